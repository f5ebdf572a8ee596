//! What a file system can do beyond `fuse-backend-rs`'s [`FileSystem`] trait.
//!
//! # Theory of operation
//! The server speaks to a file system through [`FileSystem`] (metadata, names, handles) and through
//! [`Extension`], whose every method has a default that falls back to [`FileSystem`] or to `ENOSYS`.
//! Any upstream file system therefore plugs in with an empty `impl Extension for X {}`; ours overrides
//! the methods of the hot path, so that READ and WRITE are one `preadv2`/`pwritev2` on the chain's own
//! iovecs, without an allocation or a call through a vtable.
//!
//! A queue's worker calls the methods on its own thread and must not be held up. Reads and writes take
//! a [`Wait`]: with [`Wait::Never`] the file system does what it can without waiting (`RWF_NOWAIT`) and
//! answers `EAGAIN` for the rest, which the worker then gives to a slow thread with
//! [`Wait::Allowed`], or, if nothing else is there to be done, tries itself with [`Wait::Briefly`].
//! [`Extension::waits`] says which other operations go to a slow thread at once.
//!
//! All errors are `io::Error`s made from an errno, which allocate nothing; their errno is the reply's.

use std::ffi::CStr;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions, stat64};
use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, FileLock, FileSystem, FsOptions};
use outboard_common::ring::IoVecs;

use super::opcode::Opcode;
use super::upstream;

/// `ENOSYS`: the kernel then stops sending the operation, where it can.
#[must_use]
pub fn not_supported() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSYS)
}

/// Whether an operation may wait for a disk, a network or a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Do what needs no waiting; `EAGAIN` if that is nothing. Fewer bytes than asked for, ending at a
    /// page boundary, mean that the rest would have to wait (or that the file ends there).
    Never,
    /// Nothing else waits behind it: wait for storage that answers soon as a rule, a local disk. `EAGAIN`
    /// for what is not of that kind.
    Briefly,
    /// Take the time it needs.
    Allowed,
    /// The same, and SETLKW waits for its lock.
    ForLock,
}

impl Wait {
    /// Whether a queue's worker asks, which has other requests to do.
    #[inline]
    #[must_use]
    pub fn is_on_worker(self) -> bool {
        matches!(self, Self::Never | Self::Briefly)
    }
}

/// What SETLKW asks for.
#[derive(Clone, Copy)]
pub struct LockRequest {
    /// The inode.
    pub inode: u64,
    /// The handle.
    pub handle: u64,
    /// Whose lock it shall be.
    pub owner: u64,
    /// The lock.
    pub lock: FileLock,
    /// `FUSE_LK_*`.
    pub flags: u32,
}

impl std::fmt::Debug for LockRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let FileLock { start, end, lock_type, pid } = self.lock;
        f.debug_struct("LockRequest")
            .field("inode", &self.inode)
            .field("handle", &self.handle)
            .field("owner", &self.owner)
            .field("lock", &(start, end, lock_type, pid))
            .field("flags", &self.flags)
            .finish()
    }
}

/// Runs a system call that waits for a lock and that a signal ends with `EINTR`; see
/// [`LockWaits::block`](super::lock_waits::LockWaits::block).
pub type BlockForLock<'a> = dyn FnMut(&mut dyn FnMut() -> io::Result<()>) -> io::Result<()> + 'a;

/// What READ asks for, besides the buffers.
#[derive(Debug, Clone, Copy)]
pub struct ReadRequest {
    /// The inode.
    pub inode: u64,
    /// The handle that OPEN or CREATE returned; 0 when it returned none.
    pub handle: u64,
    /// Where to start, bytes.
    pub offset: u64,
    /// The lock owner, if the request names one.
    pub lock_owner: Option<u64>,
    /// The open flags that the guest holds the file with (`O_DIRECT` can change after open).
    pub flags: u32,
}

/// What WRITE asks for, besides the data.
#[derive(Debug, Clone, Copy)]
pub struct WriteRequest {
    /// The inode.
    pub inode: u64,
    /// The handle that OPEN or CREATE returned; 0 when it returned none.
    pub handle: u64,
    /// Where to start, bytes.
    pub offset: u64,
    /// The lock owner, if the request names one.
    pub lock_owner: Option<u64>,
    /// The data come from the guest's page cache; the handle is a guess (FUSE_WRITE_CACHE).
    pub delayed: bool,
    /// Clear set-user-id and set-group-id bits (FUSE_WRITE_KILL_SUIDGID).
    pub kill_suidgid: bool,
    /// The open flags that the guest holds the file with.
    pub flags: u32,
}

