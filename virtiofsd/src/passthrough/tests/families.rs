//! Each family of operations.

#![allow(
    clippy::identity_op,
    clippy::bind_instead_of_map,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, OpenOptions, SetattrValid};
use fuse_backend_rs::api::filesystem::{FileLock, FileSystem, GetxattrReply, ListxattrReply};

use super::harness::*;
use crate::fuse::extension::{CopyRange, CreateContext, Extension, LockRequest, SecurityContext};
use crate::fuse::lock_waits::LockWaits;
use crate::passthrough::xattr_map::XattrMap;
use crate::passthrough::{CachePolicy, Config, Demand, InodeFileHandles, sys};

#[test]
fn one_inode_is_one_node_whatever_its_name() {
    for mode in MODES {
        let guest = Guest::with_handles(mode);
        let (inode, handle) = guest.create(ROOT, "a");
        guest.release(inode, handle);
        guest.fs.link(&root(), inode, ROOT, c"b").unwrap();
        assert_eq!(guest.lookup(ROOT, "a").unwrap().inode, inode);
        let b = guest.lookup(ROOT, "b").unwrap();
        assert_eq!((b.inode, b.attr.st_nlink), (inode, 2));
        guest.fs.rename(&root(), ROOT, c"b", ROOT, c"c", 0).unwrap();
        assert_eq!(guest.lookup(ROOT, "c").unwrap().inode, inode);
        assert_eq!(errno_of(guest.lookup(ROOT, "b")), libc::ENOENT);
    }
}

#[test]
fn nodes_survive_renames_by_the_host() {
    for mode in MODES {
        let guest = Guest::with_handles(mode);
        fs::create_dir_all(guest.path("d/e")).unwrap();
        fs::write(guest.path("d/e/f"), "text").unwrap();
        let d = guest.lookup(ROOT, "d").unwrap().inode;
        let e = guest.lookup(d, "e").unwrap().inode;
        let f = guest.lookup(e, "f").unwrap().inode;
        fs::rename(guest.path("d"), guest.path("elsewhere")).unwrap();
        fs::rename(guest.path("elsewhere/e/f"), guest.path("g")).unwrap();
        let handle = guest.open(f, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(f, handle, 0, 100).unwrap(), b"text");
        assert_eq!(guest.fs.getattr(&root(), f, None).unwrap().0.st_size, 4);
        assert!(guest.names(e, 10).unwrap().is_empty());
    }
}

#[test]
fn an_open_file_outlives_its_last_name() {
    for mode in MODES {
        for parent in ["/dev/shm", "/tmp"] {
            let config = Config { inode_file_handles: mode, ..Config::default() };
            let guest = Guest::new_in(parent.as_ref(), config);
            let (inode, handle) = guest.create(ROOT, "a");
            guest.fs.unlink(&root(), ROOT, c"a").unwrap();
            assert_eq!(guest.write(inode, handle, 0, b"still here").unwrap(), 10);
            assert_eq!(guest.read(inode, handle, 6, 9).unwrap(), b"here");
            let (attr, _) = guest.fs.getattr(&root(), inode, Some(handle)).unwrap();
            assert_eq!((attr.st_size, attr.st_nlink), (10, 0));
            let (attr, _) = guest.fs.getattr(&root(), inode, None).unwrap();
            assert_eq!(attr.st_nlink, 0, "{parent} {mode:?}");
            // The number may come back as another inode, which is another node.
            let (again, other) = guest.create(ROOT, "a");
            assert_ne!(again, inode);
            guest.release(again, other);
            guest.release(inode, handle);
        }
    }
}

#[test]
fn numbers_used_again_are_other_nodes() {
    for mode in MODES {
        let guest = Guest::with_handles(mode);
        let mut seen = std::collections::HashSet::new();
        for _ in 0..200 {
            let (inode, handle) = guest.create(ROOT, "a");
            guest.release(inode, handle);
            assert!(seen.insert(inode));
            guest.fs.unlink(&root(), ROOT, c"a").unwrap();
            if seen.len() % 2 == 0 {
                guest.forget(inode);
            }
        }
        assert_eq!(guest.fs.inode_count(), 100);
    }
}

#[test]
fn forgotten_and_invented_nodes_and_handles_are_refused() {
    for mode in MODES {
        let guest = Guest::with_handles(mode);
        let (inode, handle) = guest.create(ROOT, "a");
        let (other, _) = guest.create(ROOT, "b");
        assert_eq!(errno_of(guest.read(other, handle, 0, 1)), libc::EBADF);
        assert_eq!(errno_of(guest.read(inode, handle + 8, 0, 1)), libc::EBADF);
        guest.release(inode, handle);
        assert_eq!(errno_of(guest.read(inode, handle, 0, 1)), libc::EBADF);
        guest.forget(inode);
        assert_eq!(errno_of(guest.fs.getattr(&root(), inode, None)), libc::ESTALE);
        assert_eq!(errno_of(guest.lookup(inode, "x")), libc::ESTALE);
        assert_eq!(errno_of(guest.open(u64::MAX, 0)), libc::ESTALE);
    }
}

