//! From a chain to a call of the file system and back: the server itself.
//!
//! # Theory of operation
//! [`Server::handle`] does one request: it copies the header and the body (for WRITE without the data)
//! out of guest memory once, parses the copy, calls the file system and writes the reply. It keeps
//! nothing between requests but what INIT agreed on, so that any thread may call it, for different
//! chains at the same time.
//!
//! A request that would have to wait is not done with [`Wait::Never`] (or, if that takes long,
//! [`Wait::Briefly`]): the outcome is then [`Outcome::Slow`], the chain is as it was popped, and the caller has the request done again on
//! another thread with [`Wait::Allowed`]. A SETLKW whose lock is taken comes back as
//! [`Outcome::Locked`]: the caller keeps the chain and asks again later, or on a thread that may wait for
//! the lock ([`Wait::ForLock`]); INTERRUPT ends the wait with `EINTR`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileLock, GetxattrReply, IoctlData, ListxattrReply, SetattrValid,
};
use outboard_common::ring::{Chain, IoVecs};

use super::Opcode;
use super::extension::{
    Created, DaxWindow, Extension, LockRequest, ReadRequest, Wait, WriteRequest,
};
use super::lock_waits::LockWaits;
use super::reply::{HEADER_SIZE, Listing, Reply, errno};
use super::request::{self, Dialect, Request};
use super::wire::{self, EntryOut, InHeader, InitOut, OpenOut, init};
use crate::dax;

/// What INIT settles besides flags.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The largest WRITE, and (in pages of 4 KiB) the largest request, bytes. The guest may go lower: its
    /// ring's size, less four, is a limit in pages.
    pub max_write: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_write: 4 << 20 }
    }
}

/// Bodies larger than this (without WRITE's data) are malformed: the largest is SETXATTR's, 64 KiB of
/// value, and BATCH_FORGET's.
const MAX_BODY: usize = 1 << 20;

/// Bytes of entries in one reply at the most. They are collected in memory of ours, which stays with the
/// thread, and a guest can make both its directories and its buffers as large as it likes.
const MAX_LISTING: usize = 1 << 20;

/// The host kernel takes this many iovecs in one call.
const IOV_MAX: usize = 1024;

/// In [`Server::session`]: INIT was done. The protocol leaves this bit alone.
const STARTED: u64 = 1 << 63;

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done; this many bytes of reply were written.
    Done(u32),
    /// Nothing sensible could be made of it; no reply.
    Rejected,
    /// It would have to wait: do it again with [`Wait::Allowed`].
    Slow,
    /// The rings are being stopped, and what it needs of the VMM must wait until they run again.
    Postponed,
    /// It waits for a lock: try again.
    Locked {
        /// The request's number, for [`Server::lock_waits`].
        unique: u64,
    },
}

/// A thread's working space, reused from request to request.
#[derive(Debug, Default)]
pub struct Scratch {
    input: Vec<u8>,
    output: Vec<u8>,
    head: IoVecs,
    /// Storage is slow at present: with [`Wait::Never`], what [may wait](Opcode::may_wait) for it is
    /// [`Outcome::Slow`] too.
    pub storage_is_slow: bool,
    /// Bytes read from files since the owner last looked.
    pub bytes_read: u64,
    /// Bytes written to files since the owner last looked.
    pub bytes_written: u64,
}

/// A FUSE server in front of the file system `F`.
pub struct Server<F> {
    fs: F,
    limits: Limits,
    /// What INIT agreed on, and [`STARTED`].
    session: AtomicU64,
    locks: LockWaits,
}

impl<F> std::fmt::Debug for Server<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("session", &self.session).finish_non_exhaustive()
    }
}

/// One request on its way, apart from its parsed body.
struct Call<'c> {
    header: InHeader,
    ctx: Context,
    wait: Wait,
    readable: &'c mut IoVecs,
    writable: &'c mut IoVecs,
    output: &'c mut Vec<u8>,
    head: &'c mut IoVecs,
    bytes_read: &'c mut u64,
    bytes_written: &'c mut u64,
}

