//! The host's end of a connection: a socket, or a descriptor that a client passed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::iovec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;

use super::io as calls;
use crate::packet::{SEQ_EOM, SEQ_EOR, SocketType};

/// Bytes that follow a message on its way between two guests: its flags.
const TRAILER: usize = 1;

/// How the descriptor is used.
#[derive(Debug)]
enum Kind {
    Stream,
    /// A Unix socket of messages. Linux keeps no MSG_EOR there.
    Messages,
    /// An AF_VSOCK socket of messages: MSG_EOR goes along.
    VsockMessages,
    /// A pair of messages between two guests of this process: each ends with a byte of its flags.
    SiblingMessages,
    /// Passed by a client: a pipe, a terminal, a file or again a socket.
    Passed {
        /// End of file and a reader that left do not end the connection.
        keep: bool,
    },
}

/// What a read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    /// So many bytes, and whether there may be more.
    Data {
        /// Bytes read.
        len: usize,
        /// Another read may find some, without a new event.
        more: bool,
    },
    /// Nothing now.
    Nothing,
    /// Nothing any more.
    End,
}

/// What a write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    /// So many bytes are gone; fewer than there were means that there was no room for more.
    Bytes(usize),
    /// Nothing is gone, not even an empty message.
    NoRoom,
    /// Nobody will ever read.
    NoReader,
}

/// The host's end.
#[derive(Debug)]
pub(crate) struct HostStream {
    fd: OwnedFd,
    kind: Kind,
}

impl HostStream {
    /// A connected, non-blocking Unix socket of `socket_type`.
    pub(crate) fn unix(fd: OwnedFd, socket_type: SocketType) -> Self {
        Self::of(fd, socket_type, Kind::Messages)
    }

    /// A non-blocking AF_VSOCK socket of `socket_type`.
    pub(crate) fn vsock(fd: OwnedFd, socket_type: SocketType) -> Self {
        Self::of(fd, socket_type, Kind::VsockMessages)
    }

    /// One end of a pair that joins two guests.
    pub(crate) fn sibling(fd: OwnedFd, socket_type: SocketType) -> Self {
        Self::of(fd, socket_type, Kind::SiblingMessages)
    }

    fn of(fd: OwnedFd, socket_type: SocketType, messages: Kind) -> Self {
        let kind = match socket_type {
            SocketType::Stream => Kind::Stream,
            SocketType::SeqPacket => messages,
        };
        Self { fd, kind }
    }

