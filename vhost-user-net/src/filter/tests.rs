//! Honest and forged frames.
#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "a test may panic"
)]

use super::*;
use proptest::prelude::*;

const ME: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn filter(ranges: &[&str]) -> SourceFilter {
    SourceFilter::new(Some(MacAddr(ME)), ranges.iter().map(|r| r.parse().unwrap()).collect())
}

fn frame(from: [u8; 6], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &from, &ethertype.to_be_bytes(), packet].concat()
}

fn ipv4(source: [u8; 4], rest: &[u8]) -> Vec<u8> {
    let mut p = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    p.extend(source);
    p.extend([255, 255, 255, 255]);
    p.extend(rest);
    p
}

fn ipv6(source: &str, next: u8, rest: &[u8]) -> Vec<u8> {
    let mut p = vec![0x60, 0, 0, 0, 0, 0, next, 255];
    p.extend(source.parse::<Ipv6Addr>().unwrap().octets());
    p.extend([0xff; 16]);
    p.extend(rest);
    p
}

fn arp(sender: [u8; 6], address: [u8; 4]) -> Vec<u8> {
    let mut p = vec![0, 1, 8, 0, 6, 4, 0, 1];
    p.extend(sender);
    p.extend(address);
    p.extend([0; 10]);
    p
}

#[test]
fn only_the_own_mac_passes() {
    let f = filter(&[]);
    assert_eq!(f.check(&frame(ME, 0x0800, &ipv4([1, 2, 3, 4], &[]))), Ok(()));
    assert_eq!(f.check(&frame(OTHER, 0x0800, &[])), Err(Spoof::Mac(MacAddr(OTHER))));
    assert_eq!(f.check(&frame(ME, 0x0806, &arp(ME, [9; 4]))), Ok(()));
    assert_eq!(f.check(&frame(ME, 0x0806, &arp(OTHER, [9; 4]))), Err(Spoof::Mac(MacAddr(OTHER))));
    assert_eq!(f.check(&frame(ME, 0x88cc, &[])), Ok(()));
    assert!(SourceFilter::default().is_open() && !f.is_open());
}

#[test]
fn only_allowed_ipv4_sources_pass() {
    let f = filter(&["10.0.0.5", "192.168.0.0/16"]);
    let check = |p: &[u8]| f.check(&frame(ME, 0x0800, p));
    assert_eq!(check(&ipv4([10, 0, 0, 5], &[])), Ok(()));
    assert_eq!(check(&ipv4([192, 168, 7, 7], &[])), Ok(()));
    assert_eq!(check(&ipv4([10, 0, 0, 6], &[])), Err(Spoof::Ip([10, 0, 0, 6].into())));
    assert_eq!(check(&ipv4([0; 4], &[0, 68, 0, 67])), Ok(()));
    assert!(check(&ipv4([0; 4], &[0, 68, 0, 53])).is_err());
    assert!(check(&ipv4([10, 0, 0, 5], &[])[..14]).is_err());
    assert_eq!(f.check(&frame(ME, 0x0806, &arp(ME, [10, 0, 0, 5]))), Ok(()));
    assert_eq!(f.check(&frame(ME, 0x0806, &arp(ME, [0; 4]))), Ok(()));
    assert!(f.check(&frame(ME, 0x0806, &arp(ME, [10, 0, 0, 1]))).is_err());
    assert_eq!(f.check(&frame(ME, 0x88cc, &[])), Err(Spoof::Protocol));
    assert!(f.check(&frame(ME, 0x86dd, &ipv6("fe80::1", 17, &[]))).is_err());
}

