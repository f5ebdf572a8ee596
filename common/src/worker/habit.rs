//! Waiting for more chains instead of asking for a kick: whether it pays, learnt from how it ended lately.

use std::time::{Duration, Instant};

/// Whether a chance of waiting is to be taken.
#[derive(Debug, Default)]
pub(super) struct Habit {
    /// Waits that were worth it, less those in vain; 0 to [`Self::MAX_CREDIT`].
    credit: u8,
    /// Chances let pass since the last wait, when there is no credit.
    passed: u8,
}

impl Habit {
    const MAX_CREDIT: u8 = 8;
    /// Without credit, one chance in so many is taken, to learn whether the driver became faster.
    const PROBE: u8 = 32;
    /// Looks in a row before other events get their turn.
    pub(super) const ROW: u8 = 32;

    /// Whether to wait this time.
    pub(super) fn chance(&mut self) -> bool {
        if self.credit > 0 {
            return true;
        }
        self.passed = (self.passed + 1) % Self::PROBE;
        self.passed == 0
    }

    /// Takes note of how a wait ended.
    pub(super) fn learn(&mut self, worth: bool) {
        self.credit = match worth {
            true => (self.credit + 1).min(Self::MAX_CREDIT),
            false => self.credit.saturating_sub(1),
        };
    }

    /// Looks whether there is something, by `found`, from `now` on and for `time` at the most, if there is a
    /// chance; whether there was.
    pub(super) fn look(
        &mut self,
        now: impl FnOnce() -> Instant,
        time: Duration,
        found: impl Fn() -> bool,
    ) -> bool {
        if !self.chance() {
            return false;
        }
        let start = now();
        let came = loop {
            // The clock is the dearest part of a round.
            if (0..8).any(|_| {
                std::hint::spin_loop();
                found()
            }) {
                break true;
            }
            if start.elapsed() >= time {
                break false;
            }
        };
        self.learn(came);
        came
    }
}

/// One queue that may rest.
#[derive(Debug)]
struct Rest {
    index: u16,
    habit: Habit,
    /// How long the next rest is, as a multiple of the shortest.
    length: u32,
    /// When the rest is over, while there is one.
    until: Option<Instant>,
    /// It rested, and nobody has said yet what came meanwhile.
    rested: bool,
}

/// The queues that may rest: left alone for a while with kicks off.
#[derive(Debug, Default)]
pub(super) struct Rests(Vec<Rest>);

impl Rests {
    /// The longest rest, as a multiple of the shortest.
    const LONGEST: u32 = 8;

    /// Queue `index` was looked at until it was empty, and `came` chains were in its ring of `size`. Whether
    /// it rests now, and until when: what `until` makes of the rest's length, as a multiple of the shortest.
    /// Otherwise a kick is to be asked for.
    pub(super) fn begin(
        &mut self,
        index: u16,
        (came, size): (u64, u16),
        until: impl FnOnce(u32) -> Instant,
    ) -> bool {
        let at = self.0.iter().position(|rest| rest.index == index).unwrap_or_else(|| {
            let habit = Habit::default();
            self.0.push(Rest { index, habit, length: 1, until: None, rested: false });
            self.0.len() - 1
        });
        let rest = &mut self.0[at];
        if std::mem::take(&mut rest.rested) {
            // A single chain would have woken the worker once too, and sooner.
            rest.habit.learn(came > 1);
            rest.length = match (came.saturating_mul(8), came.saturating_mul(3)) {
                (few, _) if came > 1 && few <= size.into() => (rest.length * 2).min(Self::LONGEST),
                // The ring must not be full before the rest is over.
                (_, many) if came <= 1 || many > size.into() => (rest.length / 2).max(1),
                _ => rest.length,
            };
        }
        rest.rested = came > 0 && rest.habit.chance();
        rest.until = rest.rested.then(|| until(rest.length));
        rest.rested
    }

    /// A queue whose rest is over by `now` and that has to be looked at; each is named once.
    pub(super) fn over(&mut self, now: impl FnOnce() -> Instant) -> Option<u16> {
        self.first()?;
        let now = now();
        let rest = self.0.iter_mut().find(|rest| rest.until.is_some_and(|end| end <= now))?;
        rest.until = None;
        Some(rest.index)
    }

    /// When the next rest is over.
    pub(super) fn first(&self) -> Option<Instant> {
        self.0.iter().filter_map(|rest| rest.until).min()
    }

    /// Queue `index` stopped.
    pub(super) fn forget(&mut self, index: u16) {
        self.0.retain(|rest| rest.index != index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_worth_it_or_become_rare() {
        let mut linger = Habit::default();
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
        assert_eq!(forgiven.count(), usize::from(Habit::MAX_CREDIT) - 1);
    }

    #[test]
    fn a_queue_rests_while_that_finds_chains() {
        let (start, while_) = (Instant::now(), Duration::from_micros(50));
        let mut rests = Rests::default();
        // One chance in 32 until it pays.
        let tried = (1..=100).find(|_| rests.begin(3, (1, 16), |n| start + while_ * n));
        assert_eq!(tried, Some(32));
        assert_eq!((rests.over(|| start), rests.first()), (None, Some(start + while_)));
        for n in 2..100 {
            assert_eq!(rests.over(|| start + while_ * (n - 1)), Some(3));
            // Three of sixteen: neither few nor many.
            assert!(rests.begin(3, (3, 16), |_| start + while_ * n));
        }
        // In vain: a kick is asked for, and nothing is due.
        assert!(!rests.begin(3, (0, 16), |_| start));
        assert_eq!((rests.over(|| start + while_ * 1000), rests.first()), (None, None));
        // It is tried again with the next chains, and no more with a queue that stopped.
        assert!(rests.begin(3, (1, 16), |_| start));
        rests.forget(3);
        assert_eq!(rests.over(|| start), None);
        // A driver that waits for each chain is not made to wait for long.
        while !rests.begin(3, (1, 16), |_| start) {}
        assert!(!rests.begin(3, (1, 16), |_| start));
        rests.forget(3);
        assert!(!rests.begin(3, (1, 16), |_| start));
    }

    #[test]
    fn a_rest_is_as_long_as_leaves_room_in_the_ring() {
        let start = Instant::now();
        let mut rests = Rests::default();
        let mut length = 0;
        let mut begin = |came| {
            rests.begin(0, came, |n| {
                length = n;
                start
            });
            length
        };
        while begin((2, 128)) == 0 {}
        // Few chains: longer, up to a limit.
        assert_eq!([2, 16, 4, 2].map(|came| begin((came, 128))), [2, 4, 8, 8]);
        // As many as that, then more than a third of the ring.
        assert_eq!([40, 43, 128, 128, 128].map(|came| begin((came, 128))), [8, 4, 2, 1, 1]);
        // In vain: shorter too.
        assert_eq!([2, 2, 1].map(|came| begin((came, 128))), [2, 4, 2]);
    }
}
