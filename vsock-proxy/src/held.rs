//! Data of the guest that the host's socket has no room for yet.
//!
//! Bounded by the connection's window: what does not fit there was never accepted. The memory goes
//! when the data went.

use std::collections::VecDeque;

use libc::iovec;
use outboard_common::ring::IoVecs;

use crate::connection::Connection;
use crate::host::io::entry;
use crate::host::stream::{HostStream, Written};
use crate::packet::{SEQ_EOM, SocketType};

/// Messages of a seqpacket connection that may wait. Small ones could otherwise take many times
/// their bytes.
const MESSAGES_MAX: usize = 4096;

/// Bytes in order, and where messages end if there are such.
#[derive(Debug, Default)]
pub(crate) struct Held {
    bytes: Vec<u8>,
    /// Bytes of `bytes` that are gone.
    start: usize,
    /// The whole messages; what follows them is the beginning of one.
    messages: VecDeque<Message>,
}

/// A whole message.
#[derive(Debug, Clone, Copy)]
struct Message {
    len: usize,
    /// Those of the packet with its end.
    flags: u32,
}

/// What became of the held data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Flushed {
    /// Bytes that went.
    bytes: u32,
    /// Nobody reads any more.
    no_reader: bool,
}

impl Held {
    /// Whether nothing is held.
    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.bytes.len() && self.messages.is_empty()
    }

    /// Bytes held.
    fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Bytes of the whole messages.
    fn whole(&self) -> usize {
        self.messages.iter().map(|message| message.len).sum()
    }

    /// Takes all of `payload`; `end`: a message ends with it, in a packet of these flags. False: too
    /// many messages.
    fn append(&mut self, payload: &mut IoVecs, end: Option<u32>) -> bool {
        if self.start > 0 && self.bytes.len() + payload.len() > self.bytes.capacity() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let old = self.bytes.len();
        self.bytes.resize(old + payload.len(), 0);
        payload.read(&mut self.bytes[old..]);
        if let Some(flags) = end {
            self.messages.push_back(Message { len: self.len() - self.whole(), flags });
        }
        self.messages.len() <= MESSAGES_MAX
    }

    /// Throws away the beginning of a message whose end has not come; returns its bytes.
    pub(crate) fn drop_partial_message(&mut self) -> u32 {
        let whole = self.whole();
        let partial = self.len() - whole;
        self.bytes.truncate(self.start + whole);
        // A window is at most 32 bits wide, and this lay in it.
        u32::try_from(partial).unwrap_or(u32::MAX)
    }

    fn take(&mut self, n: usize) {
        self.start += n;
        if self.start == self.bytes.len() {
            *self = Self { messages: std::mem::take(&mut self.messages), ..Self::default() };
        }
    }

    /// Writes as much as there is room for.
    fn flush(&mut self, stream: &HostStream, socket_type: SocketType) -> Flushed {
        let mut flushed = Flushed { bytes: 0, no_reader: false };
        while let Some((piece, flags)) = self.next_piece(socket_type) {
            match stream.write(&[piece], flags) {
                Written::NoRoom => break,
                Written::Bytes(n) => {
                    let short = n < piece.iov_len;
                    if socket_type == SocketType::SeqPacket {
                        self.messages.pop_front();
                    }
                    self.take(n);
                    // A window is at most 32 bits wide, and this lay in it.
                    flushed.bytes += u32::try_from(n).unwrap_or(u32::MAX);
                    if short {
                        break;
                    }
                }
                Written::NoReader => {
                    flushed.no_reader = true;
                    break;
                }
            }
        }
        flushed
    }

    fn next_piece(&self, socket_type: SocketType) -> Option<(iovec, u32)> {
        let bytes = self.bytes.get(self.start..)?;
        match socket_type {
            SocketType::Stream => (!bytes.is_empty()).then(|| (entry(bytes), 0)),
            SocketType::SeqPacket => {
                let message = self.messages.front()?;
                Some((entry(bytes.get(..message.len)?), message.flags))
            }
        }
    }
}

/// What became of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Given {
    /// The host has it.
    Gone,
    /// It is held, and waits for room.
    Held,
    /// It is held, as the beginning of a message.
    Begun,
    /// Nobody reads any more.
    NoReader,
    /// More messages are held than may be.
    TooMany,
}

/// Gives the payload of a packet with these flags to the host, counts what went, and holds the rest.
pub(crate) fn give(
    held: &mut Option<Box<Held>>,
    connection: &mut Connection,
    stream: &HostStream,
    payload: &mut IoVecs,
    flags: u32,
) -> Given {
    let is_stream = connection.socket_type() == SocketType::Stream;
    // Streams have no messages, whatever their packets' flags say; empty ones are messages too.
    let end = (flags & SEQ_EOM != 0 && !is_stream).then_some(flags);
    let whole = is_stream || end.is_some();
    let mut is_gone = payload.is_empty() && end.is_none();
    if held.is_none() && whole && !is_gone {
        match stream.write(payload.as_slice(), flags) {
            Written::Bytes(n) => {
                payload.advance(n);
                is_gone = payload.is_empty();
                // No more than the header's length, which has 32 bits.
                connection.on_forwarded(u32::try_from(n).unwrap_or(u32::MAX));
            }
            Written::NoRoom => {}
            Written::NoReader => return Given::NoReader,
        }
    }
    if is_gone && held.is_none() {
        return Given::Gone;
    }
    if !held.get_or_insert_default().append(payload, end) {
        return Given::TooMany;
    }
    if whole { Given::Held } else { Given::Begun }
}

/// Gives the host as much of what is held as it has room for. True: nobody reads any more.
pub(crate) fn flush(
    held: &mut Option<Box<Held>>,
    connection: &mut Connection,
    stream: &HostStream,
) -> bool {
    let Some(all) = held else { return false };
    let flushed = all.flush(stream, connection.socket_type());
    if all.is_empty() {
        *held = None;
    }
    connection.on_forwarded(flushed.bytes);
    flushed.no_reader
}

#[cfg(test)]
mod tests;
