//! A worker: one queue pair on one descriptor of the back end.
//!
//! # Theory of operation
//! Everything happens in turns with a budget of frames, the same for both directions, and the event loop
//! gives each direction that has work one turn a round. So a flood one way never starves the other, nor
//! the session.
//!
//! The back end's descriptor is watched edge-triggered: an edge means "read until there is no more",
//! which [`RxSide`] remembers. It asks for a turn of the receive queue and so does the driver's kick;
//! both end up in [`NetWorker::on_kick`]. A back end that was full reports room in the same way.
//!
//! A user-mode network's connection ends when its program does. The cable is out then, as far as the
//! guest can see, and frames stay in its ring until the keeper sends another connection. So it is when
//! somebody deletes the interface; only another daemon can open the next one then.

mod doubt;
mod fetch;
mod frame_io;
mod moderation;
mod pace;
mod rest;
mod rework;
mod rx;
pub(crate) mod switch;
mod tx;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Instant;

use epoll::Events;
use outboard_common::ring::{Chain, Queue};
use outboard_common::warn_limited;
use outboard_common::worker::{Context, Progress, QueueHandler};
use virtio_bindings::virtio_net as v;

use self::doubt::Doubt;
use self::frame_io::{FrameIo, Reworked};
use self::moderation::{Moderation, OF_BULK, Rule, of_sent_frames};
use self::pace::{Bulk, NEAR, PACE, is_roomy};
use self::rest::Rest;
use self::rework::Rework;
use self::rx::RxSide;
use self::tx::TxSide;
use crate::backend::user::{News, UserLink};
use crate::batch::BatchIo;
use crate::config::S_ANNOUNCE;
use crate::control::{self, Command, MAX_COMMAND_SIZE, Negotiated};
use crate::header::header_size;
use crate::shared::{Flow, PairMetrics, Shared};
use crate::stream::FrameStream;

/// The back end's descriptor.
const TOKEN_BACKEND: u64 = 1;
/// News of a user-mode network.
const TOKEN_LINE: u64 = 2;

/// How a turn of one direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nothing left to do: the driver's ring (transmit) or the back end (receive) is empty.
    Done,
    /// Frames wait, and the guest gives no buffers for them.
    NoBuffers,
    /// Frames wait, and the back end has no room for them.
    Full,
    /// The budget is used up.
    Budget,
    /// A limit is reached; go on at that time.
    Limited(Instant),
}

/// The handler of one queue pair's events.
#[derive(Debug)]
pub struct NetWorker {
    shared: Arc<Shared>,
    pair: u16,
    link: Option<Arc<UserLink>>,
    /// `None` before the loop runs, and while a user-mode network has no program.
    io: Option<FrameIo>,
    rx: RxSide,
    tx: TxSide,
    /// Commands are read into this.
    command: Vec<u8>,
    /// When a limited direction may go on.
    rx_at: Option<Instant>,
    tx_at: Option<Instant>,
    metrics: PairMetrics,
    rx_signals: Moderation,
    tx_signals: Moderation,
    rx_bulk: Bulk,
    tx_bulk: Bulk,
    /// Whether to be woken by frames, or to look for them later.
    rest: Rest,
    look_at: Option<Instant>,
    /// In bulk: when to look for frames of the guest, which is not asked to kick meanwhile.
    tx_look: Option<Instant>,
    /// Whether the interface is still there.
    doubt: Doubt,
}

impl NetWorker {
    /// The worker of queue pair `pair`.
    ///
    /// # Errors
    /// There is no such pair.
    pub fn new(shared: Arc<Shared>, pair: u16) -> anyhow::Result<Self> {
        let link = shared.backend.user_link();
        anyhow::ensure!(
            link.is_some() || shared.backend.queue(pair).is_some(),
            "there is no queue pair {pair}"
        );
        let metrics = shared.metrics.get(usize::from(pair)).cloned().unwrap_or_default();
        let rx = RxSide::new(shared.clone(), metrics.clone());
        let tx = TxSide::new(shared.clone(), metrics.clone());
        Ok(Self {
            link,
            shared,
            pair,
            io: None,
            rx,
            tx,
            command: Vec::new(),
            rx_at: None,
            tx_at: None,
            metrics,
            rx_signals: Moderation::default(),
            tx_signals: Moderation::default(),
            rx_bulk: Bulk::new(Instant::now()),
            tx_bulk: Bulk::new(Instant::now()),
            rest: Rest::new(Instant::now()),
            look_at: None,
            tx_look: None,
            doubt: Doubt::new(Instant::now()),
        })
    }

