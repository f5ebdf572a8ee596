//! Receive-side scaling: the Toeplitz hash of a frame's flow, and the receive queue that follows from it.
//!
//! Pure. The hash types are those without IPv6 extensions' own addresses: extension headers are skipped,
//! as the specification asks of a device that does not offer the `_EX` types. Virtio 1.3, 5.1.6.4.3 and
//! 5.1.6.5.6.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use serde::{Deserialize, Serialize};

use crate::flow::{FLOW_BYTES, Flow, Network, Transport};

/// `rss_max_key_size`, bytes: what the longest input needs.
pub const KEY_MAX: u8 = 40;
/// `rss_max_indirection_table_length`, entries.
pub const TABLE_MAX: u16 = 128;
/// `supported_hash_types`: IPv4, TCPv4, UDPv4, IPv6, TCPv6, UDPv6.
pub const HASH_TYPES: u32 = 0x3f;

/// Half bytes of the longest input.
const NIBBLES: usize = FLOW_BYTES * 2;

/// What frames' hashes are made of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashConfig {
    /// `VIRTIO_NET_HASH_TYPE_*` in use.
    pub types: u32,
    /// The key; a shorter one than [`KEY_MAX`] ends in zeros.
    pub key: Vec<u8>,
}

/// Where frames go by their hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Queue pairs, as many as a power of two.
    pub pairs: Vec<u16>,
    /// The pair of frames that have no hash.
    pub unclassified: u16,
}

/// What a driver set with a steering command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SteeringConfig {
    /// The hash.
    pub hash: HashConfig,
    /// The table; `None`: steering is automatic, the hash is only reported.
    pub table: Option<Table>,
}

impl SteeringConfig {
    /// Whether a device with `max_pairs` queue pairs can do this.
    #[must_use]
    pub fn is_sound(&self, max_pairs: u16) -> bool {
        let hash = &self.hash;
        let has_key = !hash.key.is_empty() || hash.types == 0;
        let table_fits = self.table.as_ref().is_none_or(|table| {
            table.pairs.len().is_power_of_two()
                && table.pairs.len() <= usize::from(TABLE_MAX)
                && table.pairs.iter().chain([&table.unclassified]).all(|&pair| pair < max_pairs)
        });
        hash.types & !HASH_TYPES == 0
            && hash.key.len() <= usize::from(KEY_MAX)
            && has_key
            && table_fits
    }
}

/// A frame's hash, as its header says it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HashReport {
    /// `hash_value`.
    pub value: u32,
    /// `hash_report`: over what; 0: there is none.
    pub kind: u16,
}

/// A [`SteeringConfig`] made ready for use.
#[derive(Debug)]
pub struct Steering {
    types: u32,
    /// For each half byte of the input and each of its values: what that adds to the hash.
    parts: Box<[[u32; 16]]>,
    table: Option<Table>,
}

impl Steering {
    /// Makes `config` ready.
    #[must_use]
    pub fn new(config: &SteeringConfig) -> Self {
        let mut key = [0; KEY_MAX as usize];
        for (to, from) in key.iter_mut().zip(&config.hash.key) {
            *to = *from;
        }
        let parts = (0..NIBBLES).map(|at| nibble(&key, at)).collect();
        Self { types: config.hash.types, parts, table: config.table.clone() }
    }

    /// Whether a table says where frames go.
    #[must_use]
    pub fn has_table(&self) -> bool {
        self.table.is_some()
    }

    /// The hash of a frame of `flow`; of kind 0 if it has none.
    #[must_use]
    pub fn hash(&self, flow: &Flow) -> HashReport {
        // The types' bits, and the numbers of `hash_report`.
        let (ip, tcp, udp) = match flow.network {
            Network::Other => return HashReport::default(),
            Network::V4 => (0, 1, 2),
            Network::V6 => (3, 4, 5),
        };
        let has = |bit: u16| (self.types >> bit) & 1 != 0;
        let (bit, input) = match flow.transport {
            Some(Transport::Tcp) if has(tcp) => (tcp, flow.addresses_and_ports()),
            Some(Transport::Udp) if has(udp) => (udp, flow.addresses_and_ports()),
            _ if has(ip) => (ip, flow.addresses()),
            _ => return HashReport::default(),
        };
        HashReport { value: self.toeplitz(input), kind: bit.saturating_add(1) }
    }

    /// The pair that the table gives to a frame with this hash; `None` without a table.
    #[must_use]
    pub fn pair(&self, hash: HashReport) -> Option<u16> {
        let table = self.table.as_ref()?;
        if hash.kind == 0 {
            return Some(table.unclassified);
        }
        let last = table.pairs.len().saturating_sub(1);
        // Only the low bits count.
        let index = usize::try_from(hash.value).unwrap_or(0) & last;
        table.pairs.get(index).copied()
    }

    fn toeplitz(&self, input: &[u8]) -> u32 {
        input.iter().zip(self.parts.chunks_exact(2)).fold(0, |hash, (&byte, parts)| {
            let [high, low] = parts else { return hash };
            let part = |of: &[u32; 16], n: u8| of.get(usize::from(n)).copied().unwrap_or(0);
            hash ^ part(high, byte >> 4) ^ part(low, byte & 0x0f)
        })
    }
}

/// What the input's half byte `at` adds to the hash, for each of its values: every bit that is set adds
/// the 32 bits of the key that start where it stands.
fn nibble(key: &[u8; KEY_MAX as usize], at: usize) -> [u32; 16] {
    let start = at / 2;
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(key.iter().skip(start)) {
        *to = *from;
    }
    let shift: u32 = if at.is_multiple_of(2) { 0 } else { 4 };
    let from_here = u64::from_be_bytes(bytes) << shift;
    let window = |bit: u32| {
        // The upper half of what is left.
        u32::try_from(from_here.wrapping_shl(bit) >> 32).unwrap_or(0)
    };
    std::array::from_fn(|value| {
        (0..4)
            .filter(|bit| (value >> 3u32.saturating_sub(*bit)) & 1 != 0)
            .map(window)
            .fold(0, |a, b| a ^ b)
    })
}

#[cfg(test)]
#[path = "rss/tests.rs"]
mod tests;
