//! How a front end reaches us: we listen, we dial, or the socket was there before us.
//!
//! - *Listening* (`--socket-path`, or `--fd` with a listening socket): one front end at a time; when
//!   it leaves, the next. Connections that close at once (probes) are just short sessions.
//! - *Dialling* (`--client`): the VMM listens; we connect, again and again.
//! - *Connected* (`--fd` with a connected socket): one session, then the daemon is done.

use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cli::SocketChoice;
use crate::sys::{EventFd, inherited_fd};

/// Bytes of a Unix socket path, without the final NUL. unix(7).
const MAX_PATH: usize = 107;

/// Why a socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Longer than the system allows.
    #[error("socket path {0} is longer than {MAX_PATH} bytes; choose a shorter one")]
    PathTooLong(PathBuf),
    /// Somebody listens there.
    #[error("another process is listening on {0}; stop it or choose another path")]
    Taken(PathBuf),
    /// Something that is no socket is there.
    #[error("{0} exists and is not a socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// The directory is missing or not writable, or the like.
    #[error("cannot listen on {path}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The descriptor number of `--fd` is not open, or not a stream socket.
    #[error("file descriptor {fd} is not a Unix stream socket")]
    BadFd {
        /// Its number.
        fd: RawFd,
        /// What the system said.
        source: io::Error,
    },
}

/// A way to the next front end.
#[derive(Debug)]
pub enum Transport {
    /// Wait for front ends.
    Listen {
        /// The socket.
        listener: UnixListener,
        /// Its path, removed at the end; `None` when it was passed to us.
        path: Option<PathBuf>,
    },
    /// Connect to the front end's socket, as often as it takes.
    Dial(PathBuf),
    /// The front end is there already; only once.
    Connected(Option<UnixStream>),
}

fn check_length(path: &Path) -> Result<(), TransportError> {
    if path.as_os_str().len() > MAX_PATH {
        Err(TransportError::PathTooLong(path.to_owned()))
    } else {
        Ok(())
    }
}

impl Transport {
    /// The transport of the shared command-line arguments.
    ///
    /// # Errors
    /// As for [`Self::listen`], [`Self::dial`] and [`Self::from_fd`].
    pub fn open(choice: &SocketChoice) -> Result<Self, TransportError> {
        match choice {
            SocketChoice::Listen(path) => Self::listen(path, None),
            SocketChoice::Dial(path) => Self::dial(path),
            SocketChoice::Inherited(fd) => {
                let fd = inherited_fd(*fd)
                    .map_err(|source| TransportError::BadFd { fd: *fd, source })?;
                Self::from_fd(fd)
            }
        }
    }

    /// Listens on `path`. A socket file that nobody listens on any more is replaced. `mode` are the
    /// permission bits, if other than what umask leaves.
    ///
    /// # Errors
    /// The path is too long, taken, no socket, or cannot be made.
    pub fn listen(path: &Path, mode: Option<u32>) -> Result<Self, TransportError> {
        check_length(path)?;
        let failed = |source| TransportError::Bind { path: path.to_owned(), source };
        if let Ok(meta) = path.symlink_metadata() {
            if !meta.file_type().is_socket() {
                return Err(TransportError::NotASocket(path.to_owned()));
            }
            if stays_taken(path) {
                return Err(TransportError::Taken(path.to_owned()));
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        if let Some(mode) = mode {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
                .map_err(failed)?;
        }
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self::Listen { listener, path: Some(path.to_owned()) })
    }

    /// Will connect to `path`, which need not exist yet.
    ///
    /// # Errors
    /// The path is too long.
    pub fn dial(path: &Path) -> Result<Self, TransportError> {
        check_length(path)?;
        Ok(Self::Dial(path.to_owned()))
    }

    /// A socket that was passed to this process, listening or connected: SO_ACCEPTCONN tells.
    ///
    /// # Errors
    /// It is no Unix stream socket.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TransportError> {
        let number = std::os::fd::AsRawFd::as_raw_fd(&fd);
        let failed = |source: io::Error| TransportError::BadFd { fd: number, source };
        let kind = rustix::net::sockopt::socket_type(&fd).map_err(|e| failed(e.into()))?;
        if kind != rustix::net::SocketType::STREAM {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is another kind of socket",
            )));
        }
        let listening =
            rustix::net::sockopt::socket_acceptconn(&fd).map_err(|e| failed(e.into()))?;
        if listening {
            let listener = UnixListener::from(fd);
            listener.set_nonblocking(true).map_err(failed)?;
            return Ok(Self::Listen { listener, path: None });
        }
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false).map_err(failed)?;
        Ok(Self::Connected(Some(stream)))
    }

    /// Waits for the next front end. `None`: `shutdown` was signalled, or there will be none.
    ///
    /// # Errors
    /// The listening socket broke.
    pub fn next(&mut self, shutdown: &EventFd) -> io::Result<Option<UnixStream>> {
        match self {
            Self::Listen { listener, .. } => accept(listener, shutdown),
            Self::Dial(path) => Ok(dial(path, shutdown)),
            Self::Connected(stream) => Ok(stream.take()),
        }
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        if let Self::Listen { path: Some(path), .. } = self {
            // A sandbox may forbid it; the next start replaces the file anyway.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Waits for `fd` to be readable; false if `shutdown` came first or time ran out.
fn wait(fd: Option<&dyn AsFd>, shutdown: &EventFd, timeout: Option<Duration>) -> bool {
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    loop {
        let mut fds = vec![PollFd::new(shutdown, PollFlags::IN)];
        let borrowed = fd.map(AsFd::as_fd);
        if let Some(fd) = &borrowed {
            fds.push(PollFd::new(fd, PollFlags::IN));
        }
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
            Ok(_) => {}
        }
        if !fds[0].revents().is_empty() {
            return false;
        }
        return fds.get(1).is_some_and(|f| !f.revents().is_empty());
    }
}

fn is_signalled(shutdown: &EventFd) -> bool {
    let mut fds = [PollFd::new(shutdown, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(n) if n > 0)
}

fn accept(listener: &UnixListener, shutdown: &EventFd) -> io::Result<Option<UnixStream>> {
    loop {
        if !wait(Some(listener), shutdown, None) {
            return Ok(None);
        }
        match listener.accept() {
            // On Linux the new socket is blocking whatever the listening one is.
            Ok((stream, _)) => return Ok(Some(stream)),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                        | io::ErrorKind::ConnectionAborted
                ) => {}
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) =>
            {
                tracing::error!(error = %e, "cannot accept a front end; trying again in a second");
                if !wait(None, shutdown, Some(Duration::from_secs(1))) && is_signalled(shutdown) {
                    return Ok(None);
                }
            }
            Err(e) => return Err(e),
        }
    }
}

