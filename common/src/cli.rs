//! The arguments every daemon shares, and the one way a program starts and ends.
//!
//! A daemon's own argument struct flattens the groups it needs. Values are checked while they are
//! parsed, so a daemon never sees a malformed one. Every mistake of an operator ends in one line
//! on stderr, `error: what: why`, and exit code 1, whether it was found by the parser or later.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, FromArgMatches};

use crate::capabilities::{self, Capabilities};
use crate::logging::Level;
use crate::sandbox::seccomp::Mode as SeccompMode;

mod cpus;
#[cfg(feature = "docs")]
mod generate;
pub mod values;

use values::{CpuList, socket_path};

/// Where the front end is met. At most one of the two places may be given.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Connection")]
pub struct SocketArgs {
    /// Unix socket on which the VMM is served; created, unless --client is given
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub socket_path: Option<PathBuf>,

    /// Dial the socket instead of listening on it, again whenever the VMM goes away
    #[arg(long, requires = "socket_path", conflicts_with = "fd")]
    pub client: bool,

    /// Use this inherited socket, which may be listening or already connected
    #[arg(long, value_name = "FDNUM", conflicts_with = "socket_path",
          value_parser = clap::value_parser!(i32).range(0..))]
    pub fd: Option<RawFd>,

    /// Offer ACCESS_PLATFORM, for guests behind a virtual IOMMU or with encrypted memory
    /// (QEMU's iommu_platform=on); UML guests do not start with it
    #[arg(long)]
    pub iommu_platform: bool,

    /// Offer in-band notifications, for front ends that have no event descriptors
    #[arg(long)]
    pub inband_notifications: bool,
}

/// The one place [`SocketArgs`] names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketChoice {
    /// Create this socket and wait for the VMM.
    Listen(PathBuf),
    /// Connect to this socket, which the VMM created, again and again.
    Dial(PathBuf),
    /// An inherited file descriptor: a listening or a connected socket.
    Inherited(RawFd),
}

impl SocketArgs {
    /// The place that was given, or `None` when there is none (a configuration file may name it).
    pub fn choice(&self) -> Option<SocketChoice> {
        match (&self.socket_path, self.fd) {
            (Some(path), _) if self.client => Some(SocketChoice::Dial(path.clone())),
            (Some(path), _) => Some(SocketChoice::Listen(path.clone())),
            (None, Some(fd)) => Some(SocketChoice::Inherited(fd)),
            (None, None) => None,
        }
    }
}

/// Where log lines go and how many there are.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Logging")]
pub struct LogArgs {
    /// Least severe level that is logged
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: Level,

    /// Log to the system log (/dev/log) instead of stderr, if there is one
    #[arg(long)]
    pub syslog: bool,
}

/// How the threads that serve queues run.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Threads")]
pub struct WorkerArgs {
    /// Microseconds a worker polls its ring before it sleeps; 0 never polls
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub poll_us: u32,

    /// CPUs for the workers, like 0-3,8; the n-th worker runs on the n-th CPU, then round again
    #[arg(long, value_name = "LIST", value_parser = cpus::usable_cpus)]
    pub cpu_affinity: Option<CpuList>,
}

impl WorkerArgs {
    /// [`Self::poll_us`] as a duration.
    pub fn poll(&self) -> Duration {
        Duration::from_micros(u64::from(self.poll_us))
    }
}

/// What happens on a system call outside the daemon's list.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Sandbox")]
pub struct SeccompArgs {
    /// What happens on a system call the daemon does not need
    #[arg(long, value_name = "MODE", default_value = "kill")]
    pub seccomp: SeccompMode,
}

/// How the daemon locks itself in.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Sandbox")]
pub struct SandboxArgs {
    /// The system call filter.
    #[command(flatten)]
    pub seccomp: SeccompArgs,

    /// Leave out every sandbox stage, the system call filter too (for debugging)
    #[arg(long, conflicts_with = "seccomp")]
    pub no_sandbox: bool,
}

/// The socket of those who watch the daemon.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Monitoring")]
pub struct MetricsArgs {
    /// Unix socket that gives every counter as Prometheus text, and as JSON at /json
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub metrics_socket: Option<PathBuf>,
}

/// The socket of those who steer the daemon while it runs.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Monitoring")]
pub struct ControlArgs {
    /// Unix socket that takes one line of JSON, {"VERB": ARGUMENT}, and answers with one. A verb that is
    /// not known is answered with those that are; the README has an example of each
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub control_socket: Option<PathBuf>,
}

/// Where a newer daemon takes over from this one.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Connection")]
pub struct HandoverArgs {
    /// Take the sessions of the daemon that listens here over, if there is one, without the guest
    /// noticing; then listen here for a successor
    #[arg(long, value_name = "PATH", value_parser = socket_path())]
    pub handover_socket: Option<PathBuf>,
}

