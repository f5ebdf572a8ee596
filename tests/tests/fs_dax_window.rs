//! The DAX window without a VMM: a front end that maps as QEMU does, or plainly as crosvm does, and a
//! guest that does what no kernel would. Whatever happens, what the window shows is what the file has.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use testkit::daemon::Daemon;
use testkit::driver::fs::{FsClient, Message, op};
use testkit::frontend::{BackendChannel, BackendRequest, ShmemPolicy};
use testkit::memory::RamRegion;
use virtiofsd::fuse::wire::{AttrOut, SetattrIn};
use zerocopy::FromZeros;

const PAGE: u64 = 4096;
/// The smallest window: 512 pages.
const WINDOW: u64 = 2 << 20;
/// Where QEMU would have it in the guest's address space.
const QEMU: ShmemPolicy = ShmemPolicy::Qemu { window: 0x10_0000_0000 };
const LONG: Duration = Duration::from_secs(20);
/// What the daemon may have mapped at once: QEMU ends above 512 regions.
const CAP: usize = 400;
const ROOT: u64 = 1;
const ATTR_DAX: u32 = 1 << 1;

struct Share {
    dir: tempfile::TempDir,
    daemon: Daemon,
}

impl Share {
    fn new(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("shared")).unwrap();
        let daemon = Self::daemon(dir.path(), "fs", arguments);
        Self { dir, daemon }
    }

    fn daemon(dir: &Path, socket: &str, arguments: &[&str]) -> Daemon {
        let shared = format!("--shared-dir={}", dir.join("shared").display());
        let mut all = vec!["--tag=t", "--num-request-queues=4", "--dax-window=2M", &shared];
        all.extend(arguments);
        Daemon::start("virtiofsd", &dir.join(socket), &all).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("shared").join(name)
    }

    /// A file of `content`, open for reading and writing.
    fn file(&self, name: &str, content: &[u8]) -> File {
        fs::write(self.path(name), content).unwrap();
        OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap()
    }

    fn guest(&self, policy: ShmemPolicy) -> (FsClient, BackendChannel) {
        FsClient::start_with_window(self.daemon.socket(), 4, 8, policy).unwrap()
    }
}

/// Bytes that no offset error leaves equal.
fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_add(1);
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 32).to_le_bytes()
    });
    words.flatten().take(len).collect()
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// SETUPMAPPING of `len` bytes of the file from `from` at `at` in the window.
fn set_up(inode: u64, from: u64, len: u64, at: u64, write: bool) -> Message {
    Message::new(op::SETUPMAPPING, inode, &[u64::MAX, from, len, u64::from(write), at])
}

/// REMOVEMAPPING of one range.
fn remove(inode: u64, at: u64, len: u64) -> Message {
    let mut body = 1u32.to_ne_bytes().to_vec();
    body.extend([at, len].iter().flat_map(|n| n.to_ne_bytes()));
    Message { opcode: op::REMOVEMAPPING, nodeid: inode, body, ..Message::default() }
}

fn truncate(inode: u64, size: u64) -> Message {
    let args = SetattrIn { valid: 1 << 3, size, ..SetattrIn::new_zeroed() };
    Message::new(op::SETATTR, inode, &args)
}

fn attributes(guest: &mut FsClient, inode: u64) -> AttrOut {
    guest.call(Message::new(op::GETATTR, inode, &[0u64; 2])).unwrap().get().unwrap()
}

fn errno(guest: &mut FsClient, message: Message) -> i32 {
    guest.call(message).unwrap().errno
}

/// One step of somebody who has the file.
#[derive(Debug, Clone)]
enum Step {
    Map { slot: u64, page: u64, pages: u64 },
    Unmap { slot: u64 },
    Truncate { size: u64 },
    Write { at: u64, len: u64, seed: u64 },
    HostWrite { at: u64, len: u64, seed: u64 },
    StoreInWindow { slot: u64, at: u64, len: u64, seed: u64 },
    PunchHole { at: u64, len: u64 },
    Sync,
}

