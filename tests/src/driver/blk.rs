//! Block requests of a pretended guest. Virtio 1.3, 5.2.6.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use virtio_bindings::virtio_blk as spec;

use super::{Buffer, GuestQueue};
use crate::memory::GuestRam;

/// VIRTIO_BLK_T_*: what a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestType(pub u32);

impl RequestType {
    /// Read.
    pub const IN: Self = Self(spec::VIRTIO_BLK_T_IN);
    /// Write.
    pub const OUT: Self = Self(spec::VIRTIO_BLK_T_OUT);
    /// Make everything written durable.
    pub const FLUSH: Self = Self(spec::VIRTIO_BLK_T_FLUSH);
    /// The device's serial.
    pub const GET_ID: Self = Self(spec::VIRTIO_BLK_T_GET_ID);
    /// Forget sectors.
    pub const DISCARD: Self = Self(spec::VIRTIO_BLK_T_DISCARD);
    /// Zero sectors.
    pub const WRITE_ZEROES: Self = Self(spec::VIRTIO_BLK_T_WRITE_ZEROES);

    fn device_writes(self) -> bool {
        self == Self::IN || self == Self::GET_ID
    }
}

/// Status byte: done.
pub const S_OK: u8 = 0;
/// Status byte: failed.
pub const S_IOERR: u8 = 1;
/// Status byte: no such request.
pub const S_UNSUPP: u8 = 2;
/// What the status byte holds before the device writes it.
pub const S_PENDING: u8 = 0xaa;

/// Room in guest memory for one request: header, data, status byte. Reused from request to request.
#[derive(Debug)]
pub struct BlkSlot {
    ram: Arc<GuestRam>,
    header: u64,
    data: u64,
    capacity: u32,
    status: u64,
}

impl BlkSlot {
    /// A slot for requests of up to `capacity` bytes of data.
    ///
    /// # Errors
    /// The guest's memory is full.
    pub fn new(ram: &Arc<GuestRam>, capacity: u32) -> Result<Self> {
        let header = ram.alloc(16, 16)?;
        let status = ram.alloc(1, 1)?;
        let data = ram.alloc(u64::from(capacity), 4096)?;
        Ok(Self { ram: ram.clone(), header, data, capacity, status })
    }

    /// Guest address of the data.
    #[must_use]
    pub fn data_addr(&self) -> u64 {
        self.data
    }

    /// Guest address of the 16-byte header, for tests that break it.
    #[must_use]
    pub fn header_addr(&self) -> u64 {
        self.header
    }

    /// Guest address of the status byte.
    #[must_use]
    pub fn status_addr(&self) -> u64 {
        self.status
    }

    /// Puts `data` where the device will read it.
    pub fn set_data(&self, data: &[u8]) {
        assert!(data.len() <= self.capacity as usize, "data fits the slot");
        self.ram.write(self.data, data);
    }

    /// The first `len` bytes of the data.
    #[must_use]
    pub fn data(&self, len: usize) -> Vec<u8> {
        self.ram.bytes(self.data, len)
    }

    /// The status byte: [`S_PENDING`] until the device wrote it.
    #[must_use]
    pub fn status(&self) -> u8 {
        self.ram.bytes(self.status, 1)[0]
    }

    /// Writes the header, resets the status byte, and returns the chain: header, `len` bytes of data (no
    /// buffer for 0) and status.
    #[must_use]
    pub fn prepare(&self, kind: RequestType, sector: u64, len: u32) -> Vec<Buffer> {
        self.prepare_split(kind, sector, len, 1)
    }

    /// As [`Self::prepare`], with the data in `segments` buffers of about equal, sector-multiple length.
    #[must_use]
    pub fn prepare_split(
        &self,
        kind: RequestType,
        sector: u64,
        len: u32,
        segments: u32,
    ) -> Vec<Buffer> {
        assert!(len <= self.capacity, "data fits the slot");
        let mut header = [0u8; 16];
        header[..4].copy_from_slice(&kind.0.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.ram.write(self.header, &header);
        self.ram.write(self.status, &[S_PENDING]);
        let mut chain = vec![Buffer::readable(self.header, 16)];
        let step = (len / segments.max(1)).next_multiple_of(512).max(512);
        let mut at = 0;
        while at < len {
            let n = step.min(len - at);
            chain.push(Buffer {
                addr: self.data + u64::from(at),
                len: n,
                writable: kind.device_writes(),
            });
            at += n;
        }
        chain.push(Buffer::writable(self.status, 1));
        chain
    }

    /// Writes one `virtio_blk_discard_write_zeroes` segment as the data; prepare it with a length of 16.
    pub fn set_range(&self, sector: u64, sectors: u32, unmap: bool) {
        let mut segment = [0u8; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12] = u8::from(unmap);
        self.set_data(&segment);
    }
}

/// One request at a time on `queue`: returns the status byte.
///
/// # Errors
/// The request was not used within `timeout`.
pub fn request(
    queue: &mut GuestQueue,
    slot: &BlkSlot,
    (kind, sector, len): (RequestType, u64, u32),
    timeout: Duration,
) -> Result<u8> {
    let chain = slot.prepare(kind, sector, len);
    queue.request(&chain, timeout)?;
    let status = slot.status();
    ensure!(status != S_PENDING, "the chain was used without a status");
    Ok(status)
}
