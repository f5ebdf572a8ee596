# The same reads with and without DAX, in the same guest, in turn; the page cache starts empty each time.
mkdir -p /mnt/shared
cached() { sed -n 's/^Cached: *\([0-9]*\) kB/\1/p' /proc/meminfo; }
field() { fio --output-format=terse --terse-version=3 --minimal --thread "$@" | cut -d';' -f"$FIELD"; }
for round in 1 2 3; do
    for mode in always never; do
        mount -t virtiofs -o "dax=$mode" shared /mnt/shared
        echo 3 >/proc/sys/vm/drop_caches
        before=$(cached)
        # Terse field 8: IOPS of reads; 7: KiB/s.
        FIELD=7; first=$(field --name=s --filename=/mnt/shared/image --rw=read --bs=1M --ioengine=psync --size="$SIZE")
        after=$(cached)
        FIELD=7; again=$(field --name=s --filename=/mnt/shared/image --rw=read --bs=1M --ioengine=psync --size="$SIZE")
        FIELD=8; random=$(field --name=r --filename=/mnt/shared/image --rw=randread --bs=4k --ioengine=mmap --size="$SIZE" --io_size="$SIZE")
        echo "result ${mode}_$round $first $again $random $((after - before))"
        umount /mnt/shared
    done
done
