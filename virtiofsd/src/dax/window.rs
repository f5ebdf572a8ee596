//! The window as the VMM has it, reached over the back-end channel.

use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use outboard_common::vhost_user::backend_channel::{BackendChannel, ChannelError, ShmemMap};

use crate::fuse::extension::DaxWindow;

thread_local! {
    /// A call of this thread was interrupted since somebody last asked.
    static INTERRUPTED: Cell<bool> = const { Cell::new(false) };
}

/// Whether the request that this thread just worked on found the rings being stopped, so that it is
/// to be done again.
pub fn take_interrupted() -> bool {
    INTERRUPTED.with(|flag| flag.replace(false))
}

/// Whether the request that this thread works on found the rings being stopped.
pub fn is_interrupted() -> bool {
    INTERRUPTED.with(Cell::get)
}

/// The shared memory region of the window. Virtio 1.3, 5.11.5.
const SHMID_WINDOW: u8 = 0;
/// SHMEM_MAP: the guest may write.
const FLAG_WRITABLE: u64 = 1;

/// A window behind a back-end channel.
#[derive(Debug)]
pub struct ChannelWindow(Arc<BackendChannel>);

impl ChannelWindow {
    /// The window of the front end at the other end of `channel`.
    #[must_use]
    pub fn new(channel: Arc<BackendChannel>) -> Self {
        Self(channel)
    }
}

/// The guest's errno for a failure of the channel.
fn errno(error: &ChannelError) -> io::Error {
    match error {
        ChannelError::Interrupted => {
            INTERRUPTED.with(|flag| flag.set(true));
            io::Error::from_raw_os_error(libc::EINTR)
        }
        ChannelError::Refused { .. } => {
            tracing::warn!(%error, "the VMM refused a mapping");
            io::Error::from_raw_os_error(libc::EIO)
        }
        // The channel has said so, once.
        ChannelError::Silent => io::Error::from_raw_os_error(libc::ETIMEDOUT),
        ChannelError::NotNegotiated(_) => io::Error::from_raw_os_error(libc::EOPNOTSUPP),
        ChannelError::Broken(_) | ChannelError::Io(_) => io::Error::from_raw_os_error(libc::EIO),
    }
}

impl DaxWindow for ChannelWindow {
    fn map(
        &self,
        file: BorrowedFd<'_>,
        file_offset: u64,
        window_offset: u64,
        len: u64,
        write: bool,
    ) -> io::Result<()> {
        let map = ShmemMap {
            shmid: SHMID_WINDOW,
            padding: [0; 7],
            fd_offset: file_offset,
            shm_offset: window_offset,
            len,
            flags: if write { FLAG_WRITABLE } else { 0 },
        };
        self.0.shmem_map(&map, file).map_err(|e| errno(&e))
    }

    fn unmap(&self, window_offset: u64, len: u64) -> io::Result<()> {
        let map = ShmemMap {
            shmid: SHMID_WINDOW,
            padding: [0; 7],
            fd_offset: 0,
            shm_offset: window_offset,
            len,
            flags: 0,
        };
        self.0.shmem_unmap(&map).map_err(|e| errno(&e))
    }
}