#[test]
fn a_new_session_starts_empty() {
    let guest = Guest::with_handles(InodeFileHandles::Prefer);
    let (inode, handle) = guest.create(ROOT, "a");
    guest.fs.negotiate(u64::MAX).unwrap();
    assert_eq!((guest.fs.inode_count(), guest.fs.open_count()), (0, 0));
    assert_eq!(errno_of(guest.read(inode, handle, 0, 1)), libc::EBADF);
    assert!(guest.lookup(ROOT, "a").is_ok());
}

#[test]
fn reading_a_directory_in_small_steps_sees_every_name_once() {
    let guest = Guest::with_handles(InodeFileHandles::Prefer);
    let expected: Vec<String> =
        (0..1500).map(|n| format!("file-{n:05}-{}", "x".repeat(n % 90))).collect();
    for name in &expected {
        fs::write(guest.path(name), name).unwrap();
    }
    for room in [1, 7, 5000] {
        assert_eq!(guest.names(ROOT, room).unwrap(), expected);
    }
    let entries = guest.names_plus(ROOT, 7);
    assert_eq!(entries.len(), 1502);
    assert_eq!(guest.fs.inode_count(), 1500, "one lookup each, none for . and ..");
    for (name, entry) in entries.iter().filter(|(name, _)| !name.starts_with('.')) {
        assert_eq!(entry.attr.st_size, i64::try_from(name.len()).unwrap());
        guest.forget(entry.inode);
    }
    assert_eq!(guest.fs.inode_count(), 0);
}

#[test]
fn rewinding_shows_what_changed() {
    let guest = Guest::with_handles(InodeFileHandles::Prefer);
    let (handle, _) = guest.fs.opendir(&root(), ROOT, 0).unwrap();
    let count = |offset| {
        let mut count = 0;
        guest
            .fs
            .readdir(&root(), ROOT, handle.unwrap(), 0, offset, &mut |_| {
                count += 1;
                Ok(1)
            })
            .unwrap();
        count
    };
    assert_eq!(count(0), 2);
    fs::write(guest.path("new"), "").unwrap();
    assert_eq!(count(0), 3);
}

#[test]
fn upstreams_readdirplus_takes_back_what_did_not_fit() {
    let guest = Guest::with_handles(InodeFileHandles::Prefer);
    for n in 0..10 {
        fs::write(guest.path(&n.to_string()), "").unwrap();
    }
    let (handle, _) = guest.fs.opendir(&root(), ROOT, 0).unwrap();
    let mut room = 5;
    let mut kept = 0;
    guest
        .fs
        .readdirplus(&root(), ROOT, handle.unwrap(), 0, 0, &mut |_, entry| {
            room -= 1;
            kept += usize::from(room >= 0 && entry.inode != 0);
            Ok(usize::from(room >= 0))
        })
        .unwrap();
    assert_eq!(guest.fs.inode_count(), kept);
}

#[test]
fn attributes_change_by_node_and_by_handle() {
    for mode in MODES {
        let guest = Guest::with_handles(mode);
        let (inode, handle) = guest.create(ROOT, "a");
        for (round, handle) in [(1_i64, Some(handle)), (2, None)] {
            let mut attr = sys::empty_stat();
            attr.st_mode = 0o640 + u32::try_from(round).unwrap();
            attr.st_size = 1000 * round;
            attr.st_atime = 5 * round;
            attr.st_mtime = 7 * round;
            attr.st_mtime_nsec = 999_999_999;
            let valid =
                SetattrValid::MODE | SetattrValid::SIZE | SetattrValid::ATIME | SetattrValid::MTIME;
            let (now, _) = guest.fs.setattr(&root(), inode, attr, handle, valid).unwrap();
            assert_eq!(now.st_mode & 0o7777, attr.st_mode);
            assert_eq!(
                (now.st_size, now.st_atime, now.st_mtime),
                (1000 * round, 5 * round, 7 * round)
            );
            assert_eq!(now.st_mtime_nsec, 999_999_999);
        }
        let mut attr = sys::empty_stat();
        attr.st_mtime_nsec = libc::UTIME_OMIT;
        let refused = guest.fs.setattr(&root(), inode, attr, None, SetattrValid::MTIME);
        assert_eq!(errno_of(refused), libc::EINVAL);
        let (entry, _) = guest.fs.statx(&root(), inode, None, 0, libc::STATX_BTIME).unwrap();
        assert!(entry.stx_mask & libc::STATX_BTIME != 0 && entry.stx_btime.tv_sec > 1_600_000_000);
    }
}

