//! A newer daemon takes the sessions of an older one over: the front end keeps its connection, the guest
//! its queues, and nothing is lost.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use testkit::daemon::{Daemon, bin};
use testkit::driver::RingFormat;
use testkit::driver::blk::{BlkSlot, RequestType, S_OK, request};
use testkit::driver::fs::{FsClient, Message};
use testkit::driver::vsock::{GuestStream, VsockGuest, VsockOptions, op};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::memory::GuestRam;
use testkit::vsock_host::read_ok;

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

/// Waits until `old` has ended.
fn has_left(old: &mut Daemon) -> bool {
    let start = Instant::now();
    while old.is_running() && start.elapsed() < LONG {
        std::thread::sleep(Duration::from_millis(5));
    }
    !old.is_running()
}

/// A connection to the hand-over socket, which comes a moment after the one for front ends.
fn visit(path: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Err(_) if start.elapsed() < LONG => std::thread::sleep(Duration::from_millis(1)),
            other => return other.unwrap(),
        }
    }
}

/// Whoever connects and is no newer daemon ends nothing, and is in nobody's way for long.
#[test]
fn a_visitor_to_the_handover_socket_takes_nothing_over() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("blk");
    let path = dir.path().join("handover");
    let arguments = ["--null=1M".to_owned(), format!("--handover-socket={}", path.display())];
    let mut old = Daemon::start("vhost-user-blk", &socket, &arguments).unwrap();
    let front_end = FrontEnd::connect(&socket).unwrap();
    drop(visit(&path));
    visit(&path).write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    let _silent = visit(&path);
    // The greeting's time, and more.
    std::thread::sleep(Duration::from_millis(1500));
    assert!(old.is_running(), "{}", old.log());
    assert!(front_end.get_queue_num().unwrap() > 0);
    let mut new = std::process::Command::new(bin("vhost-user-blk").unwrap())
        .arg(format!("--socket-path={}", socket.display()))
        .args(&arguments)
        .spawn()
        .unwrap();
    let left = has_left(&mut old);
    let answer = front_end.get_queue_num();
    let _ = new.kill();
    let _ = new.wait();
    assert!(left, "the old daemon still runs:\n{}", old.log());
    assert!(answer.unwrap() > 0);
}

#[test]
fn a_newer_file_daemon_takes_over_with_open_files() {
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    std::fs::create_dir_all(shared.join("d")).unwrap();
    std::fs::write(shared.join("d/kept"), "kept").unwrap();
    std::fs::write(shared.join("d/gone"), "gone").unwrap();
    let socket = dir.path().join("fs");
    let arguments = [
        format!("--shared-dir={}", shared.display()),
        format!("--handover-socket={}", dir.path().join("handover").display()),
    ];
    let mut old = Daemon::start("virtiofsd", &socket, &arguments).unwrap();
    let mut client = FsClient::start(&socket, 1, 4).unwrap();
    let parent = client.lookup(1, "d").unwrap();
    let open: Vec<(u64, u64)> = ["kept", "gone"]
        .iter()
        .map(|name| {
            let node = client.lookup(parent, name).unwrap();
            (node, client.open(node, libc::O_RDWR).unwrap())
        })
        .collect();
    std::fs::remove_file(shared.join("d/gone")).unwrap();
    let mut new = std::process::Command::new(bin("virtiofsd").unwrap())
        .arg(format!("--socket-path={}", socket.display()))
        .args(&arguments)
        .spawn()
        .unwrap();
    let left = has_left(&mut old);
    let read: Vec<_> = open
        .iter()
        .map(|&(node, handle)| client.call(Message::read(node, handle, 0, 4)))
        .map(|answer| answer.map(|answer| (answer.errno, answer.len)))
        .collect();
    let again = client.lookup(parent, "kept");
    let fresh = client.open(open[0].0, libc::O_RDONLY);
    let _ = new.kill();
    let _ = new.wait();
    assert!(left, "the old daemon still runs:\n{}", old.log());
    for answer in read {
        assert_eq!(answer.unwrap(), (0, 16 + 4));
    }
    assert_eq!(again.unwrap(), open[0].0, "the node id is the same");
    assert!(fresh.is_ok());
}

