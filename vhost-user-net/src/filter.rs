//! Anti-spoofing: which source addresses a guest may send from.
//!
//! A pure function of a frame's first bytes, which the worker has copied out of guest memory, so
//! that the guest cannot change them after the check. What cannot be understood within
//! [`INSPECTED_BYTES`] is not allowed.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::control::MacAddr;
use crate::ethernet::{self, number};

/// Bytes of a frame that are looked at, at the most.
pub const INSPECTED_BYTES: usize = 116;

/// A range of IP addresses: `10.0.0.0/8`, `fd00::1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    bits: u8,
}

/// Why a text is no address or range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Not an IP address, or no prefix length of its family.
    #[error("not an IP address or range: write one like 10.0.0.5 or fd00::/64")]
    Cidr,
    /// Bits set beyond the prefix.
    #[error("the range has address bits beyond its prefix: write {0}")]
    HostBits(Cidr),
    /// Not a MAC address.
    #[error("not a MAC address: write one like 52:54:00:12:34:56")]
    Mac,
    /// A group address, or zero.
    #[error("the MAC address is a group address or zero, which no station can have")]
    NoStation,
}

impl Cidr {
    fn network(self) -> IpAddr {
        match self.address {
            IpAddr::V4(a) => {
                let mask =
                    u32::MAX.checked_shl(32u32.saturating_sub(self.bits.into())).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(a.to_bits() & mask))
            }
            IpAddr::V6(a) => {
                let mask =
                    u128::MAX.checked_shl(128u32.saturating_sub(self.bits.into())).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(a.to_bits() & mask))
            }
        }
    }

    /// Whether `address` lies in the range.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4()
            && Self { address, bits: self.bits }.network() == self.network()
    }
}

impl FromStr for Cidr {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok().ok_or(AddressError::Cidr)?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => most,
            Some(b) if b.len() <= 3 && b.bytes().all(|c| c.is_ascii_digit()) => {
                b.parse().ok().filter(|b| *b <= most).ok_or(AddressError::Cidr)?
            }
            Some(_) => return Err(AddressError::Cidr),
        };
        let cidr = Self { address, bits };
        let network = Self { address: cidr.network(), bits };
        if network == cidr { Ok(cidr) } else { Err(AddressError::HostBits(network)) }
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl FromStr for MacAddr {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let mut mac = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or(AddressError::Mac)?;
            if !part.bytes().all(|c| c.is_ascii_hexdigit()) {
                return Err(AddressError::Mac);
            }
            *byte = u8::from_str_radix(part, 16).ok().ok_or(AddressError::Mac)?;
        }
        if parts.next().is_some() {
            return Err(AddressError::Mac);
        }
        let mac = Self(mac);
        if mac.is_station() { Ok(mac) } else { Err(AddressError::NoStation) }
    }
}

/// What is wrong with a frame's source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Spoof {
    /// Another station's MAC address.
    #[error("sent from the MAC address {0}")]
    Mac(MacAddr),
    /// An IP address outside the allowed ranges.
    #[error("sent from, or speaking for, the IP address {0}")]
    Ip(IpAddr),
    /// A protocol that says nothing of its source, a router's announcement, or a damaged packet.
    #[error("sent as a protocol that is not allowed")]
    Protocol,
}

/// The addresses that a guest may send from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SourceFilter {
    mac: Option<MacAddr>,
    ranges: Vec<Cidr>,
}

impl SourceFilter {
    /// Only `mac`, if given, and only `ranges`, if there are any.
    #[must_use]
    pub fn new(mac: Option<MacAddr>, ranges: Vec<Cidr>) -> Self {
        Self { mac, ranges }
    }

