//! One connection between the guest and the host, as a pure state machine.
//!
//! # Theory of operation
//! Events go in (a packet of the guest, something that happened on the host's socket, a deadline
//! that passed) and what to do comes out: a [`Reaction`] to do now, [`HostAction`]s, and packets
//! that are *owed* to the guest. Owed packets are a set, not a queue: a connection owes at most one
//! of each kind, so a guest that takes no packets makes nothing grow. [`Connection::next_packet`]
//! hands them out when the guest has room, [`Connection::sendable`] says how much data may follow.
//!
//! ```text
//!   guest's REQUEST → Dialing ─ host is there ─┐
//!                                              ├→ Established → Over
//!   host's CONNECT → Requested ── RESPONSE ────┘
//! ```
//! The two directions of an established connection end on their own. The guest's ends when it
//! says SHUTDOWN(SEND) and all its data went to the host; the host's when its end of file was read and
//! all data before it went to the guest. What either side *refuses to receive* is discarded, with
//! credit going on, so that its peer's other direction is not held up. The connection is over when
//! the guest gave up both directions (we owe it an RST), when it answers our SHUTDOWN of both with an
//! RST, or when it does not answer that in time.
//!
//! Bytes themselves are not here: the caller keeps what the host cannot take yet, and counts it
//! with [`Connection::on_forwarded`].
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use std::time::Duration;

use crate::credit::{Overrun, PeerCredit, Window};
use crate::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RCV, SHUTDOWN_SEND, SocketType};

/// How long the guest may take to answer a REQUEST; clients of this protocol wait as long.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a host's service may take to be there for a guest's REQUEST. Linux guests wait as long.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the guest may take to answer SHUTDOWN of both directions once it has read all data, and
/// how long it is left waiting for the host to read the last of its own.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The same for a guest that still has data to read.
pub const LINGER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the host may take to read the last data of a connection that is over for the guest.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(300);

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The guest asked, and the host's side is being connected.
    Dialing,
    /// The host asked, and the guest has not answered.
    Requested,
    /// Data may flow.
    Established,
    /// Nothing more comes of it than an RST, if one is owed, and data that the host has yet to read.
    Over,
}

/// Packets owed to the guest, as a set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Owed(u8);

impl Owed {
    const REQUEST: Self = Self(1);
    const RESPONSE: Self = Self(2);
    const RST: Self = Self(4);
    const SHUTDOWN: Self = Self(8);
    const CREDIT_UPDATE: Self = Self(16);
    const CREDIT_REQUEST: Self = Self(32);

    fn add(&mut self, other: Self) {
        self.0 |= other.0;
    }

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    fn take(&mut self, other: Self) -> bool {
        let had = self.has(other);
        self.0 &= !other.0;
        had
    }
}

/// What a guest did that ends its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More data than credit.
    #[error("the guest sent more than it had credit for: {0}")]
    Overrun(#[from] Overrun),
    /// Data before the connection was there, or after the guest said that there would be none.
    #[error("data out of turn")]
    DataOutOfTurn,
    /// A REQUEST or SHUTDOWN that the connection's state has no place for.
    #[error("operation {0} out of turn")]
    OutOfTurn(u16),
    /// A packet of another socket type than the connection's.
    #[error("a packet of socket type {0} on a connection of another")]
    WrongType(u16),
    /// An operation that does not exist.
    #[error("there is no operation {0}")]
    UnknownOp(u16),
}

/// What the caller has to do about a packet, at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// Nothing beyond a look at what is owed and at [`Connection::host_action`].
    Settle,
    /// Give the payload to the host, and count it with [`Connection::on_forwarded`] when it is gone.
    Deliver,
    /// Throw the payload away; it is counted already.
    Discard,
    /// The guest accepted: tell the host's client.
    Accepted,
    /// The guest ended it, or refused: nobody is owed anything, except the host what is held for it.
    Ended,
    /// The guest broke the protocol: the connection is over, an RST is owed.
    Reset(Violation),
}

/// What to do on the host's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostAction {
    /// The guest sends no more and all it sent is there: end of file for the host.
    ShutdownWrite,
    /// The guest reads no more: writing shall fail for the host.
    ShutdownRead,
}

