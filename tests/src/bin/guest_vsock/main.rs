//! What a guest does with its vsock sockets: run inside one by the tests, as there is no other program
//! there that knows them. Prints a line for each step; fails at the first that goes wrong.
#![allow(unsafe_code, reason = "sockets of a family that the standard library does not know")]

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use testkit::vsock_stream::{BULK, PORTS, checksum_reader, messages, send_bulk};

fn socket(kind: i32) -> Result<OwnedFd> {
    // SAFETY: makes a descriptor that is then owned.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, kind, 0) };
    ensure!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: zeroes are an address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as u16;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const ADDRESS_LEN: u32 = size_of::<libc::sockaddr_vm>() as u32;

fn connect(kind: i32, port: u32) -> Result<File> {
    let fd = socket(kind)?;
    let address = address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address lives through the call.
    let result = unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).context(format!("connect to {port}"));
    }
    Ok(fd.into())
}

fn listen(port: u32) -> Result<OwnedFd> {
    let fd = socket(libc::SOCK_STREAM)?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives through the call.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) };
    // SAFETY: a plain call.
    let listening = unsafe { libc::listen(fd.as_raw_fd(), 1024) };
    ensure!(bound == 0 && listening == 0, "listen: {}", std::io::Error::last_os_error());
    Ok(fd)
}

fn accept(listener: &OwnedFd) -> Result<File> {
    // SAFETY: no address is asked for.
    let fd =
        unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    ensure!(fd >= 0, "accept: {}", std::io::Error::last_os_error());
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn shutdown(stream: &File, how: Shutdown) -> Result<()> {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // SAFETY: a plain call.
    let result = unsafe { libc::shutdown(stream.as_raw_fd(), how) };
    ensure!(result == 0, "shutdown: {}", std::io::Error::last_os_error());
    Ok(())
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

fn refused() -> Result<()> {
    let start = Instant::now();
    ensure!(connect(libc::SOCK_STREAM, 9).is_err(), "port 9 is served");
    let time = start.elapsed();
    ensure!(time < Duration::from_millis(50), "refused after {time:?}");
    say(&format!("refused: {time:?}"))
}

/// One write of 60,000 bytes, and all of them back.
fn large_write() -> Result<()> {
    let mut stream = connect(libc::SOCK_STREAM, PORTS.echo)?;
    let data: Vec<u8> = (0..60_000u32).map(|i| i.to_le_bytes()[1] ^ i.to_le_bytes()[0]).collect();
    let written = stream.write(&data)?;
    let mut back = vec![0; written];
    stream.read_exact(&mut back)?;
    ensure!(back == data[..written], "other bytes came back");
    ensure!(written == data.len(), "only {written} bytes were written");
    say("write(60000)")
}

fn bulk() -> Result<()> {
    let start = Instant::now();
    let mut up = connect(libc::SOCK_STREAM, PORTS.sink)?;
    let sum = send_bulk(&mut up)?;
    // Half-closed: the host answers with what it summed.
    shutdown(&up, Shutdown::Write)?;
    let mut theirs = [0; 8];
    up.read_exact(&mut theirs)?;
    ensure!(sum.to_le_bytes() == theirs, "the host summed something else");
    say(&format!("up_mb_s={}", BULK / 1_000_000 * 1000 / start.elapsed().as_millis() as u64))?;

    let start = Instant::now();
    let mut down = connect(libc::SOCK_STREAM, PORTS.source)?;
    let sum = checksum_reader(&mut down)?;
    down.read_exact(&mut theirs)?;
    ensure!(sum.to_le_bytes() == theirs, "the host sent something else");
    ensure!(down.read(&mut [0; 1])? == 0, "no end of file");
    say(&format!("down_mb_s={}", BULK / 1_000_000 * 1000 / start.elapsed().as_millis() as u64))
}

fn many() -> Result<()> {
    let streams: Result<Vec<File>> =
        (0..1000).map(|_| connect(libc::SOCK_STREAM, PORTS.echo)).collect();
    let mut streams = streams?;
    for (i, stream) in (0u32..).zip(&mut streams) {
        stream.write_all(&i.to_le_bytes())?;
    }
    for (i, stream) in (0u32..).zip(&mut streams) {
        let mut back = [0; 4];
        stream.read_exact(&mut back)?;
        ensure!(back == i.to_le_bytes(), "connection {i} has another's data");
    }
    say("1000 connections")
}

fn seqpacket() -> Result<()> {
    let mut stream = connect(libc::SOCK_SEQPACKET, PORTS.messages)?;
    let mut buffer = vec![0; 300_000];
    for message in messages() {
        ensure!(stream.write(&message)? == message.len(), "a message was cut");
        let n = stream.read(&mut buffer)?;
        ensure!(buffer[..n] == message, "{n} bytes for a message of {}", message.len());
    }
    say("seqpacket")
}

/// Serves clients of the host: echoes, until one says that it is over.
fn serve() -> Result<()> {
    let listener = listen(PORTS.guest)?;
    say("listening")?;
    loop {
        let mut stream = accept(&listener)?;
        let mut data = Vec::new();
        stream.read_to_end(&mut data)?;
        if data == b"over" {
            return Ok(());
        }
        stream.write_all(&data)?;
    }
}

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        None => {
            refused()?;
            large_write()?;
            many()?;
            seqpacket()?;
            bulk()?;
            serve()
        }
        Some(other) => bail!("unknown step {other}"),
    }
}
