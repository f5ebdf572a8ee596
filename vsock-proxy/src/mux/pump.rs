//! What goes to the guest: packets owed, then data, while it has buffers.

use outboard_common::ring::Queue;
use outboard_common::worker::Context;

use super::{BATCH_MAX, BATCH_MIN, Live, Message, Mux};
use crate::config::VmConfig;
use crate::connection::Phase;
use crate::device::RX_QUEUE;
use crate::host::stream::{HostStream, Read};
use crate::packet::{Op, SocketType};
use crate::rx_queue::Filler;

/// What became of a connection's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// It has more.
    More,
    /// It has no more, or no credit for it.
    Done,
    /// The guest has no buffer.
    NoBuffer,
}

impl Mux {
    /// Sends what there is to send, as long as the guest has buffers. Call it after anything that
    /// may have made some, or that brought buffers.
    pub(crate) fn pump(&mut self, cx: &mut Context) {
        if self.control.is_empty() && self.data.is_empty() && self.resets.is_empty() {
            return;
        }
        loop {
            if self.pump_until_full(cx) {
                return;
            }
            let Some(queue) = cx.queues.get(RX_QUEUE) else { return };
            // Kicks are wanted only while something waits for buffers.
            if !queue.enable_notifications() {
                return;
            }
            queue.disable_notifications();
        }
    }

    /// True: everything went, as far as credit allows. False: the guest has no buffer left.
    fn pump_until_full(&mut self, cx: &mut Context) -> bool {
        loop {
            let Some(queue) = cx.queues.get(RX_QUEUE) else { return true };
            if !self.resets.send(queue, &mut self.filler) {
                return false;
            }
            if let Some(&at) = self.control.front() {
                if !self.send_control(at, cx) {
                    return false;
                }
            } else if let Some(at) = self.data.pop_front() {
                match self.send_data(at, cx) {
                    Turn::More => self.data.push_back(at),
                    Turn::Done => {
                        if let Some(live) = self.live(at) {
                            live.in_data = false;
                        }
                        self.settle(at, cx);
                    }
                    Turn::NoBuffer => {
                        self.data.push_front(at);
                        return false;
                    }
                }
            } else {
                return true;
            }
        }
    }

    /// Sends all that a connection owes. False: no buffer.
    fn send_control(&mut self, at: u32, cx: &mut Context) -> bool {
        let Self { slots, filler, config, .. } = self;
        let live = match slots.get_mut(at as usize).map(|slot| &mut slot.state) {
            Some(super::State::Live(live)) if live.in_control => live,
            _ => {
                self.control.pop_front();
                return true;
            }
        };
        let Some(queue) = cx.queues.get(RX_QUEUE) else { return false };
        while live.connection.owes_packet() {
            // What is taken from the connection must find a buffer.
            if filler.next_room(queue).is_none() {
                return false;
            }
            if let Some(packet) = live.connection.next_packet() {
                let connection = &mut live.connection;
                let header = Self::header(config, &live.key, connection, packet.op, packet.flags);
                filler.packet(queue, &header, &[]);
            }
        }
        live.in_control = false;
        self.control.pop_front();
        self.settle(at, cx);
        true
    }

    /// One batch of a connection's data.
    fn send_data(&mut self, at: u32, cx: &mut Context) -> Turn {
        let Self { slots, filler, config, .. } = self;
        let live = match slots.get_mut(at as usize).map(|slot| &mut slot.state) {
            Some(super::State::Live(live)) if live.in_data => live,
            _ => return Turn::Done,
        };
        let Some(queue) = cx.queues.get(RX_QUEUE) else { return Turn::NoBuffer };
        match live.connection.socket_type() {
            SocketType::Stream => live.send_stream(queue, filler, config),
            SocketType::SeqPacket => live.send_message(queue, filler, config),
        }
    }
}

