//! `./x demo`: the project's devices in a real guest, in one table.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use testkit::demo::{self, Options, Vmm};

/// Boots a guest with a directory, a disk, a network card and vsock, and shows what they do.
#[derive(Debug, Parser)]
#[command(name = "demo")]
struct Arguments {
    /// What runs the guest: User Mode Linux needs nothing of this machine
    #[arg(long, value_enum, default_value = "uml")]
    vmm: VmmName,

    /// Afterwards give this terminal the guest's console, to try things
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum VmmName {
    Uml,
    Qemu,
}

fn main() -> ExitCode {
    let mut all_works = true;
    let code = outboard_common::cli::run_main(|arguments: Arguments| {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGHUP, SIGINT, SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop)).context("signal handlers")?;
        }
        let vmm = match arguments.vmm {
            VmmName::Uml => Vmm::Uml,
            VmmName::Qemu => Vmm::Qemu,
        };
        all_works = demo::run(Options { vmm, keep: arguments.keep }, &stop)?;
        Ok(())
    });
    if all_works { code } else { ExitCode::FAILURE }
}
