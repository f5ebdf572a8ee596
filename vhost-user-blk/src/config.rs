//! From command line and configuration file to checked disks: no I/O but reading that one file.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use outboard_common::cli::SocketChoice;
use outboard_common::cli::values::{Size, ValueError, check_socket_path, split_commas};
use outboard_common::config_file;
use outboard_common::rate_limiter::{DirectionLimits, Limit, Limits};
use serde::Deserialize;

use crate::cli::BlkArgs;
use crate::device::{DeviceOptions, MAX_QUEUE_SIZE, MAX_QUEUES};
use crate::request::{ID_LEN, SECTOR_SIZE};
use crate::store::{Cache, OpenOptions};

/// Longest name of a disk, bytes.
const NAME_MAX: usize = 64;

/// A mistake in what the operator asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ConfigError {
    #[error("no disk is given; use --blk-file PATH, --null SIZE, --memory SIZE or --config FILE")]
    NoDisk,
    #[error("no socket is given; use --socket-path PATH or --fd FDNUM")]
    NoSocket,
    #[error("disk {0} has no socket; with several disks, give each one socket=PATH")]
    DiskWithoutSocket(String),
    #[error("disk {0} has a socket of its own; leave --socket-path and --fd out, or its socket")]
    TwoSockets(String),
    #[error("two disks have the socket {0}; give each disk its own")]
    SharedSocket(PathBuf),
    #[error("two disks have the name {0}; give each disk its own")]
    SharedName(String),
    #[error("--serial would give {0} disks the same serial number; use serial= with each disk")]
    SharedSerial(usize),
    #[error("a disk is just one of path, null and memory; give each its own [[disk]]")]
    Kinds,
    #[error("{0:?} is no KEY=VALUE; a comma in a path is written twice")]
    NotKeyValue(String),
    #[error("unknown key {0}; --help lists the keys of a disk")]
    UnknownKey(String),
    #[error("{key} is given twice for one disk; give it once")]
    Twice { key: String },
    #[error("bad value of {key}: {why}")]
    BadValue { key: String, why: String },
    #[error("the serial number {0:?} is longer than {ID_LEN} bytes or not ASCII; shorten it")]
    Serial(String),
    #[error(
        "the size {0} is not a multiple of {SECTOR_SIZE} bytes from {SECTOR_SIZE} on; round it"
    )]
    DiskSize(u64),
    #[error("a queue size of {0} is impossible; give a power of two from 2 to {MAX_QUEUE_SIZE}")]
    QueueSize(u16),
    #[error("{0} queues are impossible; give a number from 1 to {MAX_QUEUES}")]
    NumQueues(u16),
    #[error("a block size of {0} bytes is impossible; give 512, 1024, 2048 or 4096")]
    BlockSize(u64),
    #[error("{0} cannot be used with a qcow2 image or a disk without a file; leave it out")]
    NotForThis(&'static str),
    #[error(
        "the name {0:?} is empty, too long or has control characters; give 1 to {NAME_MAX} others"
    )]
    Name(String),
    #[error("{0}")]
    File(String),
}

/// How an image file is laid out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// A disk as the operator describes it; everything left out has a default.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
#[allow(missing_docs, reason = "the keys are described in the help text of --blk-file")]
pub struct DiskConfig {
    pub path: Option<PathBuf>,
    pub null: Option<Size>,
    pub memory: Option<Size>,
    pub socket: Option<PathBuf>,
    pub name: Option<String>,
    pub format: Option<Format>,
    pub readonly: Option<bool>,
    pub cache: Option<Cache>,
    pub block_size: Option<Size>,
    pub num_queues: Option<u16>,
    pub queue_size: Option<u16>,
    pub serial: Option<String>,
    pub write_cache: Option<bool>,
    pub discard: Option<bool>,
    pub register_memory: Option<bool>,
    pub lock: Option<bool>,
    pub iops: Option<Limit>,
    pub read_iops: Option<Limit>,
    pub write_iops: Option<Limit>,
    pub bps: Option<Limit>,
    pub read_bps: Option<Limit>,
    pub write_bps: Option<Limit>,
}

/// The file of `--config`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Disks {
    disk: Vec<DiskConfig>,
}

