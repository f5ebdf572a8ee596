//! The sockets of those who watch and steer a daemon: metrics and control.
//!
//! # Theory of operation
//! [`AdminSockets::bind`] makes the sockets while the daemon may still write to their directories.
//! After the sandbox is closed, [`AdminSockets::serve`] starts one thread that waits on both and
//! serves one connection at a time: read one request, write one answer, close. Each connection has
//! a second, so that a client that stalls delays the others and nothing else: not the daemon's end
//! either. Without either socket there is no thread.
//!
//! Metrics: a client that sends nothing gets Prometheus text; `GET /metrics` gets the same over
//! HTTP/1.0 and `GET /json` the [`Snapshot`](crate::metrics::Snapshot) as JSON, so
//! `curl --unix-socket PATH http://d/metrics` works.
//!
//! Control: one line `{"verb": argument}`, answered by one line `{"ok": value}` or
//! `{"error": "sentence"}`. The verbs are the daemon's; see [`Control`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::metrics::Registry;
use crate::warn_limited;

mod request;
mod socket;

pub use request::ControlError;

use request::{Answer, HttpRequest, Route};

/// How long one connection may take, in all.
const CONNECTION_TIME: Duration = Duration::from_secs(1);

/// How long a metrics client may stay silent before it is taken for one that only reads.
const SILENCE: Duration = Duration::from_millis(50);

/// Longest request line of the control socket, in bytes.
const CONTROL_REQUEST_MAX: usize = 64 * 1024;

/// Longest HTTP request header, in bytes.
const HTTP_REQUEST_MAX: usize = 8 * 1024;

/// Formatting needs little stack; only touched pages count anyway.
const STACK_BYTES: usize = 128 * 1024;

/// What a daemon lets its operator ask and change while it runs.
pub trait Control: Send + Sync {
    /// Answers the request `{verb: argument}`. Runs on the admin thread, so it must not touch a
    /// queue's state directly, and should return soon.
    ///
    /// # Errors
    /// [`ControlError`], which the client gets as a sentence; nothing has changed then.
    fn on_request(
        &self,
        verb: &str,
        argument: serde_json::Value,
    ) -> Result<serde_json::Value, ControlError>;
}

/// Why a socket or its thread could not be made.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The socket cannot be made.
    #[error("cannot create the {purpose} socket {}", path.display())]
    Bind {
        /// `metrics` or `control`.
        purpose: &'static str,
        /// Where it was to be.
        path: PathBuf,
        /// Why it cannot.
        source: io::Error,
    },
    /// No thread, or nothing to stop it with.
    #[error("cannot start the thread that serves metrics and control")]
    Thread(#[source] io::Error),
}

/// The sockets, bound but not served yet.
#[derive(Debug)]
pub struct AdminSockets {
    metrics: Option<UnixListener>,
    control: Option<UnixListener>,
    paths: Vec<PathBuf>,
}

impl AdminSockets {
    /// Makes the sockets that were asked for. A socket left by a daemon that is gone is replaced.
    ///
    /// The control socket is accessible to its owner alone; the metrics socket as the umask says.
    ///
    /// # Errors
    /// [`AdminError::Bind`] with the first that cannot be made.
    pub fn bind(metrics: Option<&Path>, control: Option<&Path>) -> Result<Self, AdminError> {
        let mut sockets = Self { metrics: None, control: None, paths: Vec::new() };
        if let Some(path) = metrics {
            sockets.metrics = Some(sockets.bind_one("metrics", path, None)?);
        }
        if let Some(path) = control {
            sockets.control = Some(sockets.bind_one("control", path, Some(0o600))?);
        }
        Ok(sockets)
    }

    fn bind_one(
        &mut self,
        purpose: &'static str,
        path: &Path,
        mode: Option<u32>,
    ) -> Result<UnixListener, AdminError> {
        let listener = socket::listen(path, mode).map_err(|source| AdminError::Bind {
            purpose,
            path: path.to_owned(),
            source,
        })?;
        self.paths.push(path.to_owned());
        Ok(listener)
    }

