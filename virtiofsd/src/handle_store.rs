//! The open files and directories of the guest, by the handle it was given.
//!
//! Handles name shard, slot and the slot's generation as node ids do: a handle that the guest made up
//! or has released finds nothing. What a handle names is reference-counted; a request that runs with
//! it keeps it open. A handle is never 0, which stands for "none" in the server.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Shards; a power of two.
const SHARDS: usize = 8;
const SHARD_BITS: u32 = SHARDS.trailing_zeros();
/// Slots that a shard may be made to have by a saved state.
const MAX_RESTORED_SLOTS: usize = 1 << 20;

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    open: Option<Arc<T>>,
}

#[derive(Debug)]
struct Shard<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

/// A table of open things.
#[derive(Debug)]
pub struct HandleStore<T> {
    shards: [RwLock<Shard<T>>; SHARDS],
    next: AtomicUsize,
    count: AtomicUsize,
}

impl<T> Default for HandleStore<T> {
    fn default() -> Self {
        Self {
            shards: std::array::from_fn(|_| {
                RwLock::new(Shard { slots: Vec::new(), free: Vec::new() })
            }),
            next: AtomicUsize::new(0),
            count: AtomicUsize::new(0),
        }
    }
}

#[inline]
#[allow(clippy::cast_possible_truncation, reason = "takes halves of a 64-bit handle apart")]
fn split(handle: u64) -> (usize, u32) {
    ((handle as u32 >> SHARD_BITS) as usize, (handle >> 32) as u32)
}

impl<T> HandleStore<T> {
    fn shard(&self, handle: u64) -> &RwLock<Shard<T>> {
        // The mask keeps the index in range.
        &self.shards[usize::try_from(handle).unwrap_or(0) & (SHARDS - 1)]
    }

    fn read(&self, handle: u64) -> RwLockReadGuard<'_, Shard<T>> {
        self.shard(handle).read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, handle: u64) -> RwLockWriteGuard<'_, Shard<T>> {
        self.shard(handle).write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds `open`; `None` when the table is full.
    pub fn insert(&self, open: T) -> Option<u64> {
        let number = (self.next.fetch_add(1, Ordering::Relaxed) & (SHARDS - 1)) as u64;
        let mut shard = self.write(number);
        let open = Some(Arc::new(open));
        let (slot, generation) = match shard.free.pop() {
            Some(slot) => {
                let place = shard.slots.get_mut(slot as usize)?;
                place.open = open;
                (slot, place.generation)
            }
            None => {
                let slot = u32::try_from(shard.slots.len()).ok()?;
                if slot > u32::MAX >> SHARD_BITS {
                    return None;
                }
                shard.slots.push(Slot { generation: 1, open });
                (slot, 1)
            }
        };
        self.count.fetch_add(1, Ordering::Relaxed);
        Some((u64::from(generation) << 32) | u64::from(slot << SHARD_BITS) | number)
    }

    /// What `handle` names.
    #[inline]
    #[must_use]
    pub fn get(&self, handle: u64) -> Option<Arc<T>> {
        let (slot, generation) = split(handle);
        let shard = self.read(handle);
        let slot = shard.slots.get(slot).filter(|slot| slot.generation == generation)?;
        slot.open.clone()
    }

    /// Takes `handle` out.
    pub fn remove(&self, handle: u64) -> Option<Arc<T>> {
        let (slot, generation) = split(handle);
        let mut shard = self.write(handle);
        let place = shard.slots.get_mut(slot).filter(|slot| slot.generation == generation)?;
        let open = place.open.take()?;
        place.generation = place.generation.wrapping_add(1).max(1);
        shard.free.push(u32::try_from(slot).ok()?);
        self.count.fetch_sub(1, Ordering::Relaxed);
        Some(open)
    }

    /// Everything, by handle.
    #[must_use]
    pub fn list(&self) -> Vec<(u64, Arc<T>)> {
        let mut all = Vec::with_capacity(self.len());
        for number in 0..SHARDS as u64 {
            for (slot, place) in (0u64..).zip(&self.read(number).slots) {
                if let Some(open) = &place.open {
                    let handle =
                        (u64::from(place.generation) << 32) | (slot << SHARD_BITS) | number;
                    all.push((handle, Arc::clone(open)));
                }
            }
        }
        all
    }

    /// Puts what another store listed back under its handles; false where one cannot be a handle.
    pub fn restore(&self, all: Vec<(u64, T)>) -> bool {
        let mut good = true;
        for (handle, open) in all {
            let (at, generation) = split(handle);
            let mut shard = self.write(handle);
            if generation == 0 || at >= MAX_RESTORED_SLOTS {
                good = false;
                continue;
            }
            if shard.slots.len() <= at {
                shard.slots.resize_with(at + 1, || Slot { generation: 1, open: None });
            }
            let Some(place) = shard.slots.get_mut(at).filter(|slot| slot.open.is_none()) else {
                good = false;
                continue;
            };
            *place = Slot { generation, open: Some(Arc::new(open)) };
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        for number in 0..SHARDS as u64 {
            let mut shard = self.write(number);
            let slots = (0u32..).zip(&shard.slots);
            shard.free = slots.filter(|(_, s)| s.open.is_none()).map(|(at, _)| at).collect();
        }
        good
    }

    /// Things open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether nothing is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes everything out.
    pub fn clear(&self) {
        for number in 0..SHARDS as u64 {
            let mut shard = self.write(number);
            let mut freed = Vec::new();
            for (at, slot) in shard.slots.iter_mut().enumerate() {
                if slot.open.take().is_some() {
                    slot.generation = slot.generation.wrapping_add(1).max(1);
                    freed.extend(u32::try_from(at));
                }
            }
            self.count.fetch_sub(freed.len(), Ordering::Relaxed);
            shard.free.append(&mut freed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_released_handle_is_never_found_again() {
        let store = HandleStore::default();
        let mut seen = std::collections::HashSet::new();
        for round in 0..1000 {
            let handle = store.insert(round).unwrap();
            assert!(handle != 0 && seen.insert(handle));
            assert_eq!(store.get(handle).as_deref(), Some(&round));
            assert_eq!(store.remove(handle).as_deref(), Some(&round));
            assert!(store.get(handle).is_none() && store.remove(handle).is_none());
        }
        assert!(store.is_empty());
    }

    #[test]
    fn hostile_handles_find_nothing() {
        let store = HandleStore::default();
        let handle = store.insert(()).unwrap();
        for wrong in [0, 1, u64::MAX, handle ^ (1 << 32), handle + 8] {
            assert!(store.get(wrong).is_none() && store.remove(wrong).is_none(), "{wrong:#x}");
        }
    }

    #[test]
    fn clear_takes_everything_and_handles_differ_afterwards() {
        let store = HandleStore::default();
        let old: Vec<u64> = (0..100).map(|n| store.insert(n).unwrap()).collect();
        store.clear();
        assert!(store.is_empty());
        let new: Vec<u64> = (0..100).map(|n| store.insert(n).unwrap()).collect();
        assert!(old.iter().all(|&handle| store.get(handle).is_none()));
        assert!(new.iter().all(|&handle| store.get(handle).is_some()));
    }
}
