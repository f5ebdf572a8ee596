//! `outboard`: the launcher of a pod. See [`outboard`].

use std::process::ExitCode;

fn main() -> ExitCode {
    outboard_common::cli::run_main(outboard::run)
}
