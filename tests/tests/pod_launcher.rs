//! The launcher: its generated command lines boot guests, it starts again what dies, replaces daemons
//! under a guest, and leaves nothing behind.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use testkit::daemon::bin;
use testkit::driver::RingFormat;
use testkit::driver::blk::{BlkSlot, RequestType, S_OK, request};
use testkit::driver::fs::FsClient;
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::guests::{Job, initrd};
use testkit::loop_device::LoopDevice;
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::toolroot::ToolRoot;

/// Far above what anything here takes, so that only a hang reaches it.
const TIMEOUT: Duration = Duration::from_secs(60);
/// QEMU emulates the CPU.
const EMULATED_TIMEOUT: Duration = Duration::from_secs(180);

/// What a guest does with its devices, whatever VMM it has.
const GUEST_JOB: &str = r#"
mount -t virtiofs work /mnt
[ "$(cat /mnt/from-host)" = "hello from the host" ]
echo "hello from the guest" >/mnt/from-guest
umount /mnt
test -e /dev/vsock
dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
for disk in /dev/vda /dev/vdb; do
    dd if=/tmp/data of=$disk bs=1M conv=fsync 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    dd if=$disk of=/tmp/back bs=1M count=4 2>/dev/null
    cmp /tmp/data /tmp/back
done
[ "$(cat /sys/class/net/eth0/address)" = 52:54:00:12:34:56 ]
ip address add 192.0.2.2/24 dev eth0
ip link set eth0 up
ping -c 2 -W 5 192.0.2.1
"#;

/// A directory with a pod file and what it names.
struct Place(tempfile::TempDir);

/// What a pod needs of the host that only root can give: a block device, a network.
struct HostSide {
    disk: LoopDevice,
    network: NetNs,
}

impl HostSide {
    fn for_test(root: &ToolRoot, place: &Place) -> Option<Self> {
        let backing = place.at("device.img");
        File::create(&backing).unwrap().set_len(64 << 20).unwrap();
        let network = NetNs::for_test(root)?;
        Some(Self { disk: LoopDevice::for_test(&backing)?, network })
    }

    /// Adds a volume of tier `device` and a network card to the pod.
    fn add_to(&self, place: &Place) {
        let (disk, netns) = (self.disk.path().display(), self.network.path());
        let mut file = File::options().append(true).open(place.at("pod.toml")).unwrap();
        write!(
            file,
            "[[volume]]\nname = \"fast\"\ntier = \"device\"\npath = \"{disk}\"\n\
             [[nic]]\nname = \"eth\"\ntap = \"tap0\"\nnetns = \"{}\"\nmac = \"52:54:00:12:34:56\"\n",
            netns.display()
        )
        .unwrap();
    }

    /// Gives the tap, which the pod's daemon made, the host's address.
    fn bring_up(&self, root: &ToolRoot) {
        self.network.ip(root, "address add 192.0.2.1/24 dev tap0").unwrap();
        self.network.ip(root, "link set tap0 up").unwrap();
    }
}

impl Place {
    fn new(guest: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("shared")).unwrap();
        fs::write(dir.path().join("shared/from-host"), "hello from the host\n").unwrap();
        File::create(dir.path().join("disk.img")).unwrap().set_len(64 << 20).unwrap();
        let text = format!(
            "run-dir = \"run\"\n[guest]\n{guest}\n\
             [[volume]]\nname = \"work\"\ntier = \"shared\"\npath = \"shared\"\n\
             [[volume]]\nname = \"disk\"\ntier = \"image\"\npath = \"disk.img\"\n\
             [vsock]\ncid = 5\n"
        );
        fs::write(dir.path().join("pod.toml"), text).unwrap();
        Self(dir)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The guest did what [`GUEST_JOB`] says.
    fn expect_guest_was_here(&self) {
        let text = fs::read_to_string(self.at("shared/from-guest")).unwrap();
        assert_eq!(text, "hello from the guest\n");
        for disk in ["disk.img", "device.img"] {
            let mut start = [0; 4096];
            File::open(self.at(disk)).unwrap().read_exact(&mut start).unwrap();
            assert!(start.iter().any(|byte| *byte != 0), "the guest's data is not on {disk}");
        }
    }
}

