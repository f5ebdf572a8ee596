//! What is fuzzed: each function takes any bytes and may not panic, loop or touch what is not its own.
//!
//! The fuzz targets and a bounded test of the workspace (`tests/tests/fuzz_smoke.rs`) share this file.
#![allow(unsafe_code, reason = "hands buffers of its own to the engine's lists")]
#![allow(unreachable_pub, reason = "included by several crates")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use outboard_common::device::Device;
use outboard_common::ring::{Chain, IoVecs};
use outboard_common::sys::EventFd;
use outboard_common::vhost_user::session::{Session, SessionOptions};
use outboard_common::vhost_user::wire;
use testkit::driver::{GuestQueue, INDIRECT_DESC, RingFormat};
use testkit::frontend::encode;
use testkit::inverter::Inverter;
use testkit::memory::GuestRam;
use zerocopy::FromBytes;

/// A target's name and what it runs.
pub type Entry = (&'static str, fn(&[u8]));

/// All of them.
pub const ENTRIES: [Entry; 7] = [
    ("wire", wire_parser),
    ("session", session),
    ("rings", rings),
    ("blk_request", blk_request),
    ("fuse_request", fuse_request),
    ("vsock_packet", vsock_packet),
    ("net_header", net_header),
];

/// The vhost-user message decoder: code and descriptor count from the first bytes, the rest is body.
pub fn wire_parser(data: &[u8]) {
    let Some((&[code, fds], body)) = data.split_first_chunk() else { return };
    let _ = wire::parse(u32::from(code), body, usize::from(fds % 9));
    if let Some((header, _)) = data.split_first_chunk() {
        let _ = wire::parse_header(header);
    }
}

/// A whole session on a stream of messages: each takes a code, a size and then a body from the data.
/// Memory files come with those that want one.
pub fn session(mut data: &[u8]) {
    let Ok((ours, theirs)) = std::os::unix::net::UnixStream::pair() else { return };
    let Ok(shutdown) = EventFd::new() else { return };
    let Ok(ram) = GuestRam::new(1 << 16) else { return };
    let device: Arc<dyn Device> = Arc::new(Inverter);
    let served = std::thread::spawn(move || {
        Session::new(device, theirs, vec![Arc::default(); 2], SessionOptions::default())
            .serve(&shutdown);
    });
    // Replies must not fill the socket: somebody reads them.
    let Ok(reader) = ours.try_clone() else { return };
    let drain = std::thread::spawn(move || std::io::copy(&mut &reader, &mut std::io::sink()));
    let Ok(front_end) = testkit::frontend::Wire::new(ours) else { return };
    let file = std::os::fd::AsFd::as_fd(ram.regions()[0].file());
    while let Some((&[code, flags, size], rest)) = data.split_first_chunk() {
        let (body, rest) = rest.split_at(usize::from(size % 80).min(rest.len()));
        data = rest;
        let fds = if flags & 1 != 0 { &[file][..] } else { &[] };
        let message = encode(u32::from(code % 50), 1 | u32::from(flags & 8), body);
        if front_end.send_bytes(&message, fds).is_err() {
            break;
        }
    }
    let _ = front_end.stream().shutdown(std::net::Shutdown::Both);
    drop(front_end);
    assert!(served.join().is_ok(), "the session panicked");
    let _ = drain.join();
}

/// Both ring formats over memory filled with the data.
pub fn rings(data: &[u8]) {
    let Some((&[size, avail], data)) = data.split_first_chunk() else { return };
    for format in RingFormat::ALL {
        let Ok(ram) = GuestRam::new(1 << 16) else { return };
        let size = if format == RingFormat::Packed { size % 32 + 1 } else { 1 << (size % 6) };
        let features = format.features() | INDIRECT_DESC;
        let Ok(driver) = GuestQueue::new(&ram, u16::from(size), features) else { return };
        // Everywhere: descriptors, rings, tables.
        for at in (0..1u64 << 15).step_by(data.len().max(1)) {
            ram.write(at, data);
        }
        if format == RingFormat::Split {
            driver.areas()[1].store16(2, u16::from(avail), Ordering::Release);
            driver.areas()[2].store16(2, 0, Ordering::Release);
        }
        let Ok(memory) = ram.shared_memory() else { return };
        let Ok(mut queue) = driver.device_side(&memory, driver.initial_base(), None) else {
            return;
        };
        let mut chain = Chain::new();
        let mut popped = 0u32;
        while queue.pop(&mut chain) {
            let mut bytes = [0u8; 64];
            chain.readable.read(&mut bytes);
            queue.push(&mut chain, 0);
            queue.publish();
            // Our used descriptors may look available in this memory, but not without end.
            popped += 1;
            if popped > 1000 {
                break;
            }
        }
    }
}

/// The bytes as a list of pieces whose lengths come from the data itself, and the bytes left.
fn pieces(data: &mut &[u8], store: &mut Vec<u8>) -> IoVecs {
    store.clear();
    let lens: Vec<usize> = match data.split_first_chunk::<4>() {
        Some((lens, rest)) => {
            *data = rest;
            lens.iter().map(|&n| usize::from(n % 48)).collect()
        }
        None => Vec::new(),
    };
    let total = lens.iter().sum::<usize>().min(data.len());
    store.extend_from_slice(&data[..total]);
    *data = &data[total..];
    let mut list = IoVecs::new();
    let mut at = 0;
    for n in lens {
        let n = n.min(total - at);
        // SAFETY: a piece of `store`, which outlives the list and is not touched meanwhile.
        unsafe { list.push(store.as_mut_ptr().wrapping_add(at), n) };
        at += n;
    }
    list
}

/// The block request parser.
pub fn blk_request(mut data: &[u8]) {
    use vhost_user_blk::request::{Limits, parse};
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let mut readable = pieces(&mut data, &mut a);
    let mut writable = pieces(&mut data, &mut b);
    let mut status = IoVecs::new();
    let flag = |n: usize| data.get(n).is_some_and(|b| b & 1 != 0);
    let limits = Limits {
        capacity_sectors: u64::from(data.first().copied().unwrap_or(9)),
        read_only: flag(1),
        discard: flag(2),
        write_zeroes: flag(3),
    };
    let _ = parse(&mut readable, &mut writable, &mut status, &limits);
}

/// The FUSE request parsers: one byte of switches, a header, a body.
pub fn fuse_request(data: &[u8]) {
    use virtiofsd::fuse::request::{Dialect, parse};
    use virtiofsd::fuse::{Opcode, wire::InHeader};
    let Some((&switches, data)) = data.split_first() else { return };
    let Ok((header, body)) = InHeader::read_from_prefix(data) else { return };
    // The low byte alone, so that most headers have an operation.
    let Some(opcode) = Opcode::from_number(header.opcode % 64) else { return };
    let dialect = Dialect { setxattr_ext: switches & 1 != 0 };
    let _ = parse(opcode, &header, body, dialect);
}

/// The vsock packet parser.
pub fn vsock_packet(mut data: &[u8]) {
    let mut store = Vec::new();
    let mut chain = pieces(&mut data, &mut store);
    let had = chain.len();
    if vsock_proxy::packet::parse(&mut chain).is_ok() {
        assert!(chain.len() <= had, "a payload larger than its chain");
    }
}

/// The network header's check and the control queue's commands.
pub fn net_header(data: &[u8]) {
    use vhost_user_net::control::{self, Negotiated};
    use vhost_user_net::header::{NetHeader, TxOffloads};
    let Some((features, rest)) = data.split_first_chunk() else { return };
    let features = u64::from_le_bytes(*features);
    if let Ok((header, frame)) = NetHeader::read_from_prefix(rest) {
        let _ = header.check(frame.len(), TxOffloads::new(features));
    }
    let _ = control::parse(rest, Negotiated { features, max_pairs: 4 });
}
