//! vhost-user-net --switch: guests of one process exchange frames through memory. Needs no privileges.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use testkit::daemon::{self, Daemon, metric};
use testkit::driver::{Buffer, GuestQueue, RingFormat, wait_readable};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::memory::GuestRam;
use virtio_bindings::virtio_net as v;

#[path = "net_switch/pairs.rs"]
mod pairs;

const TIMEOUT: Duration = Duration::from_secs(10);
/// Long enough for a frame that should not come.
const QUIET: Duration = Duration::from_millis(50);
/// A worker takes its queue in well under a millisecond; this is for a busy machine.
const SETTLE: Duration = Duration::from_millis(200);
const BUFFER: u32 = 256;
const HEADER: usize = 12;
const PLAIN: [u8; HEADER] = [0; HEADER];
const NO_MQ: u64 = !(1 << v::VIRTIO_NET_F_MQ);
const ALL: [u8; 6] = [0xff; 6];

/// The address of guest `n`.
fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

fn frame(to: [u8; 6], from: [u8; 6], len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from, &[0x88, 0xb5]].concat();
    frame.extend((frame.len()..len).map(|i| (i % 251) as u8));
    frame
}

/// A running switch; each argument is the rest of a `--port`.
fn switch(dir: &Path, ports: &[&str]) -> (Daemon, PathBuf) {
    switch_with(dir, ports, &[])
}

/// The same with more arguments.
fn switch_with(dir: &Path, ports: &[&str], arguments: &[&str]) -> (Daemon, PathBuf) {
    let metrics = dir.join("metrics.sock");
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.args(arguments).arg("--switch").arg("--metrics-socket").arg(&metrics);
    for (n, rest) in ports.iter().enumerate() {
        command.arg("--port").arg(format!("socket={}{rest}", socket(dir, n).display()));
    }
    let last = socket(dir, ports.len() - 1);
    (Daemon::start_command("vhost-user-net", command, &last).unwrap(), metrics)
}

fn socket(dir: &Path, n: usize) -> PathBuf {
    dir.join(format!("port{n}.sock"))
}

struct Guest {
    frontend: FrontEnd,
    ram: Arc<GuestRam>,
    queues: Vec<GuestQueue>,
    out: u64,
}

impl Guest {
    fn new(dir: &Path, n: usize, format: RingFormat, features: u64, buffers: usize) -> Self {
        Self::with_pairs(dir, n, format, features, buffers, 1)
    }

