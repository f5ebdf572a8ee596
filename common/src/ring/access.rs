//! Reads and writes of shared ring memory: the one place that knows about volatility and order.
#![allow(unsafe_code, reason = "raw access to ring memory shared with the guest")]

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::walk::{PackedDescriptor, SplitDescriptor};

/// Ring memory of a checked size at a checked alignment. Copy freely: it is only a pointer, and the
/// ring that holds it keeps the memory table alive.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingMemory {
    base: *mut u8,
    len: usize,
}

// SAFETY: shared guest memory; all access below is atomic or volatile and needs no thread.
unsafe impl Send for RingMemory {}

impl RingMemory {
    /// # Safety
    /// `base .. base + len` is mapped and stays so while the value or a copy is used, and `base` is
    /// aligned to 16 bytes for descriptors, 4 for used rings, 2 for available rings.
    pub(super) const unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self { base, len }
    }

    #[inline]
    pub(super) fn base(self) -> *mut u8 {
        self.base
    }

    #[inline]
    pub(super) fn len(self) -> usize {
        self.len
    }

    #[inline]
    fn at(self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset + size <= self.len, "ring access within the ring");
        self.base.wrapping_add(offset)
    }

    #[inline]
    fn cell16(self, offset: usize) -> &'static AtomicU16 {
        let p = self.at(offset, 2);
        // SAFETY: in bounds by `at`, aligned by `new` and even offsets; the reference does not
        // leave this module's functions, which end before the ring does.
        unsafe { AtomicU16::from_ptr(p.cast()) }
    }

    #[inline]
    pub(super) fn load16(self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.cell16(offset).load(order))
    }

    #[inline]
    pub(super) fn store16(self, offset: usize, value: u16, order: Ordering) {
        #[cfg(test)]
        super::fault::before_store();
        self.cell16(offset).store(value.to_le(), order);
    }

    #[inline]
    pub(super) fn store32(self, offset: usize, value: u32) {
        #[cfg(test)]
        super::fault::before_store();
        let p = self.at(offset, 4);
        // SAFETY: as in `cell16`, with offsets that are multiples of 4.
        let cell = unsafe { AtomicU32::from_ptr(p.cast()) };
        cell.store(value.to_le(), Ordering::Relaxed);
    }

    /// A copy of the split descriptor at `index`; the guest cannot change it after the checks.
    #[inline]
    pub(super) fn split_descriptor(self, index: u16) -> SplitDescriptor {
        read_split_descriptor(self.at(usize::from(index) * 16, 16))
    }

    /// A copy of the packed descriptor at `index`, all but its flags, which were read before with
    /// acquire order and are passed in.
    #[inline]
    pub(super) fn packed_descriptor(self, index: u16, flags: u16) -> PackedDescriptor {
        let d: PackedDescriptor =
            zerocopy::transmute!(copy16(self.at(usize::from(index) * 16, 16)));
        PackedDescriptor {
            addr: u64::from_le(d.addr),
            len: u32::from_le(d.len),
            id: u16::from_le(d.id),
            flags,
        }
    }
}

/// A copy of 16 bytes at `p`, which the callers found to be mapped. Each is loaded once, so that what
/// is checked is what is used.
#[inline]
fn copy16(p: *const u8) -> [u64; 2] {
    if !p.addr().is_multiple_of(8) {
        // Only a strange guest's indirect table: slow is fine.
        // SAFETY: mapped; a byte array needs no alignment.
        let bytes = unsafe { p.cast::<[u8; 16]>().read_volatile() };
        return zerocopy::transmute!(bytes);
    }
    // SAFETY: mapped, and aligned by the check above.
    let low = unsafe { AtomicU64::from_ptr(p.cast_mut().cast()) };
    // SAFETY: as above.
    let high = unsafe { AtomicU64::from_ptr(p.wrapping_add(8).cast_mut().cast()) };
    [low.load(Ordering::Relaxed), high.load(Ordering::Relaxed)]
}

/// A copy of the split descriptor at `p`.
#[inline]
fn read_split_descriptor(p: *const u8) -> SplitDescriptor {
    let d: SplitDescriptor = zerocopy::transmute!(copy16(p));
    SplitDescriptor {
        addr: u64::from_le(d.addr),
        len: u32::from_le(d.len),
        flags: u16::from_le(d.flags),
        next: u16::from_le(d.next),
    }
}

/// A copy of entry `index` of an indirect table of `entries` entries at `table`.
#[inline]
pub(super) fn table_entry(table: *const u8, entries: u32, index: u32) -> SplitDescriptor {
    assert!(index < entries, "index within the indirect table");
    read_split_descriptor(table.wrapping_add(index as usize * 16))
}
