//! The vhost-user protocol against a real daemon: every message, right and wrong, in any order.
//! Whatever comes, the daemon answers as specified, ends at most that connection, and serves the next.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testkit::daemon::{Daemon, bin};
use testkit::driver::blk::{BlkSlot, RequestType, S_OK, request};
use testkit::driver::{GuestQueue, RingFormat};
use testkit::frontend::{
    AttachOptions, F_PROTOCOL_FEATURES, FLAG_NEED_REPLY, FLAG_VERSION, FrontEnd, HEADER_SIZE,
    encode,
};
use testkit::memory::{GuestRam, RamRegion};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

const SECOND: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(10);

struct Disk {
    daemon: Daemon,
    _dir: tempfile::TempDir,
}

impl Disk {
    fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("blk.sock");
        let daemon = Daemon::start("vhost-user-blk", &socket, arguments).unwrap();
        Self { daemon, _dir: dir }
    }

    fn memory() -> Self {
        Self::start(&["--memory=16M"])
    }

    fn connect(&self) -> FrontEnd {
        FrontEnd::connect(self.daemon.socket()).unwrap()
    }

    /// The daemon is alive and a well-behaved guest can work with it.
    fn works(&mut self, format: RingFormat) {
        let mut front_end = self.connect();
        let ram = GuestRam::new(4 << 20).unwrap();
        let (mut queues, _inflight) = front_end.attach(&ram, &AttachOptions::new(format)).unwrap();
        write_and_read(&mut queues[0], 5);
        assert!(self.daemon.is_running());
    }
}

/// Writes a pattern to `sector` and reads it back.
fn write_and_read(queue: &mut GuestQueue, sector: u64) {
    let slot = BlkSlot::new(&queue.ram().clone(), 4096).unwrap();
    let data: Vec<u8> = (0u16..4096).map(|i| (i % 251).to_le_bytes()[0]).collect();
    slot.set_data(&data);
    assert_eq!(request(queue, &slot, (RequestType::OUT, sector, 4096), LONG).unwrap(), S_OK);
    slot.set_data(&[0; 4096]);
    assert_eq!(request(queue, &slot, (RequestType::IN, sector, 4096), LONG).unwrap(), S_OK);
    assert_eq!(slot.data(4096), data);
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % below.max(1) as u64).unwrap()
    }
}

fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

/// Waits for the answer to a last GET_FEATURES, past the answers of whatever came before.
fn is_alive(front_end: &FrontEnd) -> bool {
    let wire = front_end.wire();
    if wire.send(1, 0, &[], &[]).is_err() {
        return false;
    }
    loop {
        match wire.receive() {
            Ok(Some(m)) if m.request == 1 => return true,
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => return false,
        }
    }
}

#[test]
fn every_message_in_every_shape() {
    let mut disk = Disk::memory();
    let mut dice = Dice(42);
    let files: Vec<OwnedFd> = (0..3).map(|_| memfd(8192)).collect();
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let sizes = [0usize, 1, 4, 7, 8, 9, 12, 16, 20, 24, 32, 40, 72, 200, 4096, 8192];
    for round in 0..4 {
        let mut front_end = disk.connect();
        if round >= 2 {
            front_end.negotiate(u64::MAX, u64::MAX).unwrap();
        }
        for code in 0..64 {
            for size in sizes {
                let body: Vec<u8> = match dice.roll(3) {
                    0 => vec![0; size],
                    1 => vec![0xff; size],
                    _ => (0..size).map(|_| dice.roll(4).to_le_bytes()[0]).collect(),
                };
                // GET_FEATURES is the probe.
                let code = if code == 1 { 0xffff } else { code };
                let flags = if round % 2 == 0 { 0 } else { FLAG_NEED_REPLY };
                let n = dice.roll(4);
                front_end.wire().send(code, flags, &body, &fds[..n]).unwrap();
                assert!(is_alive(&front_end), "message {code} of {size} bytes with {n} fds");
            }
        }
        assert!(disk.daemon.is_running());
    }
    for format in RingFormat::ALL {
        disk.works(format);
    }
}

/// A number that may be in place, at an edge, or anything.
fn odd_number(dice: &mut Dice) -> u32 {
    let numbers = [0, 1, 8, 63, 64, 65, 0x7fff, 0x8000, 0x8000_8000, 0x8040_0000, u32::MAX];
    match dice.roll(4) {
        0 => u32::try_from(dice.roll(1 << 32)).unwrap(),
        _ => numbers[dice.roll(numbers.len())],
    }
}

