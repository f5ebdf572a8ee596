//! Sessions that move: what the guest had in one daemon it has in the next.

use std::fs;
use std::os::fd::OwnedFd;

use fuse_backend_rs::api::filesystem::FileSystem;

use super::harness::{Guest, MODES, ROOT, c, errno_of, root, share};
use crate::fuse::extension::{Extension as _, Origin};
use crate::passthrough::{Config, InodeFileHandles, Migration, MigrationMode, OnError};

fn with(handles: InodeFileHandles, migration: Migration) -> Config {
    Config { inode_file_handles: handles, migration, ..Config::default() }
}

fn mode(mode: MigrationMode) -> Migration {
    Migration { mode, ..Migration::default() }
}

/// The guest of `old`, with a daemon that loaded what the old one saved.
fn moved(old: Guest, config: Config) -> anyhow::Result<Guest> {
    let mut state = Vec::new();
    old.fs.save(&mut state)?;
    let fs = share(old.dir.path(), config);
    let negotiated = fs.load(&mut state.as_slice(), Origin::Vmm)?;
    assert_eq!(negotiated, old.fs.negotiated.load(std::sync::atomic::Ordering::Relaxed));
    Ok(Guest { fs, dir: old.dir })
}

fn succeeded(old: Guest, config: Config) -> Guest {
    let (mut state, mut fds): (_, Vec<OwnedFd>) = (Vec::new(), Vec::new());
    old.fs.save_for_successor(&mut state, &mut fds).unwrap();
    let Guest { fs, dir } = old;
    drop(fs);
    let fs = share(dir.path(), config);
    fs.load(&mut state.as_slice(), Origin::Predecessor(fds)).unwrap();
    Guest { fs, dir }
}

/// Goes on with what [`prepare`] left, on whichever daemon.
fn goes_on(guest: &Guest, had: &Had) {
    assert_eq!(guest.read(had.file, had.handle, 0, 8).unwrap(), b"contents");
    assert_eq!(guest.lookup(had.dir, "file").unwrap().inode, had.file, "node ids are kept");
    assert_eq!(guest.lookup(ROOT, "dir").unwrap().inode, had.dir);
    guest.create(had.dir, "new");
    assert!(guest.path("dir/new").exists());
    assert_eq!(guest.fs.open_count(), 3);
    // Counts are kept too: with the lookups that came, and ours, nothing is left.
    for (node, count) in [(had.file, 2), (had.dir, 2)] {
        let before = guest.fs.inode_count();
        guest.fs.forget(&root(), node, count - 1);
        assert_eq!(guest.fs.inode_count(), before);
        guest.fs.forget(&root(), node, 1);
        assert_eq!(guest.fs.inode_count(), before - 1);
    }
    guest.fs.release(&root(), had.file, 0, had.handle, false, false, None).unwrap();
    assert_eq!(errno_of(guest.read(had.file, had.handle, 0, 8)), libc::EBADF);
}

struct Had {
    dir: u64,
    file: u64,
    handle: u64,
}

fn prepare(guest: &Guest) -> Had {
    fs::create_dir(guest.path("dir")).unwrap();
    fs::write(guest.path("dir/file"), "contents").unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap().inode;
    let file = guest.lookup(dir, "file").unwrap().inode;
    let handle = guest.open(file, libc::O_RDWR).unwrap();
    guest.fs.opendir(&root(), dir, 0).unwrap();
    Had { dir, file, handle }
}

#[test]
fn a_guest_goes_on_after_a_migration() {
    for handles in MODES {
        for migration in [
            mode(MigrationMode::FindPaths),
            mode(MigrationMode::FileHandles),
            Migration { verify_handles: true, confirm_paths: true, ..Migration::default() },
        ] {
            if migration.mode == MigrationMode::FileHandles && handles == InodeFileHandles::Never {
                continue; // says that it cannot be
            }
            let old = Guest::new(with(handles, migration));
            let had = prepare(&old);
            let new = moved(old, with(handles, migration)).unwrap();
            goes_on(&new, &had);
        }
    }
}

