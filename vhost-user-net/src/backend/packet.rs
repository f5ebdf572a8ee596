//! A packet socket on an interface that exists already, such as a pod's veth.
//!
//! # Theory of operation
//! A container network plug-in gives a pod an interface in a namespace. A packet socket there sees
//! every frame that arrives and sends frames out, with `virtio_net_hdr` (PACKET_VNET_HDR), so that
//! super-frames and open checksums cross it; no bridge, no second interface and no traffic rules are
//! needed. The namespace's own IP stack sees arriving frames too, so the interface must have no
//! addresses there: the guest has them.
//!
//! Unlike a tap, a packet socket cannot be told which offloads the reader takes: frames come as the
//! sender's side left them, and the worker makes of them what the guest takes. VLAN tags that the kernel
//! strips on the way in are lost.
#![allow(unsafe_code, reason = "packet sockets have options and addresses of their own")]

mod fanout;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use libc::{c_int, c_void};

use super::Backend;
use crate::control::MacAddr;
use crate::sys::{self, InterfaceName, Interfaces};

/// `PACKET_VNET_HDR_SZ`, since Linux 6.6: the header's size in bytes.
const PACKET_VNET_HDR_SZ: c_int = 24;
/// `PACKET_IGNORE_OUTGOING`: do not read what we, or others here, sent.
const PACKET_IGNORE_OUTGOING: c_int = 23;
/// Room for frames on their way out, bytes: several super-frames.
pub(super) const SEND_BUFFER_BYTES: c_int = 4 << 20;
/// Room for frames not read yet, bytes.
const RECEIVE_BUFFER_BYTES: c_int = 8 << 20;

/// Which interface to open.
#[derive(Debug, Clone)]
pub struct PacketOptions {
    /// The interface.
    pub name: InterfaceName,
    /// The network namespace it lives in.
    pub netns: Option<PathBuf>,
    /// Queue pairs.
    pub pairs: u16,
}

/// Packet sockets on one interface.
#[derive(Debug)]
pub struct PacketBackend {
    name: InterfaceName,
    index: c_int,
    queues: Vec<OwnedFd>,
    interfaces: Interfaces,
    /// Which queues a guest serves. Locked only when one starts or stops.
    running: Mutex<Vec<bool>>,
}

impl PacketBackend {
    /// Opens the sockets.
    ///
    /// # Errors
    /// A sentence for the operator: no such interface or namespace, no permission, an old kernel.
    pub fn open(options: &PacketOptions) -> anyhow::Result<Self> {
        match &options.netns {
            Some(path) => sys::in_network_namespace(path, || Self::open_here(options)),
            None => Self::open_here(options),
        }
    }

    fn open_here(options: &PacketOptions) -> anyhow::Result<Self> {
        let name = options.name.clone();
        let interfaces = Interfaces::new().context("cannot make a socket")?;
        let index = interfaces
            .index(&name)
            .with_context(|| format!("there is no interface {name} in that network namespace"))?;
        let mut queues = Vec::new();
        for _ in 0..options.pairs {
            let socket = packet_socket(index)
                .with_context(|| format!("cannot open a packet socket on {name}"))?;
            queues.push(socket);
        }
        if queues.len() > 1 {
            fanout::join(&queues, index)
                .with_context(|| format!("cannot spread {name} over several queues"))?;
        }
        interfaces
            .add_flags(&name, libc::IFF_UP)
            .with_context(|| format!("cannot set {name} up"))?;
        let running = Mutex::new(vec![false; queues.len()]);
        Ok(Self { name, index, queues, interfaces, running })
    }
}

