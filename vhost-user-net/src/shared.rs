//! What a device's session thread, its workers and its operator share.
//!
//! Everything here is changed rarely. Workers look at one atomic number per batch and take copies
//! when it moved.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outboard_common::metrics::{Counter, DeviceMetrics, Histogram};
use outboard_common::rate_limiter::RateLimiter;
use outboard_common::vhost_user::backend_channel::BackendChannel;
use outboard_common::warn_limited;
use virtio_bindings::virtio_net as v;

use crate::backend::Backend;
use crate::capture::Capture;
use crate::config::{NetConfig, S_ANNOUNCE, S_LINK_UP};
use crate::control::{Coalescing, GUEST_OFFLOADS, MacAddr, RxFilter};
use crate::filter::SourceFilter;
use crate::rss::SteeringConfig;
use crate::state::{ControlState, SavedState};

/// What one queue pair counts beyond the engine's counters.
#[derive(Debug, Clone, Default)]
pub struct PairMetrics {
    /// Frames dropped because their header or length lies.
    pub tx_malformed: Arc<Counter>,
    /// Frames dropped because their source is not the guest's.
    pub tx_spoofed: Arc<Counter>,
    /// Frames that the back end refused, or had no room for.
    pub tx_failed: Arc<Counter>,
    /// Frames sent.
    pub tx_frames: Arc<Counter>,
    /// How long frames take from the driver's ring to the back end.
    pub tx_latency: Arc<Histogram>,
    /// Frames received.
    pub rx_frames: Arc<Counter>,
    /// Received frames that the driver does not want.
    pub rx_filtered: Arc<Counter>,
    /// Received frames that no buffers of the guest can hold.
    pub rx_dropped: Arc<Counter>,
    /// Frames of a switch dropped because the driver takes no such super-frames.
    pub rx_unsegmented: Arc<Counter>,
    /// Frames of a switch dropped because the receiver's limits are reached.
    pub rx_limited: Arc<Counter>,
}

impl PairMetrics {
    /// The counters of queue pair `pair`, in a registry's `device`.
    #[must_use]
    pub fn new(device: &DeviceMetrics, pair: u16) -> Self {
        let (rx, tx) = (Some(pair.saturating_mul(2)), Some(pair.saturating_mul(2) + 1));
        let c = |name, help, queue| device.counter(name, help, queue);
        Self {
            tx_malformed: c("net_tx_malformed_total", "Frames dropped for a lying header.", tx),
            tx_spoofed: c("net_tx_spoofed_total", "Frames dropped for a forged source.", tx),
            tx_failed: c("net_tx_failed_total", "Frames that the back end did not take.", tx),
            tx_frames: c("net_tx_frames_total", "Frames sent.", tx),
            tx_latency: device.latency(
                "net_tx_seconds",
                "Time from taking a batch of frames to its end in the back end.",
                tx,
            ),
            rx_frames: c("net_rx_frames_total", "Frames received.", rx),
            rx_filtered: c("net_rx_filtered_total", "Frames the driver did not want.", rx),
            rx_dropped: c("net_rx_dropped_total", "Frames that fitted no guest buffers.", rx),
            rx_unsegmented: c(
                "net_rx_unsegmented_total",
                "Super-frames that the driver does not take and that could not be cut up.",
                rx,
            ),
            rx_limited: c("net_rx_limited_total", "Switched frames over the limits.", rx),
        }
    }
}

/// A direction, as the driver sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Frames received.
    Rx = 0,
    /// Frames sent.
    Tx = 1,
}

/// The state shared by everything that serves one device.
#[derive(Debug)]
pub struct Shared {
    /// The device's name in logs.
    pub name: String,
    /// Where frames go to and come from.
    pub backend: Arc<dyn Backend>,
    /// Which sources the guest may send from.
    pub source: SourceFilter,
    /// Limits, by direction: `Read` is towards the guest.
    pub limiter: RateLimiter,
    /// Where frames are recorded.
    pub capture: Option<Capture>,
    /// Counters, by queue pair.
    pub metrics: Vec<PairMetrics>,
    /// Write frames with plain system calls.
    pub plain_io: bool,
    features: AtomicU64,
    /// `max_virtqueue_pairs`.
    max_pairs: u16,
    /// Which pairs are in use. Locked only when that changes.
    pairs: Mutex<Pairs>,
    /// Whether the control queue is served here, and not by the VMM.
    has_control: AtomicBool,
    config: Mutex<NetConfig>,
    /// The operator's end of the cable is plugged in.
    plugged: AtomicBool,
    /// There is a network at its other end.
    network: AtomicBool,
    channel: Mutex<Option<Arc<BackendChannel>>>,
    rx_filter: Mutex<Arc<RxFilter>>,
    /// Where the driver wants received frames, if it said so.
    steering: Mutex<Option<SteeringConfig>>,
    generation: AtomicU32,
    /// Guest offloads in force.
    offloads: AtomicU64,
    /// When to signal, received and sent frames: packets in the upper half, microseconds in the lower.
    coalescing: [AtomicU64; 2],
    /// What the control queue had set before it moved here; for when it starts.
    moved: Mutex<Option<ControlState>>,
    /// What it had set when it stopped; for a successor.
    stopped: Mutex<Option<ControlState>>,
}

