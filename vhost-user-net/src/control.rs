//! The control queue's language: bytes to a [`Command`], and the receive filter that commands shape.
//!
//! Pure: no queue, no back end. Every command gets an answer; one that is malformed, not negotiated
//! or unknown gets VIRTIO_NET_ERR and changes nothing. Virtio 1.3, 5.1.6.5.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::fmt;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as v;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::rss::{HashConfig, KEY_MAX, SteeringConfig, TABLE_MAX, Table};

/// `ack`: done.
pub const OK: u8 = 0;
/// `ack`: refused.
pub const ERR: u8 = 1;

/// The longest command understood, bytes: MAC tables of 1,024 entries each.
pub const MAX_COMMAND_SIZE: usize = 2 + 2 * (4 + 6 * MAX_MAC_TABLE);
/// Entries kept of each MAC table; a longer one turns into "all of them", as the specification
/// allows ("best effort").
const MAX_MAC_TABLE: usize = 1024;

/// An Ethernet address.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    FromBytes,
    Immutable,
    KnownLayout,
    Serialize,
    Deserialize,
)]
#[repr(C)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// Whether this is a group address (broadcast included).
    #[inline]
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        let [first, ..] = self.0;
        first & 1 != 0
    }

    /// Whether this is ff:ff:ff:ff:ff:ff.
    #[inline]
    #[must_use]
    pub const fn is_broadcast(self) -> bool {
        matches!(self.0, [0xff, 0xff, 0xff, 0xff, 0xff, 0xff])
    }

    /// Whether one station can have it: not a group address and not all zeros.
    #[must_use]
    pub const fn is_station(self) -> bool {
        !self.is_multicast() && !matches!(self.0, [0, 0, 0, 0, 0, 0])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A receive mode that is on or off. Virtio 1.3, 5.1.6.5.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RxMode {
    /// Everything.
    Promiscuous,
    /// All multicast frames.
    AllMulticast,
    /// All unicast frames.
    AllUnicast,
    /// No multicast frames.
    NoMulticast,
    /// No unicast frames.
    NoUnicast,
    /// No broadcast frames.
    NoBroadcast,
}

/// When to notify the driver. Virtio 1.3, 5.1.6.5.7.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coalescing {
    /// Frames after which to notify at the latest; 0 and 1: each batch.
    pub max_packets: u32,
    /// Microseconds after which to notify at the latest; 0: at once.
    pub max_usecs: u32,
}

/// What a driver asks for on the control queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// CTRL_RX: a mode goes on or off.
    RxMode(RxMode, bool),
    /// CTRL_MAC_TABLE_SET: other addresses to receive. `None`: more than are kept, so all.
    MacTable {
        /// Unicast addresses.
        unicast: Option<Vec<MacAddr>>,
        /// Multicast addresses.
        multicast: Option<Vec<MacAddr>>,
    },
    /// CTRL_MAC_ADDR_SET: the station's own address.
    MacAddr(MacAddr),
    /// CTRL_VLAN_ADD (true) or CTRL_VLAN_DEL (false) of this VLAN.
    Vlan(u16, bool),
    /// CTRL_ANNOUNCE_ACK.
    AnnounceAck,
    /// CTRL_MQ_VQ_PAIRS_SET: queue pairs in use.
    Pairs(u16),
    /// CTRL_MQ_RSS_CONFIG: queue pairs in use to send, and where received frames go.
    Rss(u16, SteeringConfig),
    /// CTRL_MQ_HASH_CONFIG: what received frames' headers say; where they go is automatic.
    Hash(SteeringConfig),
    /// CTRL_GUEST_OFFLOADS_SET: feature bits of offloads that the driver takes now.
    GuestOffloads(u64),
    /// CTRL_NOTF_COAL_RX_SET.
    CoalesceRx(Coalescing),
    /// CTRL_NOTF_COAL_TX_SET.
    CoalesceTx(Coalescing),
}

