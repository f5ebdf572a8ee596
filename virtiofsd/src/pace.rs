//! Whether storage is slow at present, learnt from how long requests took. Pure.
//!
//! # Theory of operation
//! A batch that took long may have waited for storage, or for a CPU. What the thread did meanwhile tells
//! ([`Usage`]): one that was not preempted, and ran for less than the batch took, waited in it. What it did is
//! asked for once in a millisecond at the most, so before the batch it may have slept for its driver: of the
//! time that it did not run, what can have been before the batch is not counted.
//!
//! A thread that was preempted may have waited for a CPU all that time. Then the next batches are each looked
//! at by themselves, and one more that takes long and in which the thread gave its CPU up by itself is enough.
//!
//! To hand a request over and to take it back costs as much CPU time as a short wait for a fast disk. A worker
//! that has nothing else to do may wait itself, as long as that ends soon and nobody came meanwhile: that too
//! is learnt, and tried again now and then where it did not pay.

use std::time::{Duration, Instant};

use crate::thread_waits::Usage;

/// A batch of requests done at once that took so long, a nanosecond for each byte moved taken off, may have
/// waited for storage.
const SLOW_BATCH: Duration = Duration::from_millis(2);
/// What the thread did is asked for again after this time.
const ASK_AGAIN: Duration = Duration::from_millis(1);
/// After a batch that took long without a reason, so many are looked at each by itself.
const WATCHED_BATCHES: u8 = 64;
/// A request that a slow thread did in this time need not have gone to it...
const FAST_REQUEST: Duration = Duration::from_micros(200);
/// ...and after so many in a row they no longer do.
const FAST_ROW: u8 = 16;
/// A request that came while the worker waited was not held up for longer than this as a rule.
const BRIEF: Duration = Duration::from_micros(500);
/// Waits of the worker's own that went well are remembered up to this number, and that of those that did not
/// is taken off.
const MOST_CREDIT: u8 = 8;
/// Without credit, one request in so many is waited for.
const PROBE: u8 = 32;

/// Whether storage is slow at present.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    slow: bool,
    /// Requests in a row that slow threads did fast.
    fast: u8,
    /// The last request of a slow thread was brief.
    brief: bool,
    /// What the worker's own waits are worth, and requests that it let pass since it has none.
    credit: u8,
    passed: u8,
    /// Batches to come that are looked at each by itself, since one took long.
    watched: u8,
    /// When a batch begins, and what the thread had done a little before, at that time.
    batch: Option<Instant>,
    asked: Option<(Instant, Usage)>,
}

impl Pace {
    /// Whether requests that may wait for storage have to be expected to.
    #[inline]
    pub(crate) fn is_slow(&self) -> bool {
        self.slow
    }

    /// A batch begins at `start`; `usage` tells what the thread has done.
    #[inline]
    pub(crate) fn before_batch(&mut self, start: Instant, usage: impl FnOnce() -> Usage) {
        self.batch = Some(start);
        let old = |(at, _)| start.saturating_duration_since(at) >= ASK_AGAIN;
        if self.watched > 0 || self.asked.is_none_or(old) {
            self.asked = Some((start, usage()));
        }
    }

    /// The batch, which moved `bytes` of data, was over at `end`; `usage` tells what the thread has done.
    #[inline]
    pub(crate) fn after_batch(&mut self, end: Instant, bytes: u64, usage: impl FnOnce() -> Usage) {
        self.watched = self.watched.saturating_sub(1);
        let took = self.batch.map_or(Duration::ZERO, |start| end.saturating_duration_since(start));
        let allowed = SLOW_BATCH + Duration::from_nanos(bytes);
        if took > allowed {
            self.took_long(end, took, allowed, usage());
        }
    }

    #[cold]
    fn took_long(&mut self, end: Instant, took: Duration, allowed: Duration, now: Usage) {
        let Some((at, before)) = self.asked else { return };
        let waits = now.waits > before.waits;
        let preempted = now.preemptions > before.preemptions;
        // Asked as the batch began, it is all the batch's.
        let known = self.batch == Some(at);
        let past = end.saturating_duration_since(at);
        let idle = past.saturating_sub(now.ran.saturating_sub(before.ran));
        let idle_before = past.saturating_sub(took);
        let waited = !preempted && idle.saturating_sub(idle_before) > allowed;
        if waits && (waited || (known && self.watched > 0)) {
            *self = Self { slow: true, ..Self::default() };
        } else {
            self.watched = WATCHED_BATCHES;
        }
        // Old by now, however short the time before the next batch.
        self.asked = None;
    }

    /// A slow thread took `time` for a request.
    pub(crate) fn after_slow_thread(&mut self, time: Duration) {
        self.brief = time <= BRIEF;
        self.fast = if time <= FAST_REQUEST { self.fast.saturating_add(1) } else { 0 };
        self.slow &= self.fast < FAST_ROW;
    }

    /// Whether the worker, with nothing else to do, shall wait itself for the request that it has.
    pub(crate) fn may_wait(&mut self) -> bool {
        if self.slow || !self.brief {
            return false;
        }
        self.passed = if self.credit > 0 { 0 } else { (self.passed + 1) % PROBE };
        self.passed == 0
    }