/// One step of a front end that has lost its mind. What is refused is refused.
fn odd_request(front_end: &mut FrontEnd, queues: &[GuestQueue], offered: u64, dice: &mut Dice) {
    let index = u16::try_from(dice.roll(3)).unwrap();
    let queue = &queues[dice.roll(queues.len())];
    let number = odd_number(dice);
    let half = u16::try_from(number & 0xffff).unwrap();
    let _ = match dice.roll(10) {
        0 | 1 => front_end.set_vring_base(index, number),
        2 => front_end.set_vring_num(index, half),
        3 => front_end.set_vring_addr(index, queue.addresses(), None),
        4 => front_end.set_vring_kick(index, Some(queue.kick_fd().as_fd())),
        5 => front_end.set_vring_enable(index, dice.roll(3) > 0),
        6 => front_end.get_vring_base(index).map(drop),
        7 => front_end.set_features(offered & (u64::from(number) << 16 | 1 << 32)),
        8 => front_end.get_inflight(2, half).and_then(|file| front_end.set_inflight(&file)),
        _ => front_end.set_status(half.to_le_bytes()[0]),
    };
}

/// Rings in which anything may stand, and a front end that says anything of them.
#[test]
fn no_ring_and_no_order_of_requests_ends_the_daemon() {
    let mut disk = Disk::memory();
    let mut dice = Dice(2026);
    let ram = GuestRam::new(1 << 20).unwrap();
    let options =
        |format| AttachOptions { queues: 2, queue_size: 64, ..AttachOptions::new(format) };
    for round in 0..200 {
        let mut front_end = disk.connect();
        let offered = front_end.get_features().unwrap();
        let format = RingFormat::ALL[round % RingFormat::ALL.len()];
        let (queues, _inflight) = front_end.attach(&ram, &options(format)).unwrap();
        for _ in 0..60 {
            let queue = &queues[dice.roll(queues.len())];
            for _ in 0..dice.roll(8) {
                let area = &queue.areas()[dice.roll(3)];
                let value = odd_number(&mut dice);
                // The first few words are those that are read first.
                let words = (area.len() / 4).min(1 << dice.roll(7));
                area.store32(4 * dice.roll(words), value);
            }
            queue.kick_fd().signal();
            odd_request(&mut front_end, &queues, offered, &mut dice);
        }
        assert!(is_alive(&front_end), "round {round}:\n{}", disk.daemon.log());
    }
    for format in RingFormat::ALL {
        disk.works(format);
    }
    assert!(!disk.daemon.log().contains("panicked"), "{}", disk.daemon.log());
}