    fn rx_queue(&self) -> u16 {
        self.pair.saturating_mul(2)
    }

    /// The timer of limits and of signals held back: whatever is due first.
    fn set_timer(&self, cx: &mut Context) {
        let signals = [self.rx_signals.due(), self.tx_signals.due()];
        let ours = [self.rx_at, self.tx_at, self.look_at, self.tx_look, self.doubt.due()];
        let all = ours.into_iter().chain(signals);
        cx.set_timer(all.flatten().min());
    }

    /// Whether rings and back end are looked at now and then, and not waited for.
    fn is_paced(&self, now: Instant, ring_size: u16) -> bool {
        is_roomy(ring_size)
            && (self.rx_bulk.is_on(now) || self.tx_bulk.is_on(now))
            && self.io.as_ref().is_some_and(FrameIo::has_ring)
    }

    fn receive(&mut self, index: u16, cx: &mut Context) -> Progress {
        let now = cx.now();
        let paced = cx.queues.get(index).is_some_and(|q| self.is_paced(now, q.size()));
        let (Some(io), Some(queue)) = (&mut self.io, cx.queues.get(index)) else {
            return Progress::Waiting;
        };
        self.rx_at = None;
        io.set_guest(self.shared.guest_offloads(), header_size(queue.features()));
        let ours = if paced {
            Rule::EachLook
        } else if self.rx_bulk.is_on(now) {
            OF_BULK
        } else {
            Rule::AtOnce
        };
        self.rx_signals.set(self.shared.coalescing(Flow::Rx), ours, queue);
        let before = self.metrics.rx_frames.get();
        let bytes_before = queue.metrics().bytes_written.get();
        let turn = self.rx.turn(io, queue);
        let frames = self.metrics.rx_frames.get() - before;
        self.rx_bulk.add(queue.metrics().bytes_written.get() - bytes_before, now);
        self.rx_signals.after_turn(queue, frames);
        if turn == Turn::NoBuffers {
            self.rx_signals.out_of_buffers(queue);
        }
        if self.rx_signals.due().is_some() {
            self.set_timer(cx);
        }
        self.check_connection(cx);
        if turn == Turn::Done {
            self.rest_or_not(frames, paced, cx);
        }
        match turn {
            Turn::Done | Turn::Full => Progress::Waiting,
            Turn::NoBuffers => Progress::Emptied,
            Turn::Budget => Progress::More,
            Turn::Limited(at) => {
                self.rx_at = Some(at);
                self.set_timer(cx);
                Progress::Waiting
            }
        }
    }

    fn transmit(&mut self, index: u16, cx: &mut Context) -> Progress {
        let now = cx.now();
        let (Some(io), Some(queue)) = (&mut self.io, cx.queues.get(index)) else {
            return Progress::Waiting;
        };
        (self.tx_at, self.tx_look) = (None, None);
        let ours = of_sent_frames(queue.size());
        self.tx_signals.set(self.shared.coalescing(Flow::Tx), ours, queue);
        let before = self.metrics.tx_frames.get();
        let failed_before = self.metrics.tx_failed.get();
        let bytes_before = queue.metrics().bytes_read.get();
        let turn = self.tx.turn(io, queue);
        self.tx_bulk.add(queue.metrics().bytes_read.get() - bytes_before, now);
        let ring_size = queue.size();
        self.tx_signals.after_turn(queue, self.metrics.tx_frames.get() - before);
        if self.tx_signals.due().is_some() {
            self.set_timer(cx);
        }
        self.check_connection(cx);
        if self.doubt.is_due(now) {
            let failed = self.metrics.tx_failed.get() != failed_before;
            if failed || self.shared.backend.may_be_gone() {
                self.check_interface(cx);
            }
        }
        if turn == Turn::Done && self.is_paced(now, ring_size) {
            if self.tx_bulk.is_on(now) {
                self.tx_look = Some(Instant::now() + PACE);
                self.set_timer(cx);
                return Progress::Waiting;
            }
            // Acknowledgements: what they let the host's TCP send is there now.
            if self.look_at.take().is_some() {
                self.rx.set_readable();
                cx.ask(self.rx_queue());
            }
        }
        match turn {
            Turn::Done | Turn::NoBuffers => Progress::Emptied,
            Turn::Full => {
                self.wait_for_backend(cx);
                Progress::Waiting
            }
            Turn::Budget => Progress::More,
            Turn::Limited(at) => {
                self.tx_at = Some(at);
                self.set_timer(cx);
                Progress::Waiting
            }
        }
    }

