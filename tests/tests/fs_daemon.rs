//! `virtiofsd` as a process: command lines of those who start it, memory, sessions one after another,
//! hostile messages, locks between guests. The guest is a client that speaks FUSE into the rings.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use testkit::daemon::{Daemon, bin};
use testkit::driver::fs::{FsClient, Message, Size, op};

const PATIENCE: Duration = Duration::from_secs(10);
/// `F_RDLCK` and `F_WRLCK` of a lock request, and the flag that makes it a BSD lock.
const WRITE_LOCK: u32 = 1;
const UNLOCK: u32 = 2;
const LK_FLOCK: u32 = 1;

fn shared_dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "contents").unwrap();
    (dir, shared)
}

fn serve(dir: &Path, socket: &str, arguments: &[&str]) -> Daemon {
    let shared = format!("--shared-dir={}", dir.join("shared").display());
    let mut all = vec![shared.as_str(), "--sandbox=none"];
    all.extend(arguments);
    Daemon::start("virtiofsd", &dir.join(socket), &all).unwrap()
}

/// SETLK or SETLKW of the whole file.
fn lock(opcode: u32, inode: u64, handle: u64, owner: u64, kind: u32, flags: u32) -> Message {
    let words = [handle, owner, 0, i64::MAX.cast_unsigned(), u64::from(kind), u64::from(flags)];
    Message::new(opcode, inode, &words)
}

/// Waits until `path` is a socket that takes connections, and uses the directory through it.
fn served_at(path: &Path) {
    let end = Instant::now() + PATIENCE;
    while !path.exists() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut guest = loop {
        match FsClient::start(path, 1, 1) {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            result => break result.unwrap(),
        }
    };
    assert!(guest.lookup(1, "file").unwrap() > 1);
}

/// A shell command in which `virtiofsd` is ours and descriptor 3 a listening socket.
fn shell(line: &str, listener: Option<&UnixListener>) -> Command {
    let program = bin("virtiofsd").unwrap();
    let mut line = line.replace("virtiofsd ", &format!("{} ", program.display()));
    if let Some(listener) = listener {
        rustix::io::fcntl_setfd(listener, rustix::io::FdFlags::empty()).unwrap();
        line = format!("{line} 3<&{}", listener.as_raw_fd());
    }
    // Not every sh takes descriptors of two digits.
    let mut command = Command::new("bash");
    command.args(["-c", &line]);
    command
}