/// `outboard run`, up: it has printed the VMM's command.
struct Launcher {
    child: Child,
    place: Place,
    /// What it printed.
    line: String,
}

impl Launcher {
    fn start(place: Place, arguments: &[&str]) -> Self {
        for daemon in ["virtiofsd", "vhost-user-blk", "vsock-proxy"] {
            bin(daemon).unwrap();
        }
        let log = File::create(place.at("launcher.log")).unwrap();
        let mut child = Command::new(bin("outboard").unwrap())
            .arg("run")
            .arg(place.at("pod.toml"))
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let launcher = Self { child, place, line: line.trim_end().to_owned() };
        assert!(!launcher.line.is_empty(), "the pod is not up:\n{}", launcher.log());
        launcher
    }

    fn log(&self) -> String {
        fs::read_to_string(self.place.at("launcher.log")).unwrap_or_default()
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// What `outboard ps --json` says of the device.
    fn device(&self, name: &str) -> serde_json::Value {
        let output = outboard(&["ps", "--json", self.place.at("run").to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        let pods: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let devices = pods[0]["devices"].as_array().unwrap();
        devices.iter().find(|device| device["name"] == name).unwrap().clone()
    }

    fn daemon_pid(&self, name: &str) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.device(name)["pid"].as_i64()?).unwrap())
    }

    /// Stops the pod as systemd would.
    fn terminate(&mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let mut status = None;
        until("the launcher ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = kill_process(self.pid(), Signal::TERM);
            sleep(Duration::from_millis(300));
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "---- the launcher's log\n{}", self.log());
        }
    }
}

/// Runs the launcher, with the daemons it would look for beside itself.
fn outboard(arguments: &[&str]) -> std::process::Output {
    for daemon in ["virtiofsd", "vhost-user-blk", "vsock-proxy"] {
        bin(daemon).unwrap();
    }
    Command::new(bin("outboard").unwrap()).args(arguments).output().unwrap()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !done() {
        assert!(Instant::now() < deadline, "not within {TIMEOUT:?}: {what}");
        sleep(Duration::from_millis(10));
    }
}

