//! Real guests on `vhost-user-net`: traffic both ways on every back end and VMM.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use testkit::daemon::{self, Daemon, ask};
use testkit::guests::qemu::QemuGuest;
use testkit::guests::uml::UmlGuest;
use testkit::guests::{GuestResult, Job, VirtioId};
use testkit::netns::NetNs;
use testkit::pcap::{self, Checksum};
use testkit::service::Service;
use testkit::skip::skip;
use testkit::toolroot::ToolRoot;
use vhost_user_net::sys::{attach_tap, open_tap_device};

/// Far above what a boot takes, so that only a hang reaches it.
const TIMEOUT: Duration = Duration::from_secs(20);
/// QEMU emulates the CPU.
const EMULATED_TIMEOUT: Duration = Duration::from_secs(150);

/// The guest's part: an address, pings, TCP and UDP both ways.
const TRAFFIC: &str = r#"
ip link set eth0 mtu "$MTU" up
ip address add 10.9.0.2/24 dev eth0
ping -c 3 -i 0.2 -W 3 10.9.0.1
ping -c 2 -i 0.2 -W 3 -s 4000 10.9.0.1
for direction in upload download; do
    case $direction in upload) option= ;; download) option=-R ;; esac
    iperf3 -c 10.9.0.1 -t 2 -f m $option >/tmp/report
    rate=$(awk '/receiver/ { print $7 }' /tmp/report)
    [ "${rate%.*}" -gt 0 ]
    echo "result ${direction}_mbit $rate"
    iperf3 -c 10.9.0.1 -u -b 50M -t 1 -f m $option >/tmp/report
    rate=$(awk '/receiver/ { print $7 }' /tmp/report)
    [ "${rate%.*}" -gt 0 ]
    echo "result ${direction}_udp_mbit $rate"
done
"#;

/// The guest's part where it is enough that traffic goes both ways: an address, pings, TCP.
const EXCHANGE: &str = r#"
ip link set eth0 up
ip address add 10.9.0.2/24 dev eth0
ping -c 2 -i 0.2 -W 3 10.9.0.1
for option in "" -R; do
    iperf3 -c 10.9.0.1 -n 20M -f m $option >/tmp/report
    rate=$(awk '/receiver/ { print $7 }' /tmp/report)
    [ "${rate%.*}" -gt 0 ]
done
"#;

/// The daemon, in `namespace` if there is one.
fn start(namespace: Option<&NetNs>, dir: &Path, arguments: &[&str]) -> Daemon {
    let socket = dir.join("net.sock");
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--socket-path").arg(&socket).args(arguments);
    if let Some(namespace) = namespace {
        namespace.enter(&mut command);
    }
    Daemon::start_command("vhost-user-net", command, &socket).unwrap()
}

/// The daemon on a tap that it makes in `namespace`, with the host's end of the network set up.
fn tap_daemon(root: &ToolRoot, namespace: &NetNs, dir: &Path, arguments: &[&str]) -> Daemon {
    let daemon = start(Some(namespace), dir, &[&["--tap", "tap0"], arguments].concat());
    namespace.ip(root, "address replace 10.9.0.1/24 dev tap0").unwrap();
    daemon
}

/// The same with a control socket.
fn steered_daemon(root: &ToolRoot, namespace: &NetNs, dir: &Path) -> (Daemon, PathBuf) {
    let control = dir.join("control");
    let option = ["--control-socket", control.to_str().unwrap()];
    (tap_daemon(root, namespace, dir, &option), control)
}

fn iperf_server(root: &ToolRoot, namespace: &NetNs, dir: &Path) -> Service {
    let mut server = root.command("iperf3").unwrap();
    namespace.enter(server.args(["--server", "--forceflush"]));
    Service::start("iperf3", server, dir, "listening on").unwrap()
}

fn expect_rates(result: &GuestResult, least_mbit: f64) {
    result.expect_success();
    for direction in ["upload_mbit", "download_mbit"] {
        let rate: f64 = result.value(direction).unwrap().parse().unwrap();
        eprintln!("{direction}: {rate}");
        assert!(rate > least_mbit, "{direction}: {rate} Mbit/s");
    }
}