impl Call<'_> {
    #[inline]
    fn reply(&mut self) -> Reply<'_> {
        Reply::new(self.writable, self.header.unique)
    }
}

/// The room that a reply to `opcode` needs at least, without the header. Asked for before the call:
/// a file system must not hand out an inode or a handle that never reaches the guest.
const fn reply_size(opcode: Opcode) -> usize {
    match opcode {
        Opcode::Lookup | Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Link => {
            size_of::<EntryOut>()
        }
        Opcode::Create | Opcode::Tmpfile => size_of::<EntryOut>() + size_of::<OpenOut>(),
        Opcode::Open | Opcode::Opendir => size_of::<OpenOut>(),
        Opcode::Getattr | Opcode::Setattr => size_of::<wire::AttrOut>(),
        Opcode::Statx => size_of::<wire::StatxOut>(),
        _ => 0,
    }
}

impl<F: Extension> Server<F> {
    /// A server of `fs`.
    pub fn new(fs: F, limits: Limits) -> Self {
        Self { fs, limits, session: AtomicU64::new(0), locks: LockWaits::default() }
    }

    /// The file system.
    pub fn file_system(&self) -> &F {
        &self.fs
    }

    /// The flags that INIT agreed on; `None` when no session runs.
    pub fn negotiated(&self) -> Option<u64> {
        let session = self.session.load(Ordering::Acquire);
        (session & STARTED != 0).then_some(session & !STARTED)
    }

    /// Goes on with a session that another process negotiated (`None`: there was none).
    pub fn resume(&self, flags: Option<u64>) {
        self.session.store(flags.map_or(0, |f| f | STARTED), Ordering::Release);
    }

    /// Gives or takes the DAX window.
    pub fn set_window(&self, window: Option<Arc<dyn DaxWindow + Send + Sync>>) {
        self.fs.on_window(window);
    }

    /// Ends the session, if there is one: the file system forgets the guest.
    pub fn reset(&self) {
        if self.session.swap(0, Ordering::AcqRel) != 0 {
            self.fs.destroy();
        }
        self.locks.interrupt_all();
    }

    /// The SETLKW requests that wait.
    pub fn lock_waits(&self) -> &LockWaits {
        &self.locks
    }

    /// Does the request in `chain`. After all outcomes but `Done` and `Rejected` the chain is as it
    /// was popped.
    pub fn handle(&self, chain: &mut Chain, scratch: &mut Scratch, wait: Wait) -> Outcome {
        let mut outcome = self.attempt(chain, scratch, wait);
        if dax::take_interrupted() {
            outcome = Outcome::Postponed;
        }
        if matches!(outcome, Outcome::Slow | Outcome::Locked { .. } | Outcome::Postponed) {
            chain.readable.rewind();
            chain.writable.rewind();
        }
        outcome
    }

