//! Counters of every queue and device, and the registry they are read from.
//!
//! # Theory of operation
//! A counter has one writer, the thread that owns the queue, and any number of readers. So an
//! increment is a relaxed load, an add and a relaxed store: two plain `mov`s on the processors we
//! run on, never a locked read-modify-write. A reader sees some recent value; values of different
//! counters are not a consistent snapshot.
//!
//! The [`Registry`] holds a reference to everything that is counted, by device. Nothing is formatted
//! or copied until somebody asks for a [`Snapshot`], which is plain data: it becomes Prometheus text
//! ([`Snapshot::write_prometheus`]) or JSON (it is `Serialize`, and `Deserialize` for `outboard
//! top`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

mod histogram;
mod prometheus;
mod snapshot;

pub use histogram::{BUCKETS, Histogram, HistogramSnapshot};
pub use snapshot::{DeviceSnapshot, Kind, QueueSnapshot, SeriesSnapshot, Snapshot, Value};

/// A number that only grows (modulo 2^64). One thread adds, any thread reads.
///
/// Adding from two threads at once is not unsafe, but loses additions.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter that stands at 0.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `n`. Only the owning thread may call this.
    #[inline]
    pub fn add(&self, n: u64) {
        let value = self.0.load(Ordering::Relaxed);
        self.0.store(value.wrapping_add(n), Ordering::Relaxed);
    }

    /// The value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that is set: a depth, a state, a capacity. Any thread sets, any thread reads.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    /// A gauge that stands at 0.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Sets the value.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What every virtqueue counts, whatever its device does.
#[derive(Debug, Default)]
pub struct QueueMetrics {
    /// Kicks received from the guest (events read, not buffers made available).
    pub kicks: Counter,
    /// Descriptor chains taken from the available ring.
    pub requests: Counter,
    /// Requests answered with an error status because the guest sent nonsense.
    pub rejected: Counter,
    /// Times the queue was taken out of service because its ring was broken (0 or 1 per start).
    pub retired: Counter,
    /// Used-buffer notifications sent to the guest.
    pub signals: Counter,
    /// Payload bytes the device read from guest memory.
    pub bytes_read: Counter,
    /// Payload bytes the device wrote to guest memory.
    pub bytes_written: Counter,
}

/// Everything a daemon counts. Made once in `main` and shared.
#[derive(Debug)]
pub struct Registry {
    program: &'static str,
    started: Instant,
    devices: Mutex<Vec<Arc<DeviceMetrics>>>,
}

impl Registry {
    /// An empty registry of the program with this name.
    pub fn new(program: &'static str) -> Self {
        Self { program, started: Instant::now(), devices: Mutex::default() }
    }

    /// The metrics of the device with this name; made at the first call.
    ///
    /// The name is the operator's (an image's name, a CID, an interface) and tells devices of one
    /// process apart.
    pub fn device(&self, name: &str) -> Arc<DeviceMetrics> {
        let mut devices = lock(&self.devices);
        if let Some(device) = devices.iter().find(|device| device.name == name) {
            return Arc::clone(device);
        }
        let device = Arc::new(DeviceMetrics { name: name.to_owned(), state: Mutex::default() });
        devices.push(Arc::clone(&device));
        device
    }

    /// Forgets a device that is gone. Nothing happens when there is none of this name.
    pub fn remove_device(&self, name: &str) {
        lock(&self.devices).retain(|device| device.name != name);
    }

    /// Reads every value.
    pub fn snapshot(&self) -> Snapshot {
        let devices = lock(&self.devices).iter().map(|device| device.snapshot()).collect();
        Snapshot {
            program: self.program.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            devices,
        }
    }
}

/// The metrics of one device.
#[derive(Debug)]
pub struct DeviceMetrics {
    name: String,
    state: Mutex<DeviceState>,
}

#[derive(Debug, Default)]
struct DeviceState {
    queues: Vec<(u16, Arc<QueueMetrics>)>,
    series: Vec<Series>,
}

/// One named number of a device.
#[derive(Debug)]
struct Series {
    name: &'static str,
    help: &'static str,
    queue: Option<u16>,
    source: Source,
}

#[derive(Debug, Clone)]
enum Source {
    Counter(Arc<Counter>),
    Gauge(Arc<Gauge>),
    Histogram(Arc<Histogram>),
}

impl DeviceMetrics {
    /// The name the device was registered with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The counters of the queue with this index; made at the first call.
    ///
    /// The same counters go on when the queue is stopped and started again.
    pub fn queue(&self, index: u16) -> Arc<QueueMetrics> {
        let mut state = lock(&self.state);
        if let Some((_, queue)) = state.queues.iter().find(|(known, _)| *known == index) {
            return Arc::clone(queue);
        }
        let queue = Arc::new(QueueMetrics::default());
        state.queues.push((index, Arc::clone(&queue)));
        queue
    }

    /// A counter of the device's own, or of its queue `queue`; made at the first call.
    ///
    /// `name` is `snake_case`, without the project's prefix, and ends in `_total`. `help` is one
    /// sentence with the unit.
    pub fn counter(
        &self,
        name: &'static str,
        help: &'static str,
        queue: Option<u16>,
    ) -> Arc<Counter> {
        let new = || Source::Counter(Arc::default());
        match self.series(name, help, queue, new) {
            Source::Counter(counter) => counter,
            other => unreachable_kind(name, &other),
        }
    }

    /// A gauge of the device's own, or of its queue `queue`; made at the first call.
    pub fn gauge(&self, name: &'static str, help: &'static str, queue: Option<u16>) -> Arc<Gauge> {
        let new = || Source::Gauge(Arc::default());
        match self.series(name, help, queue, new) {
            Source::Gauge(gauge) => gauge,
            other => unreachable_kind(name, &other),
        }
    }

    /// A histogram of latencies in nanoseconds; made at the first call.
    ///
    /// `name` ends in `_seconds`, the unit of Prometheus, in which it is exported.
    pub fn latency(
        &self,
        name: &'static str,
        help: &'static str,
        queue: Option<u16>,
    ) -> Arc<Histogram> {
        let new = || Source::Histogram(Arc::default());
        match self.series(name, help, queue, new) {
            Source::Histogram(histogram) => histogram,
            other => unreachable_kind(name, &other),
        }
    }

    fn series(
        &self,
        name: &'static str,
        help: &'static str,
        queue: Option<u16>,
        new: impl FnOnce() -> Source,
    ) -> Source {
        let mut state = lock(&self.state);
        let known = state.series.iter().find(|known| known.name == name && known.queue == queue);
        if let Some(known) = known {
            return known.source.clone();
        }
        let source = new();
        state.series.push(Series { name, help, queue, source: source.clone() });
        source
    }

    fn snapshot(&self) -> DeviceSnapshot {
        let state = lock(&self.state);
        DeviceSnapshot {
            name: self.name.clone(),
            queues: state.queues.iter().map(|(index, q)| QueueSnapshot::of(*index, q)).collect(),
            series: state.series.iter().map(SeriesSnapshot::of).collect(),
        }
    }
}

/// Two uses of one name for different kinds of series are a bug of the device.
fn unreachable_kind(name: &str, found: &Source) -> ! {
    unreachable!("the series {name} is registered already, as {found:?}")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The lists only grow or shrink by whole entries, so a panicking holder harms nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
