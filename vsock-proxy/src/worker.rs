//! The worker of one guest: queues and descriptors to the mux, and back.
//!
//! Connections outlive a stop of the queues, since a VMM stops them for a pause too. Whether the guest
//! went on or began anew is seen from where its queue starts again.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use epoll::Events;
use outboard_common::ring::Chain;
use outboard_common::worker::{Context, Progress, QueueHandler};

use crate::device::{EVENT_QUEUE, Listeners, RX_QUEUE, TX_QUEUE};
use crate::host::accept;
use crate::mux::Mux;
use crate::packet::HEADER_SIZE;

/// Tokens of the worker's own descriptors; those of connections are below.
const TOKEN_OWN: u64 = 1 << 60;
const TOKEN_CALLS: u64 = TOKEN_OWN | 0xffff;
/// Packets taken from the guest before others have their turn.
const TX_BUDGET: u32 = 128;
/// How long to wait when the system is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the next step of a handshake is waited for awake: what comes later is cheaper slept for.
const LINGER: Duration = Duration::from_micros(20);
/// Bytes between two sleeps that make a transfer: who waits for one has the reader or writer of the host to
/// wait for, which may need this processor.
const BULK: u64 = 16 << 10;
/// Where a queue of a new driver starts: split rings, packed rings.
const FRESH_BASES: [u16; 2] = [0, 0x8000];

/// What one guest's thread works on.
#[derive(Debug)]
pub(crate) struct VsockWorker {
    mux: Mux,
    listeners: Arc<Listeners>,
    restored: Arc<AtomicBool>,
    chain: Chain,
    /// Where the receive queue stopped.
    rx_base: Option<u16>,
    /// When to watch listeners again for which there were no descriptors.
    accept_again: Option<Instant>,
    /// Bytes moved until the loop last went to sleep.
    moved: u64,
}

impl VsockWorker {
    pub(crate) fn new(mux: Mux, listeners: Arc<Listeners>, restored: Arc<AtomicBool>) -> Self {
        Self {
            mux,
            listeners,
            restored,
            chain: Chain::new(),
            rx_base: None,
            accept_again: None,
            moved: 0,
        }
    }

    /// Has the timer run out at the first deadline there is.
    fn set_timer(&mut self, cx: &mut Context) {
        let deadline = self.mux.next_deadline();
        cx.set_timer(deadline.into_iter().chain(self.accept_again).min());
    }

