//! A queue's worker: chains from the ring through the server and back.
//!
//! # Theory of operation
//! Each queue has a worker of its own. It does what needs no waiting at once, on its own thread; the
//! rest goes to the [`SlowPool`] and comes back through the worker's [`Mailbox`]. A SETLKW whose lock
//! is taken goes to a thread of its own ([`LockThreads`]); if there are too many, it stays here and is
//! tried again by a timer, so that any number of waiting guests costs a few threads at most.
//!
//! Whether a name is in memory, or whether a write will be made to wait, the kernel does not tell beforehand.
//! So the worker learns: when batches take milliseconds and the thread waited in them, storage is slow at
//! present ([`Pace`]), and requests that may wait for it go to the slow threads until these were fast with a row of
//! them.
//!
//! Stopping a queue drains it: slow requests are waited for, waiting locks end with `EINTR`.
//!
//! Latencies are measured by the batch, with one look at the clock for each: whoever waits for a batch
//! has its answer when the batch is published.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use epoll::Events;
use outboard_common::metrics::{DeviceMetrics, Gauge, Histogram};
use outboard_common::ring::{Chain, Queue};
use outboard_common::worker::{Context, Progress, QueueHandler};

use crate::fuse::reply::Reply;
use crate::fuse::wire::InHeader;
use crate::fuse::{Extension, Outcome, Scratch, Server, Wait};
use crate::slow_pool::{Finished, LockThreads, Mailbox, SlowPool};
use crate::thread_waits;

/// Requests done in one go before other events get their turn.
const BUDGET: usize = 128;
/// Replies that may wait for the publication of a batch.
const PUBLISH_AFTER_REPLIES: usize = 16;
/// Bytes of replies that may wait for it.
const PUBLISH_AFTER_BYTES: u32 = 256 << 10;
/// How often a waiting lock is tried, at first and at last.
const LOCK_PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(16));

/// How long an empty ring is looked at before the worker sleeps, while guests are that fast: about what
/// sleeping and waking cost.
const LINGER: Duration = Duration::from_micros(3);

/// The high-priority queue. It carries FORGET and INTERRUPT, which have no replies.
const HIGH_PRIORITY: u16 = 0;
/// How long that queue is left alone while FORGETs come fast. At one for every microsecond they do not fill
/// a ring of 128, the smallest in use, and nobody can tell that an INTERRUPT was so much later.
const REST: Duration = Duration::from_micros(50);

/// A batch of requests done at once that took so long, a nanosecond for each byte moved taken off, may have
/// waited for storage.
const SLOW_BATCH: Duration = Duration::from_millis(2);
/// After one, so many batches are looked at for waits.
const WATCHED_BATCHES: u8 = 64;
/// A request that a slow thread did in this time need not have gone to it...
const FAST_REQUEST: Duration = Duration::from_micros(200);
/// ...and after so many in a row they no longer do.
const FAST_ROW: u8 = 16;

const TOKEN_MAILBOX: u64 = 1;

/// Between two interruptions of those who wait for locks, until all are back.
const INTERRUPT_AGAIN: Duration = Duration::from_millis(20);

/// Whether storage is slow at present.
#[derive(Debug, Default)]
struct Pace {
    slow: bool,
    /// Requests in a row that slow threads did fast.
    fast: u8,
    /// Batches to come whose waits are counted, since one took long.
    watched: u8,
}

impl Pace {
    /// Before a batch: how often the thread has waited, if that is to be known.
    #[inline]
    fn before_batch(&self) -> Option<i64> {
        (self.watched > 0).then(thread_waits::count)
    }

    /// A batch that moved `bytes` of data took `time` on the worker's thread, which had waited as often as
    /// [`Self::before_batch`] said, and now as `waits` says.
    #[inline]
    fn after_batch(
        &mut self,
        time: Duration,
        bytes: u64,
        before: Option<i64>,
        waits: impl FnOnce() -> i64,
    ) {
        self.watched = self.watched.saturating_sub(1);
        if time <= SLOW_BATCH || time - SLOW_BATCH <= Duration::from_nanos(bytes) {
            return;
        }
        match before {
            Some(before) if waits() > before => *self = Self { slow: true, ..Self::default() },
            // Another thread may have had the CPU meanwhile.
            _ => self.watched = WATCHED_BATCHES,
        }
    }

    /// A slow thread took `time` for a request.
    fn after_slow_thread(&mut self, time: Duration) {
        self.fast = if time <= FAST_REQUEST { self.fast.saturating_add(1) } else { 0 };
        self.slow &= self.fast < FAST_ROW;
    }
}

