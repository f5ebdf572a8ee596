//! The virtio-fs device. Virtio 1.3, 5.11.
//!
//! Queue 0 is the high-priority queue (FORGET, INTERRUPT), the others are request queues, each with a
//! worker of its own. A VMM that leaves or resets the device ends the FUSE session: the next guest
//! starts with INIT and an empty inode table.

use std::fs::File;
use std::io::{BufWriter, Read, Seek as _, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use outboard_common::device::{Device, RING_FEATURES, WorkerBody};
use outboard_common::metrics::DeviceMetrics;
use outboard_common::vhost_user::backend_channel::BackendChannel;
use outboard_common::worker::EventLoop;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_bindings::virtio_config::VIRTIO_F_IN_ORDER;
use zerocopy::{Immutable, IntoBytes};

use crate::dax::ChannelWindow;
use crate::fuse::extension::Origin;
use crate::fuse::{Extension, Limits, Server};
use crate::slow_pool::{LockThreads, SlowPool};
use crate::worker::{FsWorker, Gauges};

/// Bytes of a tag in configuration space; shorter tags end with NUL.
pub const TAG_SIZE: usize = 36;

/// Request queues that a VMM may use when the operator did not say how many.
const MAX_REQUEST_QUEUES: u16 = 64;

/// First byte of a saved state: a FUSE session runs.
const STARTED: u8 = 1;
/// First byte of a saved state: the front end asked for the size of the window.
const ASKED: u8 = 2;

/// Configuration space. Virtio 1.3, 5.11.4.
#[derive(Debug, Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    tag: [u8; TAG_SIZE],
    num_request_queues: [u8; 4],
}

/// Why a tag cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TagError {
    /// A guest could not name it.
    #[error("a tag cannot be empty")]
    Empty,
    /// It does not fit into configuration space.
    #[error("the tag has {0} bytes; at most {TAG_SIZE} are possible")]
    TooLong(usize),
}

/// The name under which a guest mounts the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tag([u8; TAG_SIZE]);

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self.0.split(|&b| b == 0).next().unwrap_or(&[]);
        f.write_str(&String::from_utf8_lossy(text))
    }
}

impl std::str::FromStr for Tag {
    type Err = TagError;

    fn from_str(text: &str) -> Result<Self, TagError> {
        let mut tag = [0; TAG_SIZE];
        if text.is_empty() {
            return Err(TagError::Empty);
        }
        tag.get_mut(..text.len())
            .ok_or(TagError::TooLong(text.len()))?
            .copy_from_slice(text.as_bytes());
        Ok(Self(tag))
    }
}

/// How the device looks and works, apart from its file system.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// For logs, threads and metrics.
    pub name: String,
    /// The tag; without one, configuration space is not offered (the VMM has its own tag).
    pub tag: Option<Tag>,
    /// Request queues; `None`: what configuration space says is 1, and a VMM that decides itself may
    /// use up to 64.
    pub request_queues: Option<u16>,
    /// Slow threads at the most; 0: requests that wait hold up their queue, and locks are polled for.
    pub slow_threads: usize,
    /// How long the VMM may take to map or unmap.
    pub dax_timeout: Duration,
    /// For INIT.
    pub limits: Limits,
    /// Where the device's queues are counted.
    pub metrics: Arc<DeviceMetrics>,
}

/// A virtio-fs device in front of the file system `F`.
#[derive(Debug)]
pub struct FsDevice<F> {
    options: DeviceOptions,
    server: Arc<Server<F>>,
    pool: Arc<SlowPool<F>>,
    lock_threads: Arc<LockThreads<F>>,
    /// What has come of a way to the guest's DAX window.
    window: Mutex<WindowState>,
}

/// The window needs a channel to the front end, and a front end that asked for its size.
#[derive(Debug, Default)]
struct WindowState {
    channel: Option<Arc<BackendChannel>>,
    asked: bool,
}

impl<F: Extension> FsDevice<F> {
    /// A device that serves `fs`.
    pub fn new(fs: F, options: DeviceOptions) -> Self {
        let server = Arc::new(Server::new(fs, options.limits));
        let pool = Arc::new(SlowPool::new(server.clone(), options.slow_threads));
        let lock_threads = Arc::new(LockThreads::new(server.clone(), options.slow_threads > 0));
        Self { options, server, pool, lock_threads, window: Mutex::default() }
    }

    /// The FUSE server.
    pub fn server(&self) -> &Arc<Server<F>> {
        &self.server
    }

    /// Changes what is known of the window, and tells the file system.
    fn update_window(&self, change: impl FnOnce(&mut WindowState)) {
        let mut state = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        let channel = state.channel.clone().filter(|c| state.asked && c.features().shmem);
        drop(state);
        self.server.set_window(channel.map(|c| Arc::new(ChannelWindow::new(c)) as _));
    }

    fn load_with(&self, from: &mut dyn Read, origin: Origin) -> anyhow::Result<()> {
        let mut began = [0];
        from.read_exact(&mut began).context("the saved state is empty")?;
        self.server.reset();
        if matches!(origin, Origin::Predecessor(_)) {
            // The channel comes with the session; with it, the window is there at once.
            self.update_window(|state| state.asked = began[0] & ASKED != 0);
        }
        if began[0] & STARTED != 0 {
            let flags = self.server.file_system().load(from, origin)?;
            self.server.resume(Some(flags));
        }
        Ok(())
    }

