//! Running a pod: every daemon started, watched, started again when it dies, stopped at the end.
//!
//! Theory of operation. The launcher has one thread, which sleeps until a signal comes or a daemon is
//! to be started again. Children are bound to it by the kernel, so that none is left behind even if
//! the launcher is killed. Nothing here touches a device's data: a launcher that is stopped in a
//! debugger stops no guest.
//!
//! Order: run directory and its lock → daemons, each until it listens → the VMM's arguments are
//! printed → (with `--exec`) the VMM → ... → the VMM is stopped → the daemons → the directory is emptied.
//!
//! An upgrade (SIGUSR1, `outboard upgrade`) starts a newer process beside each daemon; the older one ends
//! when it has handed its guest over, and goes on when the newer one fails before.

pub mod commands;
mod readiness;
mod run_dir;
mod service;
mod signals;
mod spawn;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use self::run_dir::RunDir;
use self::service::{News, Service};
use self::signals::Wakes;
use self::spawn::spawn;
use crate::layout::Layout;
use crate::pod::Pod;
use crate::state::{self, PodState};
use crate::vmm_args::VmmCommand;

/// How long a daemon may take until it listens; milliseconds, unless the machine is busy.
const READY_TIMEOUT: Duration = Duration::from_secs(15);
/// How often that is looked at.
const READY_POLL: Duration = Duration::from_millis(5);
/// How long a daemon may finish what is in flight after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a VMM may take to leave after SIGTERM.
const VMM_STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Sleeping without a reason to wake up.
const LONG: Duration = Duration::from_secs(3600);

/// What is to be run.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Its file.
    pub file: &'a Path,
    /// Where its sockets shall be.
    pub layout: &'a Layout,
    /// Where the daemons' programs are.
    pub bin_dir: PathBuf,
    /// The VMM's command, which is printed.
    pub vmm: VmmCommand,
    /// Whether it is also run.
    pub exec: bool,
}

/// A pod with its daemons.
struct Running<'a> {
    launch: &'a Launch<'a>,
    services: Vec<Service>,
    vmm: Option<Child>,
    wakes: Wakes,
    started: u64,
}

/// Runs a pod until SIGTERM, SIGINT or SIGHUP, or until the VMM ends.
///
/// # Errors
/// A daemon does not start (all others are stopped then), or the VMM fails.
pub fn run(launch: &Launch<'_>) -> Result<()> {
    let wakes = Wakes::new().context("signal handlers")?;
    let specs = commands::daemons(launch.pod, launch.layout);
    let _dir = RunDir::take(launch.layout, &specs)?;
    let services = specs.into_iter().map(Service::new).collect();
    let mut running = Running { launch, services, vmm: None, wakes, started: state::now() };
    let outcome = running.serve();
    running.stop();
    outcome
}

