//! Open files: OPEN, CREATE, TMPFILE, READ, WRITE, FLUSH, FSYNC, RELEASE, LSEEK, FALLOCATE,
//! COPY_FILE_RANGE.
#![allow(unsafe_code, reason = "reads and writes guest memory behind a chain's iovecs")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions};
use fuse_backend_rs::api::filesystem::Context;
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use libc::iovec;
use outboard_common::ring::IoVecs;
use rustix::fs::{Mode, OFlags};

use super::credentials::{self, Masked};
use super::mounts::Speed;
use super::{CachePolicy, CreateContext, PassthroughFs, component, errno, key_of, sys};
use crate::fuse::extension::{CopyRange, Created, ReadRequest, Wait, WriteRequest};
use crate::fuse::wire::init;
use crate::inode_store::{Handle, NewNode, NodeFd, NodeInfo};

/// `fuse_open_in.open_flags`: truncation clears set-user-id and set-group-id (FUSE_OPEN_KILL_SUIDGID).
const OPEN_KILL_SUIDGID: u32 = 1 << 0;

/// A buffered write up to this size on a local disk is done at once: handing it over costs more.
const INLINE_WRITE_BYTES: usize = 64 << 10;

/// The open flags that a guest may choose. All others are ours, or mean nothing for an open inode.
const GUEST_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_TRUNC
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_LARGEFILE
    | libc::O_NOATIME
    | libc::O_DIRECTORY;

/// An open regular file.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) fd: OwnedFd,
    /// The node it was opened for.
    pub(super) inode: u64,
    /// Opened for writing.
    pub(super) writes: bool,
    /// Opened with flags that make writes wait for the disk.
    synchronous: bool,
    /// Opened with O_DIRECT: reads wait for the disk too, `RWF_NOWAIT` or not.
    direct: bool,
    speed: Speed,
    /// The guest has a BSD lock on it.
    flocked: AtomicBool,
}

impl OpenFile {
    pub(super) fn is_flocked(&self) -> bool {
        self.flocked.load(Ordering::Relaxed)
    }

    pub(super) fn set_flocked(&self, flocked: bool) {
        self.flocked.store(flocked, Ordering::Relaxed);
    }
}

impl PassthroughFs {
    /// The open file that `handle` names, which must be one of `id`.
    #[inline]
    pub(super) fn file(&self, id: u64, handle: u64) -> io::Result<Arc<OpenFile>> {
        let file = self.files.get(handle).ok_or(errno(libc::EBADF))?;
        if file.inode == id { Ok(file) } else { Err(errno(libc::EBADF)) }
    }

    /// The host's open flags for the guest's.
    pub(super) fn host_flags(&self, flags: u32) -> io::Result<i32> {
        let mut flags = flags.cast_signed() & GUEST_FLAGS;
        let access = flags & libc::O_ACCMODE;
        if self.config.readonly && (access != libc::O_RDONLY || flags & libc::O_TRUNC != 0) {
            return Err(errno(libc::EROFS));
        }
        if !self.config.allow_direct_io {
            flags &= !libc::O_DIRECT;
        }
        if !self.config.preserve_noatime {
            flags &= !libc::O_NOATIME;
        }
        if self.has(init::WRITEBACK_CACHE) {
            // The guest fills up partly written pages, and computes where an append goes.
            if access == libc::O_WRONLY {
                flags = (flags & !libc::O_ACCMODE) | libc::O_RDWR;
            }
            flags &= !libc::O_APPEND;
        }
        Ok(flags)
    }

    /// How the guest shall cache an open file or directory.
    pub(super) fn open_options(&self, directory: bool) -> OpenOptions {
        match (self.config.cache, directory) {
            (CachePolicy::Never | CachePolicy::Metadata, false) => OpenOptions::DIRECT_IO,
            (CachePolicy::Metadata | CachePolicy::Always, true) => {
                OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE
            }
            (CachePolicy::Always, false) => OpenOptions::KEEP_CACHE,
            (CachePolicy::Never, true) | (CachePolicy::Auto, _) => OpenOptions::empty(),
        }
    }

