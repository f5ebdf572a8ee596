//! Vrings: their messages, and when they start and stop.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures as P;
use virtio_bindings::virtio_config::VIRTIO_F_RING_PACKED;
use zerocopy::IntoBytes;

use super::{F_PROTOCOL_FEATURES, Reply, RequestError, Session, VringState};
use crate::ring::{Call, InflightRegion, QueueSetup, SetupError, VringAddresses};
use crate::sys::EventFd;
use crate::warn_limited;
use crate::worker::Command;

/// What a vring waits on.
#[derive(Debug, Clone, Default)]
pub(super) enum Kick {
    /// SET_VRING_KICK has not come: the ring is stopped.
    #[default]
    None,
    /// The front end's descriptor.
    Fd(Arc<EventFd>),
    /// No descriptor: in-band kicks through one of ours.
    Own(Arc<EventFd>),
    /// No descriptor and no in-band notification: poll.
    Poll,
}

impl Kick {
    fn fd(&self) -> Option<Arc<EventFd>> {
        match self {
            Self::Fd(fd) | Self::Own(fd) => Some(fd.clone()),
            Self::None | Self::Poll => None,
        }
    }
}

/// One vring as the front end has described it so far.
#[derive(Debug)]
pub(super) struct Vring {
    pub(super) size: u16,
    pub(super) base: u32,
    pub(super) addresses: Option<VringAddresses>,
    pub(super) kick: Kick,
    pub(super) call: Option<Arc<EventFd>>,
    pub(super) err: Option<Arc<EventFd>>,
    pub(super) enabled: bool,
    /// Its queue is with a worker.
    pub(super) running: bool,
}

impl Vring {
    pub(super) fn new(size: u16) -> Self {
        Self {
            size,
            base: 0,
            addresses: None,
            kick: Kick::None,
            call: None,
            err: None,
            enabled: false,
            running: false,
        }
    }

    /// Back to what a device reset leaves.
    pub(super) fn forget_driver(&mut self) {
        self.base = 0;
        self.addresses = None;
        self.kick = Kick::None;
        self.enabled = false;
    }
}

impl Session {
    fn vring(&mut self, index: u32) -> Result<&mut Vring, RequestError> {
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        self.vrings.get_mut(at).ok_or(RequestError::NoVring(index))
    }

    /// The index as the engine counts, once `vring` found it.
    fn narrow(index: u32) -> u16 {
        u16::try_from(index).unwrap_or(u16::MAX)
    }

    /// Stops vring `index` for a change of what it runs on; `start_ready` starts it again.
    fn hold(&mut self, index: u32) -> Result<&mut Vring, RequestError> {
        self.vring(index)?;
        self.stop(Self::narrow(index));
        self.vring(index)
    }

    pub(super) fn set_vring_num(&mut self, s: VringState) -> Result<(), RequestError> {
        let max = self.device.max_queue_size();
        let size = u16::try_from(s.num).unwrap_or(0);
        let packed = self.features.is_some_and(|f| f & (1 << VIRTIO_F_RING_PACKED) != 0);
        if size == 0
            || size > max
            || (self.features.is_some() && !packed && !size.is_power_of_two())
        {
            return Err(RequestError::Refused(format!(
                "vring {} cannot have {} entries (1 to {max})",
                s.index, s.num
            )));
        }
        self.hold(s.index)?.size = size;
        Ok(())
    }

    pub(super) fn set_vring_addr(
        &mut self,
        index: u32,
        addresses: VringAddresses,
    ) -> Result<(), RequestError> {
        let vring = self.vring(index)?;
        // QEMU repeats the addresses with another log flag when migration starts and ends. We log
        // by the feature bit, so nothing changes, and nothing needs to stop.
        if vring.addresses == Some(addresses) {
            return Ok(());
        }
        self.hold(index)?.addresses = Some(addresses);
        Ok(())
    }

    pub(super) fn set_vring_base(&mut self, s: VringState) -> Result<(), RequestError> {
        self.hold(s.index)?.base = s.num;
        Ok(())
    }

