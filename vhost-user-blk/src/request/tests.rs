#![allow(unsafe_code, reason = "buffers of a test stand in for guest memory")]
#![allow(clippy::arithmetic_side_effects, reason = "numbers of a test, not of a guest")]

use proptest::prelude::*;

use super::*;

const LIMITS: Limits =
    Limits { capacity_sectors: 1000, read_only: false, discard: true, write_zeroes: true };

/// A list over `buffers`, which outlive it in every test.
fn list(buffers: &mut [Vec<u8>]) -> IoVecs {
    let mut out = IoVecs::new();
    for buffer in buffers {
        // SAFETY: the buffers outlive the list in every test.
        unsafe { out.push(buffer.as_mut_ptr(), buffer.len()) };
    }
    out
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// What a chain with `readable` bytes and `writable` bytes of room parses to.
fn parse_flat(
    readable: Vec<u8>,
    writable: usize,
    limits: &Limits,
) -> (Result<Request, Status>, usize) {
    let mut readable = [readable];
    let mut writable = [vec![0; writable]];
    let (mut r, mut w, mut status) = (list(&mut readable), list(&mut writable), IoVecs::new());
    let result = parse(&mut r, &mut w, &mut status, limits);
    (result, status.len())
}

fn range(sector: u64, sectors: u64) -> ByteRange {
    ByteRange { offset: sector * SECTOR_SIZE, len: sectors * SECTOR_SIZE }
}

#[test]
fn plain_requests() {
    let ok = |readable, writable| parse_flat(readable, writable, &LIMITS).0.unwrap();
    assert_eq!(ok(header(0, 7), 4097), Request::Read { offset: 7 * 512 });
    let write = [header(1, 992), vec![1; 4096]].concat();
    assert_eq!(ok(write, 1), Request::Write { offset: 992 * 512 });
    assert_eq!(ok(header(4, 0), 1), Request::Flush);
    assert_eq!(ok(header(8, 0), 21), Request::GetId);
    let discard = [header(11, 0), segment(1, 2, 0), segment(999, 1, 0)].concat();
    assert_eq!(ok(discard, 1), Request::Discard(vec![range(1, 2), range(999, 1)]));
    let zeroes = [header(13, 0), segment(1, 2, 1), segment(3, 4, 0)].concat();
    let expected = [(range(1, 2), true), (range(3, 4), false)]
        .map(|(range, unmap)| ZeroRange { range, unmap });
    assert_eq!(ok(zeroes, 1), Request::WriteZeroes(expected.to_vec()));
}

#[test]
fn a_request_ends_where_the_disk_does() {
    let read = |sector, len: usize| parse_flat(header(0, sector), len + 1, &LIMITS).0;
    assert!(read(999, 512).is_ok());
    for (sector, len) in
        [(1000, 512), (999, 1024), (u64::MAX, 512), (u64::MAX - 1, 1024), (1 << 55, 512)]
    {
        assert_eq!(read(sector, len), Err(Status::IoErr), "{sector}+{len}");
    }
    for len in [0, 1, 511, 513] {
        assert_eq!(read(0, len), Err(Status::IoErr), "{len} bytes");
    }
}

#[test]
fn segments_are_checked_one_by_one() {
    let discard = |segments: &[Vec<u8>]| {
        parse_flat([header(11, 0), segments.concat()].concat(), 1, &LIMITS).0
    };
    assert!(discard(&vec![segment(0, 1, 0); MAX_SEGMENTS as usize]).is_ok());
    assert_eq!(discard(&vec![segment(0, 1, 0); MAX_SEGMENTS as usize + 1]), Err(Status::IoErr));
    assert_eq!(discard(&[]), Err(Status::IoErr));
    assert_eq!(discard(&[vec![0; 8]]), Err(Status::IoErr));
    assert_eq!(discard(&[segment(0, 1, 0), segment(1000, 1, 0)]), Err(Status::IoErr));
    assert_eq!(discard(&[segment(u64::MAX, 1, 0)]), Err(Status::IoErr));
    assert_eq!(discard(&[segment(0, 1, 1)]), Err(Status::Unsupported));
    let huge = Limits { capacity_sectors: 1 << 40, ..LIMITS };
    let long = [header(13, 0), segment(0, MAX_SEGMENT_SECTORS + 1, 0)].concat();
    assert_eq!(parse_flat(long, 1, &huge).0, Err(Status::IoErr));
    let flags = [header(13, 0), segment(0, 1, 2)].concat();
    assert_eq!(parse_flat(flags, 1, &LIMITS).0, Err(Status::Unsupported));
}

#[test]
fn what_was_not_negotiated_is_unsupported() {
    let plain = Limits { discard: false, write_zeroes: false, ..LIMITS };
    for kind in [11, 13] {
        let request = [header(kind, 0), segment(0, 1, 0)].concat();
        assert_eq!(parse_flat(request, 1, &plain).0, Err(Status::Unsupported));
    }
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let limits = Limits { read_only: true, ..LIMITS };
    let write = [header(1, 0), vec![0; 512]].concat();
    assert_eq!(parse_flat(write, 1, &limits).0, Err(Status::IoErr));
    for kind in [11, 13] {
        let request = [header(kind, 0), segment(0, 1, 0)].concat();
        assert_eq!(parse_flat(request, 1, &limits).0, Err(Status::IoErr));
    }
}

proptest! {
    /// Whatever a chain holds and however it is cut: no panic, the status byte is the last one, and
    /// every range that comes out lies on the disk.
    #[test]
    fn nothing_leaves_the_disk(
        kind in prop_oneof![0u32..26, any::<u32>()],
        sector in prop_oneof![0u64..1200, any::<u64>()],
        payload in proptest::collection::vec(any::<u8>(), 0..600),
        header_len in prop_oneof![Just(16usize), 0usize..17],
        cuts in proptest::collection::vec(1usize..64, 0..6),
        room in proptest::collection::vec(0usize..1100, 0..4),
        capacity in prop_oneof![0u64..1200, any::<u64>()],
        read_only: bool,
    ) {
        let mut bytes = header(kind, sector);
        bytes.truncate(header_len);
        if header_len == 16 {
            bytes.extend(&payload);
        }
        let mut readable = Vec::new();
        for cut in cuts {
            let rest = bytes.split_off(cut.min(bytes.len()));
            readable.push(std::mem::replace(&mut bytes, rest));
        }
        readable.push(bytes);
        let mut writable: Vec<Vec<u8>> = room.iter().map(|&n| vec![0; n]).collect();
        let total: usize = room.iter().sum();
        let limits = Limits { capacity_sectors: capacity, read_only, ..LIMITS };
        let (mut r, mut w, mut status) = (list(&mut readable), list(&mut writable), IoVecs::new());
        let result = parse(&mut r, &mut w, &mut status, &limits);

        prop_assert_eq!(status.len(), total.min(1));
        prop_assert_eq!(w.len(), total.saturating_sub(1));
        let on_disk = |range: ByteRange| {
            let end = u128::from(range.offset) + u128::from(range.len);
            range.len.is_multiple_of(512) && end <= u128::from(capacity) * 512
        };
        prop_assert!(total > 0 || result.is_err());
        match result {
            Ok(Request::Read { offset }) => {
                let range = ByteRange { offset, len: w.len() as u64 };
                prop_assert!(on_disk(range));
            }
            Ok(Request::Write { offset }) => {
                prop_assert!(!read_only);
                let range = ByteRange { offset, len: r.len() as u64 };
                prop_assert!(on_disk(range));
            }
            Ok(Request::Discard(ranges)) => {
                prop_assert!(!read_only && ranges.into_iter().all(on_disk));
            }
            Ok(Request::WriteZeroes(zeroes)) => {
                prop_assert!(!read_only && zeroes.into_iter().all(|z| on_disk(z.range)));
            }
            Ok(Request::Flush | Request::GetId) | Err(_) => {}
        }
    }
}
