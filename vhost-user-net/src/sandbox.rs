//! The daemon's sandbox: what it may still do once its interface and sockets are open.
//!
//! Frames go through descriptors that are open already. No path is within reach but the directories of
//! the sockets and of the capture file. CAP_NET_ADMIN stays only where an operator may change the MTU
//! through the control socket.

use std::path::{Path, PathBuf};

use outboard_common::cli::SandboxArgs;
use outboard_common::sandbox::landlock::{Access, PathRules};
use outboard_common::sandbox::namespaces::Namespace;
use outboard_common::sandbox::seccomp::lists::{
    BASE, DIAL, IO_URING, LISTEN, SHARED_MEMORY, SOCKETS,
};
use outboard_common::sandbox::seccomp::{Filter, Rule, allow, allow_if, argument_is};
use outboard_common::sandbox::{CapabilitySet, Plan, SandboxError, enter};

use crate::sys;

/// What interfaces need beside frames: see `sys`.
const INTERFACES: &[Rule] = &[
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::TUNGETIFF)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::TUNSETOFFLOAD)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::TUNSETVNETHDRSZ)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::TUNSETVNETLE)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::TUNSETQUEUE)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::TUNSETCARRIER)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::SIOCGIFNAME)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::SIOCGIFMTU)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::SIOCSIFMTU)]),
    allow_if(libc::SYS_ioctl, &[argument_is(1, sys::SIOCSIFHWADDR)]),
    // The size of guest memory's file: `File::metadata`.
    allow(libc::SYS_statx),
];

/// The capture file's rotation.
const CAPTURE: &[Rule] = &[allow(libc::SYS_openat), allow(libc::SYS_renameat)];

/// Descriptors: for each of many queues a ring, an epoll and three event descriptors.
const OPEN_FILES: u64 = 4096;

/// What the sandbox must leave open.
#[derive(Debug)]
pub struct Needs<'a> {
    /// Paths of all sockets that were made or will be dialled.
    pub sockets: Vec<&'a Path>,
    /// The capture file.
    pub capture: Option<&'a Path>,
    /// The MTU may change.
    pub net_admin: bool,
}

/// Closes the sandbox.
///
/// # Errors
/// A stage that is required cannot be done.
pub fn close(args: &SandboxArgs, needs: &Needs<'_>) -> Result<(), SandboxError> {
    if args.no_sandbox {
        return Ok(());
    }
    let mut paths = PathRules::none();
    for socket in &needs.sockets {
        paths = paths.allow(directory(socket), Access::Sockets);
    }
    if let Some(capture) = needs.capture {
        paths = paths.allow(directory(capture), Access::Everything);
    }
    let capture = if needs.capture.is_some() { CAPTURE } else { &[] };
    let lists = [BASE, SOCKETS, DIAL, LISTEN, IO_URING, SHARED_MEMORY, INTERFACES, capture];
    let none = CapabilitySet::empty();
    enter(&Plan {
        open_files: OPEN_FILES,
        namespaces: &[Namespace::Network, Namespace::Ipc, Namespace::Uts],
        capabilities: if needs.net_admin { CapabilitySet::NET_ADMIN } else { none },
        paths,
        syscalls: Filter::of(&lists),
        seccomp: args.seccomp.seccomp,
    })
}

fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}
