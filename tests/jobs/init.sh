#!/bin/busybox sh
# The first process of every test guest: makes the usual file systems, loads the drivers, runs
# the job and says how it ended. A console without the last line is a crashed guest.
export PATH=/usr/sbin:/usr/bin:/usr/lib/busybox HOME=/root TERM=linux
alias mount='/bin/busybox mount'

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /mnt
echo 1 >/proc/sys/kernel/printk

. /job/variables
for module in /guest/"$GUEST"/*.ko; do
    insmod "$module" || echo "init: no driver $module"
done
ip link set lo up

echo "init: job starts at $(cut -d' ' -f1 /proc/uptime) s"
(
    set -eu
    . /job/job.sh
)
echo "init: job ended with $?"
poweroff -f