    /// Whether everything is allowed, so that frames need not be looked at.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.mac.is_none() && self.ranges.is_empty()
    }

    /// Whether the guest may be the station `mac`.
    #[must_use]
    pub fn allows_station(&self, mac: MacAddr) -> bool {
        self.mac.is_none_or(|ours| ours == mac)
    }

    /// Checks the frame that starts with `frame`.
    ///
    /// # Errors
    /// What it pretends to be: drop it.
    pub fn check(&self, frame: &[u8]) -> Result<(), Spoof> {
        let from = array(frame, 6).map(MacAddr).ok_or(Spoof::Protocol)?;
        if self.mac.is_some_and(|mac| mac != from) {
            return Err(Spoof::Mac(from));
        }
        if self.ranges.is_empty() && self.mac.is_none() {
            return Ok(());
        }
        let carried = ethernet::payload(frame);
        let packet = carried.and_then(|(_, at)| frame.get(at..)).unwrap_or(&[]);
        match carried {
            Some((ethernet::ARP, _)) => self.check_arp(packet),
            _ if self.ranges.is_empty() => Ok(()),
            Some((ethernet::IPV4, _)) => self.check_ipv4(packet),
            Some((ethernet::IPV6, _)) => self.check_ipv6(packet),
            _ => Err(Spoof::Protocol),
        }
    }

    fn check_ip(&self, address: IpAddr) -> Result<(), Spoof> {
        if self.ranges.iter().any(|range| range.contains(address)) {
            Ok(())
        } else {
            Err(Spoof::Ip(address))
        }
    }

    /// RFC 826: sender hardware address at 8, sender protocol address at 14.
    fn check_arp(&self, packet: &[u8]) -> Result<(), Spoof> {
        let sender = array(packet, 8).map(MacAddr).ok_or(Spoof::Protocol)?;
        if self.mac.is_some_and(|mac| mac != sender) {
            return Err(Spoof::Mac(sender));
        }
        if self.ranges.is_empty() {
            return Ok(());
        }
        let address =
            array(packet, 14).map(|a: [u8; 4]| Ipv4Addr::from(a)).ok_or(Spoof::Protocol)?;
        // A probe for duplicates asks from nowhere. RFC 5227, 2.1.1.
        if address.is_unspecified() { Ok(()) } else { self.check_ip(address.into()) }
    }

    fn check_ipv4(&self, packet: &[u8]) -> Result<(), Spoof> {
        let address =
            array(packet, 12).map(|a: [u8; 4]| Ipv4Addr::from(a)).ok_or(Spoof::Protocol)?;
        if address.is_unspecified() && is_dhcp_request(packet) {
            return Ok(());
        }
        self.check_ip(address.into())
    }

    fn check_ipv6(&self, packet: &[u8]) -> Result<(), Spoof> {
        let address =
            array(packet, 8).map(|a: [u8; 16]| Ipv6Addr::from(a)).ok_or(Spoof::Protocol)?;
        let speaks_ipv6 = self.ranges.iter().any(|range| range.address.is_ipv6());
        let own = |a: Ipv6Addr| speaks_ipv6 && a.is_unicast_link_local();
        if !(own(address) || speaks_ipv6 && address.is_unspecified()) {
            self.check_ip(address.into())?;
        }
        let Some(message) = icmpv6(packet)? else { return Ok(()) };
        match message.first() {
            // Router advertisements and redirects are routers' business. RFC 4861.
            Some(134 | 137) => Err(Spoof::Protocol),
            // A neighbour advertisement speaks for its target.
            Some(136) => {
                let target = array(message, 8)
                    .map(|a: [u8; 16]| Ipv6Addr::from(a))
                    .ok_or(Spoof::Protocol)?;
                if own(target) { Ok(()) } else { self.check_ip(target.into()) }
            }
            Some(_) => Ok(()),
            None => Err(Spoof::Protocol),
        }
    }
}

/// Whether an IPv4 packet goes from UDP port 68 to 67, unfragmented.
fn is_dhcp_request(packet: &[u8]) -> bool {
    let Some(&first) = packet.first() else { return false };
    let header = usize::from(first & 0x0f).saturating_mul(4);
    let whole = number(packet, 6).is_some_and(|f| f & 0x3fff == 0);
    let ports = packet.get(header..).unwrap_or(&[]);
    packet.get(9) == Some(&17)
        && whole
        && number(ports, 0) == Some(68)
        && number(ports, 2) == Some(67)
}

/// The ICMPv6 message of an IPv6 packet, behind its extension headers; `None`: another protocol.
fn icmpv6(packet: &[u8]) -> Result<Option<&[u8]>, Spoof> {
    let mut next = *packet.get(6).ok_or(Spoof::Protocol)?;
    let mut rest = packet.get(40..).ok_or(Spoof::Protocol)?;
    for _ in 0..8 {
        let len = match next {
            58 => return Ok(Some(rest)),
            // Hop-by-hop, routing and destination options: length in units of 8 bytes after the first.
            0 | 43 | 60 => {
                let units = usize::from(*rest.get(1).ok_or(Spoof::Protocol)?);
                units.saturating_add(1).saturating_mul(8)
            }
            // A later fragment has no header to check; its first one was checked.
            44 if number(rest, 2).is_none_or(|f| f & 0xfff8 != 0) => return Ok(None),
            44 => 8,
            _ => return Ok(None),
        };
        next = *rest.first().ok_or(Spoof::Protocol)?;
        rest = rest.get(len..).ok_or(Spoof::Protocol)?;
    }
    Err(Spoof::Protocol)
}

/// `N` bytes of `data` at `at`.
fn array<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests;