    /// GET_VRING_BASE stops the ring; only a new SET_VRING_KICK starts it again.
    pub(super) fn get_vring_base(&mut self, index: u32) -> Result<Reply, RequestError> {
        let vring = self.hold(index)?;
        vring.kick = Kick::None;
        let base = vring.base;
        if let Some((region, size, packed)) = self.record_of(index) {
            region.blank_if_finished(size, packed);
        }
        Ok(Reply::Body(VringState { index, num: base }.as_bytes().to_vec()))
    }

    /// Vring `index`'s part of the inflight file, its size in entries, and whether it is packed.
    pub(super) fn record_of(&self, index: u32) -> Option<(InflightRegion, u16, bool)> {
        let (inflight, features) = (self.inflight.as_ref()?, self.features?);
        let size = self.vrings.get(usize::try_from(index).ok()?)?.size;
        let region = inflight.region_of(Self::narrow(index), size, features)?;
        Some((region, size, features & (1 << VIRTIO_F_RING_PACKED) != 0))
    }

    pub(super) fn set_vring_kick(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
    ) -> Result<(), RequestError> {
        let inband = self.has_protocol(P::INBAND_NOTIFICATIONS);
        let kick = match fd {
            Some(fd) => Kick::Fd(Arc::new(EventFd::from(fd))),
            None if inband => Kick::Own(Arc::new(
                EventFd::new().map_err(|e| RequestError::Refused(e.to_string()))?,
            )),
            None => Kick::Poll,
        };
        let vring = self.vring(index)?;
        vring.kick = kick.clone();
        if vring.running {
            self.tell(index, Command::SetKick(Self::narrow(index), kick.fd()));
        }
        Ok(())
    }

    pub(super) fn set_vring_call(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
    ) -> Result<(), RequestError> {
        let vring = self.vring(index)?;
        vring.call = fd.map(|fd| Arc::new(EventFd::from(fd)));
        if vring.running {
            let call = self.call_of(index);
            self.tell(index, Command::SetCall(Self::narrow(index), call));
        }
        Ok(())
    }

    pub(super) fn set_vring_err(
        &mut self,
        index: u32,
        fd: Option<OwnedFd>,
    ) -> Result<(), RequestError> {
        let vring = self.vring(index)?;
        vring.err = fd.map(|fd| Arc::new(EventFd::from(fd)));
        let err = vring.err.clone();
        if vring.running {
            self.tell(index, Command::SetErr(Self::narrow(index), err));
        }
        Ok(())
    }

    pub(super) fn set_vring_enable(
        &mut self,
        index: u32,
        enable: bool,
    ) -> Result<(), RequestError> {
        self.vring(index)?.enabled = enable;
        if !enable {
            self.stop(Self::narrow(index));
        }
        Ok(())
    }

    /// An in-band kick.
    pub(super) fn vring_kick(&mut self, index: u32) -> Result<(), RequestError> {
        match &self.vring(index)?.kick {
            Kick::Own(fd) | Kick::Fd(fd) => fd.signal(),
            Kick::None | Kick::Poll => {}
        }
        Ok(())
    }

    fn tell(&self, index: u32, command: Command) {
        self.pool.send(&self.device, Self::narrow(index), command);
    }

    /// How the driver of vring `index` is woken.
    fn call_of(&self, index: u32) -> Call {
        let fd = usize::try_from(index)
            .ok()
            .and_then(|i| self.vrings.get(i))
            .and_then(|v| v.call.clone());
        match (fd, &self.channel) {
            (Some(fd), _) => Call::Fd(fd),
            (None, Some(channel)) if self.has_protocol(P::INBAND_NOTIFICATIONS) => {
                let channel = channel.clone();
                Call::Message(Arc::new(move || {
                    if let Err(error) = channel.vring_call(index) {
                        tracing::debug!(%error, index, "the driver could not be woken");
                    }
                }))
            }
            _ => Call::None,
        }
    }

