//! Clients of the host that others wrote.

use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use testkit::driver::vsock::{GuestStream, Packet, VsockOptions, op};
use testkit::skip::skip;
use testkit::toolroot::ToolRoot;
use testkit::vsock_host::{PATIENCE, VsockHost, read_ok};

/// What `ssh vsock-mux/PATH` runs: it connects, and passes the connection to ssh on its output.
const SSH_PROXY: &str = "/usr/lib/systemd/systemd-ssh-proxy";

fn ssh_proxy(host: &VsockHost) -> Option<(Command, UnixStream)> {
    let root = ToolRoot::for_test()?;
    if !root.host_path(SSH_PROXY).exists() {
        skip("the tool root has no systemd-ssh-proxy");
        return None;
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = root.command(SSH_PROXY).unwrap();
    command.arg(format!("vsock-mux{}", host.path("host").display())).arg("22");
    command.stdout(OwnedFd::from(theirs));
    Some((command, ours))
}

/// The connection that the proxy of ssh passes.
fn passed(from: &UnixStream) -> UnixStream {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let mut list = [IoSliceMut::new(&mut byte)];
    recvmsg(from, &mut list, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let stream = UnixStream::from(fd.expect("a descriptor"));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn systemds_ssh_proxy_connects_ssh_to_the_guest() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let Some((mut command, ours)) = ssh_proxy(&host) else { return };
    for _ in 0..3 {
        let mut child = command.spawn().unwrap();
        let request = guest.expect(op::REQUEST).unwrap();
        assert_eq!(request.dst_port, 22);
        // The server speaks first, so fast that its greeting follows OK at once.
        let mut theirs = GuestStream::accept(&mut guest, &request).unwrap();
        theirs.send_all(&mut guest, b"SSH-2.0-guest\r\n").unwrap();
        let mut stream = passed(&ours);
        assert!(child.wait().unwrap().success());
        // The proxy only looks at OK; ssh passes over lines before the server's greeting.
        assert_eq!(read_ok(&mut stream).unwrap(), request.src_port);
        let mut greeting = [0; 15];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"SSH-2.0-guest\r\n");
        stream.write_all(b"SSH-2.0-host\r\n").unwrap();
        assert_eq!(theirs.receive_all(&mut guest, 14).unwrap(), b"SSH-2.0-host\r\n");
        guest.send(&theirs.packet(op::RST)).unwrap();
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn systemds_ssh_proxy_is_told_of_a_refusal_at_once() {
    let host = VsockHost::start(&[]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let Some((mut command, _ours)) = ssh_proxy(&host) else { return };
    let mut child = command.spawn().unwrap();
    let request = guest.expect(op::REQUEST).unwrap();
    let refused = Instant::now();
    guest.send(&Packet::new(guest.cid, 22, request.src_port, op::RST)).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(refused.elapsed() < Duration::from_secs(1), "{:?}", refused.elapsed());
}
