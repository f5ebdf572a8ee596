//! What is measured: FUSE messages, one kind after another.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use testkit::driver::fs::{FsClient, Message, op};

use super::floors::{self, Floor};

/// Size of the file that is read and written, bytes.
pub(crate) const FILE_BYTES: u64 = 64 << 20;
/// Entries of the directory that is listed.
pub(crate) const ENTRIES: usize = 10_000;
/// Room for the answer of one READDIR or READDIRPLUS, bytes.
const LISTING_BYTES: u32 = 128 << 10;
/// Bytes before the directory entry in an entry of READDIRPLUS (struct fuse_entry_out).
const ENTRY_OUT: usize = 128;

/// What the issue asks of ours, as a multiple of the better peer's.
#[derive(Clone, Copy)]
pub(crate) enum Aim {
    /// Nothing.
    None,
    /// At most this much CPU time for an operation.
    Cpu(f64),
    /// At least this many operations per second of the daemon's CPU time.
    PerCpu(f64),
    /// At least this many operations per second.
    Rate(f64),
}

/// One thing measured: how often, how, and what it should come to.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) count: usize,
    pub(crate) aim: Aim,
    pub(crate) run: fn(&mut FsClient, &Files, usize) -> Result<()>,
    /// What it cannot do without.
    pub(crate) floor: Option<Floor>,
}

impl Case {
    const fn over(mut self, floor: Floor) -> Self {
        self.floor = Some(floor);
        self
    }
}

/// What the client found in the shared directory.
pub(crate) struct Files {
    pub(crate) inode: u64,
    pub(crate) handle: u64,
    /// The directory of [`ENTRIES`] files.
    pub(crate) many: u64,
}

/// Where a case runs, and with which cases.
pub(crate) struct Section {
    pub(crate) title: &'static str,
    /// The file is opened with these flags besides O_RDWR.
    pub(crate) flags: i32,
    /// On a disk's file system instead of tmpfs.
    pub(crate) disk: bool,
    /// Request queues of ours; the peer has one. With more than one nothing is pinned.
    pub(crate) queues: u16,
    /// No page of a request follows the one before it in the guest's memory.
    pub(crate) scattered: bool,
    pub(crate) cases: &'static [Case],
}

pub(crate) const SECTIONS: &[Section] = &[
    Section { title: "small requests, tmpfs", cases: SMALL, ..PLAIN },
    Section { title: "directories, tmpfs", cases: TREE, ..PLAIN },
    Section { title: "large requests, tmpfs", cases: LARGE, ..PLAIN },
    Section { title: "large requests, tmpfs, scattered", cases: LARGE, scattered: true, ..PLAIN },
    Section { title: "disk, page cache", disk: true, cases: CACHED, ..PLAIN },
    Section { title: "disk, O_DIRECT", disk: true, flags: libc::O_DIRECT, cases: DIRECT, ..PLAIN },
    Section { title: "4 queues, tmpfs", queues: 4, cases: WIDE, ..PLAIN },
];

const PLAIN: Section =
    Section { title: "", flags: 0, disk: false, queues: 1, scattered: false, cases: &[] };

const SMALL: &[Case] = &[
    case("getattr", 10_000, Aim::Cpu(0.45), |c, f, n| getattr(c, f, n, 1)).over(floors::getattr),
    case("getattr x16", 40_000, Aim::Cpu(0.45), |c, f, n| getattr(c, f, n, 16)),
    case("lookup", 10_000, Aim::Cpu(0.45), |c, _, n| lookup(c, n, 1)).over(floors::lookup),
    case("lookup x16", 40_000, Aim::Cpu(0.45), |c, _, n| lookup(c, n, 16)),
    case("read 4k", 10_000, Aim::Cpu(0.6), |c, f, n| read(c, f, n, 1, 4096)).over(floors::read),
    case("read 4k x4", 20_000, Aim::Cpu(0.6), |c, f, n| read(c, f, n, 4, 4096)),
    case("read 4k x16", 40_000, Aim::Cpu(0.6), |c, f, n| read(c, f, n, 16, 4096)),
    case("write 4k", 8_000, Aim::None, |c, f, n| write(c, f, n, 1, 4096)),
    case("write 4k x4", 10_000, Aim::None, |c, f, n| write(c, f, n, 4, 4096)),
];

const TREE: &[Case] = &[
    case("stat 10k files", 10_000, Aim::Cpu(0.45), stat_each).over(floors::stat_each),
    case("create+unlink", 4000, Aim::PerCpu(1.5), |c, _, n| create_unlink(c, n))
        .over(floors::create_unlink),
    case("readdir 10k", 30, Aim::None, |c, f, n| list(c, f, n, op::READDIR)),
    case("readdirplus 10k", 10, Aim::None, |c, f, n| list(c, f, n, op::READDIRPLUS)),
];

