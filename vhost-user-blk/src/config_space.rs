//! The device's configuration space, `struct virtio_blk_config`. Virtio 1.3, 5.2.4.

use outboard_common::device::ConfigError;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS, SECTOR_SIZE};

/// Where `writeback` is, the only field that a driver may write.
pub const WRITEBACK_OFFSET: u32 = 32;

/// The largest single segment a driver may use, bytes (VIRTIO_BLK_F_SIZE_MAX).
const SIZE_MAX: u32 = 1 << 30;

/// The fields up to write-zeroes: 60 bytes, which is also all that Firecracker reads. The later
/// ones (secure erase, zones) belong to features that are not offered; they read as 0.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C, packed)]
pub struct ConfigSpace {
    capacity: u64,
    size_max: u32,
    seg_max: u32,
    cylinders: u16,
    heads: u8,
    sectors: u8,
    blk_size: u32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: u16,
    opt_io_size: u32,
    writeback: u8,
    unused0: u8,
    num_queues: u16,
    max_discard_sectors: u32,
    max_discard_seg: u32,
    discard_sector_alignment: u32,
    max_write_zeroes_sectors: u32,
    max_write_zeroes_seg: u32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

const _: () = assert!(size_of::<ConfigSpace>() == 60);

/// What the configuration tells about the disk.
#[derive(Debug, Clone, Copy)]
pub struct Disk {
    /// Size in sectors of 512 bytes.
    pub capacity_sectors: u64,
    /// Logical block size, bytes: a power of two from 512 on.
    pub block_size: u32,
    /// Physical block size, bytes: a power of two, at least the logical one.
    pub physical_block_size: u32,
    /// What to align discards to, bytes.
    pub discard_granularity: u32,
    /// Virtqueues.
    pub num_queues: u16,
    /// Entries of a virtqueue at the most.
    pub queue_size: u16,
    /// The write cache is on.
    pub writeback: bool,
    /// Zeroing may give storage up.
    pub unmap: bool,
}

impl ConfigSpace {
    /// The configuration of `disk`.
    #[must_use]
    pub fn new(disk: &Disk) -> Self {
        let exponent = disk
            .physical_block_size
            .trailing_zeros()
            .saturating_sub(disk.block_size.trailing_zeros());
        let blocks = |bytes: u32| bytes / disk.block_size.max(1);
        Self {
            capacity: disk.capacity_sectors.to_le(),
            size_max: SIZE_MAX.to_le(),
            // A request also takes a descriptor for its header and one for its status.
            seg_max: u32::from(disk.queue_size.saturating_sub(2).max(1)).to_le(),
            blk_size: disk.block_size.to_le(),
            physical_block_exp: u8::try_from(exponent).unwrap_or(0),
            min_io_size: u16::try_from(blocks(disk.physical_block_size)).unwrap_or(1).to_le(),
            writeback: u8::from(disk.writeback),
            num_queues: disk.num_queues.to_le(),
            max_discard_sectors: MAX_SEGMENT_SECTORS.to_le(),
            max_discard_seg: MAX_SEGMENTS.to_le(),
            discard_sector_alignment: sectors(disk.discard_granularity).to_le(),
            max_write_zeroes_sectors: MAX_SEGMENT_SECTORS.to_le(),
            max_write_zeroes_seg: MAX_SEGMENTS.to_le(),
            write_zeroes_may_unmap: u8::from(disk.unmap),
            ..Self::default()
        }
    }

    /// Fills `out` from `offset` on, with 0 past the end.
    pub fn read(&self, offset: u32, out: &mut [u8]) {
        out.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.as_bytes().get(from..).unwrap_or(&[]);
        for (to, from) in out.iter_mut().zip(bytes) {
            *to = *from;
        }
    }
}

fn sectors(bytes: u32) -> u32 {
    bytes / u32::try_from(SECTOR_SIZE).unwrap_or(512)
}

/// The value of `writeback` that a configuration write asks for.
///
/// # Errors
/// Another field is touched, or the value is neither 0 nor 1.
pub fn written_writeback(offset: u32, data: &[u8]) -> Result<bool, ConfigError> {
    match (offset, data) {
        (WRITEBACK_OFFSET, [0]) => Ok(false),
        (WRITEBACK_OFFSET, [1]) => Ok(true),
        (WRITEBACK_OFFSET, [_]) => Err(ConfigError::BadValue),
        _ => Err(ConfigError::ReadOnly { offset, len: data.len() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DISK: Disk = Disk {
        capacity_sectors: 0x1_0000_0008,
        block_size: 512,
        physical_block_size: 4096,
        discard_granularity: 4096,
        num_queues: 4,
        queue_size: 256,
        writeback: true,
        unmap: true,
    };

    fn bytes(offset: u32, len: usize) -> Vec<u8> {
        let mut out = vec![0xaa; len];
        ConfigSpace::new(&DISK).read(offset, &mut out);
        out
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        assert_eq!(bytes(0, 8), 0x1_0000_0008u64.to_le_bytes());
        assert_eq!(bytes(12, 4), 254u32.to_le_bytes());
        assert_eq!(bytes(20, 4), 512u32.to_le_bytes());
        assert_eq!(bytes(24, 4), [3, 0, 8, 0]);
        assert_eq!(bytes(WRITEBACK_OFFSET, 1), [1]);
        assert_eq!(bytes(34, 2), [4, 0]);
        assert_eq!(
            bytes(36, 12),
            [MAX_SEGMENT_SECTORS, MAX_SEGMENTS, 8].map(u32::to_le_bytes).concat()
        );
        assert_eq!(bytes(56, 1), [1]);
    }

    #[test]
    fn past_the_end_there_are_zeroes() {
        assert_eq!(bytes(56, 40)[1..], [0; 39]);
        assert_eq!(bytes(60, 4), [0; 4]);
        assert_eq!(bytes(u32::MAX, 4), [0; 4]);
    }

    #[test]
    fn only_writeback_is_writable() {
        assert_eq!(written_writeback(32, &[0]), Ok(false));
        assert_eq!(written_writeback(32, &[1]), Ok(true));
        assert_eq!(written_writeback(32, &[2]), Err(ConfigError::BadValue));
        for (offset, data) in
            [(0, &[0u8; 8][..]), (31, &[0, 1]), (32, &[1, 0]), (32, &[]), (33, &[1])]
        {
            assert!(matches!(written_writeback(offset, data), Err(ConfigError::ReadOnly { .. })));
        }
    }
}
