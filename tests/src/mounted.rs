//! A shared directory, a `virtiofsd` that serves it, and a mount of it on this host.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use tempfile::TempDir;

use crate::daemon::{Daemon, bin, copy_program};
use crate::fuse_bridge::{self, BridgeOptions, FuseBridge};
use crate::skip::skip;

/// A daemon with a mount. Users other than root reach the mount too.
#[derive(Debug)]
pub struct Mounted {
    // Dropped in this order.
    bridge: FuseBridge,
    daemon: Daemon,
    dir: TempDir,
}

impl Mounted {
    /// Starts a daemon with `arguments` on a new directory and mounts it; `None` after the test was
    /// counted as skipped.
    ///
    /// # Panics
    /// When the daemon does not start or cannot be mounted.
    #[must_use]
    pub fn new(arguments: &[&str], options: BridgeOptions) -> Option<Self> {
        Self::new_as(None, arguments, options)
    }

    /// As [`Self::new`], with a daemon that runs as user and group `user` and shares a directory of
    /// theirs.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn new_as(user: Option<u32>, arguments: &[&str], options: BridgeOptions) -> Option<Self> {
        if !fuse_bridge::available() {
            skip("mounting a fuse device needs root and /dev/fuse");
            return None;
        }
        Some(Self::start(user, arguments, options).expect("a daemon with a mount"))
    }

    fn start(user: Option<u32>, arguments: &[&str], options: BridgeOptions) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let everyone = || Permissions::from_mode(0o755);
        for name in ["shared", "mount"] {
            fs::create_dir(dir.path().join(name))?;
            fs::set_permissions(dir.path().join(name), everyone())?;
        }
        fs::set_permissions(dir.path(), everyone())?;
        let socket = dir.path().join("fs.sock");
        let mut program = bin("virtiofsd")?;
        if user.is_some() {
            // Where others may not look, they cannot run it.
            let copy = dir.path().join("virtiofsd");
            copy_program(&program, &copy, None)?;
            program = copy;
            chown(dir.path(), user, user)?;
            chown(dir.path().join("shared"), user, user)?;
        }
        let mut command = Command::new(program);
        command.arg(format!("--socket-path={}", socket.display()));
        command.arg(format!("--shared-dir={}", dir.path().join("shared").display()));
        command.args(arguments);
        if let Some(id) = user {
            command.uid(id).gid(id);
        }
        let daemon = Daemon::start_command("virtiofsd", command, &socket)?;
        let bridge = FuseBridge::mount(&socket, &dir.path().join("mount"), options)?;
        Ok(Self { bridge, daemon, dir })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        self.bridge.path()
    }

    /// `name` in the mount.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.bridge.path().join(name)
    }

    /// `name` in the shared directory itself.
    #[must_use]
    pub fn shared(&self, name: &str) -> PathBuf {
        self.dir.path().join("shared").join(name)
    }

    /// The directory of everything: room for a test's own files beside the shared directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The daemon.
    #[must_use]
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}
