//! The vhost-user session: one front end's requests, carried out on one device.
//!
//! # Theory of operation
//! A [`Session`] is a value: negotiated features, memory table, vrings, inflight file, log, channel.
//! Requests change it one by one, in whatever order they come; after each, every vring that has
//! become ready is started and every one that must not run has been stopped before the answer goes
//! out. A vring is *ready* when SET_FEATURES came, its size and addresses are known and in guest
//! memory, it was kicked off by SET_VRING_KICK, and it is enabled (by SET_VRING_ENABLE, or from the
//! start when PROTOCOL_FEATURES was not negotiated). Only a ready vring is with a worker; all others
//! are here.
//!
//! A request that cannot be done is answered as the specification says (non-zero acknowledgement, an
//! empty configuration, a reply of zero size) and otherwise forgotten. Only a stream that is no
//! vhost-user any more ends the session, and never the daemon.
//!
//! Rooms: this file has the loop and the table of requests; `vring` starts and stops rings;
//! `migration` has the log, the inflight file and device state; `state` saves and resumes.

mod migration;
mod state;
mod vring;

pub use state::{SavedSession, SavedVring};

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::VhostUserProtocolFeatures as P;
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use zerocopy::IntoBytes;

use self::migration::{Inflight, StateTransfer};
use self::vring::{Kick, Vring};
use super::backend_channel::{BackendChannel, ChannelFeatures};
use super::connection::{Connection, Message, ReceiveError};
use super::iotlb::{Iotlb, IotlbBody};
use super::memory::{
    DirtyLog, GuestMemory, MAX_MEM_SLOTS, MemoryError, Region, RegionInfo, SharedMemory,
};
use super::wire::{self, ConfigHeader, FLAG_REPLY, Header, Request, VringState};
use crate::cli::{SocketArgs, WorkerArgs};
use crate::device::Device;
use crate::metrics::QueueMetrics;
use crate::sys::EventFd;
use crate::warn_limited;
use crate::worker::{WorkerOptions, WorkerPool};

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_F_LOG_ALL.
pub const F_LOG_ALL: u64 = 1 << 26;

/// The protocol features that the engine has for every device.
pub const PROTOCOL_FEATURES: u64 = P::MQ.bits()
    | P::LOG_SHMFD.bits()
    | P::REPLY_ACK.bits()
    | P::BACKEND_REQ.bits()
    | P::CONFIG.bits()
    | P::BACKEND_SEND_FD.bits()
    | P::INFLIGHT_SHMFD.bits()
    | P::RESET_DEVICE.bits()
    | P::CONFIGURE_MEM_SLOTS.bits()
    | P::STATUS.bits()
    | P::DEVICE_STATE.bits();

/// Configuration space, the vhost-user limit in bytes.
const MAX_CONFIG: u32 = 4096;
/// Bytes of the answer to GET_SHMEM_CONFIG: a count and 256 sizes.
const SHMEM_CONFIG_SIZE: usize = 8 + 8 * 256;
/// A front end that was silent for so long has set its devices up.
const SETTLING: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// How a session behaves beyond what its device says.
#[derive(Debug, Clone, Default)]
pub struct SessionOptions {
    /// For the device's worker threads.
    pub workers: WorkerOptions,
    /// Offer INBAND_NOTIFICATIONS. Off by default: UML uses it whenever it is offered, and then every
    /// kick is a message with an answer.
    pub inband_notifications: bool,
    /// Offer VIRTIO_F_ACCESS_PLATFORM if the device has it. Off by default: a driver that sees it uses
    /// the platform's DMA interface, which UML does not have, so that its queues fail.
    pub iommu_platform: bool,
}

impl SessionOptions {
    /// The options of the shared command-line arguments.
    #[must_use]
    pub fn new(socket: &SocketArgs, workers: &WorkerArgs) -> Self {
        Self {
            workers: workers.into(),
            inband_notifications: socket.inband_notifications,
            iommu_platform: socket.iommu_platform,
        }
    }
}

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("vring {0} does not exist")]
    NoVring(u32),
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("{0}")]
    Refused(String),
    #[error("the message is not supported")]
    Unsupported,
}

/// The answer to a request.
#[derive(Debug)]
enum Reply {
    /// None of its own: acknowledged if the front end asked for that.
    Done,
    Number(u64),
    Body(Vec<u8>),
    BodyFd(Vec<u8>, OwnedFd),
}

