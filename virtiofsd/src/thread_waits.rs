//! How often a thread waited, and for how long it had a CPU.
//!
//! System calls: getrusage, clock_gettime.
#![allow(
    unsafe_code,
    reason = "getrusage, which no safe wrapper covers; a safe clock_gettime wants a prctl that the sandbox refuses"
)]

use std::time::Duration;

/// What a thread did since it began.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Times that it gave its CPU up by itself, to wait for something.
    pub(crate) waits: i64,
    /// Times that it had to give it to another thread.
    pub(crate) preemptions: i64,
    /// How long it ran.
    pub(crate) ran: Duration,
}

/// What the calling thread did.
pub(crate) fn usage() -> Usage {
    // SAFETY: a structure of integers, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is the kernel's structure and lives through the call. It cannot fail then.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    let mut ran = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // What getrusage says of this is as old as the last tick.
    // SAFETY: `ran` is the kernel's structure and lives through the call. The clock exists in every kernel.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut ran) };
    let ran = Duration::from_secs(ran.tv_sec.unsigned_abs())
        + Duration::from_nanos(ran.tv_nsec.unsigned_abs());
    Usage { waits: usage.ru_nvcsw, preemptions: usage.ru_nivcsw, ran }
}

#[cfg(test)]
mod tests {
    use super::usage;
    use std::time::{Duration, Instant};

    #[test]
    fn sleeping_is_a_wait_and_working_is_none() {
        let before = usage();
        std::thread::sleep(Duration::from_millis(1));
        assert!(usage().waits > before.waits);
        // Now and then the kernel has a thread wait for reasons of its own (a page, a lock of its).
        let waited = (0..20).map(|_| {
            let (before, start) = (usage(), Instant::now());
            while usage().ran < before.ran + Duration::from_millis(2) {
                assert!(
                    start.elapsed() < Duration::from_secs(10),
                    "it runs and that is not counted"
                );
            }
            usage().waits - before.waits
        });
        assert!(waited.filter(|&waits| waits == 0).count() > 10);
    }
}