#[test]
fn symbolic_links_and_special_files_are_made_but_never_opened() {
    for mode in MODES {
        let guest = Guest::with_handles(mode);
        guest.fs.symlink(&root(), c"/etc/passwd", ROOT, c"link").unwrap();
        let link = guest.lookup(ROOT, "link").unwrap();
        assert_eq!(guest.fs.readlink(&root(), link.inode).unwrap(), b"/etc/passwd");
        assert_eq!(errno_of(guest.open(link.inode, libc::O_RDONLY)), libc::EBADF);
        let fifo = guest.fs.mknod(&root(), ROOT, c"fifo", libc::S_IFIFO | 0o600, 0, 0).unwrap();
        assert!(fs::symlink_metadata(guest.path("fifo")).unwrap().file_type().is_fifo());
        assert_eq!(errno_of(guest.open(fifo.inode, libc::O_RDWR)), libc::EBADF);
        // Attributes of either kind change without opening it.
        let mut attr = sys::empty_stat();
        attr.st_mode = 0o604;
        let (now, _) =
            guest.fs.setattr(&root(), fifo.inode, attr, None, SetattrValid::MODE).unwrap();
        assert_eq!(now.st_mode & 0o777, 0o604);
        attr.st_mtime = 77;
        let (now, _) =
            guest.fs.setattr(&root(), link.inode, attr, None, SetattrValid::MTIME).unwrap();
        assert_eq!(now.st_mtime, 77);
        if is_root() {
            let null =
                guest.fs.mknod(&root(), ROOT, c"null", libc::S_IFCHR | 0o666, 0x103, 0).unwrap();
            assert_eq!(null.attr.st_rdev, libc::makedev(1, 3));
            assert_eq!(errno_of(guest.open(null.inode, libc::O_RDWR)), libc::EBADF);
            let size = guest.fs.setattr(&root(), null.inode, attr, None, SetattrValid::SIZE);
            assert_eq!(errno_of(size), libc::EBADF);
        }
        let dir = guest.fs.mknod(&root(), ROOT, c"dir", libc::S_IFDIR | 0o700, 0, 0);
        assert_eq!(errno_of(dir), libc::EINVAL);
    }
}

#[test]
fn a_file_without_a_name_can_get_one() {
    for mode in MODES {
        let guest = Guest::with_handles(mode);
        let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, umask: 0, fuse_flags: 0 };
        let extra = CreateContext::default();
        let (entry, handle, _) = guest.fs.tmpfile(&root(), &extra, ROOT, args).unwrap();
        guest.write(entry.inode, handle.unwrap(), 0, b"named later").unwrap();
        assert!(guest.names(ROOT, 10).unwrap().is_empty());
        let linked = guest.fs.link(&root(), entry.inode, ROOT, c"name").unwrap();
        assert_eq!((linked.inode, linked.attr.st_nlink), (entry.inode, 1));
        assert_eq!(fs::read(guest.path("name")).unwrap(), b"named later");
    }
}

#[test]
fn sparse_files_stay_sparse() {
    let guest = Guest::with_handles(InodeFileHandles::Prefer);
    let (inode, handle) = guest.create(ROOT, "sparse");
    guest.write(inode, handle, 8 << 20, b"end").unwrap();
    let seek = |offset, whence: i32| guest.fs.lseek(&root(), inode, handle, offset, whence as u32);
    assert_eq!(seek(0, libc::SEEK_DATA).unwrap(), 8 << 20);
    assert_eq!(seek(0, libc::SEEK_HOLE).unwrap(), 0);
    assert_eq!(errno_of(seek(9 << 20, libc::SEEK_DATA)), libc::ENXIO);
    let mode = |mode: i32, offset, len| {
        guest.fs.fallocate(&root(), inode, handle, mode as u32, offset, len)
    };
    mode(0, 0, 1 << 20).unwrap();
    mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, 64 << 10).unwrap();
    mode(libc::FALLOC_FL_KEEP_SIZE, 16 << 20, 4096).unwrap();
    assert_eq!(errno_of(mode(0, 0, 0)), libc::EINVAL);
    let blocks = fs::metadata(guest.path("sparse")).unwrap().blocks() * 512;
    assert!(blocks < 2 << 20, "{blocks}");
    assert_eq!(fs::metadata(guest.path("sparse")).unwrap().len(), (8 << 20) + 3);
}

#[test]
fn ranges_are_copied_within_and_between_files() {
    let guest = Guest::with_handles(InodeFileHandles::Prefer);
    let (from, from_handle) = guest.create(ROOT, "from");
    let (to, to_handle) = guest.create(ROOT, "to");
    guest.write(from, from_handle, 0, b"0123456789").unwrap();
    let range = CopyRange {
        inode_in: from,
        handle_in: from_handle,
        offset_in: 2,
        inode_out: to,
        handle_out: to_handle,
        offset_out: 1,
        len: u64::MAX >> 1,
        flags: 0,
    };
    assert_eq!(guest.fs.copy_file_range(&root(), &range).unwrap(), 8);
    assert_eq!(fs::read(guest.path("to")).unwrap(), b"\x0023456789");
    let wrong = CopyRange { handle_in: to_handle, ..range };
    assert_eq!(errno_of(guest.fs.copy_file_range(&root(), &wrong)), libc::EBADF);
    let wrong = CopyRange { flags: 1, ..range };
    assert_eq!(errno_of(guest.fs.copy_file_range(&root(), &wrong)), libc::EINVAL);
}

