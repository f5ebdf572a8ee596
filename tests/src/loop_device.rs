//! A file as a block device.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::skip::skip;

/// A loop device; dropping it detaches the file.
#[derive(Debug)]
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// `file` as a block device, or `None` after the test was counted as skipped, where there are no
    /// loop devices.
    #[must_use]
    pub fn for_test(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        let why = match output {
            Ok(output) if output.status.success() => {
                return Some(Self(String::from_utf8_lossy(&output.stdout).trim().into()));
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => format!("losetup: {error}"),
        };
        skip(&format!("no loop device: {}", why.trim()));
        None
    }

    /// The device, like `/dev/loop0`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
