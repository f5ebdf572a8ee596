//! The engine's rings against a lawful driver: everything added arrives as it was added, once, and
//! comes back once; no wake-up is lost. Both formats, all ring features.

#![allow(clippy::unwrap_used, reason = "a failing step is a failing test")]

use std::collections::VecDeque;
use std::time::Duration;

use outboard_common::ring::{Chain, Queue};
use proptest::prelude::*;
use testkit::driver::{
    Buffer, EVENT_IDX, GuestQueue, IN_ORDER, INDIRECT_DESC, RingFormat, wait_readable,
};
use testkit::memory::GuestRam;

const BUFFERS: u64 = 0x20_0000;

/// What the driver and the device do next.
#[derive(Debug, Clone)]
enum Step {
    /// Add a chain of these lengths, the first so many readable, in an indirect table or not.
    Add(Vec<u32>, usize, bool),
    Pop(usize),
    /// Complete the n-th chain held, with this length.
    Push(usize, u32),
    /// Give the last chain popped back.
    Unpop,
    Publish,
    Collect,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let add = (proptest::collection::vec(0u32..600, 1..5), 0usize..5, any::<bool>());
    let step = prop_oneof![
        4 => add.prop_map(|(lens, readable, indirect)| Step::Add(lens, readable, indirect)),
        2 => (1usize..9).prop_map(Step::Pop),
        4 => (0usize..9, 0u32..5000).prop_map(|(n, len)| Step::Push(n, len)),
        1 => Just(Step::Unpop),
        2 => Just(Step::Publish),
        2 => Just(Step::Collect),
    ];
    proptest::collection::vec(step, 1..120)
}

/// What the driver added and has not collected.
#[derive(Debug, Clone)]
struct Added {
    cookie: u64,
    buffers: Vec<Buffer>,
}

/// `buffers` as a device gets them: those that follow each other in memory are one.
fn joined(buffers: &[Buffer]) -> Vec<Buffer> {
    let mut all: Vec<Buffer> = Vec::new();
    for next in buffers.iter().copied().filter(|b| b.len > 0) {
        match all.last_mut() {
            Some(last)
                if last.writable == next.writable
                    && last.addr + u64::from(last.len) == next.addr =>
            {
                last.len += next.len;
            }
            _ => all.push(next),
        }
    }
    all
}

struct World {
    driver: GuestQueue,
    device: Queue,
    next: u64,
    /// Not popped yet, in order.
    waiting: VecDeque<Added>,
    /// Popped, not pushed.
    held: Vec<(Chain, Added)>,
    /// Whether the last of `held` is still what was popped last.
    last_is_latest: bool,
    /// Popped in this order and not collected yet (IN_ORDER).
    order: VecDeque<u64>,
    /// Pushed with these lengths, not collected yet.
    pushed: Vec<(u64, u32)>,
    /// Guest addresses of the device's mappings.
    table: outboard_common::vhost_user::memory::GuestMemory,
}

impl World {
    fn new(size: u16, features: u64) -> Self {
        let ram = GuestRam::new(8 << 20).unwrap();
        let driver = GuestQueue::new(&ram, size, features).unwrap();
        let memory = ram.shared_memory().unwrap();
        let device = driver.device_side(&memory, driver.initial_base(), None).unwrap();
        let loaded = memory.load();
        let table =
            outboard_common::vhost_user::memory::GuestMemory::new(loaded.regions().to_vec(), None)
                .unwrap();
        Self {
            driver,
            device,
            next: 0,
            waiting: VecDeque::new(),
            held: Vec::new(),
            last_is_latest: false,
            order: VecDeque::new(),
            pushed: Vec::new(),
            table,
        }
    }