/// Why a command is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Shorter than a command's class and number.
    #[error("a control command of {0} bytes")]
    Short(usize),
    /// Not a command of ours, or of a feature that was not negotiated.
    #[error("control command {class}/{command} is unknown or not negotiated")]
    Unknown {
        /// Class byte.
        class: u8,
        /// Command byte.
        command: u8,
    },
    /// The data have another length than the command's.
    #[error("control command {class}/{command} with {len} bytes of data")]
    Length {
        /// Class byte.
        class: u8,
        /// Command byte.
        command: u8,
        /// Bytes after the two.
        len: usize,
    },
    /// A value that the command cannot have.
    #[error("control command {class}/{command} with a value out of range")]
    Value {
        /// Class byte.
        class: u8,
        /// Command byte.
        command: u8,
    },
}

/// What a command is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Negotiated {
    /// The negotiated virtio features.
    pub features: u64,
    /// `max_virtqueue_pairs`.
    pub max_pairs: u16,
}

/// The features whose bits CTRL_GUEST_OFFLOADS_SET may carry. Virtio 1.3, 5.1.6.5.6.
pub const GUEST_OFFLOADS: u64 = 1 << v::VIRTIO_NET_F_GUEST_CSUM
    | 1 << v::VIRTIO_NET_F_GUEST_TSO4
    | 1 << v::VIRTIO_NET_F_GUEST_TSO6
    | 1 << v::VIRTIO_NET_F_GUEST_ECN
    | 1 << v::VIRTIO_NET_F_GUEST_UFO
    | 1 << v::VIRTIO_NET_F_GUEST_USO4
    | 1 << v::VIRTIO_NET_F_GUEST_USO6;

/// One command being decoded: its two bytes, and its data.
#[derive(Clone, Copy)]
struct Raw<'a> {
    class: u8,
    command: u8,
    data: &'a [u8],
}

impl Raw<'_> {
    fn unknown(self) -> ControlError {
        ControlError::Unknown { class: self.class, command: self.command }
    }

    fn bad_value(self) -> ControlError {
        ControlError::Value { class: self.class, command: self.command }
    }

    fn bad_length(self) -> ControlError {
        ControlError::Length { class: self.class, command: self.command, len: self.data.len() }
    }

    /// The data as exactly one `T`.
    fn exactly<T: FromBytes>(self) -> Result<T, ControlError> {
        T::read_from_bytes(self.data).ok().ok_or_else(|| self.bad_length())
    }

    /// The first bytes of `data` as one `T`, and the others.
    fn first<T: FromBytes>(self, data: &[u8]) -> Result<(T, &[u8]), ControlError> {
        T::read_from_prefix(data).ok().ok_or_else(|| self.bad_length())
    }

    fn nothing(self) -> Result<(), ControlError> {
        if self.data.is_empty() { Ok(()) } else { Err(self.bad_length()) }
    }
}