#[test]
fn syncing_works_on_files_directories_and_the_file_system() {
    let guest = Guest::with_handles(InodeFileHandles::Prefer);
    let (inode, handle) = guest.create(ROOT, "a");
    guest.fs.fsync(&root(), inode, true, handle).unwrap();
    guest.fs.fsync(&root(), inode, false, handle).unwrap();
    guest.fs.syncfs(&root(), ROOT).unwrap();
    guest.fs.syncfs(&root(), inode).unwrap();
    let (dir, _) = guest.fs.opendir(&root(), ROOT, 0).unwrap();
    guest.fs.fsyncdir(&root(), ROOT, false, dir.unwrap()).unwrap();
    guest.fs.flush(&root(), inode, handle, 7).unwrap();
    assert!(guest.fs.statfs(&root(), inode).unwrap().f_blocks > 0);
}

#[test]
fn read_only_means_that_nothing_changes() {
    let guest = Guest::new(Config { readonly: true, xattr: true, ..Config::default() });
    fs::write(guest.path("a"), "text").unwrap();
    let a = guest.lookup(ROOT, "a").unwrap().inode;
    let made = guest.create_as(&root(), ROOT, "b", libc::O_RDWR, 0o600);
    let refused = [
        errno_of(made),
        errno_of(guest.fs.mkdir(&root(), ROOT, c"d", 0o700, 0)),
        errno_of(guest.fs.mknod(&root(), ROOT, c"n", libc::S_IFREG, 0, 0)),
        errno_of(guest.fs.symlink(&root(), c"t", ROOT, c"s")),
        errno_of(guest.fs.link(&root(), a, ROOT, c"l")),
        errno_of(guest.fs.unlink(&root(), ROOT, c"a")),
        errno_of(guest.fs.rmdir(&root(), ROOT, c"a")),
        errno_of(guest.fs.rename(&root(), ROOT, c"a", ROOT, c"b", 0)),
        errno_of(guest.fs.setattr(&root(), a, sys::empty_stat(), None, SetattrValid::SIZE)),
        errno_of(guest.fs.setxattr(&root(), a, c"user.x", b"", 0)),
        errno_of(guest.fs.removexattr(&root(), a, c"user.x")),
        errno_of(guest.open(a, libc::O_RDWR)),
        errno_of(guest.open(a, libc::O_WRONLY)),
        errno_of(guest.open(a, libc::O_RDONLY | libc::O_TRUNC)),
        errno_of(guest.fs.access(&root(), a, libc::W_OK as u32)),
    ];
    assert!(refused.iter().all(|&errno| errno == libc::EROFS), "{refused:?}");
    let handle = guest.open(a, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(a, handle, 0, 10).unwrap(), b"text");
    assert!(guest.fs.access(&root(), a, libc::R_OK as u32).is_ok());
}

#[test]
fn cache_policies_say_what_the_guest_may_keep() {
    let expect = [
        (CachePolicy::Never, 0, OpenOptions::DIRECT_IO, OpenOptions::empty()),
        (CachePolicy::Auto, 1, OpenOptions::empty(), OpenOptions::empty()),
        (
            CachePolicy::Metadata,
            86_400,
            OpenOptions::DIRECT_IO,
            OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE,
        ),
        (
            CachePolicy::Always,
            86_400,
            OpenOptions::KEEP_CACHE,
            OpenOptions::CACHE_DIR | OpenOptions::KEEP_CACHE,
        ),
    ];
    for (cache, seconds, file, dir) in expect {
        let guest = Guest::new(Config { cache, ..Config::default() });
        let (entry, _, options) = guest.create_as(&root(), ROOT, "a", libc::O_RDWR, 0o600).unwrap();
        assert_eq!(entry.attr_timeout.as_secs(), seconds);
        assert_eq!(entry.entry_timeout.as_secs(), seconds);
        assert_eq!(options, file, "{cache:?}");
        assert_eq!(guest.fs.opendir(&root(), ROOT, 0).unwrap().1, dir, "{cache:?}");
    }
}

#[test]
fn writeback_reads_through_write_only_files_and_places_appends_itself() {
    let guest = Guest::new(Config { writeback: true, ..Config::default() });
    fs::write(guest.path("a"), "0123456789").unwrap();
    let a = guest.lookup(ROOT, "a").unwrap().inode;
    let handle = guest.open(a, libc::O_WRONLY | libc::O_APPEND).unwrap();
    assert_eq!(guest.read(a, handle, 8, 10).unwrap(), b"89");
    guest.write(a, handle, 2, b"xx").unwrap();
    assert_eq!(fs::read(guest.path("a")).unwrap(), b"01xx456789");
    let without = Guest::new(Config::default());
    fs::write(without.path("a"), "0123").unwrap();
    let a = without.lookup(ROOT, "a").unwrap().inode;
    let handle = without.open(a, libc::O_WRONLY | libc::O_APPEND).unwrap();
    without.write(a, handle, 0, b"45").unwrap();
    assert_eq!(fs::read(without.path("a")).unwrap(), b"012345");
    assert_eq!(errno_of(without.read(a, handle, 0, 1)), libc::EBADF);
}

