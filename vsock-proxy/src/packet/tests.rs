#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]
#![allow(unsafe_code, reason = "chains over the test's own buffers")]

use proptest::prelude::*;

use super::*;

fn chain(buffers: &mut [Vec<u8>]) -> IoVecs {
    let mut list = IoVecs::new();
    for buffer in buffers {
        // SAFETY: the buffers outlive the list in every test below.
        unsafe { list.push(buffer.as_mut_ptr(), buffer.len()) };
    }
    list
}

fn header(len: u32) -> Header {
    Header {
        src_cid: Cid(3),
        dst_cid: Cid::HOST,
        src_port: Port(1025),
        dst_port: Port(u32::MAX),
        len,
        socket_type: 1,
        op: Op::Rw.to_wire(),
        flags: 7,
        buf_alloc: 4096,
        fwd_cnt: 99,
    }
}

#[test]
fn bytes_are_where_the_specification_has_them() {
    let bytes = header(5).to_raw();
    let bytes = bytes.as_bytes();
    assert_eq!(bytes[..8], 3u64.to_le_bytes());
    assert_eq!(bytes[8..16], 2u64.to_le_bytes());
    assert_eq!(bytes[16..20], 1025u32.to_le_bytes());
    assert_eq!(bytes[20..24], u32::MAX.to_le_bytes());
    assert_eq!(bytes[24..28], 5u32.to_le_bytes());
    assert_eq!(bytes[28..30], 1u16.to_le_bytes());
    assert_eq!(bytes[30..32], 5u16.to_le_bytes());
    assert_eq!(bytes[32..36], 7u32.to_le_bytes());
    assert_eq!(bytes[36..40], 4096u32.to_le_bytes());
    assert_eq!(bytes[40..44], 99u32.to_le_bytes());
}

#[test]
fn guests_have_no_reserved_cid() {
    for reserved in [0, 1, 2, 0xffff_ffff, 1 << 32 | 3, u64::MAX] {
        assert_eq!(Cid::guest(reserved), Err(ReservedCid(reserved)));
    }
    assert!(Cid::guest(3).is_ok() && Cid::guest(0xffff_fffe).is_ok());
}

#[test]
fn an_rst_is_never_answered() {
    let answer = header(5).reset().unwrap();
    assert_eq!((answer.src_cid, answer.dst_cid), (Cid::HOST, Cid(3)));
    assert_eq!((answer.src_port, answer.dst_port), (Port(u32::MAX), Port(1025)));
    assert_eq!((answer.op, answer.socket_type, answer.len), (3, 1, 0));
    assert_eq!(answer.reset(), None);
}

proptest! {
    /// The shape of a chain does not matter: header and payload may be cut anywhere.
    #[test]
    fn any_shape_of_chain_is_the_same_packet(
        payload in proptest::collection::vec(any::<u8>(), 0..200),
        extra in 0usize..20,
        cuts in proptest::collection::vec(0usize..280, 0..12),
    ) {
        let header = header(u32::try_from(payload.len()).unwrap());
        let mut flat = header.to_raw().as_bytes().to_vec();
        flat.extend(&payload);
        flat.extend(std::iter::repeat_n(0xee, extra));
        let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(flat.len())).collect();
        cuts.extend([0, flat.len()]);
        cuts.sort_unstable();
        let mut buffers: Vec<Vec<u8>> = cuts.windows(2).map(|w| flat[w[0]..w[1]].to_vec()).collect();
        let mut list = chain(&mut buffers);
        prop_assert_eq!(parse(&mut list), Ok(header));
        let mut got = vec![0; list.len()];
        list.read(&mut got);
        prop_assert_eq!(got, payload);
    }

    /// No bytes make the parser panic, and a payload is never longer than the header says.
    #[test]
    fn no_bytes_are_dangerous(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let total = bytes.len();
        let mut buffers = [bytes];
        let mut list = chain(&mut buffers);
        match parse(&mut list) {
            Ok(header) => prop_assert_eq!(list.len(), header.len as usize),
            Err(Malformed::NoHeader(n)) => prop_assert!(n == total && n < HEADER_SIZE),
            Err(Malformed::ShortPayload { says, has, .. }) => {
                prop_assert!(says as usize > has && has == total - HEADER_SIZE);
            }
        }
    }
}
