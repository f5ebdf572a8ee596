//! The engine's rings against a guest that lies: random descriptors, loops, ranges outside memory,
//! jumping indices, rings that change while they are read. The oracle for split rings is
//! `virtio-queue`: what it reads of a lawful chain we read, what it stops at we refuse.

#![allow(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use outboard_common::ring::{Chain, IoVecs, Queue, RingError};
use outboard_common::vhost_user::memory::GuestMemory as OurMemory;
use proptest::prelude::*;
use testkit::driver::{Buffer, GuestQueue, INDIRECT_DESC, RingFormat, wait_readable};
use testkit::memory::GuestRam;
use virtio_queue::{Queue as OracleQueue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Guest memory: two pieces with a hole between them.
const LOW: u64 = 0x1_0000;
const HIGH_AT: u64 = 0x10_0000;
const HIGH: u64 = 0x1_0000;
/// Where random indirect tables are.
const TABLES: u64 = 0x8000;
const TABLE_DESCRIPTORS: usize = 64;

/// One descriptor as a hostile guest writes it.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn bytes(self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.addr.to_le_bytes());
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[12..14].copy_from_slice(&self.flags.to_le_bytes());
        out[14..].copy_from_slice(&self.next.to_le_bytes());
        out
    }
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0x4000u64..0x7000,
        2 => HIGH_AT..HIGH_AT + 0x1000,
        1 => (LOW - 0x20)..(LOW + 0x20),
        1 => (HIGH_AT + HIGH - 0x20)..(HIGH_AT + HIGH + 0x20),
        1 => Just(u64::MAX - 7),
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => 1u32..0x200,
        1 => Just(0u32),
        1 => 0x1000u32..0x20000,
        1 => Just(u32::MAX),
    ]
}

/// A descriptor of a ring (or table) of `size` entries.
fn descriptor(size: u16, tables: bool) -> impl Strategy<Value = Descriptor> {
    let flags =
        prop_oneof![4 => Just(0u16), 4 => Just(NEXT), 3 => Just(WRITE), 3 => Just(NEXT | WRITE)];
    let next = prop_oneof![8 => 0..size, 1 => any::<u16>()];
    let plain = (address(), length(), flags, next)
        .prop_map(|(addr, len, flags, next)| Descriptor { addr, len, flags, next });
    // Tables are wholly inside memory or wholly outside: the oracle reads on into one that starts
    // inside and ends outside, we refuse it at once.
    let table = (
        prop_oneof![8 => (0..TABLE_DESCRIPTORS as u64).prop_map(|i| TABLES + 16 * i), 1 => Just(0x5_0000)],
        prop_oneof![8 => (0u32..12).prop_map(|n| n * 16), 1 => length().prop_map(|len| len | 1)],
        prop_oneof![8 => Just(INDIRECT), 1 => Just(INDIRECT | WRITE)],
        any::<u16>(),
    )
        .prop_map(|(addr, len, flags, next)| Descriptor { addr, len, flags, next });
    let weight = u32::from(tables) * 2;
    prop_oneof![8 => plain, weight.max(1) => table.prop_map(move |d| {
        if tables { d } else { Descriptor { flags: 0, ..d } }
    })]
}

#[derive(Debug, Clone)]
struct Case {
    size: u16,
    ring: Vec<Descriptor>,
    tables: Vec<Descriptor>,
    heads: Vec<u16>,
    avail: u16,
}

fn case() -> impl Strategy<Value = Case> {
    proptest::sample::select(vec![1u16, 4, 8, 16]).prop_flat_map(|size| {
        (
            proptest::collection::vec(descriptor(size, true), usize::from(size)),
            // Tables hold tables now and then, which is forbidden.
            proptest::collection::vec(descriptor(8, false), TABLE_DESCRIPTORS - 1),
            descriptor(8, true),
            proptest::collection::vec(
                prop_oneof![12 => 0..size, 1 => any::<u16>()],
                usize::from(size),
            ),
            prop_oneof![6 => 0..=size, 1 => any::<u16>()],
        )
            .prop_map(move |(ring, mut tables, one, heads, avail)| {
                tables.push(one);
                Case { size, ring, tables, heads, avail }
            })
    })
}

