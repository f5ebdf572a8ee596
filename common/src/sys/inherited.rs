//! Descriptors that whoever started us left open for us, given by number (`--fd`).
#![allow(unsafe_code, reason = "takes ownership of a descriptor that is known by its number alone")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Takes the open descriptor `fd` over, close-on-exec from now on. Standard input, output and error
/// are not for taking.
///
/// # Errors
/// It is not open, or one of the standard three.
pub fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "0, 1 and 2 are the standard streams",
        ));
    }
    // SAFETY: only used to ask whether the descriptor is open; a closed one gives EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    rustix::io::fcntl_setfd(borrowed, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and by the contract of `--fd` nobody else in this process owns it: this
    // runs while arguments are read, before anything of ours was opened under a number given there.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
