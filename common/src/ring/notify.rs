//! When to interrupt: the EVENT_IDX rule, the only copy of it.

/// Whether moving an index from `old` to `new` passes the other side's `event` index, so that it
/// wants to be told. All three are free-running 16-bit counters. Virtio 1.3, 2.7.10 and its
/// `vring_need_event`.
#[inline]
#[must_use]
pub const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::need_event;

    #[test]
    fn wants_exactly_the_batch_that_passes_the_event() {
        assert!(need_event(5, 6, 5));
        assert!(!need_event(6, 6, 5));
        assert!(!need_event(4, 6, 5));
        assert!(need_event(0xffff, 3, 0xfff0));
        assert!(!need_event(3, 3, 0xfff0));
        assert!(!need_event(0, 0, 0));
    }
}
