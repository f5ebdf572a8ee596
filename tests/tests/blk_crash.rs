//! A vhost-user-blk that is killed at any moment and started again finishes what was in flight: the
//! guest sees no error, no lost write and no torn one.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use testkit::daemon::Daemon;
use testkit::driver::blk::{BlkSlot, RequestType, S_OK};
use testkit::driver::{EVENT_IDX, GuestQueue, IN_ORDER, RingFormat};
use testkit::frontend::{AttachOptions, FrontEnd, Inflight};
use testkit::memory::GuestRam;

/// Kills in each configuration; there are six.
const KILLS: u32 = 20;
const BLOCK: u32 = 4096;
const BLOCKS: u64 = 512;
/// Requests in flight.
const DEPTH: usize = 32;
const QUEUE_SIZE: u16 = 256;
const TIMEOUT: Duration = Duration::from_secs(20);

/// xorshift64*: the same run for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// What block `block` holds in its version `version`: every 16 bytes say both, so a torn block shows.
fn pattern(block: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK as usize];
    }
    let unit = [block.to_le_bytes(), version.to_le_bytes()].concat();
    unit.repeat(BLOCK as usize / unit.len())
}

#[derive(Clone, Copy)]
struct Pending {
    block: u64,
    /// The version being written; `None` for a read.
    write: Option<u64>,
}

/// A guest that writes and reads blocks and knows what each has to hold.
struct Guest {
    queue: GuestQueue,
    slots: Vec<BlkSlot>,
    pending: Vec<Option<Pending>>,
    /// The last version acknowledged, by block.
    versions: Vec<u64>,
    busy: Vec<bool>,
    random: Random,
    done: u64,
}

impl Guest {
    fn new(ram: &Arc<GuestRam>, queue: GuestQueue, seed: u64) -> Self {
        let slots = (0..DEPTH).map(|_| BlkSlot::new(ram, BLOCK).unwrap()).collect();
        Self {
            queue,
            slots,
            pending: vec![None; DEPTH],
            versions: vec![0; BLOCKS as usize],
            busy: vec![false; BLOCKS as usize],
            random: Random(seed),
            done: 0,
        }
    }

    /// Fills the free slots with requests on blocks that no other request touches.
    fn submit(&mut self) {
        for i in 0..DEPTH {
            if self.pending[i].is_some() {
                continue;
            }
            let block = self.random.below(BLOCKS);
            if std::mem::replace(&mut self.busy[block as usize], true) {
                continue;
            }
            let write = (self.random.below(4) != 0).then(|| self.versions[block as usize] + 1);
            let kind = if write.is_some() { RequestType::OUT } else { RequestType::IN };
            let sector = block * u64::from(BLOCK) / 512;
            let segments = 1 + self.random.below(3) as u32;
            let chain = self.slots[i].prepare_split(kind, sector, BLOCK, segments);
            match write {
                Some(version) => self.slots[i].set_data(&pattern(block, version)),
                None => self.slots[i].set_data(&[0x5a; BLOCK as usize]),
            }
            assert!(self.queue.add(&chain, i as u64), "the ring has room for every slot");
            self.pending[i] = Some(Pending { block, write });
        }
        self.queue.kick();
    }

    fn collect(&mut self) {
        while let Some(used) = self.queue.used() {
            self.complete(used.cookie as usize);
        }
    }

    fn complete(&mut self, i: usize) {
        let Pending { block, write } = self.pending[i].take().expect("a request that is pending");
        assert_eq!(self.slots[i].status(), S_OK, "block {block} failed");
        self.busy[block as usize] = false;
        self.done += 1;
        match write {
            Some(version) => self.versions[block as usize] = version,
            None => {
                let expected = pattern(block, self.versions[block as usize]);
                assert!(self.slots[i].data(BLOCK as usize) == expected, "block {block} is wrong");
            }
        }
    }

