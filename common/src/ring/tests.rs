//! Crash tests: a queue dies before each single store of a random life, and the next one must do
//! again exactly what the driver was not shown.
//!
//! The driver's side is the testkit's. It is compiled against the library proper, so only numbers
//! and descriptors pass between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;

use testkit::driver::{Buffer, EVENT_IDX, GuestQueue, IN_ORDER, INDIRECT_DESC, RingFormat};
use testkit::memory::GuestRam;
use vm_memory::MmapRegion;

use super::fault::{count_stores, live_for};
use super::inflight::region_size;
use super::{Call, Chain, InflightRegion, Queue, QueueSetup, SetupError, VringAddresses};
use crate::vhost_user::memory::{GuestMemory, Region, RegionInfo, SharedMemory};

/// Ring entries: few, so that rings fill up and wrap.
const SIZE: u16 = 8;
/// Where chain `n`'s buffers are: every chain is known by its address.
const BUFFERS: u64 = 0x10_0000;
const STRIDE: u64 = 0x100;

/// A small pseudo-random generator (xorshift), so that a life can be lived again exactly.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below.max(1)
    }
}

/// What survives the daemon: guest memory, the driver, the inflight file; and what the test knows.
struct World {
    driver: GuestQueue,
    memory: Arc<SharedMemory>,
    record: Arc<MmapRegion>,
    features: u64,
    added: u64,
    /// Collected by the driver.
    seen: BTreeSet<u64>,
}

impl World {
    fn new(features: u64) -> Self {
        let ram = GuestRam::new(4 << 20).unwrap();
        let regions = ram.regions().iter().map(|r| {
            let i = r.info();
            let info = RegionInfo {
                guest_addr: i.guest_addr,
                size: i.size,
                user_addr: i.user_addr,
                mmap_offset: i.mmap_offset,
            };
            let fd = r.file().as_fd().try_clone_to_owned().unwrap();
            Arc::new(Region::map(info, fd).unwrap())
        });
        let memory = Arc::new(SharedMemory::default());
        memory.publish(GuestMemory::new(regions.collect(), None).unwrap());
        let driver = GuestQueue::new(&ram, SIZE, features).unwrap();
        let record = Arc::new(MmapRegion::new(region_size(SIZE, is_packed(features))).unwrap());
        Self { driver, memory, record, features, added: 0, seen: BTreeSet::new() }
    }

    /// Starts a queue where a front end that knows nothing but `base` would.
    fn start(&self, base: u32) -> Queue {
        self.setup(base).start().unwrap()
    }

    fn setup(&self, base: u32) -> QueueSetup {
        let a = self.driver.addresses();
        QueueSetup {
            index: 0,
            size: SIZE,
            features: self.features,
            addresses: VringAddresses {
                descriptor: a.descriptor,
                available: a.available,
                used: a.used,
            },
            base,
            kick: None,
            call: Call::None,
            err: None,
            inflight: InflightRegion::of_queue(&self.record, 0, SIZE, is_packed(self.features)),
            memory: self.memory.clone(),
            metrics: Arc::default(),
        }
    }

    /// Adds a chain of one to three buffers, sometimes in an indirect table; false: no room.
    fn add(&mut self, dice: &mut Dice) -> bool {
        let at = BUFFERS + STRIDE * self.added;
        let n = 1 + dice.roll(3);
        let buffers: Vec<Buffer> =
            (0..n).map(|i| Buffer { addr: at + 16 * i, len: 8, writable: i > 0 }).collect();
        let indirect = self.features & INDIRECT_DESC != 0 && dice.roll(4) == 0;
        let added = if indirect {
            self.driver.add_indirect(&buffers, self.added).unwrap()
        } else {
            self.driver.add(&buffers, self.added)
        };
        self.added += u64::from(added);
        added
    }

    /// The driver collects what it was shown. (It panics at what is not outstanding.)
    fn collect(&mut self) {
        while let Some(used) = self.driver.used() {
            assert!(self.seen.insert(used.cookie), "chain {} was used twice", used.cookie);
        }
    }

    /// Which chain this is, by its first buffer.
    fn number_of(&self, chain: &Chain) -> u64 {
        let first = chain.readable.as_slice()[0];
        let table = self.memory.load();
        (table.guest_addr_of(first.iov_base.cast()).unwrap() - BUFFERS) / STRIDE
    }
}

fn is_packed(features: u64) -> bool {
    features & RingFormat::Packed.features() == RingFormat::Packed.features()
}

