//! Locks that are waited for: granted at once, given up at once, and not a way to exhaust the daemon.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use testkit::daemon::Daemon;
use testkit::driver::fs::{FsClient, Message, op};

const PATIENCE: Duration = Duration::from_secs(20);
/// `F_RDLCK`, `F_WRLCK` and `F_UNLCK` of a lock request, and the flag that makes it a BSD lock.
const READ_LOCK: u32 = 0;
const WRITE_LOCK: u32 = 1;
const UNLOCK: u32 = 2;
const LK_FLOCK: u32 = 1;
/// What `slow_pool` allows.
const LOCK_THREADS: usize = 64;

/// A guest with the file open.
struct Guest {
    client: FsClient,
    inode: u64,
    handle: u64,
    daemon: Daemon,
}

impl Guest {
    fn new(dir: &Path, socket: &str, depth: usize, more: &[&str]) -> Self {
        let shared = format!("--shared-dir={}", dir.join("shared").display());
        let arguments = [&[shared.as_str(), "--posix-lock", "--flock"][..], more].concat();
        let daemon = Daemon::start("virtiofsd", &dir.join(socket), &arguments).unwrap();
        let mut client = FsClient::start(daemon.socket(), 1, depth).unwrap();
        let inode = client.lookup(1, "file").unwrap();
        let handle = client.open(inode, libc::O_RDWR).unwrap();
        Self { client, inode, handle, daemon }
    }

    fn message(&self, opcode: u32, owner: u64, kind: u32, flags: u32) -> Message {
        let end = i64::MAX.cast_unsigned();
        let words = [self.handle, owner, 0, end, u64::from(kind), u64::from(flags)];
        Message::new(opcode, self.inode, &words)
    }

    fn set(&mut self, owner: u64, kind: u32, flags: u32) -> i32 {
        let message = self.message(op::SETLK, owner, kind, flags);
        self.client.call(message).unwrap().errno
    }

    /// Sends a SETLKW from slot `slot`.
    fn wait_for(&mut self, slot: usize, owner: u64, kind: u32, flags: u32) -> u64 {
        let message = self.message(op::SETLKW, owner, kind, flags);
        let unique = self.client.add(1, slot, &message).unwrap();
        self.client.queues[1].kick();
        unique
    }

    /// The next answer and its slot.
    fn answer(&mut self) -> (usize, i32) {
        let used = self.client.queues[1].wait(PATIENCE).unwrap();
        let slot = usize::try_from(used.cookie).unwrap();
        (slot, self.client.answer(slot, used.len).unwrap().errno)
    }

    fn lock_threads(&self) -> usize {
        let pid = self.daemon.serving_pid();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let name = |path: std::path::PathBuf| fs::read_to_string(path.join("comm"));
        tasks.filter(|t| name(t.as_ref().unwrap().path()).is_ok_and(|n| n.trim() == "lock")).count()
    }
}

fn shared_file() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("shared")).unwrap();
    fs::write(dir.path().join("shared/file"), "contents").unwrap();
    dir
}

#[test]
fn a_lock_of_another_guest_is_had_as_soon_as_it_is_free() {
    let dir = shared_file();
    let mut one = Guest::new(dir.path(), "one", 1, &[]);
    let mut two = Guest::new(dir.path(), "two", 2, &[]);
    for flags in [0, LK_FLOCK] {
        // A busy machine is late itself; looking every 16 ms would take 8 ms on average in each round.
        let mut medians = (0..3).map(|_| grants(&mut one, &mut two, flags)[7]);
        assert!(medians.any(|late| late < Duration::from_millis(4)), "granted late three times");
    }
}

/// How long after `one` gave its lock up `two`, who waits, has it: 15 times, sorted.
fn grants(one: &mut Guest, two: &mut Guest, flags: u32) -> Vec<Duration> {
    let mut late = Vec::new();
    for _ in 0..15 {
        assert_eq!(one.set(1, WRITE_LOCK, flags), 0);
        two.wait_for(1, 2, WRITE_LOCK, flags);
        std::thread::sleep(Duration::from_millis(40));
        let start = Instant::now();
        assert_eq!(one.set(1, UNLOCK, flags), 0);
        assert_eq!(two.answer(), (1, 0));
        late.push(start.elapsed());
        assert_eq!(one.set(1, WRITE_LOCK, flags), libc::EAGAIN);
        assert_eq!(two.set(2, UNLOCK, flags), 0);
    }
    late.sort_unstable();
    println!("granted after {:?} to {:?}, half of them within {:?}", late[0], late[14], late[7]);
    late
}

/// With threads for some of them, and with none at all.
#[test]
fn many_waits_cost_few_threads_and_all_get_their_lock() {
    const WAITS: usize = 90;
    for (arguments, threads) in [(&[][..], LOCK_THREADS), (&["--thread-pool-size=0"], 0)] {
        let dir = shared_file();
        let mut guest = Guest::new(dir.path(), "s", WAITS + 1, arguments);
        assert_eq!(guest.set(1, WRITE_LOCK, 0), 0);
        for slot in 1..=WAITS {
            guest.wait_for(slot, 10 + slot as u64, READ_LOCK, 0);
        }
        assert!(guest.client.lookup(1, "file").is_ok());
        let end = Instant::now() + PATIENCE;
        while guest.lock_threads() < threads && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(guest.lock_threads(), threads, "{arguments:?}");
        assert_eq!(guest.set(1, UNLOCK, 0), 0);
        for _ in 0..WAITS {
            assert_eq!(guest.answer().1, 0);
        }
        while guest.lock_threads() > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(guest.lock_threads(), 0);
        // All of them hold it now.
        assert_eq!(guest.set(1, WRITE_LOCK, 0), libc::EAGAIN);
    }
}