impl Running<'_> {
    fn serve(&mut self) -> Result<()> {
        if !self.start_all()? {
            return Ok(());
        }
        self.write_state();
        self.announce()?;
        if self.launch.exec {
            self.start_vmm()?;
        }
        while !self.wakes.stop() {
            if let Some(vmm) = &mut self.vmm
                && let Some(status) = vmm.try_wait().context("cannot wait for the VMM")?
            {
                self.vmm = None;
                ensure!(status.success(), "{} ended with {status}", self.launch.vmm.program);
                return Ok(());
            }
            if self.wakes.take_upgrade() {
                self.upgrade_services();
            }
            self.look_after_services();
            let due = self.services.iter().filter_map(Service::due_in).min();
            self.wakes.wait(due.unwrap_or(LONG));
        }
        tracing::info!("stopping the pod {}", self.launch.pod.name);
        Ok(())
    }

    /// Starts every daemon and waits until all listen. False: asked to stop meanwhile.
    fn start_all(&mut self) -> Result<bool> {
        for service in &mut self.services {
            service.start(&self.launch.bin_dir)?;
        }
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            if self.wakes.stop() {
                return Ok(false);
            }
            let mut all_ready = true;
            for service in &mut self.services {
                let (name, program) = (service.spec.name.clone(), service.spec.kind.program());
                if let Some(News::Ended(status)) = service.news() {
                    bail!("{program} for {name} did not start ({status}): {}", service.log_tail());
                }
                if !service.is_ready() {
                    all_ready = false;
                    ensure!(
                        Instant::now() < deadline,
                        "{program} for {name} does not listen after {READY_TIMEOUT:?}: {}",
                        service.log_tail()
                    );
                }
            }
            if all_ready {
                return Ok(true);
            }
            self.wakes.wait(READY_POLL);
        }
    }

    /// Tells the operator, and the VMM's file if it has one, how the VMM is attached.
    fn announce(&self) -> Result<()> {
        let launch = self.launch;
        let (name, count) = (&launch.pod.name, self.services.len());
        tracing::info!("the pod {name} is up in {}; devices: {count}", launch.layout.dir.display());
        if let Some((path, text)) = &launch.vmm.file {
            fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let mut stdout = io::stdout().lock();
        // A closed stdout is no reason to stop devices.
        let _ = writeln!(stdout, "{}", launch.vmm.shell_line()).and_then(|()| stdout.flush());
        Ok(())
    }

    fn start_vmm(&mut self) -> Result<()> {
        let vmm = &self.launch.vmm;
        let mut command = Command::new(&vmm.program);
        command.args(&vmm.arguments);
        let child = spawn(&mut command)
            .with_context(|| format!("cannot start {}; is it installed?", vmm.program))?;
        self.vmm = Some(child);
        Ok(())
    }

    /// Has newer processes take over from the daemons.
    fn upgrade_services(&mut self) {
        for service in &mut self.services {
            if let Err(error) = service.upgrade(&self.launch.bin_dir) {
                tracing::error!("{error:#}");
            }
        }
        self.write_state();
    }

    /// Plans the restart of what died, and restarts what is due.
    fn look_after_services(&mut self) {
        let mut changed = false;
        for service in &mut self.services {
            let (name, program) = (service.spec.name.clone(), service.spec.kind.program());
            let news = service.news();
            changed |= news.is_some();
            match news {
                Some(News::Ended(status)) => {
                    let wait = service.plan_restart(status);
                    tracing::warn!(
                        "{program} for {name} ended ({status}); starts again in {wait:?}"
                    );
                }
                Some(News::Upgraded) => {
                    tracing::info!("a newer {program} for {name} has taken over");
                }
                Some(News::NotUpgraded(status)) => {
                    let log = service.log_tail();
                    tracing::error!(
                        "the newer {program} for {name} did not take over ({status}): {log}"
                    );
                }
                None => {}
            }
            if service.due_in().is_some_and(|wait| wait.is_zero()) {
                changed = true;
                match service.restart(&self.launch.bin_dir) {
                    Ok(()) => tracing::info!("{program} for {name} was started again"),
                    Err(error) => {
                        tracing::error!("{error:#}");
                        service.postpone();
                    }
                }
            }
        }
        if changed {
            self.write_state();
        }
    }

    /// Without it `ps` and `top` show less; the devices do not mind.
    fn write_state(&self) {
        let launch = self.launch;
        let state = PodState {
            name: launch.pod.name.clone(),
            pid: std::process::id(),
            file: std::path::absolute(launch.file).unwrap_or_else(|_| launch.file.to_owned()),
            dir: launch.layout.dir.clone(),
            started: self.started,
            devices: self.services.iter().map(Service::state).collect(),
        };
        if let Err(error) = state.write(launch.layout) {
            tracing::warn!("cannot write {}: {error}", launch.layout.state().display());
        }
    }

    /// Stops the VMM, then the daemons, each by force if it does not leave in time.
    fn stop(&mut self) {
        if let Some(mut vmm) = self.vmm.take() {
            // Not waited for yet, so the number is still its own.
            let _ = kill_process(Pid::from_child(&vmm), Signal::TERM);
            let deadline = Instant::now() + VMM_STOP_TIMEOUT;
            while matches!(vmm.try_wait(), Ok(None)) && Instant::now() < deadline {
                self.wakes.wait(READY_POLL);
            }
            let _ = vmm.kill();
            let _ = vmm.wait();
        }
        for service in &self.services {
            service.signal(Signal::TERM);
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        for service in &mut self.services {
            while service.is_running() && Instant::now() < deadline {
                self.wakes.wait(READY_POLL);
            }
            service.kill();
        }
    }
}
