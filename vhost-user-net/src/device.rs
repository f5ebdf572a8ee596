//! The device: what it offers, and how its queues map to workers.
//!
//! Queue pair `n` is queues `2n` (receive) and `2n + 1` (transmit), served by worker `n`. The control
//! queue, where the front end leaves it to us, is worker 0's.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::Context as _;
use outboard_common::device::{Device, RING_FEATURES, WorkerBody};
use outboard_common::vhost_user::backend_channel::BackendChannel;
use outboard_common::warn_limited;
use outboard_common::worker::EventLoop;
use vhost::vhost_user::message::VhostUserProtocolFeatures as P;
use virtio_bindings::virtio_net as v;

use crate::cli::MTU_MIN;
use crate::config::S_ANNOUNCE;
use crate::control::MacAddr;
use crate::shared::Shared;
use crate::worker::NetWorker;
use crate::worker::switch::SwitchWorker;

/// Features that need nothing of the back end.
const OWN_FEATURES: u64 = 1 << v::VIRTIO_NET_F_MRG_RXBUF
    | 1 << v::VIRTIO_NET_F_STATUS
    | 1 << v::VIRTIO_NET_F_CTRL_VQ
    | 1 << v::VIRTIO_NET_F_CTRL_RX
    | 1 << v::VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << v::VIRTIO_NET_F_CTRL_VLAN
    | 1 << v::VIRTIO_NET_F_GUEST_ANNOUNCE;

/// Bytes of saved state at the most: long address tables, as text.
const STATE_MAX: u64 = 1 << 20;

/// One virtio-net device.
#[derive(Debug)]
pub struct NetDevice {
    shared: Arc<Shared>,
    features: u64,
}

/// Which of the optional features a device has.
#[derive(Debug, Clone, Copy, Default)]
pub struct Offers {
    /// VIRTIO_NET_F_MAC: the address is ours to give.
    pub mac: bool,
    /// VIRTIO_NET_F_CTRL_MAC_ADDR: and the driver may change it.
    pub mac_change: bool,
    /// VIRTIO_NET_F_MTU.
    pub mtu: bool,
    /// VIRTIO_NET_F_SPEED_DUPLEX.
    pub speed: bool,
}

impl NetDevice {
    /// A device around `shared`.
    #[must_use]
    pub fn new(shared: Arc<Shared>, offers: Offers) -> Self {
        let steers = shared.steers();
        let mut features = RING_FEATURES | OWN_FEATURES | shared.backend.features();
        for (on, bit) in [
            (offers.mac, v::VIRTIO_NET_F_MAC),
            (offers.mac_change, v::VIRTIO_NET_F_CTRL_MAC_ADDR),
            (offers.mtu, v::VIRTIO_NET_F_MTU),
            (offers.speed, v::VIRTIO_NET_F_SPEED_DUPLEX),
            (shared.max_pairs() > 1, v::VIRTIO_NET_F_MQ),
            (steers, v::VIRTIO_NET_F_RSS),
            (steers, v::VIRTIO_NET_F_HASH_REPORT),
            // Several senders fill a switch's receive queue, and none of them waits.
            (shared.backend.switch_port().is_none(), v::VIRTIO_NET_F_NOTF_COAL),
        ] {
            if on {
                features |= 1 << bit;
            }
        }
        Self { shared, features }
    }

    /// Plugs or unplugs the cable, at both ends.
    pub fn set_link(&self, up: bool) -> std::io::Result<()> {
        if up && !self.shared.has_network() {
            return Err(std::io::Error::other("there is no network at its other end; see the log"));
        }
        self.shared.backend.set_link(up)?;
        self.shared.set_plugged(up);
        Ok(())
    }

    /// Changes the MTU, at both ends.
    pub fn set_link_mtu(&self, mtu: u16) -> std::io::Result<()> {
        self.shared.backend.set_mtu(mtu)?;
        self.shared.change_config(|config| config.set_mtu(mtu));
        Ok(())
    }

