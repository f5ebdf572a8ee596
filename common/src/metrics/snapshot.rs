//! All values at one time, as plain data.

use serde::{Deserialize, Serialize};

use super::{HistogramSnapshot, QueueMetrics, Series, Source};

/// Everything a daemon counted up to now; the body of `GET /json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The daemon's name.
    pub program: String,
    /// The daemon's version.
    pub version: String,
    /// Milliseconds since the daemon started.
    pub uptime_ms: u64,
    /// Its devices, in the order they were made.
    pub devices: Vec<DeviceSnapshot>,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSnapshot {
    /// The operator's name for it.
    pub name: String,
    /// What its queues counted.
    pub queues: Vec<QueueSnapshot>,
    /// The series of this kind of device.
    pub series: Vec<SeriesSnapshot>,
}

/// The values of a [`QueueMetrics`], under the same names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the fields are documented in QueueMetrics")]
pub struct QueueSnapshot {
    /// The index of the queue.
    pub queue: u16,
    pub kicks: u64,
    pub requests: u64,
    pub rejected: u64,
    pub retired: u64,
    pub signals: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

impl QueueSnapshot {
    pub(super) fn of(queue: u16, metrics: &QueueMetrics) -> Self {
        // Taken apart, so that a new counter cannot be forgotten here.
        let QueueMetrics { kicks, requests, rejected, retired, signals, bytes_read, bytes_written } =
            metrics;
        Self {
            queue,
            kicks: kicks.get(),
            requests: requests.get(),
            rejected: rejected.get(),
            retired: retired.get(),
            signals: signals.get(),
            bytes_read: bytes_read.get(),
            bytes_written: bytes_written.get(),
        }
    }

    /// Name, help and value of each counter, in one order for every queue.
    pub(super) fn counters(&self) -> [(&'static str, &'static str, u64); 7] {
        [
            ("queue_kicks_total", "Kicks received from the guest.", self.kicks),
            ("queue_requests_total", "Descriptor chains taken from the ring.", self.requests),
            ("queue_rejected_total", "Requests answered with an error status.", self.rejected),
            ("queue_retired_total", "Times the queue was retired for a broken ring.", self.retired),
            ("queue_signals_total", "Notifications sent to the guest.", self.signals),
            ("queue_read_bytes_total", "Payload bytes read from guest memory.", self.bytes_read),
            (
                "queue_written_bytes_total",
                "Payload bytes written to guest memory.",
                self.bytes_written,
            ),
        ]
    }
}

/// One named number of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeriesSnapshot {
    /// The name, without the project's prefix.
    pub name: String,
    /// One sentence with the unit.
    pub help: String,
    /// The queue it is of, if it is not of the whole device.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<u16>,
    /// What it stands at.
    pub value: Value,
}

impl SeriesSnapshot {
    pub(super) fn of(series: &Series) -> Self {
        Self {
            name: series.name.to_owned(),
            help: series.help.to_owned(),
            queue: series.queue,
            value: match &series.source {
                Source::Counter(counter) => Value::Counter(counter.get()),
                Source::Gauge(gauge) => Value::Gauge(gauge.get()),
                Source::Histogram(histogram) => Value::Histogram(histogram.snapshot()),
            },
        }
    }
}

/// The value of a series.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// A number that only grows.
    Counter(u64),
    /// A number that is set.
    Gauge(u64),
    /// Latencies.
    Histogram(HistogramSnapshot),
}

impl Value {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Counter(_) => Kind::Counter,
            Self::Gauge(_) => Kind::Gauge,
            Self::Histogram(_) => Kind::Histogram,
        }
    }
}

/// The kinds of series, under Prometheus' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `counter`
    Counter,
    /// `gauge`
    Gauge,
    /// `histogram`
    Histogram,
}
