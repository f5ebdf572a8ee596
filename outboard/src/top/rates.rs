//! From two looks at a daemon's counters to what happened between them. Pure.

use std::time::Duration;

use outboard_common::metrics::{HistogramSnapshot, Snapshot, Value};

/// Words in the names of counters that count what was lost or refused.
const LOSSES: [&str; 9] = [
    "dropped",
    "failed",
    "limited",
    "lost",
    "malformed",
    "refused",
    "spoofed",
    "unsegmented",
    "violations",
];
/// What counters of frames end with: a frame may fill many of a ring's chains, or a chain wait empty.
const FRAMES: &str = "_frames_total";

/// What a device does, per second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Rates {
    /// Bytes to the guest: what it reads or receives.
    pub(super) to_guest: f64,
    /// Bytes from the guest: what it writes or sends.
    pub(super) from_guest: f64,
    /// Requests; of a network card, frames both ways.
    pub(super) requests: f64,
    /// Half of the requests took at most this, in nanoseconds; `None`: not measured, or none came.
    pub(super) p50_ns: Option<u64>,
    /// The same for 99 of 100.
    pub(super) p99_ns: Option<u64>,
    /// Requests in progress.
    pub(super) depth: Option<f64>,
    /// Lost or refused, since the daemon started.
    pub(super) drops: u64,
}

/// Sums over all devices and queues of a daemon.
#[derive(Debug, Default)]
struct Totals {
    written: u64,
    read: u64,
    requests: u64,
    frames: Option<u64>,
    drops: u64,
    depth: Option<u64>,
    latency: Option<HistogramSnapshot>,
}

impl Totals {
    fn of(snapshot: &Snapshot) -> Self {
        let mut totals = Self::default();
        for device in &snapshot.devices {
            for queue in &device.queues {
                totals.written = totals.written.wrapping_add(queue.bytes_written);
                totals.read = totals.read.wrapping_add(queue.bytes_read);
                totals.requests = totals.requests.wrapping_add(queue.requests);
                totals.drops =
                    totals.drops.wrapping_add(queue.rejected).wrapping_add(queue.retired);
            }
            for series in &device.series {
                totals.add(&series.name, &series.value);
            }
        }
        totals
    }

    fn add(&mut self, name: &str, value: &Value) {
        match value {
            Value::Counter(count) if name.ends_with(FRAMES) => {
                self.frames = Some(self.frames.unwrap_or(0).wrapping_add(*count));
            }
            Value::Counter(count) if LOSSES.iter().any(|word| name.contains(word)) => {
                self.drops = self.drops.wrapping_add(*count);
            }
            Value::Gauge(value) if name.contains("in_flight") || name.contains("depth") => {
                self.depth = Some(self.depth.unwrap_or(0).wrapping_add(*value));
            }
            Value::Histogram(latencies) => match &mut self.latency {
                None => self.latency = Some(latencies.clone()),
                Some(sum) => {
                    sum.sum_ns = sum.sum_ns.wrapping_add(latencies.sum_ns);
                    for (bucket, more) in sum.buckets.iter_mut().zip(&latencies.buckets) {
                        *bucket = bucket.wrapping_add(*more);
                    }
                }
            },
            Value::Counter(_) | Value::Gauge(_) => {}
        }
    }
}

impl Totals {
    fn work(&self) -> u64 {
        self.frames.unwrap_or(self.requests)
    }
}

