//! The run directory: made and locked by one launcher, and emptied by it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

use super::commands::DaemonSpec;
use crate::layout::Layout;

/// `ps` and `top` hold the lock for a moment to see whether it is free.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A run directory that is ours. Dropping it removes what we made there.
#[derive(Debug)]
pub(super) struct RunDir {
    layout: Layout,
    /// Removed at the end, whether or not a daemon left them.
    files: Vec<PathBuf>,
    /// Holds the lock.
    _lock: File,
}

impl RunDir {
    /// Makes the directory, for its owner alone, and takes its lock.
    ///
    /// # Errors
    /// It cannot be made, or another launcher has it.
    pub(super) fn take(layout: &Layout, daemons: &[DaemonSpec]) -> Result<Self> {
        let dir = &layout.dir;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("cannot make the run directory {}", dir.display()))?;
        let path = layout.lock();
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        for attempt in 1.. {
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if attempt < LOCK_TRIES => sleep(LOCK_PAUSE),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    bail!("the pod at {} runs already; stop it first", dir.display())
                }
                Err(error) => {
                    return Err(io::Error::from(error))
                        .with_context(|| format!("cannot lock {}", path.display()));
                }
            }
        }
        let mut files = vec![layout.state(), layout.firecracker_config()];
        files.extend([layout.vsock_uds(), layout.vsock_seqpacket()]);
        for daemon in daemons {
            // A log of the pod's last run would be taken for this one's.
            let _ = fs::remove_file(&daemon.log);
            let own = [&daemon.socket, &daemon.metrics, &daemon.log, &daemon.handover];
            files.extend(own.map(Clone::clone));
        }
        Ok(Self { layout: layout.clone(), files, _lock: lock })
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = fs::remove_file(file);
        }
        // Nobody can have taken the lock yet, so it is still our file.
        let _ = fs::remove_file(self.layout.lock());
        // Fails when the operator keeps something else there, which is theirs.
        let _ = fs::remove_dir(&self.layout.dir);
    }
}
