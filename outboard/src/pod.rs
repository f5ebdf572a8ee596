//! A pod: the devices of one virtual machine, as a TOML file describes them.
//!
//! [`Pod::read`] gives a pod in which every path exists and every value is possible, or all mistakes of
//! the file, each with its line.

mod check;
mod reader;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use outboard_common::config_file::{ConfigError, ConfigFile};
use outboard_common::rate_limiter::Limit;
use toml::de::DeTable;

use self::check::Checker;
use self::reader::{Mistakes, Section};

/// Least CID of a guest; those below are the hypervisor's and the host's. Virtio 1.3, 5.10.4.
const CID_MIN: u64 = 3;
/// Greatest CID of a guest; the one above means any.
const CID_MAX: u64 = 0xffff_fffe;

/// One virtual machine's devices, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its name: `name`, or that of the file.
    pub name: String,
    /// Where its sockets shall be, if the file says so.
    pub run_dir: Option<PathBuf>,
    /// The machine itself.
    pub guest: Guest,
    /// Directories, images and block devices.
    pub volumes: Vec<Volume>,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// Sockets between guest and host.
    pub vsock: Option<Vsock>,
}

/// What the VMM is told besides the devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub cpus: u16,
    /// Kernel image (for UML: the kernel that is run).
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: Option<String>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Names its socket and its daemon.
    pub name: String,
    /// The guest may not write.
    pub readonly: bool,
    /// What it is made of.
    pub storage: Storage,
}

/// What a volume is made of, by tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// `tier = "shared"`: a directory that host and guest see.
    Shared {
        /// The directory.
        dir: PathBuf,
        /// What the guest mounts.
        tag: String,
        /// `virtiofsd --cache`.
        cache: &'static str,
    },
    /// `tier = "image"`: a file that is a disk.
    Image {
        /// The file.
        path: PathBuf,
        /// `raw` or `qcow2`.
        format: &'static str,
        /// Its limits.
        limits: DiskLimits,
    },
    /// `tier = "device"`: a whole block device, without the host's page cache, polled.
    Device {
        /// The block device.
        path: PathBuf,
        /// How long a worker polls before it sleeps, in microseconds.
        poll_us: u32,
        /// Its limits.
        limits: DiskLimits,
    },
}

/// Limits of a disk, for reads and writes apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Requests a second.
    pub iops: Option<Limit>,
    /// Bytes a second.
    pub bps: Option<Limit>,
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Names its socket and its daemon.
    pub name: String,
    /// What is behind it.
    pub network: Network,
    /// Network namespace of the interface.
    pub netns: Option<PathBuf>,
    /// The guest's address.
    pub mac: Option<String>,
    /// In bytes.
    pub mtu: Option<u16>,
    /// Queue pairs.
    pub queue_pairs: u16,
    /// Frames a second, each way.
    pub pps: Option<Limit>,
    /// Bytes a second, each way.
    pub bps: Option<Limit>,
}

/// What is behind a network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// A tap interface, created unless it is there.
    Tap(String),
    /// A macvtap device, like `/dev/tap7`.
    Macvtap(PathBuf),
    /// An interface that is there, shared through a packet socket.
    Packet(String),
    /// The host's sockets, through passt: no interface, and no privileges.
    User {
        /// TCP ports of the host that lead to the guest, as passt has them.
        tcp: Vec<String>,
        /// UDP ports.
        udp: Vec<String>,
    },
}

/// Sockets between guest and host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vsock {
    /// The guest's address.
    pub cid: u64,
    /// The host's end; `None`: in the run directory.
    pub uds_path: Option<PathBuf>,
}

/// The name of the vsock device, which a pod has at most one of.
pub const VSOCK_NAME: &str = "vsock";

/// Why a pod file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ConfigError),
    /// It has mistakes, each one line with its place.
    #[error("{} has {} mistake(s); nothing was started", path.display(), mistakes.len())]
    Mistakes {
        /// The file.
        path: PathBuf,
        /// All of them, in the order of the file.
        mistakes: Vec<String>,
    },
}

impl Pod {
    /// Reads and checks a pod file. Relative paths in it are relative to the file.
    ///
    /// # Errors
    /// Every mistake there is.
    pub fn read(path: &Path) -> Result<Self, PodError> {
        Self::parse(&ConfigFile::read(path)?, path)
    }

    fn parse(file: &ConfigFile, path: &Path) -> Result<Self, PodError> {
        let mistakes = Mistakes::default();
        let (table, errors) = DeTable::parse_recoverable(file.text());
        for error in errors {
            mistakes.add(&error.span().unwrap_or_default(), error.message());
        }
        let mut pod = None;
        // What follows a broken line is read wrongly, so there is nothing to be said about it.
        if mistakes.is_empty() {
            let root = Section::new(table.get_ref(), 0..0, &mistakes);
            pod = Checker::new(path, &mistakes).pod(root);
        }
        match pod {
            Some(pod) if mistakes.is_empty() => Ok(pod),
            _ => Err(PodError::Mistakes { path: path.to_owned(), mistakes: mistakes.lines(file) }),
        }
    }

    /// The names of all devices: volumes, network cards, vsock; in this order everywhere.
    pub fn device_names(&self) -> impl Iterator<Item = &str> {
        let volumes = self.volumes.iter().map(|volume| volume.name.as_str());
        let nics = self.nics.iter().map(|nic| nic.name.as_str());
        volumes.chain(nics).chain(self.vsock.iter().map(|_| VSOCK_NAME))
    }
}
