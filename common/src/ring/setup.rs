//! Starting a queue: its parameters checked once, its areas found, the inflight record read.
#![allow(unsafe_code, reason = "vouches for ring areas found in mapped guest memory")]

use std::collections::VecDeque;
use std::sync::Arc;

use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::access::RingMemory;
use super::inflight::{InflightRegion, PackedInflight, SplitInflight};
use super::packed::{self, PackedRing};
use super::split::{self, SplitRing};
use super::{Call, Format, Queue, Reorder, RingFlags};
use crate::metrics::QueueMetrics;
use crate::sys::EventFd;
use crate::vhost_user::memory::{MemoryView, SharedMemory};

/// Ring addresses as SET_VRING_ADDR gives them, in the front end's own address space.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VringAddresses {
    /// Descriptor table, or packed descriptor ring.
    pub descriptor: u64,
    /// Available ring, or driver event suppression.
    pub available: u64,
    /// Used ring, or device event suppression.
    pub used: u64,
}

/// Everything that a queue starts from.
#[derive(Debug)]
pub struct QueueSetup {
    /// Index in the device.
    pub index: u16,
    /// Ring entries: a power of two for split rings.
    pub size: u16,
    /// Negotiated virtio features.
    pub features: u64,
    /// Where the ring is.
    pub addresses: VringAddresses,
    /// SET_VRING_BASE's value.
    pub base: u32,
    /// What to wait on.
    pub kick: Option<Arc<EventFd>>,
    /// How to wake the driver.
    pub call: Call,
    /// What to signal when the guest broke the ring.
    pub err: Option<Arc<EventFd>>,
    /// The queue's part of the inflight file.
    pub inflight: Option<InflightRegion>,
    /// Guest memory.
    pub memory: Arc<SharedMemory>,
    /// Where to count.
    pub metrics: Arc<QueueMetrics>,
}

/// Why a queue cannot start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// 0, more than 32768, or not a power of two in a split ring.
    #[error("{0} is no possible queue size")]
    Size(u16),
    /// An area is not in guest memory, or misaligned.
    #[error("the ring's {area} at {addr:#x} is not aligned guest memory")]
    Area {
        /// Which one.
        area: &'static str,
        /// The front end's address.
        addr: u64,
    },
    /// SET_VRING_BASE's value is past the end of a packed ring, and no inflight record knows better.
    #[error("the base {base:#x} is not within a packed ring of {size} entries")]
    Base {
        /// What the front end gave.
        base: u32,
        /// Ring entries.
        size: u16,
    },
}

fn area(
    view: &MemoryView,
    name: &'static str,
    addr: u64,
    len: usize,
    align: usize,
) -> Result<RingMemory, SetupError> {
    let error = SetupError::Area { area: name, addr };
    let base = view.get().translate_ring(addr, len as u64).ok_or(error)?;
    if base.addr() % align != 0 {
        return Err(error);
    }
    // SAFETY: mapped and aligned by the two checks; the ring keeps the memory table alive.
    Ok(unsafe { RingMemory::new(base, len) })
}

/// Whether feature bit `bit` is in `features`.
const fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

impl QueueSetup {
    /// Starts the queue.
    ///
    /// # Errors
    /// An impossible size, or areas outside guest memory.
    pub fn start(self) -> Result<Queue, SetupError> {
        let packed = has(self.features, VIRTIO_F_RING_PACKED);
        if self.size == 0 || self.size > 32768 || (!packed && !self.size.is_power_of_two()) {
            return Err(SetupError::Size(self.size));
        }
        let memory = MemoryView::new(self.memory.clone());
        let format = if packed { self.packed(&memory)? } else { self.split(&memory)? };
        let in_order = has(self.features, VIRTIO_F_IN_ORDER);
        let reorder = in_order.then(|| Reorder {
            waiting: vec![None; usize::from(self.size).next_power_of_two()],
            next: 0,
        });
        Ok(Queue {
            index: self.index,
            size: self.size,
            features: self.features,
            format,
            memory,
            kick: self.kick,
            call: self.call,
            err: self.err,
            reorder,
            sequence: 0,
            in_flight: 0,
            retired: None,
            held: false,
            owed: false,
            owed_for: 0,
            metrics: self.metrics,
        })
    }

    fn flags(&self) -> RingFlags {
        RingFlags {
            event_idx: has(self.features, VIRTIO_RING_F_EVENT_IDX),
            indirect: has(self.features, VIRTIO_RING_F_INDIRECT_DESC),
        }
    }

    fn split(&self, view: &MemoryView) -> Result<Format, SetupError> {
        let (desc, avail, used) = split::area_sizes(self.size);
        let areas = [
            area(view, "descriptor table", self.addresses.descriptor, desc, 16)?,
            area(view, "available ring", self.addresses.available, avail, 2)?,
            area(view, "used ring", self.addresses.used, used, 4)?,
        ];
        #[allow(clippy::cast_possible_truncation, reason = "a split base has 16 bits")]
        let base = self.base as u16;
        let memory = self.memory.load();
        let mut ring = SplitRing::new(areas, self.size, base, self.flags(), memory);
        let Some(region) = self.inflight.clone() else {
            // Without a record, a ring whose used entries are in order tells itself what was
            // not finished: everything after the used index.
            let behind = base.wrapping_sub(ring.used_index());
            if has(self.features, VIRTIO_F_IN_ORDER) && behind != 0 && behind <= self.size {
                ring.set_last_avail(ring.used_index());
            }
            return Ok(Format::Split { ring, inflight: None, again: VecDeque::new() });
        };
        let (inflight, again) = SplitInflight::open(region, self.size, ring.used_index());
        let Some(again) = again else {
            return Ok(Format::Split { ring, inflight: Some(inflight), again: VecDeque::new() });
        };
        // Everything taken was used or is in the record, whatever the front end believes the base
        // to be (the available index is a common guess).
        let count = u16::try_from(again.len()).unwrap_or(self.size);
        ring.set_last_avail(ring.used_index().wrapping_add(count));
        if !again.is_empty() {
            tracing::info!(
                queue = self.index,
                requests = again.len(),
                "doing again what was in flight"
            );
        }
        Ok(Format::Split { ring, inflight: Some(inflight), again: again.into() })
    }

    fn packed(&self, view: &MemoryView) -> Result<Format, SetupError> {
        let (desc, driver, device) = packed::area_sizes(self.size);
        let areas = [
            area(view, "descriptor ring", self.addresses.descriptor, desc, 16)?,
            area(view, "driver event area", self.addresses.available, driver, 4)?,
            area(view, "device event area", self.addresses.used, device, 4)?,
        ];
        let is_recorded = self.inflight.as_ref().is_some_and(|r| r.is_made_for(self.size));
        if !is_recorded && !packed::base_fits(self.base, self.size) {
            return Err(SetupError::Base { base: self.base, size: self.size });
        }
        let mut ring =
            PackedRing::new(areas, self.size, self.base, self.flags(), self.memory.load());
        let Some(region) = self.inflight.clone() else {
            return Ok(Format::Packed { ring, inflight: None, again: VecDeque::new() });
        };
        let (inflight, resume, again) = PackedInflight::open(region, self.size, &ring);
        if !again.is_empty() {
            tracing::info!(
                queue = self.index,
                requests = again.len(),
                "doing again what was in flight"
            );
        }
        if let Some((used, outstanding)) = resume {
            ring.set_positions(used, outstanding);
            ring.restore_outstanding();
        }
        Ok(Format::Packed { ring, inflight: Some(inflight), again: again.into() })
    }
}