/// Runs a printed command line with a shell, where the VMMs and the guests' tools are.
fn paste(root: &ToolRoot, line: &str, job: Option<&Path>, timeout: Duration) -> String {
    let binds: Vec<(&Path, &str)> = job.iter().map(|dir| (*dir, "/job")).collect();
    let out = tempfile::NamedTempFile::new().unwrap();
    let mut child = root
        .command_with("sh", &binds)
        .unwrap()
        .args(["-c", &format!("exec {line}")])
        .env("TMPDIR", "/dev/shm")
        .stdin(Stdio::null())
        .stdout(out.reopen().unwrap())
        .stderr(out.reopen().unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + timeout;
    while child.try_wait().unwrap().is_none() && Instant::now() < deadline {
        sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    let console = fs::read(out.path()).unwrap();
    String::from_utf8_lossy(&console).replace('\r', "")
}

fn expect_success(console: &str) {
    assert!(console.contains("init: job ended with 0"), "the guest's console:\n{console}");
}

#[test]
fn the_command_for_uml_boots_a_guest_with_its_devices() {
    let Some(root) = ToolRoot::for_test() else { return };
    let place = Place::new("memory = \"256M\"");
    let Some(host) = HostSide::for_test(root, &place) else { return };
    host.add_to(&place);
    let job = place.at("job");
    fs::create_dir(&job).unwrap();
    let init = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs/init.sh");
    let files = [
        ("init", fs::read_to_string(init).unwrap()),
        ("job.sh", GUEST_JOB.to_owned()),
        ("variables", "GUEST=uml\n".to_owned()),
    ];
    for (name, text) in files {
        fs::write(job.join(name), text).unwrap();
        fs::set_permissions(job.join(name), Permissions::from_mode(0o755)).unwrap();
    }
    let boot = "root=/dev/root rootfstype=hostfs rootflags=/ ro init=/job/init con=null \
                con0=null,fd:1 noreboot panic=-1 quiet random.trust_cpu=on";
    let arguments: Vec<&str> =
        ["--vmm", "uml", "--"].into_iter().chain(boot.split_ascii_whitespace()).collect();
    let mut launcher = Launcher::start(place, &arguments);
    host.bring_up(root);
    let console = paste(root, &launcher.line, Some(&job), TIMEOUT);
    expect_success(&console);
    launcher.place.expect_guest_was_here();
    assert!(launcher.terminate().success(), "{}", launcher.log());
}

#[test]
fn the_command_for_qemu_boots_a_guest_with_its_devices() {
    let Some(root) = ToolRoot::for_test() else { return };
    let guest = "memory = \"512M\"\ncpus = 2\nkernel = \"kernel\"\ninitrd = \"initrd\"\n\
                 cmdline = \"console=ttyS0 quiet panic=-1 random.trust_cpu=on\"";
    let place = Place::new(guest);
    let Some(host) = HostSide::for_test(root, &place) else { return };
    host.add_to(&place);
    fs::copy(root.host_path("/guest/qemu/vmlinuz"), place.at("kernel")).unwrap();
    let archive = initrd::for_job(root, &Job::from_script(GUEST_JOB)).unwrap();
    fs::write(place.at("initrd"), archive).unwrap();
    let boot = "-accel tcg,thread=multi -cpu max -nodefaults -no-user-config -no-reboot \
                -display none -serial stdio";
    let arguments: Vec<&str> = ["--"].into_iter().chain(boot.split_ascii_whitespace()).collect();
    let mut launcher = Launcher::start(place, &arguments);
    host.bring_up(root);
    let console = paste(root, &launcher.line, None, EMULATED_TIMEOUT);
    expect_success(&console);
    launcher.place.expect_guest_was_here();
    assert!(launcher.terminate().success(), "{}", launcher.log());
}

#[test]
fn a_daemon_that_dies_is_started_again_and_all_is_gone_at_the_end() {
    let mut launcher = Launcher::start(Place::new(""), &[]);
    let mut pids = Vec::new();
    for name in ["work", "disk", "vsock"] {
        let first = launcher.daemon_pid(name).unwrap();
        kill_process(first, Signal::KILL).unwrap();
        until("the daemon is started again", || {
            launcher.device(name)["restarts"] == 1
                && launcher.daemon_pid(name).is_some_and(|pid| pid != first)
        });
        let device = launcher.device(name);
        assert!(device["last_exit"].as_str().unwrap().contains("signal: 9"), "{device}");
        pids.push(launcher.daemon_pid(name).unwrap());
    }
    // It answers again.
    let run_dir = launcher.place.at("run");
    let dir = run_dir.to_str().unwrap();
    let mut table = String::new();
    until("every daemon answers", || {
        let output = outboard(&["top", "--once", "--interval", "100ms", dir]);
        table = String::from_utf8(output.stdout).unwrap();
        table.lines().count() == 4 && !table.contains("down")
    });
    let columns = "POD DEVICE KIND TO GUEST FROM GUEST IOPS P50 P99 DEPTH DROPS";
    let header = table.lines().next().unwrap();
    assert_eq!(header.split_whitespace().collect::<Vec<_>>().join(" "), columns);

    assert!(launcher.terminate().success(), "{}", launcher.log());
    for pid in pids {
        assert!(test_kill_process(pid).is_err(), "a daemon is left behind");
    }
    assert!(!run_dir.exists(), "the run directory is left behind");
    let output = outboard(&["ps", dir]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no pod runs at"), "{output:?}");
}

#[test]
fn daemons_are_replaced_while_their_guest_goes_on() {
    let place = Place::new("");
    // The programs as an operator's package has them: here they can be exchanged.
    let programs = place.at("programs");
    fs::create_dir(&programs).unwrap();
    for name in ["virtiofsd", "vhost-user-blk", "vsock-proxy"] {
        symlink(bin(name).unwrap(), programs.join(name)).unwrap();
    }
    let mut launcher = Launcher::start(place, &["--bin-dir", programs.to_str().unwrap()]);
    let run_dir = launcher.place.at("run");
    let dir = run_dir.to_str().unwrap();

    let ram = GuestRam::new(4 << 20).unwrap();
    let mut front_end = FrontEnd::connect(&run_dir.join("disk.sock")).unwrap();
    let options = AttachOptions::new(RingFormat::Split);
    let (mut queues, _inflight) = front_end.attach(&ram, &options).unwrap();
    let slot = BlkSlot::new(&ram, 4096).unwrap();
    slot.set_data(&[0xa5; 512]);
    assert_eq!(request(&mut queues[0], &slot, (RequestType::OUT, 7, 512), TIMEOUT).unwrap(), S_OK);
    let mut files = FsClient::start(&run_dir.join("work.sock"), 1, 4).unwrap();
    let node = files.lookup(1, "from-host").unwrap();

    let before = ["work", "disk", "vsock"].map(|name| launcher.daemon_pid(name).unwrap());
    let output = outboard(&["upgrade", dir]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        told,
        "pod: work: a newer virtiofsd has taken over\n\
         pod: disk: a newer vhost-user-blk has taken over\n\
         pod: vsock: a newer vsock-proxy has taken over\n"
    );
    let after = ["work", "disk", "vsock"].map(|name| launcher.daemon_pid(name).unwrap());
    assert!(before.iter().zip(&after).all(|(before, after)| before != after));
    for name in ["work", "disk", "vsock"] {
        let device = launcher.device(name);
        assert_eq!((&device["restarts"], &device["upgrades"]), (&0.into(), &1.into()));
    }
    // On the same connections, whoever serves them now.
    slot.set_data(&[0; 512]);
    assert_eq!(request(&mut queues[0], &slot, (RequestType::IN, 7, 512), TIMEOUT).unwrap(), S_OK);
    assert_eq!(slot.data(512), [0xa5; 512]);
    assert_eq!(files.lookup(1, "from-host").unwrap(), node);

    // A newer program that does not even start: the running one goes on.
    fs::remove_file(programs.join("vhost-user-blk")).unwrap();
    symlink("/bin/false", programs.join("vhost-user-blk")).unwrap();
    let output = outboard(&["upgrade", dir]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("disk: the newer vhost-user-blk failed; see "), "{told}");
    assert!(told.contains("work: a newer virtiofsd has taken over"), "{told}");
    assert_eq!(launcher.daemon_pid("disk"), Some(after[1]));
    assert_eq!(request(&mut queues[0], &slot, (RequestType::IN, 7, 512), TIMEOUT).unwrap(), S_OK);
    drop((front_end, files));
    assert!(launcher.terminate().success(), "{}", launcher.log());
    assert!(!run_dir.exists(), "the run directory is left behind");
}

#[test]
fn top_shows_what_a_guest_does_to_its_devices() {
    let mut launcher = Launcher::start(Place::new(""), &[]);
    let run_dir = launcher.place.at("run");
    let ram = GuestRam::new(4 << 20).unwrap();
    let mut front_end = FrontEnd::connect(&run_dir.join("disk.sock")).unwrap();
    let options = AttachOptions::new(RingFormat::Split);
    let (mut queues, _inflight) = front_end.attach(&ram, &options).unwrap();
    let slot = BlkSlot::new(&ram, 4096).unwrap();
    let mut files = FsClient::start(&run_dir.join("work.sock"), 1, 4).unwrap();
    let mut top = Command::new(bin("outboard").unwrap())
        .args(["top", "--once", "--interval", "500ms", run_dir.to_str().unwrap()])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    while top.try_wait().unwrap().is_none() {
        files.lookup(1, "from-host").unwrap();
        let read = request(&mut queues[0], &slot, (RequestType::IN, 0, 4096), TIMEOUT);
        assert_eq!(read.unwrap(), S_OK);
    }
    let table = String::from_utf8(top.wait_with_output().unwrap().stdout).unwrap();
    for (name, kind) in [("work", "fs"), ("disk", "blk")] {
        let row = table.lines().find(|line| line.contains(name)).unwrap();
        let cells: Vec<&str> = row.split_ascii_whitespace().collect();
        let [_, _, of, to, from, requests, p50, p99, depth, drops] = cells[..] else {
            panic!("{table}")
        };
        assert_eq!((of, drops), (kind, "0"), "{table}");
        assert!(requests.parse::<u32>().unwrap() > 0, "{table}");
        assert!(to.ends_with("/s") && from.ends_with("/s") && (to != "0B/s" || kind == "fs"));
        // Measured, and so no "-".
        assert!(p50.ends_with('s') && p99.ends_with('s'), "{table}");
        assert!(depth.parse::<f64>().unwrap() <= 1.0, "one request at a time:\n{table}");
    }
    drop((front_end, files));
    assert!(launcher.terminate().success(), "{}", launcher.log());
}

#[test]
fn a_closed_terminal_stops_the_pod() {
    let mut launcher = Launcher::start(Place::new(""), &[]);
    let daemon = launcher.daemon_pid("disk").unwrap();
    kill_process(launcher.pid(), Signal::HUP).unwrap();
    assert!(launcher.child.wait().unwrap().success(), "{}", launcher.log());
    assert!(test_kill_process(daemon).is_err(), "a daemon is left behind");
    assert!(!launcher.place.at("run").exists(), "the run directory is left behind");
}

#[test]
fn daemons_do_not_outlive_a_launcher_that_is_killed_and_the_pod_can_be_run_again() {
    let mut launcher = Launcher::start(Place::new(""), &[]);
    let pids: Vec<Pid> =
        ["work", "disk", "vsock"].map(|name| launcher.daemon_pid(name).unwrap()).to_vec();
    launcher.child.kill().unwrap();
    launcher.child.wait().unwrap();
    until("the daemons end", || pids.iter().all(|pid| test_kill_process(*pid).is_err()));
    let place = std::mem::replace(&mut launcher.place, Place::new(""));
    let mut second = Launcher::start(place, &[]);
    assert!(second.terminate().success(), "{}", second.log());
}

#[test]
fn a_pod_runs_once_at_a_time() {
    let mut launcher = Launcher::start(Place::new(""), &[]);
    let output = outboard(&["run", launcher.place.at("pod.toml").to_str().unwrap()]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("runs already"), "{error}");
    // The second one took nothing away from the first.
    assert!(launcher.daemon_pid("disk").is_some());
    assert!(launcher.place.at("run/disk.sock").exists());
    assert!(launcher.terminate().success());
}

#[test]
fn a_daemon_that_cannot_start_is_told_with_its_reason_and_stops_the_pod() {
    let place = Place::new("");
    fs::write(place.at("run"), "not a directory").unwrap();
    let file = place.at("pod.toml");
    let file = file.to_str().unwrap();
    let output = outboard(&["run", file]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("cannot make the run directory"), "{error}");
    fs::remove_file(place.at("run")).unwrap();

    // A disk of no whole sector is found by the daemon, not by the launcher.
    fs::write(place.at("disk.img"), [0; 100]).unwrap();
    let output = outboard(&["run", file]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    let told = "vhost-user-blk for disk did not start (exit status: 1): error: ";
    assert!(error.contains(told) && error.contains("disk.img"), "{error}");
    assert!(!place.at("run").exists(), "the run directory is left behind");
}

#[test]
fn exec_runs_the_vmm_and_the_pod_ends_with_it() {
    for (program, code, told) in [("true", 0, ""), ("false", 1, "false ended with exit status: 1")]
    {
        let place = Place::new("");
        let file = place.at("pod.toml");
        let arguments = ["run", file.to_str().unwrap(), "--exec", "--vmm-program", program];
        let output = outboard(&arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{error}");
        assert_eq!(output.status.signal(), None);
        assert!(error.contains(told), "{error}");
        assert!(!place.at("run").exists());
    }
}

#[test]
fn every_mistake_is_printed_and_nothing_is_started() {
    let place = Place::new("memory = \"1\"");
    let file = place.at("pod.toml");
    let broken = fs::read_to_string(&file).unwrap().replace("disk.img", "none.img");
    fs::write(&file, broken).unwrap();
    for command in ["check", "run", "args"] {
        let output = outboard(&[command, file.to_str().unwrap()]);
        let error = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<&str> = error.lines().collect();
        assert_eq!((output.status.code(), lines.len()), (Some(1), 3), "{command}: {error}");
        assert!(lines[0].contains("pod.toml:3:10: `memory` = 1: "), "{error}");
        assert!(lines[1].contains("none.img does not exist"), "{error}");
        assert!(lines[2].contains("has 2 mistake(s); nothing was started"), "{error}");
    }
    assert!(!place.at("run").exists());
}
