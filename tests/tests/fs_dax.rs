//! DAX: a QEMU guest reads and writes the host's page cache in place, and never sees a stale byte or a
//! zero that is not in the file.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use testkit::daemon::Daemon;
use testkit::guests::Job;
use testkit::guests::qemu::QemuGuest;
use testkit::toolroot::ToolRoot;

/// QEMU emulates the CPU.
const TIMEOUT: Duration = Duration::from_secs(180);
const IMAGE_BYTES: usize = 8 << 20;
const ODD_BYTES: usize = (3 << 20) + 123;

/// Bytes that no offset error leaves equal.
fn content(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let words = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 32).to_le_bytes()
    });
    words.flatten().take(len).collect()
}

fn sums(dir: &Path, names: &[&str]) -> String {
    let out =
        std::process::Command::new("sha256sum").args(names).current_dir(dir).output().unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout).unwrap()
}

/// The device with a window: QEMU's own virtio-fs has none.
fn guest(root: &'static ToolRoot, socket: &Path) -> QemuGuest {
    let device =
        "vhost-user-test-device-pci,chardev=@,virtio-id=26,num_vqs=2,config_size=40,vq_size=1024";
    QemuGuest::new(root).device_arguments(socket, vec!["-device".to_owned(), device.to_owned()])
}

fn daemon(dir: &Path, shared: &Path, mode: &str) -> Daemon {
    let dax = format!("--dax={mode}");
    let shared = format!("--shared-dir={}", shared.display());
    Daemon::start(
        "virtiofsd",
        &dir.join("fs"),
        &["--tag=shared", "--num-request-queues=1", &dax, &shared],
    )
    .unwrap()
}

fn fill(shared: &Path) {
    fs::write(shared.join("image"), content(IMAGE_BYTES, 1)).unwrap();
    fs::write(shared.join("odd"), content(ODD_BYTES, 2)).unwrap();
    fs::write(shared.join("mapped"), content(4 << 20, 6)).unwrap();
    fs::write(shared.join("small"), content(100, 3)).unwrap();
    fs::write(shared.join("renamed"), content(70_000, 4)).unwrap();
    fs::write(shared.join("empty"), b"").unwrap();
    fs::write(shared.join("sums"), sums(shared, &["image", "odd", "small", "renamed", "empty"]))
        .unwrap();
}

/// Whether process `pid` has `file` mapped: the VMM's own memory map is the proof of DAX.
fn has_mapped(pid: u32, file: &Path) -> bool {
    let inode = std::os::unix::fs::MetadataExt::ino(&fs::metadata(file).unwrap()).to_string();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().any(|line| line.split_whitespace().nth(4) == Some(&inode))
}

fn reads_and_writes_in_place(mode: &str) {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fill(&shared);
    let daemon = daemon(dir.path(), &shared, mode);
    let before = sums(&shared, &["mapped"]);
    let job = Job::named("fs-dax").unwrap().tool("/usr/bin/fio").set("MODE", mode);
    let mut running = guest(root, daemon.socket()).start(&job).unwrap();
    if let Err(error) = running.wait_for("ready-for-host", TIMEOUT) {
        panic!("{error:#}\n{}\ndaemon:\n{}", running.console(), daemon.log());
    }

    let image = shared.join("image");
    assert!(has_mapped(running.pid(), &image), "the image is not mapped into the VMM");
    let odd_is_mapped = has_mapped(running.pid(), &shared.join("odd"));
    assert_eq!(
        odd_is_mapped,
        mode == "always",
        "a file that ends inside a page is mapped only where all are"
    );
    let mut seen = [0; 20];
    let file = fs::OpenOptions::new().read(true).write(true).open(&image).unwrap();
    file.read_exact_at(&mut seen, 3_000_000).unwrap();
    assert_eq!(&seen, b"WRITTEN BY THE GUEST");
    let odd = fs::read(shared.join("odd")).unwrap();
    assert_eq!(odd.len(), ODD_BYTES, "what the guest writes past the end stays out of the file");
    assert_eq!(&odd[3_145_800..3_145_803], b"ODD");
    let sum = fs::read_to_string(shared.join("growing.sum")).unwrap();
    assert_eq!(sums(&shared, &["growing"]), sum, "what the guest grew is what the host has");
    let sum = fs::read_to_string(shared.join("mapped.sum")).unwrap();
    assert_eq!(sums(&shared, &["mapped"]), sum, "what the guest stored is what the host has");
    assert_ne!(sum, before, "the guest stored nothing");
    assert!(has_mapped(running.pid(), &shared.join("mapped")), "stored by requests");
    // The guest sees at once what the host writes into a mapped page.
    file.write_all_at(b"WRITTEN BY THE HOST", 4_000_000).unwrap();
    fs::write(shared.join("host-is-done"), b"").unwrap();
    let result = running.wait(TIMEOUT).unwrap();
    result.expect_success();
}

