//! The epoll loop: queues that are refilled while they are emptied take turns, and a queue that may rest is
//! served without kicks and never forgotten.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use outboard_common::ring::{Call, Chain, QueueSetup};
use outboard_common::worker::{
    Command, Context, ControlHandle, EventLoop, Progress, QueueHandler, WorkerOptions,
};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::memory::GuestRam;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

const LONG: Duration = Duration::from_secs(10);
/// A loop that let one queue keep it would give all of these to that one.
const TURNS: u64 = 10_000;

/// Empties a queue, and is its driver too: one that has refilled it by then, every time.
struct Refilled {
    drivers: [GuestQueue; 2],
    at: u64,
    started: [bool; 2],
    turns: [u64; 2],
    /// Turns that one queue had more than the other, at the most.
    lead: u64,
    tell: Sender<u64>,
}

impl QueueHandler for Refilled {
    fn on_start(&mut self, index: u16, _: &mut Context) {
        self.started[usize::from(index)] = true;
        self.turns = [0; 2];
    }

    fn on_kick(&mut self, index: u16, cx: &mut Context) -> Progress {
        let at = usize::from(index);
        let queue = cx.queues.get(index).unwrap();
        let mut chain = Chain::new();
        while queue.pop(&mut chain) {
            queue.push(&mut chain, 0);
        }
        queue.publish();
        if self.turns[at] < TURNS {
            let driver = &mut self.drivers[at];
            while driver.used().is_some() {}
            assert!(driver.add(&[Buffer::readable(self.at, 64)], 0));
        }
        self.turns[at] += 1;
        if self.started == [true; 2] && self.turns.iter().all(|&turns| turns <= TURNS) {
            self.lead = self.lead.max(self.turns[0].abs_diff(self.turns[1]));
        }
        if self.turns.iter().all(|&turns| turns >= TURNS) {
            // The test may have its answer already.
            let _ = self.tell.send(self.lead);
        }
        Progress::Emptied
    }
}

/// Has queue `index`, which `driver` fills, started.
fn start(index: u16, driver: &GuestQueue, ram: &GuestRam, features: u64) -> Command {
    let setup = QueueSetup {
        index,
        size: 64,
        features,
        addresses: driver.addresses(),
        base: driver.initial_base(),
        kick: Some(Arc::new(driver.kick_fd().try_clone().unwrap())),
        call: Call::Fd(Arc::new(driver.call_fd().try_clone().unwrap())),
        err: None,
        inflight: None,
        memory: ram.shared_memory().unwrap(),
        metrics: Arc::default(),
    };
    Command::Start(Box::new(setup.start().unwrap()))
}

#[test]
fn queues_that_are_refilled_all_the_time_take_turns() {
    for format in RingFormat::ALL {
        let ram = GuestRam::new(1 << 20).unwrap();
        let at = ram.alloc(64, 64).unwrap();
        let drivers = [0, 1].map(|_| GuestQueue::new(&ram, 64, format.features()).unwrap());
        let queues = [0u16, 1]
            .map(|index| start(index, &drivers[usize::from(index)], &ram, format.features()));
        let (tell, told) = channel();
        let handler = Refilled { drivers, at, started: [false; 2], turns: [0; 2], lead: 0, tell };
        let (control, worker_end) = ControlHandle::new(WorkerOptions::default()).unwrap();
        queues.into_iter().for_each(|start| control.send(start));
        let thread = std::thread::spawn(move || EventLoop::new(handler).unwrap().run(worker_end));
        let lead = told.recv_timeout(LONG).unwrap();
        assert!(lead <= 1, "{format:?}: one queue was {lead} turns ahead");
        drop(control);
        thread.join().unwrap();
    }
}

/// Empties a queue, which rests then.
struct Resting {
    rest: Duration,
    turns: Arc<AtomicU64>,
}

impl QueueHandler for Resting {
    fn on_kick(&mut self, index: u16, cx: &mut Context) -> Progress {
        let queue = cx.queues.get(index).unwrap();
        let mut chain = Chain::new();
        while queue.pop(&mut chain) {
            queue.push(&mut chain, 0);
        }
        self.turns.fetch_add(1, Ordering::Relaxed);
        Progress::Emptied
    }

    fn rest(&self, _: u16) -> Duration {
        self.rest
    }
}

/// Runs `scene` with a queue of each format that may rest for `rest`, its driver, where a chain's buffer is, and how
/// often the worker looked.
fn resting(rest: Duration, scene: impl Fn(&mut GuestQueue, Buffer, &AtomicU64)) {
    let formats = RingFormat::ALL
        .map(|format| [0, 1 << VIRTIO_RING_F_EVENT_IDX].map(|more| format.features() | more));
    for features in formats.concat() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let buffer = Buffer::readable(ram.alloc(64, 64).unwrap(), 64);
        let mut driver = GuestQueue::new(&ram, 64, features).unwrap();
        let turns = Arc::<AtomicU64>::default();
        let handler = Resting { rest, turns: turns.clone() };
        let (control, worker_end) = ControlHandle::new(WorkerOptions::default()).unwrap();
        control.send(start(0, &driver, &ram, features));
        let thread = std::thread::spawn(move || EventLoop::new(handler).unwrap().run(worker_end));
        scene(&mut driver, buffer, &turns);
        drop(control);
        thread.join().unwrap();
    }
}

#[test]
fn chains_that_nobody_waits_for_need_few_kicks_and_few_looks() {
    const CHAINS: u64 = 600;
    let rest = Duration::from_millis(5);
    resting(rest, |driver, buffer, turns| {
        let (mut kicks, mut done) = (0, 0);
        for n in 0..CHAINS {
            while !driver.add(&[buffer], n) {
                driver.poll_used(LONG).unwrap();
                done += 1;
            }
            kicks += u64::from(driver.kick());
            std::thread::sleep(Duration::from_micros(100));
        }
        while done < CHAINS {
            driver.poll_used(LONG).unwrap();
            done += 1;
        }
        let looks = turns.load(Ordering::Relaxed);
        assert!(kicks < CHAINS / 3 && looks < CHAINS / 2, "{kicks} kicks, {looks} looks");
        // A worker at rest wakes no more, and is woken by a kick.
        let deadline = Instant::now() + LONG;
        let mut before = u64::MAX;
        while std::mem::replace(&mut before, turns.load(Ordering::Relaxed)) != before {
            assert!(Instant::now() < deadline, "an empty queue is looked at for ever");
            std::thread::sleep(rest * 10);
        }
        assert!(driver.add(&[buffer], 0) && driver.kick(), "no kick is asked for");
        driver.poll_used(LONG).unwrap();
    });
}

#[test]
fn no_chain_is_forgotten_at_the_end_of_a_rest() {
    let rest = Duration::from_micros(20);
    resting(rest, |driver, buffer, _| {
        for n in 0..5000 {
            assert!(driver.add(&[buffer], n));
            driver.kick();
            // Now and then nobody waits, so that resting pays; the gaps pass by the end of a rest.
            let gap = Instant::now() + Duration::from_nanos(n * 37 % 60_000);
            while Instant::now() < gap {
                std::hint::spin_loop();
            }
            if n % 3 == 2 {
                for _ in 0..3 {
                    driver.poll_used(LONG).unwrap();
                }
            }
        }
    });
}
