//! A daemon process of a test: one of the workspace, or a peer.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};

use crate::driver::wait_readable;

/// How long a daemon may take until it listens; start-up is milliseconds, the rest is a slow machine.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a daemon's state is looked at.
const POLL: Duration = Duration::from_millis(2);
/// Age of a socket file whose daemon listens by now.
const SETTLED: Duration = Duration::from_millis(50);
/// The flag `__SO_ACCEPTCON` of a listening socket in `/proc/net/unix`.
const LISTENING: &str = "00010000";

/// One request to a daemon's control socket, and its answer: a line of JSON each.
///
/// # Panics
/// When nobody answers.
#[must_use]
pub fn ask(control: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(control).expect("a control socket");
    writeln!(stream, "{request}").expect("a request");
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).expect("an answer");
    answer
}

/// The sum of all series of the counter `name` (without `outboard_`) that a daemon's metrics socket shows.
///
/// # Panics
/// When nobody answers, or there is no such counter.
#[must_use]
pub fn metric(metrics: &Path, name: &str) -> u64 {
    let stream = UnixStream::connect(metrics).expect("a metrics socket");
    let text = std::io::read_to_string(stream).expect("metrics");
    let start = format!("outboard_{name}{{");
    let values: Vec<u64> = text
        .lines()
        .filter(|line| line.starts_with(&start))
        .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
        .collect();
    assert!(!values.is_empty(), "no {name} in\n{text}");
    values.iter().sum()
}

/// When the file was made or changed last, to the clock's tick of a few milliseconds.
fn made(file: &Path) -> Option<SystemTime> {
    fs::metadata(file).and_then(|meta| meta.modified()).ok()
}

/// A running daemon that listens. Dropping it kills it and, in a failing test, shows its log.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
    socket: PathBuf,
    /// When the socket was made that a predecessor left here.
    stale: Option<SystemTime>,
    /// The test itself killed it.
    killed: bool,
}

impl Daemon {
    /// Starts a binary of the workspace with `--socket-path=SOCKET` and `arguments`, and waits
    /// until it listens. Its log is beside the socket.
    ///
    /// # Errors
    /// When it cannot be built, or ends or does not listen in time; the error has its log.
    pub fn start<S: AsRef<OsStr>>(name: &str, socket: &Path, arguments: &[S]) -> Result<Self> {
        let mut command = Command::new(bin(name)?);
        command.arg(format!("--socket-path={}", socket.display())).args(arguments);
        Self::start_command(name, command, socket)
    }

    /// Starts `command` and waits until it listens at `socket`.
    ///
    /// # Errors
    /// When it ends or does not listen in time; the error has its log.
    pub fn start_command(name: &str, mut command: Command, socket: &Path) -> Result<Self> {
        let log = socket.with_extension("log");
        let file = File::options().create(true).append(true).open(&log)?;
        let stale = made(socket);
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let (name, socket) = (name.to_owned(), socket.to_owned());
        let mut daemon = Self { name, child, log, socket, stale, killed: false };
        daemon.wait_until_listening()?;
        Ok(daemon)
    }

