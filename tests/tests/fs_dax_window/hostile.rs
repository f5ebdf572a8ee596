//! A guest that asks for what no kernel would.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use testkit::frontend::ShmemPolicy;

use crate::share::*;

/// Numbers that a hostile guest would try.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..520).prop_map(|n| n * PAGE),
        2 => (1u64..4).prop_map(|n| n * PAGE),
        1 => any::<u64>(),
        1 => Just(u64::MAX - PAGE + 1),
        1 => 0..WINDOW,
    ]
}

proptest! {
    #![proptest_config(cases(30))]
    /// Whatever a guest asks for, the VMM is asked for nothing impossible.
    #[test]
    fn hostile_requests_never_reach_the_vmm(
        requests in proptest::collection::vec((number(), number(), number(), any::<bool>()), 1..200)
    ) {
        let share = Share::new(&["--dax=always"]);
        let _file = share.file("f", &content(index(WINDOW + 5), 2));
        let (mut guest, window) = share.guest(QEMU);
        let inode = guest.lookup(ROOT, "f").unwrap();
        let mut live = BTreeMap::new();
        for (from, len, at, take) in requests {
            let message = if take { set_up(inode, from, len, at, true) } else { remove(inode, at, len) };
            let error = errno(&mut guest, message);
            prop_assert!([0, libc::EINVAL, libc::ENOMEM].contains(&error), "errno {error}");
            follow(&window, &mut live);
            prop_assert_eq!(live.len(), window.mapped());
        }
    }
}

/// Whatever window the operator allows.
#[test]
fn mappings_neither_use_up_the_descriptors_nor_lie_where_no_file_is() {
    let share = Share::new(&["--dax=always", "--dax-vmm=plain", "--rlimit-nofile=200"]);
    let _file = share.file("f", &content(100, 4));
    let _other = share.file("other", &content(7, 4));
    let (mut guest, _window) = share.guest(ShmemPolicy::Plain);
    let inode = guest.lookup(ROOT, "f").unwrap();
    for (from, len) in [(u64::MAX - PAGE + 1, 2 * PAGE), ((1 << 63) - PAGE, PAGE), (1, PAGE)] {
        assert_eq!(errno(&mut guest, set_up(inode, from, len, 0, true)), libc::EINVAL, "{from:#x}");
    }
    let refused = (0..512).find_map(|at| {
        let error = errno(&mut guest, set_up(inode, 0, PAGE, at * PAGE, true));
        (error != 0).then_some((at, error))
    });
    let (taken, error) = refused.expect("200 descriptors are not enough for 512 mappings");
    assert!(taken > 50 && error == libc::ENFILE, "errno {error} after {taken}");
    let other = guest.lookup(ROOT, "other").unwrap();
    assert_eq!(attributes(&mut guest, other).attr.size, 7);
    assert_eq!(errno(&mut guest, remove(inode, 0, WINDOW)), 0);
    assert_eq!(errno(&mut guest, set_up(inode, 0, PAGE, 0, true)), 0);
}

/// Many small claims, and then a file that grows: mappings are brought together before there are as many
/// as end QEMU.
#[test]
fn growth_never_takes_more_mappings_than_qemu_can_hold() {
    let share = Share::new(&["--dax=always"]);
    let file = share.file("f", &content(100, 3));
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    let (mut taken, mut live) = (0, BTreeMap::new());
    // Each shows the whole of the file as it will be; four mappings of each would be too many.
    for at in 0..128 {
        taken += i32::from(errno(&mut guest, set_up(inode, 0, 4 * PAGE, at * 4 * PAGE, true)) == 0);
    }
    assert_eq!(taken, 128);
    for page in 0..4 {
        let size = page * PAGE + 100;
        assert_eq!(errno(&mut guest, truncate(inode, size)), 0);
        follow(&window, &mut live);
    }
    file.write_all_at(b"seen by all", 3 * PAGE).unwrap();
    attributes(&mut guest, inode);
    for at in 0..128 {
        let mut seen = [0; 11];
        window.read_window(at * 4 * PAGE + 3 * PAGE, &mut seen).unwrap();
        assert_eq!(&seen, b"seen by all");
    }
    // Page by page: refused before the cap, not at QEMU's end.
    assert_eq!(errno(&mut guest, remove(inode, 0, WINDOW)), 0);
    follow(&window, &mut live);
    let refused = (0..512).filter(|at| {
        let error = errno(&mut guest, set_up(inode, 0, PAGE, at * PAGE, true));
        assert!(error == 0 || error == libc::ENOMEM, "errno {error}");
        error != 0
    });
    assert_eq!(refused.count(), 512 - CAP / 2);
    follow(&window, &mut live);
}
