//! What the operator chose for the passthrough.

use std::os::fd::RawFd;
use std::time::Duration;

use super::id_map::IdMap;
use super::xattr_map::XattrMap;
use crate::dax;

/// Descriptors that the guest cannot use up: for sockets, queues and memory, and what a request opens for
/// as long as it runs.
const OWN_FDS: u64 = 512;

/// How long the guest may keep what it learned (`--cache`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CachePolicy {
    /// Nothing; file contents bypass the guest's page cache.
    Never,
    /// Names and attributes for long, contents not at all.
    Metadata,
    /// Names and attributes for a second; contents until the file is opened again.
    #[default]
    Auto,
    /// Everything, for long: nobody else changes the directory.
    Always,
}

impl CachePolicy {
    /// How long names and attributes hold.
    #[must_use]
    pub const fn timeout(self) -> Duration {
        match self {
            Self::Never => Duration::ZERO,
            Self::Auto => Duration::from_secs(1),
            Self::Metadata | Self::Always => Duration::from_secs(86_400),
        }
    }
}

/// When to name inodes by file handle rather than hold an fd (`--inode-file-handles`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InodeFileHandles {
    /// Hold an `O_PATH` fd for every inode that the guest knows.
    Never,
    /// Use handles where the file system has them and the process may open them.
    #[default]
    Prefer,
    /// Refuse inodes that have none.
    Mandatory,
}

/// Whether a feature of the guest is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Demand {
    /// Leave it off.
    #[default]
    Never,
    /// Switch it on if the guest has it.
    Auto,
    /// Refuse a guest that has it not.
    Always,
}

/// How a migration tells the destination of an inode (`--migration-mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MigrationMode {
    /// By its path in the shared directory.
    #[default]
    FindPaths,
    /// By its file handle: both sides share the same file system.
    FileHandles,
}

/// What an inode that cannot be found means at the destination (`--migration-on-error`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The migration fails, and the guest goes on at the source.
    #[default]
    Abort,
    /// The guest goes on here, and gets errors for that inode.
    GuestError,
}

/// How guests move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Migration {
    /// `--migration-mode`.
    pub mode: MigrationMode,
    /// `--migration-on-error`.
    pub on_error: OnError,
    /// `--migration-verify-handles`: the destination shall compare file handles.
    pub verify_handles: bool,
    /// `--migration-confirm-paths`: look at each path again when all are found.
    pub confirm_paths: bool,
}

/// What the operator chose for the passthrough.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools, reason = "each is one flag of the command line")]
pub struct Config {
    /// `--cache`.
    pub cache: CachePolicy,
    /// `--allow-mmap`: let the guest map files whose contents it does not cache.
    pub allow_mmap: bool,
    /// `--writeback`.
    pub writeback: bool,
    /// Not `--no-readdirplus`.
    pub readdirplus: bool,
    /// `--allow-direct-io`: pass `O_DIRECT` on.
    pub allow_direct_io: bool,
    /// `--xattr`.
    pub xattr: bool,
    /// `--xattrmap`; implies `xattr`.
    pub xattr_map: Option<XattrMap>,
    /// `--posix-acl`; implies `xattr`.
    pub posix_acl: Demand,
    /// `--security-label`; implies `xattr`.
    pub security_label: Demand,
    /// `--killpriv-v2`.
    pub killpriv_v2: bool,
    /// Not `--no-announce-submounts`.
    pub announce_submounts: bool,
    /// `--preserve-noatime`.
    pub preserve_noatime: bool,
    /// `--readonly`.
    pub readonly: bool,
    /// `--inode-file-handles`.
    pub inode_file_handles: InodeFileHandles,
    /// `--translate-uid`.
    pub uid_map: IdMap,
    /// `--translate-gid`.
    pub gid_map: IdMap,
    /// `--posix-lock`: forward `fcntl` locks to the host.
    pub posix_locks: bool,
    /// `--flock`: forward `flock` locks to the host.
    pub flock: bool,
    /// `-o timeout=`: overrides the timeout of `cache`.
    pub timeout: Option<Duration>,
    /// `--dax`, `--dax-window`, `--dax-vmm`.
    pub dax: dax::Options,
    /// `--migration-…`.
    pub migration: Migration,
    /// Fds kept open for inodes that have file handles.
    pub hot_fds: usize,
    /// Descriptors of this number and above are not the guest's to keep open: without a few free ones,
    /// nothing could be looked at any more, whoever asks.
    pub guest_fds: RawFd,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cache: CachePolicy::default(),
            allow_mmap: false,
            writeback: false,
            readdirplus: true,
            allow_direct_io: false,
            xattr: false,
            xattr_map: None,
            posix_acl: Demand::Never,
            security_label: Demand::Never,
            killpriv_v2: false,
            announce_submounts: true,
            preserve_noatime: false,
            readonly: false,
            inode_file_handles: InodeFileHandles::default(),
            uid_map: IdMap::default(),
            gid_map: IdMap::default(),
            posix_locks: false,
            flock: false,
            timeout: None,
            dax: dax::Options::default(),
            migration: Migration::default(),
            hot_fds: 2048,
            guest_fds: RawFd::MAX,
        }
    }
}

impl Config {
    /// How long names and attributes hold in the guest.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(self.cache.timeout())
    }

    /// Shares out the `limit` descriptors that the process may have open: a quarter of them, if those are
    /// not many, stay the daemon's own.
    pub fn share_fds(&mut self, limit: u64) {
        let own = (limit / 4).min(OWN_FDS);
        self.guest_fds = RawFd::try_from(limit - own).unwrap_or(RawFd::MAX);
        self.hot_fds = self.hot_fds.min(usize::try_from(limit / 8).unwrap_or(usize::MAX));
    }

    /// Whether extended attributes are on, by themselves or for something that needs them.
    #[must_use]
    pub fn uses_xattr(&self) -> bool {
        self.xattr
            || self.xattr_map.is_some()
            || self.posix_acl != Demand::Never
            || self.security_label != Demand::Never
    }
}
