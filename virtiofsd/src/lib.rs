//! Outboard's `virtiofsd`: a directory of the host as a virtio-fs device. Virtio 1.3, 5.11.
//!
//! | room | what it holds |
//! |---|---|
//! | [`cli`] | the command line, old spellings too |
//! | [`device`] | what the vhost-user session asks |
//! | [`worker`], [`slow_pool`] | queues' threads, and those for requests that wait |
//! | [`fuse`] | the FUSE server: parsers, dispatch, replies |
//! | [`dax`] | files in a window of the guest's address space |
//! | [`passthrough`] | the shared directory as a file system |
//! | [`inode_store`], [`handle_store`] | what the guest knows and has open |
//! | `confinement`, `seccomp` | the sandbox |
//! | `control` | what an operator can ask |

pub mod cli;
mod confinement;
mod control;
pub mod dax;
pub mod device;
pub mod fuse;
mod group;
pub mod handle_store;
pub mod inode_store;
mod pace;
pub mod passthrough;
mod seccomp;
pub mod slow_pool;
mod thread_waits;
pub mod worker;

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use outboard_common::admin::AdminSockets;
use outboard_common::cli::SocketChoice;
use outboard_common::daemon::{self, Endpoint, RunOptions};
use outboard_common::handover::{Handover, TakenOver};
use outboard_common::logging;
use outboard_common::metrics::Registry;
use outboard_common::sandbox::rlimits;
use outboard_common::transport::Transport;
use outboard_common::vhost_user::session::SessionOptions;
use rustix::fs::Mode;

use crate::cli::{Arguments, Cache, InodeHandles, MigrationArgs, SharingArgs, When};
use crate::control::FsControl;
use crate::device::{DeviceOptions, FsDevice};
use crate::fuse::Limits;
use crate::passthrough::id_map::IdMap;
use crate::passthrough::xattr_map::XattrMap;
use crate::passthrough::{
    CachePolicy, Config, Demand, InodeFileHandles, Migration, MigrationMode, OnError, PassthroughFs,
};

fn demand(when: When) -> Demand {
    match when {
        When::Never => Demand::Never,
        When::Auto => Demand::Auto,
        When::Always => Demand::Always,
    }
}

fn id_map(option: &str, rules: &[String]) -> anyhow::Result<IdMap> {
    let rules = rules.iter().map(|rule| rule.parse()).collect::<Result<Vec<_>, _>>();
    rules.and_then(|rules| IdMap::new(&rules)).with_context(|| option.to_owned())
}

/// What the command line says of the shared directory.
fn config(arguments: &Arguments) -> anyhow::Result<Config> {
    let SharingArgs { cache, posix_acl, security_label, .. } = arguments.sharing;
    let sharing = &arguments.sharing;
    let xattr_map = sharing.xattrmap.as_deref().map(XattrMap::parse).transpose();
    Ok(Config {
        cache: match cache {
            Cache::Auto => CachePolicy::Auto,
            Cache::Always => CachePolicy::Always,
            Cache::Never => CachePolicy::Never,
            Cache::Metadata => CachePolicy::Metadata,
        },
        allow_mmap: sharing.allow_mmap,
        writeback: sharing.writeback,
        readdirplus: !sharing.no_readdirplus,
        allow_direct_io: sharing.allow_direct_io,
        xattr: sharing.xattr,
        xattr_map: xattr_map.context("--xattrmap")?,
        posix_acl: demand(posix_acl),
        security_label: demand(security_label),
        killpriv_v2: sharing.killpriv_v2,
        announce_submounts: !sharing.no_announce_submounts,
        preserve_noatime: sharing.preserve_noatime,
        readonly: sharing.readonly,
        inode_file_handles: match sharing.inode_file_handles {
            InodeHandles::Never => InodeFileHandles::Never,
            InodeHandles::Prefer => InodeFileHandles::Prefer,
            InodeHandles::Mandatory => InodeFileHandles::Mandatory,
        },
        uid_map: id_map("--translate-uid", &arguments.ids.translate_uid)?,
        gid_map: id_map("--translate-gid", &arguments.ids.translate_gid)?,
        posix_locks: sharing.posix_lock,
        flock: sharing.flock,
        dax: dax_options(arguments)?,
        timeout: sharing.timeout,
        migration: migration(arguments.migration)?,
        ..Config::default()
    })
}

/// What the command line says of migration.
fn migration(arguments: MigrationArgs) -> anyhow::Result<Migration> {
    let by_handle = arguments.migration_mode == Some(cli::MigrationMode::FileHandles);
    for (given, name) in [
        (arguments.migration_verify_handles, "--migration-verify-handles"),
        (arguments.migration_confirm_paths, "--migration-confirm-paths"),
    ] {
        anyhow::ensure!(
            !(given && by_handle),
            "{name} is about inodes that are found by their paths, which --migration-mode=file-handles does \
             without; leave one of them out"
        );
    }
    Ok(Migration {
        mode: match arguments.migration_mode {
            None | Some(cli::MigrationMode::FindPaths) => MigrationMode::FindPaths,
            Some(cli::MigrationMode::FileHandles) => MigrationMode::FileHandles,
        },
        on_error: match arguments.migration_on_error {
            None | Some(cli::MigrationOnError::Abort) => OnError::Abort,
            Some(cli::MigrationOnError::GuestError) => OnError::GuestError,
        },
        verify_handles: arguments.migration_verify_handles,
        confirm_paths: arguments.migration_confirm_paths,
    })
}

