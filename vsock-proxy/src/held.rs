//! Data of the guest that the host's socket has no room for yet.
//!
//! Bounded by the connection's window: what does not fit there was never accepted. The memory goes
//! when the data went.

use std::collections::VecDeque;

use libc::iovec;
use outboard_common::ring::IoVecs;

use crate::host::io::entry;
use crate::host::stream::{HostStream, Written};
use crate::packet::SocketType;

/// Messages of a seqpacket connection that may wait. Small ones could otherwise take many times
/// their bytes.
const MESSAGES_MAX: usize = 4096;

/// Bytes in order, and where messages end if there are such.
#[derive(Debug, Default)]
pub(crate) struct Held {
    bytes: Vec<u8>,
    /// Bytes of `bytes` that are gone.
    start: usize,
    /// Lengths of the whole messages; what follows them is the beginning of one.
    messages: VecDeque<usize>,
}

/// What became of the held data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flushed {
    /// Bytes that went.
    pub(crate) bytes: u32,
    /// Nobody reads any more.
    pub(crate) no_reader: bool,
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

    /// Takes all of `payload`. False: too many messages.
    pub(crate) fn append(&mut self, payload: &mut IoVecs, end_of_message: bool) -> bool {
        if self.start > 0 && self.bytes.len() + payload.len() > self.bytes.capacity() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let old = self.bytes.len();
        self.bytes.resize(old + payload.len(), 0);
        payload.read(&mut self.bytes[old..]);
        if end_of_message {
            let whole: usize = self.messages.iter().sum();
            self.messages.push_back(self.len() - whole);
        }
        self.messages.len() <= MESSAGES_MAX
    }

    /// Throws away the beginning of a message whose end has not come; returns its bytes.
    pub(crate) fn drop_partial_message(&mut self) -> u32 {
        let whole: usize = self.messages.iter().sum();
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
    pub(crate) fn flush(&mut self, stream: &HostStream, socket_type: SocketType) -> Flushed {
        let mut flushed = Flushed { bytes: 0, no_reader: false };
        while let Some(piece) = self.next_piece(socket_type) {
            match stream.write(&[piece]) {
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

    fn next_piece(&self, socket_type: SocketType) -> Option<iovec> {
        let bytes = self.bytes.get(self.start..)?;
        match socket_type {
            SocketType::Stream => (!bytes.is_empty()).then(|| entry(bytes)),
            SocketType::SeqPacket => Some(entry(bytes.get(..*self.messages.front()?)?)),
        }
    }
}
