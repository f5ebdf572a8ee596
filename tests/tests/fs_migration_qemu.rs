//! A guest with a shared directory moves from one QEMU to another, each with a `virtiofsd` of its own.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;
use testkit::daemon::Daemon;
use testkit::guests::qemu::QemuGuest;
use testkit::guests::{Job, VirtioId};
use testkit::toolroot::ToolRoot;

/// QEMU emulates the CPU.
const TIMEOUT: Duration = Duration::from_secs(120);

#[test]
fn a_guest_with_open_files_moves_to_another_qemu() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("lines"), "first line\nsecond line\n").unwrap();
    let big: Vec<u8> =
        (0..1_u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(shared.join("big"), big).unwrap();
    let sum = std::process::Command::new("sha256sum").arg(shared.join("big")).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let job = Job::named("fs-migrate").unwrap().set("sum", sum.split(' ').next().unwrap());

    let arguments = [format!("--shared-dir={}", shared.display())];
    let daemon = |name: &str, more: &[&str]| {
        let more = more.iter().map(|argument| (*argument).to_owned());
        let all: Vec<String> = arguments.iter().cloned().chain(more).collect();
        Daemon::start("virtiofsd", &dir.path().join(name), &all).unwrap()
    };
    let from = daemon("from", &["--migration-verify-handles", "--migration-confirm-paths"]);
    let to = daemon("to", &[]);
    let qemu = |daemon: &Daemon| {
        QemuGuest::new(root).cpus(1).memory_mib(192, 192).device(daemon.socket(), VirtioId::Fs)
    };
    let mut source = qemu(&from).start(&job).unwrap();
    let destination = qemu(&to).argument("-incoming").argument("defer").start(&job).unwrap();
    let uri = format!("unix:{}", dir.path().join("migration").display());
    destination.qmp().unwrap().execute("migrate-incoming", &json!({ "uri": uri })).unwrap();

    let start = Instant::now();
    while !shared.join("ready").exists() {
        assert!(!source.has_ended().unwrap() && start.elapsed() < TIMEOUT, "{}", source.console());
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut monitor = source.qmp().unwrap();
    let moving = Instant::now();
    monitor.migrate(&uri).unwrap();
    println!("moved in {:?}", moving.elapsed());
    source.kill();
    drop(from);
    fs::write(shared.join("moved"), "").unwrap();
    let result = destination.wait(TIMEOUT).unwrap();
    result.expect_success();
    assert!(result.value("rounds").unwrap().parse::<u32>().unwrap() > 0);
    let log = fs::read_to_string(shared.join("work/renamed")).unwrap();
    assert_eq!(log, "before the move\nafter the move\n");
    assert_eq!(fs::read_to_string(shared.join("new/file")).unwrap(), "here\n");
}
