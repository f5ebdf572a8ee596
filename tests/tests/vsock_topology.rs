//! vsock-proxy: who reaches whom, what operators may get wrong, and what many idle connections cost.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use testkit::daemon::Daemon;
use testkit::driver::vsock::{
    GuestStream, HOST, Packet, SEQPACKET, STREAM, VsockGuest, VsockOptions, op,
};
use testkit::vsock_host::{PATIENCE, VsockHost, program, read_ok};

/// Starts a proxy with arguments that say everything; `socket` is the one to wait for.
fn start(dir: &Path, socket: &str, arguments: &[String]) -> Daemon {
    let mut command = program().unwrap();
    command.args(arguments);
    Daemon::start_command("vsock-proxy", command, &dir.join(socket)).unwrap()
}

fn refused(guest: &mut VsockGuest, peer: u64, port: u32) -> bool {
    let mut request = Packet::new(guest.cid, 4000, port, op::REQUEST);
    request.dst_cid = peer;
    guest.send(&request).unwrap();
    guest.receive(PATIENCE).unwrap().op == op::RST
}

#[test]
fn siblings_of_a_group_reach_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let vm = |cid: u32, groups: &str| {
        let d = dir.path().display();
        format!("--vm=cid={cid},socket={d}/vmm{cid},uds-path={d}/host{cid},groups={groups}")
    };
    let arguments = [vm(3, "a+b"), vm(4, "b"), vm(5, "c")];
    let _daemon = start(dir.path(), "vmm5", &arguments);
    let boot = |cid: u32| {
        let path = dir.path().join(format!("vmm{cid}"));
        VsockGuest::start(&path, VsockOptions::default()).unwrap()
    };
    let (mut three, mut five) = (boot(3), boot(5));
    assert!(refused(&mut three, 4, 80), "a sibling that does not run");
    let mut four = boot(4);
    assert!(refused(&mut three, 5, 80), "no common group");
    assert!(refused(&mut five, 3, 80), "no common group");
    assert!(refused(&mut three, 3, 80), "itself");

    for socket_type in [STREAM, SEQPACKET] {
        let mut request = Packet::new(3, 1025, 80, op::REQUEST);
        (request.dst_cid, request.socket_type) = (4, socket_type);
        three.send(&request).unwrap();
        let heard = four.expect(op::REQUEST).unwrap();
        assert_eq!((heard.src_cid, heard.src_port, heard.dst_port), (3, 1025, 80));
        assert!(three.is_silent_for(Duration::from_millis(50)), "before the sibling accepted");
        let mut b = GuestStream::accept(&mut four, &heard).unwrap();
        let response = three.expect(op::RESPONSE).unwrap();
        assert_eq!((response.src_cid, response.src_port), (4, 80));
        // The ends of messages and of records go along, either way; a message may be empty.
        for (text, flags) in [("one", 1), ("two", 3), ("", 1), ("four", 1)] {
            if text.is_empty() && socket_type == STREAM {
                continue;
            }
            let expected = if socket_type == SEQPACKET { flags } else { 0 };
            let data = b.data(text.as_bytes()).flags(flags);
            four.send(&data).unwrap();
            let got = three.expect(op::RW).unwrap();
            assert_eq!((&got.payload[..], got.flags), (text.as_bytes(), expected));
            let mut rw = Packet::new(3, 1025, 80, op::RW).with(text.as_bytes()).flags(flags);
            (rw.dst_cid, rw.socket_type) = (4, socket_type);
            three.send(&rw).unwrap();
            let got = four.expect(op::RW).unwrap();
            assert_eq!((&got.payload[..], got.flags), (text.as_bytes(), expected));
        }
        let mut close = Packet::new(3, 1025, 80, op::SHUTDOWN).flags(3);
        (close.dst_cid, close.socket_type) = (4, socket_type);
        three.send(&close).unwrap();
        three.expect(op::RST).unwrap();
        assert_eq!(four.expect(op::SHUTDOWN).unwrap().flags, 3);
        four.send(&b.packet(op::RST)).unwrap();
    }

    // Refused by the sibling.
    let mut request = Packet::new(3, 1026, 81, op::REQUEST);
    request.dst_cid = 4;
    three.send(&request).unwrap();
    let heard = four.expect(op::REQUEST).unwrap();
    let mut reset = Packet::new(4, 81, heard.src_port, op::RST);
    reset.dst_cid = 3;
    four.send(&reset).unwrap();
    three.expect(op::RST).unwrap();
}

