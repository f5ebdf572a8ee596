# Reads, maps, grows and shrinks files through the DAX window; SUMS was made on the host.
mkdir -p /mnt/shared
mount -t virtiofs -o "dax=$MODE" shared /mnt/shared
cd /mnt/shared
sha256sum -c sums
echo "result cached_kib $(sed -n 's/^Cached: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
# A file that ends in a page, and one whose end moves: every size must read back right.
printf 'first line\n' >growing
for n in 1 2 3 4 5 6 7 8; do
    head -c 1500 /dev/zero | tr '\0' "$n" >>growing
    tail -c 3 growing | grep -q "^$n$n$n$"
    [ "$(wc -c <growing)" = $((11 + n * 1500)) ]
done
[ "$(head -n 1 growing)" = 'first line' ]
truncate -s 5000 growing
[ "$(tail -c 1 growing)" = 4 ]
truncate -s 9000 growing
[ "$(tail -c 4000 growing | tr -d '\0' | wc -c)" = 0 ]
printf 'tail' >>growing
sha256sum growing >growing.sum
# Written through a shared mapping in random order, and read back through it; the host compares.
fio --name=m --filename=mapped --size=4M --bs=4k --ioengine=mmap --rw=randwrite --fsync=64 --thread \
    --verify=crc32c --verify_fatal=1 --verify_state_save=0 --minimal >/dev/null
sha256sum mapped >mapped.sum
# A file is renamed over and removed while open.
cp small victim
exec 3<victim
mv renamed victim
sha256sum <&3 | grep -q "^$(sha256sum <small | cut -d' ' -f1)"
exec 3<&-
rm victim
# Written in place, through the window.
printf 'WRITTEN BY THE GUEST' | dd of=image bs=1 seek=3000000 conv=notrunc 2>/dev/null
printf 'ODD' | dd of=odd bs=1 seek=3145800 conv=notrunc 2>/dev/null
sync
echo ready-for-host
while [ ! -e host-is-done ]; do sleep 0.1; done
dd if=image bs=1 skip=4000000 count=19 2>/dev/null | grep -q 'WRITTEN BY THE HOST'
cd /
umount /mnt/shared
