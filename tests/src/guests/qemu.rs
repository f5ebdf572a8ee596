//! QEMU with emulation: a guest with several CPUs, and devices with several queues.
//!
//! KVM is used only on request ([`QemuGuest::accelerator`]): a `/dev/kvm` that exists may still
//! not run an ordinary kernel.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::fs::Access;

use super::{GuestResult, Job, RunningGuest, VirtioId, initrd};
use crate::toolroot::ToolRoot;

/// QEMU's `-accel` for each CPU of the guest on its own thread of the host.
const EMULATION: &str = "tcg,thread=multi";
/// QEMU's `-accel` for the processor's own virtualisation.
const KVM: &str = "kvm";
/// How long the trial of KVM may take; a working one boots in a second.
const KVM_TIMEOUT: Duration = Duration::from_secs(10);

/// A device of the guest, as QEMU is told of it.
#[derive(Debug, Clone)]
struct Device {
    socket: PathBuf,
    /// QEMU can only connect disks and network cards again; the others refuse to be told.
    can_reconnect: bool,
    /// The arguments, in which `@` stands for the device's character device.
    arguments: Vec<String>,
}

/// A guest to be booted with QEMU.
#[derive(Debug, Clone)]
pub struct QemuGuest {
    root: &'static ToolRoot,
    devices: Vec<Device>,
    memory_mib: u32,
    max_memory_mib: u32,
    cpus: u32,
    accelerator: String,
    reconnect_ms: Option<u32>,
    extra: Vec<String>,
    interactive: bool,
}

impl QemuGuest {
    /// A guest without devices, with two emulated CPUs and 512 MiB of memory.
    #[must_use]
    pub fn new(root: &'static ToolRoot) -> Self {
        Self {
            root,
            devices: Vec::new(),
            memory_mib: 512,
            max_memory_mib: 512,
            cpus: 2,
            accelerator: EMULATION.to_owned(),
            reconnect_ms: None,
            extra: Vec::new(),
            interactive: false,
        }
    }

    /// Adds the device whose daemon listens at `socket`, with QEMU's defaults. A file system gets
    /// the tag `shared`.
    #[must_use]
    pub fn device(self, socket: impl AsRef<Path>, id: VirtioId) -> Self {
        self.device_with(socket, id, "")
    }

    /// As [`QemuGuest::device`], with properties of the device, such as `num-queues=2`.
    #[must_use]
    pub fn device_with(self, socket: impl AsRef<Path>, id: VirtioId, properties: &str) -> Self {
        let comma = if properties.is_empty() { "" } else { "," };
        let line = |name: &str| format!("{name},chardev=@{comma}{properties}");
        let arguments = match id {
            VirtioId::Net => vec![
                "-netdev".to_owned(),
                "vhost-user,id=net-@,chardev=@".to_owned(),
                "-device".to_owned(),
                format!("virtio-net-pci,netdev=net-@{comma}{properties}"),
            ],
            VirtioId::Blk => vec!["-device".to_owned(), line("vhost-user-blk-pci")],
            VirtioId::Vsock => vec!["-device".to_owned(), line("vhost-user-vsock-pci")],
            VirtioId::Fs => vec!["-device".to_owned(), line("vhost-user-fs-pci,tag=shared")],
        };
        self.device_arguments(socket, arguments)
    }

    /// Adds a network card with several queue pairs.
    #[must_use]
    pub fn network(self, socket: impl AsRef<Path>, queue_pairs: u32) -> Self {
        // A vector for each queue, one for the configuration and one for the control queue.
        let vectors = 2 * queue_pairs + 2;
        let arguments = [
            "-netdev".to_owned(),
            format!("vhost-user,id=net-@,chardev=@,queues={queue_pairs}"),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev=net-@,mq=on,vectors={vectors}"),
        ];
        self.device_arguments(socket, arguments.to_vec())
    }

    /// Adds a device by QEMU's own arguments; each `@` in them becomes the name of the character
    /// device that is connected to `socket`.
    #[must_use]
    pub fn device_arguments(mut self, socket: impl AsRef<Path>, arguments: Vec<String>) -> Self {
        let can_reconnect = arguments
            .iter()
            .any(|word| word.starts_with("vhost-user-blk") || word.starts_with("virtio-net"));
        self.devices.push(Device { socket: socket.as_ref().to_owned(), can_reconnect, arguments });
        self
    }