#[test]
fn the_operator_says_which_ports_are_reached() {
    let elsewhere = tempfile::tempdir().unwrap();
    let service = UnixListener::bind(elsewhere.path().join("logs")).unwrap();
    let map = format!("--map=514:{}", elsewhere.path().join("logs").display());
    let host = VsockHost::start(&["--allow-host-ports=80+500-600", "--allow-guest-ports=22", &map])
        .unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let _forbidden = host.listen(81).unwrap();
    assert!(refused(&mut guest, HOST, 81));
    let _kept = host.serve(&mut guest, 1025, 80).unwrap();
    let mut logs = GuestStream::connect(&mut guest, 1026, HOST, 514).unwrap();
    logs.send_all(&mut guest, b"line").unwrap();
    let mut got = [0; 4];
    let mut served = service.accept().unwrap().0;
    served.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"line");
    let _kept = host.connect(&mut guest, 22).unwrap();
    let mut client = host.ask(23).unwrap();
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn connect_only_means_that_the_guest_connects_to_nothing() {
    let host = VsockHost::start(&["--connect-only"]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let _service = host.listen(80).unwrap();
    assert!(refused(&mut guest, HOST, 80));
    host.connect(&mut guest, 22).unwrap();
}

/// A service on port 80 whose queue has room for `backlog` and one more.
fn busy_service(host: &VsockHost, backlog: i32) -> std::os::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(host.path("host_80")).unwrap()).unwrap();
    listen(&listener, backlog).unwrap();
    listener
}

#[test]
fn a_service_with_a_full_queue_is_waited_for() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let listener = busy_service(&host, 1);
    for port in 1..=10 {
        guest.send(&Packet::new(3, port, 80, op::REQUEST)).unwrap();
    }
    let mut accepted = Vec::new();
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(20));
        accepted.push(rustix::net::accept(&listener).unwrap());
    }
    for _ in 0..10 {
        guest.expect(op::RESPONSE).unwrap();
    }
}

#[test]
fn a_service_that_never_accepts_is_given_up() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let _listener = busy_service(&host, 0);
    // Its queue has room for one.
    guest.send(&Packet::new(3, 1025, 80, op::REQUEST)).unwrap();
    guest.expect(op::RESPONSE).unwrap();
    let fds = host.daemon.open_fds().unwrap();
    let start = Instant::now();
    guest.send(&Packet::new(3, 1026, 80, op::REQUEST)).unwrap();
    let answer = guest.receive(PATIENCE).unwrap();
    assert_eq!((answer.op, answer.dst_port), (op::RST, 1026));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(host.daemon.open_fds().unwrap(), fds);
}

#[test]
fn a_client_passes_a_descriptor() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    for text in ["1027", "1027 keep"] {
        let mut control = host.dial().unwrap();
        control.write_all(b"passfd\n").unwrap();
        let (ours, passed) = UnixStream::pair().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [passed.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let list = [IoSlice::new(text.as_bytes())];
        sendmsg(&control, &list, &mut ancillary, SendFlags::empty()).unwrap();
        drop(passed);
        let request = guest.expect(op::REQUEST).unwrap();
        assert_eq!(request.dst_port, 1027);
        let mut theirs = GuestStream::accept(&mut guest, &request).unwrap();
        assert_eq!(read_ok(&mut control).unwrap(), request.src_port);
        (&ours).write_all(b"through").unwrap();
        assert_eq!(theirs.receive_all(&mut guest, 7).unwrap(), b"through");
        theirs.send_all(&mut guest, b"and back").unwrap();
        let mut got = [0; 8];
        (&ours).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"and back");
        drop(ours);
        if text.ends_with("keep") {
            assert!(guest.is_silent_for(Duration::from_millis(50)));
            guest.send(&theirs.packet(op::RST)).unwrap();
        } else {
            assert_eq!(guest.expect(op::SHUTDOWN).unwrap().flags, 3);
            guest.send(&theirs.packet(op::RST)).unwrap();
        }
    }
}

/// What the metrics socket says of the series that begins with `name`.
fn metric(socket: &Path, name: &str) -> f64 {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let line = text.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {text}"))
}

