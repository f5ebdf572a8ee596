//! Lists of system calls by purpose, for daemons to put together.
//!
//! Calls that only one processor architecture has are behind `cfg`; the newer call that replaces
//! each is always listed.

use super::{Rule, allow, allow_if, argument_bits, argument_is};

/// `PROT_EXEC` as the filter sees it.
const PROT_EXEC: u32 = 4;

/// `CLONE_THREAD`: the new task is a thread of this process.
const CLONE_THREAD: u32 = 0x0001_0000;

/// `PR_SET_NAME`: how a thread gets its name.
const PR_SET_NAME: u32 = 15;

/// `ENOSYS` and `EACCES` are the same on all architectures.
const ENOSYS: u32 = 38;
const EACCES: u32 = 13;

/// Calls that fail with this error unless a daemon lists them.
///
/// The C library opens and looks at files when nobody asked it to (CPU counts, time zones,
/// messages), and a file that cannot be opened never harms it.
pub(super) const SOFT: &[(i64, u32)] = &[
    (libc::SYS_clone3, ENOSYS),
    (libc::SYS_openat, EACCES),
    (libc::SYS_readlinkat, EACCES),
    (libc::SYS_newfstatat, EACCES),
    (libc::SYS_statx, EACCES),
    (libc::SYS_faccessat, EACCES),
    (libc::SYS_unlinkat, EACCES),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, EACCES),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_readlink, EACCES),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_access, EACCES),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, EACCES),
];

/// What the language's runtime, the C library, logging, threads and their end need.
///
/// Memory can neither be mapped nor made executable, and only threads can be started.
pub const BASE: &[Rule] = &[
    // Memory.
    allow(libc::SYS_brk),
    allow_if(libc::SYS_mmap, &[argument_bits(2, PROT_EXEC, 0)]),
    allow_if(libc::SYS_mprotect, &[argument_bits(2, PROT_EXEC, 0)]),
    allow(libc::SYS_munmap),
    allow(libc::SYS_mremap),
    allow(libc::SYS_madvise),
    // Threads: start, name, place, wait, end.
    allow_if(libc::SYS_clone, &[argument_bits(0, CLONE_THREAD, CLONE_THREAD)]),
    allow(libc::SYS_set_robust_list),
    allow(libc::SYS_rseq),
    allow_if(libc::SYS_prctl, &[argument_is(0, PR_SET_NAME)]),
    allow(libc::SYS_sched_getaffinity),
    allow(libc::SYS_sched_setaffinity),
    allow(libc::SYS_sched_yield),
    allow(libc::SYS_futex),
    allow(libc::SYS_gettid),
    allow(libc::SYS_getpid),
    allow(libc::SYS_exit),
    allow(libc::SYS_exit_group),
    // Signals: handlers and masks of threads, and `abort`.
    allow(libc::SYS_rt_sigaction),
    allow(libc::SYS_rt_sigprocmask),
    allow(libc::SYS_rt_sigreturn),
    allow(libc::SYS_sigaltstack),
    allow(libc::SYS_tgkill),
    allow(libc::SYS_restart_syscall),
    // Time and randomness; clocks are usually read without a call.
    allow(libc::SYS_clock_gettime),
    allow(libc::SYS_clock_nanosleep),
    allow(libc::SYS_nanosleep),
    allow(libc::SYS_getrandom),
    // Descriptors: log lines, event descriptors, closing.
    allow(libc::SYS_read),
    allow(libc::SYS_write),
    allow(libc::SYS_readv),
    allow(libc::SYS_writev),
    allow(libc::SYS_close),
    allow(libc::SYS_fcntl),
    allow(libc::SYS_fstat),
    allow(libc::SYS_lseek),
    allow(libc::SYS_eventfd2),
    // Waiting.
    allow(libc::SYS_ppoll),
    #[cfg(target_arch = "x86_64")]
    allow(libc::SYS_poll),
    allow(libc::SYS_epoll_create1),
    allow(libc::SYS_epoll_ctl),
    allow(libc::SYS_epoll_pwait),
    allow(libc::SYS_epoll_pwait2),
    #[cfg(target_arch = "x86_64")]
    allow(libc::SYS_epoll_wait),
];

/// Sockets that exist already: accepting, messages with descriptors, options, pairs.
///
/// What the vhost-user session, the system log and the admin sockets need.
pub const SOCKETS: &[Rule] = &[
    allow(libc::SYS_accept4),
    allow(libc::SYS_recvmsg),
    allow(libc::SYS_sendmsg),
    allow(libc::SYS_recvfrom),
    allow(libc::SYS_sendto),
    allow(libc::SYS_shutdown),
    allow(libc::SYS_getsockopt),
    allow(libc::SYS_setsockopt),
    allow(libc::SYS_getsockname),
    allow(libc::SYS_getpeername),
    allow_if(libc::SYS_socketpair, &[argument_is(0, AF_UNIX)]),
    // `set_nonblocking` of accepted sockets.
    allow_if(libc::SYS_ioctl, &[argument_is(1, FIONBIO)]),
];

/// `FIONBIO`: the standard library's way to make a socket blocking or not.
const FIONBIO: u32 = 0x5421;

/// `AF_UNIX`
const AF_UNIX: u32 = 1;

/// Dialling Unix sockets, for a daemon in client mode.
pub const DIAL: &[Rule] =
    &[allow_if(libc::SYS_socket, &[argument_is(0, AF_UNIX)]), allow(libc::SYS_connect)];

/// Making Unix sockets while running, and removing them.
pub const LISTEN: &[Rule] = &[
    allow_if(libc::SYS_socket, &[argument_is(0, AF_UNIX)]),
    allow(libc::SYS_bind),
    allow(libc::SYS_listen),
    allow(libc::SYS_unlinkat),
    #[cfg(target_arch = "x86_64")]
    allow(libc::SYS_unlink),
];

/// An io_uring per queue, made when the queue starts.
pub const IO_URING: &[Rule] = &[
    allow(libc::SYS_io_uring_setup),
    allow(libc::SYS_io_uring_enter),
    allow(libc::SYS_io_uring_register),
];

/// Guest memory and the inflight region: sharing and sizing memory files.
pub const SHARED_MEMORY: &[Rule] =
    &[allow(libc::SYS_memfd_create), allow(libc::SYS_ftruncate), allow(libc::SYS_fstatfs)];
