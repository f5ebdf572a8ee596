//! The data path of a switch's port: from the guest's transmit chains into other guests' buffers.
//!
//! # Theory of operation
//! A batch of frames is taken from the transmit ring, checked as everywhere (see `tx`), and each gets
//! its set of destinations. Then every destination is visited once: its receive queue is locked, the
//! batch's frames for it are copied from guest memory to guest memory, all used entries are shown with
//! one store and at most one signal, and the lock is gone. A receive queue's own kicks mean nothing here:
//! senders look into the ring.
//!
//! A port whose guest uses several queue pairs is as many destinations. Only for such a port a frame is
//! looked at for its flow, once for all of them.
#![allow(unsafe_code, reason = "copies from one guest's memory to another's")]

use std::sync::Arc;
use std::time::Instant;

use libc::iovec;
use outboard_common::rate_limiter::Direction;
use outboard_common::ring::{Chain, Queue};
use outboard_common::worker::{Context, Progress, QueueHandler};
use virtio_bindings::virtio_net as v;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::fetch::fetch;
use super::tx::{Gate, Next, Slot, take};
use super::{Turn, answer_commands, has, is_mergeable};
use crate::backend::switch::{PORTS_MAX, Peer, Seen, SwitchPort, bits};
use crate::control::{MacAddr, RxFilter};
use crate::flow::Flow;
use crate::header::{
    ETHERNET_HEADER_SIZE, F_NEEDS_CSUM, HEADER_SIZE, HashHeader, NetHeader, header_size,
};
use crate::rss::{HashReport, Steering};
use crate::segment::Segments;
use crate::shared::{PairMetrics, Shared};

/// Frames taken at once.
const BATCH: usize = 64;
/// Frames in a turn.
const BUDGET: usize = 256;

/// A frame on its way, checked.
#[derive(Debug)]
struct Frame<'a> {
    header: NetHeader,
    /// The first bytes after the header, in our memory.
    head: &'a [u8],
    /// The rest, in the sender's memory.
    rest: &'a [iovec],
    /// Bytes of both.
    len: usize,
    /// Its flow's hash, for a guest that wants that in the header.
    hash: HashReport,
}

impl<'a> Frame<'a> {
    /// A frame in our memory that needs nothing of its receiver.
    fn finished(frame: &'a [u8], hash: HashReport) -> Self {
        let header = NetHeader::new_zeroed();
        Self { header, head: frame, rest: &[], len: frame.len(), hash }
    }

    /// The whole frame in `room`, in our memory.
    fn gather(&self, room: &mut Vec<u8>) {
        room.clear();
        self.append_to(room, self.len);
    }

    /// Appends the frame's first `most` bytes to `room`.
    fn append_to(&self, room: &mut Vec<u8>, most: usize) {
        let head = self.head.get(..most).unwrap_or(self.head);
        room.extend_from_slice(head);
        let mut left = most - head.len();
        for part in self.rest {
            let (at, len) = (room.len(), part.iov_len.min(left));
            left -= len;
            room.resize(at + len, 0);
            let to = room[at..].as_mut_ptr();
            // SAFETY: the range was just made in `room`, which is ours; the part lies in the memory
            // table that the sender's queue keeps, and its chain is not pushed yet.
            unsafe {
                std::ptr::copy(part.iov_base.cast::<u8>(), to, len);
            }
        }
    }

    /// The whole frame in `room`, with its checksum filled in. Virtio 1.3, 5.1.6.2.
    fn finish(&self, room: &mut Vec<u8>) {
        self.gather(room);
        self.header.fill_checksum(room);
    }
}

/// The receiving side of a port: used by whichever port's worker holds the lock around it.
#[derive(Debug)]
pub struct Receiver {
    queue: Box<Queue>,
    shared: Arc<Shared>,
    metrics: PairMetrics,
    filter: Arc<RxFilter>,
    generation: u32,
    header_size: usize,
    mergeable: bool,
    /// Chains taken ahead, in order: those from `next` to `have` are not used yet. The others are empty.
    chains: Vec<Chain>,
    next: usize,
    have: usize,
    /// A frame whose checksum is filled in here.
    room: Vec<u8>,
    /// A super-frame that is cut.
    whole: Vec<u8>,
    /// The ring had too few buffers for a frame of this batch.
    exhausted: bool,
}