#[test]
fn what_each_vm_does_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().display();
    let vm = |cid: u32| format!("--vm=cid={cid},socket={d}/vmm{cid},uds-path={d}/host{cid}");
    let metrics = dir.path().join("metrics");
    let arguments = [vm(3), vm(4), format!("--metrics-socket={}", metrics.display())];
    let _daemon = start(dir.path(), "vmm4", &arguments);
    let boot = |cid: u32| {
        let path = dir.path().join(format!("vmm{cid}"));
        VsockGuest::start(&path, VsockOptions::default()).unwrap()
    };
    let (mut three, mut four) = (boot(3), boot(4));
    assert!(refused(&mut four, HOST, 99));
    let listener = UnixListener::bind(dir.path().join("host3_80")).unwrap();
    let mut theirs = GuestStream::connect(&mut three, 1025, HOST, 80).unwrap();
    let mut stream = listener.accept().unwrap().0;
    theirs.send_all(&mut three, &[1; 1000]).unwrap();
    stream.read_exact(&mut [0; 1000]).unwrap();
    stream.write_all(&[2; 300]).unwrap();
    theirs.receive_all(&mut three, 300).unwrap();

    let of = |name: &str, labels: &str| metric(&metrics, &format!("outboard_{name}{{{labels}"));
    for (name, labels, three, four) in [
        ("vsock_connections", "", 1.0, 0.0),
        ("vsock_connections_total", "", 1.0, 1.0),
        ("vsock_refused_total", "", 0.0, 1.0),
        ("vsock_connect_seconds_count", "", 1.0, 0.0),
        ("queue_read_bytes_total", ",queue=\"1\"", 1000.0, 0.0),
        ("queue_written_bytes_total", ",queue=\"0\"", 300.0, 0.0),
    ] {
        let both = [3, 4].map(|cid| of(name, &format!("device=\"vsock{cid}\"{labels}")));
        assert_eq!(both, [three, four], "{name}");
    }
    assert!(of("vsock_connect_seconds_sum", "device=\"vsock3\"") > 0.0);
}

#[test]
fn ten_thousand_idle_connections_cost_next_to_nothing() {
    let count = 10_000;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    if limit.maximum.is_some_and(|most| most < count + 200) {
        testkit::skip::skip("too few file descriptors are allowed");
        return;
    }
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (_first, _theirs) = host.connect(&mut guest, 80).unwrap();
    let before = host.daemon.private_bytes().unwrap();
    let mut streams = Vec::new();
    for _ in 0..count {
        streams.push(host.connect(&mut guest, 80).unwrap());
    }
    let each = (host.daemon.private_bytes().unwrap() - before) / count;
    assert!(each < 1024, "{each} bytes for an idle connection");
    // Their last deadline, of the REQUEST, is still to come and must find nobody.
    let cpu = host.daemon.cpu_time().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let spent = host.daemon.cpu_time().unwrap() - cpu;
    assert!(spent <= Duration::from_millis(10), "{spent:?} of CPU for idle connections");
    // They are still there.
    let (stream, theirs) = streams.last_mut().unwrap();
    stream.write_all(b"x").unwrap();
    theirs.receive_all(&mut guest, 1).unwrap();
}

#[test]
fn an_idle_proxy_is_small_and_starts_fast() {
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        let mut command = program().unwrap();
        let host = dir.path().join("host");
        command.arg("--socket").arg(&path).arg("--uds-path").arg(&host);
        let start = Instant::now();
        let mut child = command.stderr(std::process::Stdio::null()).spawn().unwrap();
        while UnixStream::connect(&path).is_err() {
            assert!(start.elapsed() < PATIENCE);
            std::hint::spin_loop();
        }
        best = best.min(start.elapsed());
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(best < Duration::from_millis(10), "ready after {best:?}");
    // Of two, so that the program's own pages are nobody's private memory; how many of them the kernel
    // maps at once depends on how the file came into its cache.
    let other = VsockHost::start(&[]).unwrap();
    let _other_guest = other.guest(VsockOptions::default()).unwrap();
    let host = VsockHost::start(&[]).unwrap();
    let _guest = host.guest(VsockOptions::default()).unwrap();
    let private = host.daemon.private_bytes().unwrap();
    assert!(private < 1 << 20, "{private} bytes");
}

