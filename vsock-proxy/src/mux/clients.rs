//! What the host does: clients that come and say what they want, siblings that call, and sockets
//! with news.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use epoll::Events;
use outboard_common::worker::Context;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};

use super::guest::prepare;
use super::{CLIENT_PORTS, Client, GREETING_TIMEOUT, Key, Mux, OnAccept, Side, State, watch};
use crate::connection::{Connection, Phase};
use crate::host::greeting::{GREETING_MAX, Greeting, parse_greeting, parse_passed};
use crate::host::stream::HostStream;
use crate::packet::{Cid, Port, SocketType};
use crate::sibling::{ACCEPTED, Call};

/// What a client's socket has to say.
enum Said {
    /// It waits for more.
    NotYet,
    /// It wants a connection to this port, and may have said more.
    Connect { port: Port, more: bool },
    /// It wants one with what it passed as the host's end.
    Pass(Port, HostStream),
    /// It wants nothing that we have, or left.
    Goodbye,
}

/// The host's end of a client's connection.
enum Host {
    /// The client's socket.
    Itself(Next),
    /// What it passed.
    Passed(HostStream),
}

/// What is known of a client's socket behind its greeting.
struct Next {
    /// There may be more; what comes later makes an event.
    readable: bool,
    /// It writes no more.
    ending: bool,
}

impl Mux {
    /// A client of the host came to a listening Unix socket.
    pub(crate) fn on_client(&mut self, stream: OwnedFd, socket_type: SocketType, cx: &mut Context) {
        if self.is_full() {
            self.counters.refused.add(1);
            return;
        }
        let deadline = cx.now() + GREETING_TIMEOUT;
        let client = Client { stream, socket_type, passes: false, deadline };
        let at = self.insert(State::Client(Box::new(client)));
        let token = self.token(at);
        let State::Client(client) = &self.slots[at as usize].state else { return };
        // Watched before it is heard: most say it right after coming, and have said it by then.
        if !watch(cx, client.stream.as_raw_fd(), token, Events::empty()) {
            return self.remove(at, cx);
        }
        self.listen_to(at, Events::empty(), cx);
        if matches!(&self.slots[at as usize].state, State::Client(_)) && self.token(at) == token {
            self.timers.add(deadline, token);
        }
    }

    /// A client came by AF_VSOCK, to a port that stands for the guest's of the same number.
    pub(crate) fn on_forwarded_client(&mut self, stream: OwnedFd, port: Port, cx: &mut Context) {
        if self.is_full() || !self.config.policy.host_may_reach(port) {
            self.counters.refused.add(1);
            return;
        }
        let Some(local) = self.free_port(port) else { return };
        let key = Key { cid: Cid::HOST, port: local, guest_port: port };
        let connection = Connection::requesting(SocketType::Stream, self.config.tx_buffer_size);
        let at = self.add_live(key, connection, OnAccept::Silence, cx);
        self.attach(at, HostStream::vsock(stream, SocketType::Stream));
        self.settle(at, cx);
        self.pump(cx);
    }

    /// Siblings have called.
    pub(crate) fn on_calls(&mut self, cx: &mut Context) {
        self.membership.mailbox.clear_wake();
        while let Some(call) = self.membership.mailbox.next() {
            self.on_call(call, cx);
        }
        self.pump(cx);
    }

    fn on_call(&mut self, call: Call, cx: &Context) {
        let (cid, port) = call.from;
        let key = Key { cid, port, guest_port: call.port };
        let refused = self.is_full() || !self.config.policy.host_may_reach(call.port);
        // The sibling may have forgotten a connection that we have not: it must wait for that.
        if refused || self.index.contains_key(&key) {
            self.counters.refused.add(1);
            return;
        }
        let buf_alloc = self.config.tx_buffer_size;
        prepare(&call.stream, call.socket_type, buf_alloc);
        let connection = Connection::requesting(call.socket_type, buf_alloc);
        let at = self.add_live(key, connection, OnAccept::Byte, cx);
        self.attach(at, HostStream::sibling(call.stream, call.socket_type));
        self.settle(at, cx);
    }

