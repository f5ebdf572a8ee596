//! In bulk, a worker looks at its rings and its back end now and then, and waits for neither. Pure.
//!
//! # Theory of operation
//! Each waking costs, whoever is woken: the worker by a kick or by the back end, the guest by a signal, and
//! most of all where the other side has just gone to sleep on another processor. With 1 Gbit/s or more under
//! way each of them happens thousands of times a second. So the worker keeps a pace then: kicks and the back
//! end's events are off, both are looked at every [`PACE`], and a look's frames are one signal. First come
//! the guest's frames, then the host's: what the host's TCP answers, or sends because the guest's
//! acknowledgements let it, goes with the same look. So a round trip is longer by one look at the most.
//!
//! A guest that mostly receives kicks as ever: its acknowledgements are few, and the host's TCP may have sent
//! all that it may until they come. With them the back end is looked at, before its time, and what that finds is
//! shown at once; the signal, where the guest sleeps and needs one, is [`next_signal`]'s.
//!
//! Below that rate, or where a ring would fill up between two looks ([`is_roomy`]), nothing is delayed.

use std::time::{Duration, Instant};

/// Time from look to look. The kernel adds up to 50 us of its own.
pub(super) const PACE: Duration = Duration::from_micros(100);
/// What is due so soon after a waking is done with it.
pub(super) const NEAR: Duration = Duration::from_micros(50);
/// Entries: so many frames of 1500 bytes in two hundred microseconds are 15 Gbit/s.
const LEAST_RING: u16 = 256;

/// Whether a ring of `size` entries takes what comes between two looks.
pub(super) fn is_roomy(size: u16) -> bool {
    size >= LEAST_RING
}

/// When the guest is told of received frames, having been told at `last`: its acknowledgements ask for looks
/// before their time, and it is told once a look all the same.
pub(super) fn next_signal(last: Option<Instant>, now: Instant) -> Instant {
    last.map_or(now, |last| now.max(last + PACE))
}

/// Whether so much is moved one way that news of it may wait.
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
    fn a_guest_is_told_once_a_look() {
        let (mut now, mut last, mut told) = (Instant::now(), None, 0);
        let end = now + 20 * PACE;
        while now < end {
            if next_signal(last, now) <= now {
                last = Some(now);
                told += 1;
            }
            now += PACE / 8;
        }
        assert_eq!(told, 20);
        // Nothing is held back after a pause.
        assert_eq!(next_signal(last, end + PACE), end + PACE);
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
