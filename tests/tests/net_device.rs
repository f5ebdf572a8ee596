//! vhost-user-net over a real socket, with a driver of the testkit on a real tap: frames right and
//! wrong, control commands, the guards.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::net::UdpSocket;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use testkit::daemon::{self, Daemon, metric};
use testkit::driver::{Buffer, GuestQueue, IN_ORDER, RingFormat, wait_readable};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::link_socket::LinkSocket;
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::toolroot::ToolRoot;
use virtio_bindings::virtio_net as v;

const TIMEOUT: Duration = Duration::from_secs(10);
const ME: [u8; 6] = [2, 0, 0, 0, 0, 9];
const HOST_IP: [u8; 4] = [10, 9, 0, 1];
const MY_IP: [u8; 4] = [10, 9, 0, 2];
/// Bytes of each receive buffer.
const BUFFER: u32 = 1600;
const HEADER: usize = 12;
/// Entries of each ring of the test of fairness.
const FLOOD_RING: u16 = 512;

/// A running device on a tap with one attached guest.
struct Bench {
    frontend: FrontEnd,
    ram: Arc<GuestRam>,
    queues: Vec<GuestQueue>,
    /// Where frames to send are put, and room for a control command.
    out: u64,
    metrics: PathBuf,
    namespace: NetNs,
    daemon: Daemon,
    dir: tempfile::TempDir,
}

fn start(namespace: &NetNs, dir: &tempfile::TempDir, arguments: &[&str]) -> (Daemon, PathBuf) {
    let (socket, metrics) = (dir.path().join("net.sock"), dir.path().join("metrics.sock"));
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--socket-path").arg(&socket).arg("--metrics-socket").arg(&metrics);
    command.args(["--tap", "tap0"]).args(arguments);
    namespace.enter(&mut command);
    let daemon = Daemon::start_command("vhost-user-net", command, &socket).unwrap();
    (daemon, metrics)
}

fn bench(format: RingFormat, features: u64, arguments: &[&str]) -> Option<Bench> {
    bench_with(format, features, AttachOptions::new(format).queue_size, arguments)
}

fn bench_with(
    format: RingFormat,
    features: u64,
    queue_size: u16,
    arguments: &[&str],
) -> Option<Bench> {
    let root = ToolRoot::for_test()?;
    let namespace = NetNs::for_test(root)?;
    let dir = tempfile::tempdir().unwrap();
    let (daemon, metrics) = start(&namespace, &dir, arguments);
    namespace.ip(root, "address add 10.9.0.1/24 dev tap0").unwrap();
    let ram = GuestRam::new(16 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    // Without MQ the control queue is queue 2.
    let options = AttachOptions { features, queues: 3, queue_size, ..AttachOptions::new(format) };
    let (queues, _) = frontend.attach(&ram, &options).unwrap();
    let out = ram.alloc(1 << 17, 4096).unwrap();
    let mut bench = Bench { frontend, ram, queues, out, metrics, namespace, daemon, dir };
    for _ in 0..64 {
        bench.give_buffer();
    }
    Some(bench)
}

impl Bench {
    /// Adds a receive buffer whose cookie is its address.
    fn give_buffer(&mut self) {
        let at = self.ram.alloc(u64::from(BUFFER), 64).unwrap();
        self.give_again(at);
    }

    fn give_again(&mut self, at: u64) {
        assert!(self.queues[0].add(&[Buffer::writable(at, BUFFER)], at));
        self.queues[0].kick();
    }

    /// Sends header and frame as one chain and waits until it is used.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        let bytes = [&header[..], frame].concat();
        self.ram.write(self.out, &bytes);
        let buffer = Buffer::readable(self.out, u32::try_from(bytes.len()).unwrap());
        self.queues[1].request(&[buffer], TIMEOUT).unwrap();
    }

    /// The next received frame that `wanted` takes, without header, however many buffers it fills.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            let mut frame: Vec<u8> = Vec::new();
            let mut buffers = 1;
            let mut at = 0;
            while at < buffers {
                let used = self.queues[0].wait(TIMEOUT).unwrap();
                frame.extend(self.ram.bytes(used.cookie, used.len as usize));
                if at == 0 {
                    buffers = u16::from_le_bytes(frame[10..12].try_into().unwrap());
                    assert!(buffers >= 1, "num_buffers 0");
                }
                at += 1;
                self.give_again(used.cookie);
            }
            let frame = frame.split_off(HEADER);
            if wanted(&frame) {
                return frame;
            }
        }
    }

    /// Asks for the host's address and expects the answer: the device works both ways.
    fn expect_arp(&mut self) -> [u8; 6] {
        self.send([0; HEADER], &arp_request(ME, MY_IP));
        let answer = self.receive(|f| f[12..14] == [8, 6] && f[20..22] == [0, 2]);
        assert_eq!(answer[..6], ME);
        assert_eq!(answer[28..32], HOST_IP);
        answer[22..28].try_into().unwrap()
    }

    /// One number of the metrics socket.
    fn metric(&self, name: &str) -> u64 {
        metric(&self.metrics, name)
    }

    /// A control command's answer; `None` when the device wrote none.
    fn control(&mut self, command: &[u8]) -> Option<u8> {
        self.ram.write(self.out, command);
        let answer = self.out + 65536;
        self.ram.write(answer, &[0xaa]);
        let chain = [
            Buffer::readable(self.out, u32::try_from(command.len()).unwrap()),
            Buffer::writable(answer, 1),
        ];
        let len = self.queues[2].request(&chain, TIMEOUT).unwrap();
        (len == 1).then(|| self.ram.bytes(answer, 1)[0])
    }
}

