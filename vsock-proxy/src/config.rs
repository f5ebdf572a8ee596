//! What a proxy serves, checked as a whole before anything is opened.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::host::unix::{PATH_MAX, port_path, seqpacket_path};
use crate::packet::{Cid, Port, ReservedCid};
use crate::policy::{BadPortSet, Policy, PortSet};

/// The guest's CID when none is given.
pub const DEFAULT_GUEST_CID: u64 = 3;
/// Bytes of data that a connection may have on its way to the host.
pub const DEFAULT_TX_BUFFER_SIZE: u32 = 256 * 1024;
/// Entries that a virtqueue may have.
pub const DEFAULT_QUEUE_SIZE: u16 = 1024;
/// The group of VMs that name none.
pub const DEFAULT_GROUP: &str = "default";
/// Connections of one VM at one time.
pub const DEFAULT_MAX_CONNECTIONS: u32 = 65536;

/// A configuration that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// One VM's entry lacks something, or has too much.
    #[error("{0}")]
    Entry(&'static str),
    /// The CID is not a guest's.
    #[error(transparent)]
    Cid(#[from] ReservedCid),
    /// Two VMs have one CID.
    #[error("two VMs have the CID {0}")]
    DuplicateCid(Cid),
    /// Two VMs have one socket.
    #[error("{0} is used twice")]
    DuplicatePath(PathBuf),
    /// A socket's path does not fit, with what is added to it.
    #[error("{path} is too long: with its suffixes it must have at most {PATH_MAX} bytes")]
    LongPath {
        /// The path as given.
        path: PathBuf,
    },
    /// Not a queue size of virtio.
    #[error("queue-size {0} is no power of two from 2 to 32768")]
    QueueSize(u64),
    /// Too small to carry anything, or absurd.
    #[error("tx-buffer-size {0} is not between 4096 and 1073741824 bytes")]
    BufferSize(u64),
    /// A set of ports.
    #[error(transparent)]
    Ports(#[from] BadPortSet),
    /// `key=value` was expected.
    #[error("{0:?} is no key=value")]
    NoPair(String),
    /// A key that does not exist.
    #[error("there is no key {0:?}")]
    UnknownKey(String),
    /// A value that is not a number.
    #[error("{key}: {value:?} is no number")]
    Number {
        /// The key.
        key: String,
        /// What was given.
        value: String,
    },
    /// A mapping that is not `PORT:PATH`.
    #[error("{0:?} is no PORT:PATH")]
    Map(String),
    /// Neither true nor false.
    #[error("{key}: {value:?} is neither true nor false")]
    Bool {
        /// The key.
        key: String,
        /// What was given.
        value: String,
    },
}

/// The host's side of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostSide {
    /// Unix sockets: clients come to this path, services are at `PATH_PORT`.
    Unix(PathBuf),
    /// AF_VSOCK: services are those of `cid`, clients come to ports of the same number.
    Vsock {
        /// Where services are.
        cid: u32,
        /// Ports that stand for the guest's.
        listen: Vec<Port>,
    },
}

/// One VM, checked.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// The guest's CID.
    pub guest_cid: Cid,
    /// vhost-user socket.
    pub socket: PathBuf,
    /// The host's side.
    pub host: HostSide,
    /// Bytes of a connection's window from the guest to the host.
    pub tx_buffer_size: u32,
    /// Entries that a virtqueue may have.
    pub queue_size: u16,
    /// Groups; guests that share one may connect to each other.
    pub groups: Vec<String>,
    /// What is allowed.
    pub policy: Policy,
}