    #[inline]
    fn attempt(&self, chain: &mut Chain, scratch: &mut Scratch, wait: Wait) -> Outcome {
        let Some(header) = chain.readable.read_obj::<InHeader>() else {
            return Outcome::Rejected;
        };
        let refuse = |writable: &mut IoVecs, errno| {
            Outcome::Done(Reply::new(writable, header.unique).error(errno))
        };
        let Some(opcode) = Opcode::from_number(header.opcode) else {
            tracing::debug!(opcode = header.opcode, "an operation that this server does not know");
            return refuse(&mut chain.writable, libc::ENOSYS);
        };
        let session = self.session.load(Ordering::Acquire);
        let body = usize::try_from(header.len).unwrap_or(0).checked_sub(size_of::<InHeader>());
        let body = body.filter(|&n| n <= chain.readable.len());
        let started = session & STARTED != 0 || opcode == Opcode::Init;
        let (Some(body), true) = (body, started) else {
            return refuse(&mut chain.writable, libc::EIO);
        };
        let waits = self.fs.waits(opcode) || (scratch.storage_is_slow && opcode.may_wait());
        if waits && wait.is_on_worker() {
            return Outcome::Slow;
        }
        chain.readable.truncate(body);
        let copied = if opcode == Opcode::Write { size_of::<wire::WriteIn>() } else { body };
        let needed = reply_size(opcode);
        let room = needed == 0 || chain.writable.len() >= HEADER_SIZE.saturating_add(needed);
        if copied > MAX_BODY || !room {
            return refuse(&mut chain.writable, libc::EIO);
        }
        if scratch.input.len() < copied {
            scratch.input.resize(copied, 0);
        }
        let input = scratch.input.get_mut(..copied).unwrap_or(&mut []);
        let copied = chain.readable.read(input);
        let input = scratch.input.get(..copied).unwrap_or(&[]);
        let dialect = Dialect { setxattr_ext: session & init::SETXATTR_EXT != 0 };
        let request = match request::parse(opcode, &header, input, dialect) {
            Ok(request) => request,
            Err(e) => return refuse(&mut chain.writable, e.errno()),
        };
        let call = Call {
            header,
            ctx: Context { uid: header.uid, gid: header.gid, pid: header.pid.cast_signed() },
            wait,
            readable: &mut chain.readable,
            writable: &mut chain.writable,
            output: &mut scratch.output,
            head: &mut scratch.head,
            bytes_read: &mut scratch.bytes_read,
            bytes_written: &mut scratch.bytes_written,
        };
        self.dispatch(&request, call)
    }

    #[inline]
    fn dispatch(&self, request: &Request<'_>, mut call: Call<'_>) -> Outcome {
        let (fs, ctx, inode) = (&self.fs, call.ctx, call.header.nodeid);
        Outcome::Done(match *request {
            Request::Lookup { name } => entry(&mut call, fs.lookup(&ctx, inode, name)),
            Request::Getattr { handle } => {
                let found = fs.getattr(&ctx, inode, handle);
                call.reply().map(found, |(st, valid)| {
                    wire::AttrOut::new(&st, fs.attr_flags(inode, &st), valid)
                })
            }
            Request::Read(args) => return self.read(&args, call),
            Request::Write(args) => return self.write(&args, call),
            Request::Forget { nlookup } => {
                fs.forget(&ctx, inode, nlookup);
                0
            }
            Request::BatchForget(list) => {
                fs.forget_each(&ctx, &mut list.map(|one| (one.nodeid, one.nlookup)));
                0
            }
            Request::Setattr(args) => {
                let handle = (args.valid & wire::FATTR_FH != 0).then_some(args.fh);
                let valid = SetattrValid::from_bits_truncate(args.valid);
                let set = fs.setattr(&ctx, inode, args.to_stat(), handle, valid);
                call.reply().map(set, |(st, valid)| {
                    wire::AttrOut::new(&st, fs.attr_flags(inode, &st), valid)
                })
            }
            Request::Open(_)
            | Request::Release(_)
            | Request::Flush(_)
            | Request::Fsync { .. }
            | Request::Fallocate(_)
            | Request::Lseek(_)
            | Request::CopyFileRange { .. } => self.file(request, call),
            Request::Opendir(_)
            | Request::Readdir(_)
            | Request::Readdirplus(_)
            | Request::Releasedir(_)
            | Request::Fsyncdir { .. } => self.directory(request, call),
            Request::Getlk(_) | Request::Setlk(_) | Request::Setlkw(_) => {
                return self.lock(request, call);
            }
            Request::Setxattr { .. }
            | Request::Getxattr { .. }
            | Request::Listxattr { .. }
            | Request::Removexattr { .. } => self.xattr(request, call),
            Request::Init { args, flags2 } => self.init(&args, flags2, call),
            // Only waiting locks can be interrupted; anything else is soon done.
            Request::Interrupt { unique } => {
                self.locks.interrupt(unique);
                0
            }
            Request::Symlink { .. }
            | Request::Mknod { .. }
            | Request::Mkdir { .. }
            | Request::Unlink { .. }
            | Request::Rmdir { .. }
            | Request::Rename { .. }
            | Request::Link { .. }
            | Request::Create { .. }
            | Request::Tmpfile { .. } => self.namespace(request, call),
            _ => self.rare(request, call),
        })
    }

