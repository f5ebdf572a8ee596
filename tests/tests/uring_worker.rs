//! The worker loop around io_uring, with a handler whose operations end when the test says so: requests
//! complete in any order, a stop waits for what is in flight and takes nothing new, no number of
//! operations is too many for the ring, and a queue that the guest broke harms no other.

#![allow(unsafe_code, reason = "operations of the test's own handler are handed to the kernel")]
#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use io_uring::{opcode, types};
use outboard_common::ring::{Call, Chain, Queue, QueueSetup};
use outboard_common::sys::EventFd;
use outboard_common::vhost_user::memory::SharedMemory;
use outboard_common::worker::{
    Command, ControlHandle, Progress, UringContext, UringHandler, UringLoop, WorkerOptions,
};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::memory::GuestRam;

const LONG: Duration = Duration::from_secs(10);
/// Long enough for a loop that would do the wrong thing to do it.
const WHILE: Duration = Duration::from_millis(60);
const SIZE: u16 = 1024;

/// Each request is a wait for one of the gates, in turn; with no gates it is done at once.
struct Gated {
    gates: Vec<EventFd>,
    pending: BTreeMap<u64, (u16, Chain)>,
    next: u64,
}

impl UringHandler for Gated {
    fn on_init(&mut self, _: &mut UringContext) -> std::io::Result<()> {
        Ok(())
    }

    fn on_kick(&mut self, index: u16, cx: &mut UringContext) -> Progress {
        loop {
            let mut chain = Chain::new();
            if !cx.queues.get(index).unwrap().pop(&mut chain) {
                return Progress::Emptied;
            }
            let token = self.next;
            self.next += 1;
            let gate = self.gates.get(usize::try_from(token).unwrap() % self.gates.len().max(1));
            let entry = gate.map_or_else(
                || opcode::Nop::new().build(),
                |gate| {
                    let readable = u32::try_from(libc::POLLIN).unwrap();
                    opcode::PollAdd::new(types::Fd(gate.as_raw_fd()), readable).build()
                },
            );
            self.pending.insert(token, (index, chain));
            // SAFETY: neither operation carries a pointer.
            unsafe { cx.submit(entry, token) };
        }
    }

    fn on_completion(&mut self, token: u64, result: i32, cx: &mut UringContext) {
        assert!(result >= 0, "operation {token}: {result}");
        let (index, mut chain) = self.pending.remove(&token).expect("an operation of ours");
        cx.queues.get(index).unwrap().push(&mut chain, 0);
    }

    fn on_stopping(&mut self, _: u16, _: &mut UringContext) {}

    fn on_timer(&mut self, _: &mut UringContext) {}
}

/// A worker's thread, its queues' drivers and the gates.
struct Bench {
    drivers: Vec<GuestQueue>,
    gates: Vec<EventFd>,
    control: ControlHandle,
    thread: JoinHandle<()>,
    thread_id: rustix::thread::Pid,
}

fn bench(format: RingFormat, queues: u16, gates: usize, poll: Duration) -> Bench {
    let ram = GuestRam::new(8 << 20).unwrap();
    let memory = ram.shared_memory().unwrap();
    let gates: Vec<EventFd> = (0..gates).map(|_| EventFd::new().unwrap()).collect();
    let handler = Gated {
        gates: gates.iter().map(|g| g.try_clone().unwrap()).collect(),
        pending: BTreeMap::new(),
        next: 0,
    };
    let options = WorkerOptions { poll, ..WorkerOptions::default() };
    let (control, worker_end) = ControlHandle::new(options).unwrap();
    let (tell, told) = sync_channel(1);
    let thread = std::thread::spawn(move || {
        tell.send(rustix::thread::gettid()).unwrap();
        UringLoop::new(handler).unwrap().run(&worker_end);
    });
    let thread_id = told.recv().unwrap();
    let mut drivers = Vec::new();
    for index in 0..queues {
        let driver = GuestQueue::new(&ram, SIZE, format.features()).unwrap();
        control.send(Command::Start(Box::new(device_side(&driver, index, &memory))));
        drivers.push(driver);
    }
    Bench { drivers, gates, control, thread, thread_id }
}

