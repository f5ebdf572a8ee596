//! vsock-proxy with real guest kernels: User Mode Linux and QEMU, and a program that uses their sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::IntoRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, accept, bind, listen, recv,
    send, socket,
};
use testkit::daemon::bin;
use testkit::guests::qemu::QemuGuest;
use testkit::guests::uml::UmlGuest;
use testkit::guests::{Job, RunningGuest, VirtioId};
use testkit::toolroot::ToolRoot;
use testkit::vsock_host::{VsockHost, read_ok};
use testkit::vsock_stream::{CALLS, PORTS, checksum_reader, send_bulk};

const TIMEOUT: Duration = Duration::from_secs(240);

/// Runs `serve` on a thread for every client of `listener`.
fn serve(listener: UnixListener, serve: impl Fn(UnixStream) + Copy + Send + 'static) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::Builder::new().stack_size(96 << 10).spawn(move || serve(stream)).unwrap();
        }
    });
}

fn echo(mut stream: UnixStream) {
    let mut buffer = [0; 8192];
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
}

fn sink(mut stream: UnixStream, bytes: u64) {
    let sum = checksum_reader(&mut stream, bytes).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "half-close was lost");
    stream.write_all(&sum.to_le_bytes()).unwrap();
}

fn source(mut stream: UnixStream, bytes: u64) {
    let sum = send_bulk(&mut stream, bytes).unwrap();
    stream.write_all(&sum.to_le_bytes()).unwrap();
}

/// Sends messages back, each whole.
fn serve_messages(path: &Path) {
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&listener, 8).unwrap();
    std::thread::spawn(move || {
        let stream = accept(&listener).unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&stream, 256 << 10).unwrap();
        let mut buffer = vec![0; 300_000];
        while let Ok((n @ 1.., _)) = recv(&stream, buffer.as_mut_slice(), RecvFlags::empty()) {
            send(&stream, &buffer[..n], SendFlags::NOSIGNAL).unwrap();
        }
    });
}

/// A job of the guest's program with the words `step`.
fn job(step: &str) -> Job {
    Job::named("vsock").unwrap().program(bin("guest_vsock").unwrap()).set("STEP", step)
}

/// All that a guest can do with sockets: with `mib` MiB each way, checked; a write of 60,000 bytes; 1,000
/// connections at once; half-close by either side; a refusal within 50 ms; messages.
fn uses_its_sockets(mib: u64, start: impl FnOnce(&VsockHost, &Job) -> RunningGuest) {
    let host = VsockHost::start(&[]).unwrap();
    let bytes = mib << 20;
    serve(host.listen(PORTS.echo).unwrap(), echo);
    serve(host.listen(PORTS.sink).unwrap(), move |stream| sink(stream, bytes));
    serve(host.listen(PORTS.source).unwrap(), move |stream| source(stream, bytes));
    serve_messages(&host.path(&format!("host_{}", PORTS.messages)));

    let mut guest = start(&host, &job(&format!("all {mib}")));
    guest.wait_for("listening", TIMEOUT).unwrap();
    for i in 0..50 {
        let mut stream = host.ask(PORTS.guest).unwrap();
        read_ok(&mut stream).unwrap();
        let question = vec![i; 10_000];
        stream.write_all(&question).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer == question, "{} bytes", answer.len());
    }
    let mut stream = host.ask(PORTS.guest).unwrap();
    read_ok(&mut stream).unwrap();
    stream.write_all(b"over").unwrap();
    drop(stream);
    let result = guest.wait(TIMEOUT).unwrap();
    result.expect_success();
    assert!(result.console.contains("1000 connections"), "{}", result.console);
}

#[test]
fn uml_uses_its_sockets() {
    let Some(root) = ToolRoot::for_test() else { return };
    uses_its_sockets(1024, |host, job| {
        let guest = UmlGuest::new(root).device(host.daemon.socket(), VirtioId::Vsock);
        guest.start(job).unwrap()
    });
}

/// PCI, two CPUs, rings of another size, and a kernel configured by others.
#[test]
fn qemu_uses_its_sockets() {
    let Some(root) = ToolRoot::for_test() else { return };
    uses_its_sockets(64, |host, job| {
        let guest = QemuGuest::new(root).device(host.daemon.socket(), VirtioId::Vsock);
        guest.start(job).unwrap()
    });
}

/// As the agents of pods are called: ttrpc over `CONNECT`, by several clients.
#[test]
fn a_ttrpc_server_in_the_guest_answers_ten_thousand_calls() {
    const CLIENTS: u32 = 4;
    const CALLS_EACH: u32 = 2500;
    let Some(root) = ToolRoot::for_test() else { return };
    let host = VsockHost::start(&[]).unwrap();
    let guest = UmlGuest::new(root).device(host.daemon.socket(), VirtioId::Vsock);
    let mut guest = guest.start(&job("calls")).unwrap();
    guest.wait_for("listening", TIMEOUT).unwrap();
    let client = || {
        let mut stream = host.ask(PORTS.calls).unwrap();
        read_ok(&mut stream).unwrap();
        stream.set_read_timeout(None).unwrap();
        ttrpc::Client::new(stream.into_raw_fd()).unwrap()
    };
    let request = |method: &str, payload: Vec<u8>| {
        let mut request = ttrpc::Request::new();
        request.service = CALLS.0.to_owned();
        request.method = method.to_owned();
        request.timeout_nano = 10_000_000_000;
        request.payload = payload;
        request
    };
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let client = client();
            scope.spawn(move || {
                for call in 0..CALLS_EACH {
                    // From nothing to several packets.
                    let len = (call * 37 % 9000) as usize;
                    let payload: Vec<u8> = (number + call..).map(|n| n as u8).take(len).collect();
                    let response = client.request(request(CALLS.1, payload.clone())).unwrap();
                    assert!(response.payload == payload, "call {call} of client {number}");
                }
            });
        }
    });
    client().request(request(CALLS.2, Vec::new())).unwrap();
    guest.wait(TIMEOUT).unwrap().expect_success();
}

/// A proxy that forwards to AF_VSOCK, in a guest whose kernel can loop it back: few hosts' can.
#[test]
fn connections_are_forwarded_to_the_kernels_own_vsock() {
    let Some(root) = ToolRoot::for_test() else { return };
    let job = Job::named("vsock-forward").unwrap();
    let job = job.program(bin("guest_vsock").unwrap()).program(bin("vsock-proxy").unwrap());
    let result = UmlGuest::new(root).run(&job, TIMEOUT).unwrap();
    result.expect_success();
    for line in ["guest to AF_VSOCK", "AF_VSOCK to guest", "refusal", "messages"] {
        assert!(result.console.contains(&format!("forwarded: {line}")), "{}", result.console);
    }
}
