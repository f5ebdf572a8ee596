//! The system calls that this daemon makes, beside those every daemon makes.

use outboard_common::sandbox::seccomp::{Filter, Rule, allow, allow_if, argument_is, lists};

/// `CLONE_FS`: the thread gets its own working directory and umask.
const CLONE_FS: u32 = 0x200;

/// What the passthrough needs. Where each is made: `passthrough::sys`.
const PASSTHROUGH: &[Rule] = &[
    // Finding and opening inodes.
    allow(libc::SYS_openat),
    allow(libc::SYS_openat2),
    allow(libc::SYS_statx),
    allow(libc::SYS_newfstatat),
    allow(libc::SYS_readlinkat),
    allow(libc::SYS_name_to_handle_at),
    allow(libc::SYS_open_by_handle_at),
    allow(libc::SYS_statfs),
    allow(libc::SYS_dup),
    allow(libc::SYS_getdents64),
    allow(libc::SYS_faccessat),
    allow(libc::SYS_faccessat2),
    // Changing the tree.
    allow(libc::SYS_mkdirat),
    allow(libc::SYS_mknodat),
    allow(libc::SYS_symlinkat),
    allow(libc::SYS_linkat),
    allow(libc::SYS_unlinkat),
    allow(libc::SYS_renameat),
    allow(libc::SYS_renameat2),
    // Attributes.
    allow(libc::SYS_fchmod),
    allow(libc::SYS_fchmodat),
    allow(libc::SYS_fchownat),
    allow(libc::SYS_utimensat),
    allow(libc::SYS_getxattr),
    allow(libc::SYS_setxattr),
    allow(libc::SYS_listxattr),
    allow(libc::SYS_removexattr),
    allow(libc::SYS_fgetxattr),
    allow(libc::SYS_fsetxattr),
    allow(libc::SYS_flistxattr),
    allow(libc::SYS_fremovexattr),
    // Contents.
    allow(libc::SYS_pread64),
    allow(libc::SYS_pwrite64),
    allow(libc::SYS_preadv),
    allow(libc::SYS_preadv2),
    allow(libc::SYS_pwritev),
    allow(libc::SYS_pwritev2),
    allow(libc::SYS_fallocate),
    allow(libc::SYS_copy_file_range),
    allow(libc::SYS_fsync),
    allow(libc::SYS_fdatasync),
    allow(libc::SYS_syncfs),
    allow(libc::SYS_flock),
    // Whether a thread waited: `thread_waits`.
    allow(libc::SYS_getrusage),
    // Acting as the guest's user, each thread for itself.
    allow_if(libc::SYS_unshare, &[argument_is(0, CLONE_FS)]),
    allow(libc::SYS_fchdir),
    allow(libc::SYS_umask),
    allow(libc::SYS_setresuid),
    allow(libc::SYS_setresgid),
    allow(libc::SYS_setgroups),
    allow(libc::SYS_capget),
    allow(libc::SYS_capset),
    allow(libc::SYS_geteuid),
    allow(libc::SYS_getegid),
];

/// Everything this daemon may call.
pub(crate) fn filter() -> Filter {
    Filter::of(&[lists::BASE, lists::SOCKETS, lists::DIAL, lists::SHARED_MEMORY, PASSTHROUGH])
}
