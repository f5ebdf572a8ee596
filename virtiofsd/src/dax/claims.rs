//! The table of the window: which range shows which part of which file. Pure.
//!
//! A *claim* is what the guest asked for with one SETUPMAPPING. What the VMM was asked to map for it
//! are its *pieces*: at most one of whole pages from the file and one for the page in which the file
//! ends. Linux asks for ranges of 2 MiB at multiples of 2 MiB and reuses them whole, so a request that
//! cuts a claim in two comes from another kind of guest, and is refused.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::tails::TailSlot;

/// The page size of the window, and of INIT's `map_alignment`.
pub const PAGE: u64 = 4096;

/// What the VMM has mapped for a claim.
#[derive(Debug, Clone, Default)]
pub struct Pieces {
    /// Lengths of the mappings, one after another from the claim's start, that show the file itself:
    /// more than one after it has grown.
    pub parts: Vec<u64>,
    /// The page after these shows a copy of the file's last, partial page.
    pub tail: Option<TailSlot>,
}

impl Pieces {
    /// How many mappings these are in the VMM.
    #[must_use]
    pub fn count(&self) -> usize {
        self.parts.len() + usize::from(self.tail.is_some())
    }

    /// Bytes from the claim's start that show the file itself.
    #[must_use]
    pub fn file(&self) -> u64 {
        self.parts.iter().sum()
    }

    /// The ranges of the window that are mapped, as they were mapped, for a claim at `offset`.
    #[must_use]
    pub fn ranges(&self, offset: u64) -> Vec<(u64, u64)> {
        let mut at = offset;
        let lens = self.parts.iter().copied().chain(self.tail.map(|_| PAGE));
        lens.map(|len| {
            let range = (at, len);
            at += len;
            range
        })
        .collect()
    }
}

/// One range of the window that the guest has taken.
#[derive(Debug, Clone)]
pub struct Claim {
    /// Bytes of the range.
    pub len: u64,
    /// FUSE node id.
    pub inode: u64,
    /// Where in the file the range starts, bytes.
    pub file_offset: u64,
    /// The guest may write.
    pub write: bool,
    /// The file, opened as the VMM needs it.
    pub file: Arc<OwnedFd>,
    /// What is mapped now.
    pub pieces: Pieces,
}

impl Claim {
    /// What should be mapped when the file has `size` bytes: bytes of whole pages from the file, and the
    /// file offset and length of a partial last page in the range.
    #[must_use]
    pub fn wanted(&self, size: u64) -> (u64, Option<Range<u64>>) {
        let whole = size - size % PAGE;
        let file = whole.saturating_sub(self.file_offset).min(self.len);
        let has_tail =
            size > whole && whole >= self.file_offset && whole - self.file_offset < self.len;
        (file, has_tail.then_some(whole..size))
    }
}

/// Why a request of the guest is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// Not at page boundaries, empty, or past the window's end.
    #[error("the range is not one of whole pages in the window")]
    BadRange,
    /// It covers a part of a range that was taken whole.
    #[error("the range covers a part of another one")]
    Partial,
}

/// All claims, by window offset.
#[derive(Debug)]
pub struct Claims {
    size: u64,
    by_offset: BTreeMap<u64, Claim>,
}