#[test]
fn a_stream_that_is_no_vhost_user_ends_only_its_connection() {
    let mut disk = Disk::memory();
    let garbage: [&[u8]; 4] = [
        // Oversized, wrong version, no version, noise.
        &[24, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f],
        &[1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        b"GET / HTTP/1.1\r\n\r\n",
    ];
    for bytes in garbage {
        let front_end = disk.connect();
        let wire = front_end.wire();
        wire.send_bytes(bytes, &[]).unwrap();
        assert!(wire.receive().map_or(true, |m| m.is_none()), "the connection should be over");
    }
    // Half a header, half a body, a header alone; then gone.
    for cut in [1, 6, HEADER_SIZE, HEADER_SIZE + 3] {
        let front_end = disk.connect();
        let message = encode(2, FLAG_VERSION, &0u64.to_ne_bytes());
        front_end.wire().send_bytes(&message[..cut], &[]).unwrap();
    }
    // More descriptors than any message has.
    let file = memfd(4096);
    let front_end = disk.connect();
    front_end.wire().send(5, 0, &[0; 40], &[file.as_fd(); 32]).unwrap();
    is_alive(&front_end);
    drop(front_end);
    disk.works(RingFormat::Split);
}

#[test]
fn probes_that_vanish_do_no_harm_and_leak_nothing() {
    let mut disk = Disk::memory();
    disk.works(RingFormat::Split);
    let before = disk.daemon.open_fds().unwrap();
    for i in 0..60 {
        let stream = UnixStream::connect(disk.daemon.socket()).unwrap();
        if i % 3 == 0 {
            let front_end = FrontEnd::from_stream(stream).unwrap();
            front_end.wire().send(1, 0, &[], &[]).unwrap();
        }
    }
    disk.works(RingFormat::Packed);
    // The session that was served last may still be closing.
    let deadline = Instant::now() + 5 * SECOND;
    while disk.daemon.open_fds().unwrap() > before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(disk.daemon.open_fds().unwrap() <= before);
}

#[test]
fn everything_is_acknowledged_when_asked() {
    let mut disk = Disk::memory();
    let mut front_end = disk.connect();
    let ram = GuestRam::new(4 << 20).unwrap();
    front_end.negotiate(u64::MAX, u64::MAX).unwrap();
    assert!(front_end.has(VhostUserProtocolFeatures::REPLY_ACK));
    // `set` waits for an acknowledgement of each of these.
    front_end.set_mem_table(&ram).unwrap();
    let queue = GuestQueue::new(&ram, 64, front_end.features & !F_PROTOCOL_FEATURES).unwrap();
    front_end.start_queue(0, &queue, queue.initial_base()).unwrap();
    front_end.set_status(15).unwrap();
    assert_eq!(front_end.get_status().unwrap(), 15);
    // Refusals are acknowledged with something else than 0.
    for refused in [
        front_end.set_vring_num(9999, 64),
        front_end.set_vring_num(0, 0),
        front_end.set_config(0, &[1; 8]),
        front_end.set(0xfff, &[], &[]),
        front_end.set(u32::from(FrontendReq::SET_FEATURES), &[0; 3], &[]),
        front_end.remove_region(RamRegion::new(1 << 40, 4096).unwrap().info()),
        front_end.add_region(ram.regions()[0].info(), memfd(4096).as_fd()),
    ] {
        let error = refused.unwrap_err();
        assert!(error.is::<testkit::frontend::Refused>(), "{error:#}");
    }
    assert_eq!(front_end.get_queue_num().unwrap().min(1), 1);
    assert!(front_end.get_max_mem_slots().unwrap() >= 32);
    drop(front_end);
    disk.works(RingFormat::Split);
}

#[test]
fn configuration_space_in_growing_bites() {
    let disk = Disk::memory();
    let mut front_end = disk.connect();
    front_end.negotiate(u64::MAX, u64::MAX).unwrap();
    let whole = front_end.get_config(0, 256).unwrap();
    let capacity = u64::from_le_bytes(whole[..8].try_into().unwrap());
    assert_eq!(capacity, (16 << 20) / 512);
    for len in 1..=60 {
        assert_eq!(front_end.get_config(0, len).unwrap(), whole[..usize::try_from(len).unwrap()]);
        assert_eq!(
            front_end.get_config(60 - len, len).unwrap(),
            whole[usize::try_from(60 - len).unwrap()..60]
        );
    }
    // Past the end: no payload, no hang-up.
    assert!(front_end.get_config(4000, 200).is_err());
    assert!(front_end.get_config(u32::MAX, 8).is_err());
    assert!(is_alive(&front_end));
}

/// One step of setting a ring up.
type Setup<'a> = Box<dyn Fn(&FrontEnd) -> anyhow::Result<()> + 'a>;

#[test]
fn a_ring_may_be_set_up_in_any_order() {
    let mut disk = Disk::memory();
    let mut dice = Dice(7);
    for turn in 0..40 {
        let format = RingFormat::ALL[turn % 2];
        let mut front_end = disk.connect();
        let offered = front_end.get_features().unwrap();
        front_end.set_protocol_features(front_end.get_protocol_features().unwrap()).unwrap();
        let other = RingFormat::Packed.features() & !format.features();
        let features = offered & !other & !(1 << 26);
        // As the front end keeps it, whenever it sends it.
        front_end.features = features;
        let ram = GuestRam::new(4 << 20).unwrap();
        let mut queue = GuestQueue::new(&ram, 32, features & !F_PROTOCOL_FEATURES).unwrap();
        let q = &queue;
        let set_features = u32::from(FrontendReq::SET_FEATURES);
        let mut steps: Vec<Setup<'_>> = vec![
            Box::new(move |f| f.set(set_features, &features.to_ne_bytes(), &[])),
            Box::new(|f| f.set_vring_enable(0, true)),
            Box::new(|f| f.set_mem_table(&ram)),
            Box::new(|f| f.set_vring_num(0, 32)),
            Box::new(|f| f.set_vring_base(0, q.initial_base())),
            Box::new(|f| f.set_vring_addr(0, q.addresses(), None)),
            Box::new(|f| f.set_vring_call(0, Some(q.call_fd().as_fd()))),
            Box::new(|f| f.set_vring_kick(0, Some(q.kick_fd().as_fd()))),
        ];
        let mut order = Vec::new();
        // QEMU's net order first: enable before features.
        if turn < 2 {
            steps.swap(0, 1);
        } else {
            for i in (1..steps.len()).rev() {
                let j = dice.roll(i + 1);
                steps.swap(i, j);
                order.push(j);
            }
        }
        for step in &steps {
            step(&front_end).unwrap();
        }
        drop(steps);
        let slot = BlkSlot::new(&ram, 512).unwrap();
        let status = request(&mut queue, &slot, (RequestType::IN, 0, 512), LONG);
        assert_eq!(status.unwrap(), S_OK, "{format:?} {order:?}");
        drop(front_end);
        assert!(disk.daemon.is_running());
    }
}

