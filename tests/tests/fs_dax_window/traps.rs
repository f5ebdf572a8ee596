//! The traps of QEMU's window, each by its name: what aborts it, what it refuses, and what it shows as
//! zeroes. (That its limits on the window's size are met is in `fs_dax.rs`, that on the number of mappings in
//! `hostile.rs`.)

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{OFlags, fcntl_getfl};
use testkit::daemon::copy_program;
use testkit::driver::fs::Message;

use crate::share::*;

/// Trap: a descriptor that is open for reading alone is refused with "Permission denied".
#[test]
fn every_descriptor_is_open_for_writing() {
    let share = Share::new(&["--dax=always"]);
    let _file = share.file("f", &content(index(PAGE + 5), 1));
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    // The guest wants to read, and has the file open so.
    guest.open(inode, libc::O_RDONLY).unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 0, false)), 0);
    window.with_mappings(|all| {
        assert_eq!(all.len(), 2);
        assert!(all.iter().all(|m| fcntl_getfl(&m.file).unwrap().contains(OFlags::RDWR)));
    });
}

/// Trap: a map past the file's end is refused, and with it the part that is in the file.
#[test]
fn nothing_past_the_end_is_asked_for() {
    let share = Share::new(&["--dax=always"]);
    let (mut guest, window) = share.guest(QEMU);
    for (n, size) in [1, 4095, 4096, 4097, 20_000].into_iter().enumerate() {
        let name = format!("f{n}");
        let _file = share.file(&name, &content(size, 1));
        let inode = guest.lookup(ROOT, &name).unwrap();
        assert_eq!(errno(&mut guest, set_up(inode, 0, WINDOW, 0, true)), 0);
        let mut live = BTreeMap::new();
        window.with_mappings(|all| live.extend(all.iter().map(|m| (m.shm_offset, m.len))));
        let end = live.iter().map(|(at, len)| at + len).max().unwrap();
        assert_eq!(end, (size as u64).next_multiple_of(PAGE), "of {size} bytes");
        window.touch_all().unwrap();
        // Wholly behind the end there is nothing to map, and to ask for it is no error.
        assert_eq!(errno(&mut guest, set_up(inode, WINDOW, WINDOW, 0, true)), 0);
        assert_eq!(window.mapped(), 0);
    }
}

/// Trap: clamped to whole pages, the page in which the file ends reads as zeroes.
#[test]
fn the_last_page_is_not_zero() {
    let share = Share::new(&["--dax=always"]);
    let bytes = content(index(2 * PAGE + 9), 2);
    let _file = share.file("f", &bytes);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 0, true)), 0);
    let mut page = vec![1; index(PAGE)];
    window.read_window(2 * PAGE, &mut page).unwrap();
    assert_eq!(page[..9], bytes[index(2 * PAGE)..]);
    assert!(page[9..].iter().all(|&byte| byte == 0), "behind the end");
}

/// Trap: a file that grows after it was mapped reads as zeroes behind its old end.
#[test]
fn what_a_file_grows_by_is_not_zero() {
    let share = Share::new(&["--dax=always"]);
    let mut bytes = content(index(PAGE + 9), 3);
    let file = share.file("f", &bytes);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    let handle = guest.open(inode, libc::O_RDWR).unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 16 * PAGE, 0, true)), 0);
    let check = |bytes: &[u8], who: &str| {
        for at in (0..bytes.len()).step_by(4096) {
            let mut seen = vec![0; (bytes.len() - at).min(4096)];
            window.read_window(at as u64, &mut seen).unwrap();
            assert!(seen == bytes[at..at + seen.len()], "{who}, at {at}");
        }
    };
    let more = content(index(3 * PAGE), 4);
    let (from, _) = guest.data_at(0);
    guest.ram().write(from, &more);
    let write =
        Message::write(inode, handle, bytes.len() as u64, u32::try_from(more.len()).unwrap());
    assert_eq!(errno(&mut guest, write), 0);
    bytes.extend(&more);
    check(&bytes, "by the guest's write");

    let more = content(index(2 * PAGE), 5);
    file.write_all_at(&more, bytes.len() as u64).unwrap();
    bytes.extend(&more);
    assert_eq!(attributes(&mut guest, inode).attr.size, bytes.len() as u64);
    check(&bytes, "by the host's write");

    bytes.resize(index(12 * PAGE + 1), 0);
    assert_eq!(errno(&mut guest, truncate(inode, bytes.len() as u64)), 0);
    file.write_all_at(b"in the hole", 9 * PAGE).unwrap();
    bytes[index(9 * PAGE)..][..11].copy_from_slice(b"in the hole");
    check(&bytes, "by a truncation");
}

/// Trap: QEMU makes an empty file as large as the mapping.
#[test]
fn an_empty_file_stays_empty() {
    let share = Share::new(&["--dax=always"]);
    let file = share.file("f", b"");
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, WINDOW, 0, true)), 0);
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(errno(&mut guest, truncate(inode, 3 * PAGE)), 0);
    assert_eq!(window.mapped(), 1);
    assert_eq!(errno(&mut guest, truncate(inode, 0)), 0);
    assert_eq!((file.metadata().unwrap().len(), window.mapped()), (0, 0));
}

