//! Threads for what would block a worker: every operation of qcow2, and discards and zeroes.
//!
//! A worker hands a [`Job`] over and goes on; the job's end wakes the worker's ring through an eventfd.
//! Threads are made when there is work and none is idle, and end with the worker.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use outboard_common::ring::IoVecs;
use outboard_common::sys::EventFd;

use super::Image;
use crate::request::Request;

/// Threads of one worker at the most: what it can have in flight on a qcow2 image.
const THREADS_MAX: usize = 8;

/// A request and its data, to be carried out elsewhere.
#[derive(Debug)]
pub struct Job {
    /// The worker's own number for the request.
    pub slot: u32,
    /// What to do.
    pub request: Request,
    /// The data's place in guest memory, which stays mapped until the job is done.
    pub data: IoVecs,
    /// Whether a change has to be durable when the job is done.
    pub durable: bool,
}

/// A job that is done.
#[derive(Debug)]
pub struct Done {
    /// The worker's own number for the request.
    pub slot: u32,
    /// It was a read: the data's place is in the chain's writable part.
    pub read: bool,
    /// The data's place, for the worker to put back.
    pub data: IoVecs,
    /// Bytes that were to be moved.
    pub bytes: u64,
    /// How it went.
    pub result: io::Result<()>,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    image: Arc<dyn Image>,
    queue: Mutex<Queue>,
    ready: Condvar,
    done: Mutex<Vec<Done>>,
    wake: EventFd,
}

/// The pool of one worker.
#[derive(Debug)]
pub struct Pool {
    shared: Arc<Shared>,
}

/// Every change under these locks is complete at each step: a panicking holder harms nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool without threads yet.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(image: Arc<dyn Image>) -> io::Result<Self> {
        let shared = Shared {
            image,
            queue: Mutex::default(),
            ready: Condvar::new(),
            done: Mutex::default(),
            wake: EventFd::new()?,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Signalled when [`Self::take_done`] has something.
    #[must_use]
    pub fn wake_fd(&self) -> RawFd {
        self.shared.wake.as_raw_fd()
    }

    /// Hands `job` to a thread.
    pub fn submit(&self, job: Job) {
        let mut queue = lock(&self.shared.queue);
        queue.jobs.push_back(job);
        if queue.idle >= queue.jobs.len() {
            drop(queue);
            self.shared.ready.notify_one();
        } else if queue.threads < THREADS_MAX {
            let shared = self.shared.clone();
            match std::thread::Builder::new().name("blk-io".into()).spawn(move || shared.work()) {
                Ok(_) => queue.threads += 1,
                // With a thread there, the job waits for that one.
                Err(error) if queue.threads > 0 => {
                    tracing::warn!(%error, "cannot make another I/O thread");
                }
                Err(error) => {
                    let job = queue.jobs.pop_back();
                    drop(queue);
                    if let Some(Job { slot, request, data, .. }) = job {
                        let read = matches!(request, Request::Read { .. });
                        let result = Err(error);
                        self.shared.finish(Done { slot, read, data, bytes: 0, result });
                    }
                }
            }
        }
    }

    /// Takes the jobs that are done into `out`, which must be empty.
    pub fn take_done(&self, out: &mut Vec<Done>) {
        std::mem::swap(&mut *lock(&self.shared.done), out);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.queue).closed = true;
        self.shared.ready.notify_all();
    }
}

impl Shared {
    fn finish(&self, done: Done) {
        lock(&self.done).push(done);
        self.wake.signal();
    }

    fn next_job(&self) -> Option<Job> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.ready.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
    }

    fn work(&self) {
        while let Some(Job { slot, request, mut data, durable }) = self.next_job() {
            let read = matches!(request, Request::Read { .. });
            let bytes = match request {
                Request::Read { .. } | Request::Write { .. } => data.len() as u64,
                _ => 0,
            };
            let result = perform(&*self.image, request, &mut data, durable);
            self.finish(Done { slot, read, data, bytes, result });
        }
    }
}

/// Carries out a request on this thread.
///
/// # Errors
/// The image's.
pub fn perform(
    image: &dyn Image,
    request: Request,
    data: &mut IoVecs,
    durable: bool,
) -> io::Result<()> {
    match request {
        Request::Read { offset } => return image.read(offset, data),
        Request::Write { offset } => return image.write(offset, data, durable),
        Request::Flush => return image.flush(),
        // Answered by the worker itself.
        Request::GetId => return Ok(()),
        Request::Discard(ranges) => {
            for range in ranges {
                image.discard(range)?;
            }
        }
        Request::WriteZeroes(ranges) => {
            for range in ranges {
                image.zero(range)?;
            }
        }
    }
    if durable { image.flush() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{ByteRange, ZeroRange};
    use crate::store::memory;

    #[test]
    fn jobs_are_done_and_reported() {
        let image = memory::open(1 << 20).unwrap().image;
        let pool = Pool::new(image.clone()).unwrap();
        let mut buffer = vec![7u8; 4096];
        let mut data = IoVecs::new();
        #[allow(unsafe_code, reason = "a buffer of the test as guest memory")]
        // SAFETY: the buffer outlives the pool's use of it.
        unsafe {
            data.push(buffer.as_mut_ptr(), buffer.len());
        }
        pool.submit(Job { slot: 1, request: Request::Write { offset: 4096 }, data, durable: true });
        for slot in 2..40 {
            let request = Request::Flush;
            pool.submit(Job { slot, request, data: IoVecs::new(), durable: false });
        }
        let (mut all, mut some) = (Vec::new(), Vec::new());
        while all.len() < 39 {
            pool.take_done(&mut some);
            all.append(&mut some);
            std::thread::yield_now();
        }
        assert!(all.iter().all(|d| d.result.is_ok()));
        let mut slots: Vec<u32> = all.iter().map(|d| d.slot).collect();
        slots.sort_unstable();
        assert_eq!(slots, (1..40).collect::<Vec<_>>());
        let zero = ZeroRange { range: ByteRange { offset: 5000, len: 10 }, unmap: false };
        perform(&*image, Request::WriteZeroes(vec![zero]), &mut IoVecs::new(), true).unwrap();
    }
}