/// What a disk is made of.
#[derive(Debug, Clone)]
pub enum Source {
    /// A raw file or block device.
    Raw(OpenOptions),
    /// A qcow2 image.
    Qcow2(OpenOptions),
    /// Nothing; bytes.
    Null(u64),
    /// Memory; bytes.
    Memory(u64),
}

/// A disk, checked.
#[derive(Debug, Clone)]
pub struct Disk {
    /// What it is made of.
    pub source: Source,
    /// Where its front end comes.
    pub socket: SocketChoice,
    /// The rest.
    pub device: DeviceOptions,
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" | "true" | "yes" => Ok(true),
        "off" | "false" | "no" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

fn value<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|e: T::Err| e.to_string())
}

/// Puts a value where none was.
fn once<T>(slot: &mut Option<T>, key: &str, value: Result<T, String>) -> Result<(), ConfigError> {
    let key = key.to_owned();
    if slot.is_some() {
        return Err(ConfigError::Twice { key });
    }
    *slot = Some(value.map_err(|why| ConfigError::BadValue { key, why })?);
    Ok(())
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err("write raw or qcow2"),
        }
    }
}

impl FromStr for Cache {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "direct" => Ok(Self::Direct),
            "buffered" => Ok(Self::Buffered),
            _ => Err("write auto, direct or buffered"),
        }
    }
}

impl DiskConfig {
    /// `PATH[,KEY=VALUE...]`.
    ///
    /// # Errors
    /// The first mistake.
    pub fn parse_file(text: &str) -> Result<Self, ConfigError> {
        Self::parse(text, |disk, path| {
            if path.is_empty() {
                return Err(ConfigError::NoDisk);
            }
            disk.path = Some(path.into());
            Ok(())
        })
    }

    /// `SIZE[,KEY=VALUE...]` of a null disk.
    ///
    /// # Errors
    /// The first mistake.
    pub fn parse_null(text: &str) -> Result<Self, ConfigError> {
        Self::parse(text, |disk, size| once(&mut disk.null, "size", value(size)))
    }

    /// `SIZE[,KEY=VALUE...]` of a memory disk.
    ///
    /// # Errors
    /// The first mistake.
    pub fn parse_memory(text: &str) -> Result<Self, ConfigError> {
        Self::parse(text, |disk, size| once(&mut disk.memory, "size", value(size)))
    }

    fn parse(
        text: &str,
        first: impl FnOnce(&mut Self, &str) -> Result<(), ConfigError>,
    ) -> Result<Self, ConfigError> {
        let mut disk = Self::default();
        let mut parts = split_commas(text).into_iter();
        first(&mut disk, &parts.next().unwrap_or_default())?;
        for part in parts {
            let (key, value) =
                part.split_once('=').ok_or_else(|| ConfigError::NotKeyValue(part.clone()))?;
            disk.set(key, value)?;
        }
        Ok(disk)
    }

    fn set(&mut self, key: &str, text: &str) -> Result<(), ConfigError> {
        match key {
            "socket" => once(&mut self.socket, key, Ok(text.into())),
            "name" => once(&mut self.name, key, Ok(text.into())),
            "format" => once(&mut self.format, key, value(text)),
            "readonly" | "read-only" => once(&mut self.readonly, key, switch(text)),
            "cache" => once(&mut self.cache, key, value(text)),
            "block-size" => once(&mut self.block_size, key, value(text)),
            "num-queues" => once(&mut self.num_queues, key, value(text)),
            "queue-size" => once(&mut self.queue_size, key, value(text)),
            "serial" => once(&mut self.serial, key, Ok(text.into())),
            "write-cache" => once(&mut self.write_cache, key, switch(text)),
            "discard" => once(&mut self.discard, key, switch(text)),
            "register-memory" => once(&mut self.register_memory, key, switch(text)),
            "lock" => once(&mut self.lock, key, switch(text)),
            "iops" => once(&mut self.iops, key, value(text)),
            "read-iops" => once(&mut self.read_iops, key, value(text)),
            "write-iops" => once(&mut self.write_iops, key, value(text)),
            "bps" => once(&mut self.bps, key, value(text)),
            "read-bps" => once(&mut self.read_bps, key, value(text)),
            "write-bps" => once(&mut self.write_bps, key, value(text)),
            _ => Err(ConfigError::UnknownKey(key.to_owned())),
        }
    }