/// One life: the driver adds and collects, the device pops, completes in any order, holds some back,
/// gives some back, publishes now and then.
fn live(world: &mut World, queue: &mut Queue, dice: &mut Dice, steps: u32) {
    let mut held: Vec<(u64, Chain)> = Vec::new();
    for _ in 0..steps {
        match dice.roll(10) {
            0..=2 => while world.add(dice) && dice.roll(3) > 0 {},
            3 | 4 => {
                for _ in 0..dice.roll(6) {
                    let mut chain = Chain::new();
                    if queue.pop(&mut chain) {
                        held.push((world.number_of(&chain), chain));
                    }
                }
            }
            5 | 6 => {
                for _ in 0..dice.roll(6) {
                    if !held.is_empty() {
                        let at = usize::try_from(dice.roll(held.len() as u64)).unwrap();
                        let (_, mut chain) = held.remove(at);
                        queue.push(&mut chain, 8);
                    }
                }
            }
            7 => {
                // Only the latest popped may go back, and only if nothing newer was completed.
                if let Some((number, mut chain)) = held.pop() {
                    if chain.token.sequence == queue.sequence.wrapping_sub(1) {
                        queue.unpop(&mut chain);
                    } else {
                        held.push((number, chain));
                    }
                }
            }
            8 => queue.publish(),
            _ => world.collect(),
        }
    }
    queue.publish();
}

/// A new daemon finds the world as the dead one left it: it must pop exactly what the driver was not
/// shown, and then all is well.
fn recover(world: &mut World, base: u32) {
    let mut queue = world.start(base);
    let mut done_again = BTreeSet::new();
    let mut chain = Chain::new();
    let mut order = Vec::new();
    let mut chains = Vec::new();
    while queue.pop(&mut chain) {
        order.push(world.number_of(&chain));
        assert!(done_again.insert(world.number_of(&chain)), "popped twice");
        chains.push(std::mem::take(&mut chain));
    }
    assert_eq!(queue.retired(), None);
    // Before the first publish of this life: what the driver can see now, the dead daemon showed.
    world.collect();
    let missing: BTreeSet<u64> = (0..world.added).filter(|n| !world.seen.contains(n)).collect();
    assert_eq!(done_again, missing, "popped again, against not shown");
    // As many again in the middle of a batch, one by one, so that leftovers of the dead show.
    for mut chain in chains {
        queue.push(&mut chain, 8);
        queue.publish();
        world.collect();
    }
    assert_eq!(world.driver.outstanding(), 0, "everything was given back");
    // And life goes on: a full ring of new chains, twice around.
    let mut dice = Dice(99);
    for _ in 0..4 {
        while world.add(&mut dice) {}
        while queue.pop(&mut chain) {
            queue.push(&mut chain, 8);
        }
        queue.publish();
        world.collect();
    }
    assert_eq!(world.seen.len() as u64, world.added);
}

/// What a front end may believe the vring base to be after a crash.
fn bases(world: &World) -> Vec<u32> {
    if is_packed(world.features) {
        // QEMU knows only what it knew at the start.
        return vec![0x8000_8000];
    }
    // QEMU: the used index; cloud-hypervisor: the available one.
    let [_, avail, used] = world.driver.areas();
    let order = std::sync::atomic::Ordering::Acquire;
    let used = u32::from(used.load16(2, order));
    if record_bytes(world)["version"] == 0 {
        // Nothing was recorded, so nothing was taken: the record can correct no wrong guess.
        return vec![used, used];
    }
    vec![used, u32::from(avail.load16(2, order))]
}

fn first_life(features: u64, seed: u64, stores: u64) -> World {
    let mut world = World::new(features);
    let mut dice = Dice(seed);
    let base = world.driver.initial_base();
    live_for(stores, || {
        let mut queue = world.start(base);
        live(&mut world, &mut queue, &mut dice, 40);
    });
    world
}

fn crash_everywhere(features: u64, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let seed = 0x9e37_79b9_7f4a_7c15u64.wrapping_mul(seed + 1);
        let stores = count_stores(|| drop(first_life(features, seed, u64::MAX)));
        for stop in 0..stores {
            for which in 0..bases(&World::new(features)).len() {
                let mut world = first_life(features, seed, stop);
                let base = bases(&world)[which];
                recover(&mut world, base);
            }
        }
    }
}

/// The second daemon dies while it recovers, too.
fn crash_twice(features: u64, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let seed = 0xd129_0b2e_8a1c_e5a7u64.wrapping_mul(seed + 1);
        let stores = count_stores(|| drop(first_life(features, seed, u64::MAX)));
        for stop in (0..stores).step_by(7) {
            for second in 0.. {
                let mut world = first_life(features, seed, stop);
                let base = bases(&world)[0];
                let mut dice = Dice(seed ^ second);
                let survived = live_for(second, || {
                    let mut queue = world.start(base);
                    live(&mut world, &mut queue, &mut dice, 6);
                });
                let base = bases(&world)[0];
                recover(&mut world, base);
                if survived.is_some() {
                    break;
                }
            }
        }
    }
}

