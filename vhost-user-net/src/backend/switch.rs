//! A switch in shared memory: guests of one process, joined without the kernel.
//!
//! # Theory of operation
//! Every guest is a port. A port's transmit queues belong to its workers, as everywhere; its receive
//! queues lie in the port, each behind a lock, because every other port's workers fill them. A sender takes
//! such a lock once for a batch and destination, never for a frame, and holds it for no longer than copying
//! a batch takes. It never waits for a receiver: what finds no buffers is dropped and counted there.
//!
//! Where a guest uses several queue pairs, the port remembers on which of them it last sent frames of a flow
//! ([`Flows`]), and frames of that flow come to it on the same one, unless the driver gave a table of its own
//! ([`Steering`]). Virtio 1.3, 5.1.6.5.5 and 5.1.6.5.6.
//!
//! Addresses are learnt into a table of atomic words, so looking them up takes no lock. A port can
//! neither take an address that the operator gave to another one, nor displace living entries of others
//! by sending from many addresses: those stay unlearnt, and frames to them are flooded.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_bindings::virtio_net as v;

use super::Backend;
use super::flows::Flows;
use crate::control::MacAddr;
use crate::rss::{Steering, SteeringConfig};
use crate::worker::switch::Receiver;

/// Ports at the most: one bit each.
pub const PORTS_MAX: usize = 64;
/// Queue pairs of a port at the most: one bit each.
pub const PAIRS_MAX: u16 = 64;
/// Sets of the table; each holds [`WAYS`] addresses.
const SETS: usize = 512;
const WAYS: usize = 8;
/// Ways that one port may have in a set, so that one guest cannot fill it.
const WAYS_OF_A_PORT: usize = 2;
/// A tick of the table's clock, seconds.
const TICK_SECONDS: u64 = 8;
/// Ticks after which an address that was not heard is forgotten: 304 seconds, about IEEE 802.1D's 300.
const AGE_TICKS: u64 = 38;

/// One entry: address (48 bits), port (6), fixed (1), tick (9). Zero is empty: no station has
/// address 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry(u64);

const TICKS: u64 = 512;

impl Entry {
    fn new(address: u64, port: usize, fixed: bool, tick: u64) -> Self {
        Self((address << 16) | ((port as u64) << 10) | (u64::from(fixed) << 9) | (tick % TICKS))
    }

    fn address(self) -> u64 {
        self.0 >> 16
    }

    fn port(self) -> usize {
        // Six bits, below PORTS_MAX.
        (self.0 >> 10) as usize % PORTS_MAX
    }

    fn is_fixed(self) -> bool {
        (self.0 >> 9) & 1 != 0
    }

    fn is_alive(self, now: u64) -> bool {
        self.0 != 0
            && (self.is_fixed() || (now % TICKS + TICKS - self.0 % TICKS) % TICKS <= AGE_TICKS)
    }
}

fn number(mac: MacAddr) -> u64 {
    mac.0.iter().fold(0, |n, &byte| (n << 8) | u64::from(byte))
}

/// Which address lives at which port.
#[derive(Debug)]
struct Table {
    sets: Box<[[AtomicU64; WAYS]]>,
}

impl Table {
    fn new() -> Self {
        Self { sets: (0..SETS).map(|_| Default::default()).collect() }
    }

    fn set(&self, address: u64) -> &[AtomicU64; WAYS] {
        // Fibonacci hashing; nine bits index 512 sets.
        &self.sets[(address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 55) as usize % SETS]
    }

    /// The port of `mac`, and whether the operator put it there.
    fn find(&self, mac: MacAddr, now: u64) -> Option<(usize, bool)> {
        let address = number(mac);
        self.set(address)
            .iter()
            .map(|way| Entry(way.load(Ordering::Relaxed)))
            .find(|e| e.address() == address && e.is_alive(now))
            .map(|e| (e.port(), e.is_fixed()))
    }

    /// `mac` was heard at `port`. False when the operator gave it to another port.
    fn learn(&self, mac: MacAddr, port: usize, fixed: bool, now: u64) -> bool {
        let address = number(mac);
        let new = Entry::new(address, port, fixed, now);
        let mut free = None;
        let (mut own, mut own_way) = (0, None);
        for way in self.set(address) {
            let old = Entry(way.load(Ordering::Relaxed));
            if old.address() == address && old.0 != 0 {
                if old.is_fixed() {
                    return old.port() == port;
                }
                if old != new {
                    way.store(new.0, Ordering::Relaxed);
                }
                return true;
            }
            if !old.is_alive(now) {
                free = free.or(Some(way));
            } else if old.port() == port && !old.is_fixed() {
                own += 1;
                own_way = Some(way);
            }
        }
        let place = if own >= WAYS_OF_A_PORT { own_way } else { free };
        if let Some(way) = place {
            way.store(new.0, Ordering::Relaxed);
        }
        true
    }
}