    /// Takes from the command line what the disk does not say itself.
    fn with_defaults(mut self, args: &BlkArgs) -> Self {
        let (defaults, limits) = (&args.defaults, &args.limits);
        let cache = match (defaults.direct, defaults.buffered) {
            (true, _) => Some(Cache::Direct),
            (_, true) => Some(Cache::Buffered),
            _ => None,
        };
        self.readonly = self.readonly.or(defaults.read_only.then_some(true));
        // An option for all disks does not hurt those that it cannot apply to.
        if self.path.is_some() {
            self.cache = self.cache.or(cache);
            self.block_size = self.block_size.or(defaults.block_size);
        }
        self.num_queues = self.num_queues.or(defaults.num_queues);
        self.queue_size = self.queue_size.or(defaults.queue_size);
        self.serial = self.serial.or_else(|| defaults.serial.clone());
        self.write_cache = self.write_cache.or(defaults.write_cache.map(|s| s.is_on()));
        self.discard = self.discard.or(defaults.discard.map(|s| s.is_on()));
        self.register_memory = self.register_memory.or(defaults.register_memory.then_some(true));
        self.iops = self.iops.or(limits.iops);
        self.read_iops = self.read_iops.or(limits.read_iops);
        self.write_iops = self.write_iops.or(limits.write_iops);
        self.bps = self.bps.or(limits.bps);
        self.read_bps = self.read_bps.or(limits.read_bps);
        self.write_bps = self.write_bps.or(limits.write_bps);
        self
    }

    /// What to open.
    fn source(&self) -> Result<Source, ConfigError> {
        let size = |size: Size| match size.bytes() {
            n if n >= SECTOR_SIZE && n.is_multiple_of(SECTOR_SIZE) && i64::try_from(n).is_ok() => {
                Ok(n)
            }
            n => Err(ConfigError::DiskSize(n)),
        };
        let only_files = [
            ("format", self.format.is_some()),
            ("cache", self.cache.is_some()),
            ("block-size", self.block_size.is_some()),
            ("lock", self.lock.is_some()),
        ];
        if self.path.is_none()
            && let Some((key, _)) = only_files.iter().find(|(_, given)| *given)
        {
            return Err(ConfigError::NotForThis(key));
        }
        match (&self.path, self.null, self.memory) {
            (None, Some(n), None) => Ok(Source::Null(size(n)?)),
            (None, None, Some(n)) => Ok(Source::Memory(size(n)?)),
            (Some(path), None, None) => self.file_source(path),
            (None, None, None) => Err(ConfigError::NoDisk),
            _ => Err(ConfigError::Kinds),
        }
    }

    fn file_source(&self, path: &Path) -> Result<Source, ConfigError> {
        let block_size = match self.block_size.map(Size::bytes) {
            None => None,
            Some(n) => match u32::try_from(n) {
                Ok(n @ (512 | 1024 | 2048 | 4096)) => Some(n),
                _ => return Err(ConfigError::BlockSize(n)),
            },
        };
        let options = OpenOptions {
            path: path.to_owned(),
            read_only: self.readonly.unwrap_or(false),
            cache: self.cache.unwrap_or_default(),
            block_size,
            lock: self.lock.unwrap_or(true),
        };
        Ok(match self.format.unwrap_or_default() {
            Format::Raw => Source::Raw(options),
            Format::Qcow2 => Source::Qcow2(options),
        })
    }

    fn limits(&self) -> Limits {
        Limits {
            read: DirectionLimits {
                ops: self.read_iops.or(self.iops),
                bytes: self.read_bps.or(self.bps),
            },
            write: DirectionLimits {
                ops: self.write_iops.or(self.iops),
                bytes: self.write_bps.or(self.bps),
            },
        }
    }