/// Queue pairs, each in use when the driver wants it and its ring is there.
#[derive(Debug)]
struct Pairs {
    /// How many the driver uses, by CTRL_MQ.
    wanted: u16,
    /// A bit for each whose receive ring runs; there are 64 pairs at the most.
    started: u64,
}

impl Pairs {
    fn uses(&self, pair: u16) -> bool {
        pair < self.wanted
            && self.started.checked_shr(pair.into()).is_some_and(|bits| bits & 1 != 0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is complete at each step, so a panicking holder harms nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What [`Shared::new`] is made from.
#[derive(Debug)]
pub struct SharedParts {
    /// The device's name in logs.
    pub name: String,
    /// Where frames go to and come from.
    pub backend: Arc<dyn Backend>,
    /// Which sources the guest may send from.
    pub source: SourceFilter,
    /// Limits.
    pub limiter: RateLimiter,
    /// Where frames are recorded.
    pub capture: Option<Capture>,
    /// Counters, by queue pair.
    pub metrics: Vec<PairMetrics>,
    /// Write frames with plain system calls.
    pub plain_io: bool,
    /// Configuration space.
    pub config: NetConfig,
}

impl Shared {
    /// The state of a device that no guest uses yet.
    #[must_use]
    pub fn new(parts: SharedParts) -> Self {
        let max_pairs = parts.backend.pairs();
        Self {
            name: parts.name,
            backend: parts.backend,
            source: parts.source,
            limiter: parts.limiter,
            capture: parts.capture,
            metrics: parts.metrics,
            plain_io: parts.plain_io,
            features: AtomicU64::new(0),
            max_pairs,
            pairs: Mutex::new(Pairs { wanted: max_pairs, started: 0 }),
            has_control: AtomicBool::new(false),
            config: Mutex::new(parts.config),
            plugged: AtomicBool::new(true),
            network: AtomicBool::new(true),
            channel: Mutex::default(),
            rx_filter: Mutex::new(Arc::new(RxFilter::everything())),
            steering: Mutex::default(),
            generation: AtomicU32::new(0),
            offloads: AtomicU64::new(0),
            coalescing: Default::default(),
            moved: Mutex::default(),
            stopped: Mutex::default(),
        }
    }

    /// The negotiated features.
    pub fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    /// Whether feature `bit` was negotiated.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features() & (1 << bit) != 0
    }

    /// `max_virtqueue_pairs`.
    pub fn max_pairs(&self) -> u16 {
        self.max_pairs
    }

    /// Whether received frames are steered here, so that the driver may say how: on a switch whose ports have
    /// several queue pairs.
    pub fn steers(&self) -> bool {
        self.max_pairs > 1 && self.backend.switch_port().is_some()
    }

    /// The driver's choice of features: takes effect on the back end too.
    pub fn negotiated(&self, features: u64) {
        self.features.store(features, Ordering::Release);
        let header = crate::header::header_size(features);
        if let Err(error) = self.backend.set_header_size(header) {
            warn_limited!(device = %self.name, header, %error, "the back end cannot use this header");
        }
        self.set_guest_offloads(features & GUEST_OFFLOADS);
    }

    /// Tells the back end which offloads the guest takes; false if it refuses.
    pub fn set_guest_offloads(&self, offloads: u64) -> bool {
        self.offloads.store(offloads, Ordering::Relaxed);
        let result = self.backend.set_guest_offloads(offloads);
        if let Err(error) = &result {
            warn_limited!(device = %self.name, offloads, %error, "the back end refuses these offloads");
        }
        result.is_ok()
    }

    /// The offloads that the guest takes at present.
    pub fn guest_offloads(&self) -> u64 {
        self.offloads.load(Ordering::Relaxed)
    }

    /// Which queue is the control queue. Virtio 1.3, 5.1.2.
    pub fn control_queue(&self) -> Option<u16> {
        if !self.has_feature(v::VIRTIO_NET_F_CTRL_VQ) {
            return None;
        }
        Some(if self.has_pairs() { self.max_pairs.saturating_mul(2) } else { 2 })
    }

    /// Whether the driver knows of more than one queue pair.
    fn has_pairs(&self) -> bool {
        self.has_feature(v::VIRTIO_NET_F_MQ) || self.has_feature(v::VIRTIO_NET_F_RSS)
    }

    /// The control queue is served here (or no more).
    pub fn set_control(&self, here: bool) {
        let before = self.control_state();
        *lock(&self.stopped) = before.filter(|_| !here);
        self.has_control.store(here, Ordering::Release);
        let moved = lock(&self.moved).take().filter(|_| here);
        if let Some(moved) = moved {
            self.set_rx_filter(moved.filter);
            self.set_guest_offloads(moved.offloads & self.features());
            self.set_pairs(moved.pairs.clamp(1, self.max_pairs));
            self.set_coalescing(Flow::Rx, moved.coalescing[0]);
            self.set_coalescing(Flow::Tx, moved.coalescing[1]);
            self.set_steering(moved.steering.filter(|s| s.is_sound(self.max_pairs)));
        } else if here {
            let mut mac = [0; 6];
            lock(&self.config).read(0, &mut mac);
            let mac = Some(MacAddr(mac)).filter(|m| m.is_station());
            self.set_rx_filter(RxFilter::for_station(mac, self.features()));
            if self.has_pairs() {
                self.set_pairs(1);
            }
        } else {
            self.set_rx_filter(RxFilter::everything());
            self.set_pairs(self.max_pairs);
            self.set_coalescing(Flow::Rx, Coalescing::default());
            self.set_coalescing(Flow::Tx, Coalescing::default());
            self.set_steering(None);
        }
    }

    /// Hashes and steers received frames as the driver wishes, or as the back end likes.
    pub fn set_steering(&self, steering: Option<SteeringConfig>) {
        let mut place = lock(&self.steering);
        self.backend.set_steering(steering.as_ref());
        *place = steering;
    }

    /// Steers received frames as the back end likes; what is hashed stays.
    pub fn steer_automatically(&self) {
        let now = lock(&self.steering).clone();
        if let Some(SteeringConfig { hash, table: Some(_) }) = now {
            self.set_steering(Some(SteeringConfig { hash, table: None }));
        }
    }

    /// Takes `pairs` queue pairs into use, as far as their rings are there, and the others out of it.
    pub fn set_pairs(&self, pairs: u16) {
        let mut state = lock(&self.pairs);
        state.wanted = pairs;
        for pair in 0..self.max_pairs {
            self.backend.set_pair_running(pair, state.uses(pair));
        }
        self.backend.set_pairs(pairs);
    }

    /// The receive ring of `pair` was started or stopped.
    pub fn set_pair_started(&self, pair: u16, started: bool) {
        let mut state = lock(&self.pairs);
        let bit = 1u64.checked_shl(pair.into()).unwrap_or(0);
        state.started = if started { state.started | bit } else { state.started & !bit };
        self.backend.set_pair_running(pair, state.uses(pair));
    }

    /// Sets when the driver is told of received or of sent frames.
    pub fn set_coalescing(&self, flow: Flow, wish: Coalescing) {
        let word = u64::from(wish.max_packets) << 32 | u64::from(wish.max_usecs);
        self.coalescing[flow as usize].store(word, Ordering::Relaxed);
    }

    /// When the driver is to be told.
    #[inline]
    pub fn coalescing(&self, flow: Flow) -> Coalescing {
        let word = self.coalescing[flow as usize].load(Ordering::Relaxed);
        let [a, b, c, d, e, f, g, h] = word.to_be_bytes();
        Coalescing {
            max_packets: u32::from_be_bytes([a, b, c, d]),
            max_usecs: u32::from_be_bytes([e, f, g, h]),
        }
    }

    /// The driver's receive filter, for change.
    pub fn driver_filter(&self) -> Arc<RxFilter> {
        lock(&self.rx_filter).clone()
    }

    /// The receive filter in force. Not every back end has an end of the cable that can be pulled, so what
    /// still comes out of an unplugged one goes no further.
    pub fn rx_filter(&self) -> Arc<RxFilter> {
        if self.is_plugged() { self.driver_filter() } else { Arc::new(RxFilter::nothing()) }
    }

    /// Puts another receive filter in force.
    pub fn set_rx_filter(&self, filter: RxFilter) {
        *lock(&self.rx_filter) = Arc::new(filter);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Changes with everything that workers keep a copy of.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Reads configuration space.
    pub fn read_config(&self, offset: u32, out: &mut [u8]) {
        lock(&self.config).read(offset, out);
    }

    /// Changes configuration space; tells the driver when `change` says true.
    pub fn change_config(&self, change: impl FnOnce(&mut NetConfig) -> bool) {
        let changed = change(&mut lock(&self.config));
        if !changed {
            return;
        }
        let channel = lock(&self.channel).clone();
        let Some(channel) = channel else { return };
        if let Err(error) = channel.config_changed() {
            tracing::debug!(device = %self.name, %error, "the front end does not hear of the change");
        }
    }

    /// Plugs or unplugs the cable. It stays so, whatever becomes of the network behind it.
    pub fn set_plugged(&self, plugged: bool) {
        self.plugged.store(plugged, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
        self.change_config(|config| self.set_link(config));
    }

    /// Whether the operator has the cable plugged in.
    #[inline]
    pub fn is_plugged(&self) -> bool {
        self.plugged.load(Ordering::Relaxed)
    }

    /// Whether there is a network behind the cable.
    pub fn has_network(&self) -> bool {
        self.network.load(Ordering::Relaxed)
    }

    /// The network behind the cable came or went; true if that is news.
    pub fn set_network(&self, there: bool) -> bool {
        let before = self.network.swap(there, Ordering::Relaxed);
        self.change_config(|config| self.set_link(config));
        before != there
    }

    /// Puts the state of the link in configuration space; true if that changed it. Both its causes are read
    /// with `config` locked, so that whoever changes one of them last sees the other.
    fn set_link(&self, config: &mut NetConfig) -> bool {
        let up = self.is_plugged() && self.has_network();
        config.set_status(S_LINK_UP, up)
    }

    /// The channel to the front end came or went.
    pub fn set_channel(&self, channel: Option<Arc<BackendChannel>>) {
        *lock(&self.channel) = channel;
    }

    /// What a successor needs to know.
    pub fn save(&self) -> SavedState {
        let config = lock(&self.config);
        let mut mac = [0; 6];
        config.read(0, &mut mac);
        let control = self.control_state().or_else(|| lock(&self.stopped).clone());
        let plugged = Some(self.is_plugged());
        SavedState { mac, mtu: config.mtu(), status: config.status(), plugged, control }
    }

    /// What the control queue's commands set, where it is served here.
    fn control_state(&self) -> Option<ControlState> {
        self.has_control.load(Ordering::Acquire).then(|| ControlState {
            pairs: lock(&self.pairs).wanted,
            offloads: self.offloads.load(Ordering::Relaxed),
            filter: (*self.driver_filter()).clone(),
            coalescing: [self.coalescing(Flow::Rx), self.coalescing(Flow::Tx)],
            steering: lock(&self.steering).clone(),
        })
    }

    /// Goes on where the device that wrote `state` was.
    pub fn load(&self, state: SavedState) {
        let was_up = state.status & S_LINK_UP != 0;
        self.plugged.store(state.plugged.unwrap_or(was_up), Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
        self.change_config(|config| {
            config.set_mac(MacAddr(state.mac));
            config.set_mtu(state.mtu);
            config.set_status(u16::MAX, false);
            config.set_status(state.status & (S_LINK_UP | S_ANNOUNCE), true);
            // The network here may be there while the one before was not.
            self.set_link(config)
        });
        *lock(&self.moved) = state.control;
    }

    /// The guest is gone.
    pub fn reset(&self) {
        self.features.store(0, Ordering::Release);
        self.set_control(false);
        *lock(&self.stopped) = None;
        *lock(&self.moved) = None;
        self.change_config(|config| {
            config.set_status(S_ANNOUNCE, false);
            false
        });
        for pair in 0..self.max_pairs {
            self.set_pair_started(pair, false);
        }
        self.backend.forget_guest();
    }
}
