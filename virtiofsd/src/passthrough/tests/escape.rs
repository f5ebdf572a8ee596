//! No way out of the shared directory, whatever the guest sends and whatever another process of the
//! host does to the directory meanwhile.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, SetattrValid};
use fuse_backend_rs::api::filesystem::FileSystem;
use tempfile::TempDir;

use super::harness::*;
use crate::fuse::extension::{CreateContext, Extension};
use crate::passthrough::{Config, sys};

const SECRET: &str = "nobody inside may read this";

/// A directory with a shared one and another beside it.
struct Ground {
    _dir: TempDir,
    guest: Guest,
    outside: std::path::PathBuf,
}

fn ground(config: Config) -> Ground {
    let dir = TempDir::new().unwrap();
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), SECRET).unwrap();
    let guest = Guest::new_in(dir.path(), config);
    Ground { _dir: dir, guest, outside }
}

/// What is outside is as it was.
fn assert_untouched(outside: &Path) {
    let names: Vec<_> =
        fs::read_dir(outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["secret"], "something was made or removed outside");
    assert_eq!(fs::read_to_string(outside.join("secret")).unwrap(), SECRET);
    assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
}

#[test]
fn names_that_are_paths_are_refused_by_every_operation() {
    for mode in MODES {
        let ground = ground(Config { inode_file_handles: mode, ..Config::default() });
        let guest = &ground.guest;
        let (inode, _) = guest.create(ROOT, "file");
        let args = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, umask: 0, fuse_flags: 0 };
        let absolute = ground.outside.join("x").display().to_string();
        let names = [
            "",
            ".",
            "..",
            "../outside",
            "../outside/secret",
            "/",
            "a/b",
            "a/",
            "./file",
            &absolute,
        ];
        for name in names {
            let name = c(name);
            let refused = [
                errno_of(guest.fs.lookup(&root(), ROOT, &name)),
                errno_of(guest.fs.create_with(
                    &root(),
                    &CreateContext::default(),
                    ROOT,
                    &name,
                    args,
                )),
                errno_of(guest.fs.mkdir(&root(), ROOT, &name, 0o700, 0)),
                errno_of(guest.fs.mknod(&root(), ROOT, &name, libc::S_IFREG | 0o600, 0, 0)),
                errno_of(guest.fs.symlink(&root(), c"target", ROOT, &name)),
                errno_of(guest.fs.link(&root(), inode, ROOT, &name)),
                errno_of(guest.fs.unlink(&root(), ROOT, &name)),
                errno_of(guest.fs.rmdir(&root(), ROOT, &name)),
                errno_of(guest.fs.rename(&root(), ROOT, &name, ROOT, c"new", 0)),
                errno_of(guest.fs.rename(&root(), ROOT, c"file", ROOT, &name, 0)),
            ];
            assert!(refused.iter().all(|&errno| errno == libc::EINVAL), "{name:?}: {refused:?}");
        }
        assert_eq!(guest.names(ROOT, 10).unwrap(), ["file"]);
        assert_untouched(&ground.outside);
    }
}

#[test]
fn symbolic_links_are_things_and_never_ways() {
    for mode in MODES {
        let ground = ground(Config { inode_file_handles: mode, xattr: true, ..Config::default() });
        let guest = &ground.guest;
        for (name, target) in
            [("to-dir", "../outside"), ("to-file", "../outside/secret"), ("up", "..")]
        {
            symlink(target, guest.path(name)).unwrap();
            let link = guest.lookup(ROOT, name).unwrap();
            assert_eq!(link.attr.st_mode & libc::S_IFMT, libc::S_IFLNK);
            let inode = link.inode;
            assert_eq!(errno_of(guest.lookup(inode, "secret")), libc::ENOTDIR);
            assert_eq!(errno_of(guest.open(inode, libc::O_RDWR)), libc::EBADF);
            assert_eq!(errno_of(guest.fs.opendir(&root(), inode, 0)), libc::EBADF);
            assert_eq!(errno_of(guest.fs.mkdir(&root(), inode, c"x", 0o700, 0)), libc::ENOTDIR);
            assert_eq!(errno_of(guest.fs.unlink(&root(), inode, c"secret")), libc::ENOTDIR);
            let made = guest.create_as(&root(), inode, "x", libc::O_RDWR, 0o600);
            assert_eq!(errno_of(made), libc::ENOTDIR);
            // Over the name of a link, only the link itself can be meant.
            let there = guest.create_as(&root(), ROOT, name, libc::O_RDWR | libc::O_TRUNC, 0o600);
            assert_eq!(errno_of(there), libc::ENXIO);
            let mut attr = sys::empty_stat();
            attr.st_mtime = 1;
            guest.fs.setattr(&root(), inode, attr, None, SetattrValid::MTIME).unwrap();
            let size = guest.fs.setattr(&root(), inode, attr, None, SetattrValid::SIZE);
            assert_eq!(errno_of(size), libc::EBADF);
            assert!(guest.fs.setxattr(&root(), inode, c"user.x", b"1", 0).is_err());
            let hard = guest.fs.link(&root(), inode, ROOT, &c(&format!("{name}-2"))).unwrap();
            assert_eq!(hard.inode, inode, "a link to the link");
        }
        assert!(fs::metadata(ground.outside.join("secret")).unwrap().mtime() > 1);
        assert_untouched(&ground.outside);
    }
}