impl Receiver {
    fn new(queue: Box<Queue>, shared: Arc<Shared>, metrics: PairMetrics) -> Self {
        let features = queue.features();
        Self {
            queue,
            metrics,
            filter: shared.rx_filter(),
            generation: shared.generation(),
            shared,
            header_size: header_size(features),
            mergeable: is_mergeable(features),
            chains: Vec::new(),
            next: 0,
            have: 0,
            room: Vec::new(),
            whole: Vec::new(),
            exhausted: false,
        }
    }

    /// A batch of `frames` begins.
    fn begin(&mut self, frames: usize) {
        self.exhausted = false;
        (self.next, self.have) = (0, 0);
        while self.have < frames && self.take_chain() {}
        if self.shared.generation() != self.generation {
            self.generation = self.shared.generation();
            self.filter = self.shared.rx_filter();
        }
    }

    /// Gives a frame to the driver, or drops and counts it; true if the driver has it.
    fn receive(&mut self, frame: &Frame<'_>, offloads: u64) -> bool {
        if !self.filter.is_open() && !self.filter.accepts(frame.head) {
            self.metrics.rx_filtered.add(1);
            return false;
        }
        if frame.header.is_taken_whole(offloads) {
            self.give(frame, offloads)
        } else {
            self.cut(frame)
        }
    }

    /// Gives a super-frame to a driver that takes none, in pieces; true if it has any of them.
    fn cut(&mut self, frame: &Frame<'_>) -> bool {
        let mut whole = std::mem::take(&mut self.whole);
        let mut room = std::mem::take(&mut self.room);
        frame.gather(&mut whole);
        let mut given = false;
        match Segments::new(&frame.header, &whole) {
            // What can never fit must not hold up the other senders of this queue.
            Some(mut pieces) if pieces.count() <= usize::from(self.queue.size()) => {
                while pieces.next_into(&mut room) {
                    let piece = Frame::finished(&room, frame.hash);
                    // The checksums are filled in: no offload is needed.
                    given |= self.give(&piece, 0);
                }
            }
            _ => self.metrics.rx_unsegmented.add(1),
        }
        (self.whole, self.room) = (whole, room);
        given
    }

    /// Gives a frame that the driver takes as it is, but for the checksum.
    fn give(&mut self, frame: &Frame<'_>, offloads: u64) -> bool {
        let bytes = self.header_size + frame.len;
        let Some(count) = self.stage(bytes) else {
            self.metrics.rx_dropped.add(1);
            return false;
        };
        if self.shared.limiter.try_take(Direction::Read, 1, bytes as u64, Instant::now).is_err() {
            self.metrics.rx_limited.add(1);
            return false;
        }
        let partial = frame.header.flags & F_NEEDS_CSUM != 0;
        if partial && !has(offloads, v::VIRTIO_NET_F_GUEST_CSUM) {
            let mut room = std::mem::take(&mut self.room);
            frame.finish(&mut room);
            self.copy(&Frame::finished(&room, frame.hash), count);
            self.room = room;
        } else {
            self.copy(frame, count);
        }
        self.metrics.rx_frames.add(1);
        self.queue.metrics().bytes_written.add(bytes as u64);
        true
    }

    /// Takes one more chain ahead; false if there is none.
    #[inline]
    fn take_chain(&mut self) -> bool {
        if self.have == self.chains.len() {
            self.chains.push(Chain::new());
        }
        let Some(chain) = self.chains.get_mut(self.have) else { return false };
        if !self.queue.pop(chain) {
            return false;
        }
        fetch(&chain.writable);
        self.have += 1;
        true
    }

    /// Makes the chains from `next` on hold `bytes`; gives how many those are, `None` if there are too few.
    #[inline]
    fn stage(&mut self, bytes: usize) -> Option<usize> {
        if self.exhausted {
            return None;
        }
        match self.chains.get(self.next) {
            Some(chain) if self.next < self.have && chain.writable.len() >= bytes => Some(1),
            _ => self.stage_many(bytes),
        }
    }

