//! The passthrough: a directory of the host as the guest's file system.
//!
//! # Theory of operation
//! The guest names inodes by node id and directory entries by parent and one name. A node id leads to
//! an `O_PATH` fd through [`InodeStore`]; everything is then done relative to such an fd, with at most
//! one name and never following a symbolic link, so nothing that the guest or a racing process on the
//! host does can make the kernel walk out of the shared directory. File contents are opened through
//! the inode's file handle or `/proc/self/fd`, never by name again, and only those of regular files and
//! directories: opening a device, a FIFO or a socket could have effects on the host.
//!
//! LOOKUP is one `statx`: for an inode that the guest knows already, nothing else. A new inode costs a
//! `name_to_handle_at`; it is opened when first used. What a handle opens is compared with the identity
//! it was looked up with, before it is used for the first time, because another process may have
//! exchanged the name between the two calls. A GETATTR that follows its LOOKUP asks for the name again
//! instead ([`recent`]), and opens nothing.
//!
//! Permissions were checked by the guest's kernel (virtio-fs mounts have `default_permissions`), so
//! most operations run with the daemon's rights; what makes a file runs as the caller
//! ([`credentials`]).
//!
//! | room | operations |
//! |---|---|
//! | [`lookup`] | LOOKUP, FORGET, and from node ids to fds |
//! | [`attr`] | GETATTR, SETATTR, STATX, STATFS, ACCESS |
//! | [`data`] | OPEN, CREATE, TMPFILE, READ, WRITE, FSYNC, LSEEK, FALLOCATE, COPY_FILE_RANGE |
//! | [`dir`] | OPENDIR, READDIR, READDIRPLUS |
//! | [`dax_ops`] | SETUPMAPPING, REMOVEMAPPING, and what else moves the end of a mapped file |
//! | [`namespace`] | MKDIR, MKNOD, SYMLINK, LINK, UNLINK, RMDIR, RENAME, READLINK |
//! | [`xattr`] | extended attributes, their mapping, labels |
//! | [`locks`], [`lock_table`] | POSIX and BSD locks, and deadlocks among them |
//! | [`state`] | a session as data, for another process |
//! | [`traits`] | from the FUSE server's traits to the above |

mod attr;
pub mod config;
mod credentials;
mod data;
mod dax_ops;
mod dir;
pub mod id_map;
mod lock_table;
mod locks;
mod lookup;
mod mounts;
mod namespace;
mod negotiate;
mod recent;
mod state;
mod sys;
mod traits;
mod xattr;
pub mod xattr_map;

#[cfg(test)]
mod tests;

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::Context;
use rustix::fs::{Mode, OFlags};

pub use config::{
    CachePolicy, Config, Demand, InodeFileHandles, Migration, MigrationMode, OnError,
};
use credentials::{ActingAs, Caller, OwnIds};
use locks::Locks;
use mounts::Mounts;
use recent::RecentNames;
use xattr_map::ClientName;

use crate::dax::{self, Dax};
use crate::fuse::extension::CreateContext;
use crate::fuse::wire::init;
use crate::handle_store::HandleStore;
use crate::inode_store::{Handle, InodeStore, Key, NodeFd, NodeInfo};

/// The attribute of file capabilities.
const CAPABILITY: &CStr = c"security.capability";

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum PassthroughError {
    /// The fd is no directory, or cannot be examined.
    #[error("cannot examine the shared directory")]
    Examine(#[source] io::Error),
    /// It is something else.
    #[error("the shared directory is not a directory")]
    NotADirectory,
    /// File handles are mandatory, and there are none.
    #[error(
        "file handles are mandatory but cannot be used: the file system has none, or the process has \
         not CAP_DAC_READ_SEARCH"
    )]
    NoHandles(#[source] io::Error),
    /// `--translate-uid`/`-gid` with ACLs, whose entries would not be translated.
    #[error("ids cannot be translated together with POSIX ACLs, whose entries are not translated")]
    TranslatedAcl,
}

/// A directory of the host, shared.
#[derive(Debug)]
pub struct PassthroughFs {
    config: Config,
    timeout: Duration,
    proc_self_fd: OwnedFd,
    own: OwnIds,
    inodes: InodeStore,
    recent: RecentNames,
    files: HandleStore<data::OpenFile>,
    dirs: HandleStore<dir::OpenDir>,
    mounts: Mounts,
    locks: Locks,
    dax: Option<Dax>,
    /// INIT flags that both sides switched on.
    negotiated: AtomicU64,
    /// Where `--xattrmap` puts file capabilities, if it moves them: the host's kernel then does not
    /// take them away from a file that changes.
    moved_capability: Option<CString>,
}

/// The error of a bare errno; allocates nothing.
fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Identity of the inode that `stat` describes.
#[inline]
fn key_of(stat: &libc::statx) -> Key {
    Key {
        ino: stat.stx_ino,
        // The id of a mount is a small number of the kernel's; the unique form is not asked for.
        mount: u32::try_from(stat.stx_mnt_id).unwrap_or(u32::MAX),
        dev: (stat.stx_dev_major << 20) | stat.stx_dev_minor,
    }
}

