# A proxy that forwards to this kernel's own AF_VSOCK, which its loopback connects with itself.
insmod /usr/lib/uml/modules/*/kernel/net/vmw_vsock/vsock_loopback.ko
/job/guest_vsock forward /job/vsock-proxy