    /// Asks the driver to announce itself to the network; false when there is none that can.
    #[must_use]
    pub fn ask_to_announce(&self) -> bool {
        let can = self.shared.has_feature(v::VIRTIO_NET_F_GUEST_ANNOUNCE);
        if can {
            self.shared.change_config(|config| {
                config.set_status(S_ANNOUNCE, true);
                true
            });
        }
        can
    }

    /// What workers share.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Device for NetDevice {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn queue_count(&self) -> u16 {
        // Pairs and the control queue: QEMU compares this with pairs, others with queues.
        self.shared.max_pairs().saturating_mul(2).saturating_add(1)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn protocol_features(&self) -> u64 {
        // Where there is no network to announce a guest to, nobody shall ask for it.
        let rarp = if self.shared.backend.queue(0).is_some() { P::RARP } else { P::empty() };
        (rarp | P::MTU).bits()
    }

    fn negotiated(&self, features: u64) {
        self.shared.negotiated(features);
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.shared.read_config(offset, out);
    }

    fn worker_of(&self, queue: u16) -> usize {
        if self.shared.control_queue() == Some(queue) { 0 } else { usize::from(queue / 2) }
    }

    fn worker(&self, worker: usize) -> anyhow::Result<WorkerBody> {
        let pair = u16::try_from(worker)?;
        if let Some(port) = self.shared.backend.switch_port() {
            anyhow::ensure!(pair < self.shared.max_pairs(), "there is no queue pair {pair}");
            let event_loop = EventLoop::new(SwitchWorker::new(self.shared.clone(), port, pair))?;
            return Ok(Box::new(move |control| event_loop.run(control)));
        }
        let worker = NetWorker::new(self.shared.clone(), pair)?;
        let event_loop = EventLoop::new(worker)?;
        Ok(Box::new(move |control| event_loop.run(control)))
    }

    fn save(&self, to: &mut dyn Write) -> anyhow::Result<()> {
        Ok(serde_json::to_writer(to, &self.shared.save())?)
    }

    fn load(&self, from: &mut dyn Read) -> anyhow::Result<()> {
        let mut text = Vec::new();
        from.take(STATE_MAX).read_to_end(&mut text)?;
        // A device that keeps no state beside its session's.
        if !text.is_empty() {
            self.shared.load(serde_json::from_slice(&text).context("the saved state is damaged")?);
        }
        Ok(())
    }

    fn save_for_successor(&self, to: &mut dyn Write, fds: &mut Vec<OwnedFd>) -> anyhow::Result<()> {
        self.save(to)?;
        if !self.shared.has_network() {
            // The successor opens the interface that has taken the place of the deleted one.
            return Ok(());
        }
        // An interface that we made goes with its last descriptor.
        for queue in (0..self.shared.max_pairs()).filter_map(|p| self.shared.backend.queue(p)) {
            fds.push(queue.try_clone_to_owned()?);
        }
        Ok(())
    }

    fn set_channel(&self, channel: Option<Arc<BackendChannel>>) {
        self.shared.set_channel(channel);
    }

    fn reset(&self) {
        self.shared.reset();
    }

    fn set_mtu(&self, mtu: u16) -> bool {
        if mtu < MTU_MIN {
            return false;
        }
        // The front end tells what it gave the guest; frames up to that size must pass.
        let wide_enough = self.shared.backend.mtu().is_some_and(|now| now >= mtu);
        let result = if wide_enough { Ok(()) } else { self.shared.backend.set_mtu(mtu) };
        if let Err(error) = &result {
            tracing::warn!(device = %self.shared.name, mtu, %error, "the back end cannot have this MTU");
            return false;
        }
        self.shared.change_config(|config| config.set_mtu(mtu));
        true
    }

    fn send_rarp(&self, mac: [u8; 6]) -> bool {
        let mac = MacAddr(mac);
        // Switches would send another station's frames here.
        if !self.shared.source.allows_station(mac) {
            warn_limited!(device = %self.shared.name, %mac, "the front end would announce an address that is not the guest's");
            return false;
        }
        crate::announce::announce(self.shared.backend.as_ref(), &self.shared, mac)
    }
}
