//! Fewer interrupts, at the driver's wish: VIRTIO_NET_F_NOTF_COAL. Virtio 1.3, 5.1.6.5.7.
//!
//! # Theory of operation
//! Used entries are shown as ever, so a driver that polls sees them at once. Only the signal is held
//! back: until so many frames are used, or until so long after the first of them, whichever is first. A
//! driver that set one of the two to zero wants no delay.

use std::time::{Duration, Instant};

use outboard_common::ring::Queue;

use crate::control::Coalescing;

/// One direction's signals.
#[derive(Debug, Default)]
pub(super) struct Moderation {
    wish: Coalescing,
    /// Frames used since the last signal.
    frames: u64,
    /// When the signal held back goes out at the latest.
    due: Option<Instant>,
}

impl Moderation {
    /// Follows the driver's wish.
    pub(super) fn set(&mut self, wish: Coalescing, queue: &mut Queue) {
        if wish == self.wish {
            return;
        }
        self.wish = wish;
        queue.hold_signals(self.is_on());
        self.release(queue);
    }

    fn is_on(&self) -> bool {
        self.wish.max_packets > 1 && self.wish.max_usecs > 0
    }

    /// After a turn in which `frames` were used.
    pub(super) fn after_turn(&mut self, queue: &mut Queue, frames: u64) {
        if !self.is_on() {
            return;
        }
        queue.publish();
        self.frames += frames;
        if !queue.owes_signal() {
            self.due = None;
            return;
        }
        let delay = Duration::from_micros(self.wish.max_usecs.into());
        if self.frames >= u64::from(self.wish.max_packets) {
            self.release(queue);
        } else if self.due.is_none() {
            self.due = Some(Instant::now() + delay);
        }
    }

    /// When it wants to be looked at again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Signals if the time has come.
    pub(super) fn on_time(&mut self, queue: &mut Queue, now: Instant) {
        if self.due.is_some_and(|due| due <= now) {
            self.release(queue);
        }
    }

    /// The queue stops: nothing is held back any more.
    pub(super) fn stop(&mut self, queue: &mut Queue) {
        queue.publish();
        queue.hold_signals(false);
        self.release(queue);
        self.wish = Coalescing::default();
    }

    /// Signals what was held back.
    fn release(&mut self, queue: &mut Queue) {
        self.frames = 0;
        self.due = None;
        queue.signal_now();
    }
}
