//! `virtio_net_hdr`: what precedes every frame, and what a guest may lie about in it.
//!
//! The device never hands a guest's own header to the kernel: [`TxHeader::check`] makes a clean one
//! from the guest's bytes, or says why the frame must be dropped. Virtio 1.3, 5.1.6.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use virtio_bindings::virtio_net as v;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::checksum::{checksum, sum, udp_checksum};

/// Bytes of a header with `num_buffers`: VIRTIO_F_VERSION_1 or VIRTIO_NET_F_MRG_RXBUF negotiated.
pub const HEADER_SIZE: usize = 12;
/// Bytes of a header without `num_buffers`: a legacy driver without mergeable buffers.
pub const LEGACY_HEADER_SIZE: usize = 10;
/// Bytes of a header with a hash: VIRTIO_NET_F_HASH_REPORT negotiated.
pub const HASH_HEADER_SIZE: usize = 20;
/// Bytes of an Ethernet header, which every frame has at the least.
pub const ETHERNET_HEADER_SIZE: usize = 14;
/// The longest frame: a 64 KiB IP packet with its Ethernet header and two VLAN tags.
pub const MAX_FRAME_SIZE: usize = 65535 + ETHERNET_HEADER_SIZE + 8;

/// `flags`: `csum_start` and `csum_offset` say where a checksum is still to be filled in.
pub const F_NEEDS_CSUM: u8 = 1;
/// `flags`: the checksum has been verified.
pub const F_DATA_VALID: u8 = 2;

/// `gso_type`: not a super-frame.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: UDP fragmentation.
pub const GSO_UDP: u8 = 3;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP segmentation.
pub const GSO_UDP_L4: u8 = 5;
/// `gso_type` flag: the TCP segments carry ECN.
pub const GSO_ECN: u8 = 0x80;

/// Where a UDP header has its checksum; no other protocol has it there.
const UDP_CHECKSUM_AT: u16 = 6;

/// The header as it lies in guest memory. Virtio 1.3, 5.1.6.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct NetHeader {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Length of the headers that a super-frame's segments repeat, bytes.
    pub hdr_len: U16,
    /// Payload bytes in each segment.
    pub gso_size: U16,
    /// Where summing starts, bytes from the frame's first.
    pub csum_start: U16,
    /// Where the sum goes, bytes from `csum_start`.
    pub csum_offset: U16,
    /// Chains that the frame fills (received frames only).
    pub num_buffers: U16,
}

impl NetHeader {
    /// Whether a guest with these `VIRTIO_NET_F_GUEST_*` offloads takes such a frame whole: it is no
    /// super-frame, or one of a kind that it negotiated. Virtio 1.3, 5.1.6.4.1.
    #[must_use]
    pub fn is_taken_whole(&self, offloads: u64) -> bool {
        let takes = |bit: u32| offloads & (1 << bit) != 0;
        if self.gso_type & GSO_ECN != 0 && !takes(v::VIRTIO_NET_F_GUEST_ECN) {
            return false;
        }
        match self.gso_type & !GSO_ECN {
            GSO_NONE => true,
            GSO_TCPV4 => takes(v::VIRTIO_NET_F_GUEST_TSO4),
            GSO_TCPV6 => takes(v::VIRTIO_NET_F_GUEST_TSO6),
            GSO_UDP => takes(v::VIRTIO_NET_F_GUEST_UFO),
            GSO_UDP_L4 => takes(v::VIRTIO_NET_F_GUEST_USO4) && takes(v::VIRTIO_NET_F_GUEST_USO6),
            _ => false,
        }
    }

    /// Fills in the checksum of `frame` that is said to be missing: the sum of the pseudo-header stands in
    /// its place. Nothing happens where that lies beyond the frame. Virtio 1.3, 5.1.6.2.
    pub fn fill_checksum(&self, frame: &mut [u8]) {
        let (start, offset) = (self.csum_start.get(), self.csum_offset.get());
        let sum = sum(frame.get(usize::from(start)..).unwrap_or(&[]));
        let sum = if offset == UDP_CHECKSUM_AT { udp_checksum(sum) } else { checksum(sum) };
        let place = usize::from(start).saturating_add(offset.into());
        if let Some(to) = frame.get_mut(place..place.saturating_add(2)) {
            to.copy_from_slice(&sum);
        }
    }
}

/// The header of a received frame with its hash: `struct virtio_net_hdr_v1_hash`. Virtio 1.3, 5.1.6.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct HashHeader {
    /// What every frame has.
    pub net: NetHeader,
    /// The hash of the frame's flow.
    pub hash_value: U32,
    /// What it was made of, `VIRTIO_NET_HASH_REPORT_*`; 0: there is none.
    pub hash_report: U16,
    /// Zero.
    pub padding: U16,
}

