use std::ffi::OsString;
use std::io::BufRead;

use rustix::fs::{Mode, OFlags};

use super::super::namespaces::id_map::{IdMap, IdMapError, IdMaps};
use super::super::namespaces::{Namespace, deliver_signals, root, unshare};
use super::*;

fn namespace(kind: &str) -> OsString {
    fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().into_os_string()
}

#[test]
fn namespaces_are_left_with_and_without_privileges() {
    let kinds = ["net", "ipc", "uts", "mnt"];
    let outside = kinds.map(namespace);
    for prepare in [|| (), become_nobody] {
        succeeds(|| {
            prepare();
            let user = rustix::process::geteuid();
            let all = [Namespace::Network, Namespace::Ipc, Namespace::Uts, Namespace::Mount];
            assert_eq!(unshare(&all).unwrap(), Outcome::Applied);
            for (kind, outside) in kinds.iter().zip(&outside) {
                assert_ne!(namespace(kind), *outside, "{kind}");
            }
            assert_eq!(rustix::process::geteuid(), user);
            let interfaces = fs::read_to_string("/proc/self/net/dev").unwrap();
            assert_eq!(interfaces.lines().count(), 3, "{interfaces}");
        });
    }
}

#[test]
fn no_namespace_is_no_change() {
    succeeds(|| {
        let before = namespace("user");
        assert_eq!(unshare(&[]).unwrap(), Outcome::Applied);
        assert_eq!(namespace("user"), before);
    });
}

/// What a daemon sees after `root::enter` or `root::change`.
fn check_inside(handles: root::ProcHandles) {
    let names: Vec<_> = fs::read_dir("/").unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["file"]);
    assert!(fs::metadata("/proc").is_err());
    assert!(fs::read("/../../../../etc/passwd").is_err());
    // A descriptor can be opened again through the handle, in another mode.
    let path = rustix::fs::open("/file", OFlags::PATH, Mode::empty()).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&path).to_string();
    let again = rustix::fs::openat(&handles.self_fd, number, OFlags::RDONLY, Mode::empty());
    let mut text = String::new();
    fs::File::from(again.unwrap()).read_to_string(&mut text).unwrap();
    assert_eq!(text, "served");
    let mounts = io::BufReader::new(handles.mountinfo).lines().map(Result::unwrap);
    let points: Vec<_> = mounts.map(|line| line.split(' ').nth(4).unwrap().to_owned()).collect();
    assert!(points.iter().all(|point| !point.contains("proc")), "{points:?}");
}

fn served() -> tempfile::TempDir {
    let dir = open_directory();
    fs::write(dir.path().join("file"), "served").unwrap();
    dir
}

#[test]
fn the_directory_becomes_the_root_of_a_process_one() {
    if !is_root() {
        return;
    }
    let dir = served();
    succeeds(|| {
        let handles = root::enter(dir.path(), None).unwrap();
        assert_eq!(rustix::process::getpid().as_raw_nonzero().get(), 1);
        check_inside(handles);
    });
    // Nothing of it is left outside.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
}

#[test]
fn without_privileges_one_is_root_of_ones_own_namespace() {
    let dir = served();
    let own_file = !is_root();
    succeeds(|| {
        become_nobody();
        let handles = root::enter(dir.path(), Some(&IdMaps::self_as_root())).unwrap();
        assert!(is_root());
        // Root of the namespace only: a file of the outside's root stays out of reach.
        assert_eq!(fs::OpenOptions::new().write(true).open("/file").is_ok(), own_file);
        check_inside(handles);
    });
}

#[test]
fn root_maps_ranges_of_users() {
    if !is_root() {
        return;
    }
    let dir = served();
    succeeds(|| {
        let range = vec![IdMap { inside: 0, outside: 100_000, count: 1000 }];
        let maps = IdMaps { users: range.clone(), groups: range };
        root::enter(dir.path(), Some(&maps)).unwrap();
        assert!(is_root());
        let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata("/file").unwrap());
        assert_eq!(owner, 65534);
    });
}

#[test]
fn a_map_that_is_not_granted_is_one_clear_error() {
    let dir = served();
    succeeds(|| {
        become_nobody();
        let range = vec![IdMap { inside: 0, outside: 7_000_000, count: 1000 }];
        let maps = IdMaps { users: range.clone(), groups: range };
        let error = chain(root::enter(dir.path(), Some(&maps)).unwrap_err());
        assert!(error.contains("newuidmap failed"), "{error}");
    });
}

#[test]
fn chroot_shows_the_directory_alone() {
    if !is_root() {
        return;
    }
    let dir = served();
    succeeds(|| check_inside(root::change(dir.path()).unwrap()));
    succeeds(|| {
        become_nobody();
        let error = chain(root::change(dir.path()).unwrap_err());
        assert!(error.contains("cannot make the root "), "{error}");
    });
}

