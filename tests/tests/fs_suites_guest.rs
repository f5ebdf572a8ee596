//! What people do all day with a file system, in a guest: load of every kind (stress-ng's stressors of
//! files), packages unpacked as a package manager does it, a repository cloned and checked.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::time::Duration;

use testkit::daemon::Daemon;
use testkit::guests::uml::UmlGuest;
use testkit::guests::{GuestResult, Job, VirtioId};
use testkit::toolroot::ToolRoot;

/// Stressors of stress-ng's class `filesystem` that are run, each on files in the shared directory.
const STRESSORS: &[&str] = &[
    "access",
    "acl",
    "chattr",
    "chdir",
    "chmod",
    "chown",
    "copy-file",
    "dentry",
    "dentrycache",
    "dir",
    "dirdeep",
    "dirmany",
    "dnotify",
    "fallocate",
    "fcntl",
    "filehole",
    "filename",
    "filerace",
    "flock",
    "fpunch",
    "fsize",
    "fstat",
    "getdent",
    "hdd",
    "inode-flags",
    "inotify",
    "io",
    "iomix",
    "lease",
    "link",
    "locka",
    "lockf",
    "lockmix",
    "lockofd",
    "metamix",
    "mknod",
    "open",
    "pseek",
    "rename",
    "symlink",
    "sync-file",
    "touch",
    "unlink",
    "utime",
    "xattr",
];
/// Those of them that every run has.
const USUAL: &[&str] = &[
    "acl",
    "dentry",
    "fallocate",
    "filerace",
    "flock",
    "iomix",
    "lockofd",
    "metamix",
    "rename",
    "xattr",
];
/// The others of the class, with the reason why they say nothing about this file system.
const NOT_RUN: &[(&str, &str)] = &[
    ("binderfs", "mounts another file system"),
    ("bind-mount", "mounts the root of the guest again and again"),
    ("dup", "descriptors of /dev/null"),
    ("eventfd", "no files"),
    (
        "fanotify",
        "watches whole mounts of the guest, which its kernel does without the file system",
    ),
    ("fd-fork", "descriptors of /dev/zero"),
    ("fiemap", "FUSE has no FIEMAP"),
    ("file-ioctl", "FUSE passes no such ioctl on to a virtio-fs device"),
    ("handle", "FUSE has no file handles without EXPORT_SUPPORT, which the daemon does not offer"),
    ("ioprio", "priorities of processes"),
    ("procfs", "reads /proc"),
    ("rofs", "looks for read-only file systems of the guest"),
    ("statmount", "the guest's mount table"),
    ("umask", "no files"),
    ("verity", "FUSE has no verity"),
];
/// Those that are also run with locks forwarded to the host. `lockf` and `lockmix` are not: they kill
/// processes that wait for a lock, and Linux's virtio-fs driver cannot tell the daemon to give such a wait up.
const FORWARDED: &[&str] = &["flock", "locka", "lockofd"];

fn guest(arguments: &[&str], job: &Job, timeout: Duration) -> Option<GuestResult> {
    let root = ToolRoot::suites_for_test()?;
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let shared_dir = format!("--shared-dir={}", shared.display());
    let mut all = vec![shared_dir.as_str(), "--tag=shared"];
    all.extend(arguments);
    let mut daemon = Daemon::start("virtiofsd", &dir.path().join("fs.sock"), &all).unwrap();
    let guest = UmlGuest::new(root).memory_mib(512).device(daemon.socket(), VirtioId::Fs);
    let result = guest.run(job, timeout).unwrap();
    assert!(daemon.is_running());
    Some(result)
}

