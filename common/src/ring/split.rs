//! The split virtqueue, seen from the device. Virtio 1.3, 2.7.
//!
//! # Theory of operation
//! `last_avail` counts chains taken, `next_used` used entries written, `published` what the driver
//! has been shown of them. A batch costs one acquire load of `avail.idx` at its start and one
//! release store of `used.idx` at its end, whatever its size. All counters are free-running 16-bit.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::access::{RingMemory, table_entry};
use super::chain::{Chain, Token};
use super::notify;
use super::walk::{F_INDIRECT, F_NEXT, MAX_CHAIN, RingError, add_buffer, indirect_table};
use crate::vhost_user::memory::GuestMemory;

/// `avail.flags`: the driver wants no interrupt. Virtio 1.3, 2.7.6.
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// `used.flags`: the device wants no notification. Virtio 1.3, 2.7.8.
const USED_F_NO_NOTIFY: u16 = 1;

#[derive(Debug)]
pub(super) struct SplitRing {
    desc: RingMemory,
    avail: RingMemory,
    used: RingMemory,
    size: u16,
    last_avail: u16,
    /// `avail.idx` as last loaded.
    seen_avail: u16,
    next_used: u16,
    published: u16,
    event_idx: bool,
    indirect: bool,
    /// Whether the driver has been told not to notify.
    muted: bool,
    /// Keeps the ring's memory mapped.
    _memory: Arc<GuestMemory>,
}

/// Bytes of each of the three areas.
pub(super) fn area_sizes(size: u16) -> (usize, usize, usize) {
    let n = usize::from(size);
    (16 * n, 6 + 2 * n, 6 + 8 * n)
}

impl SplitRing {
    /// `areas` are descriptor table, available and used ring of the sizes of [`area_sizes`].
    pub(super) fn new(
        areas: [RingMemory; 3],
        size: u16,
        base: u16,
        flags: super::RingFlags,
        memory: Arc<GuestMemory>,
    ) -> Self {
        let [desc, avail, used] = areas;
        let mut ring = Self {
            desc,
            avail,
            used,
            size,
            last_avail: base,
            seen_avail: base,
            next_used: 0,
            published: 0,
            event_idx: flags.event_idx,
            indirect: flags.indirect,
            muted: false,
            _memory: memory,
        };
        ring.next_used = ring.used_index();
        ring.published = ring.next_used;
        ring
    }

    /// The driver-visible used index.
    pub(super) fn used_index(&self) -> u16 {
        self.used.load16(2, Ordering::Acquire)
    }

    /// The used index as the driver was shown it last.
    pub(super) fn shown_index(&self) -> u16 {
        self.published
    }

    pub(super) fn last_avail(&self) -> u16 {
        self.last_avail
    }

    /// Starts taking chains at `index`.
    pub(super) fn set_last_avail(&mut self, index: u16) {
        self.last_avail = index;
        self.seen_avail = index;
    }

