//! What a launcher says of its pod, in the run directory's `state.json`: for `ps` and `top`.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::launch::commands::Kind;
use crate::layout::Layout;

/// A pod that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodState {
    /// Its name.
    pub name: String,
    /// The launcher's process.
    pub pid: u32,
    /// Its file.
    pub file: PathBuf,
    /// Its run directory.
    pub dir: PathBuf,
    /// Seconds since 1970.
    pub started: u64,
    /// Its devices, in the order of the file.
    pub devices: Vec<DeviceState>,
}

/// One device of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// The daemon's process; none while it waits to be started again.
    pub pid: Option<u32>,
    /// When that process started, in seconds since 1970.
    pub started: u64,
    /// How often it was started again.
    pub restarts: u32,
    /// How it ended the last time.
    pub last_exit: Option<String>,
    /// Where the VMM comes.
    pub socket: PathBuf,
    /// Where its counters are.
    pub metrics: PathBuf,
    /// How often a newer process took its guest over.
    pub upgrades: u32,
    /// How often one was to do so and could not.
    pub failed_upgrades: u32,
}

/// Seconds since 1970.
#[must_use]
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

impl PodState {
    /// Writes the file anew; a reader sees the old one or the new one.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, layout: &Layout) -> io::Result<()> {
        let path = layout.state();
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        serde_json::to_writer(&mut file, self)?;
        file.write_all(b"\n")?;
        fs::rename(new, path)
    }

    /// The pod of this run directory, or `None` when no launcher runs there.
    ///
    /// # Errors
    /// There is a state that cannot be read.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let layout = Layout { dir: dir.to_owned() };
        if !is_locked(&layout.lock()) {
            return Ok(None);
        }
        let path = layout.state();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            // The launcher is only starting.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let state = serde_json::from_str(&text)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Some(state))
    }

    /// Every pod with a run directory below `base`, by name.
    ///
    /// # Errors
    /// The directory, or a state in it, cannot be read.
    pub fn all(base: &Path) -> Result<Vec<Self>> {
        let entries = match fs::read_dir(base) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", base.display()));
            }
        };
        let mut pods = Vec::new();
        for entry in entries {
            pods.extend(Self::read(&entry?.path())?);
        }
        pods.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(pods)
    }
}

/// Whether a launcher holds this lock.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    flock(&file, FlockOperation::NonBlockingLockShared).is_err()
}