fn arp_request(mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &ip].concat();
    frame.extend([0; 6]);
    frame.extend(HOST_IP);
    frame.resize(60, 0);
    frame
}

const NO_MQ: u64 = !(1 << v::VIRTIO_NET_F_MQ);

#[test]
fn frames_go_both_ways_in_every_ring() {
    for format in RingFormat::ALL {
        for features in [NO_MQ, NO_MQ & !IN_ORDER, 1 << v::VIRTIO_NET_F_CTRL_VQ] {
            let Some(mut b) = bench(format, features, &[]) else { return };
            for _ in 0..200 {
                b.expect_arp();
            }
            assert_eq!(b.frontend.get_queue_num().unwrap(), 3);
            assert_eq!(b.metric("net_tx_frames_total"), 200);
        }
    }
}

#[test]
fn long_frames_fill_several_buffers_and_arrive_whole() {
    for format in RingFormat::ALL {
        for features in [NO_MQ, NO_MQ & !IN_ORDER] {
            let Some(mut b) = bench(format, features, &["--mtu", "65520"]) else { return };
            b.expect_arp();
            let bind = b.namespace.run(|| UdpSocket::bind("10.9.0.1:0").unwrap()).unwrap();
            // Small ones first and between, so that the long ones find small-frame reads.
            for (i, len) in [10, 9000, 20, 60000, 1400, 1600, 3200, 65000, 5].iter().enumerate() {
                let payload: Vec<u8> = (0..*len).map(|n: usize| (n % 251 + i) as u8).collect();
                bind.send_to(&payload, "10.9.0.2:77").unwrap();
                let frame = b.receive(|f| f[12..14] == [8, 0] && f[36..38] == [0, 77]);
                assert!(frame[42..42 + len] == payload[..], "{len} bytes");
            }
            for round in 0..20u8 {
                for len in [4000usize, 30, 20000] {
                    bind.send_to(&vec![round; len], "10.9.0.2:77").unwrap();
                }
                for len in [4000, 30, 20000] {
                    let frame = b.receive(|f| f[12..14] == [8, 0] && f[36..38] == [0, 77]);
                    assert!(frame[42..42 + len].iter().all(|&byte| byte == round), "{len} bytes");
                }
            }
            assert_eq!(b.metric("net_rx_dropped_total"), 0);
        }
    }
}