/// A packet owed to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outgoing {
    /// Operation.
    pub op: Op,
    /// Its flags.
    pub flags: u32,
}

/// One connection. See the module for its life.
#[derive(Debug)]
pub struct Connection {
    socket_type: SocketType,
    phase: Phase,
    owed: Owed,
    /// Guest to host.
    window: Window,
    /// Host to guest.
    credit: PeerCredit,
    /// SHUTDOWN bits that the guest sent; they never go away.
    guest_shutdown: u32,
    /// SHUTDOWN bits that hold for the host's side, and how many of them the guest was told.
    host_shutdown: u32,
    told_shutdown: u32,
    /// What was done on the host's socket.
    wrote_eof: bool,
    read_closed: bool,
    /// CREDIT_REQUEST was sent and not answered.
    asked_credit: bool,
}

impl Connection {
    fn new(socket_type: SocketType, phase: Phase, buf_alloc: u32) -> Self {
        Self {
            socket_type,
            phase,
            owed: Owed::default(),
            window: Window::new(buf_alloc),
            credit: PeerCredit::default(),
            guest_shutdown: 0,
            host_shutdown: 0,
            told_shutdown: 0,
            wrote_eof: false,
            read_closed: false,
            asked_credit: false,
        }
    }

    /// A connection that the guest's REQUEST asks for, while the host's side is being connected.
    #[must_use]
    pub fn dialing(socket_type: SocketType, request: &Header, buf_alloc: u32) -> Self {
        let mut connection = Self::new(socket_type, Phase::Dialing, buf_alloc);
        connection.credit.update(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// A connection that the host asks for: a REQUEST is owed.
    #[must_use]
    pub fn requesting(socket_type: SocketType, buf_alloc: u32) -> Self {
        let mut connection = Self::new(socket_type, Phase::Requested, buf_alloc);
        connection.owed.add(Owed::REQUEST);
        connection
    }

    /// Where it is in its life.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Its socket type.
    #[must_use]
    pub fn socket_type(&self) -> SocketType {
        self.socket_type
    }

    /// Bytes that the caller holds for the host.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.window.held()
    }

    /// Whether the guest has not heard of it yet.
    #[must_use]
    pub fn is_unknown_to_guest(&self) -> bool {
        self.phase == Phase::Requested && self.owed.has(Owed::REQUEST)
    }

    /// Whether nothing more can come from the guest.
    #[must_use]
    pub fn guest_sends_no_more(&self) -> bool {
        self.phase == Phase::Over || self.guest_shutdown & SHUTDOWN_SEND != 0
    }

    /// Takes one packet of the guest on this connection.
    pub fn on_packet(&mut self, header: &Header) -> Reaction {
        let Some(op) = Op::from_wire(header.op) else {
            return self.violated(Violation::UnknownOp(header.op));
        };
        if header.socket_type != self.socket_type.to_wire() {
            return self.violated(Violation::WrongType(header.socket_type));
        }
        if self.phase == Phase::Over {
            return self.on_packet_when_over(op);
        }
        self.credit.update(header.buf_alloc, header.fwd_cnt);
        self.asked_credit = false;
        match (op, self.phase) {
            (Op::Rst, _) => {
                self.phase = Phase::Over;
                self.owed = Owed::default();
                Reaction::Ended
            }
            (Op::Response, Phase::Requested) if !self.owed.has(Owed::REQUEST) => {
                self.phase = Phase::Established;
                Reaction::Accepted
            }
            // Said twice is said once.
            (Op::Response, Phase::Established) => Reaction::Settle,
            (Op::Rw, Phase::Established) => self.on_data(header.len),
            (Op::Rw, _) => self.violated(Violation::DataOutOfTurn),
            (Op::Shutdown, Phase::Established) => {
                self.guest_shutdown |= header.flags & SHUTDOWN_BOTH;
                self.settle_guest_close();
                Reaction::Settle
            }
            (Op::CreditUpdate, _) => Reaction::Settle,
            (Op::CreditRequest, _) => {
                self.owed.add(Owed::CREDIT_UPDATE);
                Reaction::Settle
            }
            (Op::Request | Op::Response | Op::Shutdown, _) => {
                self.violated(Violation::OutOfTurn(header.op))
            }
        }
    }

    /// The guest may not know yet that it is over; what it still sends is answered with an RST.
    fn on_packet_when_over(&mut self, op: Op) -> Reaction {
        if op == Op::Rst {
            self.owed = Owed::default();
            return Reaction::Ended;
        }
        self.owed.add(Owed::RST);
        Reaction::Discard
    }

    fn violated(&mut self, violation: Violation) -> Reaction {
        self.abort();
        Reaction::Reset(violation)
    }

    fn on_data(&mut self, len: u32) -> Reaction {
        if self.guest_shutdown & SHUTDOWN_SEND != 0 {
            return self.violated(Violation::DataOutOfTurn);
        }
        if let Err(overrun) = self.window.receive(len) {
            return self.violated(overrun.into());
        }
        if self.host_shutdown & SHUTDOWN_RCV != 0 {
            self.on_forwarded(len);
            return Reaction::Discard;
        }
        Reaction::Deliver
    }

    /// The host's side is there.
    pub fn on_host_connected(&mut self) {
        if self.phase == Phase::Dialing {
            self.phase = Phase::Established;
            self.owed.add(Owed::RESPONSE);
        }
    }

    /// Over at once: the guest is owed an RST if it knows of the connection at all. Also for a host
    /// that cannot be reached or went away before the guest answered.
    pub fn abort(&mut self) {
        let unknown = self.owed.has(Owed::REQUEST);
        self.phase = Phase::Over;
        self.owed = if unknown { Owed::default() } else { Owed::RST };
    }

    /// `n` held bytes went to the host, or were thrown away because it takes no more.
    #[inline]
    pub fn on_forwarded(&mut self, n: u32) {
        self.window.forward(n);
        if self.phase != Phase::Established {
            return;
        }
        let eager = self.socket_type == SocketType::SeqPacket;
        if self.guest_shutdown & SHUTDOWN_SEND == 0 && self.window.worth_telling(eager) {
            self.owed.add(Owed::CREDIT_UPDATE);
        }
        self.settle_guest_close();
    }

    /// The host sends no more, and all it sent went to the guest.
    pub fn on_host_eof(&mut self) {
        self.host_says(SHUTDOWN_SEND);
    }

    /// The host reads no more. The caller throws away what it holds, and counts it as forwarded.
    pub fn on_host_reads_no_more(&mut self) {
        self.host_says(SHUTDOWN_RCV);
    }

    fn host_says(&mut self, bits: u32) {
        match self.phase {
            Phase::Established => {
                self.host_shutdown |= bits;
                if self.told_shutdown != self.host_shutdown {
                    self.owed.add(Owed::SHUTDOWN);
                }
            }
            Phase::Dialing | Phase::Requested => self.abort(),
            Phase::Over => {}
        }
    }

    /// With both directions given up by the guest and nothing held any more, it is owed an RST.
    fn settle_guest_close(&mut self) {
        if self.phase == Phase::Established
            && self.guest_shutdown == SHUTDOWN_BOTH
            && self.window.held() == 0
        {
            self.abort();
        }
    }

    /// The next thing to do on the host's socket; call until there is none.
    pub fn host_action(&mut self) -> Option<HostAction> {
        if self.phase != Phase::Established {
            return None;
        }
        let sends_no_more = self.guest_shutdown & SHUTDOWN_SEND != 0;
        if sends_no_more && self.window.held() == 0 && !self.wrote_eof {
            self.wrote_eof = true;
            return Some(HostAction::ShutdownWrite);
        }
        if self.guest_shutdown & SHUTDOWN_RCV != 0 && !self.read_closed {
            self.read_closed = true;
            return Some(HostAction::ShutdownRead);
        }
        None
    }

    /// Whether the guest wants data at all: it is connected, and did not say SHUTDOWN(RCV).
    #[inline]
    #[must_use]
    pub fn takes_data(&self) -> bool {
        self.phase == Phase::Established
            && (self.guest_shutdown & SHUTDOWN_RCV) | (self.host_shutdown & SHUTDOWN_SEND) == 0
    }

    /// Bytes that may be sent to the guest now.
    #[inline]
    #[must_use]
    pub fn sendable(&self) -> u32 {
        if self.takes_data() { self.credit.available() } else { 0 }
    }

    /// The next packet of a message with `rest` bytes left, for a buffer with `room` bytes: how many of
    /// them it takes, and whether the message ends with it.
    #[must_use]
    pub fn piece(&self, rest: usize, room: usize) -> (usize, bool) {
        let credit = usize::try_from(self.sendable()).unwrap_or(usize::MAX);
        let len = rest.min(room).min(credit);
        (len, len == rest)
    }

    /// The guest's whole receive buffer, bytes.
    #[must_use]
    pub fn guest_buf_alloc(&self) -> u32 {
        self.credit.buf_alloc()
    }

    /// There is data for the guest, and no credit. Asks for some, once.
    pub fn want_credit(&mut self) {
        if self.takes_data() && !self.asked_credit {
            self.asked_credit = true;
            self.owed.add(Owed::CREDIT_REQUEST);
        }
    }

    /// Counts `n` bytes of data as sent; they are at most [`Self::sendable`]. Their header says what
    /// [`Self::stamp`] gives.
    #[inline]
    pub fn on_sent(&mut self, n: u32) {
        self.credit.send(n);
    }

    /// `(buf_alloc, fwd_cnt)` for a packet that goes to the guest now.
    #[inline]
    pub fn stamp(&mut self) -> (u32, u32) {
        self.owed.take(Owed::CREDIT_UPDATE);
        self.window.tell()
    }

    /// Whether [`Self::next_packet`] has one.
    #[inline]
    #[must_use]
    pub fn owes_packet(&self) -> bool {
        self.owed != Owed::default()
    }

    /// Takes the next packet owed to the guest; the caller sends it, with [`Self::stamp`].
    pub fn next_packet(&mut self) -> Option<Outgoing> {
        let plain = |op| Some(Outgoing { op, flags: 0 });
        if self.owed.take(Owed::RST) {
            self.owed = Owed::default();
            return plain(Op::Rst);
        }
        for (owed, op) in [(Owed::REQUEST, Op::Request), (Owed::RESPONSE, Op::Response)] {
            if self.owed.take(owed) {
                return plain(op);
            }
        }
        if self.owed.take(Owed::SHUTDOWN) {
            self.told_shutdown = self.host_shutdown;
            return Some(Outgoing { op: Op::Shutdown, flags: self.host_shutdown });
        }
        for (owed, op) in
            [(Owed::CREDIT_REQUEST, Op::CreditRequest), (Owed::CREDIT_UPDATE, Op::CreditUpdate)]
        {
            if self.owed.take(owed) {
                return plain(op);
            }
        }
        None
    }

    /// Whether nothing is left to do: the caller forgets it. What it holds for the host counts.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Over && !self.owes_packet() && self.window.held() == 0
    }

