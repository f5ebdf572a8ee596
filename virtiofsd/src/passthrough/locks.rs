//! Locks, kept by the host, so that guests that share a directory exclude each other.
//!
//! # Theory of operation
//! A POSIX lock belongs to a process of the guest (`owner`) and an inode, whichever fd it was set
//! through; closing any of the process's fds of that inode drops it. The host's open-file-description
//! locks belong to an open file: so each pair of inode and owner that holds locks gets an open file of
//! its own, and closing that drops them all. A BSD lock belongs to an open file of the guest, which is
//! one of ours already.
//!
//! The host's kernel waits for a lock; a signal ends the wait. Deadlocks among
//! the guest's own processes are found here ([`lock_table`](super::lock_table)).

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_backend_rs::api::filesystem::FileLock;
use rustix::fs::FlockOperation;

use super::lock_table::{Range, Ranges, Wanted, is_deadlock};
use super::{PassthroughFs, errno, sys};
use crate::fuse::LockRequest;
use crate::fuse::extension::BlockForLock;

/// `fuse_lk_in.lk_flags`: a BSD lock (FUSE_LK_FLOCK).
const LK_FLOCK: u32 = 1 << 0;

/// An inode and one of its lock owners.
pub(super) type Holder = (u64, u64);

#[derive(Debug)]
struct Held {
    fd: Arc<OwnedFd>,
    /// The guest's process, for those who ask who holds a lock.
    pid: u32,
    ranges: Ranges,
}

impl Held {
    fn new(fd: Arc<OwnedFd>, pid: u32) -> Self {
        Self { fd, pid, ranges: Ranges::default() }
    }
}

/// The locks of the guest.
#[derive(Debug, Default)]
pub(super) struct Locks {
    held: Mutex<HashMap<Holder, Held>>,
    /// What is waited for. Locked after `held` where both are.
    waiting: Mutex<Vec<Wanted>>,
    /// Size of `held`, so that FLUSH of a guest without locks takes no lock itself.
    count: AtomicUsize,
    /// Goes up when all locks are dropped: what is granted later is nobody's.
    session: AtomicU64,
}

impl Locks {
    fn held(&self) -> MutexGuard<'_, HashMap<Holder, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops all locks of `owner` on `inode`.
    pub(super) fn release_owner(&self, inode: u64, owner: u64) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut held = self.held();
        let gone = held.remove(&(inode, owner));
        self.count.store(held.len(), Ordering::Release);
        drop(held);
        drop(gone);
    }

    /// Keeps the lock just granted on `fd`, unless another open file carries the locks of `holder`.
    fn keep(&self, holder: Holder, fd: &Arc<OwnedFd>, pid: u32) -> bool {
        let mut held = self.held();
        // It is gone if the holder closed the file meanwhile, which drops the locks it had then.
        let one = held.entry(holder).or_insert_with(|| Held::new(Arc::clone(fd), pid));
        let same = Arc::ptr_eq(&one.fd, fd);
        self.count.store(held.len(), Ordering::Release);
        same
    }

    /// Notes that `holder` has locked `range`.
    fn add(&self, holder: Holder, range: Range) {
        if let Some(one) = self.held().get_mut(&holder) {
            one.ranges.add(range);
        }
    }

    /// Notes that `holder` is about to unlock `range`.
    fn remove(&self, holder: Holder, range: &Range) {
        if let Some(one) = self.held().get_mut(&holder) {
            one.ranges.remove(range);
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Wanted>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that `wanted` is waited for, until the guard is dropped.
    ///
    /// # Errors
    /// `EDEADLK` if the wait would never end.
    fn wait_for(&self, wanted: Wanted) -> io::Result<Waiting<'_>> {
        let held = self.held();
        let mut waiting = self.waiting();
        let each = |tell: &mut dyn FnMut(Holder, &Ranges)| {
            held.iter().for_each(|(holder, one)| tell(*holder, &one.ranges));
        };
        if is_deadlock(&wanted, &each, &waiting) {
            return Err(errno(libc::EDEADLK));
        }
        waiting.push(wanted);
        Ok(Waiting { locks: self, wanted })
    }

    /// Who holds locks, on which open file, and the process that asked.
    pub(super) fn list(&self) -> Vec<(Holder, Arc<OwnedFd>, u32)> {
        let held = self.held();
        held.iter().map(|(holder, one)| (*holder, Arc::clone(&one.fd), one.pid)).collect()
    }

    /// Puts the locks of a holder back, which the open file `fd` carries.
    pub(super) fn restore(&self, holder: Holder, fd: OwnedFd, pid: u32) {
        let mut held = self.held();
        held.insert(holder, Held::new(Arc::new(fd), pid));
        self.count.store(held.len(), Ordering::Release);
    }

    /// Drops all locks.
    pub(super) fn clear(&self) {
        self.session.fetch_add(1, Ordering::Release);
        let all = std::mem::take(&mut *self.held());
        self.count.store(0, Ordering::Release);
        drop(all);
    }
}