const SLOT_PAGES: u64 = 8;
const SLOTS: u64 = 8;
/// The file stays below this.
const MOST: u64 = 20 * PAGE;

fn step() -> impl Strategy<Value = Step> {
    let run = || (0..MOST, 1..3 * PAGE, any::<u64>());
    prop_oneof![
        4 => (0..SLOTS, 0u64..16, 1..=SLOT_PAGES)
            .prop_map(|(slot, page, pages)| Step::Map { slot, page, pages }),
        1 => (0..SLOTS).prop_map(|slot| Step::Unmap { slot }),
        3 => (0..MOST).prop_map(|size| Step::Truncate { size }),
        1 => (0..MOST / PAGE).prop_map(|pages| Step::Truncate { size: pages * PAGE }),
        3 => run().prop_map(|(at, len, seed)| Step::Write { at, len, seed }),
        2 => run().prop_map(|(at, len, seed)| Step::HostWrite { at, len, seed }),
        3 => (0..SLOTS, run())
            .prop_map(|(slot, (at, len, seed))| Step::StoreInWindow { slot, at, len, seed }),
        1 => run().prop_map(|(at, len, _)| Step::PunchHole { at, len }),
        1 => Just(Step::Sync),
    ]
}

/// A guest and the file as it should be.
struct Checker {
    guest: FsClient,
    window: BackendChannel,
    file: File,
    inode: u64,
    handle: u64,
    model: Vec<u8>,
    /// File offset and length of what each slot of the window shows, bytes.
    slots: BTreeMap<u64, (u64, u64)>,
}

impl Checker {
    fn new(share: &Share, policy: ShmemPolicy) -> Self {
        let model = content(index(5 * PAGE + 77), 1);
        let file = share.file("f", &model);
        let (mut guest, window) = share.guest(policy);
        let inode = guest.lookup(ROOT, "f").unwrap();
        let handle = guest.open(inode, libc::O_RDWR).unwrap();
        Self { guest, window, file, inode, handle, model, slots: BTreeMap::new() }
    }

    fn done(&mut self, message: Message) {
        assert_eq!(errno(&mut self.guest, message), 0);
    }

    fn put(&mut self, at: u64, data: &[u8]) {
        let end = index(at) + data.len();
        if self.model.len() < end {
            self.model.resize(end, 0);
        }
        self.model[index(at)..end].copy_from_slice(data);
    }

    fn step(&mut self, step: &Step) {
        let size = self.model.len() as u64;
        match *step {
            Step::Map { slot, page, pages } => {
                let at = slot * SLOT_PAGES * PAGE;
                // A slot is taken whole, as Linux does.
                self.done(remove(self.inode, at, SLOT_PAGES * PAGE));
                self.done(set_up(self.inode, page * PAGE, pages * PAGE, at, true));
                self.slots.insert(slot, (page * PAGE, pages * PAGE));
            }
            Step::Unmap { slot } => {
                let at = slot * SLOT_PAGES * PAGE;
                self.done(remove(self.inode, at, SLOT_PAGES * PAGE));
                self.slots.remove(&slot);
            }
            Step::Truncate { size } => {
                self.done(truncate(self.inode, size));
                self.model.resize(index(size), 0);
            }
            Step::Write { at, len, seed } => {
                let data = content(index(len), seed);
                let (from, _) = self.guest.data_at(0);
                self.guest.ram().write(from, &data);
                let len = u32::try_from(len).unwrap();
                self.done(Message::write(self.inode, self.handle, at, len));
                self.put(at, &data);
            }
            Step::HostWrite { at, len, seed } => {
                // Inside the file: what the host does to its size, a guest sees when it asks.
                let len = len.min(size.saturating_sub(at));
                let data = content(index(len), seed);
                self.file.write_all_at(&data, at).unwrap();
                if len > 0 {
                    self.put(at, &data);
                }
            }
            Step::StoreInWindow { slot, at, len, seed } => self.store(slot, at, len, seed),
            Step::PunchHole { at, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let body = [self.handle, at, len, u64::from(mode.cast_unsigned())];
                self.done(Message::new(op::FALLOCATE, self.inode, &body));
                let (at, end) = (at.min(size), (at + len).min(size));
                self.model[index(at)..index(end)].fill(0);
            }
            Step::Sync => self.done(Message::new(op::FSYNC, self.inode, &[self.handle, 0])),
        }
    }

