//! A descriptor chain, checked and turned into lists of host memory.
//!
//! # Theory of operation
//! [`Queue::pop`](super::Queue::pop) walks one chain of descriptors, checks every one against the
//! memory table and fills the two [`IoVecs`] of a caller-owned [`Chain`]: what the device may read
//! and what it may write. Their entries are plain `iovec`s that point straight into guest memory,
//! so a device hands them to `preadv2`, `writev` or io_uring and the kernel moves the data: nothing
//! is copied here. A `Chain` keeps its vectors between requests, so that the hot path allocates
//! nothing after the first few.
//!
//! An `IoVecs` is consumed in place, from the front ([`advance`](IoVecs::advance), the `read_*` and
//! `write_*` methods) and from the back ([`take_tail`](IoVecs::take_tail)). The entries themselves
//! stay recoverable, since the dirty log needs the whole of what was writable at completion.
//!
//! Guest memory can change under us at any time. Nothing here makes references to it: bytes are
//! copied through raw pointers, and what was checked is the copy.
#![allow(unsafe_code, reason = "copies to and from guest memory through raw pointers")]

use std::mem::MaybeUninit;

use libc::iovec;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A list of host memory ranges, consumed from both ends.
pub struct IoVecs {
    entries: Vec<iovec>,
    /// First entry with something left.
    start: usize,
    /// Bytes by which `entries[start]` has been advanced.
    head_adjust: usize,
    /// One past the last entry with something left.
    end: usize,
    /// Bytes cut off the end of `entries[end - 1]`.
    tail_adjust: usize,
    /// Bytes left.
    len: usize,
}

// SAFETY: the pointers lead into shared guest memory, which any thread may access while the
// memory table that they were made from is alive; the `Queue` keeps it so.
unsafe impl Send for IoVecs {}

impl std::fmt::Debug for IoVecs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoVecs")
            .field("entries", &(self.end - self.start))
            .field("len", &self.len)
            .finish()
    }
}

impl Default for IoVecs {
    fn default() -> Self {
        Self::new()
    }
}

impl IoVecs {
    /// An empty list.
    #[must_use]
    pub const fn new() -> Self {
        Self { entries: Vec::new(), start: 0, head_adjust: 0, end: 0, tail_adjust: 0, len: 0 }
    }

    /// Forgets everything but the capacity.
    #[inline]
    pub fn clear(&mut self) {
        self.entries.clear();
        self.start = 0;
        self.head_adjust = 0;
        self.end = 0;
        self.tail_adjust = 0;
        self.len = 0;
    }

    /// Appends `len` bytes at `base`. Zero-length ranges are left out. Only for a list from which
    /// nothing has been consumed.
    ///
    /// # Safety
    /// `base .. base + len` is mapped memory, shared with the guest or owned by the caller, that
    /// stays mapped for as long as this list or anything made from it is used.
    #[inline]
    pub unsafe fn push(&mut self, base: *mut u8, len: usize) {
        debug_assert!(
            self.head_adjust == 0 && self.tail_adjust == 0 && self.end == self.entries.len()
        );
        if len == 0 {
            return;
        }
        self.entries.push(iovec { iov_base: base.cast(), iov_len: len });
        self.end = self.entries.len();
        // A chain is at most 4 GiB per entry and the entries are bounded: no overflow on 64 bits.
        self.len += len;
    }

    /// As [`Self::push`], but with `joins` a range that begins where the last one ends becomes part of it:
    /// the kernel then has fewer ranges to walk. Only for ranges of one mapping.
    ///
    /// # Safety
    /// As [`Self::push`].
    #[inline]
    pub(crate) unsafe fn push_joined(&mut self, base: *mut u8, len: usize, joins: bool) {
        debug_assert!(self.tail_adjust == 0 && self.end == self.entries.len());
        match self.entries.last_mut() {
            Some(last) if joins && last.iov_base.wrapping_byte_add(last.iov_len) == base.cast() => {
                last.iov_len += len;
                self.len += len;
            }
            // SAFETY: handed on from the caller.
            _ => unsafe { self.push(base, len) },
        }
    }

    /// Bytes left.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is left, as the kernel wants it. The pointers are valid while the chain's queue holds
    /// the chain, that is until it is pushed.
    #[inline]
    #[must_use]
    pub fn as_slice(&self) -> &[iovec] {
        self.entries.get(self.start..self.end).unwrap_or(&[])
    }

    /// Forgets the first `n` bytes (all, if fewer are left).
    #[inline]
    pub fn advance(&mut self, n: usize) {
        let mut n = n.min(self.len);
        self.len -= n;
        while n > 0 {
            let entry = &mut self.entries[self.start];
            if n < entry.iov_len {
                entry.iov_base = entry.iov_base.wrapping_byte_add(n);
                entry.iov_len -= n;
                self.head_adjust += n;
                return;
            }
            n -= entry.iov_len;
            self.drop_first();
        }
    }

