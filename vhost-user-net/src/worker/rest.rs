//! When to sleep on frames: a flood is read now and then, not frame by frame. Pure.
//!
//! # Theory of operation
//! A worker that is woken by each frame that finds the back end empty wakes for two or three frames of a
//! flood, and waking costs more than reading them. So while frames come fast, the worker does not wait
//! for the next one but for a short while, and then reads what has gathered. It adds that while to the
//! time a frame takes, at rates at which nobody can tell; below them, and when the flood ends, every
//! frame wakes the worker as ever.

use std::time::{Duration, Instant};

use super::pace::PACE;

/// How long to rest. At a million frames a second about one batch gathers.
pub(super) const REST: Duration = Duration::from_micros(30);
/// The rate is looked at over this time,
const WINDOW: Duration = Duration::from_micros(200);
/// and is high with so many frames in it: 200,000 a second.
const WINDOW_FRAMES: u64 = 40;
/// Frames after a rest with which it goes on: a little less than that rate.
const REST_FRAMES: u64 = 4;

/// The rate of one queue, and what follows from it.
#[derive(Debug)]
pub(super) struct Rest {
    resting: bool,
    since: Instant,
    frames: u64,
}

impl Rest {
    /// Nothing has been seen yet.
    pub(super) fn new(now: Instant) -> Self {
        Self { resting: false, since: now, frames: 0 }
    }

    /// Whether the last advice was to rest.
    pub(super) fn is_on(&self) -> bool {
        self.resting
    }

    /// The back end was read until it was empty, with so many frames since the last time. Gives until when
    /// to rest; `None`: be woken by the next frame. `paced`: bytes come fast, see [`super::pace`].
    pub(super) fn emptied(&mut self, frames: u64, paced: bool, now: Instant) -> Option<Instant> {
        if paced {
            (self.resting, self.since, self.frames) = (true, now, 0);
            return Some(now + PACE);
        }
        self.frames += frames;
        let past = now.saturating_duration_since(self.since);
        if self.resting {
            self.resting = frames >= REST_FRAMES;
        } else if past >= WINDOW {
            // A longer time without looking was one without frames.
            let enough = u128::from(WINDOW_FRAMES) * past.as_nanos() / WINDOW.as_nanos();
            self.resting = u128::from(self.frames) >= enough;
        }
        if past >= WINDOW || self.resting {
            self.since = now;
            self.frames = 0;
        }
        self.resting.then(|| now + REST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `frames` every `gap` until the advice is to rest, at most 1,000 times.
    fn rests(frames: u64, gap: Duration) -> bool {
        let mut now = Instant::now();
        let mut rest = Rest::new(now);
        (0..1000).any(|_| {
            now += gap;
            rest.emptied(frames, false, now).is_some()
        })
    }

    #[test]
    fn only_a_flood_is_rested_on() {
        assert!(rests(2, Duration::from_micros(3)));
        assert!(rests(32, Duration::from_micros(100)));
        // 100,000 a second; large frames of a fast connection; one burst a millisecond.
        assert!(!rests(1, Duration::from_micros(10)));
        assert!(!rests(2, Duration::from_micros(60)));
        assert!(!rests(64, Duration::from_millis(1)));
    }

    #[test]
    fn it_ends_with_the_flood() {
        let mut now = Instant::now();
        let mut rest = Rest::new(now);
        now += WINDOW;
        assert_eq!(rest.emptied(100, false, now), Some(now + REST));
        for _ in 0..100 {
            now += REST;
            assert_eq!(rest.emptied(REST_FRAMES, false, now), Some(now + REST));
        }
        assert!(rest.emptied(REST_FRAMES - 1, false, now + REST).is_none() && !rest.is_on());
    }

    #[test]
    fn a_pace_is_kept_whatever_comes_and_left_with_it() {
        let now = Instant::now();
        let mut rest = Rest::new(now);
        for frames in [0, 1, 100] {
            assert_eq!(rest.emptied(frames, true, now), Some(now + PACE));
            assert!(rest.is_on());
        }
        assert!(rest.emptied(1, false, now + PACE).is_none() && !rest.is_on());
    }
}
