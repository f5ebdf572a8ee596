//! All connections of one guest.
//!
//! # Theory of operation
//! Everything that happens ends in [`Mux::settle`] for the connection it happened to, which looks at
//! the state machine: it acts on the host's socket, queues the connection for the guest's receive
//! queue if it owes a packet or has data to send, sets its deadline, and removes it when it is done.
//! [`Mux::pump`] serves those queues while the guest has buffers: answers to strangers first, then
//! control packets, then data, one batch a connection in turn.
//!
//! Descriptors are registered once, edge-triggered. So the mux remembers that a socket is readable
//! until a read says otherwise; only a socket with no room is watched for room, until it has some.
//!
//! Connections live in numbered slots; a slot's generation is part of its token, so that an event or
//! deadline of a connection that is gone finds nobody.

mod clients;
mod guest;
mod pump;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use epoll::Events;
use outboard_common::worker::Context;

use crate::config::VmConfig;
use crate::connection::{Connection, HostAction, Phase};
use crate::counters::Counters;
use crate::held::Held;
use crate::host::stream::HostStream;
use crate::packet::{Cid, Header, Op, Port};
use crate::rx_queue::{Filler, Resets};
use crate::sibling::Membership;
use crate::timers::Timers;

/// Local ports of clients of the host: high, so that they are nobody's service, and below 2^31, as
/// some guests print them signed.
const CLIENT_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;
/// How long a client may take to say what it wants.
const GREETING_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a service with a full queue is tried again.
const DIAL_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes that the first read of a connection asks for; it grows with what reads find.
const BATCH_MIN: u32 = 4096;
/// Bytes that one read may ask for.
const BATCH_MAX: u32 = 1 << 20;

/// Both ends of a connection, without the guest's CID, which is always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The host's CID, or a sibling's.
    pub(crate) cid: Cid,
    /// The port there.
    pub(crate) port: Port,
    /// The guest's port.
    pub(crate) guest_port: Port,
}

/// What the host's side is told when the guest accepted.
#[derive(Debug)]
pub(crate) enum OnAccept {
    /// Nothing: it asked by AF_VSOCK.
    Silence,
    /// `OK <port>`.
    Ok,
    /// `OK <port>` on the socket over which the descriptor was passed.
    OkOn(OwnedFd),
    /// The byte that siblings agreed on.
    Byte,
}

/// Where the host's side of a connection is.
#[derive(Debug)]
enum Side {
    /// It is there.
    Ready,
    /// The service's queue was full; it is tried again.
    Busy,
    /// It connects, and is writable when that is decided.
    Connecting,
    /// A sibling has been called, and says one byte when it accepted.
    Called,
}

/// A connection with its host's end and its data.
#[derive(Debug)]
struct Live {
    key: Key,
    connection: Connection,
    /// When it was asked for.
    begun: Instant,
    /// `None` while it is dialled, and after it is over.
    stream: Option<HostStream>,
    side: Side,
    on_accept: OnAccept,
    held: Option<Box<Held>>,
    /// A message that goes to the guest piece by piece.
    message: Option<Message>,
    /// A read may find something.
    readable: bool,
    /// No more will come from the writer than there is.
    ending: bool,
    /// The host's peer is gone altogether.
    gone: bool,
    /// Watched for room to write.
    wants_room: bool,
    /// Bytes that the next read asks for.
    batch: u32,
    /// In the queue of those that owe packets, of those that have data.
    in_control: bool,
    in_data: bool,
    /// The key leads to another connection now.
    detached: bool,
    /// The state machine's time-out that `deadline` was made from.
    timeout: Option<Duration>,
    deadline: Option<Instant>,
}

/// A message on its way to the guest.
#[derive(Debug)]
struct Message {
    bytes: Vec<u8>,
    /// How much went.
    sent: usize,
    /// Those of the packet with its end.
    flags: u32,
}

