//! The driver's side of a packed ring. Virtio 1.3, 2.8.21.

use std::sync::atomic::{Ordering, fence};

use outboard_common::ring::notify::need_event;

use super::{Buffer, F_INDIRECT, F_NEXT, F_WRITE, Used};
use crate::memory::Area;

const F_AVAIL: u16 = 1 << 7;
const F_USED: u16 = 1 << 15;

/// Event suppression. Virtio 1.3, 2.8.14.
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// A place in the ring with its wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    fn advance(&mut self, n: u16, size: u16) {
        let index = u32::from(self.index) + u32::from(n);
        let size = u32::from(size);
        if index >= size {
            self.wrap = !self.wrap;
        }
        self.index = u16::try_from(index % size).unwrap_or(0);
    }

    /// The flag bits of a descriptor made available here.
    fn available(self) -> u16 {
        if self.wrap { F_AVAIL } else { F_USED }
    }

    fn bits(self) -> u16 {
        self.index | if self.wrap { 0x8000 } else { 0 }
    }
}

#[derive(Debug)]
pub(super) struct PackedDriver {
    desc: Area,
    /// Written by the driver.
    driver_event: Area,
    /// Written by the device.
    device_event: Area,
    size: u16,
    event_idx: bool,
    /// Free buffer ids.
    ids: Vec<u16>,
    /// By buffer id: cookie and ring descriptors taken, while outstanding.
    chains: Vec<Option<(u64, u16)>>,
    outstanding: usize,
    free: u16,
    next: Place,
    /// Descriptors added since a kick was last considered.
    unkicked: u16,
    used: Place,
}

impl PackedDriver {
    pub(super) fn new(areas: [Area; 3], size: u16, event_idx: bool) -> Self {
        let [desc, driver_event, device_event] = areas;
        let start = Place { index: 0, wrap: true };
        Self {
            desc,
            driver_event,
            device_event,
            size,
            event_idx,
            ids: (0..size).rev().collect(),
            chains: vec![None; usize::from(size)],
            outstanding: 0,
            free: size,
            next: start,
            unkicked: 0,
            used: start,
        }
    }

    pub(super) fn free(&self) -> u16 {
        self.free
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    pub(super) fn add(&mut self, buffers: &[Buffer], cookie: u64) -> bool {
        let list: Vec<(u64, u32, u16)> =
            buffers.iter().map(|b| (b.addr, b.len, if b.writable { F_WRITE } else { 0 })).collect();
        let Some(&id) = self.ids.last() else { return false };
        self.offer(id, &list, cookie)
    }

    pub(super) fn add_table(&mut self, fill: impl Fn(u16) -> (u64, u32), cookie: u64) -> bool {
        let Some(&id) = self.ids.last() else { return false };
        if self.free == 0 {
            return false;
        }
        let (addr, len) = fill(id);
        self.offer(id, &[(addr, len, F_INDIRECT)], cookie)
    }

    /// Writes a chain into the ring, the first descriptor's flags last. False: no room.
    fn offer(&mut self, id: u16, list: &[(u64, u32, u16)], cookie: u64) -> bool {
        let Ok(count) = u16::try_from(list.len()) else { return false };
        if count == 0 || count > self.free {
            return false;
        }
        self.ids.pop();
        let head = self.next;
        let mut head_flags = 0;
        for (i, &(addr, len, flags)) in (0u16..).zip(list) {
            let at = 16 * usize::from(self.next.index);
            self.desc.store64(at, addr);
            self.desc.store32(at + 8, len);
            self.desc.store16(at + 12, id, Ordering::Relaxed);
            let next = if i + 1 < count { F_NEXT } else { 0 };
            let flags = flags | next | self.next.available();
            if i == 0 {
                head_flags = flags;
            } else {
                self.desc.store16(at + 14, flags, Ordering::Relaxed);
            }
            self.next.advance(1, self.size);
        }
        self.desc.store16(16 * usize::from(head.index) + 14, head_flags, Ordering::Release);
        self.free -= count;
        self.unkicked += count;
        self.outstanding += 1;
        self.chains[usize::from(id)] = Some((cookie, count));
        true
    }

    pub(super) fn needs_kick(&mut self) -> bool {
        let batch = std::mem::take(&mut self.unkicked);
        if batch == 0 {
            return false;
        }
        fence(Ordering::SeqCst);
        let flags = self.device_event.load16(2, Ordering::Acquire) & 3;
        if flags == EVENT_DESC && self.event_idx {
            let bits = self.device_event.load16(0, Ordering::Relaxed);
            let mut event = bits & 0x7fff;
            if (bits & 0x8000 != 0) != self.next.wrap {
                event = event.wrapping_sub(self.size);
            }
            return need_event(event, self.next.index, self.next.index.wrapping_sub(batch));
        }
        flags != EVENT_DISABLE
    }

    /// Whether the descriptor at the used place has been used.
    fn is_used(&self) -> bool {
        let flags = self.desc.load16(16 * usize::from(self.used.index) + 14, Ordering::Acquire);
        (flags & F_AVAIL != 0) == self.used.wrap && (flags & F_USED != 0) == self.used.wrap
    }

    pub(super) fn used(&mut self) -> Option<Used> {
        if !self.is_used() {
            return None;
        }
        let at = 16 * usize::from(self.used.index);
        let id = self.desc.load16(at + 12, Ordering::Relaxed);
        let len = self.desc.load32(at + 8);
        let (cookie, count) = self
            .chains
            .get_mut(usize::from(id))
            .and_then(Option::take)
            .unwrap_or_else(|| panic!("the device used buffer {id}, which is not outstanding"));
        self.used.advance(count, self.size);
        self.free += count;
        self.ids.push(id);
        self.outstanding -= 1;
        Some(Used { cookie, len })
    }

    pub(super) fn enable_interrupts(&mut self) -> bool {
        if self.event_idx {
            self.driver_event.store16(0, self.used.bits(), Ordering::Relaxed);
            self.driver_event.store16(2, EVENT_DESC, Ordering::Release);
        } else {
            self.driver_event.store16(2, EVENT_ENABLE, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        self.is_used()
    }

    pub(super) fn disable_interrupts(&mut self) {
        self.driver_event.store16(2, EVENT_DISABLE, Ordering::Relaxed);
    }
}
