//! Fewer interrupts: at the driver's wish (VIRTIO_NET_F_NOTF_COAL, virtio 1.3, 5.1.6.5.7), and for sent
//! frames of our own accord.
//!
//! # Theory of operation
//! Used entries are shown as ever, so a driver that polls sees them at once. Only the signal is held
//! back: until so many frames are used, or until so long after the first of them, whichever is first.
//!
//! An interrupt is dear, a quarter of the daemon's time in a guest's bulk transfer. A sender's says no more
//! than that memory may be used again. So it is delayed a little even where the driver said nothing: not
//! beyond a quarter of the ring, so that a full ring never waits for it. Received frames are news, and
//! theirs waits for some more of them only while a guest receives in bulk.

use std::time::{Duration, Instant};

use outboard_common::ring::Queue;

use crate::control::Coalescing;

/// What a driver can wait for its sent frames' interrupt, microseconds. TCP has a millisecond's worth
/// of data under way.
const TX_USECS: u32 = 100;

/// What is done for a transmit queue of `size` entries where the driver says nothing.
pub(super) fn of_sent_frames(size: u16) -> Coalescing {
    Coalescing { max_packets: u32::from(size / 4), max_usecs: TX_USECS }
}

/// Whether so much is received that interrupts may wait.
#[derive(Debug)]
pub(super) struct Bulk {
    since: Instant,
    bytes: u64,
    on: bool,
}

/// The rate is looked at over this time,
const BULK_WINDOW: Duration = Duration::from_millis(1);
/// and is high with so many bytes in it: 1 Gbit/s.
const BULK_BYTES: u64 = 125_000;

impl Bulk {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, bytes: 0, on: false }
    }

    /// So many bytes came just now.
    pub(super) fn add(&mut self, bytes: u64, now: Instant) {
        self.bytes += bytes;
        let past = now.saturating_duration_since(self.since);
        if past >= BULK_WINDOW {
            let enough = u128::from(BULK_BYTES) * past.as_nanos() / BULK_WINDOW.as_nanos();
            self.on = u128::from(self.bytes) >= enough;
            self.since = now;
            self.bytes = 0;
        }
    }

    /// Whether it is so; not for longer than a moment after the last bytes.
    pub(super) fn is_on(&self, now: Instant) -> bool {
        self.on && now.saturating_duration_since(self.since) < 2 * BULK_WINDOW
    }
}

/// What is done for a receive queue in bulk, where the driver says nothing: frames are long then.
pub(super) const OF_BULK: Coalescing = Coalescing { max_packets: 8, max_usecs: 30 };

/// One direction's signals.
#[derive(Debug, Default)]
pub(super) struct Moderation {
    rule: Coalescing,
    /// Frames used since the last signal.
    frames: u64,
    /// When the signal held back goes out at the latest.
    due: Option<Instant>,
}

fn delays(rule: Coalescing) -> bool {
    rule.max_packets > 1 && rule.max_usecs > 0
}

impl Moderation {
    /// Follows the driver's `wish`, or `ours` if it has none.
    pub(super) fn set(&mut self, wish: Coalescing, ours: Coalescing, queue: &mut Queue) {
        let rule = if delays(wish) { wish } else { ours };
        if rule == self.rule {
            return;
        }
        self.rule = rule;
        queue.hold_signals(delays(rule));
        self.release(queue);
    }

    /// After a turn in which `frames` were used.
    pub(super) fn after_turn(&mut self, queue: &mut Queue, frames: u64) {
        if !delays(self.rule) {
            return;
        }
        queue.publish();
        self.frames += frames;
        if !queue.owes_signal() {
            self.due = None;
            return;
        }
        let now = Instant::now();
        let due = *self
            .due
            .get_or_insert_with(|| now + Duration::from_micros(self.rule.max_usecs.into()));
        if self.frames >= u64::from(self.rule.max_packets) || due <= now {
            self.release(queue);
        }
    }

    /// The driver has to make room first, so it must hear of what is there.
    pub(super) fn out_of_buffers(&mut self, queue: &mut Queue) {
        if self.rule == OF_BULK {
            self.release(queue);
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
        self.rule = Coalescing::default();
    }

    /// Signals what was held back.
    fn release(&mut self, queue: &mut Queue) {
        self.frames = 0;
        self.due = None;
        queue.signal_now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds `bytes` every `gap` for a while; whether that is bulk.
    fn is_bulk(bytes: u64, gap: Duration) -> bool {
        let mut now = Instant::now();
        let mut bulk = Bulk::new(now);
        for _ in 0..1000 {
            now += gap;
            bulk.add(bytes, now);
        }
        bulk.is_on(now)
    }

    #[test]
    fn bulk_is_a_gigabit_a_second() {
        assert!(is_bulk(64_000, Duration::from_micros(500)));
        assert!(is_bulk(1514, Duration::from_micros(12)));
        assert!(!is_bulk(64_000, Duration::from_micros(600)));
        assert!(!is_bulk(1514, Duration::from_micros(13)));
        // A request and its answer now and then.
        assert!(!is_bulk(64_000, Duration::from_millis(5)));
    }

    #[test]
    fn bulk_ends_with_the_bytes() {
        let mut now = Instant::now();
        let mut bulk = Bulk::new(now);
        now += BULK_WINDOW;
        bulk.add(2 * BULK_BYTES, now);
        assert!(bulk.is_on(now));
        assert!(!bulk.is_on(now + 2 * BULK_WINDOW));
    }
}
