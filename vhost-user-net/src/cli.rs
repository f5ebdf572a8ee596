//! The command line.

use std::num::NonZeroU16;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Args, Parser};
use outboard_common::cli::values::Size;
use outboard_common::cli::{
    CapabilitiesArgs, ControlArgs, HandoverArgs, LogArgs, MetricsArgs, SandboxArgs, SocketArgs,
    WorkerArgs,
};
use outboard_common::rate_limiter::Limit;

use crate::backend::user::check_option;
use crate::control::MacAddr;
use crate::filter::Cidr;
use crate::ports::PortConfig;
use crate::sys::InterfaceName;

/// The least MTU a device may have. Virtio 1.3, 5.1.4.1.
pub(crate) const MTU_MIN: u16 = 68;

/// What `--help` and the manual page end with.
const EXAMPLES: &str = r#"Examples:
  A tap, created if it is not there, whose guest may send from its own address alone:
    vhost-user-net --socket-path=/run/net.sock --tap=vmtap0 --mac=52:54:00:12:34:56

  A pod's own interface, with no bridge and no tc rules:
    vhost-user-net --socket-path=/run/net.sock --packet=eth0 --netns=/run/netns/pod1

  Without root, port 8022 of the host being the guest's ssh:
    vhost-user-net --socket-path=/run/net.sock --user --user-tcp=8022:22

  Two guests joined in memory:
    vhost-user-net --switch --port socket=/run/a.sock,mac=52:54:00:00:00:01 \
        --port socket=/run/b.sock

  Pull the cable while it runs:
    vhost-user-net --socket-path=/run/net.sock --tap=vmtap0 --control-socket=/run/net.ctl
    echo '{"link": false}' | socat - UNIX-CONNECT:/run/net.ctl"#;

/// A virtio network device for any VMM that speaks vhost-user.
#[derive(Debug, Clone, Parser)]
#[command(name = "vhost-user-net", version, max_term_width = 100, after_long_help = EXAMPLES)]
pub struct Cli {
    /// Where the front end is met.
    #[command(flatten)]
    pub socket: SocketArgs,

    /// Hand-over.
    #[command(flatten)]
    pub handover: HandoverArgs,

    /// The network behind the device.
    #[command(flatten)]
    pub backend: BackendArgs,

    /// The user-mode network.
    #[command(flatten)]
    pub user: UserArgs,

    /// The device itself.
    #[command(flatten)]
    pub device: DeviceArgs,

    /// What the guest may do.
    #[command(flatten)]
    pub guard: GuardArgs,

    /// Threads.
    #[command(flatten)]
    pub workers: WorkerArgs,

    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,

    /// Metrics.
    #[command(flatten)]
    pub metrics: MetricsArgs,

    /// Control.
    #[command(flatten)]
    pub control: ControlArgs,

    /// Sandbox.
    #[command(flatten)]
    pub sandbox: SandboxArgs,

    /// Capabilities.
    #[command(flatten)]
    pub capabilities: CapabilitiesArgs,
}

/// The network behind the device; exactly one is given.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Network")]
#[group(id = "network")]
pub struct BackendArgs {
    /// Tap interface to use; created, unless it is there
    #[arg(long, value_name = "NAME", group = "kind")]
    pub tap: Option<InterfaceName>,