    /// The back end is empty after `frames` frames: decides how to hear of the next one.
    fn rest_or_not(&mut self, frames: u64, paced: bool, cx: &mut Context) {
        if !self.io.as_ref().is_some_and(FrameIo::has_ring) {
            return;
        }
        let was_resting = self.rest.is_on();
        self.look_at = self.rest.emptied(frames, paced, Instant::now());
        if self.look_at.is_some() {
            self.set_timer(cx);
        }
        if self.rest.is_on() == was_resting {
            return;
        }
        self.wait_for_backend(cx);
    }

    /// Waits for frames, unless they are looked for, and for room where there was none: a macvtap tells of
    /// it only who asked after it was full. What happened meanwhile is an event at once.
    fn wait_for_backend(&mut self, cx: &mut Context) {
        let Some(io) = &self.io else { return };
        let mut events = Events::EPOLLET;
        events.set(Events::EPOLLIN, !self.rest.is_on());
        events
            .set(Events::EPOLLOUT, self.tx.is_full() || self.shared.backend.tells_of_frames_sent());
        if let Err(error) = cx.rewatch(io.raw_fd(), events, TOKEN_BACKEND) {
            tracing::error!(device = %self.shared.name, %error, "cannot wait for the back end");
        }
    }

    /// Opens the way to a back end with a descriptor of its own for each pair.
    fn open(&mut self, cx: &mut Context) -> std::io::Result<()> {
        let fd = self.shared.backend.queue(self.pair).ok_or(std::io::ErrorKind::NotFound)?;
        let fd = fd.try_clone_to_owned()?;
        let io = BatchIo::new(fd.as_fd(), self.shared.plain_io);
        let io = Box::new(io);
        let io = if self.shared.backend.takes_offloads() {
            FrameIo::Calls(fd, io)
        } else {
            let rework = Rework::new(self.metrics.rx_unsegmented.clone());
            FrameIo::Reworked(fd, io, Box::new(Reworked::new(rework)))
        };
        self.use_io(io, cx)
    }

    fn use_io(&mut self, io: FrameIo, cx: &mut Context) -> std::io::Result<()> {
        let mut events = Events::EPOLLIN | Events::EPOLLET;
        events.set(Events::EPOLLOUT, self.shared.backend.tells_of_frames_sent());
        cx.watch(io.raw_fd(), events, TOKEN_BACKEND)?;
        self.io = Some(io);
        Ok(())
    }

    /// Goes on with a (new) connection to a user-mode network.
    fn connect(&mut self, mut stream: Box<FrameStream>, cx: &mut Context) {
        stream.set_header_size(header_size(self.shared.features()));
        if let Err(error) = self.use_io(FrameIo::Stream(stream), cx) {
            tracing::error!(device = %self.shared.name, %error, "cannot wait for the user-mode network");
            return;
        }
        self.rx.set_readable();
        cx.ask(self.rx_queue());
        cx.ask(self.rx_queue() + 1);
    }

    /// Pulls the cable when the connection to a user-mode network has ended.
    fn check_connection(&mut self, cx: &mut Context) {
        let Some(error) = self.io.as_mut().and_then(FrameIo::take_error) else { return };
        tracing::warn!(device = %self.shared.name, %error, "the user-mode network is gone; the link is down until another one runs");
        if let Some(io) = self.io.take() {
            cx.unwatch(io.raw_fd());
        }
        self.shared.set_network(false);
    }

    /// Pulls the cable when the interface was deleted.
    fn check_interface(&mut self, cx: &mut Context) {
        if !self.shared.backend.is_gone() {
            return;
        }
        self.doubt.settle();
        if let Some(io) = self.io.take() {
            cx.unwatch(io.raw_fd());
        }
        (self.rx_at, self.tx_at, self.look_at, self.tx_look) = (None, None, None, None);
        self.set_timer(cx);
        // The first of the workers to see it.
        if self.shared.set_network(false) {
            tracing::warn!(device = %self.shared.name, "the network interface was deleted; the link is down: create the interface again and restart this daemon");
        }
    }

