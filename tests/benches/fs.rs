//! `./x bench fs`: virtiofsd and Debian's, in turn, from the same client.
//!
//! The client puts FUSE messages into the rings itself and spins for the replies, pinned to one CPU; the
//! daemon is pinned to another. What is compared is the daemon's CPU time for each operation (all its
//! threads, from schedstat) and operations per second. Each number is the median of the rounds; in each
//! round all daemons run in turn. `x4` and `x16` are requests in flight. With four queues nothing is pinned
//! and the client sleeps while it waits. Some cases have a floor: CPU time of the barest system calls for the
//! same, in a plain loop of the client's, in the same rounds.
//!
//! Words after the benchmark's name choose the cases whose names, or whose sections' titles, contain one
//! of them; `million` is a case. `$OUTBOARD_BENCH_DIR` is where the disk's cases keep their file.

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]
#![allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]

#[path = "fs/cases.rs"]
mod cases;
#[path = "fs/floors.rs"]
mod floors;
#[path = "fs/million.rs"]
mod million;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use testkit::daemon::{Daemon, bin};
use testkit::driver::fs::{FsClient, Size};
use testkit::toolroot::ToolRoot;

use cases::{Aim, Case, ENTRIES, FILE_BYTES, Files, SECTIONS, Section};

const ROUNDS: usize = 3;

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

/// Puts this process, and what it starts from now on, on CPU `cpu`; `None`: on any.
fn pin(cpu: Option<usize>) -> Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    let cpus =
        cpu.map_or(0..std::thread::available_parallelism()?.get().max(2), |cpu| cpu..cpu + 1);
    cpus.for_each(|cpu| set.set(cpu));
    rustix::thread::sched_setaffinity(None, &set).with_context(|| format!("pin to CPU {cpu:?}"))
}

fn start(
    root: &ToolRoot,
    who: &Contestant,
    dir: &Path,
    shared: &Path,
    more: &[&str],
    pinned: bool,
) -> Result<Daemon> {
    let socket = dir.join("fs.sock");
    let mut command = if who.peer {
        root.command_with("virtiofsd", &[(dir, dir.to_str().context("a path in UTF-8")?)])?
    } else {
        Command::new(bin("virtiofsd")?)
    };
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--shared-dir={}", shared.display()))
        .args(["--sandbox=none", "--log-level=error"])
        .args(who.arguments)
        .args(more);
    pin(pinned.then_some(0))?;
    let daemon = Daemon::start_command(who.name, command, &socket);
    pin(pinned.then_some(1))?;
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
    // What is written back during a measurement would disturb it.
    rustix::fs::syncfs(fs::File::open(shared)?)?;
    Ok(())
}

/// Median of `values`.
fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// CPU microseconds for one operation, and operations per second, of every case.
fn measure(
    daemon: &Daemon,
    queues: u16,
    section: &Section,
    cases: &[&Case],
) -> Result<Vec<(f64, f64)>> {
    let size = Size { scattered: section.scattered, ..Size::new(queues, 16) };
    let mut client = FsClient::start_sized(daemon.socket(), size)?;
    let inode = client.lookup(1, "file")?;
    let many = client.lookup(1, "many")?;
    let handle = client.open(inode, libc::O_RDWR | section.flags)?;
    let files = Files { inode, handle, many };
    let mut results = Vec::new();
    for case in cases {
        (case.run)(&mut client, &files, (case.count / 20).max(1))?;
        let (cpu, start) = (cpu_ns(daemon)?, Instant::now());
        (case.run)(&mut client, &files, case.count).with_context(|| case.name.to_owned())?;
        let (took, cpu) = (start.elapsed(), cpu_ns(daemon)? - cpu);
        let count = case.count as f64;
        results.push((cpu as f64 / 1000.0 / count, count / took.as_secs_f64()));
    }
    Ok(results)
}