    fn keep_open(&self, id: u64, fd: OwnedFd, flags: i32, mount: u32) -> io::Result<u64> {
        let fd = self.for_guest(fd)?;
        self.files.insert(self.open_file(id, fd, flags, mount)).ok_or(errno(libc::ENFILE))
    }

    fn open_file(&self, id: u64, fd: OwnedFd, flags: i32, mount: u32) -> OpenFile {
        OpenFile {
            fd,
            inode: id,
            writes: flags & libc::O_ACCMODE != libc::O_RDONLY,
            direct: flags & libc::O_DIRECT != 0,
            synchronous: flags & (libc::O_DIRECT | libc::O_SYNC | libc::O_DSYNC) != 0,
            speed: self.mounts.get(mount).map_or(Speed::Remote, |mount| mount.speed),
            flocked: AtomicBool::new(false),
        }
    }

    /// A file that another process had open for us, or that was opened again with its flags.
    pub(super) fn open_file_of(&self, id: u64, fd: OwnedFd, flags: i32) -> OpenFile {
        // An inode that came as a descriptor is of a mount that is not ours: the root's is the same.
        let mount = self.inodes.mount(id).filter(|id| self.mounts.get(*id).is_some());
        let mount = mount.unwrap_or(self.inodes.root_info().key.mount);
        self.open_file(id, fd, flags, mount)
    }

    /// OPEN.
    pub(super) fn do_open(
        &self,
        id: u64,
        flags: u32,
        open_flags: u32,
    ) -> io::Result<(u64, OpenOptions)> {
        let host = self.host_flags(flags)?;
        let kill = self.has(init::HANDLE_KILLPRIV_V2)
            && open_flags & OPEN_KILL_SUIDGID != 0
            && host & libc::O_TRUNC != 0;
        credentials::set_fsetid(!kill)?;
        let mount = self.inodes.mount(id).ok_or(errno(libc::ESTALE))?;
        let wanted_more = host & libc::O_ACCMODE == libc::O_RDWR
            && flags.cast_signed() & libc::O_ACCMODE == libc::O_WRONLY;
        let fd = match self.open_node(id, host) {
            // Writing alone was asked for; without reading, the guest's cache copes.
            Err(error) if wanted_more && error.raw_os_error() == Some(libc::EACCES) => {
                self.open_node(id, (host & !libc::O_ACCMODE) | libc::O_WRONLY)
            }
            other => other,
        }?;
        Ok((self.keep_open(id, fd, host, mount)?, self.open_options(false)))
    }