/// Decodes one command: everything readable of its chain.
///
/// # Errors
/// It must be answered with [`ERR`].
pub fn parse(bytes: &[u8], negotiated: Negotiated) -> Result<Command, ControlError> {
    let [class, command, data @ ..] = bytes else {
        return Err(ControlError::Short(bytes.len()));
    };
    let raw = Raw { class: *class, command: *command, data };
    let needs = |bit: u32| {
        if negotiated.features & (1 << bit) != 0 { Ok(()) } else { Err(raw.unknown()) }
    };
    match (u32::from(raw.class), u32::from(raw.command)) {
        (v::VIRTIO_NET_CTRL_RX, command) => {
            let extra = command > v::VIRTIO_NET_CTRL_RX_ALLMULTI;
            needs(if extra { v::VIRTIO_NET_F_CTRL_RX_EXTRA } else { v::VIRTIO_NET_F_CTRL_RX })?;
            rx_mode(raw)
        }
        (v::VIRTIO_NET_CTRL_MAC, v::VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
            needs(v::VIRTIO_NET_F_CTRL_RX)?;
            mac_table(raw)
        }
        (v::VIRTIO_NET_CTRL_MAC, v::VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
            needs(v::VIRTIO_NET_F_CTRL_MAC_ADDR)?;
            let mac: MacAddr = raw.exactly()?;
            if mac.is_station() { Ok(Command::MacAddr(mac)) } else { Err(raw.bad_value()) }
        }
        (
            v::VIRTIO_NET_CTRL_VLAN,
            c @ (v::VIRTIO_NET_CTRL_VLAN_ADD | v::VIRTIO_NET_CTRL_VLAN_DEL),
        ) => {
            needs(v::VIRTIO_NET_F_CTRL_VLAN)?;
            let id = raw.exactly::<U16>()?.get();
            let on = c == v::VIRTIO_NET_CTRL_VLAN_ADD;
            if id < VLANS { Ok(Command::Vlan(id, on)) } else { Err(raw.bad_value()) }
        }
        (v::VIRTIO_NET_CTRL_ANNOUNCE, v::VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
            needs(v::VIRTIO_NET_F_GUEST_ANNOUNCE)?;
            raw.nothing().map(|()| Command::AnnounceAck)
        }
        (v::VIRTIO_NET_CTRL_MQ, v::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
            needs(v::VIRTIO_NET_F_MQ)?;
            let pairs = raw.exactly::<U16>()?.get();
            let fits = (1..=negotiated.max_pairs).contains(&pairs);
            if fits { Ok(Command::Pairs(pairs)) } else { Err(raw.bad_value()) }
        }
        (v::VIRTIO_NET_CTRL_MQ, v::VIRTIO_NET_CTRL_MQ_RSS_CONFIG) => {
            needs(v::VIRTIO_NET_F_RSS)?;
            rss_config(raw, negotiated.max_pairs)
        }
        (v::VIRTIO_NET_CTRL_MQ, v::VIRTIO_NET_CTRL_MQ_HASH_CONFIG) => {
            needs(v::VIRTIO_NET_F_HASH_REPORT)?;
            hash_config(raw, negotiated.max_pairs)
        }
        (v::VIRTIO_NET_CTRL_GUEST_OFFLOADS, v::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
            needs(v::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
            let offloads = raw.exactly::<U64>()?.get();
            let allowed = negotiated.features & GUEST_OFFLOADS;
            if offloads & !allowed == 0 {
                Ok(Command::GuestOffloads(offloads))
            } else {
                Err(raw.bad_value())
            }
        }
        (v::VIRTIO_NET_CTRL_NOTF_COAL, v::VIRTIO_NET_CTRL_NOTF_COAL_TX_SET) => {
            needs(v::VIRTIO_NET_F_NOTF_COAL)?;
            coalescing(raw).map(Command::CoalesceTx)
        }
        (v::VIRTIO_NET_CTRL_NOTF_COAL, v::VIRTIO_NET_CTRL_NOTF_COAL_RX_SET) => {
            needs(v::VIRTIO_NET_F_NOTF_COAL)?;
            coalescing(raw).map(Command::CoalesceRx)
        }
        _ => Err(raw.unknown()),
    }
}

fn rx_mode(raw: Raw<'_>) -> Result<Command, ControlError> {
    let mode = match u32::from(raw.command) {
        v::VIRTIO_NET_CTRL_RX_PROMISC => RxMode::Promiscuous,
        v::VIRTIO_NET_CTRL_RX_ALLMULTI => RxMode::AllMulticast,
        v::VIRTIO_NET_CTRL_RX_ALLUNI => RxMode::AllUnicast,
        v::VIRTIO_NET_CTRL_RX_NOMULTI => RxMode::NoMulticast,
        v::VIRTIO_NET_CTRL_RX_NOUNI => RxMode::NoUnicast,
        v::VIRTIO_NET_CTRL_RX_NOBCAST => RxMode::NoBroadcast,
        _ => return Err(raw.unknown()),
    };
    match raw.exactly::<u8>()? {
        0 => Ok(Command::RxMode(mode, false)),
        1 => Ok(Command::RxMode(mode, true)),
        _ => Err(raw.bad_value()),
    }
}

fn coalescing(raw: Raw<'_>) -> Result<Coalescing, ControlError> {
    let [max_packets, max_usecs] = raw.exactly::<[U32; 2]>()?;
    Ok(Coalescing { max_packets: max_packets.get(), max_usecs: max_usecs.get() })
}

/// `struct virtio_net_rss_config`. Virtio 1.3, 5.1.6.5.6.
fn rss_config(raw: Raw<'_>, max_pairs: u16) -> Result<Command, ControlError> {
    let (types, rest) = raw.first::<U32>(raw.data)?;
    let (mask, rest) = raw.first::<U16>(rest)?;
    let (unclassified, rest) = raw.first::<U16>(rest)?;
    let entries = mask.get().checked_add(1).filter(|n| n.is_power_of_two() && *n <= TABLE_MAX);
    let bytes = usize::from(entries.ok_or_else(|| raw.bad_value())?).saturating_mul(2);
    let (table, rest) = rest.split_at_checked(bytes).ok_or_else(|| raw.bad_length())?;
    let (pairs, rest) = raw.first::<U16>(rest)?;
    let hash = HashConfig { types: types.get(), key: key(raw, rest)? };
    let table = Table {
        pairs: table
            .chunks_exact(2)
            .filter_map(|c| U16::read_from_bytes(c).ok())
            .map(U16::get)
            .collect(),
        unclassified: unclassified.get(),
    };
    let config = SteeringConfig { hash, table: Some(table) };
    if config.is_sound(max_pairs) && (1..=max_pairs).contains(&pairs.get()) {
        Ok(Command::Rss(pairs.get(), config))
    } else {
        Err(raw.bad_value())
    }
}

/// `struct virtio_net_hash_config`. Its reserved words are not looked at. Virtio 1.3, 5.1.6.5.6.
fn hash_config(raw: Raw<'_>, max_pairs: u16) -> Result<Command, ControlError> {
    let (types, rest) = raw.first::<U32>(raw.data)?;
    let (_, rest) = raw.first::<U64>(rest)?;
    let hash = HashConfig { types: types.get(), key: key(raw, rest)? };
    let config = SteeringConfig { hash, table: None };
    if config.is_sound(max_pairs) { Ok(Command::Hash(config)) } else { Err(raw.bad_value()) }
}

/// A key behind its length. Linux 6.15 and later count a byte of padding to these commands, the last.
fn key(raw: Raw<'_>, data: &[u8]) -> Result<Vec<u8>, ControlError> {
    let (len, key) = raw.first::<u8>(data)?;
    if len > KEY_MAX {
        return Err(raw.bad_value());
    }
    let (key, padding) = key.split_at_checked(len.into()).ok_or_else(|| raw.bad_length())?;
    if padding.len() <= 1 { Ok(key.to_vec()) } else { Err(raw.bad_length()) }
}

/// Two tables, each a count and its addresses.
fn mac_table(raw: Raw<'_>) -> Result<Command, ControlError> {
    let (unicast, rest) = one_table(raw, raw.data)?;
    let (multicast, rest) = one_table(raw, rest)?;
    if rest.is_empty() {
        Ok(Command::MacTable { unicast, multicast })
    } else {
        Err(raw.bad_length())
    }
}

type Addresses<'a> = (Option<Vec<MacAddr>>, &'a [u8]);

