//! Receive: frames from the back end into the guest's buffers.
//!
//! # Theory of operation
//! Chains are taken from the ring ahead of time ([`RxSide::staged`]) and used strictly in order, so
//! that those not used yet can always be given back to the ring.
//!
//! While frames are small (each fits one chain), each is read into a room of ours and copied: the room
//! stays in the first cache, and one range of memory is so much cheaper for the kernel than two that
//! the copy is for nothing. A frame that does not fit switches to large mode: frames are read straight
//! into as many chains as the longest may need, with the room behind them so that none is ever cut
//! short, until frames are small again. Frames for which the guest gives too few buffers wait in
//! [`RxSide::backlog`].
#![allow(unsafe_code, reason = "lends guest memory to the kernel")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use outboard_common::rate_limiter::Direction;
use outboard_common::ring::{Chain, Queue};
use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

use super::frame_io::FrameIo;
use super::{Turn, is_mergeable};
use crate::batch::{FrameMemory, Transfer};
use crate::control::RxFilter;
use crate::header::{ETHERNET_HEADER_SIZE, HEADER_SIZE, MAX_FRAME_SIZE, header_size};
use crate::shared::{PairMetrics, Shared};

/// Frames after which the driver is shown what there is, and the limits are asked.
const BATCH: usize = 32;
/// Frames in a turn.
const BUDGET: usize = 128;
/// Small frames in a row after which large mode ends.
const LARGE_PATIENCE: u32 = 32;
/// Room for one frame of any kind.
const ROOM_SIZE: usize = (HEADER_SIZE + MAX_FRAME_SIZE).next_multiple_of(4096);
/// Bytes of a frame that the receive filter looks at.
const FILTERED_BYTES: usize = 18;
/// Parts of memory in one read, with some to spare: the kernel takes 1,024.
const PARTS_MAX: usize = 1000;
/// Where `num_buffers` lies in the header.
const NUM_BUFFERS_AT: usize = 10;

/// The receive side of a queue pair.
#[derive(Debug)]
pub(super) struct RxSide {
    shared: Arc<Shared>,
    metrics: PairMetrics,
    /// Chains taken from the ring and not used, oldest first.
    staged: VecDeque<Chain>,
    /// Their writable bytes.
    staged_bytes: usize,
    spare: Vec<Chain>,
    /// Large mode: the memory of a read.
    frame: FrameMemory,
    /// [`ROOM_SIZE`] bytes; pages of it that no frame filled take no memory.
    room: Vec<u8>,
    /// Frames that wait for buffers, whole, with header.
    backlog: VecDeque<Vec<u8>>,
    /// The back end may have frames.
    readable: bool,
    header_size: usize,
    mergeable: bool,
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
            frame: FrameMemory::default(),
            room: vec![0; ROOM_SIZE],
            backlog: VecDeque::new(),
            readable: true,
            header_size: HEADER_SIZE,
            mergeable: false,
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
            let got = if self.large > 0 {
                self.read_large(io, queue).map_or(0, |()| 1)
            } else {
                self.read_small(io, queue, left.min(BATCH))
            };
            queue.publish();
            if got == 0 {
                return Turn::NoBuffers;
            }
            left = left.saturating_sub(got);
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

    /// Whether there is a chain for the next frame. It is the first of those staged.
    #[inline]
    fn has_chain(&mut self, queue: &mut Queue) -> bool {
        let least = self.header_size + ETHERNET_HEADER_SIZE;
        if self.staged.front().is_some_and(|chain| chain.writable.len() >= least) {
            return true;
        }
        self.reject_useless(queue);
        for _ in 0..queue.size() {
            if !self.staged.is_empty() {
                return true;
            }
            self.stage(queue, 1, usize::MAX);
            if self.staged.is_empty() {
                return false;
            }
            self.reject_useless(queue);
        }
        false
    }

    /// Reads up to `most` frames, while they are small; gives their number (at least 1, also when the
    /// back end is empty), or 0 when there are no buffers.
    fn read_small(&mut self, io: &mut FrameIo, queue: &mut Queue, most: usize) -> usize {
        let mut frames = 0;
        while frames < most && self.has_chain(queue) {
            let result = io.read_into(&mut self.room);
            let Some(len) = self.length(result) else { return frames.max(1) };
            frames += 1;
            if !self.wants(len) {
                continue;
            }
            if self.staged.front().is_some_and(|chain| len <= chain.writable.len()) {
                self.copy_in(queue, len);
            } else {
                self.put_aside(len);
                return frames;
            }
        }
        frames
    }

