//! The loop of a worker driven by file descriptors, on epoll.
//!
//! # Theory of operation
//! Kicks are registered edge-triggered and never read: each signal is one event. After a kick the loop
//! mutes the queue, calls the handler, publishes, and goes on so until the ring is empty and a last
//! look after unmuting found nothing. A handler that leaves chains in the ring on purpose (receive
//! queues) says [`Progress::Waiting`] and is not asked again before a kick or an event of its own.
//!
//! The loop goes in rounds: whatever happened, each queue gets one turn a round at the most, and one
//! that is refilled while it is emptied gets its next turn in the next round. So queues with work share
//! the thread evenly, and a driver that keeps one of them full holds up neither the others nor the
//! session.
//!
//! A handler may have the loop linger ([`QueueHandler::linger`]): a ring just emptied is looked at a little
//! longer before the driver is asked to kick again. Going to sleep and waking costs a thread some
//! microseconds of CPU time, so a shorter look is the cheaper way if the next chain comes in time. Whether it
//! does is learnt ([`Habit`]); a driver that is slower is looked at in vain once in 32 times. Such a queue
//! gets up to [`Habit::ROW`] turns in a round.
//!
//! A queue whose chains nobody waits for may rest instead ([`QueueHandler::rest`]): emptied, it is left alone
//! for a while with kicks off, and looked at again then. While that finds chains, the driver never kicks, and
//! the worker wakes once for many of them. Kicks are asked for, and the ring looked at a last time, as soon as
//! a rest was in vain. This too is done only while it pays. Rests get longer while few chains come for the
//! ring's size.
//!
//! A handler whose next work may as well come from its descriptors has the loop look at all of them
//! ([`QueueHandler::linger_over_all`]): rings that were emptied stay muted meanwhile, and the driver is asked
//! for kicks only when the loop goes to sleep.
//!
//! With busy-polling on, an idle loop spins over `has_available` and a non-blocking `epoll_wait` for
//! as long as recent spins found work, at most the set time, before it sleeps.

use std::cell::Cell;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use epoll::{ControlOptions, Event, Events};

use super::habit::{Habit, Rests};
use super::{Command, Control};
use crate::ring::Queue;
use crate::sys::{EventFd, epoll_wait_for};

/// What a handler left behind in a queue after a kick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It popped until the ring was empty: wait for the next kick.
    Emptied,
    /// It left chains on purpose, or handles notifications itself: do not ask again by yourself.
    Waiting,
    /// Its budget ran out: look at other events, then ask again.
    More,
}

/// The queues of one worker, by index.
#[derive(Debug, Default)]
pub struct Queues {
    slots: Vec<Option<Box<Queue>>>,
}

impl Queues {
    /// The running queue `index`.
    #[inline]
    pub fn get(&mut self, index: u16) -> Option<&mut Queue> {
        self.slots.get_mut(usize::from(index))?.as_deref_mut()
    }

    /// All running queues.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Queue> {
        self.slots.iter_mut().filter_map(|q| q.as_deref_mut())
    }

    /// Puts a queue in that was taken out with [`Self::take`].
    pub fn put(&mut self, queue: Box<Queue>) {
        let at = usize::from(queue.index());
        if self.slots.len() <= at {
            self.slots.resize_with(at + 1, || None);
        }
        self.slots[at] = Some(queue);
    }

    /// Takes queue `index` out, to lend it to another thread. The loop does not serve it until it is
    /// back; see [`QueueHandler::take_back`].
    pub fn take(&mut self, index: u16) -> Option<Box<Queue>> {
        self.slots.get_mut(usize::from(index))?.take()
    }
}

/// Events of descriptors that are the loop's own carry this bit; handlers' tokens must not.
const LOOP_BIT: u64 = 1 << 63;
const TOKEN_CONTROL: u64 = LOOP_BIT | 1 << 62;