fn one_table<'a>(raw: Raw<'_>, data: &'a [u8]) -> Result<Addresses<'a>, ControlError> {
    let (count, rest) = U32::read_from_prefix(data).ok().ok_or_else(|| raw.bad_length())?;
    let count = usize::try_from(count.get()).unwrap_or(usize::MAX);
    let bytes = count.checked_mul(6).ok_or_else(|| raw.bad_length())?;
    let (table, rest) = rest.split_at_checked(bytes).ok_or_else(|| raw.bad_length())?;
    let kept = count <= MAX_MAC_TABLE;
    let macs = || table.chunks_exact(6).filter_map(|c| MacAddr::read_from_bytes(c).ok()).collect();
    Ok((kept.then(macs), rest))
}

/// VLAN identifiers there are.
const VLANS: u16 = 4096;
/// Words of a bit for each.
const VLAN_WORDS: usize = 64;

/// Which received frames the driver wants. Virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RxFilter {
    mac: Option<MacAddr>,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Vec<MacAddr>,
    multicast: Vec<MacAddr>,
    table_overflow: (bool, bool),
    /// One bit per VLAN; `None`: no VLAN filter.
    vlans: Option<Vec<u64>>,
}

impl RxFilter {
    /// Lets everything through, until commands say otherwise.
    #[must_use]
    pub fn everything() -> Self {
        Self {
            mac: None,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Vec::new(),
            multicast: Vec::new(),
            table_overflow: (false, false),
            vlans: None,
        }
    }

