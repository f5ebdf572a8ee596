//! A model of a guest and of a host around the state machine: whatever they do, in whatever order,
//! no byte is lost, reordered or doubled, and credit is kept both ways.

#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::packet::{Cid, Port, SEQ_EOM};

const OURS: u32 = 4096;
const THEIRS: u32 = 3000;

fn packet(op: Op, len: u32, flags: u32, buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header {
        src_cid: Cid::from_wire(3),
        dst_cid: Cid::HOST,
        src_port: Port(1),
        dst_port: Port(2),
        len,
        socket_type: SocketType::Stream.to_wire(),
        op: op.to_wire(),
        flags,
        buf_alloc,
        fwd_cnt,
    }
}

fn plain(op: Op) -> Header {
    packet(op, 0, 0, THEIRS, 0)
}

fn established() -> Connection {
    let mut c = Connection::dialing(SocketType::Stream, &plain(Op::Request), OURS);
    c.on_host_connected();
    assert_eq!(c.next_packet(), Some(Outgoing { op: Op::Response, flags: 0 }));
    c
}

fn next_op(c: &mut Connection) -> Option<(Op, u32)> {
    c.next_packet().map(|p| (p.op, p.flags))
}

/// What the guest and the host know and did, around one connection.
struct Model {
    connection: Connection,
    /// Guest to host: sent so far, on the way in the caller's hands, read by the host.
    guest_sent: u32,
    held: VecDeque<u32>,
    host_got: u32,
    /// The guest's knowledge of our window.
    known_alloc: u32,
    known_fwd: u32,
    /// Host to guest: bytes are numbered.
    host_sent: u32,
    guest_got: u32,
    guest_taken: u32,
    host_eof: bool,
    guest_eof: bool,
    told_eof: bool,
    shut_write: bool,
}

impl Model {
    fn new() -> Self {
        let mut connection = established();
        let (known_alloc, known_fwd) = connection.stamp();
        Self {
            connection,
            guest_sent: 0,
            held: VecDeque::new(),
            host_got: 0,
            known_alloc,
            known_fwd,
            host_sent: 0,
            guest_got: 0,
            guest_taken: 0,
            host_eof: false,
            guest_eof: false,
            told_eof: false,
            shut_write: false,
        }
    }

    fn header(&self, op: Op, len: u32, flags: u32) -> Header {
        packet(op, len, flags, THEIRS, self.guest_taken)
    }

    /// The guest sends up to `n` bytes, as far as it knows it may.
    fn guest_sends(&mut self, n: u32) -> Result<(), TestCaseError> {
        let room = self.known_alloc - (self.guest_sent - self.known_fwd);
        let n = n.min(room);
        if self.guest_eof || n == 0 {
            return Ok(());
        }
        let header = self.header(Op::Rw, n, 0);
        prop_assert_eq!(self.connection.on_packet(&header), Reaction::Deliver);
        self.held.extend(self.guest_sent..self.guest_sent + n);
        self.guest_sent += n;
        prop_assert!(self.held.len() <= OURS as usize);
        Ok(())
    }

    /// The host takes up to `n` bytes.
    fn host_takes(&mut self, n: u32) -> Result<(), TestCaseError> {
        let n = n.min(u32::try_from(self.held.len()).unwrap());
        for byte in self.held.drain(..n as usize) {
            prop_assert_eq!(byte, self.host_got);
            self.host_got += 1;
        }
        self.connection.on_forwarded(n);
        self.actions()
    }

    fn actions(&mut self) -> Result<(), TestCaseError> {
        while let Some(action) = self.connection.host_action() {
            prop_assert_eq!(action, HostAction::ShutdownWrite);
            prop_assert!(self.guest_eof && self.host_got == self.guest_sent && !self.shut_write);
            self.shut_write = true;
        }
        Ok(())
    }

    /// The host sends, and the guest has room for a packet of up to `n` bytes.
    fn host_sends(&mut self, n: u32) -> Result<(), TestCaseError> {
        let n = n.min(self.connection.sendable());
        if self.host_eof || n == 0 {
            return Ok(());
        }
        self.connection.on_sent(n);
        (self.known_alloc, self.known_fwd) = self.connection.stamp();
        self.host_sent += n;
        self.guest_got += n;
        prop_assert!(self.guest_got - self.guest_taken <= THEIRS, "credit exceeded");
        Ok(())
    }

    /// The guest takes packets that are owed.
    fn guest_receives(&mut self) -> Result<(), TestCaseError> {
        while let Some(packet) = self.connection.next_packet() {
            (self.known_alloc, self.known_fwd) = self.connection.stamp();
            match packet.op {
                Op::CreditUpdate | Op::CreditRequest => {}
                Op::Shutdown => {
                    prop_assert!(self.host_eof && !self.told_eof);
                    prop_assert_eq!(packet.flags, SHUTDOWN_SEND);
                    prop_assert_eq!(self.guest_got, self.host_sent);
                    self.told_eof = true;
                }
                other => prop_assert!(false, "{other:?} out of nowhere"),
            }
        }
        Ok(())
    }

