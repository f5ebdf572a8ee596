//! The loop of a worker driven by io_uring completions: blk.
//!
//! # Theory of operation
//! One thread, one ring, one `io_uring_enter` a turn: it submits what the last turn prepared, runs the
//! kernel's deferred work and sleeps until something completes. A turn then takes the completions, lets
//! the handler empty the virtqueues, publishes all used entries at once, and enters again.
//!
//! The kick descriptor has a multishot poll in the same ring and is never read: each write to it wakes
//! the poll once. While the thread is awake the driver is asked not to kick; just before sleeping the
//! loop asks for kicks and looks a last time. The worker's control descriptor is watched alike.
//!
//! A queue that stops is not popped from any more and goes back when its last request is done, while
//! the worker's other queues go on. When the session ends the loop returns only after all requests are
//! done: the kernel must not write into guest memory that is about to be unmapped.
//!
//! With busy-polling on, an idle loop looks at the rings and at the completion queue, which costs no
//! system call, for as long as recent looks found work and at most the set time.
#![allow(unsafe_code, reason = "submission queue entries carry raw pointers")]

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use super::control::SessionOver;
use super::uring_memory::RegisteredMemory;
use super::{Command, Control, Progress, Queues};
use crate::ring::Queue;
use crate::sys::EventFd;
use crate::vhost_user::memory::GuestMemory;

/// Entries of the submission queue: what one turn submits without an extra system call.
const SQ_ENTRIES: u32 = 256;
/// Entries of the completion queue. More than that at once are kept by the kernel, slower.
const CQ_ENTRIES: u32 = 2048;
/// Completions copied out of the ring at once.
const REAP_BATCH: usize = 64;

/// `IORING_ENTER_GETEVENTS` and `IORING_ENTER_EXT_ARG`.
const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 8;

/// Tokens with this bit are the loop's own; handlers' tokens must not have it.
const LOOP_BIT: u64 = 1 << 63;
const TOKEN_CONTROL: u64 = LOOP_BIT | 1 << 62;
const TOKEN_IGNORED: u64 = LOOP_BIT | 1 << 61;

/// A kick's token: its queue, and which registration it belongs to, so that a late event of a
/// removed one is not taken for a new one.
fn kick_token(index: u16, generation: u32) -> u64 {
    LOOP_BIT | u64::from(generation) << 16 | u64::from(index)
}

/// What a handler works with: its queues, the ring and a timer.
pub struct UringContext {
    /// The worker's queues.
    pub queues: Queues,
    ring: IoUring,
    /// Entries that found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
    deadline: Option<Instant>,
    /// Operations submitted and not completed.
    under_way: u32,
    registered: Option<RegisteredMemory>,
    /// The time of the look that found what this turn is about, when the loop polls.
    looked: Option<Instant>,
}

impl std::fmt::Debug for UringContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringContext").field("queues", &self.queues).finish_non_exhaustive()
    }
}

impl UringContext {
    /// Queues an operation for the next `io_uring_enter`; its result arrives at
    /// [`UringHandler::on_completion`] with `token`, which must be below 2^63.
    ///
    /// # Safety
    /// Everything `entry` points to stays valid until that completion.
    #[inline]
    pub unsafe fn submit(&mut self, entry: squeue::Entry, token: u64) {
        debug_assert!(token & LOOP_BIT == 0);
        self.under_way += 1;
        // SAFETY: handed on from the caller.
        unsafe { self.push(entry.user_data(token)) };
    }

    /// # Safety
    /// As for [`Self::submit`].
    #[inline]
    unsafe fn push(&mut self, entry: squeue::Entry) {
        if self.backlog.is_empty() {
            // SAFETY: handed on from the caller.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
        }
        self.backlog.push_back(entry);
    }

    /// Reports each time `fd` becomes readable to [`UringHandler::on_completion`] with `token`. The
    /// watch lasts as long as the worker.
    pub fn watch(&mut self, fd: RawFd, token: u64) {
        debug_assert!(token & LOOP_BIT == 0);
        // SAFETY: a poll carries no pointer, and the kernel holds the file.
        unsafe { self.push(poll(fd).user_data(token)) };
    }

