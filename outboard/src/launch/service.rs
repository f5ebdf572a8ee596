//! One daemon through its life: started, watched, started again, stopped.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

use super::commands::DaemonSpec;
use super::readiness;
use super::spawn::spawn;
use crate::state::{self, DeviceState};

/// The first wait before a daemon is started again; each failure doubles it.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The longest wait.
const BACKOFF_MOST: Duration = Duration::from_secs(10);
/// A daemon that ran this long was fine: its next failure is a first one.
const HEALTHY: Duration = Duration::from_secs(30);
/// Of a log that is shown with an error.
const LOG_TAIL: usize = 400;

/// A daemon and what became of it.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) spec: DaemonSpec,
    child: Option<Child>,
    /// A newer process, while it takes over from `child`.
    successor: Option<Child>,
    started: Instant,
    started_at: u64,
    restarts: u32,
    last_exit: Option<String>,
    backoff: Duration,
    /// When it shall be started again.
    due: Option<Instant>,
    upgrades: u32,
    failed_upgrades: u32,
}

/// What became of a daemon since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It ended.
    Ended(ExitStatus),
    /// A newer process serves its guest now.
    Upgraded,
    /// The newer process ended without that; the old one goes on.
    NotUpgraded(ExitStatus),
}

impl Service {
    pub(super) fn new(spec: DaemonSpec) -> Self {
        Self {
            spec,
            child: None,
            successor: None,
            started: Instant::now(),
            started_at: 0,
            restarts: 0,
            last_exit: None,
            backoff: BACKOFF_FIRST,
            due: None,
            upgrades: 0,
            failed_upgrades: 0,
        }
    }

    /// Starts the process.
    pub(super) fn start(&mut self, bin_dir: &Path) -> Result<()> {
        let child = self.spawn(bin_dir)?;
        self.serves_now(child);
        self.due = None;
        Ok(())
    }

    /// Starts a newer process, which takes the guest over from the running one; false if there is
    /// nothing to take over.
    pub(super) fn upgrade(&mut self, bin_dir: &Path) -> Result<bool> {
        if self.child.is_none() || self.successor.is_some() {
            return Ok(false);
        }
        let started = self.spawn(bin_dir).inspect_err(|_| self.failed_upgrades += 1)?;
        self.successor = Some(started);
        Ok(true)
    }

    fn serves_now(&mut self, child: Child) {
        self.child = Some(child);
        self.started = Instant::now();
        self.started_at = state::now();
    }

    fn spawn(&self, bin_dir: &Path) -> Result<Child> {
        let spec = &self.spec;
        let program = bin_dir.join(spec.kind.program());
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&spec.log)
            .with_context(|| format!("cannot write {}", spec.log.display()))?;
        let mut command = Command::new(&program);
        command
            .args(&spec.arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C in the terminal is for the launcher, which stops the daemons after the VMM.
            .process_group(0);
        spawn(&mut command)
            .with_context(|| format!("cannot start {} for {}", program.display(), spec.name))
    }

    /// Whether VMM and watchers can come.
    pub(super) fn is_ready(&self) -> bool {
        readiness::all_listening(&[&self.spec.socket, &self.spec.metrics])
    }

    /// What happened since the last call.
    pub(super) fn news(&mut self) -> Option<News> {
        // The successor first: one that ends just after it took over is the daemon that ended.
        let successor = exited(&mut self.successor);
        match (exited(&mut self.child), successor) {
            (Some(_), None) if self.successor.is_some() => {
                self.upgrades += 1;
                if let Some(successor) = self.successor.take() {
                    self.serves_now(successor);
                }
                Some(News::Upgraded)
            }
            (Some(status), _) => Some(News::Ended(status)),
            (None, Some(status)) => {
                self.failed_upgrades += 1;
                Some(News::NotUpgraded(status))
            }
            (None, None) => None,
        }
    }

    /// Plans the next start after the process ended; gives the wait.
    pub(super) fn plan_restart(&mut self, status: ExitStatus) -> Duration {
        let wait = if self.started.elapsed() >= HEALTHY { BACKOFF_FIRST } else { self.backoff };
        self.backoff = (wait * 2).min(BACKOFF_MOST);
        self.last_exit = Some(status.to_string());
        self.due = Some(Instant::now() + wait);
        wait
    }

    /// After a start that failed: try again, later.
    pub(super) fn postpone(&mut self) {
        self.due = Some(Instant::now() + self.backoff);
        self.backoff = (self.backoff * 2).min(BACKOFF_MOST);
    }

    /// Time until it shall be started again.
    pub(super) fn due_in(&self) -> Option<Duration> {
        self.due.map(|due| due.saturating_duration_since(Instant::now()))
    }

    /// Starts it again.
    pub(super) fn restart(&mut self, bin_dir: &Path) -> Result<()> {
        self.restarts += 1;
        self.start(bin_dir)
    }

    pub(super) fn signal(&self, signal: Signal) {
        for child in self.child.iter().chain(&self.successor) {
            // Not waited for yet (`news` takes those that are), so the number is still its own.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }

    pub(super) fn is_running(&mut self) -> bool {
        let mut processes = self.child.iter_mut().chain(&mut self.successor);
        processes.any(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Ends it by force, if it still runs.
    pub(super) fn kill(&mut self) {
        for mut child in self.child.take().into_iter().chain(self.successor.take()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The end of its log, in one line.
    pub(super) fn log_tail(&self) -> String {
        let text = fs::read(&self.spec.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let last: Vec<&str> = text.lines().rev().take(3).collect();
        let line = last.into_iter().rev().collect::<Vec<_>>().join(" | ");
        line.chars().take(LOG_TAIL).collect()
    }

    pub(super) fn state(&self) -> DeviceState {
        DeviceState {
            name: self.spec.name.clone(),
            kind: self.spec.kind,
            pid: self.child.as_ref().map(Child::id),
            started: self.started_at,
            restarts: self.restarts,
            last_exit: self.last_exit.clone(),
            socket: self.spec.socket.clone(),
            metrics: self.spec.metrics.clone(),
            upgrades: self.upgrades,
            failed_upgrades: self.failed_upgrades,
        }
    }
}

/// How a process ended, once; then it is gone from `child`.
fn exited(child: &mut Option<Child>) -> Option<ExitStatus> {
    let status = child.as_mut()?.try_wait().ok()??;
    *child = None;
    Some(status)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::super::commands::Kind;
    use super::*;

    #[test]
    fn failures_in_a_row_wait_longer_and_longer() {
        let spec = DaemonSpec {
            name: "a".into(),
            kind: Kind::Blk,
            arguments: Vec::new(),
            socket: "/s".into(),
            metrics: "/m".into(),
            log: "/l".into(),
            handover: "/h".into(),
        };
        let mut service = Service::new(spec);
        let killed = ExitStatus::from_raw(9);
        let waits: Vec<u128> = (0..9).map(|_| service.plan_restart(killed).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        // One that ran well begins from the start.
        service.started = Instant::now() - HEALTHY;
        assert_eq!(service.plan_restart(killed), BACKOFF_FIRST);
        assert!(service.state().last_exit.unwrap().contains("signal: 9"));
    }
}