#[test]
fn messages_may_come_back_to_back() {
    // Everything in one write, no acknowledgements: nothing may be lost between messages.
    let disk = Disk::memory();
    let mut front_end = disk.connect();
    front_end.negotiate(u64::MAX, 0).unwrap();
    let mut bytes = Vec::new();
    for i in 0..200u64 {
        bytes.extend(encode(8, FLAG_VERSION, &[0u32.to_ne_bytes(), 64u32.to_ne_bytes()].concat()));
        bytes.extend(encode(10, FLAG_VERSION, &(i << 32).to_ne_bytes()));
    }
    bytes.extend(encode(1, FLAG_VERSION, &[]));
    let wire = front_end.wire();
    wire.send_bytes(&bytes, &[]).unwrap();
    assert_eq!(wire.receive().unwrap().unwrap().request, 1);
}

#[test]
fn a_busy_ring_stops_drained() {
    for format in RingFormat::ALL {
        let disk = Disk::memory();
        let mut front_end = disk.connect();
        let ram = GuestRam::new(8 << 20).unwrap();
        let (mut queues, _inflight) = front_end.attach(&ram, &AttachOptions::new(format)).unwrap();
        let queue = &mut queues[0];
        let slots: Vec<BlkSlot> = (0..30).map(|_| BlkSlot::new(&ram, 4096).unwrap()).collect();
        let mut base = 0;
        for round in 0..40u64 {
            for (i, slot) in (0u64..).zip(&slots) {
                let chain = slot.prepare(RequestType::IN, i * 8, 4096);
                assert!(queue.add(&chain, i));
            }
            queue.kick();
            base = front_end.get_vring_base(0).unwrap();
            // Stopped: all that was taken was given back, nothing moves any more.
            let mut done = 0;
            while queue.used().is_some() {
                done += 1;
            }
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(queue.used(), None, "a stopped ring moved");
            assert_eq!(queue.outstanding(), slots.len() - done);
            // It goes on from there, with the rest.
            front_end.set_vring_base(0, base).unwrap();
            front_end.set_vring_kick(0, Some(queue.kick_fd().as_fd())).unwrap();
            for _ in done..slots.len() {
                queue.wait(LONG).unwrap();
            }
            assert!(slots.iter().all(|s| s.status() == S_OK), "round {round}");
        }
        assert_ne!(base, queue.initial_base());
    }
}

#[test]
fn memory_comes_and_goes_while_a_queue_runs() {
    for format in RingFormat::ALL {
        let mut disk = Disk::memory();
        let mut front_end = disk.connect();
        let ram = GuestRam::new(8 << 20).unwrap();
        let (mut queues, _inflight) = front_end.attach(&ram, &AttachOptions::new(format)).unwrap();
        let queue = &mut queues[0];
        let slot = BlkSlot::new(&ram, 4096).unwrap();
        for i in 0..60u64 {
            let chain = slot.prepare(RequestType::IN, i, 4096);
            assert!(queue.add(&chain, i));
            queue.kick();
            let extra = RamRegion::new((1 << 32) + (i << 24), 1 << 20).unwrap();
            front_end.add_mem_region(&extra).unwrap();
            // A request straight into the new memory.
            let mut far = slot.prepare(RequestType::IN, i, 512);
            queue.wait(LONG).unwrap();
            far[1].addr = extra.info().guest_addr;
            queue.request(&far, LONG).unwrap();
            assert_eq!(slot.status(), S_OK);
            front_end.remove_region(extra.info()).unwrap();
            // And into memory that is gone: refused, the queue goes on.
            let mut gone = slot.prepare(RequestType::IN, i, 512);
            gone[1].addr = extra.info().guest_addr;
            assert_eq!(queue.request(&gone, LONG).unwrap(), 0);
        }
        write_and_read(queue, 9);
        assert!(disk.daemon.is_running());
    }
}