    /// Has the kernel hold `table`'s memory ready for operations with [`Self::registered_buffer`]. It stays
    /// pinned until another table is registered or the worker ends. Does nothing while operations are
    /// under way, nor when `table` is what was tried last.
    ///
    /// # Errors
    /// The kernel's, such as a limit on locked memory; then no buffer is registered.
    pub fn register_memory(&mut self, table: &Arc<GuestMemory>) -> io::Result<()> {
        if self.under_way > 0 || self.registered.as_ref().is_some_and(|r| r.is_of(table)) {
            return Ok(());
        }
        let submitter = self.ring.submitter();
        if let Some(old) = self.registered.take() {
            old.unregister(&submitter)?;
        }
        let (registered, result) = RegisteredMemory::register(&submitter, table.clone());
        self.registered = Some(registered);
        result
    }

    /// The number by which an operation can name the registered memory that has all of `buffer`.
    #[inline]
    #[must_use]
    pub fn registered_buffer(&self, buffer: &libc::iovec) -> Option<u16> {
        self.registered.as_ref()?.piece_of(buffer)
    }

    /// Registers the files that operations can name by their place in `fds` (`types::Fixed`).
    ///
    /// # Errors
    /// The kernel's, such as a limit on locked memory.
    pub fn register_files(&mut self, fds: &[RawFd]) -> io::Result<()> {
        self.ring.submitter().register_files(fds)
    }

    /// Has [`UringHandler::on_timer`] called once, at `deadline`. Replaces the one before; `None`
    /// cancels it.
    pub fn set_timer(&mut self, deadline: Option<Instant>) {
        self.deadline = deadline;
    }

    /// The time. A turn that a look found work for, without sleeping, has it from there the first time: that
    /// is when the work came, and saves a look at the clock.
    #[inline]
    #[must_use]
    pub fn now(&mut self) -> Instant {
        self.looked.take().unwrap_or_else(Instant::now)
    }

    /// When [`UringHandler::on_timer`] will be called.
    #[must_use]
    pub fn timer(&self) -> Option<Instant> {
        self.deadline
    }

    /// Moves what found no room before into the submission queue.
    #[inline]
    fn refill(&mut self) {
        while let Some(entry) = self.backlog.front() {
            // SAFETY: whoever queued the entry promised its validity until completion.
            if unsafe { self.ring.submission().push(entry) }.is_err() {
                return;
            }
            self.backlog.pop_front();
        }
    }

    /// Submits, runs deferred work, and waits for one completion: not at all, for ever, or until a
    /// deadline.
    fn enter(&mut self, wait: Wait) -> io::Result<()> {
        self.refill();
        let to_submit = u32::try_from(self.ring.submission().len()).unwrap_or(u32::MAX);
        let mut timespec = types::Timespec::new();
        let (want, flags) = match wait {
            Wait::No => (0, ENTER_GETEVENTS),
            Wait::Ever => (1, ENTER_GETEVENTS),
            Wait::Until(left) => {
                timespec = types::Timespec::from(left);
                (1, ENTER_GETEVENTS | ENTER_EXT_ARG)
            }
        };
        let result = if flags & ENTER_EXT_ARG == 0 {
            // SAFETY: no argument is passed; the entries are valid by `submit`'s contract.
            unsafe { self.ring.submitter().enter::<libc::sigset_t>(to_submit, want, flags, None) }
        } else {
            let args = types::SubmitArgs::new().timespec(&timespec);
            // SAFETY: `args` is what EXT_ARG calls for and outlives the call.
            unsafe { self.ring.submitter().enter(to_submit, want, flags, Some(&args)) }
        };
        match result {
            Ok(_) => Ok(()),
            // A signal, the time-out, or completions to be taken first: all seen in the next turn.
            Err(e) => match e.raw_os_error() {
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => Ok(()),
                _ => Err(e),
            },
        }
    }

    /// Whether the kernel has something for us: a completion, or deferred work that will make one.
    #[inline]
    fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }
}

/// How long `io_uring_enter` may sleep.
#[derive(Debug, Clone, Copy)]
enum Wait {
    No,
    Ever,
    Until(Duration),
}