    fn in_order(&self) -> bool {
        self.driver.features() & IN_ORDER != 0
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Add(lens, readable, indirect) => self.add(lens, *readable, *indirect),
            Step::Pop(n) => (0..*n).for_each(|_| self.pop()),
            Step::Push(n, len) => self.push(*n, *len),
            Step::Unpop => self.unpop(),
            Step::Publish => self.device.publish(),
            Step::Collect => self.collect(),
        }
    }

    fn add(&mut self, lens: &[u32], readable: usize, indirect: bool) {
        let mut at = BUFFERS + (self.next % 512) * 4096;
        let mut buffers = Vec::new();
        for (i, &len) in lens.iter().enumerate() {
            buffers.push(Buffer { addr: at, len, writable: i >= readable });
            at += u64::from(len);
        }
        let indirect = indirect
            && self.driver.features() & INDIRECT_DESC != 0
            && buffers.len() <= usize::from(self.driver.size());
        let added = if indirect {
            self.driver.add_indirect(&buffers, self.next).unwrap()
        } else {
            self.driver.add(&buffers, self.next)
        };
        if added {
            self.waiting.push_back(Added { cookie: self.next, buffers });
            self.next += 1;
        }
    }

    /// The buffers of one direction as the device got them.
    fn got(&self, list: &outboard_common::ring::IoVecs, writable: bool) -> Vec<Buffer> {
        let buffer = |v: &libc::iovec| Buffer {
            addr: self.table.guest_addr_of(v.iov_base.cast()).expect("inside guest memory"),
            len: u32::try_from(v.iov_len).unwrap(),
            writable,
        };
        list.as_slice().iter().map(buffer).collect()
    }

    fn pop(&mut self) {
        let mut chain = Chain::new();
        let Some(expected) = self.waiting.pop_front() else {
            assert!(!self.device.has_available());
            assert!(!self.device.pop(&mut chain), "popped what was never added");
            return;
        };
        assert!(self.device.has_available());
        assert!(self.device.pop(&mut chain), "an added chain is not there");
        let mut got = self.got(&chain.readable, false);
        got.extend(self.got(&chain.writable, true));
        assert_eq!(got, joined(&expected.buffers));
        self.order.push_back(expected.cookie);
        self.held.push((chain, expected));
        self.last_is_latest = true;
    }

    fn push(&mut self, n: usize, len: u32) {
        if self.held.is_empty() {
            return;
        }
        let n = n % self.held.len();
        if n + 1 == self.held.len() {
            // What was popped last is completed: the one before it cannot go back any more.
            self.last_is_latest = false;
        }
        let (mut chain, added) = self.held.remove(n);
        self.device.push(&mut chain, len);
        self.pushed.push((added.cookie, len));
    }

    fn unpop(&mut self) {
        if !self.last_is_latest {
            return;
        }
        if let Some((mut chain, added)) = self.held.pop() {
            self.device.unpop(&mut chain);
            assert_eq!(self.order.pop_back(), Some(added.cookie));
            // The one before may go back too, if nothing between them was completed.
            // Chains are popped in the order of their cookies; one that was completed between the two
            // would leave a gap.
            self.last_is_latest =
                self.held.last().is_some_and(|(_, a)| a.cookie + 1 == added.cookie);
            self.waiting.push_front(added);
        }
    }

    fn collect(&mut self) {
        while let Some(used) = self.driver.used() {
            let at = self.pushed.iter().position(|&(c, _)| c == used.cookie);
            let (cookie, len) = self.pushed.remove(at.expect("used before it was pushed"));
            assert_eq!(used.len, len);
            if self.in_order() {
                assert_eq!(self.order.pop_front(), Some(cookie), "out of order");
            } else {
                self.order.retain(|&c| c != cookie);
            }
        }
    }

    /// Everything comes to its end.
    fn finish(mut self) {
        while !self.waiting.is_empty() {
            self.pop();
        }
        while !self.held.is_empty() {
            self.push(0, 1);
        }
        self.device.publish();
        self.collect();
        assert_eq!(self.driver.outstanding(), 0);
        assert_eq!(self.pushed, []);
        assert_eq!(self.device.retired(), None);
        assert_eq!(self.device.in_flight(), 0);
        assert_eq!(self.driver.free(), self.driver.size());
    }
}

/// Every combination of format and ring features, with sizes each format allows.
fn variants() -> impl Strategy<Value = (u16, u64)> {
    let split = proptest::sample::select(vec![1u16, 2, 8, 64])
        .prop_map(|size| (size, RingFormat::Split.features()));
    let packed = proptest::sample::select(vec![1u16, 2, 7, 8, 60])
        .prop_map(|size| (size, RingFormat::Packed.features()));
    let features = proptest::bits::u64::masked(EVENT_IDX | INDIRECT_DESC | IN_ORDER);
    (prop_oneof![split, packed], features).prop_map(|((size, format), f)| (size, format | f))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]
    #[test]
    fn every_chain_arrives_and_returns_once((size, features) in variants(), steps in steps()) {
        let mut world = World::new(size, features);
        for step in &steps {
            world.step(step);
        }
        world.finish();
    }
}

/// One side's step in the game of [`no_order_of_steps_loses_a_wake_up`].
struct Game {
    driver: GuestQueue,
    device: Queue,
    /// The device sleeps until kicked.
    device_asleep: bool,
    /// The driver sleeps until called.
    driver_asleep: bool,
    kicked: bool,
    /// The driver added and has not decided about the kick yet.
    owes_kick: bool,
    chain: Chain,
}

impl Game {
    fn called(&self) -> bool {
        let called = wait_readable(self.driver.call_fd(), Duration::ZERO).unwrap();
        if called {
            self.driver.call_fd().drain();
        }
        called
    }