#[test]
fn mistakes_of_operators_are_one_sentence_and_exit_code_1() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().display().to_string();
    std::fs::write(dir.path().join("file"), "x").unwrap();
    let taken = UnixListener::bind(dir.path().join("taken")).unwrap();
    let bad_toml = dir.path().join("bad.toml");
    std::fs::write(&bad_toml, "[[vm]]\nguest-cid = 3\nsockett = \"x\"\n").unwrap();
    let long = format!("{d}/{}", "x".repeat(90));
    let cases: &[(&[&str], &str)] = &[
        (&["--uds-path=D/h"], "--socket-path"),
        (&["--socket=D/v"], "uds-path"),
        (&["--socket=D/v", "--uds-path=D/h", "--guest-cid=2"], "reserved"),
        (&["--socket=D/v", "--uds-path=D/h", "--guest-cid=4294967295"], "reserved"),
        (&["--socket=D/v", "--uds-path=D/h", "--guest-cid=x"], "guest-cid"),
        (&["--socket=D/v", "--uds-path=LONG"], "too long"),
        (&["--socket=D/v", "--uds-path=D/taken"], "another process"),
        (&["--socket=D/v", "--uds-path=D/file"], "socket"),
        (&["--socket=D/v", "--uds-path=D/none/h"], "D/none/h"),
        (&["--socket=D/v", "--uds-path=/proc/h"], "/proc/h"),
        (&["--socket=D/v", "--uds-path=D/h", "--forward-cid=1"], "forward-cid"),
        (&["--socket=D/v", "--uds-path=D/h", "--queue-size=100"], "queue-size"),
        (&["--socket=D/v", "--uds-path=D/h", "--tx-buffer-size=1"], "tx-buffer-size"),
        (&["--socket=D/v", "--uds-path=D/h", "--allow-host-ports=9-1"], "ports"),
        (&["--socket=D/v", "--uds-path=D/h", "--map=x"], "PORT:PATH"),
        (&["--vm=cid=3,socket=D/v,uds-path=D/h", "--vm=cid=3,socket=D/w,uds-path=D/i"], "CID 3"),
        (&["--vm=cid=3,socket=D/v,uds-path=D/h", "--vm=cid=4,socket=D/v,uds-path=D/i"], "twice"),
        (&["--vm=cid=3,socket=D/v,udspath=D/h"], "udspath"),
        (&["--vm=cid=3,uds-path=D/h"], "socket"),
        (&["--vm=cid=3,socket=D/v,uds-path=D/h", "--guest-cid=4"], "--guest-cid"),
        (&["--config=D/bad.toml"], "sockett"),
        (&["--config=D/none.toml"], "none.toml"),
        (&["--config=/dev/zero"], "larger than 1 MiB"),
        (&["--socket=D/v", "--uds-path=D/h", "--cpu-affinity=1023"], "no CPU 1023"),
    ];
    for (arguments, expected) in cases {
        let arguments =
            arguments.iter().map(|a| a.replace("LONG", &long).replace("D/", &format!("{d}/")));
        let output = program().unwrap().args(arguments.clone()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let expected = expected.replace("D/", &format!("{d}/"));
        assert_eq!(output.status.code(), Some(1), "{:?}: {stderr}", arguments.collect::<Vec<_>>());
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        let said: Vec<&str> = stderr.trim_end().split(": ").collect();
        let is_new = |i: usize| !said[..i].contains(&said[i]);
        assert!((0..said.len()).all(is_new), "said twice: {stderr}");
        assert!(
            stderr.starts_with("error: ") && stderr.contains(&expected),
            "{expected}: {stderr}"
        );
    }
    drop(taken);
}

#[test]
fn a_file_says_the_same_as_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().display();
    let file = dir.path().join("vms.toml");
    let text = format!(
        "[[vm]]\nguest-cid = 7\nsocket = \"{d}/vmm7\"\nuds-path = \"{d}/host7\"\nconnect-only = true\n\
         [[vm]]\nguest_cid = 8\nsocket = \"{d}/vmm8\"\nuds_path = \"{d}/host8\"\ntx_buffer_size = 65536\n"
    );
    std::fs::write(&file, text).unwrap();
    let _daemon = start(dir.path(), "vmm8", &[format!("--config={}", file.display())]);
    let mut seven = VsockGuest::start(&dir.path().join("vmm7"), VsockOptions::default()).unwrap();
    assert_eq!(seven.cid, 7);
    assert!(refused(&mut seven, HOST, 1));
    let mut eight = VsockGuest::start(&dir.path().join("vmm8"), VsockOptions::default()).unwrap();
    let _service = UnixListener::bind(dir.path().join("host8_1")).unwrap();
    let stream = GuestStream::connect(&mut eight, 1025, HOST, 1).unwrap();
    assert_eq!(stream.credit(), 65536);
}

/// As vhost-device-vsock has it, byte for byte but for the directories.
#[test]
fn a_yaml_file_of_the_other_proxy_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().display();
    let file = dir.path().join("vms.yaml");
    let text = format!(
        "vms:\n    - guest_cid: 3\n      socket: {d}/vmm3\n      uds_path: {d}/host3\n      \
         tx_buffer_size: 65536\n      queue_size: 1024\n      groups: group1+groupA\n    \
         - guest_cid: 4\n      socket: {d}/vmm4\n      uds_path: {d}/host4\n      \
         groups: group2\n"
    );
    std::fs::write(&file, text).unwrap();
    let _daemon = start(dir.path(), "vmm4", &[format!("--config={}", file.display())]);
    let mut three = VsockGuest::start(&dir.path().join("vmm3"), VsockOptions::default()).unwrap();
    assert_eq!(three.cid, 3);
    let _service = UnixListener::bind(dir.path().join("host3_1")).unwrap();
    let stream = GuestStream::connect(&mut three, 1025, HOST, 1).unwrap();
    assert_eq!(stream.credit(), 65536);
    let mut four = VsockGuest::start(&dir.path().join("vmm4"), VsockOptions::default()).unwrap();
    assert!(refused(&mut four, 3, 1), "they share no group");
}
