//! vhost-user-net --user: a guest on the host's sockets, through passt, without privileges. The daemon runs
//! in the tool root, where passt is.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use testkit::daemon::{self, Daemon, ask};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::guests::uml::UmlGuest;
use testkit::guests::{Job, VirtioId};
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::toolroot::ToolRoot;
use virtio_bindings::virtio_net as v;

const TIMEOUT: Duration = Duration::from_secs(10);
const ME: [u8; 6] = [2, 0, 0, 0, 0, 9];
/// The guest's address is that of the name space's interface; the gateway stands for its loopback.
const MY_IP: [u8; 4] = [10, 9, 0, 2];
const GATEWAY: [u8; 4] = [10, 9, 0, 1];
const HEADER: usize = 12;
const BUFFER: u32 = 1600;
const FORWARDED_PORT: u16 = 7007;

/// A name space with what passt wants to see: an interface with a default route.
fn namespace(root: &ToolRoot) -> Option<NetNs> {
    let namespace = NetNs::for_test(root)?;
    for line in [
        "link add up0 type veth peer name up1",
        "link set up0 up",
        "link set up1 up",
        "address add 10.9.0.2/24 dev up0",
        "route add default via 10.9.0.1 dev up0",
    ] {
        namespace.ip(root, line).unwrap();
    }
    Some(namespace)
}

/// The daemon as user nobody.
fn start(root: &ToolRoot, namespace: &NetNs, dir: &Path, arguments: &str) -> Daemon {
    let bin = daemon::bin("vhost-user-net").unwrap();
    fs::set_permissions(dir, Permissions::from_mode(0o777)).unwrap();
    let socket = dir.join("net.sock");
    let line = format!(
        "exec /outboard/vhost-user-net --socket-path={} --user {arguments}",
        socket.display()
    );
    let binds = [(bin.parent().unwrap(), "/outboard")];
    let mut command = root.command_with("su", &binds).unwrap();
    command.args(["-s", "/bin/sh", "nobody", "-c", &line]);
    namespace.enter(&mut command);
    Daemon::start_command("vhost-user-net", command, &socket).unwrap()
}

struct Guest {
    frontend: FrontEnd,
    ram: Arc<GuestRam>,
    rx: GuestQueue,
    tx: GuestQueue,
    out: u64,
}

impl Guest {
    fn new(daemon: &Daemon, format: RingFormat) -> Self {
        Self::at(daemon.socket(), format)
    }

    fn at(socket: &Path, format: RingFormat) -> Self {
        let ram = GuestRam::new(4 << 20).unwrap();
        let mut frontend = FrontEnd::connect(socket).unwrap();
        let features = !(1 << v::VIRTIO_NET_F_MQ);
        let options = AttachOptions { features, queues: 2, ..AttachOptions::new(format) };
        let (mut queues, _) = frontend.attach(&ram, &options).unwrap();
        let (tx, mut rx) = (queues.pop().unwrap(), queues.pop().unwrap());
        for _ in 0..64 {
            let at = ram.alloc(u64::from(BUFFER), 64).unwrap();
            assert!(rx.add(&[Buffer::writable(at, BUFFER)], at));
        }
        rx.kick();
        let out = ram.alloc(1 << 16, 4096).unwrap();
        Self { frontend, ram, rx, tx, out }
    }

    fn send(&mut self, frame: &[u8]) {
        self.ram.write(self.out, &[&[0; HEADER], frame].concat());
        let len = u32::try_from(HEADER + frame.len()).unwrap();
        self.tx.request(&[Buffer::readable(self.out, len)], TIMEOUT).unwrap();
    }

