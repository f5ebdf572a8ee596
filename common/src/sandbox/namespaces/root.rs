//! A root directory that holds the served directory and nothing else.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind_recursive, unmount};
use rustix::process::{chdir, chroot, fchdir, pivot_root};
use rustix::thread::UnshareFlags;

use super::super::StageError;
use super::id_map::{IdMaps, enter_user_namespace};
use super::{keep_mounts_inside, supervisor, unshare_flags};

/// What of /proc is still needed where there is no /proc.
#[derive(Debug)]
pub struct ProcHandles {
    /// The directory `/proc/self/fd`, to open descriptors again in another mode.
    pub self_fd: OwnedFd,
    /// `/proc/self/mountinfo`, to see what is mounted in the root.
    pub mountinfo: File,
}

/// Makes `directory` the root, in mount, PID and network namespaces of its own, and in a user
/// namespace with `ids` if given.
///
/// Forks: this function returns in the child, which is process 1 of its PID namespace. What is
/// mounted in the directory later appears inside.
///
/// # Errors
/// [`StageError`] with the first step that fails. The process must end then.
pub fn enter(directory: &Path, ids: Option<&IdMaps>) -> Result<ProcHandles, StageError> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWNET;
    match ids {
        Some(ids) => enter_user_namespace(ids, flags)?,
        None => unshare_flags(flags).map_err(StageError::system("make namespaces"))?,
    }
    supervisor::continue_in_child().map_err(StageError::system("fork into the PID namespace"))?;
    keep_mounts_inside()?;
    mount_own_proc()?;
    let proc_self = open_proc_self()?;
    pivot_into(directory)?;
    ProcHandles::open(&proc_self)
}

/// Makes `directory` the root by `chroot`, without namespaces. Needs `CAP_SYS_CHROOT`.
///
/// # Errors
/// [`StageError`] with the step that fails.
pub fn change(directory: &Path) -> Result<ProcHandles, StageError> {
    let proc_self = open_proc_self()?;
    chroot(directory).map_err(path_error("make the root", directory))?;
    chdir("/").map_err(StageError::system("change to the new root"))?;
    ProcHandles::open(&proc_self)
}

impl ProcHandles {
    /// Opens both in the new root: `mountinfo` shows what was beneath the root at its opening.
    fn open(proc_self: &OwnedFd) -> Result<Self, StageError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let self_fd = openat(proc_self, "fd", flags, Mode::empty())
            .map_err(StageError::system("open /proc/self/fd"))?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mountinfo = openat(proc_self, "mountinfo", flags, Mode::empty())
            .map_err(StageError::system("open /proc/self/mountinfo"))?;
        Ok(Self { self_fd, mountinfo: File::from(mountinfo) })
    }
}

/// The /proc that was there shows the processes outside; this one shows ours.
fn mount_own_proc() -> Result<(), StageError> {
    let flags = MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::RELATIME;
    mount("proc", "/proc", "proc", flags, None)
        .map_err(StageError::system("mount /proc for the PID namespace"))
}

/// Stays open only until the root has changed: more can be reached through it than should be.
fn open_proc_self() -> Result<OwnedFd, StageError> {
    let path = Path::new("/proc/self");
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).map_err(path_error("open", path))
}

fn pivot_into(directory: &Path) -> Result<(), StageError> {
    // A root has to be a mount: mount the directory on itself, with all that is mounted in it.
    mount_bind_recursive(directory, directory).map_err(path_error("mount", directory))?;
    let new_root =
        open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(path_error("open", directory))?;
    fchdir(&new_root).map_err(path_error("enter", directory))?;
    // With the same directory for both, the old root is stacked over the new one, so no
    // subdirectory is needed to put it in; the topmost mount at "." is then the old root.
    pivot_root(".", ".").map_err(path_error("make the root", directory))?;
    unmount(".", UnmountFlags::DETACH).map_err(StageError::system("unmount the old root"))?;
    fchdir(&new_root).map_err(path_error("enter", directory))?;
    chdir("/").map_err(StageError::system("change to the new root"))
}

fn path_error(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> StageError {
    let path = path.to_owned();
    move |error| StageError::Path { action, path, source: error.into() }
}
