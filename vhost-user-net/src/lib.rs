//! Outboard `vhost-user-net`: a virtio network device for any VMM that speaks vhost-user.
//!
//! | room | what it holds |
//! |---|---|
//! | [`header`] | `virtio_net_hdr`: checked and made anew (pure) |
//! | [`control`] | control queue commands, and the receive filter they shape (pure) |
//! | [`filter`] | anti-spoofing (pure) |
//! | [`flow`], [`rss`] | which flow a frame belongs to; its hash, and the queue that follows from it (pure) |
//! | [`config`] | configuration space |
//! | [`device`], [`shared`] | what the device offers; what its threads share |
//! | [`state`] | what moves to a newer daemon or another host |
//! | [`worker`] | the data path of a queue pair |
//! | [`batch`], [`stream`] | several frames in one system call |
//! | [`backend`] | tap, macvtap, packet socket, user-mode network, switch |
//! | [`ports`] | a switch's ports on the command line (pure) |
//! | [`capture`] | pcap files |
//! | [`operator`] | requests on the control socket |
//! | [`sandbox`] | what the daemon may still do when it serves |
//! | [`sys`] | system calls of network interfaces |
//!
//! [`run`] is the daemon: files and sockets are opened, the sandbox is closed, then it serves.

pub mod announce;
pub mod backend;
pub mod batch;
pub mod capture;
mod checksum;
pub mod cli;
pub mod config;
pub mod control;
pub mod device;
mod ethernet;
pub mod filter;
pub mod flow;
pub mod header;
pub mod operator;
pub mod ports;
pub mod rss;
pub mod sandbox;
mod segment;
pub mod shared;
pub mod state;
pub mod stream;
pub mod sys;
pub mod worker;

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use outboard_common::admin::AdminSockets;
use outboard_common::capabilities::Capabilities;
use outboard_common::cli::SocketChoice;
use outboard_common::daemon::{self, RunOptions};
use outboard_common::handover::{Handover, TakenOver};
use outboard_common::metrics::Registry;
use outboard_common::rate_limiter::{DirectionLimits, Limits, RateLimiter};
use outboard_common::sys::inherited_fd;
use outboard_common::vhost_user::session::SessionOptions;

use self::backend::Backend;
use self::backend::macvtap::MacvtapBackend;
use self::backend::packet::{PacketBackend, PacketOptions};
use self::backend::switch::{PORTS_MAX, PortOptions, Switch, SwitchPort};
use self::backend::tap::{TapBackend, TapOptions};
use self::backend::user::{UserBackend, UserOptions};
use self::capture::Capture;
use self::cli::{BackendArgs, Cli, GuardArgs};
use self::config::NetConfig;
use self::control::MacAddr;
use self::device::{NetDevice, Offers};
use self::filter::SourceFilter;
use self::operator::Operator;
use self::ports::PortConfig;
use self::sandbox::Needs;
use self::shared::{PairMetrics, Shared, SharedParts};

/// The program's name, and its device's in logs and metrics.
const PROGRAM: &str = "vhost-user-net";
const DEVICE: &str = "net0";

/// What `--print-capabilities` says.
pub const CAPABILITIES: Capabilities = Capabilities { device_type: "net", features: &[] };

