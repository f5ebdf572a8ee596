//! How often a thread waited.
//!
//! System calls: getrusage.
#![allow(unsafe_code, reason = "getrusage, which no safe wrapper covers")]

/// Times that the calling thread gave its CPU up by itself, to wait for something. Having had to give it to
/// another thread is not counted.
pub(crate) fn count() -> i64 {
    // SAFETY: a structure of integers, for which zeros are valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is the kernel's structure and lives through the call. It cannot fail then.
    unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) };
    usage.ru_nvcsw
}

#[cfg(test)]
mod tests {
    #[test]
    fn sleeping_is_a_wait() {
        let before = super::count();
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(super::count() > before);
    }
}