    /// A guest that has so many queue pairs, with so many buffers each.
    fn with_pairs(
        dir: &Path,
        n: usize,
        format: RingFormat,
        features: u64,
        buffers: usize,
        pairs: usize,
    ) -> Self {
        let ram = GuestRam::new(4 << 20).unwrap();
        let mut frontend = FrontEnd::connect(&socket(dir, n)).unwrap();
        let queues = u16::try_from(2 * pairs + 1).unwrap();
        let options = AttachOptions { features, queues, ..AttachOptions::new(format) };
        let (queues, _) = frontend.attach(&ram, &options).unwrap();
        let out = ram.alloc(1 << 16, 4096).unwrap();
        let mut guest = Self { frontend, ram, queues, out };
        for pair in 0..pairs {
            for _ in 0..buffers {
                let at = guest.ram.alloc(u64::from(BUFFER), 64).unwrap();
                assert!(guest.queues[2 * pair].add(&[Buffer::writable(at, BUFFER)], at));
            }
            guest.queues[2 * pair].kick();
        }
        // A frame that comes before the worker has lent the queue to its port is dropped, as on a wire
        // that is not plugged in yet.
        std::thread::sleep(SETTLE);
        guest
    }

    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        self.send_on(0, &[&header[..], frame].concat());
    }

    /// Sends header and frame on `pair`.
    fn send_on(&mut self, pair: usize, bytes: &[u8]) {
        self.ram.write(self.out, bytes);
        let buffer = Buffer::readable(self.out, u32::try_from(bytes.len()).unwrap());
        self.queues[2 * pair + 1].request(&[buffer], TIMEOUT).unwrap();
    }

    /// The next frame, with its header.
    fn receive(&mut self) -> Vec<u8> {
        self.receive_on(0, TIMEOUT).unwrap()
    }

    /// The next frame of `pair`, with its header, if one comes in time.
    fn receive_on(&mut self, pair: usize, timeout: Duration) -> Option<Vec<u8>> {
        let queue = &mut self.queues[2 * pair];
        let mut frame: Vec<u8> = Vec::new();
        let (mut at, mut buffers) = (0, 1);
        while at < buffers {
            let used = queue.wait(timeout).ok()?;
            frame.extend(self.ram.bytes(used.cookie, used.len as usize));
            if at == 0 {
                buffers = u16::from_le_bytes(frame[10..12].try_into().unwrap());
            }
            at += 1;
            assert!(queue.add(&[Buffer::writable(used.cookie, BUFFER)], used.cookie));
        }
        Some(frame)
    }

    fn expect(&mut self, frame: &[u8]) {
        assert_eq!(&self.receive()[HEADER..], frame);
    }

    fn expect_nothing(&mut self) {
        assert!(self.queues[0].wait(QUIET).is_err());
    }

    /// Bytes before each frame.
    fn header_size(&self) -> usize {
        let has_hash = self.frontend.features & (1 << v::VIRTIO_NET_F_HASH_REPORT) != 0;
        if has_hash { HEADER + 8 } else { HEADER }
    }

    /// Which pair the next frame comes on, and the frame without header.
    fn receive_anywhere(&mut self) -> (usize, Vec<u8>) {
        let pairs = self.queues.len() / 2;
        let start = Instant::now();
        let mut patience = Duration::ZERO;
        while start.elapsed() < TIMEOUT {
            for pair in 0..pairs {
                if let Some(frame) = self.receive_on(pair, patience) {
                    return (pair, frame[self.header_size()..].to_vec());
                }
            }
            patience = Duration::from_micros(200);
        }
        panic!("no frame came");
    }

    /// A control command's answer.
    fn control(&mut self, command: &[u8]) -> u8 {
        self.ram.write(self.out, command);
        let answer = self.out + 32768;
        self.ram.write(answer, &[0xaa]);
        let len = u32::try_from(command.len()).unwrap();
        let chain = [Buffer::readable(self.out, len), Buffer::writable(answer, 1)];
        let queue = self.queues.last_mut().unwrap();
        assert_eq!(queue.request(&chain, TIMEOUT).unwrap(), 1);
        self.ram.bytes(answer, 1)[0]
    }
}

/// Without a control queue there is no third one; a front end that starts it all the same must not get a
/// second worker, which would take the port's receive queue away.
#[test]
fn a_queue_that_a_port_has_not_is_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, _metrics) = switch(dir.path(), &["", ""]);
    let features = NO_MQ & !(1 << v::VIRTIO_NET_F_CTRL_VQ);
    let mut strange = Guest::new(dir.path(), 0, RingFormat::Split, features, 4);
    let mut other = Guest::new(dir.path(), 1, RingFormat::Split, NO_MQ, 4);
    assert!(wait_readable(strange.queues[2].err_fd(), TIMEOUT).unwrap());
    let hello = frame(ALL, mac(1), 60);
    other.send(PLAIN, &hello);
    strange.expect(&hello);
}

#[test]
fn frames_go_from_guest_to_guest_in_every_ring() {
    for format in RingFormat::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (_daemon, metrics) = switch(dir.path(), &["", "", ""]);
        let mut guests: Vec<Guest> =
            (0..3).map(|n| Guest::new(dir.path(), n, format, NO_MQ, 32)).collect();
        let hello = frame(ALL, mac(0), 60);
        guests[0].send(PLAIN, &hello);
        guests[1].expect(&hello);
        guests[2].expect(&hello);
        // Long frames fill many buffers; what is learnt by now goes to one port.
        for len in [60, 1514, 4000] {
            let answer = frame(mac(0), mac(1), len);
            guests[1].send(PLAIN, &answer);
            guests[0].expect(&answer);
        }
        guests[2].expect_nothing();
        assert_eq!(metric(&metrics, "net_tx_frames_total"), 4);
        assert_eq!(metric(&metrics, "net_rx_frames_total"), 5);
    }
}

