//! The record of requests in flight, in memory that outlives this process.
//!
//! # Theory of operation
//! vhost-user specification, "Inflight I/O tracking". The front end keeps a memory file for us; each
//! queue has a region in it, laid out as the specification says. Taking a chain marks its head as in
//! flight with a running number; publishing used entries first links the batch's heads, then shows
//! them to the driver, then clears their marks and copies the used index. Whatever instant the
//! process dies at, the next one can tell: if the region's used index is behind the ring's, the last
//! batch was shown but its marks not cleared. Marks that remain are requests to do again, by number.
//!
//! For the packed ring, which overwrites descriptors as they are used, the region also holds a copy
//! of each descriptor in flight, on a free list threaded through `next`.
//!
//! The front end owns this memory, so what is read from it is range-checked like a guest's.
#![allow(unsafe_code, reason = "raw access to the shared inflight region")]

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use vm_memory::MmapRegion;

use super::packed::{PackedRing, Position};
use super::walk::{F_NEXT, PackedDescriptor};

/// Regions start at multiples of this. (The specification leaves it to the back end.)
const ALIGNMENT: usize = 64;
const VERSION: u16 = 1;
/// Bytes before the descriptor states, split and packed.
const SPLIT_HEADER: usize = 16;
const SPLIT_STATE: usize = 16;
const PACKED_HEADER: usize = 32;
const PACKED_STATE: usize = 32;
/// The mark of a chain in flight, with the padding byte after it.
const MARK: u16 = u16::from_ne_bytes([1, 0]);

/// Bytes that one queue of `size` needs.
#[must_use]
pub fn region_size(size: u16, packed: bool) -> usize {
    let (header, state) =
        if packed { (PACKED_HEADER, PACKED_STATE) } else { (SPLIT_HEADER, SPLIT_STATE) };
    (header + state * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// One queue's region.
#[derive(Debug, Clone)]
pub struct InflightRegion {
    /// Keeps `base` mapped.
    _map: Arc<MmapRegion>,
    base: *mut u8,
    len: usize,
}

// SAFETY: the pointer is into shared memory that `_map` keeps, whatever thread the value is on.
unsafe impl Send for InflightRegion {}

/// An entry of the packed record, found to be within the region.
#[derive(Clone, Copy)]
struct PackedEntry<'a> {
    words: *mut u64,
    _region: PhantomData<&'a InflightRegion>,
}

impl PackedEntry<'_> {
    #[inline]
    fn load(self, word: usize) -> u64 {
        assert!(word < PACKED_STATE / 8, "a word of the entry");
        // SAFETY: within the entry, which `InflightRegion::packed_entry` checked; entries are aligned.
        unsafe { self.words.wrapping_add(word).read_volatile() }
    }

    #[inline]
    fn store(self, word: usize, value: u64) {
        #[cfg(test)]
        super::fault::before_store();
        assert!(word < PACKED_STATE / 8, "a word of the entry");
        // SAFETY: as in `load`.
        unsafe { self.words.wrapping_add(word).write_volatile(value) };
    }
}

impl InflightRegion {
    /// The part of `map` that queue `index` has when every queue has `size` entries, or `None` if the
    /// map ends before.
    #[must_use]
    pub fn of_queue(map: &Arc<MmapRegion>, index: u16, size: u16, packed: bool) -> Option<Self> {
        let len = region_size(size, packed);
        let offset = len.checked_mul(usize::from(index))?;
        (offset.checked_add(len)? <= map.size()).then(|| Self {
            _map: map.clone(),
            base: map.as_ptr().wrapping_add(offset),
            len,
        })
    }

    /// Whether there is a record of a ring of `size` entries in it.
    pub(super) fn is_made_for(&self, size: u16) -> bool {
        self.load::<u16>(8) == VERSION && self.load::<u16>(10) == size
    }

    /// Blanks the record, so that whoever starts the ring next begins where the front end says: the
    /// driver reset the ring.
    pub fn blank(&self) {
        self.store(8, 0u16);
    }