    /// Lets nothing through: what is received while the cable is out.
    #[must_use]
    pub fn nothing() -> Self {
        let everything = Self::everything();
        Self {
            promiscuous: false,
            no_multicast: true,
            no_unicast: true,
            no_broadcast: true,
            ..everything
        }
    }

    /// The filter of a device whose control queue we serve: what it starts with after a reset. As
    /// drivers expect, everything is received until the first CTRL_RX command.
    #[must_use]
    pub fn for_station(mac: Option<MacAddr>, features: u64) -> Self {
        let filters_vlans = features & (1 << v::VIRTIO_NET_F_CTRL_VLAN) != 0;
        Self { mac, vlans: filters_vlans.then(|| vec![0; VLAN_WORDS]), ..Self::everything() }
    }

    /// Whether no frame is filtered out, so that frames need not be looked at.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.promiscuous && self.vlans.is_none()
    }

    /// Applies `command` where it concerns the filter.
    pub fn apply(&mut self, command: &Command) {
        match command {
            Command::RxMode(mode, on) => *self.mode(*mode) = *on,
            Command::MacTable { unicast, multicast } => {
                self.table_overflow = (unicast.is_none(), multicast.is_none());
                self.unicast = unicast.clone().unwrap_or_default();
                self.multicast = multicast.clone().unwrap_or_default();
                self.unicast.sort_unstable();
                self.multicast.sort_unstable();
            }
            Command::MacAddr(mac) => self.mac = Some(*mac),
            Command::Vlan(id, on) => self.set_vlan(*id, *on),
            _ => {}
        }
    }

    fn mode(&mut self, mode: RxMode) -> &mut bool {
        match mode {
            RxMode::Promiscuous => &mut self.promiscuous,
            RxMode::AllMulticast => &mut self.all_multicast,
            RxMode::AllUnicast => &mut self.all_unicast,
            RxMode::NoMulticast => &mut self.no_multicast,
            RxMode::NoUnicast => &mut self.no_unicast,
            RxMode::NoBroadcast => &mut self.no_broadcast,
        }
    }

    fn set_vlan(&mut self, id: u16, on: bool) {
        let Some(vlans) = &mut self.vlans else { return };
        let Some(word) = vlans.get_mut(usize::from(id) / 64) else { return };
        let bit = 1 << (id % 64);
        *word = if on { *word | bit } else { *word & !bit };
    }

    /// Whether the driver wants the frame that starts with these bytes (18 are enough).
    #[must_use]
    pub fn accepts(&self, frame: &[u8]) -> bool {
        let Ok((to, rest)) = MacAddr::read_from_prefix(frame) else { return false };
        if let (Some(vlans), [_, _, _, _, _, _, 0x81, 0x00, high, low, ..]) = (&self.vlans, rest) {
            let id = u16::from_be_bytes([*high, *low]) & 0x0fff;
            let word = vlans.get(usize::from(id) / 64).copied().unwrap_or(0);
            // Priority tags (VLAN 0) belong to no VLAN.
            if id != 0 && word & (1 << (id % 64)) == 0 {
                return false;
            }
        }
        self.promiscuous || self.accepts_address(to)
    }

    fn accepts_address(&self, to: MacAddr) -> bool {
        if to.is_broadcast() {
            return !self.no_broadcast;
        }
        let (unicast_overflow, multicast_overflow) = self.table_overflow;
        if to.is_multicast() {
            return !self.no_multicast
                && (self.all_multicast
                    || multicast_overflow
                    || self.multicast.binary_search(&to).is_ok());
        }
        !self.no_unicast
            && (self.all_unicast
                || unicast_overflow
                || self.mac.is_none_or(|mac| mac == to)
                || self.unicast.binary_search(&to).is_ok())
    }
}

#[cfg(test)]
mod tests;