/// Runs `stressors` for `seconds` each; all must end with success.
fn stress(stressors: &[&str], seconds: &str, arguments: &[&str]) {
    let job = Job::named("fs-stress").unwrap();
    let job = job.set("stressors", &stressors.join(" ")).set("seconds", seconds);
    let patience = 60 + stressors.len() as u64 * (5 + 2 * seconds.parse::<u64>().unwrap());
    let Some(result) = guest(arguments, &job, Duration::from_secs(patience)) else { return };
    result.expect_success();
    for stressor in stressors {
        let line = format!("stressor {stressor} 0");
        let ended = result.console.lines().any(|text| text.trim() == line);
        assert!(ended, "{stressor}:\n{}", result.console);
    }
    println!("{} stressors in {:?}", stressors.len(), result.took);
}

/// `OUTBOARD_STRESS_SECONDS` sets how long each of all stressors runs; without it, a few run shortly.
#[test]
fn stressors_find_nothing_wrong() {
    let arguments = ["--xattr", "--posix-acl", "--allow-direct-io"];
    match std::env::var("OUTBOARD_STRESS_SECONDS") {
        Ok(seconds) => stress(STRESSORS, &seconds, &arguments),
        Err(_) => stress(USUAL, "1", &arguments),
    }
}

#[test]
fn stressors_of_locks_find_nothing_wrong_with_forwarded_ones() {
    stress(FORWARDED, "1", &["--posix-lock", "--flock"]);
}

#[test]
fn every_stressor_of_the_class_is_run_or_has_a_reason_not_to() {
    let Some(root) = ToolRoot::suites_for_test() else { return };
    let output =
        root.command("stress-ng").unwrap().args(["--class", "filesystem?"]).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let (_, names) = text.split_once("stressors: ").unwrap();
    let mut there: Vec<&str> = names.split_whitespace().collect();
    let mut known: Vec<&str> =
        STRESSORS.iter().copied().chain(NOT_RUN.iter().map(|(name, _)| *name)).collect();
    there.sort_unstable();
    known.sort_unstable();
    assert_eq!(there, known);
    assert!(USUAL.iter().chain(FORWARDED).all(|name| STRESSORS.contains(name)));
}

/// `OUTBOARD_PACKAGES` names those to be unpacked, of what the tool root keeps; without it, small ones.
#[test]
fn packages_are_unpacked_and_a_repository_is_cloned_and_checked() {
    let packages = std::env::var("OUTBOARD_PACKAGES").unwrap_or("diffutils findutils".to_owned());
    let job = Job::named("fs-unpack").unwrap().set("packages", &packages);
    let Some(result) = guest(&["--xattr"], &job, Duration::from_secs(200)) else { return };
    result.expect_success();
    let files: u32 = result.value("files").unwrap().parse().unwrap();
    assert!(files > 100, "{files} files");
    println!("{packages}: {files} files in {:?}", result.took);
}

/// Each adds to a number that the other adds to as well, under BSD locks and under POSIX locks; then one
/// holds the lock and the other waits for it.
#[test]
fn two_guests_exclude_each_other_by_locks() {
    const ROUNDS: u32 = 40;
    let Some(root) = ToolRoot::suites_for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("number"), "0\n").unwrap();
    fs::write(shared.join("lock"), "").unwrap();
    let argument = format!("--shared-dir={}", shared.display());
    let start = |me: &str| {
        let arguments = [&argument, "--tag=shared", "--flock", "--posix-lock", "--cache=never"];
        let daemon = Daemon::start("virtiofsd", &dir.path().join(me), &arguments).unwrap();
        let job = Job::named("fs-locks").unwrap().set("me", me).set("rounds", &ROUNDS.to_string());
        let guest = UmlGuest::new(root).device(daemon.socket(), VirtioId::Fs).start(&job).unwrap();
        (daemon, guest)
    };
    let (first, second) = (start("1"), start("2"));
    for (_daemon, guest) in [first, second] {
        guest.wait(Duration::from_secs(60)).unwrap().expect_success();
    }
    let number = fs::read_to_string(shared.join("number")).unwrap();
    assert_eq!(number.trim(), (2 * 2 * ROUNDS).to_string(), "additions were lost");
    let order = fs::read_to_string(shared.join("order")).unwrap();
    assert_eq!(order, "bsd 1\nbsd 2\nposix 1\nposix 2\n");
}