/// What is wrong with a frame that a guest sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderFault {
    /// The chain ends within the header or the Ethernet header.
    #[error("a chain of {0} bytes holds no frame")]
    Short(usize),
    /// The frame is longer than any can be.
    #[error("a frame of {0} bytes is too long")]
    Long(usize),
    /// `hdr_len` lies past the frame's end.
    #[error("hdr_len {0} is past the end of the frame")]
    HeaderLength(u16),
    /// A checksum place past the frame's end.
    #[error("the checksum at {start}+{offset} is past the end of the frame")]
    Checksum {
        /// `csum_start`.
        start: u16,
        /// `csum_offset`.
        offset: u16,
    },
    /// An offload that was not negotiated.
    #[error("flags {flags:#x} and gso_type {gso_type:#x} ask for what was not negotiated")]
    NotNegotiated {
        /// `flags`.
        flags: u8,
        /// `gso_type`.
        gso_type: u8,
    },
    /// A super-frame without segment size or without checksum offload.
    #[error("a super-frame with gso_size {0} or without a checksum to fill in")]
    Gso(u16),
}

/// What a guest may ask of its device when it sends, from the negotiated features.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TxOffloads {
    features: u64,
}

impl TxOffloads {
    /// What `features` (the negotiated ones) allow.
    #[must_use]
    pub const fn new(features: u64) -> Self {
        Self { features }
    }

    const fn has(self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Whether a frame may have this `gso_type` (not [`GSO_NONE`]).
    const fn allows(self, gso_type: u8) -> bool {
        let ecn = gso_type & GSO_ECN != 0;
        match gso_type & !GSO_ECN {
            GSO_TCPV4 => self.has(v::VIRTIO_NET_F_HOST_TSO4) && self.ecn_ok(ecn),
            GSO_TCPV6 => self.has(v::VIRTIO_NET_F_HOST_TSO6) && self.ecn_ok(ecn),
            GSO_UDP => self.has(v::VIRTIO_NET_F_HOST_UFO) && !ecn,
            GSO_UDP_L4 => self.has(v::VIRTIO_NET_F_HOST_USO) && !ecn,
            _ => false,
        }
    }

    const fn ecn_ok(self, ecn: bool) -> bool {
        !ecn || self.has(v::VIRTIO_NET_F_HOST_ECN)
    }
}

impl NetHeader {
    /// The clean header of a frame of `frame_len` bytes that a guest sent with this one.
    ///
    /// Flag bits that a device does not recognise are ignored, as the specification asks; so is
    /// everything that the set flags do not give a meaning to.
    ///
    /// # Errors
    /// The header lies, or asks for what was not negotiated: drop the frame.
    pub fn check(&self, frame_len: usize, allowed: TxOffloads) -> Result<Self, HeaderFault> {
        if frame_len < ETHERNET_HEADER_SIZE {
            return Err(HeaderFault::Short(frame_len));
        }
        if frame_len > MAX_FRAME_SIZE {
            return Err(HeaderFault::Long(frame_len));
        }
        let mut clean = Self::default();
        if usize::from(self.hdr_len.get()) > frame_len {
            return Err(HeaderFault::HeaderLength(self.hdr_len.get()));
        }
        let refused = HeaderFault::NotNegotiated { flags: self.flags, gso_type: self.gso_type };
        if self.flags & F_NEEDS_CSUM != 0 {
            if !allowed.has(v::VIRTIO_NET_F_CSUM) {
                return Err(refused);
            }
            self.check_checksum(frame_len)?;
            clean.flags = F_NEEDS_CSUM;
            clean.csum_start = self.csum_start;
            clean.csum_offset = self.csum_offset;
        }
        if self.gso_type != GSO_NONE {
            if !allowed.allows(self.gso_type) {
                return Err(refused);
            }
            if self.gso_size.get() == 0 || clean.flags == 0 {
                return Err(HeaderFault::Gso(self.gso_size.get()));
            }
            clean.gso_type = self.gso_type;
            clean.gso_size = self.gso_size;
            clean.hdr_len = self.hdr_len;
        }
        Ok(clean)
    }

