//! vhost-user-net's operator: mistakes on the command line, changes at run time, its footprint.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use testkit::daemon::{self, Daemon, ask};
use testkit::driver::{Buffer, RingFormat};
use testkit::frontend::{AttachOptions, BackendRequest, FrontEnd, ShmemPolicy};
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::toolroot::ToolRoot;
use vhost_user_net::sys::{attach_tap, open_tap_device};

/// Runs the program, which must end by itself; gives exit code, stdout and stderr.
fn run(namespace: &NetNs, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    namespace.enter(command.args(arguments));
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn mistakes_end_in_one_sentence_and_code_1() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s").display().to_string();
    let _other = on_tap(&namespace, &dir.path().join("other"), &[]);
    let bad_capture = dir.path().join("none/x.pcap").display().to_string();
    for (arguments, part) in [
        (&["--tap", "tap0"][..], "another program uses it"),
        (&["--tap", "lo"], "lo"),
        (&["--tap", "t1", "--netns", "/nonexistent/ns"], "/nonexistent/ns"),
        (&["--tap", "t1", "--netns", "/dev/null"], "/dev/null"),
        (&["--macvtap", "/dev/tap4711"], "/dev/tap4711"),
        (&["--packet", "eth77"], "eth77"),
        (&["--user", "--passt", "/nonexistent/passt"], "install the package passt"),
        (&["--tap-fd", "99"], "--tap-fd 99"),
        (&["--tap", "t1", "--mac", "52:54:00"], "not a MAC address"),
        (&["--tap", "t1", "--allow-ip", "10.0.0.1/40"], "not an IP address"),
        (&["--tap", "t1", "--pcap", &bad_capture], "x.pcap"),
        (&[], "no network is named"),
        (&["--bogus"], "--bogus"),
    ] {
        let all = [&["--socket-path", &socket][..], arguments].concat();
        let (code, out, err) = run(&namespace, &all);
        assert_eq!((code, out.as_str()), (1, ""), "{arguments:?}");
        assert!(err.contains(part), "{arguments:?}: {err}");
        assert_eq!(err.lines().count(), 1, "{arguments:?}: {err}");
    }
    let (code, _, err) = run(&namespace, &["--tap", "t1"]);
    assert_eq!(code, 1);
    assert!(err.contains("--socket-path"), "{err}");
    let (code, out, _) = run(&namespace, &["--print-capabilities", "--bogus"]);
    assert_eq!(code, 0);
    assert!(out.contains("\"net\""), "{out}");
}

fn on_tap(namespace: &NetNs, socket: &Path, arguments: &[&str]) -> Daemon {
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--socket-path").arg(socket).args(["--tap", "tap0"]).args(arguments);
    namespace.enter(&mut command);
    Daemon::start_command("vhost-user-net", command, socket).unwrap()
}

