//! SETLKW requests that wait, and how they are given up.
//!
//! # Theory of operation
//! A lock that is taken is waited for by a thread in a system call, which the host's kernel ends when the
//! lock is granted. Nothing else ends it but a signal, and a signal that comes just
//! before the call is lost. So a thread says that it goes to wait ([`LockWaits::block`]) under the lock
//! under which INTERRUPT looks at it; whoever interrupts sends the signal again and again until the
//! thread has said that it is back. The signal's handler does nothing.
#![allow(unsafe_code, reason = "sigaction and tgkill have no safe form")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

/// Between two signals to one thread.
const AGAIN: Duration = Duration::from_millis(1);
/// Signals to one thread before others get their turn; more than one is a rarity.
const ATTEMPTS: u32 = 100;

/// A SETLKW that waits.
#[derive(Debug, Default)]
struct LockWait {
    /// INTERRUPT asked it to stop.
    interrupted: bool,
    /// The threads that are in the system call, or about to enter it. One, unless the guest gave several
    /// requests the same number.
    threads: Vec<libc::pid_t>,
}

/// The waiting SETLKW requests of a session, by number.
#[derive(Debug, Default)]
pub struct LockWaits {
    waits: Mutex<BTreeMap<u64, LockWait>>,
    /// A thread left its system call.
    left: Condvar,
}

impl LockWaits {
    fn waits(&self) -> MutexGuard<'_, BTreeMap<u64, LockWait>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Request `unique` found its lock taken: true if it shall wait, false if it was interrupted, and
    /// is forgotten.
    pub fn goes_on(&self, unique: u64) -> bool {
        let mut waits = self.waits();
        if !waits.entry(unique).or_default().interrupted {
            return true;
        }
        forget(&mut waits, unique);
        false
    }

    /// Request `unique` waits no more.
    pub fn forget(&self, unique: u64) {
        forget(&mut self.waits(), unique);
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waits().is_empty()
    }

    /// Runs `call`, a system call that waits for the lock of request `unique` and that a signal ends
    /// with `EINTR`.
    ///
    /// # Errors
    /// Those of `call`; `EINTR` if the request was interrupted, and only then.
    pub fn block(&self, unique: u64, call: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        install_handler();
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        loop {
            {
                let mut waits = self.waits();
                let wait = waits.entry(unique).or_default();
                if wait.interrupted {
                    return Err(io::Error::from_raw_os_error(libc::EINTR));
                }
                wait.threads.push(thread);
            }
            let result = call();
            if let Some(wait) = self.waits().get_mut(&unique) {
                wait.threads.retain(|other| *other != thread);
            }
            self.left.notify_all();
            match result {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    /// Has request `unique` end with `EINTR`, if it waits.
    pub fn interrupt(&self, unique: u64) {
        let mut waits = self.waits();
        for _ in 0..ATTEMPTS {
            let Some(wait) = waits.get_mut(&unique) else { return };
            wait.interrupted = true;
            if wait.threads.is_empty() {
                return;
            }
            wait.threads.iter().copied().for_each(signal);
            waits = self
                .left
                .wait_timeout(waits, AGAIN)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(guard, _)| guard);
        }
    }

    /// As [`Self::interrupt`], for all that wait.
    pub fn interrupt_all(&self) {
        let all: Vec<u64> = self.waits().keys().copied().collect();
        for unique in all {
            self.interrupt(unique);
        }
    }
}

/// Forgets request `unique`, unless another of that number waits still: it must be found to be interrupted.
fn forget(waits: &mut BTreeMap<u64, LockWait>, unique: u64) {
    if waits.get(&unique).is_some_and(|wait| wait.threads.is_empty()) {
        waits.remove(&unique);
    }
}

/// A signal that nothing else in this process uses.
fn number() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_signal: libc::c_int) {}

/// Makes the signal end system calls rather than the process.
fn install_handler() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: plain integers and a pointer, for which zero is a value.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(libc::c_int) = nothing;
        // No SA_RESTART: the calls shall not go on by themselves.
        action.sa_sigaction = handler as libc::sighandler_t;
        // SAFETY: the handler does nothing, so it may run at any time.
        let result = unsafe { libc::sigaction(number(), &raw const action, std::ptr::null_mut()) };
        debug_assert_eq!(result, 0, "a signal that can be handled");
    });
}

/// Signals a thread of this process. One that has ended since is no error.
fn signal(thread: libc::pid_t) {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: takes numbers only; the signal has a handler, since a thread is registered.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, number()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn a_call_that_waits_ends_when_interrupted_at_any_moment() {
        let waits = LockWaits::default();
        for round in 0..200_u64 {
            let (reader, _writer) = rustix::pipe::pipe().unwrap();
            std::thread::scope(|scope| {
                let waiter = scope.spawn(|| {
                    waits.block(round, &mut || {
                        let mut byte = [0_u8];
                        rustix::io::read(reader.as_fd(), &mut byte)?;
                        Ok(())
                    })
                });
                // At once, so that it comes before, in and after the last look at the flag.
                while waits.is_empty() {
                    std::hint::spin_loop();
                }
                waits.interrupt(round);
                let error = waiter.join().unwrap().unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EINTR));
            });
            waits.forget(round);
        }
        assert!(waits.is_empty());
    }

    #[test]
    fn other_signals_are_no_interruption() {
        let waits = LockWaits::default();
        let calls = AtomicU32::new(0);
        let result = waits.block(7, &mut || {
            if calls.fetch_add(1, Ordering::Relaxed) < 3 {
                return Err(io::Error::from_raw_os_error(libc::EINTR));
            }
            Ok(())
        });
        assert!(result.is_ok());
        assert_eq!(calls.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn an_interrupted_request_does_not_go_on() {
        let waits = LockWaits::default();
        assert!(waits.goes_on(1) && waits.goes_on(2));
        waits.interrupt(2);
        waits.interrupt(3);
        assert!(waits.goes_on(1) && !waits.goes_on(2) && waits.goes_on(3));
        waits.interrupt_all();
        assert!(!waits.goes_on(1) && !waits.goes_on(3));
        assert!(waits.is_empty());
    }
}
