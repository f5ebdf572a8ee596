//! A daemon's life beside the data path: how long from its start until it answers, what it keeps in
//! memory and burns while one guest is attached and idle, and how long it takes to leave.
//!
//! Every daemon runs alone, in its default sandbox, from the built binary.

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use testkit::daemon::bin;
use testkit::driver::RingFormat;
use testkit::frontend::{AttachOptions, FrontEnd};
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::toolroot::ToolRoot;

/// Starts of each daemon.
const RUNS: usize = 21;
/// How long the attached guest is idle while CPU time is counted.
const IDLE: Duration = Duration::from_secs(2);
/// After a guest attached, until its daemon has nothing left to tidy up.
const SETTLING: Duration = Duration::from_millis(1500);
/// Between two tries to connect.
const STEP: Duration = Duration::from_micros(50);
const TIMEOUT: Duration = Duration::from_secs(10);

/// What is started, and how a guest attaches.
struct Subject {
    name: &'static str,
    arguments: Vec<String>,
    queues: u16,
    namespace: Option<NetNs>,
}

/// One start: until a connection is made, until the first answer, and of SIGTERM until the end; ms.
#[derive(Debug, Clone, Copy)]
struct Times {
    connected: f64,
    answered: f64,
    left: f64,
}

/// What the process has to itself, KiB.
#[derive(Debug, Clone, Copy)]
struct Memory {
    /// Written by it: heap, stacks, data.
    dirty: u64,
    /// Of files, and nobody else has it mapped: code, for a daemon that runs once.
    clean: u64,
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// A started daemon; killed when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Starts `subject` and connects as soon as that can be done.
    fn start(subject: &Subject, socket: &Path) -> Result<(Self, UnixStream, Instant, f64)> {
        let mut command = Command::new(bin(subject.name)?);
        command.arg("--socket-path").arg(socket).args(&subject.arguments);
        // What it logs is in nobody's way here; what it fails with is.
        command.arg("--log-level=warn");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        if let Some(namespace) = &subject.namespace {
            namespace.enter(&mut command);
        }
        let start = Instant::now();
        let running = Self(command.spawn().context(subject.name)?);
        loop {
            if let Ok(stream) = UnixStream::connect(socket) {
                return Ok((running, stream, start, ms(start.elapsed())));
            }
            ensure!(start.elapsed() < TIMEOUT, "{} does not listen", subject.name);
            sleep(STEP);
        }
    }

    /// The process that serves: a confined daemon does its work in a child.
    fn server(&self) -> u32 {
        let mut pid = self.0.id();
        while let Some(child) = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
            .ok()
            .and_then(|list| list.split_ascii_whitespace().next()?.parse().ok())
        {
            pid = child;
        }
        pid
    }

    /// Of all its processes together.
    fn memory(&self) -> Result<Memory> {
        let mut memory = Memory { dirty: 0, clean: 0 };
        let mut pids = vec![self.0.id()];
        if self.server() != self.0.id() {
            pids.push(self.server());
        }
        for pid in pids {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            let field = |name: &str| {
                let line = rollup.lines().find(|l| l.starts_with(name)).unwrap_or_default();
                line.split_ascii_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0u64)
            };
            memory.dirty += field("Private_Dirty:");
            memory.clean += field("Private_Clean:");
        }
        Ok(memory)
    }

    /// On a CPU so far, all threads; nanoseconds from the scheduler.
    fn on_cpu(&self) -> Result<Duration> {
        let mut nanoseconds = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.server()))? {
            let stat = fs::read_to_string(task?.path().join("schedstat"))?;
            let first = stat.split_ascii_whitespace().next().unwrap_or("0");
            nanoseconds += first.parse::<u64>()?;
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// Milliseconds from SIGTERM to its end.
    fn leave(mut self) -> Result<f64> {
        let start = Instant::now();
        kill_process(Pid::from_child(&self.0), Signal::TERM)?;
        let status = self.0.wait()?;
        ensure!(status.success(), "after SIGTERM: {status}");
        Ok(ms(start.elapsed()))
    }
}

