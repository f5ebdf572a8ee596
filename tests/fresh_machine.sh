#!/usr/bin/env bash
# Runs commands of this project as a newcomer does, on a Debian machine that has nothing yet: an image with apt,
# sudo and git alone, a clone of the last commit, and no tool, cache or setting of the machine it runs on.
# Needs root, mmdebstrap and util-linux. The first failing command's status is the script's.
set -euo pipefail

usage() {
    cat <<'TEXT'
tests/fresh_machine.sh [OPTION]... [COMMAND]...

COMMAND is a line for a shell in the clone; without one: './x demo' and './x test'.

  --suite NAME          the Debian release (forky); MIRROR is $OUTBOARD_MIRROR, or what apt uses here
  --dir DIR             where the image is; kept, and used again if it is there (default: a temporary one)
  --user                run the commands as a user who may use sudo, not as root
  --no-sudo             run them as a user who may not
  --without DEVICE      leave out /dev/kvm, /dev/net/tun, /dev/fuse or /dev/loop: kvm, tun, fuse, loop
  --offline             a machine without a network (for what is needed from outside, use --dir twice)
  --disk SIZE           a disk of this size only, like 2G
  --overlay DIR         files to lay over the image, like etc/apt/apt.conf.d/50proxy or root/.cargo/config.toml
  --bind FROM:TO        a directory of this machine in the image, like a Rust toolchain at /usr/local
TEXT
}

say() { printf 'fresh machine: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

suite=forky dir='' account=root offline='' disk='' overlay=''
without=() binds=()
while [ $# -gt 0 ]; do
    case $1 in
        --user) account=newcomer ;;
        --no-sudo) account=guest ;;
        --offline) offline=--net ;;
        --help) usage && exit ;;
        --suite | --dir | --without | --disk | --overlay | --bind)
            [ $# -gt 1 ] || fail "$1 needs a value"
            case $1 in
                --suite) suite=$2 ;;
                --dir) dir=$2 ;;
                --without) without+=("$2") ;;
                --disk) disk=$2 ;;
                --overlay) overlay=$2 ;;
                --bind) binds+=("$2") ;;
            esac
            shift
            ;;
        --*) usage >&2 && exit 2 ;;
        *) break ;;
    esac
    shift