    /// CREATE: makes a file, or opens the one that is there.
    pub(super) fn do_create(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<Created> {
        self.writable()?;
        component(name)?;
        let host = self.host_flags(args.flags)?;
        let dir = self.node_fd(parent)?;
        let flags = host | libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW;
        let made = self.make_open(ctx, extra, dir.as_fd(), name, flags, &args);
        match made {
            Ok(fd) => {
                let labelled = self.label(fd.as_fd(), extra);
                labelled.and_then(|()| self.created(parent, fd, host)).inspect_err(|_| {
                    // What could not be labelled, or kept open, must not stay.
                    let _ = rustix::fs::unlinkat(&dir, name, rustix::fs::AtFlags::empty());
                })
            }
            Err(error)
                if error.raw_os_error() == Some(libc::EEXIST)
                    && args.flags.cast_signed() & libc::O_EXCL == 0 =>
            {
                self.open_existing(ctx, extra, parent, name, host)
            }
            Err(error) => Err(error),
        }
    }

    /// TMPFILE: a file without a name.
    pub(super) fn do_tmpfile(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        args: CreateIn,
    ) -> io::Result<Created> {
        self.writable()?;
        let host = self.host_flags(args.flags)? & !libc::O_TRUNC;
        let dir = self.node_fd(parent)?;
        let exclusive = args.flags.cast_signed() & libc::O_EXCL;
        let flags = (host & !libc::O_DIRECTORY) | libc::O_TMPFILE | exclusive;
        let fd = self.make_open(ctx, extra, dir.as_fd(), c".", flags, &args)?;
        self.label(fd.as_fd(), extra)?;
        self.created(parent, fd, host)
    }

    /// Makes a file as the caller and opens it.
    fn make_open(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        dir: BorrowedFd<'_>,
        name: &CStr,
        flags: i32,
        args: &CreateIn,
    ) -> io::Result<OwnedFd> {
        let _masked = self.masked(args.umask)?;
        let _acting = self.act_as(ctx, extra)?;
        let flags = OFlags::from_bits_retain(flags.cast_unsigned()) | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(args.mode & 0o7777);
        self.with_spare_fds(|| Ok(rustix::fs::openat(dir, name, flags, mode)?))
    }

    /// The umask to make files with: the guest has applied its own, unless ACLs may override it.
    pub(super) fn masked(&self, umask: u32) -> io::Result<Masked> {
        self.prepare_thread()?;
        Ok(Masked::new(if self.has(init::DONT_MASK) { umask } else { 0 }))
    }

    /// The reply for a file just made and open as `fd`.
    fn created(&self, parent: u64, fd: OwnedFd, flags: i32) -> io::Result<Created> {
        let mut stat = sys::statx(fd.as_fd(), c"", 0, sys::STATX_MASK)?;
        let id = self.adopt_open(parent, fd.as_fd(), &mut stat)?;
        let handle = self.keep_open(id, fd, flags, key_of(&stat).mount).inspect_err(|_| {
            self.do_forget(id, 1);
        })?;
        Ok((self.entry_of(id, &stat), Some(handle), self.open_options(false)))
    }

    /// Makes a node for what is open as `fd`.
    fn adopt_open(
        &self,
        parent: u64,
        fd: BorrowedFd<'_>,
        stat: &mut libc::statx,
    ) -> io::Result<u64> {
        let key = key_of(stat);
        let handle = self.mounts.acquire(fd, c"", key)?;
        if handle == Handle::None {
            self.mounts.release(key.mount);
            let path = self.reopen_fd(fd, libc::O_PATH)?;
            return self.adopt(parent, path.as_fd(), c"", stat);
        }
        let birth_ns = super::lookup::identity_birth(stat, &handle);
        let info = NodeInfo {
            key,
            birth_ns,
            file_type: super::lookup::type_of(stat),
            submount: false,
            // The handle was made from the open file itself.
            verified: true,
            handle,
        };
        match self.inodes.insert(NewNode { info, fd: None::<NodeFd> }) {
            Some((id, true)) => Ok(id),
            other => {
                self.mounts.release(key.mount);
                other.map(|(id, _)| id).ok_or(errno(libc::ENOMEM))
            }
        }
    }

    /// CREATE of a name that exists: opens it as the caller, whose permissions nobody has checked.
    fn open_existing(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        name: &CStr,
        flags: i32,
    ) -> io::Result<Created> {
        let entry = self.do_lookup(parent, name)?;
        let open = || {
            if entry.attr.st_mode & libc::S_IFMT != libc::S_IFREG {
                let directory = entry.attr.st_mode & libc::S_IFMT == libc::S_IFDIR;
                return Err(errno(if directory { libc::EISDIR } else { libc::ENXIO }));
            }
            let path = self.node_fd(entry.inode)?;
            let mount = self.inodes.mount(entry.inode).ok_or(errno(libc::ESTALE))?;
            let acting = self.act_as(ctx, extra)?;
            let fd = self.reopen_fd(path.as_fd(), flags & !libc::O_DIRECTORY)?;
            drop(acting);
            self.keep_open(entry.inode, fd, flags, mount)
        };
        match open() {
            Ok(handle) => Ok((entry, Some(handle), self.open_options(false))),
            Err(error) => {
                self.do_forget(entry.inode, 1);
                Err(error)
            }
        }
    }

    /// READ into a chain.
    #[inline]
    pub(super) fn do_read(
        &self,
        request: &ReadRequest,
        out: &IoVecs,
        wait: Wait,
    ) -> io::Result<usize> {
        let file = self.file(request.inode, request.handle)?;
        let flags = match (wait, file.speed) {
            (Wait::Allowed | Wait::ForLock, _) | (_, Speed::Memory) => 0,
            (Wait::Briefly, Speed::Local) => 0,
            (Wait::Never, Speed::Local) if !file.direct => libc::RWF_NOWAIT,
            (Wait::Never | Wait::Briefly, _) => return Err(errno(libc::EAGAIN)),
        };
        // SAFETY: the entries lie in the chain's memory, which is mapped while the chain is held, and
        // which is never accessed through references.
        let result =
            unsafe { sys::preadv2(file.fd.as_fd(), out.as_slice(), request.offset, flags) };
        match result {
            Err(error) if flags != 0 && error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                Err(errno(libc::EAGAIN))
            }
            other => other,
        }
    }

