//! The mounts that the guest's inodes are on: how to open their file handles, and how slow they are.
//!
//! A handle is opened relative to an fd on its mount. That fd pins the mount on the host, so it goes
//! with the last inode of the mount that the guest knows.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::{Mode, OFlags};

use super::config::InodeFileHandles;
use super::sys;
use crate::inode_store::{Handle, Key};

/// How long I/O to a file system may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Speed {
    /// It lives in memory: never waits for a device.
    Memory,
    /// A local disk: buffered writes rarely wait.
    Local,
    /// Another machine or process answers.
    Remote,
}

/// One mount.
#[derive(Debug)]
pub(super) struct Mount {
    id: u32,
    /// For opening handles; `None` if that is not possible here.
    fd: Option<OwnedFd>,
    pub(super) speed: Speed,
    nodes: AtomicUsize,
}

impl Mount {
    /// The fd that handles are opened relative to.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }
}

/// The mounts in use.
#[derive(Debug)]
pub(super) struct Mounts {
    mode: InodeFileHandles,
    list: RwLock<Vec<Arc<Mount>>>,
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

impl Mounts {
    pub(super) fn new(mode: InodeFileHandles) -> Self {
        Self { mode, list: RwLock::new(Vec::new()) }
    }

    /// The mount with this id.
    pub(super) fn get(&self, id: u32) -> Option<Arc<Mount>> {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        list.iter().find(|mount| mount.id == id).cloned()
    }

    /// Counts a node for the mount of `name` in `dir`, and returns the node's handle if it has one.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where handles are mandatory and there are none; the object went away.
    pub(super) fn acquire(&self, dir: BorrowedFd<'_>, name: &CStr, key: Key) -> io::Result<Handle> {
        let mount = self.acquire_mount(dir, name, key)?;
        let handle = self.handle(&mount, dir, name);
        if handle.is_err() {
            self.release(key.mount);
        }
        handle
    }

    /// The handle of `name` in `dir`; none where `mount` opens none.
    pub(super) fn handle(
        &self,
        mount: &Mount,
        dir: BorrowedFd<'_>,
        name: &CStr,
    ) -> io::Result<Handle> {
        if mount.fd.is_none() {
            return self.without();
        }
        match sys::name_to_handle(dir, name) {
            Ok(raw) => Ok(Handle::new(raw.kind(), raw.bytes())),
            Err(error) if sys::is_unsupported(&error) => self.without(),
            Err(error) => Err(error),
        }
    }

    fn without(&self) -> io::Result<Handle> {
        if self.mode == InodeFileHandles::Mandatory {
            return Err(errno(libc::EOPNOTSUPP));
        }
        Ok(Handle::None)
    }

    fn acquire_mount(&self, dir: BorrowedFd<'_>, name: &CStr, key: Key) -> io::Result<Arc<Mount>> {
        {
            let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(mount) = list.iter().find(|mount| mount.id == key.mount) {
                mount.nodes.fetch_add(1, Ordering::Relaxed);
                return Ok(Arc::clone(mount));
            }
        }
        let new = self.probe(dir, name, key)?;
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(mount) = list.iter().find(|mount| mount.id == key.mount) {
            mount.nodes.fetch_add(1, Ordering::Relaxed);
            return Ok(Arc::clone(mount));
        }
        let new = Arc::new(new);
        list.push(Arc::clone(&new));
        Ok(new)
    }

    /// Counts a node for mount `id`; false if that is not in use, or opens no handles.
    pub(super) fn count(&self, id: u32) -> bool {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        let Some(mount) = list.iter().find(|mount| mount.id == id && mount.fd.is_some()) else {
            return false;
        };
        mount.nodes.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// A node of mount `id` is gone.
    pub(super) fn release(&self, id: u32) {
        {
            let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
            match list.iter().find(|mount| mount.id == id) {
                Some(mount) if mount.nodes.fetch_sub(1, Ordering::Relaxed) == 1 => {}
                _ => return,
            }
        }
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        list.retain(|mount| mount.id != id || mount.nodes.load(Ordering::Relaxed) > 0);
    }

    /// Finds out about the mount of `name` in `dir`.
    fn probe(&self, dir: BorrowedFd<'_>, name: &CStr, key: Key) -> io::Result<Mount> {
        let path = rustix::fs::openat(
            dir,
            if name.is_empty() { c"." } else { name },
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let speed = speed_of(path.as_fd());
        let fd = if self.mode == InodeFileHandles::Never {
            None
        } else {
            handle_opener(dir, name, path.as_fd(), key)
        };
        Ok(Mount { id: key.mount, fd, speed, nodes: AtomicUsize::new(1) })
    }
}

/// An fd on the mount that opens handles, if a trial shows that it does. Only directories and regular
/// files are opened, since opening anything else can have effects.
fn handle_opener(
    dir: BorrowedFd<'_>,
    name: &CStr,
    path: BorrowedFd<'_>,
    key: Key,
) -> Option<OwnedFd> {
    let stat = sys::statx(path, c"", 0, sys::STATX_MASK).ok()?;
    let file_type = u32::from(stat.stx_mode) & libc::S_IFMT;
    if super::key_of(&stat).mount != key.mount
        || !(file_type == libc::S_IFDIR || file_type == libc::S_IFREG)
    {
        return None;
    }
    let raw = sys::name_to_handle(path, c"").ok()?;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let name = if name.is_empty() { c"." } else { name };
    let fd = rustix::fs::openat(dir, name, flags, Mode::empty()).ok()?;
    // Somebody may have put another object there meanwhile: look at what was opened.
    let opened = sys::statx(fd.as_fd(), c"", 0, sys::STATX_MASK).ok()?;
    if super::key_of(&opened) != super::key_of(&stat) {
        return None;
    }
    sys::open_by_handle(fd.as_fd(), &raw, libc::O_PATH).ok()?;
    Some(fd)
}

fn speed_of(fd: BorrowedFd<'_>) -> Speed {
    const MEMORY: [i64; 3] =
        [libc::TMPFS_MAGIC, 0x8584_58f6 /* ramfs */, libc::HUGETLBFS_MAGIC];
    const LOCAL: [i64; 8] = [
        libc::EXT4_SUPER_MAGIC,
        libc::XFS_SUPER_MAGIC,
        libc::BTRFS_SUPER_MAGIC,
        libc::OVERLAYFS_SUPER_MAGIC,
        libc::F2FS_SUPER_MAGIC,
        libc::MSDOS_SUPER_MAGIC,
        0xca45_1a4e, // bcachefs
        0x2fc1_2fc1, // zfs
    ];
    match rustix::fs::fstatfs(fd) {
        Ok(stat) if MEMORY.contains(&stat.f_type) => Speed::Memory,
        Ok(stat) if LOCAL.contains(&stat.f_type) => Speed::Local,
        _ => Speed::Remote,
    }
}
