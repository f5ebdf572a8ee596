//! virtiofsd as a file system of the host, through the fuse bridge.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::cargo_tool;
use testkit::daemon::{Daemon, copy_program};
use testkit::fuse_bridge::{BridgeOptions, FuseBridge};
use testkit::mounted::Mounted;
use testkit::skip::skip;

#[test]
fn files_made_through_the_mount_are_on_the_host_and_back() {
    for queues in [1, 3] {
        let options = BridgeOptions { queues, ..BridgeOptions::default() };
        let Some(mut mounted) = Mounted::new(&["--xattr"], options) else { return };
        fs::create_dir(mounted.path("d")).unwrap();
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        fs::write(mounted.path("d/file"), &data).unwrap();
        assert!(fs::read(mounted.shared("d/file")).unwrap() == data);
        fs::write(mounted.shared("d/other"), &data).unwrap();
        assert!(fs::read(mounted.path("d/other")).unwrap() == data);
        symlink("d/file", mounted.path("link")).unwrap();
        fs::hard_link(mounted.path("d/file"), mounted.path("hard")).unwrap();
        assert_eq!(fs::metadata(mounted.path("hard")).unwrap().nlink(), 2);
        assert_eq!(
            fs::metadata(mounted.path("link")).unwrap().ino(),
            fs::metadata(mounted.path("hard")).unwrap().ino()
        );
        fs::rename(mounted.path("d"), mounted.path("e")).unwrap();
        let names: Vec<_> =
            fs::read_dir(mounted.path("e")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2);
        fs::remove_dir_all(mounted.path("e")).unwrap();
        assert!(!mounted.shared("e").exists());
        assert!(mounted.daemon().is_running());
    }
}

/// Cases of pjdfstest that do not pass through the mount though they pass on the host's file system, each
/// with the reason.
const PJDFSTEST_EXCEPTIONS: &[(&str, &str)] = &[(
    "link::link_count_max",
    "skipped: the C library derives LINK_MAX from the type of the file system, and knows none for FUSE",
)];

const PJDFSTEST_CONFIG: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// The program of a crate, or `None` after the test was counted as skipped.
fn tool(name: &str, version: &str) -> Option<PathBuf> {
    match cargo_tool::installed(name, version) {
        Ok(program) => Some(program),
        Err(error) => {
            skip(&format!("no {name}: {error:#}"));
            None
        }
    }
}

/// Each case with its result (`ok`, `FAILED`, `skipped`) in `dir`, and all that was printed.
fn pjdfstest(program: &Path, dir: &Path, config: &Path) -> (BTreeMap<String, String>, String) {
    let output = Command::new(program)
        .arg("-c")
        .arg(config)
        .arg("-p")
        .arg(dir)
        .args(["-s", "/dev/shm"])
        .current_dir("/")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("Summary:"), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let cases: BTreeMap<String, String> = text
        .lines()
        .filter(|line| !line.starts_with(char::is_whitespace))
        .filter_map(|line| line.split_once(char::is_whitespace))
        .map(|(name, result)| (name.to_owned(), result.trim().to_owned()))
        .collect();
    let passed = cases.values().filter(|result| *result == "ok").count();
    assert!(passed > 300, "only {passed} cases passed: {text}");
    (cases, text)
}

