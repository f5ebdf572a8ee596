//! What the vsock test's guest program and its host agree on.

use std::io::{Read, Write};

use anyhow::Result;

/// Ports of both sides.
#[derive(Debug)]
pub struct Ports {
    /// The host sends back what it gets.
    pub echo: u32,
    /// The host takes the bulk until end of file, and answers with its checksum.
    pub sink: u32,
    /// The host sends the bulk, its checksum and end of file.
    pub source: u32,
    /// The host sends messages back.
    pub messages: u32,
    /// The guest sends back what it gets until end of file.
    pub guest: u32,
    /// The guest serves ttrpc.
    pub calls: u32,
}

/// The ports.
pub const PORTS: Ports =
    Ports { echo: 2000, sink: 2001, source: 2002, messages: 2003, guest: 5000, calls: 5001 };
/// The service and the methods that the guest's ttrpc server has: one answers with what it got, one
/// ends the server.
pub const CALLS: (&str, &str, &str) = ("outboard.Test", "Echo", "Over");
const CHUNK: usize = 64 << 10;

fn add(mut sum: u64, bytes: &[u8]) -> u64 {
    for word in bytes.as_chunks::<8>().0 {
        sum = (sum ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    }
    sum
}

/// Sends `bytes` bytes, whole chunks of 64 KiB, that never repeat; returns their checksum.
///
/// # Errors
/// The stream ends.
pub fn send_bulk(stream: &mut impl Write, bytes: u64) -> Result<u64> {
    let mut chunk = vec![0; CHUNK];
    let (mut sum, mut word) = (0, 1u64);
    for _ in 0..bytes / CHUNK as u64 {
        for bytes in chunk.as_chunks_mut::<8>().0 {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            *bytes = word.to_le_bytes();
        }
        sum = add(sum, &chunk);
        stream.write_all(&chunk)?;
    }
    Ok(sum)
}

/// Reads what [`send_bulk`] sends; returns its checksum.
///
/// # Errors
/// The stream ends.
pub fn checksum_reader(stream: &mut impl Read, bytes: u64) -> Result<u64> {
    let mut chunk = vec![0; CHUNK];
    let mut sum = 0;
    for _ in 0..bytes / CHUNK as u64 {
        stream.read_exact(&mut chunk)?;
        sum = add(sum, &chunk);
    }
    Ok(sum)
}

/// Messages of many lengths.
#[must_use]
pub fn messages() -> Vec<Vec<u8>> {
    [1, 2, 4096, 65_536, 100_000, 3, 65_537, 200_000, 1]
        .iter()
        .map(|&len: &usize| (0..len).map(|i| (i * 7 + len).to_le_bytes()[0]).collect())
        .collect()
}