/// Birth time in nanoseconds, 0 if the file system has none. Wraps after 584 years, which is no harm:
/// it tells inodes with the same number apart.
#[inline]
fn birth_of(stat: &libc::statx) -> u64 {
    if stat.stx_mask & libc::STATX_BTIME == 0 {
        return 0;
    }
    let birth = stat.stx_btime;
    let seconds = birth.tv_sec.cast_unsigned();
    // The top bit marks digests of handles, see `lookup`.
    seconds.wrapping_mul(1_000_000_000).wrapping_add(birth.tv_nsec.into()) & !(1 << 63)
}

/// Refuses what is not exactly one component of a path.
#[inline]
fn component(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(()),
    }
}

impl PassthroughFs {
    /// Shares `directory`. `proc_self_fd` is `/proc/self/fd` of this process, opened before a sandbox
    /// took `/proc` away.
    ///
    /// # Errors
    /// The directory cannot be shared in the way that `config` asks for.
    pub fn new(
        config: Config,
        directory: OwnedFd,
        proc_self_fd: OwnedFd,
    ) -> Result<Self, PassthroughError> {
        let translated = !config.uid_map.is_identity() || !config.gid_map.is_identity();
        if translated && config.posix_acl != Demand::Never {
            return Err(PassthroughError::TranslatedAcl);
        }
        let stat = sys::statx(directory.as_fd(), c"", 0, sys::STATX_MASK)
            .map_err(PassthroughError::Examine)?;
        if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
            return Err(PassthroughError::NotADirectory);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(&directory, c".", flags, Mode::empty())
            .map_err(|error| PassthroughError::Examine(error.into()))?;
        let mounts = Mounts::new(config.inode_file_handles);
        let key = key_of(&stat);
        let handle = mounts.acquire(root.as_fd(), c"", key).map_err(PassthroughError::NoHandles)?;
        tracing::debug!(handles = handle != Handle::None, "sharing device {:#x}", key.dev);
        if handle == Handle::None && config.inode_file_handles == InodeFileHandles::Prefer {
            tracing::info!(
                "every inode that the guest knows stays open, since the file system has no file handles, or \
                 the process has not CAP_DAC_READ_SEARCH (see --rlimit-nofile)"
            );
        }
        let dax = match config.dax.mode {
            dax::Mode::Never => None,
            _ => Some(Dax::new(config.dax).map_err(PassthroughError::Examine)?),
        };
        let info = NodeInfo {
            key,
            birth_ns: birth_of(&stat),
            file_type: libc::S_IFDIR,
            submount: false,
            verified: true,
            handle: Handle::None,
        };
        let moved_capability = match config.xattr_map.as_ref().map(|map| map.client(CAPABILITY)) {
            Some(Ok(ClientName::Renamed(name))) => Some(name),
            _ => None,
        };
        Ok(Self {
            timeout: config.timeout(),
            inodes: InodeStore::new(info, NodeFd::new(root), config.hot_fds),
            recent: RecentNames::new(),
            config,
            proc_self_fd,
            own: OwnIds::get(),
            files: HandleStore::default(),
            dirs: HandleStore::default(),
            mounts,
            locks: Locks::default(),
            dax,
            negotiated: AtomicU64::new(0),
            moved_capability,
        })
    }

    /// Inodes that the guest knows, besides the shared directory.
    #[must_use]
    pub fn inode_count(&self) -> usize {
        self.inodes.len()
    }

    /// Files and directories that the guest has open.
    #[must_use]
    pub fn open_count(&self) -> usize {
        self.files.len() + self.dirs.len()
    }

    /// Prepares the calling thread: its own umask and working directory.
    ///
    /// # Errors
    /// `unshare` or `fchdir` refused.
    pub fn prepare_thread(&self) -> io::Result<()> {
        credentials::prepare_thread(self.proc_self_fd.as_fd())
    }

    /// The guest is new, or gone: forgets what it knew and closes what it had open.
    fn reset(&self) {
        if let Some(dax) = &self.dax {
            dax.forget_guest();
        }
        self.locks.clear();
        self.files.clear();
        self.dirs.clear();
        self.inodes.clear_with(&mut |key| self.mounts.release(key.mount));
    }

    #[inline]
    fn has(&self, flag: u64) -> bool {
        self.negotiated.load(Ordering::Relaxed) & flag != 0
    }

    /// Refuses changes to a directory shared read-only.
    #[inline]
    fn writable(&self) -> io::Result<()> {
        if self.config.readonly { Err(errno(libc::EROFS)) } else { Ok(()) }
    }

    fn proc_fd(&self) -> BorrowedFd<'_> {
        self.proc_self_fd.as_fd()
    }

    /// Host ids of the guest's.
    fn host_ids(&self, uid: u32, gid: u32) -> io::Result<(u32, u32)> {
        let uid = self.config.uid_map.host(uid).ok_or(errno(libc::EPERM))?;
        let gid = self.config.gid_map.host(gid).ok_or(errno(libc::EPERM))?;
        Ok((uid, gid))
    }

    /// Takes the rights of the caller, as the host knows them.
    fn act_as(&self, ctx: &Context, extra: &CreateContext<'_>) -> io::Result<ActingAs> {
        let (uid, gid) = self.host_ids(ctx.uid, ctx.gid)?;
        let group = match extra.supplementary_group {
            None => None,
            Some(group) => Some(self.config.gid_map.host(group).ok_or(errno(libc::EPERM))?),
        };
        let names_groups = self.has(init::CREATE_SUPP_GROUP);
        Caller { uid, gid, group, names_groups }.act(self.own)
    }
}
