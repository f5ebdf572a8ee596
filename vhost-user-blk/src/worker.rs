//! The part of a worker that is blk's own: from a chain to a status byte.
//!
//! # Theory of operation
//! Each request lives in a *slot*, which owns its chain; slots are reused and their number is the token
//! of the request's io_uring operation, so a completion finds its request by an index. Slots are made
//! when more requests are in flight than ever before, after that nothing is allocated.
//!
//! ```text
//! pop → parse → limits ─→ ring: SQE … CQE (the rest, if it was short) ─→ status byte → push
//!                  │   ├─→ inline ──────────────────────────────────────┤
//!                  │   └─→ threads … done ──────────────────────────────┘
//!                  └─ parked until the timer
//! ```
//! Requests that a limit holds back are parked by direction, so that a guest that reads too fast can
//! still write. A queue that stops lets its parked requests go at once.
#![allow(unsafe_code, reason = "hands guest buffers to io_uring")]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use outboard_common::metrics::{DeviceMetrics, Gauge, Histogram};
use outboard_common::rate_limiter::{Direction, RateLimiter};
use outboard_common::ring::{Chain, IoVecs};
use outboard_common::warn_limited;
use outboard_common::worker::{Progress, UringContext, UringHandler};
use virtio_bindings::virtio_blk as spec;

use crate::device::Shared;
use crate::request::{self, ID_LEN, Limits, Request, Status};
use crate::store::pool::{self, Done, Job, Pool};
use crate::store::raw::{Descriptor, RawImage, Transfer};
use crate::store::{Route, Store};

/// The token of the thread pool's wake-ups; slots are numbered below it.
const TOKEN_POOL: u64 = 1 << 32;
/// Requests taken from one queue before the others have their turn.
const BUDGET: usize = 256;

/// Bytes done on the worker's thread before the driver is shown what there is: it can go on meanwhile.
const INLINE_BATCH: u64 = 128 << 10;

/// What a slot's request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The slot is free.
    Free,
    /// An io_uring transfer.
    Transfer(Transfer),
    /// An io_uring flush.
    Flush,
    /// A thread of the pool.
    Job,
    /// A rate limit.
    Parked,
}

/// One request in flight.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    status: IoVecs,
    queue: u16,
    stage: Stage,
    descriptor: Descriptor,
    /// Where the rest of a transfer goes.
    offset: u64,
    /// What the used entry will say: all of the writable part.
    written: u32,
    /// A parked request.
    request: Option<Request>,
    /// When it was taken, for the few whose time is measured.
    begun: Option<Instant>,
}

impl Slot {
    const fn new() -> Self {
        Self {
            chain: Chain::new(),
            status: IoVecs::new(),
            queue: 0,
            stage: Stage::Free,
            descriptor: Descriptor::Buffered,
            offset: 0,
            written: 0,
            request: None,
            begun: None,
        }
    }

    /// The bytes that a request moves.
    #[inline]
    fn bytes(&self, request: &Request) -> usize {
        match request {
            Request::Read { .. } => self.chain.writable.len(),
            Request::Write { .. } => self.chain.readable.len(),
            _ => 0,
        }
    }

    /// The data of a transfer.
    #[inline]
    fn data(&mut self, transfer: Transfer) -> &mut IoVecs {
        match transfer {
            Transfer::Read => &mut self.chain.writable,
            Transfer::Write | Transfer::WriteThrough => &mut self.chain.readable,
        }
    }
}

/// What is shown of one queue beyond its counters.
#[derive(Debug)]
struct QueueGauges {
    latency: Arc<Histogram>,
    in_flight: Arc<Gauge>,
}

impl QueueGauges {
    fn new(metrics: &DeviceMetrics, queue: u16) -> Self {
        let help = "Time from taking a request to its answer, of one request a batch.";
        let latency = metrics.latency("blk_request_seconds", help, Some(queue));
        let help = "Requests taken and not answered yet.";
        Self { latency, in_flight: metrics.gauge("blk_in_flight", help, Some(queue)) }
    }
}

