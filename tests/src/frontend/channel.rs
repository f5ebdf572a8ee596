//! The front end's side of the back-end channel: answers the daemon's own requests.
//!
//! SHMEM_MAP is answered as QEMU does it: before its reply, QEMU sends ADD_MEM_REG for the mapped
//! range over the main socket and waits until that is acknowledged. A daemon that holds a lock
//! over either deadlocks here as it would there.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, bail, ensure};
use outboard_common::sys::EventFd;
use outboard_common::vhost_user::memory::RegionInfo;
use vhost::vhost_user::message::BackendReq;

use super::FrontEnd;
use super::wire::{FLAG_NEED_REPLY, FLAG_REPLY, Message, Wire};
use crate::file_view::FileView;

/// How SHMEM_MAP is served. Either way the file is really mapped, and the guest's accesses go there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShmemPolicy {
    /// As QEMU: ADD_MEM_REG at this guest address plus the offset, then the reply; overlapping maps,
    /// inexact unmaps, files that are not open for writing and maps past the file's end are refused.
    Qemu {
        /// Guest address of the window.
        window: u64,
    },
    /// As crosvm: a plain mmap, nothing is sent back.
    Plain,
    /// Every request is refused.
    Refuse,
}

/// A range that the daemon mapped into a shared memory region.
#[derive(Debug)]
pub struct ShmemMapping {
    /// Region id.
    pub shmid: u8,
    /// Offset in the region, bytes.
    pub shm_offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset in the file, bytes.
    pub fd_offset: u64,
    /// VHOST_USER_FLAG_MAP_RW and others.
    pub flags: u64,
    /// The file.
    pub file: File,
    view: FileView,
}

impl ShmemMapping {
    fn new(message: &mut Message) -> Result<Self> {
        ensure!(message.body.len() == 40, "SHMEM_MAP of {} bytes", message.body.len());
        let fd: OwnedFd = message.fds.pop().context("SHMEM_MAP without a descriptor")?;
        let file = File::from(fd);
        let (fd_offset, len, flags) =
            (message.u64_at(8)?, message.u64_at(24)?, message.u64_at(32)?);
        let view = FileView::map(&file, fd_offset, len, flags & MAP_RW != 0)?;
        let shm_offset = message.u64_at(16)?;
        Ok(Self { shmid: message.body[0], shm_offset, len, fd_offset, flags, file, view })
    }

    /// What QEMU checks before it maps.
    fn check_as_qemu(&self) -> Result<()> {
        let flags = rustix::fs::fcntl_getfl(&self.file)?;
        ensure!(flags.contains(rustix::fs::OFlags::RDWR), "Permission denied");
        let size = self.file.metadata()?.len();
        if size == 0 {
            // QEMU takes an empty file for one that it is to fill.
            self.file.set_len(self.fd_offset + self.len)?;
        } else {
            let end = self.fd_offset + self.len;
            ensure!(size <= self.fd_offset || end <= size, "a map past the file's end");
        }
        Ok(())
    }
}

/// What the daemon asked or told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendRequest {
    /// CONFIG_CHANGE_MSG.
    ConfigChange,
    /// VRING_CALL: an in-band interrupt of this queue.
    VringCall(u32),
    /// VRING_ERR: an in-band error of this queue.
    VringErr(u32),
    /// SHMEM_MAP of offset and length in bytes.
    Map(u64, u64),
    /// SHMEM_UNMAP of offset and length in bytes.
    Unmap(u64, u64),
    /// IOTLB_MSG: the translation of this I/O virtual address is wanted, for this access.
    IotlbMiss(u64, u8),
    /// Anything else, by request code.
    Other(u32),
}

/// VHOST_USER_FLAG_MAP_RW.
const MAP_RW: u64 = 1;

pub(super) type Shared<T> = Arc<Mutex<T>>;

/// The channel and the thread that serves it.
#[derive(Debug)]
pub struct BackendChannel {
    /// What came, in order.
    pub requests: Receiver<BackendRequest>,
    mappings: Shared<Vec<ShmemMapping>>,
    calls: Shared<Vec<Option<EventFd>>>,
    gate: Arc<Gate>,
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

/// Answers wait here while it is closed.
#[derive(Debug, Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn set(&self, closed: bool) {
        *lock(&self.closed) = closed;
        self.opened.notify_all();
    }

    fn pass(&self) {
        let closed = self.opened.wait_while(lock(&self.closed), |closed| *closed);
        drop(closed.unwrap_or_else(PoisonError::into_inner));
    }
}