#[test]
fn link_mtu_and_limits_change_at_run_time() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control");
    let path = control.display().to_string();
    let daemon = on_tap(&namespace, &dir.path().join("s"), &["--control-socket", &path]);
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    frontend.negotiate(u64::MAX, u64::MAX).unwrap();
    assert_eq!(frontend.get_config(6, 6).unwrap(), [1, 0, 1, 0, 0xdc, 5]);
    assert!(ask(&control, r#"{"link": false}"#).contains(r#""link":false"#));
    assert_eq!(frontend.get_config(6, 2).unwrap(), [0, 0]);
    assert!(ask(&control, r#"{"link": true}"#).contains(r#""link":true"#));
    assert_eq!(frontend.get_config(6, 2).unwrap(), [1, 0]);
    assert!(ask(&control, r#"{"mtu": 9000}"#).contains(r#""mtu":9000"#));
    assert_eq!(frontend.get_config(10, 2).unwrap(), 9000u16.to_le_bytes());
    let mut show = root.command("ip").unwrap();
    namespace.enter(show.args(["link", "show", "tap0"]));
    let shown = String::from_utf8(show.output().unwrap().stdout).unwrap();
    assert!(shown.contains("mtu 9000"), "{shown}");
    for mtu in [0, 67] {
        assert!(frontend.set_mtu(mtu).is_err(), "{mtu}");
    }
    frontend.set_mtu(68).unwrap();
    assert_eq!(frontend.get_config(10, 2).unwrap(), 68u16.to_le_bytes());
    frontend.set_mtu(9000).unwrap();
    assert!(ask(&control, r#"{"announce": null}"#).contains(r#""mtu":9000"#));
    assert_eq!(frontend.get_config(6, 2).unwrap(), [3, 0]);
    drop(frontend);
    for wrong in [r#"{"mtu": 60}"#, r#"{"mtu": "x"}"#, r#"{"bogus": 1}"#, "nonsense"] {
        assert!(ask(&control, wrong).contains("error"), "{wrong}");
    }
    assert!(ask(&control, r#"{"state": null}"#).contains(r#""mtu":9000"#));
    let frontend = FrontEnd::connect(daemon.socket()).unwrap();
    // Served, so the one before has been forgotten.
    assert!(frontend.get_queue_num().unwrap() > 0);
    assert!(ask(&control, r#"{"announce": null}"#).contains("no guest"), "nobody hears it");
}

fn mtu_of(root: &ToolRoot, namespace: &NetNs, interface: &str) -> String {
    let mut show = root.command("ip").unwrap();
    namespace.enter(show.args(["-o", "link", "show", interface]));
    let shown = String::from_utf8(show.output().unwrap().stdout).unwrap();
    let mut words = shown.split_ascii_whitespace().skip_while(|word| *word != "mtu").skip(1);
    words.next().unwrap_or_default().to_owned()
}

#[test]
fn the_mtu_given_is_the_interfaces_whatever_kind_it_is() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(pod) = NetNs::for_test(root) else { return };
    let Some(other) = NetNs::for_test(root) else { return };
    pod.ip(root, "link add v0 type veth peer name v1").unwrap();
    // Of the same name as the tap that there will be in the pod.
    other.ip(root, "link add tap0 type veth peer name v1").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let start = |namespace: &NetNs, name: &str, arguments: &[&str]| {
        let socket = dir.path().join(name);
        let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
        command.arg("--socket-path").arg(&socket).args(["--mtu", "1400"]).args(arguments);
        namespace.enter(&mut command);
        Daemon::start_command("vhost-user-net", command, &socket).unwrap()
    };
    let _veth = start(&pod, "veth", &["--packet", "v0"]);
    assert_eq!(mtu_of(root, &pod, "v0"), "1400");
    // A tap that somebody made in the pod, given to a daemon that is not there.
    let tap = pod.run(|| {
        let fd = open_tap_device(Path::new("/dev/net/tun")).unwrap();
        attach_tap(fd.as_fd(), Some(&"tap0".parse().unwrap()), false).unwrap();
        fd
    });
    let tap = tap.unwrap();
    rustix::io::fcntl_setfd(&tap, rustix::io::FdFlags::empty()).unwrap();
    let _tap = start(&other, "tap", &["--tap-fd", &tap.as_raw_fd().to_string()]);
    assert_eq!(mtu_of(root, &pod, "tap0"), "1400");
    assert_eq!(mtu_of(root, &other, "tap0"), "1500", "an interface of the same name");
}

/// Somebody deletes the interface: the guest sees the cable pulled, once, and the log says what to do.
#[test]
fn a_deleted_interface_is_an_unplugged_cable() {
    let Some(root) = ToolRoot::for_test() else { return };
    for (arguments, interface) in
        [(["--tap", "tap0"], "tap0"), (["--packet", "v0"], "v0"), (["--packet", "v0"], "v1")]
    {
        let Some(namespace) = NetNs::for_test(root) else { return };
        namespace.ip(root, "link add v0 type veth peer name v1").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (socket, control) = (dir.path().join("s"), dir.path().join("control"));
        let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
        command.arg("--socket-path").arg(&socket).arg("--control-socket").arg(&control);
        namespace.enter(command.args(arguments));
        let mut daemon = Daemon::start_command("vhost-user-net", command, &socket).unwrap();
        let ram = GuestRam::new(4 << 20).unwrap();
        let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
        let options = AttachOptions { queues: 2, ..AttachOptions::new(RingFormat::Split) };
        let _queues = frontend.attach(&ram, &options).unwrap();
        let channel = frontend.open_backend_channel(ShmemPolicy::Refuse).unwrap();
        assert_eq!(frontend.get_config(6, 2).unwrap(), [1, 0]);
        namespace.ip(root, &format!("link delete {interface}")).unwrap();
        let told = channel.requests.recv_timeout(Duration::from_secs(5));
        assert_eq!(told, Ok(BackendRequest::ConfigChange), "{interface}: {}", daemon.log());
        assert_eq!(frontend.get_config(6, 2).unwrap(), [0, 0]);
        let before = daemon.cpu_time().unwrap();
        let more = channel.requests.recv_timeout(Duration::from_millis(300));
        assert!(more.is_err(), "told once: {more:?}");
        assert!(daemon.cpu_time().unwrap() - before <= Duration::from_millis(10), "a busy loop");
        // A front end that comes again does not make it come up, nor does the operator.
        drop((channel, frontend));
        let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
        let _queues = frontend.attach(&ram, &options).unwrap();
        assert_eq!(frontend.get_config(6, 2).unwrap(), [0, 0]);
        assert!(ask(&control, r#"{"link": true}"#).contains("no network at its other end"));
        assert_eq!(frontend.get_config(6, 2).unwrap(), [0, 0]);
        assert!(daemon.is_running());
        let log = daemon.log();
        let advice = log.lines().filter(|line| line.contains("restart this daemon"));
        assert_eq!(advice.count(), 1, "{log}");
    }
}

/// Makes the macvtap `mv0`, and a device file for it in `dir`: a container's /dev has none.
fn macvtap(root: &ToolRoot, namespace: &NetNs, dir: &Path) -> Option<String> {
    namespace.ip(root, "link add up0 type veth peer name up1").unwrap();
    namespace.ip(root, "link add link up0 name mv0 type macvtap mode bridge").ok()?;
    for interface in ["up0", "up1", "mv0"] {
        namespace.ip(root, &format!("link set {interface} up")).unwrap();
    }
    let show = "mount -t sysfs none /mnt && cat /mnt/class/net/mv0/macvtap/*/dev";
    let mut command = Command::new("unshare");
    namespace.enter(command.args(["--mount", "sh", "-c", show]));
    let numbers = String::from_utf8(command.output().ok()?.stdout).ok()?;
    let (major, minor) = numbers.trim().split_once(':')?;
    let device = dir.join("tap").display().to_string();
    let made = Command::new("mknod").args([&device, "c", major, minor]).status().ok()?;
    // A file system may have no use for devices.
    (made.success() && open_tap_device(Path::new(&device)).is_ok()).then_some(device)
}

/// The descriptor of a macvtap says nothing when it is deleted and takes frames as ever.
#[test]
fn a_deleted_macvtap_is_noticed_while_the_guest_sends() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let Some(device) = macvtap(root, &namespace, dir.path()) else {
        return testkit::skip::skip("there is no way to a macvtap here");
    };
    let socket = dir.path().join("s");
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--socket-path").arg(&socket).args(["--macvtap", &device]);
    namespace.enter(&mut command);
    let daemon = Daemon::start_command("vhost-user-net", command, &socket).unwrap();
    let ram = GuestRam::new(4 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    let options = AttachOptions { queues: 2, ..AttachOptions::new(RingFormat::Split) };
    let (mut queues, _) = frontend.attach(&ram, &options).unwrap();
    let channel = frontend.open_backend_channel(ShmemPolicy::Refuse).unwrap();
    let frame = ram.alloc(72, 64).unwrap();
    let mut send = || {
        assert!(queues[1].add(&[Buffer::readable(frame, 72)], 0));
        queues[1].kick();
        channel.requests.recv_timeout(Duration::from_millis(100)).ok()
    };
    assert_eq!(send(), None);
    assert_eq!(frontend.get_config(6, 2).unwrap(), [1, 0]);
    namespace.ip(root, "link delete mv0").unwrap();
    let told = (0..40).find_map(|_| send());
    assert_eq!(told, Some(BackendRequest::ConfigChange), "{}", daemon.log());
    assert_eq!(frontend.get_config(6, 2).unwrap(), [0, 0]);
    // The log may be a moment behind.
    let start = Instant::now();
    while !daemon.log().contains("restart this daemon") {
        assert!(start.elapsed() < Duration::from_secs(5), "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_idle_daemon_is_small_and_asleep() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = NetNs::for_test(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let start = Instant::now();
    let daemon = on_tap(&namespace, &dir.path().join("s"), &[]);
    let ready = start.elapsed();
    let before = daemon.cpu_time().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(daemon.cpu_time().unwrap(), before, "an idle daemon uses the CPU");
    let bytes = daemon.private_bytes().unwrap();
    eprintln!("ready after {ready:?}, {} KiB private", bytes >> 10);
    // A program built for debugging has a megabyte more of its own pages.
    let most = if cfg!(debug_assertions) { 4 << 20 } else { 2 << 20 };
    assert!(bytes < most, "{bytes} bytes");
    assert!(ready < Duration::from_secs(2), "{ready:?}");
}