    /// How long the present state may last before [`Self::on_timeout`]; `None`: for ever.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        match self.phase {
            Phase::Dialing => Some(DIAL_TIMEOUT),
            // The time in which the guest has no room for the REQUEST does not count.
            Phase::Requested => (!self.owed.has(Owed::REQUEST)).then_some(REQUEST_TIMEOUT),
            Phase::Established if self.guest_shutdown == SHUTDOWN_BOTH => Some(CLOSE_TIMEOUT),
            Phase::Established if self.told_shutdown == SHUTDOWN_BOTH => {
                let all_read = self.credit.outstanding() == 0;
                Some(if all_read { CLOSE_TIMEOUT } else { LINGER_TIMEOUT })
            }
            Phase::Over if self.window.held() > 0 => Some(DRAIN_TIMEOUT),
            Phase::Established | Phase::Over => None,
        }
    }

    /// The present state lasted too long. The guest gets an RST; with data held for the host, that
    /// goes on until the next time-out, when true says: let go of it.
    pub fn on_timeout(&mut self) -> bool {
        if self.phase == Phase::Over {
            return true;
        }
        self.abort();
        false
    }

    /// Throws away what the caller holds and no longer will deliver.
    pub fn on_dropped_held(&mut self) {
        let held = self.window.held();
        self.on_forwarded(held);
    }
}

#[cfg(test)]
mod tests;
