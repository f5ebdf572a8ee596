//! What every daemon promises besides its device: it leaves at once when it is told to, whatever its
//! guest does, and its threads have names and stay on the CPUs they were given.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::any::Any;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use testkit::daemon::{Daemon, bin};
use testkit::driver::blk::{BlkSlot, RequestType};
use testkit::driver::fs::{FsClient, Message, op};
use testkit::driver::vsock::VsockOptions;
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::toolroot::ToolRoot;
use testkit::vsock_host::VsockHost;

/// From SIGTERM to the process's end, with the work in flight done, for a daemon that gets a CPU when it wants
/// one. It has a dozen turns to take: on two CPUs wanted by twelve they took a second, all of it waiting.
const PROMISE: Duration = Duration::from_millis(100);
/// Lives of each daemon; every one of them has to keep the promise.
const LIVES: usize = 5;
/// How long the guest works before it all ends.
const WORK: Duration = Duration::from_millis(60);
/// How long a guest's thread waits for a daemon that has left.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The second CPU and the first, where there are two.
fn affinity() -> String {
    let one = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
    format!("--cpu-affinity={}", if one { "0" } else { "1,0" })
}

/// A daemon and a guest that keeps it busy.
struct Life {
    daemon: Daemon,
    /// What has to stay for that: connections, directories.
    _keep: Vec<Box<dyn Any>>,
}

/// Does `work` on a thread of its own until it says no. The threads end with the test's process: what
/// they wait for last is a daemon that has left.
fn again_and_again(mut work: impl FnMut() -> bool + Send + 'static) {
    std::thread::spawn(move || while work() {});
}

/// Reads and writes of 64 KiB on two queues, 32 at a time on each.
fn disk(dir: &Path) -> Life {
    let image = dir.join("image");
    fs::write(&image, vec![7; 16 << 20]).unwrap();
    // The daemon's writes have not to wait for these.
    fs::File::open(&image).unwrap().sync_all().unwrap();
    let arguments = [format!("--blk-file={},lock=off", image.display()), affinity()];
    let daemon = Daemon::start("vhost-user-blk", &dir.join("blk"), &arguments).unwrap();
    let ram = GuestRam::new(16 << 20).unwrap();
    let mut front_end = FrontEnd::connect(daemon.socket()).unwrap();
    let options = AttachOptions { queues: 2, ..AttachOptions::new(RingFormat::Split) };
    let (queues, _) = front_end.attach(&ram, &options).unwrap();
    for mut queue in queues {
        let slots: Vec<BlkSlot> = (0..32).map(|_| BlkSlot::new(&ram, 65536).unwrap()).collect();
        let add = move |queue: &mut GuestQueue, at: u64| {
            let kind = if at.is_multiple_of(2) { RequestType::IN } else { RequestType::OUT };
            let added = queue.add(&slots[at as usize].prepare(kind, at * 128, 65536), at);
            queue.kick();
            added
        };
        assert!((0..32).all(|at| add(&mut queue, at)));
        again_and_again(move || match queue.poll_used(TIMEOUT) {
            Ok(used) => add(&mut queue, used.cookie),
            Err(_) => false,
        });
    }
    Life { daemon, _keep: vec![Box::new(front_end)] }
}

/// GETATTR, 16 at a time.
fn files(dir: &Path) -> Life {
    let arguments = [format!("--shared-dir={}", dir.display()), affinity()];
    let daemon = Daemon::start("virtiofsd", &dir.join("fs"), &arguments).unwrap();
    let mut client = FsClient::start(daemon.socket(), 1, 16).unwrap();
    again_and_again(move || {
        client.pump(1, 16, 1000, |_| Message::new(op::GETATTR, 1, &[0u64; 2])).is_ok()
    });
    Life { daemon, _keep: Vec::new() }
}

/// A stream from the guest to a service of the host that reads all of it.
fn sockets(_dir: &Path) -> Life {
    let host = VsockHost::start(&["--guest-cid=3", &affinity()]).unwrap();
    let mut guest = host.guest(VsockOptions::default()).unwrap();
    let (mut stream, mut theirs) = host.serve(&mut guest, 1025, 80).unwrap();
    let mut sink = vec![0; 1 << 16];
    again_and_again(move || stream.read(&mut sink).is_ok_and(|n| n > 0));
    again_and_again(move || theirs.send_all(&mut guest, &[9; 32 << 10]).is_ok());
    let VsockHost { dir, daemon } = host;
    Life { daemon, _keep: vec![Box::new(dir)] }
}

