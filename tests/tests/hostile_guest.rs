//! A guest that breaks every rule of its block device's rings and requests: the daemon goes on, says so
//! (a status byte, an unused chain, VRING_ERR), and the other queues notice nothing.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use testkit::daemon::Daemon;
use testkit::driver::blk::{BlkSlot, RequestType, S_IOERR, S_OK, S_PENDING, S_UNSUPP, request};
use testkit::driver::{Buffer, GuestQueue, RingFormat, wait_readable};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::memory::GuestRam;

/// A way to break a ring, with its name.
type Breakage<F> = (&'static str, F);

const LONG: Duration = Duration::from_secs(10);
/// 16 MiB.
const SECTORS: u64 = 32768;

struct World {
    ram: Arc<GuestRam>,
    queues: Vec<GuestQueue>,
    front_end: FrontEnd,
    daemon: Daemon,
    _dir: tempfile::TempDir,
}

impl World {
    fn new(format: RingFormat) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("blk.sock");
        let daemon =
            Daemon::start("vhost-user-blk", &socket, &["--memory=16M,num-queues=2"]).unwrap();
        let mut front_end = FrontEnd::connect(&socket).unwrap();
        let ram = GuestRam::new(16 << 20).unwrap();
        let options = AttachOptions { queues: 2, queue_size: 64, ..AttachOptions::new(format) };
        let (queues, _inflight) = front_end.attach(&ram, &options).unwrap();
        Self { ram, queues, front_end, daemon, _dir: dir }
    }

    /// Queue `index` serves.
    fn serves(&mut self, index: usize) {
        let slot = BlkSlot::new(&self.ram, 512).unwrap();
        let status = request(&mut self.queues[index], &slot, (RequestType::IN, 3, 512), LONG);
        assert_eq!(status.unwrap(), S_OK);
        assert!(self.daemon.is_running());
    }

    /// Queue 0 was given up, VRING_ERR says so, queue 1 serves, and a reset brings queue 0 back.
    fn queue_0_is_retired(&mut self) {
        assert!(wait_readable(self.queues[0].err_fd(), LONG).unwrap(), "VRING_ERR");
        self.serves(1);
        self.front_end.get_vring_base(0).unwrap();
        let fresh = GuestQueue::new(&self.ram, 64, self.queues[0].features()).unwrap();
        self.front_end.start_queue(0, &fresh, fresh.initial_base()).unwrap();
        self.queues[0] = fresh;
        self.serves(0);
    }
}

/// Requests that are wrong in themselves: what the status byte must say.
#[test]
fn wrong_requests_get_their_own_status() {
    for format in RingFormat::ALL {
        let mut world = World::new(format);
        let slot = BlkSlot::new(&world.ram, 8192).unwrap();
        let queue = &mut world.queues[0];
        let mut status =
            |kind, sector, len| request(queue, &slot, (kind, sector, len), LONG).unwrap();
        let unknown = RequestType(0x7777);
        assert_eq!(status(unknown, 0, 512), S_UNSUPP);
        for kind in [RequestType::IN, RequestType::OUT] {
            assert_eq!(status(kind, SECTORS, 512), S_IOERR, "just past the end");
            assert_eq!(status(kind, SECTORS - 1, 1024), S_IOERR, "over the end");
            assert_eq!(status(kind, u64::MAX, 512), S_IOERR);
            assert_eq!(status(kind, u64::MAX / 512, 8192), S_IOERR, "a byte offset that wraps");
            assert_eq!(status(kind, 0, 511), S_IOERR, "no whole sector");
            assert_eq!(status(kind, SECTORS - 1, 512), S_OK, "the last sector");
        }
        // Ranges past the end, wrapped ranges, and tables that are no multiple of a segment.
        for kind in [RequestType::DISCARD, RequestType::WRITE_ZEROES] {
            for (sector, count) in
                [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (u64::MAX - 1, u32::MAX)]
            {
                slot.set_range(sector, count, false);
                assert_eq!(status(kind, 0, 16), S_IOERR, "{sector}+{count}");
            }
            slot.set_range(0, 8, false);
            assert_ne!(status(kind, 0, 15), S_OK);
            assert_eq!(status(kind, 0, 16), S_OK);
        }
        world.serves(0);
        world.serves(1);
    }
}

