# Runs the test's program with the words $STEP on the guest's vsock sockets.
ulimit -n 4096
/job/guest_vsock $STEP
