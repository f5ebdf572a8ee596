//! The system calls of network interfaces that no safe wrapper covers.
#![allow(unsafe_code, reason = "ioctls on tap descriptors and sockets")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use libc::{c_int, c_ulong, ifreq};

use crate::control::MacAddr;

const TUNSETIFF: u32 = 0x4004_54ca;
pub(crate) const TUNSETOFFLOAD: u32 = 0x4004_54d0;
pub(crate) const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETSNDBUF: u32 = 0x4004_54d4;
pub(crate) const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
pub(crate) const TUNSETQUEUE: u32 = 0x4004_54d9;
pub(crate) const TUNSETVNETLE: u32 = 0x4004_54dc;
pub(crate) const TUNSETCARRIER: u32 = 0x4004_54e2;
const TUNGETDEVNETNS: u32 = 0x54e3;
pub(crate) const SIOCGIFNAME: u32 = 0x8910;
const SIOCGIFINDEX: u32 = 0x8933;
pub(crate) const SIOCGIFMTU: u32 = 0x8921;
pub(crate) const SIOCSIFMTU: u32 = 0x8922;
const SIOCGIFHWADDR: u32 = 0x8927;
const SIOCGIFFLAGS: u32 = 0x8913;
const SIOCSIFFLAGS: u32 = 0x8914;
pub(crate) const SIOCSIFHWADDR: u32 = 0x8924;

/// `TUNSETOFFLOAD`: the reader takes frames whose checksum is not filled in.
pub const TUN_F_CSUM: u32 = 0x01;
/// `TUNSETOFFLOAD`: and TCP super-frames over IPv4.
pub const TUN_F_TSO4: u32 = 0x02;
/// `TUNSETOFFLOAD`: and TCP super-frames over IPv6.
pub const TUN_F_TSO6: u32 = 0x04;
/// `TUNSETOFFLOAD`: and such with ECN.
pub const TUN_F_TSO_ECN: u32 = 0x08;
/// `TUNSETOFFLOAD`: and UDP to be fragmented.
pub const TUN_F_UFO: u32 = 0x10;
/// `TUNSETOFFLOAD`: and UDP super-frames over IPv4 (only together with the next).
pub const TUN_F_USO4: u32 = 0x20;
/// `TUNSETOFFLOAD`: and UDP super-frames over IPv6.
pub const TUN_F_USO6: u32 = 0x40;

/// An interface name as the kernel takes it: 1 to 15 bytes, no slash, no white space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceName(String);

/// Why a text is no interface name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an interface name has 1 to 15 characters, none of them a slash, a colon or white space")]
pub struct BadName;

impl std::str::FromStr for InterfaceName {
    type Err = BadName;

    fn from_str(name: &str) -> Result<Self, BadName> {
        let fits = (1..libc::IFNAMSIZ).contains(&name.len());
        let bad = |b: u8| b == b'/' || b == b':' || b == 0 || b.is_ascii_whitespace();
        if fits && name != "." && name != ".." && !name.bytes().any(bad) {
            Ok(Self(name.to_owned()))
        } else {
            Err(BadName)
        }
    }
}

impl std::fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl InterfaceName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn request(&self) -> ifreq {
        let mut request = empty_request();
        for (to, &from) in request.ifr_name.iter_mut().zip(self.0.as_bytes()) {
            #[allow(clippy::cast_possible_wrap, reason = "c_char is the kernel's byte")]
            {
                *to = from as libc::c_char;
            }
        }
        request
    }

    fn of(request: &ifreq) -> Self {
        let bytes = request.ifr_name.iter().take_while(|&&c| c != 0);
        #[allow(clippy::cast_sign_loss, reason = "c_char is the kernel's byte")]
        let name = bytes.map(|&c| char::from(c as u8)).collect();
        Self(name)
    }
}

fn empty_request() -> ifreq {
    // SAFETY: `ifreq` is a plain C struct of integers, arrays and pointers; zeros are valid.
    unsafe { std::mem::zeroed() }
}

