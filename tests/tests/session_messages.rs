//! Messages of the specification that no usual set-up has, on a bare session: in-band notifications, a
//! virtual IOMMU, device state, shared memory regions, and the hooks of network devices.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use outboard_common::device::{Device, WorkerBody};
use outboard_common::sys::EventFd;
use outboard_common::vhost_user::session::{Ended, Session, SessionOptions};
use outboard_common::worker::{Context, EventLoop, Progress, QueueHandler};
use testkit::driver::{Buffer, GuestQueue, RingFormat, wait_readable};
use testkit::frontend::{AttachOptions, BackendRequest, FrontEnd, ShmemPolicy};
use testkit::inverter::Inverter;
use testkit::memory::{GuestRam, USER_BASE};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};

const TIMEOUT: Duration = Duration::from_secs(10);
/// Pieces that the virtual IOMMU tells of, as QEMU's.
const PAGE: u64 = 4096;
/// Access in IOTLB messages.
const READ: u8 = 1;
const READ_WRITE: u8 = 3;
/// IOTLB message types.
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

/// An inverter that also notes what a network device is told, and has state and shared memory.
#[derive(Default)]
struct Station {
    mtu: Mutex<Option<u16>>,
    announced: Mutex<Option<[u8; 6]>>,
    state: Mutex<Vec<u8>>,
}

impl Device for Station {
    fn name(&self) -> &str {
        "station"
    }
    fn queue_count(&self) -> u16 {
        Inverter.queue_count()
    }
    fn features(&self) -> u64 {
        Inverter.features()
    }
    fn protocol_features(&self) -> u64 {
        (Protocol::MTU | Protocol::RARP).bits()
    }
    fn read_config(&self, _offset: u32, _out: &mut [u8]) {}
    fn worker_of(&self, queue: u16) -> usize {
        Inverter.worker_of(queue)
    }
    fn worker(&self, worker: usize) -> anyhow::Result<WorkerBody> {
        Inverter.worker(worker)
    }
    fn set_mtu(&self, mtu: u16) -> bool {
        *self.mtu.lock().unwrap() = Some(mtu);
        mtu >= 68
    }
    fn send_rarp(&self, mac: [u8; 6]) -> bool {
        *self.announced.lock().unwrap() = Some(mac);
        true
    }
    fn shmem_regions(&self) -> Vec<u64> {
        vec![1 << 20, 0, 1 << 30]
    }
    fn save(&self, to: &mut dyn Write) -> anyhow::Result<()> {
        Ok(to.write_all(&self.state.lock().unwrap())?)
    }
    fn load(&self, from: &mut dyn Read) -> anyhow::Result<()> {
        let mut state = Vec::new();
        from.read_to_end(&mut state)?;
        anyhow::ensure!(state.starts_with(b"station"), "somebody else's state");
        *self.state.lock().unwrap() = state;
        Ok(())
    }
}

/// A session with `device` on a thread, and a front end that has said nothing yet.
fn session(device: Arc<dyn Device>, options: SessionOptions) -> (FrontEnd, JoinHandle<Ended>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let metrics = vec![Arc::default(), Arc::default()];
    let thread = std::thread::spawn(move || {
        Session::new(device, theirs, metrics, options).serve(&EventFd::new().unwrap())
    });
    (FrontEnd::from_stream(ours).unwrap(), thread)
}

/// One request: `byte` repeated, which must come back inverted. `kick` wakes the device.
fn invert(queue: &mut GuestQueue, [from, to]: [u64; 2], byte: u8, kick: impl Fn(&mut GuestQueue)) {
    let ram = queue.ram().clone();
    assert!(queue.add(&[Buffer::readable(from, 64), Buffer::writable(to, 64)], 0));
    kick(queue);
    assert_eq!(queue.wait(TIMEOUT).unwrap().len, 64, "byte {byte}");
    assert_eq!(ram.bytes(to, 64), vec![!byte; 64]);
}