fn device_side(driver: &GuestQueue, index: u16, memory: &Arc<SharedMemory>) -> Queue {
    let shared = |fd: &EventFd| Arc::new(fd.try_clone().unwrap());
    QueueSetup {
        index,
        size: SIZE,
        features: driver.features(),
        addresses: driver.addresses(),
        base: driver.initial_base(),
        kick: Some(shared(driver.kick_fd())),
        call: Call::Fd(shared(driver.call_fd())),
        err: Some(shared(driver.err_fd())),
        inflight: None,
        memory: memory.clone(),
        metrics: Arc::default(),
    }
    .start()
    .unwrap()
}

impl Bench {
    fn add(&mut self, queue: usize, cookies: std::ops::Range<u64>) {
        let driver = &mut self.drivers[queue];
        let at = driver.ram().regions()[0].info().guest_addr + 0x1000;
        for cookie in cookies {
            assert!(driver.add(&[Buffer::readable(at, 8)], cookie));
        }
        driver.kick();
    }

    fn wait(&mut self, queue: usize) -> u64 {
        self.drivers[queue].wait(LONG).unwrap().cookie
    }

    /// What the worker's thread has been on a CPU.
    fn on_cpu(&self) -> Duration {
        let path = format!("/proc/self/task/{}/schedstat", self.thread_id.as_raw_nonzero());
        let stat = std::fs::read_to_string(path).unwrap();
        Duration::from_nanos(stat.split_ascii_whitespace().next().unwrap().parse().unwrap())
    }

    /// Ends the session, as when the front end leaves.
    fn end(self) {
        drop(self.control);
        self.thread.join().unwrap();
    }
}

#[test]
fn requests_complete_in_the_order_in_which_the_kernel_is_done() {
    for format in RingFormat::ALL {
        let mut b = bench(format, 1, 3, Duration::ZERO);
        b.add(0, 0..3);
        for gate in [2, 0, 1u64] {
            b.gates[usize::try_from(gate).unwrap()].signal();
            assert_eq!(b.wait(0), gate, "{format:?}");
        }
        b.end();
    }
}

#[test]
fn more_operations_than_the_ring_holds_are_all_done() {
    for (format, poll) in [
        (RingFormat::Split, Duration::ZERO),
        (RingFormat::Packed, Duration::ZERO),
        (RingFormat::Split, Duration::from_millis(1)),
    ] {
        let mut b = bench(format, 1, 0, poll);
        for round in 0..5u64 {
            let first = round * u64::from(SIZE);
            b.add(0, first..first + u64::from(SIZE));
            let mut done: Vec<u64> = (0..SIZE).map(|_| b.wait(0)).collect();
            done.sort_unstable();
            assert_eq!(done, (first..first + u64::from(SIZE)).collect::<Vec<_>>());
        }
        b.end();
    }
}

#[test]
fn a_stop_waits_for_what_is_in_flight_and_takes_nothing_new() {
    for format in RingFormat::ALL {
        let mut b = bench(format, 2, 1, Duration::ZERO);
        b.add(0, 0..2);
        std::thread::sleep(WHILE);
        let (reply, answer) = sync_channel(1);
        b.control.send(Command::Stop { index: 0, reply });
        // Kicked in the middle of draining.
        b.add(0, 2..4);
        assert!(matches!(answer.recv_timeout(WHILE), Err(RecvTimeoutError::Timeout)));
        b.gates[0].signal();
        let mut queue = answer.recv_timeout(LONG).unwrap().expect("the queue comes back");
        assert_eq!((queue.in_flight(), queue.has_available()), (0, true));
        // What one gate held may end in any order.
        let mut done = [b.wait(0), b.wait(0)];
        done.sort_unstable();
        assert_eq!(done, [0, 1]);
        assert!(b.drivers[0].used().is_none(), "what came during the drain was not served");
        // The other queue of the worker is served all the same, and this one goes on where it stopped.
        b.add(1, 7..8);
        assert_eq!(b.wait(1), 7);
        queue.publish();
        b.control.send(Command::Start(queue));
        let mut done = [b.wait(0), b.wait(0)];
        done.sort_unstable();
        assert_eq!(done, [2, 3]);
        b.end();
    }
}

