# Runs each of $stressors on the shared directory for $seconds, and tells how it ended.
mkdir /mnt/shared
mount -t virtiofs shared /mnt/shared
for stressor in $stressors; do
    mkdir /mnt/shared/tmp
    status=0
    stress-ng --temp-path /mnt/shared/tmp --verify --oom-avoid --timeout "$seconds" \
        --"$stressor" 2 >/tmp/log 2>&1 || status=$?
    # 2: it found something wrong; 3: this system has not what it tries; 4: too little of something.
    [ "$status" = 0 ] || grep -v 'setting to\|dispatching' /tmp/log || true
    echo "stressor $stressor $status"
    rm -rf /mnt/shared/tmp
done
[ -z "$(ls /mnt/shared)" ]
umount /mnt/shared