    fn wait_until_listening(&mut self) -> Result<()> {
        let deadline = Instant::now() + READY_TIMEOUT;
        // A connection to find out would be a front end to the daemon; some peers then exit.
        while !self.is_listening() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended at once ({status}); its log:\n{}", self.name, self.log());
            }
            if Instant::now() > deadline {
                bail!(
                    "{} does not listen at {}; its log:\n{}",
                    self.name,
                    self.socket.display(),
                    self.log()
                );
            }
            sleep(POLL);
        }
        Ok(())
    }

    fn is_listening(&self) -> bool {
        let tables = ["/proc/net/unix".to_owned(), format!("/proc/{}/net/unix", self.pid())];
        let listed = tables.iter().any(|table| {
            fs::read_to_string(table).unwrap_or_default().lines().any(|line| {
                let mut fields = line.split_ascii_whitespace();
                fields.nth(3) == Some(LISTENING)
                    && fields.nth(3).is_some_and(|path| Path::new(path) == self.socket)
            })
        });
        listed || self.is_settled()
    }

    /// Whether the socket has been there for a while. A daemon that was started in one network name
    /// space and locked itself into another listens in a table that neither has.
    fn is_settled(&self) -> bool {
        made(&self.socket)
            .is_some_and(|at| self.stale != Some(at) && at.elapsed().is_ok_and(|age| age > SETTLED))
    }

    /// Where the daemon listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the daemon printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Whether the process still runs.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The process and those it made: a confined daemon does its work in a child.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let mut all = vec![self.pid()];
        let mut next = 0;
        while let Some(pid) = all.get(next) {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            let children = children.unwrap_or_default();
            all.extend(children.split_ascii_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
            next += 1;
        }
        all
    }

    /// The process that serves: a confined daemon's child, or the daemon itself.
    #[must_use]
    pub fn serving_pid(&self) -> u32 {
        self.processes().last().copied().unwrap_or(self.pid())
    }

    /// User and system time of all threads, ended ones included; steps of 10 ms.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn cpu_time(&self) -> Result<Duration> {
        let mut ticks = 0;
        for pid in self.processes() {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
            // The second field is the name in parentheses, which may have blanks itself.
            let (_, fields) = stat.rsplit_once(')').context("malformed /proc/PID/stat")?;
            for field in fields.split_ascii_whitespace().skip(11).take(2) {
                ticks += field.parse::<u64>()?;
            }
        }
        Ok(Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second())?)
    }

    /// Bytes of memory that belong to the daemon alone; guest memory is shared and not in it.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn private_bytes(&self) -> Result<u64> {
        let mut kib = 0;
        for pid in self.processes() {
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
            for line in rollup.lines() {
                if let Some((_, value)) = line
                    .split_once(':')
                    .filter(|(key, _)| matches!(*key, "Private_Clean" | "Private_Dirty"))
                {
                    kib += value.trim().trim_end_matches(" kB").parse::<u64>()?;
                }
            }
        }
        Ok(kib * 1024)
    }

    /// How many file descriptors the daemon has open: the process of it that has most.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn open_fds(&self) -> Result<usize> {
        let mut most = 0;
        for pid in self.processes() {
            most = most.max(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
        }
        Ok(most)
    }

    /// Kills the daemon as a crash would, and waits until it is gone.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.killed = true;
        self.child.kill()?;
        Ok(self.child.wait()?)
    }

    /// Asks the daemon to end (SIGTERM) and waits until it did.
    ///
    /// # Errors
    /// When it does not within `timeout`.
    pub fn terminate(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let pid = Pid::from_child(&self.child);
        let end = pidfd_open(pid, PidfdFlags::empty())?;
        rustix::process::kill_process(pid, Signal::TERM)?;
        if wait_readable(&end, timeout)? {
            return Ok(self.child.wait()?);
        }
        bail!("{} did not end within {timeout:?} of SIGTERM; its log:\n{}", self.name, self.log())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let ended = self.child.try_wait().ok().flatten();
        let _ = self.child.kill();
        let _ = self.child.wait();
        let crashed = !self.killed && ended.is_some_and(|status| status.signal().is_some());
        if crashed || std::thread::panicking() {
            let end = ended.map_or("still ran".to_owned(), |status| status.to_string());
            show(&format!("log of {} ({end})", self.name), &self.log());
        }
    }
}

/// Shows a captured text with a failing test.
pub(crate) fn show(title: &str, text: &str) {
    let _ = write!(std::io::stderr(), "---- {title}\n{text}\n----\n");
}

/// Copies a program that a test then runs. Another process writes the copy: were it this one, a process that
/// another test of ours starts meanwhile would have it open for a moment too, and the kernel runs nothing
/// that is open for writing (`ETXTBSY`). With `len`, zeroes behind its end make it so many bytes long.
///
/// # Errors
/// When it cannot be copied.
pub fn copy_program(from: &Path, to: &Path, len: Option<u64>) -> Result<()> {
    let mut commands = vec![Command::new("cp")];
    commands[0].arg(from).arg(to);
    if let Some(len) = len {
        let mut truncate = Command::new("truncate");
        truncate.arg(format!("--size={len}")).arg(to);
        commands.push(truncate);
    }
    for mut command in commands {
        let status = command.status()?;
        anyhow::ensure!(status.success(), "{command:?}: {status}");
    }
    Ok(())
}

/// The path of the workspace's binary `name`: from `$OUTBOARD_BIN_DIR`, else built here with the
/// profile of the running test and up to date.
///
/// # Errors
/// When it is not in `$OUTBOARD_BIN_DIR`, or cannot be built.
pub fn bin(name: &str) -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("OUTBOARD_BIN_DIR") {
        let path = PathBuf::from(dir).join(name);
        return path
            .is_file()
            .then_some(path)
            .with_context(|| format!("OUTBOARD_BIN_DIR has no {name}"));
    }
    // …/target/debug/deps/this-test, or …/target/debug/this-program
    let program = std::env::current_exe()?;
    let dir = program
        .ancestors()
        .skip(1)
        .find(|dir| !matches!(dir.file_name().and_then(OsStr::to_str), Some("deps" | "examples")))
        .context("the running program has no directory")?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo
        .args(["build", "--quiet", "--workspace", "--bin", name])
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    if dir.ends_with("release") {
        cargo.arg("--release");
    }
    if let Some(target) = dir.parent() {
        cargo.arg("--target-dir").arg(target);
    }
    let output = cargo.output().context("run cargo")?;
    if !output.status.success() {
        bail!("build {name}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(dir.join(name))
}