    /// Watches all listeners that are not watched yet. One that still has clients says so again.
    ///
    /// # Errors
    /// One of them cannot be watched: the user's watches or the memory for them are used up.
    fn watch_listeners(&self, cx: &Context) -> io::Result<()> {
        let unix = self.listeners.unix.iter().map(|l| l.fd.as_raw_fd());
        let vsock = self.listeners.vsock.iter().map(|(_, fd)| fd.as_raw_fd());
        for (token, fd) in (TOKEN_OWN..).zip(unix.chain(vsock)) {
            match cx.watch(fd, Events::EPOLLIN, token) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes a client of listener `n`, Unix sockets first. One, and no more before the next event: asking
    /// for another costs as much as taking it, for the kernel makes the socket before it looks.
    fn accept(&mut self, n: usize, cx: &mut Context) {
        let listeners = self.listeners.clone();
        let unix = listeners.unix.get(n);
        let vsock = listeners.vsock.get(n.wrapping_sub(listeners.unix.len()));
        let Some(fd) = unix.map(|l| &l.fd).or(vsock.map(|(_, fd)| fd)) else { return };
        match (accept(fd), unix, vsock) {
            (Ok(Some(client)), Some(listener), _) => {
                self.mux.on_client(client, listener.socket_type, cx);
            }
            (Ok(Some(client)), None, Some((port, _))) => {
                self.mux.on_forwarded_client(client, *port, cx);
            }
            (Ok(_), ..) => {}
            (Err(error), ..) => {
                tracing::warn!(%error, "cannot take a client now");
                cx.unwatch(fd.as_raw_fd());
                self.accept_again = Some(cx.now() + ACCEPT_PAUSE);
            }
        }
    }

    /// Takes packets from the guest. The receive queue may be full meanwhile; nothing here waits for it.
    fn transmit(&mut self, cx: &mut Context) -> Progress {
        for _ in 0..TX_BUDGET {
            let Some(queue) = cx.queues.get(TX_QUEUE) else { return Progress::Emptied };
            if !queue.pop(&mut self.chain) {
                return Progress::Emptied;
            }
            let payload = self.chain.readable.len().saturating_sub(HEADER_SIZE);
            queue.metrics().bytes_read.add(payload as u64);
            self.mux.on_packet(&mut self.chain.readable, cx);
            if let Some(queue) = cx.queues.get(TX_QUEUE) {
                queue.push(&mut self.chain, 0);
            }
        }
        Progress::More
    }

    /// The receive queue starts: is it the guest that we know?
    fn on_receive_start(&mut self, base: u16, cx: &Context) {
        let restored = self.restored.swap(false, Ordering::AcqRel);
        let goes_on = self.rx_base == Some(base) && !restored;
        if goes_on {
            return;
        }
        self.mux.forget_guest(cx);
        if restored || !FRESH_BASES.contains(&base) {
            // A guest that was running, with connections that we know nothing of.
            self.mux.want_reset_event();
        }
    }
}

impl QueueHandler for VsockWorker {
    fn on_init(&mut self, cx: &mut Context) -> io::Result<()> {
        self.watch_listeners(cx)?;
        cx.watch(self.mux.calls_fd(), Events::EPOLLIN | Events::EPOLLET, TOKEN_CALLS)
    }

    fn linger_over_all(&mut self, cx: &mut Context) -> Option<Duration> {
        let sent = cx.queues.get(RX_QUEUE).map_or(0, |q| q.metrics().bytes_written.get());
        let taken = cx.queues.get(TX_QUEUE).map_or(0, |q| q.metrics().bytes_read.get());
        let moved = sent.wrapping_add(taken);
        let is_bulk = moved.wrapping_sub(std::mem::replace(&mut self.moved, moved)) >= BULK;
        Some(if is_bulk { Duration::ZERO } else { LINGER })
    }

    fn on_start(&mut self, index: u16, cx: &mut Context) {
        if let (RX_QUEUE, Some(queue)) = (index, cx.queues.get(RX_QUEUE)) {
            let base = queue.next_avail();
            self.on_receive_start(base, cx);
        }
        self.mux.send_reset_event(EVENT_QUEUE, cx);
    }

    fn on_stop(&mut self, index: u16, cx: &mut Context) {
        if let (RX_QUEUE, Some(queue)) = (index, cx.queues.get(RX_QUEUE)) {
            self.rx_base = Some(queue.next_avail());
        }
    }

    fn on_kick(&mut self, index: u16, cx: &mut Context) -> Progress {
        let progress = match index {
            TX_QUEUE => {
                let progress = self.transmit(cx);
                self.mux.pump(cx);
                progress
            }
            RX_QUEUE => {
                self.mux.pump(cx);
                Progress::Waiting
            }
            _ => {
                self.mux.send_reset_event(EVENT_QUEUE, cx);
                Progress::Waiting
            }
        };
        self.set_timer(cx);
        progress
    }

    fn on_wait(&mut self, cx: &mut Context) -> bool {
        let refused = self.mux.watch_new(cx);
        if refused {
            self.set_timer(cx);
        }
        refused
    }

    fn on_event(&mut self, token: u64, events: Events, cx: &mut Context) {
        if token == TOKEN_CALLS {
            // What the guest said before comes first: it may be the end of a connection that a call replaces.
            if self.transmit(cx) == Progress::More {
                cx.ask(TX_QUEUE);
            }
            self.mux.on_calls(cx);
        } else if token & TOKEN_OWN != 0 {
            self.accept(usize::try_from(token & !TOKEN_OWN).unwrap_or(usize::MAX), cx);
        } else {
            self.mux.on_event(token, events, cx);
        }
        self.set_timer(cx);
    }

    fn on_timer(&mut self, cx: &mut Context) {
        if self.accept_again.is_some_and(|at| at <= cx.now()) {
            self.accept_again = self.watch_listeners(cx).err().map(|error| {
                tracing::warn!(%error, "cannot look for clients now");
                cx.now() + ACCEPT_PAUSE
            });
        }
        self.mux.on_timer(cx);
        self.set_timer(cx);
    }
}
