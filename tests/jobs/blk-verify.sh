# Writes the disk with checksums and reads them back; the disk's daemon may come and go meanwhile.
echo "writing now"
fio --name=verify --filename=/dev/vda --rw=randwrite --bs=16k --size=96M --direct=1 --ioengine=libaio \
    --iodepth=16 --rate_iops=1500 --verify=crc32c --verify_fatal=1 --do_verify=1 --eta=never --output=/tmp/fio
echo "result verified $(grep -c 'err= 0' /tmp/fio)"
