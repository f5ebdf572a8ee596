//! Credit: how much either side may send. Virtio 1.3, 5.10.6.3.
//!
//! All counters run modulo 2^32, as the packets have them; differences are what counts.
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

/// What we may send to the guest.
#[derive(Debug, Clone, Copy, Default)]
pub struct PeerCredit {
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
}

impl PeerCredit {
    /// Takes what a packet of the guest says.
    #[inline]
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        self.fwd_cnt = fwd_cnt;
    }

    /// Bytes sent that the guest's application has not taken. Nonsense from the guest (it took more
    /// than was sent) counts as very much, so that nothing more is sent.
    #[inline]
    #[must_use]
    pub fn outstanding(&self) -> u32 {
        self.sent.wrapping_sub(self.fwd_cnt)
    }

    /// Bytes that may be sent now.
    #[inline]
    #[must_use]
    pub fn available(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.outstanding())
    }

    /// The guest's whole receive buffer.
    #[inline]
    #[must_use]
    pub fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Counts `n` bytes as sent; `n` is at most [`Self::available`].
    #[inline]
    pub fn send(&mut self, n: u32) {
        debug_assert!(n <= self.available());
        self.sent = self.sent.wrapping_add(n);
    }
}

/// More came than the window has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes came with {held} of {buf_alloc} in use")]
pub struct Overrun {
    /// Bytes that came.
    pub len: u32,
    /// Bytes held already.
    pub held: u32,
    /// Bytes of the window.
    pub buf_alloc: u32,
}

/// What the guest may send to us.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    buf_alloc: u32,
    received: u32,
    forwarded: u32,
    told: u32,
}

impl Window {
    /// A window of `buf_alloc` bytes.
    #[must_use]
    pub const fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, received: 0, forwarded: 0, told: 0 }
    }

    /// Bytes that came and were not forwarded.
    #[inline]
    #[must_use]
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Counts `len` bytes from the guest.
    ///
    /// # Errors
    /// They are more than there is room for; nothing was counted.
    #[inline]
    pub fn receive(&mut self, len: u32) -> Result<(), Overrun> {
        let held = self.held();
        if len > self.buf_alloc.saturating_sub(held) {
            return Err(Overrun { len, held, buf_alloc: self.buf_alloc });
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Counts `n` bytes, of those held, as taken by the host.
    #[inline]
    pub fn forward(&mut self, n: u32) {
        debug_assert!(n <= self.held());
        self.forwarded = self.forwarded.wrapping_add(n);
    }

    /// What a packet to the guest says: `(buf_alloc, fwd_cnt)`. The guest knows it from now on.
    #[inline]
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.buf_alloc, self.forwarded)
    }

    /// Whether the guest should be told of room it does not know of: a quarter of the window. With
    /// `eager`, also any room at all when it knows of less than a quarter; messages that come whole
    /// or not at all need that.
    #[inline]
    #[must_use]
    pub fn worth_telling(&self, eager: bool) -> bool {
        let news = self.forwarded.wrapping_sub(self.told);
        let quarter = self.buf_alloc / 4;
        let known_room = self.buf_alloc.saturating_sub(self.received.wrapping_sub(self.told));
        news > 0 && (news >= quarter || (eager && known_room < quarter))
    }
}

#[cfg(test)]
#[allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_guest_that_took_more_than_was_sent_gets_nothing() {
        let mut credit = PeerCredit::default();
        credit.update(1000, 5);
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn counters_wrap() {
        let mut credit = PeerCredit { buf_alloc: 100, fwd_cnt: u32::MAX - 10, sent: u32::MAX - 10 };
        credit.send(60);
        assert_eq!(credit.available(), 40);
        credit.update(100, 49);
        assert_eq!(credit.available(), 100);
        let mut window =
            Window { buf_alloc: 64, received: u32::MAX, forwarded: u32::MAX, told: u32::MAX };
        window.receive(64).unwrap();
        assert_eq!(window.receive(1), Err(Overrun { len: 1, held: 64, buf_alloc: 64 }));
        window.forward(64);
        assert!(window.worth_telling(false));
        assert_eq!(window.tell(), (64, 63));
    }

    #[test]
    fn a_message_as_large_as_the_window_is_never_stuck() {
        let mut window = Window::new(256);
        window.receive(60).unwrap();
        window.forward(60);
        assert!(!window.worth_telling(true), "a quarter is not yet reached");
        // All the guest knows it may send; the message is longer still.
        window.receive(196).unwrap();
        assert!(!window.worth_telling(false));
        assert!(window.worth_telling(true));
    }

    proptest! {
        /// Whatever is sent within what was told is accepted, and never is more held than allotted.
        #[test]
        fn what_was_told_may_be_sent(steps in proptest::collection::vec((0u8..3, 0u32..300), 1..200)) {
            let mut window = Window::new(256);
            let (mut told, mut sent) = (0u32, 0u32);
            for (step, n) in steps {
                match step {
                    0 => {
                        let n = n.min(256 - (sent - told));
                        prop_assert_eq!(window.receive(n), Ok(()));
                        sent += n;
                    }
                    1 => window.forward(n.min(window.held())),
                    _ => told = window.tell().1,
                }
                prop_assert!(window.held() <= 256);
            }
        }
    }
}