    /// The next frame that `wanted` takes.
    fn receive(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            let mut frame = Vec::new();
            let (mut at, mut buffers) = (0, 1);
            while at < buffers {
                let used = self.rx.wait(TIMEOUT).unwrap();
                frame.extend(self.ram.bytes(used.cookie, used.len as usize));
                if at == 0 {
                    buffers = u16::from_le_bytes(frame[10..12].try_into().unwrap());
                }
                at += 1;
                assert!(self.rx.add(&[Buffer::writable(used.cookie, BUFFER)], used.cookie));
                self.rx.kick();
            }
            let frame = frame.split_off(HEADER);
            if wanted(&frame) {
                return frame;
            }
        }
    }

    /// Asks for the gateway's address and gives it.
    fn arp(&mut self) -> [u8; 6] {
        let head = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let question =
            [&head[..], &ME, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &ME, &MY_IP, &[0; 6], &GATEWAY];
        let mut question = question.concat();
        question.resize(60, 0);
        self.send(&question);
        let answer = self.receive(|f| f[12..14] == [8, 6] && f[20..22] == [0, 2]);
        assert_eq!((&answer[..6], &answer[28..32]), (&ME[..], &GATEWAY[..]));
        answer[22..28].try_into().unwrap()
    }

    fn link_is_up(&self) -> bool {
        self.frontend.get_config(6, 2).unwrap()[0] & 1 != 0
    }

    fn await_link(&self, up: bool) {
        let deadline = Instant::now() + TIMEOUT;
        while self.link_is_up() != up {
            assert!(Instant::now() < deadline, "the link is never {up}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A UDP datagram in its frame, with the checksum of IP; that of UDP is optional.
fn udp(to_mac: [u8; 6], to: ([u8; 4], u16), from: ([u8; 4], u16), payload: &[u8]) -> Vec<u8> {
    let udp_len = u16::try_from(8 + payload.len()).unwrap();
    let mut ip =
        [&[0x45, 0][..], &(20 + udp_len).to_be_bytes(), &[0, 1, 0, 0, 64, 17, 0, 0]].concat();
    ip.extend(from.0);
    ip.extend(to.0);
    let sum: u32 = ip.chunks(2).map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum();
    let sum = !(sum % 0xffff) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let ports = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    [&to_mac[..], &ME, &[8, 0], &ip, &ports, &udp_len.to_be_bytes(), &[0, 0], payload].concat()
}

fn is_udp(frame: &[u8], from_port: u16) -> bool {
    frame[12..14] == [8, 0] && frame[23] == 17 && frame[34..36] == from_port.to_be_bytes()
}

#[test]
fn frames_reach_the_hosts_sockets_and_come_back() {
    let Some(root) = ToolRoot::for_test() else { return };
    for format in RingFormat::ALL {
        let Some(namespace) = namespace(root) else { return };
        let dir = tempfile::tempdir().unwrap();
        let ports = format!("--user-udp={FORWARDED_PORT} --user-option=--ipv4-only");
        let daemon = start(root, &namespace, dir.path(), &ports);
        let mut guest = Guest::new(&daemon, format);
        assert!(guest.link_is_up());
        assert_eq!(guest.frontend.get_config(10, 2).unwrap(), 65520u16.to_le_bytes());
        let offloads = 1 << v::VIRTIO_NET_F_CSUM | 1 << v::VIRTIO_NET_F_GUEST_TSO4;
        assert_eq!(guest.frontend.features & offloads, 0);
        let gateway = guest.arp();

        // DHCP: DISCOVER is answered with an OFFER of the interface's address.
        let mut discover = vec![1, 1, 6, 0, 1, 2, 3, 4];
        discover.resize(28, 0);
        discover.extend(ME);
        discover.resize(236, 0);
        discover.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
        guest.send(&udp([0xff; 6], ([0xff; 4], 67), ([0; 4], 68), &discover));
        let offer = guest.receive(|f| is_udp(f, 67));
        assert_eq!(offer[42..43], [2]);
        assert_eq!(offer[58..62], MY_IP);

        // Guest to host and back, small and in many buffers.
        let echo = namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
        echo.set_read_timeout(Some(TIMEOUT)).unwrap();
        let port = echo.local_addr().unwrap().port();
        for len in [1usize, 1000, 9000, 40_000] {
            let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            guest.send(&udp(gateway, (GATEWAY, port), (MY_IP, 5000), &payload));
            let mut got = vec![0; 65536];
            let (n, from) = echo.recv_from(&mut got).unwrap();
            assert!(got[..n] == payload, "{len} bytes");
            echo.send_to(&payload, from).unwrap();
            let frame = guest.receive(|f| is_udp(f, port));
            // The shortest frames are padded.
            assert!(frame[42..42 + len] == payload, "{len} bytes back");
        }

        // A forwarded port.
        let host = namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
        let hello = b"hello guest, this is the host";
        host.send_to(hello, ("127.0.0.1", FORWARDED_PORT)).unwrap();
        let frame = guest.receive(|f| f.ends_with(hello));
        assert_eq!(frame[36..38], FORWARDED_PORT.to_be_bytes());
    }
}

/// The process of passt that runs in the name space of `daemon`'s keeper.
fn passt_pid(daemon: &Daemon) -> Option<i32> {
    let children = |pid: u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        text.unwrap_or_default().split_whitespace().map(|p| p.parse::<u32>().unwrap()).collect()
    };
    let keepers: Vec<u32> = children(daemon.pid());
    let passts: Vec<u32> = keepers.into_iter().flat_map(children).collect();
    let pid = passts.into_iter().find(|pid| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|c| c.starts_with("passt"))
    })?;
    i32::try_from(pid).ok()
}

