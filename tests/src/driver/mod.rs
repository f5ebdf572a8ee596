//! The guest's side of a virtqueue: adds chains, kicks, waits for used ones.
//!
//! [`GuestQueue`] is the whole interface for both ring formats. It keeps the rules of virtio 1.3 that
//! bind a driver (never reuses descriptors early, honours EVENT_IDX in both directions), so what a
//! test wants wrong it writes into the ring itself, through [`GuestQueue::areas`].
//!
//! Each chain carries a `cookie`, any number, by which the caller knows it again when it is used.

pub mod blk;
pub mod fs;
mod packed;
mod split;
pub mod vsock;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use outboard_common::ring::{Call, InflightRegion, Queue, QueueSetup, VringAddresses};
use outboard_common::sys::EventFd;
use outboard_common::vhost_user::memory::SharedMemory;
use rustix::event::{PollFd, PollFlags, poll};
use virtio_bindings::{virtio_config as config, virtio_ring as ring};

use self::packed::PackedDriver;
use self::split::SplitDriver;
use crate::memory::{Area, GuestRam};

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer that the device reads.
    #[must_use]
    pub const fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: false }
    }

    /// A buffer that the device writes.
    #[must_use]
    pub const fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: true }
    }
}

/// A chain that the device gave back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// What the chain was added with.
    pub cookie: u64,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// The two ring formats; tests run under both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingFormat {
    /// Virtio 1.3, 2.7.
    Split,
    /// Virtio 1.3, 2.8.
    Packed,
}

impl RingFormat {
    /// Both, for loops.
    pub const ALL: [Self; 2] = [Self::Split, Self::Packed];

    /// The virtio feature bits of this format: VERSION_1, and RING_PACKED for the packed one.
    #[must_use]
    pub const fn features(self) -> u64 {
        let version_1 = 1 << config::VIRTIO_F_VERSION_1;
        match self {
            Self::Split => version_1,
            Self::Packed => version_1 | 1 << config::VIRTIO_F_RING_PACKED,
        }
    }
}

/// VIRTIO_RING_F_EVENT_IDX as a mask.
pub const EVENT_IDX: u64 = 1 << ring::VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_RING_F_INDIRECT_DESC as a mask.
pub const INDIRECT_DESC: u64 = 1 << ring::VIRTIO_RING_F_INDIRECT_DESC;
/// VIRTIO_F_IN_ORDER as a mask.
pub const IN_ORDER: u64 = 1 << config::VIRTIO_F_IN_ORDER;

/// Descriptor flags. Virtio 1.3, 2.7.5.
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

#[derive(Debug)]
enum Format {
    Split(SplitDriver),
    Packed(PackedDriver),
}

/// One virtqueue in guest memory with its eventfds, driven from the guest's side.
#[derive(Debug)]
pub struct GuestQueue {
    ram: Arc<GuestRam>,
    size: u16,
    features: u64,
    format: Format,
    areas: [Area; 3],
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    /// Guest memory for indirect tables, one of `size` entries for each descriptor; 0: none yet.
    tables: u64,
}

impl GuestQueue {
    /// A new queue of `size` entries in `ram`. `features` are the negotiated virtio features: the format
    /// follows from RING_PACKED.
    ///
    /// # Errors
    /// The guest's memory is full.
    pub fn new(ram: &Arc<GuestRam>, size: u16, features: u64) -> Result<Self> {
        let packed = features & 1 << config::VIRTIO_F_RING_PACKED != 0;
        let n = usize::from(size);
        let lens = if packed { [16 * n, 4, 4] } else { [16 * n, 6 + 2 * n, 6 + 8 * n] };
        let area = |len: usize| ram.area(ram.alloc(len as u64, 64)?, len);
        let areas = [area(lens[0])?, area(lens[1])?, area(lens[2])?];
        let event_idx = features & EVENT_IDX != 0;
        let format = if packed {
            Format::Packed(PackedDriver::new(areas.clone(), size, event_idx))
        } else {
            Format::Split(SplitDriver::new(areas.clone(), size, event_idx))
        };
        Ok(Self {
            ram: ram.clone(),
            size,
            features,
            format,
            areas,
            kick: EventFd::new()?,
            call: EventFd::new()?,
            err: EventFd::new()?,
            tables: 0,
        })
    }