    /// Blanks the record of a stopped ring of `size` entries if nothing in it is in flight. For when
    /// the front end is told the ring's base: what it starts the ring with next may follow a reset
    /// and have nothing to do with where we stopped. Only after a loss of the connection or a crash
    /// does the record speak.
    pub fn blank_if_finished(&self, size: u16, packed: bool) {
        let (header, state) =
            if packed { (PACKED_HEADER, PACKED_STATE) } else { (SPLIT_HEADER, SPLIT_STATE) };
        let busy = (0..usize::from(size)).any(|i| self.load::<u8>(header + state * i) != 0);
        if !busy {
            self.blank();
        }
    }

    #[inline]
    fn at(&self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset + size <= self.len, "inflight access within the region");
        self.base.wrapping_add(offset)
    }

    /// The entry at `offset`, which one check finds to be within the region as a whole.
    #[inline]
    fn packed_entry(&self, offset: usize) -> PackedEntry<'_> {
        let words = self.at(offset, PACKED_STATE).cast();
        PackedEntry { words, _region: PhantomData }
    }

    #[inline]
    fn load<T: Copy + zerocopy::FromBytes>(&self, offset: usize) -> T {
        let p = self.at(offset, size_of::<T>());
        // SAFETY: in bounds by `at`; the layout keeps fields at their natural alignment.
        unsafe { p.cast::<T>().read_volatile() }
    }

    #[inline]
    fn store<T: Copy + zerocopy::IntoBytes>(&self, offset: usize, value: T) {
        #[cfg(test)]
        super::fault::before_store();
        let p = self.at(offset, size_of::<T>());
        // SAFETY: as in `load`.
        unsafe { p.cast::<T>().write_volatile(value) };
    }
}

/// `entry`, or 0 if the front end's memory holds a number that is no entry. (A remainder would do too,
/// at the price of a division for each step of every chain.)
#[inline]
const fn bounded(entry: u16, size: u16) -> u16 {
    if entry < size { entry } else { 0 }
}

/// Order against a crash of this process, not against another CPU: the stores must reach the
/// shared page in program order, which volatile accesses and a compiler fence give.
#[inline]
fn crash_order() {
    compiler_fence(Ordering::SeqCst);
}

/// Split-ring tracking. Fields of the region: version @8, desc_num @10, last_batch_head @12,
/// used_idx @14; per descriptor: inflight @0, next @6, counter @8.
#[derive(Debug)]
pub(super) struct SplitInflight {
    region: InflightRegion,
    size: u16,
    counter: u64,
    batch: u16,
    last_batch_head: u16,
}

impl SplitInflight {
    /// Opens the region; returns the heads to do again, oldest first, or `None` if nothing was
    /// recorded in it yet.
    pub(super) fn open(
        region: InflightRegion,
        size: u16,
        ring_used: u16,
    ) -> (Self, Option<Vec<u16>>) {
        let mut this = Self { region, size, counter: 0, batch: 0, last_batch_head: 0 };
        let fresh = !this.region.is_made_for(size);
        if fresh {
            for head in 0..size {
                this.region.store(this.state(head), 0u8);
            }
            this.region.store(10, size);
            this.region.store(12, 0u16);
            this.region.store(14, ring_used);
            crash_order();
            this.region.store(8, VERSION);
            return (this, None);
        }
        this.last_batch_head = bounded(this.region.load::<u16>(12), size);
        this.settle_last_batch(ring_used);
        let mut again: Vec<(u64, u16)> = (0..size)
            .filter(|&head| this.region.load::<u8>(this.state(head)) == 1)
            .map(|head| (this.region.load::<u64>(this.state(head) + 8), head))
            .collect();
        again.sort_unstable();
        this.counter = again.last().map_or(0, |&(n, _)| n.wrapping_add(1));
        (this, Some(again.into_iter().map(|(_, head)| head).collect()))
    }

