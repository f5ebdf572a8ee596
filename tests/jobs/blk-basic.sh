# Makes a file system on the disk, fills it, checks it, and reads the same bytes after a remount.
mkfs.ext4 -q -F /dev/vda
mkdir /mnt/disk
mount -t ext4 /dev/vda /mnt/disk
dd if=/dev/urandom of=/mnt/disk/random bs=1M count=16 2>/dev/null
before=$(sha256sum </mnt/disk/random)
umount /mnt/disk
e2fsck -fn /dev/vda
mount -t ext4 /dev/vda /mnt/disk
[ "$(sha256sum </mnt/disk/random)" = "$before" ]
rm /mnt/disk/random
fstrim -v /mnt/disk || echo "the disk has no discard"
umount /mnt/disk
echo "result queues $(ls /sys/block/vda/mq | wc -l)"