#[test]
fn offloads_reach_only_who_takes_them() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, metrics) = switch(dir.path(), &["", "", ""]);
    let without = NO_MQ & !(1 << v::VIRTIO_NET_F_GUEST_CSUM | 1 << v::VIRTIO_NET_F_GUEST_TSO4);
    let mut sender = Guest::new(dir.path(), 0, RingFormat::Split, NO_MQ, 32);
    let mut able = Guest::new(dir.path(), 1, RingFormat::Split, NO_MQ, 32);
    let mut plain = Guest::new(dir.path(), 2, RingFormat::Split, without, 32);
    // NEEDS_CSUM from byte 34, to byte 34 + 16.
    let mut header = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    let sent = frame(ALL, mac(0), 61);
    sender.send(header, &sent);
    let got = able.receive();
    assert_eq!((&got[..10], &got[HEADER..]), (&header[..10], &sent[..]));
    let got = plain.receive();
    assert_eq!(got[..10], [0; 10]);
    assert_ne!(got[HEADER + 50..HEADER + 52], sent[50..52]);
    // The sender's number stood in the checksum's place, so that place less it is the sum's complement.
    let sum = |bytes: &[u8]| {
        let words =
            bytes.chunks(2).map(|p| u32::from(p[0]) << 8 | p.get(1).map_or(0, |&b| b.into()));
        words.sum::<u32>() % 0xffff
    };
    let checksum = u32::from(u16::from_be_bytes(got[HEADER + 50..HEADER + 52].try_into().unwrap()));
    assert_eq!((sum(&sent[34..]) + checksum) % 0xffff, 0);
    // A super-frame of TCP.
    (header[1], header[2], header[4]) = (1, 54, 20);
    sender.send(header, &sent);
    assert_eq!(able.receive()[..10], header[..10]);
    plain.expect_nothing();
    assert_eq!(metric(&metrics, "net_rx_unsegmented_total"), 1);
}