    /// A descriptor of this mux has news.
    pub(crate) fn on_event(&mut self, token: u64, events: Events, cx: &mut Context) {
        let Some(at) = self.slot_of(token) else { return };
        match &self.slots[at as usize].state {
            State::Client(_) => self.listen_to(at, events, cx),
            State::Live(_) => self.on_live_event(at, events, cx),
            State::Free => {}
        }
        self.pump(cx);
    }

    fn on_live_event(&mut self, at: u32, events: Events, cx: &Context) {
        let Some(live) = self.live(at) else { return };
        if events
            .intersects(Events::EPOLLIN | Events::EPOLLRDHUP | Events::EPOLLHUP | Events::EPOLLERR)
        {
            live.readable = true;
        }
        live.ending |= events.intersects(Events::EPOLLRDHUP | Events::EPOLLHUP | Events::EPOLLERR);
        if !matches!(live.side, Side::Ready) {
            return self.on_dial_event(at, cx);
        }
        if events.intersects(Events::EPOLLHUP | Events::EPOLLERR) {
            self.on_host_gone(at);
        } else if events.contains(Events::EPOLLOUT) {
            return self.on_room(at, cx);
        }
        self.settle(at, cx);
    }

    /// The host's peer is gone: nobody reads what we write, though what it wrote may be unread.
    fn on_host_gone(&mut self, at: u32) {
        let Some(live) = self.live(at) else { return };
        live.gone = true;
        if live.connection.phase() != Phase::Established {
            // Gone before the guest answered, or with the last data unread.
            live.held = None;
            live.connection.on_dropped_held();
            return live.connection.on_host_eof();
        }
        if live.held.is_some() {
            live.lose_reader();
        }
        if !live.connection.takes_data() {
            live.connection.on_host_eof();
            live.connection.on_host_reads_no_more();
        }
    }

    /// Hears a client out.
    fn listen_to(&mut self, at: u32, events: Events, cx: &mut Context) {
        let State::Client(client) = &mut self.slots[at as usize].state else { return };
        let gone = events.intersects(Events::EPOLLHUP | Events::EPOLLERR);
        let said = if gone { Said::Goodbye } else { hear(client) };
        let ending = events.contains(Events::EPOLLRDHUP);
        match said {
            // Half closed in the middle of a line: the rest will never come.
            Said::NotYet if ending => self.remove(at, cx),
            Said::NotYet => {}
            Said::Goodbye => self.remove(at, cx),
            Said::Connect { port, more } => {
                let next = Next { readable: more || ending, ending };
                self.promote(at, port, Host::Itself(next), cx);
            }
            Said::Pass(port, stream) => self.promote(at, port, Host::Passed(stream), cx),
        }
    }

    /// A client becomes a connection to `port`, in the same slot: its socket stays watched.
    fn promote(&mut self, at: u32, port: Port, host: Host, cx: &mut Context) {
        let local = self.free_port(port).filter(|_| self.config.policy.host_may_reach(port));
        let Some(local) = local else {
            self.counters.refused.add(1);
            return self.remove(at, cx);
        };
        let State::Client(client) = std::mem::take(&mut self.slots[at as usize].state) else {
            return;
        };
        let Client { stream: socket, socket_type, .. } = *client;
        let connection = Connection::requesting(socket_type, self.config.tx_buffer_size);
        let key = Key { cid: Cid::HOST, port: local, guest_port: port };
        match host {
            Host::Itself(next) => {
                prepare(&socket, socket_type, self.config.tx_buffer_size);
                self.make_live(at, key, connection, OnAccept::Ok, cx);
                if let Some(live) = self.live(at) {
                    live.stream = Some(HostStream::unix(socket, socket_type));
                    live.readable = next.readable;
                    live.ending = next.ending;
                }
            }
            Host::Passed(stream) => {
                cx.unwatch(socket.as_raw_fd());
                self.make_live(at, key, connection, OnAccept::OkOn(socket), cx);
                self.attach(at, stream);
            }
        }
        self.settle(at, cx);
        self.pump(cx);
    }