/// Kicks and calls as messages, for a front end that has no descriptors to give.
#[test]
fn notifications_travel_in_band() {
    for format in RingFormat::ALL {
        let options = SessionOptions { inband_notifications: true, ..SessionOptions::default() };
        let (mut front_end, thread) = session(Arc::new(Inverter), options);
        let features = front_end.negotiate(format.features(), u64::MAX).unwrap();
        assert!(front_end.has(Protocol::INBAND_NOTIFICATIONS));
        let ram = GuestRam::new(1 << 20).unwrap();
        front_end.set_mem_table(&ram).unwrap();
        let channel = front_end.open_backend_channel(ShmemPolicy::Refuse).unwrap();
        let mut queue = GuestQueue::new(&ram, 16, features).unwrap();
        channel.forward_calls(0, queue.call_fd().try_clone().unwrap());
        front_end.set_vring_num(0, queue.size()).unwrap();
        front_end.set_vring_base(0, queue.initial_base()).unwrap();
        front_end.set_vring_addr(0, queue.addresses(), None).unwrap();
        front_end.set_vring_call(0, None).unwrap();
        front_end.set_vring_kick(0, None).unwrap();
        front_end.set_vring_enable(0, true).unwrap();
        let at = ram.alloc(4096, 16).unwrap();
        let kick = |_: &mut GuestQueue| {
            front_end.set(FrontendReq::VRING_KICK.into(), &[0; 8], &[]).unwrap();
        };
        // A driver that looks only when it is woken, which messages alone can do here.
        assert!(!queue.enable_interrupts());
        assert!(queue.add(&[Buffer::readable(at, 64), Buffer::writable(at + 64, 64)], 0));
        kick(&mut queue);
        assert!(wait_readable(queue.call_fd(), TIMEOUT).unwrap(), "the driver is woken");
        assert_eq!(queue.used().unwrap().len, 64);
        for byte in 0..100 {
            ram.fill(at, 64, byte);
            invert(&mut queue, [at, at + 64], byte, kick);
        }
        let first = channel.requests.recv_timeout(TIMEOUT).unwrap();
        assert_eq!(first, BackendRequest::VringCall(0));
        // An index that no ring has is no reason to leave.
        assert!(
            front_end.set(FrontendReq::VRING_KICK.into(), &[9, 0, 0, 0, 0, 0, 0, 0], &[]).is_err()
        );
        drop((front_end, channel));
        assert!(matches!(thread.join().unwrap(), Ended::FrontendLeft));
    }
}

/// A VMM's IOMMU: pages by I/O virtual address, with the guest address and the access allowed.
type Pages = Arc<Mutex<BTreeMap<u64, (u64, u8)>>>;

/// IOTLB_MSG, which is always answered: true if it was taken.
fn tell(front_end: &FrontEnd, kind: u8, iova: u64, size: u64, (at, perm): (u64, u8)) -> bool {
    let mut body: Vec<u8> =
        [iova, size, USER_BASE + at].iter().flat_map(|v| v.to_ne_bytes()).collect();
    body.extend([perm, kind, 0, 0, 0, 0, 0, 0]);
    let answer = front_end.call(FrontendReq::IOTLB_MSG.into(), &body, &[]).unwrap();
    answer.as_u64().unwrap() == 0
}