#[test]
fn a_renamed_file_is_found_where_it_is_now() {
    let old = Guest::with_handles(InodeFileHandles::Prefer);
    let had = prepare(&old);
    fs::rename(old.path("dir/file"), old.path("elsewhere")).unwrap();
    old.fs.inodes.cool_all();
    let new = moved(old, Config::default()).unwrap();
    assert_eq!(new.lookup(ROOT, "elsewhere").unwrap().inode, had.file);
    assert_eq!(new.read(had.file, had.handle, 0, 8).unwrap(), b"contents");
}

#[test]
fn what_is_gone_stops_a_migration_or_is_an_error_for_the_guest() {
    let lenient = Migration { on_error: OnError::GuestError, ..Migration::default() };
    for (config, fails) in
        [(Config::default(), true), (with(InodeFileHandles::Prefer, lenient), false)]
    {
        let old = Guest::new(Config::default());
        let had = prepare(&old);
        fs::remove_file(old.path("dir/file")).unwrap();
        let new = moved(old, config);
        assert_eq!(new.is_err(), fails);
        let Ok(new) = new else { continue };
        assert_eq!(errno_of(new.fs.getattr(&root(), had.file, None)), libc::ESTALE);
        assert_eq!(errno_of(new.read(had.file, had.handle, 0, 8)), libc::EBADF);
        assert!(new.fs.getattr(&root(), had.dir, None).is_ok());
        new.fs.forget(&root(), had.file, 1);
        assert_eq!(new.fs.inode_count(), 1);
    }
}

#[test]
fn another_inode_at_the_same_path_is_noticed_when_handles_are_compared() {
    let verify = Migration { verify_handles: true, ..Migration::default() };
    let old = Guest::new(with(InodeFileHandles::Prefer, verify));
    prepare(&old);
    let mut state = Vec::new();
    old.fs.save(&mut state).unwrap();
    fs::write(old.path("other"), "other").unwrap();
    fs::rename(old.path("other"), old.path("dir/file")).unwrap();
    let new = share(old.dir.path(), Config::default());
    let error = new.load(&mut state.as_slice(), Origin::Vmm).unwrap_err();
    assert!(format!("{error:#}").contains("another inode"), "{error:#}");
    assert_eq!((new.inode_count(), new.open_count()), (0, 0));
}

#[test]
fn a_successor_has_deleted_files_and_locks_too() {
    for handles in MODES {
        let config =
            || Config { posix_locks: true, inode_file_handles: handles, ..Config::default() };
        let old = Guest::new(config());
        let had = prepare(&old);
        let (gone, gone_handle) = old.create(had.dir, "gone");
        old.write(gone, gone_handle, 0, b"still here").unwrap();
        old.fs.unlink(&root(), had.dir, &c("gone")).unwrap();
        let lock = |fs: &crate::passthrough::PassthroughFs, owner| {
            let lock = fuse_backend_rs::api::filesystem::FileLock {
                start: 0,
                end: u64::MAX >> 1,
                lock_type: libc::F_WRLCK as u32,
                pid: 1,
            };
            fs.setlk(&root(), had.file, had.handle, owner, lock, 0)
        };
        lock(&old.fs, 7).unwrap();
        let mut refused = Vec::new();
        let error = old.fs.save(&mut refused).unwrap_err();
        assert!(error.to_string().contains("locks"), "{error:#}");
        let new = succeeded(old, config());
        assert_eq!(new.read(gone, gone_handle, 0, 10).unwrap(), b"still here");
        assert_eq!(errno_of(lock(&new.fs, 8)), libc::EAGAIN, "the lock is still held");
        lock(&new.fs, 7).unwrap();
        new.fs.release(&root(), gone, 0, gone_handle, false, false, None).unwrap();
        new.fs.forget(&root(), gone, 1);
        goes_on(&new, &had);
    }
}

