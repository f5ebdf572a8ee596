//! A new daemon takes the sessions of an old one over, and the guest notices a pause.
//!
//! # Theory of operation
//! Both are started with the same `--handover-socket PATH`. The old one listens there. The new one, before
//! it opens anything, connects; the old one then stops all rings with their work done, turns each session
//! into data and descriptors ([`SavedSession`]), sends them with its listening sockets and its devices'
//! own state, and ends. The end of the connection tells the new one that the old one, its locks
//! included, is gone. It opens what it serves, resumes the sessions, and listens at PATH for its own
//! successor. Front ends stay connected all along: their sockets never close.
//!
//! On the wire: the new one says [`GREETING`], so that whoever else connects (somebody who looks whether the
//! socket is alive) ends no daemon. The old one answers with 8 bytes, the length of the text and the
//! number of descriptors, then the descriptors, [`FDS_AT_ONCE`] with each byte of padding, then the
//! text, JSON.

use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::io::{IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::cli::SocketChoice;
use crate::daemon::Endpoint;
use crate::device::Device;
use crate::transport::{Transport, TransportError};
use crate::vhost_user::session::{SavedSession, SessionOptions};
use crate::warn_limited;

/// What a successor says first.
const GREETING: &[u8] = b"outboard: take over\n";
/// How long it may take to say it. Others wait meanwhile.
const GREETING_TIME: Duration = Duration::from_secs(1);
/// How long to wait after a connection that could not be accepted: out of descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Descriptors in one message; the kernel's limit is 253.
const FDS_AT_ONCE: usize = 64;
/// Bytes of text and descriptors at the most: a daemon of 64 devices with large states stays below.
const MAX_TEXT: usize = 64 << 20;
const MAX_FDS: usize = 16_384;

/// One endpoint on its way.
#[derive(Debug, Serialize, Deserialize)]
struct Item {
    /// The device's name.
    name: String,
    /// Which descriptor is the listening socket.
    listener: Option<usize>,
    /// The session, if a front end is there, and where its descriptors are in the list.
    session: Option<(SavedSession, std::ops::Range<usize>)>,
    /// The device's own state, as [`Device::save`](crate::device::Device::save) wrote it.
    state: Vec<u8>,
    /// Where the device's own descriptors are in the list.
    #[serde(default)]
    device_fds: std::ops::Range<usize>,
}

/// A device's own state, with its descriptors.
#[derive(Debug, Default)]
pub(crate) struct DeviceState {
    pub(crate) state: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Parcel {
    items: Vec<Item>,
}

/// What one endpoint inherits.
#[derive(Debug)]
pub struct Inherited {
    pub(crate) session: SavedSession,
    pub(crate) fds: Vec<OwnedFd>,
    pub(crate) state: Vec<u8>,
    pub(crate) device_fds: Vec<OwnedFd>,
}

/// What came from an old daemon.
#[derive(Debug, Default)]
pub struct TakenOver {
    items: Vec<Item>,
    fds: Vec<Option<OwnedFd>>,
}

impl TakenOver {
    /// Takes everything over from the daemon that listens on `path`; empty when there is none.
    /// Returns when that daemon has ended.
    ///
    /// # Errors
    /// There is one, but what it sent cannot be used.
    pub fn from(path: &Path) -> anyhow::Result<Self> {
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(Self::default());
            }
            Err(e) => {
                return Err(e).with_context(|| {
                    format!("cannot reach the daemon to take over at {}", path.display())
                });
            }
        };
        let taken = receive(stream)
            .with_context(|| format!("taking over from the daemon at {}", path.display()))?;
        tracing::info!(endpoints = taken.items.len(), "took over from the daemon before");
        Ok(taken)
    }

    /// The endpoint of `device`: with the socket and the session that the daemon before left, or else
    /// with a socket made as `choice` says.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn endpoint(
        &mut self,
        device: Arc<dyn Device>,
        choice: &SocketChoice,
        options: SessionOptions,
    ) -> Result<Endpoint, TransportError> {
        let path = match choice {
            SocketChoice::Listen(path) => Some(path.clone()),
            SocketChoice::Dial(_) | SocketChoice::Inherited(_) => None,
        };
        let transport = match self.transport(device.name(), path) {
            Some(transport) => transport,
            None => Transport::open(choice)?,
        };
        let inherited = self.session(device.name());
        Ok(Endpoint { inherited, ..Endpoint::new(device, transport, options) })
    }

    /// Duplicates of the descriptors that the device `name` left, for what has to be opened before the
    /// session goes on; none if there are none.
    #[must_use]
    pub fn device_fds(&self, name: &str) -> Vec<OwnedFd> {
        let item = self.items.iter().find(|i| i.name == name);
        let fds = item.and_then(|i| self.fds.get(i.device_fds.clone())).unwrap_or_default();
        // One that cannot be duplicated is opened anew, as if it had not come.
        fds.iter().flatten().filter_map(|fd| fd.try_clone().ok()).collect()
    }

    /// The listening socket of the device `name`, if it came.
    pub fn transport(&mut self, name: &str, path: Option<PathBuf>) -> Option<Transport> {
        let at = self.items.iter().find(|i| i.name == name)?.listener?;
        let fd = self.fds.get_mut(at)?.take()?;
        Some(Transport::Listen { listener: UnixListener::from(fd), path })
    }

    /// The session of the device `name`, if a front end was there.
    pub fn session(&mut self, name: &str) -> Option<Inherited> {
        let at = self.items.iter().position(|i| i.name == name && i.session.is_some())?;
        let item = &mut self.items[at];
        let (session, range) = item.session.take()?;
        let state = std::mem::take(&mut item.state);
        let device_fds = item.device_fds.clone();
        let mut take = |range: std::ops::Range<usize>| -> Option<Vec<OwnedFd>> {
            self.fds.get_mut(range)?.iter_mut().map(Option::take).collect()
        };
        Some(Inherited { session, fds: take(range)?, state, device_fds: take(device_fds)? })
    }
}