    fn config(&self) -> Config {
        let queues = u32::from(self.options.request_queues.unwrap_or(1));
        Config {
            tag: self.options.tag.map_or([0; TAG_SIZE], |tag| tag.0),
            num_request_queues: queues.to_le_bytes(),
        }
    }
}

impl<F: Extension> Device for FsDevice<F> {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn queue_count(&self) -> u16 {
        1 + self.options.request_queues.unwrap_or(MAX_REQUEST_QUEUES)
    }

    fn features(&self) -> u64 {
        // In-order completion would let one slow request hold up all that follow it.
        RING_FEATURES & !(1 << VIRTIO_F_IN_ORDER)
    }

    fn withheld_protocol_features(&self) -> u64 {
        use vhost::vhost_user::message::VhostUserProtocolFeatures as P;
        // Requests must not be done twice, and after a crash a new process knows none of the old
        // one's inodes.
        let mut withheld = P::INFLIGHT_SHMFD;
        if !self.server.file_system().can_save() {
            withheld |= P::DEVICE_STATE;
        }
        if self.options.tag.is_none() {
            withheld |= P::CONFIG;
        }
        withheld.bits()
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let config = self.config();
        let bytes = config.as_bytes();
        let at = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let (_, rest) = bytes.split_at(at);
        let n = rest.len().min(out.len());
        let (known, unknown) = out.split_at_mut(n);
        known.copy_from_slice(&rest[..n]);
        unknown.fill(0);
    }

    fn worker_of(&self, queue: u16) -> usize {
        usize::from(queue)
    }

    fn worker(&self, worker: usize) -> anyhow::Result<WorkerBody> {
        // A queue has the worker of its number.
        let gauges = Gauges::new(&self.options.metrics, u16::try_from(worker)?);
        let worker = FsWorker::new(
            self.server.clone(),
            self.pool.clone(),
            self.lock_threads.clone(),
            gauges,
        )?;
        let event_loop = EventLoop::new(worker)?;
        Ok(Box::new(move |control| event_loop.run(control)))
    }

    fn set_channel(&self, channel: Option<Arc<BackendChannel>>) {
        if let Some(channel) = &channel {
            channel.set_timeout(self.options.dax_timeout);
        }
        self.update_window(|state| {
            // A session without a channel is over: the next front end has to ask anew.
            state.asked &= channel.is_some();
            state.channel = channel;
        });
    }

    fn shmem_regions(&self) -> Vec<u64> {
        match self.server.file_system().dax_window() {
            0 => Vec::new(),
            size => vec![size],
        }
    }

    fn shmem_config_asked(&self) {
        self.update_window(|state| state.asked = true);
    }

    fn reset(&self) {
        self.server.reset();
    }

    fn save(&self, to: &mut dyn Write) -> anyhow::Result<()> {
        to.write_all(&[if self.server.negotiated().is_some() { STARTED } else { 0 }])?;
        if self.server.negotiated().is_some() {
            self.server.file_system().save(to)?;
        }
        Ok(())
    }

    fn load(&self, from: &mut dyn Read) -> anyhow::Result<()> {
        self.load_with(from, Origin::Vmm)
    }

    fn save_for_successor(&self, to: &mut dyn Write, fds: &mut Vec<OwnedFd>) -> anyhow::Result<()> {
        let asked = self.window.lock().unwrap_or_else(PoisonError::into_inner).asked;
        let asked = if asked { ASKED } else { 0 };
        let Some(flags) = self.server.negotiated() else { return Ok(to.write_all(&[asked])?) };
        tracing::debug!("handing a session over, with FUSE flags {flags:#x}");
        to.write_all(&[asked | STARTED])?;
        // A large state goes in a file of its own: the first descriptor.
        let file = File::from(memfd_create("state", MemfdFlags::CLOEXEC)?);
        fds.push(file.try_clone()?.into());
        let mut of_state = Vec::new();
        let mut file = BufWriter::new(file);
        self.server.file_system().save_for_successor(&mut file, &mut of_state)?;
        file.flush()?;
        fds.append(&mut of_state);
        Ok(())
    }

    fn load_from_predecessor(
        &self,
        from: &mut dyn Read,
        mut fds: Vec<OwnedFd>,
    ) -> anyhow::Result<()> {
        if fds.is_empty() {
            return self.load_with(from, Origin::Predecessor(fds));
        }
        let mut file = File::from(fds.remove(0));
        file.seek(SeekFrom::Start(0))?;
        self.load_with(&mut from.chain(file), Origin::Predecessor(fds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_fit_or_say_why_not() {
        assert_eq!("".parse::<Tag>(), Err(TagError::Empty));
        assert_eq!("a".repeat(37).parse::<Tag>(), Err(TagError::TooLong(37)));
        let full: Tag = "t".repeat(36).parse().unwrap();
        assert_eq!(full.0, [b't'; 36]);
        let short: Tag = "ab".parse().unwrap();
        assert_eq!(&short.0[..3], b"ab\0");
    }
}