#[test]
fn magic_links_lead_nowhere() {
    let fs = share(Path::new("/proc/self"), Config::default());
    for name in [c"root", c"cwd", c"exe"] {
        let link = fs.lookup(&root(), ROOT, name).unwrap();
        assert_eq!(errno_of(fs.lookup(&root(), link.inode, c"etc")), libc::ENOTDIR);
        assert_eq!(errno_of(fs.open(&root(), link.inode, 0, 0)), libc::EBADF);
        assert_eq!(errno_of(fs.opendir(&root(), link.inode, 0)), libc::EBADF);
    }
}

#[test]
fn open_flags_of_the_guest_make_nothing() {
    let ground = ground(Config::default());
    let guest = &ground.guest;
    let (inode, handle) = guest.create(ROOT, "file");
    guest.write(inode, handle, 0, b"kept").unwrap();
    for flags in
        [libc::O_TMPFILE | libc::O_RDWR, libc::O_PATH, libc::O_CREAT | libc::O_EXCL, libc::O_ASYNC]
    {
        let _ = guest.open(ROOT, flags);
        let opened = guest.open(inode, flags & !libc::O_DIRECTORY).unwrap();
        assert_eq!(guest.read(inode, opened, 0, 9).unwrap(), b"kept", "{flags:o}");
    }
    assert_eq!(guest.names(ROOT, 10).unwrap(), ["file"]);
}

#[test]
fn a_directory_moved_out_by_the_host_is_no_way_up() {
    for mode in MODES {
        let ground = ground(Config { inode_file_handles: mode, ..Config::default() });
        let guest = &ground.guest;
        fs::create_dir_all(guest.path("d/e")).unwrap();
        let d = guest.lookup(ROOT, "d").unwrap().inode;
        let e = guest.lookup(d, "e").unwrap().inode;
        fs::rename(guest.path("d"), ground.outside.join("d")).unwrap();
        for name in ["..", "../secret", "."] {
            assert_eq!(errno_of(guest.lookup(d, name)), libc::EINVAL);
            assert_eq!(errno_of(guest.lookup(e, name)), libc::EINVAL);
        }
        fs::remove_dir_all(ground.outside.join("d")).unwrap();
        assert_untouched(&ground.outside);
    }
}

#[test]
fn the_number_of_the_directory_above_is_not_told() {
    let ground = ground(Config::default());
    let above = fs::metadata(ground.guest.dir.path().parent().unwrap()).unwrap().ino();
    let (handle, _) = ground.guest.fs.opendir(&root(), ROOT, 0).unwrap();
    ground
        .guest
        .fs
        .readdir(&root(), ROOT, handle.unwrap(), 0, 0, &mut |entry| {
            assert_ne!(entry.ino, above);
            Ok(1)
        })
        .unwrap();
}

