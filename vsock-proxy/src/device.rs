//! The device as the session sees it. Virtio 1.3, 5.10.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, ensure};
use outboard_common::device::{Device, RING_FEATURES, WorkerBody};
use outboard_common::worker::EventLoop;

use crate::config::{HostSide, VmConfig};
use crate::counters::Counters;
use crate::host::unix::{self, Listener};
use crate::host::vsock;
use crate::mux::Mux;
use crate::packet::{Port, SocketType};
use crate::sibling::Siblings;
use crate::worker::VsockWorker;

/// Packets to the guest.
pub const RX_QUEUE: u16 = 0;
/// Packets from the guest.
pub const TX_QUEUE: u16 = 1;
/// Events for the guest.
pub const EVENT_QUEUE: u16 = 2;

/// Feature bits of virtio 1.3, 5.10.3.
const VIRTIO_VSOCK_F_STREAM: u64 = 1 << 0;
const VIRTIO_VSOCK_F_SEQPACKET: u64 = 1 << 1;
const VIRTIO_VSOCK_F_NO_IMPLIED_STREAM: u64 = 1 << 2;

/// What a saved device begins with; the last byte is the version.
const STATE_MAGIC: [u8; 8] = *b"obvsock\x01";

/// The sockets that clients of the host come to; open from start to end, whether a VMM is there or
/// not. Clients that come early wait in them.
#[derive(Debug, Default)]
pub(crate) struct Listeners {
    /// Unix sockets.
    pub(crate) unix: Vec<Listener>,
    /// AF_VSOCK sockets, by the port they stand for.
    pub(crate) vsock: Vec<(Port, OwnedFd)>,
}

impl Listeners {
    fn open(host: &HostSide) -> anyhow::Result<Self> {
        match host {
            HostSide::Unix(path) => Ok(Self {
                unix: vec![
                    Listener::bind(path, SocketType::Stream)?,
                    Listener::bind(&unix::seqpacket_path(path), SocketType::SeqPacket)?,
                ],
                vsock: Vec::new(),
            }),
            HostSide::Vsock { listen, .. } => {
                let open = |&port| Ok((port, vsock::listen(port)?));
                let vsock = listen.iter().map(open).collect::<anyhow::Result<_>>()?;
                Ok(Self { unix: Vec::new(), vsock })
            }
        }
    }
}

/// A vsock device for one guest.
#[derive(Debug)]
pub struct VsockDevice {
    name: String,
    config: Arc<VmConfig>,
    listeners: Arc<Listeners>,
    siblings: Arc<Siblings>,
    counters: Counters,
    /// State was loaded: the guest has connections that we have not.
    restored: Arc<AtomicBool>,
}

impl VsockDevice {
    /// The device of `config`, its host sockets open.
    ///
    /// # Errors
    /// A host socket cannot be had.
    pub fn new(
        config: VmConfig,
        siblings: Arc<Siblings>,
        counters: Counters,
    ) -> anyhow::Result<Self> {
        let listeners = Arc::new(Listeners::open(&config.host)?);
        Ok(Self {
            name: Self::name_of(&config),
            config: Arc::new(config),
            listeners,
            siblings,
            counters,
            restored: Arc::default(),
        })
    }

    /// The name of the device of `config`.
    #[must_use]
    pub fn name_of(config: &VmConfig) -> String {
        format!("vsock{}", config.guest_cid)
    }
}

impl Device for VsockDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn queue_count(&self) -> u16 {
        3
    }

    fn max_queue_size(&self) -> u16 {
        self.config.queue_size
    }

    fn features(&self) -> u64 {
        RING_FEATURES
            | VIRTIO_VSOCK_F_STREAM
            | VIRTIO_VSOCK_F_SEQPACKET
            | VIRTIO_VSOCK_F_NO_IMPLIED_STREAM
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let config = self.config.guest_cid.get().to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = config.iter().skip(from).chain(std::iter::repeat(&0));
        for (to, byte) in out.iter_mut().zip(bytes) {
            *to = *byte;
        }
    }

    fn worker_of(&self, _queue: u16) -> usize {
        0
    }

    fn worker(&self, _worker: usize) -> anyhow::Result<WorkerBody> {
        let membership = self
            .siblings
            .join(self.config.guest_cid, &self.config.groups)
            .context("event descriptor")?;
        let mux = Mux::new(self.config.clone(), membership, self.counters.clone());
        let worker = VsockWorker::new(mux, self.listeners.clone(), self.restored.clone());
        let event_loop = EventLoop::new(worker).context("epoll")?;
        Ok(Box::new(move |control| event_loop.run(control)))
    }

    fn save(&self, to: &mut dyn Write) -> anyhow::Result<()> {
        // Connections are the host's and stay behind; the guest is told where it wakes up.
        Ok(to.write_all(&STATE_MAGIC)?)
    }

    fn load(&self, from: &mut dyn Read) -> anyhow::Result<()> {
        let mut state = Vec::new();
        from.take(64).read_to_end(&mut state)?;
        ensure!(
            state.is_empty() || state == STATE_MAGIC,
            "the state is not of a vsock device of this version"
        );
        self.restored.store(true, Ordering::Release);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