/// `--print-capabilities`, for the help text. [`daemon_main`] acts on it before anything is parsed.
#[derive(Debug, Clone, Default, Args)]
pub struct CapabilitiesArgs {
    /// Print what this program can do as JSON and exit, whatever the other options are
    #[arg(long)]
    pub print_capabilities: bool,
}

/// Runs a daemon: answers `--print-capabilities`, parses the arguments, calls `main`.
///
/// Returns the exit code for `fn main`: 0, or 1 with one line on stderr.
pub fn daemon_main<A>(
    capabilities: &Capabilities,
    main: impl FnOnce(A) -> anyhow::Result<()>,
) -> ExitCode
where
    A: CommandFactory + FromArgMatches,
{
    daemon_main_with(capabilities, |words| Ok(words.collect()), main)
}

/// [`daemon_main`] for a daemon that has old spellings: `modernise` turns the command line, the
/// program's name first, into what is parsed.
pub fn daemon_main_with<A>(
    capabilities: &Capabilities,
    modernise: impl FnOnce(std::env::ArgsOs) -> anyhow::Result<Vec<OsString>>,
    main: impl FnOnce(A) -> anyhow::Result<()>,
) -> ExitCode
where
    A: CommandFactory + FromArgMatches,
{
    if capabilities::requested(std::env::args_os().skip(1)) {
        return exit_code(capabilities.write(&mut io::stdout().lock()).map_err(Into::into));
    }
    match modernise(std::env::args_os()) {
        Ok(words) => run_words(words, main),
        Err(error) => exit_code(Err(error)),
    }
}

/// Runs a program: parses the arguments and calls `main` with them.
///
/// With the feature `docs`, `--generate man|bash|zsh|fish` prints that document instead.
///
/// Returns the exit code for `fn main`: 0, or 1 with one line on stderr.
pub fn run_main<A>(main: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode
where
    A: CommandFactory + FromArgMatches,
{
    run_words(std::env::args_os(), main)
}

fn run_words<A>(
    words: impl IntoIterator<Item = OsString>,
    main: impl FnOnce(A) -> anyhow::Result<()>,
) -> ExitCode
where
    A: CommandFactory + FromArgMatches,
{
    #[cfg(feature = "docs")]
    if let Some(kind) = generate::requested(std::env::args_os().skip(1)) {
        let written = generate::write(&kind, A::command(), &mut io::stdout().lock());
        return exit_code(written.map_err(Into::into));
    }
    match parse::<A>(words) {
        Ok(Parsed::Arguments(arguments)) => exit_code(main(arguments)),
        Ok(Parsed::Text(text)) => exit_code(print(&text).map_err(Into::into)),
        Err(error) => exit_code(Err(error.into())),
    }
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Parsed<A> {
    /// To run with these arguments.
    Arguments(A),
    /// To print this text (help, version) and leave.
    Text(String),
}

/// A command line that cannot be used, as one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(String);

/// Parses a whole command line, the program's name first.
///
/// # Errors
/// The first mistake found, in one line that says what to do.
pub fn parse<A>(command_line: impl IntoIterator<Item = OsString>) -> Result<Parsed<A>, UsageError>
where
    A: CommandFactory + FromArgMatches,
{
    let mut command = A::command();
    let parsed = command
        .try_get_matches_from_mut(command_line)
        .and_then(|mut matches| A::from_arg_matches_mut(&mut matches));
    match parsed {
        Ok(arguments) => Ok(Parsed::Arguments(arguments)),
        Err(error) if error.use_stderr() => {
            Err(UsageError(one_line(&error.to_string(), command.get_name())))
        }
        Err(error) => Ok(Parsed::Text(error.to_string())),
    }
}

/// Turns the parser's message of several paragraphs into one line.
fn one_line(message: &str, program: &str) -> String {
    let mut line = String::new();
    let without_prefix = message.strip_prefix("error: ").unwrap_or(message);
    for part in without_prefix.lines().map(str::trim) {
        if part.starts_with("Usage:") || part.starts_with("For more information") {
            break;
        }
        if part.is_empty() {
            continue;
        }
        if part.starts_with("tip:") {
            line.push(';');
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(part);
    }
    line.push_str(" (see ");
    line.push_str(program);
    line.push_str(" --help)");
    line
}

/// Prints text to stdout.
fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Reports the outcome of a program on stderr and gives its exit code.
fn exit_code(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With stderr closed there is nobody left to tell; the exit code still says it.
            let _ = writeln!(io::stderr().lock(), "{}", error_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes as `error: a: b: c`, always one line. A cause that was quoted in a sentence before
/// it is not said again.
pub fn error_line(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        let cause = if said.is_empty() { cause } else { format!(": {cause}") };
        if !said.contains(&cause) {
            said.push_str(&cause);
        }
    }
    format!("error: {said}").replace('\n', " ")
}

#[cfg(test)]
mod tests;
