//! What a device back end is: the two halves that every daemon implements.
//!
//! # Theory of operation
//! A [`Device`] is shared, says what it offers, and answers the session thread. Its queues are served
//! by *workers*: threads that the engine makes the first time one of their queues starts. A device
//! maps queues to workers ([`Device::worker_of`]) and hands out each worker's body
//! ([`Device::worker`]), usually an [`EventLoop`](crate::worker::EventLoop) around a
//! [`QueueHandler`](crate::worker::QueueHandler). A started [`Queue`](crate::ring::Queue) is moved
//! into its worker and moved back when it stops, so the data path shares nothing.
//!
//! The order of calls: `features` (any time), `negotiated` (after SET_FEATURES, before any queue of
//! that session starts), `worker` and then queues starting and stopping in any order, `reset` (all
//! queues stopped: the VMM left, or asked for RESET_DEVICE).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::vhost_user::backend_channel::BackendChannel;
use crate::worker::Control;

/// The ring features that the engine implements for every device: a device adds those it wants to
/// its own features. Virtio 1.3, 6.
pub const RING_FEATURES: u64 = {
    use virtio_bindings::{virtio_config as c, virtio_ring as r};
    1 << c::VIRTIO_F_VERSION_1
        | 1 << c::VIRTIO_F_RING_PACKED
        | 1 << c::VIRTIO_F_IN_ORDER
        | 1 << c::VIRTIO_F_ACCESS_PLATFORM
        | 1 << c::VIRTIO_F_RING_RESET
        | 1 << r::VIRTIO_RING_F_INDIRECT_DESC
        | 1 << r::VIRTIO_RING_F_EVENT_IDX
};

/// The body of a worker's thread: runs until its [`Control`] says that the session is over.
pub type WorkerBody = Box<dyn FnOnce(Control) + Send>;

/// Why a device refused a configuration write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The field is read-only.
    #[error("configuration bytes {offset}+{len} are read-only")]
    ReadOnly {
        /// Offset in the device's configuration space, bytes.
        offset: u32,
        /// Length in bytes.
        len: usize,
    },
    /// The value is not one that the field can have.
    #[error("a value that this configuration field cannot have")]
    BadValue,
}

/// One virtio device behind one vhost-user socket.
///
/// Methods are called on the session's thread and must not wait for a worker's I/O.
pub trait Device: Send + Sync + 'static {
    /// A short name for logs, threads and metrics, such as `blk0`.
    fn name(&self) -> &str;

    /// Virtqueues at the most; also the answer to GET_QUEUE_NUM.
    fn queue_count(&self) -> u16;

    /// Entries a virtqueue may have at the most.
    fn max_queue_size(&self) -> u16 {
        1024
    }

    /// Virtio features offered, the device's own and those of [`RING_FEATURES`] it wants. The session
    /// adds VHOST_USER_F_PROTOCOL_FEATURES and VHOST_F_LOG_ALL.
    fn features(&self) -> u64;

    /// vhost-user protocol features beyond the engine's own
    /// ([`PROTOCOL_FEATURES`](crate::vhost_user::session::PROTOCOL_FEATURES)), such as MTU or RARP.
    fn protocol_features(&self) -> u64 {
        0
    }

    /// Features of [`PROTOCOL_FEATURES`](crate::vhost_user::session::PROTOCOL_FEATURES) that this
    /// device must not offer (an example is INFLIGHT_SHMFD, where doing a request twice is wrong).
    fn withheld_protocol_features(&self) -> u64 {
        0
    }

    /// The driver's choice of virtio features.
    fn negotiated(&self, features: u64) {
        let _ = features;
    }

    /// Fills `out` from configuration space at `offset`; bytes past its end are 0.
    fn read_config(&self, offset: u32, out: &mut [u8]);

    /// Writes to configuration space. Virtio 1.3, 2.5.
    ///
    /// # Errors
    /// The bytes are not writable, or not with this value; nothing was changed.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        Err(ConfigError::ReadOnly { offset, len: data.len() })
    }

    /// Which worker serves queue `queue`. Workers are numbered from 0.
    fn worker_of(&self, queue: u16) -> usize;

    /// Makes the body of worker `worker`, on the first start of one of its queues in a session.
    ///
    /// # Errors
    /// Whatever the worker needs is not to be had; the ring stays stopped and VRING_ERR is raised.
    fn worker(&self, worker: usize) -> anyhow::Result<WorkerBody>;

    /// The back-end channel is there (`Some`), or gone. Only with BACKEND_REQ negotiated.
    fn set_channel(&self, channel: Option<Arc<BackendChannel>>) {
        let _ = channel;
    }

    /// The session is over or RESET_DEVICE came: all queues are stopped; forget the guest.
    fn reset(&self) {}

    /// The front end changed the virtio status byte (SET_STATUS). Virtio 1.3, 2.1.
    fn status(&self, status: u8) {
        let _ = status;
    }

    /// NET_SET_MTU; true if accepted.
    fn set_mtu(&self, mtu: u16) -> bool {
        let _ = mtu;
        false
    }

    /// SEND_RARP: announce `mac` on the network; true if done.
    fn send_rarp(&self, mac: [u8; 6]) -> bool {
        let _ = mac;
        false
    }

    /// Sizes of the shared memory regions (virtio 1.3, 2.10) by region id, 0 where there is none;
    /// GET_SHMEM_CONFIG's answer.
    fn shmem_regions(&self) -> Vec<u64> {
        Vec::new()
    }

    /// GET_SHMEM_CONFIG came: this front end can map.
    fn shmem_config_asked(&self) {}

    /// Writes the device's own state to `to` (DEVICE_STATE, save). All queues are stopped.
    ///
    /// # Errors
    /// Anything that makes the state unusable; the migration fails and the source goes on.
    fn save(&self, to: &mut dyn std::io::Write) -> anyhow::Result<()> {
        let _ = to;
        Ok(())
    }

    /// As [`Self::save`], for a newer daemon on this machine that gets the descriptors added to `fds` too.
    ///
    /// # Errors
    /// Anything that makes the state unusable; the front end then has to reconnect.
    fn save_for_successor(
        &self,
        to: &mut dyn std::io::Write,
        fds: &mut Vec<OwnedFd>,
    ) -> anyhow::Result<()> {
        let _ = fds;
        self.save(to)
    }

    /// Loads what [`Self::save_for_successor`] wrote, with the descriptors that came along.
    ///
    /// # Errors
    /// As [`Self::load`].
    fn load_from_predecessor(
        &self,
        from: &mut dyn std::io::Read,
        fds: Vec<OwnedFd>,
    ) -> anyhow::Result<()> {
        let _ = fds;
        self.load(from)
    }

    /// Loads what [`Self::save`] wrote. No queue has started yet.
    ///
    /// # Errors
    /// The state is damaged, or of a device that this one cannot stand in for.
    fn load(&self, from: &mut dyn std::io::Read) -> anyhow::Result<()> {
        let _ = from;
        Ok(())
    }
}