/// A SETLKW whose lock is taken, and that has no thread.
#[derive(Debug)]
struct Waiting {
    chain: Box<Chain>,
    queue: u16,
    unique: u64,
}

/// What is shown of one queue beyond its counters.
#[derive(Debug)]
pub struct Gauges {
    latency: Arc<Histogram>,
    in_flight: Arc<Gauge>,
}

impl Gauges {
    /// Those of queue `queue`, in a registry's `device`.
    #[must_use]
    pub fn new(device: &DeviceMetrics, queue: u16) -> Self {
        let help = "Time from taking a batch of requests to its answers; waiting locks apart.";
        let latency = device.latency("fs_request_seconds", help, Some(queue));
        let help = "Requests that are with slow threads or wait for a lock.";
        Self { latency, in_flight: device.gauge("fs_in_flight", help, Some(queue)) }
    }
}

/// The worker of a queue.
#[derive(Debug)]
pub struct FsWorker<F: Extension> {
    server: Arc<Server<F>>,
    pool: Arc<SlowPool<F>>,
    mailbox: Arc<Mailbox>,
    scratch: Scratch,
    chain: Box<Chain>,
    /// Chains that came back from the pool, to be used again.
    #[allow(clippy::vec_box, reason = "they travel in their boxes")]
    spare: Vec<Box<Chain>>,
    /// Working space for what comes out of the mailbox.
    finished: Vec<Finished>,
    /// Chains with the slow threads.
    away: usize,
    locks: Vec<Waiting>,
    lock_pause: Duration,
    lock_threads: Arc<LockThreads<F>>,
    /// The SETLKW requests that wait on threads.
    lock_waits: Vec<u64>,
    gauges: Gauges,
    /// Requests that this worker answered itself and that are in no latency yet.
    answered: u64,
    pace: Pace,
}

