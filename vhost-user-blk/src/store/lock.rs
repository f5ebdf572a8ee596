//! A lock on a whole image file, so that two programs cannot write to one image.
//!
//! Open-file-description locks, `fcntl(2)`: they end with the last duplicate of the descriptor, so with
//! the process, however it ends. They conflict with the byte locks that QEMU takes on its images.
//!
//! The lock is on the very descriptor that io_uring works on, and so it is a fence, too. When a daemon
//! is killed, the kernel finishes its operations in the background and holds the file until then: a
//! write of the dead daemon must not come after one that its successor acknowledged. So the successor
//! waits a while for the lock.
#![allow(unsafe_code, reason = "fcntl with a struct flock")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// How long a killed predecessor's operations may take to end.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often to try.
const INTERVAL: Duration = Duration::from_millis(2);

fn whole_file(kind: i32) -> libc::flock {
    // SAFETY: all-zero bytes are a valid `flock`: start 0, length 0 means to the end of the file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).unwrap_or(0);
    lock
}

/// Locks `file`, waiting for a predecessor's last operations. `Ok(false)`: somebody else has it.
///
/// # Errors
/// The file system has no locks.
pub fn lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let start = Instant::now();
    while !try_lock(file, exclusive)? {
        if start.elapsed() > PATIENCE {
            return Ok(false);
        }
        std::thread::sleep(INTERVAL);
    }
    Ok(true)
}

/// Locks `file`: shared for reading only, exclusive for writing. `Ok(false)`: somebody else has it.
///
/// # Errors
/// The file system has no locks.
fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
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
