//! The daemons Outboard is compared with, from Debian, run in the tool root.
//!
//! They also prove the guests: a job that works with a peer and not with a daemon of the
//! workspace has found a bug of ours.

use std::ffi::OsStr;
use std::path::Path;

use anyhow::Result;

use crate::daemon::Daemon;
use crate::netns::NetNs;
use crate::toolroot::ToolRoot;

/// Starts virtiofsd on the directory `shared`.
///
/// # Errors
/// When it does not start.
pub fn virtiofsd(root: &ToolRoot, socket: &Path, shared: &Path) -> Result<Daemon> {
    let mut command = root.command("virtiofsd")?;
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--shared-dir={}", shared.display()))
        // Front ends without a tag of their own, such as User Mode Linux, need one.
        .args(["--tag=shared", "--sandbox=none", "--cache=auto"]);
    Daemon::start_command("virtiofsd (peer)", command, socket)
}

/// Starts qemu-storage-daemon on the raw image `image`, with `queues` queues.
///
/// # Errors
/// When it does not start.
pub fn storage_daemon(root: &ToolRoot, socket: &Path, image: &Path, queues: u16) -> Result<Daemon> {
    let mut command = root.command("qemu-storage-daemon")?;
    let (image, socket_path) = (image.display(), socket.display());
    command
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={image},aio=threads,discard=unmap"));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={queues},\
         addr.type=unix,addr.path={socket_path}"
    ));
    Daemon::start_command("qemu-storage-daemon (peer)", command, socket)
}

/// Starts vhost-device-vsock for the guest `cid`; its host side is the Unix socket `host_socket`.
///
/// # Errors
/// When it does not start.
pub fn vsock(root: &ToolRoot, socket: &Path, host_socket: &Path, cid: u32) -> Result<Daemon> {
    let mut command = root.command("vhost-device-vsock")?;
    command.args([
        OsStr::new("--socket"),
        socket.as_os_str(),
        OsStr::new("--uds-path"),
        host_socket.as_os_str(),
        OsStr::new("--guest-cid"),
        OsStr::new(&cid.to_string()),
    ]);
    Daemon::start_command("vhost-device-vsock (peer)", command, socket)
}

/// Starts passt in `namespace`. It gives the guest an address, and the guest reaches the name
/// space's loopback at its gateway.
///
/// # Errors
/// When it does not start.
pub fn passt(root: &ToolRoot, socket: &Path, namespace: &NetNs) -> Result<Daemon> {
    let mut command = root.command("passt")?;
    command.args(["--foreground", "--vhost-user", "--socket"]).arg(socket);
    namespace.enter(&mut command);
    Daemon::start_command("passt (peer)", command, socket)
}
