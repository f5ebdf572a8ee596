//! vhost-user-blk and qemu-storage-daemon, in turn, on the same images and with the same client.
//!
//! The client is the testkit's own guest driver. For small requests it polls, so that what is compared
//! is the daemons', and daemons and client are pinned to a CPU each. Large transfers are copies, and
//! the kernel threads that copy for qemu-storage-daemon's io_uring are not held by its pinning; so
//! there nobody is pinned and the client sleeps: every daemon has every CPU. Every figure is the median
//! of several runs that alternate between the daemons; `ratio` compares with the better of QEMU's two.
//!
//! On the disk most of the time is the kernel's. There the table also has ours with `--register-memory`
//! (`reg.`), and a bare loop that does the same operations with no virtio at all (`blk/floor.rs`).
//!
//! | store | what it is |
//! |---|---|
//! | null | no storage: the cost of the protocol |
//! | tmpfs | a file in /dev/shm |
//! | zram | /dev/zram0 with O_DIRECT; only when it exists and is not in use |
//! | disk | a file in `$OUTBOARD_BENCH_DIR` (a temporary directory) with O_DIRECT |
//!
//! With `$OUTBOARD_BENCH_AGAINST`, a program and its arguments, ours is compared with that instead, which takes
//! the same arguments: another build of it, or the same with another option. `$OUTBOARD_BENCH_RUNS` is the
//! number of runs.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot measure stops")]
#![allow(clippy::print_stdout, reason = "its table is what a benchmark is for")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "figures of a table"
)]

