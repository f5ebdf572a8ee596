//! A vhost-user front end: what a VMM does, on a real socket.
//!
//! [`FrontEnd::attach`] does the whole of it, as a well-behaved VMM would, and most tests need no
//! more. Below it there is one method a message, and below those [`FrontEnd::call`],
//! [`FrontEnd::set`] and [`Wire`], which send anything at all.

mod channel;
mod wire;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use outboard_common::ring::VringAddresses;
use outboard_common::vhost_user::memory::RegionInfo;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

pub use self::channel::{BackendChannel, BackendRequest, ShmemMapping, ShmemPolicy};
pub use self::wire::{
    FLAG_NEED_REPLY, FLAG_REPLY, FLAG_VERSION, HEADER_SIZE, Message, REPLY_TIMEOUT, Wire, encode,
};
use crate::driver::{GuestQueue, RingFormat};
use crate::memory::{GuestRam, RamRegion};

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_F_LOG_ALL.
pub const F_LOG_ALL: u64 = 1 << 26;
/// In SET_VRING_KICK, CALL and ERR: there is no descriptor.
pub const VRING_NO_FD: u64 = 0x100;

/// Requests by number that the `vhost` crate has no name for.
pub mod request {
    /// VHOST_USER_SET_DEVICE_STATE_FD.
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    /// VHOST_USER_CHECK_DEVICE_STATE.
    pub const CHECK_DEVICE_STATE: u32 = 43;
    /// VHOST_USER_GET_SHMEM_CONFIG.
    pub const GET_SHMEM_CONFIG: u32 = 44;
}

/// The daemon answered a request with a non-zero status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused(pub u64);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the daemon refused the request with {:#x}", self.0)
    }
}

impl std::error::Error for Refused {}

/// The shared inflight file, as the front end keeps it over a daemon's death.
#[derive(Debug)]
pub struct Inflight {
    /// The memory file.
    pub fd: OwnedFd,
    /// Bytes to map.
    pub size: u64,
    /// Where in the file.
    pub offset: u64,
    /// Queues it has room for.
    pub queues: u16,
    /// Entries each of them has.
    pub queue_size: u16,
}

/// What [`FrontEnd::attach`] negotiates and starts.
#[derive(Debug, Clone, Copy)]
pub struct AttachOptions {
    /// Ring format.
    pub format: RingFormat,
    /// Virtio features wanted besides the format's; those that the device does not offer are left out.
    pub features: u64,
    /// Protocol features wanted; the rest is masked away.
    pub protocol_features: u64,
    /// Queues to start, from queue 0.
    pub queues: u16,
    /// Entries each.
    pub queue_size: u16,
    /// Ask for an inflight file and hand it in, if the device offers that.
    pub inflight: bool,
}

impl AttachOptions {
    /// One queue of 128 entries with every offered feature.
    #[must_use]
    pub const fn new(format: RingFormat) -> Self {
        Self {
            format,
            features: u64::MAX,
            protocol_features: u64::MAX,
            queues: 1,
            queue_size: 128,
            inflight: true,
        }
    }
}

/// A front end's side of one vhost-user connection. Clones share the socket.
#[derive(Debug, Clone)]
pub struct FrontEnd {
    wire: Arc<Mutex<Wire>>,
    /// Virtio features set, with F_PROTOCOL_FEATURES.
    pub features: u64,
    /// Protocol features set.
    pub protocol_features: u64,
}

fn code(request: FrontendReq) -> u32 {
    request.into()
}

/// A body of words.
fn words<const N: usize>(values: [u64; N]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_ne_bytes()).collect()
}

fn two_words(a: u32, b: u32) -> Vec<u8> {
    [a.to_ne_bytes(), b.to_ne_bytes()].concat()
}

fn region_body(info: RegionInfo) -> Vec<u8> {
    words([info.guest_addr, info.size, info.user_addr, info.mmap_offset])
}