    fn stage_many(&mut self, bytes: usize) -> Option<usize> {
        let most = if self.mergeable { usize::from(self.queue.size()) } else { 1 };
        let mut room = 0;
        let mut count = 0;
        while room < bytes && count < most {
            if self.next + count == self.have && !self.take_chain() {
                break;
            }
            let chain = self.chains.get_mut(self.next + count)?;
            let len = chain.writable.len();
            if count == 0 && len < self.header_size + ETHERNET_HEADER_SIZE {
                // The guest's mistake: it can hold no frame's start.
                self.queue.metrics().rejected.add(1);
                self.queue.push(chain, 0);
                self.next += 1;
                continue;
            }
            room += len;
            count += 1;
        }
        if room < bytes {
            // Trying again for every frame of a batch would let a guest with many tiny buffers hold
            // its senders up. Without merging, one too small buffer says nothing of other frames.
            self.exhausted = self.mergeable || count == 0;
            return None;
        }
        Some(count)
    }

    /// The batch is over: chains that nothing needed go back to the ring.
    fn end(&mut self) {
        for chain in self.chains.iter_mut().take(self.have).skip(self.next).rev() {
            self.queue.unpop(chain);
        }
        (self.next, self.have) = (0, 0);
        self.queue.publish();
    }

    /// Copies header and frame into the next `count` chains, which are large enough, and uses them.
    #[inline]
    fn copy(&mut self, frame: &Frame<'_>, count: usize) {
        let mut header = HashHeader {
            net: frame.header,
            hash_value: frame.hash.value.into(),
            hash_report: frame.hash.kind.into(),
            padding: 0.into(),
        };
        // A ring has at most 32,768 chains.
        header.net.num_buffers = u16::try_from(count).unwrap_or(u16::MAX).into();
        let header = header.as_bytes();
        let header = header.get(..self.header_size).unwrap_or(header);
        let range = self.next..self.next + count;
        self.next += count;
        let Some(chains) = self.chains.get_mut(range) else { return };
        if let ([chain], []) = (&mut *chains, frame.rest)
            && let [part, ..] = chain.writable.as_slice()
            && part.iov_len >= header.len() + frame.head.len()
        {
            let to = part.iov_base.cast::<u8>();
            // SAFETY: the part has room for both; see `copy_to`. These sources are ours.
            unsafe { std::ptr::copy_nonoverlapping(header.as_ptr(), to, header.len()) };
            let (to, head) = (to.wrapping_add(header.len()), frame.head);
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(head.as_ptr(), to, head.len()) };
            // A frame with header is shorter than 2^17 bytes.
            let written = u32::try_from(header.len() + head.len()).unwrap_or(0);
            self.queue.push(chain, written);
            return;
        }
        let mut at = 0;
        copy_to(chains, &mut at, header.as_ptr(), header.len());
        copy_to(chains, &mut at, frame.head.as_ptr(), frame.head.len());
        for part in frame.rest {
            copy_to(chains, &mut at, part.iov_base.cast(), part.iov_len);
        }
        for chain in chains {
            let left = chain.writable.len();
            chain.writable.rewind();
            let written = u32::try_from(chain.writable.len() - left).unwrap_or(0);
            self.queue.push(chain, written);
        }
    }
}

/// Copies `len` bytes from `from` to the first chains' writable memory, from chain `at` on. `from` is
/// our memory, or a range of a chain that is not pushed yet.
fn copy_to(chains: &mut [Chain], at: &mut usize, mut from: *const u8, mut len: usize) {
    while len > 0 {
        let Some(chain) = chains.get_mut(*at) else { return };
        let Some(part) = chain.writable.as_slice().first() else {
            *at += 1;
            continue;
        };
        let n = part.iov_len.min(len);
        // SAFETY: `from` has `len` readable bytes by the callers; the part lies in the memory table that
        // the receiver's queue keeps. The two may overlap: one VM may have two ports.
        unsafe { std::ptr::copy(from, part.iov_base.cast::<u8>(), n) };
        chain.writable.advance(n);
        from = from.wrapping_add(n);
        len -= n;
    }
}

