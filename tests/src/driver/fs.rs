//! A guest's side of virtio-fs without a kernel: FUSE messages straight into the rings.
//!
//! For tests that want a message no kernel sends, for two guests in one process, and for benchmarks that
//! measure the daemon and nothing else.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{Buffer, GuestQueue, RingFormat};
use crate::frontend::{AttachOptions, BackendChannel, FrontEnd, ShmemPolicy};
use crate::memory::GuestRam;

/// Nothing that the tests ask for takes longer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Room for a request without data, bytes.
const REQUEST_ROOM: u64 = 4096;
/// Room for the fixed part of a reply, bytes.
const REPLY_ROOM: u64 = 4096;
const IN_HEADER: usize = 40;
const OUT_HEADER: u32 = 16;
const PAGE: u32 = 4096;
/// How many FORGETs that nobody waits for may be in the ring at a time, and the room for each, bytes.
const FORGETS: usize = 256;
const FORGET_ROOM: u64 = 64;
/// The cookies of these FORGETs begin here, above all slots.
const FORGET_COOKIES: u64 = 1 << 32;

/// Operations by number. `include/uapi/linux/fuse.h`.
#[allow(missing_docs, reason = "names are those of the header")]
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const UNLINK: u32 = 10;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const SETLK: u32 = 32;
    pub const SETLKW: u32 = 33;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
}

/// A message before it is in memory.
#[derive(Debug, Clone, Default)]
pub struct Message {
    /// The operation.
    pub opcode: u32,
    /// The inode.
    pub nodeid: u64,
    /// Everything after the header but WRITE's data.
    pub body: Vec<u8>,
    /// Bytes of data to send, whatever is in the slot.
    pub data_out: u32,
    /// Bytes of data that may come back, in pages of their own.
    pub data_in: u32,
}

impl Message {
    /// A message whose body is `words`.
    #[must_use]
    pub fn new<T: IntoBytes + Immutable + ?Sized>(opcode: u32, nodeid: u64, body: &T) -> Self {
        Self { opcode, nodeid, body: body.as_bytes().to_vec(), ..Self::default() }
    }

    /// READ of `size` bytes at `offset` through handle `fh`.
    #[must_use]
    pub fn read(nodeid: u64, fh: u64, offset: u64, size: u32) -> Self {
        let body = [fh, offset, u64::from(size), 0, 0];
        Self { data_in: size, ..Self::new(op::READ, nodeid, &body) }
    }

    /// WRITE of `size` bytes at `offset` through handle `fh`.
    #[must_use]
    pub fn write(nodeid: u64, fh: u64, offset: u64, size: u32) -> Self {
        let body = [fh, offset, u64::from(size), 0, 0];
        Self { data_out: size, ..Self::new(op::WRITE, nodeid, &body) }
    }
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Positive errno, 0 for success.
    pub errno: i32,
    /// Length as the header has it, bytes.
    pub len: u32,
    /// The fixed part of the reply, as far as it was filled.
    pub body: Vec<u8>,
}

impl Answer {
    /// The reply's body as a `T`.
    ///
    /// # Errors
    /// The operation failed, or the body is shorter.
    pub fn get<T: FromBytes>(&self) -> Result<T> {
        ensure!(self.errno == 0, "errno {}", self.errno);
        T::read_from_prefix(&self.body).ok().map(|(value, _)| value).context("a short reply")
    }

    /// The u64 at byte `at` of the reply's body.
    ///
    /// # Errors
    /// The operation failed, or the body is shorter.
    pub fn u64_at(&self, at: usize) -> Result<u64> {
        ensure!(self.errno == 0, "errno {}", self.errno);
        let bytes = self.body.get(at..at + 8).context("a short reply")?;
        Ok(u64::from_ne_bytes(bytes.try_into()?))
    }
}

/// How large a client is.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Request queues.
    pub queues: u16,
    /// Requests at a time, altogether.
    pub depth: usize,
    /// Entries of each ring; a request has at most so many buffers.
    pub ring: u16,
    /// Room for a request's data, in either direction, bytes.
    pub data: u64,
    /// Neighbouring pages of a request's data change places, so that none follows the one before it in
    /// memory.
    pub scattered: bool,
}

impl Size {
    /// `queues` request queues, `depth` requests of up to 1 MiB at a time.
    #[must_use]
    pub const fn new(queues: u16, depth: usize) -> Self {
        Self { queues, depth, ring: 512, data: 1 << 20, scattered: false }
    }

