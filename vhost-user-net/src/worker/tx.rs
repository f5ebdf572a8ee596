//! Transmit: frames from the guest's chains to the back end, in batches and in order.
//!
//! # Theory of operation
//! Of each frame, the header and the first bytes are copied to a buffer of ours; the header is
//! checked and made anew, the sources are checked, and then the kernel gets the copy followed by the
//! rest straight from guest memory. So what was checked is what is sent, whatever the guest writes
//! meanwhile, and a small frame is one range of memory.
#![allow(unsafe_code, reason = "hands guest memory to the kernel")]

use std::sync::Arc;
use std::time::Instant;

use outboard_common::rate_limiter::Direction;
use outboard_common::ring::{Chain, Queue};
use zerocopy::{FromZeros, IntoBytes};

use super::Turn;
use crate::batch::{BatchIo, FrameMemory, Transfer};
use crate::filter::INSPECTED_BYTES;
use crate::header::{HEADER_SIZE, HeaderFault, NetHeader, TxOffloads, header_size};
use crate::shared::{PairMetrics, Shared};

/// Frames written at once.
const BATCH: usize = 32;
/// Frames in a turn.
const BUDGET: usize = 128;
/// Bytes of each frame, with its header, that are copied.
const HEAD_SIZE: usize = HEADER_SIZE + INSPECTED_BYTES;

/// A frame on its way out.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) chain: Chain,
    pub(super) head: [u8; HEAD_SIZE],
    /// Bytes with header.
    pub(super) len: usize,
}

/// The transmit side of a queue pair.
#[derive(Debug)]
pub(super) struct TxSide {
    shared: Arc<Shared>,
    metrics: PairMetrics,
    slots: Box<[Slot]>,
    frames: Box<[FrameMemory]>,
    header_size: usize,
    offloads: TxOffloads,
}

impl TxSide {
    pub(super) fn new(shared: Arc<Shared>, metrics: PairMetrics) -> Self {
        Self {
            shared,
            metrics,
            slots: (0..BATCH).map(|_| Slot::new()).collect(),
            frames: (0..BATCH).map(|_| FrameMemory::default()).collect(),
            header_size: HEADER_SIZE,
            offloads: TxOffloads::default(),
        }
    }

    /// A queue with these features starts.
    pub(super) fn start(&mut self, features: u64) {
        self.header_size = header_size(features);
        self.offloads = TxOffloads::new(features);
    }

    /// Sends what waits, up to the budget.
    pub(super) fn turn(&mut self, io: &mut BatchIo, queue: &mut Queue) -> Turn {
        let mut left = BUDGET;
        loop {
            let (count, end) = self.fill(queue, left.min(BATCH));
            if count > 0 {
                self.send(io, queue, count);
                queue.publish();
                left = left.saturating_sub(count);
            }
            match end {
                Some(end) => return end,
                None if left == 0 => return Turn::Budget,
                None => {}
            }
        }
    }

    /// Takes up to `most` frames; says why there are no more, if so.
    fn fill(&mut self, queue: &mut Queue, most: usize) -> (usize, Option<Turn>) {
        let mut count = 0;
        // Frames dropped count too, or a guest that sends rubbish holds the loop.
        let mut dropped = 0;
        while count < most && dropped < BATCH {
            let (Some(slot), Some(frame)) = (self.slots.get_mut(count), self.frames.get_mut(count))
            else {
                break;
            };
            if !queue.pop(&mut slot.chain) {
                return (count, Some(Turn::Done));
            }
            let bytes = slot.chain.readable.len() as u64;
            if let Err(at) = self.shared.limiter.try_take(Direction::Write, 1, bytes, Instant::now)
            {
                queue.unpop(&mut slot.chain);
                return (count, Some(Turn::Limited(at)));
            }
            match slot.prepare(self.header_size, self.offloads) {
                Ok(inspected) => {
                    let seen = slot.head.get(self.header_size..inspected).unwrap_or(&[]);
                    if self.shared.source.is_open() || self.shared.source.check(seen).is_ok() {
                        slot.lend(inspected, frame);
                        count += 1;
                        continue;
                    }
                    self.metrics.tx_spoofed.add(1);
                }
                Err(fault) => {
                    tracing::debug!(device = %self.shared.name, %fault, "frame dropped");
                    self.metrics.tx_malformed.add(1);
                    queue.metrics().rejected.add(1);
                }
            }
            dropped += 1;
            queue.push(&mut slot.chain, 0);
        }
        (count, if dropped == BATCH { Some(Turn::Budget) } else { None })
    }

    fn send(&mut self, io: &mut BatchIo, queue: &mut Queue, count: usize) {
        let frames = self.frames.get(..count).unwrap_or(&[]);
        if let Some(capture) = &self.shared.capture {
            for (frame, slot) in frames.iter().zip(&self.slots) {
                capture.record(slot.len - self.header_size, |out, most| {
                    // SAFETY: the slot's chain is not pushed yet, and `head` is ours.
                    unsafe { frame.copy_to(self.header_size, most, out) };
                });
            }
        }
        // SAFETY: the chains are pushed, and the heads used again, only after this.
        let results = unsafe { io.transfer(Transfer::Write, frames) };
        let (mut bytes, mut sent) = (0, 0);
        for (slot, &result) in self.slots.iter_mut().zip(results) {
            if result < 0 {
                self.metrics.tx_failed.add(1);
            } else {
                bytes += slot.len as u64;
                sent += 1;
            }
            queue.push(&mut slot.chain, 0);
        }
        self.metrics.tx_frames.add(sent);
        queue.metrics().bytes_read.add(bytes);
    }
}

impl Slot {
    pub(super) fn new() -> Self {
        Self { chain: Chain::new(), head: [0; HEAD_SIZE], len: 0 }
    }

    /// Copies the frame's head and puts a clean header in it; gives the bytes in `head`.
    #[inline]
    pub(super) fn prepare(
        &mut self,
        header_size: usize,
        offloads: TxOffloads,
    ) -> Result<usize, HeaderFault> {
        self.len = self.chain.readable.len();
        let copied = self.chain.readable.read(&mut self.head);
        let frame_len = self.len.checked_sub(header_size).ok_or(HeaderFault::Short(self.len))?;
        let mut header = NetHeader::new_zeroed();
        let (bytes, _) = self.head.split_at(header_size.min(HEADER_SIZE));
        if let Some(to) = header.as_mut_bytes().get_mut(..bytes.len()) {
            to.copy_from_slice(bytes);
        }
        let clean = header.check(frame_len, offloads)?;
        for (to, from) in self.head.iter_mut().zip(clean.as_bytes().iter().take(header_size)) {
            *to = *from;
        }
        Ok(copied)
    }

    /// Makes the frame's memory: the head, then what follows in guest memory.
    #[inline]
    fn lend(&mut self, copied: usize, frame: &mut FrameMemory) {
        frame.clear();
        frame.push(self.head.as_mut_ptr(), copied);
        frame.extend(self.chain.readable.as_slice());
    }
}
