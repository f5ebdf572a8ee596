//! Counters of every queue and device, and the registry they are read from.
//!
//! A counter has one writer, the thread that owns the queue, and any number of readers. So an
//! increment is a relaxed load, an add and a relaxed store: two plain `mov`s on the processors we
//! run on, never a locked read-modify-write. A reader sees some recent value; values of different
//! counters are not a consistent snapshot.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that only grows (modulo 2^64). One thread adds, any thread reads.
///
/// Adding from two threads at once is not unsafe, but loses additions.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter that stands at 0.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `n`. Only the owning thread may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        let value = self.0.load(Ordering::Relaxed);
        self.0.store(value.wrapping_add(n), Ordering::Relaxed);
    }

    /// The value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What every virtqueue counts, whatever its device does.
#[derive(Debug, Default)]
pub struct QueueMetrics {
    /// Kicks received from the guest (events read, not buffers made available).
    pub kicks: Counter,
    /// Descriptor chains taken from the available ring.
    pub requests: Counter,
    /// Requests answered with an error status because the guest sent nonsense.
    pub rejected: Counter,
    /// Times the queue was taken out of service because its ring was broken (0 or 1 per start).
    pub retired: Counter,
    /// Used-buffer notifications sent to the guest.
    pub signals: Counter,
    /// Payload bytes the device read from guest memory.
    pub bytes_read: Counter,
    /// Payload bytes the device wrote to guest memory.
    pub bytes_written: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_adds_and_wraps() {
        let counter = Counter::new();
        counter.add(3);
        counter.add(4);
        assert_eq!(counter.get(), 7);
        counter.add(u64::MAX);
        assert_eq!(counter.get(), 6);
    }
}