/// The old daemon's side: listens for its successor, and collects what sessions leave.
#[derive(Debug)]
pub struct Handover {
    listener: UnixListener,
    /// A successor is here: sessions that end are to be saved, not closed.
    wanted: AtomicBool,
    parcel: Mutex<(Parcel, Vec<OwnedFd>)>,
}

impl Handover {
    /// Listens on `path` for a successor.
    ///
    /// # Errors
    /// The socket cannot be made there.
    pub fn listen(path: &Path) -> anyhow::Result<Arc<Self>> {
        let mut transport = Transport::listen(path, Some(0o600))?;
        let Transport::Listen { listener, path } = &mut transport else {
            anyhow::bail!("no listening socket")
        };
        // The successor replaces the file; we must not remove it when we end after that.
        path.take();
        let listener = listener.try_clone()?;
        listener.set_nonblocking(false)?;
        Ok(Arc::new(Self { listener, wanted: AtomicBool::new(false), parcel: Mutex::default() }))
    }

    /// Waits for a successor, on a thread of its own.
    pub(crate) fn wait(&self) -> UnixStream {
        loop {
            let greeted = self.listener.accept().inspect_err(|_| std::thread::sleep(ACCEPT_PAUSE));
            match greeted.and_then(|(stream, _)| greeted_by(stream)) {
                Ok(stream) => {
                    self.wanted.store(true, Ordering::SeqCst);
                    return stream;
                }
                Err(error) => {
                    warn_limited!(%error, "who came to the hand-over socket is no successor");
                }
            }
        }
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// Adds an endpoint.
    pub(crate) fn add(
        &self,
        name: &str,
        listener: Option<&UnixListener>,
        session: Option<(SavedSession, Vec<OwnedFd>)>,
        device: DeviceState,
    ) -> io::Result<()> {
        let listener = listener.map(UnixListener::try_clone).transpose()?;
        let mut parcel = self.parcel.lock().unwrap_or_else(PoisonError::into_inner);
        let (Parcel { items }, fds) = &mut *parcel;
        let listener = listener.map(|l| {
            fds.push(l.into());
            fds.len() - 1
        });
        let session = session.map(|(session, mut of_session)| {
            let start = fds.len();
            fds.append(&mut of_session);
            (session, start..fds.len())
        });
        let start = fds.len();
        fds.extend(device.fds);
        let device_fds = start..fds.len();
        let state = device.state;
        items.push(Item { name: name.to_owned(), listener, session, state, device_fds });
        Ok(())
    }

    /// Sends everything to the successor, which then waits for the end of this process.
    pub(crate) fn send(&self, mut stream: &UnixStream) -> anyhow::Result<()> {
        let parcel = self.parcel.lock().unwrap_or_else(PoisonError::into_inner);
        let (parcel, fds) = &*parcel;
        let text = serde_json::to_vec(parcel)?;
        stream.write_all(&u32::try_from(text.len())?.to_ne_bytes())?;
        stream.write_all(&u32::try_from(fds.len())?.to_ne_bytes())?;
        for some in fds.chunks(FDS_AT_ONCE) {
            let borrowed: Vec<_> = some.iter().map(AsFd::as_fd).collect();
            let mut space =
                [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(FDS_AT_ONCE))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            ensure!(
                ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)),
                "too many descriptors in one message"
            );
            sendmsg(stream, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL)?;
        }
        stream.write_all(&text)?;
        Ok(())
    }
}

/// The connection of a successor that says so.
fn greeted_by(mut stream: UnixStream) -> io::Result<UnixStream> {
    stream.set_read_timeout(Some(GREETING_TIME))?;
    let mut said = [0; GREETING.len()];
    stream.read_exact(&mut said)?;
    if said != GREETING {
        return Err(io::Error::other("it says something else"));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

fn number(stream: &mut UnixStream) -> anyhow::Result<usize> {
    let mut bytes = [0u8; 4];
    stream.read_exact(&mut bytes)?;
    Ok(usize::try_from(u32::from_ne_bytes(bytes))?)
}

fn receive(mut stream: UnixStream) -> anyhow::Result<TakenOver> {
    stream.write_all(GREETING)?;
    let (text_len, fd_count) = (number(&mut stream)?, number(&mut stream)?);
    ensure!(text_len <= MAX_TEXT && fd_count <= MAX_FDS, "what it sent is too large to be true");
    let mut fds = Vec::new();
    while fds.len() < fd_count {
        let mut byte = [0u8];
        let mut space = [MaybeUninit::<u8>::uninit(); rustix::cmsg_space!(ScmRights(FDS_AT_ONCE))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &stream,
            &mut [IoSliceMut::new(&mut byte)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let before = fds.len();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(some) = message {
                fds.extend(some);
            }
        }
        ensure!(got.bytes == 1 && fds.len() > before, "it ended in the middle");
    }
    let mut text = vec![0u8; text_len];
    stream.read_exact(&mut text)?;
    let parcel: Parcel = serde_json::from_slice(&text).context("it is of another version")?;
    // The end of the stream is the end of the old daemon, and of its locks.
    stream.read_to_end(&mut Vec::new())?;
    Ok(TakenOver { items: parcel.items, fds: fds.into_iter().map(Some).collect() })
}