    fn device(&self, number: usize) -> Result<DeviceOptions, ConfigError> {
        let queue_size = self.queue_size.unwrap_or(MAX_QUEUE_SIZE);
        if !queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return Err(ConfigError::QueueSize(queue_size));
        }
        let num_queues = self.num_queues.unwrap_or(MAX_QUEUES);
        if !(1..=MAX_QUEUES).contains(&num_queues) {
            return Err(ConfigError::NumQueues(num_queues));
        }
        let name = self.name.clone().unwrap_or_else(|| format!("blk{number}"));
        check_name(&name)?;
        Ok(DeviceOptions {
            name,
            serial: serial(self.serial.as_deref().unwrap_or(""))?,
            read_only: self.readonly.unwrap_or(false),
            num_queues,
            queue_size,
            write_cache: self.write_cache.unwrap_or(true),
            discard: self.discard.unwrap_or(true),
            limits: self.limits(),
            register_memory: self.register_memory.unwrap_or(false),
        })
    }

    /// The disk, checked; `shared` is the socket of the command line, if this disk may have it.
    fn check(self, number: usize, shared: Option<&SocketChoice>) -> Result<Disk, ConfigError> {
        let source = self.source()?;
        let device = self.device(number)?;
        let socket = match (self.socket, shared) {
            (Some(_), Some(_)) => return Err(ConfigError::TwoSockets(device.name)),
            (Some(path), None) => {
                check_socket_path(&path).map_err(|e: ValueError| ConfigError::BadValue {
                    key: "socket".to_owned(),
                    why: e.to_string(),
                })?;
                SocketChoice::Listen(path)
            }
            (None, Some(choice)) => choice.clone(),
            (None, None) => return Err(ConfigError::DiskWithoutSocket(device.name)),
        };
        Ok(Disk { source, socket, device })
    }
}

/// A serial number as GET_ID gives it: padded with zeroes.
fn serial(text: &str) -> Result<[u8; ID_LEN], ConfigError> {
    let mut id = [0; ID_LEN];
    match id.get_mut(..text.len()) {
        Some(start) if text.is_ascii() => start.copy_from_slice(text.as_bytes()),
        _ => return Err(ConfigError::Serial(text.to_owned())),
    }
    Ok(id)
}

fn read_file(path: &Path) -> Result<Vec<DiskConfig>, ConfigError> {
    let read = config_file::ConfigFile::read(path).and_then(|file| file.parse::<Disks>());
    let disks = read.map_err(|error| ConfigError::File(format!("{:#}", anyhow::Error::new(error))));
    Ok(disks?.disk)
}

/// A name that can be a thread's, and a label of the metrics.
fn check_name(name: &str) -> Result<(), ConfigError> {
    if name.is_empty() || name.len() > NAME_MAX || name.chars().any(char::is_control) {
        return Err(ConfigError::Name(name.to_owned()));
    }
    Ok(())
}

/// All disks that the command line and its configuration file describe.
///
/// # Errors
/// The first mistake.
pub fn disks(args: &BlkArgs) -> Result<Vec<Disk>, ConfigError> {
    let mut configs: Vec<DiskConfig> = Vec::new();
    for list in [&args.disks.blk_file, &args.disks.null, &args.disks.memory] {
        configs.extend(list.iter().cloned());
    }
    if let Some(path) = &args.disks.config {
        configs.extend(read_file(path)?);
    }
    if configs.is_empty() {
        return Err(ConfigError::NoDisk);
    }
    let alone = configs.len() == 1;
    let shared = args.socket.choice();
    if alone && shared.is_none() && configs.iter().all(|d| d.socket.is_none()) {
        return Err(ConfigError::NoSocket);
    }
    if !alone && args.defaults.serial.is_some() {
        return Err(ConfigError::SharedSerial(configs.len()));
    }
    let mut disks: Vec<Disk> = Vec::new();
    for (number, config) in configs.into_iter().enumerate() {
        // A socket of the command line is for one disk only.
        let shared = shared.as_ref().filter(|_| alone || config.socket.is_some());
        let disk = config.with_defaults(args).check(number, shared)?;
        for other in &disks {
            if other.device.name == disk.device.name {
                return Err(ConfigError::SharedName(disk.device.name));
            }
            if let (SocketChoice::Listen(a), SocketChoice::Listen(b)) =
                (&other.socket, &disk.socket)
                && a == b
            {
                return Err(ConfigError::SharedSocket(a.clone()));
            }
        }
        disks.push(disk);
    }
    Ok(disks)
}

#[cfg(test)]
mod tests;