    fn step(&mut self, step: u8, n: u32) -> Result<(), TestCaseError> {
        match step {
            0 | 1 => self.guest_sends(n),
            2 | 3 => self.host_takes(n),
            4 | 5 => self.host_sends(n),
            6 => {
                self.guest_taken += n.min(self.guest_got - self.guest_taken);
                let header = self.header(Op::CreditUpdate, 0, 0);
                prop_assert_eq!(self.connection.on_packet(&header), Reaction::Settle);
                Ok(())
            }
            7 => self.guest_receives(),
            8 if n > 2900 => {
                self.guest_eof = true;
                let header = self.header(Op::Shutdown, 0, SHUTDOWN_SEND);
                prop_assert_eq!(self.connection.on_packet(&header), Reaction::Settle);
                self.actions()
            }
            9 if n > 2900 => {
                self.host_eof = true;
                self.connection.on_host_eof();
                Ok(())
            }
            _ => {
                self.connection.want_credit();
                Ok(())
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_byte_is_lost_reordered_or_doubled_and_credit_is_kept(
        steps in proptest::collection::vec((0u8..11, 0u32..3000), 1..400)
    ) {
        let mut model = Model::new();
        for (step, n) in steps {
            model.step(step, n)?;
        }
        // Everybody goes on until nothing is left: nothing may be stuck.
        for _ in 0..4 {
            model.guest_sends(OURS)?;
            model.host_takes(OURS)?;
            model.guest_receives()?;
        }
        prop_assert_eq!(model.host_got, model.guest_sent);
        prop_assert_eq!(model.shut_write, model.guest_eof);
        prop_assert_eq!(model.told_eof, model.host_eof);
        if !model.guest_eof {
            prop_assert!(model.known_alloc - (model.guest_sent - model.known_fwd) > OURS / 2);
        }
    }

    /// Any packets in any state: no panic, credit kept, and what is over stays over.
    #[test]
    fn no_sequence_of_packets_is_dangerous(
        initiated_by_host: bool,
        packets in proptest::collection::vec(
            (0u16..9, 0u32..6000, 0u32..8, any::<u32>(), any::<u32>(), 0u8..12, 1u16..4), 1..60)
    ) {
        let mut c = if initiated_by_host {
            Connection::requesting(SocketType::Stream, OURS)
        } else {
            Connection::dialing(SocketType::Stream, &plain(Op::Request), OURS)
        };
        let mut over = false;
        for (op, len, flags, buf_alloc, fwd_cnt, event, socket_type) in packets {
            let mut header = packet(Op::Rw, len, flags, buf_alloc, fwd_cnt);
            header.op = op;
            header.socket_type = socket_type.min(2);
            let reaction = c.on_packet(&header);
            prop_assert!(c.held() <= OURS);
            match reaction {
                Reaction::Deliver => prop_assert!(!over),
                Reaction::Reset(_) => {
                    prop_assert_eq!(c.phase(), Phase::Over);
                    c.on_dropped_held();
                }
                _ => {}
            }
            over |= c.phase() == Phase::Over;
            prop_assert_eq!(over, c.phase() == Phase::Over);
            match event {
                0 => c.on_host_connected(),
                1 => c.on_host_eof(),
                2 => { c.on_dropped_held(); c.on_host_reads_no_more(); }
                3 => c.on_forwarded(c.held().min(100)),
                4 => c.on_sent(c.sendable().min(500)),
                5 => c.want_credit(),
                6 => { c.on_timeout(); }
                _ => { c.next_packet(); c.stamp(); }
            }
            while c.host_action().is_some() {}
            over |= c.phase() == Phase::Over;
        }
        c.abort();
        c.on_dropped_held();
        while c.next_packet().is_some() {}
        prop_assert!(c.is_done());
    }
}

#[test]
fn a_repeated_response_changes_nothing() {
    let mut c = Connection::requesting(SocketType::Stream, OURS);
    assert_eq!(next_op(&mut c), Some((Op::Request, 0)));
    assert_eq!(c.on_packet(&plain(Op::Response)), Reaction::Accepted);
    assert_eq!(c.on_packet(&plain(Op::Response)), Reaction::Settle);
    assert_eq!(c.phase(), Phase::Established);
    assert_eq!(next_op(&mut c), None);
}

#[test]
fn data_before_the_answer_is_out_of_turn() {
    let mut c = Connection::requesting(SocketType::Stream, OURS);
    assert_eq!(next_op(&mut c), Some((Op::Request, 0)));
    let reaction = c.on_packet(&packet(Op::Rw, 1, 0, THEIRS, 0));
    assert_eq!(reaction, Reaction::Reset(Violation::DataOutOfTurn));
    assert_eq!(next_op(&mut c), Some((Op::Rst, 0)));
    assert!(c.is_done());
}

#[test]
fn an_overrun_ends_the_connection_aloud() {
    let mut c = established();
    assert_eq!(c.on_packet(&packet(Op::Rw, OURS, 0, THEIRS, 0)), Reaction::Deliver);
    let reaction = c.on_packet(&packet(Op::Rw, 1, 0, THEIRS, 0));
    let overrun = Overrun { len: 1, held: OURS, buf_alloc: OURS };
    assert_eq!(reaction, Reaction::Reset(Violation::Overrun(overrun)));
    assert_eq!(next_op(&mut c), Some((Op::Rst, 0)));
}

#[test]
fn shutdown_bits_stay() {
    let mut c = established();
    c.on_packet(&packet(Op::Shutdown, 0, SHUTDOWN_RCV, THEIRS, 0));
    assert_eq!(c.host_action(), Some(HostAction::ShutdownRead));
    assert_eq!(c.sendable(), 0);
    // The second says only the other bit, and means both.
    c.on_packet(&packet(Op::Shutdown, 0, SHUTDOWN_SEND, THEIRS, 0));
    assert_eq!(next_op(&mut c), Some((Op::Rst, 0)));
    assert!(c.is_done());
}

#[test]
fn closing_with_unsent_data_waits_for_the_host() {
    let mut c = established();
    c.on_packet(&packet(Op::Rw, 100, 0, THEIRS, 0));
    c.on_packet(&packet(Op::Shutdown, 0, SHUTDOWN_BOTH, THEIRS, 0));
    assert_eq!(next_op(&mut c), None, "the guest waits while data is on the way");
    assert_eq!(c.timeout(), Some(CLOSE_TIMEOUT));
    c.on_forwarded(100);
    assert_eq!(next_op(&mut c), Some((Op::Rst, 0)));
    assert!(c.is_done());
}

#[test]
fn a_slow_reader_keeps_its_data_when_the_guest_stops_waiting() {
    let mut c = established();
    c.on_packet(&packet(Op::Rw, 100, 0, THEIRS, 0));
    c.on_packet(&packet(Op::Shutdown, 0, SHUTDOWN_BOTH, THEIRS, 0));
    assert!(!c.on_timeout());
    assert_eq!(next_op(&mut c), Some((Op::Rst, 0)));
    assert!(!c.is_done());
    c.on_forwarded(100);
    assert!(c.is_done());
}

#[test]
fn a_guest_that_never_answers_is_let_go() {
    let mut c = Connection::requesting(SocketType::Stream, OURS);
    assert_eq!(c.timeout(), None, "no time runs while the guest has no room for the REQUEST");
    c.next_packet();
    assert_eq!(c.timeout(), Some(REQUEST_TIMEOUT));
    c.on_timeout();
    assert_eq!(next_op(&mut c), Some((Op::Rst, 0)));
    assert!(c.is_done());

    let mut c = established();
    c.on_host_eof();
    c.on_host_reads_no_more();
    assert_eq!(next_op(&mut c), Some((Op::Shutdown, SHUTDOWN_BOTH)));
    assert_eq!(c.timeout(), Some(CLOSE_TIMEOUT));
    c.on_timeout();
    assert_eq!(next_op(&mut c), Some((Op::Rst, 0)));
    assert!(c.is_done());
}

#[test]
fn a_host_that_leaves_before_the_request_is_sent_leaves_nothing() {
    let mut c = Connection::requesting(SocketType::Stream, OURS);
    c.on_host_eof();
    assert_eq!(next_op(&mut c), None);
    assert!(c.is_done());
}

#[test]
fn what_the_host_no_longer_reads_is_credited() {
    let mut c = established();
    c.on_host_reads_no_more();
    assert_eq!(next_op(&mut c), Some((Op::Shutdown, SHUTDOWN_RCV)));
    for _ in 0..10 {
        assert_eq!(c.on_packet(&packet(Op::Rw, OURS, 0, THEIRS, 0)), Reaction::Discard);
    }
    assert_eq!(c.held(), 0);
}

#[test]
fn a_message_type_is_checked() {
    let mut c = Connection::dialing(SocketType::SeqPacket, &plain(Op::Request), OURS);
    c.on_host_connected();
    let reaction = c.on_packet(&packet(Op::Rw, 1, SEQ_EOM, THEIRS, 0));
    assert_eq!(reaction, Reaction::Reset(Violation::WrongType(1)));
}
