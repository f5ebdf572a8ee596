//! The command line: every option of the reference daemon with its meaning, and a few of our own.
//!
//! Old spellings (`-o key=value,…`, `-d`, `-f`, `--socket`) are turned into these by [`compat`] before
//! anything is parsed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, ValueEnum};
use outboard_common::capabilities::Capabilities;
use outboard_common::cli::{
    CapabilitiesArgs, ControlArgs, HandoverArgs, LogArgs, MetricsArgs, SeccompArgs, SocketArgs,
    WorkerArgs, values::Size,
};
use outboard_common::sandbox::namespaces::id_map::IdMap;

use crate::dax;
use crate::device::Tag;

pub mod compat;
mod values;

pub use values::CapabilityChanges;

/// `--print-capabilities`' answer. QEMU's back-end program conventions.
pub const CAPABILITIES: Capabilities = Capabilities {
    device_type: "fs",
    features: &[
        "migrate-precopy",
        "posix-acl-negotiation-mode",
        "security-label-negotiation-mode",
        "separate-options",
    ],
};

/// What `--help` and the manual page end with.
const EXAMPLES: &str = r#"Examples:
  Share a directory (in the guest: mount -t virtiofs share /mnt):
    virtiofsd --socket-path=/run/fs.sock --shared-dir=/srv/share --tag=share

  Several request queues, and locks that other guests and the host see:
    virtiofsd --socket-path=/run/fs.sock --shared-dir=/srv/share --num-request-queues=4 \
        --posix-lock --flock

  Have QEMU's guest map files in place of copying them:
    virtiofsd --socket-path=/run/fs.sock --shared-dir=/srv/share --tag=share \
        --dax=inode --dax-window=256M

  A newer program takes over from one that runs, open files and all, if both have the option:
    virtiofsd --socket-path=/run/fs.sock --shared-dir=/srv/share \
        --handover-socket=/run/fs.next"#;

/// Shares a directory with a guest as a virtio-fs device
#[derive(Debug, Clone, Parser)]
#[command(name = "virtiofsd", version, max_term_width = 100, args_override_self = true, after_long_help = EXAMPLES)]
pub struct Arguments {
    /// Directory to share
    #[arg(long, value_name = "DIR")]
    pub shared_dir: Option<PathBuf>,

    /// Name under which the guest mounts the directory; without one, the VMM must have it
    #[arg(long, value_name = "TAG")]
    pub tag: Option<Tag>,

    /// Where the VMM is met.
    #[command(flatten)]
    pub socket: SocketArgs,

    /// Group that the socket belongs to, so that its members can connect
    #[arg(long, value_name = "GROUP", conflicts_with = "fd")]
    pub socket_group: Option<String>,

    /// Contents and attributes.
    #[command(flatten)]
    pub sharing: SharingArgs,

    /// DAX.
    #[command(flatten)]
    pub dax: DaxArgs,

    /// Owners.
    #[command(flatten)]
    pub ids: IdArgs,

    /// Migration.
    #[command(flatten)]
    pub migration: MigrationArgs,

    /// Hand-over.
    #[command(flatten)]
    pub handover: HandoverArgs,

    /// Confinement.
    #[command(flatten)]
    pub confinement: ConfinementArgs,

    /// Queues and threads.
    #[command(flatten)]
    pub threads: ThreadArgs,

    /// Log.
    #[command(flatten)]
    pub log: LogArgs,

    /// Metrics.
    #[command(flatten)]
    pub metrics: MetricsArgs,

    /// Control.
    #[command(flatten)]
    pub control: ControlArgs,

    /// Capabilities.
    #[command(flatten)]
    pub capabilities: CapabilitiesArgs,
}

/// Which files the guest may map into its address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dax {
    /// None
    Never,
    /// Large files that do not grow, for guests that mount with dax=inode
    Inode,
    /// Any file, for guests that mount with dax=always
    Always,
}

impl From<Dax> for dax::Mode {
    fn from(dax: Dax) -> Self {
        match dax {
            Dax::Never => Self::Never,
            Dax::Inode => Self::Inode,
            Dax::Always => Self::Always,
        }
    }
}

/// How the VMM maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DaxVmm {
    /// Whole pages inside files that are open for writing, a few hundred at once
    Qemu,
    /// Whatever it is asked for, as crosvm does
    Plain,
}

impl From<DaxVmm> for dax::Vmm {
    fn from(vmm: DaxVmm) -> Self {
        match vmm {
            DaxVmm::Qemu => Self::Strict,
            DaxVmm::Plain => Self::Plain,
        }
    }
}