/// A frame of the batch and where it goes.
#[derive(Debug)]
struct Out {
    slot: Slot,
    header: NetHeader,
    copied: usize,
    to: u64,
    /// Its flow, and that one's number, if they were asked for already.
    flow: Option<(Flow, u32)>,
    /// The pair of the port that is visited, and the hash there.
    pair: u16,
    hash: HashReport,
    /// A port has it.
    taken: bool,
    /// Its chain is still to be given back.
    waits: bool,
}

impl Out {
    fn new() -> Self {
        Self {
            slot: Slot::new(),
            header: NetHeader::new_zeroed(),
            copied: 0,
            to: 0,
            flow: None,
            pair: 0,
            hash: HashReport::default(),
            taken: false,
            waits: false,
        }
    }

    /// Whether it goes to port number `at`.
    #[inline]
    fn goes_to(&self, at: u32) -> bool {
        (self.to >> at) & 1 != 0
    }

    /// What of the frame is in our memory.
    #[inline]
    fn head(&self, header_size: usize) -> &[u8] {
        self.slot.head.get(header_size..self.copied).unwrap_or(&[])
    }

    /// The frame itself, with its hash where it goes.
    #[inline]
    fn frame(&self, header_size: usize, hash: HashReport) -> Frame<'_> {
        Frame {
            header: self.header,
            head: self.head(header_size),
            rest: self.slot.chain.readable.as_slice(),
            len: self.slot.len - header_size,
            hash,
        }
    }

    /// Its flow, and the number of that.
    fn flow(&mut self, header_size: usize) -> &(Flow, u32) {
        let found = self.flow.take().unwrap_or_else(|| {
            let flow = Flow::of(self.head(header_size));
            (flow, flow.id())
        });
        self.flow.insert(found)
    }
}

/// The worker of one queue pair of a port.
#[derive(Debug)]
pub(crate) struct SwitchWorker {
    gate: Gate,
    port: SwitchPort,
    pair: u16,
    /// How the other ports' frames are steered.
    seen: Box<[Seen]>,
    out: Box<[Out]>,
    command: Vec<u8>,
}

impl SwitchWorker {
    /// The worker of `pair` of `port`.
    #[must_use]
    pub(crate) fn new(shared: Arc<Shared>, port: SwitchPort, pair: u16) -> Self {
        let metrics = shared.metrics.get(usize::from(pair)).cloned().unwrap_or_default();
        Self {
            gate: Gate::new(shared, metrics),
            port,
            pair,
            seen: vec![Seen::default(); PORTS_MAX].into(),
            out: (0..BATCH).map(|_| Out::new()).collect(),
            command: Vec::new(),
        }
    }

    fn rx_queue(&self) -> u16 {
        self.pair.saturating_mul(2)
    }

    fn tx_queue(&self) -> u16 {
        self.rx_queue().saturating_add(1)
    }

    fn turn(&mut self, queue: &mut Queue) -> Turn {
        let mut left = BUDGET;
        let mut begun = Instant::now();
        loop {
            let (chains, end) = self.fill(queue);
            let frames = self.switch(queue, chains);
            queue.publish();
            if frames > 0 {
                begun = self.gate.metrics.tx_latency.record_since(begun, frames);
            }
            left = left.saturating_sub(chains);
            match end {
                Some(end) => return end,
                None if left == 0 => return Turn::Budget,
                None => {}
            }
        }
    }