    /// Starts the thread that serves the sockets; `None` when there are none to serve.
    ///
    /// To be called when the sandbox is closed: the thread inherits its limits.
    ///
    /// # Errors
    /// [`AdminError::Thread`]
    pub fn serve(
        mut self,
        registry: Arc<Registry>,
        control: Arc<dyn Control>,
    ) -> Result<Option<AdminThread>, AdminError> {
        if self.metrics.is_none() && self.control.is_none() {
            return Ok(None);
        }
        let (stop, stopped) = UnixStream::pair().map_err(AdminError::Thread)?;
        let server = Server {
            metrics: self.metrics.take(),
            control: self.control.take(),
            stopped: stopped.into(),
            registry,
            handler: control,
        };
        let thread = thread::Builder::new()
            .name("admin".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || server.run())
            .map_err(AdminError::Thread)?;
        Ok(Some(AdminThread { stop, thread, sockets: self }))
    }
}

impl Drop for AdminSockets {
    fn drop(&mut self) {
        for path in &self.paths {
            // In a sandbox the path may be out of reach; the next daemon replaces the socket.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The running thread. Dropping it tells the thread to end and removes the sockets.
#[derive(Debug)]
pub struct AdminThread {
    /// Closing this end wakes the thread for the last time.
    stop: UnixStream,
    thread: JoinHandle<()>,
    sockets: AdminSockets,
}

impl AdminThread {
    /// Ends the thread and waits for it. Clients that are being served lose their answer.
    pub fn join(self) {
        let Self { stop, thread, sockets } = self;
        drop(stop);
        // A panic of the thread was reported by the panic hook.
        let _ = thread.join();
        drop(sockets);
    }
}

/// What the thread works with.
struct Server {
    metrics: Option<UnixListener>,
    control: Option<UnixListener>,
    stopped: OwnedFd,
    registry: Arc<Registry>,
    handler: Arc<dyn Control>,
}

impl Server {
    fn run(self) {
        loop {
            match self.wait() {
                Ok(Wake { stop: true, .. }) => return,
                Ok(wake) => {
                    if let (true, Some(listener)) = (wake.metrics, &self.metrics) {
                        self.accept(listener, Self::serve_metrics);
                    }
                    if let (true, Some(listener)) = (wake.control, &self.control) {
                        self.accept(listener, Self::serve_control);
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "metrics and control end: cannot wait for clients");
                    return;
                }
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait(&self) -> Result<Wake, Errno> {
        let mut fds = Vec::with_capacity(3);
        fds.push(PollFd::new(&self.stopped, PollFlags::IN));
        fds.extend(self.metrics.as_ref().map(|socket| PollFd::new(socket, PollFlags::IN)));
        fds.extend(self.control.as_ref().map(|socket| PollFd::new(socket, PollFlags::IN)));
        poll(&mut fds, None)?;
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        Ok(Wake {
            stop: ready.next().unwrap_or(true),
            metrics: self.metrics.is_some() && ready.next().unwrap_or(false),
            control: self.control.is_some() && ready.next().unwrap_or(false),
        })
    }

    fn accept(
        &self,
        listener: &UnixListener,
        serve: fn(&Self, &mut Connection<'_>) -> io::Result<()>,
    ) {
        let outcome = match listener.accept() {
            Ok((stream, _)) => serve(self, &mut Connection::new(stream, self.stopped.as_fd())),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => {
                // Out of descriptors, most likely: the client still waits, so do not spin on it.
                thread::sleep(Duration::from_millis(100));
                Err(error)
            }
        };
        if let Err(error) = outcome {
            warn_limited!(%error, "a client of the metrics or control socket was not served");
        }
    }

    fn serve_metrics(&self, connection: &mut Connection<'_>) -> io::Result<()> {
        let mut header = Vec::new();
        let request = loop {
            match request::parse_http(&header) {
                HttpRequest::Incomplete if header.len() < HTTP_REQUEST_MAX => {
                    let patience = if header.is_empty() { SILENCE } else { CONNECTION_TIME };
                    if !connection.read_more(&mut header, patience)? {
                        break HttpRequest::Plain;
                    }
                }
                HttpRequest::Incomplete => break HttpRequest::Plain,
                other => break other,
            }
        };
        let answer = match request {
            HttpRequest::Get(Route::Metrics) => Answer::text(self.prometheus()).http(),
            HttpRequest::Get(Route::Json) => Answer::json(self.json()?).http(),
            HttpRequest::Get(Route::Unknown) => Answer::not_found().http(),
            HttpRequest::OtherMethod => Answer::method_not_allowed().http(),
            HttpRequest::Plain | HttpRequest::Incomplete => self.prometheus().into_bytes(),
        };
        connection.write(&answer)
    }

    fn prometheus(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.registry.snapshot().write_prometheus(&mut text);
        text
    }

    fn json(&self) -> io::Result<String> {
        Ok(serde_json::to_string(&self.registry.snapshot())?)
    }

    fn serve_control(&self, connection: &mut Connection<'_>) -> io::Result<()> {
        let mut line = Vec::new();
        while !line.contains(&b'\n') && line.len() <= CONTROL_REQUEST_MAX {
            if !connection.read_more(&mut line, CONNECTION_TIME)? {
                break;
            }
        }
        // A client that looks whether anybody is there and leaves is not worth an answer.
        if line.is_empty() {
            return Ok(());
        }
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let reply = if line.len() > CONTROL_REQUEST_MAX {
            request::reply(Err(ControlError::TooLong(CONTROL_REQUEST_MAX)))
        } else {
            request::reply(
                request::parse_control(line)
                    .and_then(|(verb, argument)| self.handler.on_request(&verb, argument)),
            )
        };
        connection.write(reply.as_bytes())
    }
}

/// What woke the thread.
struct Wake {
    stop: bool,
    metrics: bool,
    control: bool,
}

/// One client, with the time it has left.
struct Connection<'a> {
    stream: UnixStream,
    /// Readable when the thread is to end.
    stopped: BorrowedFd<'a>,
    deadline: Instant,
}

impl<'a> Connection<'a> {
    fn new(stream: UnixStream, stopped: BorrowedFd<'a>) -> Self {
        Self { stream, stopped, deadline: Instant::now() + CONNECTION_TIME }
    }

    /// Waits until the client is ready for `what`; false when `patience` or the time of the connection is
    /// over before.
    fn wait(&self, what: PollFlags, patience: Duration) -> io::Result<bool> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now()).min(patience);
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds =
                [PollFd::new(&self.stream, what), PollFd::new(&self.stopped, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) if !fds[1].revents().is_empty() => {
                    return Err(io::Error::other("the daemon is leaving"));
                }
                Ok(ready) => return Ok(ready > 0),
            }
        }
    }

    /// Appends what the client sent. False when it sends no more: its end is closed, or `patience`
    /// or the time of the connection is over.
    fn read_more(&mut self, buffer: &mut Vec<u8>, patience: Duration) -> io::Result<bool> {
        if !self.wait(PollFlags::IN, patience)? {
            return Ok(false);
        }
        let mut piece = [0; 4096];
        match rustix::net::recv(&self.stream, &mut piece, RecvFlags::DONTWAIT) {
            Ok((_, length)) => {
                buffer.extend_from_slice(&piece[..length]);
                Ok(length > 0)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes it all, or fails when the time is over.
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while !bytes.is_empty() {
            if !self.wait(PollFlags::OUT, CONNECTION_TIME)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            match rustix::net::send(&self.stream, bytes, flags) {
                Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
