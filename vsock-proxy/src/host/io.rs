//! The system calls that move data between guest memory and the host's descriptors, and the ones for
//! AF_VSOCK addresses. Everything else the proxy does without `unsafe`.
#![allow(unsafe_code, reason = "gives the kernel pointers into guest memory, and socket addresses")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{c_int, iovec, msghdr};

/// Entries that one system call takes.
pub(crate) const IOV_MAX: usize = 1024;

fn checked(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_negative| io::Error::last_os_error())
}

fn message(list: &[iovec]) -> msghdr {
    // SAFETY: all bytes zero are a msghdr without address, data or control.
    let mut message: msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.as_ptr().cast_mut();
    message.msg_iovlen = list.len().min(IOV_MAX);
    message
}

/// Receives from a socket into `list`, without waiting. The flags say what was cut off.
///
/// # Errors
/// As `recvmsg`.
pub(crate) fn receive(fd: BorrowedFd<'_>, list: &[iovec]) -> io::Result<(usize, c_int)> {
    let mut message = message(list);
    // SAFETY: the entries come from an `IoVecs` whose chain is held, or point into a buffer of the
    // caller's; the kernel only reads the list itself.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    checked(n).map(|n| (n, message.msg_flags))
}

/// Sends `list` on a socket, without waiting and without SIGPIPE.
///
/// # Errors
/// As `sendmsg`.
pub(crate) fn send(fd: BorrowedFd<'_>, list: &[iovec], flags: c_int) -> io::Result<usize> {
    let message = message(list);
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `receive`; the kernel only reads.
    checked(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) })
}

/// Reads from any descriptor into `list`.
///
/// # Errors
/// As `readv`.
pub(crate) fn read(fd: BorrowedFd<'_>, list: &[iovec]) -> io::Result<usize> {
    let count = c_int::try_from(list.len().min(IOV_MAX)).unwrap_or(0);
    // SAFETY: as in `receive`.
    checked(unsafe { libc::readv(fd.as_raw_fd(), list.as_ptr(), count) })
}

/// Writes `list` to any descriptor.
///
/// # Errors
/// As `writev`.
pub(crate) fn write(fd: BorrowedFd<'_>, list: &[iovec]) -> io::Result<usize> {
    let count = c_int::try_from(list.len().min(IOV_MAX)).unwrap_or(0);
    // SAFETY: as in `send`.
    checked(unsafe { libc::writev(fd.as_raw_fd(), list.as_ptr(), count) })
}

/// An entry for bytes that are only going to be read.
pub(crate) fn entry(bytes: &[u8]) -> iovec {
    iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// An entry for bytes that are going to be written.
pub(crate) fn entry_mut(bytes: &mut [u8]) -> iovec {
    iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all bytes zero are a sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = u16::try_from(libc::AF_VSOCK).unwrap_or(0);
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

/// `size_of::<sockaddr_vm>()` as the calls want it.
fn vsock_address_len() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<libc::sockaddr_vm>()).unwrap_or(0)
}

fn zero_is_ok(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Connects an AF_VSOCK socket.
///
/// # Errors
/// As `connect`; `InProgress` on a socket that does not wait.
pub(crate) fn connect_vsock(fd: BorrowedFd<'_>, cid: u32, port: u32) -> io::Result<()> {
    let address = vsock_address(cid, port);
    // SAFETY: the address lives through the call and its length is given.
    zero_is_ok(unsafe {
        libc::connect(fd.as_raw_fd(), (&raw const address).cast(), vsock_address_len())
    })
}

/// Binds an AF_VSOCK socket to `port` of this machine, whatever its CIDs are.
///
/// # Errors
/// As `bind`.
pub(crate) fn bind_vsock(fd: BorrowedFd<'_>, port: u32) -> io::Result<()> {
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: as in `connect_vsock`.
    zero_is_ok(unsafe {
        libc::bind(fd.as_raw_fd(), (&raw const address).cast(), vsock_address_len())
    })
}
