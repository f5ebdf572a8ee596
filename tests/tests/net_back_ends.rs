//! What a guest may rely on whatever is behind its network card: a tap, a macvtap, a pod's veth.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::collections::HashSet;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use testkit::daemon::{self, Daemon, ask, metric};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::link_socket::segment_datagrams;
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::pcap::{self, Checksum};
use testkit::skip::skip;
use testkit::toolroot::ToolRoot;
use virtio_bindings::virtio_net as v;

const TIMEOUT: Duration = Duration::from_secs(10);
/// Long enough for whatever is on its way.
const QUIET: Duration = Duration::from_millis(300);
const ME: [u8; 6] = [2, 0, 0, 0, 0, 9];
const ME_TEXT: &str = "02:00:00:00:00:09";
const HEADER: usize = 12;
const BUFFER: u32 = 2048;
const NO_MQ: u64 = !(1 << v::VIRTIO_NET_F_MQ);

/// Name spaces, one of which the daemon's interface is in.
struct Place {
    root: &'static ToolRoot,
    /// Has 10.9.0.1, and knows the guest as 10.9.0.2.
    host: NetNs,
    /// The interface there.
    host_link: &'static str,
    /// Where the daemon runs.
    pod: NetNs,
    dir: tempfile::TempDir,
}

/// A name space in which nobody sends of his own accord: the kernel's own frames would wake a device that
/// has forgotten some. Where there is no IPv6, there are none.
fn silent(root: &ToolRoot) -> Option<NetNs> {
    let namespace = NetNs::for_test(root)?;
    let silence = || {
        ["all", "default"].map(|links| {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{links}/disable_ipv6"), "1")
        })
    };
    let _ = namespace.run(silence).unwrap();
    Some(namespace)
}

impl Place {
    /// A tap's host is where the tap is.
    fn of_tap() -> Option<Self> {
        let root = ToolRoot::for_test()?;
        let host = silent(root)?;
        let dir = tempfile::tempdir().unwrap();
        Some(Self { root, pod: host.clone(), host, host_link: "tap0", dir })
    }

    /// A pair of interfaces, `eth0` with the daemon, `veth0` with the host.
    fn of_veth() -> Option<Self> {
        let root = ToolRoot::for_test()?;
        let (host, pod) = (silent(root)?, silent(root)?);
        host.ip(root, "link add veth0 type veth peer name eth0").unwrap();
        host.ip(root, &format!("link set eth0 netns {}", pod.path().display())).unwrap();
        pod.ip(root, "link set eth0 up").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let place = Self { root, host, host_link: "veth0", pod, dir };
        place.settle();
        Some(place)
    }

    /// Gives the host's interface its address, and the guest's neighbour entry.
    fn settle(&self) {
        let link = self.host_link;
        for line in [
            format!("link set {link} up"),
            format!("address replace 10.9.0.1/24 dev {link}"),
            format!("neighbour replace 10.9.0.2 lladdr {ME_TEXT} dev {link}"),
        ] {
            self.host.ip(self.root, &line).unwrap();
        }
    }