/// What a handler works with: its queues, and the descriptors and the timer it waits on.
#[derive(Debug)]
pub struct Context {
    /// The worker's queues.
    pub queues: Queues,
    epoll: RawFd,
    deadline: Option<Instant>,
    /// The time, if it was asked for since the loop last waited.
    now: Cell<Option<Instant>>,
    /// The time that a handler just knew.
    noted: Option<Instant>,
    /// Queues to be asked in the next round.
    again: Vec<u16>,
}

impl Context {
    fn ctl(&self, op: ControlOptions, fd: RawFd, events: Events, token: u64) -> io::Result<()> {
        epoll::ctl(self.epoll, op, fd, Event::new(events, token))
    }

    /// Waits for `events` on `fd`; they arrive at [`QueueHandler::on_event`] with `token`, which must
    /// be below 2^62. Closing the descriptor's last duplicate ends it too.
    ///
    /// # Errors
    /// The descriptor cannot be polled, or is watched already.
    pub fn watch(&self, fd: RawFd, events: Events, token: u64) -> io::Result<()> {
        debug_assert!(token < TOKEN_CONTROL & !LOOP_BIT);
        self.ctl(ControlOptions::EPOLL_CTL_ADD, fd, events, token)
    }

    /// Changes what to wait for.
    ///
    /// # Errors
    /// The descriptor is not watched.
    pub fn rewatch(&self, fd: RawFd, events: Events, token: u64) -> io::Result<()> {
        self.ctl(ControlOptions::EPOLL_CTL_MOD, fd, events, token)
    }

    /// Stops waiting on `fd`.
    pub fn unwatch(&self, fd: RawFd) {
        // Not watched any more is what was wanted.
        let _ = self.ctl(ControlOptions::EPOLL_CTL_DEL, fd, Events::empty(), 0);
    }

    /// Has [`QueueHandler::on_timer`] called once, at `deadline`. Replaces the one before; `None`
    /// cancels it.
    pub fn set_timer(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// The time of this round, asked of the system once: for deadlines, which a round too late does no
    /// harm.
    #[must_use]
    pub fn now(&self) -> Instant {
        let now = self.now.get().unwrap_or_else(Instant::now);
        self.now.set(Some(now));
        now
    }

    /// Tells the loop, which would ask for it next, that it is `now`.
    #[inline]
    pub fn note_time(&mut self, now: Instant) {
        self.noted = Some(now);
    }

    /// Has [`QueueHandler::on_kick`] called for queue `index` before the loop sleeps, as if the driver
    /// had kicked it. A queue that is not running is not asked.
    pub fn ask(&mut self, index: u16) {
        if !self.is_asked(index) {
            self.again.push(index);
        }
    }

    /// Whether queue `index` gets a turn before the loop sleeps, because of [`Self::ask`] or a kick.
    #[must_use]
    pub fn is_asked(&self, index: u16) -> bool {
        self.again.contains(&index)
    }
}

/// A device's part of a worker: called by the loop, always on the worker's thread.
pub trait QueueHandler: Send {
    /// The loop runs: watch descriptors here. No queue is there yet.
    ///
    /// # Errors
    /// The worker cannot serve: its queues are retired.
    fn on_init(&mut self, cx: &mut Context) -> io::Result<()> {
        let _ = cx;
        Ok(())
    }

    /// Queue `index` has just started; `on_kick` follows at once.
    fn on_start(&mut self, index: u16, cx: &mut Context) {
        let _ = (index, cx);
    }

    /// Queue `index` is about to be handed back. Afterwards every chain popped must have been pushed
    /// or given back with `unpop`; the loop publishes.
    fn on_stop(&mut self, index: u16, cx: &mut Context) {
        let _ = (index, cx);
    }

    /// The session changes queue `index` or wants it back: a handler that lent it to another thread
    /// puts it back now and says so. Unless the queue stops, `on_kick` follows.
    fn take_back(&mut self, index: u16, cx: &mut Context) -> bool {
        let _ = (index, cx);
        false
    }