/// COPY_FILE_RANGE's arguments.
#[derive(Debug, Clone, Copy)]
pub struct CopyRange {
    /// Source inode.
    pub inode_in: u64,
    /// Source handle.
    pub handle_in: u64,
    /// Source offset, bytes.
    pub offset_in: u64,
    /// Target inode.
    pub inode_out: u64,
    /// Target handle.
    pub handle_out: u64,
    /// Target offset, bytes.
    pub offset_out: u64,
    /// Bytes to copy.
    pub len: u64,
    /// `copy_file_range(2)`'s flags.
    pub flags: u64,
}

/// SETUPMAPPING's arguments: show a part of a file in the DAX window.
#[derive(Debug, Clone, Copy)]
pub struct MapRequest {
    /// The inode.
    pub inode: u64,
    /// A handle, or `u64::MAX`.
    pub handle: u64,
    /// Offset in the file, bytes.
    pub file_offset: u64,
    /// Bytes to map.
    pub len: u64,
    /// The guest wants to write (FUSE_SETUPMAPPING_FLAG_WRITE).
    pub write: bool,
    /// Where in the window, bytes.
    pub window_offset: u64,
}

/// The guest's DAX window, shared memory region 0 of the device.
pub trait DaxWindow {
    /// Shows `len` bytes of `file` from `file_offset` at `window_offset`; what was mapped there goes.
    ///
    /// # Errors
    /// The front end refused.
    fn map(
        &self,
        file: BorrowedFd<'_>,
        file_offset: u64,
        window_offset: u64,
        len: u64,
        write: bool,
    ) -> io::Result<()>;

    /// Takes `len` bytes at `window_offset` out of the window.
    ///
    /// # Errors
    /// The front end refused.
    fn unmap(&self, window_offset: u64, len: u64) -> io::Result<()>;
}

/// One security label to give to a new file: the extended attribute's name and value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SecurityContext<'a> {
    /// Such as `security.selinux`.
    pub name: &'a CStr,
    /// The attribute's value.
    pub value: &'a [u8],
}

/// What CREATE, MKNOD, MKDIR, SYMLINK and TMPFILE bring along besides their arguments.
#[derive(Debug, Clone, Copy, Default)]
pub struct CreateContext<'a> {
    /// The label that the guest's security module chose (FUSE_SECURITY_CTX).
    pub security: Option<SecurityContext<'a>>,
    /// The caller has this group as a supplementary one; it is the parent directory's
    /// (FUSE_CREATE_SUPP_GROUP).
    pub supplementary_group: Option<u32>,
}

/// What CREATE and TMPFILE return: the entry, the handle, how the guest shall treat the open file.
pub type Created = (Entry, Option<u64>, OpenOptions);

/// Takes directory entries together with their attributes.
pub trait EntrySink {
    /// Whether an entry with a name of `name_len` bytes fits. Ask before looking the entry up: a
    /// lookup that is not handed out would have to be undone.
    fn fits(&self, name_len: usize) -> bool;

    /// Adds an entry; false, and nothing added, when it does not fit. An [`Entry`] whose inode is 0
    /// carries no lookup: the guest will look it up when it needs it (`.` and `..`, and entries that
    /// went away).
    fn add(&mut self, dirent: DirEntry<'_>, entry: &Entry) -> bool;
}

/// Whom a saved session comes from, and so what it may name.
#[derive(Debug)]
pub enum Origin {
    /// The VMM. A guest may have taken it over: the state can get no more than the guest could by asking.
    Vmm,
    /// Our own predecessor on this machine, with these descriptors.
    Predecessor(Vec<OwnedFd>),
}

/// The operations and the fast forms that upstream's trait has not.
#[allow(unused_variables, reason = "defaults that do nothing name their arguments for the reader")]
pub trait Extension: FileSystem<Inode = u64, Handle = u64> + Send + Sync + 'static {
    /// INIT: takes the driver's flags (`flags` in the low and `flags2` in the high half) and returns
    /// those to switch on; bits not in `capable` are dropped by the server. A new session starts: the
    /// inode and handle tables are empty but for the root.
    ///
    /// # Errors
    /// The mount fails with this errno.
    fn negotiate(&self, capable: u64) -> io::Result<u64> {
        self.init(FsOptions::from_bits_truncate(capable)).map(|options| options.bits())
    }

