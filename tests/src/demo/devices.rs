//! The demo's daemons: whether this machine can run each, and how it is started and stopped.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::progress;
use super::report::{Outcome, Report};
use crate::daemon::{self, Daemon};
use crate::guests::VirtioId;
use crate::netns::NetNs;
use crate::service::Service;
use crate::toolroot::ToolRoot;

/// What the shared file and the vsock call say.
pub(super) const GREETING: &str = "hello from the host";
/// The two ends of the network, from the block that documentation uses.
pub(super) const HOST_ADDRESS: &str = "192.0.2.1";
pub(super) const GUEST_ADDRESS: &str = "192.0.2.2";
/// The guest's address on vsock.
const GUEST_CID: u32 = 3;
/// The disk, an image whose blocks are allocated as they are written.
const DISK_BYTES: u64 = 512 << 20;
/// From listening to serving takes a daemon milliseconds.
const SETTLING: Duration = Duration::from_millis(50);
/// A daemon leaves in milliseconds; this is for a slow machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The four devices, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Fs,
    Blk,
    Net,
    Vsock,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Fs, Self::Blk, Self::Net, Self::Vsock];

    /// The daemon, which is also what the table calls the device.
    pub(super) fn binary(self) -> &'static str {
        match self {
            Self::Fs => "virtiofsd",
            Self::Blk => "vhost-user-blk",
            Self::Net => "vhost-user-net",
            Self::Vsock => "vsock-proxy",
        }
    }

    /// The section of `jobs/demo.sh`.
    pub(super) fn section(self) -> &'static str {
        match self {
            Self::Fs => "fs",
            Self::Blk => "blk",
            Self::Net => "net",
            Self::Vsock => "vsock",
        }
    }

    pub(super) fn virtio_id(self) -> VirtioId {
        match self {
            Self::Fs => VirtioId::Fs,
            Self::Blk => VirtioId::Blk,
            Self::Net => VirtioId::Net,
            Self::Vsock => VirtioId::Vsock,
        }
    }
}

/// Where the host's sides of the devices are.
#[derive(Debug, Clone)]
pub(super) struct Places {
    pub(super) shared: PathBuf,
    pub(super) vsock: PathBuf,
    disk: PathBuf,
}

/// The daemons that run, and what they need.
#[derive(Debug)]
pub(super) struct Devices {
    running: Vec<(Kind, Daemon)>,
    /// Where the network's host side is; its services end with it.
    network: Option<(NetNs, Service)>,
    places: Places,
}

impl Devices {
    /// Starts every daemon this machine can run; the others become rows that say why not.
    ///
    /// # Errors
    /// When `dir` cannot be written.
    pub(super) fn start(
        root: Option<&'static ToolRoot>,
        dir: &Path,
        report: &mut Report,
    ) -> Result<Self> {
        let at = |name: &str| dir.join(name);
        let places = Places { shared: at("shared"), vsock: at("host-vsock"), disk: at("disk.img") };
        fs::create_dir(&places.shared)?;
        fs::write(places.shared.join("from-host"), GREETING)?;
        File::create(&places.disk)?.set_len(DISK_BYTES)?;
        let mut devices = Self { running: Vec::new(), network: None, places };
        for kind in Kind::ALL {
            let name = kind.binary();
            if let Err(why) = devices.can_run(kind, root, dir) {
                // A table's cell has one line.
                let why = format!("{why:#}").lines().next().unwrap_or_default().to_owned();
                progress(&format!("{name}: skipped: {why}"));
                report.row(name, "starts", Outcome::Skipped, &why);
                continue;
            }
            match devices.start_one(kind, dir) {
                Ok(figure) => {
                    progress(&format!("{name}: {figure}"));
                    report.row(name, "starts, listens", Outcome::Works, &figure);
                }
                Err(error) => {
                    report.row(name, "starts", Outcome::Failed, "see below");
                    report.note(format!("{name} does not start: {error:#}"));
                }
            }
        }
        Ok(devices)
    }

