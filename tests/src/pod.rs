//! A pod: the four daemons of the workspace with small host sides, ready for one guest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::daemon::{Daemon, bin};
use crate::guests::qemu::QemuGuest;
use crate::guests::uml::UmlGuest;
use crate::guests::{Job, VirtioId};
use crate::netns::NetNs;
use crate::toolroot::ToolRoot;

/// The host's address on the pod's network.
pub const HOST_ADDRESS: &str = "192.0.2.1";
/// The guest's address on the pod's network.
pub const GUEST_ADDRESS: &str = "192.0.2.2";
/// The size of the pod's disk.
const DISK_BYTES: u64 = 128 << 20;
/// Queues of each device of a QEMU guest, as many as it has CPUs.
const QUEUES: u32 = 2;

/// Four daemons that listen; dropping it ends them and removes their files.
#[derive(Debug)]
pub struct Pod {
    root: &'static ToolRoot,
    dir: TempDir,
    namespace: NetNs,
    daemons: Vec<(VirtioId, Daemon)>,
}

impl Pod {
    /// Starts the daemons; the network's host side is in `namespace`.
    ///
    /// # Errors
    /// When one does not start.
    pub fn start(root: &'static ToolRoot, namespace: &NetNs) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("outboard-pod-").tempdir()?;
        fs::create_dir(dir.path().join("shared"))?;
        File::create(dir.path().join("disk.img"))?.set_len(DISK_BYTES)?;
        let mut pod = Self { root, dir, namespace: namespace.clone(), daemons: Vec::new() };
        for id in [VirtioId::Fs, VirtioId::Blk, VirtioId::Net, VirtioId::Vsock] {
            let daemon = pod.start_daemon(id)?;
            pod.daemons.push((id, daemon));
        }
        namespace.ip(root, &format!("address add {HOST_ADDRESS}/24 dev tap0"))?;
        namespace.ip(root, "link set tap0 up")?;
        Ok(pod)
    }

    /// Starts the daemon of a device; its socket may still be there from one that was killed.
    fn start_daemon(&self, id: VirtioId) -> Result<Daemon> {
        let at = |name: &str| self.dir.path().join(name);
        let (name, arguments) = match id {
            VirtioId::Fs => (
                "virtiofsd",
                vec![format!("--shared-dir={}", at("shared").display()), "--tag=shared".to_owned()],
            ),
            VirtioId::Blk => {
                ("vhost-user-blk", vec![format!("--blk-file={}", at("disk.img").display())])
            }
            VirtioId::Net => {
                ("vhost-user-net", vec!["--tap=tap0".to_owned(), format!("--queue-pairs={QUEUES}")])
            }
            VirtioId::Vsock => (
                "vsock-proxy",
                vec![format!("--uds-path={}", self.vsock().display()), "--guest-cid=3".to_owned()],
            ),
        };
        let socket = at(&format!("{name}.sock"));
        let mut command = Command::new(bin(name)?);
        command.arg(format!("--socket-path={}", socket.display())).args(arguments);
        if id == VirtioId::Net {
            self.namespace.enter(&mut command);
        }
        Daemon::start_command(name, command, &socket)
    }

    /// Kills the daemon of a device as a crash would, and starts it again.
    ///
    /// # Errors
    /// When the pod has no such device or the daemon does not start.
    pub fn crash(&mut self, id: VirtioId) -> Result<()> {
        self.daemon_mut(id)?.kill()?;
        let daemon = self.start_daemon(id)?;
        // The old one was killed on purpose: its end is no news.
        *self.daemon_mut(id)? = daemon;
        Ok(())
    }

    /// The daemon of a device.
    ///
    /// # Errors
    /// When the pod has no such device.
    pub fn daemon_mut(&mut self, id: VirtioId) -> Result<&mut Daemon> {
        let daemon = self.daemons.iter_mut().find(|(of, _)| *of == id);
        Ok(&mut daemon.context("the pod has no such device")?.1)
    }

    /// The shared directory.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.dir.path().join("shared")
    }

    /// The Unix socket at which the host calls the guest's vsock.
    #[must_use]
    pub fn vsock(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    /// The Unix socket that the guest reaches as `port` of the host's vsock.
    #[must_use]
    pub fn vsock_service(&self, port: u16) -> PathBuf {
        self.dir.path().join(format!("vsock_{port}"))
    }

    /// The job `name`, told of the addresses, with the tools pods' jobs use.
    ///
    /// # Errors
    /// When there is no such job.
    pub fn job(name: &str) -> Result<Job> {
        Ok(["/usr/sbin/mkfs.ext4", "/usr/sbin/e2fsck", "/usr/bin/fio", "/usr/bin/socat"]
            .iter()
            .fold(Job::named(name)?, |job, tool| job.tool(tool))
            .set("HOST_ADDRESS", HOST_ADDRESS)
            .set("GUEST_ADDRESS", GUEST_ADDRESS))
    }

    /// A guest of User Mode Linux with all four devices.
    #[must_use]
    pub fn uml(&self) -> UmlGuest {
        let guest = UmlGuest::new(self.root);
        self.daemons.iter().fold(guest, |guest, (id, daemon)| guest.device(daemon.socket(), *id))
    }

    /// A guest of QEMU with two CPUs, all four devices, and two queues where a device has several.
    #[must_use]
    pub fn qemu(&self) -> QemuGuest {
        let guest = QemuGuest::new(self.root).cpus(QUEUES);
        self.daemons.iter().fold(guest, |guest, (id, daemon)| {
            let socket: &Path = daemon.socket();
            match id {
                VirtioId::Blk => guest.device_with(socket, *id, &format!("num-queues={QUEUES}")),
                VirtioId::Fs => {
                    guest.device_with(socket, *id, &format!("num-request-queues={QUEUES}"))
                }
                VirtioId::Net => guest.network(socket, QUEUES),
                VirtioId::Vsock => guest.device(socket, *id),
            }
        })
    }
}
