//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};
use outboard_common::capabilities::Capabilities;
use outboard_common::cli::values::Size;
use outboard_common::cli::{
    CapabilitiesArgs, ControlArgs, HandoverArgs, LogArgs, MetricsArgs, SandboxArgs, SocketArgs,
    WorkerArgs,
};
use outboard_common::rate_limiter::Limit;

use crate::config::DiskConfig;
use crate::device::{MAX_QUEUE_SIZE, MAX_QUEUES};

/// What `--print-capabilities` prints.
pub const CAPABILITIES: Capabilities =
    Capabilities { device_type: "block", features: &["blk-file", "read-only"] };

/// What `--help` and the manual page end with.
const EXAMPLES: &str = r#"Examples:
  Serve an image (in the guest: /dev/vda):
    vhost-user-blk --socket-path=/run/blk.sock --blk-file=disk.img

  Two disks in one process, the second of them limited and read only:
    vhost-user-blk --blk-file=a.img,socket=/run/a.sock \
        --blk-file=b.qcow2,format=qcow2,socket=/run/b.sock,readonly=on,iops=10K:20K

  A whole fast disk, with workers that look for requests before they sleep:
    vhost-user-blk --socket-path=/run/blk.sock --blk-file=/dev/nvme0n1 --poll-us=50 \
        --cpu-affinity=2-3

  Change limits while it runs:
    vhost-user-blk --socket-path=/run/blk.sock --blk-file=disk.img --control-socket=/run/blk.ctl
    echo '{"limits": {"limits": {"read": {"ops": 1000}}}}' |
        socat - UNIX-CONNECT:/run/blk.ctl"#;

/// Serves disk images to virtual machines as virtio-blk devices over vhost-user
#[derive(Debug, Clone, Parser)]
#[command(name = "vhost-user-blk", version, max_term_width = 100, after_long_help = EXAMPLES)]
pub struct BlkArgs {
    /// Where front ends come.
    #[command(flatten)]
    pub socket: SocketArgs,
    /// Which disks there are.
    #[command(flatten)]
    pub disks: DiskArgs,
    /// What all disks have unless they say otherwise.
    #[command(flatten)]
    pub defaults: DefaultArgs,
    /// Rate limits.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// Worker threads.
    #[command(flatten)]
    pub worker: WorkerArgs,
    /// Log.
    #[command(flatten)]
    pub log: LogArgs,
    /// Metrics.
    #[command(flatten)]
    pub metrics: MetricsArgs,
    /// Control.
    #[command(flatten)]
    pub control: ControlArgs,
    /// Handing sessions over.
    #[command(flatten)]
    pub handover: HandoverArgs,
    /// Sandbox.
    #[command(flatten)]
    pub sandbox: SandboxArgs,
    /// Capabilities.
    #[command(flatten)]
    pub capabilities: CapabilitiesArgs,
}

/// Which disks there are.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Disks")]
pub struct DiskArgs {
    /// Image file or block device to serve; repeatable. KEY is one of socket, name, format
    /// (raw or qcow2), readonly, cache (auto, direct or buffered), block-size, num-queues,
    /// queue-size, serial, write-cache, discard, register-memory, lock (on or off), iops, read-iops,
    /// write-iops, bps,
    /// read-bps, write-bps. A comma in a value is written twice
    #[arg(long, value_name = "PATH[,KEY=VALUE...]", value_parser = DiskConfig::parse_file)]
    pub blk_file: Vec<DiskConfig>,

    /// A disk of SIZE bytes that ignores reads and writes, for measurements; repeatable
    #[arg(long, value_name = "SIZE[,KEY=VALUE...]", value_parser = DiskConfig::parse_null)]
    pub null: Vec<DiskConfig>,

    /// A disk of SIZE bytes in memory that is gone with the process; repeatable
    #[arg(long, value_name = "SIZE[,KEY=VALUE...]", value_parser = DiskConfig::parse_memory)]
    pub memory: Vec<DiskConfig>,

    /// TOML file with one [[disk]] table a disk: path, null or memory, and the KEYs of --blk-file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

impl Switch {
    /// As a truth value.
    #[must_use]
    pub fn is_on(self) -> bool {
        self == Self::On
    }
}

/// What all disks have unless they say otherwise.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Defaults for all disks")]
pub struct DefaultArgs {
    /// Refuse writes
    #[arg(long)]
    pub read_only: bool,

    /// Bypass the host's page cache, or refuse to start (without either option: where possible)
    #[arg(long, conflicts_with = "buffered")]
    pub direct: bool,

    /// Use the host's page cache
    #[arg(long)]
    pub buffered: bool,

    /// Logical block size in bytes, a power of two from 512 to 4096 [default: the image's own]
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<Size>,

    /// Queues offered to the guest [default: 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub num_queues: Option<u16>,

    /// Entries of a queue at the most, a power of two [default: 1024]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(2..=i64::from(MAX_QUEUE_SIZE)))]
    pub queue_size: Option<u16>,

    /// Serial number the guest sees, up to 20 ASCII characters
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,

    /// Whether writes may rest in a cache until the guest flushes [default: on]
    #[arg(long, value_name = "ON|OFF")]
    pub write_cache: Option<Switch>,

    /// Whether the guest may give storage back [default: on]
    #[arg(long, value_name = "ON|OFF")]
    pub discard: Option<Switch>,

    /// Pin the guest's memory and register it with io_uring, which then need not look pages up for each
    /// request. Not for guests with a balloon or free page reporting; no effect on disks in memory
    #[arg(long)]
    pub register_memory: bool,
}

/// Rate limits of each disk.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Limits for all disks, as RATE or RATE:BURST")]
pub struct LimitArgs {
    /// Reads a second, and writes a second
    #[arg(long, value_name = "LIMIT")]
    pub iops: Option<Limit>,

    /// Reads a second
    #[arg(long, value_name = "LIMIT")]
    pub read_iops: Option<Limit>,

    /// Writes a second
    #[arg(long, value_name = "LIMIT")]
    pub write_iops: Option<Limit>,

    /// Bytes read a second, and bytes written a second
    #[arg(long, value_name = "LIMIT")]
    pub bps: Option<Limit>,

    /// Bytes read a second
    #[arg(long, value_name = "LIMIT")]
    pub read_bps: Option<Limit>,

    /// Bytes written a second
    #[arg(long, value_name = "LIMIT")]
    pub write_bps: Option<Limit>,
}
