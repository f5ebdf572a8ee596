//! The back-end channel: requests from us to the front end, over the socket of SET_BACKEND_REQ_FD.
//!
//! # Theory of operation
//! A request that wants an answer blocks its caller, usually a worker. The front end may, before it
//! answers, send us memory changes on the main socket (QEMU does so for SHMEM_MAP); those never
//! wait for a worker, so all is well. But it may also stop our rings, which does wait for workers.
//! So the session *interrupts* the channel around stopping rings: waiting callers give up with
//! [`ChannelError::Interrupted`], and their late answers are skipped when they come.
//!
//! A front end that does not answer at all must not hold a queue up for ever. A caller gives up after the
//! time that the channel allows ([`ChannelError::Silent`]); until some answer comes nothing more is sent, and
//! callers are refused at once. With the first late answer all is well again.
//!
//! vhost-user specification, "Back-end message types".

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::BackendReq;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::connection::{Connection, ReceiveError};
use super::iotlb::IotlbBody;
use super::wire::{FLAG_NEED_REPLY, Header};
use crate::sys::EventFd;

/// How long a front end may take for an answer, if nothing else was asked for.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Answers that may be outstanding for callers that gave up; with more, nothing is sent. Each such request
/// waits in the socket of a front end that does not read, and the socket must not fill up.
const MAX_LATE: u32 = 64;

/// Why a request on the channel failed.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The rings are being stopped: give up what you do and let go of the queue.
    #[error("interrupted because the rings are being stopped")]
    Interrupted,
    /// The front end refused.
    #[error("the front end refused {request:?} with code {code}")]
    Refused {
        /// What was asked.
        request: BackendReq,
        /// Its answer, not 0.
        code: u64,
    },
    /// The front end does not answer. The request may have been carried out, or may be later.
    #[error("the front end does not answer")]
    Silent,
    /// The front end did not agree to this kind of request.
    #[error("the front end did not negotiate {0:?}")]
    NotNegotiated(BackendReq),
    /// The channel broke.
    #[error("the back-end channel broke: {0}")]
    Broken(#[from] ReceiveError),
    /// The channel broke on our side.
    #[error("the back-end channel broke: {0}")]
    Io(#[from] io::Error),
}

/// "MMAP request", the body of SHMEM_MAP and SHMEM_UNMAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ShmemMap {
    /// Shared memory region id.
    pub shmid: u8,
    /// 0.
    pub padding: [u8; 7],
    /// Where in the file, bytes.
    pub fd_offset: u64,
    /// Where in the region, bytes.
    pub shm_offset: u64,
    /// Bytes.
    pub len: u64,
    /// Bit 0: writable.
    pub flags: u64,
}

/// What the front end agreed to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ChannelFeatures {
    /// REPLY_ACK: requests can be answered.
    pub reply_ack: bool,
    /// BACKEND_SEND_FD.
    pub send_fd: bool,
    /// SHMEM.
    pub shmem: bool,
    /// CONFIG.
    pub config: bool,
}

#[derive(Debug)]
struct Line {
    connection: Connection,
    /// How long callers wait for an answer.
    timeout: Duration,
    /// Answers still to come for callers that gave up.
    late: u32,
    /// The last answer that was waited for did not come in time, and none has come since.
    silent: bool,
    /// A message was cut short, so that nothing after it makes sense.
    broken: bool,
}

/// The channel. Shared by the session and the workers.
#[derive(Debug)]
pub struct BackendChannel {
    line: Mutex<Line>,
    features: ChannelFeatures,
    interrupt: EventFd,
    interrupted: AtomicBool,
}