/// Files that the guest reads in place, in the host's page cache.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "DAX")]
pub struct DaxArgs {
    /// Files the guest may map into its address space
    #[arg(long, value_name = "WHICH", default_value = "never")]
    pub dax: Dax,

    /// Address space of the guest that is set aside for mapped files, a power of two
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub dax_window: Size,

    /// How the VMM maps
    #[arg(long, value_name = "VMM", default_value = "qemu")]
    pub dax_vmm: DaxVmm,

    /// Seconds that the VMM may take to map or unmap; the guest's request fails then, and the queue
    /// goes on
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = values::some_seconds)]
    pub dax_timeout: Duration,
}

/// How the directory is shown to the guest.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sharing")]
#[allow(clippy::struct_excessive_bools, reason = "each is one flag of the command line")]
pub struct SharingArgs {
    /// How long the guest may keep names, attributes and contents
    #[arg(long, value_name = "POLICY", default_value = "auto")]
    pub cache: Cache,

    /// Seconds that names and attributes stay valid in the guest, in place of the policy's
    #[arg(long, value_name = "SECONDS", value_parser = values::seconds)]
    pub timeout: Option<Duration>,

    /// With --cache=metadata or never: let the guest map shared files into memory all the same
    #[arg(long)]
    pub allow_mmap: bool,

    /// Let the guest's page cache collect writes
    #[arg(long, overrides_with = "no_writeback")]
    pub writeback: bool,
    #[arg(long, hide = true, overrides_with = "writeback")]
    no_writeback: bool,

    /// Do not send attributes together with directory entries
    #[arg(long, overrides_with = "readdirplus")]
    pub no_readdirplus: bool,
    #[arg(long, hide = true, overrides_with = "no_readdirplus")]
    readdirplus: bool,

    /// Pass O_DIRECT of the guest's programs on to the host
    #[arg(long, overrides_with = "no_allow_direct_io")]
    pub allow_direct_io: bool,
    #[arg(long, hide = true, overrides_with = "allow_direct_io")]
    no_allow_direct_io: bool,

    /// Extended attributes
    #[arg(long, overrides_with = "no_xattr")]
    pub xattr: bool,
    #[arg(long, hide = true, overrides_with = "xattr")]
    no_xattr: bool,

    /// Rules that translate names of extended attributes, like :map::user.virtiofs.: (implies --xattr)
    #[arg(long, value_name = "RULES")]
    pub xattrmap: Option<String>,

    /// POSIX access control lists (implies --xattr); always: refuse guests that cannot
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true,
          default_value = "never", default_missing_value = "always")]
    pub posix_acl: When,

    /// Labels of security modules on new files (implies --xattr); always: refuse guests that cannot
    #[arg(long, value_name = "WHEN", num_args = 0..=1, require_equals = true,
          default_value = "never", default_missing_value = "always")]
    pub security_label: When,

    /// Clear set-user-id, set-group-id and capabilities on the host when a file changes
    #[arg(long, overrides_with = "no_killpriv_v2")]
    pub killpriv_v2: bool,
    /// Leave that to the guest [default]
    #[arg(long, overrides_with = "killpriv_v2")]
    pub no_killpriv_v2: bool,

    /// Show the guest where other file systems are mounted in the directory [default]
    #[arg(long, overrides_with = "no_announce_submounts")]
    pub announce_submounts: bool,
    /// Show them as ordinary directories
    #[arg(long, overrides_with = "announce_submounts")]
    pub no_announce_submounts: bool,

    /// Pass O_NOATIME on, even where the daemon may not use it
    #[arg(long)]
    pub preserve_noatime: bool,

    /// The guest may not change anything
    #[arg(long)]
    pub readonly: bool,

    /// POSIX locks that exclude the host's processes and other guests too
    #[arg(long, overrides_with = "no_posix_lock")]
    pub posix_lock: bool,
    #[arg(long, hide = true, overrides_with = "posix_lock")]
    no_posix_lock: bool,

    /// BSD locks that exclude the host's processes and other guests too
    #[arg(long, overrides_with = "no_flock")]
    pub flock: bool,
    #[arg(long, hide = true, overrides_with = "flock")]
    no_flock: bool,

    /// Remember inodes by file handle rather than by open descriptor
    #[arg(long, value_name = "WHEN", default_value = "prefer")]
    pub inode_file_handles: InodeHandles,
}

