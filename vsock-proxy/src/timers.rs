//! Deadlines of connections. A deadline that was called off stays in the heap until it comes or the
//! heap is swept, so that calling off costs nothing.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

/// Deadlines of things known by a token.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, u64)>>,
}

impl Timers {
    /// Adds a deadline.
    pub(crate) fn add(&mut self, at: Instant, token: u64) {
        self.heap.push(Reverse((at, token)));
    }

    /// The first deadline.
    pub(crate) fn first(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes a deadline that has come.
    pub(crate) fn next_due(&mut self, now: Instant) -> Option<u64> {
        if self.first()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse((_, token))| token)
    }

    /// Forgets deadlines that `wanted` does not want, once there are more than `expected` suggests.
    pub(crate) fn sweep(&mut self, expected: usize, mut wanted: impl FnMut(Instant, u64) -> bool) {
        if self.heap.len() > 2 * expected + 64 {
            self.heap.retain(|Reverse((at, token))| wanted(*at, *token));
            self.heap.shrink_to(expected + 64);
        }
    }
}
