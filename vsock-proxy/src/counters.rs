//! What the proxy counts beside the queues' own counters.

use std::sync::Arc;
use std::time::Instant;

use outboard_common::metrics::{Counter, DeviceMetrics, Gauge, Histogram};

/// One VM's counters; its worker writes them.
#[derive(Debug, Clone)]
pub struct Counters {
    /// Connections that were asked for by either side.
    pub(crate) opened: Arc<Counter>,
    /// Of these, refused by the operator's rules, by nobody listening, or for want of room.
    pub(crate) refused: Arc<Counter>,
    /// RSTs to packets of no connection, and those that were lost since the guest took none.
    pub(crate) strays: Arc<Counter>,
    pub(crate) strays_lost: Arc<Counter>,
    /// Connections that a guest lost by breaking the protocol.
    pub(crate) violations: Arc<Counter>,
    /// Connections ended since somebody did not answer.
    pub(crate) timeouts: Arc<Counter>,
    open: Arc<Gauge>,
    connect: Arc<Histogram>,
}

impl Counters {
    /// The counters of `device`, made on first use.
    #[must_use]
    pub fn of(device: &DeviceMetrics) -> Self {
        let counter = |name, help| device.counter(name, help, None);
        Self {
            opened: counter("vsock_connections_total", "Connections asked for by either side"),
            refused: counter("vsock_refused_total", "Connections that were refused on the host"),
            strays: counter("vsock_strays_total", "Packets of no connection, answered by an RST"),
            strays_lost: counter("vsock_strays_lost_total", "Such packets left without an RST"),
            violations: counter("vsock_violations_total", "Connections ended for what a guest did"),
            timeouts: counter("vsock_timeouts_total", "Connections ended for want of an answer"),
            open: device.gauge("vsock_connections", "Connections that exist", None),
            connect: device.latency(
                "vsock_connect_seconds",
                "Time from asking for a connection to its being there, either way",
                None,
            ),
        }
    }

    /// `change` connections more exist.
    pub(crate) fn open(&self, change: i64) {
        self.open.set(self.open.get().saturating_add_signed(change));
    }

    /// A connection that was asked for at `begun` is there.
    pub(crate) fn connected(&self, begun: Instant) {
        let time = begun.elapsed().as_nanos();
        self.connect.record(u64::try_from(time).unwrap_or(u64::MAX));
    }
}