    /// The guest stores to a page it has mapped.
    fn store(&mut self, slot: u64, at: u64, len: u64, seed: u64) {
        let Some(&(from, mapped)) = self.slots.get(&slot) else { return };
        let size = self.model.len() as u64;
        // Within one page, inside the mapping and the file.
        let at = from + at % mapped;
        let end = (at + len).min(at - at % PAGE + PAGE).min(size);
        if at >= end {
            return;
        }
        let data = content(index(end - at), seed);
        self.window.write_window(slot * SLOT_PAGES * PAGE + at - from, &data).unwrap();
        self.put(at, &data);
    }

    /// The guest asks for the attributes, and what it then sees in its mappings is the file.
    fn check(&mut self, after: &Step) {
        let size = self.model.len() as u64;
        assert_eq!(attributes(&mut self.guest, self.inode).attr.size, size, "{after:?}");
        for (&slot, &(from, mapped)) in &self.slots {
            for at in (from..(from + mapped).min(size)).step_by(index(PAGE)) {
                let len = PAGE.min(size - at);
                let mut page = vec![0; index(len)];
                let shown = slot * SLOT_PAGES * PAGE + at - from;
                self.window.read_window(shown, &mut page).unwrap();
                let wanted = &self.model[index(at)..index(at + len)];
                assert!(page == wanted, "{after:?}: slot {slot}, page at {at} of {size}");
            }
        }
        let on_host = fs::read(format!("/proc/self/fd/{}", fd_number(&self.file))).unwrap();
        assert!(on_host == self.model, "{after:?}: the file on the host");
    }
}

fn fd_number(file: &File) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(file)
}

/// How many histories of how many steps; `OUTBOARD_DAX_CASES` asks for more.
fn cases(few: u32) -> ProptestConfig {
    let cases = std::env::var("OUTBOARD_DAX_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases.unwrap_or(few)) }
}

fn the_window_shows_the_file(policy: ShmemPolicy, vmm: &str) {
    let share = Share::new(&["--dax=always", vmm]);
    proptest!(cases(40), |(steps in proptest::collection::vec(step(), 1..60))| {
        let mut checker = Checker::new(&share, policy);
        for step in &steps {
            checker.step(step);
            checker.check(step);
        }
        // A file that loses its name stays what it is for those who have it mapped.
        fs::write(share.path("other"), b"other").unwrap();
        fs::rename(share.path("other"), share.path("f")).unwrap();
        checker.check(&Step::Sync);
    });
}

#[test]
fn random_histories_through_a_window_that_checks() {
    the_window_shows_the_file(QEMU, "--dax-vmm=qemu");
}

#[test]
fn random_histories_through_a_plain_window() {
    the_window_shows_the_file(ShmemPolicy::Plain, "--dax-vmm=plain");
}

/// What a VMM would hold after `requests`; stops the test at one that a VMM must never get.
fn follow(requests: &BackendChannel, live: &mut BTreeMap<u64, u64>) {
    for request in requests.requests.try_iter() {
        match request {
            BackendRequest::Map(at, len) => {
                assert!(len > 0 && at % PAGE == 0 && len % PAGE == 0, "{at:#x} {len:#x}");
                assert!(at < WINDOW && len <= WINDOW - at, "outside: {at:#x} {len:#x}");
                let before = live.range(..at + len).next_back();
                assert!(before.is_none_or(|(from, n)| from + n <= at), "overlaps: {at:#x}");
                live.insert(at, len);
            }
            BackendRequest::Unmap(at, len) => {
                assert_eq!(live.remove(&at), Some(len), "what was not mapped so: {at:#x}");
            }
            other => panic!("{other:?}"),
        }
        assert!(live.len() <= CAP, "{} mappings", live.len());
    }
}

/// Numbers that a hostile guest would try.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..520).prop_map(|n| n * PAGE),
        2 => (1u64..4).prop_map(|n| n * PAGE),
        1 => any::<u64>(),
        1 => Just(u64::MAX - PAGE + 1),
        1 => 0..WINDOW,
    ]
}

