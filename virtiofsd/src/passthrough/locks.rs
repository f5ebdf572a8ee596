//! Locks, kept by the host, so that guests that share a directory exclude each other.
//!
//! # Theory of operation
//! A POSIX lock belongs to a process of the guest (`owner`) and an inode, whichever fd it was set
//! through; closing any of the process's fds of that inode drops it. The host's open-file-description
//! locks belong to an open file: so each pair of inode and owner that holds locks gets an open file of
//! its own, and closing that drops them all. A BSD lock belongs to an open file of the guest, which is
//! one of ours already.
//!
//! Waiting for a lock is done by trying again: at once when a lock is released here, and every few
//! milliseconds for those held elsewhere. A wait can thus be ended at any time.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::FileLock;
use rustix::fs::FlockOperation;

use super::{PassthroughFs, errno, sys};

/// `fuse_lk_in.lk_flags`: a BSD lock (FUSE_LK_FLOCK).
const LK_FLOCK: u32 = 1 << 0;
/// How often a wait looks for locks released by other processes of the host.
const RETRY: Duration = Duration::from_millis(5);

/// An inode and one of its lock owners.
type Holder = (u64, u64);

#[derive(Debug)]
struct Held {
    fd: Arc<OwnedFd>,
    /// The guest's process, for those who ask who holds a lock.
    pid: u32,
}

/// The locks of the guest.
#[derive(Debug, Default)]
pub(super) struct Locks {
    held: Mutex<HashMap<Holder, Held>>,
    /// Size of `held`, so that FLUSH of a guest without locks takes no lock itself.
    count: AtomicUsize,
    /// Goes up when waits are to end.
    interrupts: AtomicU64,
    released: Condvar,
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
        if gone.is_some() {
            drop(gone);
            self.wake();
        }
    }

    /// Who holds locks, on which open file, and the process that asked.
    pub(super) fn list(&self) -> Vec<(Holder, Arc<OwnedFd>, u32)> {
        let held = self.held();
        held.iter().map(|(holder, one)| (*holder, Arc::clone(&one.fd), one.pid)).collect()
    }

    /// Puts the locks of a holder back, which the open file `fd` carries.
    pub(super) fn restore(&self, holder: Holder, fd: OwnedFd, pid: u32) {
        let mut held = self.held();
        held.insert(holder, Held { fd: Arc::new(fd), pid });
        self.count.store(held.len(), Ordering::Release);
    }

    /// A lock may be free now.
    pub(super) fn wake(&self) {
        self.released.notify_all();
    }

    /// Ends all waits with `EINTR`.
    pub(super) fn interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::Release);
        self.wake();
    }

    /// Drops all locks and ends all waits.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.held());
        self.count.store(0, Ordering::Release);
        drop(all);
        self.interrupt();
    }
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
        let fd = match self.open_node(holder.0, libc::O_RDWR) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES)) => {
                self.open_node(holder.0, libc::O_RDONLY)
            }
            other => other,
        }?;
        let mut held = self.locks.held();
        let held_one = held.entry(holder).or_insert_with(|| Held { fd: Arc::new(fd), pid });
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
            let fd = self.lock_fd((id, owner), lock.pid)?;
            let mut wanted = wanted;
            sys::ofd_lock(fd.as_fd(), libc::F_OFD_SETLK, &mut wanted)?;
        }
        if unlocks {
            self.locks.wake();
        }
        Ok(())
    }

    /// SETLKW: as SETLK, but waits; `EINTR` when waits are interrupted.
    pub(super) fn do_setlkw(
        &self,
        id: u64,
        handle: u64,
        owner: u64,
        lock: &FileLock,
        flags: u32,
    ) -> io::Result<()> {
        let before = self.locks.interrupts.load(Ordering::Acquire);
        loop {
            match self.do_setlk(id, handle, owner, lock, flags) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                }
                result => return result,
            }
            let held = self.locks.held();
            if self.locks.interrupts.load(Ordering::Acquire) != before {
                return Err(errno(libc::EINTR));
            }
            // A release between the try and here is noticed at the next round, soon enough.
            let waited = self.locks.released.wait_timeout(held, RETRY);
            drop(waited.unwrap_or_else(PoisonError::into_inner));
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