#[test]
fn extended_attributes_of_every_kind_of_inode() {
    for mode in MODES {
        let guest = Guest::with_handles(mode);
        let (inode, _) = guest.create(ROOT, "a");
        guest.fs.setxattr(&root(), inode, c"user.one", b"1", 0).unwrap();
        let exclusive =
            guest.fs.setxattr(&root(), inode, c"user.one", b"2", libc::XATTR_CREATE as u32);
        assert_eq!(errno_of(exclusive), libc::EEXIST);
        assert!(matches!(
            guest.fs.getxattr(&root(), inode, c"user.one", 0).unwrap(),
            GetxattrReply::Count(1)
        ));
        match guest.fs.getxattr(&root(), inode, c"user.one", 100).unwrap() {
            GetxattrReply::Value(value) => assert_eq!(value, b"1"),
            GetxattrReply::Count(_) => panic!("asked for the value"),
        }
        match guest.fs.listxattr(&root(), inode, 100).unwrap() {
            ListxattrReply::Names(names) => assert_eq!(names, b"user.one\0"),
            ListxattrReply::Count(_) => panic!("asked for the names"),
        }
        assert_eq!(errno_of(guest.fs.listxattr(&root(), inode, 3).map(drop)), libc::ERANGE);
        guest.fs.removexattr(&root(), inode, c"user.one").unwrap();
        assert_eq!(
            errno_of(guest.fs.getxattr(&root(), inode, c"user.one", 9).map(drop)),
            libc::ENODATA
        );
        if is_root() {
            symlink("x", guest.path("link")).unwrap();
            let link = guest.lookup(ROOT, "link").unwrap().inode;
            guest.fs.setxattr(&root(), link, c"trusted.t", b"of the link", 0).unwrap();
            match guest.fs.getxattr(&root(), link, c"trusted.t", 100).unwrap() {
                GetxattrReply::Value(value) => assert_eq!(value, b"of the link"),
                GetxattrReply::Count(_) => panic!("asked for the value"),
            }
        }
    }
}

#[test]
fn extended_attributes_are_renamed_hidden_or_off() {
    let off = Guest::new(Config::default());
    assert_eq!(errno_of(off.fs.getxattr(&root(), ROOT, c"user.x", 0).map(drop)), libc::ENOSYS);
    let map = XattrMap::parse(":map::user.virtiofs.:").unwrap();
    let guest = Guest::new(Config { xattr_map: Some(map), ..Config::default() });
    let (inode, _) = guest.create(ROOT, "a");
    guest.fs.setxattr(&root(), inode, c"security.capability", b"caps", 0).unwrap();
    rustix::fs::setxattr(guest.path("a"), "user.own", b"host", rustix::fs::XattrFlags::empty())
        .unwrap();
    let mut value = [0; 16];
    let n = rustix::fs::getxattr(guest.path("a"), "user.virtiofs.security.capability", &mut value)
        .unwrap();
    assert_eq!(&value[..n], b"caps");
    match guest.fs.listxattr(&root(), inode, 100).unwrap() {
        ListxattrReply::Names(names) => assert_eq!(names, b"security.capability\0"),
        ListxattrReply::Count(_) => panic!("asked for the names"),
    }
    let acl = guest.fs.setxattr(&root(), inode, c"system.posix_acl_access", b"", 0);
    assert_eq!(errno_of(acl), libc::ENOTSUP, "ACLs are off");
}

#[test]
fn moved_file_capabilities_go_when_the_file_changes() {
    let map = XattrMap::parse(":map::user.virtiofs.:").unwrap();
    let guest = Guest::new(Config { xattr_map: Some(map), ..Config::default() });
    let (inode, handle) = guest.create(ROOT, "a");
    let mut attr = sys::empty_stat();
    attr.st_size = 1;
    let truncate = || guest.fs.setattr(&root(), inode, attr, None, SetattrValid::SIZE).map(drop);
    let chown = || guest.fs.setattr(&root(), inode, attr, None, SetattrValid::UID).map(drop);
    let write = || guest.write(inode, handle, 0, b"x").map(drop);
    let allocate = || guest.fs.fallocate(&root(), inode, handle, 0, 0, 9);
    let changes: [&dyn Fn() -> std::io::Result<()>; 4] = [&truncate, &chown, &write, &allocate];
    for change in changes {
        guest.fs.setxattr(&root(), inode, c"security.capability", b"caps", 0).unwrap();
        change().unwrap();
        let gone = guest.fs.getxattr(&root(), inode, c"security.capability", 99).map(drop);
        assert_eq!(errno_of(gone), libc::ENODATA);
        change().unwrap();
    }
}

