//! `vsock-proxy`: the vsock sockets of guests, connected to the host's. Virtio 1.3, 5.10.
//!
//! | room | what it holds |
//! |---|---|
//! | [`cli`], [`config`], [`policy`] | the command line, the checked VMs that come of it, who may reach whom |
//! | [`packet`] | a packet's bytes to values; pure |
//! | [`connection`], [`credit`] | one connection as a state machine; pure |
//! | `mux` | all connections of a guest: packets and events in, actions out |
//! | `rx_queue`, `held`, `timers` | the guest's buffers, data that waits for the host, deadlines |
//! | [`host`] | Unix sockets and AF_VSOCK: what clients say, services dialled, bytes moved |
//! | [`sibling`] | guests of one process that connect to each other |
//! | [`device`], `worker` | what the session asks; the guest's thread |
//! | [`seccomp`] | the system calls it makes |

pub mod cli;
pub mod config;
pub mod connection;
pub mod counters;
pub mod credit;
pub mod device;
mod held;
pub mod host;
mod mux;
pub mod packet;
pub mod policy;
mod rx_queue;
pub mod seccomp;
pub mod sibling;
mod timers;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use outboard_common::admin::{AdminSockets, Control, ControlError};
use outboard_common::cli::SocketChoice;
use outboard_common::daemon::{self, RunOptions};
use outboard_common::handover::{Handover, TakenOver};
use outboard_common::logging;
use outboard_common::metrics::Registry;
use outboard_common::sandbox::landlock::{Access, PathRules};
use outboard_common::sandbox::seccomp::{Filter, lists};
use outboard_common::sandbox::{self, CapabilitySet, Plan};
use outboard_common::vhost_user::session::SessionOptions;

use crate::cli::{Served, VsockArgs};
use crate::config::HostSide;
use crate::counters::Counters;
use crate::device::VsockDevice;
use crate::sibling::Siblings;

/// Descriptors that may be open: a connection has one.
const OPEN_FILES: u64 = 1 << 17;

/// Serves what `args` ask for until it is told to leave. The start-up order of the house: arguments →
/// log → take over → open → sockets → sandbox → threads → serve.
///
/// # Errors
/// The operator's mistakes, before anything is served; and what the system refuses.
pub fn run(args: &VsockArgs) -> anyhow::Result<()> {
    let vms = args.vms()?;
    logging::init(&args.log, "vsock-proxy")?;
    let handover_socket = args.handover.handover_socket.as_deref();
    let mut taken = handover_socket.map(TakenOver::from).transpose()?.unwrap_or_default();
    let registry = Arc::new(Registry::new("vsock-proxy"));
    let siblings = Arc::new(Siblings::default());
    let options = SessionOptions::new(&args.connection, &args.worker);
    let mut endpoints = Vec::new();
    for vm in &vms {
        let counters = Counters::of(&registry.device(&VsockDevice::name_of(&vm.config)));
        let device = VsockDevice::new(vm.config.clone(), siblings.clone(), counters)?;
        let endpoint = taken.endpoint(Arc::new(device), &vm.socket, options.clone())?;
        endpoints.push(endpoint.counted_in(&registry));
    }
    let handover = handover_socket.map(Handover::listen).transpose()?;
    let admin = AdminSockets::bind(args.metrics.metrics_socket.as_deref(), None)?;
    if !args.sandbox.no_sandbox {
        sandbox::enter(&plan(args, &vms)).context("sandbox")?;
    }
    let admin = admin.serve(registry, Arc::new(NothingToSet))?;
    outboard_common::footprint::give_back_startup_memory();
    let served = daemon::run(endpoints, RunOptions { handover, ..RunOptions::default() });
    if let Some(admin) = admin {
        admin.join();
    }
    served
}

/// What the proxy locks itself into: its sockets' directories, and the calls it makes.
fn plan(args: &VsockArgs, vms: &[Served]) -> Plan {
    let mut paths = PathRules::none();
    let own = [&args.metrics.metrics_socket, &args.handover.handover_socket];
    let own = own.into_iter().flatten().map(|path| directory(path));
    for path in vms.iter().flat_map(directories).chain(own) {
        paths = paths.allow(path, Access::Sockets);
    }
    let mut calls = vec![
        lists::BASE,
        lists::SOCKETS,
        lists::SHARED_MEMORY,
        lists::LISTEN,
        lists::DIAL,
        seccomp::VSOCK,
    ];
    if vms.iter().any(|vm| matches!(vm.config.host, HostSide::Vsock { .. })) {
        calls.push(seccomp::FORWARD);
    }
    Plan {
        open_files: OPEN_FILES,
        namespaces: &[],
        capabilities: CapabilitySet::empty(),
        paths,
        syscalls: Filter::of(&calls),
        seccomp: args.sandbox.seccomp.seccomp,
    }
}

/// The directories of a VM's sockets; services come and go in them while it runs.
fn directories(vm: &Served) -> Vec<PathBuf> {
    let socket = match &vm.socket {
        SocketChoice::Listen(path) | SocketChoice::Dial(path) => Some(path.as_path()),
        SocketChoice::Inherited(_) => None,
    };
    let host = match &vm.config.host {
        HostSide::Unix(path) => Some(path.as_path()),
        HostSide::Vsock { .. } => None,
    };
    let mapped = vm.config.policy.map.values().map(PathBuf::as_path);
    socket.into_iter().chain(host).chain(mapped).map(directory).collect()
}

fn directory(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// There is no control socket, and so nobody to ask for anything.
struct NothingToSet;

impl Control for NothingToSet {
    fn on_request(
        &self,
        _verb: &str,
        _argument: serde_json::Value,
    ) -> Result<serde_json::Value, ControlError> {
        Err(ControlError::UnknownVerb { known: &[] })
    }
}
