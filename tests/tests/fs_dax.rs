//! DAX: a QEMU guest reads and writes the host's page cache in place, and never sees a stale byte or a
//! zero that is not in the file.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use testkit::daemon::{Daemon, bin, copy_program};
use testkit::dax_story::{answer, content, question};
use testkit::guests::qemu::QemuGuest;
use testkit::guests::{Job, RunningGuest};
use testkit::page_cache::resident_pages;
use testkit::toolroot::ToolRoot;

/// QEMU emulates the CPU.
const TIMEOUT: Duration = Duration::from_secs(180);
const IMAGE_BYTES: usize = 8 << 20;
const ODD_BYTES: usize = (3 << 20) + 123;

fn sums(dir: &Path, names: &[&str]) -> String {
    let out =
        std::process::Command::new("sha256sum").args(names).current_dir(dir).output().unwrap();
    assert!(out.status.success());
    String::from_utf8(out.stdout).unwrap()
}

/// What the README says between `before` and `after` in its section on DAX.
fn readme(before: &str, after: &str) -> String {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md"));
    let readme = readme.unwrap();
    let section = readme.split_once("**DAX**").expect("the README has a section on DAX").1;
    let (_, rest) = section.split_once(before).expect("it has the command");
    format!("{before}{}", rest.split_once(after).unwrap().0)
}

/// What it tells a user to add to QEMU's command line: the device with a window, which QEMU's own virtio-fs
/// lacks. Its character device is called `fs` there.
fn device_of_the_readme() -> String {
    let device = readme("vhost-user-test-device-pci,", "`");
    assert!(device.contains("chardev=fs,"), "{device}");
    device.replace("chardev=fs,", "chardev=@,")
}

/// The daemon that it has a user start, but for the paths.
fn daemon_of_the_readme(dir: &Path, shared: &Path) -> Daemon {
    let line = readme("virtiofsd --socket-path=/run/fs.sock ", "\n");
    let line = line.replace("/srv/share", &shared.display().to_string());
    Daemon::start("virtiofsd", &dir.join("fs"), &line.split(' ').skip(2).collect::<Vec<_>>())
        .unwrap()
}

fn guest(root: &'static ToolRoot, socket: &Path) -> QemuGuest {
    let device = device_of_the_readme();
    QemuGuest::new(root).device_arguments(socket, vec!["-device".to_owned(), device])
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

/// The image of the sharing test, MiB: as large as the window.
const SHARED_MIB: u64 = 256;

/// Two guests that read the same file share its pages: the host's page cache has them once, the guests' have
/// not got them. Daemons, device and mount are the README's, word for word.
#[test]
fn two_guests_share_one_copy_of_256_mib() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let image = shared.join("image");
    let bytes = content(usize::try_from(SHARED_MIB << 20).unwrap(), 5);
    fs::write(&image, &bytes).unwrap();
    fs::write(dir.path().join("end"), &bytes[255 << 20..]).unwrap();
    // As `sha256sum` prints it of a pipe.
    let end = sums(dir.path(), &["end"]).replace("  end\n", "  -");
    let mount = readme("mount -t virtiofs -o dax=inode ", "`");
    let script = "$MOUNT\n\
                  cached() { sed -n 's/^Cached: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo; }\n\
                  before=$(cached)\n\
                  dd if=/mnt/image of=/dev/null bs=1M 2>/dev/null\n\
                  echo \"result grown $(($(cached) - before))\"\n\
                  [ \"$(dd if=/mnt/image bs=1M skip=255 2>/dev/null | sha256sum)\" = \"$END\" ]\n\
                  echo ready\n\
                  while [ ! -e /mnt/done ]; do sleep 0.1; done\n";
    let mut daemons = Vec::new();
    let mut guests = Vec::new();
    for name in ["a", "b"] {
        let place = dir.path().join(name);
        fs::create_dir(&place).unwrap();
        let daemon = daemon_of_the_readme(&place, &shared);
        let job = Job::from_script(script).set("MOUNT", &mount).set("END", &end);
        guests.push(guest(root, daemon.socket()).start(&job).unwrap());
        daemons.push(daemon);
    }
    for guest in &mut guests {
        guest.wait_for("ready", TIMEOUT).unwrap();
    }
    let all_kib = SHARED_MIB << 10;
    let mapped = mapped_at_rest(&guests, "image");
    println!("{mapped:?} of {all_kib} KiB");
    for mapped in &mapped {
        // The guest's kernel gives some ranges back so as to have a fifth of its window free.
        assert!(mapped.resident > all_kib * 6 / 10, "{mapped:?}");
        assert!(mapped.anonymous < 1 << 10, "a private copy: {mapped:?}");
    }
    // Each VMM is charged for its part of every page; two copies would be more than the file has.
    let charged: u64 = mapped.iter().map(|mapped| mapped.proportional).sum();
    assert!(charged <= all_kib + 1024, "{mapped:?}");
    let resident = resident_pages(&image).unwrap();
    assert_eq!(resident, SHARED_MIB << 8, "pages of the image in the host's page cache");
    fs::write(shared.join("done"), b"").unwrap();
    for guest in guests {
        let result = guest.wait(TIMEOUT).unwrap();
        result.expect_success();
        let grown: i64 = result.value("grown").unwrap().parse().unwrap();
        println!("the guest's own page cache grew by {grown} KiB");
        assert!(grown < 8 << 10, "the guest's own page cache grew by {grown} KiB");
    }
}