impl FrontEnd {
    /// A front end on a connected socket.
    ///
    /// # Errors
    /// The socket is not usable.
    pub fn from_stream(stream: UnixStream) -> Result<Self> {
        let wire = Arc::new(Mutex::new(Wire::new(stream)?));
        Ok(Self { wire, features: 0, protocol_features: 0 })
    }

    /// Dials the daemon's socket at `path`, again and again for up to ten seconds: it may be starting.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Self::from_stream(stream),
                Err(e) if Instant::now() > deadline => {
                    return Err(e).with_context(|| format!("dialling {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Waits for a daemon in client mode to dial `listener`.
    ///
    /// # Errors
    /// It does not within [`REPLY_TIMEOUT`].
    pub fn accept(listener: &UnixListener) -> Result<Self> {
        ensure!(
            crate::driver::wait_readable(listener, REPLY_TIMEOUT)?,
            "no daemon dialled within {REPLY_TIMEOUT:?}"
        );
        Self::from_stream(listener.accept()?.0)
    }

    /// The socket, for messages that are wrong on purpose. Held: nobody else may send.
    pub fn wire(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether protocol feature `feature` was set.
    #[must_use]
    pub fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
    }

    /// Sends a request that has a reply, and waits for it.
    ///
    /// # Errors
    /// No reply, or one to something else.
    pub fn call(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<Message> {
        let wire = self.wire();
        wire.send(request, 0, body, fds)?;
        let reply = wire
            .receive()?
            .with_context(|| format!("the daemon hung up instead of answering {request}"))?;
        drop(wire);
        ensure!(reply.request == request, "reply to {} instead of {request}", reply.request);
        ensure!(reply.flags & 7 == FLAG_VERSION | FLAG_REPLY, "reply flags {:#x}", reply.flags);
        Ok(reply)
    }

    /// Sends a request that has no reply of its own; with REPLY_ACK negotiated asks for an
    /// acknowledgement and waits for it.
    ///
    /// # Errors
    /// [`Refused`], or the daemon hung up.
    pub fn set(&self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let wire = self.wire();
        if !self.has(VhostUserProtocolFeatures::REPLY_ACK) {
            return wire.send(request, 0, body, fds);
        }
        wire.send(request, FLAG_NEED_REPLY, body, fds)?;
        let reply = wire
            .receive()?
            .with_context(|| format!("the daemon hung up instead of acknowledging {request}"))?;
        drop(wire);
        ensure!(reply.request == request, "reply to {} instead of {request}", reply.request);
        match reply.as_u64()? {
            0 => Ok(()),
            status => Err(Refused(status).into()),
        }
    }

    fn get_u64(&self, request: FrontendReq) -> Result<u64> {
        self.call(code(request), &[], &[])?.as_u64()
    }

    fn set_u64(&self, request: FrontendReq, value: u64) -> Result<()> {
        self.set(code(request), &value.to_ne_bytes(), &[])
    }

    /// GET_FEATURES. Also a barrier: all messages before it have been handled.
    ///
    /// # Errors
    /// No proper reply.
    pub fn get_features(&self) -> Result<u64> {
        self.get_u64(FrontendReq::GET_FEATURES)
    }

    /// SET_FEATURES.
    ///
    /// # Errors
    /// Refused.
    pub fn set_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        self.set_u64(FrontendReq::SET_FEATURES, features)
    }

    /// GET_PROTOCOL_FEATURES.
    ///
    /// # Errors
    /// No proper reply.
    pub fn get_protocol_features(&self) -> Result<u64> {
        self.get_u64(FrontendReq::GET_PROTOCOL_FEATURES)
    }

    /// SET_PROTOCOL_FEATURES.
    ///
    /// # Errors
    /// Refused.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        // Not acknowledged with a reply that is only being negotiated.
        self.wire().send(
            code(FrontendReq::SET_PROTOCOL_FEATURES),
            0,
            &features.to_ne_bytes(),
            &[],
        )?;
        self.protocol_features = features;
        Ok(())
    }

    /// SET_OWNER.
    ///
    /// # Errors
    /// Refused.
    pub fn set_owner(&self) -> Result<()> {
        self.set(code(FrontendReq::SET_OWNER), &[], &[])
    }

    /// GET_QUEUE_NUM.
    ///
    /// # Errors
    /// No proper reply.
    pub fn get_queue_num(&self) -> Result<u64> {
        self.get_u64(FrontendReq::GET_QUEUE_NUM)
    }

    /// GET_MAX_MEM_SLOTS.
    ///
    /// # Errors
    /// No proper reply.
    pub fn get_max_mem_slots(&self) -> Result<u64> {
        self.get_u64(FrontendReq::GET_MAX_MEM_SLOTS)
    }

    /// SET_MEM_TABLE with all regions of `ram`.
    ///
    /// # Errors
    /// Refused.
    pub fn set_mem_table(&self, ram: &GuestRam) -> Result<()> {
        let count = u32::try_from(ram.regions().len())?;
        let mut body = two_words(count, 0);
        let mut fds = Vec::new();
        for region in ram.regions() {
            body.extend(region_body(region.info()));
            fds.push(region.file().as_fd());
        }
        self.set(code(FrontendReq::SET_MEM_TABLE), &body, &fds)
    }

    /// ADD_MEM_REG.
    ///
    /// # Errors
    /// Refused.
    pub fn add_mem_region(&self, region: &RamRegion) -> Result<()> {
        self.add_region(region.info(), region.file().as_fd())
    }

    /// ADD_MEM_REG of any descriptor.
    ///
    /// # Errors
    /// Refused.
    pub fn add_region(&self, info: RegionInfo, fd: BorrowedFd<'_>) -> Result<()> {
        let body = [words([0]), region_body(info)].concat();
        self.set(code(FrontendReq::ADD_MEM_REG), &body, &[fd])
    }

    /// REM_MEM_REG.
    ///
    /// # Errors
    /// Refused.
    pub fn remove_region(&self, info: RegionInfo) -> Result<()> {
        let body = [words([0]), region_body(info)].concat();
        self.set(code(FrontendReq::REM_MEM_REG), &body, &[])
    }

    /// GET_CONFIG of `len` bytes at `offset`.
    ///
    /// # Errors
    /// Refused (the reply has no payload) or no proper reply.
    pub fn get_config(&self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let mut body = [offset, len, 0].map(u32::to_ne_bytes).concat();
        body.resize(12 + usize::try_from(len)?, 0);
        let mut reply = self.call(code(FrontendReq::GET_CONFIG), &body, &[])?;
        ensure!(reply.body.len() == body.len(), "GET_CONFIG's reply has {}", reply.body.len());
        Ok(reply.body.split_off(12))
    }

    /// SET_CONFIG.
    ///
    /// # Errors
    /// Refused.
    pub fn set_config(&self, offset: u32, data: &[u8]) -> Result<()> {
        let len = u32::try_from(data.len())?;
        let mut body = [offset, len, 0].map(u32::to_ne_bytes).concat();
        body.extend_from_slice(data);
        self.set(code(FrontendReq::SET_CONFIG), &body, &[])
    }

    /// SET_VRING_NUM.
    ///
    /// # Errors
    /// Refused.
    pub fn set_vring_num(&self, index: u16, size: u16) -> Result<()> {
        self.set(code(FrontendReq::SET_VRING_NUM), &two_words(index.into(), size.into()), &[])
    }

    /// SET_VRING_BASE.
    ///
    /// # Errors
    /// Refused.
    pub fn set_vring_base(&self, index: u16, base: u32) -> Result<()> {
        self.set(code(FrontendReq::SET_VRING_BASE), &two_words(index.into(), base), &[])
    }

    /// GET_VRING_BASE: stops the ring.
    ///
    /// # Errors
    /// No proper reply.
    pub fn get_vring_base(&self, index: u16) -> Result<u32> {
        let body = two_words(index.into(), 0);
        let reply = self.call(code(FrontendReq::GET_VRING_BASE), &body, &[])?;
        ensure!(reply.u32_at(0)? == u32::from(index), "the base of another ring");
        reply.u32_at(4)
    }

    /// SET_VRING_ADDR; with `log` the used ring's writes are logged at that guest address.
    ///
    /// # Errors
    /// Refused.
    pub fn set_vring_addr(&self, index: u16, at: VringAddresses, log: Option<u64>) -> Result<()> {
        let mut body = two_words(index.into(), log.is_some().into());
        body.extend(words([at.descriptor, at.used, at.available, log.unwrap_or(0)]));
        self.set(code(FrontendReq::SET_VRING_ADDR), &body, &[])
    }

    fn set_vring_fd(
        &self,
        request: FrontendReq,
        index: u16,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<()> {
        let bits = u64::from(index) | if fd.is_none() { VRING_NO_FD } else { 0 };
        self.set(code(request), &bits.to_ne_bytes(), fd.as_slice())
    }

    /// SET_VRING_KICK: starts the ring. `None`: the daemon must poll.
    ///
    /// # Errors
    /// Refused.
    pub fn set_vring_kick(&self, index: u16, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_vring_fd(FrontendReq::SET_VRING_KICK, index, fd)
    }

    /// SET_VRING_CALL. `None`: the driver polls.
    ///
    /// # Errors
    /// Refused.
    pub fn set_vring_call(&self, index: u16, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_vring_fd(FrontendReq::SET_VRING_CALL, index, fd)
    }

    /// SET_VRING_ERR.
    ///
    /// # Errors
    /// Refused.
    pub fn set_vring_err(&self, index: u16, fd: Option<BorrowedFd<'_>>) -> Result<()> {
        self.set_vring_fd(FrontendReq::SET_VRING_ERR, index, fd)
    }

    /// SET_VRING_ENABLE.
    ///
    /// # Errors
    /// Refused.
    pub fn set_vring_enable(&self, index: u16, enable: bool) -> Result<()> {
        let body = two_words(index.into(), enable.into());
        self.set(code(FrontendReq::SET_VRING_ENABLE), &body, &[])
    }

    /// GET_INFLIGHT_FD.
    ///
    /// # Errors
    /// No proper reply.
    pub fn get_inflight(&self, queues: u16, queue_size: u16) -> Result<Inflight> {
        let body = inflight_body(0, 0, queues, queue_size);
        let mut reply = self.call(code(FrontendReq::GET_INFLIGHT_FD), &body, &[])?;
        let (size, offset) = (reply.u64_at(0)?, reply.u64_at(8)?);
        let fd = reply.fds.pop().context("GET_INFLIGHT_FD's reply has no descriptor")?;
        Ok(Inflight { fd, size, offset, queues, queue_size })
    }

    /// SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// Refused.
    pub fn set_inflight(&self, inflight: &Inflight) -> Result<()> {
        let i = inflight;
        let body = inflight_body(i.size, i.offset, i.queues, i.queue_size);
        self.set(code(FrontendReq::SET_INFLIGHT_FD), &body, &[i.fd.as_fd()])
    }

    /// SET_LOG_BASE with `fd` (LOG_SHMFD); the reply is awaited.
    ///
    /// # Errors
    /// No proper reply.
    pub fn set_log_base(&self, size: u64, offset: u64, fd: BorrowedFd<'_>) -> Result<Message> {
        self.call(code(FrontendReq::SET_LOG_BASE), &words([size, offset]), &[fd])
    }

    /// GET_STATUS.
    ///
    /// # Errors
    /// No proper reply.
    pub fn get_status(&self) -> Result<u64> {
        self.get_u64(FrontendReq::GET_STATUS)
    }

    /// SET_STATUS.
    ///
    /// # Errors
    /// Refused.
    pub fn set_status(&self, status: u8) -> Result<()> {
        self.set_u64(FrontendReq::SET_STATUS, status.into())
    }

    /// RESET_DEVICE.
    ///
    /// # Errors
    /// Refused.
    pub fn reset_device(&self) -> Result<()> {
        self.set(code(FrontendReq::RESET_DEVICE), &[], &[])
    }

    /// SET_DEVICE_STATE_FD: `save` has the daemon write its state to `fd`, else it reads it from there.
    ///
    /// # Errors
    /// Refused.
    pub fn set_device_state_fd(&self, save: bool, fd: BorrowedFd<'_>) -> Result<()> {
        let body = two_words(u32::from(!save), 0);
        let reply = self.call(request::SET_DEVICE_STATE_FD, &body, &[fd])?;
        // Low byte: status; bit 8: no descriptor of the daemon's own comes back.
        match reply.as_u64()? & 0xff {
            0 => Ok(()),
            status => Err(Refused(status).into()),
        }
    }

    /// CHECK_DEVICE_STATE: whether the transfer succeeded.
    ///
    /// # Errors
    /// No proper reply.
    pub fn check_device_state(&self) -> Result<bool> {
        Ok(self.call(request::CHECK_DEVICE_STATE, &[], &[])?.as_u64()? == 0)
    }

    /// GET_SHMEM_CONFIG: sizes of the regions, in bytes, by id.
    ///
    /// # Errors
    /// No proper reply.
    pub fn get_shmem_config(&self) -> Result<Vec<u64>> {
        let reply = self.call(request::GET_SHMEM_CONFIG, &[], &[])?;
        let regions = usize::try_from(reply.u32_at(0)?)?;
        let sizes: Result<Vec<u64>> =
            (8..reply.body.len()).step_by(8).map(|at| reply.u64_at(at)).collect();
        let sizes = sizes?;
        let used = sizes.iter().filter(|&&s| s != 0).count();
        ensure!(used == regions, "{regions} shared memory regions announced, {used} described");
        Ok(sizes)
    }

    /// SET_BACKEND_REQ_FD: opens the back-end channel, served by a thread with `policy` for SHMEM_MAP.
    ///
    /// # Errors
    /// Refused.
    pub fn open_backend_channel(&self, policy: ShmemPolicy) -> Result<BackendChannel> {
        let (ours, theirs) = UnixStream::pair()?;
        self.set(code(FrontendReq::SET_BACKEND_REQ_FD), &[], &[theirs.as_fd()])?;
        BackendChannel::serve(ours, self.clone(), policy, Arc::default())
    }

    /// Another channel in the place of `old`, by the same VMM: what is mapped stays.
    ///
    /// # Errors
    /// Refused.
    pub fn replace_backend_channel(
        &self,
        old: BackendChannel,
        policy: ShmemPolicy,
    ) -> Result<BackendChannel> {
        let (ours, theirs) = UnixStream::pair()?;
        self.set(code(FrontendReq::SET_BACKEND_REQ_FD), &[], &[theirs.as_fd()])?;
        let mappings = old.shared_mappings();
        drop(old);
        BackendChannel::serve(ours, self.clone(), policy, mappings)
    }

    /// SEND_RARP.
    ///
    /// # Errors
    /// Refused.
    pub fn send_rarp(&self, mac: [u8; 6]) -> Result<()> {
        let mut body = [0u8; 8];
        body[..6].copy_from_slice(&mac);
        self.set(code(FrontendReq::SEND_RARP), &body, &[])
    }

    /// NET_SET_MTU.
    ///
    /// # Errors
    /// Refused.
    pub fn set_mtu(&self, mtu: u16) -> Result<()> {
        self.set_u64(FrontendReq::NET_SET_MTU, mtu.into())
    }

    /// Negotiates the virtio features in `wanted` and the protocol features in `wanted_protocol`, as far as
    /// offered, in the usual order. Returns the virtio features without F_PROTOCOL_FEATURES.
    ///
    /// # Errors
    /// The daemon does not follow the protocol.
    pub fn negotiate(&mut self, wanted: u64, wanted_protocol: u64) -> Result<u64> {
        let offered = self.get_features()?;
        if offered & F_PROTOCOL_FEATURES != 0 {
            let protocol = self.get_protocol_features()? & wanted_protocol;
            self.set_protocol_features(protocol)?;
        }
        self.set_owner()?;
        let features = offered & wanted & !F_LOG_ALL;
        self.set_features(features | offered & F_PROTOCOL_FEATURES)?;
        Ok(features & !F_PROTOCOL_FEATURES)
    }

    /// Hands `queue` over as queue `index`, from vring base `base`, and enables it.
    ///
    /// # Errors
    /// Refused.
    pub fn start_queue(&self, index: u16, queue: &GuestQueue, base: u32) -> Result<()> {
        self.set_vring_num(index, queue.size())?;
        self.set_vring_base(index, base)?;
        self.set_vring_addr(index, queue.addresses(), None)?;
        self.set_vring_err(index, Some(queue.err_fd().as_fd()))?;
        self.set_vring_call(index, Some(queue.call_fd().as_fd()))?;
        self.set_vring_kick(index, Some(queue.kick_fd().as_fd()))?;
        if self.features & F_PROTOCOL_FEATURES != 0 {
            self.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// Attaches as a VMM does: negotiates, shares `ram`, and starts queues. Returns them, and the
    /// inflight file if there is one.
    ///
    /// # Errors
    /// The daemon does not follow the protocol, or does not offer the ring format.
    pub fn attach(
        &mut self,
        ram: &Arc<GuestRam>,
        options: &AttachOptions,
    ) -> Result<(Vec<GuestQueue>, Option<Inflight>)> {
        let format = options.format.features();
        // Of the wanted features only the wanted format.
        let other_format = RingFormat::Packed.features() & !format;
        let wanted = options.features & !other_format | format;
        let features = self.negotiate(wanted, options.protocol_features)?;
        ensure!(features & format == format, "the device does not offer {:?}", options.format);
        let mut inflight = None;
        if options.inflight && self.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            inflight = Some(self.get_inflight(options.queues, options.queue_size)?);
        }
        let queues: Result<Vec<_>> = (0..options.queues)
            .map(|_| GuestQueue::new(ram, options.queue_size, features))
            .collect();
        let queues = queues?;
        self.share(ram, &queues, inflight.as_ref(), |q| q.initial_base())?;
        Ok((queues, inflight))
    }

    /// Attaches to a new daemon with the same queues after the old one died: as a VMM, it knows only what
    /// it knew before (`base_of`).
    ///
    /// # Errors
    /// The daemon does not follow the protocol.
    pub fn reattach(
        &mut self,
        ram: &Arc<GuestRam>,
        queues: &[GuestQueue],
        inflight: Option<&Inflight>,
        base_of: impl Fn(&GuestQueue) -> u32,
    ) -> Result<()> {
        let Some(first) = queues.first() else { bail!("no queues to attach again") };
        let features = self.negotiate(first.features(), u64::MAX)?;
        ensure!(features == first.features(), "the new daemon offers less: {features:#x}");
        self.share(ram, queues, inflight, base_of)
    }

    fn share(
        &self,
        ram: &GuestRam,
        queues: &[GuestQueue],
        inflight: Option<&Inflight>,
        base_of: impl Fn(&GuestQueue) -> u32,
    ) -> Result<()> {
        if let Some(inflight) = inflight {
            self.set_inflight(inflight)?;
        }
        self.set_mem_table(ram)?;
        for (index, queue) in (0u16..).zip(queues) {
            self.start_queue(index, queue, base_of(queue))
                .with_context(|| format!("starting queue {index}"))?;
        }
        // Without REPLY_ACK nothing above was acknowledged: wait until it has been handled.
        self.get_features()?;
        Ok(())
    }
}

/// VhostUserInflight. The structure ends with 4 bytes of padding in C.
fn inflight_body(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut body = words([size, offset]);
    body.extend(queues.to_ne_bytes());
    body.extend(queue_size.to_ne_bytes());
    body.extend([0; 4]);
    body
}