/// Connections are the process's own and end; the guest is told, and its listeners stay.
#[test]
fn a_newer_socket_proxy_takes_over() {
    let dir = tempfile::tempdir().unwrap();
    let host = dir.path().join("host");
    let socket = dir.path().join("vmm");
    let arguments = [
        format!("--uds-path={}", host.display()),
        format!("--handover-socket={}", dir.path().join("handover").display()),
    ];
    let mut old = Daemon::start("vsock-proxy", &socket, &arguments).unwrap();
    let mut guest = VsockGuest::start(&socket, VsockOptions::default()).unwrap();
    guest.give_event().unwrap();
    let ask = || {
        let mut stream = UnixStream::connect(&host).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream.write_all(b"CONNECT 80\n").unwrap();
        stream
    };
    let mut stream = ask();
    let request = guest.expect(op::REQUEST).unwrap();
    GuestStream::accept(&mut guest, &request).unwrap();
    read_ok(&mut stream).unwrap();

    let mut new = std::process::Command::new(bin("vsock-proxy").unwrap())
        .arg(format!("--socket-path={}", socket.display()))
        .args(&arguments)
        .spawn()
        .unwrap();
    let left = has_left(&mut old);
    let event = guest.event(LONG);
    let ended = stream.read(&mut [0; 1]);
    // The guest begins anew on the same queues.
    let mut again = ask();
    let request = guest.expect(op::REQUEST);
    let accepted = request.and_then(|request| GuestStream::accept(&mut guest, &request));
    let said = read_ok(&mut again);
    let _ = new.kill();
    let _ = new.wait();
    assert!(left, "the old daemon still runs:\n{}", old.log());
    assert_eq!(event.unwrap(), 0, "TRANSPORT_RESET");
    assert_eq!(ended.unwrap(), 0);
    assert!(accepted.is_ok() && said.is_ok(), "{accepted:?} {said:?}");
}

/// Saves the state of one daemon and loads it into another one, as a migration does.
#[test]
fn a_file_servers_guest_migrates_to_another_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    std::fs::create_dir_all(shared.join("d")).unwrap();
    std::fs::write(shared.join("d/kept"), "kept").unwrap();
    let arguments = [format!("--shared-dir={}", shared.display())];
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let _source = Daemon::start("virtiofsd", &from, &arguments).unwrap();
    let mut client = FsClient::start(&from, 1, 4).unwrap();
    let parent = client.lookup(1, "d").unwrap();
    let node = client.lookup(parent, "kept").unwrap();
    let handle = client.open(node, libc::O_RDWR).unwrap();
    let bases: Vec<u32> =
        [0, 1].iter().map(|&i| client.front_end.get_vring_base(i).unwrap()).collect();
    let (read, write) = rustix::pipe::pipe().unwrap();
    client.front_end.set_device_state_fd(true, write.as_fd()).unwrap();
    drop(write);
    let mut state = Vec::new();
    std::fs::File::from(read).read_to_end(&mut state).unwrap();
    assert!(client.front_end.check_device_state().unwrap());

    let _destination = Daemon::start("virtiofsd", &to, &arguments).unwrap();
    let mut front_end = FrontEnd::connect(&to).unwrap();
    front_end.negotiate(client.queues[0].features(), u64::MAX).unwrap();
    let (read, write) = rustix::pipe::pipe().unwrap();
    front_end.set_device_state_fd(false, read.as_fd()).unwrap();
    std::fs::File::from(write).write_all(&state).unwrap();
    assert!(front_end.check_device_state().unwrap());
    front_end.set_mem_table(client.ram()).unwrap();
    for (index, base) in (0u16..).zip(bases) {
        front_end.start_queue(index, &client.queues[usize::from(index)], base).unwrap();
    }
    client.front_end = front_end;
    let answer = client.call(Message::read(node, handle, 0, 4)).unwrap();
    assert_eq!((answer.errno, answer.len), (0, 16 + 4));
    assert_eq!(client.lookup(parent, "kept").unwrap(), node);
}

#[test]
fn a_newer_disk_daemon_takes_over_split_rings() {
    takes_over(RingFormat::Split);
}

#[test]
fn a_newer_disk_daemon_takes_over_packed_rings() {
    takes_over(RingFormat::Packed);
}
