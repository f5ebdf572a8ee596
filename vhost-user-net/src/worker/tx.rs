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
use super::fetch::fetch;
use super::frame_io::FrameIo;
use crate::batch::{FrameMemory, Transfer};
use crate::filter::INSPECTED_BYTES;
use crate::header::{
    HASH_HEADER_SIZE, HEADER_SIZE, HeaderFault, NetHeader, TxOffloads, header_size,
};
use crate::shared::{PairMetrics, Shared};

/// Frames written at once.
const BATCH: usize = 32;
/// Frames in a turn.
const BUDGET: usize = 128;
/// Bytes of each frame, with its header, that are copied.
const HEAD_SIZE: usize = HASH_HEADER_SIZE + INSPECTED_BYTES;

/// A frame on its way out.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) chain: Chain,
    pub(super) head: [u8; HEAD_SIZE],
    /// Bytes with header.
    pub(super) len: usize,
}

/// What the gate says of a chain.
#[derive(Debug)]
pub(super) enum Next {
    /// A frame that may go, so many bytes of it in the slot's head.
    Frame(usize),
    /// One that may not. It was counted and given back.
    Dropped,
    /// A limit is reached; the chain is still in the slot.
    Limited(Instant),
}

/// What every frame passes on its way out of the guest, whatever the back end: limits, the check of its
/// header, that of its source.
#[derive(Debug)]
pub(super) struct Gate {
    pub(super) shared: Arc<Shared>,
    pub(super) metrics: PairMetrics,
    pub(super) header_size: usize,
    offloads: TxOffloads,
    /// Frames at the ring's front that the limits were asked about already.
    prepaid: usize,
}

impl Gate {
    pub(super) fn new(shared: Arc<Shared>, metrics: PairMetrics) -> Self {
        let offloads = TxOffloads::default();
        Self { shared, metrics, header_size: HEADER_SIZE, offloads, prepaid: 0 }
    }

    /// A queue with these features starts.
    pub(super) fn start(&mut self, features: u64) {
        self.prepaid = 0;
        self.header_size = header_size(features);
        self.offloads = TxOffloads::new(features);
    }

    /// Looks at the chain in `slot`, which came from `queue`.
    #[inline]
    pub(super) fn check(&mut self, queue: &mut Queue, slot: &mut Slot) -> Next {
        let bytes = slot.chain.readable.len() as u64;
        if self.prepaid > 0 {
            self.prepaid -= 1;
        } else if let Err(at) =
            self.shared.limiter.try_take(Direction::Write, 1, bytes, Instant::now)
        {
            return Next::Limited(at);
        }
        match slot.prepare(self.header_size, self.offloads) {
            // Not every back end has an end of the cable that can be pulled.
            Ok(_) if !self.shared.is_plugged() => self.metrics.tx_failed.add(1),
            Ok(inspected) => {
                let seen = slot.head.get(self.header_size..inspected).unwrap_or(&[]);
                if self.shared.source.is_open() || self.shared.source.check(seen).is_ok() {
                    return Next::Frame(inspected);
                }
                self.metrics.tx_spoofed.add(1);
            }
            Err(fault) => {
                tracing::debug!(device = %self.shared.name, %fault, "frame dropped");
                self.metrics.tx_malformed.add(1);
                queue.metrics().rejected.add(1);
            }
        }
        queue.push(&mut slot.chain, 0);
        Next::Dropped
    }
}

/// Takes chains of `queue` into `slots`, as many as there are; gives their number.
pub(super) fn take<'a>(queue: &mut Queue, slots: impl Iterator<Item = &'a mut Slot>) -> usize {
    let mut taken = 0;
    for slot in slots {
        if !queue.pop(&mut slot.chain) {
            break;
        }
        fetch(&slot.chain.readable);
        taken += 1;
    }
    taken
}

/// The transmit side of a queue pair.
#[derive(Debug)]
pub(super) struct TxSide {
    gate: Gate,
    slots: Box<[Slot]>,
    frames: Box<[FrameMemory]>,
    /// The back end had no room, and an event of it is awaited.
    full: bool,
}

impl TxSide {
    pub(super) fn new(shared: Arc<Shared>, metrics: PairMetrics) -> Self {
        Self {
            gate: Gate::new(shared, metrics),
            slots: (0..BATCH).map(|_| Slot::new()).collect(),
            frames: (0..BATCH).map(|_| FrameMemory::default()).collect(),
            full: false,
        }
    }

    /// Whether a turn ended for want of room; asked once.
    pub(super) fn take_full(&mut self) -> bool {
        std::mem::take(&mut self.full)
    }

    /// Whether room in the back end is awaited.
    pub(super) fn is_full(&self) -> bool {
        self.full
    }

