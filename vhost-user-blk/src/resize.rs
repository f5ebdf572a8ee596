//! Watching image sizes, so that a disk can grow or shrink while a guest uses it.
//!
//! A file's size is looked at once a second while some guest is attached that could be told, on SIGHUP,
//! on the control request `resize`, and whenever a front end reads the configuration. (inotify would
//! wake us for every write, too, since a write and a truncation are one kind of event there.)

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::device::BlkDevice;

/// How often to look.
const INTERVAL: Duration = Duration::from_secs(1);
/// The thread only makes a system call a disk.
const STACK_BYTES: usize = 64 << 10;

/// How many front ends could be told of a new size.
#[derive(Debug, Default)]
pub struct Audience {
    count: Mutex<usize>,
    changed: Condvar,
}

impl Audience {
    /// One more, or one fewer.
    pub fn change(&self, joined: bool) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = if joined { count.saturating_add(1) } else { count.saturating_sub(1) };
        self.changed.notify_all();
    }

    /// Sleeps until there is somebody, and then for one interval.
    fn wait(&self) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count == 0 {
            count = self.changed.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        drop(count);
        std::thread::sleep(INTERVAL);
    }
}

/// Looks at the size of every disk now.
pub fn check(devices: &[Arc<BlkDevice>]) {
    for device in devices {
        if let Err(error) = device.check_size() {
            outboard_common::warn_limited!(%error, "an image's size cannot be told");
        }
    }
}

/// Starts the thread that watches `devices` for as long as the process runs.
///
/// # Errors
/// The system has no thread for it.
pub fn watch(devices: Vec<Arc<BlkDevice>>, audience: Arc<Audience>) -> std::io::Result<()> {
    std::thread::Builder::new().name("resize".into()).stack_size(STACK_BYTES).spawn(move || {
        loop {
            audience.wait();
            check(&devices);
        }
    })?;
    Ok(())
}