fn uml_on_a_tap(mtu: &str) {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let daemon = tap_daemon(root, &namespace, dir.path(), &["--mtu", mtu]);
    let _server = iperf_server(root, &namespace, dir.path());
    let guest = UmlGuest::new(root).device(daemon.socket(), VirtioId::Net);
    let job = Job::from_script(TRAFFIC)
        .tool("/usr/bin/iperf3")
        .tool("/usr/lib/x86_64-linux-gnu/libgcc_s.so.1")
        .set("MTU", mtu);
    let result = guest.run(&job, TIMEOUT).unwrap();
    eprintln!("daemon: {:?}\n{}", daemon.cpu_time().unwrap(), daemon.log());
    expect_rates(&result, 300.0);
}

#[test]
fn uml_on_a_tap_with_the_usual_mtu() {
    uml_on_a_tap("1500");
}

#[test]
fn uml_on_a_tap_with_a_large_mtu() {
    uml_on_a_tap("65520");
}

#[test]
fn qemu_with_two_queue_pairs_on_a_tap() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let daemon = tap_daemon(root, &namespace, dir.path(), &["--queue-pairs", "2"]);
    let _server = iperf_server(root, &namespace, dir.path());
    let arguments = [
        "-netdev",
        "vhost-user,id=net-@,chardev=@,queues=2",
        "-device",
        "virtio-net-pci,netdev=net-@,mq=on,packed=on",
    ];
    let guest = QemuGuest::new(root)
        .device_arguments(daemon.socket(), arguments.map(str::to_owned).to_vec());
    let job = Job::from_script(TRAFFIC)
        .tool("/usr/bin/iperf3")
        .tool("/usr/lib/x86_64-linux-gnu/libgcc_s.so.1")
        .set("MTU", "1500");
    let result = guest.run(&job, EMULATED_TIMEOUT).unwrap();
    eprintln!("{}", daemon.log());
    expect_rates(&result, 20.0);
}

/// A guest on `daemon` exchanges data with 10.9.0.1 in `host`.
fn exchange(root: &'static ToolRoot, host: &NetNs, dir: &Path, daemon: &Daemon) {
    let _server = iperf_server(root, host, dir);
    let guest = UmlGuest::new(root).device(daemon.socket(), VirtioId::Net);
    guest.run(&Job::from_script(EXCHANGE), TIMEOUT).unwrap().expect_success();
}

/// A pod's name space as a bridge plug-in of CNI leaves it, but for the bridge: `eth0` with an address
/// and a default route, and its peer on the host with the gateway's address.
fn pod(root: &ToolRoot, host: &NetNs) -> Option<NetNs> {
    let pod = NetNs::for_test(root)?;
    host.ip(root, "link add veth0 type veth peer name eth0").unwrap();
    host.ip(root, &format!("link set eth0 netns {}", pod.path().display())).unwrap();
    host.ip(root, "address add 10.9.0.1/24 dev veth0").unwrap();
    host.ip(root, "link set veth0 up").unwrap();
    for line in
        ["link set eth0 up", "address add 10.9.0.2/24 dev eth0", "route add default via 10.9.0.1"]
    {
        pod.ip(root, line).unwrap();
    }
    Some(pod)
}

#[test]
fn uml_in_a_pods_name_space_uses_its_veth() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(host) = NetNs::for_test(root) else { return };
    let Some(pod) = pod(root, &host) else { return };
    let dir = tempfile::tempdir().unwrap();
    let daemon =
        start(None, dir.path(), &["--packet", "eth0", "--netns", pod.path().to_str().unwrap()]);
    // The guest has the pod's addresses now.
    pod.ip(root, "address flush dev eth0").unwrap();
    exchange(root, &host, dir.path(), &daemon);
}

#[test]
fn uml_on_a_tap_in_a_name_space_given_by_path() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(pod) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let daemon =
        start(None, dir.path(), &["--tap", "tap0", "--netns", pod.path().to_str().unwrap()]);
    pod.ip(root, "address add 10.9.0.1/24 dev tap0").unwrap();
    exchange(root, &pod, dir.path(), &daemon);
}

/// What the other guest of a switch does.
const SERVE: &str = r#"
ip link set eth0 up
ip address add 10.9.0.1/24 dev eth0
iperf3 --server --forceflush
"#;