#[test]
fn new_files_carry_their_label_or_are_not_made() {
    let map = XattrMap::parse(":prefix:all:security.:user.virtiofs.::bad:all:::").unwrap();
    let label = |name| CreateContext {
        security: Some(SecurityContext { name, value: b"label" }),
        supplementary_group: None,
    };
    let config = Config { security_label: Demand::Auto, xattr_map: Some(map), ..Config::default() };
    let guest = Guest::new(config);
    let good = label(c"security.selinux");
    let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, umask: 0, fuse_flags: 0 };
    guest.fs.create_with(&root(), &good, ROOT, c"file", args).unwrap();
    guest.fs.mkdir_with(&root(), &good, ROOT, c"dir", 0o700, 0).unwrap();
    for name in ["file", "dir"] {
        let mut value = [0; 16];
        let n = rustix::fs::getxattr(guest.path(name), "user.virtiofs.selinux", &mut value);
        assert_eq!(n.unwrap_or(99), 99, "the key is prefixed, not replaced");
        let n =
            rustix::fs::getxattr(guest.path(name), "user.virtiofs.security.selinux", &mut value)
                .unwrap();
        assert_eq!(&value[..n], b"label");
    }
    let bad = label(c"trusted.no");
    let refused = [
        errno_of(guest.fs.create_with(&root(), &bad, ROOT, c"x", args)),
        errno_of(guest.fs.mkdir_with(&root(), &bad, ROOT, c"x", 0o700, 0)),
        errno_of(guest.fs.symlink_with(&root(), &bad, c"t", ROOT, c"x")),
    ];
    assert_eq!(refused, [libc::EPERM; 3]);
    assert_eq!(guest.names(ROOT, 10).unwrap(), ["dir", "file"]);
}

#[test]
fn demands_on_the_guest_are_checked() {
    use crate::fuse::wire::init;
    let acl = Guest::new(Config { posix_acl: Demand::Always, ..Config::default() });
    assert_eq!(errno_of(acl.fs.negotiate(u64::MAX & !init::POSIX_ACL)), libc::EPROTO);
    let on = acl.fs.negotiate(u64::MAX).unwrap();
    assert!(on & init::POSIX_ACL != 0 && on & init::DONT_MASK != 0);
    let auto = Guest::new(Config { posix_acl: Demand::Auto, ..Config::default() });
    assert_eq!(auto.fs.negotiate(!init::DONT_MASK).unwrap() & init::POSIX_ACL, 0);
    let plain = Guest::new(Config::default());
    let on = plain.fs.negotiate(u64::MAX).unwrap();
    assert_eq!(on & (init::POSIX_LOCKS | init::FLOCK_LOCKS | init::WRITEBACK_CACHE), 0);
    assert_eq!(on & init::ATOMIC_O_TRUNC, 0, "the guest's kernel would check too late");
    assert_eq!(plain.fs.negotiate(0).unwrap(), 0);
}

#[test]
fn default_acls_beat_the_umask() {
    let guest = Guest::new(Config { posix_acl: Demand::Auto, ..Config::default() });
    let make = |name: &str, umask| {
        let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o666, umask, fuse_flags: 0 };
        let extra = CreateContext::default();
        guest.fs.create_with(&root(), &extra, ROOT, &c(name), args).unwrap().0.attr.st_mode & 0o777
    };
    assert_eq!(make("masked", 0o027), 0o640);
    // Version 2; user::rw- group::rw- other::r--, no qualifiers.
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions) in [(1_u16, 6_u16), (4, 6), (0x20, 4)] {
        acl.extend_from_slice(&tag.to_le_bytes());
        acl.extend_from_slice(&permissions.to_le_bytes());
        acl.extend_from_slice(&u32::MAX.to_le_bytes());
    }
    guest.fs.setxattr(&root(), ROOT, c"system.posix_acl_default", &acl, 0).unwrap();
    assert_eq!(make("by-acl", 0o077), 0o664);
}

/// `fuse_lk_in.lk_flags`: a BSD lock.
const LK_FLOCK: u32 = 1;

fn lock(kind: i32, start: u64, end: u64) -> FileLock {
    FileLock { start, end, lock_type: kind as u32, pid: 42 }
}

#[test]
fn posix_locks_exclude_owners_guests_and_the_host() {
    let config = Config { posix_locks: true, flock: true, ..Config::default() };
    let guest = Guest::new(config.clone());
    let (inode, handle) = guest.create(ROOT, "a");
    let set = |owner, lock| guest.fs.setlk(&root(), inode, handle, owner, lock, 0);
    let all = i64::MAX as u64;
    set(1, lock(libc::F_WRLCK, 0, 9)).unwrap();
    set(1, lock(libc::F_RDLCK, 5, 20)).unwrap();
    assert_eq!(errno_of(set(2, lock(libc::F_RDLCK, 4, 4))), libc::EAGAIN);
    set(2, lock(libc::F_RDLCK, 5, 9)).unwrap();
    set(2, lock(libc::F_WRLCK, 100, all)).unwrap();
    let found = guest.fs.getlk(&root(), inode, handle, 3, lock(libc::F_WRLCK, 0, 3), 0).unwrap();
    assert_eq!(
        (found.lock_type, found.start, found.end, found.pid),
        (libc::F_WRLCK as u32, 0, 4, 42)
    );
    let free = guest.fs.getlk(&root(), inode, handle, 3, lock(libc::F_WRLCK, 50, 60), 0).unwrap();
    assert_eq!(free.lock_type, libc::F_UNLCK as u32);
    // A second guest shares the directory.
    let other = share(guest.dir.path(), config);
    let there = other.lookup(&root(), ROOT, c"a").unwrap().inode;
    let (other_handle, ..) = other.open(&root(), there, libc::O_RDWR as u32, 0).unwrap();
    let try_other = |lock| other.setlk(&root(), there, other_handle.unwrap(), 1, lock, 0);
    assert_eq!(errno_of(try_other(lock(libc::F_WRLCK, 0, 0))), libc::EAGAIN);
    // Closing any fd of the file drops the owner's locks.
    guest.fs.flush(&root(), inode, handle, 1).unwrap();
    try_other(lock(libc::F_WRLCK, 0, 0)).unwrap();
    assert_eq!(errno_of(try_other(lock(libc::F_WRLCK, 5, 5))), libc::EAGAIN, "owner 2 reads there");
    set(2, lock(libc::F_UNLCK, 0, all)).unwrap();
    try_other(lock(libc::F_WRLCK, 0, all)).unwrap();
    for wrong in [lock(7, 0, 1), lock(libc::F_RDLCK, 2, 1), lock(libc::F_RDLCK, u64::MAX, u64::MAX)]
    {
        assert_eq!(errno_of(set(1, wrong)), libc::EINVAL);
    }
}

