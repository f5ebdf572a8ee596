//! Each option of `virtiofsd` that shows in what a guest or the host sees: with it and without it, on a
//! running daemon. (Sandbox and ids: `fs_sandbox`; locks: `fs_daemon`, `fs_posix`; migration:
//! `handover`, `fs_migration_qemu`; DAX: `fs_dax`.)
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(unsafe_code, reason = "maps a shared file as a program does")]

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, XattrFlags};
use testkit::daemon::{Daemon, bin};
use testkit::driver::fs::{FsClient, Message, op};
use testkit::frontend::FrontEnd;
use testkit::fuse_bridge::BridgeOptions;
use testkit::mounted::Mounted;
use virtiofsd::fuse::wire::{EntryOut, OpenOut, init};

struct World {
    daemon: Daemon,
    dir: tempfile::TempDir,
}

impl World {
    fn new(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::write(shared.join("file"), "contents").unwrap();
        let shared = format!("--shared-dir={}", shared.display());
        let control = format!("--control-socket={}", dir.path().join("control").display());
        let all = [&[shared.as_str(), control.as_str()][..], arguments].concat();
        let daemon = Daemon::start("virtiofsd", &dir.path().join("s"), &all).unwrap();
        Self { daemon, dir }
    }

    fn client(&self, depth: usize) -> FsClient {
        FsClient::start(self.daemon.socket(), 1, depth).unwrap()
    }

    /// What INIT agreed on with a guest that has everything.
    fn agreed(&self) -> u64 {
        let _client = self.client(1);
        let answer = ask(&self.dir.path().join("control"), r#"{"status": null}"#);
        let (_, rest) = answer.split_once("\"fuse_flags\":\"0x").unwrap();
        u64::from_str_radix(rest.split('"').next().unwrap(), 16).unwrap()
    }

    /// Threads of the daemon with this name.
    fn threads(&self, name: &str) -> usize {
        let pid = self.daemon.serving_pid();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let named = |path: &Path| fs::read_to_string(path.join("comm")).unwrap_or_default();
        tasks.filter(|task| named(&task.as_ref().unwrap().path()).trim() == name).count()
    }
}

fn ask(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

/// Each option that changes what is agreed with the guest changes just that.
#[test]
fn what_is_agreed_on_follows_the_options() {
    const READDIRPLUS: u64 = init::DO_READDIRPLUS | init::READDIRPLUS_AUTO;
    const ACL: u64 = init::POSIX_ACL | init::DONT_MASK;
    let plain = World::new(&[]).agreed();
    assert_eq!(plain & READDIRPLUS, READDIRPLUS);
    assert_ne!(plain & init::SUBMOUNTS, 0);
    assert_eq!(plain & init::ATOMIC_O_TRUNC, 0);
    let cases: [(&[&str], u64); 19] = [
        (&["--no-readdirplus"], READDIRPLUS),
        (&["-o", "no_readdirplus"], READDIRPLUS),
        (&["--writeback"], init::WRITEBACK_CACHE),
        (&["--killpriv-v2"], init::HANDLE_KILLPRIV_V2),
        (&["--killpriv-v2", "--no-killpriv-v2"], 0),
        (&["--no-announce-submounts"], init::SUBMOUNTS),
        (&["--announce-submounts"], 0),
        (&["--posix-acl"], ACL),
        (&["--posix-acl=auto"], ACL),
        (&["--posix-acl=never"], 0),
        (&["--security-label"], init::SECURITY_CTX),
        (&["-o", "security_label"], init::SECURITY_CTX),
        (&["--allow-mmap"], init::DIRECT_IO_ALLOW_MMAP),
        (&["--posix-lock"], init::POSIX_LOCKS),
        (&["--flock"], init::FLOCK_LOCKS),
        (&["-o", "posix_lock,flock,no_flock"], init::POSIX_LOCKS),
        (&["--cache=never"], init::CACHE_SYMLINKS | READDIRPLUS),
        (&["--cache=never", "--timeout=1"], init::CACHE_SYMLINKS),
        (&["--cache=metadata"], 0),
    ];
    for (arguments, change) in cases {
        let agreed = World::new(arguments).agreed();
        assert_eq!(agreed ^ plain, change, "{arguments:?}: {agreed:#x} instead of {plain:#x}");
    }
}

#[test]
fn names_and_attributes_hold_as_long_as_the_policy_says() {
    let cases: [(&[&str], u64, u32, u32); 7] = [
        (&[], 1, 0, 0),
        (&["--cache=never"], 0, 0, 1),
        (&["-o", "cache=none"], 0, 0, 1),
        (&["--cache=metadata"], 86_400, 0, 1),
        (&["--cache=always"], 86_400, 0, 2),
        (&["--timeout=2.5"], 2, 500_000_000, 0),
        (&["--cache=always", "-o", "timeout=7"], 7, 0, 2),
    ];
    for (arguments, seconds, nanoseconds, open_flags) in cases {
        let world = World::new(arguments);
        let mut client = world.client(1);
        let body = b"file\0".to_vec();
        let lookup = Message { opcode: op::LOOKUP, nodeid: 1, body, ..Message::default() };
        let entry: EntryOut = client.call(lookup).unwrap().get().unwrap();
        assert_eq!((entry.entry_valid, entry.entry_valid_nsec), (seconds, nanoseconds));
        assert_eq!((entry.attr_valid, entry.attr_valid_nsec), (seconds, nanoseconds));
        // FOPEN_DIRECT_IO is 1, FOPEN_KEEP_CACHE 2.
        let open = client.call(Message::new(op::OPEN, entry.nodeid, &[0_u32, 0])).unwrap();
        let open: OpenOut = open.get().unwrap();
        assert_eq!(open.open_flags & 3, open_flags, "{arguments:?}");
    }
}

/// The flags that the daemon has a file of this name open with.
fn host_flags(world: &World, name: &str) -> OFlags {
    let pid = world.daemon.serving_pid();
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let fd = fd.unwrap();
        let leads = fs::read_link(fd.path()).is_ok_and(|path| path.ends_with(name));
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().display()));
        let info = info.unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        if let (true, Some(flags)) = (leads, flags) {
            let bits = u32::from_str_radix(flags.trim(), 8).unwrap();
            let flags = OFlags::from_bits_retain(bits);
            if !flags.contains(OFlags::PATH) {
                return flags;
            }
        }
    }
    panic!("{name} is not open");
}