    fn slot(&self) -> u64 {
        REQUEST_ROOM + REPLY_ROOM + 2 * self.data
    }

    /// Bytes of memory that rings, their indirect tables and all slots take, and some more.
    fn memory(&self) -> u64 {
        let ring = u64::from(self.ring);
        let rings = u64::from(self.queues + 1) * (16 * ring * ring + 64 * ring);
        let forgets = FORGETS as u64 * FORGET_ROOM;
        (self.depth as u64 * self.slot() + rings + forgets + (1 << 20)).next_multiple_of(2 << 20)
    }
}

/// A mounted guest, so to speak: queue 0 is the high-priority queue, requests go to the others.
#[derive(Debug)]
pub struct FsClient {
    /// The connection.
    pub front_end: FrontEnd,
    /// The queues.
    pub queues: Vec<GuestQueue>,
    /// The largest WRITE that INIT allowed, bytes.
    pub max_write: u32,
    /// The largest request that INIT allowed, pages of 4 KiB.
    pub max_pages: u16,
    ram: Arc<GuestRam>,
    slots: u64,
    /// Room for FORGETs that nobody waits for, and which of it is free.
    forgets: u64,
    forgets_free: Vec<u64>,
    size: Size,
    unique: u64,
    /// By slot: the reply's payload goes to the room for data.
    data_comes: Vec<bool>,
    /// Working space for a message and for its buffers.
    bytes: Vec<u8>,
    buffers: Vec<Buffer>,
}

impl FsClient {
    /// Connects, starts the high-priority queue and `queues` request queues with room for `depth`
    /// requests at a time altogether, and does INIT with all features offered.
    ///
    /// # Errors
    /// The daemon does not play along.
    pub fn start(socket: &Path, queues: u16, depth: usize) -> Result<Self> {
        Self::start_sized(socket, Size::new(queues, depth))
    }

    /// As [`Self::start`], of any size.
    ///
    /// # Errors
    /// As there.
    pub fn start_sized(socket: &Path, size: Size) -> Result<Self> {
        let mut client = Self::attach(socket, size)?;
        client.init()?;
        Ok(client)
    }

    /// As [`Self::start`], by a VMM that has a DAX window and maps as `policy` says.
    ///
    /// # Errors
    /// The daemon does not play along, or offers no window.
    pub fn start_with_window(
        socket: &Path,
        queues: u16,
        depth: usize,
        policy: ShmemPolicy,
    ) -> Result<(Self, BackendChannel)> {
        let mut client = Self::attach(socket, Size::new(queues, depth))?;
        let channel = client.front_end.open_backend_channel(policy)?;
        ensure!(!client.front_end.get_shmem_config()?.is_empty(), "no window is offered");
        client.init()?;
        Ok((client, channel))
    }

    fn attach(socket: &Path, size: Size) -> Result<Self> {
        let mut front_end = FrontEnd::connect(socket)?;
        let ram = GuestRam::new(size.memory())?;
        let attach = AttachOptions {
            queues: size.queues + 1,
            queue_size: size.ring,
            inflight: false,
            ..AttachOptions::new(RingFormat::Split)
        };
        let (queues, _) = front_end.attach(&ram, &attach)?;
        Ok(Self {
            front_end,
            queues,
            max_write: 0,
            max_pages: 0,
            slots: ram.alloc(size.depth as u64 * size.slot(), 4096)?,
            forgets: ram.alloc(FORGETS as u64 * FORGET_ROOM, 4096)?,
            forgets_free: (0..FORGETS as u64).collect(),
            ram,
            unique: 2,
            data_comes: vec![false; size.depth],
            size,
            bytes: Vec::new(),
            buffers: Vec::new(),
        })
    }

    fn init(&mut self) -> Result<()> {
        let flags = !(1u32 << 31);
        let mut body = [7u32, 45, 1 << 20, flags, u32::MAX].as_bytes().to_vec();
        body.resize(64, 0);
        let answer = self.call(Message { opcode: op::INIT, body, ..Message::default() })?;
        // From struct fuse_init_out: 5 words, max_write, time_gran, max_pages, map_alignment.
        let out: [u32; 8] = answer.get().context("INIT")?;
        self.max_write = out[5];
        self.max_pages = u16::try_from(out[7] & 0xffff)?;
        Ok(())
    }

    fn slot(&self, slot: usize) -> u64 {
        self.slots + slot as u64 * self.size.slot()
    }