    /// Takes a batch. Gives the chains taken, and why there are no more, if so.
    fn fill(&mut self, queue: &mut Queue) -> (usize, Option<Turn>) {
        let tick = self.port.tick();
        let flows = self.port.flows();
        let chains = take(queue, self.out.iter_mut().map(|out| &mut out.slot));
        let mut last = None;
        for at in 0..chains {
            let Some(out) = self.out.get_mut(at) else { break };
            (out.to, out.taken, out.waits, out.flow) = (0, false, false, None);
            match self.gate.check(queue, &mut out.slot) {
                Next::Frame(copied) => {
                    out.waits = true;
                    let header_size = self.gate.header_size;
                    match route(header_size, &self.port, out, copied, tick, &mut last) {
                        Some(to) => {
                            out.to = to;
                            if let Some(flows) = flows {
                                flows.learn(out.flow(header_size).1, self.pair, tick);
                            }
                        }
                        None => {
                            self.gate.metrics.tx_spoofed.add(1);
                            out.waits = false;
                            queue.push(&mut out.slot.chain, 0);
                        }
                    }
                }
                Next::Dropped => {}
                Next::Limited(until) => {
                    for out in self.out.iter_mut().take(chains).skip(at).rev() {
                        queue.unpop(&mut out.slot.chain);
                    }
                    return (at, Some(Turn::Limited(until)));
                }
            }
        }
        (chains, (chains < BATCH).then_some(Turn::Done))
    }

    /// Brings the frames of the first `chains` where they go, a destination at a time; gives their number.
    fn switch(&mut self, queue: &mut Queue, chains: usize) -> u64 {
        let header_size = self.gate.header_size;
        if self.gate.shared.capture.is_some() {
            self.record(chains);
        }
        let batch = self.out.get_mut(..chains).unwrap_or_default();
        let mut ports = batch.iter().fold(0, |all, out| all | out.to);
        while ports != 0 {
            let at = ports.trailing_zeros();
            ports &= ports - 1;
            let Some(peer) = self.port.peer(at as usize) else { continue };
            let active = peer.active();
            let steering = self.seen.get_mut(at as usize).and_then(|seen| peer.steering(seen));
            if active.count_ones() > 1 || steering.is_some() {
                for pair in bits(steer(peer, at, active, steering, batch, header_size)) {
                    let goes = |out: &Out| out.goes_to(at) && out.pair == pair;
                    deliver(peer, pair, batch, header_size, |out| goes(out).then_some(out.hash));
                }
            } else if let Some(pair) = bits(active).next() {
                let hash = |out: &Out| out.goes_to(at).then(HashReport::default);
                deliver(peer, pair, batch, header_size, hash);
            }
        }
        let (mut bytes, mut sent, mut frames) = (0, 0, 0);
        for out in batch.iter_mut().filter(|out| out.waits) {
            frames += 1;
            if out.taken {
                bytes += out.slot.len as u64;
                sent += 1;
            }
            queue.push(&mut out.slot.chain, 0);
        }
        self.gate.metrics.tx_frames.add(sent);
        self.gate.metrics.tx_failed.add(frames - sent);
        queue.metrics().bytes_read.add(bytes);
        frames
    }

    /// Records the frames of the first `chains` that may go anywhere.
    #[cold]
    fn record(&self, chains: usize) {
        let Some(capture) = &self.gate.shared.capture else { return };
        for out in self.out.iter().take(chains).filter(|out| out.waits) {
            let frame = out.frame(self.gate.header_size, HashReport::default());
            capture.record(frame.len, |room, most| frame.append_to(room, most));
        }
    }

    fn take_receiver(&self) -> Option<Box<Queue>> {
        self.port.set_receiver(self.pair, None).map(|receiver| receiver.queue)
    }
}

/// Says on which of its pairs each frame for port number `at` goes to it, and the frame's hash there; gives all
/// those pairs, a bit for each. The driver's table names any pair, automatic steering the `active` ones.
fn steer(
    peer: Peer<'_>,
    at: u32,
    active: u64,
    steering: Option<&Steering>,
    batch: &mut [Out],
    header_size: usize,
) -> u64 {
    let mut pairs = 0;
    for out in batch.iter_mut().filter(|out| out.goes_to(at)) {
        let &(flow, id) = out.flow(header_size);
        out.hash = steering.map_or_else(HashReport::default, |steering| steering.hash(&flow));
        out.pair = match steering.and_then(|steering| steering.pair(out.hash)) {
            Some(pair) => pair,
            None => peer.pair_of(id, active),
        };
        pairs |= 1u64.checked_shl(out.pair.into()).unwrap_or(0);
    }
    pairs
}

