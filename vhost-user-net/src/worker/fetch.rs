//! Memory asked for before it is needed.
//!
//! A batch's first bytes lie anywhere in guest memory, and another processor wrote them last. Asked for one
//! by one, each is waited for; asked for together, they come together.
#![allow(unsafe_code, reason = "a processor's hint has a raw pointer")]

use outboard_common::ring::IoVecs;

/// Bytes that the processor moves at once.
const LINE: usize = 64;
/// What is asked for at the most: header and head of a frame.
const LINES: usize = 2;

/// Asks the processor for the first bytes of `memory`. It reads nothing and never faults.
#[inline]
pub(super) fn fetch(memory: &IoVecs) {
    let Some(part) = memory.as_slice().first() else { return };
    for line in 0..LINES.min(part.iov_len.div_ceil(LINE)) {
        line_at(part.iov_base.cast::<u8>().wrapping_add(line * LINE));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn line_at(at: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a hint, which does nothing where there is no memory.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
#[inline]
fn line_at(_: *const u8) {}
