//! The daemon ends with mappings live: killed, or replaced by a newer one.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use testkit::daemon::Daemon;
use testkit::driver::fs::{FsClient, Message, op};
use testkit::frontend::ShmemPolicy;

use crate::share::*;

/// The daemon is killed with mappings live and started again: the next guest sees today's file.
#[test]
fn nothing_stale_is_shown_after_the_daemon_was_killed() {
    let mut share = Share::new(&["--dax=always"]);
    let file = share.file("f", &content(index(3 * PAGE + 50), 7));
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 0, true)), 0);
    window.write_window(10, b"by the guest").unwrap();
    share.daemon.kill().unwrap();
    let mut kept = [0; 12];
    file.read_exact_at(&mut kept, 10).unwrap();
    assert_eq!(&kept, b"by the guest", "what is in a mapping is in the file");
    drop((guest, window));

    let bytes = content(index(5 * PAGE + 3), 8);
    fs::write(share.path("f"), &bytes).unwrap();
    share.daemon = Share::daemon(share.dir.path(), "again", &["--dax=always"]);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 0, true)), 0);
    for page in 0..5 {
        let mut seen = vec![0; index(PAGE)];
        window.read_window(page * PAGE, &mut seen).unwrap();
        assert!(seen == bytes[index(page * PAGE)..index((page + 1) * PAGE)]);
    }
    let mut tail = [9; 8];
    window.read_window(5 * PAGE, &mut tail).unwrap();
    assert_eq!(tail[..3], bytes[index(5 * PAGE)..]);
    assert_eq!(tail[3..], [0; 5], "past the end there are zeroes");
}

/// Waits until `old` has ended.
fn has_left(old: &mut Daemon) {
    let start = Instant::now();
    while old.is_running() {
        assert!(start.elapsed() < LONG, "the old daemon still runs:\n{}", old.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Starts a successor of the share's daemon, which leaves.
fn replace(share: &mut Share, arguments: &[&str]) {
    let new = Share::daemon(share.dir.path(), "fs", arguments);
    let mut old = std::mem::replace(&mut share.daemon, new);
    has_left(&mut old);
}

fn goes_on_with_what_is_mapped(policy: ShmemPolicy, vmm: &str) {
    let handover = tempfile::tempdir().unwrap();
    let handover = format!("--handover-socket={}", handover.path().join("h").display());
    let arguments = ["--dax=always", "--sandbox=none", vmm, &handover];
    let mut share = Share::new(&arguments);
    let mut bytes = content(index(5 * PAGE + 77), 11);
    let (file, gone) = (share.file("f", &bytes), share.file("gone", &bytes));
    let (mut guest, window) = share.guest(policy);
    let [inode, other] = ["f", "gone"].map(|name| guest.lookup(ROOT, name).unwrap());
    let handle = guest.open(inode, libc::O_RDWR).unwrap();
    for (inode, at) in [(inode, 0), (other, 16 * PAGE), (inode, 32 * PAGE)] {
        assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, at, true)), 0);
    }
    fs::remove_file(share.path("gone")).unwrap();
    window.write_window(5 * PAGE, b"in the tail").unwrap();
    bytes[index(5 * PAGE)..][..11].copy_from_slice(b"in the tail");
    while window.requests.try_recv().is_ok() {}
    let mapped = window.mapped();

    replace(&mut share, &arguments);
    // The guest goes on, in the window and with requests; nothing was unmapped in between.
    window.write_window(10, b"meanwhile").unwrap();
    bytes[10..19].copy_from_slice(b"meanwhile");
    window.write_window(5 * PAGE + 20, b"and there").unwrap();
    bytes[index(5 * PAGE + 20)..][..9].copy_from_slice(b"and there");
    assert_eq!(errno(&mut guest, Message::new(op::FSYNC, inode, &[handle, 0])), 0);
    assert_eq!((window.mapped(), window.requests.try_iter().count()), (mapped, 0));
    assert!(fs::read(share.path("f")).unwrap() == bytes);
    // It grows and shrinks, and the mappings follow in both places.
    for size in [9 * PAGE + 5, 3 * PAGE + 1, PAGE, 6 * PAGE] {
        assert_eq!(errno(&mut guest, truncate(inode, size)), 0);
        bytes.resize(index(size), 0);
        for start in [0, 32 * PAGE] {
            for at in (0..size.min(8 * PAGE)).step_by(index(PAGE)) {
                let mut seen = vec![1; index((size - at).min(PAGE))];
                window.read_window(start + at, &mut seen).unwrap();
                assert!(seen == bytes[index(at)..][..seen.len()], "page at {at} of {size}");
            }
        }
        if policy == QEMU {
            window.touch_all().unwrap();
        }
    }
    // A file without a name is as alive as before.
    window.write_window(16 * PAGE, b"nameless").unwrap();
    let mut seen = [0; 8];
    gone.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"nameless");
    file.write_all_at(b"by the host", PAGE).unwrap();
    let mut seen = [0; 11];
    window.read_window(33 * PAGE, &mut seen).unwrap();
    assert_eq!(&seen, b"by the host");
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 8 * PAGE, true)), 0, "a new one");
    assert_eq!(errno(&mut guest, remove(inode, 0, WINDOW)), 0);
    assert_eq!(window.mapped(), 0);
}

