//! Which flow a frame belongs to: its addresses and ports.
//!
//! Pure: reads a frame's first bytes, which the worker has copied out of guest memory. What cannot be
//! found there is left out: a frame without readable ports belongs to its two stations' flow.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::ethernet::{self, number};

/// Bytes that identify a flow at the most: two IPv6 addresses and two ports.
pub const FLOW_BYTES: usize = 36;

const TCP: u8 = 6;
const UDP: u8 = 17;
/// Extension headers of IPv6 looked at, at the most.
const EXTENSIONS: usize = 8;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Network {
    /// Neither IPv4 nor IPv6: the flow is that of two stations.
    Other,
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Network {
    /// Bytes of an address.
    const fn address_size(self) -> usize {
        match self {
            Self::Other => 6,
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A frame's flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// What its addresses are.
    pub network: Network,
    /// Whose ports it has, if it has any. Fragments have none: all but the first lack them.
    pub transport: Option<Transport>,
    /// Source address, destination address, source port, destination port; zeros behind.
    bytes: [u8; FLOW_BYTES],
}

impl Flow {
    /// The flow of the frame that starts with `frame`.
    #[must_use]
    pub fn of(frame: &[u8]) -> Self {
        ip_flow(frame).unwrap_or_else(|| {
            // Destination first, as in the frame: it makes no difference to `id`.
            let stations = frame.get(..ethernet::STATIONS_SIZE).unwrap_or(&[]);
            Self::new(Network::Other, [stations, &[], &[]], None)
        })
    }

    fn new(network: Network, parts: [&[u8]; 3], transport: Option<Transport>) -> Self {
        let mut bytes = [0; FLOW_BYTES];
        for (to, from) in bytes.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        Self { network, transport, bytes }
    }

    /// Both addresses.
    #[must_use]
    pub fn addresses(&self) -> &[u8] {
        let size = self.network.address_size();
        self.bytes.get(..size.saturating_mul(2)).unwrap_or(&self.bytes)
    }

    /// Both addresses and both ports; without ports, zeros in their place.
    #[must_use]
    pub fn addresses_and_ports(&self) -> &[u8] {
        let size = self.network.address_size();
        self.bytes.get(..size.saturating_mul(2).saturating_add(4)).unwrap_or(&self.bytes)
    }

    /// A number of the flow that is the same for both directions.
    #[must_use]
    pub fn id(&self) -> u32 {
        const K: u64 = 0x9e37_79b9_7f4a_7c15;
        let size = self.network.address_size();
        let (from, rest) = self.bytes.split_at_checked(size).unwrap_or((&[], &self.bytes));
        let (to, ports) = rest.split_at_checked(size).unwrap_or((&[], rest));
        let end = |address: &[u8], port: Option<&[u8]>| {
            let fold = |sum: u64, part: &[u8]| {
                let word = part.iter().fold(0, |word, &byte| (word << 8) | u64::from(byte));
                (sum ^ word).wrapping_mul(K)
            };
            fold(address.chunks(8).fold(0, fold), port.unwrap_or(&[]))
        };
        let (a, b) = (end(from, ports.get(..2)), end(to, ports.get(2..4)));
        let (low, high) = if a <= b { (a, b) } else { (b, a) };
        let mixed = (low.rotate_left(23) ^ high).wrapping_mul(K);
        let [a, b, c, d, ..] = (mixed ^ (mixed >> 29)).wrapping_mul(K).to_be_bytes();
        u32::from_be_bytes([a, b, c, d])
    }
}

/// The flow of a frame with an IP packet; `None`: it has none.
fn ip_flow(frame: &[u8]) -> Option<Flow> {
    let (ethertype, at) = ethernet::payload(frame)?;
    let packet = frame.get(at..)?;
    let version = packet.first()? >> 4;
    let (network, addresses, protocol) = match ethertype {
        ethernet::IPV4 if version == 4 => (Network::V4, packet.get(12..20)?, ipv4_protocol(packet)),
        ethernet::IPV6 if version == 6 => (Network::V6, packet.get(8..40)?, ipv6_protocol(packet)),
        _ => return None,
    };
    let transport = protocol.and_then(|(protocol, at)| {
        let transport = match protocol {
            TCP => Transport::Tcp,
            UDP => Transport::Udp,
            _ => return None,
        };
        Some((transport, packet.get(at..at.checked_add(4)?)?))
    });
    Some(match transport {
        Some((transport, ports)) => Flow::new(network, [addresses, ports, &[]], Some(transport)),
        None => Flow::new(network, [addresses, &[], &[]], None),
    })
}

/// The protocol of an IPv4 packet that is no fragment, and where its header starts.
fn ipv4_protocol(packet: &[u8]) -> Option<(u8, usize)> {
    let header = usize::from(packet.first()? & 0x0f).checked_mul(4)?;
    let whole = number(packet, 6)? & 0x3fff == 0;
    (whole && header >= 20).then_some((*packet.get(9)?, header))
}

/// The same of an IPv6 packet, behind its extension headers.
fn ipv6_protocol(packet: &[u8]) -> Option<(u8, usize)> {
    let mut next = *packet.get(6)?;
    let mut at: usize = 40;
    for _ in 0..EXTENSIONS {
        // Hop-by-hop, routing and destination options: length in units of 8 bytes after the first.
        if !matches!(next, 0 | 43 | 60) {
            return Some((next, at));
        }
        let units = usize::from(*packet.get(at.checked_add(1)?)?);
        next = *packet.get(at)?;
        at = at.checked_add(units.checked_add(1)?.checked_mul(8)?)?;
    }
    None
}

#[cfg(test)]
#[path = "flow/tests.rs"]
mod tests;