struct Hostile {
    ram: Arc<GuestRam>,
    driver: GuestQueue,
    device: Queue,
    table: OurMemory,
}

impl Hostile {
    fn new(size: u16, features: u64) -> Self {
        let ram = GuestRam::with_regions(&[(0, LOW), (HIGH_AT, HIGH)]).unwrap();
        let driver = GuestQueue::new(&ram, size, features).unwrap();
        let memory = ram.shared_memory().unwrap();
        let device = driver.device_side(&memory, driver.initial_base(), None).unwrap();
        let table = OurMemory::new(memory.load().regions().to_vec(), None).unwrap();
        Self { ram, driver, device, table }
    }

    fn write(&self, at: u64, descriptors: &[Descriptor]) {
        for (i, d) in descriptors.iter().enumerate() {
            self.ram.write(at + 16 * i as u64, &d.bytes());
        }
    }

    fn oracle(&self) -> (OracleQueue, GuestMemoryMmap) {
        let ranges = self.ram.regions().iter().map(|r| {
            let i = r.info();
            let file = r.file().as_fd().try_clone_to_owned().unwrap().into();
            let len = usize::try_from(i.size).unwrap();
            (GuestAddress(i.guest_addr), len, Some(FileOffset::new(file, 0)))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges.collect::<Vec<_>>()).unwrap();
        let mut queue = OracleQueue::new(self.driver.size()).unwrap();
        queue.set_size(self.driver.size());
        let [desc, avail, used] =
            self.driver.areas().each_ref().map(|a| u32::try_from(a.addr()).unwrap());
        queue.set_desc_table_address(Some(desc), Some(0));
        queue.set_avail_ring_address(Some(avail), Some(0));
        queue.set_used_ring_address(Some(used), Some(0));
        queue.set_ready(true);
        (queue, memory)
    }

    fn flat(&self, list: &IoVecs) -> Vec<(u64, u64)> {
        let addr = |v: &libc::iovec| {
            let guest = self.table.guest_addr_of(v.iov_base.cast()).expect("inside guest memory");
            let last = v.iov_base.wrapping_byte_add(v.iov_len - 1);
            let end = self.table.guest_addr_of(last.cast()).expect("ends inside guest memory");
            assert_eq!(end - guest, v.iov_len as u64 - 1);
            (guest, v.iov_len as u64)
        };
        list.as_slice().iter().map(addr).collect()
    }
}

fn is_memory(addr: u64, len: u32) -> bool {
    let inside = |start: u64, size: u64| {
        addr >= start && addr < start + size && u64::from(len) <= start + size - addr
    };
    len == 0 || inside(0, LOW) || inside(HIGH_AT, HIGH)
}

/// Readable and writable ranges of a chain.
type Lists = (Vec<(u64, u64)>, Vec<(u64, u64)>);

/// Adds a range; one that goes on where the last one ends, in the same region, becomes part of it.
fn join(list: &mut Vec<(u64, u64)>, (addr, len): (u64, u64)) {
    match list.last_mut() {
        Some((last, n)) if *last + *n == addr && addr != HIGH_AT => *n += len,
        _ => list.push((addr, len)),
    }
}

/// What the oracle says a lawful chain holds, or `None` for one that breaks the rules.
fn judge(descriptors: &[virtio_queue::desc::split::Descriptor]) -> Option<Lists> {
    let last = descriptors.last()?;
    if last.has_next() {
        return None;
    }
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    for d in descriptors {
        if !is_memory(d.addr().0, d.len()) {
            return None;
        }
        if d.len() == 0 {
            if !d.is_write_only() && !writable.is_empty() {
                return None;
            }
            continue;
        }
        let entry = (d.addr().0, u64::from(d.len()));
        if d.is_write_only() {
            join(&mut writable, entry);
        } else if writable.is_empty() {
            join(&mut readable, entry);
        } else {
            return None;
        }
    }
    Some((readable, writable))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() })]
    #[test]
    fn split_agrees_with_the_oracle(case in case()) {
        let mut world = Hostile::new(case.size, RingFormat::Split.features() | INDIRECT_DESC);
        let [desc, avail, _] = world.driver.areas().clone();
        world.write(desc.addr(), &case.ring);
        world.write(TABLES, &case.tables);
        for (i, &head) in case.heads.iter().enumerate() {
            avail.store16(4 + 2 * i, head, Ordering::Relaxed);
        }
        avail.store16(2, case.avail, Ordering::Release);
        let (mut oracle, memory) = world.oracle();
        let mut chain = Chain::new();
        // Each lawful chain in the ring is popped by both; each other one is refused by us.
        let mut lawful = Vec::new();
        let mut unlawful = 0u64;
        while let Some(c) = oracle.pop_descriptor_chain(&memory) {
            let descriptors: Vec<_> = c.collect();
            match judge(&descriptors) {
                Some(lists) => lawful.push(lists),
                None => {
                    unlawful += 1;
                    lawful.push((vec![], vec![(u64::MAX, 0)]));
                }
            }
        }
        let mut ours = Vec::new();
        while world.device.pop(&mut chain) {
            ours.push((world.flat(&chain.readable), world.flat(&chain.writable)));
        }
        let rejected = world.device.metrics().rejected.get();
        let expected: Vec<_> =
            lawful.iter().filter(|(_, w)| w.first() != Some(&(u64::MAX, 0))).cloned().collect();
        match world.device.retired() {
            // All bad chains were only bad by address; the good ones are all there.
            None => {
                prop_assert_eq!(rejected, unlawful);
                prop_assert_eq!(ours, expected);
            }
            // The ring was given up at a bad chain (or index): all before it are as the oracle says.
            Some(RingError::IndexJump { .. }) => prop_assert_eq!(lawful.len(), 0),
            Some(_) => {
                prop_assert!(unlawful > rejected);
                prop_assert_eq!(&ours[..], &expected[..ours.len()]);
            }
        }
    }
}

