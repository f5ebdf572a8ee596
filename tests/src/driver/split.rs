//! The driver's side of a split ring. Virtio 1.3, 2.7.13.

use std::sync::atomic::{Ordering, fence};

use outboard_common::ring::notify::need_event;

use super::{Buffer, F_INDIRECT, F_NEXT, F_WRITE, Used};
use crate::memory::Area;

/// `avail.flags`: no interrupt, please.
const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// `used.flags`: the device wants no kick.
const USED_F_NO_NOTIFY: u16 = 1;

#[derive(Debug)]
pub(super) struct SplitDriver {
    desc: Area,
    avail: Area,
    used: Area,
    size: u16,
    event_idx: bool,
    /// Free descriptors, last in first out.
    free: Vec<u16>,
    /// By head: the chain's cookie and descriptors, while outstanding.
    chains: Vec<Option<(u64, Vec<u16>)>>,
    outstanding: usize,
    avail_idx: u16,
    /// `avail_idx` when a kick was last considered.
    kicked: u16,
    last_used: u16,
}

impl SplitDriver {
    pub(super) fn new(areas: [Area; 3], size: u16, event_idx: bool) -> Self {
        let [desc, avail, used] = areas;
        Self {
            desc,
            avail,
            used,
            size,
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![None; usize::from(size)],
            outstanding: 0,
            avail_idx: 0,
            kicked: 0,
            last_used: 0,
        }
    }

    pub(super) fn free(&self) -> u16 {
        u16::try_from(self.free.len()).unwrap_or(u16::MAX)
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    fn write_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = 16 * usize::from(index);
        self.desc.store64(at, addr);
        self.desc.store32(at + 8, len);
        self.desc.store16(at + 12, flags, Ordering::Relaxed);
        self.desc.store16(at + 14, next, Ordering::Relaxed);
    }

    pub(super) fn add(&mut self, buffers: &[Buffer], cookie: u64) -> bool {
        if buffers.is_empty() || buffers.len() > self.free.len() {
            return false;
        }
        let mut ids = self.free.split_off(self.free.len() - buffers.len());
        ids.reverse();
        for (i, b) in buffers.iter().enumerate() {
            let write = if b.writable { F_WRITE } else { 0 };
            let (next_flag, next) = ids.get(i + 1).map_or((0, 0), |&n| (F_NEXT, n));
            self.write_descriptor(ids[i], b.addr, b.len, write | next_flag, next);
        }
        self.offer(ids, cookie);
        true
    }

    pub(super) fn add_table(&mut self, fill: impl Fn(u16) -> (u64, u32), cookie: u64) -> bool {
        let Some(head) = self.free.pop() else { return false };
        let (addr, len) = fill(head);
        self.write_descriptor(head, addr, len, F_INDIRECT, 0);
        self.offer(vec![head], cookie);
        true
    }

    /// Shows the device the chain whose descriptors are `ids`.
    fn offer(&mut self, ids: Vec<u16>, cookie: u64) {
        let head = ids[0];
        let slot = usize::from(self.avail_idx & (self.size - 1));
        self.avail.store16(4 + 2 * slot, head, Ordering::Relaxed);
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.avail.store16(2, self.avail_idx, Ordering::Release);
        self.chains[usize::from(head)] = Some((cookie, ids));
        self.outstanding += 1;
    }

    pub(super) fn needs_kick(&mut self) -> bool {
        let old = std::mem::replace(&mut self.kicked, self.avail_idx);
        if old == self.avail_idx {
            return false;
        }
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.used.load16(4 + 8 * usize::from(self.size), Ordering::Relaxed);
            need_event(event, self.avail_idx, old)
        } else {
            self.used.load16(0, Ordering::Relaxed) & USED_F_NO_NOTIFY == 0
        }
    }

    pub(super) fn used(&mut self) -> Option<Used> {
        if self.used.load16(2, Ordering::Acquire) == self.last_used {
            return None;
        }
        let at = 4 + 8 * usize::from(self.last_used & (self.size - 1));
        let head = self.used.load32(at);
        let len = self.used.load32(at + 4);
        self.last_used = self.last_used.wrapping_add(1);
        let (cookie, ids) = usize::try_from(head)
            .ok()
            .and_then(|h| self.chains.get_mut(h)?.take())
            .unwrap_or_else(|| panic!("the device used chain {head}, which is not outstanding"));
        self.free.extend(ids);
        self.outstanding -= 1;
        Some(Used { cookie, len })
    }

    pub(super) fn enable_interrupts(&mut self) -> bool {
        if self.event_idx {
            self.avail.store16(4 + 2 * usize::from(self.size), self.last_used, Ordering::Relaxed);
        } else {
            self.avail.store16(0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.used.load16(2, Ordering::Acquire) != self.last_used
    }

    pub(super) fn disable_interrupts(&mut self) {
        if self.event_idx {
            // As far away as an event can be: the index just passed.
            let behind = self.last_used.wrapping_sub(1);
            self.avail.store16(4 + 2 * usize::from(self.size), behind, Ordering::Relaxed);
        } else {
            self.avail.store16(0, AVAIL_F_NO_INTERRUPT, Ordering::Relaxed);
        }
    }
}