/// One VM as the operator writes it, in a file, after `--vm`, or as separate options.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmEntry {
    /// The guest's CID.
    #[serde(alias = "guest_cid", alias = "cid")]
    pub guest_cid: Option<u64>,
    /// vhost-user socket.
    #[serde(alias = "socket-path")]
    pub socket: Option<PathBuf>,
    /// Unix socket for clients.
    #[serde(alias = "uds_path")]
    pub uds_path: Option<PathBuf>,
    /// CID for the guest's connections.
    #[serde(alias = "forward_cid")]
    pub forward_cid: Option<u32>,
    /// Ports for AF_VSOCK clients, joined by `+`.
    #[serde(alias = "forward_listen")]
    pub forward_listen: Option<String>,
    /// Window in bytes.
    #[serde(alias = "tx_buffer_size")]
    pub tx_buffer_size: Option<u64>,
    /// Ring entries.
    #[serde(alias = "queue_size")]
    pub queue_size: Option<u64>,
    /// Groups, joined by `+`.
    pub groups: Option<String>,
    /// No connections from the guest.
    #[serde(default)]
    pub connect_only: bool,
    /// Ports the guest may reach.
    pub allow_host_ports: Option<String>,
    /// Ports of the guest that may be reached.
    pub allow_guest_ports: Option<String>,
    /// Services elsewhere: `PORT:PATH`.
    #[serde(default)]
    pub map: Vec<String>,
    /// Limit of connections.
    pub max_connections: Option<u32>,
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T, ConfigError> {
    value
        .parse()
        .map_err(|_not_one| ConfigError::Number { key: key.to_owned(), value: value.to_owned() })
}

impl VmEntry {
    /// Reads `key=value,…`; underscores and dashes are the same.
    ///
    /// # Errors
    /// Whatever cannot be understood.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let mut entry = Self::default();
        for pair in text.split(',') {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| ConfigError::NoPair(pair.to_owned()))?;
            entry.set(&key.replace('_', "-"), value)?;
        }
        Ok(entry)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        match key {
            "guest-cid" | "cid" => self.guest_cid = Some(number(key, value)?),
            "socket" | "socket-path" => self.socket = Some(value.into()),
            "uds-path" => self.uds_path = Some(value.into()),
            "forward-cid" => self.forward_cid = Some(number(key, value)?),
            "forward-listen" => self.forward_listen = Some(value.to_owned()),
            "tx-buffer-size" => self.tx_buffer_size = Some(number(key, value)?),
            "queue-size" => self.queue_size = Some(number(key, value)?),
            "groups" => self.groups = Some(value.to_owned()),
            "connect-only" => {
                self.connect_only = value.parse().map_err(|_not_one| ConfigError::Bool {
                    key: key.to_owned(),
                    value: value.to_owned(),
                })?;
            }
            "allow-host-ports" => self.allow_host_ports = Some(value.to_owned()),
            "allow-guest-ports" => self.allow_guest_ports = Some(value.to_owned()),
            "map" => self.map.push(value.to_owned()),
            "max-connections" => self.max_connections = Some(number(key, value)?),
            _ => return Err(ConfigError::UnknownKey(key.to_owned())),
        }
        Ok(())
    }

    /// Checks the entry; `socket` may have been given otherwise.
    ///
    /// # Errors
    /// What cannot be served.
    pub fn check(self, socket: Option<&Path>) -> Result<VmConfig, ConfigError> {
        let guest_cid = Cid::guest(self.guest_cid.unwrap_or(DEFAULT_GUEST_CID))?;
        let socket = self.socket.or_else(|| socket.map(Path::to_owned)).unwrap_or_default();
        let host = match (self.uds_path, self.forward_cid) {
            (Some(path), None) if self.forward_listen.is_none() => HostSide::Unix(path),
            (None, Some(cid)) => {
                let listen = self.forward_listen.as_deref().map_or(Ok(Vec::new()), port_list)?;
                HostSide::Vsock { cid, listen }
            }
            (None, None) => {
                return Err(ConfigError::Entry("a VM needs uds-path, or forward-cid"));
            }
            _ => {
                return Err(ConfigError::Entry("uds-path and forward-cid exclude each other"));
            }
        };
        let set = |text: Option<String>| text.map(|t| t.parse::<PortSet>()).transpose();
        let config = VmConfig {
            guest_cid,
            socket,
            host,
            tx_buffer_size: buffer_size(self.tx_buffer_size)?,
            queue_size: queue_size(self.queue_size)?,
            groups: groups(self.groups.as_deref()),
            policy: Policy {
                connect_only: self.connect_only,
                host_ports: set(self.allow_host_ports)?,
                guest_ports: set(self.allow_guest_ports)?,
                map: self.map.iter().map(|m| mapping(m)).collect::<Result<_, _>>()?,
                max_connections: self.max_connections.unwrap_or(DEFAULT_MAX_CONNECTIONS),
            },
        };
        config.check_paths()?;
        Ok(config)
    }
}

