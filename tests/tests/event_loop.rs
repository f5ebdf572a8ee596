//! The epoll loop: queues that are refilled while they are emptied take turns.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use outboard_common::ring::{Call, Chain, QueueSetup};
use outboard_common::worker::{
    Command, Context, ControlHandle, EventLoop, Progress, QueueHandler, WorkerOptions,
};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::memory::GuestRam;

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

#[test]
fn queues_that_are_refilled_all_the_time_take_turns() {
    for format in RingFormat::ALL {
        let ram = GuestRam::new(1 << 20).unwrap();
        let memory = ram.shared_memory().unwrap();
        let at = ram.alloc(64, 64).unwrap();
        let drivers = [0, 1].map(|_| GuestQueue::new(&ram, 64, format.features()).unwrap());
        let queues = [0u16, 1].map(|index| {
            let driver = &drivers[usize::from(index)];
            let setup = QueueSetup {
                index,
                size: 64,
                features: format.features(),
                addresses: driver.addresses(),
                base: driver.initial_base(),
                kick: Some(Arc::new(driver.kick_fd().try_clone().unwrap())),
                call: Call::Fd(Arc::new(driver.call_fd().try_clone().unwrap())),
                err: None,
                inflight: None,
                memory: memory.clone(),
                metrics: Arc::default(),
            };
            Command::Start(Box::new(setup.start().unwrap()))
        });
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
