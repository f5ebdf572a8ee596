# Keeps files open, appends, reads and checks while the guest is moved to another host.
mkdir /mnt/shared
mount -t virtiofs shared /mnt/shared
cd /mnt/shared
mkdir work
exec 3>>work/log 4<lines
echo "before the move" >&3
read -r line <&4
[ "$line" = "first line" ]
ln work/log work/second-name
rounds=0
: >ready
while [ ! -e moved ]; do
    # From the daemon each time, into memory that is being copied meanwhile.
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(sha256sum <big | cut -d' ' -f1)" = "$sum" ]
    rounds=$((rounds + 1))
done
echo "result rounds $rounds"
echo "after the move" >&3
read -r line <&4
[ "$line" = "second line" ]
[ "$(cat work/second-name)" = "before the move
after the move" ]
mv work/log work/renamed
mkdir new
echo "here" >new/file
rm work/second-name
[ "$(sha256sum <big | cut -d' ' -f1)" = "$sum" ]
cd /
exec 3>&- 4<&-
umount /mnt/shared
