#![allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "tests may panic")]

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::*;

fn header(total_extlen: u16) -> InHeader {
    InHeader { nodeid: 1, total_extlen, ..InHeader::default() }
}

fn parse_plain(opcode: Opcode, bytes: &[u8]) -> Result<Request<'_>, RequestError> {
    parse(opcode, &header(0), bytes, Dialect::default())
}

proptest! {
    #[test]
    fn no_bytes_of_any_operation_do_harm(
        at in 0..Opcode::ALL.len(),
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        total_extlen: u16,
        setxattr_ext: bool,
    ) {
        let head = header(total_extlen % 32);
        let parsed = parse(Opcode::ALL[at], &head, &bytes, Dialect { setxattr_ext });
        // Records must end.
        match parsed {
            Ok(Request::BatchForget(list)) => prop_assert!(list.count() * 16 <= bytes.len()),
            Ok(Request::RemoveMapping(list)) => prop_assert!(list.count() * 16 <= bytes.len()),
            _ => {}
        }
    }

    #[test]
    fn a_name_is_one_component(name in "[a-z./]{0,5}") {
        let bytes = [name.as_bytes(), b"\0"].concat();
        let good = !name.is_empty() && name != "." && name != ".." && !name.contains('/');
        match parse_plain(Opcode::Lookup, &bytes) {
            Ok(Request::Lookup { name: found }) => {
                prop_assert!(good);
                prop_assert_eq!(found.to_bytes(), name.as_bytes());
            }
            other => {
                prop_assert!(!good);
                prop_assert_eq!(other.unwrap_err(), RequestError::BadName);
            }
        }
    }

    #[test]
    fn create_contexts_are_found(
        label in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)),
        group in proptest::option::of(any::<u32>()),
    ) {
        let mut records = Vec::new();
        if let Some(label) = &label {
            let name = b"security.selinux\0";
            let len = u32::try_from(16 + name.len() + label.len()).unwrap();
            let padded = usize::try_from(len).unwrap().next_multiple_of(8);
            let at = records.len();
            records.extend(wire::ExtHeader { size: len.next_multiple_of(8), kind: 1 }.as_bytes());
            let size = u32::try_from(label.len()).unwrap();
            records.extend(wire::Secctx { size, padding: 0 }.as_bytes());
            records.extend(name);
            records.extend(label);
            records.resize(at + padded, 0);
        }
        if let Some(group) = group {
            records.extend(wire::ExtHeader { size: 16, kind: wire::EXT_GROUPS }.as_bytes());
            records.extend(1u32.as_bytes());
            records.extend(group.as_bytes());
        }
        let mut bytes = wire::MkdirIn { mode: 0o755, umask: 0o22 }.as_bytes().to_vec();
        bytes.extend(b"dir\0");
        bytes.extend(&records);
        let head = header(u16::try_from(records.len() / 8).unwrap());
        let parsed = parse(Opcode::Mkdir, &head, &bytes, Dialect::default()).unwrap();
        let Request::Mkdir { args, name, extra } = parsed else { panic!("{parsed:?}") };
        prop_assert_eq!((args.mode, name), (0o755, c"dir"));
        prop_assert_eq!(extra.supplementary_group, group);
        prop_assert_eq!(extra.security.map(|s| s.value.to_vec()), label);
    }
}

#[test]
fn extension_records_cannot_be_longer_than_the_message() {
    let bytes = [wire::MkdirIn::default().as_bytes(), b"dir\0"].concat();
    let parsed = parse(Opcode::Mkdir, &header(9), &bytes, Dialect::default());
    assert_eq!(parsed.unwrap_err(), RequestError::Malformed);
}

#[test]
fn two_names_follow_one_another() {
    let bytes = [9u64.as_bytes(), b"old\0new\0"].concat();
    let Ok(Request::Rename { newdir: 9, flags: 0, old, new }) = parse_plain(Opcode::Rename, &bytes)
    else {
        panic!()
    };
    assert_eq!((old, new), (c"old", c"new"));
    let Ok(Request::Symlink { name, target, .. }) = parse_plain(Opcode::Symlink, b"link\0../a/b\0")
    else {
        panic!()
    };
    assert_eq!((name, target), (c"link", c"../a/b"));
    assert_eq!(parse_plain(Opcode::Rename, &bytes[..11]).unwrap_err(), RequestError::Malformed);
}

#[test]
fn setxattr_has_two_forms() {
    let short = [wire::SetxattrIn { size: 2, flags: 1 }.as_bytes(), b"user.a\0vv"].concat();
    let Ok(Request::Setxattr { name, value, flags: 1, kill_sgid: false }) =
        parse_plain(Opcode::Setxattr, &short)
    else {
        panic!()
    };
    assert_eq!((name, value), (c"user.a", &b"vv"[..]));
    let long = [
        wire::SetxattrIn { size: 2, flags: 1 }.as_bytes(),
        wire::SetxattrExt { setxattr_flags: 1, padding: 0 }.as_bytes(),
        b"user.a\0vv",
    ]
    .concat();
    let dialect = Dialect { setxattr_ext: true };
    let Ok(Request::Setxattr { kill_sgid: true, .. }) =
        parse(Opcode::Setxattr, &header(0), &long, dialect)
    else {
        panic!()
    };
    let cut = &short[..short.len() - 1];
    assert_eq!(parse_plain(Opcode::Setxattr, cut).unwrap_err(), RequestError::Malformed);
}

#[test]
fn the_first_init_of_an_old_kernel_is_short() {
    let args = wire::InitIn { major: 7, minor: 31, max_readahead: 1, flags: 2 };
    let Ok(Request::Init { flags2: 0, .. }) = parse_plain(Opcode::Init, args.as_bytes()) else {
        panic!()
    };
    let long = [args.as_bytes(), 5u32.as_bytes(), &[0; 44]].concat();
    let Ok(Request::Init { args: found, flags2: 5 }) = parse_plain(Opcode::Init, &long) else {
        panic!()
    };
    assert_eq!(found, args);
}