    /// The back end's descriptor reports an error.
    #[cold]
    fn on_error(&mut self, cx: &mut Context) {
        if matches!(self.io, Some(FrameIo::Calls(..) | FrameIo::Reworked(..))) {
            self.doubt.raise();
            if self.doubt.is_due(Instant::now()) {
                self.check_interface(cx);
            }
            self.set_timer(cx);
        }
    }

    /// The keeper of a user-mode network has news.
    fn on_line(&mut self, cx: &mut Context) {
        let Some(link) = self.link.clone() else { return };
        while let Some(news) = link.news() {
            match news {
                News::Started(socket) => {
                    if let Some(io) = self.io.take() {
                        cx.unwatch(io.raw_fd());
                    }
                    self.connect(Box::new(FrameStream::new(socket)), cx);
                    self.shared.set_network(true);
                    tracing::info!(device = %self.shared.name, "a new user-mode network runs");
                }
                News::Failed(why) => {
                    tracing::warn!(device = %self.shared.name, why, "cannot start a user-mode network");
                }
                News::KeeperEnded => {
                    tracing::error!(device = %self.shared.name, "nobody is left to start a user-mode network");
                    cx.unwatch(link.line().as_raw_fd());
                    return;
                }
            }
        }
    }

    /// Answers every command that waits.
    fn control(&mut self, index: u16, cx: &mut Context) -> Progress {
        let Some(queue) = cx.queues.get(index) else { return Progress::Waiting };
        answer_commands(&self.shared, &mut self.command, queue)
    }
}

/// Answers every command that waits in the control queue; `room` is for one command.
fn answer_commands(shared: &Shared, room: &mut Vec<u8>, queue: &mut Queue) -> Progress {
    let mut chain = Chain::new();
    while queue.pop(&mut chain) {
        let len = chain.readable.len().min(MAX_COMMAND_SIZE + 1);
        room.resize(len, 0);
        chain.readable.read(room);
        let negotiated = Negotiated { features: queue.features(), max_pairs: shared.max_pairs() };
        let done = match control::parse(room, negotiated) {
            Ok(command) => obey(shared, &command),
            Err(error) => {
                tracing::debug!(device = %shared.name, %error, "control command refused");
                queue.metrics().rejected.add(1);
                false
            }
        };
        let ack = if done { control::OK } else { control::ERR };
        let written = u32::from(chain.writable.write(&[ack]) == 1);
        queue.push(&mut chain, written);
    }
    Progress::Emptied
}

/// Does what a command says; false if it cannot be done.
fn obey(shared: &Shared, command: &Command) -> bool {
    match command {
        Command::AnnounceAck => {
            shared.change_config(|config| {
                config.set_status(S_ANNOUNCE, false);
                // The driver knows: it told us.
                false
            });
            true
        }
        Command::Pairs(pairs) => {
            shared.set_pairs(*pairs);
            shared.steer_automatically();
            true
        }
        Command::Rss(pairs, steering) => {
            shared.set_pairs(*pairs);
            shared.set_steering(Some(steering.clone()));
            true
        }
        Command::Hash(steering) => {
            shared.set_steering(Some(steering.clone()));
            true
        }
        Command::GuestOffloads(offloads) => shared.set_guest_offloads(*offloads),
        Command::CoalesceRx(wish) => {
            shared.set_coalescing(Flow::Rx, *wish);
            true
        }
        Command::CoalesceTx(wish) => {
            shared.set_coalescing(Flow::Tx, *wish);
            true
        }
        Command::MacAddr(mac) => {
            if let Err(error) = shared.backend.set_mac(*mac) {
                warn_limited!(device = %shared.name, %mac, %error, "the back end refuses this address");
                return false;
            }
            shared.change_config(|config| {
                config.set_mac(*mac);
                false
            });
            change_filter(shared, command);
            true
        }
        Command::RxMode(..) | Command::MacTable { .. } | Command::Vlan(..) => {
            change_filter(shared, command);
            true
        }
    }
}

fn change_filter(shared: &Shared, command: &Command) {
    let mut filter = (*shared.driver_filter()).clone();
    filter.apply(command);
    shared.set_rx_filter(filter);
}