    /// WRITE from a chain.
    #[inline]
    pub(super) fn do_write(
        &self,
        request: &WriteRequest,
        data: &IoVecs,
        wait: Wait,
    ) -> io::Result<usize> {
        let file = self.file(request.inode, request.handle)?;
        if wait.is_on_worker() {
            let at_once = match file.speed {
                Speed::Memory => true,
                Speed::Local if wait == Wait::Briefly => true,
                Speed::Local => !file.synchronous && data.len() <= INLINE_WRITE_BYTES,
                Speed::Remote => false,
            };
            if !at_once {
                return Err(errno(libc::EAGAIN));
            }
        }
        credentials::set_fsetid(!(self.has(init::HANDLE_KILLPRIV_V2) && request.kill_suidgid))?;
        self.drop_moved_capability(file.fd.as_fd())?;
        // SAFETY: as in `do_read`; the entries are only read.
        unsafe { sys::pwritev2(file.fd.as_fd(), data.as_slice(), request.offset, 0) }
    }

    /// FLUSH: one of the guest's file descriptors was closed.
    pub(super) fn do_flush(&self, id: u64, handle: u64, owner: u64) -> io::Result<()> {
        let file = self.file(id, handle)?;
        self.locks.release_owner(id, owner);
        if file.speed == Speed::Remote {
            // Closing a descriptor is when such file systems tell about failed writes.
            let copy = rustix::io::fcntl_dupfd_cloexec(&file.fd, 0)?;
            drop(copy);
        }
        Ok(())
    }

    /// RELEASE: the last of the guest's file descriptors for an open file is gone.
    pub(super) fn do_release(&self, id: u64, handle: u64, owner: Option<u64>) -> io::Result<()> {
        if let Some(owner) = owner {
            self.locks.release_owner(id, owner);
        }
        self.files.remove(handle).map(drop).ok_or(errno(libc::EBADF))
    }

    /// FSYNC.
    pub(super) fn do_fsync(&self, id: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let file = self.file(id, handle)?;
        if data_only {
            rustix::fs::fdatasync(&file.fd)?;
        } else {
            rustix::fs::fsync(&file.fd)?;
        }
        Ok(())
    }

    /// SYNCFS.
    pub(super) fn do_syncfs(&self, id: u64) -> io::Result<()> {
        let fd = self.open_node(id, libc::O_RDONLY)?;
        rustix::fs::syncfs(&fd)?;
        Ok(())
    }

    /// LSEEK, which the guest's kernel sends for SEEK_DATA and SEEK_HOLE.
    pub(super) fn do_lseek(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let file = self.file(id, handle)?;
        let offset = i64::try_from(offset).map_err(|_unfit| errno(libc::EINVAL))?;
        sys::lseek(file.fd.as_fd(), offset, whence.cast_signed())
    }