struct Server {
    gate: Arc<Gate>,
    wire: Wire,
    front_end: FrontEnd,
    policy: ShmemPolicy,
    requests: Sender<BackendRequest>,
    mappings: Shared<Vec<ShmemMapping>>,
    calls: Shared<Vec<Option<EventFd>>>,
}

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BackendChannel {
    pub(super) fn serve(
        socket: UnixStream,
        front_end: FrontEnd,
        policy: ShmemPolicy,
        mappings: Shared<Vec<ShmemMapping>>,
    ) -> Result<Self> {
        let (sender, requests) = channel();
        let calls = Shared::default();
        let gate = Arc::<Gate>::default();
        let wire = Wire::new(socket.try_clone()?)?;
        // The daemon may be silent for as long as it likes.
        socket.set_read_timeout(None)?;
        let server = Server {
            gate: Arc::clone(&gate),
            wire,
            front_end,
            policy,
            requests: sender,
            mappings: Arc::clone(&mappings),
            calls: Arc::clone(&calls),
        };
        let thread =
            std::thread::Builder::new().name("backend-channel".into()).spawn(move || {
                // Hanging up ends it; so does a malformed message, and the test will miss its answer.
                while let Ok(Some(message)) = server.wire.receive() {
                    if server.answer(message).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self { requests, mappings, calls, gate, socket, thread: Some(thread) })
    }

    /// Turns VRING_CALL for queue `index` into a signal on `call`.
    pub fn forward_calls(&self, index: u16, call: EventFd) {
        let mut calls = lock(&self.calls);
        let at = usize::from(index);
        if calls.len() <= at {
            calls.resize_with(at + 1, || None);
        }
        calls[at] = Some(call);
    }

    /// A VMM that is slow, or stuck: requests are carried out, and their answers wait while `held`.
    pub fn hold_answers(&self, held: bool) {
        self.gate.set(held);
    }

    /// What is mapped, for the channel that comes after this one.
    pub(super) fn shared_mappings(&self) -> Shared<Vec<ShmemMapping>> {
        Arc::clone(&self.mappings)
    }

    /// How many ranges are mapped.
    #[must_use]
    pub fn mapped(&self) -> usize {
        lock(&self.mappings).len()
    }

    /// Calls `look` with what is mapped now.
    pub fn with_mappings<T>(&self, look: impl FnOnce(&[ShmemMapping]) -> T) -> T {
        look(&lock(&self.mappings))
    }

    /// Writes what a guest would at offset `at` of its window.
    ///
    /// # Errors
    /// Nothing is mapped there, or for reading only.
    pub fn write_window(&self, at: u64, data: &[u8]) -> Result<()> {
        let mappings = lock(&self.mappings);
        let found = mappings
            .iter()
            .find(|m| at >= m.shm_offset && at + data.len() as u64 <= m.shm_offset + m.len);
        let m = found.with_context(|| format!("nothing is mapped at {at:#x}"))?;
        m.view.write(at - m.shm_offset, data)?;
        drop(mappings);
        Ok(())
    }

    /// What a guest would read at offset `at` of its window.
    ///
    /// # Errors
    /// Nothing is mapped there, or the file ends before.
    pub fn read_window(&self, at: u64, out: &mut [u8]) -> Result<()> {
        let mappings = lock(&self.mappings);
        let found = mappings
            .iter()
            .find(|m| at >= m.shm_offset && at + out.len() as u64 <= m.shm_offset + m.len);
        let m = found.with_context(|| format!("nothing is mapped at {at:#x}"))?;
        m.view.read(at - m.shm_offset, out)?;
        drop(mappings);
        Ok(())
    }

    /// Touches every page that is mapped.
    ///
    /// # Errors
    /// A file ends before its mapping does: a guest that reads there ends the VMM.
    pub fn touch_all(&self) -> Result<()> {
        lock(&self.mappings).iter().try_for_each(|m| {
            let page = |at| m.view.read(at, &mut [0]).with_context(|| format!("{m:?} at {at:#x}"));
            (0..m.len).step_by(4096).try_for_each(page)
        })
    }
}

impl Drop for BackendChannel {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        self.gate.set(false);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn is(message: &Message, request: BackendReq) -> bool {
    message.request == u32::from(request)
}

impl Server {
    fn answer(&self, mut message: Message) -> Result<()> {
        let outcome = self.handle(&mut message);
        if message.flags & FLAG_NEED_REPLY != 0 {
            let status = u64::from(outcome.is_err());
            self.gate.pass();
            self.wire.send(message.request, FLAG_REPLY, &status.to_ne_bytes(), &[])?;
        }
        Ok(())
    }

    /// What the status of the reply follows from.
    fn handle(&self, message: &mut Message) -> Result<()> {
        let request = match message.request {
            _ if is(message, BackendReq::CONFIG_CHANGE_MSG) => BackendRequest::ConfigChange,
            4 => BackendRequest::VringCall(message.u32_at(0)?),
            5 => BackendRequest::VringErr(message.u32_at(0)?),
            _ if is(message, BackendReq::SHMEM_MAP) => {
                BackendRequest::Map(message.u64_at(16)?, message.u64_at(24)?)
            }
            _ if is(message, BackendReq::SHMEM_UNMAP) => {
                BackendRequest::Unmap(message.u64_at(16)?, message.u64_at(24)?)
            }
            _ if is(message, BackendReq::IOTLB_MSG) => {
                ensure!(message.body.len() == 32 && message.body[25] == 1, "no IOTLB miss");
                BackendRequest::IotlbMiss(message.u64_at(0)?, message.body[24])
            }
            other => BackendRequest::Other(other),
        };
        let outcome = match request {
            BackendRequest::Map(..) => self.map(message),
            BackendRequest::Unmap(offset, len) => self.unmap(message, offset, len),
            BackendRequest::Other(n) => bail!("unknown request {n}"),
            BackendRequest::VringCall(index) => {
                if let Some(Some(call)) = lock(&self.calls).get(usize::try_from(index)?) {
                    call.signal();
                }
                Ok(())
            }
            _ => Ok(()),
        };
        // The test may have stopped listening.
        let _ = self.requests.send(request);
        outcome
    }

    fn map(&self, message: &mut Message) -> Result<()> {
        let mapping = ShmemMapping::new(message)?;
        ensure!(self.policy != ShmemPolicy::Refuse, "refused by policy");
        let end = mapping.shm_offset.checked_add(mapping.len).context("a range that wraps")?;
        let overlaps = lock(&self.mappings).iter().any(|m| {
            m.shmid == mapping.shmid
                && mapping.shm_offset < m.shm_offset + m.len
                && m.shm_offset < end
        });
        ensure!(mapping.len > 0 && !overlaps, "an overlapping map");
        if let ShmemPolicy::Qemu { window } = self.policy {
            mapping.check_as_qemu()?;
            self.front_end.add_region(region(window, &mapping), mapping.file.as_fd())?;
        }
        lock(&self.mappings).push(mapping);
        Ok(())
    }

    fn unmap(&self, message: &Message, offset: u64, len: u64) -> Result<()> {
        ensure!(message.body.len() == 40, "SHMEM_UNMAP of {} bytes", message.body.len());
        let shmid = message.body[0];
        let mut mappings = lock(&self.mappings);
        let at = mappings
            .iter()
            .position(|m| m.shmid == shmid && m.shm_offset == offset && m.len == len)
            .context("an unmap of what was not mapped so")?;
        let mapping = mappings.swap_remove(at);
        drop(mappings);
        if let ShmemPolicy::Qemu { window } = self.policy {
            self.front_end.remove_region(region(window, &mapping))?;
        }
        Ok(())
    }
}

fn region(window: u64, m: &ShmemMapping) -> RegionInfo {
    RegionInfo {
        guest_addr: window + m.shm_offset,
        size: m.len,
        user_addr: crate::memory::USER_BASE + window + m.shm_offset,
        mmap_offset: m.fd_offset,
    }
}