/// What the operator says of a port.
#[derive(Debug, Clone, Copy, Default)]
pub struct PortOptions {
    /// Its address, which no other port may use.
    pub mac: Option<MacAddr>,
    /// It exchanges no frames with other isolated ports.
    pub isolated: bool,
}

#[derive(Debug)]
struct Port {
    options: PortOptions,
    up: AtomicBool,
    /// `VIRTIO_NET_F_GUEST_*` bits that the guest takes now.
    offloads: AtomicU64,
    /// The receive queues, by pair, as far as they are lent.
    receivers: Box<[Mutex<Option<Receiver>>]>,
    /// Which those are: a bit for each pair.
    running: AtomicU64,
    /// The pairs that the driver uses.
    used: AtomicU64,
    /// With several pairs: which of them the guest sends a flow on.
    flows: Option<Flows>,
    /// What the driver said of steering; senders keep a copy each.
    steering: Mutex<Option<Arc<Steering>>>,
    /// Changes with it; 0: the driver never said anything.
    generation: AtomicU64,
    /// It is a table that says where frames go.
    has_table: AtomicBool,
}

impl Port {
    fn new(options: PortOptions, pairs: u16) -> Self {
        Self {
            options,
            up: AtomicBool::new(true),
            offloads: AtomicU64::new(0),
            receivers: (0..pairs).map(|_| Mutex::default()).collect(),
            running: AtomicU64::new(0),
            used: AtomicU64::new(u64::MAX),
            flows: (pairs > 1).then(Flows::new),
            steering: Mutex::default(),
            generation: AtomicU64::new(0),
            has_table: AtomicBool::new(false),
        }
    }

    /// The pairs that may receive: a bit for each.
    #[inline]
    fn active(&self) -> u64 {
        self.running.load(Ordering::Relaxed) & self.used.load(Ordering::Relaxed)
    }

    fn receiver(&self, pair: u16) -> Option<MutexGuard<'_, Option<Receiver>>> {
        let place = self.receivers.get(usize::from(pair))?;
        // A sender that panicked between two frames left a whole receiver.
        Some(place.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The switch itself.
#[derive(Debug)]
pub struct Switch {
    ports: Vec<Port>,
    isolated: u64,
    table: Table,
    started: Instant,
}

impl Switch {
    /// A switch with these ports, at most [`PORTS_MAX`]; more are not there. Each has `pairs` queue pairs, at
    /// most [`PAIRS_MAX`].
    #[must_use]
    pub fn new(ports: &[PortOptions], pairs: u16) -> Arc<Self> {
        let table = Table::new();
        let mut isolated = 0;
        for (at, options) in ports.iter().take(PORTS_MAX).enumerate() {
            isolated |= u64::from(options.isolated) << at;
            if let Some(mac) = options.mac {
                table.learn(mac, at, true, 0);
            }
        }
        let pairs = pairs.clamp(1, PAIRS_MAX);
        let ports =
            ports.iter().take(PORTS_MAX).map(|options| Port::new(*options, pairs)).collect();
        Arc::new(Self { ports, isolated, table, started: Instant::now() })
    }

    /// The ports, in the operator's order.
    pub fn ports(self: &Arc<Self>) -> impl Iterator<Item = SwitchPort> {
        (0..self.ports.len()).map(|at| SwitchPort { switch: self.clone(), at })
    }
}

/// One port of a [`Switch`].
#[derive(Debug, Clone)]
pub struct SwitchPort {
    switch: Arc<Switch>,
    at: usize,
}

impl SwitchPort {
    fn port(&self) -> &Port {
        &self.switch.ports[self.at]
    }

    /// The table's clock, for [`Self::route`].
    #[must_use]
    pub fn tick(&self) -> u64 {
        self.switch.started.elapsed().as_secs() / TICK_SECONDS
    }

    /// Learns where `from` is and says which ports (a bit each) a frame to `to` goes to. `None`: the
    /// source address belongs to another port.
    #[must_use]
    pub fn route(&self, to: MacAddr, from: MacAddr, tick: u64) -> Option<u64> {
        let table = &self.switch.table;
        if from.is_station() && !table.learn(from, self.at, false, tick) {
            return None;
        }
        let known = if to.is_multicast() { None } else { table.find(to, tick) };
        let mut ports = match known {
            Some((port, _)) => 1 << port,
            None => u64::MAX >> (PORTS_MAX - self.switch.ports.len()),
        };
        ports &= !(1 << self.at);
        if self.port().options.isolated {
            ports &= !self.switch.isolated;
        }
        Some(if self.port().up.load(Ordering::Relaxed) { ports } else { 0 })
    }

    /// Port number `at`; `None` when there is no such port or its cable is out.
    #[must_use]
    pub fn peer(&self, at: usize) -> Option<Peer<'_>> {
        let port = self.switch.ports.get(at).filter(|p| p.up.load(Ordering::Relaxed))?;
        Some(Peer { port })
    }

    /// Where to note which pair the guest sends a flow on; `None` while it uses one pair alone, or says itself
    /// where frames go.
    #[must_use]
    pub fn flows(&self) -> Option<&Flows> {
        let port = self.port();
        let wanted = || port.active().count_ones() > 1 && !port.has_table.load(Ordering::Relaxed);
        port.flows.as_ref().filter(|_| wanted())
    }

    /// Puts the receiving side of `pair` in place, or takes it out; gives the one before.
    pub fn set_receiver(&self, pair: u16, receiver: Option<Receiver>) -> Option<Receiver> {
        let port = self.port();
        let mut place = port.receiver(pair)?;
        // Of both, senders see the bit first, and then wait for the place.
        let bit = 1u64.checked_shl(pair.into()).unwrap_or(0);
        if receiver.is_some() {
            port.running.fetch_or(bit, Ordering::Relaxed);
        } else {
            port.running.fetch_and(!bit, Ordering::Relaxed);
        }
        std::mem::replace(&mut *place, receiver)
    }
}

/// A port that frames are sent to.
#[derive(Debug, Clone, Copy)]
pub struct Peer<'a> {
    port: &'a Port,
}

