//! The command line. The options of vhost-device-vsock have the same meaning here.

use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::{Args, Parser};
use outboard_common::capabilities::Capabilities;
use outboard_common::cli::values::{Size, socket_path};
use outboard_common::cli::{
    CapabilitiesArgs, HandoverArgs, LogArgs, MetricsArgs, SandboxArgs, SocketArgs, SocketChoice,
    WorkerArgs,
};
use outboard_common::config_file;

use crate::config::{
    ConfigFile, DEFAULT_GROUP, DEFAULT_GUEST_CID, DEFAULT_MAX_CONNECTIONS, DEFAULT_QUEUE_SIZE,
    VmConfig, VmEntry, check_together,
};

/// What `--print-capabilities` prints.
pub const CAPABILITIES: Capabilities =
    Capabilities { device_type: "vsock", features: &["seqpacket"] };

/// What `--help` and the manual page end with.
const EXAMPLES: &str = r#"Examples:
  One guest; clients of the host say CONNECT 1234 to /run/vm.vsock, it reaches /run/vm.vsock_PORT:
    vsock-proxy --guest-cid=3 --socket=/run/vsock.sock --uds-path=/run/vm.vsock

  Two guests that may connect to each other:
    vsock-proxy --vm guest-cid=3,socket=/run/a.sock,uds-path=/run/a.vsock,groups=pod \
        --vm guest-cid=4,socket=/run/b.sock,uds-path=/run/b.vsock,groups=pod

  A guest that is called and calls nobody, on two ports:
    vsock-proxy --socket=/run/vsock.sock --uds-path=/run/vm.vsock --connect-only \
        --allow-guest-ports=22+1024"#;

/// Connects the vsock sockets of virtual machines to Unix sockets of the host over vhost-user
#[derive(Debug, Clone, Parser)]
#[command(name = "vsock-proxy", version, max_term_width = 100, after_long_help = EXAMPLES)]
pub struct VsockArgs {
    /// Where the front end comes, with one VM.
    #[command(flatten)]
    pub connection: SocketArgs,
    /// Where a newer proxy takes over.
    #[command(flatten)]
    pub handover: HandoverArgs,
    /// The VM, if there is one.
    #[command(flatten)]
    pub single: SingleArgs,
    /// The VMs, if there are several.
    #[command(flatten)]
    pub several: SeveralArgs,
    /// Worker threads.
    #[command(flatten)]
    pub worker: WorkerArgs,
    /// Log.
    #[command(flatten)]
    pub log: LogArgs,
    /// Metrics.
    #[command(flatten)]
    pub metrics: MetricsArgs,
    /// Sandbox.
    #[command(flatten)]
    pub sandbox: SandboxArgs,
    /// Capabilities.
    #[command(flatten)]
    pub capabilities: CapabilitiesArgs,
}

/// One VM.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "One VM")]
#[group(id = "single", multiple = true)]
pub struct SingleArgs {
    /// The same as --socket-path
    #[arg(long, value_name = "PATH", value_parser = socket_path(),
          conflicts_with_all = ["socket_path", "fd"])]
    pub socket: Option<PathBuf>,

    /// CID of the guest: 3 to 4294967294 [default: 3]
    #[arg(long, value_name = "CID")]
    pub guest_cid: Option<u64>,

    /// Unix socket for clients of the host: CONNECT PORT. The guest reaches PATH_PORT; seqpacket
    /// clients come to PATH_seqpacket
    #[arg(long, value_name = "PATH", conflicts_with_all = ["forward_cid", "forward_listen"])]
    pub uds_path: Option<PathBuf>,

    /// Connect the guest to this CID of the host's own AF_VSOCK instead of to Unix sockets
    #[arg(long, value_name = "CID")]
    pub forward_cid: Option<u32>,

    /// AF_VSOCK ports of the host, joined by +, that stand for the guest's of the same number
    #[arg(long, value_name = "PORTS", requires = "forward_cid")]
    pub forward_listen: Option<String>,

    /// Bytes that a connection may have on the way from the guest to the host [default: 256K]
    #[arg(long, value_name = "SIZE")]
    pub tx_buffer_size: Option<Size>,

    /// Entries that a virtqueue may have: a power of two
    #[arg(long, value_name = "N", default_value_t = DEFAULT_QUEUE_SIZE)]
    pub queue_size: u16,

    /// Groups, joined by +; guests that share one may connect to each other
    #[arg(long, value_name = "NAMES", default_value = DEFAULT_GROUP)]
    pub groups: String,

    /// The host may connect to the guest, and the guest to nothing
    #[arg(long)]
    pub connect_only: bool,

    /// Ports that the guest may connect to, like 1024-2000+5000 [default: all]
    #[arg(long, value_name = "PORTS")]
    pub allow_host_ports: Option<String>,

    /// Ports of the guest that the host may connect to [default: all]
    #[arg(long, value_name = "PORTS")]
    pub allow_guest_ports: Option<String>,

    /// The guest reaches PORT at this Unix socket instead of at PATH_PORT; repeatable
    #[arg(long, value_name = "PORT:PATH")]
    pub map: Vec<String>,

    /// Connections and waiting clients at one time
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_CONNECTIONS)]
    pub max_connections: u32,
}