/// Chains without room for a header or a status: nothing can be said, the chain comes back unused.
#[test]
fn chains_that_are_no_requests_come_back() {
    for format in RingFormat::ALL {
        let mut world = World::new(format);
        let slot = BlkSlot::new(&world.ram, 4096).unwrap();
        let good = slot.prepare(RequestType::IN, 0, 512);
        let (header, data, status) = (good[0], good[1], good[2]);
        let outside = Buffer::writable(1 << 40, 512);
        let straddling = Buffer::writable((16 << 20) - 100, 512);
        let chains: Vec<Vec<Buffer>> = vec![
            vec![header],
            vec![status],
            vec![data, status],
            vec![Buffer { len: 15, ..header }, data, status],
            vec![Buffer { len: 0, ..header }, data, status],
            vec![header, Buffer::readable(data.addr, 512)],
            vec![header, Buffer { len: 0, ..status }],
            vec![header, outside, status],
            vec![header, straddling, status],
            vec![Buffer::readable(u64::MAX - 8, 16), data, status],
            vec![header, Buffer::writable(data.addr, u32::MAX), status],
        ];
        for chain in chains {
            let _ = slot.prepare(RequestType::IN, 0, 512);
            world.queues[0].request(&chain, LONG).unwrap();
            assert_ne!(slot.status(), S_OK, "{chain:?}");
            world.serves(0);
        }
        // The shortest one there is: the status in the last byte of a data buffer.
        let _ = slot.prepare(RequestType::IN, 0, 512);
        let merged = Buffer::writable(data.addr, 513);
        world.queues[0].request(&[header, merged], LONG).unwrap();
        assert_eq!(slot.data(513)[512], S_OK);
        assert_eq!(slot.status(), S_PENDING);
        // The header in three pieces, all in an indirect table.
        let pieces = [
            Buffer::readable(header.addr, 3),
            Buffer::readable(header.addr + 3, 1),
            Buffer::readable(header.addr + 4, 12),
            data,
            status,
        ];
        let _ = slot.prepare(RequestType::IN, 0, 512);
        assert!(world.queues[0].add_indirect(&pieces, 0).unwrap());
        world.queues[0].kick();
        world.queues[0].wait(LONG).unwrap();
        assert_eq!(slot.status(), S_OK);
        world.serves(1);
    }
}

