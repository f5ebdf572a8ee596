//! The first GETATTR of an inode asks for its name, and tells of that inode or of none.

use std::fs;

use fuse_backend_rs::api::filesystem::FileSystem as _;

use super::harness::*;
use crate::passthrough::Config;

/// Size and link count, as GETATTR has them.
fn attributes(guest: &Guest, inode: u64) -> (i64, u64) {
    let (stat, _) = guest.fs.getattr(&root(), inode, None).unwrap();
    (stat.st_size, stat.st_nlink)
}

/// The process' open `O_PATH` descriptors of `path` cannot be told apart from others', so the store is asked.
fn is_open(guest: &Guest, inode: u64) -> bool {
    guest.fs.inodes.fd(inode).is_some()
}

#[test]
fn an_inode_that_is_used_once_is_not_opened() {
    if !is_root() {
        return; // without CAP_DAC_READ_SEARCH every inode is open
    }
    let guest = Guest::new(Config::default());
    fs::write(guest.path("file"), "12345").unwrap();
    let file = guest.lookup(1, "file").unwrap().inode;
    assert_eq!((attributes(&guest, file), is_open(&guest, file)), ((5, 1), false));
    // Twice is worth it.
    fs::write(guest.path("file"), "1234567").unwrap();
    assert_eq!((attributes(&guest, file), is_open(&guest, file)), ((7, 1), true));
}

#[test]
fn what_has_taken_the_name_is_not_taken_for_the_inode() {
    type Change = fn(&Guest);
    let changes: [(&str, Change); 5] = [
        ("renamed", |g| fs::rename(g.path("file"), g.path("elsewhere")).unwrap()),
        ("replaced", |g| {
            fs::write(g.path("new"), "another").unwrap();
            fs::rename(g.path("new"), g.path("file")).unwrap();
        }),
        ("a link to another", |g| {
            fs::remove_file(g.path("file")).unwrap();
            fs::write(g.path("new"), "another").unwrap();
            std::os::unix::fs::symlink("new", g.path("file")).unwrap();
        }),
        ("a link to itself", |g| {
            fs::rename(g.path("file"), g.path("elsewhere")).unwrap();
            std::os::unix::fs::symlink("elsewhere", g.path("file")).unwrap();
        }),
        ("a directory", |g| {
            fs::remove_file(g.path("file")).unwrap();
            fs::create_dir(g.path("file")).unwrap();
        }),
    ];
    for (what, change) in changes {
        let guest = Guest::new(Config::default());
        fs::write(guest.path("file"), "12345").unwrap();
        // Another name, so that the inode stays.
        fs::hard_link(guest.path("file"), guest.path("kept")).unwrap();
        let file = guest.lookup(1, "file").unwrap().inode;
        change(&guest);
        assert_eq!(attributes(&guest, file).0, 5, "{what}");
        assert_eq!(guest.lookup(1, "kept").unwrap().inode, file, "{what}");
    }
}

#[test]
fn a_guests_own_removal_is_known() {
    let guest = Guest::new(Config::default());
    // Inode numbers may come back at once, and with them the time of birth.
    for _ in 0..100 {
        fs::write(guest.path("file"), "12345").unwrap();
        let file = guest.lookup(1, "file").unwrap().inode;
        guest.fs.unlink(&root(), 1, &c("file")).unwrap();
        fs::write(guest.path("file"), "another").unwrap();
        // It is held open where there are no file handles.
        let stale = guest.fs.getattr(&root(), file, None);
        assert!(stale.as_ref().is_err() || stale.is_ok_and(|(stat, _)| stat.st_size == 5));
        guest.forget(file);
    }
}