fn poll(fd: RawFd) -> squeue::Entry {
    #[allow(clippy::cast_sign_loss, reason = "poll bits are small positive numbers")]
    let readable = libc::POLLIN as u32;
    opcode::PollAdd::new(types::Fd(fd), readable).multi(true).build()
}

/// A device's part of the worker: called by the loop, always on the worker's thread.
pub trait UringHandler: Send {
    /// The loop runs: register files, watch descriptors. No queue is there yet.
    ///
    /// # Errors
    /// The worker cannot serve.
    fn on_init(&mut self, cx: &mut UringContext) -> io::Result<()>;

    /// Queue `index` has chains. Pop them; the loop publishes afterwards. [`Progress::More`]: look at
    /// completions, then ask again.
    fn on_kick(&mut self, index: u16, cx: &mut UringContext) -> Progress;

    /// The operation or watch submitted with `token` completed with `result`, negative for an errno.
    fn on_completion(&mut self, token: u64, result: i32, cx: &mut UringContext);

    /// Queue `index` stops: everything popped from it has to complete without waiting for anything
    /// but the store.
    fn on_stopping(&mut self, index: u16, cx: &mut UringContext);

    /// The timer ran out.
    fn on_timer(&mut self, cx: &mut UringContext);
}

/// What the loop knows about a running queue.
#[derive(Debug)]
struct Member {
    index: u16,
    /// Which registration of a kick descriptor counts.
    generation: u32,
    kick: Option<RawFd>,
    /// The driver has been asked to kick.
    armed: bool,
    /// The queue is on its way out; the reply is `None` when the session just ended.
    stopping: Option<Option<SyncSender<Option<Box<Queue>>>>>,
}

/// An io_uring loop around a handler.
#[derive(Debug)]
pub struct UringLoop<H> {
    handler: H,
    cx: UringContext,
    members: Vec<Member>,
    generation: u32,
    over: bool,
    spin: Duration,
}

/// A ring with the best flags that this kernel has.
fn build_ring() -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_r_disabled()
        .setup_cqsize(CQ_ENTRIES);
    let without = builder.clone();
    builder
        .setup_no_sqarray()
        .build(SQ_ENTRIES)
        // Linux before 6.6.
        .or_else(|_| without.build(SQ_ENTRIES))
        // Linux before 6.1.
        .or_else(|_| IoUring::builder().setup_cqsize(CQ_ENTRIES).build(SQ_ENTRIES))
}

impl<H: UringHandler> UringLoop<H> {
    /// A loop around `handler`. The thread that runs it becomes the ring's one issuer.
    ///
    /// # Errors
    /// The kernel gives no ring.
    pub fn new(handler: H) -> io::Result<Self> {
        let cx = UringContext {
            queues: Queues::default(),
            ring: build_ring()?,
            backlog: VecDeque::new(),
            deadline: None,
            under_way: 0,
            registered: None,
            looked: None,
        };
        Ok(Self {
            handler,
            cx,
            members: Vec::new(),
            generation: 0,
            over: false,
            spin: Duration::ZERO,
        })
    }

    /// Serves until the session is over. The whole life of a worker's thread.
    pub fn run(mut self, control: &Control) {
        // Fails where the ring was made without being disabled, which is fine.
        let _ = self.cx.ring.submitter().register_enable_rings();
        // SAFETY: a poll carries no pointer.
        unsafe { self.cx.push(poll(control.wake_fd()).user_data(TOKEN_CONTROL)) };
        if let Err(error) = self.handler.on_init(&mut self.cx) {
            tracing::error!(%error, "a worker cannot start; its queues stay unserved");
        }
        self.spin = control.options.poll;
        loop {
            self.reap(control);
            self.serve();
            self.publish_all();
            self.finish_stops();
            if self.over && self.members.is_empty() {
                return;
            }
            if let Err(error) = self.wait(control.options.poll) {
                tracing::error!(%error, "io_uring_enter failed; a worker ends");
                return;
            }
        }
    }

