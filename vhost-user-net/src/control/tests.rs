//! Commands of every kind, right and wrong, and the filter they make.
#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

use super::*;
use proptest::prelude::*;

const ALL: Negotiated = Negotiated { features: u64::MAX, max_pairs: 4 };

fn unknown(class: u8, command: u8) -> Result<Command, ControlError> {
    Err(ControlError::Unknown { class, command })
}

#[test]
fn every_command_is_decoded() {
    let cases: &[(&[u8], Command)] = &[
        (&[0, 0, 1], Command::RxMode(RxMode::Promiscuous, true)),
        (&[0, 1, 0], Command::RxMode(RxMode::AllMulticast, false)),
        (&[0, 2, 1], Command::RxMode(RxMode::AllUnicast, true)),
        (&[0, 3, 1], Command::RxMode(RxMode::NoMulticast, true)),
        (&[0, 4, 1], Command::RxMode(RxMode::NoUnicast, true)),
        (&[0, 5, 1], Command::RxMode(RxMode::NoBroadcast, true)),
        (&[1, 1, 2, 3, 4, 5, 6, 7], Command::MacAddr(MacAddr([2, 3, 4, 5, 6, 7]))),
        (&[2, 0, 0xff, 0x0f], Command::Vlan(4095, true)),
        (&[2, 1, 7, 0], Command::Vlan(7, false)),
        (&[3, 0], Command::AnnounceAck),
        (&[4, 0, 4, 0], Command::Pairs(4)),
        (&[5, 0, 0x82, 1, 0, 0, 0, 0, 0, 0], Command::GuestOffloads(0x182)),
        (
            &[6, 0, 8, 0, 0, 0, 50, 0, 0, 0],
            Command::CoalesceTx(Coalescing { max_packets: 8, max_usecs: 50 }),
        ),
        (
            &[6, 1, 8, 0, 0, 0, 50, 0, 0, 0],
            Command::CoalesceRx(Coalescing { max_packets: 8, max_usecs: 50 }),
        ),
        (
            &[1, 0, 1, 0, 0, 0, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0],
            Command::MacTable {
                unicast: Some(vec![MacAddr([2, 3, 4, 5, 6, 7])]),
                multicast: Some(vec![]),
            },
        ),
    ];
    for (bytes, command) in cases {
        assert_eq!(parse(bytes, ALL).as_ref(), Ok(command));
        // One byte more or less is another length, which no command forgives.
        let longer = [bytes, &[0][..]].concat();
        assert!(matches!(parse(&longer, ALL), Err(ControlError::Length { .. })), "{longer:?}");
        let shorter = &bytes[..bytes.len() - 1];
        assert!(parse(shorter, ALL).is_err(), "{shorter:?}");
    }
}