/// The first option of migration that was given.
fn explicit(arguments: MigrationArgs) -> Option<&'static str> {
    let MigrationArgs {
        migration_mode,
        migration_on_error,
        migration_verify_handles,
        migration_confirm_paths,
    } = arguments;
    let given = [
        (migration_mode.is_some(), "--migration-mode"),
        (migration_on_error.is_some(), "--migration-on-error"),
        (migration_verify_handles, "--migration-verify-handles"),
        (migration_confirm_paths, "--migration-confirm-paths"),
    ];
    given.into_iter().find_map(|(given, name)| given.then_some(name))
}

/// What the command line says of DAX.
fn dax_options(arguments: &Arguments) -> anyhow::Result<dax::Options> {
    let args = &arguments.dax;
    let options = dax::Options {
        mode: args.dax.into(),
        window: args.dax_window.into(),
        vmm: args.dax_vmm.into(),
    };
    options.check(arguments.sharing.readonly).map_err(anyhow::Error::msg)?;
    if let (true, Some(option)) = (options.mode != dax::Mode::Never, explicit(arguments.migration))
    {
        anyhow::bail!(
            "{option}: a guest that has files mapped with --dax cannot be migrated; leave one of them out"
        );
    }
    Ok(options)
}

/// The socket, with the group that was asked for; or the one that `taken` brought.
fn open_socket(
    arguments: &Arguments,
    name: &str,
    taken: &mut TakenOver,
) -> anyhow::Result<Transport> {
    let choice = arguments
        .socket
        .choice()
        .context("one of --socket-path and --fd is needed, to meet the VMM")?;
    let group = match (&arguments.socket_group, &choice) {
        (Some(name), SocketChoice::Listen(path)) => {
            Some((group::id_of(name).with_context(|| format!("--socket-group {name}"))?, path))
        }
        _ => None,
    };
    let path = match &choice {
        SocketChoice::Listen(path) => Some(path.clone()),
        _ => None,
    };
    if let Some(transport) = taken.transport(name, path) {
        return Ok(transport);
    }
    // Whatever umask we were started with: nobody but this user, and the group that was named, connects.
    let others = if group.is_some() { Mode::RWXO } else { Mode::RWXG | Mode::RWXO };
    let umask = rustix::process::umask(others);
    let transport = Transport::open(&choice);
    rustix::process::umask(umask);
    let transport = transport?;
    if let Some((gid, path)) = group {
        group::give(path, gid).with_context(|| format!("--socket-group: {}", path.display()))?;
    }
    Ok(transport)
}

/// Threads for requests that wait, at the most.
const SLOW_THREADS_MAX: u64 = 1024;

/// How many there may be. The reference daemon takes any number.
fn slow_threads(asked: u64) -> usize {
    if asked > SLOW_THREADS_MAX {
        tracing::warn!(asked, "--thread-pool-size: there will be {SLOW_THREADS_MAX} at the most");
    }
    usize::try_from(asked.min(SLOW_THREADS_MAX)).unwrap_or(0)
}

/// A name for logs and metrics: the tag, or the shared directory's last component.
fn device_name(arguments: &Arguments, shared: &Path) -> String {
    let last = || shared.file_name().map(|name| name.to_string_lossy().into_owned());
    let tag = arguments.tag.as_ref().map(ToString::to_string);
    tag.or_else(last).unwrap_or_else(|| "fs".to_owned())
}

/// Serves what `arguments` ask for until it is told to leave. The start-up order of the house:
/// arguments → log → take over → sockets → sandbox → threads → serve.
///
/// # Errors
/// The operator's mistakes, and what the system refuses.
pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let mut config = config(arguments)?;
    confinement::check(arguments)?;
    logging::init(&arguments.log, "virtiofsd")?;
    let shared = arguments.shared_dir.as_deref().context("--shared-dir is needed")?;
    anyhow::ensure!(shared.is_dir(), "--shared-dir: {} is not a directory", shared.display());
    let name = device_name(arguments, shared);
    let handover_socket = arguments.handover.handover_socket.as_deref();
    if handover_socket.is_some() {
        // What is taken over may be more descriptors than a process has by default.
        let _ = rlimits::open_files(confinement::OPEN_FILES);
    }
    let mut taken = handover_socket.map(TakenOver::from).transpose()?.unwrap_or_default();
    let transport = open_socket(arguments, &name, &mut taken)?;
    let handover = handover_socket.map(Handover::listen).transpose()?;
    let admin = AdminSockets::bind(
        arguments.metrics.metrics_socket.as_deref(),
        arguments.control.control_socket.as_deref(),
    )?;

    let entered = confinement::enter(arguments, shared)?;
    config.share_fds(entered.open_files);
    let fs = PassthroughFs::new(config, entered.directory, entered.proc_self_fd)?;
    let registry = Arc::new(Registry::new("virtiofsd"));
    let device = FsDevice::new(
        fs,
        DeviceOptions {
            name: name.clone(),
            tag: arguments.tag,
            request_queues: arguments.threads.num_request_queues,
            slow_threads: slow_threads(arguments.threads.thread_pool_size),
            dax_timeout: arguments.dax.dax_timeout,
            limits: Limits::default(),
            metrics: registry.device(&name),
        },
    );

    let options = SessionOptions::new(&arguments.socket, &arguments.threads.workers);
    let control = Arc::new(FsControl(device.server().clone()));
    let mut endpoint = Endpoint::new(Arc::new(device), transport, options).counted_in(&registry);
    endpoint.inherited = taken.session(&name);
    let admin = admin.serve(registry, control)?;
    // Kata waits for these words.
    tracing::info!("Waiting for vhost-user socket connection...");
    outboard_common::footprint::give_back_startup_memory();
    let served = daemon::run(vec![endpoint], RunOptions { handover, ..RunOptions::default() });
    if let Some(admin) = admin {
        admin.join();
    }
    served
}
