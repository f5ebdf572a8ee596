//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use outboard_common::cli::LogArgs;
use outboard_common::cli::values::duration;

use crate::vmm_args::Vmm;

/// What `--help` and the manual page end with.
const EXAMPLES: &str = r#"Examples:
  outboard check pod.toml
  outboard run pod.toml --vmm qemu
  outboard run pod.toml --vmm uml --exec -- root=/dev/root rootfstype=hostfs ro init=/bin/sh
  outboard top
  outboard upgrade hello"#;

/// Starts and watches the devices of a virtual machine, which a pod file describes
#[derive(Debug, Clone, Parser)]
#[command(name = "outboard", version, max_term_width = 100, after_long_help = EXAMPLES)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Start a pod's daemons, print the VMM's command, and watch until SIGTERM or Ctrl-C
    Run(RunArgs),
    /// Check a pod file: every mistake with its line
    Check {
        /// Pod file
        #[arg(value_name = "POD.toml")]
        pod: PathBuf,
    },
    /// Print the VMM's command for a pod as one line for a shell
    Args(PodArgs),
    /// Replace a pod's daemons by those now on disk, while its guest goes on
    Upgrade {
        /// Names or run directories of pods
        #[arg(value_name = "POD", required = true)]
        pods: Vec<PathBuf>,
    },
    /// List the pods that run, and their daemons
    Ps {
        /// Names or run directories of pods [default: all of this user]
        #[arg(value_name = "POD")]
        pods: Vec<PathBuf>,

        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Watch the devices of pods that run: throughput, requests, latency, queue depth, drops
    Top(TopArgs),
}

/// A pod and its VMM.
#[derive(Debug, Clone, Args)]
pub struct PodArgs {
    /// Pod file
    #[arg(value_name = "POD.toml")]
    pub pod: PathBuf,

    /// VMM that the devices are for
    #[arg(long, value_name = "VMM", default_value = "qemu")]
    pub vmm: Vmm,

    /// Directory for sockets, logs and state [default: as the pod file says, else
    /// $XDG_RUNTIME_DIR/outboard/NAME or /run/outboard/NAME]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,

    /// Further arguments for the VMM
    #[arg(last = true, value_name = "VMM ARGUMENT")]
    pub extra: Vec<String>,
}

/// `outboard run`.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// The pod.
    #[command(flatten)]
    pub pod: PodArgs,

    /// Start the VMM too; the pod ends with it
    #[arg(long)]
    pub exec: bool,

    /// VMM program to use in place of the one in $PATH
    #[arg(long, value_name = "PROGRAM")]
    pub vmm_program: Option<String>,

    /// Directory of the daemons' programs [default: the one outboard is in]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,

    /// Log.
    #[command(flatten)]
    pub log: LogArgs,
}

/// `outboard top`.
#[derive(Debug, Clone, Args)]
pub struct TopArgs {
    /// Names or run directories of pods [default: all of this user]
    #[arg(value_name = "POD")]
    pub pods: Vec<PathBuf>,

    /// Print one table as text, measured over one interval, and leave
    #[arg(long)]
    pub once: bool,

    /// Time between two looks, like 500ms
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    pub interval: Duration,
}

/// Shorter intervals would measure the watching.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(3600);

fn interval(text: &str) -> Result<Duration, String> {
    let interval = duration(text).map_err(|error| error.to_string())?;
    if (INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
        return Ok(interval);
    }
    Err("write a time from 100ms to 1h".to_owned())
}

#[cfg(test)]
mod tests {
    use outboard_common::cli::{Parsed, parse};

    use super::*;

    fn parsed(line: &str) -> Result<Arguments, String> {
        match parse::<Arguments>(line.split(' ').map(Into::into)) {
            Ok(Parsed::Arguments(arguments)) => Ok(arguments),
            Ok(Parsed::Text(text)) => panic!("{text}"),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn what_comes_after_two_dashes_is_the_vmms() {
        let line = "outboard run a.toml --vmm cloud-hypervisor --exec -- --serial tty";
        let Command::Run(run) = parsed(line).unwrap().command else { panic!("{line}") };
        assert_eq!(run.pod.vmm, Vmm::CloudHypervisor);
        assert_eq!(run.pod.extra, ["--serial", "tty"]);
        assert!(run.exec);
    }

    #[test]
    fn mistakes_are_told_in_one_sentence() {
        for (line, part) in [
            ("outboard run a.toml --vmm bhyve", "cloud-hypervisor"),
            ("outboard run", "POD.toml"),
            ("outboard run a.toml b.toml", "b.toml"),
            ("outboard top --interval 1ms", "from 100ms to 1h"),
            ("outboard top --interval 9", "not a duration"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