/// Gives the frames of `batch` for which `goes` has a hash to a port's receive queue, in order.
#[inline]
fn deliver(
    peer: Peer<'_>,
    pair: u16,
    batch: &mut [Out],
    header_size: usize,
    goes: impl Fn(&Out) -> Option<HashReport>,
) {
    let Some((mut receiver, offloads)) = peer.receiver(pair) else { return };
    let Some(receiver) = receiver.as_mut() else { return };
    receiver.begin(batch.iter().filter(|out| goes(out).is_some()).count());
    for out in batch.iter_mut() {
        let Some(hash) = goes(out) else { continue };
        let taken = receiver.receive(&out.frame(header_size, hash), offloads);
        out.taken |= taken;
    }
    receiver.end();
}

/// Addresses as they stand in a frame, and where such a frame goes.
type Way = ([MacAddr; 2], u64);

/// Where a frame goes, and its clean header in `out`; `None`: its address is another port's. `last` is the
/// way of the frame before, which is most often that of the next one too.
#[inline]
fn route(
    header_size: usize,
    port: &SwitchPort,
    out: &mut Out,
    copied: usize,
    tick: u64,
    last: &mut Option<Way>,
) -> Option<u64> {
    let (header, frame) = out.slot.head.get(..copied)?.split_at_checked(header_size)?;
    out.header = NetHeader::new_zeroed();
    // What may follow `num_buffers` says nothing on a frame that is sent.
    let clean = header.get(..HEADER_SIZE).unwrap_or(header);
    out.header.as_mut_bytes().get_mut(..clean.len())?.copy_from_slice(clean);
    out.copied = copied;
    let (to, rest) = MacAddr::read_from_prefix(frame).ok()?;
    let (from, _) = MacAddr::read_from_prefix(rest).ok()?;
    if let Some((addresses, ports)) = *last
        && addresses == [to, from]
    {
        return Some(ports);
    }
    let ports = port.route(to, from, tick)?;
    *last = Some(([to, from], ports));
    Some(ports)
}

impl QueueHandler for SwitchWorker {
    fn on_start(&mut self, index: u16, cx: &mut Context) {
        if self.gate.shared.control_queue() == Some(index) {
            self.gate.shared.set_control(true);
        } else if index == self.tx_queue() {
            let features = cx.queues.get(index).map_or(0, |q| q.features());
            self.gate.start(features);
        }
    }

    fn take_back(&mut self, index: u16, cx: &mut Context) -> bool {
        let lent = if index == self.rx_queue() { self.take_receiver() } else { None };
        let was_lent = lent.is_some();
        lent.into_iter().for_each(|queue| cx.queues.put(queue));
        was_lent
    }

    fn on_stop(&mut self, index: u16, cx: &mut Context) {
        if self.gate.shared.control_queue() == Some(index) {
            self.gate.shared.set_control(false);
        } else if index == self.tx_queue() {
            cx.set_timer(None);
        }
    }

    fn on_kick(&mut self, index: u16, cx: &mut Context) -> Progress {
        if index == self.rx_queue() {
            if let Some(mut queue) = cx.queues.take(index) {
                queue.disable_notifications();
                let (shared, metrics) = (self.gate.shared.clone(), self.gate.metrics.clone());
                let receiver = Receiver::new(queue, shared, metrics);
                self.port.set_receiver(self.pair, Some(receiver));
            }
            return Progress::Waiting;
        }
        let Some(queue) = cx.queues.get(index) else { return Progress::Waiting };
        if index != self.tx_queue() {
            return answer_commands(&self.gate.shared, &mut self.command, queue);
        }
        match self.turn(queue) {
            Turn::Done | Turn::NoBuffers | Turn::Full => Progress::Emptied,
            Turn::Budget => Progress::More,
            Turn::Limited(at) => {
                cx.set_timer(Some(at));
                Progress::Waiting
            }
        }
    }

    fn on_timer(&mut self, cx: &mut Context) {
        cx.ask(self.tx_queue());
    }
}

impl Drop for SwitchWorker {
    fn drop(&mut self) {
        // The session is over: its queue must not receive for a guest that left.
        self.take_receiver();
    }
}