    fn work_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.submit();
            self.collect();
            std::thread::yield_now();
        }
    }

    /// Waits until nothing is in flight.
    fn drain(&mut self) {
        while self.pending.iter().any(Option::is_some) {
            let used = self.queue.wait(TIMEOUT).unwrap();
            self.complete(used.cookie as usize);
        }
    }
}

fn start(socket: &Path, image: &Path) -> Daemon {
    let file = format!("--blk-file={}", image.display());
    Daemon::start("vhost-user-blk", socket, &[file]).unwrap()
}

fn new_image(dir: &Path) -> PathBuf {
    let image = dir.join("disk.img");
    fs::File::create(&image).unwrap().set_len(BLOCKS * u64::from(BLOCK)).unwrap();
    image
}

fn check_image(image: &Path, versions: &[u64]) {
    let bytes = fs::read(image).unwrap();
    for (block, found) in bytes.chunks(BLOCK as usize).enumerate() {
        let expected = pattern(block as u64, versions[block]);
        assert!(found == expected, "block {block} in the image is not what was acknowledged");
    }
}

fn survives_kills(dir: &Path, format: RingFormat, features: u64) {
    let (image, socket) = (new_image(dir), dir.join("blk.sock"));
    let mut daemon = start(&socket, &image);
    let ram = GuestRam::new(8 << 20).unwrap();
    let options = AttachOptions { features, queue_size: QUEUE_SIZE, ..AttachOptions::new(format) };
    let mut frontend = FrontEnd::connect(&socket).unwrap();
    let (mut queues, inflight) = frontend.attach(&ram, &options).unwrap();
    let inflight: Inflight = inflight.expect("the device tracks what is in flight");
    let mut guest = Guest::new(&ram, queues.remove(0), 0x9e37_79b9 ^ features);
    let mut interrupted = 0;
    for _ in 0..KILLS {
        let time = Duration::from_micros(200 + guest.random.below(12_000));
        guest.work_for(time);
        guest.submit();
        daemon.kill().unwrap();
        guest.collect();
        interrupted += guest.pending.iter().flatten().count();
        daemon = start(&socket, &image);
        frontend = FrontEnd::connect(&socket).unwrap();
        // A VMM that lost its back end does not know where that stood.
        let queues = std::slice::from_ref(&guest.queue);
        frontend.reattach(&ram, queues, Some(&inflight), |q| q.initial_base()).unwrap();
        guest.queue.kick_fd().signal();
        guest.drain();
    }
    assert!(interrupted > 0, "no kill met a request in flight: the test shows nothing");
    assert!(guest.done > u64::from(KILLS) * DEPTH as u64, "only {} requests", guest.done);
    check_image(&image, &guest.versions);
}

fn without(bits: u64) -> u64 {
    !bits
}

#[test]
fn split_ring() {
    let dir = tempfile::tempdir().unwrap();
    survives_kills(dir.path(), RingFormat::Split, without(IN_ORDER | EVENT_IDX));
}

#[test]
fn split_ring_with_event_idx() {
    let dir = tempfile::tempdir().unwrap();
    survives_kills(dir.path(), RingFormat::Split, without(IN_ORDER));
}

#[test]
fn split_ring_in_order() {
    let dir = tempfile::tempdir().unwrap();
    survives_kills(dir.path(), RingFormat::Split, u64::MAX);
}

#[test]
fn packed_ring() {
    let dir = tempfile::tempdir().unwrap();
    survives_kills(dir.path(), RingFormat::Packed, without(IN_ORDER | EVENT_IDX));
}

#[test]
fn packed_ring_with_event_idx() {
    let dir = tempfile::tempdir().unwrap();
    survives_kills(dir.path(), RingFormat::Packed, without(IN_ORDER));
}

#[test]
fn packed_ring_in_order() {
    let dir = tempfile::tempdir().unwrap();
    survives_kills(dir.path(), RingFormat::Packed, u64::MAX);
}