impl Claims {
    /// An empty window of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size, by_offset: BTreeMap::new() }
    }

    /// Whether nothing is claimed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_offset.is_empty()
    }

    /// What the VMM may have to hold for us at any time, in mappings: a claim that has fewer than two can
    /// come to have two, whenever its file changes.
    #[must_use]
    pub fn budget(&self) -> usize {
        self.by_offset.values().map(|c| c.pieces.count().max(2)).sum()
    }

    /// Window offsets of the claims that lie in `offset .. offset + len`.
    ///
    /// # Errors
    /// A bad range, or one that cuts a claim.
    pub fn covered(&self, offset: u64, len: u64) -> Result<Vec<u64>, ClaimError> {
        let end =
            offset.checked_add(len).filter(|&end| end <= self.size).ok_or(ClaimError::BadRange)?;
        if len == 0 || !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(ClaimError::BadRange);
        }
        let before = self.by_offset.range(..offset).next_back();
        if before.is_some_and(|(start, claim)| start + claim.len > offset) {
            return Err(ClaimError::Partial);
        }
        let inside = self.by_offset.range(offset..end);
        if inside.clone().next_back().is_some_and(|(start, claim)| start + claim.len > end) {
            return Err(ClaimError::Partial);
        }
        Ok(inside.map(|(start, _)| *start).collect())
    }

    /// Window offsets of the claims of `inode`.
    #[must_use]
    pub fn of_inode(&self, inode: u64) -> Vec<u64> {
        self.by_offset.iter().filter(|(_, c)| c.inode == inode).map(|(start, _)| *start).collect()
    }

    /// Window offsets of all claims.
    #[must_use]
    pub fn all(&self) -> Vec<u64> {
        self.by_offset.keys().copied().collect()
    }

    /// All claims with their window offsets.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Claim)> {
        self.by_offset.iter().map(|(offset, claim)| (*offset, claim))
    }

    /// The claim at exactly `offset`.
    pub fn get_mut(&mut self, offset: u64) -> Option<&mut Claim> {
        self.by_offset.get_mut(&offset)
    }

    /// Puts a claim where none is.
    pub fn insert(&mut self, offset: u64, claim: Claim) {
        self.by_offset.insert(offset, claim);
    }

    /// Takes a claim out.
    pub fn remove(&mut self, offset: u64) -> Option<Claim> {
        self.by_offset.remove(&offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claim(len: u64, inode: u64) -> Claim {
        let file = Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()));
        Claim { len, inode, file_offset: 0, write: false, file, pieces: Pieces::default() }
    }

    #[test]
    fn the_end_of_the_file_decides_what_is_mapped() {
        let mut c = claim(8 * PAGE, 1);
        c.file_offset = 2 * PAGE;
        assert_eq!(c.wanted(0), (0, None));
        assert_eq!(c.wanted(2 * PAGE), (0, None));
        assert_eq!(c.wanted(2 * PAGE + 1), (0, Some(2 * PAGE..2 * PAGE + 1)));
        assert_eq!(c.wanted(3 * PAGE), (PAGE, None));
        assert_eq!(c.wanted(10 * PAGE + 5), (8 * PAGE, None));
        assert_eq!(c.wanted(9 * PAGE + 5), (7 * PAGE, Some(9 * PAGE..9 * PAGE + 5)));
    }

    #[test]
    fn ranges_outside_or_across_are_refused() {
        let mut claims = Claims::new(64 * PAGE);
        claims.insert(8 * PAGE, claim(8 * PAGE, 1));
        assert_eq!(claims.covered(0, 0), Err(ClaimError::BadRange));
        assert_eq!(claims.covered(1, PAGE), Err(ClaimError::BadRange));
        assert_eq!(claims.covered(60 * PAGE, 8 * PAGE), Err(ClaimError::BadRange));
        assert_eq!(claims.covered(u64::MAX - PAGE + 1, PAGE), Err(ClaimError::BadRange));
        assert_eq!(claims.covered(9 * PAGE, PAGE), Err(ClaimError::Partial));
        assert_eq!(claims.covered(0, 9 * PAGE), Err(ClaimError::Partial));
        assert_eq!(claims.covered(15 * PAGE, 2 * PAGE), Err(ClaimError::Partial));
        assert_eq!(claims.covered(0, 64 * PAGE), Ok(vec![8 * PAGE]));
        assert_eq!(claims.covered(16 * PAGE, PAGE), Ok(vec![]));
    }

    proptest! {
        /// Whatever is accepted never overlaps what stays.
        #[test]
        fn accepted_claims_never_overlap(requests in proptest::collection::vec((0u64..70, 0u64..20), 1..60)) {
            let mut claims = Claims::new(64 * PAGE);
            let mut pages = [0u64; 64];
            let index = |n: u64| usize::try_from(n).unwrap();
            for (n, (at, len)) in (1u64..).zip(requests) {
                let Ok(old) = claims.covered(at * PAGE, len * PAGE) else { continue };
                for start in old {
                    let gone = claims.remove(start).unwrap();
                    pages[index(start / PAGE)..index((start + gone.len) / PAGE)].fill(0);
                }
                let range = index(at)..index(at + len);
                prop_assert!(pages[range.clone()].iter().all(|&p| p == 0));
                pages[range].fill(n);
                claims.insert(at * PAGE, claim(len * PAGE, n));
            }
        }
    }
}
