//! What the guest sends: packets to connections, strangers and requests; data to the host.

use std::os::fd::AsRawFd;

use epoll::Events;
use outboard_common::ring::IoVecs;
use outboard_common::worker::Context;
use rustix::net::sockopt;

use super::{DIAL_INTERVAL, Key, Live, Mux, OnAccept, Side, watch};
use crate::config::HostSide;
use crate::connection::{Connection, Phase, Reaction};
use crate::held::{Given, flush, give};
use crate::host::stream::HostStream;
use crate::host::{Dial, unix, vsock};
use crate::packet::{Cid, Header, Malformed, Op, SocketType, parse};
use crate::sibling::ACCEPTED;

impl Mux {
    /// Takes one packet off the transmit queue. What it makes us owe goes with the next pump.
    pub(crate) fn on_packet(&mut self, chain: &mut IoVecs, cx: &Context) {
        let header = match parse(chain) {
            Ok(header) => header,
            Err(Malformed::NoHeader(_)) => {
                self.counters.violations.add(1);
                return;
            }
            Err(Malformed::ShortPayload { header, .. }) => {
                self.counters.violations.add(1);
                self.drop_connection(&header, cx);
                return self.answer_stray(&header);
            }
        };
        // A guest speaks for itself only, and its CID has no upper half.
        if header.src_cid != self.config.guest_cid {
            return self.answer_stray(&header);
        }
        let key = key_of(&header);
        match self.index.get(&key).copied() {
            Some(at) if header.op == Op::Request.to_wire() => {
                self.on_repeated_request(at, &header, cx)
            }
            Some(at) => self.on_connection_packet(at, &header, chain, cx),
            None if header.op == Op::Request.to_wire() => self.on_request(&header, cx),
            None => self.answer_stray(&header),
        }
    }

    /// Owes an RST to a packet of no connection.
    fn answer_stray(&mut self, header: &Header) {
        if let Some(reset) = header.reset() {
            let counter = if self.resets.push(reset) {
                &self.counters.strays
            } else {
                &self.counters.strays_lost
            };
            counter.add(1);
        }
    }

    fn drop_connection(&mut self, header: &Header, cx: &Context) {
        if let Some(&at) = self.index.get(&key_of(header)) {
            self.remove(at, cx);
        }
    }

    /// A REQUEST for what is there already. If it is over, apart from data that the host has yet to
    /// read, the guest is right; else it broke the protocol, and both the old and the new end.
    fn on_repeated_request(&mut self, at: u32, header: &Header, cx: &Context) {
        let Some(live) = self.live(at) else { return };
        if live.connection.phase() == Phase::Over {
            if live.connection.held() > 0 {
                live.detached = true;
                self.index.remove(&key_of(header));
            } else {
                self.remove(at, cx);
            }
            return self.on_request(header, cx);
        }
        self.counters.violations.add(1);
        self.remove(at, cx);
        self.answer_stray(header);
    }

    fn on_connection_packet(
        &mut self,
        at: u32,
        header: &Header,
        payload: &mut IoVecs,
        cx: &Context,
    ) {
        let Some(live) = self.live(at) else { return };
        match live.connection.on_packet(header) {
            Reaction::Settle if header.op == Op::Shutdown.to_wire() => {
                self.drop_partial_message(at)
            }
            Reaction::Settle | Reaction::Discard => {}
            Reaction::Deliver => self.deliver(at, payload, header.flags, cx),
            Reaction::Accepted => self.on_accepted(at),
            Reaction::Ended => self.drop_partial_message(at),
            Reaction::Reset(violation) => {
                live.held = None;
                live.connection.on_dropped_held();
                tracing::debug!(%violation, port = %live.key.guest_port, "connection reset");
                self.counters.violations.add(1);
            }
        }
        self.settle(at, cx);
    }