/// The line of Kata's Go runtime, word for word: a listening socket as descriptor 3, the system log.
#[test]
fn a_daemon_that_is_told_to_leave_while_it_starts_leaves() {
    let (dir, shared) = shared_dir();
    // Over all of a start: before, during and after it becomes process 1 of its namespaces.
    for delay in (0..40).map(|step| Duration::from_micros(250 * step)) {
        let mut daemon = Command::new(bin("virtiofsd").unwrap())
            .arg(format!("--socket-path={}", dir.path().join("early.sock").display()))
            .arg(format!("--shared-dir={}", shared.display()))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(delay);
        kill_process(Pid::from_child(&daemon), Signal::TERM).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while daemon.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "SIGTERM after {delay:?} was lost");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn kata_starts_it_with_a_listening_descriptor() {
    if !rustix::process::geteuid().is_root() {
        return testkit::skip::skip("a system log of its own needs root");
    }
    let (dir, shared) = shared_dir();
    let socket = dir.path().join("kata.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let log = UnixDatagram::bind(dir.path().join("log")).unwrap();
    log.set_read_timeout(Some(PATIENCE)).unwrap();
    // A /dev with nothing but our system log, for this process alone.
    let line = format!(
        "mount -t tmpfs none /dev && : >/dev/log && mount --bind {} /dev/log && exec \
         virtiofsd --syslog --cache=auto --shared-dir={} --fd=3 --thread-pool-size=1 --announce-submounts",
        dir.path().join("log").display(),
        shared.display(),
    );
    let mut command = Command::new("unshare");
    command.arg("--mount").arg("bash").args(shell(&line, Some(&listener)).get_args());
    let mut child = command.spawn().unwrap();
    let mut text = [0; 4096];
    let ready = (0..50).any(|_| {
        let n = log.recv(&mut text).unwrap();
        String::from_utf8_lossy(&text[..n]).contains("Waiting for vhost-user socket connection")
    });
    assert!(ready);
    served_at(&socket);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn without_a_system_log_it_serves_and_logs_to_stderr() {
    if !rustix::process::geteuid().is_root() {
        return testkit::skip::skip("a /dev of its own needs root");
    }
    let (dir, shared) = shared_dir();
    let socket = dir.path().join("s");
    let program = bin("virtiofsd").unwrap();
    let line = format!(
        "mount -t tmpfs none /dev && exec {} --syslog --shared-dir={} --socket-path={}",
        program.display(),
        shared.display(),
        socket.display(),
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "bash", "-c", &line]);
    let daemon = Daemon::start_command("virtiofsd", command, &socket).unwrap();
    served_at(daemon.socket());
    assert!(daemon.log().contains("cannot reach the system log at /dev/log"));
}

/// The line of Kata's Rust runtime, which reads the error output, and libvirt's, old and new.
#[test]
fn kata_and_libvirt_start_it_as_they_are_used_to() {
    let lines = [
        "virtiofsd --socket-path SOCKET --shared-dir DIR --cache auto --thread-pool-size=1 \
         -o announce_submounts --xattr",
        "virtiofsd --fd=3 -o source=DIR,cache=always,sandbox=namespace,xattr,no_flock,no_posix_lock",
        "virtiofsd --fd=3 --shared-dir DIR --cache auto --sandbox namespace --xattr --log-level=info",
    ];
    for line in lines {
        let (dir, shared) = shared_dir();
        let socket = dir.path().join("s.sock");
        let listener = line.contains("--fd").then(|| UnixListener::bind(&socket).unwrap());
        let line = line.replace("DIR", &shared.display().to_string());
        let line = line.replace("SOCKET", &socket.display().to_string());
        let line = format!("exec {line}");
        let mut child = shell(&line, listener.as_ref()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let ready =
            lines.any(|line| line.unwrap().contains("Waiting for vhost-user socket connection"));
        assert!(ready, "{line}");
        served_at(&socket);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn it_is_small_and_soon_ready() {
    let (dir, _shared) = shared_dir();
    let start = Instant::now();
    let daemon = serve(dir.path(), "s", &[]);
    let ready = start.elapsed();
    let idle = daemon.private_bytes().unwrap();
    // A debug build's relocations count too; the figures for releases are in the benchmark.
    assert!(idle < 12 << 20, "{idle} bytes");
    assert!(ready < Duration::from_secs(2), "{ready:?}");
    let mut guest = FsClient::start(daemon.socket(), 1, 1).unwrap();
    guest.lookup(1, "file").unwrap();
    let serving = daemon.private_bytes().unwrap();
    assert!(serving < 16 << 20, "{serving} bytes");
}

#[test]
fn the_next_guest_starts_afresh() {
    let (dir, _shared) = shared_dir();
    let mut daemon = serve(dir.path(), "s", &[]);
    let mut first = FsClient::start(daemon.socket(), 2, 1).unwrap();
    let inode = first.lookup(1, "file").unwrap();
    let handle = first.open(inode, libc::O_RDWR).unwrap();
    let fds = daemon.open_fds().unwrap();
    drop(first);

    let mut second = FsClient::start(daemon.socket(), 2, 1).unwrap();
    let stale = second.call(Message::read(inode, handle, 0, 4096)).unwrap();
    assert_ne!(stale.errno, 0, "the handle of a guest that left still works");
    let inode = second.lookup(1, "file").unwrap();
    let handle = second.open(inode, libc::O_RDWR).unwrap();
    assert!(daemon.open_fds().unwrap() <= fds, "descriptors of the first guest stay open");
    let answer = second.call(Message::read(inode, handle, 0, 4096)).unwrap();
    assert_eq!((answer.errno, answer.len), (0, 16 + 8));
    assert_eq!(second.ram().bytes(second.data_at(0).1, 8), b"contents");
    assert!(daemon.is_running());
}

#[test]
fn malformed_messages_end_nothing() {
    let (dir, _shared) = shared_dir();
    let mut daemon = serve(dir.path(), "s", &[]);
    let mut guest = FsClient::start(daemon.socket(), 1, 1).unwrap();
    for opcode in 0..60 {
        for body in [&b""[..], b"x", &[0xff; 64], &[0; 200]] {
            // INIT and DESTROY end the session, FORGET has no reply.
            if matches!(opcode, op::FORGET | op::INIT | 38 | op::INTERRUPT | 42) {
                continue;
            }
            let body = body.to_vec();
            let message = Message { opcode, nodeid: u64::MAX, body, ..Message::default() };
            let answer = guest.call(message).unwrap();
            if opcode == 0 || opcode == 7 || opcode > 53 {
                assert_eq!(answer.errno, libc::ENOSYS, "{opcode}");
            }
        }
    }
    for name in ["..", ".", "", "a/b", "/etc/passwd"] {
        assert!(guest.lookup(1, name).is_err(), "{name}");
    }
    assert!(guest.lookup(1, "file").is_ok());
    assert!(daemon.is_running());
}

/// `OUTBOARD_FUZZ_MESSAGES` sets how many messages; the promise was tried with a million.
#[test]
fn random_messages_end_nothing_and_reach_nothing_outside() {
    let messages: u64 =
        std::env::var("OUTBOARD_FUZZ_MESSAGES").map_or(20_000, |text| text.parse().unwrap());
    let (dir, shared) = shared_dir();
    fs::write(dir.path().join("outside"), "untouched").unwrap();
    let arguments = ["--xattr", "--posix-acl", "--posix-lock", "--flock", "--sandbox=none"];
    let mut daemon = serve(dir.path(), "s", &arguments);
    let mut guest = FsClient::start(daemon.socket(), 1, 1).unwrap();
    let mut dice = Dice { state: 0x2545_f491_4f6c_dd1d, words: [1; 5] };
    for n in 0..messages {
        if n % 1000 == 0 {
            // What the messages removed, replaced and closed is there again.
            let file = shared.join("file");
            let _ = fs::remove_file(&file);
            let _ = fs::remove_dir_all(&file);
            fs::write(file, "contents").unwrap();
            let inode = guest.lookup(1, "file").unwrap();
            dice.words = [1, inode, guest.open(inode, libc::O_RDWR).unwrap(), 2, 3];
        }
        let message = dice.message();
        guest.add(1, 0, &message).unwrap();
        guest.queues[1].kick();
        guest.queues[1].wait(PATIENCE).unwrap_or_else(|error| panic!("{n}: {message:?}: {error}"));
    }
    assert!(guest.lookup(1, "..").is_err());
    drop(guest);
    assert!(FsClient::start(daemon.socket(), 1, 1).unwrap().lookup(1, "file").is_ok());
    assert!(daemon.is_running());
    assert_eq!(fs::read(dir.path().join("outside")).unwrap(), b"untouched");
    let mut there: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    there.sort();
    assert_eq!(there, ["outside", "s", "s.log", "shared"]);
}

/// Messages that are nearly right: known inodes and handles, small numbers, names.
struct Dice {
    state: u64,
    /// Root, an inode, a handle of it, and others.
    words: [u64; 5],
}

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) % below
    }

    fn word(&mut self) -> u64 {
        match self.roll(8) {
            0..4 => self.words[usize::try_from(self.roll(5)).unwrap()],
            4 => self.roll(5000),
            5 => 1 << self.roll(64),
            6 => u64::MAX - self.roll(3),
            _ => 0,
        }
    }

    fn message(&mut self) -> Message {
        const NAMES: [&[u8]; 8] = [
            b"file\0",
            b"..\0",
            b"../outside\0",
            b"new\0",
            b"user.x\0",
            b"a/b\0",
            b"\0",
            b"no end",
        ];
        // SETLKW may wait for its own earlier lock, INIT and DESTROY would end what is tried.
        let opcode = loop {
            let opcode = u32::try_from(self.roll(60)).unwrap();
            if !matches!(opcode, op::SETLKW | op::INIT | 38) {
                break opcode;
            }
        };
        // FALLOCATE and COPY_FILE_RANGE of a large size would fill the disk.
        let large = !matches!(opcode, op::FALLOCATE | 47 | 53);
        let words = self.roll(9);
        let mut body: Vec<u8> = (0..words)
            .flat_map(|_| self.word().min(if large { u64::MAX } else { 5000 }).to_ne_bytes())
            .collect();
        for _ in 0..self.roll(3) {
            body.extend(NAMES[usize::try_from(self.roll(8)).unwrap()]);
        }
        if self.roll(4) == 0 {
            body.truncate(usize::try_from(self.roll(80)).unwrap());
        }
        let nodeid = self.words[usize::try_from(self.roll(3)).unwrap()];
        let data_out = u32::try_from(self.roll(2) * self.roll(9000)).unwrap();
        Message { opcode, nodeid, body, data_out, data_in: 0 }
    }
}

#[test]
fn two_guests_exclude_each_other() {
    let (dir, _shared) = shared_dir();
    let locks = ["--posix-lock", "--flock"];
    let (one, two) = (serve(dir.path(), "one", &locks), serve(dir.path(), "two", &locks));
    let mut guests: Vec<(FsClient, u64, u64)> = [&one, &two]
        .iter()
        .map(|daemon| {
            let mut guest = FsClient::start(daemon.socket(), 1, 4).unwrap();
            let inode = guest.lookup(1, "file").unwrap();
            let handle = guest.open(inode, libc::O_RDWR).unwrap();
            (guest, inode, handle)
        })
        .collect();
    let (mut b, b_inode, b_handle) = guests.pop().unwrap();
    let (mut a, a_inode, a_handle) = guests.pop().unwrap();
    for flags in [LK_FLOCK, 0] {
        let a_lock = |kind| lock(op::SETLK, a_inode, a_handle, 7, kind, flags);
        assert_eq!(a.call(a_lock(WRITE_LOCK)).unwrap().errno, 0);
        let b_try = lock(op::SETLK, b_inode, b_handle, 8, WRITE_LOCK, flags);
        assert_eq!(b.call(b_try).unwrap().errno, libc::EAGAIN);

        // The second guest waits; its other requests go on.
        let b_wait = lock(op::SETLKW, b_inode, b_handle, 8, WRITE_LOCK, flags);
        b.add(1, 1, &b_wait).unwrap();
        b.queues[1].kick();
        assert!(b.lookup(1, "file").is_ok());
        assert_eq!(a.call(a_lock(UNLOCK)).unwrap().errno, 0);
        let used = b.queues[1].wait(PATIENCE).unwrap();
        assert_eq!((used.cookie, b.answer(1, used.len).unwrap().errno), (1, 0));

        // Now the first one waits, and gives up.
        let a_wait = lock(op::SETLKW, a_inode, a_handle, 7, WRITE_LOCK, flags);
        let unique = a.add(1, 2, &a_wait).unwrap();
        a.queues[1].kick();
        assert!(a.lookup(1, "file").is_ok());
        a.add(0, 3, &Message::new(op::INTERRUPT, 0, &unique)).unwrap();
        a.queues[0].kick();
        a.queues[0].wait(PATIENCE).unwrap();
        let used = a.queues[1].wait(PATIENCE).unwrap();
        assert_eq!((used.cookie, a.answer(2, used.len).unwrap().errno), (2, libc::EINTR));
        let b_free = lock(op::SETLK, b_inode, b_handle, 8, UNLOCK, flags);
        assert_eq!(b.call(b_free).unwrap().errno, 0);
    }
}

#[test]
fn fsyncs_come_back_from_the_slow_threads() {
    let (dir, _shared) = shared_dir();
    let daemon = serve(dir.path(), "s", &[]);
    let mut guest = FsClient::start(daemon.socket(), 1, 8).unwrap();
    let inode = guest.lookup(1, "file").unwrap();
    let handle = guest.open(inode, libc::O_RDWR).unwrap();
    for round in 0..50 {
        guest.ram().fill(guest.data_at(0).0, 4096, 7);
        guest.call(Message::write(inode, handle, round * 4096, 4096)).unwrap();
        for slot in 1..4 {
            let sync = Message::new(op::FSYNC, inode, &[handle, 0]);
            guest.add(1, slot, &sync).unwrap();
        }
        guest.queues[1].kick();
        let mut seen = Vec::new();
        while seen.len() < 3 {
            let used = guest.queues[1].wait(PATIENCE).unwrap();
            let slot = usize::try_from(used.cookie).unwrap();
            assert_eq!(guest.answer(slot, used.len).unwrap().errno, 0);
            seen.push(slot);
        }
        seen.sort_unstable();
        assert_eq!(seen, [1, 2, 3]);
    }
}

#[test]
fn a_slow_request_does_not_hold_up_its_queue() {
    const FALLOCATE: u32 = 43;
    const BYTES: u64 = 256 << 20;
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::create_dir(dir.path().join("shared")).unwrap();
    fs::write(dir.path().join("shared/file"), "contents").unwrap();
    let daemon = serve(dir.path(), "s", &[]);
    let mut guest = FsClient::start(daemon.socket(), 1, 4).unwrap();
    let inode = guest.lookup(1, "file").unwrap();
    let handle = guest.open(inode, libc::O_RDWR).unwrap();
    // Giving a file 256 MiB of memory takes tens of milliseconds. A machine that is busy elsewhere may
    // not run the queue's worker meanwhile: it gets more chances.
    let overtaken = (0..5).any(|_| {
        let slow = Message::new(FALLOCATE, inode, &[handle, 0, BYTES, 0]);
        guest.add(1, 1, &slow).unwrap();
        let getattr = Message::new(op::GETATTR, inode, &[0u64; 2]);
        guest.add(1, 2, &getattr).unwrap();
        guest.queues[1].kick();
        let order: Vec<u64> = (0..2)
            .map(|_| {
                let used = guest.queues[1].wait(PATIENCE).unwrap();
                let slot = usize::try_from(used.cookie).unwrap();
                assert_eq!(guest.answer(slot, used.len).unwrap().errno, 0);
                used.cookie
            })
            .collect();
        fs::File::options()
            .write(true)
            .open(dir.path().join("shared/file"))
            .and_then(|file| file.set_len(0))
            .unwrap();
        order == [2, 1]
    });
    assert!(overtaken, "GETATTR waited for FALLOCATE each time");
}

/// Neighbouring pages exchanged: no page of a request then follows the one before it in memory.
fn exchanged(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(8192).flat_map(|pair| [&pair[4096..], &pair[..4096]].concat()).collect()
}

#[test]
fn requests_are_as_large_as_the_ring_allows() {
    // Linux keeps four of a ring's entries for headers.
    const PAGES: u32 = 1024 - 4;
    const BYTES: u32 = PAGES * 4096;
    let (dir, shared) = shared_dir();
    let daemon = serve(dir.path(), "s", &[]);
    for scattered in [false, true] {
        let size = Size { ring: 1024, data: 4 << 20, scattered, ..Size::new(1, 1) };
        let mut guest = FsClient::start_sized(daemon.socket(), size).unwrap();
        assert!(guest.max_write >= BYTES && u32::from(guest.max_pages) >= PAGES);
        let inode = guest.lookup(1, "file").unwrap();
        let handle = guest.open(inode, libc::O_RDWR).unwrap();
        let contents: Vec<u8> = (0..BYTES).map(|i| (i / 4096 + i % 251).to_le_bytes()[0]).collect();
        let in_memory = if scattered { exchanged(&contents) } else { contents.clone() };
        let (from, to) = guest.data_at(0);
        guest.ram().write(from, &in_memory);
        let written = guest.call(Message::write(inode, handle, 0, BYTES)).unwrap();
        assert_eq!(written.get::<u32>().unwrap(), BYTES);
        assert!(fs::read(shared.join("file")).unwrap() == contents, "what was written");
        let read = guest.call(Message::read(inode, handle, 0, BYTES)).unwrap();
        assert_eq!((read.errno, read.len), (0, BYTES + 16));
        assert!(guest.ram().bytes(to, in_memory.len()) == in_memory, "what was read");
    }
}

/// However large the directory and the guest's buffer are.
#[test]
fn a_listing_comes_in_pieces_of_a_mebibyte() {
    const FILES: usize = 6_000;
    let (dir, shared) = shared_dir();
    for i in 0..FILES {
        fs::write(shared.join(format!("{i:0>200}")), "").unwrap();
    }
    let daemon = serve(dir.path(), "s", &[]);
    let size = Size { ring: 1024, data: 4 << 20, ..Size::new(1, 1) };
    let mut guest = FsClient::start_sized(daemon.socket(), size).unwrap();
    let opened = guest.call(Message::new(op::OPENDIR, 1, &[0_u32, 0])).unwrap();
    let handle = opened.u64_at(0).unwrap();
    let (mut names, mut offset) = (0, 0);
    loop {
        let mut message = Message::new(op::READDIR, 1, &[handle, offset, 2 << 20, 0, 0]);
        message.data_in = 2 << 20;
        let answer = guest.call(message).unwrap();
        assert_eq!(answer.errno, 0);
        assert!(answer.len <= (1 << 20) + 16, "{} bytes", answer.len);
        let bytes = guest.ram().bytes(guest.data_at(0).1, answer.len as usize - 16);
        let mut rest = &bytes[..];
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            offset = u64::from_ne_bytes(rest[8..16].try_into().unwrap());
            let len = u32::from_ne_bytes(rest[16..20].try_into().unwrap()) as usize;
            names += usize::from(len == 200);
            rest = &rest[(24 + len).next_multiple_of(8)..];
        }
    }
    assert_eq!(names, FILES);
}

#[test]
fn capabilities_are_told_whatever_else_is_asked() {
    let output = Command::new(bin("virtiofsd").unwrap())
        .args(["--print-capabilities", "-o", "nonsense"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\"type\": \"fs\""), "{text}");
    for feature in ["migrate-precopy", "separate-options", "posix-acl-negotiation-mode"] {
        assert!(text.contains(feature), "{text}");
    }
}

#[test]
fn mistakes_end_with_one_line_and_code_one() {
    for (arguments, part) in [
        (&["--shared-dir=/nowhere/at/all", "--socket-path=/tmp/never"][..], "/nowhere/at/all"),
        (&["--shared-dir=/tmp"], "--socket-path"),
        (&["--socket-path=/tmp/never"], "--shared-dir"),
        (&["-o", "bogus"], "bogus"),
        (&["--shared-dir=/tmp", "--socket-path=/tmp/never", "--xattrmap=junk"], "xattrmap"),
        (&["--shared-dir=/tmp", "--socket-path=/tmp/never", "--translate-uid=x"], "translate-uid"),
        (
            &[
                "--shared-dir=/tmp",
                "--socket-path=/tmp/never",
                "--migration-mode=file-handles",
                "--migration-confirm-paths",
            ],
            "--migration-confirm-paths",
        ),
        (
            &["--shared-dir=/tmp", "--socket-path=/nowhere/never"],
            "error: cannot listen on /nowhere/never: No such file or directory (os error 2)\n",
        ),
    ] {
        let output = Command::new(bin("virtiofsd").unwrap()).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
        assert!(text.contains(part) && text.lines().count() == 1, "{arguments:?}: {text}");
    }
}
