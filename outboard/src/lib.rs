//! `outboard`: one file names a virtual machine's devices; this starts and watches their daemons.
//!
//! | room | what it holds |
//! |---|---|
//! | [`cli`] | the command line |
//! | [`pod`] | the file and its checks: every mistake with its line |
//! | [`layout`], [`state`] | the run directory; what is said of a running pod |
//! | [`vmm_args`] | how each VMM is told of the devices; pure |
//! | [`launch`] | daemons started, watched, started again, stopped |
//! | [`upgrade`] | the daemons of a running pod replaced by newer ones |
//! | [`watch`], [`top`] | the pods that run, as a list and live |

pub mod cli;
pub mod launch;
pub mod layout;
pub mod pod;
pub mod state;
pub mod top;
pub mod upgrade;
pub mod vmm_args;
pub mod watch;

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use outboard_common::logging;

use crate::cli::{Arguments, Command, PodArgs, RunArgs};
use crate::launch::Launch;
use crate::layout::Layout;
use crate::pod::{Pod, PodError};

/// Does what the command line asks for.
///
/// # Errors
/// The operator's mistakes, and what the system refuses.
pub fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Command::Run(args) => run_pod(&args),
        Command::Check { pod } => {
            let pod = read(&pod)?;
            let count = pod.device_names().count();
            print(&format!("{}: no mistakes; devices: {count}", pod.name))
        }
        Command::Args(args) => {
            let (pod, layout) = prepare(&args)?;
            print(&vmm_args::command(args.vmm, &pod, &layout, &args.extra)?.shell_line())
        }
        Command::Upgrade { pods } => upgrade::run(&pods),
        Command::Ps { pods, json } => watch::list(&pods, json),
        Command::Top(args) => top::run(&args),
    }
}

/// Reads a pod file; each of its mistakes is a line on stderr.
fn read(file: &std::path::Path) -> Result<Pod> {
    Pod::read(file).map_err(|error| {
        if let PodError::Mistakes { mistakes, .. } = &error {
            let mut stderr = io::stderr().lock();
            for mistake in mistakes {
                // With stderr closed there is nobody to tell; the exit code still says it.
                let _ = writeln!(stderr, "{mistake}");
            }
        }
        error.into()
    })
}

fn prepare(args: &PodArgs) -> Result<(Pod, Layout)> {
    let pod = read(&args.pod)?;
    let layout = Layout::of(&pod, args.run_dir.as_deref())
        .map_err(|why| anyhow!("the run directory: {why}"))?;
    Ok((pod, layout))
}

fn run_pod(args: &RunArgs) -> Result<()> {
    logging::init(&args.log, "outboard")?;
    let (pod, layout) = prepare(&args.pod)?;
    let mut vmm = vmm_args::command(args.pod.vmm, &pod, &layout, &args.pod.extra)?;
    if let Some(program) = &args.vmm_program {
        vmm.program = program.clone();
    }
    let bin_dir = match &args.bin_dir {
        // Relative to here, and not to where a daemon may be started.
        Some(dir) => std::path::absolute(dir)?,
        None => own_dir()?,
    };
    launch::run(&Launch {
        pod: &pod,
        file: &args.pod.pod,
        layout: &layout,
        bin_dir,
        vmm,
        exec: args.exec,
    })
}

/// The directory of this program, where the daemons are too.
fn own_dir() -> Result<PathBuf> {
    let program = std::env::current_exe().context("cannot find this program's directory")?;
    let dir = program.parent().context("this program has no directory; use --bin-dir")?;
    Ok(dir.to_owned())
}

/// Prints a line on stdout.
fn print(line: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).context("cannot write to stdout")
}
