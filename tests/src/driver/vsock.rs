//! A guest's side of a vsock device, packet by packet: a driver that does exactly what a test says,
//! sensible or not. Virtio 1.3, 5.10.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{Buffer, EVENT_IDX, GuestQueue, INDIRECT_DESC, RingFormat};
use crate::frontend::{AttachOptions, FrontEnd};
use crate::memory::GuestRam;

/// Bytes of a packet's header.
pub const HEADER: usize = 44;
/// The host's CID.
pub const HOST: u64 = 2;
/// Payload that one transmit slot has room for, bytes.
pub const TX_ROOM: usize = 64 << 10;

/// Operations.
#[allow(missing_docs, reason = "the names of the specification")]
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Stream sockets.
pub const STREAM: u16 = 1;
/// Seqpacket sockets.
pub const SEQPACKET: u16 = 2;

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields of the specification")]
pub struct Packet {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// As the header has it, whatever the payload's length is.
    pub len: u32,
    pub socket_type: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub payload: Vec<u8>,
}

impl Packet {
    /// A packet of a guest with `cid` from its `src_port` to `dst_port` of the host, with credit for
    /// 256 KiB.
    #[must_use]
    pub fn new(cid: u64, src_port: u32, dst_port: u32, op: u16) -> Self {
        Self {
            src_cid: cid,
            dst_cid: HOST,
            src_port,
            dst_port,
            len: 0,
            socket_type: STREAM,
            op,
            flags: 0,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
            payload: Vec::new(),
        }
    }

    /// The same with `payload`.
    #[must_use]
    pub fn with(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self.len = u32::try_from(payload.len()).expect("a payload of a test");
        self
    }

    /// The same with `flags`.
    #[must_use]
    pub fn flags(mut self, flags: u32) -> Self {
        self.flags = flags;
        self
    }

    /// The same of a seqpacket socket.
    #[must_use]
    pub fn seqpacket(mut self) -> Self {
        self.socket_type = SEQPACKET;
        self
    }

    /// The header's bytes.
    #[must_use]
    pub fn header(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.socket_type.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        ensure!(bytes.len() >= HEADER, "a packet of {} bytes", bytes.len());
        let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let packet = Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            socket_type: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
            payload: bytes[HEADER..].to_vec(),
        };
        ensure!(packet.len as usize == packet.payload.len(), "length and used length: {packet:?}");
        Ok(packet)
    }
}

/// How a guest is made.
#[derive(Debug, Clone, Copy)]
pub struct VsockOptions {
    /// Ring format.
    pub format: RingFormat,
    /// Virtio features besides.
    pub features: u64,
    /// Ring entries.
    pub queue_size: u16,
    /// Bytes of a receive buffer, header included.
    pub rx_size: u32,
    /// Receive buffers; no more than ring entries.
    pub rx_buffers: u16,
    /// Bytes of guest memory.
    pub memory: u64,
}

impl Default for VsockOptions {
    fn default() -> Self {
        Self {
            format: RingFormat::Split,
            features: !super::IN_ORDER,
            queue_size: 256,
            rx_size: 4096,
            rx_buffers: 256,
            memory: 64 << 20,
        }
    }
}

/// A guest with a vsock device.
#[derive(Debug)]
pub struct VsockGuest {
    /// The front end's end of the session.
    pub front: FrontEnd,
    /// Its memory.
    pub ram: Arc<GuestRam>,
    /// Receive, transmit and event queue.
    pub queues: Vec<GuestQueue>,
    /// The CID that the device says.
    pub cid: u64,
    options: VsockOptions,
    rx_base: u64,
    tx_base: u64,
    tx_free: Vec<u16>,
    event_base: u64,
}

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Transmit slots.
const TX_SLOTS: u16 = 64;
const TX_STRIDE: u64 = TX_ROOM as u64 + 4096;

impl VsockGuest {
    /// Boots a guest at the vhost-user socket `socket`.
    ///
    /// # Errors
    /// The daemon does not follow the protocol.
    pub fn start(socket: &Path, options: VsockOptions) -> Result<Self> {
        let ram = GuestRam::new(options.memory)?;
        let mut front = FrontEnd::connect(socket)?;
        let attach = AttachOptions {
            features: options.features,
            queues: 3,
            queue_size: options.queue_size,
            inflight: false,
            ..AttachOptions::new(options.format)
        };
        let (queues, _) = front.attach(&ram, &attach)?;
        let config = front.get_config(0, 8)?;
        let cid = u64::from_le_bytes(config.try_into().ok().context("8 bytes of configuration")?);
        let rx_base =
            ram.alloc(u64::from(options.rx_buffers) * u64::from(options.rx_size), 4096)?;
        let tx_base = ram.alloc(u64::from(TX_SLOTS) * TX_STRIDE, 4096)?;
        let event_base = ram.alloc(64, 8)?;
        let mut guest = Self {
            front,
            ram,
            queues,
            cid,
            options,
            rx_base,
            tx_base,
            tx_free: (0..TX_SLOTS).collect(),
            event_base,
        };
        for buffer in 0..options.rx_buffers {
            guest.give_rx(buffer)?;
        }
        guest.queues[RX].kick();
        Ok(guest)
    }

