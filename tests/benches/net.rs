//! vhost-user-net, beside passt where passt can do it too, in turn in one run.
//!
//! | part | what it is |
//! |---|---|
//! | guest | a User Mode Linux guest's TCP with iperf3, and its pings; ours on a tap, passt as it is |
//! | polling | the same TCP with an end of ours that never sleeps in the guest's place, so that no signals of a hypervisor are in it |
//! | frames | 60-byte and 1514-byte frames between the testkit's driver and a tap, one way and both at once |
//! | round trip | an ARP request of the testkit's driver, answered by the kernel behind the tap |
//! | switch | frames between two ports of the switch, driven by DPDK's testpmd |
//! | idle | CPU time in a second with a guest attached that does nothing; private memory; time to ready |
//!
//! Daemon and client are pinned to a CPU each. Rates are of useful work per second of the daemon's CPU
//! time. `ceiling` is a bare loop on a tap in our place (`net/ceiling.rs`, `net/tcp.rs`). `./x bench net` runs all;
//! `OUTBOARD_BENCH_PART` names one part, and words after `--` choose the guest's and the frames' rows that
//! have all of them.

#![allow(clippy::unwrap_used, reason = "a benchmark that cannot measure stops")]
#![allow(clippy::print_stdout, reason = "its table is what a benchmark is for")]
#![allow(clippy::cast_precision_loss, reason = "figures of a table")]

#[path = "net/ceiling.rs"]
mod ceiling;
#[path = "net/tcp.rs"]
mod tcp;

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use self::tcp::Carrier;
use testkit::daemon::{self, Daemon};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::guests::uml::UmlGuest;
use testkit::guests::{Job, VirtioId};
use testkit::link_socket::LinkSocket;
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::peers;
use testkit::service::Service;
use testkit::testpmd::{self, Testpmd};
use testkit::toolroot::ToolRoot;
use virtio_bindings::virtio_net as v;

const TIMEOUT: Duration = Duration::from_secs(60);
const ROUNDS: usize = 3;
/// What iperf3 runs for.
const SECONDS: f64 = 2.0;
const RUN_TIME: Duration = Duration::from_secs(1);
const RING: u16 = 1024;
const HEADER: usize = 12;
const ME: [u8; 6] = [2, 0, 0, 0, 0, 9];
const ROUND_TRIPS: usize = 5000;

/// One direction at a time, so that the daemon's CPU time belongs to it.
const GUEST: &str = r#"
ip link set eth0 mtu "$MTU" up
ip address add $ADDRESS/24 dev eth0
ip route add default via $SERVER
ping -c 2 -i 0.2 $SERVER >/dev/null || true
echo start
iperf3 -c $SERVER -t 2 -f m $OPTION >/tmp/report
echo result mbit $(awk '/receiver/ { print $7 }' /tmp/report)
ping -c 200 -i 0.005 $SERVER | sed -n 's/.*time=\([0-9.]*\) ms/\1/p' | sort -n >/tmp/times
echo result p50 $(sed -n 100p /tmp/times)
echo result p99 $(sed -n 198p /tmp/times)
"#;

/// One stream of TCP, and how the host's TCP keeps its pace.
#[derive(Debug, Clone)]
struct Bulk {
    to_guest: bool,
    /// Congestion control. One that paces (bbr) sends by timers, which go off on the CPU that took the last
    /// acknowledgement, the daemon's, and are in its time. A connection that began with one is paced for
    /// ever, so none is changed: it comes from the route.
    control: String,
}

impl std::fmt::Display for Bulk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let direction = if self.to_guest { "host to guest" } else { "guest to host" };
        write!(f, "{direction}, {}", self.control)
    }
}

impl Bulk {
    /// Has the host's TCP use the congestion control towards a guest on `tap0`.
    fn control_tap(&self, root: &ToolRoot, namespace: &NetNs) {
        self.replace(root, namespace, "10.9.0.0/24 dev tap0 src 10.9.0.1");
    }