#[test]
fn damaged_states_are_refused_and_leave_nothing() {
    let old = Guest::new(Config::default());
    prepare(&old);
    let mut state = Vec::new();
    old.fs.save(&mut state).unwrap();
    let fs = share(old.dir.path(), Config::default());
    for cut in 0..state.len() - 1 {
        assert!(fs.load(&mut &state[..cut], Origin::Vmm).is_err(), "cut at {cut}");
        assert_eq!((fs.inode_count(), fs.open_count()), (0, 0));
    }
    let text = String::from_utf8(state).unwrap();
    for (name, target) in [("to-etc", "/etc"), ("to-dir", "dir")] {
        std::os::unix::fs::symlink(target, old.path(name)).unwrap();
    }
    for (from, to) in [
        ("\"Path\":\"dir/file\"", "\"Path\":\"to-etc/passwd\""),
        ("\"Path\":\"dir/file\"", "\"Path\":\"to-dir/file\""),
        ("\"version\":1", "\"version\":2"),
        ("\"Path\":\"dir\"", "\"Path\":\"../x\""),
        ("\"Path\":\"dir\"", "\"Path\":\"/etc\""),
        ("\"fd\":null", "\"fd\":9"),
        ("\"id\":", "\"id\":9"),
    ] {
        assert!(text.contains(from), "{text}");
        let bad = text.replacen(from, to, 1);
        let loaded = fs.load(&mut bad.as_bytes(), Origin::Vmm);
        // Another id is as good as the one that was, as long as it can be one; the file is then not it.
        assert!(loaded.is_err(), "{from} → {to}");
        assert_eq!((fs.inode_count(), fs.open_count()), (0, 0));
    }
}

/// What a VMM that a guest has taken over could bring: the state in `text`, to a daemon with `config`.
fn brought(dir: &std::path::Path, text: &str, config: Config) -> Result<u64, String> {
    let fs = share(dir, config);
    fs.load(&mut text.as_bytes(), Origin::Vmm).map_err(|error| format!("{error:#}"))
}

#[test]
fn file_handles_of_a_vmm_are_opened_only_where_the_operator_says_so() {
    let by_handle = || with(InodeFileHandles::Prefer, mode(MigrationMode::FileHandles));
    let by_path = || with(InodeFileHandles::Prefer, Migration::default());
    let old = Guest::new(by_handle());
    prepare(&old);
    let (mut handles, mut known) = (Vec::new(), Vec::new());
    old.fs.save(&mut handles).unwrap();
    old.fs.save_for_successor(&mut known, &mut Vec::new()).unwrap();
    let [handles, known] = [handles, known].map(|state| String::from_utf8(state).unwrap());
    assert!(brought(old.dir.path(), &handles, by_handle()).is_ok());
    for (state, config, why) in [
        (&handles, by_path(), "--migration-mode=file-handles"),
        (&known, by_path(), "for a successor only"),
        (&known, by_handle(), "for a successor only"),
    ] {
        let error = brought(old.dir.path(), state, config).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_state_gets_no_more_than_its_guest_could_by_asking() {
    let old = Guest::new(Config::default());
    prepare(&old);
    let mut state = Vec::new();
    old.fs.save(&mut state).unwrap();
    let text = String::from_utf8(state).unwrap();
    let with_flags = |flags: i32| {
        // The kernel's O_LARGEFILE, which is 0 in libc, comes on top.
        let had = format!("\"flags\":{}", libc::O_RDWR | 0o100_000);
        assert!(text.contains(&had), "{text}");
        text.replacen(&had, &format!("\"flags\":{flags}"), 1)
    };
    // Not a file opened for writing in a directory that is read-only, nor one made empty by coming here.
    let readonly = || Config { readonly: true, ..Config::default() };
    let error = brought(old.dir.path(), &text, readonly()).unwrap_err();
    assert!(error.contains("Read-only"), "{error}");
    brought(old.dir.path(), &with_flags(libc::O_RDONLY), readonly()).unwrap();
    let emptying = with_flags(libc::O_RDWR | libc::O_TRUNC);
    brought(old.dir.path(), &emptying, Config::default()).unwrap();
    assert_eq!(fs::read(old.path("dir/file")).unwrap(), b"contents");

    // Nor a feature that this daemon was not told to offer.
    let negotiated = old.fs.negotiated.load(std::sync::atomic::Ordering::Relaxed);
    let more = format!("\"flags\":{}", negotiated | crate::fuse::wire::init::POSIX_LOCKS);
    let locking = text.replacen(&format!("\"flags\":{negotiated}"), &more, 1);
    let error = brought(old.dir.path(), &locking, Config::default()).unwrap_err();
    assert!(error.contains("options of the one before"), "{error}");
    let locks = Config { posix_locks: true, ..Config::default() };
    brought(old.dir.path(), &locking, locks).unwrap();
}