/// Rings, buffers and tables are where the VMM says when it is asked, page by page.
#[test]
fn addresses_behind_an_iommu_are_asked_for() {
    /// I/O virtual addresses are guest addresses and this, unless a page says otherwise.
    const SHIFT: u64 = 1 << 40;
    for format in RingFormat::ALL {
        let options = SessionOptions { iommu_platform: true, ..SessionOptions::default() };
        let (mut front_end, thread) = session(Arc::new(Inverter), options);
        let other_format = RingFormat::Packed.features() & !format.features();
        let features = front_end.negotiate(!other_format, u64::MAX).unwrap();
        assert_ne!(features & 1 << virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM, 0);
        let ram = GuestRam::new(4 << 20).unwrap();
        front_end.set_mem_table(&ram).unwrap();
        let mut queue = GuestQueue::new(&ram, 256, features).unwrap();
        // The driver writes guest addresses into its rings: they are the I/O virtual ones here, and the rings
        // themselves are elsewhere.
        let pages: Pages = Arc::default();
        for page in (0..4 << 20).step_by(4096) {
            pages.lock().unwrap().insert(page, (page, READ_WRITE));
            pages.lock().unwrap().insert(SHIFT + page, (page, READ_WRITE));
        }
        let channel = front_end.open_backend_channel(ShmemPolicy::Refuse).unwrap();
        let (asked, vmm) = (pages.clone(), front_end.clone());
        let answering = std::thread::spawn(move || {
            let mut misses = 0;
            for request in &channel.requests {
                let BackendRequest::IotlbMiss(iova, _) = request else { continue };
                misses += 1;
                let page = iova & !(PAGE - 1);
                let known = asked.lock().unwrap().get(&page).copied();
                if let Some(known) = known {
                    assert!(tell(&vmm, UPDATE, page, PAGE, known));
                }
            }
            misses
        });
        let mut addresses = queue.addresses();
        for address in [&mut addresses.descriptor, &mut addresses.available, &mut addresses.used] {
            *address = *address - USER_BASE + SHIFT;
        }
        front_end.set_vring_num(0, queue.size()).unwrap();
        front_end.set_vring_base(0, queue.initial_base()).unwrap();
        front_end.set_vring_addr(0, addresses, None).unwrap();
        front_end.set_vring_call(0, Some(queue.call_fd().as_fd())).unwrap();
        front_end.set_vring_kick(0, Some(queue.kick_fd().as_fd())).unwrap();
        front_end.set_vring_enable(0, true).unwrap();
        // As QEMU does, the first translation comes unasked, and everything else follows from it.
        let used = addresses.used & !(PAGE - 1);
        assert!(tell(&front_end, UPDATE, used, PAGE, (used - SHIFT, READ_WRITE)));
        let kick = |queue: &mut GuestQueue| {
            queue.kick();
        };
        let from = ram.alloc(4 * PAGE, PAGE).unwrap();
        let to = from + PAGE;
        for byte in 0..20 {
            ram.fill(from, 64, byte);
            invert(&mut queue, [from, to], byte, kick);
        }
        // Across two pages that are apart in memory: what is read begins in one and ends in the other.
        ram.fill(from + PAGE - 32, 32, 0x11);
        ram.fill(from + 3 * PAGE, 32, 0x11);
        remap(&pages, &front_end, from + PAGE, (from + 3 * PAGE, READ_WRITE));
        ram.fill(from + 3 * PAGE + 64, 64, 0);
        let chain =
            [Buffer::readable(from + PAGE - 32, 64), Buffer::writable(from + PAGE + 64, 64)];
        assert!(queue.add(&chain, 0));
        queue.kick();
        assert_eq!(queue.wait(TIMEOUT).unwrap().len, 64);
        assert_eq!(ram.bytes(from + 3 * PAGE + 64, 64), vec![!0x11; 64]);
        // A table of descriptors over a page's end.
        ram.alloc(PAGE - 16, PAGE).unwrap();
        assert!(queue.add_indirect(&chain, 0).unwrap());
        queue.kick();
        assert_eq!(queue.wait(TIMEOUT).unwrap().len, 64);
        // What may only be read is not written: the chain comes back unused.
        remap(&pages, &front_end, from + 2 * PAGE, (from + 2 * PAGE, READ));
        let chain = [Buffer::readable(from, 64), Buffer::writable(from + 2 * PAGE, 64)];
        assert!(queue.add(&chain, 0));
        queue.kick();
        assert_eq!(queue.wait(TIMEOUT).unwrap().len, 0);
        // The VMM's other thread has the socket too.
        front_end.wire().stream().shutdown(Shutdown::Both).unwrap();
        let misses = answering.join().unwrap();
        assert!(misses >= 4, "only {misses} misses");
        assert!(matches!(thread.join().unwrap(), Ended::FrontendLeft));
    }
}

/// Puts another page at `iova`, as a guest does that maps and unmaps.
fn remap(pages: &Pages, front_end: &FrontEnd, iova: u64, page: (u64, u8)) {
    pages.lock().unwrap().insert(iova, page);
    assert!(tell(front_end, INVALIDATE, iova, PAGE, (0, 0)));
}