#[path = "blk/floor.rs"]
mod floor;

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::Advice;
use testkit::daemon::Daemon;
use testkit::driver::blk::{BlkSlot, RequestType, S_OK};
use testkit::driver::{GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::memory::GuestRam;
use testkit::toolroot::ToolRoot;

use self::floor::Floor;

const IMAGE_BYTES: u64 = 256 << 20;
const RUNS: usize = 3;
const RUN_TIME: Duration = Duration::from_millis(250);
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long ours polls in the rows that say so.
const POLL_US: u32 = 100;

/// What is measured.
#[derive(Clone, Copy)]
struct Load {
    name: &'static str,
    bytes: u32,
    depth: usize,
    random: bool,
    kind: RequestType,
    /// Ours polls; QEMU's daemon does not.
    polling: bool,
    /// Nobody is pinned, and the client sleeps while it waits.
    unpinned: bool,
}

const fn load(name: &'static str, bytes: u32, depth: usize) -> Load {
    let kind = RequestType::IN;
    Load { name, bytes, depth, random: true, kind, polling: false, unpinned: false }
}

/// Large transfers, one after another on the disk.
const fn sequential(name: &'static str, kind: RequestType) -> Load {
    Load { random: false, kind, unpinned: true, ..load(name, 1 << 20, 8) }
}

impl Load {
    /// The block of the next request.
    fn block(&self, random: &mut u64, next: &mut u64) -> u64 {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        *next += 1;
        (if self.random { *random } else { *next }) % (IMAGE_BYTES / u64::from(self.bytes))
    }
}

const LOADS: [Load; 8] = [
    load("4k random read, QD 1", 4096, 1),
    Load { polling: true, ..load("4k random read, QD 1, ours polls", 4096, 1) },
    load("4k random read, QD 32", 4096, 32),
    load("4k random read, QD 128", 4096, 128),
    Load { kind: RequestType::OUT, ..load("4k random write, QD 32", 4096, 32) },
    sequential("1M read, QD 8", RequestType::IN),
    sequential("1M write, QD 8", RequestType::OUT),
    load("64k random read, QD 8", 65536, 8),
];

/// One run's result.
#[derive(Clone, Copy)]
struct Figures {
    cpu_us: f64,
    iops: f64,
    p50_us: f64,
    p99_us: f64,
}

enum Store {
    Null,
    Tmpfs(PathBuf),
    Device(PathBuf),
    Disk(PathBuf),
}

/// Runs this process, and what it starts from now on, on CPU `cpu` if there is one; `None`: anywhere.
fn pin(cpu: Option<usize>) {
    let mut set = rustix::thread::CpuSet::new();
    match cpu {
        Some(cpu) => set.set(cpu),
        None => (0..rustix::thread::CpuSet::MAX_CPU).for_each(|cpu| set.set(cpu)),
    }
    // A machine with one CPU measures unpinned.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// CPU time of all threads of `daemon`, in nanoseconds.
fn cpu_ns(daemon: &Daemon) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    tasks.map(|task| task_cpu_ns(&task.unwrap().path())).sum()
}

/// CPU time of the thread that `task` shows, in nanoseconds; 0 when it is gone.
fn task_cpu_ns(task: &Path) -> u64 {
    let text = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
    text.split_ascii_whitespace().next().map_or(0, |time| time.parse().unwrap())
}

/// Arguments for ours.
fn arguments(store: &Store, polling: bool) -> [String; 2] {
    let disk = match store {
        Store::Null => format!("--null={IMAGE_BYTES}"),
        Store::Tmpfs(path) | Store::Device(path) | Store::Disk(path) => {
            format!("--blk-file={},lock=off", path.display())
        }
    };
    [disk, format!("--poll-us={}", if polling { POLL_US } else { 0 })]
}

fn start_ours(dir: &Path, store: &Store, polling: bool) -> Daemon {
    let socket = dir.join(if polling { "ours-polling" } else { "ours" });
    Daemon::start("vhost-user-blk", &socket, &arguments(store, polling)).unwrap()
}

/// What `$OUTBOARD_BENCH_AGAINST` names.
fn start_other(other: &str, dir: &Path, store: &Store, polling: bool) -> Daemon {
    let mut words = other.split_ascii_whitespace();
    let mut command = Command::new(words.next().unwrap());
    let socket = dir.join(if polling { "other-polling" } else { "other" });
    command.args(words).arg("--socket-path").arg(&socket).args(arguments(store, polling));
    Daemon::start_command(other, command, &socket).unwrap()
}

fn start_peer(root: &ToolRoot, dir: &Path, store: &Store, iothread: bool) -> Daemon {
    let mut command = root.command("qemu-storage-daemon").unwrap();
    let socket = dir.join(if iothread { "peer-iothread" } else { "peer" });
    let blockdev = match store {
        Store::Null => format!("driver=null-co,size={IMAGE_BYTES}"),
        Store::Tmpfs(path) => {
            format!("driver=file,locking=off,aio=io_uring,filename={}", path.display())
        }
        Store::Device(path) => {
            format!("driver=host_device,aio=io_uring,cache.direct=on,filename={}", path.display())
        }
        Store::Disk(path) => {
            let options = "driver=file,locking=off,aio=io_uring,cache.direct=on";
            format!("{options},filename={}", path.display())
        }
    };
    let mut export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
        socket.display()
    );
    if iothread {
        command.args(["--object", "iothread,id=thread,poll-max-ns=32768"]);
        export.push_str(",iothread=thread");
    }
    command.arg("--blockdev").arg(format!("{blockdev},node-name=disk"));
    command.arg("--export").arg(export);
    Daemon::start_command("qemu-storage-daemon", command, &socket).unwrap()
}

/// One connection to a daemon, with requests ready.
struct Client {
    _frontend: FrontEnd,
    queue: GuestQueue,
    slots: Vec<BlkSlot>,
    random: u64,
    next: u64,
}

impl Client {
    fn new(daemon: &Daemon, load: &Load) -> Self {
        let ram = GuestRam::new(64 << 20).unwrap();
        let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
        let options = AttachOptions { queue_size: 512, ..AttachOptions::new(RingFormat::Split) };
        let (mut queues, _) = frontend.attach(&ram, &options).unwrap();
        let slots = (0..load.depth).map(|_| BlkSlot::new(&ram, load.bytes).unwrap()).collect();
        Self { _frontend: frontend, queue: queues.remove(0), slots, random: 88_172_645, next: 0 }
    }