/// Several VMs.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Several VMs")]
pub struct SeveralArgs {
    /// A VM; repeatable. KEY is one of guest-cid, socket, uds-path, forward-cid, forward-listen,
    /// tx-buffer-size, queue-size, groups, connect-only, allow-host-ports, allow-guest-ports, map,
    /// max-connections
    #[arg(long, value_name = "KEY=VALUE,...",
          conflicts_with_all = ["single", "config", "socket_path", "fd"])]
    pub vm: Vec<String>,

    /// File with all VMs, its keys those of --vm: TOML with a [[vm]] for each, or, where its name ends
    /// in .yaml or .yml, YAML with a list `vms`
    #[arg(long, value_name = "FILE", conflicts_with_all = ["single", "socket_path", "fd"])]
    pub config: Option<PathBuf>,
}

/// A VM, and how its front end comes.
#[derive(Debug)]
pub struct Served {
    /// The VM.
    pub config: VmConfig,
    /// Its socket.
    pub socket: SocketChoice,
}

impl SingleArgs {
    fn entry(&self) -> VmEntry {
        VmEntry {
            guest_cid: Some(self.guest_cid.unwrap_or(DEFAULT_GUEST_CID)),
            socket: None,
            uds_path: self.uds_path.clone(),
            forward_cid: self.forward_cid,
            forward_listen: self.forward_listen.clone(),
            tx_buffer_size: self.tx_buffer_size.map(Size::bytes),
            queue_size: Some(self.queue_size.into()),
            groups: Some(self.groups.clone()),
            connect_only: self.connect_only,
            allow_host_ports: self.allow_host_ports.clone(),
            allow_guest_ports: self.allow_guest_ports.clone(),
            map: self.map.clone(),
            max_connections: Some(self.max_connections),
        }
    }
}

impl VsockArgs {
    /// The VMs that are asked for, checked.
    ///
    /// # Errors
    /// The operator's mistakes.
    pub fn vms(&self) -> anyhow::Result<Vec<Served>> {
        let several = match &self.several.config {
            Some(path) => Some(read_file(path)?),
            None if !self.several.vm.is_empty() => Some(
                self.several
                    .vm
                    .iter()
                    .map(|text| VmEntry::parse(text).with_context(|| format!("--vm {text}")))
                    .collect::<anyhow::Result<Vec<_>>>()?,
            ),
            None => None,
        };
        let served = match several {
            Some(entries) => entries.into_iter().map(listening).collect::<anyhow::Result<_>>()?,
            None => vec![self.single()?],
        };
        let configs: Vec<VmConfig> = served.iter().map(|s: &Served| s.config.clone()).collect();
        check_together(&configs)?;
        Ok(served)
    }

    fn single(&self) -> anyhow::Result<Served> {
        let plain = self.single.socket.clone().map(SocketChoice::Listen);
        let socket = plain
            .or(self.connection.choice())
            .context("a VMM needs a way in: give --socket-path, --fd, --vm or --config")?;
        let path = match &socket {
            SocketChoice::Listen(path) | SocketChoice::Dial(path) => Some(path.clone()),
            SocketChoice::Inherited(_) => None,
        };
        Ok(Served { config: self.single.entry().check(path.as_deref())?, socket })
    }
}

fn listening(entry: VmEntry) -> anyhow::Result<Served> {
    let cid = entry.guest_cid.unwrap_or(DEFAULT_GUEST_CID);
    let config = entry.check(None).with_context(|| format!("VM with CID {cid}"))?;
    ensure!(!config.socket.as_os_str().is_empty(), "the VM with CID {cid} needs a socket");
    let socket = SocketChoice::Listen(config.socket.clone());
    Ok(Served { config, socket })
}

fn read_file(path: &std::path::Path) -> anyhow::Result<Vec<VmEntry>> {
    let text = config_file::ConfigFile::read(path)?;
    let is_yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
    let file: ConfigFile = if is_yaml {
        serde_saphyr::from_str(text.text())
            .map_err(|e| anyhow::anyhow!("{e}"))
            .with_context(|| format!("read {}", path.display()))?
    } else {
        text.parse()?
    };
    Ok(file.vm)
}

#[cfg(test)]
mod tests;
