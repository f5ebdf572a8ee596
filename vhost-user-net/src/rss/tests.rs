//! The published verification values, and what tables do with them.
#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "a test may panic")]

use super::*;
use std::net::{IpAddr, SocketAddr};

/// The key of the published verification suite of receive-side scaling.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0,
    0xd0, 0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c,
    0x6a, 0x42, 0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Destination, source, the hash without and that with ports.
const SUITE: [(&str, &str, u32, u32); 8] = [
    ("161.142.100.80:1766", "66.9.149.187:2794", 0x323e_8fc2, 0x51cc_c178),
    ("65.69.140.83:4739", "199.92.111.2:14230", 0xd718_262a, 0xc626_b0ea),
    ("12.22.207.184:38024", "24.19.198.95:12898", 0xd2d0_a5de, 0x5c2b_394a),
    ("209.142.163.6:2217", "38.27.205.30:48228", 0x8298_9176, 0xafc7_327f),
    ("202.188.127.2:1303", "153.39.163.191:44251", 0x5d18_09c5, 0x10e8_28a2),
    ("[3ffe:2501:200:3::1]:1766", "[3ffe:2501:200:1fff::7]:2794", 0x2cc1_8cd5, 0x4020_7d3d),
    ("[ff02::1]:4739", "[3ffe:501:8::260:97ff:fe40:efab]:14230", 0x0f0c_461c, 0xdde5_1bbf),
    (
        "[fe80::200:f8ff:fe21:67cf]:38024",
        "[3ffe:1900:4545:3:200:f8ff:fe21:67cf]:44251",
        0x4b61_e985,
        0x02d1_feef,
    ),
];

fn frame(to: &str, from: &str, protocol: u8) -> Vec<u8> {
    let (to, from): (SocketAddr, SocketAddr) = (to.parse().unwrap(), from.parse().unwrap());
    let mut frame = vec![0; 12];
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            frame.extend([8, 0, 0x45, 0, 0, 24, 0, 0, 0, 0, 64, protocol, 0, 0]);
            frame.extend([from.octets(), to.octets()].concat());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 4, protocol, 64]);
            frame.extend([from.octets(), to.octets()].concat());
        }
        _ => panic!("two families"),
    }
    frame.extend([from.port().to_be_bytes(), to.port().to_be_bytes()].concat());
    frame
}

fn config(types: u32, table: Option<Table>) -> SteeringConfig {
    SteeringConfig { hash: HashConfig { types, key: KEY.to_vec() }, table }
}

#[test]
fn the_hash_is_that_of_the_verification_suite() {
    let all = Steering::new(&config(HASH_TYPES, None));
    let addresses = Steering::new(&config(0b1001, None));
    for (to, from, without, with) in SUITE {
        let shift = if to.starts_with('[') { 3 } else { 0 };
        for (protocol, ports_kind) in [(6, 2), (17, 3)] {
            let flow = Flow::of(&frame(to, from, protocol));
            assert_eq!(all.hash(&flow), HashReport { value: with, kind: ports_kind + shift });
            assert_eq!(addresses.hash(&flow), HashReport { value: without, kind: 1 + shift });
        }
        let flow = Flow::of(&frame(to, from, 1));
        assert_eq!(all.hash(&flow), HashReport { value: without, kind: 1 + shift });
    }
}

#[test]
fn a_type_that_is_off_makes_no_hash() {
    let (to, from, ..) = SUITE[0];
    let tcp = Flow::of(&frame(to, from, 6));
    for types in [0, 0b100, 0b111_000] {
        assert_eq!(Steering::new(&config(types, None)).hash(&tcp), HashReport::default());
    }
    let arp = Flow::of(&[0; 60]);
    assert_eq!(Steering::new(&config(HASH_TYPES, None)).hash(&arp), HashReport::default());
}

#[test]
fn the_table_is_indexed_by_the_low_bits() {
    let table = Table { pairs: vec![3, 1, 0, 2], unclassified: 1 };
    let steering = Steering::new(&config(HASH_TYPES, Some(table)));
    let report = |value| HashReport { value, kind: 1 };
    for (value, pair) in [(0, 3), (0xffff_fff5, 1), (6, 0), (0x8000_0003, 2)] {
        assert_eq!(steering.pair(report(value)), Some(pair));
    }
    assert_eq!(steering.pair(HashReport::default()), Some(1));
    assert_eq!(Steering::new(&config(HASH_TYPES, None)).pair(report(1)), None);
}

#[test]
fn what_a_device_cannot_do_is_not_sound() {
    let table = |pairs: &[u16], unclassified| Some(Table { pairs: pairs.to_vec(), unclassified });
    assert!(config(HASH_TYPES, table(&[0, 1], 1)).is_sound(2));
    assert!(config(0, None).is_sound(1));
    for (types, table) in [
        (0x40, None),
        (1, table(&[0, 1, 0], 0)),
        (1, table(&[], 0)),
        (1, table(&[0; 256], 0)),
        (1, table(&[0, 2], 0)),
        (1, table(&[0, 1], 2)),
    ] {
        assert!(!config(types, table.clone()).is_sound(2), "{types:#x} {table:?}");
    }
    let mut long = config(1, None);
    long.hash.key.push(0);
    assert!(!long.is_sound(2));
    long.hash.key.clear();
    assert!(!long.is_sound(2));
}
