//! Signals as something that can be waited for with a deadline.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM, SIGUSR1};

/// SIGTERM, SIGINT and SIGHUP (stop; the last is a terminal that was closed), SIGUSR1 (start the daemons
/// anew), SIGCHLD (look at the children).
#[derive(Debug)]
pub(super) struct Wakes {
    receiver: UnixStream,
    stop: Arc<AtomicBool>,
    upgrade: Arc<AtomicBool>,
}

impl Wakes {
    /// Catches the signals from now on.
    pub(super) fn new() -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        receiver.set_nonblocking(true)?;
        let (stop, upgrade) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        for (signal, flag) in
            [(SIGTERM, &stop), (SIGINT, &stop), (SIGHUP, &stop), (SIGUSR1, &upgrade)]
        {
            // The flag before the wake-up, so that whoever wakes sees it.
            signal_hook::flag::register(signal, Arc::clone(flag))?;
        }
        for signal in [SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGCHLD] {
            signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
        }
        Ok(Self { receiver, stop, upgrade })
    }

    /// Whether somebody asked the launcher to stop.
    pub(super) fn stop(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Whether somebody asked for the daemons to be started anew since the last call.
    pub(super) fn take_upgrade(&self) -> bool {
        self.upgrade.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until a signal came, or for `most`.
    pub(super) fn wait(&mut self, most: Duration) {
        let timeout = Timespec {
            tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(most.subsec_nanos()),
        };
        let mut fds = [PollFd::new(&self.receiver, PollFlags::IN)];
        // An interrupted wait is a wait that is over.
        let _ = poll(&mut fds, Some(&timeout));
        let mut bytes = [0; 64];
        while matches!(self.receiver.read(&mut bytes), Ok(1..)) {}
    }
}
