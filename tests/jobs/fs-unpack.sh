# Unpacks $packages as a package manager does, and compares; makes a repository of that, clones and checks it.
# Full paths, since the shell prefers its own dpkg, tar and diff.
export HOME=/tmp PERL5LIB=
mkdir /mnt/shared
mount -t virtiofs shared /mnt/shared
system=/mnt/shared/system
mkdir -p "$system/var/lib/dpkg/info" "$system/var/lib/dpkg/updates"
: >"$system/var/lib/dpkg/status"
debs=
for package in $packages; do
    debs="$debs $(echo /guest/debs/"$package"*.deb)"
done
# This root leaves documentation out; the guest's does not.
/usr/bin/dpkg --root="$system" --path-include='/usr/share/*' --force-bad-path --force-depends \
    --unpack $debs >/dev/null
echo "result files $(find "$system" | wc -l)"

# Contents against the checksums of the packages; then contents, owners, modes and times against the archives.
sync
echo 3 >/proc/sys/vm/drop_caches
wrong=$(/usr/bin/dpkg --root="$system" --force-bad-path --verify)
[ -z "$wrong" ] || { echo "$wrong"; exit 1; }
for package in $debs; do
    /usr/bin/dpkg-deb --fsys-tarfile "$package" | /usr/bin/tar --compare --directory="$system" --file=-
done

# Every hard case of a source tree at once: many small files, renames over others, locks, packs in place.
git config --global user.name guest
git config --global user.email guest@example.com
git config --global safe.directory '*'
git config --global init.defaultBranch main
cd "$system"
git init -q
git add usr
git commit -q -m everything
git clone -q "file://$system" /mnt/shared/clone
cd /mnt/shared/clone
git fsck --full --strict --no-progress 2>&1
git repack -q -a -d
git checkout -q -b other
git rm -q -r usr/share
git commit -q -m fewer
git checkout -q main
[ -z "$(git status --porcelain)" ]
git fsck --full --strict --no-progress 2>&1
cd /mnt/shared
/usr/bin/diff -r --no-dereference system/usr clone/usr
rm -rf system clone
[ -z "$(ls /mnt/shared)" ]
cd /
umount /mnt/shared