/// A lock that is waited for.
#[derive(Debug)]
struct Waiting<'a> {
    locks: &'a Locks,
    wanted: Wanted,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut waiting = self.locks.waiting();
        if let Some(at) = waiting.iter().position(|one| *one == self.wanted) {
            waiting.swap_remove(at);
        }
    }
}

/// The file is on a read-only mount, immutable, a running program, or otherwise not for writing.
fn cannot_be_written(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES | libc::EPERM | libc::ETXTBSY))
}

/// The part of the file that `lock` is about.
fn range_of(lock: &FileLock) -> Range {
    Range { start: lock.start, end: lock.end, write: lock.lock_type != libc::F_RDLCK as u32 }
}

/// The guest's lock as the host's; the end is inclusive in FUSE.
fn host_lock(lock: &FileLock) -> io::Result<libc::flock64> {
    let kind = match i32::try_from(lock.lock_type) {
        Ok(kind @ (libc::F_RDLCK | libc::F_WRLCK | libc::F_UNLCK)) => kind,
        _ => return Err(errno(libc::EINVAL)),
    };
    let start = i64::try_from(lock.start).map_err(|_unfit| errno(libc::EINVAL))?;
    if lock.end < lock.start {
        return Err(errno(libc::EINVAL));
    }
    let mut out = sys::empty_lock();
    out.l_type = i16::try_from(kind).map_err(|_unfit| errno(libc::EINVAL))?;
    out.l_whence = 0; // SEEK_SET
    out.l_start = start;
    // Length 0 means up to the end, wherever that will be.
    out.l_len = match i64::try_from(lock.end) {
        Ok(end) if end < i64::MAX => end - start + 1,
        _ => 0,
    };
    Ok(out)
}

impl PassthroughFs {
    /// The open file that carries the locks of a holder; opened if `make`.
    fn lock_fd(&self, holder: Holder, pid: u32) -> io::Result<Arc<OwnedFd>> {
        if let Some(there) = self.locks.held().get(&holder) {
            return Ok(Arc::clone(&there.fd));
        }
        // For writing, since the holder may come to want that too; unless nobody can, and the guest has it
        // open for reading alone.
        let most = if self.config.readonly { libc::O_RDONLY } else { libc::O_RDWR };
        let fd = match self.open_node(holder.0, most) {
            Err(error) if cannot_be_written(&error) => self.open_node(holder.0, libc::O_RDONLY),
            other => other,
        }?;
        let fd = self.for_guest(fd)?;
        let mut held = self.locks.held();
        let held_one = held.entry(holder).or_insert_with(|| Held::new(Arc::new(fd), pid));
        let fd = Arc::clone(&held_one.fd);
        self.locks.count.store(held.len(), Ordering::Release);
        Ok(fd)
    }