    /// A port for a client, unused with this port of the guest.
    fn free_port(&mut self, guest_port: Port) -> Option<Port> {
        // One more than there can be connections finds one.
        for _ in 0..=self.index.len() {
            let port = Port(self.next_port);
            self.next_port += 1;
            if self.next_port == CLIENT_PORTS.end {
                self.next_port = CLIENT_PORTS.start;
            }
            if !self.index.contains_key(&Key { cid: Cid::HOST, port, guest_port }) {
                return Some(port);
            }
        }
        None
    }

    /// The guest accepted: the host's client is told. If it left meanwhile, an event says so.
    pub(super) fn on_accepted(&mut self, at: u32) {
        let Some(live) = self.live(at) else { return };
        let line = || format!("OK {}\n", live.key.port);
        match std::mem::replace(&mut live.on_accept, OnAccept::Silence) {
            OnAccept::Silence => {}
            OnAccept::Ok => {
                if let Some(stream) = &live.stream {
                    tell(stream, line().as_bytes());
                }
            }
            OnAccept::OkOn(control) => {
                tell(&control, line().as_bytes());
            }
            OnAccept::Byte => {
                if let Some(stream) = &live.stream {
                    tell(stream, &ACCEPTED);
                }
            }
        }
        let begun = live.begun;
        self.counters.connected(begun);
    }
}

/// Writes a few bytes to a fresh socket, which has room for them.
fn tell(stream: &impl AsFd, bytes: &[u8]) {
    // A client that left is found out by its event.
    let _ = send(stream, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
}

/// Looks at what a client says, and takes no more of it than what is meant for us.
fn hear(client: &mut Client) -> Said {
    if client.passes {
        return hear_passed(client);
    }
    let mut line = [0u8; GREETING_MAX];
    let len = match recv(&client.stream, &mut line, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => return Said::Goodbye,
        Ok((len, _)) => len,
        Err(e) if would_block(e) => return Said::NotYet,
        Err(_) => return Said::Goodbye,
    };
    match parse_greeting(line.get(..len).unwrap_or(&[])) {
        Greeting::Incomplete => Said::NotYet,
        Greeting::Nonsense => Said::Goodbye,
        Greeting::Connect { port, len: greeting } => {
            if !consume(client, greeting) {
                return Said::Goodbye;
            }
            // What comes after this look makes an event.
            let more = len > greeting || client.socket_type == SocketType::SeqPacket;
            Said::Connect { port, more }
        }
        Greeting::PassFd { .. } if client.socket_type == SocketType::SeqPacket => Said::Goodbye,
        Greeting::PassFd { len } => {
            if !consume(client, len) {
                return Said::Goodbye;
            }
            client.passes = true;
            hear_passed(client)
        }
    }
}

/// Takes a greeting out of the socket; a message goes as a whole.
fn consume(client: &Client, len: usize) -> bool {
    let mut line = [0u8; GREETING_MAX];
    let Some(line) = line.get_mut(..len) else { return false };
    matches!(recv(&client.stream, line, RecvFlags::DONTWAIT), Ok((n, _)) if n == len)
}

fn would_block(error: rustix::io::Errno) -> bool {
    io::Error::from(error).kind() == io::ErrorKind::WouldBlock
}

/// Receives the descriptor that a client passes, and the port that comes with it.
fn hear_passed(client: &mut Client) -> Said {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut text = [0u8; GREETING_MAX];
    let mut list = [io::IoSliceMut::new(&mut text)];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let len = match recvmsg(&client.stream, &mut list, &mut control, flags) {
        Ok(received) if received.bytes > 0 => received.bytes,
        Err(e) if would_block(e) => return Said::NotYet,
        _ => return Said::Goodbye,
    };
    let passed = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let wanted = parse_passed(text.get(..len).unwrap_or(&[]));
    let (Some(fd), Some((port, keep))) = (passed, wanted) else { return Said::Goodbye };
    HostStream::passed(fd, keep).map_or(Said::Goodbye, |stream| Said::Pass(port, stream))
}
