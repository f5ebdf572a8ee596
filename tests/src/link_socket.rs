//! A packet socket on one interface that sends whole frames, many at a time.
#![allow(unsafe_code, reason = "a packet socket's address and sendmmsg exist in no safe form")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};

/// SOL_PACKET's PACKET_QDISC_BYPASS: frames go to the driver without a queue in between.
const PACKET_QDISC_BYPASS: libc::c_int = 20;

/// A packet socket bound to an interface of the name space it was made in.
#[derive(Debug)]
pub struct LinkSocket {
    fd: OwnedFd,
}

impl LinkSocket {
    /// A socket on `interface` that only sends, past the queueing discipline.
    ///
    /// # Errors
    /// There is no such interface, or no right to open a packet socket.
    pub fn sender(interface: &str) -> Result<Self> {
        let socket = Self::bound(interface)?;
        socket.set(libc::SOL_PACKET, PACKET_QDISC_BYPASS, 1)?;
        Ok(socket)
    }

    fn bound(interface: &str) -> Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: plain numbers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("open a packet socket");
        }
        // SAFETY: a new descriptor that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = CString::new(interface)?;
        // SAFETY: a string with its zero.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        anyhow::ensure!(index != 0, "no interface {interface}");
        // SAFETY: all-zero is a valid address structure.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET)?;
        address.sll_ifindex = i32::try_from(index)?;
        let len = libc::socklen_t::try_from(size_of_val(&address))?;
        // SAFETY: the address is `len` bytes and lives during the call.
        if unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len) } != 0 {
            return Err(io::Error::last_os_error()).context(format!("bind to {interface}"));
        }
        Ok(Self { fd })
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> Result<()> {
        let len = libc::socklen_t::try_from(size_of_val(&value))?;
        // SAFETY: the value is `len` bytes and lives during the call.
        let done = unsafe {
            libc::setsockopt(self.fd.as_raw_fd(), level, option, (&raw const value).cast(), len)
        };
        if done != 0 {
            return Err(io::Error::last_os_error()).context("set an option of a packet socket");
        }
        Ok(())
    }

    /// Sends `frame` `count` times in one system call; gives how many the interface took.
    #[must_use]
    pub fn send_copies(&self, frame: &[u8], count: usize) -> usize {
        let mut part =
            libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
        // SAFETY: all-zero is a valid message header.
        let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
        message.msg_hdr.msg_iov = &raw mut part;
        message.msg_hdr.msg_iovlen = 1;
        let mut messages = vec![message; count];
        let most = u32::try_from(count).unwrap_or(0);
        // SAFETY: the messages, the part and the frame live during the call.
        let sent = unsafe { libc::sendmmsg(self.fd.as_raw_fd(), messages.as_mut_ptr(), most, 0) };
        usize::try_from(sent).unwrap_or(0)
    }
}

/// Has the kernel cut what is sent on `socket` into datagrams of `bytes` (UDP_SEGMENT), as late as it can.
///
/// # Errors
/// The kernel cannot.
pub fn segment_datagrams(socket: &std::net::UdpSocket, bytes: u16) -> io::Result<()> {
    let value = libc::c_int::from(bytes);
    let len = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    let pointer = (&raw const value).cast();
    // SAFETY: the value is `len` bytes and lives during the call.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, pointer, len)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