    /// Leaves the first entry behind, whole again.
    #[inline]
    fn drop_first(&mut self) {
        let entry = &mut self.entries[self.start];
        entry.iov_base = entry.iov_base.wrapping_byte_sub(self.head_adjust);
        entry.iov_len += self.head_adjust;
        self.head_adjust = 0;
        self.start += 1;
        if self.start == self.end {
            // The tail cut belonged to this same entry.
            self.entries[self.start - 1].iov_len += self.tail_adjust;
            self.tail_adjust = 0;
        }
    }

    /// Keeps only the first `n` bytes (all, if fewer are left).
    #[inline]
    pub fn truncate(&mut self, n: usize) {
        let mut cut = self.len.saturating_sub(n);
        self.len -= cut;
        while cut > 0 {
            let entry = &mut self.entries[self.end - 1];
            if cut < entry.iov_len {
                entry.iov_len -= cut;
                self.tail_adjust += cut;
                return;
            }
            cut -= entry.iov_len;
            entry.iov_len += self.tail_adjust;
            self.tail_adjust = 0;
            if self.end - 1 == self.start {
                entry.iov_base = entry.iov_base.wrapping_byte_sub(self.head_adjust);
                entry.iov_len += self.head_adjust;
                self.head_adjust = 0;
            }
            self.end -= 1;
        }
    }

    /// Undoes every `advance` and `truncate`: the chain's own entries again.
    pub fn rewind(&mut self) {
        if self.start < self.end {
            let first = &mut self.entries[self.start];
            first.iov_base = first.iov_base.wrapping_byte_sub(self.head_adjust);
            first.iov_len += self.head_adjust;
            self.entries[self.end - 1].iov_len += self.tail_adjust;
        }
        self.start = 0;
        self.head_adjust = 0;
        self.end = self.entries.len();
        self.tail_adjust = 0;
        self.len = self.entries.iter().map(|e| e.iov_len).sum();
    }

    /// Copies up to `out.len()` bytes from the front and consumes them; returns how many.
    #[inline]
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let want = out.len().min(self.len);
        let mut done = 0;
        while done < want {
            let entry = self.entries[self.start];
            let n = entry.iov_len.min(want - done);
            // SAFETY: `push` promised the source range, `n` is within both, and `out` is ours and
            // so not guest memory.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    entry.iov_base.cast::<u8>(),
                    out.as_mut_ptr().wrapping_add(done),
                    n,
                );
            }
            done += n;
            self.advance(n);
        }
        done
    }

    /// Copies a whole `T` from the front and consumes it; `None`, with nothing consumed, when fewer
    /// bytes are left.
    #[inline]
    pub fn read_obj<T: FromBytes>(&mut self) -> Option<T> {
        let size = size_of::<T>();
        if self.len < size {
            return None;
        }
        let mut value = MaybeUninit::<T>::zeroed();
        // SAFETY: the slice covers the zeroed (so initialised) bytes of `value` exactly.
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(value.as_mut_ptr().cast::<u8>(), size) };
        self.read(bytes);
        // SAFETY: every byte was written, and any bytes are a `T`: `FromBytes`.
        Some(unsafe { value.assume_init() })
    }

    /// Copies `data` to the front and consumes what it took; returns how many bytes fitted.
    #[inline]
    pub fn write(&mut self, data: &[u8]) -> usize {
        let want = data.len().min(self.len);
        let mut done = 0;
        while done < want {
            let entry = self.entries[self.start];
            let n = entry.iov_len.min(want - done);
            // SAFETY: `push` promised the target range, `n` is within both, and `data` is ours
            // and so not guest memory.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    data.as_ptr().wrapping_add(done),
                    entry.iov_base.cast::<u8>(),
                    n,
                );
            }
            done += n;
            self.advance(n);
        }
        done
    }

    /// Copies a whole `T` to the front and consumes its room; false, with nothing done, when it
    /// does not fit.
    #[inline]
    pub fn write_obj<T: IntoBytes + Immutable>(&mut self, value: &T) -> bool {
        if self.len < size_of::<T>() {
            return false;
        }
        self.write(value.as_bytes());
        true
    }

    /// Zeroes `n` bytes at the front (fewer if fewer are left) and consumes them; returns how many.
    pub fn write_zeroes(&mut self, n: usize) -> usize {
        let want = n.min(self.len);
        let mut done = 0;
        while done < want {
            let entry = self.entries[self.start];
            let n = entry.iov_len.min(want - done);
            // SAFETY: `push` promised the range and `n` is within it.
            unsafe { std::ptr::write_bytes(entry.iov_base.cast::<u8>(), 0, n) };
            done += n;
            self.advance(n);
        }
        done
    }

    /// Moves the first `n` bytes to the end of `front` (its own former content is forgotten) and
    /// consumes them here; returns how many that were. With it a device writes a reply's payload
    /// before its header: split the header's room off, fill the rest, then fill the header.
    pub fn split_front(&mut self, n: usize, front: &mut IoVecs) -> usize {
        front.clear();
        let want = n.min(self.len);
        let mut done = 0;
        while done < want {
            let entry = self.entries[self.start];
            let n = entry.iov_len.min(want - done);
            // SAFETY: the range lies within one that `push` already promised for this list.
            unsafe { front.push(entry.iov_base.cast(), n) };
            done += n;
            self.advance(n);
        }
        done
    }

    /// Moves the last `n` bytes into `tail` (its own former content is forgotten) and forgets them
    /// here; returns how many that were. A blk request's status byte is its chain's last byte.
    pub fn take_tail(&mut self, n: usize, tail: &mut IoVecs) -> usize {
        tail.clear();
        let take = n.min(self.len);
        let mut skip = self.len - take;
        for entry in self.as_slice() {
            if skip >= entry.iov_len {
                skip -= entry.iov_len;
                continue;
            }
            // SAFETY: the range lies within one that `push` already promised for this list.
            unsafe {
                tail.push(entry.iov_base.cast::<u8>().wrapping_add(skip), entry.iov_len - skip)
            };
            skip = 0;
        }
        self.truncate(self.len - take);
        take
    }
}