impl<F: Extension> FsWorker<F> {
    /// A worker that gives slow requests to `pool`, and waits for locks on `lock_threads`.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(
        server: Arc<Server<F>>,
        pool: Arc<SlowPool<F>>,
        lock_threads: Arc<LockThreads<F>>,
        gauges: Gauges,
    ) -> io::Result<Self> {
        Ok(Self {
            server,
            pool,
            mailbox: Arc::new(Mailbox::new()?),
            scratch: Scratch::default(),
            chain: Box::default(),
            spare: Vec::new(),
            finished: Vec::new(),
            away: 0,
            locks: Vec::new(),
            lock_pause: LOCK_PAUSE.0,
            lock_threads,
            lock_waits: Vec::new(),
            gauges,
            answered: 0,
            pace: Pace::default(),
        })
    }

    /// Does what `self.chain` asks for. Returns the bytes of reply that wait for publication, or
    /// `None` if the request went back into its ring because that is being stopped.
    #[inline]
    fn serve(&mut self, queue: &mut Queue) -> Option<u32> {
        let written = match self.server.handle(&mut self.chain, &mut self.scratch, Wait::Never) {
            Outcome::Done(written) => {
                queue.push(&mut self.chain, written);
                self.answered += 1;
                written
            }
            Outcome::Slow => self.hand_over(queue),
            Outcome::Postponed => {
                queue.unpop(&mut self.chain);
                return None;
            }
            outcome => {
                let chain = self.replace_chain();
                self.settle(chain, outcome, queue);
                0
            }
        };
        Some(written)
    }

    /// Puts a spare chain in the place of `self.chain` and returns that.
    fn replace_chain(&mut self) -> Box<Chain> {
        std::mem::replace(&mut self.chain, self.spare.pop().unwrap_or_default())
    }

    #[cold]
    fn hand_over(&mut self, queue: &mut Queue) -> u32 {
        let chain = self.replace_chain();
        match self.pool.submit(chain, queue.index(), &self.mailbox) {
            Ok(()) => {
                self.away += 1;
                0
            }
            Err(mut chain) => {
                let outcome = self.server.handle(&mut chain, &mut self.scratch, Wait::Allowed);
                self.settle(chain, outcome, queue)
            }
        }
    }

    /// Does with `chain` what its outcome says.
    fn settle(&mut self, mut chain: Box<Chain>, outcome: Outcome, queue: &mut Queue) -> u32 {
        let written = match outcome {
            Outcome::Done(written) => written,
            Outcome::Locked { unique } => {
                match self.lock_threads.submit(chain, (queue.index(), unique), &self.mailbox) {
                    Ok(()) => {
                        self.away += 1;
                        self.lock_waits.push(unique);
                    }
                    Err(chain) => self.try_again(Waiting { chain, queue: queue.index(), unique }),
                }
                return 0;
            }
            // Chains popped after it may be done already, so it cannot go back into the ring.
            Outcome::Postponed => interrupted(&mut chain),
            // A file system that cannot do without waiting even when it may wait is broken.
            Outcome::Rejected | Outcome::Slow => {
                queue.metrics().rejected.add(1);
                0
            }
        };
        queue.push(&mut chain, written);
        self.spare.push(chain);
        written
    }

    /// Keeps a lock request to be tried again soon.
    fn try_again(&mut self, waiting: Waiting) {
        self.lock_pause = LOCK_PAUSE.0;
        self.locks.push(waiting);
    }

    /// Counts the bytes of a batch, and takes note of how long it took.
    fn end_batch(&mut self, queue: &Queue, took: Duration, waits: Option<i64>) {
        let bytes = self.scratch.bytes_read.saturating_add(self.scratch.bytes_written);
        self.pace.after_batch(took, bytes, waits, thread_waits::count);
        self.count_bytes(queue);
    }

    fn count_bytes(&mut self, queue: &Queue) {
        let metrics = queue.metrics();
        metrics.bytes_read.add(std::mem::take(&mut self.scratch.bytes_read));
        metrics.bytes_written.add(std::mem::take(&mut self.scratch.bytes_written));
    }

    /// Gives back what the slow threads finished.
    fn collect(&mut self, cx: &mut Context) {
        let mut finished = std::mem::take(&mut self.finished);
        for done in finished.drain(..) {
            self.away -= 1;
            match done.lock {
                Some(unique) => self.lock_waits.retain(|one| *one != unique),
                None => self.pace.after_slow_thread(done.took),
            }
            // A queue is there as long as one of its chains is away.
            let Some(queue) = cx.queues.get(done.queue) else { continue };
            self.scratch.bytes_read += done.bytes_read;
            self.scratch.bytes_written += done.bytes_written;
            self.count_bytes(queue);
            match done.outcome {
                // From a file system that cannot wait for locks.
                Outcome::Locked { unique } => {
                    self.try_again(Waiting { chain: done.chain, queue: done.queue, unique });
                }
                outcome => {
                    self.settle(done.chain, outcome, queue);
                }
            }
            if done.lock.is_none() {
                self.gauges.latency.record_since(done.begun, 1);
            }
        }
        self.finished = finished;
        self.before_waiting(cx);
    }

    /// Counts the batch that began at `begun` and is to be published; gives the begin of the next.
    #[inline]
    fn count_batch(&mut self, begun: Instant) -> Instant {
        match std::mem::take(&mut self.answered) {
            0 => begun,
            answered => self.gauges.latency.record_since(begun, answered),
        }
    }

    /// Before the loop is left: shows what is not done yet, and has waiting locks tried again soon.
    fn before_waiting(&self, cx: &mut Context) {
        self.gauges.in_flight.set((self.away + self.locks.len()) as u64);
        if !self.locks.is_empty() {
            cx.set_timer(Some(Instant::now() + self.lock_pause));
        }
    }

    /// Ends the waiting locks of queue `index`: it stops.
    fn interrupt_locks(&mut self, index: u16, cx: &mut Context) {
        let (ending, staying) =
            std::mem::take(&mut self.locks).into_iter().partition(|w| w.queue == index);
        self.locks = staying;
        let ending: Vec<Waiting> = ending;
        for mut waiting in ending {
            self.server.lock_waits().forget(waiting.unique);
            let Some(queue) = cx.queues.get(index) else { continue };
            let written = interrupted(&mut waiting.chain);
            queue.push(&mut waiting.chain, written);
            self.spare.push(waiting.chain);
        }
    }

    /// Waits for everything that is with other threads; waits for locks are interrupted.
    fn drain(&mut self, cx: Option<&mut Context>) {
        let mut cx = cx;
        while self.away > 0 {
            for unique in &self.lock_waits {
                self.server.lock_waits().interrupt(*unique);
            }
            match self.lock_waits.is_empty() {
                true => self.mailbox.wait(&mut self.finished),
                false => self.mailbox.wait_for(&mut self.finished, INTERRUPT_AGAIN),
            }
            match &mut cx {
                Some(cx) => self.collect(cx),
                None => self.away -= self.finished.drain(..).count(),
            }
        }
    }
}