#[test]
fn passt_may_die_and_guests_may_come_and_go() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = namespace(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(root, &namespace, dir.path(), "--mtu=9000");
    for round in 0..3 {
        let mut guest = Guest::new(&daemon, RingFormat::Split);
        assert_eq!(guest.frontend.get_config(10, 2).unwrap(), 9000u16.to_le_bytes());
        guest.arp();
        let pid = passt_pid(&daemon).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        guest.await_link(false);
        guest.await_link(true);
        guest.arp();
        assert_ne!(passt_pid(&daemon).unwrap(), pid, "round {round}");
    }
    // It leaves nothing behind.
    let pid = passt_pid(&daemon).unwrap();
    drop(daemon);
    let deadline = Instant::now() + TIMEOUT;
    while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z ")) {
        assert!(Instant::now() < deadline, "passt outlives its daemon");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What the operator unplugged stays so, whatever passt does.
#[test]
fn a_link_that_was_set_down_stays_down_when_passt_comes_back() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = namespace(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control");
    let argument = format!("--control-socket={}", control.display());
    let daemon = start(root, &namespace, dir.path(), &argument);
    let mut guest = Guest::new(&daemon, RingFormat::Split);
    guest.arp();
    assert!(ask(&control, r#"{"link": false}"#).contains(r#""link":false"#));
    let pid = passt_pid(&daemon).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    until("another passt", || daemon.log().contains("a new user-mode network").then_some(()));
    assert!(!guest.link_is_up(), "the operator said down");
    assert!(ask(&control, r#"{"link": true}"#).contains(r#""link":true"#));
    assert!(guest.link_is_up());
    guest.arp();
}

/// A pod's launcher as user nobody; killed with this, and its daemons with it.
struct Launcher(Child);

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the launcher says of the pod in `dir`.
fn pod_state(dir: &Path) -> Option<serde_json::Value> {
    serde_json::from_str(&fs::read_to_string(dir.join("run/state.json")).ok()?).ok()
}

/// The process that the number at `pointer` of `state` is.
fn process(state: &serde_json::Value, pointer: &str) -> Option<Pid> {
    Pid::from_raw(i32::try_from(state.pointer(pointer)?.as_i64()?).ok()?)
}

fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {TIMEOUT:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_pod_of_a_user_without_rights_has_a_network() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = namespace(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    let pod = format!(
        "run-dir = \"run\"\n[[nic]]\nname = \"eth0\"\nuser = true\nmac = \"02:00:00:00:00:09\"\n\
         user-udp = [\"{FORWARDED_PORT}\"]\n"
    );
    fs::write(dir.path().join("pod.toml"), pod).unwrap();
    daemon::bin("vhost-user-net").unwrap();
    let bin = daemon::bin("outboard").unwrap();
    let as_nobody = |line: &str| {
        let binds = [(bin.parent().unwrap(), "/outboard")];
        let mut command = root.command_with("su", &binds).unwrap();
        command.args(["-s", "/bin/sh", "nobody", "-c", line]);
        namespace.enter(&mut command);
        command
    };
    let run = format!("exec /outboard/outboard run {}/pod.toml", dir.path().display());
    let mut launcher = Launcher(as_nobody(&run).stdout(Stdio::null()).spawn().unwrap());

    let socket = dir.path().join("run/eth0.sock");
    for restarts in 0..2 {
        // The state tells of a process that may not listen yet; the launcher waits for that only at first.
        let state = until("the card's daemon runs", || {
            pod_state(dir.path()).filter(|s| s["devices"][0]["restarts"] == restarts)
        });
        let pid = until("it listens", || {
            UnixStream::connect(dir.path().join("run/eth0.metrics")).ok()?;
            process(&state, "/devices/0/pid")
        });
        let mut guest = Guest::at(&socket, RingFormat::Split);
        let gateway = guest.arp();
        let echo = namespace.run(|| UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
        echo.set_read_timeout(Some(TIMEOUT)).unwrap();
        let port = echo.local_addr().unwrap().port();
        guest.send(&udp(gateway, (GATEWAY, port), (MY_IP, 5000), b"hello host"));
        let mut got = [0; 64];
        let (n, from) = echo.recv_from(&mut got).unwrap();
        assert_eq!(&got[..n], b"hello host");
        echo.send_to(b"hello guest", from).unwrap();
        guest.receive(|f| is_udp(f, port) && f[42..].starts_with(b"hello guest"));
        let top =
            format!("/outboard/outboard top --once --interval 100ms {}/run", dir.path().display());
        let table = String::from_utf8(as_nobody(&top).output().unwrap().stdout).unwrap();
        let row = table.lines().find(|line| line.contains("eth0")).unwrap_or_default();
        assert!(row.contains("net") && !row.contains("down"), "{table}");
        drop(guest);
        if restarts == 0 {
            kill_process(pid, Signal::KILL).unwrap();
        }
    }
    let pid = process(&pod_state(dir.path()).unwrap(), "/pid").unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let status = until("the launcher ends", || launcher.0.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert!(!dir.path().join("run").exists(), "the run directory is left behind");
}

/// Fetches from the host's loopback, and sends there.
const FETCH: &str = r#"
ip link set eth0 up
ip address add 10.9.0.2/24 dev eth0
echo "result mtu $(cat /sys/class/net/eth0/mtu)"
for n in 1 2 3; do
    nc 10.9.0.1 "$PORT" </dev/null >/tmp/fetched
    echo "result fetched_$n $(sha256sum </tmp/fetched | cut -d' ' -f1)"
done
nc 10.9.0.1 "$PORT" </tmp/fetched >/dev/null
"#;

#[test]
fn a_real_guest_fetches_from_the_hosts_loopback() {
    let Some(root) = ToolRoot::for_test() else { return };
    let Some(namespace) = namespace(root) else { return };
    let dir = tempfile::tempdir().unwrap();
    let daemon = start(root, &namespace, dir.path(), "--user-option=--ipv4-only");
    let listener = namespace.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let port = listener.local_addr().unwrap().port();
    let file: Vec<u8> = (0..4_000_000u32).map(|i| (i ^ (i >> 9)) as u8).collect();
    let expected = file.clone();
    let server = std::thread::spawn(move || {
        for _ in 0..3 {
            listener.accept().unwrap().0.write_all(&file).unwrap();
        }
        let (mut last, _) = listener.accept().unwrap();
        let mut got = Vec::new();
        last.read_to_end(&mut got).unwrap();
        got
    });
    let job = Job::from_script(FETCH).set("PORT", &port.to_string());
    let guest = UmlGuest::new(root).device(daemon.socket(), VirtioId::Net);
    let result = guest.run(&job, Duration::from_secs(20)).unwrap();
    result.expect_success();
    assert_eq!(result.value("mtu"), Some("65520"));
    let first = result.value("fetched_1").unwrap();
    assert_eq!(result.value("fetched_3"), Some(first));
    assert!(server.join().unwrap() == expected, "what the guest sent is not what it fetched");
}
