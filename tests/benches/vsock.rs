//! vsock-proxy and vhost-device-vsock, in turn in one run. The guest is a driver that polls, so that
//! what is measured is the proxy, and the processor time is that of the proxy's process alone.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use testkit::driver::RingFormat;
use testkit::driver::vsock::{Packet, STREAM, VsockGuest, VsockOptions, op};
use testkit::toolroot::ToolRoot;
use testkit::vsock_host::VsockHost;

/// How long a throughput is measured.
const TIME: Duration = Duration::from_millis(1500);
const BUF_ALLOC: u32 = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    Ours,
    Peer,
}

impl Program {
    fn start(self) -> Result<VsockHost> {
        match self {
            Self::Ours => VsockHost::start(&[]),
            Self::Peer => {
                let root = ToolRoot::guests()?;
                VsockHost::start_program("peer", root.command("vhost-device-vsock")?)
            }
        }
    }
}

fn options(rx_size: u32) -> VsockOptions {
    VsockOptions {
        format: RingFormat::Split,
        features: VsockGuest::usual_features(),
        queue_size: 256,
        rx_size,
        rx_buffers: 256,
        memory: 64 << 20,
    }
}

/// Polls for the next packet.
fn next(guest: &mut VsockGuest) -> Result<Packet> {
    let mut wait = Wait::default();
    loop {
        if let Some(packet) = guest.poll_header()? {
            return Ok(packet);
        }
        wait.once()?;
    }
}

/// Waiting without sleeping.
#[derive(Debug, Default)]
struct Wait {
    rounds: u32,
    since: Option<Instant>,
}

impl Wait {
    /// One round in vain.
    fn once(&mut self) -> Result<()> {
        self.rounds += 1;
        if !self.rounds.is_multiple_of(200) {
            std::hint::spin_loop();
            return Ok(());
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        ensure!(since.elapsed() < Duration::from_secs(5), "the proxy stands still");
        // On a busy machine the proxy may have no other processor.
        std::thread::yield_now();
        Ok(())
    }
}

/// Polls for a packet with operation `op`; others are passed over.
fn next_of(guest: &mut VsockGuest, op: u16) -> Result<Packet> {
    loop {
        let packet = next(guest)?;
        if packet.op == op {
            return Ok(packet);
        }
    }
}

/// A packet from port `from` of the guest.
fn packet(from: u32, to: u32, op: u16, fwd_cnt: u32) -> Packet {
    Packet { socket_type: STREAM, buf_alloc: BUF_ALLOC, fwd_cnt, ..Packet::new(3, from, to, op) }
}

/// A service at `port` of the host that does `serve` with its one client.
fn service<T: Send + 'static>(
    host: &VsockHost,
    port: u32,
    serve: impl FnOnce(UnixStream) -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let listener = host.listen(port)?;
    Ok(std::thread::spawn(move || serve(listener.accept().expect("a client").0)))
}

fn connect(guest: &mut VsockGuest, from: u32, to: u32) -> Result<Packet> {
    guest.send_header(&packet(from, to, op::REQUEST, 0), 0)?;
    next_of(guest, op::RESPONSE)
}

/// MB/s, and CPU-µs of the proxy per MB.
struct Throughput {
    rate: f64,
    cpu: f64,
}

fn throughput(bytes: u64, time: Duration, cpu: Duration) -> Throughput {
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    let megabytes = bytes as f64 / 1e6;
    Throughput { rate: megabytes / time.as_secs_f64(), cpu: cpu.as_secs_f64() * 1e6 / megabytes }
}

