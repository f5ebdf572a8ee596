//! The packed virtqueue, seen from the device. Virtio 1.3, 2.8.
//!
//! # Theory of operation
//! One ring of descriptors serves both ways: the driver makes one available by setting its AVAIL bit
//! to the driver's wrap counter and USED to the opposite; the device uses it by setting both to
//! its own. We keep two positions with a wrap counter each: where the next chain is read, and where
//! the next used descriptor is written; the second follows the first by the descriptors that
//! outstanding chains took. A batch of used descriptors is shown by storing the flags of its *first*
//! descriptor last, with release order (the driver reads in order and stops at the first that is
//! not used).

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::access::{RingMemory, table_entry};
use super::chain::{Chain, Token};
use super::notify;
use super::walk::{
    F_INDIRECT, F_NEXT, F_WRITE, PackedDescriptor, RingError, add_buffer, indirect_table,
};
use crate::vhost_user::memory::GuestMemory;

const F_AVAIL: u16 = 1 << 7;
const F_USED: u16 = 1 << 15;

/// Event suppression flags. Virtio 1.3, 2.8.14.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A place in the ring with its wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) index: u16,
    pub(super) wrap: bool,
}

impl Position {
    /// Decodes half of a vring base: bit 15 is the wrap counter. vhost-user, "vring state".
    pub(super) const fn from_bits(bits: u16) -> Self {
        Self { index: bits & 0x7fff, wrap: bits & 0x8000 != 0 }
    }

    pub(super) const fn bits(self) -> u16 {
        self.index | if self.wrap { 0x8000 } else { 0 }
    }

    /// Descriptors from here to `to`, which is at most `size` further on; 0 if it is not.
    pub(super) const fn distance_to(self, to: Self, size: u16) -> u16 {
        if self.wrap == to.wrap {
            to.index.saturating_sub(self.index)
        } else if to.index <= self.index {
            size - (self.index - to.index)
        } else {
            0
        }
    }

    /// `count` descriptors further on in a ring of `size`; `count` is at most `size`.
    pub(super) const fn plus(self, count: u16, size: u16) -> Self {
        let index = self.index as u32 + count as u32;
        if index >= size as u32 {
            #[allow(clippy::cast_possible_truncation, reason = "below size, a u16")]
            Self { index: (index - size as u32) as u16, wrap: !self.wrap }
        } else {
            #[allow(clippy::cast_possible_truncation, reason = "below size, a u16")]
            Self { index: index as u16, wrap: self.wrap }
        }
    }
}

/// A chain as found in the ring, for the inflight record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found {
    /// First descriptor's index.
    pub(super) head: Position,
    /// Ring descriptors it takes.
    pub(super) count: u16,
    /// The first of them, as it was read.
    pub(super) first: PackedDescriptor,
}

#[derive(Debug)]
pub(super) struct PackedRing {
    desc: RingMemory,
    /// Driver event suppression (we read).
    driver_event: RingMemory,
    /// Device event suppression (we write).
    device_event: RingMemory,
    size: u16,
    avail: Position,
    used: Position,
    /// First used descriptor not shown yet, with the flags to show it by.
    first_unpublished: Option<(Position, u16)>,
    /// Descriptors used since the last publish.
    unpublished: u16,
    /// Descriptors popped and not shown as used: at most `size`.
    taken: u16,
    event_idx: bool,
    indirect: bool,
    muted: bool,
    _memory: Arc<GuestMemory>,
}

/// Whether both positions of the vring base `base` are within a ring of `size`.
pub(super) fn base_fits(base: u32, size: u16) -> bool {
    let within = |half: u32| u16::try_from(half & 0x7fff).is_ok_and(|index| index < size);
    within(base) && within(base >> 16)
}

/// Bytes of descriptor ring and of each event suppression structure.
pub(super) fn area_sizes(size: u16) -> (usize, usize, usize) {
    (16 * usize::from(size), 4, 4)
}

impl PackedRing {
    /// `areas` are descriptor ring, driver and device event suppression; `base` is the vring base,
    /// low half the available position, high half the used one.
    pub(super) fn new(
        areas: [RingMemory; 3],
        size: u16,
        base: u32,
        flags: super::RingFlags,
        memory: Arc<GuestMemory>,
    ) -> Self {
        let [desc, driver_event, device_event] = areas;
        let (avail, used) = Self::positions(base, desc);
        let (avail, used) = (Self::clamp(avail, size), Self::clamp(used, size));
        Self {
            desc,
            driver_event,
            device_event,
            size,
            avail,
            used,
            taken: used.distance_to(avail, size),
            first_unpublished: None,
            unpublished: 0,
            event_idx: flags.event_idx,
            indirect: flags.indirect,
            muted: false,
            _memory: memory,
        }
    }