proptest! {
    #![proptest_config(cases(30))]
    /// Whatever a guest asks for, the VMM is asked for nothing impossible.
    #[test]
    fn hostile_requests_never_reach_the_vmm(
        requests in proptest::collection::vec((number(), number(), number(), any::<bool>()), 1..200)
    ) {
        let share = Share::new(&["--dax=always"]);
        let _file = share.file("f", &content(index(WINDOW + 5), 2));
        let (mut guest, window) = share.guest(QEMU);
        let inode = guest.lookup(ROOT, "f").unwrap();
        let mut live = BTreeMap::new();
        for (from, len, at, take) in requests {
            let message = if take { set_up(inode, from, len, at, true) } else { remove(inode, at, len) };
            let error = errno(&mut guest, message);
            prop_assert!([0, libc::EINVAL, libc::ENOMEM].contains(&error), "errno {error}");
            follow(&window, &mut live);
            prop_assert_eq!(live.len(), window.mapped());
        }
    }
}

/// Many small claims, and then a file that grows: mappings are brought together before there are as many
/// as end QEMU.
#[test]
fn growth_never_takes_more_mappings_than_qemu_can_hold() {
    let share = Share::new(&["--dax=always"]);
    let file = share.file("f", &content(100, 3));
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    let (mut taken, mut live) = (0, BTreeMap::new());
    // Each shows the whole of the file as it will be; four mappings of each would be too many.
    for at in 0..128 {
        taken += i32::from(errno(&mut guest, set_up(inode, 0, 4 * PAGE, at * 4 * PAGE, true)) == 0);
    }
    assert_eq!(taken, 128);
    for page in 0..4 {
        let size = page * PAGE + 100;
        assert_eq!(errno(&mut guest, truncate(inode, size)), 0);
        follow(&window, &mut live);
    }
    file.write_all_at(b"seen by all", 3 * PAGE).unwrap();
    attributes(&mut guest, inode);
    for at in 0..128 {
        let mut seen = [0; 11];
        window.read_window(at * 4 * PAGE + 3 * PAGE, &mut seen).unwrap();
        assert_eq!(&seen, b"seen by all");
    }
    // Page by page: refused before the cap, not at QEMU's end.
    assert_eq!(errno(&mut guest, remove(inode, 0, WINDOW)), 0);
    follow(&window, &mut live);
    let refused = (0..512).filter(|at| {
        let error = errno(&mut guest, set_up(inode, 0, PAGE, at * PAGE, true));
        assert!(error == 0 || error == libc::ENOMEM, "errno {error}");
        error != 0
    });
    assert_eq!(refused.count(), 512 - CAP / 2);
    follow(&window, &mut live);
}

/// Adds `message` on `queue` from `slot`, without waiting.
fn send(guest: &mut FsClient, queue: usize, slot: usize, message: &Message) {
    guest.add(queue, slot, message).unwrap();
    guest.queues[queue].kick();
}

fn answer(guest: &mut FsClient, queue: usize) -> i32 {
    let used = guest.queues[queue].wait(LONG).unwrap();
    guest.answer(index(used.cookie), used.len).unwrap().errno
}

fn await_map(window: &BackendChannel) {
    let request = window.requests.recv_timeout(LONG).unwrap();
    assert!(matches!(request, BackendRequest::Map(..)), "{request:?}");
}

