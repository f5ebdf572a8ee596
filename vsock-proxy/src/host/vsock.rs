//! AF_VSOCK of the host's kernel: guests reach services of another CID, and its clients reach guests.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::Context as _;
use rustix::net::AddressFamily;

use super::{Dial, io as calls, socket};
use crate::packet::{Port, SocketType};

const BACKLOG: i32 = 1024;

fn family() -> AddressFamily {
    AddressFamily::from_raw(u16::try_from(libc::AF_VSOCK).unwrap_or(0))
}

/// Connects to `port` of `cid`.
pub(crate) fn dial(cid: u32, port: Port, socket_type: SocketType) -> Dial {
    let fd = match socket(family(), socket_type) {
        Ok(fd) => fd,
        Err(error) => return Dial::Refused(error),
    };
    match calls::connect_vsock(fd.as_fd(), cid, port.0) {
        Ok(()) => Dial::Done(fd),
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => Dial::InProgress(fd),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Dial::Busy,
        Err(e) => Dial::Refused(e),
    }
}

/// Listens on `port` of this machine.
///
/// # Errors
/// The kernel has no AF_VSOCK, or the port is taken.
pub(crate) fn listen(port: Port) -> anyhow::Result<OwnedFd> {
    let fd = socket(family(), SocketType::Stream).context("this kernel has no AF_VSOCK")?;
    calls::bind_vsock(fd.as_fd(), port.0)
        .with_context(|| format!("listen on port {port} of AF_VSOCK"))?;
    rustix::net::listen(&fd, BACKLOG)
        .with_context(|| format!("listen on port {port} of AF_VSOCK"))?;
    Ok(fd)
}
