//! Where frames go to and come from: the other side of the device.
//!
//! A [`Backend`] is opened once, before the sandbox closes, with a descriptor for every queue pair.
//! Workers read and write those descriptors themselves; the trait is for everything rarer.

pub mod flows;
pub mod macvtap;
pub mod packet;
pub mod switch;
pub mod tap;
pub mod user;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::control::MacAddr;
use crate::rss::SteeringConfig;

/// One network back end.
pub trait Backend: Send + Sync + Debug {
    /// Queue pairs opened.
    fn pairs(&self) -> u16;

    /// The descriptor of a pair, non-blocking.
    fn queue(&self, pair: u16) -> Option<BorrowedFd<'_>>;

    /// The place in a switch, where there is no descriptor but other guests' rings.
    fn switch_port(&self) -> Option<switch::SwitchPort> {
        None
    }

    /// The connection to a user-mode network, whose descriptor comes and goes.
    fn user_link(&self) -> Option<Arc<user::UserLink>> {
        None
    }

    /// Whether each frame that leaves it is an event, so that the worker looks for more. A packet socket
    /// whose events are asked for only while it is full moves little more than half as much out of a guest.
    fn tells_of_frames_sent(&self) -> bool {
        false
    }

    /// The virtio-net features that it makes possible.
    fn features(&self) -> u64;

    /// The MTU of the network behind it, bytes, when it has one of its own.
    fn mtu(&self) -> Option<u16>;

    /// The address that the guest must use, where the back end only takes that one.
    fn fixed_mac(&self) -> Option<MacAddr> {
        None
    }

    /// Whether the interface behind the descriptors was deleted. Waits for whoever changes interfaces.
    fn is_gone(&self) -> bool {
        false
    }

    /// Whether the interface may be gone though frames are still taken. Waits for nobody.
    fn may_be_gone(&self) -> bool {
        false
    }

    /// Sets the bytes of header before each frame.
    ///
    /// # Errors
    /// The kernel refuses: the device cannot work with this driver.
    fn set_header_size(&self, bytes: usize) -> io::Result<()>;

    /// Says which offloads (`VIRTIO_NET_F_GUEST_*` bits) the guest takes on frames it receives.
    ///
    /// # Errors
    /// The kernel refuses.
    fn set_guest_offloads(&self, offloads: u64) -> io::Result<()>;

    /// Whether it can be told that, and gives no frame that needs more.
    fn takes_offloads(&self) -> bool {
        true
    }

    /// Takes a queue pair in or out of use.
    fn set_pair_running(&self, pair: u16, running: bool) {
        let _ = (pair, running);
    }

    /// The driver uses the first `pairs` queue pairs.
    fn set_pairs(&self, pairs: u16) {
        let _ = pairs;
    }

    /// Received frames are hashed and steered so; `None`: not hashed, and steered as the back end likes.
    fn set_steering(&self, steering: Option<&SteeringConfig>) {
        let _ = steering;
    }

    /// The guest is gone; another one may come.
    fn forget_guest(&self) {}

    /// The guest took another address.
    ///
    /// # Errors
    /// The interface cannot have it.
    fn set_mac(&self, mac: MacAddr) -> io::Result<()> {
        let _ = mac;
        Ok(())
    }

    /// Changes the host side's MTU.
    ///
    /// # Errors
    /// The interface cannot have it.
    fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let _ = mtu;
        Ok(())
    }

    /// Plugs or unplugs the host's end of the cable, where it has one.
    ///
    /// # Errors
    /// The kernel refuses.
    fn set_link(&self, up: bool) -> io::Result<()> {
        let _ = up;
        Ok(())
    }
}
