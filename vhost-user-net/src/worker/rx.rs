//! Receive: frames from the back end straight into the guest's buffers.
//!
//! # Theory of operation
//! Chains are taken from the ring ahead of time ([`RxSide::staged`]) and used strictly in order, so
//! that those not used yet can always be given back to the ring. Each read has the guest's memory
//! first and a spill buffer behind it, so that no frame is ever cut short.
//!
//! While frames are small (each fits one chain), a batch of reads is done at once, one chain each. A
//! frame that spills switches to large mode: one read at a time over as many chains as the longest
//! frame may need, until frames are small again. When a frame did not land in the chains that are
//! next in order (an earlier read found nothing or was filtered, or the guest gave too few buffers), it
//! and those behind it are copied to [`RxSide::backlog`] and from there to the right place; that is
//! rare, and loses nothing.
#![allow(unsafe_code, reason = "lends guest memory to the kernel")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use outboard_common::rate_limiter::Direction;
use outboard_common::ring::{Chain, Queue};
use zerocopy::little_endian::U16;

use super::frame_io::FrameIo;
use super::{Turn, is_mergeable};
use crate::batch::{FrameMemory, Transfer};
use crate::control::RxFilter;
use crate::header::{ETHERNET_HEADER_SIZE, HEADER_SIZE, MAX_FRAME_SIZE, header_size};
use crate::shared::{PairMetrics, Shared};

/// Reads at once, at the most.
const BATCH: usize = 32;
/// Frames in a turn.
const BUDGET: usize = 128;
/// Small frames in a row after which large mode ends.
const LARGE_PATIENCE: u32 = 32;
/// Room for one frame that the guest's buffers do not hold.
const SPILL_SIZE: usize = (HEADER_SIZE + MAX_FRAME_SIZE).next_multiple_of(4096);
/// Bytes of a frame that the receive filter looks at.
const FILTERED_BYTES: usize = 18;
/// Where `num_buffers` lies in the header.
const NUM_BUFFERS_AT: usize = 10;

/// The receive side of a queue pair.
#[derive(Debug)]
pub(super) struct RxSide {
    shared: Arc<Shared>,
    metrics: PairMetrics,
    /// Chains taken from the ring and not used, oldest first.
    staged: VecDeque<Box<Chain>>,
    /// Their writable bytes.
    staged_bytes: usize,
    #[allow(clippy::vec_box, reason = "chains go from here to `staged` and back, as pointers")]
    spare: Vec<Box<Chain>>,
    frames: Box<[FrameMemory]>,
    /// One room of [`SPILL_SIZE`] per read; pages of it that nothing spilled to take no memory.
    spill: Vec<u8>,
    /// Frames that wait for buffers, whole, with header.
    backlog: VecDeque<Vec<u8>>,
    results: Vec<i32>,
    /// The back end may have frames.
    readable: bool,
    header_size: usize,
    mergeable: bool,
    /// Reads in the next batch.
    depth: usize,
    /// Large mode lasts for so many more small frames.
    large: u32,
    filter: Arc<RxFilter>,
    generation: u32,
    prefix: Vec<u8>,
    /// Delivered and not charged to the limits yet: frames, bytes.
    owed: (u64, u64),
}

impl RxSide {
    pub(super) fn new(shared: Arc<Shared>, metrics: PairMetrics) -> Self {
        let (filter, generation) = (shared.rx_filter(), shared.generation());
        Self {
            shared,
            metrics,
            staged: VecDeque::new(),
            staged_bytes: 0,
            spare: Vec::new(),
            frames: (0..BATCH).map(|_| FrameMemory::default()).collect(),
            spill: vec![0; SPILL_SIZE * BATCH],
            backlog: VecDeque::new(),
            results: Vec::new(),
            readable: true,
            header_size: HEADER_SIZE,
            mergeable: false,
            depth: 2,
            large: 0,
            filter,
            generation,
            prefix: Vec::new(),
            owed: (0, 0),
        }
    }

    /// A queue with these features starts.
    pub(super) fn start(&mut self, features: u64) {
        self.header_size = header_size(features);
        self.mergeable = is_mergeable(features);
        self.readable = true;
        self.backlog.clear();
    }

    /// Gives all chains back.
    pub(super) fn stop(&mut self, queue: &mut Queue) {
        while let Some(mut chain) = self.staged.pop_back() {
            queue.unpop(&mut chain);
            self.spare.push(chain);
        }
        self.staged_bytes = 0;
    }

