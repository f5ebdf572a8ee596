//! `vhost-user-blk`: disk images as virtio-blk devices. Virtio 1.3, 5.2.
//!
//! | room | what it holds |
//! |---|---|
//! | [`cli`], [`config`] | the command line, and the checked disks that come of it |
//! | [`request`] | a request's bytes to an enum; pure |
//! | [`config_space`] | `struct virtio_blk_config` |
//! | [`store`] | what disks are made of |
//! | [`device`] | what the session asks |
//! | [`worker`] | the data path: chains to io_uring and back |
//! | [`resize`], [`control`] | changes while a guest runs |
//! | [`seccomp`] | what the process may still do when it serves |

pub mod cli;
pub mod config;
pub mod config_space;
pub mod control;
pub mod device;
pub mod request;
pub mod resize;
pub mod seccomp;
pub mod store;
pub mod worker;

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use outboard_common::admin::AdminSockets;
use outboard_common::cli::SocketChoice;
use outboard_common::daemon::{self, Endpoint, RunOptions};
use outboard_common::handover::{Handover, TakenOver};
use outboard_common::logging;
use outboard_common::metrics::Registry;
use outboard_common::sandbox::rlimits;
use outboard_common::vhost_user::session::SessionOptions;

use crate::cli::BlkArgs;
use crate::config::{Disk, Source};
use crate::control::BlkControl;
use crate::device::BlkDevice;
use crate::resize::Audience;
use crate::store::raw::RawImage;
use crate::store::{OpenError, Store, memory, null::NullImage, qcow2::Qcow2Image};

fn open(source: &Source) -> Result<Store, OpenError> {
    match source {
        Source::Raw(options) => RawImage::open(options),
        Source::Qcow2(options) => Qcow2Image::open(options),
        Source::Null(size) => Ok(NullImage::open(*size)),
        Source::Memory(size) => memory::open(*size),
    }
}

/// The device of `disk`, its image open.
fn open_device(
    disk: &Disk,
    audience: &Arc<Audience>,
    registry: &Registry,
) -> anyhow::Result<Arc<BlkDevice>> {
    let store = open(&disk.source)?;
    let metrics = registry.device(&disk.device.name);
    let device = BlkDevice::new(disk.device.clone(), store, audience.clone(), metrics)?;
    Ok(Arc::new(device))
}

/// The paths of all sockets.
fn socket_paths(args: &BlkArgs, disks: &[Disk]) -> Vec<PathBuf> {
    let disks = disks.iter().filter_map(|disk| match &disk.socket {
        SocketChoice::Listen(path) | SocketChoice::Dial(path) => Some(path),
        SocketChoice::Inherited(_) => None,
    });
    let admin = [
        &args.metrics.metrics_socket,
        &args.control.control_socket,
        &args.handover.handover_socket,
    ];
    disks.chain(admin.into_iter().flatten()).cloned().collect()
}

/// The endpoints of `disks`: sockets made here, or taken over with their sessions.
fn endpoints(
    args: &BlkArgs,
    disks: &[Disk],
    devices: &[Arc<BlkDevice>],
    mut taken: TakenOver,
    registry: &Registry,
) -> anyhow::Result<Vec<Endpoint>> {
    let options = SessionOptions::new(&args.socket, &args.worker);
    let mut endpoints = Vec::new();
    for (disk, device) in disks.iter().zip(devices) {
        let endpoint = taken.endpoint(device.clone(), &disk.socket, options.clone())?;
        endpoints.push(endpoint.counted_in(registry));
    }
    Ok(endpoints)
}

/// Fails with advice when there is no io_uring here.
fn check_io_uring() -> anyhow::Result<()> {
    io_uring::IoUring::new(2).context(
        "this system gives us no io_uring; it needs Linux 5.19 and kernel.io_uring_disabled=0",
    )?;
    Ok(())
}

/// Serves what `args` ask for until it is told to leave. The start-up order of the house: arguments →
/// log → open → sockets → sandbox → threads → serve.
///
/// # Errors
/// The operator's mistakes, before any socket exists; and what the system refuses.
pub fn run(args: &BlkArgs) -> anyhow::Result<()> {
    let disks = config::disks(args)?;
    logging::init(&args.log, "vhost-user-blk")?;
    check_io_uring()?;
    let handover_socket = args.handover.handover_socket.as_deref();
    let taken = handover_socket.map(TakenOver::from).transpose()?.unwrap_or_default();

    let registry = Arc::new(Registry::new("vhost-user-blk"));
    let audience = Arc::new(Audience::default());
    let devices = disks
        .iter()
        .map(|disk| open_device(disk, &audience, &registry))
        .collect::<anyhow::Result<Vec<Arc<BlkDevice>>>>()?;

    let endpoints = endpoints(args, &disks, &devices, taken, &registry)?;
    let handover = handover_socket.map(Handover::listen).transpose()?;
    let (metrics, control) = (&args.metrics.metrics_socket, &args.control.control_socket);
    let admin = AdminSockets::bind(metrics.as_deref(), control.as_deref())?;

    let pins_memory = disks.iter().any(|disk| disk.device.register_memory);
    if pins_memory {
        rlimits::locked_memory();
    }
    seccomp::close(&args.sandbox, &socket_paths(args, &disks), pins_memory)
        .context("cannot close the sandbox")?;

    let admin = admin.serve(registry, Arc::new(BlkControl::new(devices.clone())))?;
    resize::watch(devices.clone(), audience).context("thread for sizes")?;
    let reload = Some(Box::new(move || resize::check(&devices)) as daemon::Reload);
    outboard_common::footprint::give_back_startup_memory();
    let served = daemon::run(endpoints, RunOptions { reload, handover });
    if let Some(admin) = admin {
        admin.join();
    }
    served
}