    /// Makes a macvtap beside `eth0`; gives its device, if the kernel shows it in /dev here.
    fn macvtap(&self, offset: u32) -> Option<PathBuf> {
        // Device files are named by index, for all name spaces alike.
        let index = offset + std::process::id();
        let line = format!("link add link eth0 name mv0 index {index} type macvtap mode bridge");
        self.pod.ip(self.root, &line).unwrap();
        self.pod.ip(self.root, "link set mv0 up").unwrap();
        let device = PathBuf::from(format!("/dev/tap{index}"));
        if !device.exists() {
            skip("the kernel's new devices do not appear in /dev here");
            return None;
        }
        Some(device)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The daemon with a metrics and a control socket.
    fn start(&self, arguments: &[&str]) -> Daemon {
        let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
        for (option, name) in [
            ("--socket-path", "s"),
            ("--metrics-socket", "metrics"),
            ("--control-socket", "control"),
        ] {
            command.arg(option).arg(self.path(name));
        }
        self.pod.enter(command.args(arguments));
        Daemon::start_command("vhost-user-net", command, &self.path("s")).unwrap()
    }

    fn ask(&self, request: &str) -> String {
        ask(&self.path("control"), request)
    }

    /// The sum of one metric over all queues.
    fn metric(&self, name: &str) -> u64 {
        metric(&self.path("metrics"), name)
    }

    /// A socket of the host's that is connected to the guest's port 77.
    fn host_socket(&self) -> UdpSocket {
        let made = self.host.run(|| {
            let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
            socket.connect("10.9.0.2:77").unwrap();
            socket
        });
        made.unwrap()
    }
}

/// A driver of the testkit with its rings.
struct Guest {
    frontend: FrontEnd,
    ram: Arc<GuestRam>,
    queues: Vec<GuestQueue>,
    out: u64,
}

impl Guest {
    fn attach(socket: &Path, format: RingFormat, features: u64, queues: u16) -> Self {
        Self::attach_to(FrontEnd::connect(socket).unwrap(), format, features, queues)
    }

    fn attach_to(mut frontend: FrontEnd, format: RingFormat, features: u64, queues: u16) -> Self {
        let ram = GuestRam::new(16 << 20).unwrap();
        let options = AttachOptions { features, queues, ..AttachOptions::new(format) };
        let (queues, _) = frontend.attach(&ram, &options).unwrap();
        let out = ram.alloc(1 << 17, 4096).unwrap();
        let mut guest = Self { frontend, ram, queues, out };
        // All queues but a last one that is alone are pairs.
        for queue in (0..guest.queues.len() - 1).step_by(2) {
            for _ in 0..64 {
                let at = guest.ram.alloc(BUFFER.into(), 64).unwrap();
                guest.give(queue, at);
            }
        }
        guest
    }

    fn give(&mut self, queue: usize, at: u64) {
        assert!(self.queues[queue].add(&[Buffer::writable(at, BUFFER)], at));
        self.queues[queue].kick();
    }

