//! Captures read back: the frames of a pcap file, and whether their checksums are right.

use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The frames of a classic pcap file of Ethernet, as far as they were recorded.
///
/// # Errors
/// The file cannot be read, or is cut off.
pub fn frames(path: &Path) -> Result<Vec<Vec<u8>>> {
    let bytes = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let number = |at: usize| -> Result<usize> {
        let word = bytes.get(at..at + 4).context("a capture that is cut off")?;
        Ok(u32::from_le_bytes(word.try_into()?) as usize)
    };
    ensure!(number(0)? == 0xa1b2_3c4d && number(20)? == 1, "no pcap file of Ethernet");
    let mut frames = Vec::new();
    let mut at = 24;
    while at < bytes.len() {
        let len = number(at + 8)?;
        ensure!(number(at + 12)? == len, "a frame that was not recorded whole");
        frames.push(bytes.get(at + 16..at + 16 + len).context("a frame is cut off")?.to_vec());
        at += 16 + len;
    }
    Ok(frames)
}

/// What a frame's checksum is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksum {
    /// Complete and right.
    Right,
    /// Only the pseudo-header's sum, for the other side to complete.
    Partial,
    /// The frame has none: not TCP, UDP or ICMP, or a fragment.
    None,
    /// Neither.
    Wrong,
}

fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|p| u32::from(p[0]) << 8 | p.get(1).map_or(0, |&b| b.into()));
    words.fold(0, |sum, word| {
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    })
}

fn fold(sum: u32) -> u32 {
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) + (sum >> 16)
}

/// Looks at the checksums of IP and of what is in it.
#[must_use]
pub fn checksum(frame: &[u8]) -> Checksum {
    let Some((link, packet)) = frame.split_at_checked(14) else { return Checksum::Wrong };
    match (link[12], link[13]) {
        (8, 0) => ipv4(packet),
        (0x86, 0xdd) => ipv6(packet),
        _ => Checksum::None,
    }
}

fn ipv4(packet: &[u8]) -> Checksum {
    if packet.len() < 20 || sum(&packet[..20]) != 0xffff {
        return Checksum::Wrong;
    }
    let len = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff;
    match packet.get(20..len) {
        Some(_) if fragment != 0 => Checksum::None,
        Some(body) => transport(packet[9], &packet[12..20], body),
        None => Checksum::Wrong,
    }
}

fn ipv6(packet: &[u8]) -> Checksum {
    if packet.len() < 40 {
        return Checksum::Wrong;
    }
    let len = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    match packet.get(40..40 + len) {
        Some(body) => transport(packet[6], &packet[8..40], body),
        None => Checksum::Wrong,
    }
}

/// `addresses` are both of IP's.
fn transport(protocol: u8, addresses: &[u8], body: &[u8]) -> Checksum {
    let at = match protocol {
        1 => return if sum(body) == 0xffff { Checksum::Right } else { Checksum::Wrong },
        6 => 16,
        17 => 6,
        58 => 2,
        _ => return Checksum::None,
    };
    let Some(&[high, low]) = body.get(at..at + 2) else { return Checksum::Wrong };
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let pseudo = fold(sum(addresses) + u32::from(protocol) + len);
    if fold(pseudo + sum(body)) == 0xffff {
        Checksum::Right
    } else if u32::from(high) << 8 | u32::from(low) == pseudo {
        Checksum::Partial
    } else if protocol == 17 && addresses.len() == 8 && (high, low) == (0, 0) {
        Checksum::None
    } else {
        Checksum::Wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ICMP echo request of 8 bytes from 10.0.0.1 to 10.0.0.2.
    fn ping() -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([8, 0]);
        frame.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0x66, 0xdf, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([8, 0, 0xf7, 0xff, 0, 0, 0, 0]);
        frame
    }

    #[test]
    fn a_right_checksum_is_told_from_a_wrong_one() {
        assert_eq!(checksum(&ping()), Checksum::Right);
        for at in [18, 36, 40] {
            let mut bad = ping();
            bad[at] ^= 1;
            assert_eq!(checksum(&bad), Checksum::Wrong, "{at}");
        }
        assert_eq!(checksum(&[0; 13]), Checksum::Wrong);
    }

    #[test]
    fn a_partial_checksum_is_the_pseudo_headers() {
        let mut frame = ping();
        // UDP of 8 bytes: 10.0.0.1 + 10.0.0.2 + 17 + 8.
        frame[23] = 17;
        frame[24..26].copy_from_slice(&[0x66, 0xcf]);
        frame[34..42].copy_from_slice(&[0, 1, 0, 2, 0, 8, 0x14, 0x1c]);
        assert_eq!(checksum(&frame), Checksum::Partial);
        frame[40] = 0;
        frame[41] = 0;
        assert_eq!(checksum(&frame), Checksum::None);
    }
}
