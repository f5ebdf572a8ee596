//! Children that do not outlive the launcher, however it ends.
#![allow(unsafe_code, reason = "what runs between fork and exec is marked unsafe by std")]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, getpid, getppid};

/// Starts `command`; it gets SIGTERM when this *thread* ends, so the main thread starts all children.
///
/// # Errors
/// It cannot be started.
pub(super) fn spawn(command: &mut Command) -> io::Result<Child> {
    let launcher: Pid = getpid();
    let bind_to_launcher = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
        // It may have ended before the line above.
        if getppid() != Some(launcher) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    };
    // SAFETY: the closure makes two system calls and allocates nothing.
    unsafe { command.pre_exec(bind_to_launcher) };
    command.spawn()
}