const LARGE: &[Case] = &[
    case("read 1M", 1500, Aim::Rate(1.1), |c, f, n| read(c, f, n, 1, 1 << 20)),
    case("read 1M x4", 1500, Aim::Rate(1.1), |c, f, n| read(c, f, n, 4, 1 << 20)),
    case("write 1M x4", 500, Aim::Rate(1.1), |c, f, n| write(c, f, n, 4, 1 << 20)),
];

const CACHED: &[Case] = &[
    case("read 4k", 10_000, Aim::Cpu(0.6), |c, f, n| read(c, f, n, 1, 4096)).over(floors::read),
    case("read 4k x4", 20_000, Aim::Cpu(0.6), |c, f, n| read(c, f, n, 4, 4096)),
    case("write 4k", 5_000, Aim::None, |c, f, n| write(c, f, n, 1, 4096)),
    case("write 4k x4", 5_000, Aim::None, |c, f, n| write(c, f, n, 4, 4096)),
];

const DIRECT: &[Case] = &[
    case("read 4k", 1_500, Aim::None, |c, f, n| read(c, f, n, 1, 4096)),
    case("read 4k x4", 3_000, Aim::None, |c, f, n| read(c, f, n, 4, 4096)),
    case("write 4k", 1_000, Aim::None, |c, f, n| write(c, f, n, 1, 4096)),
    case("write 4k x4", 2_000, Aim::None, |c, f, n| write(c, f, n, 4, 4096)),
];

const WIDE: &[Case] = &[
    case("read 4k, 4 jobs", 40_000, Aim::None, |c, f, n| four_jobs(c, f, n, 4096)),
    case("read 128k, 4 jobs", 10_000, Aim::Rate(1.5), |c, f, n| four_jobs(c, f, n, 128 << 10)),
    case("read 1M, 4 jobs", 1500, Aim::Rate(1.5), |c, f, n| four_jobs(c, f, n, 1 << 20)),
];

const fn case(
    name: &'static str,
    count: usize,
    aim: Aim,
    run: fn(&mut FsClient, &Files, usize) -> Result<()>,
) -> Case {
    Case { name, count, aim, run, floor: None }
}

fn named(parent: u64, opcode: u32, name: &str) -> Message {
    let body = [name.as_bytes(), b"\0"].concat();
    Message { opcode, nodeid: parent, body, ..Message::default() }
}

/// Where operation `i` of `size` bytes goes: small ones jump about the file, large ones go through it.
pub(crate) fn place(i: usize, size: u32) -> u64 {
    let size = u64::from(size);
    let step = if size > 4096 { 1 } else { 0x9e37_79b9_7f4a_7c15 };
    (i as u64).wrapping_mul(step) % (FILE_BYTES / size) * size
}

fn getattr(c: &mut FsClient, f: &Files, n: usize, depth: usize) -> Result<()> {
    c.pump(1, depth, n, |_| Message::new(op::GETATTR, f.inode, &[0u64; 2]))
}

fn lookup(c: &mut FsClient, n: usize, depth: usize) -> Result<()> {
    c.pump(1, depth, n, |_| named(1, op::LOOKUP, "file"))
}

/// LOOKUP, GETATTR and FORGET of one file after another: the inode is new each time. As with Linux, nobody
/// waits for a FORGET to come back.
fn stat_each(c: &mut FsClient, f: &Files, n: usize) -> Result<()> {
    for i in 0..n {
        let found =
            c.call_spinning(&named(f.many, op::LOOKUP, &format!("entry-{}", i % ENTRIES)))?;
        let inode = found.u64_at(0)?;
        c.call_spinning(&Message::new(op::GETATTR, inode, &[0u64; 2]))?.u64_at(0)?;
        c.forget_unawaited(inode, 1)?;
    }
    c.await_forgets()
}

fn read(c: &mut FsClient, f: &Files, n: usize, depth: usize, size: u32) -> Result<()> {
    c.pump(1, depth, n, |i| Message::read(f.inode, f.handle, place(i, size), size))
}

fn write(c: &mut FsClient, f: &Files, n: usize, depth: usize, size: u32) -> Result<()> {
    c.pump(1, depth, n, |i| Message::write(f.inode, f.handle, place(i, size), size))
}

/// CREATE, RELEASE, UNLINK and FORGET of one file after another.
fn create_unlink(c: &mut FsClient, n: usize) -> Result<()> {
    for i in 0..n {
        let name = format!("made-{}", i % 100);
        let mut create = named(1, op::CREATE, &name);
        let flags = u32::from_ne_bytes((libc::O_RDWR | libc::O_CREAT).to_ne_bytes());
        let head = [flags, 0o100_644, 0, 0];
        create.body.splice(0..0, head.iter().flat_map(|word| word.to_ne_bytes()));
        let made = c.call_spinning(&create)?;
        let (inode, handle) = (made.u64_at(0)?, made.u64_at(128)?);
        c.call_spinning(&Message::new(op::RELEASE, inode, &[handle, 0, 0]))?;
        c.call_spinning(&named(1, op::UNLINK, &name))?;
        c.forget_unawaited(inode, 1)?;
    }
    c.await_forgets()
}