#[test]
fn bsd_locks_belong_to_open_files() {
    let guest = Guest::new(Config { flock: true, ..Config::default() });
    let (inode, first) = guest.create(ROOT, "a");
    let second = guest.open(inode, libc::O_RDONLY).unwrap();
    let set =
        |handle, kind| guest.fs.setlk(&root(), inode, handle, 1, lock(kind, 0, i64::MAX as u64), 1);
    set(first, libc::F_RDLCK).unwrap();
    set(second, libc::F_RDLCK).unwrap();
    assert_eq!(errno_of(set(second, libc::F_WRLCK)), libc::EAGAIN);
    guest.release(inode, first);
    set(second, libc::F_WRLCK).unwrap();
    set(second, libc::F_UNLCK).unwrap();
}

#[test]
fn waits_for_locks_end_when_the_lock_is_free_or_the_guest_gives_up() {
    let guest = Guest::new(Config { posix_locks: true, flock: true, ..Config::default() });
    let (inode, handle) = guest.create(ROOT, "a");
    let other = guest.open(inode, libc::O_RDWR).unwrap();
    let all = lock(libc::F_WRLCK, 0, i64::MAX as u64);
    let waits = LockWaits::default();
    for (flags, waiter) in [(0, handle), (LK_FLOCK, other)] {
        guest.fs.setlk(&root(), inode, handle, 1, all, flags).unwrap();
        let wait = |unique, owner| {
            let request = LockRequest { inode, handle: waiter, owner, lock: all, flags };
            guest.fs.wait_for_lock(&root(), &request, &mut |call| waits.block(unique, call))
        };
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(2, 2));
            let interrupted = scope.spawn(|| wait(3, 3));
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert!(!waiting.is_finished() && !interrupted.is_finished());
            waits.interrupt(3);
            assert_eq!(errno_of(interrupted.join().unwrap()), libc::EINTR);
            waits.forget(3);
            let unlock = lock(libc::F_UNLCK, 0, i64::MAX as u64);
            guest.fs.setlk(&root(), inode, handle, 1, unlock, flags).unwrap();
            waiting.join().unwrap().unwrap();
        });
        let held = guest.fs.setlk(&root(), inode, handle, 1, all, flags);
        assert_eq!(errno_of(held), libc::EAGAIN);
        // Closing the file drops the lock that was waited for, as any other.
        guest.fs.flush(&root(), inode, waiter, 2).unwrap();
        if flags == 0 {
            guest.fs.setlk(&root(), inode, handle, 1, all, flags).unwrap();
        }
    }
}

#[test]
fn processes_of_a_guest_that_wait_for_each_other_are_told() {
    let guest = Guest::new(Config { posix_locks: true, ..Config::default() });
    let (inode, handle) = guest.create(ROOT, "a");
    let set = |owner, kind, byte| {
        guest.fs.setlk(&root(), inode, handle, owner, lock(kind, byte, byte), 0)
    };
    let waits = LockWaits::default();
    let wait = |owner, byte| {
        let lock = lock(libc::F_WRLCK, byte, byte);
        let request = LockRequest { inode, handle, owner, lock, flags: 0 };
        guest.fs.wait_for_lock(&root(), &request, &mut |call| waits.block(owner, call))
    };
    for round in 0..3 {
        set(1, libc::F_WRLCK, 10).unwrap();
        set(2, libc::F_WRLCK, 20).unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(2, 10));
            std::thread::sleep(std::time::Duration::from_millis(30));
            assert_eq!(errno_of(wait(1, 20)), libc::EDEADLK, "round {round}");
            // The one who was told lets go, and the other goes on.
            set(1, libc::F_UNLCK, 10).unwrap();
            waiting.join().unwrap().unwrap();
        });
        for byte in [10, 20] {
            set(2, libc::F_UNLCK, byte).unwrap();
        }
    }
}

