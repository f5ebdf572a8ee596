//! The daemon's sandbox: what it may still do once its images and sockets are open.
//!
//! Nothing is opened any more, so no path is within reach but the directories of the sockets, which are
//! removed at the end (or dialled again), and no capability stays.

use std::path::{Path, PathBuf};

use outboard_common::cli::SandboxArgs;
use outboard_common::sandbox::capabilities;
use outboard_common::sandbox::landlock::{Access, PathRules};
use outboard_common::sandbox::namespaces::Namespace;
use outboard_common::sandbox::seccomp::lists::{
    BASE, DIAL, IO_URING, LISTEN, SHARED_MEMORY, SOCKETS,
};
use outboard_common::sandbox::seccomp::{Filter, Rule, allow};
use outboard_common::sandbox::{CapabilitySet, Plan, SandboxError, enter};

/// What images need beside the rings: see `store`.
const IMAGES: &[Rule] = &[
    allow(libc::SYS_pread64),
    allow(libc::SYS_pwrite64),
    allow(libc::SYS_preadv),
    allow(libc::SYS_pwritev),
    allow(libc::SYS_preadv2),
    allow(libc::SYS_pwritev2),
    allow(libc::SYS_fdatasync),
    allow(libc::SYS_fsync),
    allow(libc::SYS_fallocate),
    // The size of guest memory's file: `File::metadata`.
    allow(libc::SYS_statx),
    // BLKDISCARD and BLKZEROOUT.
    allow(libc::SYS_ioctl),
];

/// Descriptors: images twice, sockets, and for each of many queues a ring and three event descriptors.
const OPEN_FILES: u64 = 16 * 1024;

/// Closes the sandbox. `sockets` are the paths of all sockets that were made or will be dialled; guest memory
/// will be registered if `pins_memory`, which the capability to lock memory frees from its limit.
///
/// # Errors
/// A stage that is required cannot be done.
pub fn close(
    args: &SandboxArgs,
    sockets: &[PathBuf],
    pins_memory: bool,
) -> Result<(), SandboxError> {
    if args.no_sandbox {
        return Ok(());
    }
    let mut paths = PathRules::none();
    let mut directories: Vec<&Path> = sockets.iter().filter_map(|s| directory(s)).collect();
    directories.sort_unstable();
    directories.dedup();
    for directory in directories {
        paths = paths.allow(directory, Access::Sockets);
    }
    let kept = if pins_memory {
        capabilities::held(CapabilitySet::IPC_LOCK)
    } else {
        CapabilitySet::empty()
    };
    enter(&Plan {
        open_files: OPEN_FILES,
        namespaces: &[Namespace::Network, Namespace::Ipc, Namespace::Uts],
        capabilities: kept,
        paths,
        syscalls: Filter::of(&[BASE, SOCKETS, DIAL, LISTEN, IO_URING, SHARED_MEMORY, IMAGES]),
        seccomp: args.seccomp.seccomp,
    })
}

fn directory(socket: &Path) -> Option<&Path> {
    match socket.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Some(Path::new(".")),
        parent => parent,
    }
}
