//! A guest that runs, and what became of it.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::qmp::Qmp;

/// What `jobs/init.sh` prints at the very end.
const END_OF_JOB: &str = "init: job ended with ";
/// How often a guest's state is looked at.
const POLL: Duration = Duration::from_millis(5);

/// A booted guest; dropping it kills it.
#[derive(Debug)]
pub struct RunningGuest {
    child: Child,
    started: Instant,
    /// The guest's `/job`, console file and, for QEMU, initrd and monitor socket.
    dir: TempDir,
}

/// How a guest ended.
#[derive(Debug, Clone)]
pub struct GuestResult {
    /// What the job's script ended with; `None` when the guest never said, so it crashed, hung or
    /// was stopped.
    pub exit_code: Option<i32>,
    /// Everything the guest and its VMM printed.
    pub console: String,
    /// From the start of the VMM to its end.
    pub took: Duration,
    /// How the VMM ended, in words.
    pub vmm: String,
}

impl GuestResult {
    /// Stops the test unless the job succeeded; shows the console.
    ///
    /// # Panics
    /// When the job did not end with 0.
    pub fn expect_success(&self) {
        assert!(
            self.exit_code == Some(0),
            "the guest's job ended with {:?} (VMM: {}); its console:\n{}",
            self.exit_code,
            self.vmm,
            self.console
        );
    }

    /// The value of the last line `result NAME VALUE` that the job printed.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<&str> {
        self.console.lines().rev().find_map(|line| {
            let (key, value) = line.strip_prefix("result ")?.split_once(' ')?;
            (key == name).then(|| value.trim())
        })
    }
}

impl RunningGuest {
    pub(super) fn new(child: Child, dir: TempDir) -> Self {
        Self { child, started: Instant::now(), dir }
    }

    /// The VMM's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the guest is off, or its VMM gone.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().context("wait for the guest")?.is_some())
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    /// The guest does not run in QEMU.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.dir.path().join("qmp"))
    }

    /// What the console shows so far.
    #[must_use]
    pub fn console(&self) -> String {
        let bytes = fs::read(self.dir.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits until the console shows `text`.
    ///
    /// # Errors
    /// When the guest ends or `timeout` passes first; the error has the console.
    pub fn wait_for(&mut self, text: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let ended = self.child.try_wait()?;
            let console = self.console();
            if console.contains(text) {
                return Ok(());
            }
            if let Some(status) = ended {
                bail!("the guest ended ({status}) without printing {text:?}:\n{console}");
            }
            if Instant::now() > deadline {
                bail!("the guest did not print {text:?} within {timeout:?}:\n{console}");
            }
            sleep(POLL);
        }
    }

    /// Waits for the guest to power off; one that takes longer than `timeout` is killed.
    ///
    /// # Errors
    /// When the process cannot be waited for. A guest that hangs is a result, not an error.
    pub fn wait(mut self, timeout: Duration) -> Result<GuestResult> {
        let deadline = self.started + timeout;
        let vmm = loop {
            if let Some(status) = self.child.try_wait().context("wait for the guest")? {
                break describe(status);
            }
            if Instant::now() > deadline {
                self.kill();
                break format!("killed after {timeout:?}");
            }
            sleep(POLL);
        };
        let console = self.console();
        let exit_code = console
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix(END_OF_JOB)?.parse().ok());
        Ok(GuestResult { exit_code, console, took: self.started.elapsed(), vmm })
    }

    /// Kills the VMM as a crash would.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        let was_running = matches!(self.child.try_wait(), Ok(None));
        self.kill();
        if was_running && std::thread::panicking() {
            crate::daemon::show("the guest's console", &self.console());
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => status.to_string(),
    }
}