    /// SETLK: sets or drops a lock, or fails with `EAGAIN` if another holds it.
    pub(super) fn do_setlk(
        &self,
        id: u64,
        handle: u64,
        owner: u64,
        lock: &FileLock,
        flags: u32,
    ) -> io::Result<()> {
        let file = self.file(id, handle)?;
        let wanted = host_lock(lock)?;
        let unlocks = i32::from(wanted.l_type) == libc::F_UNLCK;
        if flags & LK_FLOCK != 0 {
            let operation = match i32::from(wanted.l_type) {
                libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
                libc::F_WRLCK => FlockOperation::NonBlockingLockExclusive,
                _ => FlockOperation::NonBlockingUnlock,
            };
            rustix::fs::flock(&file.fd, operation)?;
            file.set_flocked(!unlocks);
        } else if unlocks && wanted.l_start == 0 && wanted.l_len == 0 {
            self.locks.release_owner(id, owner);
        } else if unlocks && !self.locks.held().contains_key(&(id, owner)) {
            return Ok(());
        } else {
            let (holder, range) = ((id, owner), range_of(lock));
            let fd = self.lock_fd(holder, lock.pid)?;
            let mut wanted = wanted;
            if unlocks {
                self.locks.remove(holder, &range);
            }
            sys::ofd_lock(fd.as_fd(), libc::F_OFD_SETLK, &mut wanted)?;
            if !unlocks {
                self.locks.add(holder, range);
            }
        }
        Ok(())
    }

    /// SETLKW: as SETLK, but waits in calls that go through `block`.
    pub(super) fn do_wait_for_lock(
        &self,
        request: &LockRequest,
        block: &mut BlockForLock<'_>,
    ) -> io::Result<()> {
        let LockRequest { inode, handle, owner, ref lock, flags } = *request;
        let session = self.locks.session.load(Ordering::Acquire);
        let file = self.file(inode, handle)?;
        let wanted = host_lock(lock)?;
        let operation = match i32::from(wanted.l_type) {
            libc::F_RDLCK => FlockOperation::LockShared,
            libc::F_WRLCK => FlockOperation::LockExclusive,
            _ => return self.do_setlk(inode, handle, owner, lock, flags),
        };
        if flags & LK_FLOCK != 0 {
            block(&mut || Ok(rustix::fs::flock(&file.fd, operation)?))?;
            file.set_flocked(true);
            return Ok(());
        }
        let (holder, range) = ((inode, owner), range_of(lock));
        let _waiting = self.locks.wait_for(Wanted { holder, range })?;
        loop {
            let fd = self.lock_fd(holder, lock.pid)?;
            block(&mut || {
                let mut wanted = wanted;
                sys::ofd_lock(fd.as_fd(), libc::F_OFD_SETLKW, &mut wanted)
            })?;
            if self.locks.session.load(Ordering::Acquire) != session {
                return Err(errno(libc::EINTR));
            }
            if self.locks.keep(holder, &fd, lock.pid) {
                self.locks.add(holder, range);
                return Ok(());
            }
        }
    }

    /// GETLK: what would be in the way of `lock`.
    pub(super) fn do_getlk(
        &self,
        id: u64,
        handle: u64,
        owner: u64,
        lock: &FileLock,
    ) -> io::Result<FileLock> {
        self.file(id, handle)?;
        let mut wanted = host_lock(lock)?;
        let own = self.locks.held().get(&(id, owner)).map(|held| Arc::clone(&held.fd));
        let fd = match own {
            Some(fd) => fd,
            None => Arc::new(self.open_node(id, libc::O_RDONLY)?),
        };
        sys::ofd_lock(fd.as_fd(), libc::F_OFD_GETLK, &mut wanted)?;
        let start = u64::try_from(wanted.l_start).unwrap_or(0);
        let end = match u64::try_from(wanted.l_len) {
            Ok(len @ 1..) => start.saturating_add(len - 1),
            _ => i64::MAX.cast_unsigned(),
        };
        let kind = u32::try_from(wanted.l_type).unwrap_or(libc::F_UNLCK as u32);
        // The host cannot tell which open file it was; another holder here is the best guess.
        let pid = self
            .locks
            .held()
            .iter()
            .find(|((inode, other), _)| *inode == id && *other != owner)
            .map_or(0, |(_, held)| held.pid);
        Ok(FileLock { start, end, lock_type: kind, pid })
    }
}
