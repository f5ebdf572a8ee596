//! A histogram of latencies with a bucket for each power of two.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::Counter;

/// Number of buckets. Bucket `k` counts values above `2^(k-1)` ns and up to `2^k` ns; the first
/// takes 0 and 1 ns, the last everything above 2^38 ns (275 s).
pub const BUCKETS: usize = 40;

/// Latencies in nanoseconds, as counts in powers of two. One thread records, any thread reads.
///
/// Recording is a count of leading zeros and two plain additions.
#[derive(Debug)]
pub struct Histogram {
    buckets: [Counter; BUCKETS],
    sum_ns: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [const { Counter::new() }; BUCKETS], sum_ns: Counter::new() }
    }
}

impl Histogram {
    /// Counts one latency of `nanoseconds`. Only the owning thread may call this.
    #[inline]
    pub fn record(&self, nanoseconds: u64) {
        self.buckets[bucket_of(nanoseconds)].add(1);
        self.sum_ns.add(nanoseconds);
    }

    /// Counts `count` requests of one batch, each of which took from `begun` until now, and gives now:
    /// the begin of the next batch. Reads the clock once. Only the owning thread may call this.
    #[inline]
    pub fn record_since(&self, begun: Instant, count: u64) -> Instant {
        let now = Instant::now();
        self.record_between(begun, now, count);
        now
    }

    /// Counts `count` requests that took from `begun` until `ended`. Only the owning thread may call this.
    #[inline]
    pub fn record_between(&self, begun: Instant, ended: Instant, count: u64) {
        let elapsed = ended.saturating_duration_since(begun).as_nanos();
        let nanoseconds = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.buckets[bucket_of(nanoseconds)].add(count);
        self.sum_ns.add(nanoseconds.saturating_mul(count));
    }

    /// The counts now.
    pub fn snapshot(&self) -> HistogramSnapshot {
        HistogramSnapshot {
            buckets: self.buckets.iter().map(Counter::get).collect(),
            sum_ns: self.sum_ns.get(),
        }
    }
}

/// The bucket of a value: the binary logarithm, rounded up.
#[inline]
fn bucket_of(nanoseconds: u64) -> usize {
    let log2_rounded_up = u64::BITS - nanoseconds.saturating_sub(1).leading_zeros();
    (log2_rounded_up as usize).min(BUCKETS - 1)
}

/// Counts of a [`Histogram`] at one time, or between two times.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistogramSnapshot {
    /// How many values each bucket took; see [`BUCKETS`].
    pub buckets: Vec<u64>,
    /// All values together, in nanoseconds.
    pub sum_ns: u64,
}

impl HistogramSnapshot {
    /// How many values there are.
    pub fn count(&self) -> u64 {
        self.buckets.iter().fold(0, |sum, bucket| sum.wrapping_add(*bucket))
    }

    /// What was recorded after `earlier`, a snapshot of the same histogram.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = earlier.buckets.iter().copied().chain(std::iter::repeat(0));
        let buckets = self.buckets.iter().zip(before).map(|(now, then)| now.wrapping_sub(then));
        Self { buckets: buckets.collect(), sum_ns: self.sum_ns.wrapping_sub(earlier.sum_ns) }
    }

    /// An upper bound in nanoseconds, at most twice the truth, for the value that `percent` of all
    /// values do not exceed; `None` when there are no values.
    pub fn percentile_ns(&self, percent: u8) -> Option<u64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let rank = (u128::from(count) * u128::from(percent.min(100))).div_ceil(100).max(1);
        let mut seen = 0;
        for (bucket, values) in self.buckets.iter().enumerate() {
            seen += u128::from(*values);
            if seen >= rank {
                return 1_u64.checked_shl(u32::try_from(bucket).unwrap_or(u32::MAX));
            }
        }
        None
    }

    /// The mean in nanoseconds; `None` when there are no values.
    pub fn mean_ns(&self) -> Option<u64> {
        self.sum_ns.checked_div(self.count())
    }
}
