//! Descriptors: their layouts, the errors a guest can make in them, and their way into a chain.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::chain::Chain;
use crate::vhost_user::memory::GuestMemory;

/// The chain goes on in `next`. Virtio 1.3, 2.7.5.
pub(super) const F_NEXT: u16 = 1;
/// The device writes this buffer.
pub(super) const F_WRITE: u16 = 2;
/// The buffer holds a table of descriptors.
pub(super) const F_INDIRECT: u16 = 4;

/// Descriptors in one chain at the most, indirect ones included. Virtio limits a chain to the queue
/// size, but drivers are known to exceed it with indirect tables; QEMU's own limit is 1024.
pub(super) const MAX_CHAIN: u32 = 1024;

/// Split descriptor, also the layout of indirect tables. Virtio 1.3, 2.7.5.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct SplitDescriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

/// Packed descriptor. Virtio 1.3, 2.8.13.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct PackedDescriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) id: u16,
    pub(super) flags: u16,
}

/// What a guest can do wrong in a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// A buffer or table that is not guest memory. The chain is returned unused, the ring goes on.
    #[error("descriptor {addr:#x}+{len:#x} is not guest memory")]
    Address {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// More bytes than virtio allows in a chain, which devices count in 32 bits. Virtio 1.3, 2.7.5.2.
    /// The chain is returned unused, the ring goes on.
    #[error("descriptor chain of 4 GiB or more")]
    TooManyBytes,
    /// The available index moved by more than the ring holds, or back.
    #[error("available index {avail} is not within {size} of used index {last}")]
    IndexJump {
        /// The guest's index.
        avail: u16,
        /// The used index it was shown last.
        last: u16,
        /// Ring size.
        size: u16,
    },
    /// A descriptor index past the ring or table.
    #[error("descriptor index {0} is out of range")]
    BadIndex(u16),
    /// More descriptors than a chain may have: a loop, most likely.
    #[error("descriptor chain is endless or too long")]
    TooLong,
    /// An indirect table of a bad size, inside another one, or with NEXT set.
    #[error("bad indirect descriptor table of {0} bytes")]
    BadIndirect(u32),
    /// A buffer to read after one to write. Virtio 1.3, 2.7.4.2.
    #[error("readable descriptor after a writable one")]
    Order,
    /// A chain given back although one behind it was rejected, and so returned, already.
    #[error("a chain before a rejected one was given back")]
    BehindRejected,
    /// The device found that it cannot go on with this queue.
    #[error("{0}")]
    Device(&'static str),
}

impl RingError {
    /// Whether only the one chain is bad and the ring itself can go on.
    pub(super) fn is_chain_only(self) -> bool {
        matches!(self, Self::Address { .. } | Self::TooManyBytes | Self::BehindRejected)
    }
}

/// Adds one buffer to `chain`.
#[inline]
pub(super) fn add_buffer(
    memory: &GuestMemory,
    chain: &mut Chain,
    addr: u64,
    len: u32,
    flags: u16,
) -> Result<(), RingError> {
    let list = if flags & F_WRITE != 0 {
        &mut chain.writable
    } else {
        if !chain.writable.is_empty() {
            return Err(RingError::Order);
        }
        &mut chain.readable
    };
    if memory.append(addr, len, flags & F_WRITE != 0, list) {
        Ok(())
    } else {
        Err(RingError::Address { addr, len })
    }
}

/// Where an indirect table is and how many entries it has.
pub(super) fn indirect_table(
    memory: &GuestMemory,
    addr: u64,
    len: u32,
) -> Result<(*const u8, u32), RingError> {
    let entries = len / 16;
    if len == 0 || !len.is_multiple_of(16) || entries > MAX_CHAIN {
        return Err(RingError::BadIndirect(len));
    }
    let table = memory.translate(addr, u64::from(len)).ok_or(RingError::Address { addr, len })?;
    Ok((table.cast_const(), entries))
}