    /// Whether any daemon runs.
    pub(super) fn any(&self) -> bool {
        !self.running.is_empty()
    }

    pub(super) fn running(&self) -> &[(Kind, Daemon)] {
        &self.running
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// Stops every daemon as an operator would; one that does not leave cleanly is a row.
    ///
    /// # Errors
    /// When a process cannot be signalled.
    pub(super) fn stop(&mut self, report: &mut Report) -> Result<()> {
        for (kind, daemon) in &mut self.running {
            let name = kind.binary();
            match daemon.terminate(STOP_TIMEOUT) {
                Ok(status) if status.success() => {}
                Ok(status) => {
                    report.note(format!("{name} ended with {status}; its log:\n{}", daemon.log()))
                }
                Err(error) => report.note(format!("{error:#}")),
            }
        }
        Ok(())
    }

    /// What must be there for a daemon to be of use here.
    fn can_run(&mut self, kind: Kind, root: Option<&'static ToolRoot>, dir: &Path) -> Result<()> {
        let binary = daemon::bin(kind.binary())?;
        let output = Command::new(&binary).arg("--print-capabilities").output()?;
        let is_daemon =
            output.status.success() && String::from_utf8_lossy(&output.stdout).contains("\"type\"");
        ensure!(is_daemon, "this tree has no {} that runs", kind.binary());
        if kind == Kind::Net {
            let root = root.context("the network's host side needs the guest's tools")?;
            self.network = Some(network(root, dir)?);
        }
        Ok(())
    }

    /// Starts a daemon; the figure says how long it took and what it takes.
    fn start_one(&mut self, kind: Kind, dir: &Path) -> Result<String> {
        let socket = dir.join(format!("{}.sock", kind.section()));
        let mut command = Command::new(daemon::bin(kind.binary())?);
        command.arg(with_value("--socket-path=", &socket)).args(self.arguments(kind));
        if let (Kind::Net, Some((namespace, _))) = (kind, &self.network) {
            namespace.enter(&mut command);
        }
        let started = Instant::now();
        let daemon = Daemon::start_command(kind.binary(), command, &socket)?;
        let took = started.elapsed().as_millis();
        // It listens before it gives back what only starting took.
        sleep(SETTLING);
        let memory = daemon.private_bytes()? >> 10;
        self.running.push((kind, daemon));
        Ok(format!("in {took} ms, {memory} KiB of memory"))
    }

    fn arguments(&self, kind: Kind) -> Vec<OsString> {
        match kind {
            Kind::Fs => vec![
                with_value("--shared-dir=", &self.places.shared),
                // User Mode Linux has no way to name a file system; QEMU's own tag is the same.
                "--tag=shared".into(),
            ],
            Kind::Blk => vec![with_value("--blk-file=", &self.places.disk)],
            Kind::Net => vec!["--tap=tap0".into()],
            Kind::Vsock => vec![
                with_value("--uds-path=", &self.places.vsock),
                format!("--guest-cid={GUEST_CID}").into(),
            ],
        }
    }
}

fn with_value(option: &str, path: &Path) -> OsString {
    let mut argument = OsString::from(option);
    argument.push(path);
    argument
}

/// A network name space with the tap device and an iperf3 server.
fn network(root: &ToolRoot, dir: &Path) -> Result<(NetNs, Service)> {
    if !rustix::process::geteuid().is_root() {
        bail!("a tap device needs root");
    }
    File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("/dev/net/tun (modprobe tun)")?;
    let namespace = NetNs::new(root).context("network name space")?;
    namespace.ip(root, "tuntap add dev tap0 mode tap vnet_hdr")?;
    namespace.ip(root, &format!("address add {HOST_ADDRESS}/24 dev tap0"))?;
    namespace.ip(root, "link set tap0 up")?;
    let mut server = root.command("iperf3")?;
    namespace.enter(server.args(["--server", "--forceflush"]));
    let server = Service::start("iperf3", server, dir, "listening on")?;
    Ok((namespace, server))
}
