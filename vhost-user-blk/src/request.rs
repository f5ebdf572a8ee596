//! A virtio-blk request: from a chain's bytes to an enum, without I/O.
//!
//! Virtio 1.3, 5.2.6. A request is a 16-byte header and then what its type calls for; its last
//! device-writable byte is the status. Everything here comes from the guest, so every number is
//! checked before it is used, and on a copy: guest memory may change under us.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use outboard_common::ring::IoVecs;
use virtio_bindings::virtio_blk as spec;
use zerocopy::FromBytes;

/// Bytes of a sector, the unit of the request header whatever the block size is.
pub const SECTOR_SIZE: u64 = 512;
/// `SECTOR_SIZE` as a shift.
pub const SECTOR_SHIFT: u32 = 9;
/// Segments that a discard or write-zeroes request may have, as told in configuration space.
pub const MAX_SEGMENTS: u32 = 16;
/// Sectors that one such segment may cover, as told in configuration space (1 GiB).
pub const MAX_SEGMENT_SECTORS: u32 = 1 << 21;
/// Bytes of GET_ID's answer.
pub const ID_LEN: usize = 20;

/// What goes into a request's status byte. Virtio 1.3, 5.2.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The device failed, or the request makes no sense.
    IoErr = 1,
    /// The device does not do this type of request.
    Unsupported = 2,
}

/// A range of bytes on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// One segment of a write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroRange {
    /// The bytes that shall read as zeroes.
    pub range: ByteRange,
    /// Whether the storage may be given up.
    pub unmap: bool,
}

/// A request that may be carried out as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Fill all of the writable part (the status byte is gone from it) from this offset on.
    Read {
        /// First byte on the disk.
        offset: u64,
    },
    /// Store all of the readable part from this offset on.
    Write {
        /// First byte on the disk.
        offset: u64,
    },
    /// Make every write that was acknowledged durable.
    Flush,
    /// Put the serial number into the writable part.
    GetId,
    /// Forget these ranges.
    Discard(Vec<ByteRange>),
    /// Zero these ranges.
    WriteZeroes(Vec<ZeroRange>),
}

/// What requests are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// The disk's size in sectors.
    pub capacity_sectors: u64,
    /// Refuse everything that changes the disk.
    pub read_only: bool,
    /// The driver took VIRTIO_BLK_F_DISCARD.
    pub discard: bool,
    /// The driver took VIRTIO_BLK_F_WRITE_ZEROES.
    pub write_zeroes: bool,
}

/// `struct virtio_blk_outhdr`.
#[derive(Debug, Clone, Copy, FromBytes)]
#[repr(C)]
struct Header {
    kind: u32,
    _reserved: u32,
    sector: u64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Debug, Clone, Copy, FromBytes)]
#[repr(C)]
struct Segment {
    sector: u64,
    num_sectors: u32,
    flags: u32,
}

const SEGMENT_LEN: usize = size_of::<Segment>();
const SEGMENT_UNMAP: u32 = spec::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

impl Limits {
    /// `len` bytes from `sector` on, if the disk has them all.
    #[inline]
    fn range(&self, sector: u64, len: u64) -> Result<ByteRange, Status> {
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(Status::IoErr);
        }
        let sectors = len >> SECTOR_SHIFT;
        let end = sector.checked_add(sectors).ok_or(Status::IoErr)?;
        if end > self.capacity_sectors {
            return Err(Status::IoErr);
        }
        // A capacity that came from a file's size in bytes leaves room for this.
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoErr)?;
        Ok(ByteRange { offset, len })
    }

    fn writable(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::IoErr) } else { Ok(()) }
    }
}

