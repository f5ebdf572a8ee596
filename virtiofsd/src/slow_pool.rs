//! Threads for requests that wait: disk misses, fsync, big copies.
//!
//! # Theory of operation
//! A queue's worker hands a whole chain over ([`SlowPool::submit`]) and goes on; a slow thread does
//! the request from the start, with waiting allowed, and puts the chain with its outcome into the
//! worker's [`Mailbox`], whose descriptor wakes the worker's loop. Threads are made when there is work
//! and no idle thread, up to the pool's size, and leave after some idle seconds, so that a daemon at
//! rest has none.
//!
//! A worker must take back every chain it submitted before it gives its queue back or ends
//! ([`Mailbox::wait`]): a chain points into guest memory that only the queue keeps mapped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outboard_common::ring::Chain;
use outboard_common::sys::EventFd;

use crate::fuse::{Extension, Outcome, Scratch, Server, Wait};

/// How long an idle thread stays.
const IDLE: Duration = Duration::from_secs(5);

/// A request done by a slow thread.
#[derive(Debug)]
pub struct Finished {
    /// Its chain.
    pub chain: Box<Chain>,
    /// The chain's queue.
    pub queue: u16,
    /// What became of it.
    pub outcome: Outcome,
    /// The number of a SETLKW that waited on a [`LockThreads`] thread.
    pub lock: Option<u64>,
    /// When it was handed over.
    pub begun: Instant,
    /// Bytes read from files.
    pub bytes_read: u64,
    /// Bytes written to files.
    pub bytes_written: u64,
    /// How long it took, once begun.
    pub took: Duration,
}

#[derive(Debug, Default)]
struct Letters {
    finished: Vec<Finished>,
    /// The worker waits for them here, and not in its loop.
    awaited: bool,
}

/// Where a worker gets its finished requests.
#[derive(Debug)]
pub struct Mailbox {
    letters: Mutex<Letters>,
    arrived: Condvar,
    wake: EventFd,
}

