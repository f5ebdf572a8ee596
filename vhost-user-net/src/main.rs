//! `vhost-user-net`: parses the command line and runs the daemon.

use std::process::ExitCode;

use outboard_common::cli::daemon_main;
use vhost_user_net::cli::Cli;

fn main() -> ExitCode {
    daemon_main::<Cli>(&vhost_user_net::CAPABILITIES, vhost_user_net::run)
}