    /// A queue with these features starts.
    pub(super) fn start(&mut self, features: u64) {
        self.gate.start(features);
    }

    /// Sends what waits, up to the budget.
    pub(super) fn turn(&mut self, io: &mut FrameIo, queue: &mut Queue) -> Turn {
        let mut left = BUDGET;
        let mut begun = Instant::now();
        if io.has_rest() {
            // SAFETY: no memory is lent.
            unsafe { io.transfer(Transfer::Write, &[]) };
            if io.has_rest() {
                self.full = true;
                return Turn::Full;
            }
        }
        loop {
            let Filled { count, chains, end } = self.fill(queue, left.min(BATCH));
            if count > 0 {
                let taken = self.send(io, queue, count);
                queue.publish();
                begun = self.gate.metrics.tx_latency.record_since(begun, taken as u64);
                if taken < count || io.has_rest() {
                    self.full = true;
                    return Turn::Full;
                }
            }
            // Frames dropped count too, or a guest that sends rubbish holds the loop.
            left = left.saturating_sub(chains);
            match end {
                Some(end) => return end,
                None if left == 0 => return Turn::Budget,
                None => {}
            }
        }
    }

    /// Takes up to `most` frames.
    fn fill(&mut self, queue: &mut Queue, most: usize) -> Filled {
        let chains = take(queue, self.slots.iter_mut().take(most));
        let mut count = 0;
        for at in 0..chains {
            let (Some(slot), Some(frame)) = (self.slots.get_mut(at), self.frames.get_mut(count))
            else {
                break;
            };
            match self.gate.check(queue, slot) {
                Next::Frame(inspected) => {
                    if at != count {
                        self.slots.swap(at, count);
                    }
                    if let Some(slot) = self.slots.get_mut(count) {
                        slot.lend(inspected, frame);
                    }
                    count += 1;
                }
                Next::Dropped => {}
                Next::Limited(until) => {
                    for slot in self.slots.iter_mut().take(chains).skip(at).rev() {
                        queue.unpop(&mut slot.chain);
                    }
                    return Filled { count, chains: at, end: Some(Turn::Limited(until)) };
                }
            }
        }
        Filled { count, chains, end: (chains < most).then_some(Turn::Done) }
    }

    /// Sends the first `count` frames. Gives how many of them the back end took or refused for good;
    /// the others are in the ring again, to be sent when there is room.
    fn send(&mut self, io: &mut FrameIo, queue: &mut Queue, count: usize) -> usize {
        let frames = self.frames.get(..count).unwrap_or(&[]);
        // SAFETY: the chains are pushed, and the heads used again, only after this.
        let results = unsafe { io.transfer(Transfer::Write, frames) };
        // A tap is full only where whoever opened it gave it a send buffer; a macvtap, as its card is.
        let waiting = results.iter().rev().take_while(|&&r| r == -libc::EAGAIN).count();
        let taken = count - waiting;
        self.gate.prepaid += waiting;
        for slot in self.slots.iter_mut().take(count).skip(taken).rev() {
            queue.unpop(&mut slot.chain);
        }
        if let Some(capture) = &self.gate.shared.capture {
            for (frame, slot) in frames.iter().zip(&self.slots).take(taken) {
                capture.record(slot.len - self.gate.header_size, |out, most| {
                    // SAFETY: the slot's chain is not pushed yet, and `head` is ours.
                    unsafe { frame.copy_to(self.gate.header_size, most, out) };
                });
            }
        }
        let (mut bytes, mut sent) = (0, 0);
        for (slot, &result) in self.slots.iter_mut().zip(results).take(taken) {
            if result < 0 {
                self.gate.metrics.tx_failed.add(1);
            } else {
                bytes += slot.len as u64;
                sent += 1;
            }
            queue.push(&mut slot.chain, 0);
        }
        self.gate.metrics.tx_frames.add(sent);
        queue.metrics().bytes_read.add(bytes);
        taken
    }
}

/// What [`TxSide::fill`] found.
#[derive(Debug)]
struct Filled {
    /// Frames to send.
    count: usize,
    /// Chains they were found in, and others that were dropped.
    chains: usize,
    /// Why there are no more, if so.
    end: Option<Turn>,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self { chain: Chain::new(), head: [0; HEAD_SIZE], len: 0 }
    }

    /// Copies the frame's head and puts a clean header in it; gives the bytes in `head`. Of a header with a
    /// hash, which says nothing on a frame that is sent, the rest stays the guest's.
    #[inline]
    pub(super) fn prepare(
        &mut self,
        header_size: usize,
        offloads: TxOffloads,
    ) -> Result<usize, HeaderFault> {
        self.len = self.chain.readable.len();
        let room = self.head.get_mut(..header_size + INSPECTED_BYTES).unwrap_or(&mut []);
        let copied = self.chain.readable.read(room);
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
