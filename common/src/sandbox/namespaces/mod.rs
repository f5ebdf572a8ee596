//! Namespaces: a network without interfaces, a root directory that holds nothing else.
//!
//! # Theory of operation
//! [`unshare`] is for daemons that only shed what they do not use. Without the privilege to make
//! namespaces it makes a user namespace first, in which this user is mapped to itself, so that file
//! permissions stay what they were.
//!
//! [`root::enter`] is for a daemon that serves a directory: it makes that directory its root, in
//! namespaces of its own, with the user ids mapped if asked to. A PID namespace takes effect in a
//! child, so the process forks: the child serves, and the parent only passes on signals and the
//! child's end (see [`supervisor`]).

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::{getegid, geteuid};
use rustix::thread::UnshareFlags;

use super::{Outcome, StageError};

pub mod id_map;
pub mod root;
mod supervisor;

pub use supervisor::deliver_signals;

use id_map::IdMap;

/// A kind of namespace that a daemon can do without the outside of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespace {
    /// Network interfaces and abstract Unix sockets. Sockets that exist go on working.
    Network,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// The host's name.
    Uts,
    /// Mounts: what is mounted outside later still appears, what is mounted inside stays inside.
    Mount,
}

impl Namespace {
    fn flag(self) -> UnshareFlags {
        match self {
            Self::Network => UnshareFlags::NEWNET,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Uts => UnshareFlags::NEWUTS,
            Self::Mount => UnshareFlags::NEWNS,
        }
    }
}

/// Leaves the outside's namespaces of these kinds.
///
/// # Errors
/// [`StageError::System`] when that is forbidden, as it is in many containers.
pub fn unshare(namespaces: &[Namespace]) -> Result<Outcome, StageError> {
    let flags = namespaces.iter().fold(UnshareFlags::empty(), |all, kind| all | kind.flag());
    if flags.is_empty() {
        return Ok(Outcome::Applied);
    }
    match unshare_flags(flags) {
        Ok(()) => {}
        Err(Errno::PERM) => {
            let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
            unshare_flags(flags | UnshareFlags::NEWUSER)
                .map_err(StageError::system("leave the namespaces of the system"))?;
            write_own_maps(IdMap::same(uid), IdMap::same(gid))?;
        }
        Err(error) => {
            return Err(StageError::system("leave the namespaces of the system")(error));
        }
    }
    if flags.contains(UnshareFlags::NEWNS) {
        keep_mounts_inside()?;
    }
    Ok(Outcome::Applied)
}

/// `unshare` without `CLONE_FILES`, the one flag that needs care.
#[allow(unsafe_code, reason = "the safe wrapper is deprecated because of CLONE_FILES")]
fn unshare_flags(flags: UnshareFlags) -> Result<(), Errno> {
    debug_assert!(!flags.contains(UnshareFlags::FILES));
    // SAFETY: only CLONE_FILES, with which threads stop sharing descriptors, can do harm.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Lets mounts of the outside appear here, and none from here outside.
fn keep_mounts_inside() -> Result<(), StageError> {
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(StageError::system("keep mounts to this mount namespace"))
}

/// Maps one user and one group in a user namespace just made; that needs no privilege.
fn write_own_maps(uid: IdMap, gid: IdMap) -> Result<(), StageError> {
    let write = || -> io::Result<()> {
        // Without this the group could be used to drop out of a group that a file excludes.
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", uid.to_string())?;
        fs::write("/proc/self/gid_map", gid.to_string())
    };
    write().map_err(StageError::system("map this user in its own user namespace"))
}
