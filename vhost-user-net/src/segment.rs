//! Cutting a super-frame (TSO, USO) into frames, for a guest that did not negotiate to take it whole.
//!
//! # Theory of operation
//! A super-frame is the headers of one frame with the payload of many. Every frame of the cut has a copy
//! of the headers, in which the lengths, the IPv4 identification (RFC 791, 3.1), the TCP sequence number
//! and the TCP flags that belong to the first frame (CWR) or the last (FIN, PSH) alone are its own
//! (RFC 9293, 3.1; RFC 3168, 6.1.2), and both checksums are computed. The headers are a guest's: what is
//! not of the kind that the `gso_type` names is not cut. Virtio 1.3, 5.1.6.2.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::checksum::{checksum, sum, udp_checksum};
use crate::ethernet::{self, number};
use crate::header::{GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NetHeader};

const UDP_HEADER_SIZE: usize = 8;
/// The first byte of a TCP header's flags.
const TCP_FLAGS_AT: usize = 13;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    V4,
    V6,
}

impl Network {
    /// Bytes of its shortest header.
    const fn header_size(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    /// Its number in an IP header, and the place of the checksum in its own.
    const fn protocol(self) -> (u8, usize) {
        match self {
            Self::Tcp => (6, 16),
            Self::Udp => (17, 6),
        }
    }
}

/// The frames of a super-frame, one after the other.
#[derive(Debug)]
pub(crate) struct Segments<'a> {
    headers: &'a [u8],
    payload: &'a [u8],
    /// Payload bytes in each frame but the last.
    size: usize,
    network: Network,
    /// Where the IP header starts, bytes.
    network_at: usize,
    transport: Transport,
    /// Where the TCP or UDP header starts, bytes.
    transport_at: usize,
    /// Payload bytes in the frames before.
    done: usize,
}

impl<'a> Segments<'a> {
    /// The cut of `frame` by its (checked) header; `None`: it is not what the header says.
    pub(crate) fn new(header: &NetHeader, frame: &'a [u8]) -> Option<Self> {
        let (network, network_at) = find_network(frame)?;
        let transport_at = usize::from(header.csum_start.get());
        let transport = match (header.gso_type & !GSO_ECN, network) {
            (GSO_TCPV4, Network::V4) | (GSO_TCPV6, Network::V6) => Transport::Tcp,
            (GSO_UDP_L4, _) => Transport::Udp,
            _ => return None,
        };
        let (protocol, checksum_at) = transport.protocol();
        if usize::from(header.csum_offset.get()) != checksum_at
            || transport_at < network_at.checked_add(network.header_size())?
        {
            return None;
        }
        if network == Network::V4 {
            let words = usize::from(frame.get(network_at)? & 0x0f);
            let end = network_at.checked_add(words.checked_mul(4)?)?;
            if end != transport_at || *frame.get(network_at.checked_add(9)?)? != protocol {
                return None;
            }
        }
        let transport_size = match transport {
            Transport::Tcp => {
                usize::from(frame.get(transport_at.checked_add(12)?)? >> 4).checked_mul(4)?
            }
            Transport::Udp => UDP_HEADER_SIZE,
        };
        if transport == Transport::Tcp && transport_size < 20 {
            return None;
        }
        let (headers, payload) =
            frame.split_at_checked(transport_at.checked_add(transport_size)?)?;
        let size = usize::from(header.gso_size.get());
        // The longest of them must be a packet whose length fits its header.
        let packet = headers.len().checked_sub(network_at)?.checked_add(size.min(payload.len()))?;
        let sound = size > 0 && !payload.is_empty() && packet <= usize::from(u16::MAX);
        let first =
            Self { headers, payload, size, network, network_at, transport, transport_at, done: 0 };
        sound.then_some(first)
    }

    /// How many frames there are in all.
    pub(crate) fn count(&self) -> usize {
        self.payload.len().div_ceil(self.size)
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> usize {
        self.headers.len().saturating_mul(self.count()).saturating_add(self.payload.len())
    }

    /// Puts the next frame into `room`; false after the last.
    pub(crate) fn next_into(&mut self, room: &mut Vec<u8>) -> bool {
        let left = self.payload.get(self.done..).unwrap_or(&[]);
        let part = left.get(..self.size.min(left.len())).unwrap_or(left);
        if part.is_empty() {
            return false;
        }
        room.clear();
        room.extend_from_slice(self.headers);
        room.extend_from_slice(part);
        let last = part.len() == left.len();
        // Each place was found to lie within the headers when the cut began, so it is never refused.
        let mended = self.mend(room, last).is_some();
        debug_assert!(mended);
        self.done = self.done.saturating_add(part.len());
        mended
    }

    /// Makes the headers in `room` those of this frame.
    fn mend(&self, room: &mut [u8], last: bool) -> Option<()> {
        let ip = room.get_mut(self.network_at..)?;
        let bytes = u16::try_from(ip.len()).ok()?;
        match self.network {
            Network::V4 => {
                put(ip, 2, bytes)?;
                // Without a cut, frames of one sender have numbers of their own: so have these.
                let index = self.done.checked_div(self.size)? & usize::from(u16::MAX);
                let index = u16::try_from(index).ok()?;
                let id = number(ip, 4)?.wrapping_add(index);
                put(ip, 4, id)?;
                put(ip, 10, 0)?;
                let end = self.transport_at.checked_sub(self.network_at)?;
                let sum = checksum(sum(ip.get(..end)?));
                ip.get_mut(10..12)?.copy_from_slice(&sum);
            }
            Network::V6 => put(ip, 4, bytes.checked_sub(40)?)?,
        }
        let (protocol, checksum_at) = self.transport.protocol();
        let addresses = match self.network {
            Network::V4 => sum(ip.get(12..20)?),
            Network::V6 => sum(ip.get(8..40)?),
        };
        let segment = room.get_mut(self.transport_at..)?;
        match self.transport {
            Transport::Tcp => {
                let number = u32::from_be_bytes(segment.get(4..8)?.try_into().ok()?);
                let number = number.wrapping_add(u32::try_from(self.done).ok()?);
                segment.get_mut(4..8)?.copy_from_slice(&number.to_be_bytes());
                let flags = segment.get_mut(TCP_FLAGS_AT)?;
                if !last {
                    *flags &= !FIN_PSH;
                }
                if self.done > 0 {
                    *flags &= !CWR;
                }
            }
            Transport::Udp => put(segment, 4, u16::try_from(segment.len()).ok()?)?,
        }
        put(segment, checksum_at, 0)?;
        let pseudo = addresses
            .checked_add(u64::from(protocol))?
            .checked_add(u64::try_from(segment.len()).ok()?)?;
        let sum = pseudo.checked_add(sum(segment))?;
        let sum = match self.transport {
            Transport::Tcp => checksum(sum),
            Transport::Udp => udp_checksum(sum),
        };
        segment.get_mut(checksum_at..checksum_at.checked_add(2)?)?.copy_from_slice(&sum);
        Some(())
    }
}

/// What IP a frame carries, and from which byte on.
fn find_network(frame: &[u8]) -> Option<(Network, usize)> {
    match ethernet::payload(frame)? {
        (ethernet::IPV4, at) => Some((Network::V4, at)),
        (ethernet::IPV6, at) => Some((Network::V6, at)),
        _ => None,
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) -> Option<()> {
    bytes.get_mut(at..at.checked_add(2)?)?.copy_from_slice(&value.to_be_bytes());
    Some(())
}

#[cfg(test)]
#[path = "segment/tests.rs"]
mod tests;