const SPLIT: u64 = RingFormat::Split.features() | INDIRECT_DESC;
const PACKED: u64 = RingFormat::Packed.features() | INDIRECT_DESC;

#[test]
fn split_loses_and_repeats_nothing() {
    crash_everywhere(SPLIT, 0..12);
    crash_everywhere(SPLIT | EVENT_IDX | IN_ORDER, 20..26);
}

#[test]
fn packed_loses_and_repeats_nothing() {
    crash_everywhere(PACKED, 0..12);
    crash_everywhere(PACKED | EVENT_IDX | IN_ORDER, 20..26);
}

#[test]
fn split_survives_a_crash_in_recovery() {
    crash_twice(SPLIT, 0..6);
}

#[test]
fn packed_survives_a_crash_in_recovery() {
    crash_twice(PACKED, 0..6);
}

/// Contents of the record, as the vhost-user specification lays it out.
fn record_bytes(world: &World) -> BTreeMap<&'static str, u64> {
    let at = |offset: usize, len: usize| {
        let mut bytes = [0u8; 8];
        let p = world.record.as_ptr().wrapping_add(offset);
        for (i, b) in bytes.iter_mut().take(len).enumerate() {
            *b = read_byte(p.wrapping_add(i));
        }
        u64::from_le_bytes(bytes)
    };
    let mut out =
        BTreeMap::from([("features", at(0, 8)), ("version", at(8, 2)), ("desc_num", at(10, 2))]);
    if is_packed(world.features) {
        out.extend([
            ("free_head", at(12, 2)),
            ("old_free_head", at(14, 2)),
            ("used_idx", at(16, 2)),
            ("old_used_idx", at(18, 2)),
            ("used_wrap_counter", at(20, 1)),
            ("old_used_wrap_counter", at(21, 1)),
            ("0.inflight", at(32, 1)),
            ("0.last", at(36, 2)),
            ("0.num", at(38, 2)),
            ("0.counter", at(40, 8)),
            ("0.id", at(48, 2)),
            ("0.len", at(52, 4)),
            ("0.addr", at(56, 8)),
        ]);
    } else {
        out.extend([
            ("last_batch_head", at(12, 2)),
            ("used_idx", at(14, 2)),
            ("0.inflight", at(16, 1)),
            ("0.counter", at(24, 8)),
        ]);
    }
    out
}

#[allow(unsafe_code, reason = "a byte of the test's own mapping")]
fn read_byte(p: *const u8) -> u8 {
    // SAFETY: the callers' offsets lie within the record's mapping.
    unsafe { p.read_volatile() }
}

#[test]
fn the_record_is_laid_out_as_specified() {
    for features in [RingFormat::Split.features(), RingFormat::Packed.features()] {
        let mut world = World::new(features);
        let mut queue = world.start(world.driver.initial_base());
        assert!(
            world.driver.add(&[Buffer::readable(BUFFERS, 7), Buffer::writable(BUFFERS + 64, 9)], 0)
        );
        let mut chain = Chain::new();
        assert!(queue.pop(&mut chain));
        let taken = record_bytes(&world);
        assert_eq!((taken["features"], taken["version"], taken["desc_num"]), (0, 1, 8));
        assert_eq!(taken["0.inflight"], 1);
        if is_packed(features) {
            assert_eq!((taken["free_head"], taken["old_free_head"]), (2, 2));
            assert_eq!((taken["0.last"], taken["0.num"]), (1, 2));
            assert_eq!((taken["0.len"], taken["0.addr"]), (7, BUFFERS));
        }
        queue.push(&mut chain, 9);
        queue.publish();
        let done = record_bytes(&world);
        assert_eq!(done["0.inflight"], 0);
        if is_packed(features) {
            assert_eq!((done["free_head"], done["old_free_head"]), (0, 0));
            assert_eq!((done["used_idx"], done["old_used_idx"]), (2, 2));
            assert_eq!((done["used_wrap_counter"], done["old_used_wrap_counter"]), (1, 1));
        } else {
            assert_eq!((done["used_idx"], done["last_batch_head"]), (1, 0));
        }
    }
}