    /// FALLOCATE.
    pub(super) fn do_fallocate(
        &self,
        id: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        self.writable()?;
        let file = self.file(id, handle)?;
        let offset = i64::try_from(offset).map_err(|_unfit| errno(libc::EINVAL))?;
        let len = i64::try_from(len).map_err(|_unfit| errno(libc::EINVAL))?;
        credentials::set_fsetid(!self.has(init::HANDLE_KILLPRIV_V2))?;
        self.drop_moved_capability(file.fd.as_fd())?;
        sys::fallocate(file.fd.as_fd(), mode.cast_signed(), offset, len)
    }

    /// COPY_FILE_RANGE.
    pub(super) fn do_copy_file_range(&self, range: &CopyRange) -> io::Result<u64> {
        self.writable()?;
        let from = self.file(range.inode_in, range.handle_in)?;
        let to = self.file(range.inode_out, range.handle_out)?;
        let from_offset = i64::try_from(range.offset_in).map_err(|_unfit| errno(libc::EINVAL))?;
        let to_offset = i64::try_from(range.offset_out).map_err(|_unfit| errno(libc::EINVAL))?;
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        let flags = u32::try_from(range.flags).map_err(|_unfit| errno(libc::EINVAL))?;
        credentials::set_fsetid(!self.has(init::HANDLE_KILLPRIV_V2))?;
        self.drop_moved_capability(to.fd.as_fd())?;
        sys::copy_file_range(from.fd.as_fd(), from_offset, to.fd.as_fd(), to_offset, len, flags)
    }
}

/// Lets upstream's zero-copy readers and writers work on an open file.
pub(super) struct FileIo<'a>(pub(super) BorrowedFd<'a>);

/// The most slices passed to the kernel in one call from upstream's traits.
const MAX_SLICES: usize = 64;

impl FileIo<'_> {
    /// `slices` as the kernel wants them; how many there are.
    fn gather(slices: &[FileVolatileSlice<'_>], out: &mut [iovec; MAX_SLICES]) -> usize {
        for (slice, entry) in slices.iter().zip(out.iter_mut()) {
            *entry = iovec { iov_base: slice.as_ptr().cast(), iov_len: slice.len() };
        }
        slices.len().min(MAX_SLICES)
    }

    fn read_slices(&self, slices: &[FileVolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        let mut entries = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_SLICES];
        let n = Self::gather(slices, &mut entries);
        // SAFETY: whoever made the slices vouches that they are writable and not referenced.
        unsafe { sys::preadv2(self.0, entries.get(..n).unwrap_or(&[]), offset, 0) }
    }

    fn write_slices(&self, slices: &[FileVolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        let mut entries = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; MAX_SLICES];
        let n = Self::gather(slices, &mut entries);
        // SAFETY: whoever made the slices vouches that they are readable.
        unsafe { sys::pwritev2(self.0, entries.get(..n).unwrap_or(&[]), offset, 0) }
    }
}

impl FileReadWriteVolatile for FileIo<'_> {
    fn read_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(errno(libc::ESPIPE)) // there is no current position
    }

    fn write_volatile(&mut self, _slice: FileVolatileSlice<'_>) -> io::Result<usize> {
        Err(errno(libc::ESPIPE)) // there is no current position
    }

    fn read_at_volatile(&mut self, slice: FileVolatileSlice<'_>, offset: u64) -> io::Result<usize> {
        self.read_slices(&[slice], offset)
    }

    fn read_vectored_at_volatile(
        &mut self,
        bufs: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        self.read_slices(bufs, offset)
    }

    fn write_at_volatile(
        &mut self,
        slice: FileVolatileSlice<'_>,
        offset: u64,
    ) -> io::Result<usize> {
        self.write_slices(&[slice], offset)
    }

    fn write_vectored_at_volatile(
        &mut self,
        bufs: &[FileVolatileSlice<'_>],
        offset: u64,
    ) -> io::Result<usize> {
        self.write_slices(bufs, offset)
    }
}