#[test]
fn the_parent_ends_as_the_daemon_ends() {
    let dir = served();
    let enter = || {
        become_nobody();
        root::enter(dir.path(), Some(&IdMaps::self_as_root())).unwrap();
    };
    let status = in_child(|| {
        enter();
        // SAFETY: ends the child.
        unsafe { libc::_exit(42) }
    });
    assert_eq!(status.exit_status(), Some(42), "{status:?}");
    let status = in_child(|| {
        enter();
        // SAFETY: an invalid instruction address ends the child by SIGSEGV; process 1 of a
        // namespace ignores signals that it sends itself.
        unsafe { std::ptr::null_mut::<u8>().write_volatile(0) };
    });
    assert_eq!(status.exit_status(), Some(128 + libc::SIGSEGV), "{status:?}");
}

/// Starts a daemon that writes a byte when it is inside, and returns the parent and that pipe.
fn start_daemon(dir: &std::path::Path, on_ready: fn()) -> (Pid, UnixStream) {
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let parent = fork(|| {
        become_nobody();
        root::enter(dir, Some(&IdMaps::self_as_root())).unwrap();
        on_ready();
        theirs.write_all(&[1]).unwrap();
        loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        }
    });
    drop(theirs);
    ours.read_exact(&mut [0]).unwrap();
    (parent, ours)
}

/// Has SIGTERM end the process with exit code 9.
fn leave_on_sigterm() {
    extern "C" fn leave(_signal: libc::c_int) {
        // SAFETY: ends the process.
        unsafe { libc::_exit(9) }
    }
    let leave: extern "C" fn(libc::c_int) = leave;
    // SAFETY: the handler only ends the process.
    unsafe { libc::signal(libc::SIGTERM, leave as libc::sighandler_t) };
    deliver_signals().unwrap();
}

#[test]
fn signals_reach_the_daemon() {
    let dir = served();
    let (parent, _pipe) = start_daemon(dir.path(), leave_on_sigterm);
    kill_process(parent, Signal::TERM).unwrap();
    assert_eq!(wait(parent).exit_status(), Some(9));
}

#[test]
fn a_signal_before_the_daemon_has_handlers_is_not_lost() {
    let dir = served();
    let (mut ours, mut theirs) = UnixStream::pair().unwrap();
    let parent = fork(|| {
        become_nobody();
        root::enter(dir.path(), Some(&IdMaps::self_as_root())).unwrap();
        theirs.write_all(&[1]).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        leave_on_sigterm();
        std::thread::sleep(std::time::Duration::from_secs(20));
    });
    drop(theirs);
    ours.read_exact(&mut [0]).unwrap();
    kill_process(parent, Signal::TERM).unwrap();
    assert_eq!(wait(parent).exit_status(), Some(9));
}

#[test]
fn the_daemon_does_not_outlive_its_parent_nor_share_its_sockets() {
    let dir = served();
    let (parent, mut pipe) = start_daemon(dir.path(), || ());
    kill_process(parent, Signal::KILL).unwrap();
    assert_eq!(wait(parent).terminating_signal(), Some(libc::SIGKILL));
    // The end of the stream: both processes are gone.
    pipe.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    assert_eq!(pipe.read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_parent_keeps_no_descriptor() {
    let dir = served();
    let (parent, _pipe) = start_daemon(dir.path(), || ());
    // The daemon tells that it is ready; its parent may need a moment longer.
    let directory = format!("/proc/{}/fd", parent.as_raw_nonzero());
    let open = || fs::read_dir(&directory).unwrap().count();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while open() > 3 && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(open() <= 3);
    kill_process(parent, Signal::KILL).unwrap();
    wait(parent);
}

#[test]
fn maps_of_ids_are_read_and_written() {
    let map = IdMap { inside: 0, outside: 100_000, count: 65536 };
    for text in [":0:100000:65536:", "/0/100000/65536/", " 0 100000 65536 "] {
        assert_eq!(text.parse(), Ok(map), "{text}");
    }
    assert_eq!(map.to_string(), "0 100000 65536");
    for text in [
        "",
        ":",
        "::",
        ":0:1:",
        ":0:1:0:",
        ":0:1:2",
        "0:1:2:",
        ":0:1:2:3:",
        ":-1:0:1:",
        ":4294967295:0:1:",
        ":0:4294967290:10:",
        "é0é1é2é3",
    ] {
        assert_eq!(text.parse::<IdMap>(), Err(IdMapError), "{text}");
    }
}
