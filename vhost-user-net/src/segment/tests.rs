//! What is cut is taken apart again by a packet library, which knows nothing of this room.
#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::unwrap_used,
    reason = "a test may panic"
)]

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use zerocopy::FromZeros;

use super::*;
use crate::header::F_NEEDS_CSUM;

const FIN: u8 = 1;
const PSH: u8 = 8;
const ACK: u8 = 16;
const SEQUENCE: u32 = u32::MAX - 5000;

/// A super-frame and its header, as a guest's driver gives them to a device.
fn super_frame(
    v6: bool,
    tcp: bool,
    tags: usize,
    payload: &[u8],
    size: u16,
) -> (NetHeader, Vec<u8>) {
    let ethernet = PacketBuilder::ethernet2([2; 6], [4; 6]);
    let ip =
        if v6 { ethernet.ipv6([7; 16], [9; 16], 64) } else { ethernet.ipv4([7; 4], [9; 4], 64) };
    let mut frame = Vec::new();
    if tcp {
        let options = [etherparse::TcpOptionElement::Timestamp(1, 2)];
        let tcp = ip.tcp(1, 2, SEQUENCE, 100).fin().psh().ack(9).options(&options).unwrap();
        tcp.write(&mut frame, payload).unwrap();
    } else {
        ip.udp(1, 2).write(&mut frame, payload).unwrap();
    }
    let at = 14 + if v6 { 40 } else { 20 };
    if tcp {
        // CWR, which the library's builder does not set.
        frame[at + TCP_FLAGS_AT] |= CWR;
    }
    for _ in 0..tags {
        frame.splice(12..12, [0x81, 0, 0, 5]);
    }
    let mut header = NetHeader::new_zeroed();
    header.flags = F_NEEDS_CSUM;
    header.gso_type = match (tcp, v6) {
        (true, false) => GSO_TCPV4 | GSO_ECN,
        (true, true) => GSO_TCPV6,
        (false, _) => GSO_UDP_L4,
    };
    header.gso_size = size.into();
    header.csum_start = u16::try_from(at + 4 * tags).unwrap().into();
    header.csum_offset = if tcp { 16 } else { 6 }.into();
    (header, frame)
}

/// Checks a frame of a cut and gives its payload.
fn inspect(frame: &[u8], index: usize, last: bool, size: u16) -> Vec<u8> {
    let parsed = SlicedPacket::from_ethernet(frame).unwrap();
    let net = parsed.net.unwrap();
    if let NetSlice::Ipv4(ip) = &net {
        let header = ip.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        assert_eq!(usize::from(header.identification), index);
    }
    let (mut header, payload) = match parsed.transport.unwrap() {
        TransportSlice::Tcp(tcp) => (Some(tcp.to_header()), tcp.payload().to_vec()),
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            let sum = match &net {
                NetSlice::Ipv4(ip) => {
                    header.calc_checksum_ipv4(&ip.header().to_header(), udp.payload())
                }
                NetSlice::Ipv6(ip) => {
                    header.calc_checksum_ipv6(&ip.header().to_header(), udp.payload())
                }
                NetSlice::Arp(_) => unreachable!("ARP was not sent"),
            };
            assert_eq!(header.checksum, sum.unwrap());
            (None, udp.payload().to_vec())
        }
        other => panic!("{other:?}"),
    };
    if let Some(tcp) = header.take() {
        let sum = match &net {
            NetSlice::Ipv4(ip) => tcp.calc_checksum_ipv4(&ip.header().to_header(), &payload),
            NetSlice::Ipv6(ip) => tcp.calc_checksum_ipv6(&ip.header().to_header(), &payload),
            NetSlice::Arp(_) => unreachable!("ARP was not sent"),
        };
        assert_eq!(tcp.checksum, sum.unwrap());
        let done = u32::try_from(index).unwrap() * u32::from(size);
        assert_eq!(tcp.sequence_number, SEQUENCE.wrapping_add(done));
        assert_eq!((tcp.fin, tcp.psh, tcp.cwr), (last, last, index == 0));
        assert!(tcp.ack && tcp.options.len() == 12);
    }
    payload
}

#[test]
fn a_frame_that_lies_about_itself_is_not_cut() {
    let (header, frame) = super_frame(false, true, 0, &[1; 100], 10);
    assert!(Segments::new(&header, &frame).is_some());
    let refuses = |change: fn(&mut NetHeader, &mut Vec<u8>)| {
        let (mut header, mut frame) = (header, frame.clone());
        change(&mut header, &mut frame);
        assert!(Segments::new(&header, &frame).is_none());
    };
    refuses(|h, _| h.gso_type = GSO_TCPV6);
    refuses(|h, _| h.gso_type = GSO_UDP_L4);
    refuses(|h, _| h.csum_start = 14.into());
    refuses(|h, _| h.csum_start = 38.into());
    refuses(|h, _| h.csum_offset = 6.into());
    refuses(|_, f| f[14] = 0x46);
    refuses(|_, f| f[12] = 0x09);
    // The TCP header's length: less than one, and more than there is.
    refuses(|_, f| f[34 + 12] = 0x40);
    refuses(|_, f| f.truncate(60));
    // A piece whose length no IP header can say.
    refuses(|h, f| {
        h.gso_size = u16::MAX.into();
        f.resize(14 + 65_536, 0);
    });
    // Headers alone.
    refuses(|_, f| f.truncate(66));
    assert_eq!(frame[34 + TCP_FLAGS_AT] & (FIN | PSH | ACK | CWR), FIN | PSH | ACK | CWR);
}

proptest! {
    /// The frames of a cut are sound, in order, and carry every byte once.
    #[test]
    fn a_cut_loses_nothing(
        v6: bool,
        tcp: bool,
        tags in 0usize..3,
        len in 1usize..20_000,
        size in 16u16..9000,
    ) {
        let payload: Vec<u8> = (0..len).map(|i| u8::try_from(i * i % 251).unwrap()).collect();
        let (header, frame) = super_frame(v6, tcp, tags, &payload, size);
        let mut cut = Segments::new(&header, &frame).unwrap();
        let count = cut.count();
        let (mut room, mut got, mut index) = (Vec::new(), Vec::new(), 0);
        while cut.next_into(&mut room) {
            let part = inspect(&room, index, index + 1 == count, size);
            prop_assert!(part.len() == usize::from(size) || index + 1 == count);
            got.extend(part);
            index += 1;
        }
        prop_assert_eq!(index, count);
        prop_assert_eq!(got, payload);
    }

    /// Whatever the bytes, a cut ends.
    #[test]
    fn bytes_without_sense_do_no_harm(
        mut frame in prop::collection::vec(any::<u8>(), 0..200),
        kind in 0usize..4,
        gso in prop::sample::select(vec![GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, 3, 0x81]),
        size: u16,
        start in 0u16..120,
        offset in 0u16..20,
    ) {
        for (to, from) in frame.iter_mut().skip(12).zip([[8, 0, 0x45], [0x86, 0xdd, 0x60], [0x81, 0, 8], [0, 0, 0]][kind]) {
            *to = from;
        }
        let mut header = NetHeader::new_zeroed();
        header.gso_type = gso;
        header.gso_size = size.into();
        header.csum_start = start.into();
        header.csum_offset = offset.into();
        let mut room = Vec::new();
        if let Some(mut cut) = Segments::new(&header, &frame) {
            let count = cut.count();
            let mut seen = 0;
            while cut.next_into(&mut room) {
                seen += 1;
            }
            prop_assert_eq!(seen, count);
        }
    }
}