    /// Starts every vring that is ready and not running.
    pub(super) fn start_ready(&mut self) {
        let Some(features) = self.features else { return };
        let all_enabled = features & F_PROTOCOL_FEATURES == 0;
        for index in 0..self.device.queue_count() {
            let vring = &self.vrings[usize::from(index)];
            let ready = !vring.running
                && (vring.enabled || all_enabled)
                && !matches!(vring.kick, Kick::None);
            if let (true, Some(addresses)) = (ready, vring.addresses) {
                self.start(index, features, addresses);
            }
        }
    }

    fn start(&mut self, index: u16, features: u64, addresses: VringAddresses) {
        let vring = &self.vrings[usize::from(index)];
        let record = self.inflight.as_ref().map(|i| i.region_of(index, vring.size, features));
        let has_no_room = matches!(record, Some(None));
        let setup = QueueSetup {
            index,
            size: vring.size,
            features,
            addresses,
            base: vring.base,
            kick: vring.kick.fd(),
            call: self.call_of(u32::from(index)),
            err: vring.err.clone(),
            inflight: record.flatten(),
            memory: self.memory.clone(),
            metrics: self.metrics.get(usize::from(index)).cloned().unwrap_or_default(),
        };
        let queue = match setup.start() {
            Ok(queue) => queue,
            Err(error @ SetupError::Area { .. }) => {
                // The memory may still come; said once more at each try, so only for those who look.
                tracing::debug!(index, %error, "a vring is not ready");
                return;
            }
            Err(error) => {
                warn_limited!(index, %error, "a vring cannot start");
                return;
            }
        };
        match self.pool.start(&self.device, queue) {
            Ok(()) => {
                tracing::debug!(index, "vring started");
                if has_no_room {
                    tracing::warn!(
                        index,
                        "the inflight file has no room for this vring; its requests in flight are not recorded"
                    );
                }
                self.vrings[usize::from(index)].running = true;
            }
            Err(error) => {
                let vring = &mut self.vrings[usize::from(index)];
                tracing::error!(
                    index,
                    error = format!("{error:#}"),
                    "a vring cannot be served; it stays stopped"
                );
                vring.kick = Kick::None;
                if let Some(err) = &vring.err {
                    err.signal();
                }
            }
        }
    }

    /// Takes vring `index` back from its worker, drained, if it is running.
    pub(super) fn stop(&mut self, index: u16) {
        if self.vrings.get(usize::from(index)).is_some_and(|v| v.running) {
            self.take_back(&[index], Workers::Stay);
        }
    }

    /// Takes all running vrings back. They drain at the same time, so this takes as long as the slowest.
    pub(super) fn stop_all(&mut self) {
        self.take_back(&self.running(), Workers::Stay);
    }

    /// As [`Self::stop_all`], and ends the workers.
    pub(super) fn end_workers(&mut self) {
        self.take_back(&self.running(), Workers::End);
    }

    fn take_back(&mut self, indices: &[u16], workers: Workers) {
        // A worker that waits for the front end must let go, since the front end waits for us.
        let waited_on = self.channel.as_ref().filter(|_| !indices.is_empty());
        if let Some(channel) = waited_on {
            channel.interrupt();
        }
        let queues = match workers {
            Workers::Stay => self.pool.stop(&self.device, indices),
            Workers::End => self.pool.shut_down(&self.device, indices),
        };
        if let Some(channel) = waited_on {
            channel.resume();
        }
        for (&index, queue) in indices.iter().zip(queues) {
            let vring = &mut self.vrings[usize::from(index)];
            vring.running = false;
            match queue {
                Some(queue) => vring.base = queue.release(),
                None => tracing::error!(
                    index,
                    "a vring's worker is gone; its position is as it was at the start"
                ),
            }
            tracing::debug!(index, base = vring.base, "vring stopped");
        }
    }

    fn running(&self) -> Vec<u16> {
        (0..self.device.queue_count()).filter(|&i| self.vrings[usize::from(i)].running).collect()
    }

    /// Whether any vring is with a worker.
    pub(super) fn any_running(&self) -> bool {
        self.vrings.iter().any(|v| v.running)
    }
}

/// What becomes of the workers whose vrings are taken back.
#[derive(Debug, Clone, Copy)]
enum Workers {
    Stay,
    End,
}