#[test]
fn two_guests_talk_over_the_switch() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let sockets = ["a.sock", "b.sock"].map(|name| dir.path().join(name));
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--switch");
    for socket in &sockets {
        command.arg("--port").arg(format!("socket={}", socket.display()));
    }
    let _daemon = Daemon::start_command("vhost-user-net", command, &sockets[1]).unwrap();
    let guest = |socket: &Path| UmlGuest::new(root).device(socket, VirtioId::Net);
    let mut server = guest(&sockets[0]).start(&Job::from_script(SERVE)).unwrap();
    server.wait_for("Server listening", TIMEOUT).unwrap();
    let client = guest(&sockets[1]).run(&Job::from_script(EXCHANGE), TIMEOUT).unwrap();
    client.expect_success();
}

/// What a guest of a switch does that takes two queue pairs, with `TABLE` as its wish.
const TWO_QUEUES: &str = r#"
ethtool=/job/ethtool
$ethtool -l eth0 | awk '/Combined/ { print $2 }' | tr '\n' ' ' | grep '^2 1 $'
$ethtool -L eth0 combined 2
$ethtool -x eth0 | grep 'with 2 RX ring'
$ethtool -x eth0 | grep 'toeplitz: on'
$ethtool -K eth0 rxhash on
$ethtool -X eth0 $TABLE
ip link set eth0 up
ip address add 10.9.0.2/24 dev eth0
ping -c 2 -i 0.2 -W 3 10.9.0.1
for option in "" -R; do iperf3 -c 10.9.0.1 -P 8 -n 20M $option; done
"#;

/// A guest whose control queue we serve takes a second queue pair and steers frames with a table.
#[test]
fn uml_steers_its_frames_on_the_switch() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(ethtool) = root.ethtool_for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let sockets = ["a.sock", "b.sock"].map(|name| dir.path().join(name));
    let metrics = dir.path().join("metrics");
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.args(["--queue-pairs", "2", "--switch", "--metrics-socket"]).arg(&metrics);
    for socket in &sockets {
        command.arg("--port").arg(format!("socket={}", socket.display()));
    }
    let _daemon = Daemon::start_command("vhost-user-net", command, &sockets[1]).unwrap();
    let guest = |socket: &Path| UmlGuest::new(root).device(socket, VirtioId::Net);
    let mut server = guest(&sockets[0]).start(&Job::from_script(SERVE)).unwrap();
    server.wait_for("Server listening", TIMEOUT).unwrap();
    // Frames that a guest with this table got, by queue.
    let mut before = [0; 2];
    let mut received = |table: &str| {
        let job = Job::from_script(TWO_QUEUES).program(&ethtool).set("TABLE", table);
        guest(&sockets[1]).run(&job, TIMEOUT).unwrap().expect_success();
        let mut text = String::new();
        UnixStream::connect(&metrics).unwrap().read_to_string(&mut text).unwrap();
        let now = [0, 2].map(|queue| {
            let name = format!("net_rx_frames_total{{device=\"net1\",queue=\"{queue}\"}} ");
            let number = |line: &str| line.split_once(&name)?.1.parse::<u64>().ok();
            text.lines().find_map(number).unwrap_or_else(|| panic!("no {name} in {text}"))
        });
        let new = [now[0] - before[0], now[1] - before[1]];
        before = now;
        new
    };
    let [zero, one] = received("equal 2");
    assert!(zero > 100 && one > 100, "{zero} and {one} frames");
    // What has no hash, like ARP, goes to the first one still.
    let [zero, one] = received("weight 0 1");
    assert!(zero < 20 && one > 200, "{zero} and {one} frames");
}

#[test]
fn uml_on_a_macvtap() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    // Device files are named by index, for all name spaces alike.
    let index = 1_000_000 + std::process::id();
    for line in [
        "link add up0 type veth peer name up1",
        "link set up0 up",
        "link set up1 up",
        "address add 10.9.0.1/24 dev up1",
        &format!("link add link up0 name mv0 index {index} type macvtap mode bridge"),
        "link set mv0 up",
    ] {
        namespace.ip(root, line).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let device = format!("/dev/tap{index}");
    if !Path::new(&device).exists() {
        // A container's /dev has what was put there; devtmpfs has every device.
        return skip("the kernel's new devices do not appear in /dev here");
    }
    let daemon = start(Some(&namespace), dir.path(), &["--macvtap", &device]);
    exchange(root, &namespace, dir.path(), &daemon);
}

