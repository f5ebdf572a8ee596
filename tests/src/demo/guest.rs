//! The guest's part of the demo: booting it, following its steps, and what they say.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::devices::{Devices, GREETING, GUEST_ADDRESS, HOST_ADDRESS, Kind};
use super::report::{Outcome, Report};
use super::terminal::Terminal;
use super::vsock_host::{self, Figures, VsockHost};
use super::{Vmm, not_stopped, progress};
use crate::guests::qemu::QemuGuest;
use crate::guests::uml::UmlGuest;
use crate::guests::{GuestResult, Job, RunningGuest};
use crate::toolroot::ToolRoot;

/// How long each timed measurement runs in the guest.
const SECONDS_EACH: &str = "3";
/// Far above what it takes, emulation included, so that only a hang reaches it.
const TIMEOUT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(20);

/// What the number of a `result` line is.
#[derive(Debug, Clone, Copy)]
enum Unit {
    Iops,
    FilesPerSecond,
    KibPerSecond,
    BytesPerSecond,
    MbitPerSecond,
    Microseconds,
    Seconds,
    /// The step has nothing to measure.
    Nothing,
}

/// One step of `jobs/demo.sh`; its row in the table.
#[derive(Debug)]
struct Step {
    kind: Kind,
    name: &'static str,
    done: &'static str,
    unit: Unit,
}

const fn step(kind: Kind, name: &'static str, done: &'static str, unit: Unit) -> Step {
    Step { kind, name, done, unit }
}

const STEPS: [Step; 15] = [
    step(Kind::Fs, "fs_files", "mounts the directory, creates 1000 files", Unit::FilesPerSecond),
    step(Kind::Fs, "fs_write", "fio: writes a file, 1 MiB blocks", Unit::KibPerSecond),
    step(Kind::Fs, "fs_read", "fio: reads it, 1 MiB blocks", Unit::KibPerSecond),
    step(Kind::Fs, "fs_random", "fio: random 4 KiB reads, one at a time", Unit::Iops),
    step(Kind::Blk, "blk_write", "fio: writes the disk, 1 MiB blocks", Unit::KibPerSecond),
    step(Kind::Blk, "blk_read", "fio: reads it, 1 MiB blocks", Unit::KibPerSecond),
    step(Kind::Blk, "blk_random", "fio: random 4 KiB reads, 32 at a time", Unit::Iops),
    step(Kind::Blk, "blk_ext4", "ext4: made, filled, checked, same after a remount", Unit::Nothing),
    step(Kind::Net, "net_ping", "ping the host", Unit::Microseconds),
    step(Kind::Net, "net_up", "iperf3: TCP to the host", Unit::MbitPerSecond),
    step(Kind::Net, "net_down", "iperf3: TCP from the host", Unit::MbitPerSecond),
    step(Kind::Vsock, "vsock_call", "calls a service of the host", Unit::Nothing),
    step(Kind::Vsock, "vsock_up", "sends 256 MiB to the host", Unit::BytesPerSecond),
    step(Kind::Vsock, "vsock_down", "receives 256 MiB from the host", Unit::BytesPerSecond),
    step(Kind::Vsock, "vsock_echo", "the host calls the guest: 64-byte echo", Unit::Seconds),
];

/// Boots the guest with every device, follows it to its end and adds the rows.
///
/// # Errors
/// When it was stopped, or a guest cannot be started at all.
pub(super) fn show(
    root: &'static ToolRoot,
    vmm: Vmm,
    devices: &Devices,
    stop: &AtomicBool,
    report: &mut Report,
) -> Result<()> {
    let has_vsock = devices.running().iter().any(|(kind, _)| *kind == Kind::Vsock);
    let vsock = if has_vsock { Some(VsockHost::start(&devices.places().vsock)?) } else { None };
    let job = job("demo", devices)?
        .set("SECONDS_EACH", SECONDS_EACH)
        .set("BULK_BYTES", &vsock_host::BULK_BYTES.to_string());
    let guest = boot(root, vmm, devices, &job, false, stop)?;
    let followed = follow(guest, stop);
    let (figures, vsock_outcome) = match vsock {
        Some(host) => host.finish(),
        None => (Figures::new(), Ok(())),
    };
    let result = followed?;
    add_rows(&result, &figures, devices, report);
    if let (false, Err(error)) = (report.is_good(), vsock_outcome) {
        report.note(format!("vsock, seen from the host: {error:#}"));
    }
    Ok(())
}

/// Boots the guest again with its console on this terminal, until its user leaves.
///
/// # Errors
/// When it was stopped, or the guest cannot be started.
pub(super) fn keep(
    root: &'static ToolRoot,
    vmm: Vmm,
    devices: &Devices,
    stop: &AtomicBool,
) -> Result<()> {
    let terminal = Terminal::save();
    let mut guest = boot(root, vmm, devices, &job("demo-shell", devices)?, true, stop)?;
    while !guest.has_ended()? {
        not_stopped(stop)?;
        sleep(POLL);
    }
    not_stopped(stop)?;
    drop(guest);
    drop(terminal);
    Ok(())
}

/// The job `name`, told of the devices.
fn job(name: &str, devices: &Devices) -> Result<Job> {
    let sections: Vec<&str> = devices.running().iter().map(|(kind, _)| kind.section()).collect();
    let places = devices.places();
    Ok(Job::named(name)?
        .tool("/usr/sbin/mkfs.ext4")
        .tool("/usr/sbin/e2fsck")
        .tool("/usr/bin/fio")
        .tool("/usr/bin/iperf3")
        .tool("/usr/bin/socat")
        .set("DEVICES", &sections.join(" "))
        .set("GREETING", GREETING)
        .set("HOST_ADDRESS", HOST_ADDRESS)
        .set("GUEST_ADDRESS", GUEST_ADDRESS)
        .set("SHARED_DIR", &places.shared.to_string_lossy())
        .set("VSOCK_PATH", &places.vsock.to_string_lossy()))
}

