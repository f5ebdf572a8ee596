# Runs the program of the test on the guest's vsock sockets.
ulimit -n 4096
"$PROGRAM"