    /// The sector of the next request.
    fn sector(&mut self, load: &Load) -> u64 {
        load.block(&mut self.random, &mut self.next) * u64::from(load.bytes) / 512
    }

    fn submit(&mut self, load: &Load, slot: usize) {
        let sector = self.sector(load);
        let chain = self.slots[slot].prepare(load.kind, sector, load.bytes);
        assert!(self.queue.add(&chain, slot as u64), "the ring has room");
    }

    /// Every request once: what a daemon does for a new guest is not to be counted.
    fn warm_up(&mut self, load: &Load) {
        for slot in 0..load.depth {
            self.submit(load, slot);
            self.queue.kick();
            self.queue.wait(TIMEOUT).unwrap();
        }
    }

    fn run(&mut self, daemon: &Daemon, load: &Load, time: Duration) -> Figures {
        let mut begun = vec![Instant::now(); load.depth];
        let mut latencies: Vec<u64> = Vec::with_capacity(1 << 20);
        if !load.unpinned {
            self.queue.disable_interrupts();
        }
        let (cpu, start) = (cpu_ns(daemon), Instant::now());
        for slot in 0..load.depth {
            self.submit(load, slot);
        }
        self.queue.kick();
        let mut outstanding = load.depth;
        let end = start + time;
        while outstanding > 0 {
            let used = if load.unpinned {
                self.queue.wait(TIMEOUT)
            } else {
                self.queue.poll_used(TIMEOUT)
            };
            let mut used = Some(used.unwrap());
            let now = Instant::now();
            while let Some(one) = used {
                let slot = one.cookie as usize;
                assert_eq!(self.slots[slot].status(), S_OK);
                latencies.push((now - begun[slot]).as_nanos() as u64);
                outstanding -= 1;
                if now < end {
                    self.submit(load, slot);
                    begun[slot] = now;
                    outstanding += 1;
                }
                used = self.queue.used();
            }
            self.queue.kick();
        }
        let cpu = cpu_ns(daemon) - cpu;
        figures_of(latencies, cpu, start.elapsed())
    }
}

