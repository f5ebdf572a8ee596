# Mounts the shared directory, reads what the host wrote and writes what the host will read.
mkdir /mnt/shared
mount -t virtiofs shared /mnt/shared
cd /mnt/shared
[ "$(cat from-host)" = "hello from the host" ]

echo "hello from the guest" >from-guest
mkdir -p deep/er
dd if=/dev/urandom of=deep/er/random bs=1M count=4 2>/dev/null
sync
echo 3 >/proc/sys/vm/drop_caches
mv deep/er/random deep/moved
ln -s deep/moved link
echo "result sum $(sha256sum <link | cut -d' ' -f1)"
rm link
[ "$(ls)" = "deep
from-guest
from-host" ]
cd /
umount /mnt/shared
