//! The guest's receive queue: packets go in, control packets before data.
//!
//! # Theory of operation
//! The receive queue is the guest's scarce resource; the rules that keep one connection, or the
//! guest itself, from clogging it are here. Answers to packets of no connection wait in a bounded
//! queue, and a guest that makes more of them than it takes loses the rest. Data is read from the
//! host straight into as many of the guest's buffers as credit allows, by one system call; the
//! buffers it did not fill are given back untouched. The header, whose length field depends on the
//! read, is written last.
//!
//! The caller publishes, once for all that went in.
#![allow(unsafe_code, reason = "a list of pointers into guest memory moves with its thread")]

use std::collections::VecDeque;

use libc::iovec;
use outboard_common::ring::{Chain, IoVecs, Queue};

use crate::host::io::IOV_MAX;
use crate::packet::{HEADER_SIZE, Header};

/// Buffers that one read may fill.
const BATCH_MAX: usize = 64;
/// Answers to packets of no connection that may wait.
const RESETS_MAX: usize = 1024;

/// RSTs that answer packets of no connection.
#[derive(Debug, Default)]
pub(crate) struct Resets {
    waiting: VecDeque<Header>,
}

impl Resets {
    /// Queues an RST; false: there are too many already, and this one is lost.
    pub(crate) fn push(&mut self, reset: Header) -> bool {
        let fits = self.waiting.len() < RESETS_MAX;
        if fits {
            self.waiting.push_back(reset);
        }
        fits
    }

    /// Sends what waits. True: all of it.
    pub(crate) fn send(&mut self, queue: &mut Queue, filler: &mut Filler) -> bool {
        while let Some(reset) = self.waiting.front() {
            if !filler.packet(queue, reset, &[]) {
                return false;
            }
            self.waiting.pop_front();
        }
        if self.waiting.capacity() > 64 {
            self.waiting = VecDeque::new();
        }
        true
    }

    /// Whether none waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
    }
}

/// One buffer of a batch: the chain, and the room for the header split off it.
#[derive(Debug, Default)]
struct Slot {
    chain: Chain,
    header: IoVecs,
    room: usize,
}

/// Puts packets into the receive queue. Keeps its lists from one batch to the next.
#[derive(Debug, Default)]
pub(crate) struct Filler {
    slots: Vec<Slot>,
    taken: usize,
    list: Vec<iovec>,
}

// SAFETY: `list` is only meaningful between `prepare` and `commit`, and a worker is moved to its
// thread before either; its pointers lead into guest memory, as those of an `IoVecs` do.
unsafe impl Send for Filler {}

/// The length of a packet as the used ring has it.
fn used_len(payload: usize) -> u32 {
    u32::try_from(HEADER_SIZE + payload).unwrap_or(u32::MAX)
}

impl Filler {
    /// Takes the next buffer into slot `taken`, with at most `limit` bytes of room for a payload.
    /// False: there is none.
    fn take(&mut self, queue: &mut Queue, limit: usize) -> bool {
        if self.slots.len() == self.taken {
            self.slots.push(Slot::default());
        }
        let slot = &mut self.slots[self.taken];
        while queue.pop(&mut slot.chain) {
            let room = slot.chain.writable.len().saturating_sub(HEADER_SIZE);
            let has_header = slot.chain.writable.len() >= HEADER_SIZE;
            if has_header && (room > 0 || limit == 0) {
                slot.chain.writable.split_front(HEADER_SIZE, &mut slot.header);
                slot.room = room.min(limit);
                slot.chain.writable.truncate(slot.room);
                self.taken += 1;
                return true;
            }
            if self.taken > 0 {
                // A buffer may only go back while nothing after it did.
                queue.unpop(&mut slot.chain);
                return false;
            }
            queue.metrics().rejected.add(1);
            queue.push(&mut slot.chain, 0);
        }
        false
    }

    /// Gives back the buffers of the batch from `from` on, untouched.
    fn give_back(&mut self, queue: &mut Queue, from: usize) {
        while self.taken > from {
            self.taken -= 1;
            queue.unpop(&mut self.slots[self.taken].chain);
        }
    }

    /// Sends one packet; `payload` must be as long as the header says. False: no buffer has room.
    pub(crate) fn packet(&mut self, queue: &mut Queue, header: &Header, payload: &[u8]) -> bool {
        if !self.take(queue, payload.len()) {
            return false;
        }
        let slot = &mut self.slots[0];
        if slot.room < payload.len() {
            self.give_back(queue, 0);
            return false;
        }
        slot.header.write_obj(&header.to_raw());
        slot.chain.writable.write(payload);
        queue.push(&mut slot.chain, used_len(payload.len()));
        self.taken = 0;
        true
    }

    /// Room for a payload in the next buffer; `None`: there is no buffer.
    pub(crate) fn next_room(&mut self, queue: &mut Queue) -> Option<usize> {
        if !self.take(queue, usize::MAX) {
            return None;
        }
        let room = self.slots[0].room;
        self.give_back(queue, 0);
        Some(room)
    }

    /// Takes buffers with room for up to `limit` bytes. What they are as one list for the kernel;
    /// empty: there is no buffer. [`Self::commit`] must follow.
    pub(crate) fn prepare(&mut self, queue: &mut Queue, limit: usize) -> &[iovec] {
        self.list.clear();
        let mut room = 0;
        while self.taken < BATCH_MAX && room < limit && self.take(queue, limit - room) {
            let slot = &self.slots[self.taken - 1];
            let entries = slot.chain.writable.as_slice();
            if self.list.len() + entries.len() > IOV_MAX {
                self.give_back(queue, self.taken - 1);
                break;
            }
            room += slot.room;
            self.list.extend_from_slice(entries);
        }
        &self.list
    }

    /// `len` bytes are in the buffers of [`Self::prepare`]: writes their headers, `header` with the
    /// length set, and gives the rest of the buffers back.
    pub(crate) fn commit(&mut self, queue: &mut Queue, len: usize, mut header: Header) {
        let mut left = len;
        let mut filled = 0;
        while left > 0 && filled < self.taken {
            let n = left.min(self.slots[filled].room);
            left -= n;
            filled += 1;
        }
        self.give_back(queue, filled);
        left = len;
        for slot in self.slots.iter_mut().take(filled) {
            let n = left.min(slot.room);
            left -= n;
            header.len = u32::try_from(n).unwrap_or(u32::MAX);
            slot.header.write_obj(&header.to_raw());
            queue.push(&mut slot.chain, used_len(n));
        }
        self.taken = 0;
    }
}