#[test]
fn pjdfstest_passes_where_it_passes_on_the_host() {
    let Some(program) = tool("pjdfstest", "0.2.2") else { return };
    let host = tempfile::tempdir().unwrap();
    fs::set_permissions(host.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let config = host.path().join("pjdfstest.toml");
    fs::write(&config, PJDFSTEST_CONFIG).unwrap();
    let place = host.path().join("place");
    fs::create_dir(&place).unwrap();
    let arguments: [&[&str]; 5] = [
        &[],
        &["--cache=never"],
        &["--cache=always", "--writeback", "--inode-file-handles=never"],
        &["--posix-acl", "--killpriv-v2", "--xattr"],
        &["--cache=metadata", "--killpriv-v2", "--no-readdirplus", "--thread-pool-size=0"],
    ];
    let mut baseline = None;
    for arguments in arguments {
        let options = BridgeOptions { queues: 2, ..BridgeOptions::default() };
        let Some(mut mounted) = Mounted::new(arguments, options) else { return };
        let on_host = baseline.get_or_insert_with(|| pjdfstest(&program, &place, &config).0);
        let (cases, text) = pjdfstest(&program, mounted.mountpoint(), &config);
        let passes = |case: &str| cases.get(case).is_some_and(|result| result == "ok");
        let excepted = |case: &str| PJDFSTEST_EXCEPTIONS.iter().any(|(name, _)| *name == case);
        let news: Vec<&String> = on_host
            .iter()
            .filter(|(case, result)| *result == "ok" && !passes(case) && !excepted(case))
            .map(|(case, _)| case)
            .collect();
        assert!(news.is_empty(), "{arguments:?}: {news:#?} pass on the host alone:\n{text}");
        for (case, _) in PJDFSTEST_EXCEPTIONS {
            assert!(!passes(case), "{arguments:?}: {case} passes and needs no exception");
        }
        assert!(mounted.daemon().is_running());
    }
}

/// A guest's kernel refuses to change a program that runs. Were truncation left to OPEN, it would refuse
/// after the daemon had emptied the file.
#[test]
fn a_running_program_keeps_its_contents() {
    use rustix::fs::{Mode, OFlags};
    let Some(mounted) = Mounted::new(&[], BridgeOptions::default()) else { return };
    let program = mounted.path("sleep");
    copy_program(Path::new("/bin/sleep"), &program, None).unwrap();
    let size = fs::metadata(&program).unwrap().len();
    let mut running = Command::new(&program).arg("30").spawn().unwrap();
    let refused: Vec<_> = [OFlags::WRONLY, OFlags::RDWR, OFlags::RDONLY | OFlags::TRUNC]
        .map(|flags| rustix::fs::open(&program, flags, Mode::empty()).map(drop))
        .into();
    let after = fs::metadata(mounted.shared("sleep")).unwrap().len();
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(refused, [Err(rustix::io::Errno::TXTBSY); 3]);
    assert_eq!(after, size);
}

/// What the suites do not try, with the daemon confined as it is by default.
#[test]
fn the_rarer_operations_work_inside_the_sandbox() {
    use rustix::fs::{
        AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, SeekFrom, XattrFlags,
    };
    let arguments = ["--xattr", "--posix-acl", "--killpriv-v2", "--allow-direct-io"];
    let Some(mounted) = Mounted::new(&arguments, BridgeOptions::default()) else { return };
    let (file, other, link) = (mounted.path("file"), mounted.path("other"), mounted.path("link"));
    fs::write(&file, "contents").unwrap();
    symlink("nowhere", &link).unwrap();
    // Extended attributes, also of a link.
    rustix::fs::setxattr(&file, "user.key", b"value", XattrFlags::CREATE).unwrap();
    // Of a link only `trusted` ones could be set, and for those the daemon has not the capability.
    let refused = rustix::fs::lsetxattr(&link, "trusted.key", b"x", XattrFlags::empty());
    assert_eq!(refused, Err(rustix::io::Errno::PERM));
    let mut value = [0; 64];
    let n = rustix::fs::getxattr(mounted.shared("file"), "user.key", &mut value).unwrap();
    assert_eq!(&value[..n], b"value");
    let n = rustix::fs::listxattr(&file, &mut value).unwrap();
    assert_eq!(&value[..n], b"user.key\0");
    rustix::fs::removexattr(&file, "user.key").unwrap();
    // A file without a name, named afterwards.
    let nameless =
        rustix::fs::open(mounted.mountpoint(), OFlags::TMPFILE | OFlags::RDWR, Mode::RUSR).unwrap();
    rustix::io::write(&nameless, b"named later").unwrap();
    let proc = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&nameless));
    rustix::fs::linkat(CWD, proc, CWD, &other, AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_eq!(fs::read(mounted.shared("other")).unwrap(), b"named later");
    rustix::fs::renameat_with(CWD, &file, CWD, &other, RenameFlags::EXCHANGE).unwrap();
    assert_eq!(fs::read(&other).unwrap(), b"contents");
    assert!(rustix::fs::renameat_with(CWD, &file, CWD, &other, RenameFlags::NOREPLACE).is_err());
    // Holes, space, ranges, and what reaches the disk.
    let sparse = fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(mounted.path("sparse"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"far", 1 << 20).unwrap();
    sparse.sync_all().unwrap();
    assert_eq!(rustix::fs::seek(&sparse, SeekFrom::Data(0)).unwrap(), 1 << 20);
    rustix::fs::fallocate(&sparse, FallocateFlags::empty(), 0, 8192).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&sparse, punch, 0, 4096).unwrap();
    let target = fs::File::create(mounted.path("target")).unwrap();
    let n = rustix::fs::copy_file_range(&sparse, Some(&mut (1 << 20)), &target, None, 100).unwrap();
    assert_eq!(n, 3);
    assert_eq!(fs::read(mounted.shared("target")).unwrap(), b"far");
    rustix::fs::syncfs(&sparse).unwrap();
    let direct =
        rustix::fs::open(mounted.path("sparse"), OFlags::DIRECT | OFlags::RDONLY, Mode::empty());
    drop(direct.unwrap());
    assert!(rustix::fs::statvfs(mounted.mountpoint()).unwrap().f_blocks > 0);
    // Gone from the directory, still there for who has it open.
    fs::remove_file(mounted.path("sparse")).unwrap();
    assert_eq!(sparse.metadata().unwrap().nlink(), 0);
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"x", 0).unwrap();
    // Inherited ACL: user::rw- group::rw- other::r--.
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions) in [(1_u16, 6_u16), (4, 6), (0x20, 4)] {
        acl.extend(tag.to_le_bytes().into_iter().chain(permissions.to_le_bytes()));
        acl.extend(u32::MAX.to_le_bytes());
    }
    fs::create_dir(mounted.path("acl")).unwrap();
    rustix::fs::setxattr(
        mounted.path("acl"),
        "system.posix_acl_default",
        &acl,
        XattrFlags::empty(),
    )
    .unwrap();
    let made = rustix::fs::open(
        mounted.path("acl/file"),
        OFlags::CREATE | OFlags::RDWR,
        Mode::from_raw_mode(0o666),
    );
    drop(made.unwrap());
    let mode = fs::metadata(mounted.shared("acl/file")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o664);
    let proc = Command::new("stat").arg("-c").arg("%W").arg(&file).output().unwrap();
    assert!(
        String::from_utf8_lossy(&proc.stdout).trim().parse::<i64>().unwrap() > 0,
        "no birth time"
    );
}

