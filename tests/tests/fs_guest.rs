//! `virtiofsd` in guests: what a guest's kernel does with the shared directory.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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
        Self::in_dir(tempfile::tempdir().unwrap(), arguments)
    }

    fn in_dir(dir: tempfile::TempDir, arguments: &[&str]) -> Self {
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

/// `OUTBOARD_MANY_FILES` says how many files (default 20,000). With a million it takes some minutes, and
/// 6 GiB of memory.
#[test]
fn a_guest_that_knows_many_files_costs_little() {
    const EACH: u64 = 10_000;
    let Some(root) = ToolRoot::for_test() else { return };
    let count = std::env::var("OUTBOARD_MANY_FILES");
    let files: u64 = count.map_or(2 * EACH, |count| count.parse().unwrap());
    let share = Share::in_dir(tempfile::tempdir_in("/dev/shm").unwrap(), &[]);
    for file in 0..files {
        let dir = share.path(&format!("many/{}", file / EACH));
        if file % EACH == 0 {
            fs::create_dir_all(&dir).unwrap();
        }
        fs::write(dir.join(file.to_string()), "").unwrap();
    }
    // What the guest's kernel knows of a file takes about 1.5 KiB there.
    let memory_mib = u32::try_from(256 + files * 3 / 1024).unwrap();
    let job = Job::from_script(
        "mkdir /mnt/shared\n\
         mount -t virtiofs shared /mnt/shared\n\
         cd /mnt/shared\n\
         echo \"result files $(ls -lR many | grep -c '^-')\"\n\
         echo ready-for-host\n\
         while [ ! -e host-is-done ]; do sleep 0.1; done\n",
    );
    let before = share.daemon.private_bytes().unwrap();
    let guest = share.uml(root).memory_mib(memory_mib);
    let patience = TIMEOUT + Duration::from_millis(files);
    let start = Instant::now();
    let mut running = guest.start(&job).unwrap();
    running.wait_for("ready-for-host", patience).unwrap();
    let took = start.elapsed();
    let grown = share.daemon.private_bytes().unwrap().saturating_sub(before);
    let fds = share.daemon.open_fds().unwrap();
    let bytes_each = grown / files;
    println!("{files} files: {bytes_each} bytes each, {fds} descriptors; boot and list: {took:?}");
    fs::write(share.path("host-is-done"), "").unwrap();
    let result = running.wait(patience).unwrap();
    result.expect_success();
    assert_eq!(result.value("files"), Some(files.to_string().as_str()));
    // The session itself takes some memory too, whatever the number of files.
    assert!(grown < 250 * files + (2 << 20), "{bytes_each} bytes an inode");
    assert!(fds < 4096, "{fds} descriptors");
}
