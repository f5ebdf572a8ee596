//! The host's side: Unix sockets, and AF_VSOCK where it is forwarded.

pub mod greeting;
pub(crate) mod io;
pub(crate) mod stream;
pub(crate) mod unix;
pub(crate) mod vsock;

use std::io::Error;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType as Kind, socket_with};

use crate::packet::SocketType;

/// How an attempt to reach a service of the host went.
#[derive(Debug)]
pub(crate) enum Dial {
    /// It is connected.
    Done(OwnedFd),
    /// It will be writable when it is decided.
    InProgress(OwnedFd),
    /// The service has its queue full: try again.
    Busy,
    /// Nobody is there.
    Refused(Error),
}

impl SocketType {
    /// The type as the host's sockets have it.
    pub(crate) fn host(self) -> Kind {
        match self {
            Self::Stream => Kind::STREAM,
            Self::SeqPacket => Kind::SEQPACKET,
        }
    }
}

/// A new socket of the host, which never waits.
fn socket(family: AddressFamily, socket_type: SocketType) -> Result<OwnedFd, Error> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(family, socket_type.host(), flags, None)?)
}

/// Takes the next client of a listening socket; `None` when there is none.
///
/// # Errors
/// The process or the system is out of descriptors or memory.
pub(crate) fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>, Error> {
    use rustix::io::Errno;
    loop {
        match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(fd) => return Ok(Some(fd)),
            Err(Errno::AGAIN) => return Ok(None),
            // The client left again, or a signal came.
            Err(Errno::CONNABORTED | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
