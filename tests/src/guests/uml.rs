//! User Mode Linux: a guest kernel that is an ordinary process.
//!
//! Its root is the tool root itself, read-only through hostfs, so there is no image to build and
//! every tool is at hand. It has one CPU, rings of at most 256 entries, one queue a device unless it is asked
//! for more, and no reconnection.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{GuestResult, Job, RunningGuest, VirtioId};
use crate::toolroot::ToolRoot;

/// A guest to be booted with User Mode Linux.
#[derive(Debug, Clone)]
pub struct UmlGuest {
    root: &'static ToolRoot,
    devices: Vec<(PathBuf, VirtioId)>,
    memory_mib: u32,
    interactive: bool,
}

impl UmlGuest {
    /// A guest without devices and with 256 MiB of memory.
    #[must_use]
    pub fn new(root: &'static ToolRoot) -> Self {
        Self { root, devices: Vec::new(), memory_mib: 256, interactive: false }
    }

    /// Adds the device whose daemon listens at `socket`.
    #[must_use]
    pub fn device(mut self, socket: impl AsRef<Path>, id: VirtioId) -> Self {
        self.devices.push((socket.as_ref().to_owned(), id));
        self
    }

    /// Sets the guest's memory.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Gives the guest's console to the terminal instead of a file.
    #[must_use]
    pub fn interactive(mut self) -> Self {
        self.interactive = true;
        self
    }

    /// Boots the guest and waits until it is off, at most `timeout`.
    ///
    /// # Errors
    /// When the guest cannot be started; a failing job is in the result.
    pub fn run(&self, job: &Job, timeout: Duration) -> Result<GuestResult> {
        self.start(job)?.wait(timeout)
    }

    /// Boots the guest.
    ///
    /// # Errors
    /// When the guest cannot be started.
    pub fn start(&self, job: &Job) -> Result<RunningGuest> {
        let dir = tempfile::Builder::new().prefix("outboard-uml-").tempdir()?;
        for (name, text) in job.files("uml")? {
            let path = dir.path().join(name);
            fs::write(&path, text)?;
            fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        }
        for (name, path) in job.programs() {
            fs::copy(path, dir.path().join(name))?;
        }
        let console = File::create(dir.path().join("console"))?;
        let mut command = self.root.command_with("linux.uml", &[(dir.path(), "/job")])?;
        command
            .args(self.arguments(dir.path()))
            // The guest's memory is a file there; on a disk every write of it would be written back.
            .env("TMPDIR", "/dev/shm");
        if !self.interactive {
            command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
        }
        let child = command.spawn().context("start linux.uml")?;
        Ok(RunningGuest::new(child, dir))
    }

    fn arguments(&self, dir: &Path) -> Vec<String> {
        let console = if self.interactive { "con0=fd:0,fd:1" } else { "con0=null,fd:1" };
        let mut arguments: Vec<String> = [
            "root=/dev/root rootfstype=hostfs rootflags=/ ro init=/job/init",
            "con=null seccomp=on noreboot panic=-1 quiet random.trust_cpu=on",
            console,
        ]
        .iter()
        .flat_map(|line| line.split(' '))
        .map(str::to_owned)
        .collect();
        arguments.push(format!("mem={}M", self.memory_mib));
        arguments.push(format!("uml_dir={}", dir.display()));
        arguments.push("umid=uml".to_owned());
        for (socket, id) in &self.devices {
            arguments.push(format!("virtio_uml.device={}:{}", socket.display(), *id as u8));
        }
        arguments
    }
}