    #[inline]
    fn state(&self, head: u16) -> usize {
        SPLIT_HEADER + SPLIT_STATE * usize::from(bounded(head, self.size))
    }

    /// Clears the marks of a batch that was shown just before the crash.
    fn settle_last_batch(&mut self, ring_used: u16) {
        let shown = ring_used.wrapping_sub(self.region.load::<u16>(14));
        let mut head = self.last_batch_head;
        for _ in 0..shown.min(self.size) {
            self.region.store(self.state(head), 0u8);
            head = bounded(self.region.load::<u16>(self.state(head) + 6), self.size);
        }
        crash_order();
        self.region.store(14, ring_used);
    }

    #[inline]
    pub(super) fn take(&mut self, head: u16) {
        let state = self.state(head);
        self.region.store(state + 8, self.counter);
        self.counter = self.counter.wrapping_add(1);
        crash_order();
        self.region.store(state, 1u8);
    }

    /// Undoes the latest `take`.
    pub(super) fn untake(&mut self, head: u16) {
        self.region.store(self.state(head), 0u8);
    }

    #[inline]
    pub(super) fn complete(&mut self, head: u16) {
        self.region.store(self.state(head) + 6, self.last_batch_head);
        self.last_batch_head = head;
        self.batch += 1;
        crash_order();
        self.region.store(12, head);
    }

    /// After the used index `ring_used` was shown.
    #[inline]
    pub(super) fn published(&mut self, ring_used: u16) {
        crash_order();
        let mut head = self.last_batch_head;
        for _ in 0..std::mem::take(&mut self.batch) {
            let state = self.state(head);
            self.region.store(state, 0u8);
            head = self.region.load::<u16>(state + 6);
        }
        crash_order();
        self.region.store(14, ring_used);
    }
}

/// A chain to do again after a crash of a packed ring.
#[derive(Debug)]
pub(super) struct PackedAgain {
    /// First entry in the region.
    pub(super) entry: u16,
    /// The chain's descriptors, as the driver made them.
    pub(super) descriptors: Vec<PackedDescriptor>,
}

/// Packed-ring tracking. Fields of the region: version @8, desc_num @10, free_head @12,
/// old_free_head @14, used_idx @16, old_used_idx @18, used_wrap_counter @20,
/// old_used_wrap_counter @21; per descriptor: inflight @0, next @2, last @4, num @6, counter @8,
/// id @16, flags @18, len @20, addr @24.
///
/// Neighbouring fields are stored together, as one aligned word: the two used positions, the two free
/// heads, a chain's mark with its lengths, and half a descriptor. A crash falls between words, never
/// into one.
#[derive(Debug)]
pub(super) struct PackedInflight {
    region: InflightRegion,
    size: u16,
    counter: u64,
    /// What the region's free_head says; nobody else writes it while we live.
    free_head: u16,
    /// The used position shown last, which is what both of the region's say between batches.
    shown: Position,
    /// Heads completed since the last publish.
    batch: Vec<u16>,
}

/// Four fields of 16 bits as the word that stands for them in memory.
#[inline]
fn word(fields: [u16; 4]) -> u64 {
    zerocopy::transmute!(fields)
}

/// The four fields of such a word.
#[inline]
fn fields(word: u64) -> [u16; 4] {
    zerocopy::transmute!(word)
}

impl PackedInflight {
    /// Opens (or first initialises) the region. Returns where used descriptors continue, how many
    /// descriptors after that are outstanding, and the chains to do again, oldest first.
    pub(super) fn open(
        region: InflightRegion,
        size: u16,
        ring: &PackedRing,
    ) -> (Self, Option<(Position, u16)>, Vec<PackedAgain>) {
        let shown = ring.used_position();
        let mut this = Self { region, size, counter: 0, free_head: 0, shown, batch: Vec::new() };
        if !this.region.is_made_for(size) {
            this.initialise();
            return (this, None, Vec::new());
        }
        this.settle_last_batch(ring);
        let (again, outstanding) = this.collect();
        (this.shown, _) = this.positions();
        let used = this.shown;
        (this, Some((used, outstanding)), again)
    }