#[test]
fn every_file_is_mapped_with_dax_always() {
    reads_and_writes_in_place("always");
}

#[test]
fn only_marked_files_are_mapped_with_dax_inode() {
    reads_and_writes_in_place("inode");
}

/// Two guests that read the same file share its pages.
#[test]
fn two_guests_share_one_copy() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("image"), content(64 << 20, 5)).unwrap();
    let script = "mkdir -p /mnt/s; mount -t virtiofs -o dax=inode shared /mnt/s\n\
                  before=$(sed -n 's/^Cached: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)\n\
                  sha256sum /mnt/s/image >/dev/null\n\
                  after=$(sed -n 's/^Cached: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)\n\
                  echo \"result grown $((after - before))\"\necho ready\n\
                  while [ ! -e /mnt/s/done ]; do sleep 0.1; done\n";
    let mut daemons = Vec::new();
    let mut guests = Vec::new();
    for name in ["a", "b"] {
        let place = dir.path().join(name);
        fs::create_dir(&place).unwrap();
        let daemon = daemon(&place, &shared, "inode");
        guests.push(guest(root, daemon.socket()).start(&Job::from_script(script)).unwrap());
        daemons.push(daemon);
    }
    for guest in &mut guests {
        guest.wait_for("ready", TIMEOUT).unwrap();
    }
    for guest in &guests {
        let shared_kib = mapped_kib(guest.pid(), "image");
        assert!(shared_kib.0 > 60 << 10, "{} KiB of the image are mapped", shared_kib.0);
        assert!(shared_kib.1 < 1 << 10, "{} KiB of the image are a private copy", shared_kib.1);
    }
    fs::write(shared.join("done"), b"").unwrap();
    for guest in guests {
        let result = guest.wait(TIMEOUT).unwrap();
        result.expect_success();
        let grown: i64 = result.value("grown").unwrap().parse().unwrap();
        assert!(grown < 8 << 10, "the guest's own page cache grew by {grown} KiB");
    }
}

/// Resident and anonymous KiB of the mappings of files called `name`.
fn mapped_kib(pid: u32, name: &str) -> (u64, u64) {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut inside, mut resident, mut private) = (false, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        if first.contains('-') {
            inside = line.ends_with(&format!("/{name}"));
        } else if inside {
            let kib: u64 = words.next().and_then(|w| w.parse().ok()).unwrap_or(0);
            match first {
                "Rss:" => resident += kib,
                "Anonymous:" => private += kib,
                _ => {}
            }
        }
    }
    (resident, private)
}

/// An operator's impossible window is refused before there is a socket.
#[test]
fn windows_that_would_end_the_vmm_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let shared = format!("--shared-dir={}", dir.path().display());
    let socket = dir.path().join("s");
    for (arguments, word) in [
        (vec!["--dax=inode", "--dax-window=512M"], "--dax-vmm=plain"),
        (vec!["--dax=inode", "--dax-window=100M"], "power of two"),
        (vec!["--dax=always", "--readonly"], "--readonly"),
    ] {
        let started = Instant::now();
        let out = std::process::Command::new(testkit::daemon::bin("virtiofsd").unwrap())
            .args(["--tag=t", &shared])
            .arg(format!("--socket-path={}", socket.display()))
            .args(&arguments)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{arguments:?}: {error}");
        assert!(error.contains(word), "{arguments:?}: {error}");
        assert!(!socket.exists() && started.elapsed() < Duration::from_secs(5));
    }
}
