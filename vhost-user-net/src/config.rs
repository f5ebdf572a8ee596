//! The device's configuration space. Virtio 1.3, 5.1.4.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{Immutable, IntoBytes};

use crate::control::MacAddr;
use crate::rss;

/// `status`: the link is up.
pub const S_LINK_UP: u16 = 1;
/// `status`: announce yourself to the network.
pub const S_ANNOUNCE: u16 = 2;

/// `speed` when there is none to speak of. Virtio 1.3, 5.1.4.
const SPEED_UNKNOWN: u32 = u32::MAX;

/// `struct virtio_net_config`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoBytes, Immutable)]
#[repr(C)]
pub struct NetConfig {
    mac: [u8; 6],
    status: U16,
    max_virtqueue_pairs: U16,
    mtu: U16,
    speed: U32,
    duplex: u8,
    rss_max_key_size: u8,
    rss_max_indirection_table_length: U16,
    supported_hash_types: U32,
}

impl NetConfig {
    /// The configuration of a device whose link is up.
    #[must_use]
    pub fn new(
        mac: Option<MacAddr>,
        pairs: u16,
        mtu: Option<u16>,
        speed_mbps: Option<u32>,
    ) -> Self {
        Self {
            mac: mac.map_or([0; 6], |m| m.0),
            status: S_LINK_UP.into(),
            max_virtqueue_pairs: pairs.into(),
            mtu: mtu.unwrap_or(0).into(),
            speed: speed_mbps.unwrap_or(SPEED_UNKNOWN).into(),
            // 1: full duplex; 0xff: unknown.
            duplex: if speed_mbps.is_some() { 1 } else { 0xff },
            rss_max_key_size: 0,
            rss_max_indirection_table_length: 0.into(),
            supported_hash_types: 0.into(),
        }
    }

    /// The same, of a device that steers received frames and hashes them. Virtio 1.3, 5.1.4.
    #[must_use]
    pub fn with_rss(mut self) -> Self {
        self.rss_max_key_size = rss::KEY_MAX;
        self.rss_max_indirection_table_length = rss::TABLE_MAX.into();
        self.supported_hash_types = rss::HASH_TYPES.into();
        self
    }

    /// Fills `out` from `offset`; bytes past the end are 0.
    pub fn read(&self, offset: u32, out: &mut [u8]) {
        out.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.as_bytes().get(from..).unwrap_or(&[]);
        for (to, from) in out.iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    /// `status`.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.status.get()
    }

    /// Sets bits of `status`, or clears them; true if that changed anything.
    pub fn set_status(&mut self, bits: u16, on: bool) -> bool {
        let old = self.status.get();
        let new = if on { old | bits } else { old & !bits };
        self.status = new.into();
        old != new
    }

    /// `mtu`, 0 if none was set.
    #[must_use]
    pub fn mtu(&self) -> u16 {
        self.mtu.get()
    }

    /// Sets `mtu`; true if that changed it.
    pub fn set_mtu(&mut self, mtu: u16) -> bool {
        let changed = self.mtu.get() != mtu;
        self.mtu = mtu.into();
        changed
    }

    /// Sets `mac`, as the driver asked.
    pub fn set_mac(&mut self, mac: MacAddr) {
        self.mac = mac.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_the_specifications() {
        let mut config =
            NetConfig::new(Some(MacAddr([2, 3, 4, 5, 6, 7])), 4, Some(1500), Some(25000));
        let mut out = [0xff; 30];
        config.read(0, &mut out);
        assert_eq!(out[..6], [2, 3, 4, 5, 6, 7]);
        assert_eq!(out[6..8], [1, 0]);
        assert_eq!(out[8..10], [4, 0]);
        assert_eq!(out[10..12], 1500u16.to_le_bytes());
        assert_eq!(out[12..16], 25000u32.to_le_bytes());
        assert_eq!(out[16], 1);
        assert_eq!(out[24..], [0; 6]);
        assert!(config.set_status(S_LINK_UP, false) && !config.set_status(S_LINK_UP, false));
        assert!(config.set_mtu(9000) && !config.set_mtu(9000));
        config.read(6, &mut out);
        assert_eq!(out[..6], [0, 0, 4, 0, 0x28, 0x23]);
        config.read(u32::MAX, &mut out);
        assert_eq!(out, [0; 30]);
        config.with_rss().read(16, &mut out);
        assert_eq!(out[..9], [1, 40, 128, 0, 0x3f, 0, 0, 0, 0]);
    }
}