/// Runs `guest` for a while, and `host` over and over beside it.
fn race(host: impl Fn() + Send + Sync, guest: impl Fn(u32)) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                host();
            }
        });
        let end = Instant::now() + Duration::from_millis(700);
        let mut round = 0;
        while Instant::now() < end || round < 200 {
            guest(round);
            round += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_directory_swapped_for_a_link_is_never_followed() {
    for mode in MODES {
        let ground = ground(Config { inode_file_handles: mode, ..Config::default() });
        let (guest, outside) = (&ground.guest, &ground.outside);
        fs::create_dir(guest.path("d")).unwrap();
        symlink("../outside", guest.path("l")).unwrap();
        let (d, l) = (guest.path("d"), guest.path("l"));
        let swap = || {
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            rustix::fs::renameat_with(rustix::fs::CWD, &d, rustix::fs::CWD, &l, flags).unwrap();
        };
        let reached = std::cell::Cell::new(0);
        race(swap, |round| {
            let Ok(entry) = guest.lookup(ROOT, "d") else { return };
            let d = entry.inode;
            if let Ok(secret) = guest.lookup(d, "secret") {
                panic!("reached the outside: {secret:?}");
            }
            let name = format!("new-{round}");
            if let Ok((file, handle, _)) = guest.create_as(&root(), d, &name, libc::O_RDWR, 0o600) {
                reached.set(reached.get() + 1);
                guest.write(file.inode, handle.unwrap(), 0, b"data").unwrap();
                guest.release(file.inode, handle.unwrap());
                guest.fs.unlink(&root(), d, &c(&name)).unwrap();
                guest.forget(file.inode);
            }
            let _ = guest.fs.mkdir(&root(), d, c"sub", 0o700, 0);
            let _ = guest.fs.rename(&root(), d, c"sub", d, c"sub2", 0);
            let _ = guest.fs.rmdir(&root(), d, c"sub2");
            let _ = guest.fs.unlink(&root(), d, c"secret");
            if let Ok(names) = guest.names(d, 10) {
                assert!(!names.contains(&"secret".to_owned()));
            }
            guest.forget(d);
        });
        assert!(reached.get() > 0, "the race never let the guest in");
        assert_untouched(outside);
    }
}

#[test]
fn a_file_swapped_for_a_link_or_a_fifo_is_never_followed_or_waited_for() {
    for mode in MODES {
        let ground = ground(Config { inode_file_handles: mode, ..Config::default() });
        let (guest, outside) = (&ground.guest, &ground.outside);
        let names = ["f", "l", "p"].map(|name| guest.path(name));
        fs::write(&names[0], "inside").unwrap();
        symlink("../outside/secret", &names[1]).unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        let everyone = rustix::fs::Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, &names[2], fifo, everyone, 0).unwrap();
        let swap = || {
            for other in &names[1..] {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                let at = rustix::fs::CWD;
                rustix::fs::renameat_with(at, &names[0], at, other, flags).unwrap();
            }
        };
        let opened = std::cell::Cell::new(0);
        race(swap, |_| {
            let Ok(entry) = guest.lookup(ROOT, "f") else { return };
            if let Ok(handle) = guest.open(entry.inode, libc::O_RDWR) {
                opened.set(opened.get() + 1);
                assert_eq!(guest.read(entry.inode, handle, 0, 100).unwrap(), b"inside");
                guest.write(entry.inode, handle, 0, b"inside").unwrap();
                guest.release(entry.inode, handle);
            }
            let flags = libc::O_RDWR | libc::O_NONBLOCK;
            if let Ok((made, handle, _)) = guest.create_as(&root(), ROOT, "f", flags, 0o600) {
                assert_eq!(guest.read(made.inode, handle.unwrap(), 0, 100).unwrap(), b"inside");
                guest.release(made.inode, handle.unwrap());
                guest.forget(made.inode);
            }
            guest.forget(entry.inode);
        });
        assert!(opened.get() > 0, "the race never let the guest in");
        assert_untouched(outside);
    }
}

#[test]
fn names_exchanged_during_a_lookup_do_not_mix_two_inodes() {
    for mode in MODES {
        let guest =
            Guest::new(Config { inode_file_handles: mode, hot_fds: 0, ..Config::default() });
        let names = ["a", "b"].map(|name| guest.path(name));
        for name in &names {
            fs::write(name, fs::metadata(guest.dir.path()).unwrap().ino().to_string()).unwrap();
            fs::write(name, fs::metadata(name).unwrap().ino().to_string()).unwrap();
        }
        let swap = || {
            let flags = rustix::fs::RenameFlags::EXCHANGE;
            let at = rustix::fs::CWD;
            rustix::fs::renameat_with(at, &names[0], at, &names[1], flags).unwrap();
        };
        race(swap, |_| {
            let entry = guest.lookup(ROOT, "a").unwrap();
            match guest.fs.getattr(&root(), entry.inode, None) {
                Ok((attr, _)) => assert_eq!(attr.st_ino, entry.attr.st_ino),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ESTALE)),
            }
            if let Ok(handle) = guest.open(entry.inode, libc::O_RDONLY) {
                let text = guest.read(entry.inode, handle, 0, 100).unwrap();
                assert_eq!(text, entry.attr.st_ino.to_string().as_bytes());
                guest.release(entry.inode, handle);
            }
            guest.forget(entry.inode);
        });
        assert_eq!(guest.fs.inode_count(), 0);
    }
}

#[test]
fn submitting_the_handle_of_nothing_reaches_nothing() {
    let ground = ground(Config::default());
    for inode in (0..64).chain([u64::MAX, 1 << 32, (1 << 32) | 1]).filter(|&inode| inode != ROOT) {
        assert_eq!(errno_of(ground.guest.fs.getattr(&root(), inode, None)), libc::ESTALE);
        assert_eq!(errno_of(ground.guest.lookup(inode, "secret")), libc::ESTALE);
        ground.guest.fs.forget(&root(), inode, u64::MAX);
    }
    assert!(ground.guest.fs.negotiate(0).is_ok());
    assert_untouched(&ground.outside);
}