impl QueueHandler for NetWorker {
    fn on_init(&mut self, cx: &mut Context) -> std::io::Result<()> {
        let Some(link) = self.link.clone() else { return self.open(cx) };
        cx.watch(link.line().as_raw_fd(), Events::EPOLLIN, TOKEN_LINE)?;
        if let Some(stream) = link.take() {
            self.connect(stream, cx);
        }
        Ok(())
    }

    fn on_start(&mut self, index: u16, cx: &mut Context) {
        if self.shared.control_queue() == Some(index) {
            self.shared.set_control(true);
            return;
        }
        let features = cx.queues.get(index).map_or(0, |q| q.features());
        if let Some(FrameIo::Stream(stream)) = &mut self.io {
            stream.set_header_size(header_size(features));
        }
        if index == self.rx_queue() {
            self.rx.start(features);
            if let Some(io) = &mut self.io {
                io.forget_frames();
            }
            self.shared.set_pair_started(self.pair, true);
        } else {
            self.tx.start(features);
        }
    }

    fn on_stop(&mut self, index: u16, cx: &mut Context) {
        if self.shared.control_queue() == Some(index) {
            self.shared.set_control(false);
            return;
        }
        if index == self.rx_queue() {
            self.shared.set_pair_started(self.pair, false);
            self.rx_at = None;
            if let Some(queue) = cx.queues.get(index) {
                self.rx.stop(queue);
                self.rx_signals.stop(queue);
            }
        } else {
            self.tx_at = None;
            if let Some(queue) = cx.queues.get(index) {
                self.tx_signals.stop(queue);
            }
        }
        self.set_timer(cx);
    }

    fn on_kick(&mut self, index: u16, cx: &mut Context) -> Progress {
        if self.shared.control_queue() == Some(index) {
            self.control(index, cx)
        } else if index == self.rx_queue() {
            self.receive(index, cx)
        } else {
            self.transmit(index, cx)
        }
    }

    fn on_event(&mut self, token: u64, events: Events, cx: &mut Context) {
        if token == TOKEN_LINE {
            return self.on_line(cx);
        }
        if events.intersects(Events::EPOLLERR | Events::EPOLLHUP) {
            self.on_error(cx);
        }
        if events != Events::EPOLLOUT {
            self.rx.set_readable();
            cx.ask(self.rx_queue());
        }
        if events.contains(Events::EPOLLOUT) && self.tx.take_full() {
            self.wait_for_backend(cx);
            cx.ask(self.rx_queue() + 1);
        }
    }

    fn on_timer(&mut self, cx: &mut Context) {
        if self.rx_at.take().is_some() {
            cx.ask(self.rx_queue());
        }
        if self.tx_at.take().is_some() {
            cx.ask(self.rx_queue() + 1);
        }
        let now = Instant::now();
        // One waking for both directions: the other look is due in a moment.
        let soon = if self.tx_look.is_some() { now + NEAR } else { now };
        let is_due = |at: &mut Option<Instant>| at.take_if(|at| *at <= soon).is_some();
        let (rx, tx) = (self.rx_queue(), self.rx_queue() + 1);
        // The guest's frames first: what the host's TCP answers them is there for the second look.
        if is_due(&mut self.tx_look) {
            cx.ask(tx);
        }
        if is_due(&mut self.look_at) {
            self.rx.set_readable();
            cx.ask(rx);
        }
        if self.doubt.due().is_some() && self.doubt.is_due(now) {
            self.check_interface(cx);
        }
        for (signals, index) in [(&mut self.rx_signals, rx), (&mut self.tx_signals, tx)] {
            // A turn that is about to come may have more to tell of.
            if cx.is_asked(index) {
                continue;
            }
            if let Some(queue) = cx.queues.get(index) {
                signals.on_time(queue, now);
            }
        }
        self.set_timer(cx);
    }
}

impl Drop for NetWorker {
    fn drop(&mut self) {
        // The next guest goes on with the same connection.
        if let (Some(link), Some(FrameIo::Stream(stream))) = (&self.link, self.io.take()) {
            link.put_back(stream);
        }
    }
}

/// Whether `bit` is in `features`.
const fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// Whether a frame may fill several chains.
const fn is_mergeable(features: u64) -> bool {
    has(features, v::VIRTIO_NET_F_MRG_RXBUF)
}
