//! What lets a guest or a daemon move on: the dirty log, the inflight file, device state.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::VhostUserProtocolFeatures as P;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use vm_memory::{FileOffset, MmapRegion};
use zerocopy::IntoBytes;

use super::super::wire::InflightBody;
use super::{DirtyLog, F_LOG_ALL, MemoryError, Reply, RequestError, Session};
use crate::device::Device;
use crate::ring::InflightRegion;
use crate::ring::inflight::region_size;
use crate::sys::EventFd;
use crate::warn_limited;

/// The inflight file that the front end keeps for us.
#[derive(Debug)]
pub(super) struct Inflight {
    pub(super) body: InflightBody,
    map: Arc<MmapRegion>,
}

impl Inflight {
    pub(super) fn map(body: InflightBody, fd: OwnedFd) -> Result<Self, RequestError> {
        let refused = |e: &dyn std::fmt::Display| {
            RequestError::Refused(format!("the inflight file cannot be used: {e}"))
        };
        let file = File::from(fd);
        let needed = body
            .mmap_offset
            .checked_add(body.mmap_size)
            .ok_or_else(|| refused(&"its size wraps around"))?;
        let len = rustix::fs::fstat(&file).map_err(|e| refused(&e))?.st_size;
        let len = u64::try_from(len).unwrap_or(0);
        let size = usize::try_from(body.mmap_size).map_err(|e| refused(&e))?;
        if len < needed || size == 0 {
            return Err(refused(&format!("it has {len} bytes and should have {needed}")));
        }
        let map = MmapRegion::from_file(FileOffset::new(file, body.mmap_offset), size)
            .map_err(|e| refused(&e))?;
        Ok(Self { body, map: Arc::new(map) })
    }

    /// The part of vring `index`, or none when the file was made for fewer or smaller rings.
    pub(super) fn region_of(&self, index: u16, size: u16, features: u64) -> Option<InflightRegion> {
        if index >= self.body.num_queues || size > self.body.queue_size {
            return None;
        }
        // Every queue's part is sized for the largest ring, so that parts do not move.
        InflightRegion::of_queue(&self.map, index, self.body.queue_size, is_packed(features))
    }

    pub(super) fn file(&self) -> Option<&File> {
        self.map.file_offset().map(FileOffset::file)
    }
}

fn is_packed(features: u64) -> bool {
    features & (1 << VIRTIO_F_RING_PACKED) != 0
}