/// The VMM has mapped and not answered; it stops the ring, and starts it again.
#[test]
fn a_map_that_waits_survives_a_stop_of_its_ring() {
    let share = Share::new(&["--dax=always"]);
    let bytes = content(index(4 * PAGE + 9), 4);
    let _file = share.file("f", &bytes);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    for round in 0..5 {
        window.hold_answers(true);
        send(&mut guest, 1, 0, &set_up(inode, 0, 8 * PAGE, 0, true));
        await_map(&window);
        let base = guest.front_end.get_vring_base(1).unwrap();
        window.hold_answers(false);
        guest.front_end.start_queue(1, &guest.queues[1], base).unwrap();
        guest.queues[1].kick();
        assert_eq!(answer(&mut guest, 1), 0, "round {round}");
        let mut seen = vec![0; index(4 * PAGE)];
        window.read_window(0, &mut seen).unwrap();
        assert!(seen == bytes[..seen.len()]);
        let mut tail = [0; 9];
        window.read_window(4 * PAGE, &mut tail).unwrap();
        assert_eq!(tail, bytes[index(4 * PAGE)..]);
        assert_eq!(window.mapped(), 2);
        // The same with a mapping that is taken back.
        window.hold_answers(true);
        send(&mut guest, 1, 0, &remove(inode, 0, 8 * PAGE));
        let base = guest.front_end.get_vring_base(1).unwrap();
        window.hold_answers(false);
        guest.front_end.start_queue(1, &guest.queues[1], base).unwrap();
        guest.queues[1].kick();
        assert_eq!(answer(&mut guest, 1), 0, "round {round}");
        // What was interrupted is taken back with the next request at the latest.
        assert_eq!(errno(&mut guest, remove(inode, 0, WINDOW)), 0);
        assert_eq!(window.mapped(), 0);
        while window.requests.try_recv().is_ok() {}
    }
}

/// While a mapping waits for the VMM, the VMM's own requests are answered: all that it could do first.
#[test]
fn the_session_answers_while_a_map_waits() {
    let share = Share::new(&["--dax=always"]);
    let _file = share.file("f", &content(index(WINDOW), 5));
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    window.hold_answers(true);
    for queue in 1..4 {
        let at = queue as u64 * 16 * PAGE;
        send(&mut guest, queue, queue, &set_up(inode, at, 16 * PAGE, at, true));
    }
    await_map(&window);
    let more = RamRegion::new(1 << 40, 1 << 20).unwrap();
    guest.front_end.add_mem_region(&more).unwrap();
    assert_eq!(guest.front_end.get_shmem_config().unwrap()[0], WINDOW);
    guest.front_end.get_config(0, 40).unwrap();
    guest.front_end.remove_region(more.info()).unwrap();
    let base = guest.front_end.get_vring_base(4).unwrap();
    guest.front_end.start_queue(4, &guest.queues[4], base).unwrap();
    window.hold_answers(false);
    for queue in 1..4 {
        // Whom the stop of a ring interrupted is served when its own is started again.
        let base = guest.front_end.get_vring_base(queue).unwrap();
        guest.front_end.start_queue(queue, &guest.queues[usize::from(queue)], base).unwrap();
        guest.queues[usize::from(queue)].kick();
        assert_eq!(answer(&mut guest, queue.into()), 0);
    }
    assert_eq!(window.mapped(), 3);
}

/// A VMM that never answers leaves; the next one finds the daemon as if nothing had been.
#[test]
fn a_vmm_may_leave_while_a_map_waits() {
    let share = Share::new(&["--dax=always"]);
    let bytes = content(index(WINDOW), 6);
    let _file = share.file("f", &bytes);
    for _ in 0..3 {
        let (mut guest, window) = share.guest(QEMU);
        let inode = guest.lookup(ROOT, "f").unwrap();
        window.hold_answers(true);
        for queue in 1..4 {
            send(&mut guest, queue, queue, &set_up(inode, 0, PAGE, queue as u64 * PAGE, true));
        }
        await_map(&window);
        drop(guest);
    }
    let start = Instant::now();
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, WINDOW, 0, true)), 0);
    let mut seen = vec![0; index(WINDOW)];
    window.read_window(0, &mut seen).unwrap();
    assert!(seen == bytes && start.elapsed() < LONG);
}

