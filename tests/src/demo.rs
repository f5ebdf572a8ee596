//! The demo: the project's devices in a real guest, in one table.
//!
//! Theory of operation. Every device that this machine can show is started as a user would start
//! it: a release binary, its sandbox on, a Unix socket. One guest is booted with all of them and
//! runs `jobs/demo.sh`, which says `step NAME` before each step and `result NAME VALUE` after it;
//! what is measured from outside (vsock) is measured here meanwhile. A step without a result has
//! failed, and costs neither the other devices nor the table. Everything lives in one temporary
//! directory and one network name space, and is owned by values whose drop ends it, so that an
//! interruption at any point leaves nothing behind.

mod devices;
mod guest;
mod report;
mod terminal;
mod vsock_host;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::toolroot::ToolRoot;
use devices::Devices;
use report::Report;

/// Which VMM boots the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// User Mode Linux, which runs wherever a process runs.
    Uml,
    /// QEMU, with KVM where it really runs a guest.
    Qemu,
}

/// What the demo is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// The guest's VMM.
    pub vmm: Vmm,
    /// Afterwards boot the guest again with its console on this terminal.
    pub keep: bool,
}

/// Shows the devices on stdout; progress goes to stderr. Ends early, and clean, when `stop` is set.
///
/// Returns whether everything that this machine can show works.
///
/// # Errors
/// When it was stopped, or a guest or the terminal cannot be used at all.
pub fn run(options: Options, stop: &AtomicBool) -> Result<bool> {
    let started = Instant::now();
    let dir = tempfile::Builder::new().prefix("outboard-demo-").tempdir()?;
    let mut report = Report::default();
    progress("looking for the guest's kernel and tools (unpacked the first time, ~550 MB)");
    let root = ToolRoot::guests_unless(stop);
    not_stopped(stop)?;
    let known = root.as_ref().ok().copied();
    let mut devices = Devices::start(known, dir.path(), &mut report)?;
    not_stopped(stop)?;
    match &root {
        Ok(root) if devices.any() => {
            guest::show(root, options.vmm, &devices, stop, &mut report)?;
        }
        Ok(_) => {}
        Err(error) => report.note(format!("No guest could be booted: {error:#}.")),
    }
    print(&report.table())?;
    if let (Some(root), true) = (known, options.keep && devices.any()) {
        guest::keep(root, options.vmm, &devices, stop)?;
    }
    devices.stop(&mut report)?;
    drop(devices);
    dir.close().context("remove the demo's directory")?;
    let took = started.elapsed().as_secs_f64();
    print(&format!(
        "{}{}; all stopped and removed after {took:.0} s.\n",
        report.notes(),
        report.summary()
    ))?;
    Ok(report.is_good())
}

/// A line for the person who waits.
fn progress(line: &str) {
    let _ = writeln!(std::io::stderr(), "demo: {line}");
}

fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("write to stdout")
}

fn not_stopped(stop: &AtomicBool) -> Result<()> {
    ensure!(!stop.load(Ordering::Relaxed), "interrupted; everything is stopped and removed");
    Ok(())
}
