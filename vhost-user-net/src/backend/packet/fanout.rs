//! Several packet sockets on one interface: which of them gets a frame.
//!
//! # Theory of operation
//! A socket cannot leave its group while it lives, and a guest may serve fewer queues than there are
//! sockets: frames for the others would wait for ever. So the kernel does not choose by itself, but by a
//! small filter program of ours, which is replaced when the number of queues served changes. A flow's
//! frames go to one queue: the program takes the hash that the kernel has for the flow, and where it has
//! none, the addresses.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use libc::{c_int, sock_filter, sock_fprog};

use super::set_socket_option;

/// `PACKET_FANOUT_CBPF`: a filter program says which socket.
const PACKET_FANOUT_CBPF: c_int = 6;
/// `PACKET_FANOUT_DATA`: sets that program.
const PACKET_FANOUT_DATA: c_int = 22;

/// `SKF_AD_OFF`, and what lies there: protocol and hash.
const ANCILLARY: u32 = 0_u32.wrapping_sub(0x1000);
const AD_PROTOCOL: u32 = ANCILLARY;
const AD_RXHASH: u32 = ANCILLARY.wrapping_add(32);
/// `SKF_NET_OFF`: the IP header.
const NETWORK: u32 = 0_u32.wrapping_sub(0x0010_0000);

const LOAD_WORD: u16 = 0x20;
const STORE_X_OF_A: u16 = 0x07;
const XOR_X: u16 = 0xac;
const RIGHT: u16 = 0x74;
const MODULO: u16 = 0x94;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP: u16 = 0x05;
const RETURN_A: u16 = 0x16;

/// Makes one group of `sockets`, which are bound to interface `index`; the first gets everything.
///
/// # Errors
/// The kernel refuses.
pub(super) fn join(sockets: &[OwnedFd], index: c_int) -> io::Result<()> {
    use std::os::fd::AsFd as _;
    // The group's number is the interface's and ours.
    let group = (index ^ i32::try_from(std::process::id()).unwrap_or(0)) & 0xffff;
    for socket in sockets {
        let value = group | PACKET_FANOUT_CBPF << 16;
        super::set_option(socket.as_fd(), libc::PACKET_FANOUT, value)?;
    }
    sockets.first().map_or(Ok(()), |socket| spread(socket.as_fd(), 1))
}

/// Has the first `queues` sockets (one at the least) of the group of `socket` share its frames.
///
/// # Errors
/// The kernel refuses.
pub(super) fn spread(socket: BorrowedFd<'_>, queues: usize) -> io::Result<()> {
    let mut program = program(u32::try_from(queues.max(1)).map_err(io::Error::other)?);
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    // The kernel copies the program before the call returns.
    let value = sock_fprog { len, filter: program.as_mut_ptr() };
    set_socket_option(socket, libc::SOL_PACKET, PACKET_FANOUT_DATA, &value)
}

/// A frame to a number below `queues`. A load past the frame's end gives queue 0.
fn program(queues: u32) -> Vec<sock_filter> {
    let step = |code, k| sock_filter { code, jt: 0, jf: 0, k };
    let skip = |k, jt, jf| sock_filter { code: JUMP_IF_EQUAL, jt, jf, k };
    let load = |k| step(LOAD_WORD, k);
    let to_x = step(STORE_X_OF_A, 0);
    let xor = step(XOR_X, 0);
    // Where neither kernel nor IP says anything, the sum is the protocol's number: one queue.
    let ipv4 = [load(NETWORK + 12), to_x, load(NETWORK + 16), xor];
    let ipv6 = [load(NETWORK + 20), to_x, load(NETWORK + 36), xor];
    let mut all = vec![load(AD_RXHASH), skip(0, 0, 12), load(AD_PROTOCOL)];
    all.push(skip(0x0800, 1, 0));
    all.push(skip(0x86dd, 5, 9));
    all.extend(ipv4);
    all.push(step(JUMP, 4));
    all.extend(ipv6);
    // Addresses differ in their last bits, which another two of 16 bits each may cancel.
    all.extend([to_x, step(RIGHT, 16), xor, step(MODULO, queues), step(RETURN_A, 0)]);
    all
}