    /// Called once on every thread that is about to call the other methods: queue workers and slow
    /// threads. The place for per-thread state such as `unshare(CLONE_FS)`.
    fn on_thread(&self) {}

    /// Whether `op` may wait so long (disk, network, big copy) that it goes to a slow thread. READ and
    /// WRITE are asked with [`Wait`] instead, and SETLKW never waits: the server tries `setlk` again.
    fn waits(&self, op: Opcode) -> bool {
        op.waits()
    }

    /// READ into `out`, from its front. Returns the bytes read, 0 at the end of the file. At most
    /// `IOV_MAX` entries need to be filled: the server asks again for the rest.
    ///
    /// # Errors
    /// `EAGAIN` when it would have to wait and `wait` forbids that; otherwise the reply's errno.
    fn read_into(
        &self,
        ctx: &Context,
        request: &ReadRequest,
        out: &IoVecs,
        wait: Wait,
    ) -> io::Result<usize> {
        if wait.is_on_worker() {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        upstream::read(self, ctx, request, out)
    }

    /// WRITE from `data`, from its front. Returns the bytes written, as [`Self::read_into`] does.
    ///
    /// # Errors
    /// `EAGAIN` when it would have to wait and `wait` forbids that; otherwise the reply's errno.
    fn write_from(
        &self,
        ctx: &Context,
        request: &WriteRequest,
        data: &IoVecs,
        wait: Wait,
    ) -> io::Result<usize> {
        if wait.is_on_worker() {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        upstream::write(self, ctx, request, data)
    }

    /// SETLKW, on a thread that may wait: takes the lock, waiting for it in calls that go through `block`.
    /// A file system that cannot tries once.
    ///
    /// # Errors
    /// `EAGAIN` when the lock is taken still; otherwise the reply's errno.
    fn wait_for_lock(
        &self,
        ctx: &Context,
        request: &LockRequest,
        block: &mut BlockForLock<'_>,
    ) -> io::Result<()> {
        let LockRequest { inode, handle, owner, lock, flags } = *request;
        self.setlk(ctx, inode, handle, owner, lock, flags)
    }

    /// The `fuse_attr` flags (`FUSE_ATTR_SUBMOUNT`, `FUSE_ATTR_DAX`) of a GETATTR or SETATTR reply;
    /// those of a lookup are in [`Entry::attr_flags`], and must be the same.
    fn attr_flags(&self, inode: u64, attr: &stat64) -> u32 {
        0
    }

    /// `FOPEN_*` flags for OPEN, CREATE and TMPFILE replies that upstream's `OpenOptions` lacks, such as
    /// `FOPEN_NOFLUSH` and `FOPEN_PARALLEL_DIRECT_WRITES`; added to those returned with `handle`.
    fn open_flags(&self, inode: u64, handle: Option<u64>, flags: u32) -> u32 {
        0
    }

    /// FORGET and BATCH_FORGET: pairs of inode and count.
    fn forget_each(&self, ctx: &Context, requests: &mut dyn Iterator<Item = (u64, u64)>) {
        for (inode, count) in requests {
            self.forget(ctx, inode, count);
        }
    }

    /// MKNOD with what came along. Arguments as in [`FileSystem::mknod`].
    ///
    /// # Errors
    /// The reply's errno.
    #[allow(clippy::too_many_arguments, reason = "mirrors the upstream method")]
    fn mknod_with(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.mknod(ctx, parent, name, mode, rdev, umask)
    }

    /// MKDIR with what came along. Arguments as in [`FileSystem::mkdir`].
    ///
    /// # Errors
    /// The reply's errno.
    fn mkdir_with(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.mkdir(ctx, parent, name, mode, umask)
    }

    /// SYMLINK with what came along. Arguments as in [`FileSystem::symlink`].
    ///
    /// # Errors
    /// The reply's errno.
    fn symlink_with(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.symlink(ctx, target, parent, name)
    }

    /// CREATE with what came along. Arguments as in [`FileSystem::create`].
    ///
    /// # Errors
    /// The reply's errno.
    fn create_with(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<Created> {
        self.create(ctx, parent, name, args).map(|(entry, handle, open, _)| (entry, handle, open))
    }

    /// TMPFILE: a nameless file in `parent`, open.
    ///
    /// # Errors
    /// The reply's errno.
    fn tmpfile(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        args: CreateIn,
    ) -> io::Result<Created> {
        Err(not_supported())
    }

    /// SETXATTR; with `kill_sgid` the set-group-id bit goes too (FUSE_SETXATTR_ACL_KILL_SGID: an
    /// access ACL was set by a caller outside the file's group).
    ///
    /// # Errors
    /// The reply's errno.
    fn setxattr_with(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> io::Result<()> {
        self.setxattr(ctx, inode, name, value, flags)
    }

    /// STATX: `mask` and `flags` as in `statx(2)`; returns the attributes and how long they hold.
    ///
    /// # Errors
    /// The reply's errno.
    fn statx(
        &self,
        ctx: &Context,
        inode: u64,
        handle: Option<u64>,
        flags: u32,
        mask: u32,
    ) -> io::Result<(libc::statx, Duration)> {
        Err(not_supported())
    }

    /// SYNCFS: the file system that holds `inode`, on stable storage.
    ///
    /// # Errors
    /// The reply's errno.
    fn syncfs(&self, ctx: &Context, inode: u64) -> io::Result<()> {
        Err(not_supported())
    }

    /// COPY_FILE_RANGE and its 64-bit form; returns the bytes copied.
    ///
    /// # Errors
    /// The reply's errno.
    fn copy_file_range(&self, ctx: &Context, range: &CopyRange) -> io::Result<u64> {
        Err(not_supported())
    }

    /// READDIRPLUS: entries after `offset`, each looked up once, until `sink` is full.
    ///
    /// # Errors
    /// The reply's errno. An error after the first entry must be kept for the next call.
    fn readdirplus_into(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        sink: &mut dyn EntrySink,
    ) -> io::Result<()> {
        self.readdirplus(ctx, inode, handle, size, offset, &mut |dirent, entry| {
            let size = super::wire::direntplus_size(dirent.name.len());
            Ok(if sink.add(dirent, &entry) { size } else { 0 })
        })
    }

    /// Whether a session can be saved.
    fn can_save(&self) -> bool {
        false
    }

    /// Writes what the guest knows and has open. No request is being done.
    ///
    /// # Errors
    /// Something cannot be told to another process.
    fn save(&self, to: &mut dyn Write) -> anyhow::Result<()> {
        anyhow::bail!("this file system cannot be moved")
    }

    /// The same for a process on this machine that gets the descriptors added to `fds` too.
    ///
    /// # Errors
    /// As [`Self::save`].
    fn save_for_successor(&self, to: &mut dyn Write, fds: &mut Vec<OwnedFd>) -> anyhow::Result<()> {
        self.save(to)
    }

    /// Becomes what was saved. Returns the flags that INIT agreed on.
    ///
    /// # Errors
    /// The state is damaged, something in it cannot be found here, or it asks for more than the operator
    /// gives to one of this origin.
    fn load(&self, from: &mut dyn Read, origin: Origin) -> anyhow::Result<u64> {
        anyhow::bail!("this file system cannot be moved")
    }

    /// Bytes of the DAX window that the device shall have; 0: none.
    fn dax_window(&self) -> u64 {
        0
    }

    /// The way to the guest's DAX window is there, or gone with all that was mapped.
    fn on_window(&self, window: Option<Arc<dyn DaxWindow + Send + Sync>>) {}

    /// SETUPMAPPING.
    ///
    /// # Errors
    /// The reply's errno.
    fn setup_mapping(&self, ctx: &Context, request: &MapRequest) -> io::Result<()> {
        Err(not_supported())
    }

    /// REMOVEMAPPING: pairs of window offset and length, bytes.
    ///
    /// # Errors
    /// The reply's errno.
    fn remove_mapping(
        &self,
        ctx: &Context,
        inode: u64,
        ranges: &mut dyn Iterator<Item = (u64, u64)>,
    ) -> io::Result<()> {
        Err(not_supported())
    }
}