/// A newer daemon takes over: the VMM keeps its mappings, the guest notices nothing.
#[test]
fn a_newer_daemon_goes_on_with_what_is_mapped() {
    goes_on_with_what_is_mapped(QEMU, "--dax-vmm=qemu");
}

#[test]
fn a_newer_daemon_goes_on_with_what_is_mapped_plainly() {
    goes_on_with_what_is_mapped(ShmemPolicy::Plain, "--dax-vmm=plain");
}

/// The old daemon waits for the VMM when the new one comes: the request is done by that, and the old
/// one's answer is not taken for its own.
#[test]
fn a_map_that_waits_is_done_by_the_successor() {
    let handover = tempfile::tempdir().unwrap();
    let handover = format!("--handover-socket={}", handover.path().join("h").display());
    let arguments = ["--dax=always", "--sandbox=none", &handover];
    let mut share = Share::new(&arguments);
    let bytes = content(index(8 * PAGE), 12);
    let _file = share.file("f", &bytes);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    window.hold_answers(true);
    send(&mut guest, 1, 0, &set_up(inode, 0, 8 * PAGE, 0, true));
    await_map(&window);
    replace(&mut share, &arguments);
    window.hold_answers(false);
    assert_eq!(answer(&mut guest, 1), 0);
    let mut seen = vec![0; bytes.len()];
    window.read_window(0, &mut seen).unwrap();
    assert!(seen == bytes);
    assert_eq!(window.mapped(), 1);
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 8 * PAGE, true)), 0);
    assert_eq!(window.mapped(), 2);
}

/// A successor with another window cannot go on, and says so; the next VMM is served.
#[test]
fn a_successor_with_another_window_says_that_it_cannot_go_on() {
    let handover = tempfile::tempdir().unwrap();
    let handover = format!("--handover-socket={}", handover.path().join("h").display());
    for (other, words) in [
        ("--dax-vmm=plain", "must be those of the daemon that is replaced"),
        ("--dax=never", "start it with the options of the one before"),
    ] {
        let mut share = Share::new(&["--dax=always", "--sandbox=none", &handover]);
        let _file = share.file("f", &content(index(8 * PAGE), 13));
        let (mut guest, window) = share.guest(QEMU);
        let inode = guest.lookup(ROOT, "f").unwrap();
        assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 0, true)), 0);
        replace(&mut share, &["--dax=always", "--sandbox=none", &handover, other]);
        assert!(guest.front_end.get_queue_num().is_err(), "it hangs up");
        // It says why right after that.
        let start = Instant::now();
        while !share.daemon.log().contains(words) {
            assert!(start.elapsed() < LONG, "{}", share.daemon.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        drop((guest, window));
        FsClient::start(share.daemon.socket(), 1, 1).unwrap().lookup(ROOT, "f").unwrap();
    }
}