    /// Where slot `slot`'s data come from (WRITE), then where they go to (READ).
    #[must_use]
    pub fn data_at(&self, slot: usize) -> (u64, u64) {
        let at = self.slot(slot) + REQUEST_ROOM + REPLY_ROOM;
        (at, at + self.size.data)
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Gives the next message the number of the one before, as no kernel does.
    pub fn repeat_number(&mut self) {
        self.unique -= 2;
    }

    /// Makes `message` available on queue `queue` from slot `slot`, which becomes its cookie; the kick
    /// is the caller's.
    ///
    /// # Errors
    /// The ring is full, or the data do not fit into a slot.
    pub fn add(&mut self, queue: usize, slot: usize, message: &Message) -> Result<u64> {
        let data = u64::from(message.data_out.max(message.data_in));
        ensure!(data <= self.size.data && slot < self.size.depth, "more than there is room for");
        self.unique += 2;
        let len = u32::try_from(IN_HEADER + message.body.len())? + message.data_out;
        self.bytes.clear();
        self.bytes.extend([len, message.opcode].as_bytes());
        self.bytes.extend([self.unique, message.nodeid].as_bytes());
        self.bytes.extend([0u32; 4].as_bytes());
        self.bytes.extend(&message.body);
        let request = self.slot(slot);
        self.ram.write(request, &self.bytes);
        let (from, to) = self.data_at(slot);
        let buffers = &mut self.buffers;
        buffers.clear();
        buffers.push(Buffer::readable(request, u32::try_from(IN_HEADER)?));
        if !message.body.is_empty() {
            let at = request + IN_HEADER as u64;
            buffers.push(Buffer::readable(at, u32::try_from(message.body.len())?));
        }
        let page = |at| if self.size.scattered { at ^ u64::from(PAGE) } else { at };
        pages(message.data_out, |at, n| buffers.push(Buffer::readable(from + page(at), n)));
        if queue > 0 {
            let reply = request + REQUEST_ROOM;
            buffers.push(Buffer::writable(reply, OUT_HEADER));
            if message.data_in == 0 {
                let rest = u32::try_from(REPLY_ROOM)? - OUT_HEADER;
                buffers.push(Buffer::writable(reply + u64::from(OUT_HEADER), rest));
            }
            pages(message.data_in, |at, n| buffers.push(Buffer::writable(to + page(at), n)));
        }
        self.data_comes[slot] = message.data_in > 0;
        let ring = self.queues.get_mut(queue).context("no such queue")?;
        let added = if buffers.len() > 2 {
            ring.add_indirect(buffers, slot as u64)?
        } else {
            ring.add(buffers, slot as u64)
        };
        ensure!(added, "the ring is full");
        Ok(self.unique)
    }

    /// The reply in slot `slot`.
    ///
    /// # Errors
    /// The header's length is not that of the used entry.
    pub fn answer(&self, slot: usize, used: u32) -> Result<Answer> {
        let at = self.slot(slot) + REQUEST_ROOM;
        let mut head = [0u8; OUT_HEADER as usize];
        self.ram.read(at, &mut head);
        let (len, rest) = u32::read_from_prefix(&head).ok().context("a reply")?;
        let (error, _) = i32::read_from_prefix(rest).ok().context("a reply")?;
        ensure!(len == used, "the header says {len} bytes, the ring {used}");
        let end =
            if self.data_comes[slot] { OUT_HEADER } else { len.min(u32::try_from(REPLY_ROOM)?) };
        let body = usize::try_from(end.saturating_sub(OUT_HEADER))?;
        let body = self.ram.bytes(at + u64::from(OUT_HEADER), body);
        Ok(Answer { errno: -error, len, body })
    }

    /// Does one message on the first request queue.
    ///
    /// # Errors
    /// No answer, or a malformed one.
    pub fn call(&mut self, message: Message) -> Result<Answer> {
        self.add(1, 0, &message)?;
        self.queues[1].kick();
        let used = self.queues[1].wait(PATIENCE)?;
        self.answer(0, used.len)
    }

    /// As [`Self::call`], by spinning: for benchmarks.
    ///
    /// # Errors
    /// As there.
    pub fn call_spinning(&mut self, message: &Message) -> Result<Answer> {
        self.add(1, 0, message)?;
        self.queues[1].kick();
        let used = self.queues[1].poll_used(PATIENCE)?;
        self.answer(0, used.len)
    }

    /// FORGET, on the high-priority queue.
    ///
    /// # Errors
    /// It did not come back.
    pub fn forget(&mut self, nodeid: u64, count: u64) -> Result<()> {
        self.add(0, 0, &Message::new(op::FORGET, nodeid, &count))?;
        self.queues[0].kick();
        while let Some(number) =
            self.queues[0].poll_used(PATIENCE)?.cookie.checked_sub(FORGET_COOKIES)
        {
            self.forgets_free.push(number);
        }
        Ok(())
    }

    /// FORGET as Linux sends it: one buffer, and nobody waits for it to come back, unless there is no room
    /// for another one.
    ///
    /// # Errors
    /// There is none for long.
    pub fn forget_unawaited(&mut self, nodeid: u64, count: u64) -> Result<()> {
        self.take_forgets();
        if self.forgets_free.is_empty() {
            let used = self.queues[0].poll_used(PATIENCE)?;
            self.forgets_free.push(used.cookie.wrapping_sub(FORGET_COOKIES));
        }
        let number = self.forgets_free.pop().context("room for a FORGET")?;
        self.unique += 2;
        let len = u32::try_from(IN_HEADER)? + 8;
        self.bytes.clear();
        self.bytes.extend([len, op::FORGET].as_bytes());
        self.bytes.extend([self.unique, nodeid, 0, 0, count].as_bytes());
        let at = self.forgets + number * FORGET_ROOM;
        self.ram.write(at, &self.bytes);
        let added = self.queues[0].add(&[Buffer::readable(at, len)], FORGET_COOKIES + number);
        ensure!(added, "the high-priority queue is full");
        self.queues[0].kick();
        Ok(())
    }

    /// Takes back what of the unawaited FORGETs is done.
    fn take_forgets(&mut self) {
        while let Some(used) = self.queues[0].used() {
            self.forgets_free.push(used.cookie.wrapping_sub(FORGET_COOKIES));
        }
    }

    /// Waits until all unawaited FORGETs are done.
    ///
    /// # Errors
    /// They are not for long.
    pub fn await_forgets(&mut self) -> Result<()> {
        while self.forgets_free.len() < FORGETS {
            let used = self.queues[0].poll_used(PATIENCE)?;
            self.forgets_free.push(used.cookie.wrapping_sub(FORGET_COOKIES));
        }
        Ok(())
    }

    /// Looks `name` up in `parent`.
    ///
    /// # Errors
    /// It is not there.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64> {
        let body = [name.as_bytes(), b"\0"].concat();
        self.call(Message { opcode: op::LOOKUP, nodeid: parent, body, ..Message::default() })?
            .u64_at(0)
    }

