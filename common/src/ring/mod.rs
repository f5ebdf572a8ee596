//! Virtqueues, as a device sees them: take chains, give them back, wake the driver.
//!
//! [`Queue`] is the whole interface. It hides the two ring formats, indirect descriptors,
//! notification suppression, the inflight record, the dirty log, IN_ORDER and the change of
//! guest memory underneath; and it contains what a guest does wrong: a bad chain is returned
//! unused and counted, a broken ring is retired (VRING_ERR is raised and the queue looks empty from
//! then on), and neither is the device's concern.

mod access;
mod chain;
#[cfg(test)]
mod fault;
pub mod inflight;
pub mod notify;
mod packed;
mod setup;
mod split;
#[cfg(test)]
mod tests;
mod walk;

pub use chain::{Chain, IoVecs};
pub use inflight::InflightRegion;
pub use setup::{QueueSetup, SetupError, VringAddresses};
pub use walk::RingError;

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use self::chain::Token;
use self::inflight::{PackedAgain, PackedInflight, SplitInflight};
use self::packed::PackedRing;
use self::split::SplitRing;
use crate::metrics::QueueMetrics;
use crate::sys::EventFd;
use crate::vhost_user::memory::{GuestMemory, MemoryView};
use crate::warn_limited;

/// The ring features that the formats need to know.
#[derive(Debug, Clone, Copy)]
struct RingFlags {
    event_idx: bool,
    indirect: bool,
}

#[derive(Debug)]
enum Format {
    Split { ring: SplitRing, inflight: Option<SplitInflight>, again: VecDeque<u16> },
    Packed { ring: PackedRing, inflight: Option<PackedInflight>, again: VecDeque<PackedAgain> },
}

/// How the driver is woken.
#[derive(Clone)]
pub enum Call {
    /// No way was given: the driver polls.
    None,
    /// SET_VRING_CALL's descriptor.
    Fd(Arc<EventFd>),
    /// In-band notification: a message on the back-end channel.
    Message(Arc<dyn Fn() + Send + Sync>),
}

impl std::fmt::Debug for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Fd(_) => "Fd",
            Self::Message(_) => "Message",
        })
    }
}

impl Call {
    #[inline]
    fn signal(&self) {
        match self {
            Self::None => {}
            Self::Fd(fd) => fd.signal(),
            Self::Message(send) => send(),
        }
    }
}

/// Bytes in one chain at the most, both ways together: every count of a request's bytes fits a `u32`.
const MAX_CHAIN_BYTES: usize = u32::MAX as usize;

/// Completions that wait for older ones: virtio's IN_ORDER has used entries in the order in which
/// chains were made available.
#[derive(Debug)]
struct Reorder {
    waiting: Vec<Option<(Token, u32)>>,
    next: u16,
}

/// One started virtqueue. It belongs to one worker thread.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    size: u16,
    features: u64,
    format: Format,
    memory: MemoryView,
    kick: Option<Arc<EventFd>>,
    call: Call,
    err: Option<Arc<EventFd>>,
    reorder: Option<Reorder>,
    /// Sequence number of the next chain popped.
    sequence: u16,
    /// Chains popped and not pushed.
    in_flight: u32,
    retired: Option<RingError>,
    /// Signals are held back, and one is.
    held: bool,
    owed: bool,
    /// Entries shown since the one that owes it, that one's batch included.
    owed_for: u16,
    metrics: Arc<QueueMetrics>,
}

impl Queue {
    /// The queue's index in its device.
    #[inline]
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Ring entries.
    #[inline]
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The negotiated virtio features.
    #[inline]
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Chains popped and not pushed yet.
    #[inline]
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// The queue's counters. The device adds what it alone knows (bytes, rejected requests).
    #[inline]
    #[must_use]
    pub fn metrics(&self) -> &Arc<QueueMetrics> {
        &self.metrics
    }