/// What a completed chain is known by in its ring; opaque to devices.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Token {
    /// Split: head descriptor. Packed: buffer id.
    pub(crate) id: u16,
    /// Packed: how many ring descriptors the chain took. Split: 1.
    pub(crate) count: u16,
    /// Packed with inflight tracking: the chain's first entry in the inflight region.
    pub(crate) inflight: u16,
    /// IN_ORDER: the chain's place in the order of popping.
    pub(crate) sequence: u16,
    /// Packed: where the chain starts, as half of a vring base.
    pub(crate) head: u16,
    /// Taken from the inflight record, not from the ring.
    pub(crate) again: bool,
}

/// One descriptor chain between pop and push. Reused from request to request.
#[derive(Debug, Default)]
pub struct Chain {
    /// What the device reads (the driver's "out" descriptors), in order.
    pub readable: IoVecs,
    /// What the device writes (the driver's "in" descriptors), in order.
    pub writable: IoVecs,
    pub(crate) token: Token,
}

impl Chain {
    /// An empty chain, to be filled by [`Queue::pop`](super::Queue::pop).
    #[must_use]
    pub const fn new() -> Self {
        Self {
            readable: IoVecs::new(),
            writable: IoVecs::new(),
            token: Token { id: 0, count: 0, inflight: 0, sequence: 0, head: 0, again: false },
        }
    }

    /// Makes this chain empty, keeping capacity.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(buffers: &mut [Vec<u8>]) -> IoVecs {
        let mut v = IoVecs::new();
        for b in buffers {
            // SAFETY: the buffers outlive the list in every test below.
            unsafe { v.push(b.as_mut_ptr(), b.len()) };
        }
        v
    }

    proptest! {
        #[test]
        fn consuming_from_both_ends_reads_what_a_flat_buffer_holds(
            sizes in proptest::collection::vec(0usize..9, 1..8),
            ops in proptest::collection::vec((0u8..4, 0usize..12), 0..12),
        ) {
            let mut next = 0u8;
            let mut buffers: Vec<Vec<u8>> = sizes.iter().map(|&s| (0..s).map(|_| { next = next.wrapping_add(1); next }).collect()).collect();
            let mut flat: Vec<u8> = buffers.concat();
            let whole = flat.clone();
            let mut v = list(&mut buffers);
            for (op, n) in ops {
                match op {
                    0 => { v.advance(n); flat.drain(..n.min(flat.len())); }
                    1 => { v.truncate(n); flat.truncate(n); }
                    2 => {
                        let mut out = vec![0; n];
                        let got = v.read(&mut out);
                        let expect: Vec<u8> = flat.drain(..n.min(flat.len())).collect();
                        prop_assert_eq!(&out[..got], &expect[..]);
                    }
                    _ => {
                        let mut tail = IoVecs::new();
                        let got = v.take_tail(n, &mut tail);
                        let at = flat.len() - n.min(flat.len());
                        let expect = flat.split_off(at);
                        let mut out = vec![0; got];
                        tail.read(&mut out);
                        prop_assert_eq!(out, expect);
                    }
                }
                prop_assert_eq!(v.len(), flat.len());
                prop_assert_eq!(v.as_slice().iter().map(|e| e.iov_len).sum::<usize>(), flat.len());
            }
            v.rewind();
            let mut out = vec![0; v.len()];
            v.read(&mut out);
            prop_assert_eq!(out, whole);
        }
    }

    #[test]
    fn objects_cross_entries() {
        let mut buffers = vec![vec![1u8, 2, 3], vec![4u8, 5]];
        let mut v = list(&mut buffers);
        assert_eq!(v.read_obj::<u32>().map(u32::to_le_bytes), Some([1, 2, 3, 4]));
        assert_eq!(v.read_obj::<u32>(), None);
        assert_eq!(v.len(), 1);
        v.rewind();
        assert!(v.write_obj(&0x0807_0605u32));
        assert!(!v.write_obj(&0u32));
        assert_eq!(buffers, vec![vec![5u8, 6, 7], vec![8u8, 5]]);
    }
}
