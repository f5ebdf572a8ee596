//! `vsock-proxy`: connects the vsock sockets of virtual machines to the host. See `vsock-proxy --help`.

use std::process::ExitCode;

use outboard_common::cli::daemon_main;
use vsock_proxy::cli::{CAPABILITIES, VsockArgs};

fn main() -> ExitCode {
    daemon_main(&CAPABILITIES, |args: VsockArgs| vsock_proxy::run(&args))
}