/// Runs the daemon until it is told to leave.
///
/// # Errors
/// Whatever keeps it from starting, for the operator.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    outboard_common::logging::init(&cli.log, PROGRAM)?;
    // Inherited descriptors first, before anything of ours takes their numbers.
    let taps = cli.backend.tap_fd.iter().map(|&fd| inherit(fd)).collect::<Result<Vec<_>, _>>()?;
    let handover_socket = cli.handover.handover_socket.as_deref();
    let mut taken = handover_socket.map(TakenOver::from).transpose()?.unwrap_or_default();
    let plans = if cli.backend.switch {
        plan_switch(&cli)?
    } else {
        vec![plan_single(&cli, taps, taken.device_fds(DEVICE))?]
    };
    let admin = AdminSockets::bind(
        cli.metrics.metrics_socket.as_deref(),
        cli.control.control_socket.as_deref(),
    )?;
    let registry = Arc::new(Registry::new(PROGRAM));
    let options = SessionOptions::new(&cli.socket, &cli.workers);
    let capture = match &cli.guard.pcap {
        Some(path) => Some(Arc::new(Capture::open(path, cli.guard.pcap_size.bytes())?)),
        None => None,
    };
    let (mut devices, mut endpoints) = (Vec::new(), Vec::new());
    for plan in &plans {
        let device = Arc::new(make_device(&cli, plan, &registry, capture.clone()));
        let endpoint = taken.endpoint(device.clone(), &plan.choice, options.clone())?;
        endpoints.push(endpoint.counted_in(&registry));
        devices.push(device);
    }
    let handover = handover_socket.map(Handover::listen).transpose()?;
    let needs = Needs {
        sockets: sockets(&cli, &plans),
        capture: cli.guard.pcap.as_deref(),
        net_admin: cli.control.control_socket.is_some(),
    };
    // Workers rest for some ten microseconds at a time; the kernel's usual slack is longer than that.
    let slack = Some(NonZeroU64::MIN.saturating_add(999));
    rustix::thread::set_current_timer_slack(slack).context("cannot set the timer slack")?;
    sandbox::close(&cli.sandbox, &needs).context("cannot close the sandbox")?;
    let _admin = admin.serve(registry, Arc::new(Operator::new(devices)))?;
    outboard_common::footprint::give_back_startup_memory();
    daemon::run(endpoints, RunOptions { handover, ..RunOptions::default() })
}

/// A device before it is made.
struct Plan {
    name: String,
    choice: SocketChoice,
    backend: Arc<dyn Backend>,
    mac: Option<MacAddr>,
    source: SourceFilter,
    limits: Limits,
}

/// The one device of everything but a switch.
///
/// `before` are the descriptors of a tap that the daemon before this one had.
fn plan_single(cli: &Cli, taps: Vec<OwnedFd>, before: Vec<OwnedFd>) -> anyhow::Result<Plan> {
    let choice =
        cli.socket.choice().context("no front end is named: give --socket-path or --fd")?;
    let locked_mac = cli.device.mac.filter(|_| !cli.guard.any_mac);
    let backend = open_backend(cli, taps, before)?;
    if let Some(mac) = cli.device.mac {
        // Where the interface lets only its own address through, it must be the guest's.
        let set = backend.set_mac(mac);
        set.with_context(|| format!("cannot give the interface the address {mac}"))?;
    }
    if let Some(mtu) = cli.device.mtu {
        give_mtu(backend.as_ref(), mtu)?;
    }
    Ok(Plan {
        name: DEVICE.to_owned(),
        choice,
        backend,
        mac: cli.device.mac,
        source: SourceFilter::new(locked_mac, cli.guard.allow_ip.clone()),
        limits: limits(&cli.guard),
    })
}

/// Gives the interface the MTU that the guest is told. One that cannot be seen from here is left as it is.
fn give_mtu(backend: &dyn Backend, mtu: u16) -> anyhow::Result<()> {
    if backend.mtu().is_none_or(|now| now == mtu) {
        return Ok(());
    }
    backend.set_mtu(mtu).with_context(|| format!("cannot set the MTU of the interface to {mtu}"))
}

/// One device for each port of the switch.
fn plan_switch(cli: &Cli) -> anyhow::Result<Vec<Plan>> {
    let ports = &cli.backend.port;
    if ports.len() > PORTS_MAX {
        bail!("{} ports are too many: a switch has at most {PORTS_MAX}", ports.len());
    }
    for (at, port) in ports.iter().enumerate() {
        let before = ports.get(..at).unwrap_or(&[]);
        if before.iter().any(|p| p.socket == port.socket) {
            bail!("two ports have the socket {}", port.socket.display());
        }
        if let Some(mac) = port.mac.filter(|mac| before.iter().any(|p| p.mac == Some(*mac))) {
            bail!("two ports have the address {mac}");
        }
    }
    let options: Vec<_> =
        ports.iter().map(|p| PortOptions { mac: p.mac, isolated: p.isolated }).collect();
    let plan = |(at, (port, place)): (usize, (&PortConfig, SwitchPort))| Plan {
        name: format!("net{at}"),
        choice: port.choice(),
        backend: Arc::new(place),
        mac: port.mac,
        source: SourceFilter::new(port.mac, port.allow_ip.clone()),
        limits: port.limits_or(limits(&cli.guard)),
    };
    Ok(ports
        .iter()
        .zip(Switch::new(&options, cli.backend.queue_pairs.get()).ports())
        .enumerate()
        .map(plan)
        .collect())
}

