//! Each stage is entered in a forked child, which reports by how it ends.
#![allow(unsafe_code, reason = "fork, and system calls that the stages forbid")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, waitpid};

use super::*;

mod namespaces;
mod seccomp;
mod stages;

/// Runs `work` in a forked child with one thread. It ends with 0, or with 101 after a panic.
pub(crate) fn in_child(work: impl FnOnce()) -> WaitStatus {
    wait(fork(work))
}

fn wait(child: Pid) -> WaitStatus {
    loop {
        if let Ok(Some((_, status))) = waitpid(Some(child), WaitOptions::empty()) {
            return status;
        }
    }
}

fn fork(work: impl FnOnce()) -> Pid {
    // SAFETY: the child uses what fork keeps usable in it: the allocator and its own descriptors.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork: {}", io::Error::last_os_error());
    if let Some(child) = Pid::from_raw(child) {
        return child;
    }
    // The test harness would keep the message to itself.
    std::panic::set_hook(Box::new(|panic| {
        let _ = rustix::io::write(rustix::stdio::stderr(), format!("child: {panic}\n").as_bytes());
    }));
    let code = if catch_unwind(AssertUnwindSafe(work)).is_ok() { 0 } else { 101 };
    // SAFETY: ends the child.
    unsafe { libc::_exit(code) }
}

#[track_caller]
fn succeeds(work: impl FnOnce()) {
    let status = in_child(work);
    assert_eq!(status.exit_status(), Some(0), "{status:?}");
}

#[track_caller]
fn dies_of(signal: libc::c_int, work: impl FnOnce()) {
    let status = in_child(work);
    assert_eq!(status.terminating_signal(), Some(signal), "{status:?}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Turns root into a user without any privilege, as if it had started this process.
fn become_nobody() {
    use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
    if is_root() {
        let (user, group) = (Uid::from_raw(65534), Gid::from_raw(65534));
        rustix::thread::set_thread_groups(&[]).unwrap();
        rustix::thread::set_thread_res_gid(group, group, group).unwrap();
        rustix::thread::set_thread_res_uid(user, user, user).unwrap();
        // A process that changed its user may not look into its own /proc otherwise.
        set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
    }
}

/// A directory that everybody may enter.
fn open_directory() -> tempfile::TempDir {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn chain(error: impl std::error::Error + Send + Sync + 'static) -> String {
    format!("{:#}", anyhow::Error::from(error))
}
