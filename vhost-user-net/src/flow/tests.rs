//! Frames of every kind, and their flows.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "a test may panic")]

use super::*;
use proptest::prelude::*;

const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

fn ipv4(protocol: u8, fragment: u16, from: u8, to: u8, ports: [u8; 4]) -> Vec<u8> {
    let mut frame = [&MACS[..], &[8, 0, 0x45, 0, 0, 28, 0, 0]].concat();
    frame.extend(fragment.to_be_bytes());
    frame.extend([64, protocol, 0, 0, 10, 0, 0, from, 10, 0, 0, to]);
    frame.extend(ports);
    frame
}

/// An IPv6 packet with these bytes after its fixed header, whose `next` is given.
fn ipv6(next: u8, rest: &[u8]) -> Vec<u8> {
    let mut frame = [&MACS[..], &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, next, 64]].concat();
    frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    frame.extend(rest);
    frame
}

fn tagged(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6], &frame[12..]].concat()
}

#[test]
fn addresses_and_ports_are_found() {
    for (protocol, transport) in [(6, Transport::Tcp), (17, Transport::Udp)] {
        let frame = ipv4(protocol, 0, 1, 2, [0, 80, 1, 0]);
        for frame in [tagged(&frame), frame] {
            let flow = Flow::of(&frame);
            assert_eq!((flow.network, flow.transport), (Network::V4, Some(transport)));
            assert_eq!(flow.addresses(), [10, 0, 0, 1, 10, 0, 0, 2]);
            assert_eq!(flow.addresses_and_ports()[8..], [0, 80, 1, 0]);
        }
        let frame = ipv6(protocol, &[0, 80, 1, 0]);
        for frame in [tagged(&frame), frame] {
            let flow = Flow::of(&frame);
            assert_eq!((flow.network, flow.transport), (Network::V6, Some(transport)));
            assert_eq!(flow.addresses_and_ports()[32..], [0, 80, 1, 0]);
        }
    }
    let options =
        [60, 0, 0, 0, 0, 0, 0, 0, 17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 9];
    let flow = Flow::of(&ipv6(0, &options));
    assert_eq!(flow.transport, Some(Transport::Udp));
    assert_eq!(flow.addresses_and_ports()[32..], [0, 7, 0, 9]);
}

#[test]
fn what_has_no_ports_is_known_by_its_addresses() {
    let ping = Flow::of(&ipv4(1, 0, 1, 2, [1, 2, 3, 4]));
    assert_eq!((ping.network, ping.transport), (Network::V4, None));
    // The first fragment, a later one, and one that keeps whole: don't-fragment is no fragment.
    assert_eq!(Flow::of(&ipv4(17, 0x2000, 1, 2, [1, 2, 3, 4])), ping);
    assert_eq!(Flow::of(&ipv4(17, 0x0007, 1, 2, [1, 2, 3, 4])), ping);
    assert_eq!(Flow::of(&ipv4(17, 0x4000, 1, 2, [1, 2, 3, 4])).transport, Some(Transport::Udp));
    assert_eq!(Flow::of(&ipv6(44, &[17, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 9])).transport, None);
    // Cut short before the ports.
    assert_eq!(Flow::of(&ipv4(6, 0, 1, 2, [0; 4])[..36]).transport, None);
    let mut lies = ipv4(6, 0, 1, 2, [0; 4]);
    lies[14] = 0x41;
    assert_eq!(Flow::of(&lies).transport, None);
    lies[14] = 0x65;
    assert_eq!(Flow::of(&lies).network, Network::Other);
    let arp = Flow::of(&[&MACS[..], &[8, 6, 0, 1]].concat());
    assert_eq!((arp.network, arp.addresses()), (Network::Other, &MACS[..]));
}

#[test]
fn both_directions_are_one_flow_and_others_are_others() {
    let there = Flow::of(&ipv4(6, 0, 1, 2, [0, 80, 1, 0]));
    let back = Flow::of(&ipv4(6, 0, 2, 1, [1, 0, 0, 80]));
    assert_eq!(there.id(), back.id());
    // The same ports at the other stations are another flow.
    assert_ne!(there.id(), Flow::of(&ipv4(6, 0, 2, 1, [0, 80, 1, 0])).id());
    let swapped: Vec<u8> = [&MACS[6..], &MACS[..6], &[8, 6]].concat();
    assert_eq!(Flow::of(&swapped).id(), Flow::of(&[&MACS[..], &[8, 6]].concat()).id());
    let ids: std::collections::HashSet<u32> =
        (0..=255).map(|n| Flow::of(&ipv4(17, 0, 1, 2, [0, n, 7, 7])).id()).collect();
    assert_eq!(ids.len(), 256);
    // They spread evenly: a share of four within a factor of two.
    for part in 0..4u64 {
        let share = ids.iter().filter(|&&id| (u64::from(id) * 4) >> 32 == part).count();
        assert!((32..128).contains(&share), "{share}");
    }
}

proptest! {
    /// No bytes are too strange.
    #[test]
    fn whatever_the_bytes(mut bytes: Vec<u8>, v6: bool) {
        if let Some(kind) = bytes.get_mut(12..15) {
            kind.copy_from_slice(if v6 { &[0x86, 0xdd, 0x60] } else { &[8, 0, 0x46] });
        }
        let flow = Flow::of(&bytes);
        prop_assert!(flow.addresses_and_ports().len() <= FLOW_BYTES);
        prop_assert_eq!(flow.id(), Flow::of(&bytes).id());
    }
}
