# Carries one file through all four devices: from the shared directory to the disk, from there to the
# host over the network and over vsock, and back into the shared directory.
mkdir /mnt/shared /mnt/disk
mount -t virtiofs shared /mnt/shared
mkfs.ext4 -q -F /dev/vda
mount -t ext4 /dev/vda /mnt/disk
cp /mnt/shared/from-host /mnt/disk/copy
umount /mnt/disk
e2fsck -fn /dev/vda
mount -t ext4 /dev/vda /mnt/disk

ip address add "$GUEST_ADDRESS/24" dev eth0
ip link set eth0 up
socat -u -b 65536 OPEN:/mnt/disk/copy "TCP:$HOST_ADDRESS:5000"
socat -u -b 65536 OPEN:/mnt/disk/copy VSOCK-CONNECT:2:1234
cp /mnt/disk/copy /mnt/shared/from-guest
sync
umount /mnt/disk
umount /mnt/shared

echo "result disk_queues $(ls /sys/block/vda/mq | wc -l)"
echo "result net_queues $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)"