    /// The same towards passt, and in passt, which are connected over the loopback.
    fn control_loopback(&self, root: &ToolRoot, namespace: &NetNs) {
        for to in ["127.0.0.0/8", "127.0.0.1"] {
            let route = "dev lo proto kernel scope host src 127.0.0.1 table local";
            self.replace(root, namespace, &format!("local {to} {route}"));
        }
    }

    fn replace(&self, root: &ToolRoot, namespace: &NetNs, route: &str) {
        namespace.ip(root, &format!("route replace {route} congctl {}", self.control)).unwrap();
    }
}

/// Both directions, with Linux's default and with this machine's.
fn bulks() -> Vec<Bulk> {
    let own = fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap();
    let mut controls = vec!["cubic", own.trim()];
    controls.dedup();
    let bulk = |control: &str, to_guest| Bulk { to_guest, control: control.to_owned() };
    [false, true]
        .iter()
        .flat_map(|to_guest| controls.iter().map(|control| bulk(control, *to_guest)))
        .collect()
}

#[derive(Clone, Copy, PartialEq)]
enum Which {
    Ours,
    Passt,
}

/// One guest's figures.
#[derive(Debug, Default, Clone)]
struct GuestFigures {
    gbit: Vec<f64>,
    per_cpu: Vec<f64>,
    p50_us: Vec<f64>,
    p99_us: Vec<f64>,
    events: Vec<Events>,
}

/// CPU time of all threads of `daemon`, in seconds.
fn cpu_seconds(daemon: &Daemon) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let ns: u64 = tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
        .filter_map(|text| text.split_ascii_whitespace().next()?.parse::<u64>().ok())
        .sum();
    ns as f64 / 1e9
}