done
[ $# -gt 0 ] || set -- './x demo' './x test'
[ "$(id -u)" = 0 ] || fail 'run it as root: it makes file systems and devices'
command -v mmdebstrap >/dev/null || fail 'mmdebstrap is missing: apt-get install mmdebstrap'
top=$(cd "$(dirname "$0")/.." && pwd)

# Everything that is mounted is mounted in a name space that ends with this script.
if [ -z "${FRESH_INSIDE:-}" ]; then
    if [ -z "$dir" ]; then
        dir=$(mktemp -d)
        trap 'rm -rf "$dir"' EXIT
    fi
    mkdir -p "$dir"
    if [ ! -e "$dir/image/etc/debian_version" ]; then
        mirror=${OUTBOARD_MIRROR:-$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
            sed -n '/security/d; s/^Debian //p' | head -n1)}
        [ -n "$mirror" ] || fail 'apt has no Debian mirror here: set OUTBOARD_MIRROR'
        say "making an image of Debian $suite"
        rm -rf "$dir/image"
        mmdebstrap --quiet --variant=minbase --include=git,sudo,ca-certificates \
            --aptopt='Acquire::Check-Valid-Until "false"' "$suite" "$dir/image" "$mirror"
        # A machine that was just started has no package lists.
        rm -rf "$dir"/image/var/lib/apt/lists/*
        chroot "$dir/image" useradd --create-home --shell /bin/bash newcomer
        chroot "$dir/image" useradd --create-home --shell /bin/bash guest
        echo 'newcomer ALL=(ALL) NOPASSWD: ALL' >"$dir/image/etc/sudoers.d/newcomer"
    fi
    # As --net has an interface of its own, nothing of this machine's network is seen.
    # shellcheck disable=SC2086
    FRESH_INSIDE=$dir FRESH_ACCOUNT=$account FRESH_DISK=$disk FRESH_OVERLAY=$overlay \
        FRESH_WITHOUT=${without[*]:-} FRESH_BINDS=${binds[*]:-} \
        unshare --mount --pid --fork --kill-child --uts --ipc $offline \
        bash "$0" "$@" || exit
    exit
fi

image=$FRESH_INSIDE/image
mount --make-rprivate /
if [ -n "$FRESH_DISK" ]; then
    # A small disk: the changes go there, and are gone afterwards.
    mkdir -p "$FRESH_INSIDE"/{small,merged}
    mount -t tmpfs -o "size=$FRESH_DISK" tmpfs "$FRESH_INSIDE/small"
    mkdir "$FRESH_INSIDE"/small/{upper,work}
    mount -t overlay overlay "$FRESH_INSIDE/merged" \
        -o "lowerdir=$image,upperdir=$FRESH_INSIDE/small/upper,workdir=$FRESH_INSIDE/small/work"
    image=$FRESH_INSIDE/merged
else
    mount --bind "$image" "$image"
fi
hostname fresh
[ ! -e /etc/resolv.conf ] || cp -L /etc/resolv.conf "$image/etc/resolv.conf"
printf '127.0.0.1 localhost fresh\n' >"$image/etc/hosts"
[ -z "$FRESH_OVERLAY" ] || cp -rT "$FRESH_OVERLAY" "$image"
mount -t proc proc "$image/proc"
mount --rbind /sys "$image/sys"
mount -t tmpfs -o mode=755 tmpfs "$image/dev"
mkdir -p "$image"/dev/{pts,shm,net}
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$image/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$image/dev/shm"
ln -s pts/ptmx "$image/dev/ptmx"
ln -s /proc/self/fd "$image/dev/fd"
for fd in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${fd%:*}" "$image/dev/${fd#*:}"; done
# node NAME TYPE MAJOR MINOR MODE
node() { mknod -m "$5" "$image/dev/$1" "$2" "$3" "$4"; }
node null c 1 3 666
node zero c 1 5 666
node full c 1 7 666
node random c 1 8 666
node urandom c 1 9 666
node tty c 5 0 666
has() { case " $FRESH_WITHOUT " in *" $1 "*) return 1 ;; esac; }
has kvm && [ -e /dev/kvm ] && node kvm c 10 232 660
has tun && [ -e /dev/net/tun ] && node net/tun c 10 200 666
has fuse && [ -e /dev/fuse ] && node fuse c 10 229 666
if has loop && [ -e /dev/loop-control ]; then
    node loop-control c 10 237 660
    for number in {0..15}; do node "loop$number" b 7 "$number" 660; done
fi
for bind in $FRESH_BINDS; do
    mkdir -p "$image/${bind#*:}"
    mount --rbind "${bind%%:*}" "$image/${bind#*:}"
done

home=/home/$FRESH_ACCOUNT
[ "$FRESH_ACCOUNT" != root ] || home=/root
git -c safe.directory="$top" -C "$top" bundle create --quiet "$image/srv/outboard.bundle" HEAD
mount -t tmpfs tmpfs /mnt # out of the way of what is unmounted below
cd "$image"
# Not chroot: a process with another root than its name space's may make no user name spaces.
pivot_root . .
umount -l .
cd /
as() {
    env -i HOME="$home" TERM="${TERM:-dumb}" LANG=C USER="$FRESH_ACCOUNT" \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        setpriv --reuid "$FRESH_ACCOUNT" --regid "$FRESH_ACCOUNT" --init-groups bash -c "$1"
}
left() { # What a command must not leave behind.
    ls -A /tmp /var/tmp /dev/shm /run
    cut -d' ' -f2 /proc/mounts
    # Those that run; an ended one waits for its parent to look.
    sed -nE '/^[0-9]+ \((bash|sed|diff|unshare)\)/d; s/^[0-9]+ \((.*)\) [^Z] .*/\1/p' /proc/[0-9]*/stat 2>/dev/null
    ls /sys/class/net
}
as 'rm -rf ~/outboard && git clone --quiet -c advice.detachedHead=false /srv/outboard.bundle ~/outboard'
status=0
for command in "$@"; do
    say "$FRESH_ACCOUNT: $command"
    before=$(left)
    begin=$SECONDS
    ended=0
    as "cd ~/outboard && $command" || ended=$?
    say "$command: ended with $ended after $((SECONDS - begin)) s"
    [ "$status" != 0 ] || status=$ended
    sleep 1 # for those that are about to end
    diff <(echo "$before") <(left) >&2 && say 'nothing is left behind' || say 'the lines above are left behind'
done
exit "$status"