    fn initialise(&mut self) {
        for i in 0..self.size {
            self.region.store(self.state(i), 0u8);
            self.region.store(self.state(i) + 2, (i + 1) % self.size);
        }
        self.region.store(10, self.size);
        self.store_free_heads(0);
        self.store_positions(self.shown, self.shown);
        crash_order();
        self.region.store(8, VERSION);
    }

    /// free_head and old_free_head.
    #[inline]
    fn store_free_heads(&mut self, head: u16) {
        self.free_head = head;
        let heads: u32 = zerocopy::transmute!([head, head]);
        self.region.store(12, heads);
    }

    /// used_idx and old_used_idx with their wrap counters, in one store.
    #[inline]
    fn store_positions(&self, used: Position, old: Position) {
        let [a, b] = used.index.to_ne_bytes();
        let [c, d] = old.index.to_ne_bytes();
        let word = [a, b, c, d, u8::from(used.wrap), u8::from(old.wrap), 0, 0];
        self.region.store(16, u64::from_ne_bytes(word));
    }

    /// used_idx and old_used_idx with their wrap counters.
    #[inline]
    fn positions(&self) -> (Position, Position) {
        let [a, b, c, d, used_wrap, old_wrap, _, _] = self.region.load::<u64>(16).to_ne_bytes();
        let position = |index: [u8; 2], wrap: u8| Position {
            index: bounded(u16::from_ne_bytes(index), self.size),
            wrap: wrap != 0,
        };
        (position([a, b], used_wrap), position([c, d], old_wrap))
    }

    #[inline]
    fn state(&self, entry: u16) -> usize {
        PACKED_HEADER + PACKED_STATE * usize::from(bounded(entry, self.size))
    }

    #[inline]
    fn next(&self, entry: u16) -> u16 {
        bounded(self.region.load::<u16>(self.state(entry) + 2), self.size)
    }

    /// Commits a batch that was shown just before the crash, or rolls back one that was not.
    fn settle_last_batch(&self, ring: &PackedRing) {
        let (used, old) = self.positions();
        if used == old || ring.still_available(old) {
            self.store_positions(old, old);
            return;
        }
        // Shown: the batch stands at the front of the free list, and is done. It is counted, not
        // followed to the old free head: when all entries were in flight, that is no end mark.
        let mut entry = bounded(self.region.load::<u16>(12), self.size);
        for _ in 0..old.distance_to(used, self.size) {
            self.region.store(self.state(entry), 0u8);
            entry = self.next(entry);
        }
        crash_order();
        self.store_positions(used, used);
    }

