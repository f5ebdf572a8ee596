//! A tap interface: created, attached to by name, or inherited as descriptors.
//!
//! # Theory of operation
//! Every queue pair has a descriptor of its own on one interface. The interface is opened in the
//! network namespace it lives in (a scratch thread enters it), the descriptors work from anywhere.
//! Pairs beyond the first start detached, so that the kernel steers no flow to a queue that no
//! guest serves. Frames carry `virtio_net_hdr` both ways; which offloads the kernel may leave to the
//! guest (TUNSETOFFLOAD) follows what the driver negotiated and its control commands.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use anyhow::{Context as _, bail};
use virtio_bindings::virtio_net as v;

use super::Backend;
use crate::control::MacAddr;
use crate::sys::{self, InterfaceName, Interfaces};

/// What a tap lets a device offer. Virtio 1.3, 5.1.3.
pub(super) const FEATURES: u64 = 1 << v::VIRTIO_NET_F_CSUM
    | 1 << v::VIRTIO_NET_F_GUEST_CSUM
    | 1 << v::VIRTIO_NET_F_GUEST_TSO4
    | 1 << v::VIRTIO_NET_F_GUEST_TSO6
    | 1 << v::VIRTIO_NET_F_GUEST_ECN
    | 1 << v::VIRTIO_NET_F_GUEST_UFO
    | 1 << v::VIRTIO_NET_F_HOST_TSO4
    | 1 << v::VIRTIO_NET_F_HOST_TSO6
    | 1 << v::VIRTIO_NET_F_HOST_ECN
    | 1 << v::VIRTIO_NET_F_HOST_UFO
    | 1 << v::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | USO;

/// UDP segmentation, which kernels before 6.2 do not know.
const USO: u64 = 1 << v::VIRTIO_NET_F_GUEST_USO4
    | 1 << v::VIRTIO_NET_F_GUEST_USO6
    | 1 << v::VIRTIO_NET_F_HOST_USO;

/// Which tap to open.
#[derive(Debug, Clone)]
pub struct TapOptions {
    /// The interface; `None`: a new one with a name of the kernel's choice.
    pub name: Option<InterfaceName>,
    /// The network namespace it lives in.
    pub netns: Option<PathBuf>,
    /// Queue pairs.
    pub pairs: u16,
    /// MTU to give it, bytes.
    pub mtu: Option<u16>,
}

/// An open tap interface.
#[derive(Debug)]
pub struct TapBackend {
    name: InterfaceName,
    queues: Vec<OwnedFd>,
    /// Which queues are attached. Locked only when a queue starts or stops.
    attached: Mutex<Vec<bool>>,
    interfaces: Interfaces,
    features: u64,
}

impl TapBackend {
    /// Opens or creates the interface, and sets it up.
    ///
    /// # Errors
    /// A sentence for the operator: no permission, name in use, unknown namespace, bad MTU.
    pub fn open(options: &TapOptions) -> anyhow::Result<Self> {
        match &options.netns {
            Some(path) => sys::in_network_namespace(path, || Self::open_here(options)),
            None => Self::open_here(options),
        }
    }

    fn open_here(options: &TapOptions) -> anyhow::Result<Self> {
        let interfaces = Interfaces::new().context("cannot make a socket")?;
        let multi_queue = options.pairs > 1;
        let first = open_queue(options.name.as_ref(), multi_queue)?;
        let (first, name) = first;
        let mut queues = vec![first];
        for _ in 1..options.pairs {
            queues.push(open_queue(Some(&name), true)?.0);
        }
        if let Some(mtu) = options.mtu {
            interfaces
                .set_mtu(&name, mtu)
                .with_context(|| format!("cannot set the MTU of {name} to {mtu}"))?;
        }
        interfaces
            .add_flags(&name, libc::IFF_UP)
            .with_context(|| format!("cannot set {name} up"))?;
        Self::set_up(name, queues, interfaces)
    }

