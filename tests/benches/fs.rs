//! `./x bench fs`: virtiofsd and Debian's, in turn, from the same client.
//!
//! The client puts FUSE messages into the rings itself and spins for the replies, pinned to one CPU; the
//! daemon is pinned to another. What is compared is the daemon's CPU time for each operation (all its
//! threads, from schedstat) and operations per second. Each number is the median of the rounds; in each
//! round all daemons run in turn.

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]
#![allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use testkit::daemon::{Daemon, bin};
use testkit::driver::fs::{FsClient, Message, op};
use testkit::toolroot::ToolRoot;

const ROUNDS: usize = 3;
const FILE_BYTES: u64 = 64 << 20;
const ENTRIES: usize = 10_000;

/// One of the daemons compared.
struct Contestant {
    name: &'static str,
    peer: bool,
    arguments: &'static [&'static str],
}

const CONTESTANTS: &[Contestant] = &[
    Contestant { name: "ours", peer: false, arguments: &[] },
    Contestant { name: "1.14 defaults", peer: true, arguments: &[] },
    Contestant { name: "1.14 fastest", peer: true, arguments: &["--inode-file-handles=never"] },
];

/// One thing measured: how often, and how.
struct Case {
    name: &'static str,
    count: usize,
    run: fn(&mut FsClient, &Files, usize) -> Result<()>,
}

/// What the client found in the shared directory.
struct Files {
    inode: u64,
    handle: u64,
}

fn named(opcode: u32, name: &str) -> Message {
    Message { opcode, nodeid: 1, body: [name.as_bytes(), b"\0"].concat(), ..Message::default() }
}

/// Offsets that jump about the file.
fn scattered(i: usize, size: u64) -> u64 {
    (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) % (FILE_BYTES / size) * size
}

fn getattr(c: &mut FsClient, f: &Files, n: usize, depth: usize) -> Result<()> {
    c.pump(1, depth, n, |_| Message::new(op::GETATTR, f.inode, &[0u64; 2]))
}

fn lookup(c: &mut FsClient, n: usize, depth: usize) -> Result<()> {
    c.pump(1, depth, n, |_| named(op::LOOKUP, "file"))
}

fn read(c: &mut FsClient, f: &Files, n: usize, depth: usize, size: u32) -> Result<()> {
    c.pump(1, depth, n, |i| {
        let at =
            if size > 4096 { i as u64 * u64::from(size) % FILE_BYTES } else { scattered(i, 4096) };
        Message::read(f.inode, f.handle, at, size)
    })
}

fn write(c: &mut FsClient, f: &Files, n: usize, depth: usize, size: u32) -> Result<()> {
    c.pump(1, depth, n, |i| {
        let at =
            if size > 4096 { i as u64 * u64::from(size) % FILE_BYTES } else { scattered(i, 4096) };
        Message::write(f.inode, f.handle, at, size)
    })
}

/// CREATE, RELEASE, UNLINK and FORGET of one file after another.
fn create_unlink(c: &mut FsClient, n: usize) -> Result<()> {
    for i in 0..n {
        let name = format!("made-{}", i % 100);
        let mut create = named(op::CREATE, &name);
        let flags = u32::from_ne_bytes((libc::O_RDWR | libc::O_CREAT).to_ne_bytes());
        let head = [flags, 0o100_644, 0, 0];
        create.body.splice(0..0, head.iter().flat_map(|word| word.to_ne_bytes()));
        let made = c.call(create)?;
        let (inode, handle) = (made.u64_at(0)?, made.u64_at(128)?);
        c.call(Message::new(op::RELEASE, inode, &[handle, 0, 0]))?;
        c.call(named(op::UNLINK, &name))?;
        c.forget(inode, 1)?;
    }
    Ok(())
}

/// Whole listings of the directory of 10,000.
fn list(c: &mut FsClient, n: usize) -> Result<()> {
    let directory = c.lookup(1, "many")?;
    for _ in 0..n {
        let handle = c.call(Message::new(op::OPENDIR, directory, &[0u32; 2]))?.u64_at(0)?;
        let mut offset = 0;
        loop {
            let body = [handle, offset, 128 << 10, 0, 0];
            let mut message = Message::new(op::READDIR, directory, &body);
            message.data_in = 128 << 10;
            let answer = c.call(message)?;
            let len = usize::try_from(answer.len)? - 16;
            if len == 0 {
                break;
            }
            offset = last_offset(&c.ram().bytes(c.data_at(0).1, len))?;
        }
        c.call(Message::new(op::RELEASEDIR, directory, &[handle, 0, 0]))?;
    }
    Ok(())
}

/// Where the last entry of a listing ends in the directory.
fn last_offset(mut entries: &[u8]) -> Result<u64> {
    let mut offset = 0;
    while !entries.is_empty() {
        let word = |at: usize| entries.get(at..at + 8).context("a short entry");
        offset = u64::from_ne_bytes(word(8)?.try_into()?);
        let name = u32::from_ne_bytes(word(16)?[..4].try_into()?) as usize;
        entries = entries.get((24 + name).next_multiple_of(8)..).unwrap_or(&[]);
    }
    Ok(offset)
}

