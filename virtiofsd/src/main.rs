//! `virtiofsd`: shares a directory with a guest.

use std::process::ExitCode;

use outboard_common::cli::daemon_main_with;
use virtiofsd::cli::compat::modernise;
use virtiofsd::cli::{Arguments, CAPABILITIES};

fn main() -> ExitCode {
    daemon_main_with(
        &CAPABILITIES,
        |words| Ok(modernise(words)?),
        |arguments: Arguments| virtiofsd::run(&arguments),
    )
}