    /// The length of the frame read with this `result`; `None`: the back end is empty.
    fn length(&mut self, result: i32) -> Option<usize> {
        match usize::try_from(result) {
            Ok(len) if len > 0 => Some(len),
            _ => {
                self.complain(result);
                self.readable = false;
                None
            }
        }
    }

    /// Whether the driver wants the frame of `len` bytes in the room. One that does is recorded.
    #[inline]
    fn wants(&self, len: usize) -> bool {
        let frame = self.room.get(self.header_size..len).unwrap_or(&[]);
        if frame.len() < ETHERNET_HEADER_SIZE {
            return false;
        }
        if !self.filter.is_open() && !self.filter.accepts(frame) {
            self.metrics.rx_filtered.add(1);
            return false;
        }
        if let Some(capture) = &self.shared.capture {
            capture.record(frame.len(), |out, most| {
                out.extend_from_slice(frame.get(..most).unwrap_or(frame));
            });
        }
        true
    }

    /// Copies the frame of `len` bytes in the room to the first staged chain, which holds it.
    #[inline]
    fn copy_in(&mut self, queue: &mut Queue, len: usize) {
        if self.header_size == HEADER_SIZE
            && let Some(count) = self.room.get_mut(NUM_BUFFERS_AT..NUM_BUFFERS_AT + 2)
        {
            count.copy_from_slice(U16::new(1).as_bytes());
        }
        if let (Some(chain), Some(frame)) = (self.staged.front_mut(), self.room.get(..len)) {
            chain.writable.write(frame);
        }
        self.use_front(queue, len);
        self.account(queue, len);
    }

    /// Reads one frame into many chains; `None` when there are no buffers.
    fn read_large(&mut self, io: &mut FrameIo, queue: &mut Queue) -> Option<()> {
        self.stage(queue, usize::from(queue.size()), self.header_size + MAX_FRAME_SIZE);
        self.reject_useless(queue);
        if self.staged.is_empty() {
            return None;
        }
        let lent = self.lend();
        // SAFETY: the chains stay staged, and the room ours, until after this.
        let results = unsafe { io.transfer(Transfer::Read, std::slice::from_ref(&self.frame)) };
        let result = results.first().copied().unwrap_or(0);
        let Some(len) = self.length(result) else { return Some(()) };
        self.large = self.large.saturating_sub(1);
        if len < self.header_size + ETHERNET_HEADER_SIZE || !self.wants_lent(len) {
            return Some(());
        }
        if len <= lent {
            self.complete(queue, len);
        } else {
            let mut bytes = Vec::new();
            // SAFETY: as in `wants_lent`.
            unsafe { self.frame.copy_to(0, len, &mut bytes) };
            self.backlog.push_back(bytes);
        }
        Some(())
    }

    /// Makes the memory of a large read; gives the bytes of it that are the guest's.
    fn lend(&mut self) -> usize {
        let least = self.header_size + ETHERNET_HEADER_SIZE;
        self.frame.clear();
        for chain in self.staged.iter().take_while(|c| c.writable.len() >= least) {
            if self.frame.parts() + chain.writable.as_slice().len() > PARTS_MAX {
                break;
            }
            self.frame.extend(chain.writable.as_slice());
        }
        let lent = self.frame.bytes();
        self.frame.push(self.room.as_mut_ptr(), self.room.len());
        lent
    }

    /// As [`Self::wants`], of a frame in large mode.
    fn wants_lent(&mut self, len: usize) -> bool {
        if !self.filter.is_open() {
            self.prefix.clear();
            // SAFETY: the memory was lent for this read; its chains are still staged.
            unsafe { self.frame.copy_to(self.header_size, FILTERED_BYTES, &mut self.prefix) };
            if !self.filter.accepts(&self.prefix) {
                self.metrics.rx_filtered.add(1);
                return false;
            }
        }
        if let Some(capture) = &self.shared.capture {
            capture.record(len - self.header_size, |out, most| {
                // SAFETY: as above.
                unsafe { self.frame.copy_to(self.header_size, most, out) };
            });
        }
        true
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

    /// Puts the frame of `len` bytes in the room, which the first chain does not hold, aside.
    #[cold]
    fn put_aside(&mut self, len: usize) {
        self.backlog.push_back(self.room.get(..len).unwrap_or(&[]).to_vec());
        if self.mergeable {
            self.large = LARGE_PATIENCE;
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
                self.copy_over(queue, &frame);
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
    fn copy_over(&mut self, queue: &mut Queue, frame: &[u8]) {
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
        if !matches!(-result, libc::EAGAIN | libc::EINTR | libc::ENETDOWN) {
            let error = std::io::Error::from_raw_os_error(-result);
            outboard_common::warn_limited!(device = %self.shared.name, %error, "cannot receive");
        }
    }
}
