//! A lock on a whole image file, so that two programs cannot write to one image.
//!
//! Open-file-description locks, `fcntl(2)`: they end with the last duplicate of the descriptor, so with
//! the process, however it ends. They conflict with the byte locks that QEMU takes on its images.
#![allow(unsafe_code, reason = "fcntl with a struct flock")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

fn whole_file(kind: i32) -> libc::flock {
    // SAFETY: all-zero bytes are a valid `flock`: start 0, length 0 means to the end of the file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).unwrap_or(0);
    lock
}

/// Locks `file`: shared for reading only, exclusive for writing. `Ok(false)`: somebody else has it.
///
/// # Errors
/// The file system has no locks.
pub fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let lock = whole_file(if exclusive { libc::F_WRLCK } else { libc::F_RDLCK });
    // SAFETY: the command takes a `struct flock`, which outlives the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        e if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        e => Err(e),
    }
}

/// The process that holds a conflicting lock, where the system knows (it does not for open file
/// description locks).
#[must_use]
pub fn holder(file: &File, exclusive: bool) -> Option<i32> {
    let mut lock = whole_file(if exclusive { libc::F_WRLCK } else { libc::F_RDLCK });
    // SAFETY: the command fills a `struct flock`, which outlives the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    (result == 0 && lock.l_pid > 0).then_some(lock.l_pid)
}
