//! `vhost-user-blk`: serves disk images to virtual machines. See `vhost-user-blk --help`.

use std::process::ExitCode;

use outboard_common::cli::daemon_main;
use vhost_user_blk::cli::{BlkArgs, CAPABILITIES};

fn main() -> ExitCode {
    daemon_main(&CAPABILITIES, |args: BlkArgs| vhost_user_blk::run(&args))
}