/// What a process has mapped of a file, KiB.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mapped {
    resident: u64,
    /// Its part, where several processes have a page.
    proportional: u64,
    anonymous: u64,
}

/// What each of `guests` has mapped of `name`, once that has been the same for a while: a guest's kernel gives ranges back
/// in the background.
fn mapped_at_rest(guests: &[RunningGuest], name: &str) -> Vec<Mapped> {
    let deadline = Instant::now() + TIMEOUT;
    let mut before = Vec::new();
    loop {
        let now: Vec<Mapped> = guests.iter().map(|guest| mapped_kib(guest.pid(), name)).collect();
        if now == before {
            return now;
        }
        assert!(Instant::now() < deadline, "the guests do not come to rest: {now:?}");
        before = now;
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The mappings of files called `name` of process `pid`.
fn mapped_kib(pid: u32, name: &str) -> Mapped {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut inside, mut sum) = (false, Mapped::default());
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or("");
        if first.contains('-') {
            inside = line.ends_with(&format!("/{name}"));
        } else if inside {
            let kib: u64 = words.next().and_then(|w| w.parse().ok()).unwrap_or(0);
            match first {
                "Rss:" => sum.resident += kib,
                "Pss:" => sum.proportional += kib,
                "Anonymous:" => sum.anonymous += kib,
                _ => {}
            }
        }
    }
    sum
}

