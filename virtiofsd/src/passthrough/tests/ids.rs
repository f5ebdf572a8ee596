//! Whose files are made, and under which ids.

#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, SetattrValid};
use fuse_backend_rs::api::filesystem::FileSystem;

use super::harness::*;
use crate::fuse::extension::{CreateContext, Extension};
use crate::passthrough::id_map::IdMap;
use crate::passthrough::{Config, sys};

fn map(rules: &[&str]) -> IdMap {
    let rules: Vec<_> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    IdMap::new(&rules).unwrap()
}

#[test]
fn files_belong_to_the_caller_and_the_daemon_stays_itself() {
    if !is_root() {
        return;
    }
    let guest = Guest::new(Config::default());
    fs::set_permissions(guest.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let user = context(1234, 2345);
    guest.create_as(&user, ROOT, "file", libc::O_RDWR | libc::O_EXCL, 0o640).unwrap();
    guest.fs.mkdir(&user, ROOT, c"dir", 0o750, 0).unwrap();
    guest.fs.symlink(&user, c"x", ROOT, c"link").unwrap();
    guest.fs.mknod(&user, ROOT, c"fifo", libc::S_IFIFO | 0o600, 0, 0).unwrap();
    for name in ["file", "dir", "link", "fifo"] {
        let meta = fs::symlink_metadata(guest.path(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 2345), "{name}");
    }
    assert!(rustix::process::geteuid().is_root() && rustix::process::getegid().is_root());
    guest.create_as(&root(), ROOT, "root", libc::O_RDWR | libc::O_EXCL, 0o600).unwrap();
    assert_eq!(fs::metadata(guest.path("root")).unwrap().uid(), 0);
    for bad in [context(u32::MAX, 0), context(0, u32::MAX)] {
        let refused = guest.create_as(&bad, ROOT, "bad", libc::O_RDWR, 0o600);
        assert_eq!(errno_of(refused), libc::EINVAL);
    }
}

#[test]
fn a_file_that_exists_is_opened_with_the_callers_rights() {
    if !is_root() {
        return;
    }
    let guest = Guest::new(Config::default());
    fs::set_permissions(guest.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(guest.path("secret"), "secret").unwrap();
    fs::set_permissions(guest.path("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    guest.fs.negotiate(u64::MAX).unwrap();
    let refused = guest.create_as(&context(1234, 2345), ROOT, "secret", libc::O_RDONLY, 0o600);
    assert_eq!(errno_of(refused), libc::EACCES);
    assert_eq!(guest.fs.inode_count(), 0);
    assert!(guest.create_as(&root(), ROOT, "secret", libc::O_RDONLY, 0o600).is_ok());
    let exclusive = guest.create_as(&root(), ROOT, "secret", libc::O_RDONLY | libc::O_EXCL, 0o600);
    assert_eq!(errno_of(exclusive), libc::EEXIST);
}

#[test]
fn a_supplementary_group_lets_the_caller_in() {
    if !is_root() {
        return;
    }
    let guest = Guest::new(Config::default());
    fs::create_dir(guest.path("team")).unwrap();
    chown(guest.path("team"), Some(0), Some(77)).unwrap();
    fs::set_permissions(guest.path("team"), fs::Permissions::from_mode(0o2770)).unwrap();
    let team = guest.lookup(ROOT, "team").unwrap().inode;
    let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o2660, umask: 0, fuse_flags: 0 };
    let user = context(1234, 2345);
    let make = |name, group| {
        let extra = CreateContext { security: None, supplementary_group: group };
        guest.fs.create_with(&user, &extra, team, name, args)
    };
    assert_eq!(errno_of(make(c"alone", None)), libc::EACCES);
    make(c"with", Some(77)).unwrap();
    let meta = fs::metadata(guest.path("team/with")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (1234, 77));
    assert!(rustix::process::getgroups().unwrap().iter().all(|group| group.as_raw() != 77));
    // A guest that cannot name groups has done the checks alone.
    guest.fs.negotiate(0).unwrap();
    let team = guest.lookup(ROOT, "team").unwrap().inode;
    let made = guest.create_as(&user, team, "trusted", libc::O_RDWR | libc::O_EXCL, 0o660);
    assert!(made.is_ok());
    assert_eq!(fs::metadata(guest.path("team/trusted")).unwrap().uid(), 1234);
}

#[test]
fn ids_are_translated_both_ways_and_forbidden_ones_refused() {
    if !is_root() {
        return;
    }
    let guest = Guest::new(Config {
        uid_map: map(&["map:0:100000:1000", "forbid-guest:5000:10"]),
        gid_map: map(&["squash-guest:0:777:4294967295", "squash-host:0:5:4294967295"]),
        ..Config::default()
    });
    chown(guest.dir.path(), Some(100_001), Some(777)).unwrap();
    fs::set_permissions(guest.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (entry, ..) = guest.create_as(&context(7, 9), ROOT, "a", libc::O_RDWR, 0o600).unwrap();
    assert_eq!((entry.attr.st_uid, entry.attr.st_gid), (7, 5));
    let meta = fs::metadata(guest.path("a")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (100_007, 777));
    let refused = guest.create_as(&context(5005, 9), ROOT, "b", libc::O_RDWR, 0o600);
    assert_eq!(errno_of(refused), libc::EPERM);
    let mut attr = sys::empty_stat();
    attr.st_uid = 8;
    attr.st_gid = 3;
    let both = SetattrValid::UID | SetattrValid::GID;
    let (now, _) = guest.fs.setattr(&root(), entry.inode, attr, None, both).unwrap();
    assert_eq!((now.st_uid, now.st_gid), (8, 5));
    assert_eq!(fs::metadata(guest.path("a")).unwrap().uid(), 100_008);
    attr.st_uid = 5001;
    assert_eq!(errno_of(guest.fs.setattr(&root(), entry.inode, attr, None, both)), libc::EPERM);
    assert_eq!(guest.fs.statx(&root(), entry.inode, None, 0, 0).unwrap().0.stx_uid, 8);
}

#[test]
fn access_is_checked_as_the_caller() {
    if !is_root() {
        return;
    }
    let guest = Guest::new(Config::default());
    fs::write(guest.path("a"), "").unwrap();
    fs::set_permissions(guest.path("a"), fs::Permissions::from_mode(0o640)).unwrap();
    chown(guest.path("a"), Some(1234), Some(2345)).unwrap();
    let a = guest.lookup(ROOT, "a").unwrap().inode;
    let check = |uid, gid, mask: i32| guest.fs.access(&context(uid, gid), a, mask as u32);
    assert!(check(1234, 1, libc::R_OK | libc::W_OK).is_ok());
    assert!(check(1, 2345, libc::R_OK).is_ok());
    assert_eq!(errno_of(check(1, 2345, libc::W_OK)), libc::EACCES);
    assert_eq!(errno_of(check(1, 1, libc::R_OK)), libc::EACCES);
    assert_eq!(errno_of(check(0, 0, 0xff)), libc::EINVAL);
}
