//! `outboard upgrade`: the daemons of running pods are replaced by the programs that are now on disk.
//!
//! The launcher does it ([`crate::launch`]); here it is asked to, and what it says in its state is told.

use std::io::{self, Write};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::state::{DeviceState, PodState};
use crate::watch;

/// A hand-over takes milliseconds; requests in flight are waited for.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// Upgrades the pods that `names` name, one after another.
///
/// # Errors
/// One of them does not run, or one of its daemons could not be replaced.
pub fn run(names: &[PathBuf]) -> Result<()> {
    for pod in watch::find(names)? {
        upgrade(&pod)?;
    }
    Ok(())
}

fn upgrade(before: &PodState) -> Result<()> {
    let pid = i32::try_from(before.pid).ok().and_then(Pid::from_raw);
    let pid =
        pid.with_context(|| format!("{}: no launcher's number: {}", before.name, before.pid))?;
    kill_process(pid, Signal::USR1).with_context(|| {
        format!("cannot reach the launcher of {} ({})", before.name, before.pid)
    })?;
    let deadline = Instant::now() + PATIENCE;
    let after = loop {
        let Some(now) = PodState::read(&before.dir)? else {
            bail!("the launcher of {} ended meanwhile", before.name)
        };
        let pairs = || before.devices.iter().zip(&now.devices);
        if pairs().all(|(then, now)| outcome(then, now) != Outcome::Waiting) {
            break now;
        }
        ensure!(
            Instant::now() < deadline,
            "the pod {} is not upgraded after {PATIENCE:?}; see the logs in {}",
            before.name,
            before.dir.display()
        );
        sleep(POLL);
    };
    tell(before, &after)
}

/// What became of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Waiting,
    Done,
    Failed,
    /// It did not run.
    Down,
}

fn outcome(before: &DeviceState, now: &DeviceState) -> Outcome {
    if now.upgrades != before.upgrades {
        Outcome::Done
    } else if now.failed_upgrades != before.failed_upgrades {
        Outcome::Failed
    } else if before.pid.is_none() || now.pid.is_none() || now.restarts != before.restarts {
        Outcome::Down
    } else {
        Outcome::Waiting
    }
}

fn tell(before: &PodState, after: &PodState) -> Result<()> {
    let mut failed = 0;
    let mut stdout = io::stdout().lock();
    for (then, now) in before.devices.iter().zip(&after.devices) {
        let program = now.kind.program();
        let line = match outcome(then, now) {
            Outcome::Done => format!("a newer {program} has taken over"),
            Outcome::Down => format!("{program} was down; it starts anew by itself"),
            Outcome::Failed | Outcome::Waiting => {
                failed += 1;
                let log = after.dir.join(format!("{}.log", now.name));
                format!("the newer {program} failed; see {}", log.display())
            }
        };
        writeln!(stdout, "{}: {}: {line}", after.name, now.name)
            .context("cannot write to stdout")?;
    }
    ensure!(failed == 0, "{failed} of the daemons of {} could not be replaced", after.name);
    Ok(())
}