#[test]
fn direct_io_and_noatime_reach_the_host_when_allowed() {
    let asked = OFlags::DIRECT | OFlags::NOATIME;
    for (arguments, passed) in [
        (&[][..], OFlags::empty()),
        (&["--allow-direct-io"], OFlags::DIRECT),
        (&["--preserve-noatime"], OFlags::NOATIME),
        (&["--allow-direct-io", "--preserve-noatime"], asked),
        (&["-o", "allow_direct_io,no_allow_direct_io"], OFlags::empty()),
    ] {
        let world = World::new(arguments);
        let mut client = world.client(1);
        let node = client.lookup(1, "file").unwrap();
        client.open(node, asked.bits().cast_signed()).unwrap();
        assert_eq!(host_flags(&world, "file") & asked, passed, "{arguments:?}");
    }
}

#[test]
fn there_are_as_many_slow_threads_as_allowed_and_needed() {
    for (arguments, most) in [
        (&[][..], 8),
        (&["--thread-pool-size=2"], 2),
        (&["--thread-pool-size=0"], 0),
        (&["--thread-pool-size=65536"], 8),
    ] {
        let world = World::new(arguments);
        let mut client = world.client(8);
        let told = world.daemon.log().contains("--thread-pool-size");
        assert_eq!(told, arguments.iter().any(|a| a.ends_with("65536")), "{arguments:?}");
        assert_eq!(world.threads("slow"), 0, "none before they are needed");
        let node = client.lookup(1, "file").unwrap();
        let handle = client.open(node, libc::O_RDWR).unwrap();
        for slot in 0..8 {
            client.add(1, slot, &Message::new(op::FSYNC, node, &[handle, 0])).unwrap();
        }
        client.queues[1].kick();
        for _ in 0..8 {
            let used = client.queues[1].wait(Duration::from_secs(10)).unwrap();
            let slot = usize::try_from(used.cookie).unwrap();
            assert_eq!(client.answer(slot, used.len).unwrap().errno, 0);
        }
        let threads = world.threads("slow");
        assert!(threads <= most && (threads > 0) == (most > 0), "{arguments:?}: {threads}");
    }
}

