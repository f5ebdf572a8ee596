//! A worker: one queue pair on one descriptor of the back end.
//!
//! # Theory of operation
//! Everything happens in turns with a budget: a turn of transmit, a turn of receive, then the event
//! loop looks at the world. So a flood one way never starves the other, nor the session.
//!
//! The back end's descriptor is watched edge-triggered: an edge means "read until there is no more",
//! which [`RxSide`] remembers. It asks for a turn of the receive queue and so does the driver's kick;
//! both end up in [`NetWorker::on_kick`].

mod rx;
pub(crate) mod switch;
mod tx;

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use epoll::Events;
use outboard_common::ring::{Chain, Queue};
use outboard_common::worker::{Context, Progress, QueueHandler};
use virtio_bindings::virtio_net as v;

use self::rx::RxSide;
use self::tx::TxSide;
use crate::batch::BatchIo;
use crate::config::S_ANNOUNCE;
use crate::control::{self, Command, MAX_COMMAND_SIZE, Negotiated};
use crate::shared::Shared;

/// The back end's descriptor.
const TOKEN_BACKEND: u64 = 1;

/// How a turn of one direction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Nothing left to do: the driver's ring (transmit) or the back end (receive) is empty.
    Done,
    /// Frames wait, and the guest gives no buffers for them.
    NoBuffers,
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
    fd: OwnedFd,
    io: Option<BatchIo>,
    rx: RxSide,
    tx: TxSide,
    /// Commands are read into this.
    command: Vec<u8>,
    /// When a limited direction may go on.
    rx_at: Option<Instant>,
    tx_at: Option<Instant>,
}

impl NetWorker {
    /// The worker of queue pair `pair`.
    ///
    /// # Errors
    /// There is no such pair, or the process is out of descriptors.
    pub fn new(shared: Arc<Shared>, pair: u16) -> anyhow::Result<Self> {
        let fd =
            shared.backend.queue(pair).ok_or_else(|| anyhow::anyhow!("no queue pair {pair}"))?;
        let fd = fd.try_clone_to_owned()?;
        let metrics = shared.metrics.get(usize::from(pair)).cloned().unwrap_or_default();
        let rx = RxSide::new(shared.clone(), metrics.clone());
        let tx = TxSide::new(shared.clone(), metrics);
        Ok(Self {
            shared,
            pair,
            fd,
            io: None,
            rx,
            tx,
            command: Vec::new(),
            rx_at: None,
            tx_at: None,
        })
    }

    fn rx_queue(&self) -> u16 {
        self.pair.saturating_mul(2)
    }

    /// The limits' timer: whichever direction may go on first.
    fn set_timer(&self, cx: &mut Context) {
        let first = match (self.rx_at, self.tx_at) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        cx.set_timer(first);
    }

    fn receive(&mut self, index: u16, cx: &mut Context) -> Progress {
        let (Some(io), Some(queue)) = (&mut self.io, cx.queues.get(index)) else {
            return Progress::Waiting;
        };
        self.rx_at = None;
        match self.rx.turn(io, queue) {
            Turn::Done => Progress::Waiting,
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
        let (Some(io), Some(queue)) = (&mut self.io, cx.queues.get(index)) else {
            return Progress::Waiting;
        };
        self.tx_at = None;
        match self.tx.turn(io, queue) {
            Turn::Done | Turn::NoBuffers => Progress::Emptied,
            Turn::Budget => Progress::More,
            Turn::Limited(at) => {
                self.tx_at = Some(at);
                self.set_timer(cx);
                Progress::Waiting
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
            true
        }
        Command::GuestOffloads(offloads) => shared.set_guest_offloads(*offloads),
        // Not offered, so never negotiated.
        Command::CoalesceRx(_) | Command::CoalesceTx(_) => false,
        Command::MacAddr(mac) => {
            if let Err(error) = shared.backend.set_mac(*mac) {
                tracing::warn!(device = %shared.name, %mac, %error, "the back end refuses this address");
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
    let mut filter = (*shared.rx_filter()).clone();
    filter.apply(command);
    shared.set_rx_filter(filter);
}

impl QueueHandler for NetWorker {
    fn on_init(&mut self, cx: &mut Context) -> std::io::Result<()> {
        let fd: RawFd = self.fd.as_raw_fd();
        let borrowed: BorrowedFd<'_> = std::os::fd::AsFd::as_fd(&self.fd);
        self.io = Some(BatchIo::new(borrowed, self.shared.plain_io));
        cx.watch(fd, Events::EPOLLIN | Events::EPOLLET, TOKEN_BACKEND)
    }

    fn on_start(&mut self, index: u16, cx: &mut Context) {
        if self.shared.control_queue() == Some(index) {
            self.shared.set_control(true);
            return;
        }
        let features = cx.queues.get(index).map_or(0, |q| q.features());
        if index == self.rx_queue() {
            self.rx.start(features);
            if self.shared.uses_pair(self.pair) {
                self.shared.backend.set_pair_running(self.pair, true);
            }
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
            self.shared.backend.set_pair_running(self.pair, false);
            self.rx_at = None;
            if let Some(queue) = cx.queues.get(index) {
                self.rx.stop(queue);
            }
        } else {
            self.tx_at = None;
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

    fn on_event(&mut self, token: u64, _events: Events, cx: &mut Context) {
        if token == TOKEN_BACKEND {
            self.rx.set_readable();
            cx.ask(self.rx_queue());
        }
    }

    fn on_timer(&mut self, cx: &mut Context) {
        if self.rx_at.take().is_some() {
            cx.ask(self.rx_queue());
        }
        if self.tx_at.take().is_some() {
            cx.ask(self.rx_queue() + 1);
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