/// What a run comes to: of every request its time, in nanoseconds as the CPU time is.
fn figures_of(mut latencies: Vec<u64>, cpu: u64, elapsed: Duration) -> Figures {
    latencies.sort_unstable();
    let count = latencies.len() as f64;
    let at = |share: f64| latencies[(count * share) as usize] as f64 / 1000.0;
    Figures {
        cpu_us: cpu as f64 / 1000.0 / count,
        iops: count / elapsed.as_secs_f64(),
        p50_us: at(0.5),
        p99_us: at(0.99),
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn median_of(runs: &[Figures]) -> Figures {
    let of = |field: fn(&Figures) -> f64| median(runs.iter().map(field).collect());
    Figures {
        cpu_us: of(|f| f.cpu_us),
        iops: of(|f| f.iops),
        p50_us: of(|f| f.p50_us),
        p99_us: of(|f| f.p99_us),
    }
}

fn print_row(who: &str, load: &Load, f: &Figures) {
    let rate = if load.unpinned {
        format!("{:>9.0} MB/s", f.iops * f64::from(load.bytes) / 1e6)
    } else {
        format!("{:>9.0} IOPS", f.iops)
    };
    println!(
        "    {who:<14} {:>9.2} µs CPU/I/O {rate}   p50 {:>8.1} µs   p99 {:>8.1} µs",
        f.cpu_us, f.p50_us, f.p99_us
    );
}

/// Who is measured.
#[derive(Clone, Copy)]
enum Runner<'a> {
    Ours(&'a Daemon),
    /// Ours with other options.
    OursToo(&'a Daemon),
    Peer(&'a Daemon),
    /// No daemon at all.
    Floor(&'a Floor),
}

impl Runner<'_> {
    fn run(self, load: &Load, time: Duration) -> Figures {
        match self {
            Self::Ours(daemon) | Self::OursToo(daemon) | Self::Peer(daemon) => {
                let mut client = Client::new(daemon, load);
                client.warm_up(load);
                client.run(daemon, load, time)
            }
            Self::Floor(floor) => floor.run(load, time),
        }
    }
}

/// Measures one load on all, in turn.
fn compare(store: &str, load: &Load, runners: &[(&str, Runner<'_>)]) {
    println!("  {store}: {}", load.name);
    let mut runs: Vec<Vec<Figures>> = vec![Vec::new(); runners.len()];
    let count = std::env::var("OUTBOARD_BENCH_RUNS").map_or(RUNS, |count| count.parse().unwrap());
    for run in 0..=count {
        for (at, (_, runner)) in runners.iter().enumerate() {
            let warm_up = run == 0;
            let time = if warm_up { RUN_TIME / 8 } else { RUN_TIME };
            let figures = runner.run(load, time);
            if !warm_up {
                runs[at].push(figures);
            }
        }
    }
    let medians: Vec<Figures> = runs.iter().map(|r| median_of(r)).collect();
    let mut peers = Vec::new();
    for ((who, runner), figures) in runners.iter().zip(&medians) {
        print_row(who, load, figures);
        if let Runner::Peer(_) = runner {
            peers.push(*figures);
        }
    }
    let least = |field: fn(&Figures) -> f64| peers.iter().map(field).fold(f64::MAX, f64::min);
    let most_iops = peers.iter().map(|f| f.iops).fold(0.0, f64::max);
    for ((who, runner), figures) in runners.iter().zip(&medians) {
        if !matches!(runner, Runner::Peer(_)) {
            println!(
                "    ratio of {who}: CPU {:.2}   IOPS {:.2}   p50 {:.2}",
                figures.cpu_us / least(|f| f.cpu_us),
                figures.iops / most_iops,
                figures.p50_us / least(|f| f.p50_us)
            );
        }
    }
}

fn measure(root: &ToolRoot, name: &str, store: &Store, wanted: &[&Load]) {
    let (unpinned, pinned): (Vec<&Load>, _) = wanted.iter().partition(|load| load.unpinned);
    measure_on(root, name, store, &pinned, [Some(0), Some(1)]);
    measure_on(root, name, store, &unpinned, [None, None]);
}

/// Measures with the daemons on one CPU and the client on another.
fn measure_on(
    root: &ToolRoot,
    name: &str,
    store: &Store,
    wanted: &[&Load],
    [daemons, client]: [Option<usize>; 2],
) {
    if wanted.is_empty() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    pin(daemons);
    let ours = start_ours(dir.path(), store, false);
    let ours_polling = start_ours(dir.path(), store, true);
    if let Ok(other) = std::env::var("OUTBOARD_BENCH_AGAINST") {
        let [plain, polls] = [false, true].map(|p| start_other(&other, dir.path(), store, p));
        pin(client);
        for load in wanted {
            let [ours, other] =
                if load.polling { [&ours_polling, &polls] } else { [&ours, &plain] };
            let runners = [("ours", Runner::Ours(ours)), ("the other", Runner::Peer(other))];
            compare(name, load, &runners);
        }
        return;
    }
    let on_disk = match store {
        Store::Disk(path) => Some(OnDisk::new(dir.path(), store, path)),
        _ => None,
    };
    let peer = start_peer(root, dir.path(), store, false);
    let peer_iothread = start_peer(root, dir.path(), store, true);
    pin(client);
    for load in wanted {
        if load.polling {
            let runners = [("ours", Runner::Ours(&ours_polling)), ("qemu", Runner::Peer(&peer))];
            compare(name, load, &runners);
            continue;
        }
        let mut runners = vec![("ours", Runner::Ours(&ours))];
        if let Some(disk) = &on_disk {
            runners.push(("ours, reg.", Runner::OursToo(&disk.registering)));
        }
        runners.push(("qemu", Runner::Peer(&peer)));
        runners.push(("qemu iothread", Runner::Peer(&peer_iothread)));
        if let Some(disk) = on_disk.as_ref().filter(|_| !load.unpinned) {
            runners.extend(disk.floors.iter().map(|floor| (floor.name, Runner::Floor(floor))));
        }
        compare(name, load, &runners);
    }
}

/// What is measured besides where the kernel has most of the work.
struct OnDisk {
    /// Ours with guest memory registered.
    registering: Daemon,
    floors: [Floor; 4],
}

impl OnDisk {
    fn new(dir: &Path, store: &Store, path: &Path) -> Self {
        let [disk, polling] = arguments(store, false);
        let arguments = [disk, polling, "--register-memory".to_owned()];
        let socket = dir.join("ours-registering");
        Self {
            registering: Daemon::start("vhost-user-blk", &socket, &arguments).unwrap(),
            floors: Floor::kinds(path),
        }
    }
}

/// Fills `path` with bytes that do not compress.
fn fill(path: &Path, direct: bool) -> std::io::Result<()> {
    let mut options = fs::File::options();
    options.write(true).create(!direct);
    let mut file = options.custom_flags(libc::O_CLOEXEC).open(path)?;
    let mut random = 0x1234_5678_9abc_def1u64;
    let mut chunk = vec![0u8; 1 << 20];
    for _ in 0..IMAGE_BYTES / chunk.len() as u64 {
        for word in chunk.as_chunks_mut::<8>().0 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *word = random.to_le_bytes();
        }
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    // Who writes past the page cache first would have to empty it.
    Ok(rustix::fs::fadvise(&file, 0, None, Advice::DontNeed)?)
}

/// A compressed RAM disk for as long as it is not dropped.
struct Zram;

impl Zram {
    fn make() -> Option<Self> {
        let sys = Path::new("/sys/block/zram0");
        let size = fs::read_to_string(sys.join("disksize")).ok()?;
        if size.trim() != "0" {
            println!("zram: /dev/zram0 is in use, left out");
            return None;
        }
        fs::write(sys.join("disksize"), IMAGE_BYTES.to_string()).ok()?;
        let zram = Self;
        fill(Path::new("/dev/zram0"), true).ok()?;
        Some(zram)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        // Left as it is, the next run says that it is in use.
        let _ = fs::write("/sys/block/zram0/reset", "1");
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let wanted: Vec<&Load> = LOADS.iter().filter(|l| words_match(l, &words)).collect();
    let root = ToolRoot::guests().unwrap();
    let only = std::env::var("OUTBOARD_BENCH_STORE").unwrap_or_default();
    let chosen = |name: &str| only.is_empty() || only.split(',').any(|o| o == name);
    if chosen("null") {
        measure(root, "null", &Store::Null, &wanted);
    }
    if chosen("tmpfs") {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("image");
        fill(&path, false).unwrap();
        measure(root, "tmpfs", &Store::Tmpfs(path), &wanted);
    }
    if chosen("zram") {
        match Zram::make() {
            Some(_zram) => measure(root, "zram", &Store::Device("/dev/zram0".into()), &wanted),
            None => println!("zram: not to be had here, left out"),
        }
    }
    if chosen("disk") {
        // In /tmp the tool root finds it too.
        let place = std::env::var_os("OUTBOARD_BENCH_DIR").unwrap_or("/tmp".into());
        let dir = tempfile::tempdir_in(place).unwrap();
        let path = dir.path().join("image");
        fill(&path, false).unwrap();
        measure(root, "disk", &Store::Disk(path), &wanted);
    }
}

/// Whether a load was asked for: every word of the command line is in its name.
fn words_match(load: &Load, words: &[String]) -> bool {
    words.iter().all(|word| load.name.contains(word.as_str()))
}
