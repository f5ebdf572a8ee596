# A shell on the guest's console with the demo's devices in place.
echo
echo "This is the guest. What is here:"
for device in $DEVICES; do
    case $device in
        fs)
            mkdir /mnt/shared
            mount -t virtiofs shared /mnt/shared
            echo "  /mnt/shared       the host's directory $SHARED_DIR" ;;
        blk) echo "  /dev/vda          the disk (mkfs.ext4 /dev/vda)" ;;
        net)
            ip address add "$GUEST_ADDRESS/24" dev eth0
            ip link set eth0 up
            echo "  eth0              $GUEST_ADDRESS; the host is $HOST_ADDRESS (iperf3 -c $HOST_ADDRESS)" ;;
        vsock)
            echo "  /dev/vsock        socat VSOCK-LISTEN:5678 EXEC:cat"
            echo "                    on the host: socat - UNIX-CONNECT:$VSOCK_PATH, then CONNECT 5678" ;;
    esac
done
echo "Leave with exit or Ctrl-D; then everything is stopped and removed."
cd /root
setsid cttyhack sh -i || true