    /// Inherited descriptors of an open tap or macvtap, one a queue pair
    #[arg(long, value_name = "FD[,FD...]", group = "kind", value_delimiter = ',',
          conflicts_with_all = ["netns", "queue_pairs"],
          value_parser = clap::value_parser!(i32).range(3..))]
    pub tap_fd: Vec<RawFd>,

    /// Macvtap device, like /dev/tap7
    #[arg(long, value_name = "PATH", group = "kind", conflicts_with = "netns")]
    pub macvtap: Option<PathBuf>,

    /// Existing interface to share through a packet socket, like a pod's eth0
    #[arg(long, value_name = "NAME", group = "kind")]
    pub packet: Option<InterfaceName>,

    /// Use the host's sockets through passt, without an interface and without privileges
    #[arg(long, group = "kind", conflicts_with_all = ["netns", "queue_pairs"])]
    pub user: bool,

    /// Join the guests of all --port in a switch in memory
    #[arg(long, group = "kind", requires = "port", conflicts_with_all = NOT_WITH_SWITCH)]
    pub switch: bool,

    /// A port of --switch and the socket of its guest; repeatable. KEY is one of mac (the guest's
    /// address; it may send from no other one), allow-ip (repeatable), isolated (on: no frames
    /// between it and other isolated ports), client (on: dial the socket), tx-packets, tx-bytes,
    /// rx-packets, rx-bytes
    #[arg(long, value_name = "socket=PATH[,KEY=VALUE...]", requires = "switch",
          conflicts_with_all = NOT_WITH_SWITCH)]
    pub port: Vec<PortConfig>,

    /// Network namespace that the interface lives in, like /run/netns/pod1
    #[arg(long, value_name = "PATH")]
    pub netns: Option<PathBuf>,

    /// Queue pairs, at the most; with --switch, of each port
    #[arg(long, value_name = "N", default_value = "1", value_parser = queue_pairs)]
    pub queue_pairs: NonZeroU16,
}

/// Options of a single device, or of an interface, that say nothing to a switch.
const NOT_WITH_SWITCH: [&str; 8] =
    ["netns", "socket_path", "fd", "client", "mac", "any_mac", "allow_ip", "pcap"];

/// The other networks. The parser forgives a missing --user beside those that exclude it.
const NOT_WITH_USER: [&str; 5] = ["tap", "tap_fd", "macvtap", "packet", "switch"];

/// How `passt` is run.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "User-mode network")]
pub struct UserArgs {
    /// TCP ports of the host to forward to the guest, like 8022:22; as passt's --tcp-ports
    #[arg(long, value_name = "SPEC", requires = "user", conflicts_with_all = NOT_WITH_USER)]
    pub user_tcp: Vec<String>,

    /// UDP ports of the host to forward to the guest; as passt's --udp-ports
    #[arg(long, value_name = "SPEC", requires = "user", conflicts_with_all = NOT_WITH_USER)]
    pub user_udp: Vec<String>,

    /// Any other option of passt, in one word, like --user-option=--dns=192.0.2.1; repeatable
    #[arg(long, value_name = "OPTION", requires = "user", conflicts_with_all = NOT_WITH_USER,
          allow_hyphen_values = true, value_parser = check_option)]
    pub user_option: Vec<String>,

    /// The program to run for --user
    #[arg(long, value_name = "PROGRAM", default_value = "passt", requires = "user",
          conflicts_with_all = NOT_WITH_USER)]
    pub passt: PathBuf,
}

/// What the guest sees.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// The guest's address; it may send from no other one (see --any-mac)
    #[arg(long, value_name = "MAC")]
    pub mac: Option<MacAddr>,

    /// MTU of the interface and of the guest's, in bytes
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(i64::from(MTU_MIN)..))]
    pub mtu: Option<u16>,

    /// Link speed that the guest is told, in Mbit/s
    #[arg(long, value_name = "MBIT", value_parser = clap::value_parser!(u32).range(1..=0x7fff_ffff))]
    pub speed: Option<u32>,
}

/// What the guest may do, and who watches.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Guard")]
pub struct GuardArgs {
    /// Let the guest change its address, and send from any
    #[arg(long, requires = "mac")]
    pub any_mac: bool,

    /// IP address or range that the guest may send from; may be given more than once
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub allow_ip: Vec<Cidr>,

    /// Frames a second that the guest may send: RATE or RATE:BURST
    #[arg(long, value_name = "RATE")]
    pub tx_packets: Option<Limit>,