    /// Takes all completions, and the timer.
    fn reap(&mut self, control: &Control) {
        let mut batch = [const { MaybeUninit::uninit() }; REAP_BATCH];
        loop {
            let cqes = self.cx.ring.completion().fill(&mut batch);
            let full = cqes.len() == REAP_BATCH;
            for cqe in cqes {
                if cqe.user_data() & LOOP_BIT == 0 {
                    if !cqueue::more(cqe.flags()) {
                        self.cx.under_way = self.cx.under_way.saturating_sub(1);
                    }
                    self.handler.on_completion(cqe.user_data(), cqe.result(), &mut self.cx);
                } else {
                    self.own_event(cqe, control);
                }
            }
            if !full {
                break;
            }
        }
        if self.cx.deadline.is_some_and(|d| d <= Instant::now()) {
            self.cx.deadline = None;
            self.handler.on_timer(&mut self.cx);
        }
    }

    #[cold]
    fn control(&mut self, control: &Control) {
        control.clear_wake();
        loop {
            match control.next() {
                Ok(Some(command)) => self.command(command),
                Ok(None) => return,
                Err(SessionOver) => {
                    self.over = true;
                    for at in 0..self.members.len() {
                        self.stop(at, None);
                    }
                    return;
                }
            }
        }
    }

    fn own_event(&mut self, cqe: &cqueue::Entry, control: &Control) {
        let ended = !cqueue::more(cqe.flags());
        match cqe.user_data() {
            TOKEN_CONTROL => {
                if ended {
                    // SAFETY: a poll carries no pointer.
                    unsafe { self.cx.push(poll(control.wake_fd()).user_data(TOKEN_CONTROL)) };
                }
                self.control(control);
            }
            TOKEN_IGNORED => {}
            token => {
                let known = |m: &&mut Member| kick_token(m.index, m.generation) == token;
                let Some(member) = self.members.iter_mut().find(known) else { return };
                if let Some(queue) = self.cx.queues.get(member.index) {
                    queue.metrics().kicks.add(1);
                }
                match (cqe.result(), member.kick) {
                    (error @ ..0, _) => {
                        let error = io::Error::from_raw_os_error(-error);
                        tracing::warn!(queue = member.index, %error, "the front end's kick descriptor cannot be waited on");
                    }
                    (_, Some(fd)) if ended => {
                        // SAFETY: a poll carries no pointer.
                        unsafe { self.cx.push(poll(fd).user_data(token)) };
                    }
                    _ => {}
                }
            }
        }
    }

    /// Lets the handler empty every queue that has chains.
    #[inline]
    fn serve(&mut self) {
        for member in &mut self.members {
            if member.stopping.is_some() {
                continue;
            }
            let Some(queue) = self.cx.queues.get(member.index) else { continue };
            if queue.has_available() {
                if member.armed {
                    queue.disable_notifications();
                    member.armed = false;
                }
                // What it leaves behind is found by the last look before sleeping.
                let _ = self.handler.on_kick(member.index, &mut self.cx);
            }
        }
    }

    #[inline]
    fn publish_all(&mut self) {
        for queue in self.cx.queues.iter_mut() {
            queue.publish();
        }
    }

    /// Hands back the stopping queues whose last request is done.
    fn finish_stops(&mut self) {
        if !self.members.iter().any(|m| m.stopping.is_some()) {
            return;
        }
        let mut at = 0;
        while let Some(member) = self.members.get(at) {
            let idle = |q: &mut Queue| q.in_flight() == 0;
            let done =
                member.stopping.is_some() && self.cx.queues.get(member.index).is_none_or(idle);
            if !done {
                at += 1;
                continue;
            }
            let member = self.members.swap_remove(at);
            self.unwatch(&member);
            let queue = self.cx.queues.take(member.index);
            if let Some(Some(reply)) = member.stopping {
                // The session gave up waiting only if it is gone.
                let _ = reply.send(queue);
            }
        }
    }

    fn unwatch(&mut self, member: &Member) {
        if member.kick.is_some() {
            let token = kick_token(member.index, member.generation);
            let remove = opcode::PollRemove::new(token).build().user_data(TOKEN_IGNORED);
            // SAFETY: a removal carries no pointer.
            unsafe { self.cx.push(remove) };
        }
    }

