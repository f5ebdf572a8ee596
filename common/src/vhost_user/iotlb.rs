//! Translation of I/O virtual addresses, for guests that put the device behind a virtual IOMMU.
//!
//! # Theory of operation
//! With ACCESS_PLATFORM and a virtual IOMMU, ring and buffer addresses are I/O virtual ones. The front
//! end tells us pieces of the mapping (IOTLB_MSG update), takes them back (invalidate), and is asked
//! for what is missing (IOTLB_MISS on the back-end channel); its answer is an update on the main
//! socket, which the session thread stores here while the worker that asked waits, for a limited
//! time. Without a virtual IOMMU no IOTLB_MSG ever comes, and this room stays empty: the first one
//! switches it on.
//!
//! vhost-user specification, "IOMMU support".

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::backend_channel::BackendChannel;

/// How long a worker waits for a missing piece before it gives the chain up. A driver may take a chain that
/// comes back unused for a finished one, so a front end that is merely busy must not get there.
const MISS_TIMEOUT: Duration = Duration::from_secs(5);
/// How often a waiting worker looks whether its ring is being stopped.
const MISS_SLICE: Duration = Duration::from_millis(5);
/// Pieces kept at the most; a front end that sends more loses the oldest addresses first.
const MAX_ENTRIES: usize = 65_536;

/// Read access by the device.
pub const PERM_READ: u8 = 1;
/// Write access by the device.
pub const PERM_WRITE: u8 = 2;

/// Message types in [`IotlbBody`].
pub const TYPE_MISS: u8 = 1;
const TYPE_UPDATE: u8 = 2;
const TYPE_INVALIDATE: u8 = 3;

/// "IOTLB message".
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IotlbBody {
    /// I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the front end's own address space.
    pub user_addr: u64,
    /// Access allowed or wanted.
    pub perm: u8,
    /// Miss, update or invalidate.
    pub kind: u8,
    /// 0.
    pub padding: [u8; 6],
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    size: u64,
    user_addr: u64,
    perm: u8,
    /// Which update brought it.
    update: u64,
}

/// The pieces known, and who waits for more.
#[derive(Debug, Default)]
struct Pieces {
    by_iova: BTreeMap<u64, Entry>,
    /// Updates so far.
    updates: u64,
    /// Workers that have asked and wait.
    waiting: usize,
}

/// The pieces known, and the way to ask for more.
#[derive(Debug, Default)]
pub struct Iotlb {
    pieces: Mutex<Pieces>,
    changed: Condvar,
    /// Invalidations so far; changed with `pieces` locked.
    invalidations: AtomicU64,
    channel: Mutex<Option<Arc<BackendChannel>>>,
}

impl Iotlb {
    fn lock(&self) -> MutexGuard<'_, Pieces> {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where misses are sent.
    pub fn set_channel(&self, channel: Option<Arc<BackendChannel>>) {
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = channel;
    }

    /// Carries an update or invalidation out; false if the message is neither or makes no sense.
    pub fn apply(&self, body: &IotlbBody) -> bool {
        let Some(end) = body.iova.checked_add(body.size.saturating_sub(1)) else { return false };
        if body.size == 0 {
            return false;
        }
        self.change(&mut self.lock(), body, end)
    }

    /// As [`Self::apply`], of a message that ends at `end`, while nobody else sees the pieces.
    fn change(&self, pieces: &mut Pieces, body: &IotlbBody, end: u64) -> bool {
        match body.kind {
            TYPE_UPDATE => {
                remove_overlapping(&mut pieces.by_iova, body.iova, end);
                if pieces.by_iova.len() >= MAX_ENTRIES {
                    pieces.by_iova.pop_first();
                }
                pieces.updates += 1;
                let IotlbBody { size, user_addr, perm, .. } = *body;
                let entry = Entry { size, user_addr, perm, update: pieces.updates };
                pieces.by_iova.insert(body.iova, entry);
            }
            TYPE_INVALIDATE => {
                remove_overlapping(&mut pieces.by_iova, body.iova, end);
                self.invalidations.fetch_add(1, Ordering::Relaxed);
            }
            _ => return false,
        }
        self.changed.notify_all();
        true
    }

    /// Front end's address of `iova` and how many bytes from there on are contiguous, if known and
    /// allowed.
    #[must_use]
    pub fn lookup(&self, iova: u64, perm: u8) -> Option<(u64, u64)> {
        find(&self.lock(), iova, perm)
    }