    fn give_rx(&mut self, buffer: u16) -> Result<()> {
        let addr = self.rx_base + u64::from(buffer) * u64::from(self.options.rx_size);
        let buffers = [Buffer::writable(addr, self.options.rx_size)];
        ensure!(self.queues[RX].add(&buffers, buffer.into()), "the receive queue is full");
        Ok(())
    }

    /// Gives the device a buffer for an event.
    ///
    /// # Errors
    /// The event queue is full.
    pub fn give_event(&mut self) -> Result<()> {
        let buffers = [Buffer::writable(self.event_base, 4)];
        ensure!(self.queues[EVENT].add(&buffers, 0), "the event queue is full");
        self.queues[EVENT].kick();
        Ok(())
    }

    /// The next event, by its number.
    ///
    /// # Errors
    /// None came within `timeout`.
    pub fn event(&mut self, timeout: Duration) -> Result<u32> {
        let used = self.queues[EVENT].wait(timeout)?;
        ensure!(used.len == 4, "an event of {} bytes", used.len);
        let bytes = self.ram.bytes(self.event_base, 4);
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A free transmit slot.
    fn slot(&mut self) -> Result<u16> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            while let Some(used) = self.queues[TX].used() {
                self.tx_free.push(u16::try_from(used.cookie)?);
            }
            if let Some(slot) = self.tx_free.pop() {
                return Ok(slot);
            }
            ensure!(Instant::now() < deadline, "the device takes no packets");
            std::thread::yield_now();
        }
    }

    /// Sends `packet` as one buffer for the header and one for the payload.
    ///
    /// # Errors
    /// The device takes no packets.
    pub fn send(&mut self, packet: &Packet) -> Result<()> {
        let cuts = if packet.payload.is_empty() { vec![] } else { vec![HEADER] };
        self.send_cut(packet, &cuts, false)
    }

    /// Sends `packet` in buffers that end at the offsets `cuts`, directly or through an indirect table.
    ///
    /// # Errors
    /// The device takes no packets.
    pub fn send_cut(&mut self, packet: &Packet, cuts: &[usize], indirect: bool) -> Result<()> {
        let slot = self.slot()?;
        let addr = self.tx_base + u64::from(slot) * TX_STRIDE;
        let mut bytes = packet.header();
        bytes.extend(&packet.payload);
        self.ram.write(addr, &bytes);
        let mut buffers = Vec::new();
        let mut from = 0;
        for &to in cuts.iter().chain([&bytes.len()]) {
            let len = u32::try_from(to - from)?;
            buffers.push(Buffer::readable(addr + from as u64, len));
            from = to;
        }
        self.send_buffers(&buffers, slot, indirect)
    }

    /// Sends `bytes` as they are, in one buffer.
    ///
    /// # Errors
    /// The device takes no packets.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        let slot = self.slot()?;
        let addr = self.tx_base + u64::from(slot) * TX_STRIDE;
        self.ram.write(addr, bytes);
        let buffers = [Buffer::readable(addr, u32::try_from(bytes.len())?)];
        self.send_buffers(&buffers, slot, false)
    }

    fn send_buffers(&mut self, buffers: &[Buffer], slot: u16, indirect: bool) -> Result<()> {
        let queue = &mut self.queues[TX];
        let added = if indirect {
            queue.add_indirect(buffers, slot.into())?
        } else {
            queue.add(buffers, slot.into())
        };
        ensure!(added, "the transmit queue is full");
        queue.kick();
        Ok(())
    }

    /// Waits until the device has taken all packets.
    ///
    /// # Errors
    /// It does not within `timeout`.
    pub fn flush(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while self.tx_free.len() < usize::from(TX_SLOTS) {
            let left = deadline.saturating_duration_since(Instant::now());
            let used = self.queues[TX].wait(left)?;
            self.tx_free.push(u16::try_from(used.cookie)?);
        }
        Ok(())
    }

    /// The next packet of the device, and its buffer back to the device.
    ///
    /// # Errors
    /// None came within `timeout`, or it is malformed.
    pub fn receive(&mut self, timeout: Duration) -> Result<Packet> {
        let (packet, buffer) = self.receive_keeping(timeout)?;
        self.give_rx(buffer)?;
        self.queues[RX].kick();
        Ok(packet)
    }

    /// The next packet of the device; its buffer stays with the guest.
    ///
    /// # Errors
    /// None came within `timeout`, or it is malformed.
    pub fn receive_keeping(&mut self, timeout: Duration) -> Result<(Packet, u16)> {
        let used = self.queues[RX].wait(timeout)?;
        let buffer = u16::try_from(used.cookie)?;
        ensure!(used.len <= self.options.rx_size, "{} bytes in a buffer", used.len);
        let addr = self.rx_base + u64::from(buffer) * u64::from(self.options.rx_size);
        let packet = Packet::parse(&self.ram.bytes(addr, used.len as usize))?;
        ensure!(packet.dst_cid == self.cid, "a packet for {}", packet.dst_cid);
        Ok((packet, buffer))
    }

    /// Gives a buffer of [`Self::receive_keeping`] back.
    ///
    /// # Errors
    /// It is there already.
    pub fn give_back(&mut self, buffer: u16) -> Result<()> {
        self.give_rx(buffer)?;
        self.queues[RX].kick();
        Ok(())
    }

    /// Sends `packet` with `len` bytes of whatever its slot's memory has for a payload: for benchmarks,
    /// where a copy by the guest would be measured too.
    ///
    /// # Errors
    /// The device takes no packets.
    pub fn send_header(&mut self, packet: &Packet, len: u32) -> Result<()> {
        let slot = self.slot()?;
        let addr = self.tx_base + u64::from(slot) * TX_STRIDE;
        self.ram.write(addr, &Packet { len, payload: Vec::new(), ..packet.clone() }.header());
        let end = HEADER as u64;
        let buffers = [Buffer::readable(addr, HEADER as u32), Buffer::readable(addr + end, len)];
        self.send_buffers(if len == 0 { &buffers[..1] } else { &buffers }, slot, false)
    }

    /// The header of the next packet if one is there, its buffer back to the device and its payload
    /// not looked at: for benchmarks.
    ///
    /// # Errors
    /// It is malformed.
    pub fn poll_header(&mut self) -> Result<Option<Packet>> {
        let Some(used) = self.queues[RX].used() else { return Ok(None) };
        let buffer = u16::try_from(used.cookie)?;
        let addr = self.rx_base + u64::from(buffer) * u64::from(self.options.rx_size);
        let mut bytes = [0; HEADER];
        self.ram.read(addr, &mut bytes);
        let len = u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]);
        bytes[24..28].fill(0);
        let packet = Packet { len, ..Packet::parse(&bytes)? };
        self.give_rx(buffer)?;
        self.queues[RX].kick();
        Ok(Some(packet))
    }

    /// Whether nothing comes for `time`.
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        self.receive(time).is_err()
    }

    /// The next packet, which must have operation `op`.
    ///
    /// # Errors
    /// Another came, or none.
    pub fn expect(&mut self, op: u16) -> Result<Packet> {
        let packet = self.receive(Duration::from_secs(5))?;
        if packet.op != op {
            bail!("expected operation {op}, got {packet:?}");
        }
        Ok(packet)
    }

    /// The features that tests mostly want: indirect tables and EVENT_IDX.
    #[must_use]
    pub const fn usual_features() -> u64 {
        EVENT_IDX | INDIRECT_DESC
    }
}