    /// The driver added chains to queue `index` (or may have). The loop publishes afterwards.
    fn on_kick(&mut self, index: u16, cx: &mut Context) -> Progress;

    /// How long at most queue `index`, just emptied, is looked at before the loop sleeps, if that was worth it
    /// lately. Zero: not at all.
    fn linger(&self, index: u16) -> Duration {
        let _ = index;
        Duration::ZERO
    }

    /// How long at least queue `index`, just emptied, is left alone before it is looked at again, without a
    /// kick meanwhile, if that was worth it lately; up to eight times as long, if few chains come. For
    /// queues whose chains nobody waits for. Zero: not at all.
    fn rest(&self, index: u16) -> Duration {
        let _ = index;
        Duration::ZERO
    }

    /// How long at most all queues and descriptors are looked at before the loop sleeps this time, if that
    /// was worth it lately. `None`: this handler never wants it; the answer does not change.
    fn linger_over_all(&mut self, cx: &mut Context) -> Option<Duration> {
        let _ = cx;
        None
    }

    /// The loop is about to ask for events: descriptors that were opened since may be watched only now, and
    /// those closed again in the same burst need not be at all. True: queues were filled.
    fn on_wait(&mut self, cx: &mut Context) -> bool {
        let _ = cx;
        false
    }

    /// Something happened on a watched descriptor. The loop publishes all queues afterwards.
    fn on_event(&mut self, token: u64, events: Events, cx: &mut Context) {
        let _ = (token, events, cx);
    }

    /// The timer ran out.
    fn on_timer(&mut self, cx: &mut Context) {
        let _ = cx;
    }
}

/// An epoll loop around a handler.
#[derive(Debug)]
pub struct EventLoop<H> {
    handler: H,
    cx: Context,
    /// Queues that get a turn in this round; empty between rounds.
    round: Vec<u16>,
    /// Kicks registered, to be removed when the queue stops.
    kicks: Vec<(u16, RawFd)>,
    /// Spinning: how long the next one may last, adapted to success.
    spin: Duration,
    linger: Habit,
    rests: Rests,
    /// Whether the handler wants [`QueueHandler::linger_over_all`].
    is_patient: bool,
    /// With patience: queues that are emptied, and whose driver is asked to kick only before sleeping.
    emptied: Vec<u16>,
    /// Turns of queues since descriptors were last asked.
    row: u8,
}

/// Events taken from the kernel at once.
const EVENT_BATCH: usize = 64;
/// Looks at the rings for one at the descriptors, which is a system call.
const LOOKS: u8 = 8;

impl<H: QueueHandler> EventLoop<H> {
    /// A loop around `handler`.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(handler: H) -> io::Result<Self> {
        let epoll = epoll::create(true)?;
        let cx = Context {
            queues: Queues::default(),
            epoll,
            deadline: None,
            now: Cell::new(None),
            noted: None,
            again: Vec::new(),
        };
        Ok(Self {
            handler,
            cx,
            round: Vec::new(),
            kicks: Vec::new(),
            spin: Duration::ZERO,
            linger: Habit::default(),
            rests: Rests::default(),
            is_patient: false,
            emptied: Vec::new(),
            row: 0,
        })
    }

    /// Serves until the session is over. The whole life of a worker's thread.
    pub fn run(mut self, control: Control) {
        if let Err(error) = self.cx.ctl(
            ControlOptions::EPOLL_CTL_ADD,
            control.wake_fd(),
            Events::EPOLLIN,
            TOKEN_CONTROL,
        ) {
            tracing::error!(%error, "a worker cannot wait for its session");
            return;
        }
        if let Err(error) = self.handler.on_init(&mut self.cx) {
            tracing::error!(%error, "a worker cannot start; its queues stay unserved");
        }
        self.spin = control.options.poll;
        self.is_patient = self.handler.linger_over_all(&mut self.cx).is_some();
        let mut events = [Event::new(Events::empty(), 0); EVENT_BATCH];
        loop {
            let n = match self.wait(&mut events, control.options.poll) {
                Ok(n) => n,
                Err(error) => {
                    tracing::error!(%error, "epoll_wait failed; a worker ends");
                    return;
                }
            };
            self.cx.now.set(None);
            if self.turn(events.get(..n).unwrap_or(&[]), &control).is_err() {
                return;
            }
        }
    }