    /// The memory table in force since the last [`Self::pop`].
    #[inline]
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        self.memory.get()
    }

    /// As [`Self::memory`], to be kept.
    #[inline]
    #[must_use]
    pub fn memory_table(&self) -> &Arc<GuestMemory> {
        self.memory.table()
    }

    /// The descriptor to wait on for new chains; `None` when the driver never kicks and the queue
    /// must be polled.
    #[must_use]
    pub fn kick_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(|k| k.as_raw_fd())
    }

    /// Puts another kick descriptor in place (SET_VRING_KICK on a running ring).
    pub fn set_kick(&mut self, kick: Option<Arc<EventFd>>) {
        self.kick = kick;
    }

    /// Puts another way to wake the driver in place, and wakes it once: a signal may have gone to the
    /// old one unseen.
    pub fn set_call(&mut self, call: Call) {
        self.call = call;
        self.call.signal();
    }

    /// Puts another error descriptor in place.
    pub fn set_err(&mut self, err: Option<Arc<EventFd>>) {
        self.err = err;
        if let (Some(err), Some(_)) = (&self.err, self.retired) {
            err.signal();
        }
    }

    /// Takes the next chain into `chain`. False when none is waiting (or the queue is retired).
    ///
    /// Chains that cannot be used (buffers outside guest memory) are returned with length 0 and
    /// counted as rejected; a ring that cannot be trusted is retired.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> bool {
        if self.retired.is_some() {
            return false;
        }
        self.memory.refresh(self.in_flight);
        loop {
            let outcome = match self.take(chain) {
                Ok(false) => return false,
                Ok(true) if chain.readable.len() + chain.writable.len() > MAX_CHAIN_BYTES => {
                    Err(RingError::TooManyBytes)
                }
                Err(e) if !e.is_chain_only() => {
                    self.retire(e);
                    return false;
                }
                outcome => outcome,
            };
            chain.token.sequence = self.sequence;
            self.sequence = self.sequence.wrapping_add(1);
            self.in_flight += 1;
            match outcome {
                Ok(_) => return true,
                Err(_) if self.memory.get().is_interrupted() => {
                    // It is read again when the ring goes on.
                    self.unpop(chain);
                    return false;
                }
                Err(e) => self.reject(chain, e),
            }
        }
    }

    /// One chain from the inflight record or the ring. On a chain-only error `chain.token` is set.
    #[inline]
    fn take(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let memory = self.memory.get();
        match &mut self.format {
            Format::Split { ring, inflight, again } => {
                if let Some(head) = again.pop_front() {
                    let result = ring.read_chain(memory, head, chain);
                    chain.token.again = true;
                    return result.map(|()| true);
                }
                let Some(head) = ring.next_head()? else { return Ok(false) };
                let result = ring.read_chain(memory, head, chain);
                if result.is_err_and(|e| !e.is_chain_only()) {
                    // Not taken: it is never given back, so it must not be recorded either.
                    ring.unpop();
                } else if let Some(inflight) = inflight {
                    inflight.take(head);
                }
                result.map(|()| true)
            }
            Format::Packed { ring, inflight, again } => {
                if let Some(old) = again.front() {
                    let result = replay(ring, memory, old, chain);
                    again.pop_front();
                    return result.map(|()| true);
                }
                let (found, fault) = match ring.pop(memory, chain) {
                    Ok(None) => return Ok(false),
                    Ok(Some(found)) => (found, None),
                    Err((e, Some(found))) => (found, Some(e)),
                    Err((e, None)) => return Err(e),
                };
                if let Some(inflight) = inflight {
                    let size = self.size;
                    let entry = inflight.take(found.count, |i| match i {
                        0 => found.first,
                        i => ring.descriptor(found.head.plus(i, size).index),
                    });
                    chain.token.inflight = entry;
                }
                fault.map_or(Ok(true), Err)
            }
        }
    }

    /// Returns a chain that cannot be used.
    #[cold]
    fn reject(&mut self, chain: &mut Chain, error: RingError) {
        self.metrics.rejected.add(1);
        tracing::debug!(queue = self.index, %error, "chain rejected");
        chain.clear();
        self.push(chain, 0);
    }

    /// Gives a chain back with `written` bytes of its writable part filled. The driver sees it at the
    /// next [`Self::publish`]. Every chain popped is pushed once, in any order.
    #[inline]
    pub fn push(&mut self, chain: &mut Chain, written: u32) {
        self.memory.refresh(self.in_flight);
        if self.memory.get().log().is_some() {
            self.log_written(chain);
        }
        self.metrics.requests.add(1);
        self.in_flight = self.in_flight.saturating_sub(1);
        if self.reorder.is_some() {
            self.push_in_order(chain.token, written);
        } else {
            self.emit(chain.token, written);
        }
    }

    /// Logs all of the chain's writable memory, whatever `written` says: a blk status byte stands at
    /// the end of buffers that an error left untouched.
    #[cold]
    fn log_written(&self, chain: &mut Chain) {
        chain.writable.rewind();
        for entry in chain.writable.as_slice() {
            self.memory.get().mark_dirty(entry.iov_base.cast(), entry.iov_len);
        }
    }

    fn push_in_order(&mut self, token: Token, written: u32) {
        let Some(reorder) = &mut self.reorder else { return };
        let n = reorder.waiting.len();
        reorder.waiting[usize::from(token.sequence) % n] = Some((token, written));
        loop {
            let Some(reorder) = &mut self.reorder else { return };
            let Some((token, written)) = reorder.waiting[usize::from(reorder.next) % n].take()
            else {
                return;
            };
            reorder.next = reorder.next.wrapping_add(1);
            self.emit(token, written);
        }
    }

    #[inline]
    fn emit(&mut self, token: Token, written: u32) {
        match &mut self.format {
            Format::Split { ring, inflight, .. } => {
                ring.write_used(token, written);
                if let Some(inflight) = inflight {
                    inflight.complete(token.id);
                }
            }
            Format::Packed { ring, inflight, .. } => {
                ring.write_used(token, written);
                if let Some(inflight) = inflight {
                    inflight.complete(token.inflight);
                }
            }
        }
    }

    /// Gives the chain popped last back to the ring, untouched, to be popped again. Only for the
    /// latest chain popped, then for the one before it, and so on; none popped after it may have been
    /// pushed.
    ///
    /// A guest can break that order: a chain that [`Self::pop`] had to reject in between was pushed.
    /// The ring cannot be wound back past it, so the chain is returned unused, as rejected ones are.
    pub fn unpop(&mut self, chain: &mut Chain) {
        let token = chain.token;
        if token.sequence != self.sequence.wrapping_sub(1) {
            return self.reject(chain, RingError::BehindRejected);
        }
        match &mut self.format {
            Format::Split { ring, inflight, again } => {
                if token.again {
                    again.push_front(token.id);
                } else {
                    ring.unpop();
                    if let Some(inflight) = inflight {
                        inflight.untake(token.id);
                    }
                }
            }
            Format::Packed { inflight: Some(inflight), again, .. } if token.again => {
                again.push_front(inflight.recorded(token.inflight));
            }
            Format::Packed { ring, inflight, .. } => {
                ring.unpop(token.head, token.count);
                if let Some(inflight) = inflight {
                    inflight.untake(token.inflight);
                }
            }
        }
        self.sequence = self.sequence.wrapping_sub(1);
        self.in_flight = self.in_flight.saturating_sub(1);
        chain.clear();
    }

    /// Shows the driver everything pushed, and signals it once if it wants that.
    #[inline]
    pub fn publish(&mut self) {
        let count;
        let signal = match &mut self.format {
            Format::Split { ring, inflight, .. } => {
                count = ring.unpublished();
                if count == 0 {
                    return;
                }
                let signal = ring.publish();
                if let Some(inflight) = inflight {
                    inflight.published(ring.shown_index());
                }
                signal
            }
            Format::Packed { ring, inflight, .. } => {
                count = ring.unpublished();
                if count == 0 {
                    return;
                }
                if let Some(inflight) = inflight {
                    inflight.publishing(ring.used_position());
                }
                let signal = ring.publish();
                if let Some(inflight) = inflight {
                    inflight.published();
                }
                signal
            }
        };
        if self.memory.get().log().is_some() {
            self.log_ring();
        }
        if self.owed {
            self.owed_for = self.owed_for.saturating_add(count);
            if !self.held {
                self.signal_now();
            }
        } else if signal && self.held {
            (self.owed, self.owed_for) = (true, count);
        } else if signal {
            self.signal();
        }
    }

    #[inline]
    fn signal(&self) {
        self.metrics.signals.add(1);
        self.call.signal();
    }

    /// Holds signals to the driver back, or no longer does: its used entries are shown all the same.
    /// One that is owed goes out with [`Self::signal_now`].
    pub fn hold_signals(&mut self, held: bool) {
        self.held = held;
    }

    /// Whether a signal was held back.
    #[inline]
    #[must_use]
    pub fn owes_signal(&self) -> bool {
        self.owed
    }

    /// Signals the driver if that was held back, and it still wants to hear of it: one that looked into
    /// the ring of its own accord meanwhile has moved its event on.
    #[inline]
    pub fn signal_now(&mut self) {
        if !std::mem::take(&mut self.owed) {
            return;
        }
        let still_wanted = match &self.format {
            Format::Split { ring, .. } => ring.wants_signal(self.owed_for),
            Format::Packed { ring, .. } => ring.wants_signal(self.owed_for),
        };
        if still_wanted || self.owed_for >= self.size {
            self.signal();
        }
    }

    /// Logs the ring's own pages as written.
    #[cold]
    fn log_ring(&self) {
        let areas = match &self.format {
            Format::Split { ring, .. } => [Some(ring.used_area()), None],
            Format::Packed { ring, .. } => [Some(ring.desc_area()), Some(ring.event_area())],
        };
        for area in areas.into_iter().flatten() {
            self.memory.get().mark_dirty(area.base(), area.len());
        }
    }

    /// Whether a chain is waiting, without taking it.
    #[inline]
    #[must_use]
    pub fn has_available(&self) -> bool {
        self.retired.is_none()
            && match &self.format {
                Format::Split { ring, again, .. } => !again.is_empty() || ring.has_available(),
                Format::Packed { ring, again, .. } => !again.is_empty() || ring.has_available(),
            }
    }

    /// Asks the driver to kick when it adds chains. True when some came before it could know: pop
    /// again before going to sleep.
    #[inline]
    pub fn enable_notifications(&mut self) -> bool {
        if self.retired.is_some() {
            return false;
        }
        match &mut self.format {
            Format::Split { ring, .. } => ring.enable_notifications(),
            Format::Packed { ring, .. } => ring.enable_notifications(),
        }
    }

    /// Asks the driver not to kick. A kick may come all the same.
    #[inline]
    pub fn disable_notifications(&mut self) {
        match &mut self.format {
            Format::Split { ring, .. } => ring.disable_notifications(),
            Format::Packed { ring, .. } => ring.disable_notifications(),
        }
    }

    /// Gives this queue up: it looks empty from now on, the front end is told through VRING_ERR, and
    /// only a reset of the ring by the driver starts it anew. Chains already popped may still be
    /// pushed. For a guest that broke the protocol in a way that leaves no sensible way on.
    #[cold]
    pub fn retire(&mut self, error: RingError) {
        if self.retired.is_some() {
            return;
        }
        warn_limited!(queue = self.index, %error, "the guest broke this queue; it rests until the driver resets it");
        self.retired = Some(error);
        self.metrics.retired.add(1);
        if let Some(err) = &self.err {
            err.signal();
        }
    }

    /// Why the queue was given up, if it was.
    #[must_use]
    pub fn retired(&self) -> Option<RingError> {
        self.retired
    }

    /// Where the next chain is taken from, as a vring base has it (packed: its lower half). A device
    /// tells by it whether a queue that starts again goes on where it stopped.
    #[must_use]
    pub fn next_avail(&self) -> u16 {
        match &self.format {
            Format::Split { ring, again, .. } => {
                ring.last_avail().wrapping_sub(u16::try_from(again.len()).unwrap_or(0))
            }
            Format::Packed { ring, .. } => {
                #[allow(clippy::cast_possible_truncation, reason = "the lower half is meant")]
                let half = ring.base() as u16;
                half
            }
        }
    }

    /// Lets go of the ring; returns the vring base to answer GET_VRING_BASE with (split: the next
    /// available index; packed: both positions). The inflight record stays as it is: only the
    /// session knows whether the front end will hear of this base.
    #[must_use]
    pub fn release(self) -> u32 {
        match &self.format {
            Format::Split { ring, again, .. } => {
                let pending = u16::try_from(again.len()).unwrap_or(0);
                u32::from(ring.last_avail().wrapping_sub(pending))
            }
            Format::Packed { ring, .. } => ring.base(),
        }
    }
}

/// Fills `chain` from the inflight record's copy of its descriptors.
fn replay(
    ring: &PackedRing,
    memory: &GuestMemory,
    old: &PackedAgain,
    chain: &mut Chain,
) -> Result<(), RingError> {
    chain.clear();
    let count = u16::try_from(old.descriptors.len()).unwrap_or(u16::MAX);
    let id = old.descriptors.last().map_or(0, |d| d.id);
    chain.token = Token { id, count, inflight: old.entry, again: true, ..Token::default() };
    for (i, d) in (1u16..).zip(&old.descriptors) {
        ring.add(memory, chain, d, i)?;
    }
    Ok(())
}
