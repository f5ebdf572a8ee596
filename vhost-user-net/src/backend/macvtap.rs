//! A macvtap interface, by its `/dev/tapN`: a guest directly on a host's network card.
//!
//! The descriptors behave as a tap's. Two things differ: the interface filters by its hardware
//! address, so the guest must use that one and a change of the guest's goes to the interface; and
//! there is no host end of the cable to unplug.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use anyhow::Context as _;

use super::Backend;
use super::packet::SEND_BUFFER_BYTES;
use super::tap::TapBackend;
use crate::control::MacAddr;
use crate::sys::{self, Interfaces};

/// An open macvtap interface.
#[derive(Debug)]
pub struct MacvtapBackend {
    tap: TapBackend,
}

impl MacvtapBackend {
    /// Opens `path` (`/dev/tapN`) once for every queue pair.
    ///
    /// # Errors
    /// A sentence for the operator: no such device, no permission, no macvtap.
    pub fn open(path: &Path, pairs: u16) -> anyhow::Result<Self> {
        let mut queues = Vec::new();
        let mut name = None;
        for _ in 0..pairs {
            let fd = sys::open_tap_device(path)
                .with_context(|| format!("cannot open {}", path.display()))?;
            let attached = sys::attach_tap(fd.as_fd(), None, true)
                .with_context(|| format!("{} is no macvtap device", path.display()))?;
            drop(attached);
            let (of, _) = sys::tap_interface(fd.as_fd())
                .with_context(|| format!("{} is no macvtap device", path.display()))?;
            name = Some(of);
            queues.push(fd);
        }
        let name = name.context("a device needs at least one queue pair")?;
        for fd in &queues {
            sys::set_tap_send_buffer(fd.as_fd(), SEND_BUFFER_BYTES)
                .with_context(|| format!("cannot set the send buffer of {name}"))?;
        }
        let interfaces = Interfaces::new().context("cannot make a socket")?;
        Ok(Self { tap: TapBackend::set_up(name, queues, interfaces)? })
    }
}

impl Backend for MacvtapBackend {
    fn pairs(&self) -> u16 {
        self.tap.pairs()
    }

    fn queue(&self, pair: u16) -> Option<BorrowedFd<'_>> {
        self.tap.queue(pair)
    }

    fn features(&self) -> u64 {
        self.tap.features()
    }

    fn is_gone(&self) -> bool {
        self.tap.is_gone()
    }

    fn may_be_gone(&self) -> bool {
        // The descriptor of a deleted macvtap takes frames as ever, and drops them. The name may be gone for
        // other reasons.
        self.tap.interfaces().mtu(self.tap.first_name()).is_err()
    }

    fn mtu(&self) -> Option<u16> {
        self.tap.mtu()
    }

    fn fixed_mac(&self) -> Option<MacAddr> {
        self.tap.interfaces().mac(self.tap.first_name()).ok()
    }

    fn set_header_size(&self, bytes: usize) -> io::Result<()> {
        self.tap.set_header_size(bytes)
    }

    fn set_guest_offloads(&self, offloads: u64) -> io::Result<()> {
        self.tap.set_guest_offloads(offloads)
    }

    fn set_pair_running(&self, pair: u16, running: bool) {
        self.tap.set_pair_running(pair, running);
    }

    fn set_mac(&self, mac: MacAddr) -> io::Result<()> {
        match self.tap.queue(0) {
            Some(fd) => sys::set_macvtap_mac(fd, self.tap.first_name(), mac),
            None => Ok(()),
        }
    }

    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        self.tap.set_mtu(mtu)
    }
}
