//! The demo: what a newcomer sees first shows all four devices, and leaves nothing behind however
//! it ends.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use testkit::toolroot::ToolRoot;

/// A person who presses Ctrl-C waits this long at most; a busy machine is slower than a person's.
const LEAVES_WITHIN: Duration = Duration::from_secs(10);

/// The demo of this build, with a directory for its temporary files.
fn demo(temporary: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_demo"));
    command.env("TMPDIR", temporary).stdin(Stdio::null());
    command
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn demo_shows_all_four_devices_and_cleans_up() {
    if ToolRoot::for_test().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = demo(dir.path()).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    let progress = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{table}\n{progress}");
    for device in ["virtiofsd", "vhost-user-blk", "vhost-user-net", "vsock-proxy"] {
        assert!(table.contains(device), "no {device}:\n{table}");
    }
    assert!(table.contains("19 shown, 0 failed, 0 skipped"), "{table}");
    assert!(is_empty(dir.path()), "something is left behind");
}

/// The processes of a group that are left, by name.
fn processes_of(group: u32) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // PID (NAME) STATE PARENT GROUP
        let Some((name, fields)) = stat.rsplit_once(')') else { continue };
        if fields.split_ascii_whitespace().nth(2) == Some(group.to_string().as_str()) {
            found.push(name.to_owned());
        }
    }
    found
}

/// Ctrl-C in a terminal, which every process of the demo gets, after a line of progress has `part`.
fn interrupt_at(part: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mut child = demo(dir.path())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let reached = lines.by_ref().any(|line| line.unwrap().contains(part));
    assert!(reached, "the demo never said {part:?}");
    let interrupted = Instant::now();
    kill_process_group(Pid::from_child(&child), Signal::INT).unwrap();
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    let status = child.wait().unwrap();
    assert!(interrupted.elapsed() < LEAVES_WITHIN, "{part}: {:?}", interrupted.elapsed());
    assert_eq!(status.code(), Some(1), "{part}: {rest:?}");
    assert!(rest.iter().any(|line| line.starts_with("error: interrupted")), "{part}: {rest:?}");
    assert!(is_empty(dir.path()), "{part}: something is left behind");
    assert_eq!(processes_of(child.id()), [""; 0], "{part}: processes are left behind");
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(dir.path().to_str().unwrap()), "{part}: {mounts}");
}

#[test]
fn demo_leaves_nothing_behind_when_it_is_interrupted() {
    if ToolRoot::for_test().is_none() {
        return;
    }
    // The daemons start, the guest boots, it is up, it works.
    for part in ["virtiofsd: ", "booting", "the guest is up", "fio: writes the disk"] {
        interrupt_at(part);
    }
}

#[test]
fn demo_without_packages_says_so_and_shows_the_rest() {
    let (dir, cache) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // No cache, and neither apt-get nor mmdebstrap to fill it with.
    let output = demo(dir.path())
        .env("OUTBOARD_CACHE", cache.path())
        .env_remove("OUTBOARD_MIRROR")
        .env("PATH", dir.path())
        .output()
        .unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("No guest could be booted: "), "{table}");
    assert!(table.contains("OUTBOARD_MIRROR"), "what to do is not said:\n{table}");
    for device in ["virtiofsd", "vhost-user-blk", "vsock-proxy"] {
        let line = table.lines().find(|line| line.starts_with(device)).unwrap_or_default();
        assert!(line.contains("works"), "{device}:\n{table}");
    }
    let network = table.lines().find(|line| line.starts_with("vhost-user-net"));
    assert!(network.is_some_and(|line| line.contains("skipped")), "{table}");
    assert!(is_empty(dir.path()), "something is left behind");
}