    fn read(&self, args: &wire::ReadIn, call: Call<'_>) -> Outcome {
        let mut at = ReadRequest {
            inode: call.header.nodeid,
            handle: args.fh,
            offset: args.offset,
            lock_owner: (args.read_flags & wire::READ_LOCKOWNER != 0).then_some(args.lock_owner),
            flags: args.flags,
        };
        let size = usize::try_from(args.size).unwrap_or(usize::MAX);
        let (ctx, wait) = (call.ctx, call.wait);
        let reply = Reply::new(call.writable, call.header.unique);
        let mut done = 0;
        let result = reply.fill(size, call.head, |out| {
            transfer(out, wait, &mut at.offset.clone(), |out, offset| {
                at.offset = offset;
                self.fs.read_into(&ctx, &at, out, wait)
            })
            .inspect(|&n| done = n)
        });
        *call.bytes_read = call.bytes_read.saturating_add(done as u64);
        match result {
            Ok(len) => Outcome::Done(len),
            Err(_) if wait.is_on_worker() => Outcome::Slow,
            // With waiting allowed this is the answer of a file opened with O_NONBLOCK.
            Err(e) => Outcome::Done(Reply::new(call.head, call.header.unique).error(errno(&e))),
        }
    }

    fn write(&self, args: &wire::WriteIn, mut call: Call<'_>) -> Outcome {
        let size = usize::try_from(args.size).unwrap_or(usize::MAX);
        if size > call.readable.len() {
            return Outcome::Done(call.reply().error(libc::EIO));
        }
        call.readable.truncate(size);
        let mut at = WriteRequest {
            inode: call.header.nodeid,
            handle: args.fh,
            offset: args.offset,
            lock_owner: (args.write_flags & wire::WRITE_LOCKOWNER != 0).then_some(args.lock_owner),
            delayed: args.write_flags & wire::WRITE_CACHE != 0,
            kill_suidgid: args.write_flags & wire::WRITE_KILL_SUIDGID != 0,
            flags: args.flags,
        };
        let (ctx, mut wait) = (call.ctx, call.wait);
        let result = transfer(call.readable, wait, &mut at.offset.clone(), |data, offset| {
            at.offset = offset;
            let result = self.fs.write_from(&ctx, &at, data, wait);
            // Doing the whole again after a part was done would be wrong for O_APPEND: wait now, and
            // rather end with that part than go back into the ring.
            wait = Wait::Allowed;
            if result.is_err() && offset != args.offset && dax::take_interrupted() {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            result
        });
        match result {
            Ok(n) => {
                *call.bytes_written = call.bytes_written.saturating_add(n as u64);
                let size = u32::try_from(n).unwrap_or(u32::MAX);
                Outcome::Done(call.reply().obj(&wire::WriteOut { size, padding: 0 }))
            }
            Err(e) if call.wait.is_on_worker() && errno(&e) == libc::EAGAIN => Outcome::Slow,
            Err(e) => Outcome::Done(call.reply().error(errno(&e))),
        }
    }

    /// Operations on an open file, but for READ and WRITE.
    fn file(&self, request: &Request<'_>, mut call: Call<'_>) -> u32 {
        let (fs, ctx, inode) = (&self.fs, call.ctx, call.header.nodeid);
        match *request {
            Request::Open(args) => {
                let opened = fs.open(&ctx, inode, args.flags, args.open_flags);
                call.reply().map(opened, |(handle, options, _)| OpenOut {
                    fh: handle.unwrap_or(0),
                    open_flags: options.bits() | fs.open_flags(inode, handle, args.flags),
                    backing_id: 0,
                })
            }
            Request::Release(args) => {
                let flush = args.release_flags & wire::RELEASE_FLUSH != 0;
                let unlock = args.release_flags & wire::RELEASE_FLOCK_UNLOCK != 0;
                let owner = (flush || unlock).then_some(args.lock_owner);
                let result = fs.release(&ctx, inode, args.flags, args.fh, flush, unlock, owner);
                call.reply().result(result)
            }
            Request::Flush(args) => {
                let result = fs.flush(&ctx, inode, args.fh, args.lock_owner);
                call.reply().result(result)
            }
            Request::Fsync { handle, datasync } => {
                let result = fs.fsync(&ctx, inode, datasync, handle);
                call.reply().result(result)
            }
            Request::Fallocate(args) => {
                let result =
                    fs.fallocate(&ctx, inode, args.fh, args.mode, args.offset, args.length);
                call.reply().result(result)
            }
            Request::Lseek(args) => {
                let result = fs.lseek(&ctx, inode, args.fh, args.offset, args.whence);
                call.reply().map(result, |offset| offset)
            }
            Request::CopyFileRange { mut range, wide } => {
                if !wide {
                    // The reply has 32 bits; the guest asks again for the rest.
                    range.len = range.len.min(u64::from(!0xfff_u32));
                }
                let result = fs.copy_file_range(&ctx, &range);
                let narrow = |n| u32::try_from(n).unwrap_or(u32::MAX);
                match result {
                    Ok(n) if wide => call.reply().obj(&n),
                    Ok(n) => call.reply().obj(&wire::WriteOut { size: narrow(n), padding: 0 }),
                    Err(e) => call.reply().error(errno(&e)),
                }
            }
            _ => call.reply().error(libc::ENOSYS),
        }
    }

    fn directory(&self, request: &Request<'_>, mut call: Call<'_>) -> u32 {
        let (fs, ctx, inode) = (&self.fs, call.ctx, call.header.nodeid);
        match *request {
            Request::Opendir(args) => {
                let opened = fs.opendir(&ctx, inode, args.flags);
                call.reply().map(opened, |(handle, options)| OpenOut {
                    fh: handle.unwrap_or(0),
                    open_flags: options.bits(),
                    backing_id: 0,
                })
            }
            Request::Readdir(args) | Request::Readdirplus(args) => {
                let plus = matches!(request, Request::Readdirplus(_));
                self.list(&args, plus, call)
            }
            Request::Releasedir(args) => {
                let result = fs.releasedir(&ctx, inode, args.flags, args.fh);
                call.reply().result(result)
            }
            Request::Fsyncdir { handle, datasync } => {
                let result = fs.fsyncdir(&ctx, inode, datasync, handle);
                call.reply().result(result)
            }
            _ => call.reply().error(libc::ENOSYS),
        }
    }

    fn list(&self, args: &wire::ReadIn, plus: bool, call: Call<'_>) -> u32 {
        let (ctx, inode) = (call.ctx, call.header.nodeid);
        let reply = Reply::new(call.writable, call.header.unique);
        let max =
            usize::try_from(args.size).unwrap_or(usize::MAX).min(reply.room()).min(MAX_LISTING);
        let size = u32::try_from(max).unwrap_or(u32::MAX);
        let mut listing = Listing::new(call.output, max);
        let result = if plus {
            self.fs.readdirplus_into(&ctx, inode, args.fh, size, args.offset, &mut listing)
        } else {
            let mut add = |dirent: DirEntry<'_>| Ok(listing.add_plain(&dirent));
            self.fs.readdir(&ctx, inode, args.fh, size, args.offset, &mut add)
        };
        match result {
            // Entries that were looked up must reach the guest; an error shows again next time.
            Err(e) if call.output.is_empty() => reply.error(errno(&e)),
            _ => reply.bytes(call.output),
        }
    }

    fn lock(&self, request: &Request<'_>, mut call: Call<'_>) -> Outcome {
        let (fs, ctx, inode) = (&self.fs, call.ctx, call.header.nodeid);
        let (Request::Getlk(args) | Request::Setlk(args) | Request::Setlkw(args)) = *request else {
            return Outcome::Done(call.reply().error(libc::ENOSYS));
        };
        let lock = FileLock {
            start: args.lk.start,
            end: args.lk.end,
            lock_type: args.lk.lock_type,
            pid: args.lk.pid,
        };
        if matches!(request, Request::Getlk(_)) {
            let found = fs.getlk(&ctx, inode, args.fh, args.owner, lock, args.lk_flags);
            return Outcome::Done(call.reply().map(found, |lock| wire::FileLock {
                start: lock.start,
                end: lock.end,
                lock_type: lock.lock_type,
                pid: lock.pid,
            }));
        }
        let unique = call.header.unique;
        let waits = matches!(request, Request::Setlkw(_));
        let result = if waits && call.wait == Wait::ForLock {
            let (handle, owner, flags) = (args.fh, args.owner, args.lk_flags);
            let request = LockRequest { inode, handle, owner, lock, flags };
            fs.wait_for_lock(&ctx, &request, &mut |call| self.locks.block(unique, call))
        } else {
            fs.setlk(&ctx, inode, args.fh, args.owner, lock, args.lk_flags)
        };
        if !waits {
            return Outcome::Done(call.reply().result(result));
        }
        if result.as_ref().is_err_and(|e| matches!(errno(e), libc::EAGAIN | libc::EACCES)) {
            if self.locks.goes_on(unique) {
                return Outcome::Locked { unique };
            }
            return Outcome::Done(call.reply().error(libc::EINTR));
        }
        self.locks.forget(unique);
        Outcome::Done(call.reply().result(result))
    }

    fn xattr(&self, request: &Request<'_>, mut call: Call<'_>) -> u32 {
        let (fs, ctx, inode) = (&self.fs, call.ctx, call.header.nodeid);
        let (found, size) = match *request {
            Request::Setxattr { name, value, flags, kill_sgid } => {
                let result = fs.setxattr_with(&ctx, inode, name, value, flags, kill_sgid);
                return call.reply().result(result);
            }
            Request::Removexattr { name } => {
                let result = fs.removexattr(&ctx, inode, name);
                return call.reply().result(result);
            }
            Request::Getxattr { size, name } => (fs.getxattr(&ctx, inode, name, size), size),
            Request::Listxattr { size } => (
                fs.listxattr(&ctx, inode, size).map(|list| match list {
                    ListxattrReply::Names(names) => GetxattrReply::Value(names),
                    ListxattrReply::Count(n) => GetxattrReply::Count(n),
                }),
                size,
            ),
            _ => return call.reply().error(libc::ENOSYS),
        };
        match found {
            Ok(GetxattrReply::Count(size)) => {
                call.reply().obj(&wire::GetxattrSize { size, padding: 0 })
            }
            Ok(GetxattrReply::Value(value)) if value.len() as u64 > u64::from(size) => {
                call.reply().error(libc::ERANGE)
            }
            Ok(GetxattrReply::Value(value)) => call.reply().bytes(&value),
            Err(e) => call.reply().error(errno(&e)),
        }
    }

    fn namespace(&self, request: &Request<'_>, mut call: Call<'_>) -> u32 {
        let (fs, ctx, parent) = (&self.fs, call.ctx, call.header.nodeid);
        match *request {
            Request::Symlink { name, target, extra } => {
                let made = fs.symlink_with(&ctx, &extra, target, parent, name);
                entry(&mut call, made)
            }
            Request::Mknod { args, name, extra } => {
                let (mode, rdev, umask) = (args.mode, args.rdev, args.umask);
                let made = fs.mknod_with(&ctx, &extra, parent, name, mode, rdev, umask);
                entry(&mut call, made)
            }
            Request::Mkdir { args, name, extra } => {
                let made = fs.mkdir_with(&ctx, &extra, parent, name, args.mode, args.umask);
                entry(&mut call, made)
            }
            Request::Link { inode, name } => entry(&mut call, fs.link(&ctx, inode, parent, name)),
            Request::Unlink { name } => call.reply().result(fs.unlink(&ctx, parent, name)),
            Request::Rmdir { name } => call.reply().result(fs.rmdir(&ctx, parent, name)),
            Request::Rename { newdir, flags, old, new } => {
                let result = fs.rename(&ctx, parent, old, newdir, new, flags);
                call.reply().result(result)
            }
            Request::Create { args, name, extra } => {
                let made = fs.create_with(&ctx, &extra, parent, name, create_in(&args));
                self.created(&mut call, made, args.flags)
            }
            Request::Tmpfile { args, extra } => {
                let made = fs.tmpfile(&ctx, &extra, parent, create_in(&args));
                self.created(&mut call, made, args.flags)
            }
            _ => call.reply().error(libc::ENOSYS),
        }
    }

    fn created(&self, call: &mut Call<'_>, made: io::Result<Created>, flags: u32) -> u32 {
        match made {
            Ok((entry, handle, options)) => {
                let open = OpenOut {
                    fh: handle.unwrap_or(0),
                    open_flags: options.bits() | self.fs.open_flags(entry.inode, handle, flags),
                    backing_id: 0,
                };
                call.reply()
                    .obj_and_bytes(&EntryOut::new(&entry), zerocopy::IntoBytes::as_bytes(&open))
            }
            Err(e) => call.reply().error(errno(&e)),
        }
    }

    fn rare(&self, request: &Request<'_>, mut call: Call<'_>) -> u32 {
        let (fs, ctx, inode) = (&self.fs, call.ctx, call.header.nodeid);
        match *request {
            Request::Readlink => match fs.readlink(&ctx, inode) {
                Ok(target) => call.reply().bytes(&target),
                Err(e) => call.reply().error(errno(&e)),
            },
            Request::Statfs => {
                let found = fs.statfs(&ctx, inode);
                call.reply().map(found, |st| wire::Kstatfs::new(&st))
            }
            Request::Access { mask } => call.reply().result(fs.access(&ctx, inode, mask)),
            Request::Syncfs => call.reply().result(fs.syncfs(&ctx, inode)),
            Request::Statx(args) => {
                let handle = (args.getattr_flags & wire::GETATTR_FH != 0).then_some(args.fh);
                let found = fs.statx(&ctx, inode, handle, args.sx_flags, args.sx_mask);
                call.reply().map(found, |(stx, valid)| wire::StatxOut::new(&stx, valid))
            }
            Request::Bmap(args) => {
                let found = fs.bmap(&ctx, inode, args.block, args.blocksize);
                call.reply().map(found, |block| block)
            }
            Request::Poll(args) => {
                let found = fs.poll(&ctx, inode, args.fh, args.kh, args.flags, args.events);
                call.reply().map(found, |revents| wire::PollOut { revents, padding: 0 })
            }
            Request::Ioctl { args, data } => ioctl(fs, &args, data, &mut call),
            Request::SetupMapping(map) => {
                let result = fs.setup_mapping(&ctx, &map);
                call.reply().result(result)
            }
            Request::RemoveMapping(list) => {
                let mut ranges = list.map(|one| (one.moffset, one.len));
                let result = fs.remove_mapping(&ctx, inode, &mut ranges);
                call.reply().result(result)
            }
            Request::NotifyReply => call.reply().result(fs.notify_reply()),
            Request::Destroy => {
                self.reset();
                call.reply().ok()
            }
            _ => call.reply().error(libc::ENOSYS),
        }
    }

    /// INIT: a new session, whatever was before.
    fn init(&self, args: &wire::InitIn, flags2: u32, mut call: Call<'_>) -> u32 {
        if args.major > wire::KERNEL_VERSION {
            // The guest shall ask again in a version that we know.
            let (major, minor) = (wire::KERNEL_VERSION, wire::KERNEL_MINOR_VERSION);
            return call.reply().obj(&InitOut { major, minor, ..InitOut::default() });
        }
        if args.major < wire::KERNEL_VERSION || args.minor < wire::MIN_MINOR_VERSION {
            tracing::error!(args.major, args.minor, "the guest speaks too old a version of FUSE");
            return call.reply().error(libc::EPROTO);
        }
        self.reset();
        let mut capable = u64::from(args.flags);
        if capable & init::INIT_EXT != 0 {
            capable |= u64::from(flags2) << 32;
        }
        let wanted = match self.fs.negotiate(capable) {
            Ok(flags) => flags,
            Err(e) => return call.reply().error(errno(&e)),
        };
        let own = init::BIG_WRITES
            | init::MAX_PAGES
            | init::INIT_EXT
            | init::SETXATTR_EXT
            | init::NO_EXPORT_SUPPORT
            | init::MAP_ALIGNMENT;
        let flags = (wanted | own) & !init::EXPORT_SUPPORT & !STARTED & capable;
        self.session.store(flags | STARTED, Ordering::Release);
        tracing::info!(
            minor = args.minor,
            capable = format_args!("{capable:#x}"),
            flags = format_args!("{flags:#x}"),
            "FUSE session"
        );
        let half = |n: u64| u32::try_from(n & u64::from(u32::MAX)).unwrap_or(0);
        call.reply().obj(&InitOut {
            major: wire::KERNEL_VERSION,
            minor: wire::KERNEL_MINOR_VERSION,
            max_readahead: args.max_readahead,
            flags: half(flags),
            flags2: half(flags >> 32),
            max_background: u16::MAX,
            congestion_threshold: u16::MAX / 4 * 3,
            max_write: self.limits.max_write,
            time_gran: 1,
            max_pages: u16::try_from(self.limits.max_write / 4096).unwrap_or(u16::MAX),
            map_alignment: 12,
            ..InitOut::default()
        })
    }
}

/// Moves as much of `data` as one READ or WRITE asks for, calling `step` with the rest and its file
/// offset until the file ends or `step` fails. Returns the bytes moved; the error of a first step,
/// and `EAGAIN` of any READ step that may not wait.
fn transfer(
    data: &mut IoVecs,
    wait: Wait,
    offset: &mut u64,
    mut step: impl FnMut(&IoVecs, u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut done: usize = 0;
    while !data.is_empty() {
        let entries = data.as_slice();
        let most = if entries.len() > IOV_MAX {
            entries.iter().take(IOV_MAX).map(|e| e.iov_len).sum()
        } else {
            data.len()
        };
        match step(data, *offset) {
            Ok(0) => break,
            Ok(n) => {
                done = done.saturating_add(n);
                *offset = offset.saturating_add(n as u64);
                data.advance(n);
                // Short: the file's end, unless that lies where a page of the cache may be missing.
                if n < most && !(wait == Wait::Never && offset.is_multiple_of(4096)) {
                    break;
                }
            }
            // Unless it is us who are to let go of the ring.
            Err(e) if e.kind() == io::ErrorKind::Interrupted && !dax::is_interrupted() => {}
            Err(e) if errno(&e) == libc::EAGAIN && wait.is_on_worker() => return Err(e),
            Err(_) if done > 0 => break,
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

#[inline]
fn entry(call: &mut Call<'_>, made: io::Result<Entry>) -> u32 {
    call.reply().map(made, |entry| EntryOut::new(&entry))
}

fn create_in(args: &wire::CreateIn) -> fuse_backend_rs::abi::fuse_abi::CreateIn {
    fuse_backend_rs::abi::fuse_abi::CreateIn {
        flags: args.flags,
        mode: args.mode,
        umask: args.umask,
        fuse_flags: args.open_flags,
    }
}

fn ioctl<F: Extension>(fs: &F, args: &wire::IoctlIn, data: &[u8], call: &mut Call<'_>) -> u32 {
    let input = IoctlData { result: 0, data: (!data.is_empty()).then_some(data) };
    let (ctx, inode) = (call.ctx, call.header.nodeid);
    let done = fs.ioctl(&ctx, inode, args.fh, args.flags, args.cmd, input, args.out_size);
    let reply = Reply::new(call.writable, call.header.unique);
    match done {
        Ok(out) => {
            let bytes = out.data.unwrap_or(&[]);
            let max = usize::try_from(args.out_size).unwrap_or(usize::MAX).min(bytes.len());
            let head = wire::IoctlOut { result: out.result, ..wire::IoctlOut::default() };
            reply.obj_and_bytes(&head, bytes.get(..max).unwrap_or(&[]))
        }
        Err(e) => reply.error(errno(&e)),
    }
}

#[cfg(test)]
mod tests;
