//! A vhost-user socket: whole messages with their descriptors, in and out.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::sys::EventFd;

use super::wire::{self, HEADER_SIZE, Header, MAX_FDS, WireError};

/// Why no message came.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The front end closed the socket, between messages or in one.
    #[error("the front end left")]
    Closed,
    /// The daemon is to stop, and the front end had sent half a message.
    #[error("interrupted in the middle of a message")]
    Interrupted,
    /// What came is not the vhost-user protocol.
    #[error("not a vhost-user message: {0}")]
    Wire(#[from] WireError),
    /// The socket failed.
    #[error("socket error: {0}")]
    Io(#[from] io::Error),
}

/// A received message.
#[derive(Debug)]
pub struct Message {
    /// Its header.
    pub header: Header,
    /// Its body, `header.size` bytes.
    pub body: Vec<u8>,
    /// The descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

/// One end of a vhost-user socket.
#[derive(Debug)]
pub struct Connection {
    socket: UnixStream,
    /// Signalled when no front end may keep us waiting any more.
    interrupt: Option<EventFd>,
    /// How long the front end may leave us in the middle of a message.
    patience: Option<Timespec>,
}

impl Connection {
    /// A connection over `socket`.
    #[must_use]
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, interrupt: None, patience: None }
    }

    /// Gives up waiting for a slow front end, in the middle of a message too, once `interrupt` is
    /// signalled.
    pub fn set_interrupt(&mut self, interrupt: Option<EventFd>) {
        self.interrupt = interrupt;
    }

    /// A second descriptor of what interrupts waiting, if anything does.
    pub fn interrupt(&self) -> Option<EventFd> {
        self.interrupt.as_ref().and_then(|fd| fd.try_clone().ok())
    }

    /// Gives up on a front end that neither takes nor sends anything for `patience`, when that is waited
    /// for; what was sent or received by then is lost, and so is the connection.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = Timespec::try_from(patience).ok();
    }

    /// Waits until the socket is ready for `what`; an error when interrupted before.
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        loop {
            let mut fds = vec![PollFd::new(&self.socket, what)];
            fds.extend(self.interrupt.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            match poll(&mut fds, self.patience.as_ref()) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) if !fds[0].revents().is_empty() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::Interrupted.into()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    /// The front end left, or sent what is no message.
    pub fn receive(&self) -> Result<Message, ReceiveError> {
        let mut fds = Vec::new();
        let mut header = [0u8; HEADER_SIZE];
        self.fill(&mut header, &mut fds)?;
        let header = wire::parse_header(&header)?;
        let mut body = vec![0u8; header.size as usize];
        self.fill(&mut body, &mut fds)?;
        Ok(Message { header, body, fds })
    }

    /// Reads exactly `out.len()` bytes, and any descriptors on the way.
    fn fill(&self, out: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<(), ReceiveError> {
        let mut done = 0;
        while done < out.len() {
            let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut out[done..])];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let result = match recvmsg(&self.socket, &mut parts, &mut ancillary, flags) {
                Ok(result) => result,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => match self.wait(PollFlags::IN) {
                    Ok(()) => continue,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                        return Err(ReceiveError::Interrupted);
                    }
                    Err(e) => return Err(ReceiveError::Io(e)),
                },
                Err(rustix::io::Errno::CONNRESET) => return Err(ReceiveError::Closed),
                Err(e) => return Err(ReceiveError::Io(e.into())),
            };
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            if result.bytes == 0 {
                return Err(ReceiveError::Closed);
            }
            if result.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
                return Err(WireError::Fds { request: 0, count: fds.len() }.into());
            }
            done += result.bytes;
        }
        Ok(())
    }

    /// Sends a message with up to one descriptor.
    ///
    /// # Errors
    /// The front end is gone.
    pub fn send(&self, header: Header, body: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER_SIZE + body.len());
        bytes.extend_from_slice(zerocopy::IntoBytes::as_bytes(&header));
        bytes.extend_from_slice(body);
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [fd]);
        if let Some(fds) = &fds {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let mut done = 0;
        while done < bytes.len() {
            match sendmsg(
                &self.socket,
                &[IoSlice::new(&bytes[done..])],
                &mut ancillary,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(n) => done += n,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::AGAIN) => {
                    self.wait(PollFlags::OUT)?;
                    continue;
                }
                Err(e) => return Err(e.into()),
            }
            ancillary.clear();
        }
        Ok(())
    }

    /// The socket, to hand the session over.
    #[must_use]
    pub fn into_socket(self) -> UnixStream {
        self.socket
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