/// A client of the host that has not said what it wants.
#[derive(Debug)]
struct Client {
    stream: OwnedFd,
    socket_type: crate::packet::SocketType,
    /// It said `passfd`.
    passes: bool,
    deadline: Instant,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Free,
    Client(Box<Client>),
    Live(Box<Live>),
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    state: State,
}

/// All connections of one guest. See the module.
#[derive(Debug)]
pub(crate) struct Mux {
    config: Arc<VmConfig>,
    membership: Membership,
    pub(crate) counters: Counters,
    slots: Vec<Slot>,
    free: Vec<u32>,
    index: HashMap<Key, u32>,
    /// Slots that owe packets, slots that have data.
    control: VecDeque<u32>,
    data: VecDeque<u32>,
    resets: Resets,
    filler: Filler,
    timers: Timers,
    next_port: u32,
    /// Tokens of connections whose host's end is not watched yet.
    unwatched: Vec<u64>,
    /// The guest is to be told that its transport was reset.
    reset_event: bool,
}

/// Generations are counted modulo this, so that tokens stay below the event loop's limit.
const GENERATIONS: u32 = 1 << 24;

impl Mux {
    pub(crate) fn new(config: Arc<VmConfig>, membership: Membership, counters: Counters) -> Self {
        Self {
            config,
            membership,
            counters,
            slots: Vec::new(),
            free: Vec::new(),
            index: HashMap::new(),
            control: VecDeque::new(),
            data: VecDeque::new(),
            resets: Resets::default(),
            filler: Filler::default(),
            timers: Timers::default(),
            next_port: CLIENT_PORTS.start,
            unwatched: Vec::new(),
            reset_event: false,
        }
    }

    /// Readable when siblings call.
    pub(crate) fn calls_fd(&self) -> i32 {
        self.membership.mailbox.wake_fd()
    }

    /// Slots in use.
    fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn is_full(&self) -> bool {
        self.in_use() >= usize::try_from(self.config.policy.max_connections).unwrap_or(usize::MAX)
    }

    fn token(&self, at: u32) -> u64 {
        let generation = self.slots.get(at as usize).map_or(0, |s| s.generation);
        u64::from(generation) << 32 | u64::from(at)
    }

    /// The slot that `token` means, if it still does.
    fn slot_of(&self, token: u64) -> Option<u32> {
        let at = u32::try_from(token & 0xffff_ffff).ok()?;
        let generation = u32::try_from(token >> 32).ok()?;
        let slot = self.slots.get(at as usize)?;
        (slot.generation == generation && !matches!(slot.state, State::Free)).then_some(at)
    }

    fn live(&mut self, at: u32) -> Option<&mut Live> {
        match &mut self.slots.get_mut(at as usize)?.state {
            State::Live(live) => Some(live),
            _ => None,
        }
    }

