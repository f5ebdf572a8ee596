//! Limits on operations and bytes a second, for reads and writes apart.
//!
//! # Theory of operation
//! Each limit is a token bucket. It holds at most `burst` tokens, starts full and refills at `rate`
//! tokens a second. A request passes when each bucket of its direction holds at least one token; it
//! then takes its whole cost, and the level may go below zero. So a request larger than the burst
//! still passes, and the requests after it wait until its debt is paid. And it cannot starve: had it
//! to find its whole cost in the bucket, smaller requests of other queues could always come first.
//!
//! Over any stretch of `t` seconds no more than `burst + rate × t` tokens and the cost of one
//! request are taken.
//!
//! One [`RateLimiter`] serves all queues of a device, since the limit is the device's. A direction
//! without limits costs one relaxed load. With limits, the buckets are behind a lock; whoever sets a
//! limit has chosen one far below where that lock would matter.
//!
//! Levels are kept in billionths of a token: a rate in tokens a second is then a whole number of
//! units a nanosecond, and refilling is one multiplication without rounding.

use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cli::values::{Size, ValueError};

/// Units of a level in one token.
const UNITS_PER_TOKEN: i128 = 1_000_000_000;

/// The longest time a refused request is told to wait before it asks again.
///
/// Short, so that a limit that was raised takes effect soon without waking anybody; a waiting
/// request costs four wake-ups a second at most.
pub const WAIT_MAX: Duration = Duration::from_millis(250);

/// Which way the data of a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the device to the guest: a block read, a received packet.
    Read,
    /// From the guest to the device: a block write, a sent packet.
    Write,
}

/// A rate and how much may come at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "LimitForm")]
pub struct Limit {
    /// Tokens (operations or bytes) a second, at least 1.
    rate: u64,
    /// Tokens that may be taken at once after a quiet time, at least 1.
    burst: u64,
}

/// A limit that would let nothing pass.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// The rate or the burst is zero.
    #[error("a rate and a burst are at least 1; leave the limit out to have none")]
    Zero,
    /// One of the two numbers is malformed.
    #[error("write RATE or RATE:BURST, like 1000 or 100M:500M")]
    Malformed(#[from] ValueError),
}

impl Limit {
    /// A limit of `rate` tokens a second, of which up to `burst` may come at once.
    ///
    /// # Errors
    /// [`LimitError::Zero`] when one of the two is zero.
    pub fn new(rate: u64, burst: u64) -> Result<Self, LimitError> {
        if rate == 0 || burst == 0 {
            return Err(LimitError::Zero);
        }
        Ok(Self { rate, burst })
    }

    /// A limit with the usual burst: what comes in a tenth of a second.
    ///
    /// # Errors
    /// [`LimitError::Zero`] when the rate is zero.
    pub fn per_second(rate: u64) -> Result<Self, LimitError> {
        Self::new(rate, rate.div_ceil(10))
    }

    /// Tokens a second.
    pub fn rate(self) -> u64 {
        self.rate
    }

    /// Tokens that may be taken at once after a quiet time.
    pub fn burst(self) -> u64 {
        self.burst
    }
}

/// `RATE` or `RATE:BURST`, each with K, M, G or T if wanted.
impl FromStr for Limit {
    type Err = LimitError;

    fn from_str(text: &str) -> Result<Self, LimitError> {
        match text.split_once(':') {
            None => Self::per_second(text.parse::<Size>()?.bytes()),
            Some((rate, burst)) => {
                Self::new(rate.parse::<Size>()?.bytes(), burst.parse::<Size>()?.bytes())
            }
        }
    }
}

/// What a limit looks like in a configuration file or a control request.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a limit is a whole number, \"RATE:BURST\", or a rate and a burst")]
enum LimitForm {
    Rate(u64),
    Text(String),
    Both { rate: Size, burst: Size },
}

impl TryFrom<LimitForm> for Limit {
    type Error = LimitError;

    fn try_from(form: LimitForm) -> Result<Self, LimitError> {
        match form {
            LimitForm::Rate(rate) => Self::per_second(rate),
            LimitForm::Text(text) => text.parse(),
            LimitForm::Both { rate, burst } => Self::new(rate.bytes(), burst.bytes()),
        }
    }
}

/// The limits of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DirectionLimits {
    /// Operations a second.
    pub ops: Option<Limit>,
    /// Bytes a second.
    pub bytes: Option<Limit>,
}

impl DirectionLimits {
    fn any(&self) -> bool {
        self.ops.is_some() || self.bytes.is_some()
    }
}

/// All limits of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Limits on reads.
    pub read: DirectionLimits,
    /// Limits on writes.
    pub write: DirectionLimits,
}

/// One bucket.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    limit: Limit,
    /// Units in the bucket; negative is debt.
    level: i128,
    refilled: Instant,
}

impl Bucket {
    fn full(limit: Limit, now: Instant) -> Self {
        Self { limit, level: Self::capacity(limit), refilled: now }
    }