#[test]
fn vlan_tags_hide_nothing() {
    let f = filter(&["10.0.0.5"]);
    let tagged = |p: Vec<u8>| [&[0, 7, 8, 0][..], &p].concat();
    assert_eq!(f.check(&frame(ME, 0x8100, &tagged(ipv4([10, 0, 0, 5], &[])))), Ok(()));
    assert!(f.check(&frame(ME, 0x8100, &tagged(ipv4([10, 0, 0, 6], &[])))).is_err());
    let twice = [&[0, 7, 0x81, 0][..], &tagged(ipv4([10, 0, 0, 6], &[]))].concat();
    assert!(f.check(&frame(ME, 0x88a8, &twice)).is_err());
}

#[test]
fn only_allowed_ipv6_sources_pass_and_none_speaks_for_others() {
    let f = filter(&["fd00::5"]);
    let check = |p: &[u8]| f.check(&frame(ME, 0x86dd, p));
    assert_eq!(check(&ipv6("fd00::5", 6, &[])), Ok(()));
    assert_eq!(check(&ipv6("fe80::1", 6, &[])), Ok(()));
    assert_eq!(check(&ipv6("::", 58, &[135])), Ok(()));
    assert!(check(&ipv6("fd00::6", 6, &[])).is_err());
    let advertise = |target: &str| {
        let mut m = vec![136, 0, 0, 0, 0, 0, 0, 0];
        m.extend(target.parse::<Ipv6Addr>().unwrap().octets());
        m
    };
    assert_eq!(check(&ipv6("fd00::5", 58, &advertise("fd00::5"))), Ok(()));
    assert_eq!(check(&ipv6("fd00::5", 58, &advertise("fe80::9"))), Ok(()));
    assert!(check(&ipv6("fd00::5", 58, &advertise("fd00::1"))).is_err());
    assert!(check(&ipv6("fd00::5", 58, &[134, 0])).is_err());
    let behind_options = [&[58, 0, 0, 0, 0, 0, 0, 0][..], &advertise("fd00::1")].concat();
    assert!(check(&ipv6("fd00::5", 60, &behind_options)).is_err());
    let endless = [0, 200, 0, 0, 0, 0, 0, 0];
    assert_eq!(check(&ipv6("fd00::5", 0, &endless)), Err(Spoof::Protocol));
    let later_fragment = [58, 0, 0, 8, 0, 0, 0, 0];
    assert_eq!(check(&ipv6("fd00::5", 44, &later_fragment)), Ok(()));
}

#[test]
fn addresses_are_parsed_strictly() {
    for good in ["10.0.0.0/8", "0.0.0.0/0", "::/0", "fd00::1", "1.2.3.4", "1.2.3.4/32"] {
        assert!(good.parse::<Cidr>().is_ok(), "{good}");
    }
    for bad in ["", "10.0.0.0/33", "10.0.0.0/", "10.0.0/8", "10.0.0.0/+8", "fd00::/129", "x"] {
        assert_eq!(bad.parse::<Cidr>(), Err(AddressError::Cidr), "{bad}");
    }
    let error = "10.0.0.5/8".parse::<Cidr>().unwrap_err();
    assert!(error.to_string().ends_with("write 10.0.0.0/8"), "{error}");
    assert_eq!("52:54:00:12:34:56".parse(), Ok(MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56])));
    for bad in
        ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52:54:00:12:34:5", "+2:54:00:12:34:56"]
    {
        assert_eq!(bad.parse::<MacAddr>(), Err(AddressError::Mac), "{bad}");
    }
    assert_eq!("01:00:5e:00:00:01".parse::<MacAddr>(), Err(AddressError::NoStation));
    assert_eq!("00:00:00:00:00:00".parse::<MacAddr>(), Err(AddressError::NoStation));
}

proptest! {
    #[test]
    fn no_frame_upsets_the_filter(bytes: Vec<u8>, cut in 0usize..120) {
        let f = filter(&["10.0.0.5", "fd00::/64"]);
        let _ = f.check(&bytes);
        let mut known = frame(ME, 0x86dd, &ipv6("fd00::5", 0, &bytes));
        known.truncate(cut);
        let _ = f.check(&known);
    }
}