/// State can move before anything else was said, again and again, and the checks answer for the latest
/// transfer alone.
#[test]
fn device_state_and_shared_memory_in_any_order() {
    let station = Arc::new(Station::default());
    *station.state.lock().unwrap() = b"station one".to_vec();
    let (mut front_end, thread) = session(station.clone(), SessionOptions::default());
    assert_eq!(front_end.get_shmem_config().unwrap()[..3], [1 << 20, 0, 1 << 30]);
    assert!(!front_end.check_device_state().unwrap(), "nothing was moved yet");
    let save = |front_end: &FrontEnd| {
        let (read, write) = rustix::pipe::pipe().unwrap();
        front_end.set_device_state_fd(true, write.as_fd()).unwrap();
        drop(write);
        let mut state = Vec::new();
        std::fs::File::from(read).read_to_end(&mut state).unwrap();
        assert!(front_end.check_device_state().unwrap());
        state
    };
    let load = |front_end: &FrontEnd, state: &[u8]| {
        let (read, write) = rustix::pipe::pipe().unwrap();
        front_end.set_device_state_fd(false, read.as_fd()).unwrap();
        std::fs::File::from(write).write_all(state).unwrap();
        front_end.check_device_state().unwrap()
    };
    assert_eq!(save(&front_end), b"station one");
    assert!(load(&front_end, b"station two"));
    front_end.negotiate(RingFormat::Split.features(), u64::MAX).unwrap();
    assert!(front_end.has(Protocol::DEVICE_STATE));
    assert_eq!(save(&front_end), b"station two");
    assert!(!load(&front_end, b"another device"), "a state that is refused is said to be");
    assert_eq!(save(&front_end), b"station two", "and changes nothing");
    // While a ring runs its device's state is nobody's; when it is stopped it is.
    let ram = GuestRam::new(1 << 20).unwrap();
    front_end.set_mem_table(&ram).unwrap();
    let features = front_end.features & !testkit::frontend::F_PROTOCOL_FEATURES;
    let queue = GuestQueue::new(&ram, 16, features).unwrap();
    front_end.start_queue(0, &queue, queue.initial_base()).unwrap();
    let (_read, write) = rustix::pipe::pipe().unwrap();
    assert!(front_end.set_device_state_fd(true, write.as_fd()).is_err());
    assert_eq!(front_end.get_shmem_config().unwrap()[..3], [1 << 20, 0, 1 << 30]);
    front_end.get_vring_base(0).unwrap();
    assert_eq!(save(&front_end), b"station two");
    drop(front_end);
    assert!(matches!(thread.join().unwrap(), Ended::FrontendLeft));
}

#[test]
fn network_hooks_reach_the_device_that_has_them() {
    let station = Arc::new(Station::default());
    let (mut front_end, thread) = session(station.clone(), SessionOptions::default());
    front_end.negotiate(u64::MAX, u64::MAX).unwrap();
    assert!(front_end.has(Protocol::MTU | Protocol::RARP));
    front_end.set_mtu(9000).unwrap();
    assert_eq!(*station.mtu.lock().unwrap(), Some(9000));
    assert!(front_end.set_mtu(9).is_err(), "what the device refuses is refused");
    front_end.send_rarp([2, 0, 0, 0, 0, 7]).unwrap();
    assert_eq!(*station.announced.lock().unwrap(), Some([2, 0, 0, 0, 0, 7]));
    drop(front_end);
    thread.join().unwrap();

    let (mut front_end, thread) = session(Arc::new(Inverter), SessionOptions::default());
    front_end.negotiate(u64::MAX, u64::MAX).unwrap();
    assert!(!front_end.has(Protocol::MTU) && !front_end.has(Protocol::RARP));
    assert!(front_end.set_mtu(1500).is_err());
    assert!(front_end.send_rarp([2; 6]).is_err());
    assert!(front_end.get_shmem_config().unwrap().iter().all(|&size| size == 0));
    drop(front_end);
    thread.join().unwrap();
}

/// Two queues with a worker each, of which neither is drained before the other drains too.
#[derive(Clone, Default)]
struct Together(Arc<(Mutex<usize>, Condvar)>);

impl Together {
    /// Queues that have been drained so far, after waiting for an even number of them.
    fn meet(&self) -> usize {
        let (count, changed) = &*self.0;
        let mut drained = count.lock().unwrap();
        *drained += 1;
        changed.notify_all();
        let wanted = drained.next_multiple_of(2);
        let waited = changed.wait_timeout_while(drained, TIMEOUT / 2, |drained| *drained < wanted);
        *waited.unwrap().0
    }

    fn drained(&self) -> usize {
        *self.0.0.lock().unwrap()
    }
}

impl QueueHandler for Together {
    fn on_kick(&mut self, _index: u16, _cx: &mut Context) -> Progress {
        Progress::Emptied
    }
    fn on_stop(&mut self, _index: u16, _cx: &mut Context) {
        let drained = self.meet();
        assert!(drained.is_multiple_of(2), "the other queue was not told to stop");
    }
}