fn one_life(subject: &Subject, socket: &Path) -> Result<Times> {
    let (running, stream, start, connected) = Running::start(subject, socket)?;
    let front_end = FrontEnd::from_stream(stream)?;
    front_end.get_features()?;
    let answered = ms(start.elapsed());
    let left = running.leave()?;
    Ok(Times { connected, answered, left })
}

/// Memory as soon as a guest is attached, and CPU time and SIGTERM while it idles.
fn one_guest(subject: &Subject, socket: &Path) -> Result<(Memory, Duration, f64)> {
    let (running, stream, ..) = Running::start(subject, socket)?;
    let ram = GuestRam::new(16 << 20)?;
    let mut front_end = FrontEnd::from_stream(stream)?;
    let options = AttachOptions { queues: subject.queues, ..AttachOptions::new(RingFormat::Split) };
    let attached = front_end.attach(&ram, &options)?;
    // Until all rings have started.
    front_end.get_features()?;
    sleep(SETTLING);
    let before = running.on_cpu()?;
    sleep(IDLE);
    let burnt = running.on_cpu()? - before;
    let memory = running.memory()?;
    let left = running.leave()?;
    drop(attached);
    Ok((memory, burnt, left))
}

fn column(runs: &[Times], of: impl Fn(&Times) -> f64) -> String {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let (least, median) = (values.first().unwrap_or(&0.0), values.get(values.len() / 2));
    format!("{least:5.1}{:6.1}", median.unwrap_or(&0.0))
}

fn report(subject: &Subject, dir: &Path) -> Result<()> {
    let socket = dir.join("device.sock");
    // The first start reads the program from the disk.
    one_life(subject, &socket)?;
    let runs: Result<Vec<Times>> = (0..RUNS).map(|_| one_life(subject, &socket)).collect();
    let runs = runs?;
    let (memory, burnt, left) = one_guest(subject, &socket)?;
    println!(
        "{:16} {} {} {}   {:7} {:7} {:7} {:8.1} {left:9.1}",
        subject.name,
        column(&runs, |t| t.connected),
        column(&runs, |t| t.answered),
        column(&runs, |t| t.left),
        memory.dirty,
        memory.clean,
        memory.dirty + memory.clean,
        burnt.as_secs_f64() * 1e6 / IDLE.as_secs_f64(),
    );
    Ok(())
}

fn subjects(dir: &Path) -> Result<Vec<Subject>> {
    let image = dir.join("image");
    File::create(&image)?.set_len(64 << 20)?;
    let shared = dir.join("shared");
    fs::create_dir(&shared)?;
    let subject = |name, arguments: &[String], queues| Subject {
        name,
        arguments: arguments.to_vec(),
        queues,
        namespace: None,
    };
    let mut all = vec![
        subject("vhost-user-blk", &[format!("--blk-file={}", image.display())], 1),
        subject("virtiofsd", &[format!("--shared-dir={}", shared.display())], 2),
        subject(
            "vsock-proxy",
            &["--guest-cid=3".to_owned(), format!("--uds-path={}", dir.join("vsock").display())],
            3,
        ),
    ];
    match ToolRoot::guests().and_then(NetNs::new) {
        Ok(namespace) => all.push(Subject {
            namespace: Some(namespace),
            ..subject("vhost-user-net", &["--tap=tap0".to_owned()], 2)
        }),
        Err(error) => println!("vhost-user-net is left out: {error:#}"),
    }
    Ok(all)
}

fn main() -> Result<()> {
    let dir = tempfile::tempdir()?;
    println!(
        "                  ms, least and median of {RUNS} lives      KiB, one idle guest     us of CPU   ms to"
    );
    println!(
        "                  connected   answered    left          dirty   clean   private  a second   leave"
    );
    for subject in subjects(dir.path())? {
        report(&subject, dir.path())?;
    }
    Ok(())
}