    fn position(&self, index: u16) -> Option<usize> {
        self.members.iter().position(|m| m.index == index)
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Start(queue) => {
                let index = queue.index();
                let kick = queue.kick_fd();
                self.cx.queues.put(queue);
                self.members.push(Member {
                    index,
                    generation: 0,
                    kick: None,
                    armed: false,
                    stopping: None,
                });
                self.watch_kick(index, kick);
            }
            Command::Stop { index, reply } => match self.position(index) {
                Some(at) => self.stop(at, Some(reply)),
                // The session gave up waiting only if it is gone.
                None => drop(reply.send(None)),
            },
            Command::SetKick(index, kick) => self.set_kick(index, kick),
            Command::SetCall(index, call) => {
                if let Some(queue) = self.cx.queues.get(index) {
                    queue.set_call(call);
                }
            }
            Command::SetErr(index, err) => {
                if let Some(queue) = self.cx.queues.get(index) {
                    queue.set_err(err);
                }
            }
        }
    }

    fn stop(&mut self, at: usize, reply: Option<SyncSender<Option<Box<Queue>>>>) {
        let Some(member) = self.members.get_mut(at) else { return };
        let index = member.index;
        if member.stopping.is_none() || reply.is_some() {
            member.stopping = Some(reply);
        }
        self.handler.on_stopping(index, &mut self.cx);
    }

    fn set_kick(&mut self, index: u16, kick: Option<Arc<EventFd>>) {
        let Some(queue) = self.cx.queues.get(index) else { return };
        queue.set_kick(kick);
        let fd = queue.kick_fd();
        self.watch_kick(index, fd);
    }

    /// Registers `kick` for queue `index` in place of the one before. The poll reports at once what
    /// was signalled before.
    fn watch_kick(&mut self, index: u16, kick: Option<RawFd>) {
        let Some(at) = self.position(index) else { return };
        let old = Member { stopping: None, ..self.members[at] };
        self.unwatch(&old);
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let member = &mut self.members[at];
        member.kick = kick;
        member.generation = generation;
        if let Some(fd) = kick {
            // SAFETY: a poll carries no pointer, and the kernel holds the file.
            unsafe { self.cx.push(poll(fd).user_data(kick_token(index, generation))) };
        }
    }

    /// Submits and sleeps, after asking every driver for kicks and a last look at its ring.
    fn wait(&mut self, poll: Duration) -> io::Result<()> {
        if !poll.is_zero() {
            self.cx.looked = None;
            if self.look_around(poll)? {
                return Ok(());
            }
        }
        let mut sleep = true;
        for member in &mut self.members {
            if member.stopping.is_some() {
                continue;
            }
            let Some(queue) = self.cx.queues.get(member.index) else { continue };
            if member.kick.is_none() {
                // Nobody will wake us for this one.
                sleep = false;
            } else if !member.armed {
                member.armed = true;
                sleep &= !queue.enable_notifications();
            }
        }
        if !sleep || !self.cx.backlog.is_empty() {
            return self.cx.enter(Wait::No);
        }
        match self.cx.deadline {
            None => self.cx.enter(Wait::Ever),
            Some(at) => self.cx.enter(Wait::Until(at.saturating_duration_since(Instant::now()))),
        }
    }

    /// Looks for work for up to the adapted time. True: there is some.
    fn look_around(&mut self, poll: Duration) -> io::Result<bool> {
        if !self.cx.ring.submission().is_empty() || !self.cx.backlog.is_empty() {
            self.cx.enter(Wait::No)?;
        }
        let start = Instant::now();
        let mut now = start;
        loop {
            let waiting = self.members.iter().any(|m| {
                m.stopping.is_none()
                    && self.cx.queues.get(m.index).is_some_and(|q| q.has_available())
            });
            if waiting || self.cx.has_completions() {
                self.cx.looked = Some(now);
                self.spin = (self.spin * 2).clamp(Duration::from_micros(1), poll);
                if self.cx.ring.submission().taskrun() {
                    self.cx.enter(Wait::No)?;
                }
                return Ok(true);
            }
            now = Instant::now();
            if now - start >= self.spin || self.cx.deadline.is_some_and(|d| d <= now) {
                // Half as long next time, down to a probe that can grow again.
                self.spin = (self.spin / 2).max(Duration::from_micros(1)).min(poll);
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }
}
