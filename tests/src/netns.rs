//! Network name spaces of tests: links, addresses and services that no other test sees.
#![allow(
    unsafe_code,
    reason = "a name space is entered between fork and exec, which std marks unsafe"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::skip::skip;
use crate::toolroot::ToolRoot;

/// A network name space with its loopback up; it ends with the last process in it.
#[derive(Debug, Clone)]
pub struct NetNs {
    file: Arc<File>,
}

impl NetNs {
    /// Makes an empty name space.
    ///
    /// # Errors
    /// When this process may not make one.
    pub fn new(root: &ToolRoot) -> Result<Self> {
        // A thread of its own goes there, so that this one stays where it is.
        let made = std::thread::spawn(|| -> io::Result<File> {
            // SAFETY: only this thread's view of the network changes.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)? };
            File::open("/proc/thread-self/ns/net")
        });
        let file = made.join().ok().context("the thread in the name space panicked")??;
        let namespace = Self { file: Arc::new(file) };
        namespace.ip(root, "link set lo up")?;
        Ok(namespace)
    }

    /// An empty name space for a test, or `None` after the test was counted as skipped because it
    /// has no right to make one.
    #[must_use]
    pub fn for_test(root: &ToolRoot) -> Option<Self> {
        Self::new(root)
            .inspect_err(|error| skip(&format!("no network name space (run as root): {error:#}")))
            .ok()
    }

    /// Runs `ip` in the name space, with blanks between its arguments.
    ///
    /// # Errors
    /// When `ip` fails; the error has what it said.
    pub fn ip(&self, root: &ToolRoot, arguments: &str) -> Result<()> {
        let mut command = root.command("ip")?;
        self.enter(&mut command);
        let output = command.args(arguments.split_ascii_whitespace()).output()?;
        if !output.status.success() {
            bail!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// A path of the name space, for programs that are to enter it themselves; valid as long as `self`.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    /// Makes `command` run in the name space.
    pub fn enter(&self, command: &mut Command) {
        let file = Arc::clone(&self.file);
        // SAFETY: the closure makes one system call and allocates nothing.
        unsafe { command.pre_exec(move || Self::join(&file)) };
    }

    /// Runs `work` on a thread in the name space, for sockets of the test itself.
    ///
    /// # Errors
    /// When the thread cannot enter it.
    ///
    /// # Panics
    /// When `work` panics.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let file = Arc::clone(&self.file);
        let thread = std::thread::spawn(move || Self::join(&file).map(|()| work()));
        match thread.join() {
            Ok(result) => Ok(result?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn join(file: &File) -> io::Result<()> {
        let kind = Some(LinkNameSpaceType::Network);
        Ok(rustix::thread::move_into_link_name_space(file.as_fd(), kind)?)
    }
}