/// Frames into a tap, as fast as the ring takes them; the ring is never empty for long.
fn network(dir: &Path) -> Option<Life> {
    let root = ToolRoot::for_test()?;
    let namespace = NetNs::for_test(root)?;
    let socket = dir.join("net");
    let mut command = Command::new(bin("vhost-user-net").unwrap());
    command.arg("--socket-path").arg(&socket).args(["--tap=tap0", &affinity()]);
    namespace.enter(&mut command);
    let daemon = Daemon::start_command("vhost-user-net", command, &socket).unwrap();
    let ram = GuestRam::new(4 << 20).unwrap();
    let mut front_end = FrontEnd::connect(daemon.socket()).unwrap();
    let options = AttachOptions { queues: 2, ..AttachOptions::new(RingFormat::Split) };
    let (mut queues, _) = front_end.attach(&ram, &options).unwrap();
    let mut sender = queues.remove(1);
    // A header without wishes, and a frame to everybody.
    let frame = ram.alloc(1514 + 12, 64).unwrap();
    ram.write(frame + 12, &[0xff; 6]);
    let add = move |queue: &mut GuestQueue| {
        let added = queue.add(&[Buffer::readable(frame, 1514 + 12)], 0);
        queue.kick();
        added
    };
    assert!((0..64).all(|_| add(&mut sender)));
    again_and_again(move || sender.poll_used(TIMEOUT).is_ok() && add(&mut sender));
    Some(Life { daemon, _keep: vec![Box::new((front_end, queues, namespace))] })
}

/// For how long some CPU has been wanted by more than one so far, as the kernel counts it; `None` where it
/// does not. It is a mean over the CPUs, and all of it may have been on the daemon's.
fn cpu_shortage() -> Option<Duration> {
    let pressure = fs::read_to_string("/proc/pressure/cpu").ok()?;
    let total = pressure.lines().next()?.split_once("total=")?.1.trim().parse().ok()?;
    let cpus = std::thread::available_parallelism().ok()?;
    Some(Duration::from_micros(total) * u32::try_from(cpus.get()).ok()?)
}

/// Several lives, each of which ends as promised.
fn leaves_at_once(start: impl Fn(&Path) -> Option<Life>) {
    let mut times = Vec::new();
    for _ in 0..LIVES {
        let dir = tempfile::tempdir().unwrap();
        let Some(mut life) = start(dir.path()) else { return };
        sleep(WORK);
        let (shortage, begun) = (cpu_shortage(), Instant::now());
        let status = life.daemon.terminate(TIMEOUT).unwrap();
        let took = begun.elapsed();
        let short = shortage.zip(cpu_shortage()).map(|(before, after)| (after - before).min(took));
        assert!(status.success(), "{status}: {}", life.daemon.log());
        times.push((took, short));
    }
    eprintln!("left after (of which a CPU was short): {times:?}");
    let kept = |(took, short): &(Duration, Option<Duration>)| {
        took.saturating_sub(short.unwrap_or_default()) <= PROMISE
    };
    // Where nobody counts shortages, most lives have to do without.
    let wanted = if times[0].1.is_some() { LIVES } else { LIVES.div_ceil(2) };
    assert!(times.iter().filter(|life| kept(life)).count() >= wanted, "it left after {times:?}");
    // However busy the machine is, one of them at least gets its turns.
    assert!(times.iter().any(|(took, _)| *took <= PROMISE), "it left after {times:?}");
}

#[test]
fn a_busy_disk_daemon_leaves_at_once() {
    leaves_at_once(|dir| Some(disk(dir)));
}

#[test]
fn a_busy_file_daemon_leaves_at_once() {
    leaves_at_once(|dir| Some(files(dir)));
}

#[test]
fn a_busy_socket_daemon_leaves_at_once() {
    leaves_at_once(|dir| Some(sockets(dir)));
}

#[test]
fn a_busy_network_daemon_leaves_at_once() {
    leaves_at_once(network);
}

/// Names of all threads of a daemon, with the CPUs each may run on.
fn threads(daemon: &Daemon) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for pid in daemon.processes() {
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let task = task.unwrap().path();
            let name = fs::read_to_string(task.join("comm")).unwrap();
            let status = fs::read_to_string(task.join("status")).unwrap();
            let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            found.push((name.trim().to_owned(), cpus.unwrap().trim().to_owned()));
        }
    }
    found
}

/// Every daemon's worker `n` is called `DEVICE-qN` and runs on the n-th CPU of the list, while the thread
/// of the session, called as the device is, runs anywhere.
#[test]
fn workers_have_names_and_stay_on_their_cpus() {
    let anywhere = threads_of_this_test();
    if anywhere == "0" {
        return testkit::skip::skip("one CPU: there is no other one to stay away from");
    }
    let dir = tempfile::tempdir().unwrap();
    let lives = [Some(disk(dir.path())), Some(files(dir.path())), Some(sockets(dir.path()))];
    for life in lives.into_iter().chain([network(dir.path())]).flatten() {
        let threads = threads(&life.daemon);
        let worker = |n: usize| threads.iter().find(|(name, _)| name.ends_with(&format!("-q{n}")));
        let (name, cpus) = worker(0).unwrap_or_else(|| panic!("no worker 0 in {threads:?}"));
        assert_eq!(cpus, "1", "{threads:?}");
        let device = name.strip_suffix("-q0").unwrap();
        let session = threads.iter().find(|(name, _)| name == device);
        assert_eq!(session.unwrap_or_else(|| panic!("{threads:?}")).1, anywhere, "{threads:?}");
        if let Some((_, cpus)) = worker(1) {
            assert_eq!(cpus, "0", "{threads:?}");
        }
    }
}

/// The CPUs that a thread may run on which nobody pinned.
fn threads_of_this_test() -> String {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap();
    let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    cpus.unwrap().trim().to_owned()
}
