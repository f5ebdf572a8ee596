# The demo's guest side. Each step says its name and then its figure; a section that fails ends
# there, and the next one goes on.
# fio's terse output, version 3: fields 7 and 8 are the read bandwidth (KiB/s) and IOPS, 48 and 49 those
# of writes.
step() { echo "step $1"; }
result() { echo "result $1 $2"; }
measure() { # measure STEP FIELD FIO-OPTION...
    step "$1"
    name=$1 field=$2
    shift 2
    fio --name="$name" --output-format=terse --terse-version=3 --direct=1 "$@" >/tmp/fio
    result "$name" "$(cut -d';' -f"$field" /tmp/fio)"
}

fs() {
    step fs_files
    mkdir /mnt/shared
    mount -t virtiofs shared /mnt/shared
    [ "$(cat /mnt/shared/from-host)" = "$GREETING" ]
    mkdir /mnt/shared/many
    begin=$(now)
    for number in $(seq 1000); do : >"/mnt/shared/many/$number"; done
    result fs_files "$(per_second 1000 "$begin")"
    rm -r /mnt/shared/many
    measure fs_write 48 --filename=/mnt/shared/file --rw=write --bs=1M --size=128M
    measure fs_read 7 --filename=/mnt/shared/file --rw=read --bs=1M --size=128M --loops=4
    measure fs_random 8 --filename=/mnt/shared/file --rw=randread --bs=4k --size=128M \
        --time_based --runtime="$SECONDS_EACH"
    umount /mnt/shared
}

blk() {
    measure blk_write 48 --filename=/dev/vda --rw=write --bs=1M --ioengine=libaio --iodepth=4
    measure blk_read 7 --filename=/dev/vda --rw=read --bs=1M --ioengine=libaio --iodepth=4
    measure blk_random 8 --filename=/dev/vda --rw=randread --bs=4k --ioengine=libaio --iodepth=32 \
        --time_based --runtime="$SECONDS_EACH"
    step blk_ext4
    mkfs.ext4 -q -F /dev/vda
    mkdir /mnt/disk
    mount -t ext4 /dev/vda /mnt/disk
    dd if=/dev/urandom of=/mnt/disk/random bs=1M count=16 2>/dev/null
    before=$(sha256sum </mnt/disk/random)
    umount /mnt/disk
    e2fsck -fn /dev/vda >/dev/null 2>&1
    mount -t ext4 /dev/vda /mnt/disk
    [ "$(sha256sum </mnt/disk/random)" = "$before" ]
    umount /mnt/disk
    result blk_ext4 16
}

net() {
    step net_ping
    ip address add "$GUEST_ADDRESS/24" dev eth0
    ip link set eth0 up
    ping -q -c 20 -i 0.05 -A "$HOST_ADDRESS" >/tmp/ping
    # "round-trip min/avg/max = 0.1/0.2/0.3 ms"
    result net_ping "$(awk -F/ '/round-trip/ { print $4 * 1000 }' /tmp/ping)"
    for direction in up down; do
        step "net_$direction"
        option=
        [ $direction = up ] || option=-R
        iperf3 -c "$HOST_ADDRESS" -t "$SECONDS_EACH" -f m $option >/tmp/iperf
        # The receiver's line, which counts only what arrived.
        result "net_$direction" "$(awk '/receiver/ { print $7 }' /tmp/iperf)"
    done
}

# Measured by the host, which calls ports 5678 and 5679; a host that gave up must not be waited for.
vsock() {
    step vsock_call
    reply=$(echo "$GREETING" | socat -t5 - VSOCK-CONNECT:2:1234)
    [ "$reply" = "$GREETING" ]
    result vsock_call 1
    step vsock_up
    timeout 30 socat -u -b 65536 "OPEN:/dev/zero,readbytes=$BULK_BYTES" VSOCK-CONNECT:2:1235
    step vsock_down
    timeout 30 socat VSOCK-LISTEN:5678 SYSTEM:'dd of=/dev/null bs=64k iflag=fullblock 2>&1',nofork
    step vsock_echo
    timeout 30 socat VSOCK-LISTEN:5679 EXEC:cat,nofork
}

now() { cut -d' ' -f1 /proc/uptime; }
per_second() { awk -v count="$1" -v begin="$2" -v end="$(now)" 'BEGIN { print count / (end - begin) }'; }

status=0
set +e
for device in $DEVICES; do
    # Not in a condition: there `set -e` would have no effect inside.
    ( set -e; "$device" )
    [ $? = 0 ] || status=1
done
exit $status