impl<'a> Peer<'a> {
    /// The pairs that may receive, a bit for each.
    #[inline]
    #[must_use]
    pub fn active(self) -> u64 {
        self.port.active()
    }

    /// How the driver wants frames steered. `seen` is the caller's copy, brought up to date.
    #[inline]
    #[must_use]
    pub fn steering<'s>(&self, seen: &'s mut Seen) -> Option<&'s Steering> {
        let generation = self.port.generation.load(Ordering::Acquire);
        if generation != seen.generation {
            seen.generation = generation;
            let steering = self.port.steering.lock().unwrap_or_else(PoisonError::into_inner);
            seen.steering.clone_from(&steering);
        }
        seen.steering.as_deref()
    }

    /// The pair of `active` that frames of flow `id` go to: the one on which the guest last sent some, or else
    /// always the same one. Without any, a pair that is not there.
    #[must_use]
    pub fn pair_of(self, id: u32, active: u64) -> u16 {
        let known = self.port.flows.as_ref().and_then(|flows| flows.find(id));
        if let Some(pair) = known.filter(|&pair| bits(active).any(|one| one == pair)) {
            return pair;
        }
        let share = (u64::from(id) * u64::from(active.count_ones())) >> 32;
        bits(active).nth(usize::try_from(share).unwrap_or(0)).unwrap_or(PAIRS_MAX)
    }

    /// The receiving side of `pair`, locked, with the offloads that the guest takes.
    #[must_use]
    pub fn receiver(self, pair: u16) -> Option<(MutexGuard<'a, Option<Receiver>>, u64)> {
        let receiver = self.port.receiver(pair)?;
        Some((receiver, self.port.offloads.load(Ordering::Relaxed)))
    }
}

/// A sender's copy of how a port's frames are steered.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    generation: u64,
    steering: Option<Arc<Steering>>,
}

/// The numbers of the bits that are set.
#[inline]
pub(crate) fn bits(mut of: u64) -> impl Iterator<Item = u16> {
    std::iter::from_fn(move || {
        let lowest = u16::try_from(of.trailing_zeros()).ok().filter(|_| of != 0)?;
        of &= of - 1;
        Some(lowest)
    })
}

impl Backend for SwitchPort {
    fn pairs(&self) -> u16 {
        // At most PAIRS_MAX.
        u16::try_from(self.port().receivers.len()).unwrap_or(PAIRS_MAX)
    }