    pub(super) fn used_area(&self) -> RingMemory {
        self.used
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    /// Whether a chain is waiting; loads the driver's index.
    #[inline]
    pub(super) fn has_available(&self) -> bool {
        self.seen_avail != self.last_avail
            || self.avail.load16(2, Ordering::Acquire) != self.last_avail
    }

    /// The next head, or `None` when the ring is empty.
    #[inline]
    pub(super) fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if self.seen_avail == self.last_avail {
            let avail = self.avail.load16(2, Ordering::Acquire);
            if avail == self.last_avail {
                return Ok(None);
            }
            // A driver cannot have more chains out than there are descriptors, counted from what it
            // was shown last; nor can its index go back.
            let ahead = avail.wrapping_sub(self.published);
            if ahead > self.size || avail.wrapping_sub(self.last_avail) > self.size {
                return Err(RingError::IndexJump { avail, last: self.published, size: self.size });
            }
            self.seen_avail = avail;
        }
        let head = self.avail.load16(4 + 2 * self.slot(self.last_avail), Ordering::Relaxed);
        if head >= self.size {
            return Err(RingError::BadIndex(head));
        }
        self.last_avail = self.last_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Fills `chain` from the descriptors that start at `head`.
    #[inline]
    pub(super) fn read_chain(
        &self,
        memory: &GuestMemory,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        chain.clear();
        chain.token = Token { id: head, count: 1, ..Token::default() };
        let mut index = head;
        let mut left = self.size;
        loop {
            let d = self.desc.split_descriptor(index);
            if d.flags & F_INDIRECT != 0 {
                if d.flags & F_NEXT != 0 || !self.indirect {
                    return Err(RingError::BadIndirect(d.len));
                }
                return read_indirect(memory, d.addr, d.len, chain);
            }
            add_buffer(memory, chain, d.addr, d.len, d.flags)?;
            if d.flags & F_NEXT == 0 {
                return Ok(());
            }
            left -= 1;
            if left == 0 {
                return Err(RingError::TooLong);
            }
            if d.next >= self.size {
                return Err(RingError::BadIndex(d.next));
            }
            index = d.next;
        }
    }

    /// Gives the latest chain back untouched.
    pub(super) fn unpop(&mut self) {
        self.last_avail = self.last_avail.wrapping_sub(1);
    }

    /// Writes one used entry; the driver sees it at [`Self::publish`].
    #[inline]
    pub(super) fn write_used(&mut self, token: Token, len: u32) {
        let at = 4 + 8 * self.slot(self.next_used);
        self.used.store32(at, u32::from(token.id));
        self.used.store32(at + 4, len);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Entries written and not shown yet.
    #[inline]
    pub(super) fn unpublished(&self) -> u16 {
        self.next_used.wrapping_sub(self.published)
    }

    /// Shows the driver all entries written; true if it wants an interrupt for them.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let count = self.unpublished();
        self.used.store16(2, self.next_used, Ordering::Release);
        self.published = self.next_used;
        // Full fence: the store of used.idx must be visible before the driver's wish is read,
        // or both sides could go to sleep.
        fence(Ordering::SeqCst);
        self.wants_signal(count)
    }

    /// Whether the driver wants, as of now, an interrupt for the last `count` entries shown.
    #[inline]
    pub(super) fn wants_signal(&self, count: u16) -> bool {
        if self.event_idx {
            let event = self.avail.load16(4 + 2 * usize::from(self.size), Ordering::Relaxed);
            notify::need_event(event, self.published, self.published.wrapping_sub(count))
        } else {
            self.avail.load16(0, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver for notifications; true if chains arrived before it could know.
    pub(super) fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            self.used.store16(4 + 8 * usize::from(self.size), self.last_avail, Ordering::Relaxed);
        } else {
            self.used.store16(0, 0, Ordering::Relaxed);
            self.muted = false;
        }
        fence(Ordering::SeqCst);
        self.avail.load16(2, Ordering::Acquire) != self.last_avail
    }

    /// Asks the driver for silence. With EVENT_IDX nothing needs doing: the event index of the
    /// last enabling is passed once and not met again for 65,536 chains.
    #[inline]
    pub(super) fn disable_notifications(&mut self) {
        if !self.event_idx && !self.muted {
            self.used.store16(0, USED_F_NO_NOTIFY, Ordering::Relaxed);
            self.muted = true;
        }
    }
}

/// Fills `chain` from an indirect table, walked by its `next` fields. Virtio 1.3, 2.7.5.3.
pub(super) fn read_indirect(
    memory: &GuestMemory,
    addr: u64,
    len: u32,
    chain: &mut Chain,
) -> Result<(), RingError> {
    let (table, entries) = indirect_table(memory, addr, len)?;
    let mut index = 0u32;
    let mut left = MAX_CHAIN.min(entries);
    loop {
        let d = table_entry(table, entries, index);
        if d.flags & F_INDIRECT != 0 {
            return Err(RingError::BadIndirect(len));
        }
        add_buffer(memory, chain, d.addr, d.len, d.flags)?;
        if d.flags & F_NEXT == 0 {
            return Ok(());
        }
        left -= 1;
        if left == 0 {
            return Err(RingError::TooLong);
        }
        index = u32::from(d.next);
        if index >= entries {
            return Err(RingError::BadIndex(d.next));
        }
    }
}
