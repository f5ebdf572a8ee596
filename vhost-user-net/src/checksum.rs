//! The Internet checksum. RFC 1071.

/// The plain sum of `bytes` as big-endian 16-bit words, an odd last byte being a word's first. Sums of
/// parts of even length may be added.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let mut sum: u64 = 0;
    for word in &mut words {
        sum += u64::from(u16::from_be_bytes(word.try_into().unwrap_or_default()));
    }
    sum + words.remainder().first().map_or(0, |&last| u64::from(last) << 8)
}

/// The checksum of what has this sum, as it stands in a header.
pub(crate) fn checksum(mut sum: u64) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // Folded, it has 16 bits.
    (!u16::try_from(sum).unwrap_or(0)).to_be_bytes()
}

/// The checksum of a UDP datagram: a zero would mean that there is none, and its complement is the same
/// number. RFC 768.
pub(crate) fn udp_checksum(sum: u64) -> [u8; 2] {
    match checksum(sum) {
        [0, 0] => [0xff, 0xff],
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_rfc_1071s() {
        // The example of RFC 1071, section 3: the sum is ddf2.
        let example = sum(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(checksum(example), [0x22, 0x0d]);
        assert_eq!(checksum(sum(&[0xff, 0xff])), [0, 0]);
        assert_eq!(udp_checksum(sum(&[0xff, 0xff])), [0xff, 0xff]);
        assert_eq!(checksum(sum(&[1])), [0xfe, 0xff]);
    }
}