fn boot(
    root: &'static ToolRoot,
    vmm: Vmm,
    devices: &Devices,
    job: &Job,
    interactive: bool,
    stop: &AtomicBool,
) -> Result<RunningGuest> {
    let sockets =
        devices.running().iter().map(|(kind, daemon)| (daemon.socket(), kind.virtio_id()));
    match vmm {
        Vmm::Uml => {
            progress("booting User Mode Linux");
            let guest =
                sockets.fold(UmlGuest::new(root), |guest, (path, id)| guest.device(path, id));
            if interactive { guest.interactive().start(job) } else { guest.start(job) }
        }
        Vmm::Qemu => {
            let accelerator = QemuGuest::best_accelerator(root);
            not_stopped(stop)?;
            progress(&format!("booting QEMU with {accelerator}"));
            let guest = QemuGuest::new(root).accelerator(accelerator);
            let guest = sockets.fold(guest, |guest, (path, id)| guest.device(path, id));
            if interactive { guest.interactive().start(job) } else { guest.start(job) }
        }
    }
}

/// Waits until the guest is off, and says each step as it begins.
fn follow(mut guest: RunningGuest, stop: &AtomicBool) -> Result<GuestResult> {
    let started = Instant::now();
    let mut lines_seen = 0;
    loop {
        // Before the guest's end: Ctrl-C in a terminal ends the guest too.
        let ended = guest.has_ended()?;
        not_stopped(stop)?;
        let console = guest.console();
        // Without the part after the last line end, which may still grow.
        let lines = console.rsplit_once('\n').map_or("", |(whole, _)| whole).lines();
        for line in lines.clone().skip(lines_seen) {
            if line.starts_with("init: job starts") {
                progress(&format!(
                    "the guest is up after {:.1} s",
                    started.elapsed().as_secs_f64()
                ));
            }
            let name = line.strip_prefix("step ");
            if let Some(step) = STEPS.iter().find(|step| Some(step.name) == name) {
                progress(&format!("{}: {}", step.kind.binary(), step.done));
            }
        }
        lines_seen = lines.count();
        if ended || started.elapsed() > TIMEOUT {
            return guest.wait(TIMEOUT);
        }
        sleep(POLL);
    }
}

/// A row for each step of the devices that run: with its figure, or failed.
fn add_rows(result: &GuestResult, figures: &Figures, devices: &Devices, report: &mut Report) {
    let mut values: HashMap<&str, f64> = figures.iter().copied().collect();
    for step in &STEPS {
        if let Some(value) = result.value(step.name).and_then(|text| text.parse().ok()) {
            values.insert(step.name, value);
        }
    }
    let mut failed = false;
    for (kind, daemon) in devices.running() {
        let mut failed_here = false;
        for step in STEPS.iter().filter(|step| step.kind == *kind) {
            let (outcome, figure) = match values.get(step.name) {
                Some(value) => (Outcome::Works, figure(*value, step.unit)),
                None if failed_here => (Outcome::Skipped, "after the failure above".to_owned()),
                None => (Outcome::Failed, "see below".to_owned()),
            };
            failed_here |= outcome == Outcome::Failed;
            report.row(kind.binary(), step.done, outcome, &figure);
        }
        if failed_here {
            report.note(format!("The log of {}:\n{}", kind.binary(), daemon.log()));
        }
        failed |= failed_here;
    }
    if failed {
        report.note(format!("The guest's console ({}):\n{}", result.vmm, result.console));
    }
}

/// A value as a person reads it, with three digits or so.
fn figure(value: f64, unit: Unit) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    match unit {
        Unit::Iops => format!("{value:.0} IOPS"),
        Unit::FilesPerSecond => format!("{value:.0} files/s"),
        Unit::KibPerSecond => format!("{:.0} MiB/s", value / 1024.0),
        Unit::BytesPerSecond => format!("{:.0} MiB/s", value / MIB),
        Unit::MbitPerSecond => format!("{:.2} Gbit/s", value / 1000.0),
        Unit::Microseconds => format!("{value:.0} µs"),
        Unit::Seconds => format!("{:.0} µs", value * 1e6),
        Unit::Nothing => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A step that the script does not have would always fail, and one that is not here be lost.
    #[test]
    fn the_script_has_these_steps() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/jobs/demo.sh");
        let script = std::fs::read_to_string(path).unwrap();
        for step in &STEPS {
            let name = step.name.strip_prefix("net_").unwrap_or(step.name);
            let spelt = ["step ", "measure "].iter().any(|verb| {
                script.contains(&format!("{verb}{}", step.name))
                    || script.contains("step \"net_$direction\"") && ["up", "down"].contains(&name)
            });
            assert!(spelt, "{} is not in demo.sh", step.name);
        }
    }

    #[test]
    fn figures_have_their_unit() {
        assert_eq!(figure(2_097_152.0, Unit::KibPerSecond), "2048 MiB/s");
        assert_eq!(figure(8123.4, Unit::MbitPerSecond), "8.12 Gbit/s");
        assert_eq!(figure(0.000_052_4, Unit::Seconds), "52 µs");
    }
}