    fn capacity(limit: Limit) -> i128 {
        i128::from(limit.burst) * UNITS_PER_TOKEN
    }

    /// Adds what came since the last time. A clock that went back adds nothing.
    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.refilled);
        if elapsed.is_zero() {
            return;
        }
        self.refilled = now;
        // At most 2^64 tokens a second for 2^64 seconds of 2^30 ns: this can pass i128.
        let nanoseconds = i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX);
        let units = nanoseconds.saturating_mul(i128::from(self.limit.rate));
        self.level = self.level.saturating_add(units).min(Self::capacity(self.limit));
    }

    /// How long until the bucket holds a token; zero when it does. At most [`WAIT_MAX`].
    fn wait(&self) -> Duration {
        let missing = UNITS_PER_TOKEN - self.level;
        if missing <= 0 {
            return Duration::ZERO;
        }
        let rate = i128::from(self.limit.rate);
        let nanoseconds = missing / rate + i128::from(missing % rate != 0);
        u64::try_from(nanoseconds).map_or(WAIT_MAX, Duration::from_nanos).min(WAIT_MAX)
    }

    fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens) * UNITS_PER_TOKEN;
    }

    /// The bucket for a changed limit: debt stays, so that changing a limit is no way around it.
    fn changed(old: Option<Self>, limit: Option<Limit>, now: Instant) -> Option<Self> {
        let limit = limit?;
        let Some(mut bucket) = old else {
            return Some(Self::full(limit, now));
        };
        bucket.refill(now);
        bucket.limit = limit;
        bucket.level = bucket.level.min(Self::capacity(limit));
        Some(bucket)
    }
}

/// The two buckets of a direction.
#[derive(Debug, Clone, Copy, Default)]
struct Buckets {
    ops: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Buckets {
    fn change(&mut self, limits: &DirectionLimits, now: Instant) {
        self.ops = Bucket::changed(self.ops, limits.ops, now);
        self.bytes = Bucket::changed(self.bytes, limits.bytes, now);
    }

    fn try_take(&mut self, ops: u64, bytes: u64, now: Instant) -> Result<(), Instant> {
        let both = [(&mut self.ops, ops), (&mut self.bytes, bytes)];
        let mut wait = Duration::ZERO;
        for (bucket, cost) in &both {
            // A request that costs nothing here (a flush has no bytes) need not wait here.
            if let (Some(bucket), 1..) = (bucket.as_ref(), *cost) {
                let mut refilled = *bucket;
                refilled.refill(now);
                wait = wait.max(refilled.wait());
            }
        }
        if !wait.is_zero() {
            return Err(now + wait);
        }
        for (bucket, cost) in both {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                bucket.take(cost);
            }
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct State {
    limits: Limits,
    read: Buckets,
    write: Buckets,
}

/// The limiter of one device, shared by its queues.
#[derive(Debug, Default)]
pub struct RateLimiter {
    /// Bit 0: reads are limited; bit 1: writes are.
    limited: AtomicU32,
    state: Mutex<State>,
}

impl RateLimiter {
    /// A limiter with these limits, its buckets full.
    pub fn new(limits: Limits, now: Instant) -> Self {
        let limiter = Self::default();
        limiter.set(limits, now);
        limiter
    }

    /// Changes the limits, while queues are running too. They notice within [`WAIT_MAX`].
    ///
    /// A bucket that was there before keeps its level up to the new burst, and its debt.
    pub fn set(&self, limits: Limits, now: Instant) {
        let mut state = self.lock();
        state.limits = limits;
        state.read.change(&limits.read, now);
        state.write.change(&limits.write, now);
        let bits = u32::from(limits.read.any()) | (u32::from(limits.write.any()) << 1);
        self.limited.store(bits, Ordering::Relaxed);
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.lock().limits
    }

    /// Whether anything limits this direction.
    #[inline]
    pub fn is_limited(&self, direction: Direction) -> bool {
        let bit = match direction {
            Direction::Read => 1,
            Direction::Write => 2,
        };
        self.limited.load(Ordering::Relaxed) & bit != 0
    }

    /// Takes what a request of `ops` operations and `bytes` bytes costs, or nothing at all.
    ///
    /// `now` is called only where there is a limit.
    ///
    /// # Errors
    /// When to ask again, later than now and no later than [`WAIT_MAX`] from now.
    #[inline]
    pub fn try_take(
        &self,
        direction: Direction,
        ops: u64,
        bytes: u64,
        now: impl FnOnce() -> Instant,
    ) -> Result<(), Instant> {
        if !self.is_limited(direction) {
            return Ok(());
        }
        self.take_limited(direction, ops, bytes, now())
    }

    #[cold]
    fn take_limited(
        &self,
        direction: Direction,
        ops: u64,
        bytes: u64,
        now: Instant,
    ) -> Result<(), Instant> {
        let mut state = self.lock();
        match direction {
            Direction::Read => state.read.try_take(ops, bytes, now),
            Direction::Write => state.write.try_take(ops, bytes, now),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change of the state is complete at each step, so a panicking holder harms nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
