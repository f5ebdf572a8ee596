//! Which files are shown, and to be read alone.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use testkit::driver::fs::{FsClient, Message, op};
use testkit::frontend::ShmemPolicy;
use virtiofsd::fuse::wire::AttrOut;

use crate::share::*;

/// A layer that is shared read-only: no request, no mapping and no VMM can write to it.
#[test]
fn a_read_only_share_cannot_be_written_through_the_window() {
    let share = Share::new(&["--dax=always", "--dax-vmm=plain", "--readonly"]);
    let bytes = content(index(WINDOW), 9);
    let _file = share.file("layer", &bytes);
    let (mut guest, window) = share.guest(ShmemPolicy::Plain);
    let inode = guest.lookup(ROOT, "layer").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, PAGE, 0, true)), libc::EROFS);
    assert_eq!(window.mapped(), 0);
    assert_eq!(errno(&mut guest, set_up(inode, 0, WINDOW, 0, false)), 0);
    assert!(window.write_window(0, b"x").is_err(), "the mapping is marked writable");
    // Even a VMM that ignores the mark cannot: the descriptor is not open for writing.
    window.with_mappings(|all| {
        assert_eq!(all.len(), 1);
        assert!(all[0].file.write_at(b"x", 0).is_err());
        let flags = rustix::fs::fcntl_getfl(all[0].file.as_fd()).unwrap();
        assert!(!flags.intersects(rustix::fs::OFlags::RDWR | rustix::fs::OFlags::WRONLY));
    });
    let mut seen = vec![0; bytes.len()];
    window.read_window(0, &mut seen).unwrap();
    assert!(seen == bytes);
    assert!(fs::read(share.path("layer")).unwrap() == bytes);
}

/// Two guests share a layer, each by its own daemon; one tries everything to write to it.
#[test]
fn a_guest_that_writes_to_a_read_only_layer_hurts_nobody() {
    let arguments = ["--dax=inode", "--dax-vmm=plain", "--readonly"];
    let share = Share::new(&arguments);
    let bytes = content(index(WINDOW), 14);
    let _file = share.file("layer", &bytes);
    let _other = Share::daemon(share.dir.path(), "other", &arguments);
    let (mut bad, bad_window) = share.guest(ShmemPolicy::Plain);
    let socket = share.dir.path().join("other");
    let (mut good, good_window) =
        FsClient::start_with_window(&socket, 4, 8, ShmemPolicy::Plain).unwrap();
    let inodes = [&mut bad, &mut good].map(|guest| {
        let inode = guest.lookup(ROOT, "layer").unwrap();
        assert!(attributes(guest, inode).attr.flags & ATTR_DAX != 0);
        assert_eq!(errno(guest, set_up(inode, 0, WINDOW / 2, 0, false)), 0);
        inode
    });
    let inode = inodes[0];
    let handle = bad.open(inode, libc::O_RDONLY).unwrap();
    let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let hole = [handle, 0, PAGE, u64::from(hole.cast_unsigned())];
    for (attempt, what) in [
        (set_up(inode, 0, PAGE, WINDOW / 2, true), "a map for writing"),
        (set_up(inode, 0, WINDOW / 2, 0, true), "one in the place of its own"),
        (truncate(inode, 0), "a truncation"),
        (Message::write(inode, handle, 0, 100), "a write"),
        (Message::new(op::FALLOCATE, inode, &hole), "a hole"),
        (Message::new(op::OPEN, inode, &[libc::O_RDWR, 0]), "an open for writing"),
        (Message::new(op::OPEN, inode, &[libc::O_RDONLY | libc::O_TRUNC, 0]), "O_TRUNC"),
    ] {
        let error = errno(&mut bad, attempt);
        assert!([libc::EROFS, libc::EBADF].contains(&error), "{what}: errno {error}");
    }
    // It stores to its mapping all the same: that is its own fault, at the mapping.
    assert!(bad_window.write_window(0, b"x").is_err());
    let mut seen = vec![0; index(WINDOW / 2)];
    for window in [&bad_window, &good_window] {
        window.read_window(0, &mut seen).unwrap();
        assert!(seen == bytes[..seen.len()]);
    }
    for (guest, inode) in [&mut bad, &mut good].into_iter().zip(inodes) {
        assert_eq!(errno(guest, set_up(inode, WINDOW / 2, WINDOW / 2, WINDOW / 2, false)), 0);
        assert_eq!(attributes(guest, inode).attr.size, WINDOW);
    }
    assert!(fs::read(share.path("layer")).unwrap() == bytes);
}

/// `dax=inode`: the mark comes and goes with the file, in whatever answer has its attributes.
#[test]
fn a_file_that_stops_qualifying_loses_its_mark() {
    let share = Share::new(&["--dax=inode"]);
    let file = share.file("image", &content(index(WINDOW), 10));
    let (mut guest, _window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "image").unwrap();
    let marked = |attr: AttrOut| attr.attr.flags & ATTR_DAX != 0;
    assert!(marked(attributes(&mut guest, inode)));
    // In the answer to the very request that changes it.
    for (size, mark) in [(WINDOW - 1, false), (WINDOW + PAGE, true), (PAGE, false), (WINDOW, true)]
    {
        let set: AttrOut = guest.call(truncate(inode, size)).unwrap().get().unwrap();
        assert_eq!((marked(set), set.attr.size), (mark, size));
        assert_eq!(marked(attributes(&mut guest, inode)), mark, "{size}");
    }
    // And when the host changes it.
    file.set_len(WINDOW + 1).unwrap();
    assert!(!marked(attributes(&mut guest, inode)));
}

/// The guest hears of DAX only from a VMM that asked how large the window is, and can be asked to map.
#[test]
fn without_a_window_nothing_is_marked_and_nothing_mapped() {
    let share = Share::new(&["--dax=always"]);
    let _file = share.file("image", &content(index(WINDOW), 15));
    let mut guest = FsClient::start(share.daemon.socket(), 1, 2).unwrap();
    let inode = guest.lookup(ROOT, "image").unwrap();
    assert_eq!(attributes(&mut guest, inode).attr.flags & ATTR_DAX, 0);
    let error = errno(&mut guest, set_up(inode, 0, WINDOW, 0, false));
    assert!([libc::ENOSYS, libc::EOPNOTSUPP].contains(&error), "errno {error}");
    // A channel alone is not enough.
    let _window = guest.front_end.open_backend_channel(ShmemPolicy::Plain).unwrap();
    assert_eq!(attributes(&mut guest, inode).attr.flags & ATTR_DAX, 0);
    guest.front_end.get_shmem_config().unwrap();
    assert_eq!(attributes(&mut guest, inode).attr.flags & ATTR_DAX, ATTR_DAX);
}