#[test]
fn the_tag_and_the_queues_are_in_configuration_space() {
    for (arguments, tag, queues) in [
        (&["--tag=myfs"][..], "myfs", 1_u32),
        (
            &["--tag=a-tag-of-thirty-six-characters-in-it", "--num-request-queues=3"],
            "a-tag-of-thirty-six-characters-in-it",
            3,
        ),
    ] {
        let world = World::new(arguments);
        let mut front_end = FrontEnd::connect(world.daemon.socket()).unwrap();
        front_end.negotiate(u64::MAX, u64::MAX).unwrap();
        let config = front_end.get_config(0, 40).unwrap();
        assert_eq!(String::from_utf8_lossy(&config[..36]).trim_end_matches('\0'), tag);
        assert_eq!(config[36..], queues.to_le_bytes());
        if arguments.len() > 1 {
            assert_eq!(front_end.get_queue_num().unwrap(), u64::from(queues) + 1);
        }
    }
}

#[test]
fn the_sockets_group_may_connect() {
    if !rustix::process::geteuid().is_root() {
        return testkit::skip::skip("only root gives sockets to other groups");
    }
    let world = World::new(&["--socket-group=4321"]);
    let meta = fs::metadata(world.daemon.socket()).unwrap();
    assert_eq!((meta.gid(), meta.permissions().mode() & 0o777), (4321, 0o660));
}

/// Whatever umask the daemon is started with.
#[test]
fn nobody_else_may_connect() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let mut command = Command::new("bash");
    command.arg("-c").arg(format!(
        "umask 0; exec {} --sandbox=none --shared-dir={} --socket-path={}",
        bin("virtiofsd").unwrap().display(),
        dir.path().display(),
        socket.display(),
    ));
    let daemon = Daemon::start_command("virtiofsd", command, &socket).unwrap();
    let mode = fs::metadata(daemon.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}");
}

/// A guest that opens all the files it can leaves room for what others want of the share.
#[test]
fn a_guest_with_many_open_files_does_not_lock_the_others_out() {
    let arguments = ["--rlimit-nofile=200", "--timeout=0"];
    let Some(mounted) = Mounted::new(&arguments, BridgeOptions::default()) else { return };
    for i in 0..40 {
        fs::write(mounted.shared(&format!("old{i}")), "x").unwrap();
    }
    let mut open = Vec::new();
    let error = loop {
        match fs::File::create(mounted.path(&format!("new{}", open.len()))) {
            Ok(file) => open.push(file),
            Err(error) => break error,
        }
        assert!(open.len() < 200, "more files than descriptors");
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENFILE));
    assert!(open.len() >= 75, "{} files", open.len());
    // What could not be opened was not made.
    assert!(!mounted.shared(&format!("new{}", open.len())).exists());
    for i in 0..40 {
        let path = mounted.path(&format!("old{i}"));
        assert_eq!(fs::metadata(&path).unwrap().len(), 1);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: the name ends in NUL. (Opening the file first would need a descriptor.)
        assert_eq!(unsafe { libc::truncate(name.as_ptr(), 3) }, 0);
        fs::rename(&path, mounted.path(&format!("moved{i}"))).unwrap();
    }
    (&open[0]).write_all(b"still written").unwrap();
    drop(open);
    assert_eq!(fs::read(mounted.path("new0")).unwrap(), b"still written");
    let listed = fs::read_dir(mounted.mountpoint()).unwrap().count();
    assert_eq!(listed, fs::read_dir(mounted.shared("")).unwrap().count());
}

#[test]
fn the_log_has_as_much_as_asked_for() {
    let lines = |arguments: &[&str]| {
        let world = World::new(arguments);
        drop(world.client(1));
        world.daemon.log().lines().count()
    };
    let (off, error, info) =
        (lines(&["--log-level=off"]), lines(&["--log-level=error"]), lines(&[]));
    let (debug, old) = (lines(&["--log-level=debug"]), lines(&["-d"]));
    assert_eq!((off, error), (0, 0));
    assert!(info > 1 && debug > info && old > info, "{info} {debug} {old}");
}