#[test]
fn lying_frames_are_dropped_and_counted() {
    for format in RingFormat::ALL {
        let Some(mut b) = bench(format, NO_MQ, &[]) else { return };
        let frame = arp_request(ME, MY_IP);
        let header = |flags, gso, hdr_len: u16, size: u16, start: u16, offset: u16| {
            let mut h = [0; HEADER];
            h[0] = flags;
            h[1] = gso;
            for (at, value) in [(2, hdr_len), (4, size), (6, start), (8, offset)] {
                h[at..at + 2].copy_from_slice(&value.to_le_bytes());
            }
            h
        };
        let lies = [
            header(1, 0, 0, 0, 59, 0),
            header(1, 0, 0, 0, 34, 0xffff),
            header(1, 0, 0, 0, 0xffff, 0xffff),
            header(0, 0, 61, 0, 0, 0),
            header(1, 1, 54, 0, 34, 16),
            header(0, 1, 54, 1448, 34, 16),
            header(1, 2, 54, 1448, 34, 16),
            header(1, 0x85, 42, 1000, 34, 6),
        ];
        for lie in lies {
            b.send(lie, &frame);
        }
        b.send([0; HEADER], &frame[..13]);
        // Chains that hold no header, and one that holds nothing to read.
        let short = b.out;
        b.queues[1].request(&[Buffer::readable(short, 5)], TIMEOUT).unwrap();
        b.queues[1].request(&[Buffer::writable(short, 100)], TIMEOUT).unwrap();
        // Longer than any frame.
        let huge: Vec<Buffer> = (0..8).map(|_| Buffer::readable(short, 9000)).collect();
        b.queues[1].request(&huge, TIMEOUT).unwrap();
        assert_eq!(b.metric("net_tx_malformed_total"), lies.len() as u64 + 4);
        assert_eq!(b.metric("net_tx_frames_total"), 0);
        b.expect_arp();
    }
}

#[test]
fn useless_receive_buffers_harm_nobody_else() {
    for format in RingFormat::ALL {
        let Some(mut b) = bench(format, NO_MQ, &[]) else { return };
        b.expect_arp();
        let at = b.out;
        for len in [1, 11, 25] {
            assert!(b.queues[0].add(&[Buffer::writable(at, len)], at));
        }
        assert!(b.queues[0].add(&[Buffer::readable(at, 100)], at));
        // Round the ring, past the bad ones.
        b.send([0; HEADER], &arp_request(ME, MY_IP));
        for _ in 0..200 {
            b.send([0; HEADER], &arp_request(ME, MY_IP));
            loop {
                let used = b.queues[0].wait(TIMEOUT).unwrap();
                if used.cookie == at {
                    assert_eq!(used.len, 0);
                    continue;
                }
                b.give_again(used.cookie);
                break;
            }
        }
    }
}

