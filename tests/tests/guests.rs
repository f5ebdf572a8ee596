//! The guests themselves: each job runs against Debian's peers, so that a failure with a daemon of
//! the workspace is known to be the daemon's.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::guests::qemu::QemuGuest;
use testkit::guests::uml::UmlGuest;
use testkit::guests::{Job, VirtioId};
use testkit::netns::NetNs;
use testkit::peers;
use testkit::service::Service;
use testkit::toolroot::ToolRoot;

/// Far above what a boot takes, so that only a hang reaches it.
const TIMEOUT: Duration = Duration::from_secs(60);
/// QEMU emulates the CPU.
const EMULATED_TIMEOUT: Duration = Duration::from_secs(120);

fn image(dir: &Path, mib: u64) -> PathBuf {
    let path = dir.join("disk.img");
    fs::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    path
}

fn blk_job() -> Job {
    Job::named("blk-basic").unwrap().tool("/usr/sbin/mkfs.ext4").tool("/usr/sbin/e2fsck")
}

#[test]
fn a_failing_job_is_told_from_a_crash() {
    let Some(root) = ToolRoot::for_test() else { return };
    let guest = UmlGuest::new(root);
    let failed = guest.run(&Job::from_script("echo here; exit 7"), TIMEOUT).unwrap();
    assert_eq!(failed.exit_code, Some(7), "{}", failed.console);
    assert!(failed.console.contains("here"));

    let crash = Job::from_script("echo c >/proc/sysrq-trigger; sleep 9");
    let crashed = guest.run(&crash, TIMEOUT).unwrap();
    assert_eq!(crashed.exit_code, None, "{}", crashed.console);

    let hung = guest.run(&Job::from_script("sleep 600"), Duration::from_secs(4)).unwrap();
    assert_eq!(hung.exit_code, None, "{}", hung.console);
    assert!(hung.vmm.contains("killed after"), "{}", hung.vmm);
}

#[test]
fn uml_with_the_peers_virtiofsd() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("from-host"), "hello from the host\n").unwrap();
    let _fs = peers::virtiofsd(root, &dir.path().join("fs.sock"), &shared).unwrap();

    let guest = UmlGuest::new(root).device(dir.path().join("fs.sock"), VirtioId::Fs);
    let result = guest.run(&Job::named("fs-basic").unwrap(), TIMEOUT).unwrap();
    result.expect_success();
    let written = fs::read_to_string(shared.join("from-guest")).unwrap();
    assert_eq!(written, "hello from the guest\n");
    assert_eq!(fs::metadata(shared.join("deep/moved")).unwrap().len(), 4 << 20);
}

#[test]
fn uml_with_the_peers_disk() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("blk.sock");
    let disk = peers::storage_daemon(root, &socket, &image(dir.path(), 128), 1).unwrap();

    let result =
        UmlGuest::new(root).device(&socket, VirtioId::Blk).run(&blk_job(), TIMEOUT).unwrap();
    result.expect_success();
    assert!(disk.cpu_time().unwrap() > Duration::ZERO);
    assert!(disk.private_bytes().unwrap() > 1 << 20);
    assert!(disk.open_fds().unwrap() > 3);
}

#[test]
fn uml_with_the_peers_vsock() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (socket, host) = (dir.path().join("vsock.sock"), dir.path().join("host.sock"));
    let service = UnixListener::bind(dir.path().join("host.sock_1234")).unwrap();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = service.accept().unwrap();
        let mut buffer = [0; 64];
        let length = stream.read(&mut buffer).unwrap();
        stream.write_all(&buffer[..length]).unwrap();
    });
    let _vsock = peers::vsock(root, &socket, &host, 3).unwrap();

    let guest = UmlGuest::new(root).device(&socket, VirtioId::Vsock);
    let mut guest = guest.start(&Job::named("vsock-echo").unwrap()).unwrap();
    guest.wait_for("listening on", TIMEOUT).unwrap();
    let mut stream = UnixStream::connect(&host).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"CONNECT 5678\n").unwrap();
    let mut answer = [0; 64];
    let length = stream.read(&mut answer).unwrap();
    assert!(answer[..length].starts_with(b"OK "), "{:?}", &answer[..length]);
    stream.write_all(b"ping").unwrap();
    let mut pong = [0; 4];
    stream.read_exact(&mut pong).unwrap();
    assert_eq!(&pong, b"ping");
    drop(stream);
    guest.wait(TIMEOUT).unwrap().expect_success();
    echo.join().unwrap();
}

#[test]
fn qemu_with_two_queues_on_the_peers_disk() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("blk.sock");
    let _disk = peers::storage_daemon(root, &socket, &image(dir.path(), 128), 2).unwrap();

    let guest = QemuGuest::new(root).device_with(&socket, VirtioId::Blk, "num-queues=2");
    let result = guest.run(&blk_job(), EMULATED_TIMEOUT).unwrap();
    result.expect_success();
    assert_eq!(result.value("queues"), Some("2"), "{}", result.console);
}

#[test]
fn uml_with_the_peers_network() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let Some(namespace) = NetNs::for_test(root) else { return };
    let mut server = root.command("iperf3").unwrap();
    namespace.enter(server.args(["--server", "--forceflush"]));
    let _server = Service::start("iperf3", server, dir.path(), "listening on").unwrap();
    let net = peers::passt(root, &dir.path().join("net.sock"), &namespace).unwrap();

    let guest = UmlGuest::new(root).device(net.socket(), VirtioId::Net);
    let job = Job::named("net-iperf").unwrap().set("SERVER", "169.254.2.2");
    let result = guest.run(&job, TIMEOUT).unwrap();
    result.expect_success();
    for direction in ["upload_mbit", "download_mbit"] {
        let rate: f64 = result.value(direction).unwrap().parse().unwrap();
        assert!(rate > 100.0, "{direction}: {rate} Mbit/s");
    }
}

#[test]
fn uml_with_four_peers_at_once() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("shared")).unwrap();
    fs::write(at("shared/from-host"), "hello from the host\n").unwrap();
    let Some(namespace) = NetNs::for_test(root) else { return };
    let daemons = [
        (peers::virtiofsd(root, &at("fs.sock"), &at("shared")).unwrap(), VirtioId::Fs),
        (
            peers::storage_daemon(root, &at("blk.sock"), &image(dir.path(), 128), 1).unwrap(),
            VirtioId::Blk,
        ),
        (peers::vsock(root, &at("vsock.sock"), &at("host.sock"), 3).unwrap(), VirtioId::Vsock),
        (peers::passt(root, &at("net.sock"), &namespace).unwrap(), VirtioId::Net),
    ];
    let guest = daemons
        .iter()
        .fold(UmlGuest::new(root), |guest, (daemon, id)| guest.device(daemon.socket(), *id));
    let job = Job::from_script(
        "mount -t virtiofs shared /mnt; cat /mnt/from-host; test -b /dev/vda; test -e /dev/vsock; \
         ip link set eth0 up; \
         udhcpc -i eth0 -n -q -s /bin/true",
    );
    guest.run(&job, TIMEOUT).unwrap().expect_success();
}