/// Why a session ended.
#[derive(Debug)]
pub enum Ended {
    /// The front end closed the socket, or broke the protocol beyond repair.
    FrontendLeft,
    /// The daemon is to stop.
    ShutDown,
}

/// One front end's session with a device.
#[derive(Debug)]
pub struct Session {
    device: Arc<dyn Device>,
    connection: Connection,
    options: SessionOptions,
    pool: WorkerPool,
    memory: Arc<SharedMemory>,
    metrics: Vec<Arc<QueueMetrics>>,
    /// SET_FEATURES's value, once it came.
    features: Option<u64>,
    protocol_features: u64,
    vrings: Vec<Vring>,
    inflight: Option<Inflight>,
    log: Option<Arc<DirtyLog>>,
    channel: Option<Arc<BackendChannel>>,
    status: u8,
    transfer: Option<StateTransfer>,
}

impl std::fmt::Debug for dyn Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Session {
    /// A session with the front end at the other end of `socket`. `metrics` has one entry a queue.
    #[must_use]
    pub fn new(
        device: Arc<dyn Device>,
        socket: UnixStream,
        metrics: Vec<Arc<QueueMetrics>>,
        options: SessionOptions,
    ) -> Self {
        let max = device.max_queue_size();
        let vrings = (0..device.queue_count()).map(|_| Vring::new(max)).collect();
        Self {
            pool: WorkerPool::new(options.workers.clone()),
            device,
            connection: Connection::new(socket),
            options,
            memory: Arc::default(),
            metrics,
            features: None,
            protocol_features: 0,
            vrings,
            inflight: None,
            log: None,
            channel: None,
            status: 0,
            transfer: None,
        }
    }

    /// Serves requests until the front end leaves or `shutdown` is signalled; then drains.
    pub fn serve(mut self, shutdown: &EventFd) -> Ended {
        let ended = self.serve_until(shutdown);
        self.close();
        ended
    }