    /// The driver: adds, decides about the kick, collects, or goes to sleep.
    fn driver_step(&mut self, add: bool) {
        if self.owes_kick {
            self.owes_kick = false;
            self.kicked |= self.driver.needs_kick();
            return;
        }
        if self.driver_asleep {
            if !self.called() {
                return;
            }
            self.driver_asleep = false;
        }
        if add {
            self.owes_kick = self.driver.add(&[Buffer::writable(BUFFERS, 64)], 0);
            return;
        }
        while self.driver.used().is_some() {}
        self.driver_asleep = !self.driver.enable_interrupts();
    }

    /// The device: works off the ring, then asks for kicks and maybe sleeps.
    fn device_step(&mut self, work: bool) {
        if self.device_asleep {
            if !std::mem::take(&mut self.kicked) {
                return;
            }
            self.device_asleep = false;
            self.device.disable_notifications();
        }
        if work {
            if self.device.pop(&mut self.chain) {
                self.device.push(&mut self.chain, 0);
                self.device.publish();
            }
            return;
        }
        if !self.device.has_available() {
            self.device_asleep = !self.device.enable_notifications();
        }
    }
}

/// All orders of so many steps of driver and device; after each, both run on until both sleep, and
/// then nothing may be left to do.
#[test]
fn no_order_of_steps_loses_a_wake_up() {
    for format in RingFormat::ALL {
        for event_idx in [0, EVENT_IDX] {
            let ram = GuestRam::new(8 << 20).unwrap();
            let driver = GuestQueue::new(&ram, 4, format.features() | event_idx).unwrap();
            let memory = ram.shared_memory().unwrap();
            let device = driver.device_side(&memory, driver.initial_base(), None).unwrap();
            let mut game = Game {
                driver,
                device,
                device_asleep: false,
                driver_asleep: false,
                kicked: false,
                owes_kick: false,
                chain: Chain::new(),
            };
            for order in 0u32..1 << 14 {
                for i in 0..7 {
                    let (who, what) = (order >> (2 * i) & 1, order >> (2 * i + 1) & 1);
                    if who == 0 { game.driver_step(what == 0) } else { game.device_step(what == 0) }
                }
                // Nothing more is added: both go on until they sleep.
                let mut quiet = 0;
                for _ in 0..40 {
                    game.driver_step(false);
                    game.device_step(game.device.has_available());
                    // Asleep all along: a pending signal would have woken one of them.
                    quiet = if game.device_asleep && game.driver_asleep { quiet + 1 } else { 0 };
                    if quiet == 3 {
                        break;
                    }
                }
                assert!(game.device_asleep && game.driver_asleep, "{format:?} {order:#x}");
                assert_eq!(game.driver.outstanding(), 0, "{format:?} {event_idx:#x} {order:#x}");
                // The next game starts with both awake.
                game.device_asleep = false;
                game.driver_asleep = false;
            }
        }
    }
}

/// Two real threads that sleep on their descriptors whenever the other side lets them.
#[test]
fn two_threads_never_wait_for_each_other() {
    for format in RingFormat::ALL {
        for event_idx in [0, EVENT_IDX] {
            let ram = GuestRam::new(8 << 20).unwrap();
            let mut driver = GuestQueue::new(&ram, 8, format.features() | event_idx).unwrap();
            let memory = ram.shared_memory().unwrap();
            let mut device = driver.device_side(&memory, driver.initial_base(), None).unwrap();
            const TOTAL: u64 = 10_000;
            let kick = driver.kick_fd().try_clone().unwrap();
            let worker = std::thread::spawn(move || {
                let mut chain = Chain::new();
                let mut done = 0;
                while done < TOTAL {
                    while device.pop(&mut chain) {
                        device.push(&mut chain, 0);
                        done += 1;
                        if done % 3 == 0 {
                            device.publish();
                        }
                    }
                    device.publish();
                    if done < TOTAL && !device.enable_notifications() {
                        let kicked = wait_readable(&kick, Duration::from_secs(10)).unwrap();
                        assert!(kicked, "the device was never kicked");
                        kick.drain();
                    }
                    device.disable_notifications();
                }
            });
            let (mut added, mut seen) = (0, 0);
            while seen < TOTAL {
                while added < TOTAL && driver.add(&[Buffer::writable(BUFFERS, 64)], added) {
                    added += 1;
                    if added % 5 == 0 {
                        driver.kick();
                    }
                }
                driver.kick();
                driver.wait(Duration::from_secs(10)).expect("the driver was never called");
                seen += 1;
                while driver.used().is_some() {
                    seen += 1;
                }
            }
            worker.join().unwrap();
        }
    }
}
