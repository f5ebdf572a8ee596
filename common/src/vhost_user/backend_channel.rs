//! The back-end channel: requests from us to the front end, over the socket of SET_BACKEND_REQ_FD.
//!
//! # Theory of operation
//! A request that wants an answer blocks its caller, usually a worker. The front end may, before it
//! answers, send us memory changes on the main socket (QEMU does so for SHMEM_MAP); those never
//! wait for a worker, so all is well. But it may also stop our rings, which does wait for workers.
//! So the session *interrupts* the channel around stopping rings: waiting callers give up with
//! [`ChannelError::Interrupted`], and their late answers are skipped when they come.
//!
//! vhost-user specification, "Back-end message types".

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::message::BackendReq;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::connection::{Connection, ReceiveError};
use super::iotlb::IotlbBody;
use super::wire::{FLAG_NEED_REPLY, Header};
use crate::sys::EventFd;

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
    /// Answers still to come for callers that gave up.
    stale: u32,
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
        let connection = Connection::new(UnixStream::from(socket));
        Ok(Self {
            line: Mutex::new(Line { connection, stale: 0 }),
            features,
            interrupt: EventFd::new()?,
            interrupted: AtomicBool::new(false),
        })
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
        let line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
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
        let line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.connection.send(Header::new(request.into(), 0, body.len()), body, None)?;
        Ok(())
    }

    /// Sends and waits for the answer.
    fn call(
        &self,
        request: BackendReq,
        body: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), ChannelError> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if self.interrupted.load(Ordering::SeqCst) {
            return Err(ChannelError::Interrupted);
        }
        let flags = if self.features.reply_ack { FLAG_NEED_REPLY } else { 0 };
        line.connection.send(Header::new(request.into(), flags, body.len()), body, fd)?;
        if !self.features.reply_ack {
            return Ok(());
        }
        loop {
            if let Err(error) = self.wait_readable(&line.connection) {
                line.stale += 1;
                return Err(error);
            }
            let answer = line.connection.receive()?;
            if line.stale > 0 {
                line.stale -= 1;
                continue;
            }
            let code = u64::read_from_prefix(&answer.body).map_or(u64::MAX, |(code, _)| code);
            return if code == 0 { Ok(()) } else { Err(ChannelError::Refused { request, code }) };
        }
    }

    /// Waits for an answer or an interruption.
    fn wait_readable(&self, connection: &Connection) -> Result<(), ChannelError> {
        loop {
            let mut fds = [
                PollFd::new(connection, PollFlags::IN),
                PollFd::new(&self.interrupt, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(ChannelError::Io(e.into())),
            }
            if self.interrupted.load(Ordering::SeqCst) {
                return Err(ChannelError::Interrupted);
            }
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
        }
    }
}