#[test]
fn uml_on_a_tap_given_as_a_descriptor() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let tap = namespace.run(|| {
        let fd = open_tap_device(Path::new("/dev/net/tun")).unwrap();
        attach_tap(fd.as_fd(), Some(&"tap0".parse().unwrap()), false).unwrap();
        fd
    });
    let tap = tap.unwrap();
    rustix::io::fcntl_setfd(&tap, rustix::io::FdFlags::empty()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let fd = tap.as_raw_fd().to_string();
    let daemon = start(Some(&namespace), dir.path(), &["--tap-fd", &fd]);
    namespace.ip(root, "address add 10.9.0.1/24 dev tap0").unwrap();
    namespace.ip(root, "link set tap0 up").unwrap();
    drop(tap);
    exchange(root, &namespace, dir.path(), &daemon);
}

#[test]
fn every_checksum_on_the_wire_is_right_or_rightly_partial() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("all.pcap");
    let capture = ["--pcap", file.to_str().unwrap(), "--pcap-size", "1G"];
    let daemon = tap_daemon(root, &namespace, dir.path(), &capture);
    exchange(root, &namespace, dir.path(), &daemon);
    let (mut right, mut partial, mut bytes) = (0, 0, 0);
    for frame in pcap::frames(&file).unwrap() {
        bytes += frame.len();
        match pcap::checksum(&frame) {
            Checksum::Right => right += 1,
            Checksum::Partial => partial += 1,
            Checksum::None => {}
            Checksum::Wrong => panic!("{:02x?}", &frame[..frame.len().min(100)]),
        }
    }
    eprintln!("{right} complete and {partial} partial checksums, {bytes} bytes");
    // Pings are complete; TCP is left to the other side.
    assert!(right >= 4 && partial >= 100 && bytes > 40_000_000);
}

/// Waits for what the host does to its cable, and starts its driver anew to see the MTU.
const CHANGES: &str = r#"
ip link set eth0 up
ip address add 10.9.0.2/24 dev eth0
carrier() { until [ "$(cat /sys/class/net/eth0/carrier)" = "$1" ]; do sleep 0.01; done; }
carrier 1
echo "result mtu_before $(cat /sys/class/net/eth0/mtu)"
echo "state up"
carrier 0
echo "state down"
carrier 1
ping -c 2 -i 0.2 -W 3 10.9.0.1
device=$(basename "$(readlink /sys/class/net/eth0/device)")
echo "$device" >/sys/bus/virtio/drivers/virtio_net/unbind
echo "$device" >/sys/bus/virtio/drivers/virtio_net/bind
ip link set eth0 up
echo "result mtu_after $(cat /sys/class/net/eth0/mtu)"
ip address add 10.9.0.2/24 dev eth0
ping -c 2 -i 0.2 -W 3 -s 8000 10.9.0.1
"#;