/// A guest that did not negotiate segmentation gets the frames of which a super-frame is made.
#[test]
fn a_super_frame_is_cut_for_who_does_not_take_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, metrics) = switch(dir.path(), &["", "", ""]);
    let without = NO_MQ & !(1 << v::VIRTIO_NET_F_GUEST_TSO4);
    let mut sender = Guest::new(dir.path(), 0, RingFormat::Split, NO_MQ, 32);
    let mut able = Guest::new(dir.path(), 1, RingFormat::Packed, NO_MQ, 32);
    let mut plain = Guest::new(dir.path(), 2, RingFormat::Packed, without, 32);
    let mut sent = [&ALL[..], &mac(0), &[8, 0]].concat();
    // IPv4, 20 bytes, TCP from 10.0.0.1 to 10.0.0.2; then TCP with sequence number 7 and PSH, ACK.
    sent.extend([0x45, 0, 0, 0, 0, 9, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    sent.extend([0, 1, 0, 2, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    let payload: Vec<u8> = (0..1000).map(|i| (i % 251) as u8).collect();
    sent.extend(&payload);
    // NEEDS_CSUM and GSO_TCPV4: segments of 400 bytes, the sum of byte 34 on in byte 34 + 16.
    let header = [1, 1, 54, 0, 0x90, 1, 34, 0, 16, 0, 0, 0];
    sender.send(header, &sent);
    assert_eq!(able.receive()[HEADER..], sent[..]);
    for (index, part) in payload.chunks(400).enumerate() {
        let got = plain.receive();
        assert_eq!(got[..10], [0; 10]);
        let got = &got[HEADER..];
        assert_eq!(&got[54..], part);
        assert_eq!(usize::from(u16::from_be_bytes([got[16], got[17]])), 40 + part.len());
        assert_eq!(u16::from_be_bytes([got[18], got[19]]), 9 + index as u16);
        let at = u32::from_be_bytes(got[38..42].try_into().unwrap());
        assert_eq!(at as usize, 7 + 400 * index);
        assert_eq!(got[47], if part.len() < 400 { 0x18 } else { 0x10 });
        let sum = |bytes: &[u8]| {
            bytes.chunks(2).map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum::<u32>() % 0xffff
        };
        assert_eq!(sum(&got[14..34]), 0);
        let pseudo = sum(&got[26..34]) + 6 + 20 + part.len() as u32;
        assert_eq!((pseudo + sum(&got[34..])) % 0xffff, 0);
    }
    plain.expect_nothing();
    assert_eq!(metric(&metrics, "net_rx_unsegmented_total"), 0);
}

#[test]
fn a_slow_guest_harms_nobody_and_one_may_leave() {
    let dir = tempfile::tempdir().unwrap();
    let (_daemon, metrics) = switch(dir.path(), &["", "", ""]);
    let guest = |n, buffers| Guest::new(dir.path(), n, RingFormat::Packed, NO_MQ, buffers);
    let (mut sender, mut slow, mut quick) = (guest(0, 8), guest(1, 4), guest(2, 32));
    let start = Instant::now();
    for _ in 0..300 {
        let frame = frame(ALL, mac(0), 60);
        sender.send(PLAIN, &frame);
        quick.expect(&frame);
    }
    assert!(start.elapsed() < TIMEOUT);
    assert_eq!(metric(&metrics, "net_rx_dropped_total"), 296);
    // Its buffers have been full since; then it goes on where it was.
    let last = frame(mac(1), mac(0), 60);
    (0..4).for_each(|_| drop(slow.receive()));
    sender.send(PLAIN, &last);
    slow.expect(&last);
    // Nobody has heard of that address yet.
    quick.expect(&last);
    drop(slow);
    sender.send(PLAIN, &frame(ALL, mac(0), 60));
    quick.receive();
    let mut again = guest(1, 4);
    let hello = frame(ALL, mac(1), 60);
    again.send(PLAIN, &hello);
    quick.expect(&hello);
    sender.expect(&hello);
}

#[test]
fn ports_are_guarded_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let mac0 = ",mac=02:00:00:00:00:00,isolated=on";
    let (_daemon, metrics) = switch(dir.path(), &[mac0, ",isolated=on", ",rx-packets=1:1"]);
    let mut g: Vec<Guest> =
        (0..3).map(|n| Guest::new(dir.path(), n, RingFormat::Split, NO_MQ, 32)).collect();
    // Another address than its own; and its own, from another port.
    g[0].send(PLAIN, &frame(ALL, mac(7), 60));
    g[1].send(PLAIN, &frame(ALL, mac(0), 60));
    assert_eq!(metric(&metrics, "net_tx_spoofed_total"), 2);
    let hello = frame(ALL, mac(0), 60);
    g[0].send(PLAIN, &hello);
    g[2].expect(&hello);
    g[1].expect_nothing();
    for _ in 0..20 {
        g[0].send(PLAIN, &hello);
    }
    assert!(metric(&metrics, "net_rx_limited_total") >= 18);
}

/// Every frame is recorded once, whoever gets it, and none that may not be sent.
#[test]
fn the_capture_has_what_guests_send() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("switch.pcap");
    let option = ["--pcap", file.to_str().unwrap()];
    let ports = [",mac=02:00:00:00:00:00", "", ""];
    let (_daemon, _metrics) = switch_with(dir.path(), &ports, &option);
    let mut g: Vec<Guest> =
        (0..3).map(|n| Guest::new(dir.path(), n, RingFormat::Split, NO_MQ, 32)).collect();
    let sent = [frame(ALL, mac(0), 60), frame(mac(0), mac(1), 3000), frame(mac(7), mac(2), 14)];
    g[0].send(PLAIN, &frame(ALL, mac(9), 60));
    for (guest, frame) in g.iter_mut().zip(&sent) {
        guest.send(PLAIN, frame);
    }
    assert_eq!(testkit::pcap::frames(&file).unwrap(), sent);
    g[1].expect(&sent[0]);
    g[0].expect(&sent[1]);
}

/// Requests name the port; one that does not is told which there are.
#[test]
fn ports_are_asked_and_changed_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control");
    let option = ["--control-socket", control.to_str().unwrap()];
    let (_daemon, _metrics) = switch_with(dir.path(), &["", ""], &option);
    let both = daemon::ask(&control, r#"{"state": null}"#);
    assert!(both.contains(r#""net0":{"#) && both.contains(r#""net1":{"#), "{both}");
    let one = daemon::ask(&control, r#"{"link": {"device": "net1", "value": false}}"#);
    assert!(one.contains(r#""link":false"#), "{one}");
    let both = daemon::ask(&control, r#"{"state": null}"#);
    assert!(both.contains(r#""link":true"#) && both.contains(r#""link":false"#), "{both}");
    for request in [r#"{"link": false}"#, r#"{"link": {"device": "net7", "value": true}}"#] {
        let answer = daemon::ask(&control, request);
        assert!(answer.contains("error") && answer.contains("net0, net1"), "{answer}");
    }
}

#[test]
fn mistakes_of_the_operator_are_one_sentence() {
    let same = ["socket=/nonexistent/a", "socket=/nonexistent/a"];
    let macs = ["socket=/x/a,mac=02:00:00:00:00:01", "socket=/x/b,mac=02:00:00:00:00:01"];
    for (ports, part) in [(same, "two ports have the socket"), (macs, "two ports have the address")]
    {
        let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
        command.arg("--switch").args(ports.iter().flat_map(|p| ["--port", p]));
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains(part) && text.lines().count() == 1, "{text}");
    }
}