/// Trap: a truncated file takes QEMU down with SIGBUS when the guest touches what was mapped.
#[test]
fn a_truncation_leaves_no_page_behind_the_end_mapped() {
    let share = Share::new(&["--dax=always"]);
    let _file = share.file("f", &content(index(16 * PAGE), 6));
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    for at in 0..4 {
        let message = set_up(inode, at * 4 * PAGE, 8 * PAGE, at * 8 * PAGE, true);
        assert_eq!(errno(&mut guest, message), 0);
    }
    for size in [15 * PAGE + 1, 9 * PAGE, 5 * PAGE + 4000, PAGE, 1, 0] {
        assert_eq!(errno(&mut guest, truncate(inode, size)), 0);
        window.touch_all().unwrap();
    }
    assert_eq!(window.mapped(), 0);
}

/// Trap: overlapping maps and unmaps of other ranges than were mapped are refused with EFAULT.
#[test]
fn maps_over_others_take_those_away_first_and_halves_are_refused() {
    let share = Share::new(&["--dax=always"]);
    let bytes = content(index(32 * PAGE), 7);
    let _file = share.file("f", &bytes);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    let mut live = BTreeMap::new();
    for (from, at, len) in [(0, 0, 8), (8, 8, 8), (16, 0, 16), (24, 0, 16)] {
        let message = set_up(inode, from * PAGE, len * PAGE, at * PAGE, true);
        assert_eq!(errno(&mut guest, message), 0);
        follow(&window, &mut live);
    }
    let mut seen = vec![0; index(8 * PAGE)];
    window.read_window(0, &mut seen).unwrap();
    assert!(seen == bytes[index(24 * PAGE)..]);
    for (at, len) in [(0, 8), (4, 4), (8, 16)] {
        assert_eq!(errno(&mut guest, remove(inode, at * PAGE, len * PAGE)), libc::EINVAL);
        let over = set_up(inode, 0, len * PAGE, at * PAGE, true);
        assert_eq!(errno(&mut guest, over), libc::EINVAL);
    }
    follow(&window, &mut live);
    assert_eq!(live.len(), 1);
}

/// Trap: holes of a file are its own zeroes, and what comes to be there is seen.
#[test]
fn holes_are_mapped_like_data() {
    let share = Share::new(&["--dax=always"]);
    let file = share.file("f", b"");
    file.set_len(16 * PAGE).unwrap();
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 16 * PAGE, 0, true)), 0);
    let mut seen = [1; 5];
    window.read_window(7 * PAGE, &mut seen).unwrap();
    assert_eq!(seen, [0; 5]);
    file.write_all_at(b"host!", 7 * PAGE).unwrap();
    window.read_window(7 * PAGE, &mut seen).unwrap();
    assert_eq!(&seen, b"host!");
    window.write_window(8 * PAGE, b"guest").unwrap();
    file.read_exact_at(&mut seen, 8 * PAGE).unwrap();
    assert_eq!(&seen, b"guest");
}

/// Trap: what cannot be opened for writing cannot be mapped at all, so it must not be marked: a guest
/// that believes the mark could not even read it. Here a program that runs on the host.
#[test]
fn a_file_that_cannot_be_opened_for_writing_is_not_marked() {
    let share = Share::new(&["--dax=inode"]);
    for name in ["runs", "rests"] {
        let path = share.path(name);
        // What is behind a program's end does not disturb it.
        copy_program(Path::new("/bin/sleep"), &path, Some(WINDOW)).unwrap();
    }
    let mut running =
        Command::new(share.path("runs")).arg("60").stdin(Stdio::null()).spawn().unwrap();
    let (mut guest, window) = share.guest(QEMU);
    let marks = ["runs", "rests"].map(|name| {
        let inode = guest.lookup(ROOT, name).unwrap();
        let marked = attributes(&mut guest, inode).attr.flags & ATTR_DAX != 0;
        let error = errno(&mut guest, set_up(inode, 0, WINDOW, 0, true));
        (marked, error)
    });
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(marks, [(false, libc::ETXTBSY), (true, 0)]);
    assert_eq!(window.mapped(), 1);
}

/// One that stops being so later loses its mark with the first mapping that fails.
#[test]
fn a_file_that_can_be_opened_no_longer_loses_its_mark() {
    let share = Share::new(&["--dax=inode"]);
    let path = share.path("program");
    copy_program(Path::new("/bin/sleep"), &path, Some(WINDOW)).unwrap();
    let (mut guest, _window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "program").unwrap();
    let marked = |guest: &mut _| attributes(guest, inode).attr.flags & ATTR_DAX != 0;
    assert!(marked(&mut guest));
    let mut running = Command::new(&path).arg("60").stdin(Stdio::null()).spawn().unwrap();
    let error = errno(&mut guest, set_up(inode, 0, WINDOW, 0, true));
    let after = marked(&mut guest);
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!((error, after), (libc::ETXTBSY, false));
}