#[test]
fn every_control_command_is_answered() {
    for format in RingFormat::ALL {
        let Some(mut b) = bench(format, NO_MQ, &[]) else { return };
        let right: &[&[u8]] = &[
            &[0, 0, 1],
            &[0, 1, 1],
            &[0, 5, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[2, 0, 5, 0],
            &[2, 1, 5, 0],
            &[3, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[5, 0, 0x82, 1, 0, 0, 0, 0, 0, 0],
            &[1, 1, 2, 0, 0, 0, 0, 9],
            &[6, 0, 64, 0, 0, 0, 100, 0, 0, 0],
            &[6, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        ];
        for command in right {
            assert_eq!(b.control(command), Some(0), "{command:?}");
            let longer = [command, &[0][..]].concat();
            assert_eq!(b.control(&longer), Some(1), "{longer:?}");
        }
        for wrong in [&[][..], &[0], &[9, 9], &[4, 0, 1, 0], &[5, 0, 1, 0, 0, 0, 0, 0, 0, 0]] {
            assert_eq!(b.control(wrong), Some(1), "{wrong:?}");
        }
        let huge = vec![0; 60000];
        assert_eq!(b.control(&huge), Some(1));
        // No room for the answer.
        let at = b.out;
        assert_eq!(b.queues[2].request(&[Buffer::readable(at, 3)], TIMEOUT).unwrap(), 0);
        b.expect_arp();
    }
}

#[test]
fn the_receive_filter_keeps_strangers_frames_away() {
    let Some(mut b) = bench(RingFormat::Split, NO_MQ, &["--mac", "02:00:00:00:00:09"]) else {
        return;
    };
    b.expect_arp();
    assert_eq!(b.control(&[0, 0, 0]), Some(0));
    let root = ToolRoot::for_test().unwrap();
    b.namespace.ip(root, "neighbour add 10.9.0.77 lladdr 02:00:00:00:00:77 dev tap0").unwrap();
    let socket = b.namespace.run(|| UdpSocket::bind("10.9.0.1:0").unwrap()).unwrap();
    socket.send_to(b"not for you", "10.9.0.77:77").unwrap();
    socket.send_to(b"for you", "10.9.0.2:77").unwrap();
    let frame = b.receive(|f| f[12..14] == [8, 0] && f[36..38] == [0, 77]);
    assert_eq!(&frame[42..49], b"for you");
    assert!(b.metric("net_rx_filtered_total") >= 1);
}

#[test]
fn forged_sources_are_dropped_and_counted() {
    let arguments = ["--mac", "02:00:00:00:00:09", "--allow-ip", "10.9.0.2"];
    let Some(mut b) = bench(RingFormat::Packed, NO_MQ, &arguments) else { return };
    b.send([0; HEADER], &arp_request([2, 0, 0, 0, 0, 8], MY_IP));
    b.send([0; HEADER], &arp_request(ME, [10, 9, 0, 3]));
    assert_eq!(b.metric("net_tx_spoofed_total"), 2);
    // Nor does the front end announce another station in the guest's place.
    assert!(b.frontend.send_rarp([2, 0, 0, 0, 0, 8]).is_err());
    assert!(b.daemon.log().contains("02:00:00:00:00:08"), "{}", b.daemon.log());
    b.frontend.send_rarp(ME).unwrap();
    assert_eq!(b.frontend.get_config(0, 6).unwrap(), ME);
    assert_eq!(b.frontend.features & (1 << v::VIRTIO_NET_F_CTRL_MAC_ADDR), 0);
    b.expect_arp();
}

#[test]
fn limits_slow_a_sender_down() {
    let Some(mut b) = bench(RingFormat::Split, NO_MQ, &["--tx-packets", "100:1"]) else { return };
    let start = Instant::now();
    for _ in 0..30 {
        b.send([0; HEADER], &arp_request(ME, MY_IP));
    }
    let took = start.elapsed();
    assert!(took > Duration::from_millis(250), "{took:?}");
    assert!(took < Duration::from_secs(3), "{took:?}");
}

/// The driver always has frames to send and the host always has some for it: neither direction may get
/// less than half of what the other one gets. One thread offers both, so that no scheduler takes part;
/// a round of it hands the device more frames of both kinds than it moves meanwhile.
#[test]
fn a_flood_one_way_does_not_starve_the_other() {
    for format in RingFormat::ALL {
        let Some(mut b) = bench_with(format, NO_MQ, FLOOD_RING, &[]) else { return };
        b.expect_arp();
        for _ in 64..FLOOD_RING {
            b.give_buffer();
        }
        let frame = [&ME[..], &[2, 0, 0, 0, 0, 1], &[0x88, 0xb5], &[0; 46]].concat();
        b.ram.write(b.out, &[&[0; HEADER][..], &frame].concat());
        let socket = b.namespace.run(|| LinkSocket::sender("tap0").unwrap()).unwrap();
        let (mut sent, mut received, mut unfilled) = (0u64, 0u64, 0u64);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(1) {
            // Until the tap refuses: it is full whenever the device looks.
            unfilled += u64::from((0..64).all(|_| socket.send_copies(&frame, 64) == 64));
            while b.queues[1].used().is_some() {
                sent += 1;
            }
            while b.queues[1].add(&[Buffer::readable(b.out, 72)], 0) {}
            b.queues[1].kick();
            while let Some(used) = b.queues[0].used() {
                assert!(b.queues[0].add(&[Buffer::writable(used.cookie, BUFFER)], used.cookie));
                received += 1;
            }
            b.queues[0].kick();
        }
        eprintln!("{format:?}: {sent} sent, {received} received; tap not filled {unfilled} times");
        assert!(sent > 1000 && received > 1000, "{sent} sent, {received} received");
        assert!(sent <= 2 * received, "{sent} sent starve {received} received");
        assert!(received <= 2 * sent, "{received} received starve {sent} sent");
    }
}

/// More than a gigabit a second: the device looks at the ring of its own accord, asks for next to no kicks,
/// and afterwards for each again.
#[test]
fn kicks_are_asked_for_in_bulk_no_more_and_afterwards_again() {
    for format in RingFormat::ALL {
        let Some(mut b) = bench_with(format, NO_MQ, 256, &[]) else { return };
        b.expect_arp();
        let length = 30_000;
        let mut frame = [&[0; HEADER][..], &[0xff; 6], &ME, &[0x88, 0xb5]].concat();
        frame.resize(length, 0);
        b.ram.write(b.out, &frame);
        let buffer = Buffer::readable(b.out, u32::try_from(length).unwrap());
        let (mut sent, mut used, mut kicks) = (0u64, 0u64, 0u64);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(500) {
            // A few at a time, so that the ring is empty now and then.
            for _ in 0..8 {
                assert!(b.queues[1].add(&[buffer], 0));
                sent += 1;
            }
            kicks += u64::from(b.queues[1].kick());
            for _ in 0..8 {
                b.queues[1].poll_used(TIMEOUT).unwrap();
                used += 1;
            }
        }
        eprintln!("{format:?}: {sent} frames, {kicks} kicks");
        assert_eq!(sent, used);
        assert!(kicks * 8 <= sent / 2, "{kicks} kicks for {sent} frames");
        // It is quiet now: the device sleeps, and is woken by a frame.
        std::thread::sleep(Duration::from_millis(50));
        assert!(b.queues[1].add(&[buffer], 0));
        assert!(b.queues[1].kick(), "the device asked for no kick");
        b.queues[1].wait(TIMEOUT).unwrap();
        b.expect_arp();
    }
}

#[test]
fn front_ends_come_and_go_and_one_may_be_killed() {
    let Some(mut b) = bench(RingFormat::Split, NO_MQ, &[]) else { return };
    b.expect_arp();
    let Bench { frontend, ram, queues, out, metrics, namespace, mut daemon, dir } = b;
    drop(frontend);
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    let options =
        AttachOptions { features: NO_MQ, queues: 3, ..AttachOptions::new(RingFormat::Packed) };
    let fresh = GuestRam::new(16 << 20).unwrap();
    let (fresh_queues, inflight) = frontend.attach(&fresh, &options).unwrap();
    drop((ram, queues, out));
    let out = fresh.alloc(1 << 17, 4096).unwrap();
    let mut b =
        Bench { frontend, ram: fresh, queues: fresh_queues, out, metrics, namespace, daemon, dir };
    for _ in 0..64 {
        b.give_buffer();
    }
    b.expect_arp();
    // The daemon dies; its successor goes on with the same rings.
    b.daemon.kill().unwrap();
    let (next, _) = start(&b.namespace, &b.dir, &[]);
    daemon = next;
    let root = ToolRoot::for_test().unwrap();
    // The successor may have come before the tap was gone; then the address is still there.
    b.namespace.ip(root, "address replace 10.9.0.1/24 dev tap0").unwrap();
    b.frontend = FrontEnd::connect(daemon.socket()).unwrap();
    b.frontend.reattach(&b.ram, &b.queues, inflight.as_ref(), GuestQueue::initial_base).unwrap();
    for _ in 0..100 {
        b.expect_arp();
    }
}

#[test]
fn a_client_dials_until_somebody_listens_and_again() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm.sock");
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--client").arg("--socket-path").arg(&path).args(["--tap", "tap0"]);
    namespace.enter(&mut command);
    let mut child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let listener = UnixListener::bind(&path).unwrap();
    for _ in 0..3 {
        let frontend = FrontEnd::accept(&listener).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 3);
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A newer daemon takes over: same connection, same rings, same tap, and what control commands set.
#[test]
fn a_newer_daemon_takes_over_with_the_tap() {
    let handover = tempfile::tempdir().unwrap();
    let option = format!("--handover-socket={}", handover.path().join("h").display());
    for format in RingFormat::ALL {
        let Some(mut b) = bench(format, NO_MQ, &[&option]) else { return };
        b.expect_arp();
        assert_eq!(b.control(&[0, 0, 0]), Some(0));
        assert_eq!(b.control(&[1, 1, 2, 0, 0, 0, 0, 9]), Some(0));
        let (socket, metrics) = (b.dir.path().join("net.sock"), b.dir.path().join("metrics2.sock"));
        let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
        command.arg("--socket-path").arg(&socket).arg("--metrics-socket").arg(&metrics);
        command.args(["--tap", "tap0", &option]);
        b.namespace.enter(&mut command);
        let mut next = command.spawn().unwrap();
        let start = Instant::now();
        while b.daemon.is_running() {
            assert!(start.elapsed() < TIMEOUT, "{}", b.daemon.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        // The tap is the same one: its address is still there, and so is the driver's filter.
        b.metrics = metrics;
        for _ in 0..50 {
            b.expect_arp();
        }
        let root = ToolRoot::for_test().unwrap();
        b.namespace.ip(root, "neighbour add 10.9.0.77 lladdr 02:00:00:00:00:77 dev tap0").unwrap();
        let socket = b.namespace.run(|| UdpSocket::bind("10.9.0.1:0").unwrap()).unwrap();
        socket.send_to(b"not for you", "10.9.0.77:77").unwrap();
        b.expect_arp();
        assert!(b.metric("net_rx_filtered_total") >= 1);
        next.kill().unwrap();
        next.wait().unwrap();
    }
}

/// VIRTIO_NET_F_NOTF_COAL: used entries are there at once, the interrupt comes when the driver said.
#[test]
fn interrupts_are_held_back_as_the_driver_wishes() {
    for format in RingFormat::ALL {
        let Some(mut b) = bench(format, NO_MQ, &[]) else { return };
        b.expect_arp();
        // TX: after 4 frames or 1.5 s: far longer than a busy machine is late.
        let hold = Duration::from_millis(1500);
        assert_eq!(b.control(&[6, 0, 4, 0, 0, 0, 0x60, 0xe3, 0x16, 0]), Some(0));
        let frame = arp_request(ME, MY_IP);
        b.ram.write(b.out, &[&[0; HEADER][..], &frame].concat());
        let send = |b: &mut Bench| {
            b.queues[1].enable_interrupts();
            assert!(b.queues[1].add(&[Buffer::readable(b.out, 72)], 0));
            b.queues[1].kick();
        };
        let start = Instant::now();
        send(&mut b);
        assert!(b.queues[1].poll_used(TIMEOUT).is_ok());
        assert!(start.elapsed() < hold, "not shown at once");
        let rang = wait_readable(b.queues[1].call_fd(), TIMEOUT).unwrap();
        let took = start.elapsed();
        assert!(rang && took >= hold, "interrupted after {took:?}");
        assert!(took < hold + Duration::from_secs(3), "interrupted after {took:?}");
        b.queues[1].call_fd().drain();
        // The fourth frame rings at once.
        let start = Instant::now();
        for _ in 0..4 {
            send(&mut b);
            assert!(b.queues[1].poll_used(TIMEOUT).is_ok());
        }
        assert!(wait_readable(b.queues[1].call_fd(), TIMEOUT).unwrap());
        assert!(start.elapsed() < hold, "{:?}", start.elapsed());
        b.queues[1].call_fd().drain();
        // Both zero: as before.
        assert_eq!(b.control(&[6, 0, 0, 0, 0, 0, 0, 0, 0, 0]), Some(0));
        let start = Instant::now();
        send(&mut b);
        assert!(wait_readable(b.queues[1].call_fd(), TIMEOUT).unwrap());
        assert!(start.elapsed() < hold, "{:?}", start.elapsed());
    }
}