    fn queue(&self, _pair: u16) -> Option<BorrowedFd<'_>> {
        None
    }

    fn switch_port(&self) -> Option<Self> {
        Some(self.clone())
    }

    fn features(&self) -> u64 {
        // Fragments of UDP were given up by Linux; what is not offered need not be cut up for others.
        super::tap::FEATURES & !(1 << v::VIRTIO_NET_F_HOST_UFO | 1 << v::VIRTIO_NET_F_GUEST_UFO)
    }

    fn mtu(&self) -> Option<u16> {
        None
    }

    fn set_header_size(&self, _bytes: usize) -> io::Result<()> {
        // Each side has the header that its own driver negotiated.
        Ok(())
    }

    fn set_guest_offloads(&self, offloads: u64) -> io::Result<()> {
        self.port().offloads.store(offloads, Ordering::Relaxed);
        Ok(())
    }

    fn set_pairs(&self, pairs: u16) {
        let used = u64::MAX >> PAIRS_MAX.saturating_sub(pairs.max(1));
        self.port().used.store(used, Ordering::Relaxed);
    }

    fn set_steering(&self, steering: Option<&SteeringConfig>) {
        let port = self.port();
        let mut place = port.steering.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_none() && steering.is_none() {
            return;
        }
        *place = steering.map(|config| Arc::new(Steering::new(config)));
        let has_table = place.as_ref().is_some_and(|steering| steering.has_table());
        port.has_table.store(has_table, Ordering::Relaxed);
        port.generation.fetch_add(1, Ordering::Release);
    }

    fn forget_guest(&self) {
        if let Some(flows) = &self.port().flows {
            flows.clear();
        }
    }

    fn set_mac(&self, mac: MacAddr) -> io::Result<()> {
        let tick = self.tick();
        if self.switch.table.learn(mac, self.at, false, tick) {
            Ok(())
        } else {
            Err(io::ErrorKind::AddrInUse.into())
        }
    }

    fn set_link(&self, up: bool) -> io::Result<()> {
        self.port().up.store(up, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
    const B: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
    const ALL: MacAddr = MacAddr([0xff; 6]);

    fn ports(options: &[PortOptions]) -> Vec<SwitchPort> {
        Switch::new(options, 1).ports().collect()
    }

    #[test]
    fn unknown_addresses_are_flooded_and_known_ones_are_not() {
        let p = ports(&[PortOptions::default(); 4]);
        assert_eq!(p[0].route(B, A, 0), Some(0b1110));
        assert_eq!(p[1].route(A, B, 0), Some(0b0001));
        assert_eq!(p[0].route(B, A, 1), Some(0b0010));
        assert_eq!(p[2].route(ALL, MacAddr([2, 0, 0, 0, 0, 3]), 1), Some(0b1011));
        // To itself: nowhere.
        assert_eq!(p[0].route(A, A, 1), Some(0));
    }

    #[test]
    fn addresses_move_and_are_forgotten() {
        let p = ports(&[PortOptions::default(); 3]);
        assert!(p[0].route(ALL, A, 0).is_some());
        assert_eq!(p[2].route(A, B, AGE_TICKS), Some(0b001));
        assert_eq!(p[2].route(A, B, AGE_TICKS + 1), Some(0b011));
        assert!(p[1].route(ALL, A, AGE_TICKS + 1).is_some());
        assert_eq!(p[2].route(A, B, AGE_TICKS + 2), Some(0b010));
        // The clock's nine bits go round.
        assert!(p[1].route(ALL, A, TICKS - 1).is_some());
        assert_eq!(p[2].route(A, B, TICKS + 3), Some(0b010));
    }

    #[test]
    fn a_given_address_is_nobody_elses() {
        let p = ports(&[PortOptions { mac: Some(A), isolated: false }, PortOptions::default()]);
        assert_eq!(p[1].route(B, A, 0), None);
        assert_eq!(p[1].route(A, B, 9999), Some(1));
        assert!(p[1].set_mac(A).is_err());
        assert!(p[0].set_mac(A).is_ok());
    }

    #[test]
    fn isolated_ports_meet_only_others() {
        let isolated = PortOptions { mac: None, isolated: true };
        let p = ports(&[isolated, isolated, PortOptions::default()]);
        assert_eq!(p[0].route(ALL, A, 0), Some(0b100));
        assert_eq!(p[1].route(A, B, 0), Some(0));
        assert_eq!(p[2].route(ALL, MacAddr([2, 0, 0, 0, 0, 3]), 0), Some(0b011));
    }

    #[test]
    fn a_guest_with_many_addresses_displaces_nobody() {
        let p = ports(&[PortOptions::default(); 2]);
        assert!(p[0].route(ALL, A, 0).is_some());
        for n in 0..100_000u32 {
            let [a, b, c, d] = n.to_be_bytes();
            assert!(p[1].route(ALL, MacAddr([6, 1, a, b, c, d]), 0).is_some());
        }
        assert_eq!(p[1].route(A, B, 0), Some(1));
    }

    #[test]
    fn an_unplugged_port_neither_sends_nor_receives() {
        let p = ports(&[PortOptions::default(); 2]);
        p[0].set_link(false).unwrap();
        assert_eq!(p[0].route(ALL, A, 0), Some(0));
        assert!(p[1].peer(0).is_none());
        p[0].set_link(true).unwrap();
        assert!(p[1].peer(0).is_some());
    }
}