fn packed_flags() -> impl Strategy<Value = u16> {
    // AVAIL and USED as the driver sets them in the first round, mostly.
    let low = prop_oneof![
        4 => Just(0u16), 3 => Just(NEXT), 3 => Just(WRITE), 2 => Just(NEXT | WRITE),
        2 => Just(INDIRECT), 1 => any::<u16>()
    ];
    (low, prop_oneof![8 => Just(1u16 << 7), 1 => Just(1 << 15), 1 => Just(0u16), 1 => Just(1 << 7 | 1 << 15)])
        .prop_map(|(low, high)| low & 0x7f7f | high)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..Default::default() })]
    #[test]
    fn packed_contains_whatever_is_in_the_ring(
        size in proptest::sample::select(vec![1u16, 3, 8, 16]),
        entries in proptest::collection::vec((address(), length(), any::<u16>(), packed_flags()), 16),
        tables in proptest::collection::vec(descriptor(8, true), TABLE_DESCRIPTORS),
        publish_every in 1usize..5,
    ) {
        let mut world = Hostile::new(size, RingFormat::Packed.features() | INDIRECT_DESC);
        let [desc, ..] = world.driver.areas().clone();
        let entries: Vec<_> = entries
            .iter()
            .map(|&(addr, len, id, flags)| Descriptor { addr, len, flags: id, next: flags })
            .collect();
        world.write(desc.addr(), &entries[..usize::from(size)]);
        world.write(TABLES, &tables);
        let mut chain = Chain::new();
        let mut popped = 0usize;
        while world.device.pop(&mut chain) {
            // A simple model of the ring's first descriptors: the chain starts where the last ended.
            world.flat(&chain.readable);
            world.flat(&chain.writable);
            popped += 1;
            prop_assert!(world.device.in_flight() <= u32::from(size));
            world.device.push(&mut chain, 1);
            if popped.is_multiple_of(publish_every) {
                world.device.publish();
            }
            prop_assert!(popped <= 4 * usize::from(size), "the ring never ends");
        }
        world.device.publish();
    }
}