/// Writes one raw descriptor: address, length, then the format's last two fields.
fn raw(queue: &GuestQueue, index: u64, addr: u64, len: u32, (a, b): (u16, u16)) {
    let mut bytes = [0u8; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&a.to_le_bytes());
    bytes[14..].copy_from_slice(&b.to_le_bytes());
    queue.ram().write(queue.areas()[0].addr() + 16 * index, &bytes);
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[test]
fn broken_split_rings_retire_alone() {
    let breakages: [Breakage<fn(&GuestQueue)>; 7] = [
        ("a loop", |q| {
            raw(q, 0, 0x10_0000, 16, (NEXT, 1));
            raw(q, 1, 0x10_0000, 16, (NEXT, 0));
        }),
        ("a next past the table", |q| raw(q, 0, 0x10_0000, 16, (NEXT, 64))),
        ("a head past the table", |q| q.areas()[1].store16(4, 64, Ordering::Relaxed)),
        ("an index that jumps", |q| q.areas()[1].store16(2, 64, Ordering::Relaxed)),
        ("readable after writable", |q| {
            raw(q, 0, 0x10_0000, 16, (NEXT | WRITE, 1));
            raw(q, 1, 0x10_0000, 16, (0, 0));
        }),
        ("an indirect table of half an entry", |q| raw(q, 0, 0x10_0000, 24, (INDIRECT, 0))),
        ("an indirect table in an indirect table", |q| {
            raw(q, 0, 0x10_0000, 16, (INDIRECT, 0));
            let mut inner = [0u8; 16];
            inner[..8].copy_from_slice(&0x20_0000u64.to_le_bytes());
            inner[8] = 16;
            inner[12] = 4;
            q.ram().write(0x10_0000, &inner);
        }),
    ];
    let mut world = World::new(RingFormat::Split);
    for (name, breakage) in breakages {
        let queue = &world.queues[0];
        let [_, avail, _] = queue.areas().clone();
        let idx = avail.load16(2, Ordering::Relaxed);
        // A fresh ring in each turn but the first request or so: make head 0 available.
        let slot = usize::from(idx % 64);
        avail.store16(4 + 2 * slot, 0, Ordering::Relaxed);
        breakage(queue);
        if slot != 0 && name.starts_with("a head") {
            avail.store16(4 + 2 * slot, 64, Ordering::Relaxed);
        }
        let jump = if name.starts_with("an index") { 200 } else { 1 };
        avail.store16(2, idx.wrapping_add(jump), Ordering::Release);
        queue.kick_fd().signal();
        world.queue_0_is_retired();
    }
}

#[test]
fn broken_packed_rings_retire_alone() {
    const AVAIL: u16 = 1 << 7;
    let breakages: [Breakage<fn(&GuestQueue, u64)>; 4] = [
        ("a chain without an end", |q, _at| {
            for i in 0..64 {
                raw(q, i, 0x10_0000, 16, (0, NEXT | AVAIL));
            }
        }),
        ("readable after writable", |q, at| {
            raw(q, at + 1, 0x10_0000, 16, (0, AVAIL));
            raw(q, at, 0x10_0000, 16, (0, NEXT | WRITE | AVAIL));
        }),
        ("an indirect table of half an entry", |q, at| {
            raw(q, at, 0x10_0000, 24, (0, INDIRECT | AVAIL));
        }),
        ("an indirect table in a chain", |q, at| {
            raw(q, at + 1, 0x10_0000, 16, (0, INDIRECT | AVAIL));
            raw(q, at, 0x10_0000, 16, (0, NEXT | AVAIL));
        }),
    ];
    let mut world = World::new(RingFormat::Packed);
    for (turn, (_name, breakage)) in breakages.iter().enumerate() {
        // `serves` used one chain of three descriptors in each fresh ring.
        let at = if turn == 0 { 0 } else { 3 };
        breakage(&world.queues[0], at);
        world.queues[0].kick_fd().signal();
        world.queue_0_is_retired();
    }
}

/// The guest changes its requests while the daemon works on them.
#[test]
fn requests_may_change_while_they_are_worked_on() {
    for format in RingFormat::ALL {
        let mut world = World::new(format);
        let slots: Vec<BlkSlot> =
            (0..16).map(|_| BlkSlot::new(&world.ram, 4096).unwrap()).collect();
        let headers: Vec<u64> = slots.iter().map(BlkSlot::header_addr).collect();
        let ram = world.ram.clone();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut n = 0u64;
                while !done.load(Ordering::Relaxed) {
                    n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let header = headers[usize::try_from(n >> 40).unwrap() % headers.len()];
                    let kind = u32::try_from(n >> 33 & 15).unwrap();
                    ram.write(header, &kind.to_le_bytes());
                    ram.write(header + 8, &(n >> 20).to_le_bytes());
                }
            });
            for round in 0..300u64 {
                for (i, slot) in (0u64..).zip(&slots) {
                    let chain = slot.prepare(RequestType::OUT, round, 512);
                    assert!(world.queues[0].add(&chain, i));
                }
                world.queues[0].kick();
                for _ in &slots {
                    world.queues[0].wait(LONG).unwrap();
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        world.serves(0);
        world.serves(1);
    }
}