/// A stream of a guest with the bookkeeping of a correct driver.
#[derive(Debug, Clone)]
pub struct GuestStream {
    /// The guest's CID.
    pub cid: u64,
    /// The peer's CID.
    pub peer: u64,
    /// The guest's port.
    pub port: u32,
    /// The peer's port.
    pub peer_port: u32,
    /// STREAM or SEQPACKET.
    pub socket_type: u16,
    /// Bytes taken, as the next packet says.
    pub fwd_cnt: u32,
    /// Bytes of receive buffer.
    pub buf_alloc: u32,
    sent: u32,
    peer_alloc: u32,
    peer_fwd: u32,
}

impl GuestStream {
    /// Answers the REQUEST `request`: the stream is there.
    ///
    /// # Errors
    /// The device takes no packets.
    pub fn accept(guest: &mut VsockGuest, request: &Packet) -> Result<Self> {
        ensure!(request.op == op::REQUEST, "no request: {request:?}");
        let stream = Self {
            cid: guest.cid,
            peer: request.src_cid,
            port: request.dst_port,
            peer_port: request.src_port,
            socket_type: request.socket_type,
            fwd_cnt: 0,
            buf_alloc: 256 << 10,
            sent: 0,
            peer_alloc: request.buf_alloc,
            peer_fwd: request.fwd_cnt,
        };
        guest.send(&stream.packet(op::RESPONSE))?;
        Ok(stream)
    }