    /// The guest sends no more: a message that will never be whole is not delivered.
    fn drop_partial_message(&mut self, at: u32) {
        let Some(live) = self.live(at) else { return };
        let is_over = live.connection.guest_sends_no_more();
        if live.connection.socket_type() != SocketType::SeqPacket || !is_over {
            return;
        }
        if let Some(held) = &mut live.held {
            let dropped = held.drop_partial_message();
            if held.is_empty() {
                live.held = None;
            }
            live.connection.on_forwarded(dropped);
        }
    }

    /// Gives a payload to the host, and keeps what it has no room for.
    fn deliver(&mut self, at: u32, payload: &mut IoVecs, flags: u32, cx: &Context) {
        let token = self.token(at);
        let Some(live) = self.live(at) else { return };
        let Some(stream) = &live.stream else { return };
        match give(&mut live.held, &mut live.connection, stream, payload, flags) {
            Given::Gone | Given::Begun => {}
            // A message that has just become whole may find room that was there all the time.
            Given::Held => {
                let is_stream = live.connection.socket_type() == SocketType::Stream;
                if !live.wants_room || !is_stream {
                    live.wants_room = true;
                    live.rewatch(token, cx);
                }
            }
            Given::NoReader => live.lose_reader(),
            Given::TooMany => {
                live.held = None;
                live.connection.abort();
                live.connection.on_dropped_held();
            }
        }
    }

    /// The host's socket has room again.
    pub(super) fn on_room(&mut self, at: u32, cx: &Context) {
        let token = self.token(at);
        let Some(live) = self.live(at) else { return };
        let Some(stream) = &live.stream else { return };
        if flush(&mut live.held, &mut live.connection, stream) {
            live.lose_reader();
        }
        if live.held.is_none() && live.wants_room {
            live.wants_room = false;
            live.rewatch(token, cx);
        }
        self.settle(at, cx);
    }

    /// The guest asks for a connection.
    fn on_request(&mut self, header: &Header, cx: &Context) {
        let socket_type = SocketType::from_wire(header.socket_type);
        let allowed = self.config.policy.guest_may_reach(header.dst_port) && !self.is_full();
        let Some(socket_type) = socket_type.filter(|_| allowed) else {
            self.counters.refused.add(1);
            return self.answer_stray(header);
        };
        let connection = Connection::dialing(socket_type, header, self.config.tx_buffer_size);
        let at = self.add_live(key_of(header), connection, OnAccept::Silence, cx);
        if header.dst_cid == Cid::HOST {
            self.dial(at, cx);
        } else {
            self.call_sibling(at);
        }
        self.settle(at, cx);
    }

    /// Connects to the service that the guest wants; again, if its queue was full.
    pub(super) fn dial(&mut self, at: u32, cx: &Context) {
        let config = self.config.clone();
        let token = self.token(at);
        let Some(live) = self.live(at) else { return };
        let (port, socket_type) = (live.key.port, live.connection.socket_type());
        let dialled = match &config.host {
            HostSide::Unix(base) => match config.policy.map.get(&port.0) {
                Some(path) => unix::dial(path, socket_type),
                None => unix::dial(&unix::port_path(base, port), socket_type),
            },
            HostSide::Vsock { cid, .. } => vsock::dial(*cid, port, socket_type),
        };
        match dialled {
            Dial::Done(fd) => {
                live.side = Side::Ready;
                self.connected(at, fd);
            }
            Dial::InProgress(fd) => {
                live.side = Side::Connecting;
                let is_watched = watch(cx, fd.as_raw_fd(), token, Events::EPOLLOUT);
                live.stream = Some(HostStream::vsock(fd, socket_type));
                if !is_watched {
                    self.refuse(at);
                }
            }
            Dial::Busy => {
                live.side = Side::Busy;
                let again = cx.now() + DIAL_INTERVAL;
                self.timers.add(again, token);
            }
            Dial::Refused(error) => {
                tracing::debug!(%port, %error, "no service for the guest");
                self.refuse(at);
            }
        }
        self.settle(at, cx);
    }