#[test]
fn set_id_bits_go_when_the_guest_asks_and_only_then() {
    let guest = Guest::new(Config { killpriv_v2: true, ..Config::default() });
    let (inode, handle) = guest.create(ROOT, "a");
    let mode = || fs::metadata(guest.path("a")).unwrap().permissions().mode() & 0o7777;
    let restore =
        || fs::set_permissions(guest.path("a"), fs::Permissions::from_mode(0o6755)).unwrap();
    restore();
    guest.write_with(inode, handle, 0, b"x", false).unwrap();
    assert_eq!(mode(), 0o6755);
    guest.write_with(inode, handle, 0, b"x", true).unwrap();
    assert_eq!(mode(), 0o755);
    restore();
    let mut attr = sys::empty_stat();
    attr.st_size = 5;
    guest.fs.setattr(&root(), inode, attr, None, SetattrValid::SIZE).unwrap();
    assert_eq!(mode(), 0o6755);
    let kill = SetattrValid::SIZE | SetattrValid::KILL_SUIDGID;
    attr.st_size = 3;
    guest.fs.setattr(&root(), inode, attr, None, kill).unwrap();
    assert_eq!(mode(), 0o755);
    restore();
    guest.fs.open(&root(), inode, (libc::O_WRONLY | libc::O_TRUNC) as u32, 0).unwrap();
    assert_eq!(mode(), 0o6755);
    guest.fs.open(&root(), inode, (libc::O_WRONLY | libc::O_TRUNC) as u32, 1).unwrap();
    assert_eq!(mode(), 0o755);
    // The capability is back for what needs it.
    attr.st_mode = 0o6755;
    guest.fs.setattr(&root(), inode, attr, None, SetattrValid::MODE).unwrap();
    assert_eq!(mode(), 0o6755);
}

#[test]
fn submounts_are_announced() {
    if !is_root() {
        return;
    }
    // A mount name space of its own, so that nothing is left behind.
    std::thread::spawn(|| {
        use rustix::mount::{MountFlags, MountPropagationFlags};
        if sys::unshare_mounts().is_err() {
            return;
        }
        rustix::mount::mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .unwrap();
        for mode in MODES {
            for announce_submounts in [true, false] {
                let config =
                    Config { inode_file_handles: mode, announce_submounts, ..Config::default() };
                let guest = Guest::new(config);
                fs::create_dir(guest.path("sub")).unwrap();
                fs::create_dir(guest.path("plain")).unwrap();
                let before = guest.lookup(ROOT, "sub").unwrap();
                assert_eq!(before.attr_flags, 0);
                rustix::mount::mount("none", guest.path("sub"), "tmpfs", MountFlags::empty(), None)
                    .unwrap();
                fs::write(guest.path("sub/file"), "inside").unwrap();
                fs::create_dir(guest.path("sub/dir")).unwrap();
                let sub = guest.lookup(ROOT, "sub").unwrap();
                assert_ne!(sub.inode, before.inode);
                assert_eq!(sub.attr_flags, u32::from(announce_submounts));
                assert_eq!(guest.fs.attr_flags(sub.inode, &sub.attr), sub.attr_flags);
                let dir = guest.lookup(sub.inode, "dir").unwrap();
                assert_eq!(dir.attr_flags, 0, "not a root of a mount");
                let file = guest.lookup(sub.inode, "file").unwrap();
                let handle = guest.open(file.inode, libc::O_RDONLY).unwrap();
                assert_eq!(guest.read(file.inode, handle, 0, 9).unwrap(), b"inside");
                let plus = guest.names_plus(ROOT, 10);
                let flags = |name: &str| plus.iter().find(|(n, _)| n == name).unwrap().1.attr_flags;
                assert_eq!((flags("sub"), flags("plain")), (u32::from(announce_submounts), 0));
                // The mount goes with the last inode that the guest knows of it.
                guest.release(file.inode, handle);
                assert!(
                    rustix::mount::unmount(guest.path("sub"), rustix::mount::UnmountFlags::empty())
                        .is_err()
                );
                for (inode, count) in [(file.inode, 1), (dir.inode, 1), (sub.inode, 2)] {
                    guest.fs.forget(&root(), inode, count);
                }
                rustix::mount::unmount(guest.path("sub"), rustix::mount::UnmountFlags::empty())
                    .unwrap();
            }
        }
    })
    .join()
    .unwrap();
}

#[test]
fn mandatory_handles_need_a_file_system_that_has_them() {
    use std::os::fd::OwnedFd;
    let proc = || -> OwnedFd { fs::File::open("/proc/self/fd").unwrap().into() };
    let config = Config { inode_file_handles: InodeFileHandles::Mandatory, ..Config::default() };
    let procfs: OwnedFd = fs::File::open("/proc/self").unwrap().into();
    let refused = crate::passthrough::PassthroughFs::new(config.clone(), procfs, proc());
    assert!(refused.is_err(), "procfs has no handles");
    if is_root() {
        let guest = Guest::new(config);
        let (inode, handle) = guest.create(ROOT, "a");
        guest.write(inode, handle, 0, b"x").unwrap();
    }
}