    /// Takes over descriptors that are attached to one tap or macvtap interface already.
    ///
    /// # Errors
    /// A descriptor that is no tap with `virtio_net_hdr`.
    pub fn from_fds(queues: Vec<OwnedFd>) -> anyhow::Result<Self> {
        let mut name = None;
        for fd in &queues {
            let (of, flags) = sys::tap_interface(fd.as_fd())
                .context("the descriptor given is no attached tap device")?;
            if flags & libc::IFF_TAP == 0 {
                bail!("the descriptor given is a tun device; a tap device is needed");
            }
            if flags & libc::IFF_VNET_HDR == 0 {
                bail!("the tap descriptor given was opened without IFF_VNET_HDR");
            }
            if name.get_or_insert_with(|| of.clone()) != &of {
                bail!("the tap descriptors given belong to different interfaces");
            }
        }
        let name = name.context("no tap descriptor was given")?;
        let interfaces = match queues.first().map(|fd| sys::tap_network_namespace(fd.as_fd())) {
            // Whoever made the tap may live elsewhere, and an interface of ours have the same name.
            Some(Ok(namespace)) => {
                let path = PathBuf::from(format!("/proc/self/fd/{}", namespace.as_raw_fd()));
                sys::in_network_namespace(&path, || Ok(Interfaces::new()?))
                    .context("cannot reach the settings of the tap descriptor given")?
            }
            // Without privileges: as far as it goes.
            _ => Interfaces::new().context("cannot make a socket")?,
        };
        Self::set_up(name, queues, interfaces)
    }

    /// What is common to all ways of opening.
    pub(super) fn set_up(
        name: InterfaceName,
        queues: Vec<OwnedFd>,
        interfaces: Interfaces,
    ) -> anyhow::Result<Self> {
        let mut features = FEATURES;
        for fd in &queues {
            sys::set_tap_header(fd.as_fd(), crate::header::HEADER_SIZE)
                .with_context(|| format!("cannot set the header size of {name}"))?;
        }
        if let Some(fd) = queues.first() {
            let uso = sys::TUN_F_CSUM | sys::TUN_F_USO4 | sys::TUN_F_USO6;
            if sys::set_tap_offloads(fd.as_fd(), uso).is_err() {
                features &= !USO;
            }
            sys::set_tap_offloads(fd.as_fd(), 0)
                .with_context(|| format!("cannot set the offloads of {name}"))?;
        }
        // A queue taken over from another daemon may be detached already.
        let is_attached = |fd: &OwnedFd| {
            let interface = sys::tap_interface(fd.as_fd());
            interface.map_or(true, |(_, flags)| flags & libc::IFF_DETACH_QUEUE == 0)
        };
        let attached = Mutex::new(queues.iter().map(is_attached).collect());
        let tap = Self { name, queues, attached, interfaces, features };
        for pair in 1..tap.pairs() {
            tap.set_pair_running(pair, false);
        }
        Ok(tap)
    }

    /// The interface's name at present: somebody may have given it another one, and that one to another.
    fn name(&self) -> InterfaceName {
        let now = self.queues.first().and_then(|fd| sys::tap_interface(fd.as_fd()).ok());
        now.map_or_else(|| self.name.clone(), |(name, _)| name)
    }

    /// The name that the interface was opened by.
    pub(super) fn first_name(&self) -> &InterfaceName {
        &self.name
    }

    /// Settings of the namespace the tap was opened in.
    pub(super) fn interfaces(&self) -> &Interfaces {
        &self.interfaces
    }
}

/// A predecessor that was killed lets go of the interface only when the kernel has taken its io_uring
/// apart, a moment after its end.
const BUSY_TRIES: u32 = 10;
const BUSY_WAIT: Duration = Duration::from_millis(20);

/// One more queue of interface `name`, or the first of a new one.
fn open_queue(
    name: Option<&InterfaceName>,
    multi_queue: bool,
) -> anyhow::Result<(OwnedFd, InterfaceName)> {
    let fd = sys::open_tap_device(Path::new("/dev/net/tun")).context("cannot open /dev/net/tun")?;
    let shown = || name.map_or_else(|| "a new tap".to_owned(), ToString::to_string);
    let mut result = sys::attach_tap(fd.as_fd(), name, multi_queue);
    for _ in 0..BUSY_TRIES {
        if !result.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY)) {
            break;
        }
        std::thread::sleep(BUSY_WAIT);
        result = sys::attach_tap(fd.as_fd(), name, multi_queue);
    }
    let result = match result {
        // An interface made for several queues wants to hear so from every user.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) && !multi_queue => {
            sys::attach_tap(fd.as_fd(), name, true)
        }
        other => other,
    };
    let attached = result.map_err(|error| {
        let why = match error.raw_os_error() {
            Some(libc::EBUSY) => "another program uses it, or it is no tap interface",
            Some(libc::EPERM) => "that takes the capability CAP_NET_ADMIN or the tap's ownership",
            Some(libc::EINVAL) => "an interface of another kind has that name",
            Some(libc::E2BIG) => "the interface has no queue left",
            _ => "the kernel refuses",
        };
        anyhow::Error::new(error).context(format!("cannot attach to {}: {why}", shown()))
    })?;
    Ok((fd, attached))
}