impl Rates {
    /// What happened in the `time` between two looks. A daemon that was restarted between them has
    /// counted from zero.
    pub(super) fn between(before: &Snapshot, after: &Snapshot, time: Duration) -> Self {
        let restarted = after.uptime_ms < before.uptime_ms;
        let then = if restarted { Totals::default() } else { Totals::of(before) };
        let now = Totals::of(after);
        let seconds = time.as_secs_f64().max(f64::MIN_POSITIVE);
        let rate = |now: u64, then: u64| count(now.saturating_sub(then)) / seconds;
        let latency = now.latency.as_ref().map(|latency| match &then.latency {
            Some(earlier) => latency.since(earlier),
            None => latency.clone(),
        });
        let percentile = |percent| latency.as_ref().and_then(|l| l.percentile_ns(percent));
        // Little's law: what is in progress is the time spent in progress, per time. Where only some
        // requests are timed, or those count that take long, the gauge says more.
        let from_latency = latency.as_ref().map(|l| count(l.sum_ns) / 1e9 / seconds);
        Self {
            to_guest: rate(now.written, then.written),
            from_guest: rate(now.read, then.read),
            requests: rate(now.work(), then.work()),
            p50_ns: percentile(50),
            p99_ns: percentile(99),
            depth: greater(now.depth.map(count), from_latency),
            drops: now.drops,
        }
    }
}

/// The greater one of those that there are.
fn greater(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.max(b)),
        (one, other) => one.or(other),
    }
}

/// A count for arithmetic; those above 2^53 are rounded, which nobody sees in a rate.
#[allow(clippy::cast_precision_loss, reason = "rounded for a person to read")]
fn count(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use outboard_common::metrics::Registry;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn rates_are_the_difference_over_the_time() {
        let registry = Registry::new("test");
        let device = registry.device("d");
        let (queue, latency) = (device.queue(0), device.latency("blk_seconds", "help", None));
        let lost = device.counter("net_rx_dropped_total", "help", None);
        queue.requests.add(5);
        queue.bytes_written.add(500);
        latency.record(9_000_000);
        let before = registry.snapshot();
        queue.requests.add(10);
        queue.bytes_written.add(4096);
        queue.bytes_read.add(100);
        queue.rejected.add(1);
        lost.add(3);
        for _ in 0..10 {
            latency.record(100_000_000);
        }
        let rates = Rates::between(&before, &registry.snapshot(), 2 * SECOND);
        assert_eq!((rates.to_guest, rates.from_guest, rates.requests), (2048.0, 50.0, 5.0));
        assert_eq!(rates.drops, 4);
        assert_eq!(rates.p50_ns, Some(1 << 27), "the one before is not counted");
        assert_eq!(rates.depth, Some(0.5), "ten of 100 ms in two seconds");
    }

    #[test]
    fn a_network_cards_requests_are_its_frames() {
        let registry = Registry::new("test");
        let device = registry.device("d");
        let received = device.counter("net_rx_frames_total", "help", Some(0));
        let sent = device.counter("net_tx_frames_total", "help", Some(1));
        let before = registry.snapshot();
        // A driver that gave 256 empty buffers at once, and got three frames in four of them.
        device.queue(0).requests.add(256);
        received.add(3);
        sent.add(2);
        device.counter("net_rx_unsegmented_total", "help", Some(0)).add(1);
        let rates = Rates::between(&before, &registry.snapshot(), SECOND);
        assert_eq!((rates.requests, rates.drops), (5.0, 1));
    }

    #[test]
    fn a_restarted_daemon_counts_from_zero() {
        let old = Registry::new("test");
        old.device("d").queue(0).requests.add(1000);
        let mut before = old.snapshot();
        before.uptime_ms = 5000;
        let new = Registry::new("test");
        new.device("d").queue(0).requests.add(7);
        let rates = Rates::between(&before, &new.snapshot(), SECOND);
        assert_eq!(rates.requests, 7.0);
    }

    #[test]
    fn without_a_gauge_or_latencies_nothing_is_claimed() {
        let registry = Registry::new("test");
        registry.device("d").queue(0).requests.add(1);
        let rates = Rates::between(&registry.snapshot(), &registry.snapshot(), Duration::ZERO);
        assert_eq!((rates.p50_ns, rates.p99_ns, rates.depth), (None, None, None));
        assert!(rates.requests.is_finite());
        registry.device("d").gauge("blk_in_flight", "help", None).set(4);
        let rates = Rates::between(&registry.snapshot(), &registry.snapshot(), SECOND);
        assert_eq!(rates.depth, Some(4.0));
    }
}
