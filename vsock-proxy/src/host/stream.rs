//! The host's end of a connection: a socket, or a descriptor that a client passed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::iovec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::Shutdown;

use super::io as calls;
use crate::packet::SocketType;

/// How the descriptor is used.
#[derive(Debug)]
enum Kind {
    Stream,
    SeqPacket,
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
    /// A connected, non-blocking socket of `socket_type`.
    pub(crate) fn socket(fd: OwnedFd, socket_type: SocketType) -> Self {
        let kind = match socket_type {
            SocketType::Stream => Kind::Stream,
            SocketType::SeqPacket => Kind::SeqPacket,
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
            Kind::Stream | Kind::SeqPacket => calls::receive(self.fd.as_fd(), list),
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

    /// Bytes of the next message of a seqpacket socket.
    pub(crate) fn next_message_len(&self) -> io::Result<usize> {
        use rustix::net::{RecvFlags, recv};
        let mut nothing = [0u8; 0];
        let flags = RecvFlags::PEEK | RecvFlags::TRUNC | RecvFlags::DONTWAIT;
        let (_, len) = recv(&self.fd, &mut nothing, flags)?;
        Ok(len)
    }

    /// Receives one message of a seqpacket socket into `out`.
    pub(crate) fn receive_message(&self, out: &mut [u8]) -> io::Result<usize> {
        let (_, len) = rustix::net::recv(&self.fd, out, rustix::net::RecvFlags::DONTWAIT)?;
        Ok(len)
    }

    /// Writes `list`; on a seqpacket socket that is one message, written whole or not at all.
    pub(crate) fn write(&self, list: &[iovec]) -> Written {
        let result = match self.kind {
            Kind::Stream => calls::send(self.fd.as_fd(), list, 0),
            Kind::SeqPacket => calls::send(self.fd.as_fd(), list, libc::MSG_EOR),
            Kind::Passed { .. } => calls::write(self.fd.as_fd(), list),
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
