//! A helper process of a test that is no vhost-user daemon, such as an iperf3 server.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a service may take until it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(10);

/// A running service; dropping it kills it.
#[derive(Debug)]
pub struct Service {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Service {
    /// Starts `command` with its output in `dir`, and waits until it prints `ready`.
    ///
    /// # Errors
    /// When it ends, or does not print that in time; the error has its output.
    pub fn start(name: &str, mut command: Command, dir: &Path, ready: &str) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        let mut service = Self { name: name.to_owned(), child, log };
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            let ended = service.child.try_wait()?;
            let output = service.output();
            if output.contains(ready) {
                return Ok(service);
            }
            if ended.is_some() || Instant::now() > deadline {
                bail!("{name} is not ready ({ended:?}); it printed:\n{output}");
            }
            sleep(Duration::from_millis(2));
        }
    }

    /// What the service printed so far.
    #[must_use]
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            crate::daemon::show(&format!("output of {}", self.name), &self.output());
        }
    }
}