/// Dials until somebody answers, more slowly from try to try.
fn dial(path: &Path, shutdown: &EventFd) -> Option<UnixStream> {
    let mut pause = Duration::from_millis(20);
    let mut said = false;
    loop {
        if is_signalled(shutdown) {
            return None;
        }
        match UnixStream::connect(path) {
            Ok(stream) => return Some(stream),
            Err(error) if !said => {
                tracing::info!(path = %path.display(), %error, "nobody listens there yet; dialling until somebody does");
                said = true;
            }
            Err(_) => {}
        }
        wait(None, shutdown, Some(pause));
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

/// Whether somebody listens at `path`, and still does after a moment: when a confined daemon is killed, its
/// child process ends a little later than what its supervisor waits for.
fn stays_taken(path: &Path) -> bool {
    for pause in [5, 10, 20, 40, 80, 160] {
        if UnixStream::connect(path).is_err() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(pause));
    }
    UnixStream::connect(path).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_that_is_about_to_end_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let dying = UnixListener::bind(&path).unwrap();
        let end = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(60));
            drop(dying);
        });
        assert!(Transport::listen(&path, None).is_ok());
        end.join().unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let live = Transport::listen(&path, Some(0o600)).unwrap();
        assert!(matches!(Transport::listen(&path, None), Err(TransportError::Taken(_))));
        drop(live);
        assert!(!path.exists());
        std::fs::write(&path, "x").unwrap();
        assert!(matches!(Transport::listen(&path, None), Err(TransportError::NotASocket(_))));
    }

    #[test]
    fn passed_sockets_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        assert!(matches!(
            Transport::from_fd(listener.into()).unwrap(),
            Transport::Listen { path: None, .. }
        ));
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(matches!(Transport::from_fd(a.into()).unwrap(), Transport::Connected(Some(_))));
        let file = tempfile::tempfile().unwrap();
        assert!(Transport::from_fd(file.into()).is_err());
    }

    #[test]
    fn a_dialler_waits_for_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let mut dialler = Transport::dial(&path).unwrap();
        let shutdown = EventFd::new().unwrap();
        let thread = std::thread::spawn(move || dialler.next(&shutdown).unwrap().is_some());
        std::thread::sleep(Duration::from_millis(50));
        let listener = UnixListener::bind(&path).unwrap();
        listener.accept().unwrap();
        assert!(thread.join().unwrap());
    }

    #[test]
    fn shutdown_ends_every_wait() {
        let dir = tempfile::tempdir().unwrap();
        let shutdown = EventFd::new().unwrap();
        shutdown.signal();
        let path = dir.path().join("s");
        assert!(Transport::listen(&path, None).unwrap().next(&shutdown).unwrap().is_none());
        assert!(Transport::dial(&path).unwrap().next(&shutdown).unwrap().is_none());
    }
}