/// An ioctl whose argument points to a `T` that the kernel reads or writes.
fn ioctl_ptr<T>(fd: BorrowedFd<'_>, request: u32, argument: &mut T) -> io::Result<()> {
    // SAFETY: every request used in this module takes a pointer to the `T` it is called with, and
    // keeps no pointer to it.
    let result =
        unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An ioctl whose argument is a number.
fn ioctl_value(fd: BorrowedFd<'_>, request: u32, argument: c_ulong) -> io::Result<()> {
    // SAFETY: the requests called so take the argument by value.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request.into(), argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens `/dev/net/tun` or a macvtap device for one queue, non-blocking.
///
/// # Errors
/// Missing device, or no permission.
pub fn open_tap_device(path: &Path) -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    options.open(path).map(OwnedFd::from)
}

/// The flags of every queue we open.
const TAP_FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Attaches `fd` to the tap interface `name` (`None`: let the kernel name a new one); creates the
/// interface if there is none.
///
/// # Errors
/// No permission, a name in use, or an interface of another kind.
pub fn attach_tap(
    fd: BorrowedFd<'_>,
    name: Option<&InterfaceName>,
    multi_queue: bool,
) -> io::Result<InterfaceName> {
    let mut request = name.map_or_else(empty_request, InterfaceName::request);
    let flags = TAP_FLAGS | if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = as_short(flags);
    ioctl_ptr(fd, TUNSETIFF, &mut request)?;
    Ok(InterfaceName::of(&request))
}

/// Interface flags are 16 bits wide.
fn as_short(flags: c_int) -> libc::c_short {
    #[allow(clippy::cast_possible_truncation, reason = "interface flags are 16 bits wide")]
    {
        flags as libc::c_short
    }
}

/// Name and flags of the interface that a tap descriptor belongs to.
///
/// # Errors
/// Not an attached tap descriptor.
pub fn tap_interface(fd: BorrowedFd<'_>) -> io::Result<(InterfaceName, c_int)> {
    let mut request = empty_request();
    ioctl_ptr(fd, TUNGETIFF, &mut request)?;
    // SAFETY: TUNGETIFF fills `ifru_flags`.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((InterfaceName::of(&request), c_int::from(flags)))
}

/// The network namespace that a tap descriptor's interface was made in.
///
/// # Errors
/// No permission, or not an attached tap descriptor.
pub fn tap_network_namespace(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument.
    let namespace = unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETDEVNETNS.into(), 0) };
    if namespace < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}

/// Sets the bytes of `virtio_net_hdr` before each frame, and its byte order to little endian.
///
/// # Errors
/// Not a tap descriptor.
pub fn set_tap_header(fd: BorrowedFd<'_>, size: usize) -> io::Result<()> {
    let mut size = c_int::try_from(size).map_err(io::Error::other)?;
    ioctl_ptr(fd, TUNSETVNETHDRSZ, &mut size)?;
    let mut little_endian: c_int = 1;
    ioctl_ptr(fd, TUNSETVNETLE, &mut little_endian)
}

/// Says what the reader of the tap can take, in `TUN_F_*`.
///
/// # Errors
/// A combination that the kernel refuses.
pub fn set_tap_offloads(fd: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    ioctl_value(fd, TUNSETOFFLOAD, c_ulong::from(offloads))
}

/// Sets how many bytes of frames may be on their way out of a tap's or macvtap's descriptor.
///
/// # Errors
/// Not a tap descriptor.
pub fn set_tap_send_buffer(fd: BorrowedFd<'_>, mut bytes: c_int) -> io::Result<()> {
    ioctl_ptr(fd, TUNSETSNDBUF, &mut bytes)
}

/// Takes a queue of a multi-queue tap in or out of use.
///
/// # Errors
/// Not a multi-queue tap, or the queue is in that state already.
pub fn set_tap_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = empty_request();
    let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = as_short(flags);
    ioctl_ptr(fd, TUNSETQUEUE, &mut request)
}

/// Plugs or unplugs the host's end of a tap's cable.
///
/// # Errors
/// Not a tap descriptor.
pub fn set_tap_carrier(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let mut on = c_int::from(on);
    ioctl_ptr(fd, TUNSETCARRIER, &mut on)
}

/// The interface settings of one network namespace, through a socket made in it.
#[derive(Debug)]
pub struct Interfaces(OwnedFd);