impl Device for Together {
    fn name(&self) -> &str {
        "together"
    }
    fn queue_count(&self) -> u16 {
        Inverter.queue_count()
    }
    fn features(&self) -> u64 {
        Inverter.features()
    }
    fn read_config(&self, _offset: u32, _out: &mut [u8]) {}
    fn worker_of(&self, queue: u16) -> usize {
        Inverter.worker_of(queue)
    }
    fn worker(&self, _worker: usize) -> anyhow::Result<WorkerBody> {
        let event_loop = EventLoop::new(self.clone())?;
        Ok(Box::new(move |control| event_loop.run(control)))
    }
}

/// A device's rings drain side by side: stopping them takes as long as the slowest, not as all.
#[test]
fn rings_are_drained_at_the_same_time() {
    let device = Together::default();
    let (mut front_end, thread) = session(Arc::new(device.clone()), SessionOptions::default());
    let ram = GuestRam::new(1 << 20).unwrap();
    let options = AttachOptions { queues: 2, ..AttachOptions::new(RingFormat::Split) };
    let (queues, _) = front_end.attach(&ram, &options).unwrap();
    front_end.set_status(0).unwrap();
    // An answered request: the status is carried out by now, and no ring has come back by itself.
    assert_eq!(front_end.get_status().unwrap(), 0);
    assert_eq!(device.drained(), 2);
    for (index, queue) in (0..).zip(&queues) {
        front_end.start_queue(index, queue, queue.initial_base()).unwrap();
    }
    front_end.get_status().unwrap();
    drop(front_end);
    assert!(matches!(thread.join().unwrap(), Ended::FrontendLeft));
    assert_eq!(device.drained(), 4);
}

/// What stops rings without taking them back: they rest until the front end says so.
#[test]
fn a_stopped_ring_does_not_come_back_by_itself() {
    let (mut front_end, thread) = session(Arc::new(Inverter), SessionOptions::default());
    let ram = GuestRam::new(1 << 20).unwrap();
    let options = AttachOptions::new(RingFormat::Split);
    let (mut queues, _) = front_end.attach(&ram, &options).unwrap();
    let queue = &mut queues[0];
    let at = ram.alloc(4096, 16).unwrap();
    let resume: [(&str, &dyn Fn(&FrontEnd), &dyn Fn(&FrontEnd, &GuestQueue)); 2] = [
        ("SET_STATUS 0", &|f| f.set_status(0).unwrap(), &|f, queue| {
            f.set_vring_kick(0, Some(queue.kick_fd().as_fd())).unwrap();
        }),
        ("RESET_OWNER", &|f| f.set(FrontendReq::RESET_OWNER.into(), &[], &[]).unwrap(), &|f, _| {
            f.set_vring_enable(0, true).unwrap()
        }),
    ];
    for (what, stop, go_on) in resume {
        ram.fill(at, 64, 1);
        invert(queue, [at, at + 64], 1, |queue| {
            queue.kick();
        });
        stop(&front_end);
        ram.fill(at, 64, 2);
        assert!(queue.add(&[Buffer::readable(at, 64), Buffer::writable(at + 64, 64)], 0));
        queue.kick();
        assert_eq!(front_end.get_status().unwrap(), 0);
        assert!(queue.wait(Duration::from_millis(20)).is_err(), "after {what} it went on");
        go_on(&front_end, queue);
        assert_eq!(queue.wait(TIMEOUT).unwrap().len, 64, "after {what}");
    }
    drop(front_end);
    thread.join().unwrap();
}

/// With LOG_SHMFD the front end waits for the answer to SET_LOG_BASE, whatever it will be.
#[test]
fn a_log_that_cannot_be_used_is_answered() {
    let (mut front_end, thread) = session(Arc::new(Inverter), SessionOptions::default());
    front_end.negotiate(RingFormat::Split.features(), u64::MAX).unwrap();
    assert!(front_end.has(Protocol::LOG_SHMFD));
    let file = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, 4096).unwrap();
    let answer = front_end.set_log_base(1 << 20, 0, file.as_fd()).unwrap();
    assert_ne!(answer.as_u64().unwrap(), 0);
    let answer = front_end.set_log_base(4096, 0, file.as_fd()).unwrap();
    assert_eq!(answer.as_u64().unwrap(), 0);
    drop(front_end);
    thread.join().unwrap();
}