#[test]
fn a_guest_sees_its_cable_and_its_mtu_change() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (daemon, control) = steered_daemon(root, &namespace, dir.path());
    let guest = UmlGuest::new(root).device(daemon.socket(), VirtioId::Net);
    let mut guest = guest.start(&Job::from_script(CHANGES)).unwrap();
    guest.wait_for("state up", TIMEOUT).unwrap();
    assert!(ask(&control, r#"{"link": false}"#).contains(r#""link":false"#));
    guest.wait_for("state down", TIMEOUT).unwrap();
    assert!(ask(&control, r#"{"mtu": 9000}"#).contains(r#""mtu":9000"#));
    assert!(ask(&control, r#"{"link": true}"#).contains(r#""link":true"#));
    let result = guest.wait(TIMEOUT).unwrap();
    result.expect_success();
    assert_eq!(result.value("mtu_before"), Some("1500"));
    assert_eq!(result.value("mtu_after"), Some("9000"));
}

/// Waits until the host answers no more, and then until it does again.
const UNPLUGGED: &str = r#"
ip link set eth0 up
ip address add 10.9.0.2/24 dev eth0
answers() { ping -c 1 -W 1 10.9.0.1 >/dev/null; }
until answers; do :; done
echo "state connected"
while answers; do sleep 0.1; done
echo "result carrier $(cat /sys/class/net/eth0/carrier)"
echo "state silent"
until answers; do :; done
"#;

/// QEMU keeps the configuration of a vhost-user network card itself, so its guest sees no cable pulled
/// here (QEMU's `set_link` does that): it is only that nothing comes and goes.
#[test]
fn qemu_shows_its_own_cable_and_no_frame_passes_ours() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let (daemon, control) = steered_daemon(root, &namespace, dir.path());
    let guest = QemuGuest::new(root).network(daemon.socket(), 1);
    let mut guest = guest.start(&Job::from_script(UNPLUGGED)).unwrap();
    guest.wait_for("state connected", EMULATED_TIMEOUT).unwrap();
    assert!(ask(&control, r#"{"link": false}"#).contains(r#""link":false"#));
    guest.wait_for("state silent", EMULATED_TIMEOUT).unwrap();
    assert!(ask(&control, r#"{"link": true}"#).contains(r#""link":true"#));
    let result = guest.wait(EMULATED_TIMEOUT).unwrap();
    result.expect_success();
    assert_eq!(result.value("carrier"), Some("1"));
}

/// One connection that lasts while the daemon dies, and then proof that both pairs were used.
const SURVIVE: &str = r#"
ip link set eth0 up
ip address add 10.9.0.2/24 dev eth0
until ping -c 1 -W 1 10.9.0.1 >/dev/null; do :; done
echo "state connected"
iperf3 -c 10.9.0.1 -P 8 -t 8 -f m >/tmp/report
echo "result mbit $(awk '/SUM.*receiver/ { print $6 }' /tmp/report)"
"#;

#[test]
fn qemu_keeps_its_connections_when_the_daemon_is_killed() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    // An interface that stays when the daemon does not.
    namespace.ip(root, "tuntap add dev tap0 mode tap multi_queue").unwrap();
    let metrics = dir.path().join("metrics");
    let arguments = ["--queue-pairs", "2", "--metrics-socket", metrics.to_str().unwrap()];
    let mut first = tap_daemon(root, &namespace, dir.path(), &arguments);
    let _server = iperf_server(root, &namespace, dir.path());
    let guest = QemuGuest::new(root).network(first.socket(), 2).reconnect_ms(100);
    let job = Job::from_script(SURVIVE)
        .tool("/usr/bin/iperf3")
        .tool("/usr/lib/x86_64-linux-gnu/libgcc_s.so.1");
    let mut guest = guest.start(&job).unwrap();
    guest.wait_for("state connected", EMULATED_TIMEOUT).unwrap();
    std::thread::sleep(Duration::from_secs(3));
    first.kill().unwrap();
    let killed = Instant::now();
    let second = tap_daemon(root, &namespace, dir.path(), &arguments);
    eprintln!("another daemon after {:?}", killed.elapsed());
    let result = guest.wait(EMULATED_TIMEOUT).unwrap();
    eprintln!("{}", second.log());
    result.expect_success();
    let rate: f64 = result.value("mbit").unwrap().parse().unwrap();
    assert!(rate > 10.0, "{rate} Mbit/s");
    // Frames of both transmit queues and both receive queues, through the second daemon.
    let used = used_queues(&metrics);
    assert_eq!(used, ["0", "1", "2", "3"], "queues used");
}

/// Queues that frames went through.
fn used_queues(metrics: &Path) -> Vec<String> {
    let mut text = String::new();
    let mut socket = UnixStream::connect(metrics).unwrap();
    socket.read_to_string(&mut text).unwrap();
    let frames = |line: &&str| {
        let counter =
            line.contains("net_tx_frames_total{") || line.contains("net_rx_frames_total{");
        counter && !line.ends_with(" 0")
    };
    let queue = |line: &str| Some(line.split_once("queue=\"")?.1.split_once('"')?.0.to_owned());
    let mut queues: Vec<String> = text.lines().filter(frames).filter_map(queue).collect();
    queues.sort();
    queues
}
