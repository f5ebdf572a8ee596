//! The system calls that the proxy makes once it serves, beyond those of the session.

use outboard_common::sandbox::seccomp::{Rule, allow, allow_if, argument_is};

/// Dialling services, and answering clients; bytes go by `recvmsg` and `sendmsg`, or by `readv` and
/// `writev` for descriptors that were passed.
pub const VSOCK: &[Rule] = &[
    allow_if(libc::SYS_socket, &[argument_is(0, AF_UNIX)]),
    allow(libc::SYS_connect),
    // An empty message and the end of a seqpacket socket read alike: the bytes behind tell.
    allow_if(libc::SYS_ioctl, &[argument_is(1, FIONREAD)]),
    // Listening sockets are removed at the end.
    allow(libc::SYS_unlinkat),
    #[cfg(target_arch = "x86_64")]
    allow(libc::SYS_unlink),
];

/// Forwarding to another CID of the host's kernel.
pub const FORWARD: &[Rule] =
    &[allow_if(libc::SYS_socket, &[argument_is(0, AF_VSOCK)]), allow(libc::SYS_connect)];

const FIONREAD: u32 = 0x541b;
const AF_UNIX: u32 = 1;
const AF_VSOCK: u32 = 40;