/// Whole listings of the directory of 10,000.
fn list(c: &mut FsClient, f: &Files, n: usize, opcode: u32) -> Result<()> {
    let mut found = Vec::new();
    for _ in 0..n {
        list_once(c, f.many, opcode, &mut found)?;
        ensure!(found.len() == ENTRIES || opcode == op::READDIR, "{} entries", found.len());
        for inode in found.drain(..) {
            c.forget_unawaited(inode, 1)?;
        }
    }
    c.await_forgets()
}

/// One listing of `directory`; READDIRPLUS puts the inodes into `found`.
pub(crate) fn list_once(
    c: &mut FsClient,
    directory: u64,
    opcode: u32,
    found: &mut Vec<u64>,
) -> Result<()> {
    let handle = c.call_spinning(&Message::new(op::OPENDIR, directory, &[0u32; 2]))?.u64_at(0)?;
    let mut offset = 0;
    loop {
        let body = [handle, offset, u64::from(LISTING_BYTES), 0, 0];
        let mut message = Message::new(opcode, directory, &body);
        message.data_in = LISTING_BYTES;
        let answer = c.call_spinning(&message)?;
        ensure!(answer.errno == 0, "a listing: errno {}", answer.errno);
        let len = usize::try_from(answer.len)? - 16;
        if len == 0 {
            break;
        }
        let head = if opcode == op::READDIRPLUS { ENTRY_OUT } else { 0 };
        offset = entries(&c.ram().bytes(c.data_at(0).1, len), head, found)?;
    }
    c.call_spinning(&Message::new(op::RELEASEDIR, directory, &[handle, 0, 0]))?;
    Ok(())
}

/// Where the last entry of a listing ends in the directory. `head` bytes before each entry say which
/// inode it is; `.` and `..` are no inodes of their own.
fn entries(mut bytes: &[u8], head: usize, found: &mut Vec<u64>) -> Result<u64> {
    let mut offset = 0;
    while !bytes.is_empty() {
        let word = |at: usize| -> Result<u64> {
            Ok(u64::from_ne_bytes(bytes.get(at..at + 8).context("a short entry")?.try_into()?))
        };
        if head > 0 && word(0)? != 0 {
            found.push(word(0)?);
        }
        offset = word(head + 8)?;
        let name = usize::try_from(word(head + 16)? & 0xffff_ffff)?;
        bytes = bytes.get((head + 24 + name).next_multiple_of(8)..).unwrap_or(&[]);
    }
    Ok(offset)
}

/// READs of four jobs, each with one request at a time, spread over all request queues. The client
/// sleeps when it has nothing to do, so that it leaves both CPUs to the daemon.
fn four_jobs(c: &mut FsClient, f: &Files, n: usize, size: u32) -> Result<()> {
    const JOBS: usize = 4;
    let queues = c.queues.len() - 1;
    let (mut sent, mut done) = (0, 0);
    let mut idle: Vec<usize> = (0..JOBS).collect();
    while done < n {
        for slot in idle.drain(..) {
            if sent < n {
                let queue = 1 + slot % queues;
                let at = place(sent, size);
                c.add(queue, slot, &Message::read(f.inode, f.handle, at, size))?;
                c.queues[queue].kick();
                sent += 1;
            }
        }
        for queue in 1..=queues {
            while let Some(used) = c.queues[queue].used() {
                let slot = usize::try_from(used.cookie)?;
                let answer = c.answer(slot, used.len)?;
                ensure!(answer.errno == 0 && answer.len == size + 16, "READ: {answer:?}");
                idle.push(slot);
                done += 1;
            }
        }
        if idle.is_empty() && done < n {
            sleep_until_used(c)?;
        }
    }
    Ok(())
}

/// Waits until a chain of any request queue is used.
fn sleep_until_used(c: &mut FsClient) -> Result<()> {
    let mut used = false;
    for queue in &mut c.queues[1..] {
        used |= queue.enable_interrupts();
    }
    if used {
        return Ok(());
    }
    let start = Instant::now();
    let mut fds: Vec<PollFd<'_>> =
        c.queues[1..].iter().map(|q| PollFd::new(q.call_fd(), PollFlags::IN)).collect();
    let second = rustix::time::Timespec { tv_sec: 1, tv_nsec: 0 };
    poll(&mut fds, Some(&second))?;
    ensure!(start.elapsed() < Duration::from_millis(900), "no READ was answered for a second");
    for queue in &c.queues[1..] {
        queue.call_fd().drain();
    }
    Ok(())
}