    /// Bytes a second that the guest may send: RATE or RATE:BURST
    #[arg(long, value_name = "RATE")]
    pub tx_bytes: Option<Limit>,

    /// Frames a second that the guest may receive: RATE or RATE:BURST
    #[arg(long, value_name = "RATE")]
    pub rx_packets: Option<Limit>,

    /// Bytes a second that the guest may receive: RATE or RATE:BURST
    #[arg(long, value_name = "RATE")]
    pub rx_bytes: Option<Limit>,

    /// Record every frame to this file (pcap); at --pcap-size it becomes FILE.1 and a new one starts
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,

    /// Size at which the capture file rotates
    #[arg(long, value_name = "SIZE", default_value = "64M", requires = "pcap")]
    pub pcap_size: Size,

    /// Read and write each frame with a system call of its own, without io_uring
    #[arg(long)]
    pub no_io_uring: bool,
}

/// Most pairs of one device: as many as CPUs of a large guest, and queues stay below 256.
const QUEUE_PAIRS_MAX: u16 = 64;

fn queue_pairs(text: &str) -> Result<NonZeroU16, String> {
    text.parse::<NonZeroU16>()
        .ok()
        .filter(|n| n.get() <= QUEUE_PAIRS_MAX)
        .ok_or_else(|| format!("write a number from 1 to {QUEUE_PAIRS_MAX}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use outboard_common::cli::{Parsed, parse};

    fn error(arguments: &str) -> String {
        let line = std::iter::once("vhost-user-net").chain(arguments.split_whitespace());
        match parse::<Cli>(line.map(Into::into)) {
            Ok(_) => panic!("accepted {arguments}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_full_command_line_is_understood() {
        let line = "vhost-user-net --socket-path=/s --tap t0 --netns /run/netns/a --queue-pairs 2 \
                    --mac 52:54:00:12:34:56 --mtu 9000 --speed 10000 --allow-ip 10.0.0.5,fd00::/64 \
                    --tx-packets 1K --pcap /f --pcap-size 1M";
        let Ok(Parsed::Arguments(cli)) = parse::<Cli>(line.split_whitespace().map(Into::into))
        else {
            panic!("refused");
        };
        assert_eq!(cli.backend.queue_pairs.get(), 2);
        assert_eq!(cli.guard.allow_ip.len(), 2);
        assert_eq!(cli.device.mtu, Some(9000));
    }

    #[test]
    fn mistakes_are_told_in_one_sentence() {
        for (arguments, part) in [
            ("--tap t0 --packet e0", "cannot be used with"),
            ("--tap a/b", "interface name"),
            ("--tap t0 --mac zz", "not a MAC address"),
            ("--tap t0 --mac 01:00:5e:00:00:01", "group address"),
            ("--tap t0 --allow-ip 10.0.0.5/8", "10.0.0.0/8"),
            ("--tap t0 --allow-ip x", "not an IP address"),
            ("--tap t0 --queue-pairs 0", "from 1 to 64"),
            ("--tap t0 --queue-pairs 65", "from 1 to 64"),
            ("--tap t0 --mtu 67", "67"),
            ("--tap-fd 3 --queue-pairs 2", "cannot be used with"),
            ("--tap-fd 2", "2"),
            ("--macvtap /dev/tap1 --netns /n", "cannot be used with"),
            ("--tap t0 --any-mac", "--mac"),
            ("--switch --port socket=/p", "cannot be used with"),
            ("--port socket=/p", "cannot be used with"),
            ("--user --tap t0", "cannot be used with"),
            ("--user --netns /n", "cannot be used with"),
            ("--tap t0 --user-tcp 22", "cannot be used with"),
            ("--user-udp 22", "--user"),
            ("--user --user-option=--fd=3", "sets this one itself"),
        ] {
            let error = error(&format!("--socket-path=/s {arguments}"));
            assert!(error.contains(part), "{arguments}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