/// A device stages chains; the guest has put one among them that has to be rejected; then the device
/// finds no use for what it staged.
#[test]
fn giving_back_chains_around_a_rejected_one_loses_and_repeats_none() {
    let split = RingFormat::Split.features();
    let packed = RingFormat::Packed.features();
    for features in [split, packed, split | IN_ORDER, packed | IN_ORDER] {
        for bad in 0..3u64 {
            let mut world = World::new(features);
            let mut queue = world.start(world.driver.initial_base());
            // Three times around the ring, so that a position that is off shows.
            for round in 0..8u64 {
                let first = world.added;
                for n in 0..3 {
                    let at = BUFFERS + STRIDE * world.added;
                    let at = if n == bad { 1 << 60 } else { at };
                    assert!(world.driver.add(&[Buffer::readable(at, 8)], world.added));
                    world.added += 1;
                }
                let mut staged: Vec<Chain> = std::iter::repeat_with(Chain::new)
                    .map_while(|mut chain| queue.pop(&mut chain).then_some(chain))
                    .collect();
                assert_eq!(staged.len(), 2);
                while let Some(mut chain) = staged.pop() {
                    queue.unpop(&mut chain);
                }
                let mut again = Vec::new();
                let mut chain = Chain::new();
                while queue.pop(&mut chain) {
                    again.push(world.number_of(&chain) - first);
                    queue.push(&mut chain, 0);
                }
                // What was popped before the bad one is returned unused with it.
                let expected: Vec<u64> = (bad + 1..3).collect();
                assert_eq!(again, expected, "bad {bad}, round {round}, features {features:#x}");
                queue.publish();
                world.collect();
                assert_eq!((queue.retired(), queue.in_flight()), (None, 0));
                assert_eq!(world.driver.outstanding(), 0);
            }
        }
    }
}

/// One chain goes through `queue` while signals are held back; the signals when the held one is due.
fn signals_after(world: &mut World, queue: &mut Queue, meanwhile: impl Fn(&mut World)) -> u64 {
    world.driver.enable_interrupts();
    assert!(world.driver.add(&[Buffer::readable(BUFFERS, 8)], world.added));
    world.added += 1;
    let mut chain = Chain::new();
    assert!(queue.pop(&mut chain));
    queue.push(&mut chain, 0);
    let before = queue.metrics().signals.get();
    queue.publish();
    assert!(queue.owes_signal());
    assert_eq!(queue.metrics().signals.get(), before, "it was held back");
    meanwhile(world);
    queue.signal_now();
    assert!(!queue.owes_signal());
    queue.metrics().signals.get() - before
}

#[test]
fn a_held_signal_goes_to_drivers_that_still_want_it() {
    for format in RingFormat::ALL {
        for features in [format.features(), format.features() | EVENT_IDX] {
            let mut world = World::new(features);
            let mut queue = world.start(world.driver.initial_base());
            queue.hold_signals(true);
            // More often than the ring is long, so that its positions wrap.
            for _ in 0..3 * SIZE {
                assert_eq!(signals_after(&mut world, &mut queue, |_| ()), 1);
                world.collect();
                // It looked of its own accord, and waits for the next entry.
                let looked = signals_after(&mut world, &mut queue, |world| {
                    world.collect();
                    world.driver.enable_interrupts();
                });
                // Without an event index the wish says nothing of which entry.
                assert_eq!(looked, u64::from(features & EVENT_IDX == 0));
                if features & EVENT_IDX == 0 {
                    let polls = |world: &mut World| {
                        world.collect();
                        world.driver.disable_interrupts();
                    };
                    assert_eq!(signals_after(&mut world, &mut queue, polls), 0);
                }
            }
        }
    }
}

/// What a front end says of a packed ring's base may be past its end: it starts only where a record knows
/// better.
#[test]
fn a_packed_base_past_the_ring_is_refused() {
    let features = RingFormat::Packed.features();
    let past = [SIZE, SIZE + 1, 0x7fff];
    for bad in past.into_iter().flat_map(|index| [u32::from(index), u32::from(index) | 0x8000]) {
        for base in [bad, bad << 16 | 0x8000, bad << 16 | bad, bad << 16 | 1] {
            let mut world = World::new(features);
            let unrecorded = QueueSetup { inflight: None, ..world.setup(base) };
            let refused = SetupError::Base { base, size: SIZE };
            assert_eq!(unrecorded.start().unwrap_err(), refused, "{base:#x}");
            // A record in which nothing has been recorded yet knows nothing either.
            assert_eq!(world.setup(base).start().unwrap_err(), refused, "{base:#x}");
            let mut queue = world.start(0x8000_8000);
            live(&mut world, &mut queue, &mut Dice(7), 20);
            drop(queue);
            recover(&mut world, base);
        }
    }
}
