//! Ethernet frames: what they carry, and where that starts. Pure. IEEE 802.3, 802.1Q.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

/// EtherType of IPv4.
pub(crate) const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub(crate) const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub(crate) const IPV6: u16 = 0x86dd;
/// Bytes of both stations' addresses, which every frame begins with.
pub(crate) const STATIONS_SIZE: usize = 12;

const VLANS: [u16; 2] = [0x8100, 0x88a8];
const VLAN_TAG_SIZE: usize = 4;
const VLAN_TAGS: usize = 2;

/// The EtherType of what the frame carries behind at most two VLAN tags, and the byte that it starts at;
/// `None`: the frame ends before.
pub(crate) fn payload(frame: &[u8]) -> Option<(u16, usize)> {
    let mut at = STATIONS_SIZE;
    for _ in 0..VLAN_TAGS {
        if VLANS.contains(&number(frame, at)?) {
            at = at.checked_add(VLAN_TAG_SIZE)?;
        }
    }
    Some((number(frame, at)?, at.checked_add(2)?))
}

/// The 16-bit number of `bytes` at `at`.
pub(crate) fn number(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*pair))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(types: &[u8]) -> Vec<u8> {
        [&[0xee; STATIONS_SIZE], types].concat()
    }

    #[test]
    fn what_a_frame_carries_is_behind_its_tags() {
        let (tag, outer) = ([0x81, 0, 0, 5], [0x88, 0xa8, 0, 6]);
        assert_eq!(payload(&frame(&[8, 0])), Some((IPV4, 14)));
        assert_eq!(payload(&frame(&[&tag[..], &[0x86, 0xdd]].concat())), Some((IPV6, 18)));
        assert_eq!(payload(&frame(&[&outer[..], &tag, &[8, 6]].concat())), Some((ARP, 22)));
        // A third tag is what is carried.
        assert_eq!(payload(&frame(&[&tag[..], &tag, &tag].concat())), Some((0x8100, 22)));
        for short in [&[8][..], &tag, &[]] {
            assert_eq!(payload(&frame(short)), None);
        }
        assert_eq!(payload(&[]), None);
    }
}
