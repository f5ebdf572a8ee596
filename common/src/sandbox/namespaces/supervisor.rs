//! Children: the process in a PID namespace, and short-lived helpers.
//!
//! The parent of a daemon in a PID namespace stays outside as the process that was started and is
//! signalled: it passes signals on and ends as the daemon ends. It keeps no descriptor, no
//! capability and no way to gain one. If it is killed, the kernel kills the daemon.
#![allow(unsafe_code, reason = "fork, signal waiting and _exit have no safe wrapper")]

use std::io;

use rustix::process::{
    Pid, Signal, WaitOptions, getppid, kill_process, set_parent_process_death_signal, waitpid,
};

use super::super::{CapabilitySet, capabilities, stages};

/// What is passed on to the daemon.
const PASSED_ON: [libc::c_int; 6] =
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// Exit code of a process killed by signal `n` is this plus `n`, as shells have it.
const KILLED: i32 = 128;

/// Forks. Returns in the child; the parent stays here and ends when the child does.
///
/// In the child, signals that end a process wait until [`deliver_signals`]: the kernel drops them for a
/// process 1 that has no handler yet, and a daemon that is told to leave while it starts would stay.
///
/// To be called with one thread.
pub(super) fn continue_in_child() -> io::Result<()> {
    let watched = watched_signals();
    // Blocked before the fork, so that none is lost while the parent gets ready.
    change_mask(libc::SIG_BLOCK, &watched)?;
    let parent = rustix::process::getpid();
    match fork()? {
        Some(child) => supervise(child, &watched),
        None => {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // In a PID namespace the parent is outside and has no number; else it must be ours,
            // or it died before the line above.
            match getppid() {
                Some(now) if now != parent => Err(io::Error::other("the parent process died")),
                _ => Ok(()),
            }
        }
    }
}

/// Has this thread take the signals again that were held back since the process went into its namespaces.
/// To be called once the daemon's handlers are in place; without namespaces it changes nothing.
///
/// # Errors
/// The kernel refuses, which it does not.
pub fn deliver_signals() -> io::Result<()> {
    change_mask(libc::SIG_UNBLOCK, &watched_signals())
}

/// Runs `work` in a child, which ends with the code it returns.
pub(super) fn fork_with(work: impl FnOnce() -> u8) -> io::Result<Pid> {
    match fork()? {
        Some(child) => Ok(child),
        None => end(work().into()),
    }
}

/// Waits for a child and gives its exit code, or 255 if it was killed.
pub(super) fn wait_for(child: Pid) -> io::Result<u8> {
    loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => {
                let code = status.exit_status().and_then(|code| u8::try_from(code).ok());
                return Ok(code.unwrap_or(u8::MAX));
            }
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The parent's life.
fn supervise(child: Pid, watched: &libc::sigset_t) -> ! {
    shed_everything();
    loop {
        let mut signal = 0;
        // SAFETY: both pointers are to live values of the right type.
        let error = unsafe { libc::sigwait(watched, &raw mut signal) };
        if error != 0 {
            continue;
        }
        if signal != libc::SIGCHLD {
            if let Some(signal) = Signal::from_named_raw(signal) {
                // It fails when the child is gone, which the next SIGCHLD tells.
                let _ = kill_process(child, signal);
            }
            continue;
        }
        if let Ok(Some((_, status))) = waitpid(Some(child), WaitOptions::NOHANG) {
            let killed = status.terminating_signal().map(|signal| KILLED + signal);
            if let Some(code) = status.exit_status().or(killed) {
                end(code);
            }
        }
    }
}

/// Gives up all that the parent does not need. A socket it kept open would hide from a VMM that the
/// daemon has closed it.
fn shed_everything() {
    // SAFETY: this process never returns to code that owns a descriptor above stderr.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    let _ = stages::no_new_privileges();
    let _ = capabilities::keep(CapabilitySet::empty());
}

fn watched_signals() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: the pointer is to a place for a set.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset initialises the set that it is given.
    let mut set = unsafe { set.assume_init() };
    for signal in PASSED_ON.into_iter().chain([libc::SIGCHLD]) {
        // SAFETY: the set is initialised and the number is a signal's.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

fn change_mask(how: libc::c_int, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: the set is live and initialised; the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(how, set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Forks; `None` in the child.
fn fork() -> io::Result<Option<Pid>> {
    // SAFETY: the stages run with one thread, so no lock is held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        child => Ok(Pid::from_raw(child)),
    }
}

/// Ends a process that is not the daemon, without running anything that is.
fn end(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}