/// A guest that makes chains available over and over without waiting for their return.
#[test]
fn a_driver_cannot_have_more_out_than_the_ring_holds() {
    // Split: the index goes on while nothing was shown to be used.
    let mut world = Hostile::new(4, RingFormat::Split.features());
    let [desc, avail, _] = world.driver.areas().clone();
    let one = Descriptor { addr: 0x4000, len: 8, flags: 0, next: 0 };
    world.write(desc.addr(), &[one; 4]);
    let mut chain = Chain::new();
    let mut out = 0u16;
    for idx in 1u16..200 {
        avail.store16(2, idx, Ordering::Release);
        while world.device.pop(&mut chain) {
            out += 1;
            world.device.push(&mut chain, 0);
        }
    }
    assert_eq!(out, 4);
    assert!(matches!(world.device.retired(), Some(RingError::IndexJump { .. })));
    // Packed: all descriptors look available in both rounds.
    let mut world = Hostile::new(4, RingFormat::Packed.features());
    let [desc, ..] = world.driver.areas().clone();
    let mut out = 0;
    for round in 0..200 {
        let flags = if round % 2 == 0 { 1 << 7 } else { 1 << 15 };
        let d = Descriptor { addr: 0x4000, len: 8, flags: 0, next: flags };
        world.write(desc.addr(), &[d; 4]);
        while world.device.pop(&mut chain) {
            out += 1;
            world.device.push(&mut chain, 0);
        }
    }
    assert_eq!(out, 4);
    assert!(world.device.retired().is_some());
    assert!(wait_readable(world.driver.err_fd(), Duration::ZERO).unwrap(), "VRING_ERR");
}

/// A chain of 4 GiB and more is one that no device can count.
#[test]
fn a_chain_of_too_many_bytes_is_rejected() {
    for format in RingFormat::ALL {
        // Sparse: nothing is touched.
        let ram = GuestRam::with_regions(&[(0, 1 << 31)]).unwrap();
        let mut driver = GuestQueue::new(&ram, 8, format.features()).unwrap();
        let memory = ram.shared_memory().unwrap();
        let mut device = driver.device_side(&memory, driver.initial_base(), None).unwrap();
        let big = Buffer::readable(1 << 20, 0x7000_0000);
        assert!(driver.add(&[big, big, big], 1));
        assert!(driver.add(&[big], 2));
        let mut chain = Chain::new();
        assert!(device.pop(&mut chain));
        assert_eq!(chain.readable.len(), 0x7000_0000);
        assert_eq!(device.metrics().rejected.get(), 1);
        device.push(&mut chain, 0);
        device.publish();
        assert_eq!(driver.used().unwrap().cookie, 1);
        assert_eq!(driver.used().unwrap().cookie, 2);
    }
}

/// Rings and tables change while they are read: nothing may panic, and nothing outside guest
/// memory may be handed out.
#[test]
fn rings_may_change_while_they_are_read() {
    for format in RingFormat::ALL {
        let stop = AtomicBool::new(false);
        let world = Hostile::new(16, format.features() | INDIRECT_DESC);
        let areas = world.driver.areas().clone();
        let ram = world.ram.clone();
        let stop_seen = &stop;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut seed = 0x1234_5678_9abc_def1u64;
                let mut roll = move |below: u64| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    (seed >> 11) % below
                };
                while !stop_seen.load(Ordering::Relaxed) {
                    // The low bytes keep values near what is lawful.
                    let mut value = [0u8; 8];
                    for b in &mut value {
                        *b = if roll(3) == 0 { u8::try_from(roll(256)).unwrap() } else { 0 };
                    }
                    let area = &areas[usize::try_from(roll(3)).unwrap()];
                    let at = area.addr() + roll(area.len() as u64 - 3);
                    let n = usize::try_from(1 + roll(2)).unwrap();
                    ram.write(at, &value[..n]);
                    ram.write(TABLES + roll(1000), &value[..n]);
                }
            });
            let memory = world.ram.shared_memory().unwrap();
            // The other thread may get the processor late on a busy machine.
            let (until, give_up) = (Duration::from_millis(700), Duration::from_secs(30));
            let begun = Instant::now();
            let mut popped = 0u64;
            while begun.elapsed() < until || popped == 0 && begun.elapsed() < give_up {
                let base = world.driver.initial_base();
                let mut device = world.driver.device_side(&memory, base, None).unwrap();
                let mut chain = Chain::new();
                for _ in 0..64 {
                    if device.pop(&mut chain) {
                        popped += 1;
                        let mut byte = [0u8; 64];
                        chain.readable.read(&mut byte);
                        device.push(&mut chain, 0);
                    }
                    device.publish();
                    device.enable_notifications();
                }
            }
            stop.store(true, Ordering::Relaxed);
            assert!(popped > 0, "the game must reach the interesting part");
        });
    }
}