    /// What has been received in `queue`, or comes soon: header and frame, of one buffer each.
    fn received(&mut self, queue: usize, soon: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + soon;
        loop {
            if let Some(used) = self.queues[queue].used() {
                let bytes = self.ram.bytes(used.cookie, used.len as usize);
                self.give(queue, used.cookie);
                return Some(bytes);
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The source ports of all datagrams for port 77 in `queue`, until none came for a moment.
    fn source_ports(&mut self, queue: usize) -> HashSet<u16> {
        let mut ports = HashSet::new();
        while let Some(bytes) = self.received(queue, QUIET) {
            let frame = &bytes[HEADER..];
            if frame[12..14] == [8, 0] && frame[36..38] == [0, 77] {
                ports.insert(u16::from_be_bytes([frame[34], frame[35]]));
            }
        }
        ports
    }

    /// The next datagram's payload.
    fn datagram(&mut self) -> Vec<u8> {
        loop {
            let bytes = self.received(0, TIMEOUT).expect("a datagram");
            let frame = &bytes[HEADER..];
            if frame[12..14] == [8, 0] && frame[36..38] == [0, 77] {
                return frame[42..].to_vec();
            }
        }
    }

    fn send(&mut self, frame: &[u8]) {
        self.ram.write(self.out, &[&[0; HEADER], frame].concat());
        let len = u32::try_from(HEADER + frame.len()).unwrap();
        self.queues[1].request(&[Buffer::readable(self.out, len)], TIMEOUT).unwrap();
    }

    fn control(&mut self, queue: usize, command: &[u8]) {
        self.ram.write(self.out, command);
        let answer = self.out + 65536;
        self.ram.write(answer, &[0xaa]);
        let chain = [
            Buffer::readable(self.out, u32::try_from(command.len()).unwrap()),
            Buffer::writable(answer, 1),
        ];
        self.queues[queue].request(&chain, TIMEOUT).unwrap();
        assert_eq!(self.ram.bytes(answer, 1), [0], "{command:?}");
    }
}

/// A datagram of the guest to `port` of 10.9.0.1, without a UDP checksum.
fn datagram_to(port: u16, text: &[u8]) -> Vec<u8> {
    let udp = 8 + u16::try_from(text.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 9, 0, 2, 10, 9, 0, 1]);
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&(!folded).to_be_bytes());
    // Broadcast, so that nobody's address need be known.
    let mut frame = [&[0xff; 6][..], &ME, &[8, 0], &ip, &[0, 77]].concat();
    frame.extend(port.to_be_bytes());
    frame.extend(udp.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(text);
    frame
}

/// Datagrams of 32 flows from the host to the guest; gives their source ports.
fn flows(place: &Place) -> HashSet<u16> {
    let sockets: Vec<_> = (0..32).map(|_| place.host_socket()).collect();
    sockets.iter().for_each(|socket| assert_eq!(socket.send(b"flow").unwrap(), 4));
    sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect()
}

/// The daemon has two pairs of queues, and its guest may serve fewer: every flow reaches one that is served.
fn flows_reach_queues_that_are_served(place: &Place, arguments: &[&str]) {
    let daemon = place.start(&[arguments, &["--queue-pairs", "2"]].concat());
    place.settle();
    let mut one = Guest::attach(daemon.socket(), RingFormat::Split, NO_MQ, 3);
    let sent = flows(place);
    assert_eq!(one.source_ports(0), sent, "a driver of one pair");
    drop(one);
    // A driver of two, which first uses one of them.
    let mut two = Guest::attach(daemon.socket(), RingFormat::Packed, u64::MAX, 5);
    // An answer: the control queue is served.
    two.control(4, &[0, 0, 1]);
    let sent = flows(place);
    assert_eq!(two.source_ports(0), sent, "one of two pairs");
    two.control(4, &[4, 0, 2, 0]);
    let sent = flows(place);
    let (first, second) = (two.source_ports(0), two.source_ports(2));
    assert!(!first.is_empty() && !second.is_empty(), "{} and {}", first.len(), second.len());
    assert_eq!(&first | &second, sent, "both pairs");
    two.control(4, &[4, 0, 1, 0]);
    let sent = flows(place);
    assert_eq!(two.source_ports(0), sent, "one pair again");
    two.control(4, &[4, 0, 2, 0]);
    // The machine boots anew, on the same connection: its firmware knows one pair only.
    for queue in 0..5 {
        two.frontend.get_vring_base(queue).unwrap();
    }
    let mut firmware = Guest::attach_to(two.frontend, RingFormat::Split, NO_MQ, 3);
    let sent = flows(place);
    assert_eq!(firmware.source_ports(0), sent, "another driver");
}

#[test]
fn a_taps_flows_reach_queues_that_are_served() {
    let Some(place) = Place::of_tap() else { return };
    flows_reach_queues_that_are_served(&place, &["--tap", "tap0"]);
}

#[test]
fn a_veths_flows_reach_queues_that_are_served() {
    let Some(place) = Place::of_veth() else { return };
    flows_reach_queues_that_are_served(&place, &["--packet", "eth0"]);
}

#[test]
fn a_macvtaps_flows_reach_queues_that_are_served() {
    let Some(place) = Place::of_veth() else { return };
    let Some(device) = place.macvtap(2_000_000) else { return };
    // Its own address is not the one that the host knows the guest by: the guest's becomes its own.
    let arguments = ["--macvtap", device.to_str().unwrap(), "--mac", ME_TEXT];
    flows_reach_queues_that_are_served(&place, &arguments);
}

/// Nothing passes an unplugged cable, whatever the guest does, and nothing comes late.
fn an_unplugged_cable_carries_nothing(place: &Place, arguments: &[&str]) {
    let daemon = place.start(arguments);
    place.settle();
    let mut guest = Guest::attach(daemon.socket(), RingFormat::Split, NO_MQ, 3);
    let socket = place.host_socket();
    let port = socket.local_addr().unwrap().port();
    socket.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut heard = [0; 16];
    for round in 0..2u8 {
        guest.send(&datagram_to(port, &[b'a', round]));
        assert_eq!(socket.recv(&mut heard).unwrap(), 2);
        assert_eq!(heard[..2], [b'a', round]);
        socket.send(&[b'b', round]).unwrap();
        assert_eq!(guest.datagram(), [b'b', round]);
        assert!(place.ask(r#"{"link": false}"#).contains(r#""link":false"#));
        guest.send(&datagram_to(port, b"lost"));
        // A tap's host sees that its link is down.
        let _ = socket.send(b"lost too");
        std::thread::sleep(QUIET);
        assert!(place.ask(r#"{"link": true}"#).contains(r#""link":true"#));
        place.settle();
    }
}

#[test]
fn an_unplugged_tap_carries_nothing() {
    let Some(place) = Place::of_tap() else { return };
    an_unplugged_cable_carries_nothing(&place, &["--tap", "tap0"]);
}

#[test]
fn an_unplugged_veth_carries_nothing() {
    let Some(place) = Place::of_veth() else { return };
    an_unplugged_cable_carries_nothing(&place, &["--packet", "eth0"]);
}

/// Somebody gives the interface another name, and its name to another interface.
#[test]
fn a_renamed_interface_is_still_the_same() {
    for packet in [false, true] {
        let Some(place) = (if packet { Place::of_veth() } else { Place::of_tap() }) else { return };
        let name = if packet { "eth0" } else { "tap0" };
        let _daemon = place.start(&[if packet { "--packet" } else { "--tap" }, name]);
        for line in [
            &format!("link set {name} down"),
            &format!("link set {name} name other"),
            "link set other up",
            &format!("link add {name} type veth peer name {name}p"),
        ] {
            place.pod.ip(place.root, line).unwrap();
        }
        assert!(place.ask(r#"{"mtu": 1400}"#).contains(r#""mtu":1400"#), "{name}");
        assert!(place.ask(r#"{"mtu": 3000}"#).contains(r#""mtu":3000"#), "{name}");
        let mtu_of = |link: &'static str| {
            let interfaces = || vhost_user_net::sys::Interfaces::new().unwrap();
            place.pod.run(move || interfaces().mtu(&link.parse().unwrap()).unwrap()).unwrap()
        };
        assert_eq!((mtu_of("other"), mtu_of(name)), (3000, 1500));
    }
}

/// A card slower than the guest: frames wait in the guest's ring until there is room, and none is lost.
fn a_slow_card_loses_nothing(place: &Place, arguments: &[&str]) {
    /// More bytes than any send buffer holds.
    const FRAMES: u64 = 8000;
    let mut tc = place.root.command("tc").unwrap();
    place
        .pod
        .enter(tc.args("qdisc add dev eth0 root tbf rate 400mbit burst 64k limit 64m".split(' ')));
    if !tc.status().unwrap().success() {
        return skip("this kernel has no tbf");
    }
    let daemon = place.start(arguments);
    place.settle();
    let mut guest = Guest::attach(daemon.socket(), RingFormat::Split, NO_MQ, 3);
    let frame = datagram_to(9, &[0; 1400]);
    guest.ram.write(guest.out, &[&[0; HEADER][..], &frame].concat());
    let buffer = Buffer::readable(guest.out, u32::try_from(HEADER + frame.len()).unwrap());
    let (mut given, mut used) = (0, 0);
    let start = Instant::now();
    while used < FRAMES {
        assert!(start.elapsed() < TIMEOUT, "{used} of {given} frames used");
        while given < FRAMES && guest.queues[1].add(&[buffer], 0) {
            given += 1;
        }
        guest.queues[1].kick();
        while guest.queues[1].used().is_some() {
            used += 1;
        }
        std::thread::yield_now();
    }
    eprintln!("{FRAMES} frames in {:?}", start.elapsed());
    assert_eq!(place.metric("net_tx_failed_total"), 0);
    assert_eq!(place.metric("net_tx_frames_total"), FRAMES);
    // The card was the narrow place: 8,000 frames of 11.6 kbit less what buffers hold.
    assert!(start.elapsed() > Duration::from_millis(50), "{:?}", start.elapsed());
}

#[test]
fn a_macvtap_on_a_slow_card_loses_nothing() {
    let Some(place) = Place::of_veth() else { return };
    let Some(device) = place.macvtap(3_000_000) else { return };
    a_slow_card_loses_nothing(&place, &["--macvtap", device.to_str().unwrap()]);
}

/// The host's side leaves checksums and cutting to the reader; a driver that did not negotiate that, or
/// switched it off since, gets datagrams that are whole.
fn a_guest_gets_frames_that_it_takes(place: &Place, arguments: &[&str]) {
    let every = [
        v::VIRTIO_NET_F_GUEST_CSUM,
        v::VIRTIO_NET_F_GUEST_TSO4,
        v::VIRTIO_NET_F_GUEST_TSO6,
        v::VIRTIO_NET_F_GUEST_ECN,
        v::VIRTIO_NET_F_GUEST_UFO,
        v::VIRTIO_NET_F_GUEST_USO4,
        v::VIRTIO_NET_F_GUEST_USO6,
    ];
    let offloads = every.iter().fold(0, |bits, bit| bits | 1u64 << bit);
    let no_udp = offloads & !(1 << v::VIRTIO_NET_F_GUEST_USO4 | 1 << v::VIRTIO_NET_F_GUEST_USO6);
    let daemon = place.start(arguments);
    place.settle();
    let socket = place.host_socket();
    segment_datagrams(&socket, 1000).unwrap();
    let payload: Vec<u8> = (0..9500).map(|i| (i % 251) as u8).collect();
    for format in RingFormat::ALL {
        // A driver of before UDP's segmentation, one without offloads, one that gives them up.
        for (features, later) in [
            (NO_MQ & !offloads | no_udp, None),
            (NO_MQ & !offloads, None),
            (NO_MQ & !(1 << v::VIRTIO_NET_F_MRG_RXBUF), Some(0u64)),
        ] {
            let mut guest = Guest::attach(daemon.socket(), format, features, 3);
            if let Some(later) = later {
                guest.control(2, &[&[5, 0][..], &later.to_le_bytes()].concat());
            }
            assert_eq!(socket.send(&payload).unwrap(), payload.len());
            let mut got = Vec::new();
            while got.len() < payload.len() {
                let bytes = guest.received(0, TIMEOUT).expect("the whole payload");
                let (header, frame) = bytes.split_at(HEADER);
                if frame[12..14] != [8, 0] || frame[36..38] != [0, 77] {
                    continue;
                }
                assert_eq!(header[1], 0, "a super-frame");
                if features & (1 << v::VIRTIO_NET_F_GUEST_CSUM) == 0 || later.is_some() {
                    assert_eq!(header[0], 0, "a checksum is left to the guest");
                    assert_eq!(pcap::checksum(frame), Checksum::Right);
                }
                assert!(frame.len() <= 42 + 1000);
                got.extend_from_slice(&frame[42..]);
            }
            assert!(got == payload, "{format:?}");
        }
    }
    assert_eq!(place.metric("net_rx_unsegmented_total"), 0);
    assert_eq!(place.metric("net_rx_dropped_total"), 0);
}

#[test]
fn a_guest_on_a_tap_gets_frames_that_it_takes() {
    let Some(place) = Place::of_tap() else { return };
    a_guest_gets_frames_that_it_takes(&place, &["--tap", "tap0"]);
}

#[test]
fn a_guest_on_a_veth_gets_frames_that_it_takes() {
    let Some(place) = Place::of_veth() else { return };
    a_guest_gets_frames_that_it_takes(&place, &["--packet", "eth0"]);
}

#[test]
fn a_guest_on_a_macvtap_gets_frames_that_it_takes() {
    let Some(place) = Place::of_veth() else { return };
    let Some(device) = place.macvtap(4_000_000) else { return };
    let arguments = ["--macvtap", device.to_str().unwrap(), "--mac", ME_TEXT];
    a_guest_gets_frames_that_it_takes(&place, &arguments);
}