/// The daemon is killed with mappings live and started again: the next guest sees today's file.
#[test]
fn nothing_stale_is_shown_after_the_daemon_was_killed() {
    let mut share = Share::new(&["--dax=always"]);
    let file = share.file("f", &content(index(3 * PAGE + 50), 7));
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 0, true)), 0);
    window.write_window(10, b"by the guest").unwrap();
    share.daemon.kill().unwrap();
    let mut kept = [0; 12];
    file.read_exact_at(&mut kept, 10).unwrap();
    assert_eq!(&kept, b"by the guest", "what is in a mapping is in the file");
    drop((guest, window));

    let bytes = content(index(5 * PAGE + 3), 8);
    fs::write(share.path("f"), &bytes).unwrap();
    share.daemon = Share::daemon(share.dir.path(), "again", &["--dax=always"]);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 0, true)), 0);
    for page in 0..5 {
        let mut seen = vec![0; index(PAGE)];
        window.read_window(page * PAGE, &mut seen).unwrap();
        assert!(seen == bytes[index(page * PAGE)..index((page + 1) * PAGE)]);
    }
    let mut tail = [9; 8];
    window.read_window(5 * PAGE, &mut tail).unwrap();
    assert_eq!(tail[..3], bytes[index(5 * PAGE)..]);
    assert_eq!(tail[3..], [0; 5], "past the end there are zeroes");
}

/// A layer that is shared read-only: no request, no mapping and no VMM can write to it.
#[test]
fn a_read_only_share_cannot_be_written_through_the_window() {
    let share = Share::new(&["--dax=always", "--dax-vmm=plain", "--readonly"]);
    let bytes = content(index(WINDOW), 9);
    let _file = share.file("layer", &bytes);
    let (mut guest, window) = share.guest(ShmemPolicy::Plain);
    let inode = guest.lookup(ROOT, "layer").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, PAGE, 0, true)), libc::EROFS);
    assert_eq!(window.mapped(), 0);
    assert_eq!(errno(&mut guest, set_up(inode, 0, WINDOW, 0, false)), 0);
    assert!(window.write_window(0, b"x").is_err(), "the mapping is marked writable");
    // Even a VMM that ignores the mark cannot: the descriptor is not open for writing.
    window.with_mappings(|all| {
        assert_eq!(all.len(), 1);
        assert!(all[0].file.write_at(b"x", 0).is_err());
        let flags = rustix::fs::fcntl_getfl(all[0].file.as_fd()).unwrap();
        assert!(!flags.intersects(rustix::fs::OFlags::RDWR | rustix::fs::OFlags::WRONLY));
    });
    let mut seen = vec![0; bytes.len()];
    window.read_window(0, &mut seen).unwrap();
    assert!(seen == bytes);
    assert!(fs::read(share.path("layer")).unwrap() == bytes);
}

/// `dax=inode`: the mark comes and goes with the file, in whatever answer has its attributes.
#[test]
fn a_file_that_stops_qualifying_loses_its_mark() {
    let share = Share::new(&["--dax=inode"]);
    let file = share.file("image", &content(index(WINDOW), 10));
    let (mut guest, _window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "image").unwrap();
    let marked = |attr: AttrOut| attr.attr.flags & ATTR_DAX != 0;
    assert!(marked(attributes(&mut guest, inode)));
    // In the answer to the very request that changes it.
    for (size, mark) in [(WINDOW - 1, false), (WINDOW + PAGE, true), (PAGE, false), (WINDOW, true)]
    {
        let set: AttrOut = guest.call(truncate(inode, size)).unwrap().get().unwrap();
        assert_eq!((marked(set), set.attr.size), (mark, size));
        assert_eq!(marked(attributes(&mut guest, inode)), mark, "{size}");
    }
    // And when the host changes it.
    file.set_len(WINDOW + 1).unwrap();
    assert!(!marked(attributes(&mut guest, inode)));
}