/// Feature bits of guest offloads as `TUN_F_*`, in a combination that the kernel takes.
#[must_use]
pub fn tun_offloads(guest_offloads: u64) -> u32 {
    let has = |bit: u32| guest_offloads & (1 << bit) != 0;
    if !has(v::VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut tun = sys::TUN_F_CSUM;
    for (bit, flag) in [
        (v::VIRTIO_NET_F_GUEST_TSO4, sys::TUN_F_TSO4),
        (v::VIRTIO_NET_F_GUEST_TSO6, sys::TUN_F_TSO6),
        (v::VIRTIO_NET_F_GUEST_UFO, sys::TUN_F_UFO),
    ] {
        if has(bit) {
            tun |= flag;
        }
    }
    if has(v::VIRTIO_NET_F_GUEST_ECN) && tun & (sys::TUN_F_TSO4 | sys::TUN_F_TSO6) != 0 {
        tun |= sys::TUN_F_TSO_ECN;
    }
    if has(v::VIRTIO_NET_F_GUEST_USO4) && has(v::VIRTIO_NET_F_GUEST_USO6) {
        tun |= sys::TUN_F_USO4 | sys::TUN_F_USO6;
    }
    tun
}

impl Backend for TapBackend {
    fn pairs(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    fn queue(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        self.queues.get(usize::from(pair)).map(AsFd::as_fd)
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn mtu(&self) -> Option<u16> {
        self.interfaces.mtu(&self.name()).ok().and_then(|mtu| u16::try_from(mtu).ok())
    }

    fn is_gone(&self) -> bool {
        let result = self.queues.first().map(|fd| sys::tap_interface(fd.as_fd()));
        // A tap says the one, a macvtap the other.
        let gone =
            |error: io::Error| matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENOLINK));
        result.is_some_and(|result| result.is_err_and(gone))
    }

    fn set_header_size(&self, bytes: usize) -> io::Result<()> {
        self.queues.iter().try_for_each(|fd| sys::set_tap_header(fd.as_fd(), bytes))
    }

    fn set_guest_offloads(&self, offloads: u64) -> io::Result<()> {
        // The setting is the interface's, but only an attached queue may make it: the first.
        match self.queues.first() {
            Some(fd) => sys::set_tap_offloads(fd.as_fd(), tun_offloads(offloads)),
            None => Ok(()),
        }
    }

    fn set_pair_running(&self, pair: u16, running: bool) {
        // The first queue stays attached, so that the interface has a carrier while we live.
        if pair == 0 || self.queues.len() == 1 {
            return;
        }
        let at = usize::from(pair);
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(fd), Some(state)) = (self.queues.get(at), attached.get_mut(at)) else { return };
        if *state == running {
            return;
        }
        match sys::set_tap_queue(fd.as_fd(), running) {
            Ok(()) => *state = running,
            Err(error) => {
                tracing::warn!(interface = %self.name, pair, running, %error, "cannot switch a tap queue");
            }
        }
    }

    fn set_mac(&self, _mac: MacAddr) -> io::Result<()> {
        // The address of the tap is the host's end; the guest's is its own affair.
        Ok(())
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.interfaces.set_mtu(&self.name(), mtu)
    }

    fn set_link(&self, up: bool) -> io::Result<()> {
        match self.queues.first() {
            Some(fd) => sys::set_tap_carrier(fd.as_fd(), up),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_come_in_combinations_that_the_kernel_takes() {
        assert_eq!(tun_offloads(0), 0);
        assert_eq!(tun_offloads(1 << v::VIRTIO_NET_F_GUEST_TSO4), 0);
        assert_eq!(tun_offloads(1 << v::VIRTIO_NET_F_GUEST_CSUM), sys::TUN_F_CSUM);
        let ecn_only = 1 << v::VIRTIO_NET_F_GUEST_CSUM | 1 << v::VIRTIO_NET_F_GUEST_ECN;
        assert_eq!(tun_offloads(ecn_only), sys::TUN_F_CSUM);
        let half_uso = 1 << v::VIRTIO_NET_F_GUEST_CSUM | 1 << v::VIRTIO_NET_F_GUEST_USO4;
        assert_eq!(tun_offloads(half_uso), sys::TUN_F_CSUM);
        assert_eq!(tun_offloads(u64::MAX), 0x7f);
    }

    #[test]
    fn a_descriptor_that_is_no_tap_is_named_so() {
        let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let error = TapBackend::from_fds(vec![fd]).unwrap_err();
        assert!(format!("{error:#}").starts_with("the descriptor given is no attached tap"));
        assert!(TapBackend::from_fds(Vec::new()).is_err());
    }
}
