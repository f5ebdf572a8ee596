//! A model of a guest and of a host that send each other messages, around the state machine, the code that
//! keeps messages whole and a real socket pair: whatever they do, in whatever order, each message comes
//! once, whole, in its turn and with its marks, and credit is kept both ways.

#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "tests may panic"
)]
#![allow(unsafe_code, reason = "chains over the test's own buffers")]

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType as Kind, socketpair, sockopt};

use super::*;
use crate::connection::{HostAction, Reaction};
use crate::packet::{Cid, Header, Op, Port, SEQ_EOM, SEQ_EOR, SHUTDOWN_SEND};

/// The windows of both sides: messages are as long at the most.
const OURS: u32 = 4096;
const THEIRS: u32 = 3000;

/// A message, and the flags of the packet with its end.
type Marked = (Vec<u8>, u32);

struct Model {
    connection: Connection,
    stream: HostStream,
    host: HostStream,
    held: Option<Box<Held>>,
    /// The guest's knowledge of our window, and what it sent.
    known_alloc: u32,
    known_fwd: u32,
    guest_sent: u32,
    /// The beginning of a message, and whole ones that the host has not received.
    beginning: Vec<u8>,
    to_host: VecDeque<Marked>,
    /// Messages that the guest has not received whole, the one on its way, and what came of it.
    to_guest: VecDeque<Marked>,
    on_its_way: Option<(Vec<u8>, usize, u32)>,
    assembled: Vec<u8>,
    guest_got: u32,
    guest_taken: u32,
    /// So that no two messages are alike.
    counter: u8,
}

fn packet(op: Op, len: u32, flags: u32, fwd_cnt: u32) -> Header {
    Header {
        src_cid: Cid::from_wire(3),
        dst_cid: Cid::HOST,
        src_port: Port(1),
        dst_port: Port(2),
        len,
        socket_type: SocketType::SeqPacket.to_wire(),
        op: op.to_wire(),
        flags,
        buf_alloc: THEIRS,
        fwd_cnt,
    }
}

/// The flags of a message's end, by chance.
fn end(n: u32) -> u32 {
    if n.is_multiple_of(3) { SEQ_EOM | SEQ_EOR } else { SEQ_EOM }
}

