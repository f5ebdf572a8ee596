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
//! theirs waits only in bulk: for the pace's next look where the worker keeps one ([`super::pace`]) and has
//! signalled since the last, else for some more of them.

use std::time::{Duration, Instant};

use outboard_common::ring::Queue;

use super::pace::{PACE, next_signal};
use crate::control::Coalescing;

/// When a signal goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Rule {
    /// With the frames.
    #[default]
    AtOnce,
    /// Once for the frames of a turn, and no sooner than a look after the last one: the guest's
    /// acknowledgements ask for turns between two looks.
    EachLook,
    /// After so many frames, or so long after the first.
    Held(Coalescing),
}

/// What is done for a transmit queue of `size` entries where the driver says nothing: it can wait for as
/// long as a look takes, for TCP has a millisecond's worth of data under way.
pub(super) fn of_sent_frames(size: u16) -> Rule {
    let max_usecs = PACE.subsec_micros();
    Rule::Held(Coalescing { max_packets: u32::from(size / 4), max_usecs })
}

/// What is done for a receive queue in bulk that cannot be paced, where the driver says nothing: frames are
/// long then.
pub(super) const OF_BULK: Rule = Rule::Held(Coalescing { max_packets: 8, max_usecs: 30 });

/// One direction's signals.
#[derive(Debug, Default)]
pub(super) struct Moderation {
    rule: Rule,
    /// Frames used since the last signal.
    frames: u64,
    /// When the signal held back goes out at the latest.
    due: Option<Instant>,
    /// When the last one went out under [`Rule::EachLook`].
    last: Option<Instant>,
}

fn delays(rule: Coalescing) -> bool {
    rule.max_packets > 1 && rule.max_usecs > 0
}

impl Moderation {
    /// Follows the driver's `wish`, or `ours` if it has none.
    pub(super) fn set(&mut self, wish: Coalescing, ours: Rule, queue: &mut Queue) {
        let rule = if delays(wish) { Rule::Held(wish) } else { ours };
        if rule == self.rule {
            return;
        }
        self.rule = rule;
        queue.hold_signals(rule != Rule::AtOnce);
        self.release(queue);
    }

    /// After a turn in which `frames` were used.
    pub(super) fn after_turn(&mut self, queue: &mut Queue, frames: u64) {
        let rule = match self.rule {
            Rule::AtOnce => return,
            Rule::EachLook => None,
            Rule::Held(rule) => Some(rule),
        };
        queue.publish();
        self.frames += frames;
        if !queue.owes_signal() {
            self.due = None;
            return;
        }
        let now = Instant::now();
        let Some(rule) = rule else {
            self.due = Some(next_signal(self.last, now));
            return self.on_time(queue, now);
        };
        let due =
            *self.due.get_or_insert_with(|| now + Duration::from_micros(rule.max_usecs.into()));
        if self.frames >= u64::from(rule.max_packets) || due <= now {
            self.release(queue);
        }
    }

    /// The driver has to make room first, so it must hear of what is there.
    pub(super) fn out_of_buffers(&mut self, queue: &mut Queue) {
        if self.rule == OF_BULK || self.rule == Rule::EachLook {
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
            self.last = Some(now);
            self.release(queue);
        }
    }

    /// The queue stops: nothing is held back any more.
    pub(super) fn stop(&mut self, queue: &mut Queue) {
        queue.publish();
        queue.hold_signals(false);
        self.release(queue);
        self.rule = Rule::AtOnce;
    }

    /// Signals what was held back.
    fn release(&mut self, queue: &mut Queue) {
        self.frames = 0;
        self.due = None;
        queue.signal_now();
    }
}
