//! Looking for work a little longer instead of going to sleep, where that was worth it lately.

use std::time::{Duration, Instant};

use crate::ring::Queue;

/// Whether what comes next comes so soon that looking for it is cheaper than sleeping.
#[derive(Debug, Default)]
pub(super) struct Linger {
    /// Looks that were worth it, less those in vain; 0 to [`Self::MAX_CREDIT`].
    credit: u8,
    /// Chances let pass since the last look, when there is no credit.
    passed: u8,
}

impl Linger {
    const MAX_CREDIT: u8 = 8;
    /// Without credit, one chance in so many is taken, to learn whether the driver became faster.
    const PROBE: u8 = 32;
    /// Looks in a row before other events get their turn.
    pub(super) const ROW: u8 = 32;

    /// Whether to look this time.
    pub(super) fn chance(&mut self) -> bool {
        if self.credit > 0 {
            return true;
        }
        self.passed = (self.passed + 1) % Self::PROBE;
        self.passed == 0
    }

    /// Takes note of how a look ended.
    pub(super) fn learn(&mut self, worth: bool) {
        self.credit = match worth {
            true => (self.credit + 1).min(Self::MAX_CREDIT),
            false => self.credit.saturating_sub(1),
        };
    }

    /// Looks at `queue` for `time` at the most; whether a chain came.
    pub(super) fn look(&mut self, queue: &Queue, time: Duration) -> bool {
        if !self.chance() {
            return false;
        }
        let start = Instant::now();
        let found = loop {
            // The clock is the dearest part of a round.
            if (0..8).any(|_| {
                std::hint::spin_loop();
                queue.has_available()
            }) {
                break true;
            }
            if start.elapsed() >= time {
                break false;
            }
        };
        self.learn(found);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_worth_it_or_become_rare() {
        let mut linger = Linger::default();
        // A driver that is never fast: one look in 32 chances.
        let looks = (0..320).filter(|_| {
            let look = linger.chance();
            if look {
                linger.learn(false);
            }
            look
        });
        assert_eq!(looks.count(), 10);
        // One that has become fast is looked at each time, and forgiven some slow answers.
        while !linger.chance() {}
        for _ in 0..100 {
            linger.learn(true);
            assert!(linger.chance());
        }
        let forgiven = (0..100).take_while(|_| {
            linger.learn(false);
            linger.chance()
        });
        assert_eq!(forgiven.count(), usize::from(Linger::MAX_CREDIT) - 1);
    }
}