    /// The chains marked in flight, by age, and the sum of their descriptors.
    fn collect(&mut self) -> (Vec<PackedAgain>, u16) {
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|&i| self.region.load::<u8>(self.state(i)) == 1)
            .map(|i| (self.region.load::<u64>(self.state(i) + 8), i))
            .collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |&(n, _)| n.wrapping_add(1));
        let mut outstanding = 0u16;
        let mut again = Vec::new();
        let mut busy = vec![false; usize::from(self.size)];
        for (_, head) in heads {
            let chain = self.recorded(head);
            let count = u16::try_from(chain.descriptors.len()).unwrap_or(self.size);
            outstanding = outstanding.saturating_add(count).min(self.size);
            let mut entry = head;
            for _ in 0..count {
                busy[usize::from(entry)] = true;
                entry = self.next(entry);
            }
            again.push(chain);
        }
        self.rebuild_free_list(&busy);
        (again, outstanding)
    }

    /// The chain recorded from entry `head` on.
    pub(super) fn recorded(&self, head: u16) -> PackedAgain {
        let count = self.region.load::<u16>(self.state(head) + 6).clamp(1, self.size);
        let mut descriptors = Vec::with_capacity(usize::from(count));
        let mut entry = head;
        for _ in 0..count {
            let d = self.descriptor(entry);
            descriptors.push(d);
            if d.flags & F_NEXT == 0 {
                break;
            }
            entry = self.next(entry);
        }
        PackedAgain { entry: head, descriptors }
    }

    /// Threads the free list anew through every entry that no chain holds, so that a crash in the
    /// middle of taking or giving back leaks none.
    fn rebuild_free_list(&mut self, busy: &[bool]) {
        let free: Vec<u16> = (0..self.size).filter(|&i| !busy[usize::from(i)]).collect();
        for pair in free.windows(2) {
            self.region.store(self.state(pair[0]) + 2, pair[1]);
        }
        self.store_free_heads(free.first().copied().unwrap_or(0));
    }

    fn descriptor(&self, entry: u16) -> PackedDescriptor {
        let at = self.state(entry);
        PackedDescriptor {
            id: self.region.load(at + 16),
            flags: self.region.load(at + 18),
            len: self.region.load(at + 20),
            addr: self.region.load(at + 24),
        }
    }

    /// Records a chain whose `count` descriptors `descriptor` yields in order; returns its entry.
    /// The mark is the commit point: before it the chain is still the ring's to give, after it ours.
    #[inline]
    pub(super) fn take(&mut self, count: u16, descriptor: impl Fn(u16) -> PackedDescriptor) -> u16 {
        let head = self.free_head;
        let first = self.region.packed_entry(self.state(head));
        let (mut entry, mut last, mut second) = (head, head, head);
        for i in 0..count {
            let d = descriptor(i);
            let cell = self.region.packed_entry(self.state(entry));
            let [len_low, len_high]: [u16; 2] = zerocopy::transmute!(d.len);
            cell.store(2, word([d.id, d.flags, len_low, len_high]));
            cell.store(3, d.addr);
            last = entry;
            let [_, next, _, _] = fields(cell.load(0));
            entry = bounded(next, self.size);
            if i == 0 {
                second = entry;
            }
        }
        first.store(1, self.counter);
        crash_order();
        // The mark, and with it `next` as it was.
        first.store(0, word([MARK, second, last, count]));
        crash_order();
        self.counter = self.counter.wrapping_add(1);
        self.store_free_heads(entry);
        head
    }

    /// Undoes the latest `take`, which returned `head`.
    pub(super) fn untake(&mut self, head: u16) {
        let state = self.state(head);
        self.region.store(state, 0u8);
        crash_order();
        // Other chains may have come back to the list since.
        let last = bounded(self.region.load::<u16>(state + 4), self.size);
        self.region.store(self.state(last) + 2, self.free_head);
        self.store_free_heads(bounded(head, self.size));
    }

    /// The chain at `head` is done; it counts as in flight until it is shown.
    #[inline]
    pub(super) fn complete(&mut self, head: u16) {
        self.batch.push(head);
    }

    /// Before the batch is shown; `used` is the position after it.
    #[inline]
    pub(super) fn publishing(&mut self, used: Position) {
        let mut free = self.free_head;
        for &head in &self.batch {
            let last = bounded(self.region.load::<u16>(self.state(head) + 4), self.size);
            self.region.store(self.state(last) + 2, free);
            free = head;
        }
        self.free_head = free;
        self.region.store(12, free);
        crash_order();
        self.store_positions(used, self.shown);
        self.shown = used;
        crash_order();
    }

    /// After the batch was shown.
    #[inline]
    pub(super) fn published(&mut self) {
        crash_order();
        let mut batch = std::mem::take(&mut self.batch);
        for head in batch.drain(..) {
            self.region.store(self.state(head), 0u8);
        }
        self.batch = batch;
        crash_order();
        self.region.store(14, self.free_head);
        self.store_positions(self.shown, self.shown);
    }
}