/// A non-blocking packet socket bound to interface `index`, with `virtio_net_hdr`.
fn packet_socket(index: c_int) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // Protocol 0: nothing is received before the socket is bound.
    // SAFETY: takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nothing else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let fd = socket.as_fd();
    let header = c_int::try_from(crate::header::HEADER_SIZE).map_err(io::Error::other)?;
    set_option(fd, PACKET_VNET_HDR_SZ, header)?;
    set_option(fd, PACKET_IGNORE_OUTGOING, 1)?;
    set_option(fd, libc::PACKET_QDISC_BYPASS, 1)?;
    for (option, bytes) in
        [(libc::SO_SNDBUFFORCE, SEND_BUFFER_BYTES), (libc::SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)]
    {
        // Without CAP_NET_ADMIN the default has to do.
        let _ = set_socket_option(fd, libc::SOL_SOCKET, option, &bytes);
    }
    let membership = libc::packet_mreq {
        mr_ifindex: index,
        mr_type: u16::try_from(libc::PACKET_MR_PROMISC).unwrap_or(1),
        mr_alen: 0,
        mr_address: [0; 8],
    };
    set_socket_option(fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &membership)?;
    bind(fd, index)?;
    Ok(socket)
}

/// Starts receiving every protocol from interface `index`.
fn bind(fd: BorrowedFd<'_>, index: c_int) -> io::Result<()> {
    let all = u16::try_from(libc::ETH_P_ALL).map_err(io::Error::other)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::sa_family_t::try_from(libc::AF_PACKET).map_err(io::Error::other)?,
        sll_protocol: all.to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
    let pointer = std::ptr::from_ref(&address).cast::<libc::sockaddr>();
    // SAFETY: `pointer` and `size` describe `address`, which lives through the call.
    let result = unsafe { libc::bind(fd.as_raw_fd(), pointer, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the kernel has taken the interface away from a socket that was bound to it.
fn is_unbound(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: a plain C struct of integers; zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let Ok(mut size) = libc::socklen_t::try_from(size_of_val(&address)) else { return false };
    let pointer = std::ptr::from_mut(&mut address).cast::<libc::sockaddr>();
    // SAFETY: `pointer` and `size` describe `address`, which lives through the call.
    let result = unsafe { libc::getsockname(fd.as_raw_fd(), pointer, &raw mut size) };
    result == 0 && address.sll_ifindex <= 0
}

fn set_option(fd: BorrowedFd<'_>, option: c_int, value: c_int) -> io::Result<()> {
    set_socket_option(fd, libc::SOL_PACKET, option, &value)
}

fn set_socket_option<T>(fd: BorrowedFd<'_>, level: c_int, option: c_int, v: &T) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let pointer = std::ptr::from_ref(v).cast::<c_void>();
    // SAFETY: `pointer` and `size` describe `v`, which lives through the call.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, pointer, size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Backend for PacketBackend {
    fn pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    fn queue(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        self.queues.get(usize::from(pair)).map(AsFd::as_fd)
    }

    fn tells_of_frames_sent(&self) -> bool {
        true
    }

    fn features(&self) -> u64 {
        super::tap::FEATURES
    }

    fn mtu(&self) -> Option<u16> {
        self.interfaces
            .mtu(&self.interfaces.name(self.index).ok()?)
            .ok()
            .and_then(|mtu| u16::try_from(mtu).ok())
    }

    fn fixed_mac(&self) -> Option<MacAddr> {
        self.interfaces.mac(&self.name).ok()
    }

    fn is_gone(&self) -> bool {
        self.queues.first().is_some_and(|fd| is_unbound(fd.as_fd()))
    }

    fn set_header_size(&self, bytes: usize) -> io::Result<()> {
        let size = c_int::try_from(bytes).map_err(io::Error::other)?;
        self.queues.iter().try_for_each(|fd| set_option(fd.as_fd(), PACKET_VNET_HDR_SZ, size))
    }

    fn set_guest_offloads(&self, _offloads: u64) -> io::Result<()> {
        Ok(())
    }

    fn takes_offloads(&self) -> bool {
        false
    }

    fn set_pair_running(&self, pair: u16, running: bool) {
        let mut all = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = all.get_mut(usize::from(pair)) else { return };
        *state = running;
        let first = self.queues.first().filter(|_| self.queues.len() > 1);
        let Some(socket) = first else { return };
        let served = all.iter().take_while(|&&running| running).count();
        if let Err(error) = fanout::spread(socket.as_fd(), served) {
            tracing::warn!(interface = %self.name, served, %error, "cannot spread frames over the queues in use");
        }
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        // Somebody may have given the interface another name, and its name to another one.
        self.interfaces.set_mtu(&self.interfaces.name(self.index)?, mtu)
    }
}
