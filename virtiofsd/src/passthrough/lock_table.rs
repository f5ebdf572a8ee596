//! Which POSIX locks this guest's processes hold and wait for: to tell a deadlock, as a local file system
//! does (`EDEADLK`). The host does not: its locks belong to open files, which may be shared. And a guest
//! cannot give up: Linux's virtio-fs driver sends no INTERRUPT, so that a process in a deadlock could not
//! even be killed.
//!
//! What is recorded as held is never more than what is held: it is added after the host granted it, and
//! removed before the host is told. So nobody is told of a deadlock that is none.

use super::locks::Holder;

/// Locked parts of one file and one owner, at the most; who has more is not looked at.
const MAX_RANGES: usize = 1024;
/// Owners on the way from one that waits to the one it waits for in the end.
const MAX_DEPTH: usize = 16;

/// A part of a file, its last byte included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) end: u64,
    /// Locked for writing.
    pub(super) write: bool,
}

impl Range {
    fn overlaps(&self, other: &Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    fn conflicts(&self, other: &Self) -> bool {
        self.overlaps(other) && (self.write || other.write)
    }
}

/// What one owner has locked of one file.
#[derive(Debug, Default)]
pub(super) struct Ranges(Vec<Range>);

impl Ranges {
    /// No lock in `range` any more.
    pub(super) fn remove(&mut self, range: &Range) {
        let mut rest = Vec::with_capacity(self.0.len() + 1);
        for one in self.0.drain(..) {
            if !one.overlaps(range) {
                rest.push(one);
                continue;
            }
            if let Some(end) = range.start.checked_sub(1).filter(|end| one.start <= *end) {
                rest.push(Range { end, ..one });
            }
            if let Some(start) = range.end.checked_add(1).filter(|start| *start <= one.end) {
                rest.push(Range { start, ..one });
            }
        }
        self.0 = rest;
    }

    /// `range` is locked, in place of what was in it.
    pub(super) fn add(&mut self, range: Range) {
        self.remove(&range);
        if self.0.len() < MAX_RANGES {
            self.0.push(range);
        }
    }

    fn conflicts(&self, with: &Range) -> bool {
        self.0.iter().any(|range| range.conflicts(with))
    }
}

/// A lock that is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) holder: Holder,
    pub(super) range: Range,
}

/// Calls what it is given with every holder and what it holds.
pub(super) type EachHeld<'a> = dyn Fn(&mut dyn FnMut(Holder, &Ranges)) + 'a;

/// Whether waiting for `wanted` would never end: among those who hold it is one who waits, in the end, for
/// its owner. `held` tells all that is held, `waiting` what is waited for.
pub(super) fn is_deadlock(wanted: &Wanted, held: &EachHeld<'_>, waiting: &[Wanted]) -> bool {
    let owner = wanted.holder.1;
    let mut next = vec![*wanted];
    let mut seen: Vec<u64> = Vec::new();
    for _ in 0..MAX_DEPTH {
        let mut blockers = Vec::new();
        held(&mut |holder, ranges| {
            let blocks = |wanted: &Wanted| {
                holder.0 == wanted.holder.0
                    && holder.1 != wanted.holder.1
                    && ranges.conflicts(&wanted.range)
            };
            if next.iter().any(blocks) {
                blockers.push(holder.1);
            }
        });
        if blockers.contains(&owner) {
            return true;
        }
        blockers.retain(|one| !seen.contains(one));
        next = waiting.iter().filter(|wait| blockers.contains(&wait.holder.1)).copied().collect();
        if next.is_empty() {
            return false;
        }
        seen.append(&mut blockers);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64, write: bool) -> Range {
        Range { start, end, write }
    }

    #[test]
    fn ranges_are_cut_and_replaced() {
        let mut ranges = Ranges::default();
        ranges.add(range(0, u64::MAX, true));
        ranges.remove(&range(10, 19, false));
        assert!(ranges.conflicts(&range(9, 9, false)) && ranges.conflicts(&range(20, 20, false)));
        assert!(!ranges.conflicts(&range(10, 19, true)));
        ranges.add(range(5, 14, false));
        assert!(!ranges.conflicts(&range(5, 14, false)), "readers share");
        assert!(ranges.conflicts(&range(14, 14, true)));
        ranges.remove(&range(0, u64::MAX, false));
        assert_eq!(ranges.0, []);
        for n in 0..5000 {
            ranges.add(range(n * 2, n * 2, true));
        }
        assert_eq!(ranges.0.len(), MAX_RANGES);
    }

    /// `held` and `waiting` as inode, owner and byte.
    fn deadlock(
        wanted: (u64, u64, u64),
        held: &[(u64, u64, u64)],
        waiting: &[(u64, u64, u64)],
    ) -> bool {
        let held: Vec<(Holder, Ranges)> = held
            .iter()
            .map(|(inode, owner, at)| ((*inode, *owner), Ranges(vec![range(*at, *at, true)])))
            .collect();
        let wants = |(inode, owner, at): (u64, u64, u64)| Wanted {
            holder: (inode, owner),
            range: range(at, at, true),
        };
        let waiting: Vec<Wanted> = waiting.iter().map(|one| wants(*one)).collect();
        let each = |tell: &mut dyn FnMut(Holder, &Ranges)| {
            held.iter().for_each(|(holder, ranges)| tell(*holder, ranges));
        };
        is_deadlock(&wants(wanted), &each, &waiting)
    }

    #[test]
    fn circles_are_found_and_chains_are_not() {
        // 1 has a, 2 has b and waits for a: 1 must not wait for b.
        assert!(deadlock((7, 1, 20), &[(7, 1, 10), (7, 2, 20)], &[(7, 2, 10)]));
        assert!(!deadlock((7, 1, 21), &[(7, 1, 10), (7, 2, 20)], &[(7, 2, 10)]));
        // The same bytes of different files are different things; a circle may go over several.
        assert!(!deadlock((7, 1, 20), &[(7, 1, 10), (8, 2, 20)], &[(8, 2, 10)]));
        assert!(deadlock((8, 1, 20), &[(7, 1, 10), (8, 2, 20)], &[(7, 2, 10)]));
        // Over three, and one that waits for somebody outside of a circle.
        let held = [(7, 1, 1), (7, 2, 2), (7, 3, 3)];
        assert!(deadlock((7, 1, 2), &held, &[(7, 2, 3), (7, 3, 1)]));
        assert!(!deadlock((7, 4, 1), &held, &[(7, 1, 2), (7, 2, 3), (7, 3, 9)]));
        // Others' circle does not keep the search busy for ever.
        assert!(!deadlock((7, 4, 1), &held, &[(7, 1, 2), (7, 2, 1)]));
        // Whoever waits for its own second thread waits for nobody else.
        assert!(!deadlock((7, 1, 1), &held, &[(7, 1, 1)]));
    }
}