    /// The back end has frames.
    pub(super) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Receives what is there, up to the budget.
    pub(super) fn turn(&mut self, io: &mut FrameIo, queue: &mut Queue) -> Turn {
        if self.shared.generation() != self.generation {
            self.generation = self.shared.generation();
            self.filter = self.shared.rx_filter();
        }
        let mut left = BUDGET;
        loop {
            let (frames, bytes) = self.owed;
            if let Err(at) =
                self.shared.limiter.try_take(Direction::Read, frames, bytes, Instant::now)
            {
                return Turn::Limited(at);
            }
            self.owed = (0, 0);
            if !self.deliver_backlog(queue) {
                return Turn::NoBuffers;
            }
            if !self.readable {
                return Turn::Done;
            }
            if left == 0 {
                return Turn::Budget;
            }
            let reads = self.lend(queue);
            if reads == 0 {
                return Turn::NoBuffers;
            }
            self.read(io, reads);
            let got = self.sort(queue, reads);
            queue.publish();
            left = left.saturating_sub(got.max(1));
        }
    }

    /// Takes chains from the ring until `chains` of them or `bytes` are staged.
    fn stage(&mut self, queue: &mut Queue, chains: usize, bytes: usize) {
        while self.staged.len() < chains && self.staged_bytes < bytes {
            let mut chain = self.spare.pop().unwrap_or_default();
            if !queue.pop(&mut chain) {
                self.spare.push(chain);
                return;
            }
            self.staged_bytes += chain.writable.len();
            self.staged.push_back(chain);
        }
    }

    /// Returns chains at the front that can hold no frame's start; they are the guest's mistake.
    fn reject_useless(&mut self, queue: &mut Queue) {
        while let Some(chain) = self.staged.front() {
            if chain.writable.len() >= self.header_size + ETHERNET_HEADER_SIZE {
                return;
            }
            queue.metrics().rejected.add(1);
            self.use_front(queue, 0);
        }
    }

    /// Gives the oldest staged chain to the driver with `written` bytes.
    fn use_front(&mut self, queue: &mut Queue, written: usize) {
        let Some(mut chain) = self.staged.pop_front() else { return };
        chain.writable.rewind();
        self.staged_bytes -= chain.writable.len();
        // A chain of more than 4 GiB is never filled: a frame is 64 KiB.
        queue.push(&mut chain, u32::try_from(written).unwrap_or(0));
        self.spare.push(chain);
    }

    /// Makes the memory of the next reads; gives their number, 0 when there are no buffers.
    fn lend(&mut self, queue: &mut Queue) -> usize {
        if self.large > 0 {
            self.stage(queue, usize::from(queue.size()), self.header_size + MAX_FRAME_SIZE);
        } else {
            self.stage(queue, self.depth, usize::MAX);
        }
        self.reject_useless(queue);
        let least = self.header_size + ETHERNET_HEADER_SIZE;
        if self.large > 0 {
            let Some(frame) = self.frames.first_mut() else { return 0 };
            frame.clear();
            for chain in self.staged.iter().take_while(|c| c.writable.len() >= least) {
                if frame.parts() + chain.writable.as_slice().len() > 1000 {
                    break;
                }
                frame.extend(chain.writable.as_slice());
            }
            frame.push(self.spill.as_mut_ptr(), SPILL_SIZE);
            return usize::from(!self.staged.is_empty());
        }
        let mut reads = 0;
        let usable = self.staged.iter().take(self.depth).take_while(|c| c.writable.len() >= least);
        let rooms = self.spill.chunks_exact_mut(SPILL_SIZE);
        for ((chain, frame), room) in usable.zip(&mut self.frames).zip(rooms) {
            frame.clear();
            frame.extend(chain.writable.as_slice());
            frame.push(room.as_mut_ptr(), room.len());
            reads += 1;
        }
        reads
    }

    /// Reads a batch, and learns from it how many reads to try next time.
    fn read(&mut self, io: &mut FrameIo, reads: usize) {
        let frames = self.frames.get(..reads).unwrap_or(&[]);
        // SAFETY: the chains stay staged, and the spill room ours, until after this.
        let results = unsafe { io.transfer(Transfer::Read, frames) };
        self.results.clear();
        self.results.extend_from_slice(results);
        // Only the last read says whether there is more: a frame may have come between two.
        if self.results.last().is_some_and(|&r| r <= 0) && !io.holds_frames() {
            self.readable = false;
        }
        if self.large == 0 {
            let got = self.results.iter().filter(|&&r| r > 0).count();
            self.depth = if got == reads { self.depth * 2 } else { got + 1 }.clamp(2, BATCH);
        }
    }

    /// Gives the frames of a batch to the driver, in order; gives their number.
    fn sort(&mut self, queue: &mut Queue, reads: usize) -> usize {
        let was_large = self.large > 0;
        let mut used = 0;
        let mut in_place = true;
        let mut frames = 0;
        for at in 0..reads {
            let Some(&result) = self.results.get(at) else { break };
            let Ok(len) = usize::try_from(result) else {
                self.complain(result);
                continue;
            };
            if len < self.header_size + ETHERNET_HEADER_SIZE {
                continue;
            }
            frames += 1;
            if !self.wants(at) {
                self.metrics.rx_filtered.add(1);
                continue;
            }
            self.record(at, len);
            in_place &= used == at && self.fits(at, len);
            if in_place {
                self.complete(queue, len);
                used += 1;
            } else {
                self.put_aside(at, len);
            }
        }
        if was_large {
            self.large = self.large.saturating_sub(1);
        }
        frames
    }