/// Steps of the checker in the guest; `OUTBOARD_DAX_STEPS` asks for more, `OUTBOARD_DAX_SEED` for others.
fn from_environment(name: &str, usual: u64) -> u64 {
    std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

/// A program in the guest does at random what programs do to mapped files, and compares; so does the host,
/// while the files are mapped and afterwards. The program itself runs from the share.
fn random_operations_of_a_guest(mode: &str, floor: u64, steps: u64) {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::copy(bin("guest_dax").unwrap(), shared.join("guest_dax")).unwrap();
    let steps = from_environment("OUTBOARD_DAX_STEPS", steps);
    let seed = from_environment("OUTBOARD_DAX_SEED", 1);
    let script = format!(
        "mkdir -p /mnt/s; mount -t virtiofs -o dax={mode} shared /mnt/s\n\
         /mnt/s/guest_dax /mnt/s {floor} {steps} {seed}\numount /mnt/s\n"
    );
    let job = Job::from_script(&script).tool("/usr/lib/x86_64-linux-gnu/libgcc_s.so.1");
    let daemon = daemon(dir.path(), &shared, mode);
    let mut running = guest(root, daemon.socket()).start(&job).unwrap();
    let (mut asked, mut mapped, start) = (1, false, Instant::now());
    let timeout = TIMEOUT + Duration::from_millis(steps * 100);
    while !running.has_ended().unwrap() && start.elapsed() < timeout {
        if shared.join(question(asked)).exists() {
            mapped |=
                (0..3).any(|n| has_mapped(running.pid(), &shared.join(format!("subject-{n}"))));
            if let Err(error) = answer(&shared, asked) {
                panic!("{error:#}\n{}", running.console());
            }
            asked += 1;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let result = running.wait(timeout).unwrap();
    result.expect_success();
    let count = |name: &str| result.value(name).unwrap().parse::<u64>().unwrap();
    println!("{}", result.console);
    assert_eq!(count("questions") + 1, asked);
    assert!(mapped, "nothing was mapped");
    for what in ["sigbus", "from_map", "into_map", "renamed", "unlinked", "holes", "private"] {
        assert!(count(what) > 0, "{what} never happened");
    }
}

#[test]
fn random_operations_of_a_guest_with_dax_always() {
    random_operations_of_a_guest("always", 0, 600);
}

#[test]
fn random_operations_of_a_guest_with_dax_inode() {
    random_operations_of_a_guest("inode", 2 << 20, 250);
}

/// Trap: QEMU ends above 512 memory regions, and without CONFIGURE_MEM_SLOTS refuses the ninth. More files than
/// the window has room for, each with two mappings, and all of them are right.
#[test]
fn qemu_survives_a_window_that_is_full() {
    const FILES: u64 = 160;
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    let names: Vec<String> = (0..FILES).map(|n| format!("file{n}")).collect();
    for (seed, name) in (0..).zip(&names) {
        fs::write(shared.join(name), content(5000 + usize::try_from(seed).unwrap(), seed)).unwrap();
    }
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    fs::write(shared.join("sums"), sums(&shared, &names)).unwrap();
    let script = "mkdir -p /mnt/s; mount -t virtiofs -o dax=always shared /mnt/s; cd /mnt/s\n\
                  sha256sum -c sums >/dev/null; echo all-read\n\
                  while [ ! -e done ]; do sha256sum -c sums >/dev/null; done\n\
                  cd /; umount /mnt/s\n";
    let daemon = daemon(dir.path(), &shared, "always");
    let mut running = guest(root, daemon.socket()).start(&Job::from_script(script)).unwrap();
    running.wait_for("all-read", TIMEOUT).unwrap();
    // Of 128 ranges the guest's kernel keeps a fifth free, and gives some more back at a time: it is full
    // now and again.
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let maps = fs::read_to_string(format!("/proc/{}/maps", running.pid())).unwrap();
        let files = maps.lines().filter(|line| line.contains("/file")).count();
        let tails = maps.lines().filter(|line| line.contains("dax-tails")).count();
        if files > 100 && tails > 100 {
            break;
        }
        let late = Instant::now() > deadline;
        assert!(!late, "{files} files and {tails} last pages are mapped");
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::write(shared.join("done"), b"").unwrap();
    running.wait(TIMEOUT).unwrap().expect_success();
}

/// A guest that is not to write: its kernel does not, and what it does all the same ends at QEMU's mapping
/// or at the daemon. (QEMU maps only what is open for writing, so there the directory cannot be shared
/// read-only as a whole; files that cannot be opened so are read without DAX.)
#[test]
fn a_guest_reads_a_file_that_qemu_cannot_map() {
    let Some(root) = ToolRoot::for_test() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    fs::create_dir(&shared).unwrap();
    // A program that runs on the host cannot be opened for writing there.
    let program = shared.join("program");
    copy_program(Path::new("/bin/sleep"), &program, Some(4 << 20)).unwrap();
    fs::write(shared.join("image"), content(4 << 20, 9)).unwrap();
    fs::write(shared.join("sums"), sums(&shared, &["program", "image"])).unwrap();
    let mut sleeping = std::process::Command::new(&program).arg("600").spawn().unwrap();
    let script = "mkdir -p /mnt/s; mount -t virtiofs -o ro,dax=inode shared /mnt/s; cd /mnt/s\n\
                  sha256sum -c sums; ! echo x 2>/dev/null >>image; echo all-read\n\
                  while [ ! -e done ]; do sleep 0.1; done\n";
    let daemon = daemon(dir.path(), &shared, "inode");
    let mut running = guest(root, daemon.socket()).start(&Job::from_script(script)).unwrap();
    let read = running.wait_for("all-read", TIMEOUT);
    let mapped = ["program", "image"].map(|name| has_mapped(running.pid(), &shared.join(name)));
    fs::write(shared.join("done"), b"").unwrap();
    sleeping.kill().unwrap();
    sleeping.wait().unwrap();
    read.unwrap();
    running.wait(TIMEOUT).unwrap().expect_success();
    assert_eq!(mapped, [false, true]);
}

/// An operator's impossible window, and what has no effect with DAX, is refused before there is a socket.
#[test]
fn windows_that_would_end_the_vmm_and_options_without_effect_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let shared = format!("--shared-dir={}", dir.path().display());
    let socket = dir.path().join("s");
    for (arguments, word) in [
        (vec!["--dax=inode", "--dax-window=512M"], "--dax-vmm=plain"),
        (vec!["--dax=inode", "--dax-window=100M"], "power of two"),
        (vec!["--dax=always", "--readonly"], "--readonly"),
        (vec!["--dax=always", "--dax-timeout=0"], "86400"),
        (vec!["--dax=inode", "--migration-mode=find-paths"], "--migration-mode: a guest that"),
        (vec!["--dax=inode", "--migration-on-error=abort"], "--migration-on-error: a guest that"),
        (vec!["--dax=always", "--migration-verify-handles"], "cannot be migrated"),
        (vec!["--dax=always", "--migration-confirm-paths"], "leave one of them out"),
    ] {
        let started = Instant::now();
        let out = std::process::Command::new(bin("virtiofsd").unwrap())
            .args(["--tag=t", &shared])
            .arg(format!("--socket-path={}", socket.display()))
            .args(&arguments)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1), "{arguments:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{arguments:?}: {error}");
        assert!(error.contains(word), "{arguments:?}: {error}");
        assert!(!socket.exists() && started.elapsed() < Duration::from_secs(5));
    }
}