    /// One round: events, then queues that want another turn, then the timer.
    fn turn(
        &mut self,
        events: &[Event],
        control: &Control,
    ) -> Result<(), super::control::SessionOver> {
        let mut outside = false;
        for event in events {
            let (token, bits) = (event.data, event.events);
            if token == TOKEN_CONTROL {
                control.clear_wake();
                while let Some(command) = control.next()? {
                    self.command(command);
                }
            } else if token & LOOP_BIT != 0 {
                let index = u16::try_from(token & !LOOP_BIT).unwrap_or(u16::MAX);
                if let Some(queue) = self.cx.queues.get(index) {
                    queue.metrics().kicks.add(1);
                }
                self.cx.ask(index);
            } else {
                outside = true;
                self.handler.on_event(token, Events::from_bits_truncate(bits), &mut self.cx);
            }
        }
        if outside {
            self.publish_all();
        }
        // Whoever asks from here on is served in the next round.
        std::mem::swap(&mut self.round, &mut self.cx.again);
        let mut round = std::mem::take(&mut self.round);
        for index in round.drain(..) {
            self.kick(index);
        }
        self.round = round;
        while let Some(index) = self.rests.over(|| self.cx.now()) {
            self.kick(index);
        }
        if self.cx.deadline.is_some_and(|d| d <= self.cx.now()) {
            self.cx.deadline = None;
            self.handler.on_timer(&mut self.cx);
            self.publish_all();
        }
        Ok(())
    }

    fn publish_all(&mut self) {
        for queue in self.cx.queues.iter_mut() {
            queue.publish();
        }
    }