    /// Whether the driver wants the frame of read `at`.
    fn wants(&mut self, at: usize) -> bool {
        if self.filter.is_open() {
            return true;
        }
        let Some(frame) = self.frames.get(at) else { return false };
        self.prefix.clear();
        // SAFETY: the memory was lent for this read; its chains are still staged, or pushed but
        // within the queue's memory table, which the queue keeps.
        unsafe { frame.copy_to(self.header_size, FILTERED_BYTES, &mut self.prefix) };
        self.filter.accepts(&self.prefix)
    }

    fn record(&self, at: usize, len: usize) {
        let (Some(capture), Some(frame)) = (&self.shared.capture, self.frames.get(at)) else {
            return;
        };
        capture.record(len - self.header_size, |out, most| {
            // SAFETY: as in `wants`.
            unsafe { frame.copy_to(self.header_size, most, out) };
        });
    }

    /// Whether the frame of read `at` lies wholly in guest memory.
    fn fits(&self, at: usize, len: usize) -> bool {
        if self.large > 0 {
            let lent = self.frames.first().map_or(0, |f| f.bytes().saturating_sub(SPILL_SIZE));
            return len <= lent;
        }
        // In place, the chains before this one are gone, so this one's is the first.
        debug_assert!(at < BATCH);
        self.staged.front().is_some_and(|chain| len <= chain.writable.len())
    }

    /// Gives a frame of `len` bytes, which lies in the first staged chains, to the driver.
    fn complete(&mut self, queue: &mut Queue, len: usize) {
        let mut count: u16 = 0;
        let mut covered = 0;
        for chain in &self.staged {
            if covered >= len {
                break;
            }
            covered += chain.writable.len();
            count += 1;
        }
        if self.large > 0 && count > 1 {
            self.large = LARGE_PATIENCE;
        }
        if self.header_size == HEADER_SIZE
            && let Some(first) = self.staged.front_mut()
        {
            first.writable.advance(NUM_BUFFERS_AT);
            first.writable.write_obj(&U16::new(count));
            first.writable.rewind();
        }
        let mut left = len;
        for _ in 0..count {
            let n = self.staged.front().map_or(0, |c| c.writable.len()).min(left);
            left -= n;
            self.use_front(queue, n);
        }
        self.account(queue, len);
    }

    fn account(&mut self, queue: &Queue, len: usize) {
        self.metrics.rx_frames.add(1);
        queue.metrics().bytes_written.add(len as u64);
        self.owed.0 += 1;
        self.owed.1 += len as u64;
    }

    /// Copies the frame of read `at` to the backlog.
    #[cold]
    fn put_aside(&mut self, at: usize, len: usize) {
        let Some(frame) = self.frames.get(at) else { return };
        let mut bytes = Vec::new();
        // SAFETY: as in `wants`.
        unsafe { frame.copy_to(0, len, &mut bytes) };
        self.backlog.push_back(bytes);
        if self.mergeable && self.large == 0 {
            let chain = self.staged.front().map_or(0, |c| c.writable.len());
            if len > chain {
                self.large = LARGE_PATIENCE;
            }
        }
    }

    /// Gives the backlog to the driver; false when buffers are missing.
    fn deliver_backlog(&mut self, queue: &mut Queue) -> bool {
        while let Some(frame) = self.backlog.pop_front() {
            let chains = if self.mergeable { usize::from(queue.size()) } else { 1 };
            self.stage(queue, chains, frame.len());
            self.reject_useless(queue);
            self.stage(queue, chains, frame.len());
            let room = if self.mergeable {
                self.staged_bytes
            } else {
                self.staged.front().map_or(0, |c| c.writable.len())
            };
            if room >= frame.len() {
                self.copy_in(queue, &frame);
            } else if !self.staged.is_empty() && self.staged.len() >= chains {
                self.metrics.rx_dropped.add(1);
            } else {
                self.backlog.push_front(frame);
                return false;
            }
        }
        true
    }

    /// Copies a frame from the backlog to the first staged chains.
    fn copy_in(&mut self, queue: &mut Queue, frame: &[u8]) {
        let mut rest = frame;
        for chain in &mut self.staged {
            let n = chain.writable.write(rest);
            chain.writable.rewind();
            rest = rest.get(n..).unwrap_or(&[]);
            if rest.is_empty() {
                break;
            }
        }
        self.complete(queue, frame.len());
    }

    #[cold]
    fn complain(&self, result: i32) {
        // Of an interface that is gone the worker hears otherwise.
        if !matches!(-result, libc::EAGAIN | libc::EINTR | libc::ENETDOWN | libc::EBADFD) {
            let error = std::io::Error::from_raw_os_error(-result);
            outboard_common::warn_limited!(device = %self.shared.name, %error, "cannot receive");
        }
    }
}