impl Model {
    fn new() -> Self {
        let request = packet(Op::Request, 0, 0, 0);
        let mut connection = Connection::dialing(SocketType::SeqPacket, &request, OURS);
        connection.on_host_connected();
        assert!(connection.next_packet().is_some_and(|p| p.op == Op::Response));
        let (known_alloc, known_fwd) = connection.stamp();
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, Kind::SEQPACKET, flags, None).unwrap();
        // Room for a few messages only, so that it is often wanting.
        for fd in [&ours, &theirs] {
            sockopt::set_socket_send_buffer_size(fd, 1).unwrap();
        }
        Self {
            connection,
            stream: HostStream::sibling(ours, SocketType::SeqPacket),
            host: HostStream::sibling(theirs, SocketType::SeqPacket),
            held: None,
            known_alloc,
            known_fwd,
            guest_sent: 0,
            beginning: Vec::new(),
            to_host: VecDeque::new(),
            to_guest: VecDeque::new(),
            on_its_way: None,
            assembled: Vec::new(),
            guest_got: 0,
            guest_taken: 0,
            counter: 0,
        }
    }

    fn bytes(&mut self, n: u32) -> Vec<u8> {
        (0..n)
            .map(|_| {
                self.counter = self.counter.wrapping_add(1);
                self.counter
            })
            .collect()
    }

    /// The guest sends a packet of up to `n` bytes, as far as it knows it may. A message ends with it if
    /// `ends`, or if there may not be more of it.
    fn guest_sends(&mut self, n: u32, ends: bool) -> Result<(), TestCaseError> {
        let room = self.known_alloc - (self.guest_sent - self.known_fwd);
        let n = n.min(room).min(OURS - self.beginning.len() as u32);
        let mut bytes = self.bytes(n);
        self.beginning.extend(&bytes);
        let is_full = self.beginning.len() as u32 == OURS;
        if n == 0 && !ends && !is_full {
            return Ok(());
        }
        let flags = if ends || is_full { end(n) } else { 0 };
        let header = packet(Op::Rw, n, flags, self.guest_taken);
        prop_assert_eq!(self.connection.on_packet(&header), Reaction::Deliver);
        self.guest_sent += n;
        if flags != 0 {
            self.to_host.push_back((std::mem::take(&mut self.beginning), flags));
        }
        let mut payload = IoVecs::new();
        // In two pieces, as guests have them.
        let (one, two) = bytes.split_at_mut(n as usize / 2);
        for piece in [one, two] {
            // SAFETY: `bytes` lives as long as `payload`.
            unsafe { payload.push(piece.as_mut_ptr(), piece.len()) };
        }
        let given = give(&mut self.held, &mut self.connection, &self.stream, &mut payload, flags);
        prop_assert!(!matches!(given, Given::NoReader | Given::TooMany));
        prop_assert!(self.connection.held() <= OURS);
        Ok(())
    }

    /// The host receives a message if there is one, and the proxy uses the room.
    fn host_receives(&mut self) -> Result<(), TestCaseError> {
        if let Ok(len) = self.host.next_message(false) {
            let got = self.host.receive_message(len.unwrap()).unwrap();
            prop_assert_eq!(Some(got), self.to_host.pop_front());
        }
        prop_assert!(!flush(&mut self.held, &mut self.connection, &self.stream));
        Ok(())
    }

    fn host_sends(&mut self, n: u32) -> Result<(), TestCaseError> {
        let message = (self.bytes(n.min(THEIRS)), end(n));
        match self.host.write(&[entry(&message.0)], message.1) {
            Written::Bytes(len) => {
                prop_assert_eq!(len, message.0.len());
                self.to_guest.push_back(message);
            }
            other => prop_assert_eq!(other, Written::NoRoom),
        }
        Ok(())
    }

    /// The guest has a buffer with `room` bytes for the next piece of a message.
    fn pump(&mut self, room: u32) -> Result<(), TestCaseError> {
        if self.on_its_way.is_none() {
            let Ok(len) = self.stream.next_message(false) else { return Ok(()) };
            let (bytes, flags) = self.stream.receive_message(len.unwrap()).unwrap();
            self.on_its_way = Some((bytes, 0, flags));
        }
        let Some((bytes, sent, flags)) = &mut self.on_its_way else { return Ok(()) };
        if self.connection.sendable() == 0 {
            self.connection.want_credit();
            return Ok(());
        }
        let (n, is_last) = self.connection.piece(bytes.len() - *sent, room.max(1) as usize);
        self.assembled.extend(&bytes[*sent..*sent + n]);
        *sent += n;
        let flags = *flags;
        self.connection.on_sent(n as u32);
        (self.known_alloc, self.known_fwd) = self.connection.stamp();
        self.guest_got += n as u32;
        prop_assert!(self.guest_got - self.guest_taken <= THEIRS, "credit exceeded");
        if is_last {
            self.on_its_way = None;
            let got = (std::mem::take(&mut self.assembled), flags);
            prop_assert_eq!(Some(got), self.to_guest.pop_front());
        }
        Ok(())
    }

    fn guest_takes(&mut self, n: u32) -> Result<(), TestCaseError> {
        self.guest_taken += n.min(self.guest_got - self.guest_taken);
        let header = packet(Op::CreditUpdate, 0, 0, self.guest_taken);
        prop_assert_eq!(self.connection.on_packet(&header), Reaction::Settle);
        Ok(())
    }

    fn guest_hears(&mut self) -> Result<(), TestCaseError> {
        while let Some(packet) = self.connection.next_packet() {
            (self.known_alloc, self.known_fwd) = self.connection.stamp();
            prop_assert!(matches!(packet.op, Op::CreditUpdate | Op::CreditRequest), "{packet:?}");
        }
        Ok(())
    }

    fn step(&mut self, step: u8, n: u32) -> Result<(), TestCaseError> {
        match step {
            0 | 1 => self.guest_sends(n, n.is_multiple_of(2)),
            2 => self.guest_sends(n % 20, true),
            3 | 4 => self.host_receives(),
            5 => self.host_sends(n),
            6 => self.host_sends(n % 20),
            7 | 8 => self.pump(n),
            9 => self.guest_takes(n),
            _ => self.guest_hears(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_message_comes_once_whole_in_turn_and_credit_is_kept(
        steps in proptest::collection::vec((0u8..11, 0u32..3000), 1..300)
    ) {
        let mut model = Model::new();
        for (step, n) in steps {
            model.step(step, n)?;
        }
        // Everybody goes on until nothing is left: nothing may be stuck.
        model.guest_sends(0, true)?;
        let rest = model.to_host.len() + model.to_guest.len();
        for _ in 0..2 * rest + 4 {
            model.guest_hears()?;
            model.host_receives()?;
            model.pump(THEIRS)?;
            model.guest_takes(THEIRS)?;
        }
        prop_assert!(model.to_host.is_empty(), "{} messages are stuck", model.to_host.len());
        prop_assert!(model.to_guest.is_empty(), "{} messages are stuck", model.to_guest.len());
        prop_assert_eq!(model.connection.held(), 0);
    }

    /// A message that its guest gives up in the middle never comes, and those before it do.
    #[test]
    fn the_beginning_of_a_message_is_not_delivered(whole in 0u32..5, n in 1u32..600) {
        let mut model = Model::new();
        for _ in 0..whole {
            model.guest_sends(n, true)?;
        }
        model.guest_sends(n, false)?;
        let header = packet(Op::Shutdown, 0, SHUTDOWN_SEND, 0);
        model.connection.on_packet(&header);
        if let Some(held) = &mut model.held {
            let dropped = held.drop_partial_message();
            model.connection.on_forwarded(dropped);
        }
        for _ in 0..whole {
            model.host_receives()?;
        }
        prop_assert!(model.to_host.is_empty());
        prop_assert_eq!(model.connection.host_action(), Some(HostAction::ShutdownWrite));
    }
}