#[test]
fn two_guests_exclude_each_other() {
    use rustix::fs::{FlockOperation, fcntl_lock, flock};
    let arguments = ["--posix-lock", "--flock"];
    let Some(first) = Mounted::new(&arguments, BridgeOptions::default()) else { return };
    // A second daemon for the same directory.
    let socket = first.dir().join("second.sock");
    let shared = format!("--shared-dir={}", first.shared("").display());
    let _daemon =
        Daemon::start("virtiofsd", &socket, &[shared.as_str(), arguments[0], arguments[1]])
            .unwrap();
    let mount = first.dir().join("second");
    fs::create_dir(&mount).unwrap();
    let second = FuseBridge::mount(&socket, &mount, BridgeOptions::default()).unwrap();
    fs::write(first.path("file"), "locked").unwrap();
    let open = |path: PathBuf| fs::File::options().read(true).write(true).open(path).unwrap();
    let here = open(first.path("file"));
    let there = open(second.path().join("file"));
    let locks: [fn(&fs::File, FlockOperation) -> rustix::io::Result<()>; 2] =
        [|file, operation| fcntl_lock(file, operation), |file, operation| flock(file, operation)];
    for lock in locks {
        lock(&here, FlockOperation::NonBlockingLockExclusive).unwrap();
        let refused = lock(&there, FlockOperation::NonBlockingLockExclusive).unwrap_err();
        assert!(
            matches!(refused, rustix::io::Errno::AGAIN | rustix::io::Errno::ACCESS),
            "{refused}"
        );
        assert!(lock(&there, FlockOperation::NonBlockingLockShared).is_err());
        // One that waits gets it when the other lets go.
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| lock(&there, FlockOperation::LockExclusive));
            std::thread::sleep(std::time::Duration::from_millis(100));
            assert!(!waiter.is_finished());
            lock(&here, FlockOperation::Unlock).unwrap();
            waiter.join().unwrap().unwrap();
        });
        assert!(lock(&here, FlockOperation::NonBlockingLockExclusive).is_err());
        lock(&there, FlockOperation::Unlock).unwrap();
        lock(&here, FlockOperation::NonBlockingLockShared).unwrap();
        lock(&there, FlockOperation::NonBlockingLockShared).unwrap();
        lock(&here, FlockOperation::Unlock).unwrap();
        lock(&there, FlockOperation::Unlock).unwrap();
    }
}