    /// Where to go on. Front ends differ: QEMU gives both positions. DPDK gives the available one alone, and
    /// the other half is 0. UML does not know of wrap counters and starts every ring with 0, where
    /// a fresh ring's counters are 1; such a ring shows in its first descriptor, which the device
    /// has never used.
    fn positions(base: u32, desc: RingMemory) -> (Position, Position) {
        #[allow(clippy::cast_possible_truncation, reason = "the low half is wanted")]
        let avail = Position::from_bits(base as u16);
        let fresh = base == 0 && desc.load16(14, Ordering::Acquire) & F_USED == 0;
        if fresh {
            let start = Position { index: 0, wrap: true };
            return (start, start);
        }
        match u16::try_from(base >> 16).unwrap_or(0) {
            0 => (avail, avail),
            bits => (avail, Position::from_bits(bits)),
        }
    }

    /// A front end's bad base must not index past the ring.
    fn clamp(p: Position, size: u16) -> Position {
        if p.index < size { p } else { Position { index: 0, wrap: p.wrap } }
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.avail.bits()) | u32::from(self.used.bits()) << 16
    }

    pub(super) fn used_position(&self) -> Position {
        self.used
    }

    /// Continues as if `used` were where the next used descriptor goes and `outstanding` descriptors
    /// after it had been taken.
    pub(super) fn set_positions(&mut self, used: Position, outstanding: u16) {
        self.used = Self::clamp(used, self.size);
        self.taken = outstanding.min(self.size);
        self.avail = self.used.plus(self.taken, self.size);
    }

    /// Makes the outstanding descriptors look available again. A dead daemon may have written used
    /// ones behind the first of a batch that it did not live to show; the driver, which reads on
    /// until it finds one that is not used, would take them for ours.
    pub(super) fn restore_outstanding(&self) {
        for i in 0..self.taken {
            let at = self.used.plus(i, self.size);
            let rest = self.flags_at(at.index, Ordering::Relaxed) & !(F_AVAIL | F_USED);
            let available = if at.wrap { F_AVAIL } else { F_USED };
            self.desc.store16(usize::from(at.index) * 16 + 14, rest | available, Ordering::Release);
        }
    }

    pub(super) fn desc_area(&self) -> RingMemory {
        self.desc
    }

    pub(super) fn event_area(&self) -> RingMemory {
        self.device_event
    }

    #[inline]
    fn flags_at(&self, index: u16, order: Ordering) -> u16 {
        self.desc.load16(usize::from(index) * 16 + 14, order)
    }

    #[inline]
    fn is_available(flags: u16, wrap: bool) -> bool {
        (flags & F_AVAIL != 0) == wrap && (flags & F_USED != 0) != wrap
    }

    /// Whether the descriptor at `at` still looks available, that is, was never used.
    pub(super) fn still_available(&self, at: Position) -> bool {
        let at = Self::clamp(at, self.size);
        Self::is_available(self.flags_at(at.index, Ordering::Acquire), at.wrap)
    }

    /// Whether a chain is waiting.
    #[inline]
    pub(super) fn has_available(&self) -> bool {
        Self::is_available(self.flags_at(self.avail.index, Ordering::Acquire), self.avail.wrap)
    }

    /// A copy of the ring descriptor at `index`.
    pub(super) fn descriptor(&self, index: u16) -> PackedDescriptor {
        let flags = self.flags_at(index, Ordering::Acquire);
        self.desc.packed_descriptor(index, flags)
    }

    /// Takes the next chain. `Ok(None)`: none waiting. An address error still consumes it, with
    /// `chain.token` set, so that it can be given back unused.
    #[inline]
    pub(super) fn pop(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<Option<Found>, (RingError, Option<Found>)> {
        let head = self.avail;
        let mut flags = self.flags_at(head.index, Ordering::Acquire);
        if !Self::is_available(flags, head.wrap) {
            return Ok(None);
        }
        // What was taken and not shown as used yet is not the driver's to make available.
        let room = self.size - self.taken;
        if room == 0 {
            return Err((RingError::TooLong, None));
        }
        chain.clear();
        let mut at = head;
        let mut count = 0u16;
        let mut fault = None;
        let first = self.desc.packed_descriptor(at.index, flags);
        let mut d = first;
        let id = loop {
            count += 1;
            at = at.plus(1, self.size);
            if fault.is_none()
                && let Err(e) = self.add(memory, chain, &d, count)
            {
                if !e.is_chain_only() {
                    return Err((e, None));
                }
                fault = Some(e);
            }
            if d.flags & F_NEXT == 0 {
                break d.id;
            }
            if count >= room {
                return Err((RingError::TooLong, None));
            }
            flags = self.flags_at(at.index, Ordering::Acquire);
            d = self.desc.packed_descriptor(at.index, flags);
        };
        chain.token = Token { id, count, head: head.bits(), ..Token::default() };
        self.avail = at;
        self.taken += count;
        let found = Found { head, count, first };
        match fault {
            None => Ok(Some(found)),
            Some(e) => Err((e, Some(found))),
        }
    }

    #[inline]
    pub(super) fn add(
        &self,
        memory: &GuestMemory,
        chain: &mut Chain,
        d: &PackedDescriptor,
        count: u16,
    ) -> Result<(), RingError> {
        if d.flags & F_INDIRECT == 0 {
            return add_buffer(memory, chain, d.addr, d.len, d.flags);
        }
        // An indirect descriptor stands alone in its chain. Virtio 1.3, 2.8.19.
        if count != 1 || d.flags & F_NEXT != 0 || !self.indirect {
            return Err(RingError::BadIndirect(d.len));
        }
        let (table, entries) = indirect_table(memory, d.addr, d.len)?;
        for i in 0..entries {
            // The flags are a packed descriptor's last field, where a split one has `next`; only WRITE
            // counts, and entries stand in order. Virtio 1.3, 2.8.7.
            let entry = table_entry(table, entries, i);
            add_buffer(memory, chain, entry.addr, entry.len, entry.next & F_WRITE)?;
        }
        Ok(())
    }

    /// Gives the latest chain, of `count` descriptors from `head` on, back untouched.
    pub(super) fn unpop(&mut self, head: u16, count: u16) {
        self.avail = Self::clamp(Position::from_bits(head), self.size);
        self.taken = self.taken.saturating_sub(count);
    }

    /// Writes one used descriptor, all but the flags of a batch's first.
    #[inline]
    pub(super) fn write_used(&mut self, token: Token, len: u32) {
        let at = self.used;
        let offset = usize::from(at.index) * 16;
        self.desc.store32(offset + 8, len);
        self.desc.store16(offset + 12, token.id, Ordering::Relaxed);
        let mut flags = if at.wrap { F_AVAIL | F_USED } else { 0 };
        if len > 0 {
            flags |= F_WRITE;
        }
        if self.first_unpublished.is_none() {
            self.first_unpublished = Some((at, flags));
        } else {
            self.desc.store16(offset + 14, flags, Ordering::Release);
        }
        self.used = at.plus(token.count, self.size);
        self.unpublished += token.count;
    }

    #[inline]
    pub(super) fn unpublished(&self) -> u16 {
        self.unpublished
    }

    /// Shows the driver all used descriptors written; true if it wants an interrupt for them.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        if let Some((at, flags)) = self.first_unpublished.take() {
            self.desc.store16(usize::from(at.index) * 16 + 14, flags, Ordering::Release);
        }
        let batch = std::mem::take(&mut self.unpublished);
        self.taken = self.taken.saturating_sub(batch);
        // As in the split ring: our store before their wish.
        fence(Ordering::SeqCst);
        self.wants_signal(batch)
    }

    /// Whether the driver wants, as of now, an interrupt for the last `batch` descriptors shown.
    #[inline]
    pub(super) fn wants_signal(&self, batch: u16) -> bool {
        let flags = self.driver_event.load16(2, Ordering::Acquire);
        match flags & 3 {
            EVENT_ENABLE => true,
            EVENT_DESC if self.event_idx => {
                let event = Position::from_bits(self.driver_event.load16(0, Ordering::Relaxed));
                self.passes(event, batch)
            }
            EVENT_DISABLE => false,
            _ => true,
        }
    }

    /// Whether the last `batch` descriptors up to the used position include `event`.
    fn passes(&self, event: Position, batch: u16) -> bool {
        let new = self.used.index;
        let old = new.wrapping_sub(batch);
        let event_index = if event.wrap == self.used.wrap {
            event.index
        } else {
            event.index.wrapping_sub(self.size)
        };
        notify::need_event(event_index, new, old)
    }

    /// Asks the driver for notifications; true if a chain arrived before it could know.
    pub(super) fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            self.device_event.store16(0, self.avail.bits(), Ordering::Relaxed);
            self.device_event.store16(2, EVENT_DESC, Ordering::Release);
        } else {
            self.device_event.store16(2, EVENT_ENABLE, Ordering::Release);
        }
        self.muted = false;
        fence(Ordering::SeqCst);
        self.has_available()
    }

    /// Asks the driver for silence.
    #[inline]
    pub(super) fn disable_notifications(&mut self) {
        if !self.muted {
            self.device_event.store16(2, EVENT_DISABLE, Ordering::Relaxed);
            self.muted = true;
        }
    }
}