    /// Puts `state` into a free slot.
    fn insert(&mut self, state: State) -> u32 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            // Limited by `max_connections`, which has 32 bits.
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        self.slots[at as usize].state = state;
        at
    }

    /// Empties a slot; its descriptors close.
    fn remove(&mut self, at: u32, cx: &Context) {
        let Some(slot) = self.slots.get_mut(at as usize) else { return };
        slot.generation = (slot.generation + 1) % GENERATIONS;
        match std::mem::take(&mut slot.state) {
            State::Free => return,
            State::Client(_) => {}
            State::Live(live) => {
                if let Some(stream) = &live.stream {
                    unwatch(cx, stream);
                }
                if !live.detached {
                    self.index.remove(&live.key);
                }
                self.counters.open(-1);
            }
        }
        self.free.push(at);
        if self.free.len() == self.slots.len() {
            self.slots.shrink_to(64);
            self.index.shrink_to(64);
        }
    }

    /// Adds a connection and makes its key lead to it.
    fn add_live(
        &mut self,
        key: Key,
        connection: Connection,
        on_accept: OnAccept,
        cx: &Context,
    ) -> u32 {
        let at = self.insert(State::Free);
        self.make_live(at, key, connection, on_accept, cx);
        at
    }

    /// Makes the connection that slot `at` was taken for.
    fn make_live(
        &mut self,
        at: u32,
        key: Key,
        connection: Connection,
        on_accept: OnAccept,
        cx: &Context,
    ) {
        let Some(slot) = self.slots.get_mut(at as usize) else { return };
        slot.state = State::Live(Box::new(Live {
            key,
            connection,
            begun: cx.now(),
            stream: None,
            side: Side::Ready,
            on_accept,
            held: None,
            message: None,
            readable: true,
            ending: false,
            gone: false,
            wants_room: false,
            batch: BATCH_MIN,
            in_control: false,
            in_data: false,
            detached: false,
            timeout: None,
            deadline: None,
        }));
        self.index.insert(key, at);
        self.counters.opened.add(1);
        self.counters.open(1);
    }

    /// Gives a connection its host's end, watched before the loop waits next.
    fn attach(&mut self, at: u32, stream: HostStream) {
        let token = self.token(at);
        let Some(live) = self.live(at) else { return };
        // A socket says itself whether there is anything; asking would be one more system call for each
        // connection. What was passed may be a file, which cannot be watched and is always ready.
        live.readable = stream.is_shared();
        live.stream = Some(stream);
        self.unwatched.push(token);
    }

    /// Watches what was attached since the last wait, and is still there. True: not all can be.
    pub(crate) fn watch_new(&mut self, cx: &mut Context) -> bool {
        let mut refused = false;
        while let Some(token) = self.unwatched.pop() {
            let Some(at) = self.slot_of(token) else { continue };
            let Some(live) = self.live(at) else { continue };
            let Some(stream) = &live.stream else { continue };
            let room = if live.wants_room { Events::EPOLLOUT } else { Events::empty() };
            let is_watched = watch(cx, stream.as_raw_fd(), token, room);
            if !is_watched && !stream.is_shared() {
                self.refuse(at);
                self.settle(at, cx);
                refused = true;
            }
        }
        if refused {
            self.pump(cx);
        }
        refused
    }

    /// Brings the outside in line with a connection's state. See the module.
    fn settle(&mut self, at: u32, cx: &Context) {
        let token = self.token(at);
        let Some(live) = self.live(at) else { return };
        while let Some(action) = live.connection.host_action() {
            let Some(stream) = &live.stream else { continue };
            match action {
                HostAction::ShutdownWrite => stream.shutdown_write(),
                HostAction::ShutdownRead => stream.shutdown_read(),
            }
        }
        if live.connection.phase() == Phase::Over && live.held.is_none() {
            // The host sees the end at once, whenever the guest takes its RST.
            if let Some(stream) = live.stream.take() {
                unwatch(cx, &stream);
            }
            if let OnAccept::OkOn(_) = live.on_accept {
                live.on_accept = OnAccept::Silence;
            }
        }
        if live.connection.is_done() {
            self.remove(at, cx);
            return;
        }
        let has_data = live.readable || live.message.is_some();
        if has_data && live.connection.takes_data() && matches!(live.side, Side::Ready) {
            if live.connection.sendable() == 0 {
                live.connection.want_credit();
            } else if !live.in_data {
                live.in_data = true;
                self.data.push_back(at);
            }
        }
        self.queue_control(at);
        self.set_deadline(at, token, cx);
    }

    fn queue_control(&mut self, at: u32) {
        let Some(live) = self.live(at) else { return };
        if live.connection.owes_packet() && !live.in_control {
            live.in_control = true;
            self.control.push_back(at);
        }
    }

    fn set_deadline(&mut self, at: u32, token: u64, cx: &Context) {
        let Some(live) = self.live(at) else { return };
        let timeout = live.connection.timeout();
        if timeout == live.timeout {
            return;
        }
        live.timeout = timeout;
        live.deadline = timeout.and_then(|t| cx.now().checked_add(t));
        if let Some(deadline) = live.deadline {
            self.timers.add(deadline, token);
        }
    }

    /// The first deadline there is.
    pub(crate) fn next_deadline(&mut self) -> Option<Instant> {
        let Self { timers, slots, free, .. } = self;
        timers.sweep(slots.len() - free.len(), |at, token| {
            let slot = slots.get(usize::try_from(token & 0xffff_ffff).unwrap_or(usize::MAX));
            slot.is_some_and(|slot| {
                u64::from(slot.generation) == token >> 32
                    && match &slot.state {
                        State::Free => false,
                        State::Client(client) => client.deadline == at,
                        // Services that are tried again have deadlines of their own.
                        State::Live(live) => {
                            live.deadline == Some(at) || matches!(live.side, Side::Busy)
                        }
                    }
            })
        });
        timers.first()
    }

    /// Acts on all deadlines that have come.
    pub(crate) fn on_timer(&mut self, cx: &mut Context) {
        let now = cx.now();
        while let Some(token) = self.timers.next_due(now) {
            let Some(at) = self.slot_of(token) else { continue };
            match &mut self.slots[at as usize].state {
                State::Client(client) if client.deadline <= now => self.remove(at, cx),
                State::Live(live) => {
                    if live.deadline.is_some_and(|d| d <= now) {
                        self.on_timeout(at, cx);
                    } else if matches!(live.side, Side::Busy) {
                        self.dial(at, cx);
                    }
                }
                _ => {}
            }
        }
        self.pump(cx);
    }

    fn on_timeout(&mut self, at: u32, cx: &Context) {
        self.counters.timeouts.add(1);
        let Some(live) = self.live(at) else { return };
        live.deadline = None;
        if live.connection.on_timeout() {
            live.held = None;
            live.connection.on_dropped_held();
        }
        self.settle(at, cx);
    }

    /// A packet's header for the connection at `key`.
    fn header(config: &VmConfig, key: &Key, live: &mut Connection, op: Op, flags: u32) -> Header {
        let (buf_alloc, fwd_cnt) = live.stamp();
        Header {
            src_cid: key.cid,
            dst_cid: config.guest_cid,
            src_port: key.port,
            dst_port: key.guest_port,
            len: 0,
            socket_type: live.socket_type().to_wire(),
            op: op.to_wire(),
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// The guest is another one from now on, or forgot everything: so do we. Clients whose REQUEST
    /// waits for a guest to start stay.
    pub(crate) fn forget_guest(&mut self, cx: &Context) {
        self.control.clear();
        self.data.clear();
        self.resets.clear();
        for at in 0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX) {
            let Some(live) = self.live(at) else { continue };
            if live.connection.is_unknown_to_guest() {
                live.in_control = false;
                self.settle(at, cx);
            } else {
                self.remove(at, cx);
            }
        }
    }

    /// The guest is to be told on its event queue that connections are gone.
    pub(crate) fn want_reset_event(&mut self) {
        self.reset_event = true;
    }

    /// Tells the guest of the reset, if that is wanted and it has a buffer for it.
    pub(crate) fn send_reset_event(&mut self, index: u16, cx: &mut Context) {
        const VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: u32 = 0;
        if !self.reset_event {
            return;
        }
        let Some(queue) = cx.queues.get(index) else { return };
        let mut chain = outboard_common::ring::Chain::new();
        if queue.pop(&mut chain) {
            let event = VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.to_le_bytes();
            let n = chain.writable.write(&event);
            queue.push(&mut chain, u32::try_from(n).unwrap_or(0));
            self.reset_event = n < event.len();
        }
    }
}

/// Ends the watch of a stream that is about to be closed. Closing does it, unless it is open elsewhere.
fn unwatch(cx: &Context, stream: &HostStream) {
    if stream.is_shared() {
        cx.unwatch(stream.as_raw_fd());
    }
}

/// Watches `fd` for data, its end, and `more`. False: it cannot be watched, and needs not be (a file).
fn watch(cx: &Context, fd: i32, token: u64, more: Events) -> bool {
    let events = Events::EPOLLIN | Events::EPOLLRDHUP | Events::EPOLLET | more;
    cx.watch(fd, events, token).is_ok()
}