impl Mailbox {
    /// An empty mailbox.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        Ok(Self { letters: Mutex::default(), arrived: Condvar::new(), wake: EventFd::new()? })
    }

    /// Readable when something arrived.
    pub fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    fn put(&self, finished: Finished) {
        let mut letters = lock(&self.letters);
        // Whoever put the first one has signalled, and the worker takes all.
        let first = letters.finished.is_empty();
        letters.finished.push(finished);
        let awaited = letters.awaited;
        drop(letters);
        if awaited {
            self.arrived.notify_one();
        }
        if first {
            self.wake.signal();
        }
    }

    /// Exchanges what arrived with the empty `into`.
    pub fn take(&self, into: &mut Vec<Finished>) {
        // In this order: what is put in between is taken along.
        self.wake.drain();
        std::mem::swap(&mut lock(&self.letters).finished, into);
    }

    /// Waits until something arrived, and takes it.
    pub fn wait(&self, into: &mut Vec<Finished>) {
        let mut letters = lock(&self.letters);
        letters.awaited = true;
        while letters.finished.is_empty() {
            letters = self.arrived.wait(letters).unwrap_or_else(PoisonError::into_inner);
        }
        letters.awaited = false;
        std::mem::swap(&mut letters.finished, into);
    }

    /// As [`Self::wait`], but not longer than `timeout`.
    pub fn wait_for(&self, into: &mut Vec<Finished>, timeout: Duration) {
        let mut letters = lock(&self.letters);
        letters.awaited = true;
        let empty = |letters: &mut Letters| letters.finished.is_empty();
        let waited = self.arrived.wait_timeout_while(letters, timeout, empty);
        let mut letters = waited.unwrap_or_else(PoisonError::into_inner).0;
        letters.awaited = false;
        std::mem::swap(&mut letters.finished, into);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Job {
    chain: Box<Chain>,
    queue: u16,
    begun: Instant,
    done: Arc<Mailbox>,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

#[derive(Debug)]
struct Shared<F> {
    server: Arc<Server<F>>,
    state: Mutex<State>,
    work: Condvar,
}

/// The slow threads of a device.
#[derive(Debug)]
pub struct SlowPool<F> {
    shared: Arc<Shared<F>>,
    size: usize,
}

impl<F: Extension> SlowPool<F> {
    /// A pool of at most `size` threads, none of which exists yet.
    pub fn new(server: Arc<Server<F>>, size: usize) -> Self {
        let shared = Shared { server, state: Mutex::default(), work: Condvar::new() };
        Self { shared: Arc::new(shared), size }
    }

    /// Has the request in `chain`, of `queue`, done; it comes back in `done`.
    ///
    /// # Errors
    /// There is no thread and none can be made (or the pool's size is 0): the chain comes back, to
    /// be done by the caller.
    pub fn submit(
        &self,
        chain: Box<Chain>,
        queue: u16,
        done: &Arc<Mailbox>,
    ) -> Result<(), Box<Chain>> {
        let mut state = lock(&self.shared.state);
        if state.idle <= state.jobs.len() && state.threads < self.size {
            match spawn(&self.shared) {
                Ok(()) => state.threads += 1,
                Err(error) => tracing::warn!(%error, "no thread for slow requests"),
            }
        }
        if state.threads == 0 {
            return Err(chain);
        }
        state.jobs.push_back(Job { chain, queue, begun: Instant::now(), done: done.clone() });
        // One that is not idle looks for jobs before it is.
        let wake = state.idle > 0;
        drop(state);
        if wake {
            self.shared.work.notify_one();
        }
        Ok(())
    }
}

fn spawn<F: Extension>(shared: &Arc<Shared<F>>) -> io::Result<()> {
    let shared = shared.clone();
    let body = move || {
        shared.server.file_system().on_thread();
        let mut scratch = Scratch::default();
        while let Some(job) = next(&shared) {
            run(&shared.server, job, &mut scratch);
        }
    };
    std::thread::Builder::new().name("slow".to_owned()).spawn(body).map(drop)
}

/// The next job; `None` when there was none for so long that the thread leaves.
fn next<F>(shared: &Shared<F>) -> Option<Job> {
    let mut state = lock(&shared.state);
    state.idle += 1;
    loop {
        if let Some(job) = state.jobs.pop_front() {
            state.idle -= 1;
            return Some(job);
        }
        let waited = shared.work.wait_timeout(state, IDLE);
        let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        state = guard;
        if timeout.timed_out() && state.jobs.is_empty() {
            state.idle -= 1;
            state.threads -= 1;
            return None;
        }
    }
}

fn run<F: Extension>(server: &Server<F>, mut job: Job, scratch: &mut Scratch) {
    let start = Instant::now();
    let outcome = server.handle(&mut job.chain, scratch, Wait::Allowed);
    let took = start.elapsed();
    job.done.put(Finished {
        chain: job.chain,
        queue: job.queue,
        begun: job.begun,
        outcome,
        lock: None,
        bytes_read: std::mem::take(&mut scratch.bytes_read),
        bytes_written: std::mem::take(&mut scratch.bytes_written),
        took,
    });
}

/// Threads that wait for locks at the most. A guest decides how many locks it waits for; those for which
/// there is no thread are tried again and again by their worker.
const LOCK_THREADS: usize = 64;

/// Threads that wait for a lock each, and are gone when they have it.
#[derive(Debug)]
pub struct LockThreads<F> {
    server: Arc<Server<F>>,
    running: Arc<AtomicUsize>,
    most: usize,
}

impl<F: Extension> LockThreads<F> {
    /// No threads yet, and none at all unless `allowed`.
    pub fn new(server: Arc<Server<F>>, allowed: bool) -> Self {
        Self { server, running: Arc::default(), most: if allowed { LOCK_THREADS } else { 0 } }
    }

    /// Has the SETLKW in `chain`, of `queue` and with number `unique`, wait for its lock; it comes back in
    /// `done`.
    ///
    /// # Errors
    /// There are enough threads, or no more can be made: the chain comes back.
    pub fn submit(
        &self,
        chain: Box<Chain>,
        (queue, unique): (u16, u64),
        done: &Arc<Mailbox>,
    ) -> Result<(), Box<Chain>> {
        if self.running.fetch_add(1, Ordering::Relaxed) >= self.most {
            self.running.fetch_sub(1, Ordering::Relaxed);
            return Err(chain);
        }
        let (server, running, done) = (self.server.clone(), self.running.clone(), done.clone());
        // Shared, so that it is not lost with a thread that cannot be made.
        let chain = Arc::new(Mutex::new(Some(chain)));
        let taken = chain.clone();
        let begun = Instant::now();
        let body = move || {
            let taken = lock(&taken).take();
            if let Some(mut chain) = taken {
                server.file_system().on_thread();
                let mut scratch = Scratch::default();
                let outcome = server.handle(&mut chain, &mut scratch, Wait::ForLock);
                running.fetch_sub(1, Ordering::Relaxed);
                done.put(Finished {
                    chain,
                    queue,
                    outcome,
                    lock: Some(unique),
                    begun,
                    bytes_read: 0,
                    bytes_written: 0,
                    took: begun.elapsed(),
                });
            }
        };
        match std::thread::Builder::new().name("lock".to_owned()).spawn(body) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.running.fetch_sub(1, Ordering::Relaxed);
                tracing::warn!(%error, "no thread to wait for a lock");
                lock(&chain).take().map_or(Ok(()), Err)
            }
        }
    }
}
