//! vhost-user-net beside passt, in turn in one run: a User Mode Linux guest's TCP both ways and its
//! round trips, per second of the daemon's CPU time.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing benchmark")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use testkit::daemon::{self, Daemon};
use testkit::guests::uml::UmlGuest;
use testkit::guests::{Job, VirtioId};
use testkit::netns::NetNs;
use testkit::peers;
use testkit::service::Service;
use testkit::toolroot::ToolRoot;

const TIMEOUT: Duration = Duration::from_secs(60);
const ROUNDS: usize = 3;
const SECONDS: f64 = 3.0;

/// One direction at a time, so that the daemon's CPU time belongs to it.
const OURS: &str = r#"
ip link set eth0 mtu "$MTU" up
ip address add 10.9.0.2/24 dev eth0
SERVER=10.9.0.1
"#;
const PEERS: &str = r#"
cat >/tmp/lease <<'LEASE'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add "$ip/$mask" dev "$interface"
ip route add default via $router
LEASE
chmod +x /tmp/lease
ip link set eth0 mtu "$MTU" up
udhcpc -i eth0 -n -q -s /tmp/lease
SERVER=169.254.2.2
"#;
const MEASURE: &str = r#"
ping -c 3 -i 0.2 $SERVER >/dev/null || true
echo start
iperf3 -c $SERVER -t 3 -f m $OPTION >/tmp/report
echo result mbit $(awk '/receiver/ { print $7 }' /tmp/report)
"#;

#[derive(Clone, Copy, PartialEq)]
enum Which {
    Ours,
    Passt,
}

/// Gbit/s, and Gbit per second of the daemon's CPU time.
fn run(root: &'static ToolRoot, which: Which, mtu: &str, option: &str) -> (f64, f64) {
    let namespace = NetNs::new(root).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("net.sock");
    let daemon = match which {
        Which::Ours => ours(root, &namespace, &socket),
        Which::Passt => peers::passt(root, &socket, &namespace).unwrap(),
    };
    let mut server = root.command("iperf3").unwrap();
    namespace.enter(server.args(["--server", "--forceflush"]));
    let _server = Service::start("iperf3", server, dir.path(), "listening on").unwrap();
    let setup = if which == Which::Ours { OURS } else { PEERS };
    let script = format!("{setup}{MEASURE}");
    let job = Job::from_script(&script).set("MTU", mtu).set("OPTION", option);
    let mut guest = UmlGuest::new(root).device(&socket, VirtioId::Net).start(&job).unwrap();
    guest.wait_for("start", TIMEOUT).unwrap();
    let before = daemon.cpu_time().unwrap();
    guest.wait_for("result mbit", TIMEOUT).unwrap();
    let cpu = daemon.cpu_time().unwrap().saturating_sub(before).as_secs_f64();
    let result = guest.wait(TIMEOUT).unwrap();
    result.expect_success();
    let gbit = result.value("mbit").unwrap().parse::<f64>().unwrap() / 1000.0;
    (gbit, gbit * SECONDS / cpu.max(0.001))
}

fn ours(root: &ToolRoot, namespace: &NetNs, socket: &Path) -> Daemon {
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--socket-path").arg(socket).args(["--tap", "tap0", "--mtu", "65520"]);
    namespace.enter(&mut command);
    let daemon = Daemon::start_command("vhost-user-net", command, socket).unwrap();
    namespace.ip(root, "address add 10.9.0.1/24 dev tap0").unwrap();
    daemon
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let Ok(root) = ToolRoot::guests() else {
        eprintln!("no tool root: nothing to measure with");
        return;
    };
    println!("{:6} {:14} {:>22} {:>22}", "MTU", "direction", "ours", "passt");
    for mtu in ["1500", "65520"] {
        for (direction, option) in [("guest to host", ""), ("host to guest", "-R")] {
            let mut results = [(vec![], vec![]), (vec![], vec![])];
            for _ in 0..ROUNDS {
                for (at, which) in [Which::Ours, Which::Passt].into_iter().enumerate() {
                    let (rate, per_cpu) = run(root, which, mtu, option);
                    results[at].0.push(rate);
                    results[at].1.push(per_cpu);
                }
            }
            let [ours, passt] = results.map(|(rate, per_cpu)| {
                format!("{:.1} ({:.1}/CPU s)", median(rate), median(per_cpu))
            });
            println!("{mtu:6} {direction:14} {ours:>22} {passt:>22}");
        }
    }
}