#[test]
fn the_dirty_log_has_every_page_written() {
    for format in RingFormat::ALL {
        let disk = Disk::memory();
        let mut front_end = disk.connect();
        let ram = GuestRam::new(8 << 20).unwrap();
        let (mut queues, _inflight) = front_end.attach(&ram, &AttachOptions::new(format)).unwrap();
        let queue = &mut queues[0];
        let slot = BlkSlot::new(&ram, 64 << 10).unwrap();
        // 8 MiB are 2048 pages, 256 bytes of log.
        let log = RamRegion::new(0, 4096).unwrap();
        let view = GuestLog::new(&log);
        front_end.set_log_base(256, 0, log.file().as_fd()).unwrap();
        assert_eq!(request(queue, &slot, (RequestType::IN, 0, 4096), LONG).unwrap(), S_OK);
        assert!(view.dirty().is_empty(), "nothing is logged before LOG_ALL is set");
        front_end.set_features(front_end.features | testkit::frontend::F_LOG_ALL).unwrap();
        let used = queue.areas()[2].addr();
        front_end.set_vring_addr(0, queue.addresses(), Some(used)).unwrap();
        let before = ram.bytes(0, 8 << 20);
        let chain = slot.prepare_split(RequestType::IN, 100, 40960, 3);
        queue.request(&chain, LONG).unwrap();
        assert_eq!(slot.status(), S_OK);
        let dirty = view.dirty();
        let first = slot.data_addr() / 4096;
        for page in first..first + 10 {
            assert!(dirty.contains(&page), "data page {page} of {dirty:?}");
        }
        assert!(dirty.contains(&(slot.status_addr() / 4096)), "status byte");
        let ring = match format {
            RingFormat::Split => queue.areas()[2].addr(),
            RingFormat::Packed => queue.areas()[0].addr(),
        };
        assert!(dirty.contains(&(ring / 4096)), "ring");
        // Whatever differs must be logged, except what the driver itself wrote.
        let after = ram.bytes(0, 8 << 20);
        let [desc, avail, _] = queue.areas().each_ref().map(|a| a.addr() / 4096);
        for page in 0..2048u64 {
            let range =
                usize::try_from(page).unwrap() * 4096..(usize::try_from(page).unwrap() + 1) * 4096;
            let own = page == desc || page == avail || page == slot.header_addr() / 4096;
            assert!(own || before[range.clone()] == after[range] || dirty.contains(&page));
        }
        // A write request dirties no data page.
        let old = view.dirty().len();
        assert_eq!(request(queue, &slot, (RequestType::OUT, 0, 4096), LONG).unwrap(), S_OK);
        assert_eq!(view.dirty().len(), old);
    }
}

/// The log's own memory, read as the front end does.
struct GuestLog(std::fs::File);

impl GuestLog {
    fn new(region: &RamRegion) -> Self {
        Self(region.file().try_clone().unwrap())
    }

    fn dirty(&self) -> std::collections::BTreeSet<u64> {
        let mut bytes = [0u8; 256];
        std::os::unix::fs::FileExt::read_exact_at(&self.0, &mut bytes, 0).unwrap();
        let bits =
            |(i, b): (u64, u8)| (0..8).filter(move |n| b >> n & 1 != 0).map(move |n| i * 8 + n);
        (0u64..).zip(bytes).flat_map(bits).collect()
    }
}

#[test]
fn device_state_moves_through_a_pipe() {
    let disk = Disk::memory();
    let mut front_end = disk.connect();
    front_end.negotiate(u64::MAX, u64::MAX).unwrap();
    if !front_end.has(VhostUserProtocolFeatures::DEVICE_STATE) {
        return;
    }
    let (read, write) = rustix::pipe::pipe().unwrap();
    front_end.set_device_state_fd(true, write.as_fd()).unwrap();
    drop(write);
    let mut state = Vec::new();
    std::io::Read::read_to_end(&mut std::fs::File::from(read), &mut state).unwrap();
    assert!(front_end.check_device_state().unwrap());
    let (read, write) = rustix::pipe::pipe().unwrap();
    front_end.set_device_state_fd(false, read.as_fd()).unwrap();
    std::io::Write::write_all(&mut std::fs::File::from(write), &state).unwrap();
    assert!(front_end.check_device_state().unwrap());
    // Nothing more to check.
    assert!(!front_end.check_device_state().unwrap());
}