/// A device state on its way through a pipe, by its own thread, since the front end reads and
/// writes the other end while it goes on talking to us.
#[derive(Debug)]
pub(super) struct StateTransfer {
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Session {
    /// GET_INFLIGHT_FD: makes a file for `num_queues` rings of up to `queue_size`.
    pub(super) fn get_inflight(
        &self,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<Reply, RequestError> {
        let refused =
            |e: &dyn std::fmt::Display| RequestError::Refused(format!("no inflight file: {e}"));
        if num_queues == 0
            || num_queues > self.device.queue_count()
            || queue_size == 0
            || queue_size > 32768
        {
            return Err(refused(&format!("{num_queues} queues of {queue_size} are not possible")));
        }
        // Some front ends ask before SET_FEATURES: the packed format needs more.
        let packed = self.features.is_none_or(is_packed);
        let size = region_size(queue_size, packed) as u64 * u64::from(num_queues);
        let fd =
            rustix::fs::memfd_create("inflight", MemfdFlags::CLOEXEC).map_err(|e| refused(&e))?;
        rustix::fs::ftruncate(&fd, size).map_err(|e| refused(&e))?;
        let body =
            InflightBody { mmap_size: size, mmap_offset: 0, num_queues, queue_size, padding: 0 };
        Ok(Reply::BodyFd(body.as_bytes().to_vec(), fd))
    }

    pub(super) fn set_inflight(
        &mut self,
        body: InflightBody,
        fd: Option<OwnedFd>,
    ) -> Result<(), RequestError> {
        self.stop_all();
        self.inflight = Some(Inflight::map(body, fd.ok_or(MemoryError::NoFd)?)?);
        Ok(())
    }

    /// SET_LOG_BASE. Answered with a zero when LOG_SHMFD was negotiated; a front end that sent a descriptor
    /// without it expects nothing.
    pub(super) fn set_log_base(
        &mut self,
        size: u64,
        offset: u64,
        fd: Option<OwnedFd>,
    ) -> Result<Reply, RequestError> {
        let log = DirtyLog::map(fd.ok_or(MemoryError::NoFd)?, offset, size)?;
        self.log = Some(Arc::new(log));
        self.update_log();
        Ok(if self.has_protocol(P::LOG_SHMFD) { Reply::Number(0) } else { Reply::Done })
    }

    /// Publishes the log when the features want one, takes it away when not.
    pub(super) fn update_log(&mut self) {
        let wanted = self.features.is_some_and(|f| f & F_LOG_ALL != 0);
        let log = if wanted { self.log.clone() } else { None };
        let memory = self.memory.load();
        if memory.log().map(Arc::as_ptr) != log.as_ref().map(Arc::as_ptr) {
            self.memory.publish(memory.with_log(log));
        }
    }

    /// SET_DEVICE_STATE_FD. The answer's bit 8 says that no descriptor of ours comes back.
    pub(super) fn transfer_state(
        &mut self,
        direction: u32,
        phase: u32,
        fd: Option<OwnedFd>,
    ) -> Result<Reply, RequestError> {
        let fd = fd.ok_or(MemoryError::NoFd)?;
        if direction > 1 || phase != 0 {
            return Err(RequestError::Refused(format!(
                "direction {direction} in phase {phase} does not exist"
            )));
        }
        if self.any_running() {
            return Err(RequestError::Refused(
                "device state can only move while all rings are stopped".to_owned(),
            ));
        }
        if self.transfer.as_ref().is_some_and(|t| !t.thread.is_finished()) {
            return Err(RequestError::Refused("another device state is still moving".to_owned()));
        }
        let pipe = Pipe { file: File::from(fd), shutdown: self.connection.interrupt() };
        let device = self.device.clone();
        let thread = std::thread::Builder::new()
            .name("device-state".to_owned())
            .spawn(move || if direction == 0 { save(&*device, pipe) } else { load(&*device, pipe) })
            .map_err(|e| RequestError::Refused(e.to_string()))?;
        self.transfer = Some(StateTransfer { thread });
        Ok(Reply::Number(0x100))
    }

    /// CHECK_DEVICE_STATE: 0 when the transfer went well.
    pub(super) fn check_state(&mut self) -> Result<Reply, RequestError> {
        let transfer = self
            .transfer
            .take()
            .ok_or_else(|| RequestError::Refused("no device state was moved".to_owned()))?;
        match transfer.thread.join() {
            Ok(Ok(())) => Ok(Reply::Number(0)),
            Ok(Err(error)) => {
                warn_limited!(error = format!("{error:#}"), "the device state did not make it");
                Ok(Reply::Number(1))
            }
            Err(_panic) => Ok(Reply::Number(1)),
        }
    }
}

/// The front end's end of a state's pipe. A front end that neither reads nor writes nor closes it must not
/// keep a daemon that is told to leave.
struct Pipe {
    file: File,
    shutdown: Option<EventFd>,
}

impl Pipe {
    /// Waits until the pipe is ready for `what`; an error when the session is to end before.
    fn wait(&self, what: PollFlags) -> io::Result<()> {
        loop {
            let mut fds = vec![PollFd::new(&self.file, what)];
            fds.extend(self.shutdown.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) if fds.get(1).is_some_and(|fd| !fd.revents().is_empty()) => {
                    return Err(io::Error::other("the daemon is told to leave"));
                }
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl Read for Pipe {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.wait(PollFlags::IN)?;
        self.file.read(out)
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait(PollFlags::OUT)?;
        // A pipe that is ready takes this much without waiting; see pipe(7).
        self.file.write(bytes.get(..libc::PIPE_BUF).unwrap_or(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn save(device: &dyn Device, pipe: Pipe) -> anyhow::Result<()> {
    let mut to = io::BufWriter::new(pipe);
    device.save(&mut to)?;
    to.flush()?;
    Ok(())
}

fn load(device: &dyn Device, pipe: Pipe) -> anyhow::Result<()> {
    let mut from = io::BufReader::new(pipe);
    device.load(&mut from)?;
    // The sender closes its end when all is through; what is left over is for a later version.
    io::copy(&mut from, &mut io::sink())?;
    Ok(())
}

/// A second descriptor of `file`.
pub(super) fn duplicate(file: &File) -> io::Result<OwnedFd> {
    file.as_fd().try_clone_to_owned()
}
