//! DPDK's testpmd as the driver of vhost-user network devices (virtio-user): it polls its rings and
//! passes what arrives at one device on to the other.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::toolroot::ToolRoot;

/// Memory for packets, MiB; ordinary pages, shared with the daemon.
const MEMORY_MIB: u32 = 192;
/// Start-up sets up all that memory, on a machine that may be busy.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How its two devices look.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Bytes of the frames it makes.
    pub frame_bytes: u32,
    /// Packed rings.
    pub packed: bool,
    /// Entries of a ring.
    pub ring: u16,
}

/// A running testpmd with two devices, each of which sends what the other receives. Dropping it kills it.
#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    stdin: ChildStdin,
    log: PathBuf,
}

impl Testpmd {
    /// Starts it with a device on each of two `sockets`; its output goes to `dir`. Nothing is sent yet.
    ///
    /// # Errors
    /// It does not come up; the error has its output.
    pub fn start(
        root: &ToolRoot,
        sockets: [&Path; 2],
        dir: &Path,
        options: Options,
    ) -> Result<Self> {
        let log = dir.join("testpmd.log");
        let output = File::create(&log)?;
        let mut command = root.command("dpdk-testpmd")?;
        command
            .args(["--lcores", "(0)@0,(1)@0", "--main-lcore", "0", "--no-huge", "-m"])
            .arg(MEMORY_MIB.to_string())
            .args(["--no-pci", "--no-telemetry"])
            .arg(format!("--file-prefix=outboard{}", std::process::id()))
            // Its run-time directory.
            .env("RUNTIME_DIRECTORY", dir);
        for (n, socket) in sockets.iter().enumerate() {
            let (path, ring) = (socket.display(), options.ring);
            let packed = u8::from(options.packed);
            command.arg(format!(
                "--vdev=net_virtio_user{n},path={path},queues=1,queue_size={ring},\
                 packed_vq={packed},mrg_rxbuf=1,in_order=1"
            ));
        }
        command
            .args(["--", "--interactive", "--nb-cores=1", "--forward-mode=io", "--no-mlockall"])
            .arg(format!("--txpkts={}", options.frame_bytes))
            .args(["--total-num-mbufs=32768", "--txd=1024", "--rxd=1024"])
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output);
        let mut child = command.spawn().context("start dpdk-testpmd")?;
        let stdin = child.stdin.take().context("no pipe to testpmd")?;
        let mut testpmd = Self { child, stdin, log };
        testpmd.wait_for("testpmd>")?;
        Ok(testpmd)
    }

    /// Has `bursts` bursts of 32 frames sent by each device, and then everything passed on for ever.
    ///
    /// # Errors
    /// It does not listen.
    pub fn forward(&mut self, bursts: u32) -> Result<()> {
        Ok(writeln!(self.stdin, "start tx_first {bursts}")?)
    }

    /// Ends it, and gives the frames received and sent by both devices together.
    ///
    /// # Errors
    /// It does not say.
    pub fn stop(&mut self) -> Result<(u64, u64)> {
        // What it counted is in its buffer until it ends.
        writeln!(self.stdin, "stop\nquit")?;
        let deadline = Instant::now() + TIMEOUT;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                bail!("testpmd does not end; it printed:\n{}", self.output());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = self.output();
        let (_, total) = output.rsplit_once("Accumulated forward").context("no statistics")?;
        let number = |name: &str| -> Result<u64> {
            let (_, rest) = total.split_once(name).with_context(|| format!("no {name}"))?;
            Ok(rest.split_ascii_whitespace().next().context("no number")?.parse()?)
        };
        Ok((number("RX-packets:")?, number("TX-packets:")?))
    }

    /// What it printed so far.
    #[must_use]
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn wait_for(&mut self, text: &str) -> Result<()> {
        let deadline = Instant::now() + TIMEOUT;
        while !self.output().contains(text) {
            if let Some(status) = self.child.try_wait()? {
                bail!("testpmd ended ({status}); it printed:\n{}", self.output());
            }
            if Instant::now() > deadline {
                bail!("testpmd does not say {text:?}; it printed:\n{}", self.output());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            crate::daemon::show("output of testpmd", &self.output());
        }
    }
}