#[test]
fn waits_end_when_interrupted_and_when_the_queue_stops() {
    let dir = shared_file();
    let mut guest = Guest::new(dir.path(), "s", 80, &[]);
    for (flags, socket) in [(0, "one"), (LK_FLOCK, "two")] {
        let mut other = Guest::new(dir.path(), socket, 1, &[]);
        assert_eq!(other.set(1, WRITE_LOCK, flags), 0);
        // More than there are threads.
        let waits: Vec<u64> =
            (1..80).map(|slot| guest.wait_for(slot, 10 + slot as u64, WRITE_LOCK, flags)).collect();
        std::thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        for unique in waits {
            guest.client.add(0, 0, &Message::new(op::INTERRUPT, 0, &unique)).unwrap();
            guest.client.queues[0].kick();
            guest.client.queues[0].wait(PATIENCE).unwrap();
        }
        for _ in 1..80 {
            assert_eq!(guest.answer().1, libc::EINTR);
        }
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        assert_eq!(guest.lock_threads(), 0);
        // Nothing of them is left: the other lets go, and the lock is free.
        assert_eq!(other.set(1, UNLOCK, flags), 0);
        assert_eq!(other.set(1, WRITE_LOCK, flags), 0);
        if flags == LK_FLOCK {
            for slot in 1..80 {
                guest.wait_for(slot, 10 + slot as u64, WRITE_LOCK, flags);
            }
            std::thread::sleep(Duration::from_millis(50));
            guest.client.front_end.get_vring_base(1).unwrap();
            for _ in 1..80 {
                assert_eq!(guest.answer().1, libc::EINTR);
            }
            assert!(guest.daemon.is_running());
        }
    }
}

/// A lock for reading needs no more than reading.
#[test]
fn a_running_program_can_be_locked_and_a_locked_one_of_a_read_only_share_be_run() {
    let dir = shared_file();
    let program = dir.path().join("shared/file");
    testkit::daemon::copy_program(Path::new("/bin/sleep"), &program, None).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    for argument in ["--readonly", "--cache=auto"] {
        let shared = format!("--shared-dir={}", dir.path().join("shared").display());
        let socket = dir.path().join(argument);
        let arguments = [shared.as_str(), "--posix-lock", argument];
        let daemon = Daemon::start("virtiofsd", &socket, &arguments).unwrap();
        let mut client = FsClient::start(daemon.socket(), 1, 1).unwrap();
        let inode = client.lookup(1, "file").unwrap();
        let handle = client.open(inode, libc::O_RDONLY).unwrap();
        let mut guest = Guest { client, inode, handle, daemon };
        let run = || std::process::Command::new(&program).arg("20").spawn();
        let mut running = (argument != "--readonly").then(|| run().unwrap());
        assert_eq!(guest.set(1, READ_LOCK, 0), 0, "{argument}");
        let child = running.get_or_insert_with(|| run().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

/// The VMM waits for its queue to stop, whatever numbers the guest gave its requests.
#[test]
fn waits_of_the_same_number_all_end_when_the_queue_stops() {
    let dir = shared_file();
    let mut other = Guest::new(dir.path(), "other", 1, &[]);
    assert_eq!(other.set(1, WRITE_LOCK, 0), 0);
    let mut guest = Guest::new(dir.path(), "s", 10, &[]);
    for slot in 1..6 {
        if slot > 1 {
            guest.client.repeat_number();
        }
        guest.wait_for(slot, 10 + slot as u64, WRITE_LOCK, 0);
    }
    let end = Instant::now() + PATIENCE;
    while guest.lock_threads() < 5 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    guest.client.front_end.get_vring_base(1).unwrap();
    for _ in 1..6 {
        assert_eq!(guest.answer().1, libc::EINTR);
    }
}

#[test]
fn a_guest_that_leaves_while_it_waits_leaves_nothing() {
    let dir = shared_file();
    let mut one = Guest::new(dir.path(), "one", 1, &[]);
    assert_eq!(one.set(1, WRITE_LOCK, 0), 0);
    let mut two = Guest::new(dir.path(), "two", 8, &[]);
    for slot in 1..8 {
        two.wait_for(slot, slot as u64, WRITE_LOCK, 0);
    }
    std::thread::sleep(Duration::from_millis(30));
    let Guest { client, mut daemon, .. } = two;
    drop(client);
    let next = FsClient::start(daemon.socket(), 1, 1);
    assert!(next.is_ok() && daemon.is_running());
    // Had one of the waits gone on, it would have the lock now.
    assert_eq!(one.set(1, UNLOCK, 0), 0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(one.set(1, WRITE_LOCK, 0), 0);
}
