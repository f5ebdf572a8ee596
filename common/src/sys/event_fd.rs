//! An eventfd: a counter to wait on, and how vhost-user kicks and calls travel.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};

/// An eventfd, or whatever descriptor a front end passes in its place.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new non-blocking, close-on-exec eventfd with count 0.
    ///
    /// # Errors
    /// The system is out of descriptors or memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    /// Adds one to the count, waking whoever waits. A full counter (a reader that never reads)
    /// is as good as signalled.
    #[inline]
    pub fn signal(&self) {
        // The only failures are EAGAIN (already signalled 2^64 - 2 times) and a descriptor that
        // is no eventfd, which is its sender's own loss.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Resets the count; true if it was not 0. Never blocks on an eventfd made by [`Self::new`]; one
    /// passed by a front end may block, so read it only after epoll said that it is readable.
    #[inline]
    pub fn drain(&self) -> bool {
        let mut count = [0u8; 8];
        matches!(rustix::io::read(&self.0, &mut count), Ok(8))
    }

    /// A second descriptor of the same eventfd.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }
}

impl From<OwnedFd> for EventFd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
