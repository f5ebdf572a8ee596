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
//! A worker that has nothing else to do waits for a fast disk itself, if that is over soon as a rule
//! ([`Wait::Briefly`]).
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
use crate::pace::Pace;
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

const TOKEN_MAILBOX: u64 = 1;

/// Between two interruptions of those who wait for locks, until all are back.
const INTERRUPT_AGAIN: Duration = Duration::from_millis(20);

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
            Outcome::Slow => return self.serve_slow(queue),
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

    /// Does what `self.chain` asks for, which takes waiting: itself, if it has nothing else to do and that
    /// is brief, or on a slow thread.
    #[cold]
    fn serve_slow(&mut self, queue: &mut Queue) -> Option<u32> {
        if self.away > 0 || queue.has_available() || !self.pace.may_wait() {
            return Some(self.hand_over(queue));
        }
        queue.publish();
        let start = Instant::now();
        match self.server.handle(&mut self.chain, &mut self.scratch, Wait::Briefly) {
            Outcome::Done(written) => {
                self.pace.after_own_wait(start.elapsed(), queue.has_available());
                queue.push(&mut self.chain, written);
                self.answered += 1;
                Some(written)
            }
            Outcome::Postponed => {
                queue.unpop(&mut self.chain);
                None
            }
            _ => Some(self.hand_over(queue)),
        }
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

    /// Counts the bytes of a batch, and takes note of when it ended.
    fn end_batch(&mut self, queue: &Queue, end: Instant) {
        let bytes = self.scratch.bytes_read.saturating_add(self.scratch.bytes_written);
        self.pace.after_batch(end, bytes, thread_waits::usage);
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
                Some(unique) => {
                    if let Some(at) = self.lock_waits.iter().position(|one| *one == unique) {
                        self.lock_waits.swap_remove(at);
                    }
                }
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
        self.pace.before_batch(start, thread_waits::usage);
        // With DAX, such requests may need an answer of the VMM's, which only the worker can put off.
        self.scratch.storage_is_slow =
            self.pace.is_slow() && self.server.file_system().dax_window() == 0;
        let (mut replies, mut bytes) = (0, 0_u32);
        let mut begun = start;
        let mut progress = Progress::More;
        for _ in 0..BUDGET {
            if !queue.pop(&mut self.chain) {
                progress = Progress::Emptied;
                break;
            }
            let Some(written) = self.serve(queue) else { break };
            bytes = bytes.saturating_add(written);
            replies += 1;
            if replies >= PUBLISH_AFTER_REPLIES || bytes >= PUBLISH_AFTER_BYTES {
                queue.publish();
                begun = self.count_batch(begun);
                (replies, bytes) = (0, 0);
            }
        }
        let done = self.count_batch(begun);
        self.end_batch(queue, done);
        cx.note_time(done);
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
