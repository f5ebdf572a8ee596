//! Locking the daemon in: the shared directory becomes the root, and little else is left.
//!
//! The order of the stages is that of [`outboard_common::sandbox`]. What must be open when the
//! directory has become the root is opened here or before.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::Context as _;
use outboard_common::sandbox::namespaces::id_map::{IdMap, IdMaps};
use outboard_common::sandbox::namespaces::root;
use outboard_common::sandbox::{
    CapabilitySet, Outcome, Stage, StageError, Stages, capabilities, rlimits, stages,
};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Resource, getrlimit};

use crate::cli::{Arguments, ConfinementArgs, IdArgs, InodeHandles, Sandbox};
use crate::seccomp;

/// Descriptors that a daemon with one queue and a guest that opens a few files gets by with.
const FEWEST_OPEN_FILES: u64 = 100;

/// Descriptors that may be open, where the operator says nothing and the system allows more.
pub(crate) const OPEN_FILES: u64 = 1_000_000;

/// What the passthrough gets to work with.
#[derive(Debug)]
pub(crate) struct Entered {
    /// The shared directory.
    pub(crate) directory: OwnedFd,
    /// `/proc/self/fd`.
    pub(crate) proc_self_fd: OwnedFd,
    /// Descriptors that may be open at once.
    pub(crate) open_files: u64,
}

/// The capabilities that a file server needs to act for all users of the guest.
fn usual_capabilities(handles: InodeHandles) -> CapabilitySet {
    let mut set = CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETGID
        | CapabilitySet::SETUID
        | CapabilitySet::MKNOD
        | CapabilitySet::SETFCAP;
    if handles != InodeHandles::Never {
        // For open_by_handle_at.
        set |= CapabilitySet::DAC_READ_SEARCH;
    }
    set
}

/// The ids of the user namespace; `None` when there need not be one. Who is not spoken of is the daemon's
/// own user (or group), as itself.
fn id_maps(ids: &IdArgs) -> Option<IdMaps> {
    let (user, group) = own_ids();
    if ids.uid_map.is_empty() && ids.gid_map.is_empty() && user == 0 {
        return None;
    }
    let or_same = |given: &[IdMap], own| match given {
        [] => vec![IdMap::same(own)],
        given => given.to_vec(),
    };
    Some(IdMaps { users: or_same(&ids.uid_map, user), groups: or_same(&ids.gid_map, group) })
}

/// User and group that the daemon was started as.
fn own_ids() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// Refuses a map in which the daemon itself is nobody: having acted as somebody else, it could not become
/// itself again.
fn check_map(option: &str, map: &[IdMap], own: u32) -> anyhow::Result<()> {
    let stands = |one: &IdMap| {
        one.inside == 0 || own.checked_sub(one.outside).is_some_and(|offset| offset < one.count)
    };
    anyhow::ensure!(
        map.is_empty() || map.iter().any(stands),
        "{option}: who the daemon runs as ({own}) is nobody in this namespace; map {own} too, or some id \
         to 0, which the daemon then becomes"
    );
    Ok(())
}

/// Sets the limit of open files, which is returned; one that the operator asked for must be had.
fn open_files(stages: &mut Stages, args: &ConfinementArgs) -> anyhow::Result<u64> {
    let allowed = fs::read_to_string("/proc/sys/fs/nr_open")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(OPEN_FILES);
    match args.rlimit_nofile {
        Some(0) => {}
        Some(wanted) => stages.require(Stage::Rlimits, || match rlimits::open_files(wanted)? {
            Outcome::Partly(why) => Err(StageError::System {
                action: "set the number of open files",
                source: std::io::Error::other(why),
            }),
            outcome => Ok(outcome),
        })?,
        None => {
            stages.attempt(Stage::Rlimits, || rlimits::open_files(OPEN_FILES.min(allowed)));
        }
    }
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    anyhow::ensure!(
        limit >= FEWEST_OPEN_FILES,
        "no more than {limit} files may be open at once, and the daemon itself needs {FEWEST_OPEN_FILES}: \
         raise --rlimit-nofile"
    );
    Ok(limit)
}

/// Whether the options fit together.
///
/// # Errors
/// Maps of ids for a user namespace that there will not be, or in which the daemon would be nobody.
pub(crate) fn check(arguments: &Arguments) -> anyhow::Result<()> {
    let IdArgs { uid_map, gid_map, .. } = &arguments.ids;
    let maps = !uid_map.is_empty() || !gid_map.is_empty();
    anyhow::ensure!(
        !maps || arguments.confinement.sandbox == Sandbox::Namespace,
        "--uid-map and --gid-map need the user namespace of --sandbox=namespace (--translate-uid and \
         --translate-gid do not)"
    );
    let (user, group) = own_ids();
    check_map("--uid-map", uid_map, user)?;
    check_map("--gid-map", gid_map, group)
}

/// Leaves the supplementary groups that the daemon was started with: whoever of the guest it acts as would
/// have them too.
fn drop_groups() -> anyhow::Result<()> {
    // There is one thread, so the thread's groups are the process's.
    match rustix::thread::set_thread_groups(&[]) {
        // Who may not do that cannot act as somebody else either.
        Ok(()) | Err(rustix::io::Errno::PERM) => Ok(()),
        Err(error) => Err(error).context("leave the supplementary groups"),
    }
}

fn open_path(path: &Path) -> anyhow::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    open(path, flags, Mode::empty()).with_context(|| format!("cannot open {}", path.display()))
}

/// Enters the sandbox that `arguments` ask for around `shared`. No thread runs yet.
///
/// # Errors
/// A required stage cannot be done.
pub(crate) fn enter(arguments: &Arguments, shared: &Path) -> anyhow::Result<Entered> {
    let args = &arguments.confinement;
    let mut stages = Stages::begin()?;
    let open_files = open_files(&mut stages, args)?;
    drop_groups()?;
    let mut proc_self_fd = None;
    let root = Path::new("/");
    match args.sandbox {
        Sandbox::Namespace => stages.require(Stage::Namespaces, || {
            proc_self_fd = Some(root::enter(shared, id_maps(&arguments.ids).as_ref())?.self_fd);
            Ok(Outcome::Applied)
        })?,
        Sandbox::Chroot => stages.require(Stage::Namespaces, || {
            proc_self_fd = Some(root::change(shared)?.self_fd);
            Ok(Outcome::Applied)
        })?,
        Sandbox::None => {}
    }
    // In a user namespace, it may be possible only now.
    drop_groups()?;
    let (directory, proc_self_fd) = match proc_self_fd {
        Some(proc_self_fd) => (open_path(root)?, proc_self_fd),
        None => (open_path(shared)?, open_path(Path::new("/proc/self/fd"))?),
    };
    // Modes come from the guest, where its umask was applied already.
    rustix::process::umask(Mode::empty());
    stages.require(Stage::NoNewPrivileges, stages::no_new_privileges)?;
    let held = rustix::thread::capabilities(None).context("read the capabilities")?.permitted;
    let mut kept = usual_capabilities(arguments.sharing.inode_file_handles) & held;
    if let Some(changes) = args.modcaps {
        kept = changes.apply(kept);
    }
    stages.require(Stage::Capabilities, || capabilities::keep(kept))?;
    stages.require(Stage::Seccomp, || seccomp::filter().apply(args.seccomp.seccomp))?;
    Ok(Entered { directory, proc_self_fd, open_files })
}