#[test]
fn a_state_that_never_ends_keeps_no_daemon() {
    let mut disk = Disk::memory();
    let mut front_end = disk.connect();
    front_end.negotiate(u64::MAX, u64::MAX).unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    front_end.set_device_state_fd(false, read.as_fd()).unwrap();
    assert!(front_end.set_device_state_fd(false, read.as_fd()).is_err(), "one at a time");
    let asks = std::thread::spawn(move || front_end.check_device_state().unwrap_or(false));
    std::thread::sleep(Duration::from_millis(50));
    assert!(disk.daemon.terminate(Duration::from_secs(5)).unwrap().success());
    assert!(!asks.join().unwrap(), "half a state is none");
    drop(write);
}

#[test]
fn a_daemon_in_client_mode_dials_again_and_again() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vmm.sock");
    let mut child = Command::new(bin("vhost-user-blk").unwrap())
        .arg(format!("--socket-path={}", socket.display()))
        .args(["--client", "--memory=16M"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The VMM comes after the daemon, and twice.
    std::thread::sleep(Duration::from_millis(50));
    for format in RingFormat::ALL {
        let listener = UnixListener::bind(&socket).unwrap();
        let mut front_end = FrontEnd::accept(&listener).unwrap();
        let ram = GuestRam::new(4 << 20).unwrap();
        let (mut queues, _inflight) = front_end.attach(&ram, &AttachOptions::new(format)).unwrap();
        write_and_read(&mut queues[0], 1);
        drop(listener);
        std::fs::remove_file(&socket).unwrap();
    }
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Starts the daemon with `fd` as its descriptor 3.
fn with_inherited(fd: OwnedFd) -> std::process::Child {
    // The shell moves the descriptor, so that nothing unsafe is needed here.
    let path = bin("vhost-user-blk").unwrap();
    let mut shell = Command::new("sh");
    shell.arg("-c").arg("exec \"$0\" --fd=3 --memory=16M 3<&0 </dev/null").arg(path);
    shell.stdin(Stdio::from(fd)).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn an_inherited_socket_may_listen_or_be_connected() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("fd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut child = with_inherited(listener.into());
    for format in RingFormat::ALL {
        let mut front_end = FrontEnd::connect(&socket).unwrap();
        let ram = GuestRam::new(4 << 20).unwrap();
        let (mut queues, _inflight) = front_end.attach(&ram, &AttachOptions::new(format)).unwrap();
        write_and_read(&mut queues[0], 1);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    // A connected one serves one front end, and then the daemon is done.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = with_inherited(theirs.into());
    let mut front_end = FrontEnd::from_stream(ours).unwrap();
    let ram = GuestRam::new(4 << 20).unwrap();
    let (mut queues, _inflight) =
        front_end.attach(&ram, &AttachOptions::new(RingFormat::Split)).unwrap();
    write_and_read(&mut queues[0], 1);
    drop(front_end);
    let deadline = Instant::now() + 5 * SECOND;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "the daemon stays without a front end");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{status}");
}

#[test]
fn half_a_message_does_not_keep_the_daemon() {
    let mut disk = Disk::memory();
    let front_end = disk.connect();
    front_end.wire().send_bytes(&[1, 0, 0, 0, 1], &[]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let start = Instant::now();
    let status = disk.daemon.terminate(5 * SECOND).unwrap();
    assert!(status.success(), "{status}");
    assert!(start.elapsed() < SECOND, "SIGTERM took {:?}", start.elapsed());
}

#[test]
fn a_front_end_that_does_not_read_its_answers_does_not_keep_the_daemon() {
    let mut disk = Disk::memory();
    let front_end = disk.connect();
    let wire = front_end.wire();
    wire.stream().set_nonblocking(true).unwrap();
    // Until the answers fill the socket and the daemon waits to send one more.
    let mut sent = 0;
    while wire.send(1, 0, &[], &[]).is_ok() {
        sent += 1;
        assert!(sent < 1_000_000, "the answers went somewhere");
    }
    std::thread::sleep(Duration::from_millis(50));
    let status = disk.daemon.terminate(5 * SECOND).unwrap();
    assert!(status.success(), "{status}");
}
