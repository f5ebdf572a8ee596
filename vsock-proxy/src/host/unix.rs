//! Unix sockets of the host: the ones we listen on, and the services that guests reach.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix};

use super::{Dial, socket};
use crate::packet::{Port, SocketType};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// Bytes of a Unix socket's path, without the final zero.
pub(crate) const PATH_MAX: usize = 107;
/// What the listener for seqpacket clients adds to the path.
const SEQPACKET_SUFFIX: &str = "_seqpacket";

/// `PATH_seqpacket`.
pub(crate) fn seqpacket_path(base: &Path) -> PathBuf {
    with_suffix(base, SEQPACKET_SUFFIX)
}

fn with_suffix(base: &Path, suffix: &str) -> PathBuf {
    let mut path = base.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// `PATH_PORT`, where the guest's connection to `port` goes.
pub(crate) fn port_path(base: &Path, port: Port) -> PathBuf {
    with_suffix(base, &format!("_{port}"))
}

/// A listening socket file, removed again with this.
#[derive(Debug)]
pub(crate) struct Listener {
    /// The socket.
    pub(crate) fd: OwnedFd,
    /// What its clients speak.
    pub(crate) socket_type: SocketType,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// The path is in use, is no socket, or cannot be written.
    pub(crate) fn bind(path: &Path, socket_type: SocketType) -> anyhow::Result<Self> {
        let name = path.display();
        let address = SocketAddrUnix::new(path).with_context(|| {
            format!("{name}: a socket's path has at most {PATH_MAX} bytes and no zero")
        })?;
        clear(path, &address, socket_type).with_context(|| format!("listen on {name}"))?;
        let fd = socket(AddressFamily::UNIX, socket_type).context("socket")?;
        rustix::net::bind(&fd, &address).with_context(|| format!("listen on {name}"))?;
        rustix::net::listen(&fd, BACKLOG).with_context(|| format!("listen on {name}"))?;
        Ok(Self { fd, socket_type, path: path.to_owned() })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Gone already is as well.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Removes what a process that is gone left at `path`.
fn clear(path: &Path, address: &SocketAddrUnix, socket_type: SocketType) -> anyhow::Result<()> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    if !meta.file_type().is_socket() {
        bail!("something that is no socket is there");
    }
    let probe = socket(AddressFamily::UNIX, socket_type).context("socket")?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED) => {
            std::fs::remove_file(path).context("remove the socket of a process that is gone")
        }
        Err(Errno::NOENT) => Ok(()),
        _ => bail!("another process listens there"),
    }
}

/// Connects to the service at `path`.
pub(crate) fn dial(path: &Path, socket_type: SocketType) -> Dial {
    let connected = socket(AddressFamily::UNIX, socket_type).and_then(|fd| {
        let address = SocketAddrUnix::new(path)?;
        rustix::net::connect(&fd, &address)?;
        Ok(fd)
    });
    match connected {
        Ok(fd) => Dial::Done(fd),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Dial::Busy,
        Err(e) => Dial::Refused(e),
    }
}
