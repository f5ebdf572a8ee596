//! A proxy that forwards to the AF_VSOCK of the kernel it runs on, tried where that kernel has a loopback:
//! in a guest, with a driver for its only VM.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use testkit::daemon::Daemon;
use testkit::driver::vsock::{GuestStream, HOST, Packet, SEQPACKET, VsockGuest, VsockOptions, op};

use crate::socket;

/// This kernel's own CID.
const LOCAL: u32 = 1;
/// Ports: a stream service, one of messages, and one that stands for the guest's.
const STREAMS: u32 = 7000;
const MESSAGES: u32 = 7001;
const GUEST: u32 = 6000;
/// Bytes each way: more than all buffers between both ends.
const LENGTH: usize = 4 << 20;

fn pattern() -> Vec<u8> {
    (0..LENGTH as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Bytes each way on a connection, and the end of both directions.
fn exchange(guest: &mut VsockGuest, mut theirs: GuestStream, host: File) -> Result<()> {
    let data = pattern();
    let (mut reader, mut writer) = (host.try_clone()?, host.try_clone()?);
    let reading = std::thread::spawn(move || -> std::io::Result<Vec<u8>> {
        let mut got = Vec::new();
        reader.read_to_end(&mut got)?;
        Ok(got)
    });
    theirs.send_all(guest, &data)?;
    guest.send(&theirs.packet(op::SHUTDOWN).flags(2))?;
    let got = reading.join().expect("a reader")?;
    ensure!(got == data, "{} other bytes came from the guest", got.len());

    let sent = data.clone();
    let writing = std::thread::spawn(move || writer.write_all(&sent));
    let got = theirs.receive_all(guest, data.len())?;
    writing.join().expect("a writer")?;
    ensure!(got == data, "other bytes came to the guest");
    socket::shutdown(&host, Shutdown::Both)?;
    drop(host);
    let end = next(guest)?;
    ensure!([op::SHUTDOWN, op::RST].contains(&end.op), "instead of an end: {end:?}");
    guest.send(&theirs.packet(op::RST))
}

/// The next packet that is no credit.
fn next(guest: &mut VsockGuest) -> Result<Packet> {
    loop {
        let packet = guest.receive(Duration::from_secs(10))?;
        if ![op::CREDIT_UPDATE, op::CREDIT_REQUEST].contains(&packet.op) {
            return Ok(packet);
        }
    }
}

fn streams(guest: &mut VsockGuest) -> Result<()> {
    let listener = socket::listen(libc::SOCK_STREAM, STREAMS)?;
    let theirs = GuestStream::connect(guest, 1025, HOST, STREAMS)?;
    exchange(guest, theirs, socket::accept(&listener)?)?;
    crate::say("forwarded: guest to AF_VSOCK")?;

    let client = std::thread::spawn(|| socket::connect(libc::SOCK_STREAM, LOCAL, GUEST));
    let request = next(guest)?;
    ensure!((request.op, request.dst_port) == (op::REQUEST, GUEST), "{request:?}");
    let theirs = GuestStream::accept(guest, &request)?;
    exchange(guest, theirs, client.join().expect("a client")?)?;
    crate::say("forwarded: AF_VSOCK to guest")?;

    guest.send(&Packet::new(guest.cid, 1026, 7999, op::REQUEST))?;
    let answer = next(guest)?;
    ensure!((answer.op, answer.src_port) == (op::RST, 7999), "{answer:?}");
    crate::say("forwarded: refusal")
}

/// Messages keep their ends, of messages and of records, both ways.
fn messages(guest: &mut VsockGuest) -> Result<()> {
    let listener = socket::listen(libc::SOCK_SEQPACKET, MESSAGES)?;
    let mut theirs = GuestStream::connect_as(guest, SEQPACKET, 1027, HOST, MESSAGES)?;
    let host = socket::accept(&listener)?;
    for (text, ends_record) in [("one", false), ("two", true), ("three", false)] {
        let flags = if ends_record { 3 } else { 1 };
        let packet = theirs.data(text.as_bytes()).flags(flags);
        guest.send(&packet)?;
        let got = socket::receive_message(&host)?;
        ensure!(got == (text.into(), ends_record), "{got:?} for {text} {ends_record}");
        socket::send_message(&host, text.as_bytes(), ends_record)?;
        let got = next(guest)?;
        theirs.see(&got);
        ensure!((&got.payload[..], got.flags) == (text.as_bytes(), flags), "{got:?} for {text}");
    }
    crate::say("forwarded: messages")
}

/// Runs `proxy`, and everything above with it.
pub(crate) fn forward(proxy: &Path) -> Result<()> {
    let socket = Path::new("/tmp/vmm");
    let mut command = Command::new(proxy);
    command.arg(format!("--socket={}", socket.display()));
    command.args([format!("--forward-cid={LOCAL}"), format!("--forward-listen={GUEST}")]);
    let daemon = Daemon::start_command("vsock-proxy", command, socket)?;
    let options = VsockOptions { memory: 16 << 20, ..VsockOptions::default() };
    let mut guest = VsockGuest::start(daemon.socket(), options)?;
    streams(&mut guest)?;
    messages(&mut guest)
}