    /// Gives the handler a turn of queue `index`, and another while lingering finds work. What is left,
    /// or the driver added meanwhile, gets a turn in the next round.
    fn kick(&mut self, index: u16) {
        let linger = self.handler.linger(index);
        for _ in 0..Habit::ROW {
            let Some(queue) = self.cx.queues.get(index) else { return };
            queue.disable_notifications();
            let before = queue.metrics().requests.get();
            let progress = self.handler.on_kick(index, &mut self.cx);
            // Of this turn, or it would be an old one for the next.
            let noted = self.cx.noted.take();
            // The handler may have filled other queues too (vsock answers on its receive queue).
            self.publish_all();
            match progress {
                Progress::Waiting => return,
                Progress::More => break,
                Progress::Emptied if self.is_patient => {
                    if !self.emptied.contains(&index) {
                        self.emptied.push(index);
                    }
                    return;
                }
                Progress::Emptied => {}
            }
            let rest = self.handler.rest(index);
            let now = || noted.unwrap_or_else(Instant::now);
            let Some(queue) = self.cx.queues.get(index) else { return };
            let came = queue.metrics().requests.get().wrapping_sub(before);
            let until = |length| now() + rest * length;
            if !rest.is_zero() && self.rests.begin(index, (came, queue.size()), until) {
                return;
            }
            if linger.is_zero() || !self.linger.look(now, linger, || queue.has_available()) {
                if !queue.enable_notifications() {
                    return;
                }
                queue.disable_notifications();
                break;
            }
        }
        self.cx.ask(index);
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Start(queue) => {
                let index = queue.index();
                let kick = queue.kick_fd();
                self.cx.queues.put(queue);
                self.watch_kick(index, kick);
                self.handler.on_start(index, &mut self.cx);
                self.kick(index);
            }
            Command::Stop { index, reply } => {
                self.handler.take_back(index, &mut self.cx);
                self.handler.on_stop(index, &mut self.cx);
                self.publish_all();
                self.watch_kick(index, None);
                self.cx.again.retain(|&i| i != index);
                self.rests.forget(index);
                self.emptied.retain(|&i| i != index);
                // The session gave up waiting only if it is gone.
                let _ = reply.send(self.cx.queues.take(index));
            }
            Command::SetKick(index, kick) => {
                self.handler.take_back(index, &mut self.cx);
                self.set_kick(index, kick);
            }
            Command::SetCall(index, call) => {
                let was_lent = self.handler.take_back(index, &mut self.cx);
                if let Some(queue) = self.cx.queues.get(index) {
                    queue.set_call(call);
                }
                if was_lent {
                    self.kick(index);
                }
            }
            Command::SetErr(index, err) => {
                let was_lent = self.handler.take_back(index, &mut self.cx);
                if let Some(queue) = self.cx.queues.get(index) {
                    queue.set_err(err);
                }
                if was_lent {
                    self.kick(index);
                }
            }
        }
    }

    fn set_kick(&mut self, index: u16, kick: Option<Arc<EventFd>>) {
        self.watch_kick(index, None);
        let Some(queue) = self.cx.queues.get(index) else { return };
        queue.set_kick(kick);
        let fd = queue.kick_fd();
        self.watch_kick(index, fd);
        self.kick(index);
    }

    /// Registers `kick` for queue `index` in place of the one before.
    fn watch_kick(&mut self, index: u16, kick: Option<RawFd>) {
        if let Some(at) = self.kicks.iter().position(|&(i, _)| i == index) {
            let (_, old) = self.kicks.swap_remove(at);
            self.cx.unwatch(old);
        }
        let Some(fd) = kick else { return };
        let events = Events::EPOLLIN | Events::EPOLLET;
        match self.cx.ctl(ControlOptions::EPOLL_CTL_ADD, fd, events, LOOP_BIT | u64::from(index)) {
            Ok(()) => self.kicks.push((index, fd)),
            Err(error) => {
                tracing::warn!(queue = index, %error, "the front end's kick descriptor cannot be waited on")
            }
        }
    }

    /// Whether a queue without a kick descriptor is running: then the loop never sleeps.
    fn must_poll(&mut self) -> bool {
        self.cx.queues.iter_mut().any(|q| q.kick_fd().is_none())
    }

    /// Waits for events, spinning first if asked to.
    fn wait(&mut self, events: &mut [Event], poll: Duration) -> io::Result<usize> {
        if !self.cx.again.is_empty() {
            return self.ask_epoll(events);
        }
        if self.must_poll() {
            self.poll_kickless();
            return self.ask_epoll(events);
        }
        if self.is_patient {
            if let Some(n) = self.look_around(events, poll)? {
                return Ok(n);
            }
        } else if !poll.is_zero()
            && let Some(n) = self.spin(events, poll)?
        {
            return Ok(n);
        }
        self.before_asking();
        let timeout = self.deadline().map(|d| d.saturating_duration_since(self.cx.now()));
        wait_for(self.cx.epoll, timeout, events)
    }

    fn before_asking(&mut self) {
        if self.handler.on_wait(&mut self.cx) {
            self.publish_all();
        }
    }

    /// Asks the kernel for events, without waiting for any.
    fn ask_epoll(&mut self, events: &mut [Event]) -> io::Result<usize> {
        self.before_asking();
        wait_for(self.cx.epoll, Some(Duration::ZERO), events)
    }

    /// When there is something to do whatever happens: the timer runs out, or a rest is over.
    fn deadline(&self) -> Option<Instant> {
        match (self.cx.deadline, self.rests.first()) {
            (Some(timer), Some(rest)) => Some(timer.min(rest)),
            (timer, rest) => timer.or(rest),
        }
    }

    /// Looks at everything for as long as is worth it (or `poll`, if that is longer), and unmutes what it
    /// looked at. `None`: nothing came, go to sleep.
    fn look_around(&mut self, events: &mut [Event], poll: Duration) -> io::Result<Option<usize>> {
        let patience = self.handler.linger_over_all(&mut self.cx).unwrap_or_default().max(poll);
        if !poll.is_zero() || (!patience.is_zero() && self.linger.chance()) {
            let found = self.look_for_work(events, patience)?;
            self.linger.learn(found.is_some());
            if found.is_some() {
                return Ok(found);
            }
        }
        let Self { cx, emptied, .. } = self;
        for &index in &*emptied {
            if cx.queues.get(index).is_some_and(Queue::enable_notifications) {
                cx.ask(index);
            }
        }
        if self.cx.again.is_empty() {
            return Ok(None);
        }
        self.ask_epoll(events).map(Some)
    }

    /// The looking itself; rings first, since that costs next to nothing.
    fn look_for_work(
        &mut self,
        events: &mut [Event],
        patience: Duration,
    ) -> io::Result<Option<usize>> {
        let start = Instant::now();
        let deadline = self.deadline();
        for &index in &self.emptied {
            if let Some(queue) = self.cx.queues.get(index) {
                queue.disable_notifications();
            }
        }
        loop {
            for _ in 0..LOOKS {
                if let Some(index) = self.emptied_with_work() {
                    self.cx.ask(index);
                    self.row += 1;
                    if self.row < Habit::ROW {
                        return Ok(Some(0));
                    }
                    break;
                }
                std::hint::spin_loop();
            }
            self.row = 0;
            let n = self.ask_epoll(events)?;
            if n > 0 || !self.cx.again.is_empty() {
                return Ok(Some(n));
            }
            let now = Instant::now();
            if now - start >= patience || deadline.is_some_and(|d| d <= now) {
                return Ok(None);
            }
        }
    }

    fn emptied_with_work(&mut self) -> Option<u16> {
        let Self { cx, emptied, .. } = self;
        emptied.iter().copied().find(|&i| cx.queues.get(i).is_some_and(|q| q.has_available()))
    }

    fn poll_kickless(&mut self) {
        let waiting: Vec<u16> = self
            .cx
            .queues
            .iter_mut()
            .filter(|q| q.kick_fd().is_none() && q.has_available())
            .map(|q| q.index())
            .collect();
        for index in waiting {
            self.kick(index);
        }
        std::hint::spin_loop();
    }

    /// Looks for work for up to the adapted time. `None`: found none, go to sleep.
    fn spin(&mut self, events: &mut [Event], poll: Duration) -> io::Result<Option<usize>> {
        let (start, deadline) = (Instant::now(), self.deadline());
        loop {
            let n = self.ask_epoll(events)?;
            if n > 0 {
                self.spin = (self.spin * 2).clamp(Duration::from_micros(1), poll);
                return Ok(Some(n));
            }
            if start.elapsed() >= self.spin || deadline.is_some_and(|d| d <= Instant::now()) {
                // Half as long next time, down to a probe that can grow again.
                self.spin = (self.spin / 2).max(Duration::from_micros(1)).min(poll);
                return Ok(None);
            }
            std::hint::spin_loop();
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Nothing can be done about a failing close.
        let _ = epoll::close(self.epoll);
    }
}

/// `epoll_wait` with an optional time-out; an interrupted wait is an empty one. A kernel that knows
/// only milliseconds waits a little longer.
fn wait_for(epoll: RawFd, timeout: Option<Duration>, events: &mut [Event]) -> io::Result<usize> {
    let millis = |t: Duration| i32::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX);
    let result = match timeout {
        None => epoll::wait(epoll, -1, events),
        Some(Duration::ZERO) => epoll::wait(epoll, 0, events),
        Some(t) => match epoll_wait_for(epoll, t, events) {
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {
                epoll::wait(epoll, millis(t), events)
            }
            result => result,
        },
    };
    match result {
        Ok(n) => Ok(n),
        Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(0),
        Err(e) => Err(e),
    }
}
