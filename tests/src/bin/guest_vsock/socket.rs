//! Sockets of AF_VSOCK.
#![allow(unsafe_code, reason = "sockets of a family that the standard library does not know")]

use std::fs::File;
use std::io::{Error, IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

fn socket(kind: i32) -> Result<OwnedFd> {
    // SAFETY: makes a descriptor that is then owned.
    let fd = unsafe { libc::socket(libc::AF_VSOCK, kind, 0) };
    ensure!(fd >= 0, "socket: {}", Error::last_os_error());
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

/// A connection to `port` of `cid`.
pub(crate) fn connect(kind: i32, cid: u32, port: u32) -> Result<File> {
    let fd = socket(kind)?;
    let address = address(cid, port);
    // SAFETY: the address lives through the call.
    let result = unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) };
    if result != 0 {
        return Err(Error::last_os_error()).context(format!("connect to {port}"));
    }
    Ok(fd.into())
}

/// Listens on `port` of every CID of this machine.
pub(crate) fn listen(kind: i32, port: u32) -> Result<OwnedFd> {
    let fd = socket(kind)?;
    let address = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address lives through the call.
    let bound = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), ADDRESS_LEN) };
    // SAFETY: a plain call.
    let listening = unsafe { libc::listen(fd.as_raw_fd(), 1024) };
    ensure!(bound == 0 && listening == 0, "listen: {}", Error::last_os_error());
    Ok(fd)
}

/// The next client.
pub(crate) fn accept(listener: &OwnedFd) -> Result<File> {
    // SAFETY: no address is asked for.
    let fd =
        unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
    ensure!(fd >= 0, "accept: {}", Error::last_os_error());
    // SAFETY: just made, and nobody else's.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Half-closes.
pub(crate) fn shutdown(stream: &File, how: Shutdown) -> Result<()> {
    let how = match how {
        Shutdown::Read => libc::SHUT_RD,
        Shutdown::Write => libc::SHUT_WR,
        Shutdown::Both => libc::SHUT_RDWR,
    };
    // SAFETY: a plain call.
    let result = unsafe { libc::shutdown(stream.as_raw_fd(), how) };
    ensure!(result == 0, "shutdown: {}", Error::last_os_error());
    Ok(())
}

/// Sends a message; `ends_record`: with MSG_EOR.
pub(crate) fn send_message(stream: &File, bytes: &[u8], ends_record: bool) -> Result<()> {
    let list = [IoSlice::new(bytes)];
    let flags = if ends_record { libc::MSG_EOR } else { 0 };
    // SAFETY: all bytes zero are a msghdr without address, data or control.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_ptr().cast_mut().cast();
    message.msg_iovlen = 1;
    // SAFETY: an `IoSlice` is an iovec, and it and its bytes live through the call.
    let n = unsafe { libc::sendmsg(stream.as_raw_fd(), &raw const message, flags) };
    ensure!(usize::try_from(n) == Ok(bytes.len()), "sendmsg: {n}, {}", Error::last_os_error());
    Ok(())
}

/// Receives a message, and whether MSG_EOR came with it.
pub(crate) fn receive_message(stream: &File) -> Result<(Vec<u8>, bool)> {
    let mut bytes = vec![0; 1 << 20];
    let mut list = [IoSliceMut::new(&mut bytes)];
    // SAFETY: as in `send_message`.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_mut_ptr().cast();
    message.msg_iovlen = 1;
    // SAFETY: an `IoSliceMut` is an iovec, and it and its bytes live through the call.
    let n = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, 0) };
    let n =
        usize::try_from(n).ok().with_context(|| format!("recvmsg: {}", Error::last_os_error()))?;
    let ends_record = message.msg_flags & libc::MSG_EOR != 0;
    bytes.truncate(n);
    Ok((bytes, ends_record))
}