/// How owners are translated.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Owners")]
pub struct IdArgs {
    /// Users of the sandbox's user namespace, like :0:100000:65536: (may be repeated) [default, without
    /// privileges: the daemon's own user, as itself]
    #[arg(long, value_name = ":INSIDE:OUTSIDE:COUNT:", action = ArgAction::Append)]
    pub uid_map: Vec<IdMap>,

    /// Groups of the sandbox's user namespace (may be repeated)
    #[arg(long, value_name = ":INSIDE:OUTSIDE:COUNT:", action = ArgAction::Append)]
    pub gid_map: Vec<IdMap>,

    /// Translate users between guest and host: TYPE is guest, host, squash-guest, squash-host, forbid-guest
    /// or map (may be repeated)
    #[arg(long, value_name = "TYPE:FROM:TO:COUNT", action = ArgAction::Append)]
    pub translate_uid: Vec<String>,

    /// Translate groups between guest and host (may be repeated)
    #[arg(long, value_name = "TYPE:FROM:TO:COUNT", action = ArgAction::Append)]
    pub translate_gid: Vec<String>,
}

/// How a guest moves to another machine.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Migration")]
pub struct MigrationArgs {
    /// How the destination is told of an inode: by its path, or by its file handle (both sides must
    /// share the same file system). A destination takes file handles only with `file-handles`: they can
    /// name files outside the shared directory too, so use it where the source's VMM is trusted
    /// [default: find-paths]
    #[arg(long, value_name = "MODE")]
    pub migration_mode: Option<MigrationMode>,

    /// At the destination, what to do about an inode that is not found: abort the migration, or give the
    /// guest errors when it uses that inode
    /// [default: abort]
    #[arg(long, value_name = "WHAT")]
    pub migration_on_error: Option<MigrationOnError>,

    /// At the source, send file handles along, which the destination compares with those of the inodes
    /// that it finds
    #[arg(long)]
    pub migration_verify_handles: bool,

    /// At the source, look at every path again when all are found
    #[arg(long)]
    pub migration_confirm_paths: bool,
}

/// How the daemon is locked in.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sandbox")]
pub struct ConfinementArgs {
    /// What keeps the daemon inside the shared directory
    #[arg(long, value_name = "KIND", default_value = "namespace")]
    pub sandbox: Sandbox,

    /// The system call filter.
    #[command(flatten)]
    pub seccomp: SeccompArgs,

    /// Capabilities to keep or drop besides the usual ones, like +sys_admin:-chown
    #[arg(long, value_name = "CHANGES")]
    pub modcaps: Option<CapabilityChanges>,

    /// Descriptors that may be open at once; 0 leaves the limit alone [default: 1000000, or what the
    /// system allows]
    #[arg(long, value_name = "N")]
    pub rlimit_nofile: Option<u64>,
}

/// Queues and threads.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Threads")]
pub struct ThreadArgs {
    /// Request queues to offer [default: 1 in configuration space, up to 64 if the VMM asks for them]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub num_request_queues: Option<u16>,

    /// Threads, made when needed, for requests that wait, 1024 at the most; 0: such requests hold up
    /// their queue
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub thread_pool_size: u64,

    /// Workers.
    #[command(flatten)]
    pub workers: WorkerArgs,
}

/// `--cache`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// For a second; contents until the file is opened again after a change.
    Auto,
    /// For long: nobody else changes the directory.
    Always,
    /// Nothing is kept.
    #[value(alias = "none")]
    Never,
    /// Names and attributes for long, contents not at all.
    Metadata,
}

/// `--posix-acl` and `--security-label`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum When {
    /// Off.
    Never,
    /// On, if the guest can.
    Auto,
    /// On; a guest that cannot is refused.
    Always,
}

/// `--inode-file-handles`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum InodeHandles {
    /// Always an open descriptor.
    Never,
    /// File handles where the file system has them.
    #[value(alias = "fallback")]
    Prefer,
    /// File handles alone.
    Mandatory,
}

/// `--migration-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MigrationMode {
    /// Paths in the shared directory.
    FindPaths,
    /// File handles.
    FileHandles,
}

/// `--migration-on-error`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MigrationOnError {
    /// No migration.
    Abort,
    /// The guest gets errors.
    GuestError,
}

/// `--sandbox`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// Own mount, PID and network namespaces with the shared directory as root
    Namespace,
    /// The shared directory as root
    Chroot,
    /// No confinement of paths by the kernel
    None,
}

#[cfg(test)]
mod tests;