impl Interfaces {
    /// Those of the calling thread's namespace, also when used from others later.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
        let socket =
            socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self(socket))
    }

    /// The interface's index.
    ///
    /// # Errors
    /// No such interface.
    pub fn index(&self, name: &InterfaceName) -> io::Result<c_int> {
        let mut request = name.request();
        ioctl_ptr(self.0.as_fd(), SIOCGIFINDEX, &mut request)?;
        // SAFETY: SIOCGIFINDEX fills `ifru_ifindex`.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// The name that the interface with this index has now.
    ///
    /// # Errors
    /// No such interface.
    pub fn name(&self, index: c_int) -> io::Result<InterfaceName> {
        let mut request = empty_request();
        request.ifr_ifru.ifru_ifindex = index;
        ioctl_ptr(self.0.as_fd(), SIOCGIFNAME, &mut request)?;
        Ok(InterfaceName::of(&request))
    }

    /// The MTU in bytes.
    ///
    /// # Errors
    /// No such interface.
    pub fn mtu(&self, name: &InterfaceName) -> io::Result<c_int> {
        let mut request = name.request();
        ioctl_ptr(self.0.as_fd(), SIOCGIFMTU, &mut request)?;
        // SAFETY: SIOCGIFMTU fills `ifru_mtu`.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    /// Sets the MTU in bytes.
    ///
    /// # Errors
    /// No permission, or a size that the interface cannot have.
    pub fn set_mtu(&self, name: &InterfaceName, mtu: u16) -> io::Result<()> {
        let mut request = name.request();
        request.ifr_ifru.ifru_mtu = c_int::from(mtu);
        ioctl_ptr(self.0.as_fd(), SIOCSIFMTU, &mut request)
    }

    /// The interface's own hardware address.
    ///
    /// # Errors
    /// No such interface.
    pub fn mac(&self, name: &InterfaceName) -> io::Result<MacAddr> {
        let mut request = name.request();
        ioctl_ptr(self.0.as_fd(), SIOCGIFHWADDR, &mut request)?;
        // SAFETY: SIOCGIFHWADDR fills `ifru_hwaddr`.
        let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
        let mut mac = [0; 6];
        for (to, from) in mac.iter_mut().zip(data) {
            #[allow(clippy::cast_sign_loss, reason = "c_char is the kernel's byte")]
            {
                *to = from as u8;
            }
        }
        Ok(MacAddr(mac))
    }

    /// Sets interface flags (`IFF_UP`, `IFF_PROMISC`), leaving the others as they are.
    ///
    /// # Errors
    /// No permission, or no such interface.
    pub fn add_flags(&self, name: &InterfaceName, flags: c_int) -> io::Result<()> {
        let mut request = name.request();
        ioctl_ptr(self.0.as_fd(), SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS fills `ifru_flags`.
        let old = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = old | as_short(flags);
        ioctl_ptr(self.0.as_fd(), SIOCSIFFLAGS, &mut request)
    }
}

/// Sets the hardware address of the interface behind a macvtap descriptor.
///
/// # Errors
/// No permission, or an address in use.
pub fn set_macvtap_mac(fd: BorrowedFd<'_>, name: &InterfaceName, mac: MacAddr) -> io::Result<()> {
    let mut request = name.request();
    let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    for (to, from) in address.sa_data.iter_mut().zip(mac.0) {
        #[allow(clippy::cast_possible_wrap, reason = "c_char is the kernel's byte")]
        {
            *to = from as libc::c_char;
        }
    }
    request.ifr_ifru.ifru_hwaddr = address;
    ioctl_ptr(fd, SIOCSIFHWADDR, &mut request)
}

/// Runs `work` on a thread that has entered the network namespace at `path`, and waits for it. The
/// calling thread stays where it is.
///
/// # Errors
/// The file is missing or no network namespace, no permission to enter it, or what `work` gives.
pub fn in_network_namespace<T: Send>(
    path: &Path,
    work: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    use anyhow::Context as _;
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
    let file = File::open(path)
        .with_context(|| format!("cannot open the network namespace {}", path.display()))?;
    std::thread::scope(|scope| {
        let inside = scope.spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(io::Error::from)
                .with_context(|| {
                    format!("cannot enter the network namespace {}", path.display())
                })?;
            work()
        });
        // A panic in `work` goes on in the caller.
        inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names_are_checked() {
        for good in ["tap0", "a", "123456789012345"] {
            assert_eq!(good.parse::<InterfaceName>().map(|n| n.to_string()), Ok(good.to_owned()));
        }
        for bad in ["", "1234567890123456", "a/b", "a b", ".", "..", "a:0"] {
            assert_eq!(bad.parse::<InterfaceName>(), Err(BadName), "{bad}");
        }
    }

    #[test]
    fn a_name_survives_the_kernels_struct() {
        let name: InterfaceName = "tap-1".parse().unwrap();
        assert_eq!(InterfaceName::of(&name.request()), name);
    }

    #[test]
    fn a_missing_namespace_is_an_error() {
        let error = in_network_namespace(Path::new("/nonexistent/ns"), || Ok(())).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/ns"));
        let error = in_network_namespace(Path::new("/dev/null"), || Ok(())).unwrap_err();
        assert!(format!("{error:#}").contains("cannot enter"), "{error:#}");
    }
}