fn pin(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    // A machine with one CPU measures unpinned.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

fn ours(root: &ToolRoot, namespace: &NetNs, socket: &Path) -> Daemon {
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--socket-path").arg(socket).args(["--tap", "tap0", "--mtu", "65520"]);
    command.arg("--metrics-socket").arg(socket.with_extension("metrics"));
    namespace.enter(&mut command);
    pin(1);
    let daemon = Daemon::start_command("vhost-user-net", command, socket).unwrap();
    pin(0);
    namespace.ip(root, "address add 10.9.0.1/24 dev tap0").unwrap();
    daemon
}

/// passt takes its addresses from an interface with a default route; the guest reaches the name
/// space's loopback at the gateway's address.
fn passt(root: &ToolRoot, namespace: &NetNs, socket: &Path) -> Daemon {
    namespace.ip(root, "link add up0 type veth peer name up1").unwrap();
    for line in [
        "link set up0 up",
        "link set up1 up",
        "address add 10.9.0.2/24 dev up0",
        "route add default via 10.9.0.1 dev up0",
    ] {
        namespace.ip(root, line).unwrap();
    }
    // passt sends pings through the kernel's ping sockets, which a new name space refuses.
    namespace
        .run(|| fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"))
        .unwrap()
        .unwrap();
    pin(1);
    let daemon = peers::passt(root, socket, namespace).unwrap();
    pin(0);
    daemon
}

fn guest_run(root: &'static ToolRoot, which: Which, mtu: u32, bulk: &Bulk, to: &mut GuestFigures) {
    let namespace = NetNs::new(root).unwrap();
    let dir = tempfile::Builder::new().prefix("bench").tempdir_in("/tmp").unwrap();
    let socket = dir.path().join("net.sock");
    let daemon = match which {
        Which::Ours => ours(root, &namespace, &socket),
        Which::Passt => passt(root, &namespace, &socket),
    };
    match which {
        Which::Ours => bulk.control_tap(root, &namespace),
        Which::Passt => bulk.control_loopback(root, &namespace),
    }
    let mut server = root.command("iperf3").unwrap();
    namespace.enter(server.args(["--server", "--forceflush"]));
    let _server = Service::start("iperf3", server, dir.path(), "listening on").unwrap();
    let job = Job::from_script(GUEST)
        .set("MTU", &mtu.to_string())
        .set("OPTION", if bulk.to_guest { "-R" } else { "" })
        .set("ADDRESS", "10.9.0.2")
        .set("SERVER", "10.9.0.1");
    let mut guest = UmlGuest::new(root).device(&socket, VirtioId::Net).start(&job).unwrap();
    guest.wait_for("start", TIMEOUT).unwrap();
    let before_events = match which {
        Which::Ours => Events::of(&daemon, &socket),
        Which::Passt => Events::default(),
    };
    let before = cpu_seconds(&daemon);
    guest.wait_for("result mbit", TIMEOUT).unwrap();
    let cpu = cpu_seconds(&daemon) - before;
    if which == Which::Ours {
        let events = Events::of(&daemon, &socket).since(&before_events);
        to.events.push(events);
    }
    let result = guest.wait(TIMEOUT).unwrap();
    result.expect_success();
    let value = |name: &str| result.value(name).and_then(|v| v.parse::<f64>().ok());
    let gbit = value("mbit").unwrap() / 1000.0;
    to.gbit.push(gbit);
    to.per_cpu.push(gbit * SECONDS / cpu.max(0.001));
    to.p50_us.extend(value("p50").map(|ms| ms * 1000.0));
    to.p99_us.extend(value("p99").map(|ms| ms * 1000.0));
}

/// What happened to our daemon so often since its start.
#[derive(Debug, Default, Clone, Copy)]
struct Events {
    /// Times that it went to sleep.
    sleeps: f64,
    /// Kicks by the guest, signals to it, both directions.
    kicks: f64,
    signals: f64,
    /// Frames out of the guest, into it.
    frames: [f64; 2],
}

impl Events {
    fn of(daemon: &Daemon, socket: &Path) -> Self {
        let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
        let texts =
            tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
        let sleeps = texts.map(|text| sum_of(&text, "\nvoluntary_ctxt_switches")).sum();
        let mut text = String::new();
        let mut metrics = UnixStream::connect(socket.with_extension("metrics")).unwrap();
        metrics.read_to_string(&mut text).unwrap();
        let count = |name: &str| sum_of(&text, &format!("\noutboard_{name}_total"));
        let frames = [count("net_tx_frames"), count("net_rx_frames")];
        Self { sleeps, kicks: count("queue_kicks"), signals: count("queue_signals"), frames }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            sleeps: self.sleeps - before.sleeps,
            kicks: self.kicks - before.kicks,
            signals: self.signals - before.signals,
            frames: [0, 1].map(|at| self.frames[at] - before.frames[at]),
        }
    }
}

/// The sum of the numbers that end the lines which begin with `name`, itself a newline first.
fn sum_of(text: &str, name: &str) -> f64 {
    let lines = text.split(name).skip(1).map(|rest| rest.lines().next().unwrap_or_default());
    lines.filter_map(|line| line.split_whitespace().next_back()?.parse::<f64>().ok()).sum()
}

/// Whether the row with this label is wanted.
fn is_wanted(label: &str) -> bool {
    // cargo adds `--bench`.
    std::env::args().skip(1).filter(|word| word != "--bench").all(|word| label.contains(&word))
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn guest(root: &'static ToolRoot) {
    println!("guest: User Mode Linux, iperf3 TCP, one stream; medians of {ROUNDS}");
    println!(
        "{:6} {:20} {:7} {:>8} {:>14} {:>9} {:>9}",
        "MTU", "direction", "daemon", "Gbit/s", "Gbit/CPU s", "ping p50", "p99 (us)"
    );
    for mtu in [1500, 65520] {
        for bulk in bulks() {
            let direction = bulk.to_string();
            if is_wanted(&format!("{mtu} {direction}")) {
                guest_row(root, mtu, &direction, &bulk);
            }
        }
    }
}

fn guest_row(root: &'static ToolRoot, mtu: u32, direction: &str, bulk: &Bulk) {
    let mut figures = [GuestFigures::default(), GuestFigures::default()];
    let mut ceiling = Vec::new();
    for _ in 0..ROUNDS {
        ceiling.push(tcp::tcp(root, Carrier::Bare, mtu, bulk));
        guest_run(root, Which::Ours, mtu, bulk, &mut figures[0]);
        guest_run(root, Which::Passt, mtu, bulk, &mut figures[1]);
    }
    for (name, f) in ["ours", "passt"].iter().zip(&figures) {
        println!(
            "{mtu:<6} {direction:20} {name:7} {:8.2} {:14.1} {:9.0} {:9.0}",
            median(&f.gbit),
            median(&f.per_cpu),
            median(&f.p50_us),
            median(&f.p99_us)
        );
    }
    let (most, ours) = (median(&ceiling), median(&figures[0].per_cpu));
    let share = 100.0 * ours / most;
    println!("{mtu:<6} {direction:20} ceiling          {most:14.1}   ours is {share:.0} %");
    let each = |of: fn(&Events) -> f64| {
        let values: Vec<f64> = figures[0].events.iter().map(|e| of(e) / SECONDS).collect();
        median(&values)
    };
    println!(
        "       ours, a second: {:.0} frames out, {:.0} in, {:.0} kicks, {:.0} signals, {:.0} sleeps",
        each(|e| e.frames[0]),
        each(|e| e.frames[1]),
        each(|e| e.kicks),
        each(|e| e.signals),
        each(|e| e.sleeps)
    );
}

/// TCP with this machine's kernel by a guest that polls, so that no signal of a hypervisor is in the figures.
fn polling(root: &ToolRoot) {
    println!(
        "polling: TCP with the testkit's driver, no interrupts; Gbit/CPU s, medians of {ROUNDS}"
    );
    println!(
        "{:6} {:20} {:>8} {:>8} {:>22} {:>22}",
        "MTU", "direction", "split", "packed", "bare, other's memory", "bare, its own"
    );
    for mtu in [1500, 65520] {
        for bulk in bulks() {
            let direction = bulk.to_string();
            if !is_wanted(&format!("{mtu} {direction}")) {
                continue;
            }
            let carriers = [
                Carrier::Ours(RingFormat::Split),
                Carrier::Ours(RingFormat::Packed),
                Carrier::BareShared,
                Carrier::Bare,
            ];
            let mut rates: [Vec<f64>; 4] = Default::default();
            for _ in 0..ROUNDS {
                for (carrier, rates) in carriers.iter().zip(&mut rates) {
                    rates.push(tcp::tcp(root, *carrier, mtu, &bulk));
                }
            }
            let [split, packed, shared, own] = rates.map(|rates| median(&rates));
            println!("{mtu:<6} {direction:20} {split:8.1} {packed:8.1} {shared:22.1} {own:22.1}");
        }
    }
}

/// The testkit's driver on ours: a generator and a sink of frames.
struct Driver {
    rx: GuestQueue,
    tx: GuestQueue,
    ram: Arc<GuestRam>,
    /// The frame to send, with its header.
    out: u64,
    len: u32,
    _frontend: FrontEnd,
    namespace: NetNs,
    daemon: Daemon,
    _dir: tempfile::TempDir,
}

/// Frames for nobody: an ethertype for local experiments.
fn frame(to: [u8; 6], bytes: usize) -> Vec<u8> {
    let mut frame = [&to[..], &ME, &[0x88, 0xb5]].concat();
    frame.resize(bytes, 0x5a);
    frame
}

/// Sends `frame` into `tap0` as fast as it takes it, until told to stop.
fn flood(frame: &[u8], stop: &AtomicBool) {
    let socket = LinkSocket::sender("tap0").unwrap();
    while !stop.load(Ordering::Relaxed) {
        if socket.send_copies(frame, 64) < 64 {
            std::thread::yield_now();
        }
    }
}

/// Attaches a guest with one pair of queues of `size` entries: the receive and the transmit queue.
fn attach_pair(
    frontend: &mut FrontEnd,
    ram: &Arc<GuestRam>,
    format: RingFormat,
    size: u16,
) -> [GuestQueue; 2] {
    let options = AttachOptions {
        features: !(1 << v::VIRTIO_NET_F_MQ),
        queues: 2,
        queue_size: size,
        inflight: false,
        ..AttachOptions::new(format)
    };
    let (queues, _) = frontend.attach(ram, &options).unwrap();
    queues.try_into().unwrap()
}

impl Driver {
    fn new(root: &ToolRoot, format: RingFormat, bytes: usize) -> Self {
        let namespace = NetNs::new(root).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let daemon = ours(root, &namespace, &dir.path().join("net.sock"));
        namespace.ip(root, "link set tap0 txqueuelen 1000").unwrap();
        let ram = GuestRam::new(16 << 20).unwrap();
        let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
        let [mut rx, mut tx] = attach_pair(&mut frontend, &ram, format, RING);
        let out = ram.alloc(4096, 64).unwrap();
        ram.write(out, &[vec![0; HEADER], frame([0xff; 6], bytes)].concat());
        for _ in 0..RING {
            let at = ram.alloc(2048, 64).unwrap();
            assert!(rx.add(&[Buffer::writable(at, 2048)], at));
        }
        rx.kick();
        tx.disable_interrupts();
        rx.disable_interrupts();
        let len = u32::try_from(HEADER + bytes).unwrap();
        Self { rx, tx, ram, out, len, _frontend: frontend, namespace, daemon, _dir: dir }
    }

    /// Collects what was sent and sends as much; gives frames used.
    fn send_more(&mut self) -> u64 {
        let mut used = 0;
        while self.tx.used().is_some() {
            used += 1;
        }
        // In halves, so that the device sees batches.
        if self.tx.free() >= RING / 4 {
            while self.tx.add(&[Buffer::readable(self.out, self.len)], 0) {}
            self.tx.kick();
        }
        used
    }

    /// Takes what arrived and gives the buffers back.
    fn take_more(&mut self) -> u64 {
        let mut taken = 0;
        while let Some(used) = self.rx.used() {
            assert!(self.rx.add(&[Buffer::writable(used.cookie, 2048)], used.cookie));
            taken += 1;
            if taken % 64 == 0 {
                self.rx.kick();
            }
        }
        if taken > 0 {
            self.rx.kick();
        }
        taken
    }

    /// Runs for [`RUN_TIME`]: frames sent and received, and CPU seconds of the daemon.
    fn run(&mut self, send: bool, receive: bool) -> (u64, u64, f64) {
        let stop = Arc::new(AtomicBool::new(false));
        let flood = receive.then(|| {
            let (stop, frame) = (stop.clone(), frame(ME, self.len as usize - HEADER));
            let namespace = self.namespace.clone();
            std::thread::spawn(move || namespace.run(move || flood(&frame, &stop)))
        });
        let (mut sent, mut received) = (0, 0);
        let before = cpu_seconds(&self.daemon);
        let start = Instant::now();
        while start.elapsed() < RUN_TIME {
            let mut work = 0;
            if send {
                work = self.send_more();
                sent += work;
            }
            let taken = self.take_more();
            received += taken;
            if receive && work + taken == 0 {
                // The generator has the same CPU.
                std::thread::yield_now();
            }
        }
        let cpu = cpu_seconds(&self.daemon) - before;
        stop.store(true, Ordering::Relaxed);
        if let Some(flood) = flood {
            flood.join().unwrap().unwrap();
        }
        (sent, received, cpu)
    }
}

fn frames(root: &ToolRoot) {
    println!("frames: Mpps per daemon CPU second (Mpps a second); medians of {ROUNDS}");
    println!(
        "{:>6} {:7} {:>20} {:>20} {:>26}",
        "bytes", "ring", "guest to tap", "tap to guest", "both at once: TX, RX"
    );
    for bytes in [60, 1514] {
        let mut most: [Vec<f64>; 2] = Default::default();
        for format in RingFormat::ALL {
            let format_name = format!("{format:?}").to_lowercase();
            if is_wanted(&format!("{bytes} {format_name}")) {
                let (tx, rx) = ceiling::frames(root, bytes);
                most[0].push(tx);
                most[1].push(rx);
                frames_row(root, format, &format_name, bytes);
            }
        }
        if !most[0].is_empty() {
            let [tx, rx] = most.map(|rates| format!("{:.2}", median(&rates)));
            println!("{bytes:6} ceiling {tx:>20} {rx:>20}");
        }
    }
}

fn frames_row(root: &ToolRoot, format: RingFormat, format_name: &str, bytes: usize) {
    let mut rows: [Vec<f64>; 6] = Default::default();
    for _ in 0..ROUNDS {
        let run = |send, receive| Driver::new(root, format, bytes).run(send, receive);
        let seconds = RUN_TIME.as_secs_f64();
        let (sent, _, cpu) = run(true, false);
        rows[0].push(sent as f64 / cpu / 1e6);
        rows[1].push(sent as f64 / seconds / 1e6);
        let (_, received, cpu) = run(false, true);
        rows[2].push(received as f64 / cpu / 1e6);
        rows[3].push(received as f64 / seconds / 1e6);
        let (sent, received, _) = run(true, true);
        rows[4].push(sent as f64 / seconds / 1e6);
        rows[5].push(received as f64 / seconds / 1e6);
    }
    let [tx, tx_rate, rx, rx_rate, both_tx, both_rx] = rows.map(|row| median(&row));
    println!(
        "{bytes:6} {format_name:7} {:>20} {:>20} {:>26}",
        format!("{tx:.2} ({tx_rate:.2})"),
        format!("{rx:.2} ({rx_rate:.2})"),
        format!("({both_tx:.2}), ({both_rx:.2})")
    );
}

/// The driver asks for the host's address again and again, asleep on its interrupt meanwhile.
fn round_trip(root: &ToolRoot) {
    let mut driver = Driver::new(root, RingFormat::Packed, 60);
    let arp = [
        &[0; HEADER][..],
        &[0xff; 6],
        &ME,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &ME,
        &[10, 9, 0, 2],
        &[0; 6],
        &[10, 9, 0, 1],
        &[0; 18],
    ]
    .concat();
    driver.ram.write(driver.out, &arp);
    let mut times: Vec<f64> = (0..ROUND_TRIPS)
        .map(|_| {
            let start = Instant::now();
            assert!(driver.tx.add(&[Buffer::readable(driver.out, driver.len)], 0));
            driver.tx.kick();
            loop {
                let used = driver.rx.wait(TIMEOUT).unwrap();
                assert!(driver.rx.add(&[Buffer::writable(used.cookie, 2048)], used.cookie));
                let kind = driver.ram.bytes(used.cookie + 12 + HEADER as u64, 2);
                if kind == [8, 6] {
                    break;
                }
            }
            let time = start.elapsed().as_secs_f64() * 1e6;
            while driver.tx.used().is_some() {}
            time
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times[times.len() * percent / 100];
    println!("round trip to the kernel behind the tap: p50 {:.1} us, p99 {:.1} us", at(50), at(99));
}

fn idle(root: &ToolRoot) {
    let mut driver = Driver::new(root, RingFormat::Split, 60);
    // The kernel behind the tap looks for neighbours and routers of its own accord.
    let quiet = || fs::write("/proc/sys/net/ipv6/conf/tap0/disable_ipv6", "1");
    driver.namespace.run(quiet).unwrap().unwrap();
    driver.take_more();
    std::thread::sleep(Duration::from_millis(300));
    let before = cpu_seconds(&driver.daemon);
    std::thread::sleep(Duration::from_secs(1));
    let cpu = cpu_seconds(&driver.daemon) - before;
    let private = driver.daemon.private_bytes().unwrap() >> 10;
    let mut ready: Vec<f64> = (0..5)
        .map(|_| {
            let namespace = NetNs::new(root).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("s");
            let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
            command.arg("--socket-path").arg(&socket).args(["--tap", "tap0"]);
            namespace.enter(&mut command);
            let start = Instant::now();
            let mut child = command.stderr(Stdio::null()).spawn().unwrap();
            while UnixStream::connect(&socket).is_err() {
                std::thread::sleep(Duration::from_micros(100));
            }
            let ready = start.elapsed().as_secs_f64() * 1e3;
            child.kill().unwrap();
            child.wait().unwrap();
            ready
        })
        .collect();
    ready.sort_by(f64::total_cmp);
    println!(
        "idle with a guest: {:.1} ms CPU in a second, {private} KiB private; ready after {:.1} ms",
        cpu * 1e3,
        ready[2]
    );
}

/// Two devices of DPDK's testpmd on two ports of the switch, each sending what the other received.
fn switch() {
    let root = match ToolRoot::dpdk() {
        Ok(root) => root,
        Err(error) => return println!("switch: no DPDK here: {error:#}"),
    };
    println!("switch: frames moved by testpmd between two ports; medians of {ROUNDS}");
    println!("{:>6} {:7} {:>24} {:>16}", "bytes", "ring", "Mpps per daemon CPU s", "Mpps");
    for (packed, name) in [(false, "split"), (true, "packed")] {
        for bytes in [64, 1514] {
            let (mut per_cpu, mut rate) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                let (frames, cpu) = switch_run(root, packed, bytes);
                per_cpu.push(frames / cpu / 1e6);
                rate.push(frames / RUN_TIME.as_secs_f64() / 1e6);
            }
            println!("{bytes:6} {name:7} {:24.2} {:16.2}", median(&per_cpu), median(&rate));
        }
    }
}

/// Frames in [`RUN_TIME`], and CPU seconds of the daemon.
fn switch_run(root: &ToolRoot, packed: bool, frame_bytes: u32) -> (f64, f64) {
    let dir = tempfile::tempdir().unwrap();
    let sockets = [dir.path().join("a.sock"), dir.path().join("b.sock")];
    let mut command = Command::new(daemon::bin("vhost-user-net").unwrap());
    command.arg("--switch").arg("--metrics-socket").arg(dir.path().join("metrics"));
    for socket in &sockets {
        command.arg("--port").arg(format!("socket={}", socket.display()));
    }
    pin(1);
    let daemon = Daemon::start_command("vhost-user-net", command, &sockets[1]).unwrap();
    pin(0);
    let options = testpmd::Options { frame_bytes, packed, ring: 1024 };
    let ports = [sockets[0].as_path(), sockets[1].as_path()];
    let mut testpmd = Testpmd::start(root, ports, dir.path(), options).unwrap();
    testpmd.forward(32).unwrap();
    std::thread::sleep(RUN_TIME / 4);
    let count = || {
        let mut text = String::new();
        let mut socket = UnixStream::connect(dir.path().join("metrics")).unwrap();
        socket.read_to_string(&mut text).unwrap();
        let lines = text.lines().filter(|l| l.contains("net_rx_frames_total{"));
        lines.map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
    };
    let (frames, cpu) = (count(), cpu_seconds(&daemon));
    std::thread::sleep(RUN_TIME);
    let moved = (count() - frames, cpu_seconds(&daemon) - cpu);
    testpmd.stop().unwrap();
    moved
}

fn main() {
    let Ok(root) = ToolRoot::guests() else {
        eprintln!("no tool root: nothing to measure with");
        return;
    };
    let wanted = std::env::var("OUTBOARD_BENCH_PART").unwrap_or_default();
    let runs = |part: &str| wanted.is_empty() || wanted == part;
    if runs("frames") {
        frames(root);
    }
    if runs("latency") {
        round_trip(root);
    }
    if runs("idle") {
        idle(root);
    }
    if runs("switch") {
        switch();
    }
    if runs("polling") {
        polling(root);
    }
    if runs("guest") {
        guest(root);
    }
}