    /// The worker did; it took `time`, and meanwhile others `came`.
    pub(crate) fn after_own_wait(&mut self, time: Duration, came: bool) {
        self.credit = match time <= BRIEF && !came {
            true => (self.credit + 1).min(MOST_CREDIT),
            false => self.credit.saturating_sub(2),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A thread and its clock.
    struct Thread {
        now: Instant,
        usage: Usage,
        pace: Pace,
        asked: u32,
    }

    impl Thread {
        fn new() -> Self {
            let (usage, pace) = (Usage::default(), Pace::default());
            Self { now: Instant::now(), usage, pace, asked: 0 }
        }

        fn runs(&mut self, time: Duration) {
            self.now += time;
            self.usage.ran += time;
        }

        fn waits(&mut self, time: Duration) {
            self.now += time;
            self.usage.waits += 1;
        }

        fn is_preempted(&mut self, time: Duration) {
            self.now += time;
            self.usage.preemptions += 1;
        }

        fn batch(&mut self, bytes: u64, does: impl FnOnce(&mut Self)) -> bool {
            let mut asked = 0;
            let mut ask = |usage| {
                asked += 1;
                usage
            };
            let usage = self.usage;
            self.pace.before_batch(self.now, || ask(usage));
            does(self);
            let usage = self.usage;
            self.pace.after_batch(self.now, bytes, || ask(usage));
            self.asked += asked;
            self.pace.is_slow()
        }
    }

    #[test]
    fn one_batch_that_waited_is_enough() {
        let mut thread = Thread::new();
        assert!(thread.batch(4096, |t| t.waits(3 * MS)));
        // Also when the thread had slept before, shortly after it was asked.
        let mut thread = Thread::new();
        thread.batch(0, |t| t.runs(MS / 10));
        thread.waits(MS / 2);
        assert!(thread.batch(0, |t| t.waits(3 * MS)));
        assert_eq!(thread.asked, 2);
    }

    #[test]
    fn work_is_not_waiting_and_costs_few_questions() {
        let mut thread = Thread::new();
        // Three milliseconds are little for four megabytes, whatever the thread did.
        assert!(!thread.batch(4 << 20, |t| t.waits(3 * MS)));
        thread.waits(10 * MS);
        // It slept for its driver and then worked for long.
        thread.batch(0, |t| t.runs(MS / 10));
        thread.waits(MS / 2);
        assert!(!thread.batch(0, |t| t.runs(3 * MS)));
        let mut thread = Thread::new();
        for _ in 0..10_000 {
            assert!(!thread.batch(0, |t| t.runs(MS / 100)));
        }
        assert!(thread.asked <= 101, "asked {} times in 100 ms", thread.asked);
    }

    #[test]
    fn where_threads_are_preempted_a_second_batch_decides() {
        let mut thread = Thread::new();
        assert!(!thread.batch(0, |t| t.is_preempted(30 * MS)));
        assert!(!thread.batch(0, |t| t.is_preempted(30 * MS)));
        // A wait among preemptions, after one that raised the suspicion.
        assert!(thread.batch(0, |t| {
            t.is_preempted(2 * MS);
            t.waits(2 * MS);
        }));
        // Suspicion ends.
        let mut thread = Thread::new();
        thread.batch(0, |t| t.is_preempted(30 * MS));
        for _ in 0..WATCHED_BATCHES {
            thread.batch(0, |t| t.runs(MS / 1000));
        }
        assert!(!thread.batch(0, |t| {
            t.is_preempted(2 * MS);
            t.waits(2 * MS);
        }));
    }

    #[test]
    fn the_worker_waits_where_that_is_brief_and_nobody_minds() {
        let mut pace = Pace::default();
        let waits = |pace: &mut Pace, n| (0..n).filter(|_| pace.may_wait()).count();
        // Nothing is known of the storage, or it takes long.
        assert_eq!(waits(&mut pace, 100), 0);
        pace.after_slow_thread(MS);
        assert_eq!(waits(&mut pace, 100), 0);
        // It is tried now and then, and done while it goes well.
        pace.after_slow_thread(MS / 10);
        assert_eq!(waits(&mut pace, 320), 10);
        (0..100).for_each(|_| pace.after_own_wait(MS / 10, false));
        assert_eq!(waits(&mut pace, 100), 100);
        // Others came meanwhile, or it took long: some of these in a row are enough.
        for (time, came) in [(MS / 10, true), (MS, false)] {
            (0..4).for_each(|_| pace.after_own_wait(time, came));
            assert_eq!(waits(&mut pace, 320), 10);
            (0..100).for_each(|_| pace.after_own_wait(MS / 10, false));
        }
        pace.slow = true;
        assert_eq!(waits(&mut pace, 100), 0);
    }

    #[test]
    fn storage_is_slow_until_slow_threads_are_fast_in_a_row() {
        let mut thread = Thread::new();
        thread.batch(0, |t| t.waits(3 * MS));
        for _ in 0..FAST_ROW - 1 {
            thread.pace.after_slow_thread(MS / 20);
        }
        thread.pace.after_slow_thread(3 * MS);
        assert!(thread.pace.is_slow());
        for _ in 0..FAST_ROW {
            assert!(thread.pace.is_slow());
            thread.pace.after_slow_thread(MS / 20);
        }
        assert!(!thread.pace.is_slow());
    }
}