    /// As [`Self::lookup`], but asks the front end for what is missing and waits for it. `None`: there is
    /// no answer, or the front end keeps answering that this access is not allowed.
    #[must_use]
    pub fn resolve(&self, iova: u64, perm: u8) -> Option<(u64, u64)> {
        let mut pieces = self.lock();
        if let Some(found) = find(&pieces, iova, perm) {
            return Some(found);
        }
        let channel = self.channel()?;
        // An answer may be to a question of another worker's, for less access: as many are let pass as there
        // may be of those, and one more.
        let mut doubts = pieces.waiting + 1;
        pieces.waiting += 1;
        let deadline = Instant::now() + MISS_TIMEOUT;
        let (mut asked_at, mut seen) = (None, pieces.updates);
        let found = loop {
            if Instant::now() >= deadline || channel.is_interrupted() {
                break None;
            }
            // The answer may have come and been invalidated, with all else, before this thread woke up.
            let now = Some(self.invalidations.load(Ordering::Relaxed));
            if asked_at != now {
                if channel.iotlb_miss(iova, perm).is_err() {
                    break None;
                }
                (asked_at, seen) = (now, pieces.updates);
            }
            let wait = self.changed.wait_timeout(pieces, MISS_SLICE);
            pieces = wait.unwrap_or_else(PoisonError::into_inner).0;
            if let Some(found) = find(&pieces, iova, perm) {
                break Some(found);
            }
            if covering(&pieces, iova).is_some_and(|(_, entry)| entry.update > seen) {
                let Some(less) = doubts.checked_sub(1) else { break None };
                (doubts, asked_at) = (less, None);
            }
        };
        pieces.waiting -= 1;
        found
    }

    fn channel(&self) -> Option<Arc<BackendChannel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether nothing can be asked for because the rings are being stopped: what is missing is no fault
    /// of the driver's.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.channel().is_some_and(|channel| channel.is_interrupted())
    }

    /// Asks for `iova` without waiting: for the session's own thread, which receives the answer.
    pub fn request(&self, iova: u64, perm: u8) {
        if let Some(Err(error)) = self.channel().map(|c| c.iotlb_miss(iova, perm)) {
            tracing::debug!(%error, "an IOTLB miss could not be sent");
        }
    }
}

/// The piece that has `iova`, and where in it that is.
fn covering(pieces: &Pieces, iova: u64) -> Option<(u64, &Entry)> {
    let (start, entry) = pieces.by_iova.range(..=iova).next_back()?;
    let offset = iova - start;
    (offset < entry.size).then_some((offset, entry))
}

fn find(pieces: &Pieces, iova: u64, perm: u8) -> Option<(u64, u64)> {
    let (offset, entry) = covering(pieces, iova)?;
    (entry.perm & perm == perm).then(|| (entry.user_addr.wrapping_add(offset), entry.size - offset))
}