    /// Ring entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The features it was made with.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Guest memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Descriptor, driver and device area, for tests that break them.
    #[must_use]
    pub fn areas(&self) -> &[Area; 3] {
        &self.areas
    }

    /// The descriptor that the driver signals.
    #[must_use]
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// The descriptor that the device signals.
    #[must_use]
    pub fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// The descriptor that the device signals when it gave the queue up.
    #[must_use]
    pub fn err_fd(&self) -> &EventFd {
        &self.err
    }

    /// Where the ring is, in the front end's own addresses.
    #[must_use]
    pub fn addresses(&self) -> VringAddresses {
        let [descriptor, available, used] =
            self.areas.each_ref().map(|a| self.ram.user_addr(a.addr()));
        VringAddresses { descriptor, available, used }
    }

    /// The device's end of this queue in this very process, for tests and benchmarks of the engine's
    /// rings without a socket. `memory` has the table of [`GuestRam::memory_table`].
    ///
    /// # Errors
    /// The ring cannot start (a size that its format does not have, for example).
    pub fn device_side(
        &self,
        memory: &Arc<SharedMemory>,
        base: u32,
        inflight: Option<InflightRegion>,
    ) -> Result<Queue> {
        let setup = QueueSetup {
            index: 0,
            size: self.size,
            features: self.features,
            addresses: self.addresses(),
            base,
            kick: Some(Arc::new(self.kick.try_clone()?)),
            call: Call::Fd(Arc::new(self.call.try_clone()?)),
            err: Some(Arc::new(self.err.try_clone()?)),
            inflight,
            memory: memory.clone(),
            metrics: Arc::default(),
        };
        Ok(setup.start()?)
    }

    /// The vring base of a ring that was never used, as SET_VRING_BASE wants it.
    #[must_use]
    pub fn initial_base(&self) -> u32 {
        match self.format {
            Format::Split(_) => 0,
            Format::Packed(_) => 0x8000_8000,
        }
    }

    /// Descriptors that are free.
    #[must_use]
    pub fn free(&self) -> u16 {
        match &self.format {
            Format::Split(d) => d.free(),
            Format::Packed(d) => d.free(),
        }
    }