fn guest_to_host(program: Program) -> Result<Throughput> {
    let host = program.start()?;
    let mut guest = VsockGuest::start(host.daemon.socket(), options(4096))?;
    let reader = service(&host, 80, |mut stream| {
        let mut buffer = vec![0; 256 << 10];
        let mut total = 0u64;
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            total += n as u64;
        }
        total
    })?;
    let response = connect(&mut guest, 1025, 80)?;
    let (mut alloc, mut fwd, mut sent) = (response.buf_alloc, response.fwd_cnt, 0u32);
    let (start, cpu) = (Instant::now(), host.daemon.cpu_time()?);
    let mut total = 0u64;
    let rw = packet(1025, 80, op::RW, 0);
    while start.elapsed() < TIME {
        let credit = alloc.saturating_sub(sent.wrapping_sub(fwd));
        let n = credit.min(64 << 10);
        // As Linux does: what there is credit for, if it is worth a packet.
        if n >= 4096 {
            guest.send_header(&rw, n)?;
            sent = sent.wrapping_add(n);
            total += u64::from(n);
        }
        let seen = if n >= 4096 { guest.poll_header()? } else { Some(next(&mut guest)?) };
        if let Some(seen) = seen {
            (alloc, fwd) = (seen.buf_alloc, seen.fwd_cnt);
        }
    }
    let result = throughput(total, start.elapsed(), host.daemon.cpu_time()? - cpu);
    drop(guest);
    let _ = reader.join();
    Ok(result)
}

fn host_to_guest(program: Program, rx_size: u32) -> Result<Throughput> {
    let host = program.start()?;
    let mut guest = VsockGuest::start(host.daemon.socket(), options(rx_size))?;
    let writer = service(&host, 80, |mut stream| {
        let buffer = vec![7; 256 << 10];
        while stream.write_all(&buffer).is_ok() {}
    })?;
    connect(&mut guest, 1025, 80)?;
    let (start, cpu) = (Instant::now(), host.daemon.cpu_time()?);
    let (mut total, mut told) = (0u64, 0u64);
    while start.elapsed() < TIME {
        let seen = next(&mut guest)?;
        total += u64::from(seen.len);
        // As Linux does: when a quarter of the buffer is taken and not yet told.
        if seen.op == op::CREDIT_REQUEST || total - told >= u64::from(BUF_ALLOC / 4) {
            #[allow(clippy::cast_possible_truncation, reason = "credit counts modulo 2^32")]
            let fwd_cnt = total as u32;
            guest.send_header(&packet(1025, 80, op::CREDIT_UPDATE, fwd_cnt), 0)?;
            told = total;
        }
    }
    let result = throughput(total, start.elapsed(), host.daemon.cpu_time()? - cpu);
    drop(guest);
    drop(host);
    let _ = writer.join();
    Ok(result)
}

/// Round trips of 64 bytes through an echo on the host, in microseconds: the median and the 99th
/// percentile.
fn round_trips(program: Program) -> Result<(f64, f64)> {
    const ROUNDS: usize = 8000;
    let host = program.start()?;
    let mut guest = VsockGuest::start(host.daemon.socket(), options(4096))?;
    let echo = service(&host, 80, |mut stream| {
        let mut buffer = [0; 64];
        while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
    })?;
    connect(&mut guest, 1025, 80)?;
    let mut times = Vec::with_capacity(ROUNDS);
    let mut taken = 0;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        guest.send_header(&packet(1025, 80, op::RW, taken), 64)?;
        let mut got = 0;
        while got < 64 {
            let seen = next(&mut guest)?;
            got += seen.len;
        }
        taken += got;
        times.push(start.elapsed());
    }
    drop(guest);
    drop(host);
    let _ = echo.join();
    times.sort_unstable();
    let at = |part: usize| times[ROUNDS * part / 100].as_secs_f64() * 1e6;
    Ok((at(50), at(99)))
}

/// Connections that are asked for at one time: enough that the proxy is never idle for want of them.
const AT_ONCE: u32 = 8;
/// Connections that are measured.
const CONNECTS: u32 = 24_000;

/// Connections a second, and CPU-µs of the proxy for each.
fn connects(count: u32, start: Instant, cpu: Duration) -> (f64, f64) {
    let count = f64::from(count);
    (count / start.elapsed().as_secs_f64(), cpu.as_secs_f64() * 1e6 / count)
}