    /// Connects `port` to `peer_port` of `peer`.
    ///
    /// # Errors
    /// Refused.
    pub fn connect(guest: &mut VsockGuest, port: u32, peer: u64, peer_port: u32) -> Result<Self> {
        Self::connect_as(guest, STREAM, port, peer, peer_port)
    }

    /// As [`Self::connect`], with a socket type.
    ///
    /// # Errors
    /// Refused.
    pub fn connect_as(
        guest: &mut VsockGuest,
        socket_type: u16,
        port: u32,
        peer: u64,
        peer_port: u32,
    ) -> Result<Self> {
        let mut stream = Self {
            cid: guest.cid,
            peer,
            port,
            peer_port,
            socket_type,
            fwd_cnt: 0,
            buf_alloc: 256 << 10,
            sent: 0,
            peer_alloc: 0,
            peer_fwd: 0,
        };
        guest.send(&stream.packet(op::REQUEST))?;
        let response = guest.expect(op::RESPONSE)?;
        stream.see(&response);
        Ok(stream)
    }

    /// A packet of this stream.
    #[must_use]
    pub fn packet(&self, op: u16) -> Packet {
        Packet {
            dst_cid: self.peer,
            socket_type: self.socket_type,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Packet::new(self.cid, self.port, self.peer_port, op)
        }
    }

    /// Whether `packet` is of this stream.
    #[must_use]
    pub fn owns(&self, packet: &Packet) -> bool {
        packet.src_cid == self.peer
            && packet.src_port == self.peer_port
            && packet.dst_port == self.port
    }

    /// Takes the credit of a packet, and counts its data as taken.
    pub fn see(&mut self, packet: &Packet) {
        self.peer_alloc = packet.buf_alloc;
        self.peer_fwd = packet.fwd_cnt;
        self.fwd_cnt = self.fwd_cnt.wrapping_add(packet.len);
    }

    /// Bytes that may be sent.
    #[must_use]
    pub fn credit(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_fwd))
    }

    /// A data packet, counted as sent.
    pub fn data(&mut self, payload: &[u8]) -> Packet {
        let packet = self.packet(op::RW).with(payload);
        self.sent = self.sent.wrapping_add(packet.len);
        packet
    }

    /// Sends all of `data` within credit, waiting for it where there is none.
    ///
    /// # Errors
    /// Anything but credit comes meanwhile, or none in time.
    pub fn send_all(&mut self, guest: &mut VsockGuest, data: &[u8]) -> Result<()> {
        let mut rest = data;
        while !rest.is_empty() {
            let n = rest.len().min(self.credit() as usize).min(TX_ROOM);
            if n == 0 {
                let packet = guest.receive(Duration::from_secs(10)).context("credit")?;
                ensure!(packet.op == op::CREDIT_UPDATE, "instead of credit: {packet:?}");
                self.see(&packet);
                continue;
            }
            let packet = self.data(&rest[..n]);
            guest.send(&packet)?;
            rest = &rest[n..];
        }
        Ok(())
    }

    /// Receives `len` bytes, giving credit for them as it goes.
    ///
    /// # Errors
    /// Anything but data comes meanwhile, or none in time.
    pub fn receive_all(&mut self, guest: &mut VsockGuest, len: usize) -> Result<Vec<u8>> {
        let mut data = Vec::new();
        let mut told = self.fwd_cnt;
        while data.len() < len {
            let packet = guest.receive(Duration::from_secs(10)).context("data")?;
            if packet.op == op::CREDIT_REQUEST || packet.op == op::CREDIT_UPDATE {
                self.see(&packet);
                if packet.op == op::CREDIT_REQUEST {
                    guest.send(&self.packet(op::CREDIT_UPDATE))?;
                    told = self.fwd_cnt;
                }
                continue;
            }
            ensure!(packet.op == op::RW && self.owns(&packet), "instead of data: {packet:?}");
            self.see(&packet);
            data.extend(&packet.payload);
            if self.fwd_cnt.wrapping_sub(told) >= self.buf_alloc / 2 {
                guest.send(&self.packet(op::CREDIT_UPDATE))?;
                told = self.fwd_cnt;
            }
        }
        Ok(data)
    }
}
