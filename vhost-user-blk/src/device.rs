//! The blk device: what it offers, and what the session and the workers share of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use outboard_common::device::{ConfigError, Device, RING_FEATURES, WorkerBody};
use outboard_common::metrics::DeviceMetrics;
use outboard_common::rate_limiter::{Limits, RateLimiter};
use outboard_common::vhost_user::backend_channel::BackendChannel;
use outboard_common::warn_limited;
use outboard_common::worker::UringLoop;
use virtio_bindings::virtio_blk as spec;

use crate::config_space::{self, ConfigSpace, Disk};
use crate::request::ID_LEN;
use crate::resize::Audience;
use crate::store::{Route, Store};
use crate::worker::BlkWorker;

/// Queues a device can have.
pub const MAX_QUEUES: u16 = 64;
/// Entries a queue can have.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What an operator decides about a device.
#[derive(Debug, Clone)]
pub struct DeviceOptions {
    /// For logs, threads and metrics.
    pub name: String,
    /// What GET_ID answers.
    pub serial: [u8; ID_LEN],
    /// Refuse writes.
    pub read_only: bool,
    /// Queues offered.
    pub num_queues: u16,
    /// Entries of a queue at the most.
    pub queue_size: u16,
    /// Start with the write cache on.
    pub write_cache: bool,
    /// Offer DISCARD and let WRITE_ZEROES unmap.
    pub discard: bool,
    /// Rate limits.
    pub limits: Limits,
    /// Have the kernel hold guest memory ready for the ring.
    pub register_memory: bool,
}

/// What the workers of a device see of it. Written rarely, so the loads cost nothing.
#[derive(Debug)]
pub struct Shared {
    name: String,
    serial: [u8; ID_LEN],
    read_only: bool,
    capacity_sectors: AtomicU64,
    write_through: AtomicBool,
    errors: AtomicU64,
}

impl Shared {
    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// GET_ID's answer.
    #[must_use]
    pub fn serial(&self) -> [u8; ID_LEN] {
        self.serial
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The disk's size in sectors.
    #[inline]
    #[must_use]
    pub fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors.load(Ordering::Relaxed)
    }

    /// Whether a write has to be durable before it is acknowledged.
    #[inline]
    #[must_use]
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// Counts a request that the image failed.
    pub fn count_error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests that the image failed so far.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// What a session changes.
#[derive(Debug)]
struct State {
    /// Negotiated features.
    features: u64,
    /// The `writeback` field.
    writeback: bool,
    channel: Option<Arc<BackendChannel>>,
}

/// One disk behind one vhost-user socket.
#[derive(Debug)]
pub struct BlkDevice {
    options: DeviceOptions,
    store: Store,
    shared: Arc<Shared>,
    limiter: Arc<RateLimiter>,
    state: Mutex<State>,
    audience: Arc<Audience>,
    metrics: Arc<DeviceMetrics>,
    workers: usize,
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

impl BlkDevice {
    /// A device that serves `store`; it joins `audience` while its front end can be told of a new
    /// size, and shows in `metrics` how its requests fare.
    ///
    /// # Errors
    /// The store's size cannot be told.
    pub fn new(
        options: DeviceOptions,
        store: Store,
        audience: Arc<Audience>,
        metrics: Arc<DeviceMetrics>,
    ) -> anyhow::Result<Self> {
        let sectors = store.sectors().context("cannot tell the image's size")?;
        let shared = Shared {
            name: options.name.clone(),
            serial: options.serial,
            read_only: options.read_only,
            capacity_sectors: AtomicU64::new(sectors),
            write_through: AtomicBool::new(!options.write_cache),
            errors: AtomicU64::new(0),
        };
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let limiter = RateLimiter::new(options.limits, std::time::Instant::now());
        let writeback = options.write_cache;
        Ok(Self {
            workers: cpus.min(usize::from(options.num_queues)).max(1),
            state: Mutex::new(State { features: 0, writeback, channel: None }),
            options,
            store,
            shared: Arc::new(shared),
            limiter: Arc::new(limiter),
            audience,
            metrics,
        })
    }

    /// The limiter, to be changed while the device runs.
    #[must_use]
    pub fn limiter(&self) -> &Arc<RateLimiter> {
        &self.limiter
    }

    /// What the workers share.
    #[must_use]
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Each change of the state is complete at once: a panicking holder harms nothing.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks at the image's size. When it changed, the new one counts from now on and the front end
    /// is told. Returns the size in sectors.
    ///
    /// # Errors
    /// The size cannot be told; the old one stays.
    pub fn check_size(&self) -> std::io::Result<u64> {
        let sectors = self.store.sectors()?;
        let before = self.shared.capacity_sectors.swap(sectors, Ordering::Relaxed);
        if before == sectors {
            return Ok(sectors);
        }
        tracing::info!(
            device = self.options.name,
            before,
            now = sectors,
            "the disk's size in sectors changed"
        );
        let channel = self.state().channel.clone();
        if let Some(channel) = channel
            && let Err(error) = channel.config_changed()
        {
            warn_limited!(device = self.options.name, %error, "the front end cannot be told of the new size");
        }
        Ok(sectors)
    }

