//! `virtiofsd` in guests: what a guest's kernel does with the shared directory.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use testkit::daemon::Daemon;
use testkit::guests::qemu::QemuGuest;
use testkit::guests::uml::UmlGuest;
use testkit::guests::{Job, VirtioId};
use testkit::toolroot::ToolRoot;

/// Far above what a boot takes, so that only a hang reaches it.
const TIMEOUT: Duration = Duration::from_secs(60);
/// QEMU emulates the CPU.
const EMULATED_TIMEOUT: Duration = Duration::from_secs(120);

/// A shared directory with one file in it, and a daemon that serves it.
struct Share {
    daemon: Daemon,
    // Last, so that the daemon's log is there when it is dropped.
    dir: tempfile::TempDir,
}

impl Share {
    fn new(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        fs::create_dir(&shared).unwrap();
        fs::write(shared.join("from-host"), "hello from the host\n").unwrap();
        let shared = format!("--shared-dir={}", shared.display());
        let mut all = vec![shared.as_str(), "--tag=shared"];
        all.extend(arguments);
        let daemon = Daemon::start("virtiofsd", &dir.path().join("fs.sock"), &all).unwrap();
        Self { daemon, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("shared").join(name)
    }

    fn uml(&self, root: &'static ToolRoot) -> UmlGuest {
        UmlGuest::new(root).device(self.daemon.socket(), VirtioId::Fs)
    }
}

fn expect_basics(share: &Share, sum: Option<&str>) {
    let written = fs::read_to_string(share.path("from-guest")).unwrap();
    assert_eq!(written, "hello from the guest\n");
    let moved = share.path("deep/moved");
    assert_eq!(fs::metadata(&moved).unwrap().len(), 4 << 20);
    assert_eq!(Some(&*sha256(&moved)), sum);
}

fn sha256(path: &Path) -> String {
    let output = std::process::Command::new("sha256sum").arg(path).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
}

#[test]
fn uml_mounts_reads_and_writes() {
    let Some(root) = ToolRoot::for_test() else { return };
    let share = Share::new(&[]);
    let result = share.uml(root).run(&Job::named("fs-basic").unwrap(), TIMEOUT).unwrap();
    result.expect_success();
    expect_basics(&share, result.value("sum"));
}

#[test]
fn qemu_mounts_reads_and_writes_on_four_queues() {
    let Some(root) = ToolRoot::for_test() else { return };
    let share = Share::new(&[]);
    let guest = QemuGuest::new(root).device_with(
        share.daemon.socket(),
        VirtioId::Fs,
        "num-request-queues=4",
    );
    let result = guest.run(&Job::named("fs-basic").unwrap(), EMULATED_TIMEOUT).unwrap();
    result.expect_success();
    expect_basics(&share, result.value("sum"));
}