    fn connected(&mut self, at: u32, fd: std::os::fd::OwnedFd) {
        let Some(live) = self.live(at) else { return };
        let socket_type = live.connection.socket_type();
        prepare(&fd, socket_type, self.config.tx_buffer_size);
        let stream = match self.config.host {
            HostSide::Unix(_) => HostStream::unix(fd, socket_type),
            HostSide::Vsock { .. } => HostStream::vsock(fd, socket_type),
        };
        self.attach(at, stream);
        self.on_host_connected(at);
    }

    fn on_host_connected(&mut self, at: u32) {
        let Some(live) = self.live(at) else { return };
        live.connection.on_host_connected();
        let begun = live.begun;
        self.counters.connected(begun);
    }

    pub(super) fn refuse(&mut self, at: u32) {
        self.counters.refused.add(1);
        if let Some(live) = self.live(at) {
            live.connection.abort();
        }
    }

    fn call_sibling(&mut self, at: u32) {
        let Some(live) = self.live(at) else { return };
        let (key, socket_type) = (live.key, live.connection.socket_type());
        match self.membership.call(key.cid, key.port, key.guest_port, socket_type) {
            Some(fd) => {
                prepare(&fd, socket_type, self.config.tx_buffer_size);
                if let Some(live) = self.live(at) {
                    live.side = Side::Called;
                }
                self.attach(at, HostStream::sibling(fd, socket_type));
            }
            None => self.refuse(at),
        }
    }

    /// A connecting AF_VSOCK socket, or a sibling that was called, has news.
    pub(super) fn on_dial_event(&mut self, at: u32, cx: &Context) {
        let token = self.token(at);
        let Some(live) = self.live(at) else { return };
        let Some(stream) = &live.stream else { return };
        let decided = match live.side {
            Side::Connecting => Some(matches!(sockopt::socket_error(stream), Ok(Ok(())))),
            Side::Called => sibling_answer(stream),
            Side::Ready | Side::Busy => None,
        };
        match decided {
            Some(true) => {
                live.side = Side::Ready;
                live.readable = true;
                live.rewatch(token, cx);
                self.on_host_connected(at);
            }
            Some(false) => self.refuse(at),
            None => {}
        }
        self.settle(at, cx);
    }
}

impl Live {
    /// Nobody reads any more on the host: what is held is lost, and the guest is told.
    pub(super) fn lose_reader(&mut self) {
        self.held = None;
        self.connection.on_dropped_held();
        self.connection.on_host_reads_no_more();
    }

    /// Watches the host's end for room, if that is wanted, and not if not.
    fn rewatch(&self, token: u64, cx: &Context) {
        let Some(stream) = &self.stream else { return };
        let room = if self.wants_room { Events::EPOLLOUT } else { Events::empty() };
        let events = Events::EPOLLIN | Events::EPOLLRDHUP | Events::EPOLLET | room;
        // Fails for files, which always have room.
        let _ = cx.rewatch(stream.as_raw_fd(), events, token);
    }
}

fn key_of(header: &Header) -> Key {
    Key { cid: header.dst_cid, port: header.dst_port, guest_port: header.src_port }
}

/// What the sibling said, if it did.
fn sibling_answer(stream: &HostStream) -> Option<bool> {
    let mut answer = [0u8; 1];
    match stream.receive_raw(&mut answer) {
        Ok(n) => Some(n == 1 && answer == ACCEPTED),
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => None,
        Err(_) => Some(false),
    }
}

/// A message goes whole or not at all, so the socket must have room for the largest one.
pub(super) fn prepare(fd: &std::os::fd::OwnedFd, socket_type: SocketType, buf_alloc: u32) {
    if socket_type == SocketType::SeqPacket {
        let size = usize::try_from(buf_alloc).unwrap_or(usize::MAX);
        // With less the largest messages fail, and the guest is told.
        let _ = sockopt::set_socket_send_buffer_size(fd, size);
    }
}