/// Runs `cases` of `section` with all daemons in turn, and prints their table.
fn compare(root: &ToolRoot, section: &Section, cases: &[&Case], dir: &Path) -> Result<()> {
    let shared = dir.join("shared");
    if !shared.exists() {
        prepare(&shared)?;
    }
    // [contestant][case] → values of each round
    let mut cpu = vec![vec![Vec::new(); cases.len()]; CONTESTANTS.len()];
    let mut rate = cpu.clone();
    let mut floors = vec![Vec::new(); cases.len()];
    for _ in 0..ROUNDS {
        for (who, contestant) in CONTESTANTS.iter().enumerate() {
            let queues = if contestant.peer { 1 } else { section.queues };
            let direct: &[&str] = if section.flags == 0 { &[] } else { &["--allow-direct-io"] };
            let daemon = start(root, contestant, dir, &shared, direct, section.queues == 1)?;
            let results = measure(&daemon, queues, section, cases)?;
            for (case, (us, ops)) in results.into_iter().enumerate() {
                cpu[who][case].push(us);
                rate[who][case].push(ops);
            }
            drop(daemon);
            std::thread::sleep(Duration::from_millis(20));
        }
        for (floor, case) in floors.iter_mut().zip(cases) {
            if let Some(one) = case.floor {
                floor.push(floors::measure(one, &shared, case.count)?);
            }
        }
    }
    println!("\n{}; median of {ROUNDS} rounds", section.title);
    println!("{:18} {:>41}   {:>41}   ours / better peer", "", "daemon CPU, us/op", "operations/s");
    print!("{:18}", "");
    for _ in 0..2 {
        CONTESTANTS.iter().for_each(|who| print!(" {:>13}", who.name));
        print!("  ");
    }
    println!("      CPU     rate    floor  aim");
    for (case, what) in cases.iter().enumerate() {
        let us: Vec<f64> = cpu.iter_mut().map(|who| median(&mut who[case])).collect();
        let ops: Vec<f64> = rate.iter_mut().map(|who| median(&mut who[case])).collect();
        print_row(what, &us, &ops, median(&mut floors[case]));
    }
    Ok(())
}

/// One case's line: ours first in both `us` and `ops`; the floor is NaN where there is none.
fn print_row(case: &Case, us: &[f64], ops: &[f64], floor: f64) {
    print!("{:18}", case.name);
    us.iter().for_each(|value| print!(" {value:>13.2}"));
    print!("  ");
    ops.iter().for_each(|value| print!(" {value:>13.0}"));
    let cpu = us[0] / us[1..].iter().copied().fold(f64::INFINITY, f64::min);
    let rate = ops[0] / ops[1..].iter().copied().fold(0.0, f64::max);
    print!("   {cpu:>6.2} x {rate:>6.2} x");
    let floor = if floor.is_nan() { String::new() } else { format!("{floor:.2} us") };
    print!(" {floor:>8}");
    let (met, aim) = match case.aim {
        Aim::None => return println!(),
        Aim::Cpu(most) => (cpu <= most, format!("CPU <= {most} x")),
        Aim::PerCpu(least) => (cpu.recip() >= least, format!("work per CPU >= {least} x")),
        Aim::Rate(least) => (rate >= least, format!("rate >= {least} x")),
    };
    println!("  {aim}{}", if met { "" } else { ": missed" });
}

fn main() -> Result<()> {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let is_wanted =
        |name: &str| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str()));
    let Some(root) = ToolRoot::for_test() else { return Ok(()) };
    let memory = tempfile::Builder::new().prefix("outboard-bench-").tempdir_in("/dev/shm")?;
    let place = std::env::var_os("OUTBOARD_BENCH_DIR").unwrap_or_else(|| "/var/tmp".into());
    let disk = tempfile::Builder::new().prefix("outboard-bench-").tempdir_in(place)?;
    println!("client on CPU 1 and daemon on CPU 0, unless there are 4 queues");
    for section in SECTIONS {
        let cases: Vec<&Case> = (section.cases.iter())
            .filter(|case| is_wanted(case.name) || is_wanted(section.title))
            .collect();
        let dir = if section.disk { disk.path() } else { memory.path() };
        if !cases.is_empty() {
            compare(root, section, &cases, dir)?;
        }
    }
    if is_wanted("million") {
        million::run(root, memory.path())?;
    }
    Ok(())
}
