//! Acting as the caller: user, group, capabilities and umask of the calling thread.
//!
//! The guest's kernel has checked permissions already, so most operations run with the daemon's own
//! rights. What makes a file runs as the caller, so that the host gives it the right owner, set-group-id
//! inheritance and quota. All of these belong to the thread: the raw system calls are used, not the C
//! library's, which change every thread of the process. Nothing is called when nothing differs.
//!
//! System calls: setresuid, setresgid, setgroups, capget, capset, umask, unshare(CLONE_FS), fchdir.

use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::Mode;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::sys;

/// What this thread has become.
#[derive(Clone, Copy)]
struct ThreadState {
    /// It has its own umask (0) and its working directory is `/proc/self/fd`.
    own_fs: bool,
    /// Its capabilities when first asked.
    caps: Option<CapabilitySets>,
    /// `CAP_FSETID` is in effect (or was never there).
    fsetid: bool,
}

thread_local! {
    static THREAD: Cell<ThreadState> =
        const { Cell::new(ThreadState { own_fs: false, caps: None, fsetid: true }) };
}

/// Gives this thread its own umask, 0, and `/proc/self/fd` as its working directory, once.
pub(super) fn prepare_thread(proc_self_fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut state = THREAD.get();
    if state.own_fs {
        return Ok(());
    }
    sys::unshare_fs()?;
    rustix::process::fchdir(proc_self_fd)?;
    rustix::process::umask(Mode::empty());
    state.own_fs = true;
    THREAD.set(state);
    Ok(())
}

fn thread_caps() -> io::Result<CapabilitySets> {
    let mut state = THREAD.get();
    if let Some(caps) = state.caps {
        return Ok(caps);
    }
    let caps = rustix::thread::capabilities(None)?;
    state.caps = Some(caps);
    THREAD.set(state);
    Ok(caps)
}

/// Makes `CAP_FSETID` effective or not. Without it, writing, truncating and making files clear the
/// set-user-id and set-group-id bits as they would for an unprivileged process.
#[inline]
pub(super) fn set_fsetid(wanted: bool) -> io::Result<()> {
    if THREAD.get().fsetid == wanted { Ok(()) } else { change_fsetid(wanted) }
}

#[cold]
fn change_fsetid(wanted: bool) -> io::Result<()> {
    let mut caps = thread_caps()?;
    if caps.effective.contains(CapabilitySet::FSETID) {
        caps.effective.set(CapabilitySet::FSETID, wanted);
        rustix::thread::set_capabilities(None, caps)?;
    }
    let mut state = THREAD.get();
    state.fsetid = wanted;
    THREAD.set(state);
    Ok(())
}

/// Whose rights an operation takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller {
    /// Host user id.
    pub(super) uid: u32,
    /// Host group id.
    pub(super) gid: u32,
    /// A supplementary group of the caller, if the guest names one.
    pub(super) group: Option<u32>,
    /// The guest names supplementary groups when they matter.
    pub(super) names_groups: bool,
}

/// The daemon's own ids.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnIds {
    uid: u32,
    gid: u32,
}

impl OwnIds {
    pub(super) fn get() -> Self {
        Self { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() }
    }
}

/// Until dropped, the thread has the caller's rights.
#[derive(Debug)]
#[must_use]
pub(super) struct ActingAs {
    own: OwnIds,
    uid: bool,
    gid: bool,
    groups: bool,
}

impl Caller {
    /// Takes the caller's rights. Id 0 means the daemon's own, whatever that is, so that an
    /// unprivileged daemon can serve a guest's root.
    ///
    /// # Errors
    /// The daemon may not act as this caller, or the id is the invalid -1.
    pub(super) fn act(&self, own: OwnIds) -> io::Result<ActingAs> {
        if self.uid == u32::MAX || self.gid == u32::MAX || self.group == Some(u32::MAX) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        set_fsetid(true)?;
        let mut acting = ActingAs { own, uid: false, gid: false, groups: false };
        if self.gid != 0 && self.gid != own.gid {
            sys::set_thread_egid(self.gid)?;
            acting.gid = true;
        }
        if let Some(group) = self.group
            && group != 0
            && own.uid == 0
        {
            sys::set_thread_groups(&[group])?;
            acting.groups = true;
        }
        if self.uid != 0 && self.uid != own.uid {
            let caps = if self.names_groups { None } else { Some(thread_caps()?) };
            sys::set_thread_euid(self.uid)?;
            acting.uid = true;
            if let Some(mut caps) = caps {
                // The guest's kernel may have let the caller in for a group that we do not know.
                caps.effective &= CapabilitySet::DAC_OVERRIDE;
                rustix::thread::set_capabilities(None, caps)?;
            }
        }
        Ok(acting)
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        // The saved ids are the daemon's own, so the kernel cannot refuse; going on as somebody else
        // would be worse than ending.
        if self.uid {
            sys::set_thread_euid(self.own.uid).expect("a thread may return to its saved user id");
            if self.own.uid != 0
                && let Some(caps) = THREAD.get().caps
            {
                // Only a return to user 0 restores the effective set by itself.
                rustix::thread::set_capabilities(None, caps)
                    .expect("permitted sets did not change");
            }
        }
        if self.groups {
            sys::set_thread_groups(&[]).expect("a thread with CAP_SETGID may drop groups");
        }
        if self.gid {
            sys::set_thread_egid(self.own.gid).expect("a thread may return to its saved group id");
        }
    }
}

/// Until dropped, files are made with a umask.
#[derive(Debug)]
#[must_use]
pub(super) struct Masked(bool);

impl Masked {
    /// Applies `umask` to what this thread makes; the thread has been prepared.
    pub(super) fn new(umask: u32) -> Self {
        let mask = Mode::from_raw_mode(umask & 0o777);
        if mask.is_empty() {
            return Self(false);
        }
        rustix::process::umask(mask);
        Self(true)
    }
}

impl Drop for Masked {
    fn drop(&mut self) {
        if self.0 {
            rustix::process::umask(Mode::empty());
        }
    }
}
