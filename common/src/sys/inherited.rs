//! Descriptors that whoever started us left open for us, given by number (`--fd`).
#![allow(unsafe_code, reason = "takes ownership of a descriptor that is known by its number alone")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::FdFlags;

/// Takes the open descriptor `fd` over, close-on-exec from now on. Standard input, output and error
/// are not for taking, and no descriptor twice.
///
/// # Errors
/// It is not open, was not inherited or is taken already, or is one of the standard three.
pub fn inherited_fd(fd: RawFd) -> io::Result<OwnedFd> {
    if fd <= 2 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "0, 1 and 2 are the standard streams",
        ));
    }
    // SAFETY: only used to ask whether the descriptor is open; a closed one gives EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    // What came through exec has not got the flag; all that this process opens itself has.
    if rustix::io::fcntl_getfd(borrowed)?.contains(FdFlags::CLOEXEC) {
        let what = "it was not left open for this program, or is given twice";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and nobody else in this process owns it, as it came through exec and was not
    // taken before.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd as _, IntoRawFd as _};

    use super::*;

    #[test]
    fn a_descriptor_is_taken_once_and_only_if_it_was_left_for_us() {
        let own = std::fs::File::open("/dev/null").unwrap();
        let error = inherited_fd(own.as_raw_fd()).unwrap_err().to_string();
        assert!(error.contains("not left open for this program"), "{error}");
        let left = std::fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&left, FdFlags::empty()).unwrap();
        let number = left.into_raw_fd();
        let taken = inherited_fd(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(inherited_fd(number).unwrap_err().to_string().contains("given twice"));
        for standard in [-1, 0, 2] {
            assert!(inherited_fd(standard).is_err());
        }
    }
}
