//! A disk in memory that is gone with the process: a raw image on an unnamed memory file.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::raw::RawImage;
use super::{OpenError, Store};

/// A memory disk of `size` bytes, which takes memory only where it was written.
///
/// # Errors
/// The system has no memory file of that size.
pub fn open(size: u64) -> Result<Store, OpenError> {
    let error = |e: rustix::io::Errno| OpenError::Memory { size, source: e.into() };
    let fd = memfd_create("vhost-user-blk", MemfdFlags::CLOEXEC).map_err(error)?;
    ftruncate(&fd, size).map_err(error)?;
    Ok(RawImage::in_memory(fd.into()))
}