    /// Chains added and not yet collected.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        match &self.format {
            Format::Split(d) => d.outstanding(),
            Format::Packed(d) => d.outstanding(),
        }
    }

    /// Makes a chain available, one ring descriptor a buffer. The device sees it at once; the kick is
    /// separate. False when there are not enough free descriptors.
    pub fn add(&mut self, buffers: &[Buffer], cookie: u64) -> bool {
        match &mut self.format {
            Format::Split(d) => d.add(buffers, cookie),
            Format::Packed(d) => d.add(buffers, cookie),
        }
    }

    /// As [`Self::add`], with the buffers in an indirect table (of at most as many entries as the ring
    /// has): one ring descriptor.
    ///
    /// # Errors
    /// The guest's memory is full, or there are more buffers than the table holds.
    pub fn add_indirect(&mut self, buffers: &[Buffer], cookie: u64) -> Result<bool> {
        ensure!(buffers.len() <= usize::from(self.size), "too many buffers for a table");
        if self.tables == 0 {
            self.tables = self.ram.alloc(16 * u64::from(self.size) * u64::from(self.size), 16)?;
        }
        let table_bytes = 16 * u64::from(self.size);
        let (ram, tables) = (self.ram.clone(), self.tables);
        let len = u32::try_from(16 * buffers.len())?;
        let packed = matches!(self.format, Format::Packed(_));
        let fill = |slot: u16| {
            let addr = tables + u64::from(slot) * table_bytes;
            write_table(&ram, addr, buffers, packed);
            (addr, len)
        };
        Ok(match &mut self.format {
            Format::Split(d) => d.add_table(fill, cookie),
            Format::Packed(d) => d.add_table(fill, cookie),
        })
    }

    /// Whether the device wants a kick for what was added since this was asked last.
    pub fn needs_kick(&mut self) -> bool {
        match &mut self.format {
            Format::Split(d) => d.needs_kick(),
            Format::Packed(d) => d.needs_kick(),
        }
    }

    /// Kicks the device if it wants that; true if so.
    pub fn kick(&mut self) -> bool {
        let kick = self.needs_kick();
        if kick {
            self.kick.signal();
        }
        kick
    }

    /// The next used chain, without waiting.
    ///
    /// # Panics
    /// The device used a chain that is not outstanding: what every test here wants to know.
    pub fn used(&mut self) -> Option<Used> {
        match &mut self.format {
            Format::Split(d) => d.used(),
            Format::Packed(d) => d.used(),
        }
    }

    /// Asks the device for an interrupt at the next used chain. True when some were used before it
    /// could know.
    pub fn enable_interrupts(&mut self) -> bool {
        match &mut self.format {
            Format::Split(d) => d.enable_interrupts(),
            Format::Packed(d) => d.enable_interrupts(),
        }
    }

    /// Asks the device for no interrupts (with EVENT_IDX on a split ring: stops moving the event).
    pub fn disable_interrupts(&mut self) {
        match &mut self.format {
            Format::Split(d) => d.disable_interrupts(),
            Format::Packed(d) => d.disable_interrupts(),
        }
    }

    /// The next used chain, asleep on the call descriptor until then.
    ///
    /// # Errors
    /// Nothing was used for `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<Used> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(used) = self.used() {
                return Ok(used);
            }
            if self.enable_interrupts() {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "no chain was used within {timeout:?}");
            if wait_readable(&self.call, left)? {
                self.call.drain();
            }
        }
    }

    /// The next used chain, by spinning: for benchmarks.
    ///
    /// # Errors
    /// Nothing was used for `timeout`.
    pub fn poll_used(&mut self, timeout: Duration) -> Result<Used> {
        for _ in 0..1000 {
            if let Some(used) = self.used() {
                return Ok(used);
            }
            std::hint::spin_loop();
        }
        let start = Instant::now();
        loop {
            if let Some(used) = self.used() {
                return Ok(used);
            }
            ensure!(start.elapsed() < timeout, "no chain was used within {timeout:?}");
            std::thread::yield_now();
        }
    }

    /// Adds a chain, kicks, and waits until it is used: for tests that do one thing at a time.
    ///
    /// # Errors
    /// The ring is full, or nothing was used for `timeout`.
    pub fn request(&mut self, buffers: &[Buffer], timeout: Duration) -> Result<u32> {
        ensure!(self.add(buffers, 0), "the ring is full");
        self.kick();
        Ok(self.wait(timeout).context("a single request")?.len)
    }
}

/// Whether `fd` became readable within `timeout`.
///
/// # Errors
/// `poll` failed.
pub fn wait_readable(fd: impl AsFd, timeout: Duration) -> Result<bool> {
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let timeout = rustix::time::Timespec {
        tv_sec: i64::try_from(timeout.as_secs())?,
        tv_nsec: i64::from(timeout.subsec_nanos()),
    };
    match poll(&mut fds, Some(&timeout)) {
        Ok(n) => Ok(n > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Writes an indirect table of `buffers` at guest address `addr`.
fn write_table(ram: &GuestRam, addr: u64, buffers: &[Buffer], packed: bool) {
    let count = u16::try_from(buffers.len()).unwrap_or(u16::MAX);
    for (i, b) in (0..count).zip(buffers) {
        let mut entry = [0u8; 16];
        entry[..8].copy_from_slice(&b.addr.to_le_bytes());
        entry[8..12].copy_from_slice(&b.len.to_le_bytes());
        let write = if b.writable { F_WRITE } else { 0 };
        if packed {
            // Virtio 1.3, 2.8.7: only WRITE counts in an indirect table; 12..14 is the unused id.
            entry[14..].copy_from_slice(&write.to_le_bytes());
        } else {
            let next = if i + 1 < count { F_NEXT } else { 0 };
            entry[12..14].copy_from_slice(&(write | next).to_le_bytes());
            entry[14..].copy_from_slice(&(i + 1).to_le_bytes());
        }
        ram.write(addr + 16 * u64::from(i), &entry);
    }
}