/// Ends the request in `chain`, none of which has been read yet, with `EINTR`.
fn interrupted(chain: &mut Chain) -> u32 {
    let unique = chain.readable.read_obj::<InHeader>().map_or(0, |h| h.unique);
    Reply::new(&mut chain.writable, unique).error(libc::EINTR)
}

impl<F: Extension> QueueHandler for FsWorker<F> {
    fn on_init(&mut self, cx: &mut Context) -> io::Result<()> {
        self.server.file_system().on_thread();
        cx.watch(self.mailbox.wake_fd(), Events::EPOLLIN, TOKEN_MAILBOX)
    }

    fn on_stop(&mut self, index: u16, cx: &mut Context) {
        self.drain(Some(cx));
        self.interrupt_locks(index, cx);
    }

    fn on_kick(&mut self, index: u16, cx: &mut Context) -> Progress {
        let Some(queue) = cx.queues.get(index) else { return Progress::Waiting };
        let start = Instant::now();
        let waits = self.pace.before_batch();
        // With DAX, such requests may need an answer of the VMM's, which only the worker can put off.
        self.scratch.storage_is_slow =
            self.pace.slow && self.server.file_system().dax_window() == 0;
        let (mut replies, mut bytes) = (0, 0);
        let mut begun = start;
        let mut progress = Progress::More;
        for _ in 0..BUDGET {
            if !queue.pop(&mut self.chain) {
                progress = Progress::Emptied;
                break;
            }
            let Some(written) = self.serve(queue) else { break };
            bytes += written;
            replies += 1;
            if replies >= PUBLISH_AFTER_REPLIES || bytes >= PUBLISH_AFTER_BYTES {
                queue.publish();
                begun = self.count_batch(begun);
                (replies, bytes) = (0, 0);
            }
        }
        let done = self.count_batch(begun);
        self.end_batch(queue, done.duration_since(start), waits);
        self.before_waiting(cx);
        progress
    }

    fn linger(&self, index: u16) -> Duration {
        if index == HIGH_PRIORITY { Duration::ZERO } else { LINGER }
    }

    fn rest(&self, index: u16) -> Duration {
        if index == HIGH_PRIORITY { REST } else { Duration::ZERO }
    }

    fn on_event(&mut self, token: u64, _events: Events, cx: &mut Context) {
        if token == TOKEN_MAILBOX {
            self.mailbox.take(&mut self.finished);
            self.collect(cx);
        }
    }

    fn on_timer(&mut self, cx: &mut Context) {
        let pause = (self.lock_pause * 2).min(LOCK_PAUSE.1);
        for waiting in std::mem::take(&mut self.locks) {
            let Waiting { mut chain, queue, .. } = waiting;
            let outcome = self.server.handle(&mut chain, &mut self.scratch, Wait::Never);
            let Some(queue) = cx.queues.get(queue) else { continue };
            self.settle(chain, outcome, queue);
        }
        self.lock_pause = pause;
        self.before_waiting(cx);
    }
}

impl<F: Extension> Drop for FsWorker<F> {
    fn drop(&mut self) {
        // Chains with slow threads point into memory that the queues keep mapped, and these go next.
        self.drain(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_is_slow_until_slow_threads_are_fast_in_a_row() {
        let (slow, fast) = (Duration::from_millis(3), Duration::from_micros(50));
        let mut pace = Pace::default();
        pace.after_batch(fast, 0, pace.before_batch(), || 0);
        // Three milliseconds are little for four megabytes.
        pace.after_batch(slow, 4 << 20, pace.before_batch(), || 0);
        assert_eq!(pace.before_batch(), None);
        // Long batches in which the thread did not wait: it had no CPU.
        pace.after_batch(slow, 4096, pace.before_batch(), || 7);
        assert!(pace.before_batch().is_some());
        pace.after_batch(slow, 4096, Some(7), || 7);
        assert!(!pace.slow);
        pace.after_batch(slow, 4096, Some(7), || 8);
        assert!(pace.slow);
        for _ in 0..FAST_ROW - 1 {
            pace.after_slow_thread(fast);
        }
        pace.after_slow_thread(slow);
        assert!(pace.slow);
        for _ in 0..FAST_ROW {
            assert!(pace.slow);
            pace.after_slow_thread(fast);
        }
        assert!(!pace.slow);
        // Suspicion ends.
        pace.after_batch(slow, 0, None, || 0);
        for _ in 0..WATCHED_BATCHES {
            assert!(pace.before_batch().is_some());
            pace.after_batch(fast, 0, Some(0), || 0);
        }
        assert_eq!(pace.before_batch(), None);
    }
}
