//! Real guests on `vhost-user-net`: traffic both ways on every back end and VMM.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use testkit::daemon::{self, Daemon};
use testkit::guests::qemu::QemuGuest;
use testkit::guests::uml::UmlGuest;
use testkit::guests::{GuestResult, Job, VirtioId};
use testkit::netns::NetNs;
use testkit::service::Service;
use testkit::toolroot::ToolRoot;

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

/// The daemon on a tap that it makes in `namespace`, with the host's end of the network set up.
fn tap_daemon(root: &ToolRoot, namespace: &NetNs, dir: &Path, arguments: &[&str]) -> Daemon {
    let socket = dir.join("net.sock");
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--socket-path").arg(&socket).args(["--tap", "tap0"]).args(arguments);
    namespace.enter(&mut command);
    let daemon = Daemon::start_command("vhost-user-net", command, &socket).unwrap();
    namespace.ip(root, "address add 10.9.0.1/24 dev tap0").unwrap();
    daemon
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
