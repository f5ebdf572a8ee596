//! Announcing a guest to the network after it moved: SEND_RARP.

use rustix::io::write;

use crate::backend::Backend;
use crate::control::MacAddr;
use crate::header;
use crate::shared::Shared;

/// Sends a reverse ARP request from `mac`, by which switches learn where the station is now; false
/// when the back end does not take it. RFC 903; vhost-user specification, VHOST_USER_SEND_RARP.
pub fn announce(backend: &dyn Backend, shared: &Shared, mac: MacAddr) -> bool {
    let Some(fd) = backend.queue(0) else { return false };
    let header = header::header_size(shared.features());
    let mut bytes = vec![0; header];
    bytes.extend(rarp(mac));
    match write(fd, &bytes) {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!(device = %shared.name, %error, "cannot announce the guest");
            false
        }
    }
}

/// The frame: "who am I", from and about `mac`, to everybody, padded to the least size.
fn rarp(mac: MacAddr) -> [u8; 60] {
    let mut frame = [0; 60];
    let fixed = [0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac.0);
    frame[12..22].copy_from_slice(&fixed);
    frame[22..28].copy_from_slice(&mac.0);
    frame[32..38].copy_from_slice(&mac.0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_names_the_station_three_times() {
        let frame = rarp(MacAddr([2, 1, 1, 1, 1, 9]));
        assert_eq!(frame.windows(6).filter(|w| *w == [2, 1, 1, 1, 1, 9]).count(), 3);
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[20..22], [0, 3]);
    }
}
