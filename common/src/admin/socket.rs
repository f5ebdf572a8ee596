//! Making a listening Unix socket that is private from its first moment.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Listens on `path`, with these permission bits or what the umask leaves.
///
/// A client cannot connect before `listen`, so setting the bits before it leaves no gap.
pub(super) fn listen(path: &Path, mode: Option<u32>) -> io::Result<UnixListener> {
    remove_abandoned(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    if let Some(mode) = mode {
        rustix::fs::chmod(path, Mode::from_raw_mode(mode))?;
    }
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// Removes a socket that nobody listens on any more. Anything else at `path` stays.
fn remove_abandoned(path: &Path) -> io::Result<()> {
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        let sentence = "something that is not a socket is in its place; remove it first";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, sentence));
    }
    match probe(path) {
        Err(Errno::CONNREFUSED) => std::fs::remove_file(path),
        Err(Errno::NOENT) => Ok(()),
        _ => {
            let sentence = "another process listens on it";
            Err(io::Error::new(io::ErrorKind::AddrInUse, sentence))
        }
    }
}

/// Connects without waiting: a listener that is too busy to accept is there all the same.
fn probe(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}
