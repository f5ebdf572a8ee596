//! The passthrough as the FUSE server's [`FileSystem`] and [`Extension`].

use std::ffi::CStr;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions, SetattrValid, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileLock, FileSystem, FsOptions, GetxattrReply, ListxattrReply,
    ZeroCopyReader, ZeroCopyWriter,
};
use outboard_common::ring::IoVecs;

use super::data::FileIo;
use super::dir::Callback;
use super::namespace::New;
use super::{PassthroughFs, credentials};
use crate::fuse::extension::{
    BlockForLock, CopyRange, CreateContext, Created, DaxWindow, EntrySink, Extension, LockRequest,
    MapRequest, Origin, ReadRequest, Wait, WriteRequest,
};
use crate::fuse::wire::{WRITE_KILL_SUIDGID, init};

impl FileSystem for PassthroughFs {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.start_session(capable.bits()).map(FsOptions::from_bits_truncate)
    }

    fn destroy(&self) {
        self.reset();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let entry = self.do_lookup(parent, name)?;
        self.refresh_mapping(entry.inode)?;
        Ok(entry)
    }

    fn forget(&self, _ctx: &Context, inode: u64, count: u64) {
        self.do_forget(inode, count);
    }

    fn batch_forget(&self, _ctx: &Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.do_forget(inode, count);
        }
    }

    fn getattr(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        self.refresh_mapping(inode)?;
        self.do_getattr(inode, handle)
    }

    fn setattr(
        &self,
        _ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.setting(inode, valid, attr.st_size, || self.do_setattr(inode, &attr, handle, valid))
    }

    fn readlink(&self, _ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.do_readlink(inode)
    }

    fn symlink(
        &self,
        ctx: &Context,
        linkname: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.symlink_with(ctx, &CreateContext::default(), linkname, parent, name)
    }

    fn mknod(
        &self,
        ctx: &Context,
        inode: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.mknod_with(ctx, &CreateContext::default(), inode, name, mode, rdev, umask)
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.mkdir_with(ctx, &CreateContext::default(), parent, name, mode, umask)
    }

    fn unlink(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.do_remove(parent, name, false)
    }

    fn rmdir(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.do_remove(parent, name, true)
    }

    fn rename(
        &self,
        _ctx: &Context,
        olddir: u64,
        oldname: &CStr,
        newdir: u64,
        newname: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.do_rename(olddir, oldname, newdir, newname, flags)
    }

    fn link(
        &self,
        _ctx: &Context,
        inode: u64,
        newparent: u64,
        newname: &CStr,
    ) -> io::Result<Entry> {
        self.do_link(inode, newparent, newname)
    }

    fn open(
        &self,
        _ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let open = || self.do_open(inode, flags, fuse_flags);
        let opened = if flags.cast_signed() & libc::O_TRUNC != 0 {
            self.truncating(inode, 0, open)
        } else {
            self.refresh_mapping(inode).and_then(|()| open())
        };
        opened.map(|(handle, options)| (Some(handle), options, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let made = self.do_create(ctx, &CreateContext::default(), parent, name, args);
        made.map(|(entry, handle, options)| (entry, handle, options, None))
    }

    fn read(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let file = self.file(inode, handle)?;
        let mut source = FileIo(file.fd.as_fd());
        w.write_from(&mut source, usize::try_from(size).unwrap_or(usize::MAX), offset)
    }

    fn write(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        r: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        _flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let file = self.file(inode, handle)?;
        let kill = self.has(init::HANDLE_KILLPRIV_V2) && fuse_flags & WRITE_KILL_SUIDGID != 0;
        credentials::set_fsetid(!kill)?;
        self.drop_moved_capability(file.fd.as_fd())?;
        let mut target = FileIo(file.fd.as_fd());
        r.read_to(&mut target, usize::try_from(size).unwrap_or(usize::MAX), offset)
    }

    fn flush(&self, _ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.refresh_mapping(inode)?;
        self.do_flush(inode, handle, lock_owner)
    }

    fn fsync(&self, _ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.refresh_mapping(inode)?;
        self.do_fsync(inode, handle, datasync)
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.allocating(inode, mode, || self.do_fallocate(inode, handle, mode, offset, length))
    }

    fn release(
        &self,
        _ctx: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        // Closing the file drops its BSD lock.
        self.refresh_mapping(inode)?;
        self.do_release(inode, handle, lock_owner)
    }

    fn statfs(&self, _ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.do_statfs(inode)
    }

    fn setxattr(
        &self,
        _ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.do_setxattr(inode, name, value, flags, false)
    }

    fn getxattr(
        &self,
        _ctx: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.do_getxattr(inode, name, size)
    }

    fn listxattr(&self, _ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.do_listxattr(inode, size)
    }

    fn removexattr(&self, _ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.do_removexattr(inode, name)
    }

    fn opendir(
        &self,
        _ctx: &Context,
        inode: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        self.do_opendir(inode).map(|handle| (Some(handle), self.open_options(true)))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.do_readdir(inode, handle, offset, &mut |entry| add_entry(entry).map(|size| size > 0))
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.do_readdirplus(inode, handle, offset, &mut Callback(add_entry))
    }

    fn fsyncdir(&self, _ctx: &Context, inode: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.do_fsyncdir(inode, handle, datasync)
    }

    fn releasedir(&self, _ctx: &Context, _inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.do_releasedir(handle)
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.do_access(ctx, inode, mask)
    }

    fn lseek(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.do_lseek(inode, handle, offset, whence)
    }

    fn getlk(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        _flags: u32,
    ) -> io::Result<FileLock> {
        self.do_getlk(inode, handle, owner, &lock)
    }

    fn setlk(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        owner: u64,
        lock: FileLock,
        flags: u32,
    ) -> io::Result<()> {
        self.do_setlk(inode, handle, owner, &lock, flags)
    }
}

impl Extension for PassthroughFs {
    fn negotiate(&self, capable: u64) -> io::Result<u64> {
        self.start_session(capable)
    }

    fn can_save(&self) -> bool {
        self.can_migrate()
    }

    fn save(&self, to: &mut dyn Write) -> anyhow::Result<()> {
        self.save_bytes(to)
    }

    fn save_for_successor(&self, to: &mut dyn Write, fds: &mut Vec<OwnedFd>) -> anyhow::Result<()> {
        self.save_with_fds(to, fds)
    }

    fn load(&self, from: &mut dyn Read, origin: Origin) -> anyhow::Result<u64> {
        self.load_from(from, origin)
    }

    fn on_thread(&self) {
        if let Err(error) = self.prepare_thread() {
            // Each operation that needs it tries again and reports the error to the guest.
            tracing::warn!(
                "cannot prepare a thread for extended attributes and new files: {error}"
            );
        }
    }

    fn read_into(
        &self,
        _ctx: &Context,
        request: &ReadRequest,
        out: &IoVecs,
        wait: Wait,
    ) -> io::Result<usize> {
        self.refresh_mapping(request.inode)?;
        self.do_read(request, out, wait)
    }

    fn write_from(
        &self,
        _ctx: &Context,
        request: &WriteRequest,
        data: &IoVecs,
        wait: Wait,
    ) -> io::Result<usize> {
        // Of a request that goes back into its ring, an append must not have been done.
        let repeatable = request.flags & libc::O_APPEND.cast_unsigned() == 0;
        self.growing(request.inode, repeatable, || self.do_write(request, data, wait))
    }

    fn wait_for_lock(
        &self,
        _ctx: &Context,
        request: &LockRequest,
        block: &mut BlockForLock<'_>,
    ) -> io::Result<()> {
        self.do_wait_for_lock(request, block)
    }

    fn attr_flags(&self, inode: u64, attr: &stat64) -> u32 {
        let file_type = attr.st_mode & libc::S_IFMT;
        self.flags_of(inode, file_type)
            | self.dax_flag(inode, file_type, u64::try_from(attr.st_size).unwrap_or(0))
    }

    fn forget_each(&self, _ctx: &Context, requests: &mut dyn Iterator<Item = (u64, u64)>) {
        for (inode, count) in requests {
            self.do_forget(inode, count);
        }
    }

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
        self.do_make(ctx, extra, parent, name, New::Node(mode, rdev), umask)
    }

    fn mkdir_with(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.do_make(ctx, extra, parent, name, New::Directory(mode), umask)
    }

    fn symlink_with(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.do_make(ctx, extra, parent, name, New::Symlink(target), 0)
    }

    fn create_with(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<Created> {
        self.do_create(ctx, extra, parent, name, args)
    }

    fn tmpfile(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        args: CreateIn,
    ) -> io::Result<Created> {
        self.do_tmpfile(ctx, extra, parent, args)
    }

    fn setxattr_with(
        &self,
        _ctx: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> io::Result<()> {
        self.do_setxattr(inode, name, value, flags, kill_sgid)
    }

    fn statx(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: Option<u64>,
        flags: u32,
        mask: u32,
    ) -> io::Result<(libc::statx, Duration)> {
        self.refresh_mapping(inode)?;
        self.do_statx(inode, handle, flags, mask)
    }

    fn syncfs(&self, _ctx: &Context, inode: u64) -> io::Result<()> {
        self.write_mappings_back()?;
        self.do_syncfs(inode)
    }

    fn copy_file_range(&self, _ctx: &Context, range: &CopyRange) -> io::Result<u64> {
        self.refresh_mapping(range.inode_in)?;
        // Within one file the copied bytes may be among those that were copied over.
        let repeatable = range.inode_in != range.inode_out;
        self.growing(range.inode_out, repeatable, || self.do_copy_file_range(range))
    }

    fn dax_window(&self) -> u64 {
        self.window_size()
    }

    fn on_window(&self, window: Option<Arc<dyn DaxWindow + Send + Sync>>) {
        self.set_window(window);
    }

    fn setup_mapping(&self, _ctx: &Context, request: &MapRequest) -> io::Result<()> {
        self.do_setup_mapping(request)
    }

    fn remove_mapping(
        &self,
        _ctx: &Context,
        _inode: u64,
        ranges: &mut dyn Iterator<Item = (u64, u64)>,
    ) -> io::Result<()> {
        self.do_remove_mapping(ranges)
    }

    fn readdirplus_into(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        sink: &mut dyn EntrySink,
    ) -> io::Result<()> {
        self.do_readdirplus(inode, handle, offset, sink)
    }
}