/// A blk worker: serves some queues of one device.
#[derive(Debug)]
pub struct BlkWorker {
    store: Store,
    shared: Arc<Shared>,
    limiter: Arc<RateLimiter>,
    metrics: Arc<DeviceMetrics>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Held back by a limit: reads, writes.
    parked: [VecDeque<u32>; 2],
    pool: Pool,
    done: Vec<Done>,
    /// Bytes done inline since the last look of the driver's.
    inline_bytes: u64,
    /// What is shown of each queue, by its index; filled when it is first served.
    gauges: Vec<Option<QueueGauges>>,
    /// Guest memory is to be registered with the ring.
    register_memory: bool,
}

fn place(direction: Direction) -> usize {
    match direction {
        Direction::Read => 0,
        Direction::Write => 1,
    }
}

impl BlkWorker {
    /// A worker of the device that `shared` belongs to.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(
        store: Store,
        shared: Arc<Shared>,
        limiter: Arc<RateLimiter>,
        metrics: Arc<DeviceMetrics>,
    ) -> io::Result<Self> {
        let pool = Pool::new(store.image.clone())?;
        Ok(Self {
            store,
            shared,
            limiter,
            metrics,
            slots: Vec::new(),
            free: Vec::new(),
            parked: [VecDeque::new(), VecDeque::new()],
            pool,
            done: Vec::new(),
            inline_bytes: 0,
            gauges: Vec::new(),
            register_memory: false,
        })
    }

    /// Has the kernel hold guest memory ready, where the store goes through the ring.
    #[must_use]
    pub fn registering_memory(mut self, wanted: bool) -> Self {
        self.register_memory = wanted && matches!(self.store.route, Route::Ring(_));
        self
    }

    /// Registers the memory that queue `index` works on, unless it is.
    fn register(&mut self, index: u16, cx: &mut UringContext) {
        let Some(table) = cx.queues.get(index).map(|q| q.memory_table().clone()) else { return };
        if let Err(error) = cx.register_memory(&table) {
            warn_limited!(
                device = self.shared.name(), %error,
                "guest memory cannot be registered, so it is not; the limit on locked memory (LimitMEMLOCK) must be as large as it"
            );
        }
    }

    /// A free slot, made if need be. Requests in flight are bounded by the queues' sizes.
    #[inline]
    fn take_slot(&mut self) -> u32 {
        if let Some(slot) = self.free.pop() {
            return slot;
        }
        self.slots.push(Slot::new());
        u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
    }

    /// Parses the chain in `at` and starts it.
    #[inline]
    fn begin(&mut self, at: u32, limits: &Limits, cx: &mut UringContext) {
        let slot = &mut self.slots[at as usize];
        slot.written = u32::try_from(slot.chain.writable.len()).unwrap_or(u32::MAX);
        let (readable, writable) = (&mut slot.chain.readable, &mut slot.chain.writable);
        match request::parse(readable, writable, &mut slot.status, limits) {
            Ok(request) => self.admit(at, request, cx),
            Err(status) => {
                if let Some(queue) = cx.queues.get(slot.queue) {
                    queue.metrics().rejected.add(1);
                }
                self.finish(at, status, cx);
            }
        }
    }

    /// Starts a request as soon as the limits let it.
    #[inline]
    fn admit(&mut self, at: u32, request: Request, cx: &mut UringContext) {
        let direction = match &request {
            Request::Read { .. } => Direction::Read,
            Request::Flush | Request::GetId => return self.start(at, request, cx),
            _ => Direction::Write,
        };
        if !self.limiter.is_limited(direction) && self.parked[place(direction)].is_empty() {
            return self.start(at, request, cx);
        }
        self.slots[at as usize].request = Some(request);
        self.slots[at as usize].stage = Stage::Parked;
        self.parked[place(direction)].push_back(at);
        self.release(direction, cx);
    }

    /// Starts parked requests, oldest first, while the limit allows; else sets the timer.
    fn release(&mut self, direction: Direction, cx: &mut UringContext) {
        while let Some(&at) = self.parked[place(direction)].front() {
            let slot = &self.slots[at as usize];
            let bytes = slot.request.as_ref().map_or(0, |request| slot.bytes(request));
            if let Err(when) = self.limiter.try_take(direction, 1, bytes as u64, Instant::now) {
                cx.set_timer(Some(cx.timer().map_or(when, |earlier| earlier.min(when))));
                return;
            }
            self.parked[place(direction)].pop_front();
            self.start_parked(at, cx);
        }
    }

    fn start_parked(&mut self, at: u32, cx: &mut UringContext) {
        if let Some(request) = self.slots[at as usize].request.take() {
            self.start(at, request, cx);
        }
    }

    /// Carries a request out, or gives it to who does.
    #[inline]
    fn start(&mut self, at: u32, request: Request, cx: &mut UringContext) {
        let through = || self.shared.is_write_through();
        match (&self.store.route, request) {
            (_, Request::GetId) => self.get_id(at, cx),
            (Route::Ring(_), Request::Read { offset }) => {
                self.transfer(at, Transfer::Read, offset, cx);
            }
            (Route::Ring(_), Request::Write { offset }) => {
                let kind = if through() { Transfer::WriteThrough } else { Transfer::Write };
                self.transfer(at, kind, offset, cx);
            }
            (Route::Ring(_), Request::Flush) => {
                self.slots[at as usize].stage = Stage::Flush;
                // SAFETY: a flush carries no pointer.
                unsafe { cx.submit(RawImage::flush_entry(), u64::from(at)) };
            }
            (Route::Inline, request) => {
                let durable = through();
                self.inline(at, request, durable, cx);
            }
            (Route::Ring(_) | Route::Threads, request) => {
                let durable = through();
                self.hand_over(at, request, durable);
            }
        }
    }

    /// Begins a transfer through the ring.
    #[inline]
    fn transfer(&mut self, at: u32, transfer: Transfer, offset: u64, cx: &mut UringContext) {
        let Route::Ring(image) = &self.store.route else { return };
        let slot = &mut self.slots[at as usize];
        slot.offset = offset;
        slot.descriptor = image.route(offset, slot.data(transfer));
        self.submit(at, transfer, cx);
    }

    /// Submits what is left of a transfer.
    #[inline]
    fn submit(&mut self, at: u32, transfer: Transfer, cx: &mut UringContext) {
        let slot = &mut self.slots[at as usize];
        slot.stage = Stage::Transfer(transfer);
        let (descriptor, offset) = (slot.descriptor, slot.offset);
        let data = slot.data(transfer);
        let registered = match data.as_slice() {
            [one] => cx.registered_buffer(one),
            _ => None,
        };
        let entry = RawImage::entry(transfer, descriptor, offset, data, registered);
        // SAFETY: the buffers are guest memory that stays mapped until the chain is pushed, and the
        // vectors are in the slot's chain, which nothing changes before the completion.
        unsafe { cx.submit(entry, u64::from(at)) };
    }

    fn inline(&mut self, at: u32, request: Request, durable: bool, cx: &mut UringContext) {
        let slot = &mut self.slots[at as usize];
        let queue = slot.queue;
        let mut none = IoVecs::new();
        let data = match request {
            Request::Read { .. } => &mut slot.chain.writable,
            Request::Write { .. } => &mut slot.chain.readable,
            _ => &mut none,
        };
        let len = data.len() as u64;
        let read = matches!(request, Request::Read { .. });
        let result = pool::perform(&*self.store.image, request, data, durable);
        self.count(at, len, read, cx);
        self.conclude(at, result, cx);
        self.inline_bytes = self.inline_bytes.saturating_add(len);
        if self.inline_bytes >= INLINE_BATCH {
            self.inline_bytes = 0;
            if let Some(queue) = cx.queues.get(queue) {
                queue.publish();
            }
        }
    }

    /// Gives a request to the pool.
    fn hand_over(&mut self, at: u32, request: Request, durable: bool) {
        let slot = &mut self.slots[at as usize];
        slot.stage = Stage::Job;
        let data = match request {
            Request::Read { .. } => std::mem::take(&mut slot.chain.writable),
            _ => std::mem::take(&mut slot.chain.readable),
        };
        self.pool.submit(Job { slot: at, request, data, durable });
    }

    fn on_pool(&mut self, cx: &mut UringContext) {
        let mut done = std::mem::take(&mut self.done);
        self.pool.take_done(&mut done);
        for Done { slot: at, read, data, bytes, result } in done.drain(..) {
            let slot = &mut self.slots[at as usize];
            if read {
                slot.chain.writable = data;
            } else {
                slot.chain.readable = data;
            }
            if result.is_ok() {
                self.count(at, bytes, read, cx);
            }
            self.conclude(at, result, cx);
        }
        self.done = done;
    }

    fn get_id(&mut self, at: u32, cx: &mut UringContext) {
        let id: [u8; ID_LEN] = self.shared.serial();
        self.slots[at as usize].chain.writable.write(&id);
        self.finish(at, Status::Ok, cx);
    }

    /// A transfer's completion.
    #[inline]
    fn on_transfer(&mut self, at: u32, transfer: Transfer, result: i32, cx: &mut UringContext) {
        let slot = &mut self.slots[at as usize];
        let Ok(n) = usize::try_from(result) else {
            return self.on_transfer_error(at, transfer, -result, cx);
        };
        let data = slot.data(transfer);
        if n == data.len() {
            self.count(at, n as u64, transfer == Transfer::Read, cx);
            return self.finish(at, Status::Ok, cx);
        }
        self.on_short_transfer(at, transfer, n, cx);
    }

    /// Some of it is done: submits the rest.
    #[cold]
    fn on_short_transfer(&mut self, at: u32, transfer: Transfer, n: usize, cx: &mut UringContext) {
        if n == 0 {
            return self.conclude(at, Err(io::ErrorKind::UnexpectedEof.into()), cx);
        }
        self.count(at, n as u64, transfer == Transfer::Read, cx);
        let slot = &mut self.slots[at as usize];
        slot.data(transfer).advance(n);
        let offset = slot.offset.saturating_add(n as u64);
        self.transfer(at, transfer, offset, cx);
    }

    #[cold]
    fn on_transfer_error(
        &mut self,
        at: u32,
        transfer: Transfer,
        errno: i32,
        cx: &mut UringContext,
    ) {
        let slot = &mut self.slots[at as usize];
        match errno {
            libc::EINTR | libc::EAGAIN => self.submit(at, transfer, cx),
            // The file system wanted something aligned that it had not told of.
            libc::EINVAL if slot.descriptor == Descriptor::Direct => {
                slot.descriptor = Descriptor::Buffered;
                self.submit(at, transfer, cx);
            }
            errno => self.conclude(at, Err(io::Error::from_raw_os_error(errno)), cx),
        }
    }

    #[inline]
    fn count(&mut self, at: u32, bytes: u64, read: bool, cx: &mut UringContext) {
        let Some(queue) = cx.queues.get(self.slots[at as usize].queue) else { return };
        // A disk read writes guest memory.
        if read {
            queue.metrics().bytes_written.add(bytes);
        } else {
            queue.metrics().bytes_read.add(bytes);
        }
    }

    /// Ends a request with what the store said.
    fn conclude(&mut self, at: u32, result: io::Result<()>, cx: &mut UringContext) {
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.shared.count_error();
                warn_limited!(device = self.shared.name(), %error, "the image failed a request");
                Status::IoErr
            }
        };
        self.finish(at, status, cx);
    }

    /// Writes the status byte and gives the chain back.
    #[inline]
    fn finish(&mut self, at: u32, status: Status, cx: &mut UringContext) {
        let slot = &mut self.slots[at as usize];
        slot.stage = Stage::Free;
        slot.status.write(&[status as u8]);
        let Some(queue) = cx.queues.get(slot.queue) else { return self.free.push(at) };
        queue.push(&mut slot.chain, slot.written);
        if let Some(Some(gauges)) = self.gauges.get(usize::from(slot.queue)) {
            gauges.in_flight.set(u64::from(queue.in_flight()));
            if let Some(begun) = slot.begun.take() {
                gauges.latency.record_between(begun, cx.now(), 1);
            }
        }
        self.free.push(at);
    }

    /// Makes what is shown of queue `index`.
    #[cold]
    fn show(&mut self, index: u16) {
        let at = usize::from(index);
        if self.gauges.len() <= at {
            self.gauges.resize_with(at + 1, || None);
        }
        self.gauges[at] = Some(QueueGauges::new(&self.metrics, index));
    }

    fn limits(&self, features: u64) -> Limits {
        let has = |bit: u32| features & (1 << bit) != 0;
        Limits {
            capacity_sectors: self.shared.capacity_sectors(),
            read_only: self.shared.is_read_only(),
            discard: has(spec::VIRTIO_BLK_F_DISCARD),
            write_zeroes: has(spec::VIRTIO_BLK_F_WRITE_ZEROES),
        }
    }
}