/// Removes every entry that has a byte in `start..=end`. (Pieces cut off are asked for again.)
fn remove_overlapping(entries: &mut BTreeMap<u64, Entry>, start: u64, end: u64) {
    let before = entries
        .range(..start)
        .next_back()
        .filter(|(s, e)| **s + (e.size - 1) >= start)
        .map(|(s, _)| *s);
    let inside = entries.range(start..=end).map(|(s, _)| *s);
    for key in before.into_iter().chain(inside).collect::<Vec<_>>() {
        entries.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::super::backend_channel::ChannelFeatures;
    use super::super::wire::Header;
    use super::*;

    fn body(kind: u8, iova: u64, size: u64, user_addr: u64, perm: u8) -> IotlbBody {
        IotlbBody { iova, size, user_addr, perm, kind, padding: [0; 6] }
    }

    #[test]
    fn updates_are_found_and_invalidations_take_every_overlap() {
        let tlb = Iotlb::default();
        assert!(tlb.apply(&body(TYPE_UPDATE, 0x1000, 0x1000, 0x7000, PERM_READ)));
        assert!(tlb.apply(&body(TYPE_UPDATE, 0x2000, 0x1000, 0x9000, PERM_READ | PERM_WRITE)));
        assert_eq!(tlb.lookup(0x1800, PERM_READ), Some((0x7800, 0x800)));
        assert_eq!(tlb.lookup(0x1800, PERM_WRITE), None);
        assert_eq!(tlb.lookup(0x2fff, PERM_WRITE), Some((0x9fff, 1)));
        assert!(tlb.apply(&body(TYPE_INVALIDATE, 0x1fff, 2, 0, 0)));
        assert_eq!(tlb.lookup(0x1800, PERM_READ), None);
        assert_eq!(tlb.lookup(0x2800, PERM_READ), None);
        assert!(!tlb.apply(&body(TYPE_UPDATE, u64::MAX, 2, 0, 3)));
        assert!(!tlb.apply(&body(TYPE_MISS, 0, 1, 0, 3)));
        assert_eq!(
            tlb.resolve(0x1000, PERM_READ),
            None,
            "without a channel there is nobody to ask"
        );
    }

    #[test]
    fn the_whole_address_space_can_be_invalidated() {
        let tlb = Iotlb::default();
        tlb.apply(&body(TYPE_UPDATE, 0, 0x1000, 0x7000, 3));
        assert!(tlb.apply(&body(TYPE_INVALIDATE, 0, u64::MAX, 0, 0)));
        assert_eq!(tlb.lookup(0, PERM_READ), None);
    }

    /// The next miss that the front end is told of.
    fn miss(front_end: &mut UnixStream) -> IotlbBody {
        let mut message = [0; size_of::<Header>() + size_of::<IotlbBody>()];
        front_end.read_exact(&mut message).expect("nothing was asked for");
        IotlbBody::read_from_bytes(&message[size_of::<Header>()..]).unwrap()
    }

    /// A piece that may not be written is asked for again, since the answer may have been to a question of
    /// somebody else's; then it is believed, long before a silent front end is given up.
    #[test]
    fn an_answer_that_allows_too_little_is_asked_for_again_and_then_believed() {
        let (ours, mut front_end) = UnixStream::pair().unwrap();
        front_end.set_read_timeout(Some(MISS_TIMEOUT / 2)).unwrap();
        let tlb = Iotlb::default();
        let channel = BackendChannel::new(ours.into(), ChannelFeatures::default()).unwrap();
        tlb.set_channel(Some(Arc::new(channel)));
        let to_read = body(TYPE_UPDATE, 0x1000, 0x1000, 0x7000, PERM_READ);
        let to_write = IotlbBody { perm: PERM_READ | PERM_WRITE, ..to_read };
        // Known from before: no answer to what is asked below.
        assert!(tlb.apply(&to_read));
        for (second, expected) in [(&to_read, None), (&to_write, Some((0x7800, 0x800)))] {
            let begun = Instant::now();
            let found = std::thread::scope(|scope| {
                let worker = scope.spawn(|| tlb.resolve(0x1800, PERM_WRITE));
                for answer in [&to_read, second] {
                    assert_eq!(miss(&mut front_end).perm, PERM_WRITE);
                    assert!(tlb.apply(answer));
                }
                worker.join().unwrap()
            });
            assert_eq!(found, expected);
            assert!(begun.elapsed() < MISS_TIMEOUT / 2);
        }
        assert_eq!(tlb.lock().waiting, 0);
    }

    /// The answer and an invalidation come before the thread that waits for it runs again: here always,
    /// because the lock is held for both.
    #[test]
    fn an_answer_invalidated_before_it_was_seen_is_asked_for_again() {
        let (ours, mut front_end) = UnixStream::pair().unwrap();
        // Less than the time that a worker waits for an answer.
        front_end.set_read_timeout(Some(MISS_TIMEOUT / 2)).unwrap();
        let tlb = Iotlb::default();
        let channel = BackendChannel::new(ours.into(), ChannelFeatures::default()).unwrap();
        tlb.set_channel(Some(Arc::new(channel)));
        let answer = body(TYPE_UPDATE, 0x1000, 0x1000, 0x7000, PERM_READ);
        let found = std::thread::scope(|scope| {
            let worker = scope.spawn(|| tlb.resolve(0x1800, PERM_READ));
            let first = miss(&mut front_end);
            assert_eq!((first.kind, first.iova, first.perm), (TYPE_MISS, 0x1800, PERM_READ));
            // The worker has let go of the lock only once it waits.
            let mut pieces = tlb.lock();
            assert!(tlb.change(&mut pieces, &answer, 0x1fff));
            let everything = body(TYPE_INVALIDATE, 0, u64::MAX, 0, 0);
            assert!(tlb.change(&mut pieces, &everything, u64::MAX - 1));
            assert!(pieces.by_iova.is_empty());
            drop(pieces);
            assert_eq!(miss(&mut front_end), first);
            assert!(tlb.apply(&answer));
            worker.join().unwrap()
        });
        assert_eq!(found, Some((0x7800, 0x800)));
        // Nothing else was asked for.
        front_end.set_nonblocking(true).unwrap();
        assert_eq!(front_end.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }
}