#[test]
fn a_queue_that_is_not_here_is_no_reason_to_wait() {
    let b = bench(RingFormat::Split, 1, 0, Duration::ZERO);
    assert!(b.control.stop(5).recv().unwrap().is_none());
    assert!(b.control.stop(0).recv().unwrap().is_some());
    assert!(b.control.stop(0).recv().unwrap().is_none());
    b.end();
}

#[test]
fn the_end_of_the_session_waits_for_the_kernel() {
    let mut b = bench(RingFormat::Split, 1, 1, Duration::ZERO);
    b.add(0, 0..5);
    std::thread::sleep(WHILE);
    drop(b.control);
    std::thread::sleep(WHILE);
    assert!(!b.thread.is_finished(), "operations still refer to guest memory");
    b.gates[0].signal();
    let start = Instant::now();
    b.thread.join().unwrap();
    assert!(start.elapsed() < LONG);
    let used = std::iter::from_fn(|| b.drivers[0].used());
    let mut done: Vec<u64> = used.map(|u| u.cookie).collect();
    done.sort_unstable();
    assert_eq!(done, [0, 1, 2, 3, 4]);
}

#[test]
fn a_queue_that_the_guest_broke_rests_and_the_others_go_on() {
    let mut b = bench(RingFormat::Split, 2, 0, Duration::ZERO);
    b.add(0, 0..1);
    assert_eq!(b.wait(0), 0);
    // An available index that is further than the ring is long.
    let order = std::sync::atomic::Ordering::Release;
    b.drivers[0].areas()[1].store16(2, 0x8000, order);
    b.drivers[0].kick_fd().signal();
    assert!(testkit::driver::wait_readable(b.drivers[0].err_fd(), LONG).unwrap());
    for cookie in 0..50 {
        b.drivers[0].kick_fd().signal();
        b.add(1, cookie..cookie + 1);
        assert_eq!(b.wait(1), cookie);
    }
    let broken = b.control.stop(0).recv().unwrap().expect("it stops like any other");
    assert!(broken.retired().is_some());
    b.end();
}

#[test]
fn another_kick_descriptor_takes_the_place_of_the_first() {
    let mut b = bench(RingFormat::Split, 1, 0, Duration::ZERO);
    b.add(0, 0..1);
    assert_eq!(b.wait(0), 0);
    let kick = Arc::new(EventFd::new().unwrap());
    b.control.send(Command::SetKick(0, Some(kick.clone())));
    std::thread::sleep(WHILE);
    let at = b.drivers[0].ram().regions()[0].info().guest_addr + 0x1000;
    assert!(b.drivers[0].add(&[Buffer::readable(at, 8)], 1));
    b.drivers[0].kick_fd().signal();
    std::thread::sleep(WHILE);
    assert!(b.drivers[0].used().is_none(), "the old descriptor wakes nobody");
    kick.signal();
    assert_eq!(b.wait(0), 1);
    b.end();
}

#[test]
fn a_polling_worker_that_is_idle_goes_to_sleep() {
    let mut b = bench(RingFormat::Split, 1, 0, Duration::from_millis(2));
    for cookie in 0..100 {
        b.add(0, cookie..cookie + 1);
        assert_eq!(b.wait(0), cookie);
    }
    std::thread::sleep(WHILE);
    let before = b.on_cpu();
    std::thread::sleep(5 * WHILE);
    let burnt = b.on_cpu() - before;
    assert!(burnt < Duration::from_millis(5), "{burnt:?} of CPU in {:?} of nothing", 5 * WHILE);
    b.end();
}
