//! From names to nodes and from nodes to fds.

use std::ffi::CStr;
use std::hash::Hasher;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use fuse_backend_rs::api::filesystem::Entry;
use rustix::fs::{Mode, OFlags};

use super::sys::{self, FdName, RawHandle};
use super::{PassthroughFs, birth_of, component, errno, key_of};
use crate::inode_store::{Handle, Key, NewNode, NodeFd, NodeInfo};

/// `fuse_attr.flags`: the root of a submount (FUSE_ATTR_SUBMOUNT).
pub(super) const ATTR_SUBMOUNT: u32 = 1 << 0;

/// The file type in the mode of `stat`.
#[inline]
pub(super) fn type_of(stat: &libc::statx) -> u32 {
    u32::from(stat.stx_mode) & libc::S_IFMT
}

/// Whether a failed open may succeed once fds are free.
fn out_of_fds(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

impl PassthroughFs {
    /// LOOKUP.
    pub(super) fn do_lookup(&self, parent: u64, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        let dir = self.node_fd(parent)?;
        let stat = sys::statx(dir.as_fd(), name, 0, sys::STATX_MASK)?;
        self.entry(parent, dir.as_fd(), name, stat)
    }

    /// The entry for `name` in `dir`, which is node `parent`, just found to be `stat`: counts a lookup.
    #[inline]
    pub(super) fn entry(
        &self,
        parent: u64,
        dir: BorrowedFd<'_>,
        name: &CStr,
        mut stat: libc::statx,
    ) -> io::Result<Entry> {
        let (key, birth) = (key_of(&stat), birth_of(&stat));
        // A node that is held open has birth 0: its number cannot become another inode's.
        let held = || self.inodes.look_up(key, 0);
        let known = if birth == 0 { held() } else { self.inodes.look_up(key, birth).or_else(held) };
        let id = match known {
            Some(id) => id,
            None => {
                let id = self.adopt(parent, dir, name, &mut stat)?;
                self.recent.note(id, parent, name);
                id
            }
        };
        Ok(self.entry_of(id, &stat))
    }

    /// The reply for a node just looked up.
    #[inline]
    pub(super) fn entry_of(&self, id: u64, stat: &libc::statx) -> Entry {
        Entry {
            inode: id,
            generation: 0,
            attr: self.guest_stat(stat),
            attr_flags: self.flags_of(id, type_of(stat))
                | self.dax_flag(id, type_of(stat), stat.stx_size),
            attr_timeout: self.timeout,
            entry_timeout: self.timeout,
        }
    }

    /// The `fuse_attr` flags of a node.
    #[inline]
    pub(super) fn flags_of(&self, id: u64, file_type: u32) -> u32 {
        if file_type != libc::S_IFDIR || !self.config.announce_submounts {
            return 0;
        }
        match self.inodes.kind(id) {
            Some((_, true)) => ATTR_SUBMOUNT,
            _ => 0,
        }
    }

    /// Makes a node for an inode that may be unknown. `stat` becomes what was adopted, if `name` is
    /// another inode by now. An empty `name` means `dir` itself.
    #[cold]
    pub(super) fn adopt(
        &self,
        parent: u64,
        dir: BorrowedFd<'_>,
        name: &CStr,
        stat: &mut libc::statx,
    ) -> io::Result<u64> {
        let mut key = key_of(stat);
        let mut handle = self.mounts.acquire(dir, name, key)?;
        let mut fd = None;
        if handle == Handle::None {
            let pinned = self.with_spare_fds(|| open_path(dir, name));
            let pinned = pinned.and_then(|fd| self.for_guest(fd)).inspect_err(|_| {
                self.mounts.release(key.mount);
            })?;
            let found = sys::statx(pinned.as_fd(), c"", 0, sys::STATX_MASK);
            *stat = found.inspect_err(|_| self.mounts.release(key.mount))?;
            if key_of(stat).mount != key.mount {
                self.mounts.release(key.mount);
                key = key_of(stat);
                handle = self.mounts.acquire(pinned.as_fd(), c"", key)?;
            }
            key = key_of(stat);
            fd = Some(NodeFd::new(pinned));
        }
        let birth_ns = identity_birth(stat, &handle);
        if let Some(id) = self.inodes.look_up(key, birth_ns) {
            self.mounts.release(key.mount);
            return Ok(id);
        }
        let file_type = type_of(stat);
        let submount = file_type == libc::S_IFDIR
            && self.inodes.info(parent).is_some_and(|parent| numbers_anew(parent.key, key));
        let verified = fd.is_some();
        let info = NodeInfo { key, birth_ns, file_type, submount, verified, handle };
        match self.inodes.insert(NewNode { info, fd }) {
            Some((id, true)) => Ok(id),
            Some((id, false)) => {
                self.mounts.release(key.mount);
                Ok(id)
            }
            None => {
                self.mounts.release(key.mount);
                Err(errno(libc::ENOMEM))
            }
        }
    }

    /// FORGET.
    pub(super) fn do_forget(&self, id: u64, count: u64) {
        if let Some(key) = self.inodes.forget(id, count) {
            self.mounts.release(key.mount);
        }
    }

    /// An `O_PATH` fd of a node.
    #[inline]
    pub(super) fn node_fd(&self, id: u64) -> io::Result<NodeFd> {
        match self.inodes.fd(id) {
            Some(fd) => Ok(fd),
            None => Ok(self.reopen(id)?.0),
        }
    }

    /// Opens a node again that has no fd, and makes sure it is the same inode; the attributes are those by
    /// which it did.
    #[cold]
    fn reopen(&self, id: u64) -> io::Result<(NodeFd, Option<libc::statx>)> {
        let info = self.inodes.info(id).ok_or(errno(libc::ESTALE))?;
        let fd = self.open_handle(id, &info, libc::O_PATH)?;
        let mut attributes = None;
        if !info.verified {
            let stat = sys::statx(fd.as_fd(), c"", 0, sys::STATX_MASK)?;
            let same = key_of(&stat) == info.key
                && (birth_of(&stat) == info.birth_ns || info.birth_ns >> 63 == 1);
            if !same {
                self.inodes.detach(id);
                return Err(errno(libc::ESTALE));
            }
            attributes = Some(stat);
        }
        Ok((self.inodes.set_fd(id, NodeFd::new(fd)), attributes))
    }

    /// `statx(2)` of a node, with nothing in `mask` that is not in [`sys::STATX_MASK`].
    #[inline]
    pub(super) fn statx_node(&self, id: u64, flags: i32, mask: u32) -> io::Result<libc::statx> {
        match self.inodes.fd(id) {
            Some(fd) => sys::statx(fd.as_fd(), c"", flags, mask),
            None => self.statx_cold(id, flags, mask),
        }
    }

    /// As [`Self::statx_node`], of a node without an fd.
    pub(super) fn statx_cold(&self, id: u64, flags: i32, mask: u32) -> io::Result<libc::statx> {
        if let Some(stat) = self.statx_by_name(id, flags) {
            return Ok(stat);
        }
        match self.reopen(id)? {
            (_, Some(stat)) if flags == 0 => Ok(stat),
            (fd, _) => sys::statx(fd.as_fd(), c"", flags, mask),
        }
    }

    /// `statx(2)` of a node by the name under which it was just found, if what is there is that inode still.
    fn statx_by_name(&self, id: u64, flags: i32) -> Option<libc::statx> {
        self.recent.take(id, |parent, name| {
            let (key, birth_ns) = self.inodes.identity(id)?;
            let dir = self.inodes.fd(parent)?;
            let stat = sys::statx(dir.as_fd(), name, flags, sys::STATX_MASK).ok()?;
            // Without a birth time, a later inode with the same number looks the same.
            let same = birth_ns != 0 && (key_of(&stat), birth_of(&stat)) == (key, birth_ns);
            same.then_some(stat)
        })
    }

    fn open_handle(&self, id: u64, info: &NodeInfo, flags: i32) -> io::Result<OwnedFd> {
        let (kind, bytes) = info.handle.parts().ok_or(errno(libc::ESTALE))?;
        let mount = self.mounts.get(info.key.mount).ok_or(errno(libc::ESTALE))?;
        let mount_fd = mount.fd().ok_or(errno(libc::ESTALE))?;
        let raw = RawHandle::new(kind, bytes);
        let opened = self.with_spare_fds(|| sys::open_by_handle(mount_fd, &raw, flags));
        opened.inspect_err(|error| {
            if error.raw_os_error() == Some(libc::ESTALE) {
                // The inode is gone; its number will be another's.
                self.inodes.detach(id);
            }
        })
    }

    /// Opens the contents of a node: a regular file or a directory, nothing else.
    pub(super) fn open_node(&self, id: u64, flags: i32) -> io::Result<OwnedFd> {
        let (file_type, _) = self.inodes.kind(id).ok_or(errno(libc::ESTALE))?;
        if file_type != libc::S_IFREG && file_type != libc::S_IFDIR {
            return Err(errno(libc::EBADF));
        }
        let fixed = libc::O_NOFOLLOW | libc::O_CREAT | libc::O_EXCL | libc::O_NOCTTY;
        let flags = (flags & !fixed) | libc::O_CLOEXEC;
        if self.inodes.fd(id).is_none() {
            let info = self.inodes.info(id).ok_or(errno(libc::ESTALE))?;
            if info.verified && info.handle != Handle::None {
                return self.open_handle(id, &info, flags);
            }
        }
        let fd = self.node_fd(id)?;
        self.reopen_fd(fd.as_fd(), flags)
    }

    /// Opens again what `fd` refers to.
    pub(super) fn reopen_fd(&self, fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
        let name = FdName::new(fd);
        let flags = OFlags::from_bits_retain(flags.cast_unsigned()) | OFlags::CLOEXEC;
        self.with_spare_fds(|| {
            Ok(rustix::fs::openat(self.proc_fd(), name.as_c_str(), flags, Mode::empty())?)
        })
    }

    /// Runs `open`, and again with the fds of all cooled nodes free if there was none left.
    pub(super) fn with_spare_fds<T>(&self, open: impl Fn() -> io::Result<T>) -> io::Result<T> {
        match open() {
            Err(error) if out_of_fds(&error) && self.inodes.cool_all() > 0 => open(),
            result => result,
        }
    }

    /// `fd`, opened for the guest to keep, unless it is one of the last that are free.
    ///
    /// # Errors
    /// `ENFILE`: the guest has its share of descriptors.
    #[inline]
    pub(super) fn for_guest(&self, fd: OwnedFd) -> io::Result<OwnedFd> {
        // The kernel gives the lowest free number, so a high one says that all below are in use.
        if fd.as_raw_fd() < self.config.guest_fds { Ok(fd) } else { self.lower(fd) }
    }

    #[cold]
    fn lower(&self, fd: OwnedFd) -> io::Result<OwnedFd> {
        if self.inodes.cool_all() > 0
            && let Ok(lower) = rustix::io::fcntl_dupfd_cloexec(&fd, 0)
            && lower.as_raw_fd() < self.config.guest_fds
        {
            return Ok(lower);
        }
        outboard_common::warn_limited!(
            "the guest has as many files open as it can: {} descriptors (see --rlimit-nofile)",
            self.config.guest_fds
        );
        Err(errno(libc::ENFILE))
    }

    /// Notes that `stat`, just removed from a directory, may have lost its last name: the next inode
    /// with its number is another one.
    pub(super) fn forget_identity(&self, stat: &libc::statx) {
        if type_of(stat) != libc::S_IFDIR && stat.stx_nlink > 1 {
            return;
        }
        if let Some(id) = self.inodes.peek(key_of(stat), birth_of(stat)) {
            self.inodes.detach(id);
        }
    }
}

/// Whether inode numbers below the directory `key` have nothing to do with those of its parent: it is the
/// root of a mount, or of a subvolume, which btrfs gives a device number of its own on the same mount.
fn numbers_anew(parent: Key, key: Key) -> bool {
    (parent.mount, parent.dev) != (key.mount, key.dev)
}

/// An `O_PATH` fd of `name` in `dir`, or of `dir` itself.
fn open_path(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    if name.is_empty() {
        return Ok(rustix::io::fcntl_dupfd_cloexec(dir, 0)?);
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

/// What tells an inode from a later one with the same number: its birth time, or, where the file system
/// keeps none, a digest of its handle. An inode that we hold open needs neither (and may change the
/// first, when an overlay copies it up).
pub(super) fn identity_birth(stat: &libc::statx, handle: &Handle) -> u64 {
    let Some((kind, bytes)) = handle.parts() else { return 0 };
    match birth_of(stat) {
        0 => {
            let mut digest = std::hash::DefaultHasher::new();
            digest.write_i32(kind);
            digest.write(bytes);
            digest.finish() | (1 << 63)
        }
        birth => birth,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_and_subvolumes_number_their_inodes_anew() {
        let here = Key { ino: 256, mount: 7, dev: 40 };
        assert!(!numbers_anew(here, Key { ino: 257, ..here }));
        assert!(numbers_anew(here, Key { mount: 8, ..here }));
        assert!(numbers_anew(here, Key { dev: 41, ..here }), "a subvolume");
    }
}