    /// Opens `nodeid` and returns the handle.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(&mut self, nodeid: u64, flags: i32) -> Result<u64> {
        self.call(Message::new(op::OPEN, nodeid, &[flags, 0]))?.u64_at(0)
    }

    /// Does `count` messages that `make` makes, `depth` at a time, by spinning; all must succeed.
    ///
    /// # Errors
    /// One failed or did not come back.
    pub fn pump(
        &mut self,
        queue: usize,
        depth: usize,
        count: usize,
        mut make: impl FnMut(usize) -> Message,
    ) -> Result<()> {
        ensure!(depth <= self.size.depth, "more at a time than there is room for");
        let (mut sent, mut done) = (0, 0);
        let mut free: Vec<usize> = (0..depth).collect();
        while done < count {
            let before = sent;
            while sent < count && !free.is_empty() {
                let slot = free.pop().unwrap_or(0);
                self.add(queue, slot, &make(sent))?;
                sent += 1;
            }
            if sent > before {
                self.queues[queue].kick();
            }
            let mut used = Some(self.queues[queue].poll_used(PATIENCE)?);
            while let Some(one) = used {
                let slot = usize::try_from(one.cookie)?;
                let answer = self.answer(slot, one.len)?;
                ensure!(answer.errno == 0, "request {done}: errno {}", answer.errno);
                free.push(slot);
                done += 1;
                used = self.queues[queue].used();
            }
        }
        Ok(())
    }
}

/// Calls `piece` with offset and length of each page of `len` bytes.
fn pages(len: u32, mut piece: impl FnMut(u64, u32)) {
    let mut at = 0;
    while at < len {
        let n = PAGE.min(len - at);
        piece(u64::from(at), n);
        at += n;
    }
}