/// Reads a request out of a chain's two halves.
///
/// The status byte is moved from `writable` to `status`; the header (and segments) are consumed from
/// `readable`. What is left in them is the request's data. When `status` is empty afterwards, the
/// chain has no room for a status and there is nothing to answer.
///
/// # Errors
/// What to put into the status byte at once.
#[inline]
pub fn parse(
    readable: &mut IoVecs,
    writable: &mut IoVecs,
    status: &mut IoVecs,
    limits: &Limits,
) -> Result<Request, Status> {
    if writable.take_tail(1, status) == 0 {
        // Nobody could learn what became of it, so nothing does.
        return Err(Status::IoErr);
    }
    let header: Header = readable.read_obj().ok_or(Status::IoErr)?;
    let sector = u64::from_le(header.sector);
    match u32::from_le(header.kind) {
        spec::VIRTIO_BLK_T_IN => {
            // Nothing to read into is as wrong as bytes left over after the header.
            if writable.is_empty() || !readable.is_empty() {
                return Err(Status::IoErr);
            }
            let range = limits.range(sector, len_of(writable))?;
            Ok(Request::Read { offset: range.offset })
        }
        spec::VIRTIO_BLK_T_OUT => {
            limits.writable()?;
            if readable.is_empty() || !writable.is_empty() {
                return Err(Status::IoErr);
            }
            let range = limits.range(sector, len_of(readable))?;
            Ok(Request::Write { offset: range.offset })
        }
        spec::VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        spec::VIRTIO_BLK_T_GET_ID => {
            if writable.is_empty() {
                Err(Status::IoErr)
            } else {
                Ok(Request::GetId)
            }
        }
        spec::VIRTIO_BLK_T_DISCARD if limits.discard => discard(readable, limits),
        spec::VIRTIO_BLK_T_WRITE_ZEROES if limits.write_zeroes => write_zeroes(readable, limits),
        _ => Err(Status::Unsupported),
    }
}

#[inline]
fn len_of(data: &IoVecs) -> u64 {
    data.len() as u64
}

/// The segments in `readable`, range-checked, with their flags.
fn segments(readable: &mut IoVecs, limits: &Limits) -> Result<Vec<(ByteRange, u32)>, Status> {
    let count = readable.len().checked_div(SEGMENT_LEN).unwrap_or(0);
    let whole = count.checked_mul(SEGMENT_LEN) == Some(readable.len());
    if !whole || count == 0 || count > MAX_SEGMENTS as usize {
        return Err(Status::IoErr);
    }
    let mut out = Vec::with_capacity(count);
    while let Some(segment) = readable.read_obj::<Segment>() {
        let num_sectors = u32::from_le(segment.num_sectors);
        if num_sectors > MAX_SEGMENT_SECTORS {
            return Err(Status::IoErr);
        }
        // 2^32 sectors of 512 bytes: no overflow.
        let len = u64::from(num_sectors).saturating_mul(SECTOR_SIZE);
        let range = limits.range(u64::from_le(segment.sector), len)?;
        out.push((range, u32::from_le(segment.flags)));
    }
    Ok(out)
}

/// Discard: the unmap flag must be 0 and unknown flags are not ours to guess. Virtio 1.3, 5.2.6.2.
fn discard(readable: &mut IoVecs, limits: &Limits) -> Result<Request, Status> {
    limits.writable()?;
    let segments = segments(readable, limits)?;
    if segments.iter().any(|(_, flags)| *flags != 0) {
        return Err(Status::Unsupported);
    }
    Ok(Request::Discard(segments.into_iter().map(|(range, _)| range).collect()))
}

fn write_zeroes(readable: &mut IoVecs, limits: &Limits) -> Result<Request, Status> {
    limits.writable()?;
    let segments = segments(readable, limits)?;
    if segments.iter().any(|(_, flags)| *flags & !SEGMENT_UNMAP != 0) {
        return Err(Status::Unsupported);
    }
    let zero = |(range, flags)| ZeroRange { range, unmap: flags & SEGMENT_UNMAP != 0 };
    Ok(Request::WriteZeroes(segments.into_iter().map(zero).collect()))
}

#[cfg(test)]
mod tests;