    fn check_checksum(&self, frame_len: usize) -> Result<(), HeaderFault> {
        let (start, offset) = (self.csum_start.get(), self.csum_offset.get());
        let end = usize::from(start).saturating_add(usize::from(offset)).saturating_add(2);
        if usize::from(start) < ETHERNET_HEADER_SIZE || end > frame_len {
            return Err(HeaderFault::Checksum { start, offset });
        }
        Ok(())
    }
}

/// Bytes of header before each frame with these negotiated features. Virtio 1.3, 5.1.6.1.
#[must_use]
pub const fn header_size(features: u64) -> usize {
    let modern =
        1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1 | 1 << v::VIRTIO_NET_F_MRG_RXBUF;
    if features & (1 << v::VIRTIO_NET_F_HASH_REPORT) != 0 {
        HASH_HEADER_SIZE
    } else if features & modern != 0 {
        HEADER_SIZE
    } else {
        LEGACY_HEADER_SIZE
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "a test may panic")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: TxOffloads = TxOffloads::new(u64::MAX);

    fn tso() -> NetHeader {
        NetHeader {
            flags: F_NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 54.into(),
            gso_size: 1448.into(),
            csum_start: 34.into(),
            csum_offset: 16.into(),
            num_buffers: 0.into(),
        }
    }

    #[test]
    fn an_honest_super_frame_passes_unchanged() {
        assert_eq!(tso().check(9000, ALL), Ok(tso()));
    }

    #[test]
    fn a_plain_frame_loses_what_has_no_meaning() {
        let header = NetHeader {
            flags: F_DATA_VALID | 0x40,
            gso_size: 7.into(),
            csum_start: 60000.into(),
            num_buffers: 9.into(),
            ..NetHeader::default()
        };
        assert_eq!(header.check(60, TxOffloads::default()), Ok(NetHeader::default()));
    }

    #[test]
    fn lies_are_told_apart() {
        let fault = |change: fn(&mut NetHeader), len| {
            let mut header = tso();
            change(&mut header);
            header.check(len, ALL).unwrap_err()
        };
        assert_eq!(fault(|_| (), 13), HeaderFault::Short(13));
        assert_eq!(fault(|_| (), MAX_FRAME_SIZE + 1), HeaderFault::Long(MAX_FRAME_SIZE + 1));
        assert_eq!(fault(|h| h.hdr_len = 101.into(), 100), HeaderFault::HeaderLength(101));
        assert_eq!(
            fault(|h| h.csum_start = 83.into(), 100),
            HeaderFault::Checksum { start: 83, offset: 16 }
        );
        assert_eq!(
            fault(|h| h.csum_start = 13.into(), 100),
            HeaderFault::Checksum { start: 13, offset: 16 }
        );
        assert_eq!(fault(|h| h.gso_size = 0.into(), 100), HeaderFault::Gso(0));
        assert_eq!(fault(|h| h.flags = 0, 100), HeaderFault::Gso(1448));
        assert!(matches!(fault(|h| h.gso_type = 2, 100), HeaderFault::NotNegotiated { .. }));
        assert!(matches!(fault(|h| h.gso_type = 0x85, 100), HeaderFault::NotNegotiated { .. }));
    }

    #[test]
    fn each_offload_needs_its_feature() {
        let cases = [
            (GSO_TCPV4, v::VIRTIO_NET_F_HOST_TSO4),
            (GSO_TCPV6, v::VIRTIO_NET_F_HOST_TSO6),
            (GSO_UDP, v::VIRTIO_NET_F_HOST_UFO),
            (GSO_UDP_L4, v::VIRTIO_NET_F_HOST_USO),
        ];
        for (gso_type, bit) in cases {
            let header = NetHeader { gso_type, ..tso() };
            let with = TxOffloads::new(1 << v::VIRTIO_NET_F_CSUM | 1 << bit);
            assert!(header.check(1000, with).is_ok(), "{gso_type}");
            let without = TxOffloads::new(!(1u64 << bit));
            assert!(header.check(1000, without).is_err(), "{gso_type}");
        }
        let no_csum = TxOffloads::new(!(1u64 << v::VIRTIO_NET_F_CSUM));
        assert!(tso().check(1000, no_csum).is_err());
        let ecn = NetHeader { gso_type: GSO_TCPV4 | GSO_ECN, ..tso() };
        assert!(ecn.check(1000, ALL).is_ok());
        assert!(ecn.check(1000, TxOffloads::new(!(1u64 << v::VIRTIO_NET_F_HOST_ECN))).is_err());
    }

    #[test]
    fn the_header_is_short_for_old_drivers_only() {
        assert_eq!(size_of::<NetHeader>(), HEADER_SIZE);
        assert_eq!(header_size(0), 10);
        assert_eq!(header_size(1 << v::VIRTIO_NET_F_MRG_RXBUF), 12);
        assert_eq!(header_size(1 << 32), 12);
        assert_eq!(size_of::<HashHeader>(), HASH_HEADER_SIZE);
        assert_eq!(header_size(1 << 32 | 1 << v::VIRTIO_NET_F_HASH_REPORT), 20);
    }

    proptest! {
        /// Whatever the bytes, what passes lies within the frame.
        #[test]
        fn what_passes_is_consistent(bytes: [u8; 12], len in 0usize..70000, features: u64) {
            let header = NetHeader::read_from_bytes(&bytes).unwrap();
            if let Ok(clean) = header.check(len, TxOffloads::new(features)) {
                prop_assert!((14..=MAX_FRAME_SIZE).contains(&len));
                prop_assert!(usize::from(clean.hdr_len.get()) <= len);
                if clean.flags != 0 {
                    let end = usize::from(clean.csum_start.get()) + usize::from(clean.csum_offset.get()) + 2;
                    prop_assert!(end <= len);
                }
                if clean.gso_type != 0 {
                    prop_assert!(clean.flags == F_NEEDS_CSUM && clean.gso_size.get() > 0);
                }
            }
        }
    }
}
