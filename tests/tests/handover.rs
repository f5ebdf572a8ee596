//! A newer daemon takes the sessions of an older one over: the front end keeps its connection, the guest
//! its queues, and nothing is lost.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::time::{Duration, Instant};

use testkit::daemon::{Daemon, bin};
use testkit::driver::RingFormat;
use testkit::driver::blk::{BlkSlot, RequestType, S_OK, request};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::memory::GuestRam;

const LONG: Duration = Duration::from_secs(20);

fn takes_over(format: RingFormat) {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let socket = dir.path().join("blk");
    let file = format!("--blk-file={}", image.display());
    let handover = format!("--handover-socket={}", dir.path().join("handover").display());
    let mut old =
        Daemon::start("vhost-user-blk", &socket, &[file.clone(), handover.clone()]).unwrap();

    let ram = GuestRam::new(4 << 20).unwrap();
    let mut front_end = FrontEnd::connect(&socket).unwrap();
    let (mut queues, _inflight) = front_end.attach(&ram, &AttachOptions::new(format)).unwrap();
    let slot = BlkSlot::new(&ram, 4096).unwrap();
    slot.set_data(&[0xa5; 512]);
    assert_eq!(request(&mut queues[0], &slot, (RequestType::OUT, 7, 512), LONG).unwrap(), S_OK);

    let mut new = std::process::Command::new(bin("vhost-user-blk").unwrap())
        .arg(format!("--socket-path={}", socket.display()))
        .args([&file, &handover])
        .spawn()
        .unwrap();
    let start = Instant::now();
    while old.is_running() && start.elapsed() < LONG {
        std::thread::sleep(Duration::from_millis(5));
    }
    let left = !old.is_running();
    // On the same connection and queues, whoever serves them now.
    let read = request(&mut queues[0], &slot, (RequestType::IN, 7, 512), LONG);
    let data = slot.data(512);
    let queue_count = front_end.get_queue_num();
    // And the socket takes the next VMM when this one leaves.
    drop(front_end);
    let next = FrontEnd::connect(&socket).and_then(|f| f.get_queue_num());
    let _ = new.kill();
    let _ = new.wait();
    assert!(left, "the old daemon still runs:\n{}", old.log());
    assert_eq!(read.unwrap(), S_OK);
    assert_eq!(data, [0xa5; 512]);
    assert!(queue_count.unwrap() > 0 && next.unwrap() > 0);
}

#[test]
fn a_newer_disk_daemon_takes_over_split_rings() {
    takes_over(RingFormat::Split);
}

#[test]
fn a_newer_disk_daemon_takes_over_packed_rings() {
    takes_over(RingFormat::Packed);
}
