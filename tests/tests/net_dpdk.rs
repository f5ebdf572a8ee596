//! DPDK's testpmd drives two ports of vhost-user-net --switch: short and long frames, split and packed rings.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::process::Command;
use std::time::Duration;

use testkit::daemon::{self, Daemon};
use testkit::skip::skip;
use testkit::testpmd::{Options, Testpmd};
use testkit::toolroot::ToolRoot;

#[test]
fn dpdk_polls_two_ports_of_the_switch() {
    let root = match ToolRoot::dpdk() {
        Ok(root) => root,
        Err(error) => return skip(&format!("no tool root with DPDK: {error:#}")),
    };
    for packed in [false, true] {
        for frame_bytes in [64, 1514] {
            let dir = tempfile::tempdir().unwrap();
            let sockets = [dir.path().join("a.sock"), dir.path().join("b.sock")];
            let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
            command.arg("--switch");
            for socket in &sockets {
                command.arg("--port").arg(format!("socket={}", socket.display()));
            }
            let _daemon = Daemon::start_command("vhost-user-net", command, &sockets[1]).unwrap();
            let options = Options { frame_bytes, packed, ring: 256 };
            let ports = [sockets[0].as_path(), sockets[1].as_path()];
            let mut testpmd = Testpmd::start(root, ports, dir.path(), options).unwrap();
            testpmd.forward(4).unwrap();
            std::thread::sleep(Duration::from_millis(250));
            let (received, sent) = testpmd.stop().unwrap();
            eprintln!("packed {packed}, {frame_bytes} bytes: {sent} sent, {received} received");
            // The first bursts go round and round; some are on their way when it stops.
            assert!(sent > 5000 && received > 5000, "{sent} sent, {received} received");
        }
    }
}