const CASES: &[Case] = &[
    Case { name: "getattr", count: 10_000, run: |c, f, n| getattr(c, f, n, 1) },
    Case { name: "getattr x16", count: 30_000, run: |c, f, n| getattr(c, f, n, 16) },
    Case { name: "lookup", count: 10_000, run: |c, _, n| lookup(c, n, 1) },
    Case { name: "lookup x16", count: 30_000, run: |c, _, n| lookup(c, n, 16) },
    Case { name: "read 4k", count: 10_000, run: |c, f, n| read(c, f, n, 1, 4096) },
    Case { name: "read 4k x16", count: 30_000, run: |c, f, n| read(c, f, n, 16, 4096) },
    Case { name: "write 4k", count: 8_000, run: |c, f, n| write(c, f, n, 1, 4096) },
    Case { name: "write 4k x16", count: 10_000, run: |c, f, n| write(c, f, n, 16, 4096) },
    Case { name: "read 1M", count: 1500, run: |c, f, n| read(c, f, n, 4, 1 << 20) },
    Case { name: "write 1M", count: 500, run: |c, f, n| write(c, f, n, 4, 1 << 20) },
    Case { name: "create+unlink", count: 4000, run: |c, _, n| create_unlink(c, n) },
    Case { name: "readdir 10k", count: 30, run: |c, _, n| list(c, n) },
];

/// Puts this process, and what it starts from now on, on CPU `cpu`.
fn pin(cpu: usize) -> Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("pin to CPU {cpu}"))
}

fn start(root: &ToolRoot, who: &Contestant, dir: &Path, shared: &Path) -> Result<Daemon> {
    let socket = dir.join("fs.sock");
    let mut command =
        if who.peer { root.command("virtiofsd")? } else { Command::new(bin("virtiofsd")?) };
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--shared-dir={}", shared.display()))
        .args(["--sandbox=none", "--log-level=error"])
        .args(who.arguments);
    pin(0)?;
    let daemon = Daemon::start_command(who.name, command, &socket);
    pin(1)?;
    daemon
}

/// CPU time of all threads that run, nanoseconds.
fn cpu_ns(daemon: &Daemon) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{}/task", daemon.pid()))? {
        let stat = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        sum += stat.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
    }
    Ok(sum)
}

fn prepare(shared: &Path) -> Result<()> {
    fs::create_dir_all(shared.join("many"))?;
    fs::write(shared.join("file"), vec![7; usize::try_from(FILE_BYTES)?])?;
    for i in 0..ENTRIES {
        fs::write(shared.join(format!("many/entry-{i}")), "")?;
    }
    Ok(())
}

/// Median of `values`.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// CPU microseconds for one operation, and operations per second, of every case.
fn measure(daemon: &Daemon, cases: &[&Case]) -> Result<Vec<(f64, f64)>> {
    let mut client = FsClient::start(daemon.socket(), 1, 16)?;
    let inode = client.lookup(1, "file")?;
    let handle = client.open(inode, libc::O_RDWR)?;
    let files = Files { inode, handle };
    let mut results = Vec::new();
    for case in cases {
        (case.run)(&mut client, &files, case.count / 20)?;
        let (cpu, start) = (cpu_ns(daemon)?, Instant::now());
        (case.run)(&mut client, &files, case.count).with_context(|| case.name.to_owned())?;
        let (took, cpu) = (start.elapsed(), cpu_ns(daemon)? - cpu);
        let count = case.count as f64;
        results.push((cpu as f64 / 1000.0 / count, count / took.as_secs_f64()));
    }
    Ok(results)
}

fn main() -> Result<()> {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let cases: Vec<&Case> = CASES
        .iter()
        .filter(|case| {
            wanted.is_empty() || wanted.iter().any(|word| case.name.contains(word.as_str()))
        })
        .collect();
    let Some(root) = ToolRoot::for_test() else { return Ok(()) };
    let dir = tempfile::Builder::new().prefix("outboard-bench-").tempdir_in("/dev/shm")?;
    let shared: PathBuf = dir.path().join("shared");
    prepare(&shared)?;
    // [contestant][case] → values of each round
    let mut cpu = vec![vec![Vec::new(); cases.len()]; CONTESTANTS.len()];
    let mut rate = cpu.clone();
    for _ in 0..ROUNDS {
        for (who, contestant) in CONTESTANTS.iter().enumerate() {
            let daemon = start(root, contestant, dir.path(), &shared)?;
            for (case, (us, ops)) in measure(&daemon, &cases)?.into_iter().enumerate() {
                cpu[who][case].push(us);
                rate[who][case].push(ops);
            }
            drop(daemon);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    println!("tmpfs, one queue, client on CPU 1, daemon on CPU 0; median of {ROUNDS} rounds");
    println!("{:16} {:>44}   {:>44}", "", "daemon CPU, us/op", "operations/s");
    print!("{:16}", "");
    for _ in 0..2 {
        for who in CONTESTANTS {
            print!(" {:>13}", who.name);
        }
        print!("     ");
    }
    println!(" CPU against the better peer");
    for (case, what) in cases.iter().enumerate() {
        print!("{:16}", what.name);
        let us: Vec<f64> = cpu.iter_mut().map(|who| median(&mut who[case])).collect();
        let ops: Vec<f64> = rate.iter_mut().map(|who| median(&mut who[case])).collect();
        us.iter().for_each(|value| print!(" {value:>13.2}"));
        print!("     ");
        ops.iter().for_each(|value| print!(" {value:>13.0}"));
        let better = us[1..].iter().copied().fold(f64::INFINITY, f64::min);
        println!("      {:.2} x", us[0] / better);
    }
    Ok(())
}