#[test]
fn what_was_not_negotiated_is_unknown() {
    let none = Negotiated { features: 0, max_pairs: 4 };
    for bytes in [
        &[0u8, 0, 1][..],
        &[0, 2, 1],
        &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[1, 1, 2, 3, 4, 5, 6, 7],
        &[2, 0, 1, 0],
        &[3, 0],
        &[4, 0, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[6, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(parse(bytes, none), unknown(bytes[0], bytes[1]));
    }
    assert_eq!(parse(&[9, 9], ALL), unknown(9, 9));
    assert_eq!(parse(&[0, 6, 1], ALL), unknown(0, 6));
    assert_eq!(parse(&[4, 3, 0, 0], ALL), unknown(4, 3));
    assert_eq!(parse(&[4], ALL), Err(ControlError::Short(1)));
    assert_eq!(parse(&[], ALL), Err(ControlError::Short(0)));
}

#[test]
fn values_out_of_range_are_refused() {
    for bytes in [
        &[0u8, 0, 2][..],
        &[1, 1, 1, 0, 0, 0, 0, 1],
        &[1, 1, 0, 0, 0, 0, 0, 0],
        &[2, 0, 0, 0x10],
        &[4, 0, 0, 0],
        &[4, 0, 5, 0],
        &[5, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let expect = ControlError::Value { class: bytes[0], command: bytes[1] };
        assert_eq!(parse(bytes, ALL), Err(expect));
    }
}

#[test]
fn a_long_mac_table_becomes_everything() {
    let mut bytes = vec![1, 0];
    bytes.extend((MAX_MAC_TABLE as u32 + 1).to_le_bytes());
    bytes.extend(std::iter::repeat_n(2, 6 * (MAX_MAC_TABLE + 1)));
    bytes.extend(0u32.to_le_bytes());
    let command = parse(&bytes, ALL).unwrap();
    assert_eq!(command, Command::MacTable { unicast: None, multicast: Some(vec![]) });
    let mut filter = RxFilter::for_station(Some(MacAddr([2; 6])), 0);
    filter.apply(&Command::RxMode(RxMode::Promiscuous, false));
    assert!(!filter.accepts(&frame([4; 6], None)));
    filter.apply(&command);
    assert!(filter.accepts(&frame([4; 6], None)));
    assert!(!filter.accepts(&frame([5; 6], None)));
}

fn frame(to: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
    let mut frame = to.to_vec();
    frame.extend([2, 9, 9, 9, 9, 9]);
    if let Some(tag) = vlan {
        frame.extend([0x81, 0x00]);
        frame.extend(tag.to_be_bytes());
    }
    frame.extend([8, 0, 0, 0]);
    frame
}

#[test]
fn the_filter_follows_modes_and_tables() {
    let me = MacAddr([2, 0, 0, 0, 0, 1]);
    let other = [2, 0, 0, 0, 0, 2];
    let group = [1, 0, 0x5e, 0, 0, 1];
    let mut filter = RxFilter::for_station(Some(me), 0);
    assert!(filter.is_open() && filter.accepts(&frame(other, None)));
    filter.apply(&Command::RxMode(RxMode::Promiscuous, false));
    assert!(!filter.is_open());
    let accepted =
        |f: &RxFilter| [me.0, other, group, [0xff; 6]].map(|to| f.accepts(&frame(to, None)));
    assert_eq!(accepted(&filter), [true, false, false, true]);
    filter.apply(&Command::RxMode(RxMode::AllMulticast, true));
    assert_eq!(accepted(&filter), [true, false, true, true]);
    filter.apply(&Command::RxMode(RxMode::NoMulticast, true));
    filter.apply(&Command::RxMode(RxMode::NoBroadcast, true));
    assert_eq!(accepted(&filter), [true, false, false, false]);
    filter.apply(&Command::RxMode(RxMode::NoMulticast, false));
    filter.apply(&Command::RxMode(RxMode::AllMulticast, false));
    filter.apply(&Command::MacTable {
        unicast: Some(vec![MacAddr(other)]),
        multicast: Some(vec![MacAddr(group)]),
    });
    assert_eq!(accepted(&filter), [true, true, true, false]);
    filter.apply(&Command::RxMode(RxMode::NoUnicast, true));
    assert_eq!(accepted(&filter), [false, false, true, false]);
    filter.apply(&Command::RxMode(RxMode::NoUnicast, false));
    filter.apply(&Command::MacAddr(MacAddr([2, 0, 0, 0, 0, 7])));
    assert_eq!(accepted(&filter), [false, true, true, false]);
    assert!(!filter.accepts(&[1, 2, 3]));
}

#[test]
fn vlans_pass_only_when_added() {
    let mut filter = RxFilter::for_station(None, 1 << v::VIRTIO_NET_F_CTRL_VLAN);
    assert!(!filter.is_open());
    assert!(filter.accepts(&frame([2; 6], None)));
    assert!(filter.accepts(&frame([2; 6], Some(0xe000))));
    assert!(!filter.accepts(&frame([2; 6], Some(0xe064))));
    filter.apply(&Command::Vlan(100, true));
    assert!(filter.accepts(&frame([2; 6], Some(0xe064))));
    filter.apply(&Command::Vlan(100, false));
    assert!(!filter.accepts(&frame([2; 6], Some(100))));
}

proptest! {
    #[test]
    fn no_bytes_upset_parser_or_filter(bytes: Vec<u8>, frame: Vec<u8>, features: u64) {
        let negotiated = Negotiated { features, max_pairs: 2 };
        let mut filter = RxFilter::for_station(None, features);
        if let Ok(command) = parse(&bytes, negotiated) {
            filter.apply(&command);
        }
        let _ = filter.accepts(&frame);
    }
}

/// `struct virtio_net_rss_config`; a key of `key` bytes.
fn rss(types: u32, mask: u16, table: &[u16], unclassified: u16, pairs: u16, key: u8) -> Vec<u8> {
    let mut bytes = vec![4, 1];
    bytes.extend(types.to_le_bytes());
    let words = [&[mask, unclassified], table, &[pairs]].concat();
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    bytes.push(key);
    bytes.extend((0..key).collect::<Vec<_>>());
    bytes
}

fn hash(types: u32, key: u8) -> Vec<u8> {
    let mut bytes = vec![4, 2];
    bytes.extend(types.to_le_bytes());
    bytes.extend([0xff; 8]);
    bytes.push(key);
    bytes.extend((0..key).collect::<Vec<_>>());
    bytes
}

#[test]
fn steering_commands_are_decoded() {
    let key: Vec<u8> = (0..40).collect();
    let table = Some(Table { pairs: vec![3, 0], unclassified: 2 });
    let config = SteeringConfig { hash: HashConfig { types: 0x3f, key: key.clone() }, table };
    let right = rss(0x3f, 1, &[3, 0], 2, 4, 40);
    assert_eq!(parse(&right, ALL), Ok(Command::Rss(4, config)));
    let config = SteeringConfig { hash: HashConfig { types: 2, key }, table: None };
    assert_eq!(parse(&hash(2, 40), ALL), Ok(Command::Hash(config)));
    assert!(parse(&rss(0x3f, 127, &[1; 128], 0, 1, 40), ALL).is_ok());
    // No hash needs no key, and a short one is a key.
    assert!(parse(&rss(0, 0, &[0], 0, 1, 0), ALL).is_ok());
    assert!(parse(&hash(0, 0), ALL).is_ok());
    assert!(parse(&hash(1, 16), ALL).is_ok());
    // Any other length is another command, but for the byte of padding that Linux adds.
    for right in [right, hash(2, 40)] {
        for len in 0..right.len() {
            assert!(parse(&right[..len], ALL).is_err(), "{len}");
        }
        let padded = [&right[..], &[0]].concat();
        assert_eq!(parse(&padded, ALL), parse(&right, ALL));
        let longer = [&right[..], &[0, 0]].concat();
        assert!(matches!(parse(&longer, ALL), Err(ControlError::Length { .. })));
    }
}

#[test]
fn steering_commands_with_wrong_values_are_refused() {
    let wrong = [
        rss(0x40, 1, &[0, 1], 0, 4, 40),
        rss(0x8000_0000, 1, &[0, 1], 0, 4, 40),
        rss(1, 2, &[0, 1, 2], 0, 4, 40),
        rss(1, 255, &[0; 256], 0, 4, 40),
        rss(1, 0xffff, &[0; 65], 0, 4, 40),
        rss(1, 1, &[0, 4], 0, 4, 40),
        rss(1, 1, &[0, 0x8000], 0, 4, 40),
        rss(1, 1, &[0, 1], 4, 4, 40),
        rss(1, 1, &[0, 1], 0, 0, 40),
        rss(1, 1, &[0, 1], 0, 5, 40),
        rss(1, 1, &[0, 1], 0, 4, 41),
        rss(1, 1, &[0, 1], 0, 4, 0),
        hash(0x40, 40),
        hash(1, 41),
        hash(1, 0),
    ];
    for bytes in wrong {
        assert!(matches!(parse(&bytes, ALL), Err(ControlError::Value { .. })), "{bytes:?}");
    }
    let without = |bit: u32| Negotiated { features: !(1 << bit), max_pairs: 4 };
    let right = rss(1, 1, &[0, 1], 0, 4, 40);
    assert_eq!(parse(&right, without(v::VIRTIO_NET_F_RSS)), unknown(4, 1));
    assert_eq!(parse(&hash(1, 40), without(v::VIRTIO_NET_F_HASH_REPORT)), unknown(4, 2));
}