impl VmConfig {
    fn check_paths(&self) -> Result<(), ConfigError> {
        let fits = |path: &Path, given: &Path| {
            if path.as_os_str().as_bytes().len() <= PATH_MAX {
                return Ok(());
            }
            Err(ConfigError::LongPath { path: given.to_owned() })
        };
        fits(&self.socket, &self.socket)?;
        if let HostSide::Unix(base) = &self.host {
            fits(&port_path(base, Port(u32::MAX)), base)?;
            fits(&seqpacket_path(base), base)?;
        }
        self.policy.map.values().try_for_each(|path| fits(path, path))
    }
}

fn port_list(text: &str) -> Result<Vec<Port>, ConfigError> {
    text.split('+').map(|port| number("forward-listen", port).map(Port)).collect()
}

fn mapping(text: &str) -> Result<(u32, PathBuf), ConfigError> {
    let bad = || ConfigError::Map(text.to_owned());
    let (port, path) = text.split_once(':').ok_or_else(bad)?;
    let port = port.parse().map_err(|_not_one| bad())?;
    if path.is_empty() { Err(bad()) } else { Ok((port, path.into())) }
}

fn groups(text: Option<&str>) -> Vec<String> {
    text.unwrap_or(DEFAULT_GROUP).trim().split('+').map(str::to_owned).collect()
}

fn buffer_size(value: Option<u64>) -> Result<u32, ConfigError> {
    let value = value.unwrap_or_else(|| DEFAULT_TX_BUFFER_SIZE.into());
    u32::try_from(value)
        .ok()
        .filter(|size| (4096..=1 << 30).contains(size))
        .ok_or(ConfigError::BufferSize(value))
}

fn queue_size(value: Option<u64>) -> Result<u16, ConfigError> {
    let value = value.unwrap_or_else(|| DEFAULT_QUEUE_SIZE.into());
    u16::try_from(value)
        .ok()
        .filter(|size| (2..=32768).contains(size) && size.is_power_of_two())
        .ok_or(ConfigError::QueueSize(value))
}

/// A configuration file: TOML with a `[[vm]]` for each, or YAML with a list `vms`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// The VMs; the plural is for files written for other proxies.
    #[serde(alias = "vms")]
    pub vm: Vec<VmEntry>,
}

/// Checks what concerns all VMs together.
///
/// # Errors
/// No VM, two with the same CID, or two with the same socket.
pub fn check_together(vms: &[VmConfig]) -> Result<(), ConfigError> {
    if vms.is_empty() {
        return Err(ConfigError::Entry("there is no VM to serve"));
    }
    let mut cids = BTreeMap::new();
    let mut paths = BTreeMap::new();
    for vm in vms {
        if cids.insert(vm.guest_cid, ()).is_some() {
            return Err(ConfigError::DuplicateCid(vm.guest_cid));
        }
        let host = match &vm.host {
            HostSide::Unix(path) => Some(path),
            HostSide::Vsock { .. } => None,
        };
        for path in host.into_iter().chain(Some(&vm.socket).filter(|s| !s.as_os_str().is_empty())) {
            if paths.insert(path.clone(), ()).is_some() {
                return Err(ConfigError::DuplicatePath(path.clone()));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
