//! `epoll_wait` with a time-out in nanoseconds.
#![allow(unsafe_code, reason = "epoll_pwait2 exists in no safe form for the epoll crate's events")]

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use epoll::Event;

/// Waits for events of `epoll` for at most `timeout`; gives how many came.
///
/// # Errors
/// As `epoll_pwait2` (Linux 5.11), ENOSYS before.
pub fn epoll_wait_for(epoll: RawFd, timeout: Duration, events: &mut [Event]) -> io::Result<usize> {
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let room = libc::c_int::try_from(events.len()).unwrap_or(libc::c_int::MAX);
    let no_mask = std::ptr::null::<libc::sigset_t>();
    // SAFETY: `events` has room for `room` events, whose layout is the kernel's `epoll_event`; the
    // time-out lives through the call, and there is no signal mask.
    let n = unsafe {
        libc::syscall(
            libc::SYS_epoll_pwait2,
            epoll,
            events.as_mut_ptr(),
            room,
            &raw const timeout,
            no_mask,
            0usize,
        )
    };
    match usize::try_from(n) {
        Ok(n) => Ok(n),
        Err(_) => Err(io::Error::last_os_error()),
    }
}