    /// Decides anew whether writes go through.
    fn update_write_mode(&self, state: &State) {
        let has = |f: u32| state.features & bit(f) != 0;
        let cached = if has(spec::VIRTIO_BLK_F_CONFIG_WCE) {
            state.writeback
        } else {
            self.options.write_cache
        };
        // Without FLUSH a driver has no way to ask for durability. Virtio 1.3, 5.2.5.
        let through = !(has(spec::VIRTIO_BLK_F_FLUSH) && cached);
        let before = self.shared.write_through.swap(through, Ordering::Relaxed);
        if through && !before {
            // What was acknowledged as cached has to be durable when the driver relies on it.
            self.flush();
        }
    }

    fn flush(&self) {
        if self.options.read_only {
            return;
        }
        if let Err(error) = self.store.image.flush() {
            warn_limited!(device = self.options.name, %error, "the image cannot be flushed");
        }
    }
}

impl Device for BlkDevice {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn queue_count(&self) -> u16 {
        self.options.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.options.queue_size
    }

    fn features(&self) -> u64 {
        let mut features = RING_FEATURES
            | bit(spec::VIRTIO_BLK_F_SIZE_MAX)
            | bit(spec::VIRTIO_BLK_F_SEG_MAX)
            | bit(spec::VIRTIO_BLK_F_BLK_SIZE)
            | bit(spec::VIRTIO_BLK_F_TOPOLOGY)
            | bit(spec::VIRTIO_BLK_F_FLUSH)
            | bit(spec::VIRTIO_BLK_F_CONFIG_WCE);
        if self.options.num_queues > 1 {
            features |= bit(spec::VIRTIO_BLK_F_MQ);
        }
        if self.options.read_only {
            features |= bit(spec::VIRTIO_BLK_F_RO);
        } else {
            features |= bit(spec::VIRTIO_BLK_F_WRITE_ZEROES);
            if self.options.discard {
                features |= bit(spec::VIRTIO_BLK_F_DISCARD);
            }
        }
        features
    }

    fn negotiated(&self, features: u64) {
        let mut state = self.state();
        state.features = features;
        self.update_write_mode(&state);
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        // Firecracker reads the configuration anew after its PATCH and has no other way to learn it.
        if let Err(error) = self.check_size() {
            warn_limited!(device = self.options.name, %error, "the image's size cannot be told");
        }
        let blocks = self.store.image.blocks();
        let disk = Disk {
            capacity_sectors: self.shared.capacity_sectors(),
            block_size: blocks.logical,
            physical_block_size: blocks.physical,
            discard_granularity: blocks.discard,
            num_queues: self.options.num_queues,
            queue_size: self.options.queue_size,
            writeback: self.state().writeback,
            unmap: self.options.discard,
        };
        ConfigSpace::new(&disk).read(offset, out);
    }

    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), ConfigError> {
        let writeback = config_space::written_writeback(offset, data)?;
        let mut state = self.state();
        state.writeback = writeback;
        self.update_write_mode(&state);
        Ok(())
    }

    fn worker_of(&self, queue: u16) -> usize {
        usize::from(queue) % self.workers
    }

    fn worker(&self, _worker: usize) -> anyhow::Result<WorkerBody> {
        let (shared, limiter) = (self.shared.clone(), self.limiter.clone());
        let worker = BlkWorker::new(self.store.clone(), shared, limiter, self.metrics.clone())
            .context("event descriptor")?
            .registering_memory(self.options.register_memory);
        let uring = UringLoop::new(worker).context("cannot set up io_uring")?;
        Ok(Box::new(move |control| uring.run(&control)))
    }

    fn set_channel(&self, channel: Option<Arc<BackendChannel>>) {
        let is = channel.is_some();
        let was = std::mem::replace(&mut self.state().channel, channel).is_some();
        if is != was {
            self.audience.change(is);
        }
    }

    fn save(&self, to: &mut dyn std::io::Write) -> anyhow::Result<()> {
        to.write_all(&[u8::from(self.state().writeback)]).context("saving the cache mode")
    }

    fn load(&self, from: &mut dyn std::io::Read) -> anyhow::Result<()> {
        let mut saved = [0];
        from.read_exact(&mut saved).context("loading the cache mode")?;
        let writeback = match saved {
            [0] => false,
            [1] => true,
            [other] => anyhow::bail!("{other} is no cache mode"),
        };
        let mut state = self.state();
        state.writeback = writeback;
        self.update_write_mode(&state);
        Ok(())
    }

    fn reset(&self) {
        let mut state = self.state();
        state.features = 0;
        state.writeback = self.options.write_cache;
        self.shared.write_through.store(!self.options.write_cache, Ordering::Relaxed);
        drop(state);
        // What a qcow2 image holds in its own caches would die with the process.
        if matches!(self.store.route, Route::Threads) {
            self.flush();
        }
    }
}

#[cfg(test)]
mod tests;
