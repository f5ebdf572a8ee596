//! On which of its queue pairs a guest sends a flow.
//!
//! # Theory of operation
//! A table of atomic words, looked up by the flow's number, which is the same for both directions. The guest's
//! own workers write it, other ports' workers read it; nobody locks. Flows that share a place do not take it
//! from each other while both are alive: the later one stays unknown, and goes where unknown ones go, so
//! that neither moves to and fro and loses its order.

use std::sync::atomic::{AtomicU32, Ordering};

/// Places, a power of two.
const PLACES: usize = 4096;
/// Ticks of the clock (8 seconds each) after which a flow that was not heard of may lose its place.
const QUIET_TICKS: u32 = 2;
/// Values of the clock that are told apart.
const TICKS: u32 = 512;

/// One place: upper half of the flow's number (16 bits), tick (9), pair plus one (7). Zero is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry(u32);

impl Entry {
    fn new(id: u32, pair: u16, tick: u64) -> Self {
        // The remainder has nine bits.
        let tick = u32::try_from(tick % u64::from(TICKS)).unwrap_or(0);
        Self((id & 0xffff_0000) | (tick << 7) | (u32::from(pair) + 1) & 0x7f)
    }

    fn is_of(self, id: u32) -> bool {
        self.0 != 0 && (self.0 ^ id) >> 16 == 0
    }

    fn pair(self) -> Option<u16> {
        // Seven bits.
        u16::try_from(self.0 & 0x7f).ok()?.checked_sub(1)
    }

    fn is_quiet(self, now: Self) -> bool {
        let tick = |entry: Self| (entry.0 >> 7) % TICKS;
        self.0 == 0 || (tick(now) + TICKS - tick(self)) % TICKS >= QUIET_TICKS
    }
}

/// The table.
#[derive(Debug)]
pub struct Flows {
    places: Box<[AtomicU32]>,
}

impl Flows {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self { places: (0..PLACES).map(|_| AtomicU32::new(0)).collect() }
    }

    fn place(&self, id: u32) -> Option<&AtomicU32> {
        self.places.get(id as usize % PLACES)
    }

    /// The guest sent a frame of flow `id` on `pair`.
    pub fn learn(&self, id: u32, pair: u16, tick: u64) {
        let Some(place) = self.place(id) else { return };
        let new = Entry::new(id, pair, tick);
        let old = Entry(place.load(Ordering::Relaxed));
        if old != new && (old.is_of(id) || old.is_quiet(new)) {
            place.store(new.0, Ordering::Relaxed);
        }
    }

    /// On which pair the guest last sent frames of flow `id`, if that is known.
    #[must_use]
    pub fn find(&self, id: u32) -> Option<u16> {
        let entry = Entry(self.place(id)?.load(Ordering::Relaxed));
        if entry.is_of(id) { entry.pair() } else { None }
    }

    /// Forgets them all.
    pub fn clear(&self) {
        for place in &self.places {
            // Pages that were never written to are not made real.
            if place.load(Ordering::Relaxed) != 0 {
                place.store(0, Ordering::Relaxed);
            }
        }
    }
}

impl Default for Flows {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOW: u32 = 0x1234_5678;
    /// Another one in the same place.
    const RIVAL: u32 = 0x4321_5678;

    #[test]
    fn a_flow_is_where_it_was_last_sent() {
        let flows = Flows::new();
        assert_eq!(flows.find(FLOW), None);
        assert_eq!(flows.find(0), None);
        for (pair, tick) in [(1, 0), (63, 0), (0, 511), (5, 512)] {
            flows.learn(FLOW, pair, tick);
            assert_eq!(flows.find(FLOW), Some(pair));
        }
        assert_eq!(flows.find(RIVAL), None);
        flows.clear();
        assert_eq!(flows.find(FLOW), None);
    }

    #[test]
    fn a_living_flow_keeps_its_place() {
        let flows = Flows::new();
        flows.learn(FLOW, 1, 511);
        flows.learn(RIVAL, 2, 512);
        assert_eq!((flows.find(FLOW), flows.find(RIVAL)), (Some(1), None));
        flows.learn(RIVAL, 2, 513);
        assert_eq!((flows.find(FLOW), flows.find(RIVAL)), (None, Some(2)));
    }
}