    /// A descriptor that a client passed; it is made non-blocking.
    ///
    /// # Errors
    /// It cannot be made so.
    pub(crate) fn passed(fd: OwnedFd, keep: bool) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { fd, kind: Kind::Passed { keep } })
    }

    /// Reads into `list`. `hung_up`: an event said that the writer left, so that a short read is not
    /// the last.
    pub(crate) fn read(&self, list: &[iovec], hung_up: bool) -> Read {
        let wanted: usize = list.iter().map(|e| e.iov_len).sum();
        let result = match self.kind {
            Kind::Stream | Kind::Messages | Kind::VsockMessages | Kind::SiblingMessages => {
                calls::receive(self.fd.as_fd(), list)
            }
            Kind::Passed { .. } => calls::read(self.fd.as_fd(), list).map(|n| (n, 0)),
        };
        match result {
            Ok((0, _)) => self.end(),
            Ok((len, flags)) => {
                // A stream socket that gave less than asked for is empty, unless descriptors that
                // came along cut the read short.
                let full = len == wanted || flags & libc::MSG_CTRUNC != 0;
                Read::Data { len, more: full || hung_up || !matches!(self.kind, Kind::Stream) }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Read::Nothing,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Read::Data { len: 0, more: true },
            Err(_) => self.end(),
        }
    }

    fn end(&self) -> Read {
        if matches!(self.kind, Kind::Passed { keep: true }) { Read::Nothing } else { Read::End }
    }

    /// Bytes of the next message; `None`: there will be none. `ending`: an event said that the writer
    /// left.
    ///
    /// # Errors
    /// `WouldBlock`: there is none now.
    pub(crate) fn next_message(&self, ending: bool) -> io::Result<Option<usize>> {
        use rustix::net::{RecvFlags, recv};
        // AF_VSOCK says nothing of a message to a reader without room.
        let mut first = [0u8; 1];
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let (_, len) = recv(&self.fd, &mut first, flags)?;
        if matches!(self.kind, Kind::SiblingMessages) {
            return Ok(len.checked_sub(TRAILER));
        }
        // An empty message reads like the end. The order of the two questions matters: once the
        // writer has ended, what is queued grows no more.
        let is_end = len == 0 && (ending || self.has_ended()) && !self.has_bytes();
        Ok((!is_end).then_some(len))
    }

    /// Receives the next message, of `len` bytes, and the flags that a packet with its end has.
    ///
    /// # Errors
    /// As `recvmsg`.
    pub(crate) fn receive_message(&self, len: usize) -> io::Result<(Vec<u8>, u32)> {
        let is_sibling = matches!(self.kind, Kind::SiblingMessages);
        let mut message = vec![0; if is_sibling { len + TRAILER } else { len }];
        let (got, flags) = calls::receive(self.fd.as_fd(), &[calls::entry_mut(&mut message)])?;
        message.truncate(got);
        let ends_record = if is_sibling {
            message.pop().is_some_and(|flags| u32::from(flags) & SEQ_EOR != 0)
        } else {
            flags & libc::MSG_EOR != 0
        };
        Ok((message, SEQ_EOM | if ends_record { SEQ_EOR } else { 0 }))
    }

    /// Receives what is no message of a guest into `out`.
    pub(crate) fn receive_raw(&self, out: &mut [u8]) -> io::Result<usize> {
        let (_, len) = rustix::net::recv(&self.fd, out, rustix::net::RecvFlags::DONTWAIT)?;
        Ok(len)
    }

    /// Writes `list`; on a socket of messages that is one, written whole or not at all, and `flags` are
    /// those of the packet with its end.
    pub(crate) fn write(&self, list: &[iovec], flags: u32) -> Written {
        let result = match self.kind {
            Kind::Stream => calls::send(self.fd.as_fd(), list, 0),
            Kind::Passed { .. } => calls::write(self.fd.as_fd(), list),
            // More pieces than one call takes: the caller has it in one piece later.
            _ if list.len() >= calls::IOV_MAX => return Written::NoRoom,
            Kind::Messages => calls::send(self.fd.as_fd(), list, 0),
            Kind::VsockMessages => return self.write_vsock_message(list, flags),
            Kind::SiblingMessages => self.write_sibling_message(list, flags),
        };
        match result {
            Ok(n) => Written::Bytes(n),
            Err(e)
                if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
            {
                Written::NoRoom
            }
            // With `keep` the reader may come back; what is written meanwhile is lost to it, as it
            // is to every reader of a pipe that leaves.
            Err(_) if matches!(self.kind, Kind::Passed { keep: true }) => {
                Written::Bytes(list.iter().map(|e| e.iov_len).sum())
            }
            Err(_) => Written::NoReader,
        }
    }

    fn write_sibling_message(&self, list: &[iovec], flags: u32) -> io::Result<usize> {
        let trailer = flags.to_le_bytes();
        let mut list = list.to_vec();
        list.push(calls::entry(trailer.get(..TRAILER).unwrap_or(&[])));
        calls::send(self.fd.as_fd(), &list, 0).map(|n| n.saturating_sub(TRAILER))
    }

    /// The kernel sends the beginning of a message that there is not room for, and then says that it
    /// would block: what that leaves can only be ended.
    fn write_vsock_message(&self, list: &[iovec], flags: u32) -> Written {
        if !self.polls(PollFlags::OUT | PollFlags::HUP | PollFlags::ERR) {
            return Written::NoRoom;
        }
        let eor = if flags & SEQ_EOR != 0 { libc::MSG_EOR } else { 0 };
        calls::send(self.fd.as_fd(), list, eor).map_or(Written::NoReader, Written::Bytes)
    }

    /// Whether its peer is gone in both directions.
    pub(crate) fn has_hung_up(&self) -> bool {
        self.polls(PollFlags::HUP | PollFlags::ERR)
    }

    /// Whether its peer writes no more, or is gone.
    pub(crate) fn has_ended(&self) -> bool {
        self.polls(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
    }

    fn polls(&self, wanted: PollFlags) -> bool {
        let mut fds = [PollFd::new(&self.fd, wanted)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(wanted)
    }

    /// Whether bytes wait to be read, behind whatever empty messages there are.
    pub(crate) fn has_bytes(&self) -> bool {
        rustix::io::ioctl_fionread(&self.fd).is_ok_and(|n| n > 0)
    }

    /// Whether it is open elsewhere too, so that closing it does not end its being watched.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(self.kind, Kind::Passed { .. })
    }

    /// End of file for the host's reader.
    pub(crate) fn shutdown_write(&self) {
        // Fails on what is not a socket, and there closing says it.
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Write);
    }

    /// Writing shall fail for the host.
    pub(crate) fn shutdown_read(&self) {
        let _ = rustix::net::shutdown(&self.fd, Shutdown::Read);
    }
}

impl AsFd for HostStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for HostStream {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}