impl UringHandler for BlkWorker {
    fn on_init(&mut self, cx: &mut UringContext) -> io::Result<()> {
        if let Route::Ring(image) = &self.store.route {
            cx.register_files(&image.descriptors())?;
        }
        cx.watch(self.pool.wake_fd(), TOKEN_POOL);
        Ok(())
    }

    fn on_kick(&mut self, index: u16, cx: &mut UringContext) -> Progress {
        let Some(features) = cx.queues.get(index).map(|q| q.features()) else {
            return Progress::Emptied;
        };
        let limits = self.limits(features);
        if !matches!(self.gauges.get(usize::from(index)), Some(Some(_))) {
            self.show(index);
        }
        // One of each batch: two looks at the clock cost more than a small request's own work.
        let mut begun = Some(cx.now());
        for _ in 0..BUDGET {
            let at = self.take_slot();
            let slot = &mut self.slots[at as usize];
            if !cx.queues.get(index).is_some_and(|q| q.pop(&mut slot.chain)) {
                self.free.push(at);
                return Progress::Emptied;
            }
            slot.queue = index;
            slot.begun = begun.take();
            if self.register_memory && slot.begun.is_some() {
                self.register(index, cx);
            }
            self.begin(at, &limits, cx);
        }
        Progress::More
    }

    fn on_completion(&mut self, token: u64, result: i32, cx: &mut UringContext) {
        let Ok(at) = u32::try_from(token) else {
            return self.on_pool(cx);
        };
        match self.slots.get(at as usize).map(|s| s.stage) {
            Some(Stage::Transfer(transfer)) => self.on_transfer(at, transfer, result, cx),
            Some(Stage::Flush) => {
                let result =
                    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) };
                self.conclude(at, result, cx);
            }
            // Only what was submitted completes.
            _ => tracing::error!(token, "a completion that nobody waits for"),
        }
    }

    fn on_stopping(&mut self, index: u16, cx: &mut UringContext) {
        for direction in [0, 1] {
            let parked = std::mem::take(&mut self.parked[direction]);
            for at in parked {
                if self.slots[at as usize].queue == index {
                    self.start_parked(at, cx);
                } else {
                    self.parked[direction].push_back(at);
                }
            }
        }
    }

    fn on_timer(&mut self, cx: &mut UringContext) {
        self.release(Direction::Read, cx);
        self.release(Direction::Write, cx);
    }
}