impl BackendChannel {
    /// A channel over the socket that SET_BACKEND_REQ_FD brought.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(socket: OwnedFd, features: ChannelFeatures) -> io::Result<Self> {
        let mut connection = Connection::new(UnixStream::from(socket));
        connection.set_patience(ANSWER_TIMEOUT);
        let line =
            Line { connection, timeout: ANSWER_TIMEOUT, late: 0, silent: false, broken: false };
        Ok(Self {
            line: Mutex::new(line),
            features,
            interrupt: EventFd::new()?,
            interrupted: AtomicBool::new(false),
        })
    }

    /// Has callers from now on wait for an answer for at most `timeout`.
    pub fn set_timeout(&self, timeout: Duration) {
        let mut line = self.lock();
        line.timeout = timeout;
        line.connection.set_patience(timeout);
    }

    /// Goes on with a channel on which `late` answers are still to come, see [`Self::late_answers`].
    pub fn expect_late(&self, late: u32) {
        self.lock().late = late;
    }

    /// Answers still to come for callers that gave up.
    #[must_use]
    pub fn late_answers(&self) -> u32 {
        self.lock().late
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the front end agreed to.
    #[must_use]
    pub fn features(&self) -> ChannelFeatures {
        self.features
    }

    /// A second descriptor of the socket, to hand the session over.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn duplicate_socket(&self) -> io::Result<OwnedFd> {
        let line = self.lock();
        line.connection.as_fd().try_clone_to_owned()
    }

    /// Makes callers that wait give up, and further ones too, until [`Self::resume`].
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
        self.interrupt.signal();
    }

    /// Ends an interruption.
    pub fn resume(&self) {
        self.interrupted.store(false, Ordering::SeqCst);
        self.interrupt.drain();
    }

    /// Whether callers are to give up.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }

    /// Asks for the translation of `iova`, which comes as a message on the main socket.
    ///
    /// # Errors
    /// The channel broke.
    pub fn iotlb_miss(&self, iova: u64, perm: u8) -> Result<(), ChannelError> {
        let body = IotlbBody {
            iova,
            size: 0,
            user_addr: 0,
            perm,
            kind: super::iotlb::TYPE_MISS,
            padding: [0; 6],
        };
        self.post(BackendReq::IOTLB_MSG, body.as_bytes())
    }

    /// Tells the front end that configuration space changed, so that it asks again and tells the
    /// driver. Does not wait for an answer.
    ///
    /// # Errors
    /// CONFIG was not negotiated, or the channel broke.
    pub fn config_changed(&self) -> Result<(), ChannelError> {
        if !self.features.config {
            return Err(ChannelError::NotNegotiated(BackendReq::CONFIG_CHANGE_MSG));
        }
        self.post(BackendReq::CONFIG_CHANGE_MSG, &[])
    }

    /// In-band notification of used buffers in vring `index`.
    ///
    /// # Errors
    /// The channel broke.
    pub fn vring_call(&self, index: u32) -> Result<(), ChannelError> {
        self.post(BackendReq::VRING_CALL, super::wire::VringState { index, num: 0 }.as_bytes())
    }

    /// In-band notification that the guest broke vring `index`.
    ///
    /// # Errors
    /// The channel broke.
    pub fn vring_err(&self, index: u32) -> Result<(), ChannelError> {
        self.post(BackendReq::VRING_ERR, super::wire::VringState { index, num: 0 }.as_bytes())
    }

    /// Has the front end map a part of `file` into a shared memory region of the guest, and waits
    /// until it has.
    ///
    /// # Errors
    /// SHMEM was not negotiated; the front end refused; the rings are being stopped.
    pub fn shmem_map(&self, map: &ShmemMap, file: BorrowedFd<'_>) -> Result<(), ChannelError> {
        if !self.features.shmem || !self.features.send_fd {
            return Err(ChannelError::NotNegotiated(BackendReq::SHMEM_MAP));
        }
        self.call(BackendReq::SHMEM_MAP, map.as_bytes(), Some(file))
    }

    /// Has the front end unmap what [`Self::shmem_map`] mapped, and waits until it has.
    ///
    /// # Errors
    /// As for [`Self::shmem_map`].
    pub fn shmem_unmap(&self, map: &ShmemMap) -> Result<(), ChannelError> {
        if !self.features.shmem {
            return Err(ChannelError::NotNegotiated(BackendReq::SHMEM_UNMAP));
        }
        self.call(BackendReq::SHMEM_UNMAP, map.as_bytes(), None)
    }

    /// Sends without wanting an answer.
    fn post(&self, request: BackendReq, body: &[u8]) -> Result<(), ChannelError> {
        self.send(&mut self.lock(), request, 0, body, None)
    }

    fn send(
        &self,
        line: &mut Line,
        request: BackendReq,
        flags: u32,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ChannelError> {
        if line.broken {
            return Err(ChannelError::Io(io::ErrorKind::BrokenPipe.into()));
        }
        let header = Header::new(request.into(), flags, body.len());
        line.connection.send(header, body, fd).inspect_err(|_| line.broken = true)?;
        Ok(())
    }

    /// The next answer, of which at least the beginning is here.
    fn receive(line: &mut Line) -> Result<u64, ChannelError> {
        let answer = line.connection.receive().inspect_err(|_| line.broken = true)?;
        line.silent = false;
        Ok(u64::read_from_prefix(&answer.body).map_or(u64::MAX, |(code, _)| code))
    }

    /// Takes the late answers that are here.
    fn take_late(&self, line: &mut Line) -> Result<(), ChannelError> {
        while line.late > 0 && !line.broken && self.is_readable(&line.connection, Duration::ZERO)? {
            Self::receive(line)?;
            line.late -= 1;
        }
        Ok(())
    }

    /// Sends and waits for the answer.
    fn call(
        &self,
        request: BackendReq,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ChannelError> {
        let mut line = self.lock();
        if self.is_interrupted() {
            return Err(ChannelError::Interrupted);
        }
        self.take_late(&mut line)?;
        if line.silent || line.late >= MAX_LATE {
            return Err(ChannelError::Silent);
        }
        let flags = if self.features.reply_ack { FLAG_NEED_REPLY } else { 0 };
        self.send(&mut line, request, flags, body, fd)?;
        if !self.features.reply_ack {
            return Ok(());
        }
        let deadline = Instant::now() + line.timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.is_readable(&line.connection, left) {
                Ok(true) => {}
                Ok(false) => {
                    line.late += 1;
                    line.silent = true;
                    let seconds = line.timeout.as_secs_f32();
                    tracing::warn!(?request, "the front end has not answered for {seconds} s");
                    return Err(ChannelError::Silent);
                }
                Err(error) => {
                    line.late += 1;
                    return Err(error);
                }
            }
            let code = Self::receive(&mut line)?;
            if line.late > 0 {
                line.late -= 1;
                continue;
            }
            return if code == 0 { Ok(()) } else { Err(ChannelError::Refused { request, code }) };
        }
    }

    /// Waits for an answer, an interruption, or the end of `timeout` (false).
    fn is_readable(
        &self,
        connection: &Connection,
        timeout: Duration,
    ) -> Result<bool, ChannelError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).ok();
            let mut fds = [
                PollFd::new(connection, PollFlags::IN),
                PollFd::new(&self.interrupt, PollFlags::IN),
            ];
            let ready = match poll(&mut fds, left.as_ref()) {
                Ok(ready) => ready,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(ChannelError::Io(e.into())),
            };
            if self.is_interrupted() {
                return Err(ChannelError::Interrupted);
            }
            if ready == 0 || !fds[0].revents().is_empty() {
                return Ok(ready != 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn reply(peer: &mut UnixStream, code: u64) {
        let header = Header::new(BackendReq::SHMEM_UNMAP.into(), 4, 8);
        peer.write_all(header.as_bytes()).unwrap();
        peer.write_all(code.as_bytes()).unwrap();
    }

    #[test]
    fn who_does_not_answer_is_asked_no_more_until_something_comes() {
        let (ours, mut peer) = UnixStream::pair().unwrap();
        let features = ChannelFeatures { reply_ack: true, shmem: true, ..Default::default() };
        let channel = BackendChannel::new(ours.into(), features).unwrap();
        channel.set_timeout(Duration::from_millis(30));
        let map =
            ShmemMap { shmid: 0, padding: [0; 7], fd_offset: 0, shm_offset: 0, len: 1, flags: 0 };
        let start = Instant::now();
        assert!(matches!(channel.shmem_unmap(&map), Err(ChannelError::Silent)));
        assert!(start.elapsed() >= Duration::from_millis(30));
        for _ in 0..1000 {
            assert!(matches!(channel.shmem_unmap(&map), Err(ChannelError::Silent)));
        }
        assert_eq!(channel.late_answers(), 1, "only one was sent");
        // The late answer, and one for the next request.
        reply(&mut peer, 1);
        reply(&mut peer, 0);
        channel.shmem_unmap(&map).unwrap();
        assert_eq!(channel.late_answers(), 0);
        let mut sent = vec![0; 2 * (size_of::<Header>() + size_of::<ShmemMap>())];
        peer.read_exact(&mut sent).unwrap();
        // Half an answer makes the channel useless, and costs no more time than none.
        peer.write_all(&[0; 5]).unwrap();
        assert!(matches!(channel.shmem_unmap(&map), Err(ChannelError::Broken(_))));
        assert!(matches!(channel.shmem_unmap(&map), Err(ChannelError::Io(_))));
    }
}