    /// Sets the number of CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Sets the memory at boot, and the memory that hot-plug may grow to.
    #[must_use]
    pub fn memory_mib(mut self, at_boot: u32, at_most: u32) -> Self {
        self.memory_mib = at_boot;
        self.max_memory_mib = at_most;
        self
    }

    /// Sets QEMU's `-accel`, such as `kvm`.
    #[must_use]
    pub fn accelerator(mut self, accelerator: &str) -> Self {
        self.accelerator = accelerator.to_owned();
        self
    }

    /// Makes QEMU connect again to a disk's or network card's daemon that went away, after this
    /// time.
    #[must_use]
    pub fn reconnect_ms(mut self, delay_ms: u32) -> Self {
        self.reconnect_ms = Some(delay_ms);
        self
    }

    /// `kvm` where it runs this very guest, tried once; else emulation. A `/dev/kvm` that exists
    /// proves nothing: on some machines no ordinary kernel boots on it.
    #[must_use]
    pub fn best_accelerator(root: &'static ToolRoot) -> &'static str {
        static KVM_WORKS: OnceLock<bool> = OnceLock::new();
        let works = *KVM_WORKS.get_or_init(|| {
            let guest = Self::new(root).accelerator(KVM);
            let probe = Job::from_script("echo kvm runs me");
            rustix::fs::access("/dev/kvm", Access::READ_OK | Access::WRITE_OK).is_ok()
                && guest.run(&probe, KVM_TIMEOUT).is_ok_and(|result| result.exit_code == Some(0))
        });
        if works { KVM } else { EMULATION }
    }

    /// Gives the guest's console to the terminal instead of a file.
    #[must_use]
    pub fn interactive(mut self) -> Self {
        self.interactive = true;
        self
    }

    /// Adds an argument for QEMU.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.extra.push(argument.to_owned());
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
        let dir = tempfile::Builder::new().prefix("outboard-qemu-").tempdir()?;
        fs::write(dir.path().join("initrd"), initrd::for_job(self.root, job)?)?;
        let console = File::create(dir.path().join("console"))?;
        let mut command = self.root.command("qemu-system-x86_64")?;
        command.args(self.arguments(dir.path()));
        if !self.interactive {
            command.stdin(Stdio::null()).stdout(console.try_clone()?).stderr(console);
        }
        let child = command.spawn().context("start qemu-system-x86_64")?;
        Ok(RunningGuest::new(child, dir))
    }

    fn arguments(&self, dir: &Path) -> Vec<String> {
        let (memory, most) = (self.memory_mib, self.max_memory_mib);
        let hot_plug =
            if most > memory { format!(",slots=32,maxmem={most}M") } else { String::new() };
        let mut arguments: Vec<String> = [
            "-M q35,usb=off,memory-backend=mem -cpu max -nodefaults -no-user-config -no-reboot",
            "-display none -kernel /guest/qemu/vmlinuz",
            &format!("-accel {} -smp {}", self.accelerator, self.cpus),
            &format!("-m {memory}M{hot_plug}"),
            &format!("-object memory-backend-memfd,id=mem,size={memory}M,share=on"),
            &format!("-initrd {}/initrd", dir.display()),
            &format!("-qmp unix:{}/qmp,server=on,wait=off", dir.display()),
        ]
        .iter()
        .flat_map(|line| line.split(' '))
        .map(str::to_owned)
        .collect();
        // With `mon:` the terminal is raw, so that Ctrl-C is the guest's (Ctrl-A x ends QEMU).
        let serial = if self.interactive { "mon:stdio" } else { "stdio" };
        arguments.extend(["-serial", serial].map(str::to_owned));
        arguments.push("-append".to_owned());
        arguments.push(
            "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check \
             random.trust_cpu=on"
                .to_owned(),
        );
        for (number, device) in self.devices.iter().enumerate() {
            let reconnect = match self.reconnect_ms {
                Some(delay) if device.can_reconnect => format!(",reconnect-ms={delay}"),
                _ => String::new(),
            };
            let (id, path) = (format!("chr{number}"), device.socket.display());
            arguments.push("-chardev".to_owned());
            arguments.push(format!("socket,id={id},path={path}{reconnect}"));
            arguments.extend(device.arguments.iter().map(|argument| argument.replace('@', &id)));
        }
        arguments.extend(self.extra.iter().cloned());
        arguments
    }
}