/// Every operation that fsx has, on a file of up to a megabyte.
const FSX_CONFIG: &str = "
flen = 1048576
[opsize]
max = 131072
[weights]
close_open = 1
invalidate = 1
read = 10
write = 10
mapread = 10
mapwrite = 5
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 2
punch_hole = 3
sendfile = 3
posix_fadvise = 1
copy_file_range = 3
";

/// Operations of one run of fsx. It never unmaps what it read through a mapping, and each truncation
/// visits all mappings of the file: a million operations of one process would take hours, if the kernel's
/// limit of mappings did not end it before.
const FSX_RUN: u64 = 5_000;

/// `OUTBOARD_FSX_OPERATIONS` sets how many for each cache mode; the promise is about a million.
#[test]
fn fsx_finds_no_difference() {
    let Some(program) = tool("fsx", "0.3.2") else { return };
    let operations: u64 =
        std::env::var("OUTBOARD_FSX_OPERATIONS").map_or(FSX_RUN, |text| text.parse().unwrap());
    let arguments: [&[&str]; 3] =
        [&["--cache=auto"], &["--cache=always", "--writeback"], &["--cache=never", "--allow-mmap"]];
    for arguments in arguments {
        let options = BridgeOptions { queues: 2, ..BridgeOptions::default() };
        let Some(mounted) = Mounted::new(arguments, options) else { return };
        let config = mounted.dir().join("fsx.toml");
        fs::write(&config, FSX_CONFIG).unwrap();
        let start = std::time::Instant::now();
        for seed in 1..=operations.div_ceil(FSX_RUN) {
            fsx(&program, &config, &mounted, seed);
        }
        println!("{arguments:?}: {operations} operations in {:?}", start.elapsed());
    }
}

fn fsx(program: &Path, config: &Path, mounted: &Mounted, seed: u64) {
    let output = Command::new(program)
        .args(["-q", "-N", &FSX_RUN.to_string(), "-S", &seed.to_string()])
        .arg("-f")
        .arg(config)
        .arg("-P")
        .arg(mounted.dir())
        .arg(mounted.path("file"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "seed {seed}: {}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// `OUTBOARD_SCALE_FILES` sets how many; the promise is about a million.
#[test]
fn many_files_cost_the_daemon_few_fds_and_little_memory() {
    let files: u64 =
        std::env::var("OUTBOARD_SCALE_FILES").map_or(30_000, |text| text.parse().unwrap());
    let Some(mut mounted) = Mounted::new(&["--cache=always"], BridgeOptions::default()) else {
        return;
    };
    for n in 0..files {
        let dir = mounted.shared(&(n / 1000).to_string());
        if n % 1000 == 0 {
            fs::create_dir(&dir).unwrap();
        }
        fs::File::create(dir.join(n.to_string())).unwrap();
    }
    let before = mounted.daemon().private_bytes().unwrap();
    let mut seen = 0;
    let mut most_fds = 0;
    for dir in fs::read_dir(mounted.mountpoint()).unwrap() {
        for entry in fs::read_dir(dir.unwrap().path()).unwrap() {
            seen += u64::from(entry.unwrap().metadata().unwrap().is_file());
        }
        most_fds = most_fds.max(mounted.daemon().open_fds().unwrap());
    }
    assert_eq!(seen, files);
    let used = mounted.daemon().private_bytes().unwrap().saturating_sub(before);
    // The kernel may have forgotten some under pressure; buffers of the daemon count as well.
    let per_file = used / files;
    println!("{files} files: {per_file} bytes each, at most {most_fds} fds");
    assert!(most_fds > 10 && used > 0, "measured the wrong process");
    assert!(most_fds < 4096, "{most_fds} fds");
    assert!(per_file < 250, "{per_file} bytes a file");
}