/// Connections of `at_once` clients of the host to the guest, each made, answered and closed. Clients
/// and guest are one thread that never sleeps: nobody but the proxy is waited for.
fn connects_to_guest(program: Program, at_once: u32) -> Result<(f64, f64)> {
    let host = program.start()?;
    let mut guest = VsockGuest::start(host.daemon.socket(), options(4096))?;
    let mut clients = VecDeque::new();
    let (start, cpu) = (Instant::now(), host.daemon.cpu_time()?);
    let (mut asked, mut answered, mut done) = (0, 0, 0);
    let mut wait = Wait::default();
    while done < CONNECTS {
        while asked < CONNECTS && asked - done < at_once {
            let mut stream = UnixStream::connect(host.path("host"))?;
            stream.write_all(b"CONNECT 80\n")?;
            clients.push_back(stream);
            asked += 1;
        }
        while let Some(seen) = guest.poll_header()? {
            let answer = match seen.op {
                op::REQUEST => op::RESPONSE,
                op::SHUTDOWN => op::RST,
                _ => continue,
            };
            answered += u32::from(seen.op == op::REQUEST);
            guest.send_header(&packet(seen.dst_port, seen.src_port, answer, 0), 0)?;
        }
        let before = done;
        let mut line = [0; 32];
        // Nobody is told before the guest answered; asking would be a system call each time.
        while let Some(first) = clients.front().filter(|_| answered > done) {
            match recv(first, &mut line, RecvFlags::DONTWAIT) {
                Ok((n, _)) => ensure!(n > 3, "refused"),
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
            clients.pop_front();
            done += 1;
        }
        if done > before {
            wait = Wait::default();
        } else {
            wait.once()?;
        }
    }
    Ok(connects(CONNECTS, start, host.daemon.cpu_time()? - cpu))
}

/// Connections of the guest to a service of the host, `at_once` of them asked for at one time; closed
/// by the guest. The guest and the service are one thread that never sleeps.
fn connects_to_host(program: Program, at_once: u32) -> Result<(f64, f64)> {
    let host = program.start()?;
    let mut guest = VsockGuest::start(host.daemon.socket(), options(4096))?;
    let listener: UnixListener = host.listen(80)?;
    // Keeps a few open, and closes the oldest: by then the guest has reset it.
    let mut kept = VecDeque::new();
    let (start, cpu) = (Instant::now(), host.daemon.cpu_time()?);
    let (mut next_port, mut answered, mut refused) = (10_000, 0, 0);
    let mut waiting = Vec::new();
    while answered < CONNECTS {
        while waiting.len() < at_once as usize {
            guest.send_header(&packet(next_port, 80, op::REQUEST, 0), 0)?;
            waiting.push(next_port);
            next_port += 1;
        }
        let seen = next(&mut guest)?;
        // What comes for others is of a proxy that answers twice, or that hears of the service's end before
        // it hears of the guest's.
        let Some(at) = waiting.iter().position(|&port| port == seen.dst_port) else { continue };
        waiting.swap_remove(at);
        if seen.op != op::RESPONSE {
            refused += 1;
            continue;
        }
        answered += 1;
        guest.send_header(&packet(seen.dst_port, 80, op::RST, 0), 0)?;
        kept.push_back(listener.accept()?.0);
        if kept.len() > 4 * AT_ONCE as usize {
            kept.pop_front();
        }
    }
    let result = connects(CONNECTS, start, host.daemon.cpu_time()? - cpu);
    if refused > 0 {
        say(&format!("({program:?} refused {refused} of {CONNECTS}; they were asked for again)"));
    }
    Ok(result)
}

/// With 1000 idle connections: CPU in milliseconds a second, private KiB without, and bytes for each.
fn idle(program: Program) -> Result<(f64, f64, f64)> {
    const COUNT: u32 = 1000;
    let host = program.start()?;
    let mut guest = VsockGuest::start(host.daemon.socket(), options(4096))?;
    let listener = host.listen(80)?;
    let mut streams = Vec::new();
    // The first have the program's own pages read in, which are no connection's.
    for port in COUNT..COUNT + 32 {
        connect(&mut guest, 10_000 + port, 80)?;
        streams.push(listener.accept()?.0);
    }
    // A proxy that tidies up after its guest's attaching does it within a second.
    std::thread::sleep(Duration::from_millis(1500));
    let empty = host.daemon.private_bytes()?;
    for port in 0..COUNT {
        connect(&mut guest, 10_000 + port, 80)?;
        streams.push(listener.accept()?.0);
    }
    let full = host.daemon.private_bytes()?;
    let cpu = host.daemon.cpu_time()?;
    std::thread::sleep(Duration::from_secs(1));
    let cpu = host.daemon.cpu_time()? - cpu;
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    let each = full.saturating_sub(empty) as f64 / f64::from(COUNT);
    #[allow(clippy::cast_precision_loss, reason = "for people")]
    let kib = empty as f64 / 1024.0;
    Ok((cpu.as_secs_f64() * 1e3, kib, each))
}

/// A measurement of both: its unit, and what a program gives.
fn row(name: &str, unit: &str, ours: Result<f64>, peer: Result<f64>) {
    let show = |value: &Result<f64>| match value {
        Ok(value) => format!("{value:10.1}"),
        Err(error) => format!("{:>10}", format!("({error})")),
    };
    let ratio = match (&ours, &peer) {
        (Ok(a), Ok(b)) if *b > 0.0 => format!("{:6.2} x", a / b),
        _ => String::new(),
    };
    say(&format!("{name:34} {unit:10} {} {} {ratio}", show(&ours), show(&peer)));
}

fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn both<T>(measure: impl Fn(Program) -> Result<T>) -> (Result<T>, Result<T>) {
    (measure(Program::Ours), measure(Program::Peer))
}

fn split<A, B>(result: Result<(A, B)>) -> (Result<A>, Result<B>) {
    match result {
        Ok((a, b)) => (Ok(a), Ok(b)),
        Err(error) => (Err(anyhow::anyhow!("{error:#}")), Err(error)),
    }
}

fn throughput_rows(name: &str, (ours, peer): (Result<Throughput>, Result<Throughput>)) {
    let pair = |r: Result<Throughput>| split(r.map(|t| (t.rate, t.cpu)));
    let ((rate, cpu), (peer_rate, peer_cpu)) = (pair(ours), pair(peer));
    row(name, "MB/s", rate, peer_rate);
    row(name, "CPU-us/MB", cpu, peer_cpu);
}

fn connect_rows(name: &str, (ours, peer): (Result<(f64, f64)>, Result<(f64, f64)>)) {
    let ((rate, cpu), (peer_rate, peer_cpu)) = (split(ours), split(peer));
    let in_cpu_second = |cpu: &Result<f64>| match cpu {
        Ok(cpu) => Ok(1e6 / cpu),
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    let (each, peer_each) = (in_cpu_second(&cpu), in_cpu_second(&peer_cpu));
    row(name, "1/s", rate, peer_rate);
    row(name, "CPU-us", cpu, peer_cpu);
    row(name, "1/CPU-s", each, peer_each);
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let is_wanted =
        |name: &str| wanted.is_empty() || wanted.iter().any(|w| name.contains(w.as_str()));
    say(&format!("{:34} {:10} {:>10} {:>10}", "", "", "ours", "peer"));
    if is_wanted("up") {
        throughput_rows("guest to host, 64 KiB packets", both(guest_to_host));
    }
    if is_wanted("down") {
        throughput_rows("host to guest, 4 KiB buffers", both(|p| host_to_guest(p, 4096)));
        throughput_rows("host to guest, 64 KiB buffers", both(|p| host_to_guest(p, 64 << 10)));
    }
    if is_wanted("rtt") {
        let (ours, peer) = both(round_trips);
        let ((p50, p99), (peer_p50, peer_p99)) = (split(ours), split(peer));
        row("round trip, 64 B, median", "us", p50, peer_p50);
        row("round trip, 64 B, 99 %", "us", p99, peer_p99);
    }
    if is_wanted("connect-guest") {
        for at_once in [AT_ONCE, 1] {
            let both = both(|p| connects_to_guest(p, at_once));
            connect_rows(&format!("connects host to guest, {at_once} at once"), both);
        }
    }
    if is_wanted("connect-host") {
        for at_once in [AT_ONCE, 1] {
            let both = both(|p| connects_to_host(p, at_once));
            connect_rows(&format!("connects guest to host, {at_once} at once"), both);
        }
    }
    if is_wanted("idle") {
        let (ours, peer) = both(|p| idle(p).map(|(cpu, kib, each)| (cpu, (kib, each))));
        let ((cpu, rest), (peer_cpu, peer_rest)) = (split(ours), split(peer));
        let ((kib, each), (peer_kib, peer_each)) = (split(rest), split(peer_rest));
        row("1000 idle connections, CPU", "ms/s", cpu, peer_cpu);
        row("private memory, no connection", "KiB", kib, peer_kib);
        row("memory of an idle connection", "bytes", each, peer_each);
    }
}
