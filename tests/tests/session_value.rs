//! The session is a value: it can be saved while a guest is working, and another process's engine
//! goes on with it; the front end notices a pause and nothing else.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use outboard_common::sys::EventFd;
use outboard_common::vhost_user::session::{Ended, SavedSession, Session, SessionOptions};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::inverter::Inverter;
use testkit::memory::GuestRam;

fn metrics() -> Vec<Arc<outboard_common::metrics::QueueMetrics>> {
    vec![Arc::default(), Arc::default()]
}

/// One request: `byte` repeated, which must come back inverted.
fn invert(ram: &GuestRam, queue: &mut GuestQueue, addr: u64, byte: u8) {
    ram.fill(addr, 64, byte);
    let buffers = [Buffer::readable(addr, 64), Buffer::writable(addr + 64, 64)];
    assert_eq!(queue.request(&buffers, Duration::from_secs(5)).unwrap(), 64);
    assert_eq!(ram.bytes(addr + 64, 64), vec![!byte; 64]);
}

fn goes_on_after_a_hand_over(format: RingFormat) {
    let ram = GuestRam::new(1 << 20).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let shutdown = Arc::new(EventFd::new().unwrap());
    let stop = shutdown.clone();
    let old = std::thread::spawn(move || {
        let mut session =
            Session::new(Arc::new(Inverter), theirs, metrics(), SessionOptions::default());
        assert!(matches!(session.serve_until(&stop), Ended::ShutDown));
        session.save().unwrap()
    });
    let mut front_end = FrontEnd::from_stream(ours).unwrap();
    let options = AttachOptions { queues: 2, ..AttachOptions::new(format) };
    let (mut queues, _inflight) = front_end.attach(&ram, &options).unwrap();
    let addr = ram.alloc(4096, 16).unwrap();
    for i in 0..300u32 {
        let byte = i.to_le_bytes()[0];
        invert(&ram, &mut queues[(i % 2) as usize], addr, byte);
    }
    shutdown.signal();
    let (saved, fds) = old.join().unwrap();
    // As it would travel to another process.
    let saved: SavedSession = serde_json::from_slice(&serde_json::to_vec(&saved).unwrap()).unwrap();
    // A request made while nobody serves must be found by the next one.
    ram.fill(addr, 64, 7);
    assert!(queues[0].add(&[Buffer::readable(addr, 64), Buffer::writable(addr + 64, 64)], 1));
    queues[0].kick();
    let shutdown = Arc::new(EventFd::new().unwrap());
    let stop = shutdown.clone();
    let new = std::thread::spawn(move || {
        let session =
            Session::resume(Arc::new(Inverter), &saved, &fds, metrics(), SessionOptions::default())
                .unwrap();
        drop(fds);
        session.serve(&stop)
    });
    assert_eq!(queues[0].wait(Duration::from_secs(5)).unwrap().len, 64);
    assert_eq!(ram.bytes(addr + 64, 64), vec![!7; 64]);
    for i in 0..300u32 {
        let byte = i.to_le_bytes()[0];
        invert(&ram, &mut queues[(i % 2) as usize], addr, byte);
    }
    // The main socket works too.
    assert_eq!(front_end.get_queue_num().unwrap(), 2);
    drop(front_end);
    assert!(matches!(new.join().unwrap(), Ended::FrontendLeft));
}

#[test]
fn a_split_ring_session_is_saved_and_resumed() {
    goes_on_after_a_hand_over(RingFormat::Split);
}

#[test]
fn a_packed_ring_session_is_saved_and_resumed() {
    goes_on_after_a_hand_over(RingFormat::Packed);
}

/// UML starts packed rings with base 0, DPDK with the available half only.
#[test]
fn a_fresh_packed_ring_starts_whatever_base_the_front_end_knows() {
    for base in [0, 0x8000, 0x8000_8000] {
        let ram = GuestRam::new(1 << 20).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let shutdown = EventFd::new().unwrap();
        let daemon = std::thread::spawn(move || {
            Session::new(Arc::new(Inverter), theirs, metrics(), SessionOptions::default())
                .serve(&shutdown)
        });
        let mut front_end = FrontEnd::from_stream(ours).unwrap();
        let features = front_end.negotiate(RingFormat::Packed.features(), u64::MAX).unwrap();
        front_end.set_mem_table(&ram).unwrap();
        let mut queue = GuestQueue::new(&ram, 8, features).unwrap();
        front_end.start_queue(0, &queue, base).unwrap();
        let addr = ram.alloc(4096, 16).unwrap();
        for byte in 0..50 {
            invert(&ram, &mut queue, addr, byte);
        }
        drop(front_end);
        daemon.join().unwrap();
    }
}
