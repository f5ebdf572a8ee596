//! vsock-proxy with a real guest kernel: User Mode Linux, and a program that uses its sockets.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, accept, bind, listen, recv,
    send, socket,
};
use testkit::daemon::bin;
use testkit::guests::uml::UmlGuest;
use testkit::guests::{Job, VirtioId};
use testkit::toolroot::ToolRoot;
use testkit::vsock_host::{VsockHost, read_ok};
use testkit::vsock_stream::{PORTS, checksum_reader, send_bulk};

const TIMEOUT: Duration = Duration::from_secs(240);

/// Runs `serve` on a thread for every client of `listener`.
fn serve(listener: UnixListener, serve: fn(UnixStream)) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::Builder::new().stack_size(64 << 10).spawn(move || serve(stream)).unwrap();
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

fn sink(mut stream: UnixStream) {
    let sum = checksum_reader(&mut stream).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "half-close was lost");
    stream.write_all(&sum.to_le_bytes()).unwrap();
}

fn source(mut stream: UnixStream) {
    let sum = send_bulk(&mut stream).unwrap();
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

#[test]
fn a_real_guest_uses_its_sockets() {
    let Some(root) = ToolRoot::for_test() else { return };
    let host = VsockHost::start(&[]).unwrap();
    serve(host.listen(PORTS.echo).unwrap(), echo);
    serve(host.listen(PORTS.sink).unwrap(), sink);
    serve(host.listen(PORTS.source).unwrap(), source);
    serve_messages(&host.path(&format!("host_{}", PORTS.messages)));
    let program = host.path("guest_vsock");
    std::fs::copy(bin("guest_vsock").unwrap(), &program).unwrap();

    let job = Job::named("vsock-all").unwrap().set("DIR", &host.dir.path().display().to_string());
    let guest = UmlGuest::new(root).device(host.daemon.socket(), VirtioId::Vsock);
    let mut guest = guest.start(&job).unwrap();
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