#[test]
fn a_read_only_share_cannot_be_changed_through_a_mount() {
    let options = BridgeOptions::default();
    let Some(mounted) = Mounted::new(&["--readonly", "--xattr"], options) else { return };
    fs::write(mounted.shared("file"), "contents").unwrap();
    let file = mounted.path("file");
    assert_eq!(fs::read(&file).unwrap(), b"contents");
    let rofs = rustix::io::Errno::ROFS;
    let refused = [
        rustix::fs::open(&file, OFlags::WRONLY, Mode::empty()).map(drop),
        rustix::fs::open(mounted.path("new"), OFlags::CREATE | OFlags::RDWR, Mode::RUSR).map(drop),
        rustix::fs::mkdir(mounted.path("dir"), Mode::RWXU),
        rustix::fs::unlink(&file),
        rustix::fs::chmod(&file, Mode::RUSR),
        rustix::fs::rename(&file, mounted.path("other")),
        rustix::fs::setxattr(&file, "user.x", b"1", XattrFlags::empty()),
    ];
    assert_eq!(refused, [Err(rofs); 7]);
    assert_eq!(fs::read_dir(mounted.shared("")).unwrap().count(), 1);
}

#[test]
fn extended_attributes_are_off_on_or_elsewhere() {
    let options = BridgeOptions::default();
    let set = |mounted: &Mounted| {
        fs::write(mounted.path("file"), "").unwrap();
        rustix::fs::setxattr(mounted.path("file"), "user.key", b"value", XattrFlags::empty())
    };
    let on_host = |mounted: &Mounted, name: &str| {
        let mut value = [0; 16];
        rustix::fs::getxattr(mounted.shared("file"), name, &mut value).map(|n| value[..n].to_vec())
    };
    let Some(off) = Mounted::new(&[], options) else { return };
    assert_eq!(set(&off), Err(rustix::io::Errno::OPNOTSUPP));
    let Some(on) = Mounted::new(&["--xattr"], options) else { return };
    set(&on).unwrap();
    assert_eq!(on_host(&on, "user.key").unwrap(), b"value");
    let map = ["--xattrmap=:map::user.virtiofs.:"];
    let Some(elsewhere) = Mounted::new(&map, options) else { return };
    set(&elsewhere).unwrap();
    assert_eq!(on_host(&elsewhere, "user.virtiofs.user.key").unwrap(), b"value");
    assert!(on_host(&elsewhere, "user.key").is_err());
    let mut names = [0; 64];
    let n = rustix::fs::listxattr(elsewhere.path("file"), &mut names).unwrap();
    assert_eq!(&names[..n], b"user.key\0");
}

/// Maps a file of a page, writes its second byte and syncs.
fn write_mapped(path: &Path) -> io::Result<()> {
    let file = fs::File::options().read(true).write(true).open(path)?;
    let (protection, none) = (libc::PROT_READ | libc::PROT_WRITE, std::ptr::null_mut());
    // SAFETY: a new mapping, anywhere.
    let at = unsafe { libc::mmap(none, 4096, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the page was just mapped for writing.
    unsafe { at.cast::<u8>().wrapping_add(1).write_volatile(9) };
    // SAFETY: as above.
    let synced = unsafe { libc::msync(at, 4096, libc::MS_SYNC) };
    // SAFETY: nothing refers to the mapping.
    unsafe { libc::munmap(at, 4096) };
    if synced == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn a_file_without_page_cache_is_mapped_only_when_allowed() {
    for (arguments, allowed) in [
        (&["--cache=never"][..], false),
        (&["--cache=metadata"], false),
        (&["--cache=never", "--allow-mmap"], true),
        (&["--cache=metadata", "--allow-mmap"], true),
        (&["--cache=auto"], true),
    ] {
        let Some(mounted) = Mounted::new(arguments, BridgeOptions::default()) else { return };
        fs::write(mounted.path("file"), [7; 4096]).unwrap();
        assert_eq!(write_mapped(&mounted.path("file")).is_ok(), allowed, "{arguments:?}");
        let byte = fs::read(mounted.shared("file")).unwrap()[1];
        assert_eq!(byte, if allowed { 9 } else { 7 }, "{arguments:?}");
    }
}