impl Live {
    /// Reads from the host straight into the guest's buffers.
    fn send_stream(&mut self, queue: &mut Queue, filler: &mut Filler, config: &VmConfig) -> Turn {
        let limit = self.connection.sendable().min(self.batch);
        let Some(stream) = self.stream.as_ref().filter(|_| self.readable && limit > 0) else {
            return Turn::Done;
        };
        let list = filler.prepare(queue, usize::try_from(limit).unwrap_or(usize::MAX));
        if list.is_empty() {
            return Turn::NoBuffer;
        }
        let wanted: usize = list.iter().map(|e| e.iov_len).sum();
        let read = stream.read(list, self.ending);
        let len = match read {
            Read::Data { len, .. } => len,
            Read::Nothing | Read::End => 0,
        };
        let header = Mux::header(config, &self.key, &mut self.connection, Op::Rw, 0);
        filler.commit(queue, len, header);
        // A read is never longer than asked for, and that was at most `limit`.
        self.connection.on_sent(u32::try_from(len).unwrap_or(limit));
        queue.metrics().bytes_written.add(len as u64);
        self.adapt_batch(len, wanted);
        match read {
            Read::Data { more: true, .. } => Turn::More,
            Read::Data { .. } | Read::Nothing => {
                self.readable = false;
                Turn::Done
            }
            Read::End => {
                self.at_end();
                Turn::Done
            }
        }
    }

    /// The next read asks for four times as much if this one was filled, and for what it got if not.
    fn adapt_batch(&mut self, got: usize, wanted: usize) {
        self.batch = if got == wanted {
            self.batch.saturating_mul(4).min(BATCH_MAX)
        } else {
            u32::try_from(got.next_power_of_two()).unwrap_or(BATCH_MAX).clamp(BATCH_MIN, BATCH_MAX)
        };
    }

    /// All that the host sent is with the guest.
    fn at_end(&mut self) {
        self.readable = false;
        // Mostly it closed altogether, and the event that says so is only on its way.
        self.gone = self.gone || self.stream.as_ref().is_some_and(HostStream::has_hung_up);
        self.connection.on_host_eof();
        if self.gone {
            self.connection.on_host_reads_no_more();
        }
    }

    /// Sends the next piece of a message, which is fetched whole first.
    fn send_message(&mut self, queue: &mut Queue, filler: &mut Filler, config: &VmConfig) -> Turn {
        if self.message.is_none() && !self.fetch_message() {
            return if self.readable { Turn::More } else { Turn::Done };
        }
        let Some(message) = &mut self.message else { return Turn::Done };
        let rest = message.bytes.get(message.sent..).unwrap_or(&[]);
        if self.connection.sendable() == 0 {
            return Turn::Done;
        }
        let Some(room) = filler.next_room(queue) else { return Turn::NoBuffer };
        let (n, is_last) = self.connection.piece(rest.len(), room);
        let flags = if is_last { message.flags } else { 0 };
        let mut header = Mux::header(config, &self.key, &mut self.connection, Op::Rw, flags);
        header.len = u32::try_from(n).unwrap_or(0);
        if !filler.packet(queue, &header, rest.get(..n).unwrap_or(&[])) {
            return Turn::NoBuffer;
        }
        message.sent += n;
        self.connection.on_sent(header.len);
        queue.metrics().bytes_written.add(n as u64);
        if is_last {
            self.message = None;
        }
        Turn::More
    }

    /// Fetches the next message from the host. False: there is none now.
    fn fetch_message(&mut self) -> bool {
        let Some(stream) = self.stream.as_ref().filter(|_| self.readable) else { return false };
        let len = match stream.next_message(self.ending) {
            Ok(Some(len)) => len,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                self.readable = false;
                return false;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => return false,
            Ok(None) | Err(_) => {
                self.at_end();
                return false;
            }
        };
        let most = self.connection.guest_buf_alloc();
        if len > usize::try_from(most).unwrap_or(usize::MAX) {
            tracing::debug!(len, most, "a message larger than the guest can ever hold");
            self.connection.abort();
            self.readable = false;
            return false;
        }
        let Ok((bytes, flags)) = stream.receive_message(len) else { return false };
        self.message = Some(Message { bytes, sent: 0, flags });
        self.connection.phase() == Phase::Established
    }
}