/// The paths of all sockets.
fn sockets<'a>(cli: &'a Cli, plans: &'a [Plan]) -> Vec<&'a Path> {
    let fronts = plans.iter().filter_map(|plan| match &plan.choice {
        SocketChoice::Listen(path) | SocketChoice::Dial(path) => Some(path.as_path()),
        SocketChoice::Inherited(_) => None,
    });
    let admin =
        [&cli.metrics.metrics_socket, &cli.control.control_socket, &cli.handover.handover_socket];
    fronts.chain(admin.into_iter().filter_map(|path| path.as_deref())).collect()
}

fn inherit(fd: i32) -> anyhow::Result<OwnedFd> {
    let fd = inherited_fd(fd).with_context(|| format!("--tap-fd {fd} cannot be used"))?;
    rustix::io::ioctl_fionbio(&fd, true).context("cannot make the tap descriptor non-blocking")?;
    Ok(fd)
}

fn open_backend(
    cli: &Cli,
    taps: Vec<OwnedFd>,
    before: Vec<OwnedFd>,
) -> anyhow::Result<Arc<dyn Backend>> {
    let args = &cli.backend;
    let pairs = args.queue_pairs.get();
    let BackendArgs { tap, macvtap, packet, netns, user, .. } = args;
    let backend: Arc<dyn Backend> = if *user {
        Arc::new(UserBackend::start(&UserOptions {
            program: cli.user.passt.clone(),
            mtu: cli.device.mtu,
            tcp_ports: cli.user.user_tcp.clone(),
            udp_ports: cli.user.user_udp.clone(),
            more: cli.user.user_option.clone(),
        })?)
    } else if let Some(name) = packet {
        let options = PacketOptions { name: name.clone(), netns: netns.clone(), pairs };
        Arc::new(PacketBackend::open(&options)?)
    } else if let Some(path) = macvtap {
        Arc::new(MacvtapBackend::open(path, pairs)?)
    } else if !taps.is_empty() {
        Arc::new(TapBackend::from_fds(taps)?)
    } else if tap.is_some() && before.len() == usize::from(pairs) {
        Arc::new(match netns {
            Some(path) => sys::in_network_namespace(path, || TapBackend::from_fds(before))?,
            None => TapBackend::from_fds(before)?,
        })
    } else if let Some(name) = tap {
        drop(before);
        Arc::new(TapBackend::open(&TapOptions {
            name: Some(name.clone()),
            netns: netns.clone(),
            pairs,
            mtu: cli.device.mtu,
        })?)
    } else {
        bail!("no network is named: give --tap, --tap-fd, --macvtap, --packet, --user or --switch");
    };
    Ok(backend)
}

fn make_device(
    cli: &Cli,
    plan: &Plan,
    registry: &Registry,
    capture: Option<Arc<Capture>>,
) -> NetDevice {
    let GuardArgs { any_mac, no_io_uring, .. } = &cli.guard;
    let backend = plan.backend.clone();
    let locked_mac = plan.mac.filter(|_| !any_mac);
    let mac = plan.mac.or_else(|| backend.fixed_mac());
    let mtu = cli.device.mtu.or_else(|| backend.mtu());
    let metrics = registry.device(&plan.name);
    let config = NetConfig::new(mac, backend.pairs(), mtu, cli.device.speed);
    let steers = backend.pairs() > 1 && backend.switch_port().is_some();
    let shared = Shared::new(SharedParts {
        name: plan.name.clone(),
        source: plan.source.clone(),
        limiter: RateLimiter::new(plan.limits, Instant::now()),
        capture,
        metrics: (0..backend.pairs()).map(|pair| PairMetrics::new(&metrics, pair)).collect(),
        plain_io: *no_io_uring,
        config: if steers { config.with_rss() } else { config },
        backend,
    });
    let offers = Offers {
        mac: mac.is_some(),
        mac_change: locked_mac.is_none(),
        mtu: mtu.is_some(),
        speed: cli.device.speed.is_some(),
    };
    NetDevice::new(Arc::new(shared), offers)
}

/// The limits on the command line; reading is the guest's receiving.
fn limits(guard: &GuardArgs) -> Limits {
    Limits {
        read: DirectionLimits { ops: guard.rx_packets, bytes: guard.rx_bytes },
        write: DirectionLimits { ops: guard.tx_packets, bytes: guard.tx_bytes },
    }
}
