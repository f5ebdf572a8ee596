//! When to ask the kernel whether the interface is still there. Pure.
//!
//! # Theory of operation
//! A tap that was deleted says so at once. A packet socket says that its interface went down, which is how
//! a deletion begins and may be all that happens; a macvtap says nothing and takes frames as ever. So a sign
//! of trouble is asked about several times, and sending is a reason to look now and then. Asking takes a
//! lock that the whole host shares: never more often than once a [`PAUSE`].

use std::time::{Duration, Instant};

/// Between two questions.
pub(super) const PAUSE: Duration = Duration::from_secs(1);
/// Questions after a sign of trouble.
const PATIENCE: u8 = 10;

/// Whether the interface is doubted.
#[derive(Debug)]
pub(super) struct Doubt {
    next: Instant,
    left: u8,
}

impl Doubt {
    /// No doubt so far.
    pub(super) fn new(now: Instant) -> Self {
        Self { next: now, left: 0 }
    }

    /// A sign of trouble was seen.
    pub(super) fn raise(&mut self) {
        self.left = PATIENCE;
    }

    /// Whether to look `now`; if so, not again before a pause.
    #[inline]
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        if now < self.next {
            return false;
        }
        self.next = now + PAUSE;
        self.left = self.left.saturating_sub(1);
        true
    }

    /// When to look, though nothing else happens.
    pub(super) fn due(&self) -> Option<Instant> {
        (self.left > 0).then_some(self.next)
    }

    /// The answer is known.
    pub(super) fn settle(&mut self) {
        self.left = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_asked_about_some_times_with_pauses() {
        let mut now = Instant::now();
        let mut doubt = Doubt::new(now);
        assert_eq!(doubt.due(), None);
        assert!(doubt.is_due(now) && !doubt.is_due(now), "sending is a reason once a pause");
        let mut asked = 0;
        doubt.raise();
        while let Some(at) = doubt.due() {
            assert!(at > now, "no busy loop");
            now = at;
            assert!(doubt.is_due(now) && !doubt.is_due(now));
            asked += 1;
        }
        assert_eq!(asked, PATIENCE);
        doubt.raise();
        doubt.settle();
        assert_eq!(doubt.due(), None);
    }
}
