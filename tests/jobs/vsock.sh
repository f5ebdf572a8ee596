# Runs the test's program, from the host's directory $DIR, on the guest's vsock sockets.
ulimit -n 4096
/bin/busybox mount -t hostfs -o "$DIR" none /mnt
/mnt/guest_vsock