    /// As [`Self::serve`], but leaves the session whole, so that it can be saved.
    pub fn serve_until(&mut self, shutdown: &EventFd) -> Ended {
        // Without one (no descriptors left) only a front end that stalls can delay the end.
        self.connection.set_interrupt(shutdown.try_clone().ok());
        let mut settled = false;
        loop {
            let mut fds = [
                PollFd::new(&self.connection, PollFlags::IN),
                PollFd::new(shutdown, PollFlags::IN),
            ];
            match poll(&mut fds, (!settled).then_some(&SETTLING)) {
                Ok(0) => {
                    // Attaching a guest takes code that serving it does not.
                    crate::footprint::give_back_startup_memory();
                    settled = true;
                    continue;
                }
                Ok(_) => settled = false,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "cannot wait for the front end");
                    return Ended::FrontendLeft;
                }
            }
            if !fds[1].revents().is_empty() {
                return Ended::ShutDown;
            }
            match self.connection.receive() {
                Ok(message) => {
                    if let Err(error) = self.handle(message) {
                        tracing::info!(%error, "the front end left without its answer");
                        return Ended::FrontendLeft;
                    }
                }
                Err(ReceiveError::Closed) => return Ended::FrontendLeft,
                Err(ReceiveError::Interrupted) => return Ended::ShutDown,
                Err(error) => {
                    tracing::warn!(%error, "ending the session");
                    return Ended::FrontendLeft;
                }
            }
        }
    }

    /// Stops all rings, ends the workers and lets the device forget the guest.
    pub fn close(&mut self) {
        self.end_workers();
        self.device.set_channel(None);
        self.device.reset();
    }

    /// Carries one message out and answers it.
    fn handle(&mut self, message: Message) -> std::io::Result<()> {
        let Message { header, body, fds } = message;
        let request = match wire::parse(header.request, &body, fds.len()) {
            Ok(request) => request,
            Err(error) => {
                warn_limited!(%error, "a request was refused");
                return self.answer_failure(&header);
            }
        };
        tracing::debug!(?request, fds = fds.len(), "request");
        match self.carry_out(request, fds) {
            Ok(reply) => self.answer(&header, reply),
            Err(error) => {
                warn_limited!(request = header.request, %error, "a request was refused");
                self.answer_failure(&header)
            }
        }
    }

    fn answer(&self, header: &Header, reply: Reply) -> std::io::Result<()> {
        let (body, fd) = match reply {
            Reply::Done if self.wants_ack(header) => (0u64.as_bytes().to_vec(), None),
            Reply::Done => return Ok(()),
            Reply::Number(n) => (n.as_bytes().to_vec(), None),
            Reply::Body(body) => (body, None),
            Reply::BodyFd(body, fd) => (body, Some(fd)),
        };
        let answer = Header::new(header.request, FLAG_REPLY, body.len());
        self.connection.send(answer, &body, fd.as_ref().map(std::os::fd::AsFd::as_fd))
    }

    /// The specified answer to a request that was not done.
    fn answer_failure(&self, header: &Header) -> std::io::Result<()> {
        use vhost::vhost_user::message::FrontendReq as R;
        let body = match R::try_from(header.request) {
            // "a zero length reply", specification, VHOST_USER_GET_CONFIG. The others answer with a
            // descriptor or a session, and are not there: a front end that asks all the same must not wait.
            Ok(
                R::GET_CONFIG
                | R::POSTCOPY_ADVISE
                | R::GET_SHARED_OBJECT
                | R::CREATE_CRYPTO_SESSION,
            ) => Vec::new(),
            Ok(R::GET_VRING_BASE) => VringState { index: 0, num: 0 }.as_bytes().to_vec(),
            Ok(R::GET_INFLIGHT_FD) => vec![0; size_of::<wire::InflightBody>()],
            // Bit 8: no descriptor of ours; the low byte: the error.
            Ok(R::SET_DEVICE_STATE_FD) => 0x101u64.as_bytes().to_vec(),
            Ok(
                R::GET_FEATURES
                | R::GET_PROTOCOL_FEATURES
                | R::GET_QUEUE_NUM
                | R::GET_MAX_MEM_SLOTS
                | R::GET_STATUS,
            ) => 0u64.as_bytes().to_vec(),
            Ok(R::CHECK_DEVICE_STATE | R::IOTLB_MSG | R::POSTCOPY_END) => 1u64.as_bytes().to_vec(),
            Ok(R::GET_SHMEM_CONFIG) => vec![0; SHMEM_CONFIG_SIZE],
            // Always answered then, so a front end waits for it.
            Ok(R::SET_LOG_BASE) if self.has_protocol(P::LOG_SHMFD) => 1u64.as_bytes().to_vec(),
            _ if self.wants_ack(header) => 1u64.as_bytes().to_vec(),
            _ => return Ok(()),
        };
        self.connection.send(Header::new(header.request, FLAG_REPLY, body.len()), &body, None)
    }

    fn wants_ack(&self, header: &Header) -> bool {
        header.need_reply() && self.has_protocol(P::REPLY_ACK)
    }

    fn has_protocol(&self, feature: P) -> bool {
        self.protocol_features & feature.bits() != 0
    }

    /// Virtio features offered.
    fn offered(&self) -> u64 {
        let offered = self.device.features() | F_PROTOCOL_FEATURES | F_LOG_ALL;
        if self.options.iommu_platform {
            offered
        } else {
            offered & !(1 << VIRTIO_F_ACCESS_PLATFORM)
        }
    }

    /// Protocol features offered.
    fn offered_protocol(&self) -> u64 {
        let mut offered = PROTOCOL_FEATURES | self.device.protocol_features();
        if self.options.inband_notifications {
            offered |= P::INBAND_NOTIFICATIONS.bits();
        }
        if !self.device.shmem_regions().is_empty() {
            offered |= P::SHMEM.bits();
        }
        offered & !self.device.withheld_protocol_features()
    }

    /// The table of requests.
    fn carry_out(
        &mut self,
        request: Request,
        mut fds: Vec<OwnedFd>,
    ) -> Result<Reply, RequestError> {
        let fd = if fds.len() == 1 { fds.pop() } else { None };
        match request {
            Request::GetFeatures => return Ok(Reply::Number(self.offered())),
            Request::GetProtocolFeatures => return Ok(Reply::Number(self.offered_protocol())),
            Request::GetQueueNum => return Ok(Reply::Number(u64::from(self.device.queue_count()))),
            Request::GetMaxMemSlots => return Ok(Reply::Number(MAX_MEM_SLOTS as u64)),
            Request::GetStatus => return Ok(Reply::Number(u64::from(self.status))),
            Request::GetVringBase(index) => return self.get_vring_base(index),
            Request::GetConfig { offset, size, flags: _ } => return self.get_config(offset, size),
            Request::GetInflightFd { num_queues, queue_size } => {
                return self.get_inflight(num_queues, queue_size);
            }
            Request::GetShmemConfig => return Ok(self.get_shmem_config()),
            Request::SetLogBase { size, offset } => return self.set_log_base(size, offset, fd),
            Request::SetDeviceStateFd { direction, phase } => {
                return self.transfer_state(direction, phase, fd);
            }
            Request::CheckDeviceState => return self.check_state(),
            Request::Iotlb(body) => return self.update_iotlb(&body),
            Request::SetOwner | Request::SetLogFd => {}
            Request::ResetOwner => self.disable_all(),
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetProtocolFeatures(features) => self.set_protocol_features(features)?,
            Request::SetMemTable(regions) => self.set_mem_table(&regions, fd, fds)?,
            Request::AddMemReg(info) => self.add_region(info, fd)?,
            Request::RemMemReg(info) => {
                self.memory.publish(self.memory.load().without_region(&info)?)
            }
            Request::SetVringNum(s) => self.set_vring_num(s)?,
            Request::SetVringAddr { index, log: _, addresses } => {
                self.set_vring_addr(index, addresses)?
            }
            Request::SetVringBase(s) => self.set_vring_base(s)?,
            Request::SetVringKick { index, fd: _ } => self.set_vring_kick(index, fd)?,
            Request::SetVringCall { index, fd: _ } => self.set_vring_call(index, fd)?,
            Request::SetVringErr { index, fd: _ } => self.set_vring_err(index, fd)?,
            Request::SetVringEnable { index, enable } => self.set_vring_enable(index, enable)?,
            Request::VringKick(index) => self.vring_kick(index)?,
            Request::SetBackendReqFd => self.set_channel(fd)?,
            Request::SetConfig { offset, flags, data } => self.set_config(offset, flags, &data)?,
            Request::SetInflightFd(body) => self.set_inflight(body, fd)?,
            Request::ResetDevice => self.reset_device(),
            Request::SetStatus(status) => self.set_status(status),
            Request::SendRarp(mac) => {
                refuse_unless(self.device.send_rarp(mac), "the device announces nothing")?
            }
            Request::NetSetMtu(mtu) => {
                let mtu = u16::try_from(mtu)
                    .map_err(|_big| RequestError::Refused(format!("MTU {mtu} is too large")))?;
                refuse_unless(self.device.set_mtu(mtu), "the device has no such MTU")?;
            }
            Request::Unsupported(_) => return Err(RequestError::Unsupported),
        }
        self.start_ready();
        Ok(Reply::Done)
    }

    fn set_features(&mut self, features: u64) -> Result<(), RequestError> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(RequestError::Refused(format!("features {unknown:#x} were not offered")));
        }
        let running_on = !(F_LOG_ALL | F_PROTOCOL_FEATURES);
        let changed = self.features.is_some_and(|old| (old ^ features) & running_on != 0);
        if changed {
            // Rings started under other rules; they start again below.
            self.stop_all();
        }
        let first = self.features.is_none();
        self.features = Some(features);
        if changed || first {
            self.device.negotiated(features);
        }
        self.update_log();
        Ok(())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), RequestError> {
        let unknown = features & !self.offered_protocol();
        self.protocol_features = features & !unknown;
        if unknown != 0 {
            return Err(RequestError::Refused(format!(
                "protocol features {unknown:#x} were not offered"
            )));
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[RegionInfo],
        one: Option<OwnedFd>,
        many: Vec<OwnedFd>,
    ) -> Result<(), RequestError> {
        let fds = one.into_iter().chain(many);
        let mapped = regions
            .iter()
            .zip(fds)
            .map(|(info, fd)| Region::map(*info, fd).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        let old = self.memory.load();
        self.memory.publish(
            GuestMemory::new(mapped, old.log().cloned())?.with_iotlb(old.iotlb().cloned()),
        );
        Ok(())
    }

    fn add_region(&mut self, info: RegionInfo, fd: Option<OwnedFd>) -> Result<(), RequestError> {
        let region = Region::map(info, fd.ok_or(MemoryError::NoFd)?)?;
        self.memory.publish(self.memory.load().with_region(region)?);
        Ok(())
    }

    /// IOTLB_MSG, always answered with a number. The first one shows that the guest has a virtual
    /// IOMMU, and that addresses in rings are its I/O virtual ones.
    fn update_iotlb(&mut self, body: &IotlbBody) -> Result<Reply, RequestError> {
        let memory = self.memory.load();
        let iotlb = match memory.iotlb() {
            Some(iotlb) => iotlb.clone(),
            None => {
                self.stop_all();
                let iotlb = Arc::new(Iotlb::default());
                iotlb.set_channel(self.channel.clone());
                self.memory.publish(memory.with_iotlb(Some(iotlb.clone())));
                iotlb
            }
        };
        refuse_unless(
            iotlb.apply(body),
            "an IOTLB message that is neither update nor invalidation",
        )?;
        self.start_ready();
        Ok(Reply::Number(0))
    }

    fn get_config(&self, offset: u32, size: u32) -> Result<Reply, RequestError> {
        if size > MAX_CONFIG || offset.checked_add(size).is_none_or(|end| end > MAX_CONFIG) {
            return Err(RequestError::Refused(format!(
                "configuration bytes {offset}+{size} do not exist"
            )));
        }
        let mut body = ConfigHeader { offset, size, flags: 0 }.as_bytes().to_vec();
        let at = body.len();
        body.resize(at + size as usize, 0);
        self.device.read_config(offset, &mut body[at..]);
        Ok(Reply::Body(body))
    }

    fn set_config(&mut self, offset: u32, flags: u32, data: &[u8]) -> Result<(), RequestError> {
        tracing::debug!(offset, flags, len = data.len(), "configuration write");
        self.device.write_config(offset, data).map_err(|e| RequestError::Refused(e.to_string()))
    }

    fn get_shmem_config(&self) -> Reply {
        self.device.shmem_config_asked();
        let sizes = self.device.shmem_regions();
        let count = sizes.iter().filter(|&&s| s != 0).count();
        let mut body = vec![0u8; SHMEM_CONFIG_SIZE];
        body[..4].copy_from_slice(&u32::try_from(count).unwrap_or(0).to_ne_bytes());
        for (slot, size) in body[8..].chunks_exact_mut(8).zip(&sizes) {
            slot.copy_from_slice(&size.to_ne_bytes());
        }
        Reply::Body(body)
    }

    fn set_channel(&mut self, fd: Option<OwnedFd>) -> Result<(), RequestError> {
        let fd = fd.ok_or(MemoryError::NoFd)?;
        let features = ChannelFeatures {
            reply_ack: self.has_protocol(P::REPLY_ACK),
            send_fd: self.has_protocol(P::BACKEND_SEND_FD),
            shmem: self.has_protocol(P::SHMEM),
            config: self.has_protocol(P::CONFIG),
        };
        let channel =
            BackendChannel::new(fd, features).map_err(|e| RequestError::Refused(e.to_string()))?;
        let channel = Arc::new(channel);
        if let Some(iotlb) = self.memory.load().iotlb() {
            iotlb.set_channel(Some(channel.clone()));
        }
        if let Some(old) = self.channel.replace(channel.clone()) {
            // Whoever waits for an answer there would be waited for when its ring is stopped.
            old.interrupt();
        }
        self.device.set_channel(Some(channel));
        Ok(())
    }

    fn reset_device(&mut self) {
        self.stop_all();
        for index in 0..self.device.queue_count() {
            if let Some((record, ..)) = self.record_of(index.into()) {
                record.blank();
            }
        }
        for vring in &mut self.vrings {
            vring.forget_driver();
        }
        self.status = 0;
        self.device.reset();
    }

    /// RESET_OWNER, which the specification wants ignored or taken as this.
    fn disable_all(&mut self) {
        self.stop_all();
        for vring in &mut self.vrings {
            vring.enabled = false;
        }
    }

    /// SET_STATUS. Status 0 stops the rings, each until its next SET_VRING_KICK, but does not reset the
    /// device's own state: QEMU sends it whenever a machine is paused too.
    fn set_status(&mut self, status: u64) {
        self.status = status.to_le_bytes()[0];
        if self.status == 0 {
            self.stop_all();
            for vring in &mut self.vrings {
                vring.kick = Kick::None;
            }
        }
        self.device.status(self.status);
    }
}

fn refuse_unless(done: bool, why: &str) -> Result<(), RequestError> {
    if done { Ok(()) } else { Err(RequestError::Refused(why.to_owned())) }
}
