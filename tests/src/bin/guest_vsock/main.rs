//! What a guest does with its vsock sockets: run inside one by the tests, as there is no other program
//! there that knows them. Prints a line for each step; fails at the first that goes wrong.

mod calls;
mod forward;
mod socket;

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use testkit::vsock_stream::{PORTS, checksum_reader, messages, send_bulk};

use crate::socket::{accept, listen, shutdown};

/// Connects to `port` of the host.
fn connect(kind: i32, port: u32) -> Result<File> {
    socket::connect(kind, libc::VMADDR_CID_HOST, port)
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

fn bulk(bytes: u64) -> Result<()> {
    let rate = |start: Instant| bytes as f64 / 1e6 / start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut up = connect(libc::SOCK_STREAM, PORTS.sink)?;
    let sum = send_bulk(&mut up, bytes)?;
    // Half-closed: the host answers with what it summed.
    shutdown(&up, Shutdown::Write)?;
    let mut theirs = [0; 8];
    up.read_exact(&mut theirs)?;
    ensure!(sum.to_le_bytes() == theirs, "the host summed something else");
    say(&format!("{bytes} bytes up, {:.0} MB/s", rate(start)))?;

    let start = Instant::now();
    let mut down = connect(libc::SOCK_STREAM, PORTS.source)?;
    let sum = checksum_reader(&mut down, bytes)?;
    down.read_exact(&mut theirs)?;
    ensure!(sum.to_le_bytes() == theirs, "the host sent something else");
    ensure!(down.read(&mut [0; 1])? == 0, "no end of file");
    say(&format!("{bytes} bytes down, {:.0} MB/s", rate(start)))
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
    let listener = listen(libc::SOCK_STREAM, PORTS.guest)?;
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
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["all", mib] => {
            refused()?;
            large_write()?;
            many()?;
            seqpacket()?;
            bulk(mib.parse::<u64>().context("MiB")? << 20)?;
            serve()
        }
        ["calls"] => calls::serve(),
        ["forward", proxy] => forward::forward(proxy.as_ref()),
        _ => bail!("unknown step {words:?}"),
    }
}
