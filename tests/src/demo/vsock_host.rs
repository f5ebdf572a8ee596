//! The host's side of the vsock steps: services the guest calls, and calls to the guest's.
//!
//! The order is that of `jobs/demo.sh`: the guest calls the echo service (port 1234), sends
//! [`BULK_BYTES`] to the sink (1235), then serves a sink (5678) and an echo (5679) of its own.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How much is sent each way.
pub(super) const BULK_BYTES: u64 = 256 << 20;
/// Round trips of the echo; the figure is their median.
const ROUND_TRIPS: usize = 500;
/// For one read or write; the guest answers at once or never.
const IO_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks at a listener or a port that is not there yet.
const POLL: Duration = Duration::from_millis(5);

/// What was measured: the step's name and its value (bytes a second, or seconds).
pub(super) type Figures = Vec<(&'static str, f64)>;

/// The services, on a thread of their own.
#[derive(Debug)]
pub(super) struct VsockHost {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(Figures, Result<()>)>,
}

impl VsockHost {
    /// Listens; `base` is the path that the proxy was given for its host side.
    pub(super) fn start(base: &Path) -> Result<Self> {
        let listen = |port: u16| -> Result<UnixListener> {
            let path = service_path(base, port);
            let listener = UnixListener::bind(&path)
                .with_context(|| format!("listen on {}", path.display()))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let host = Host {
            base: base.to_owned(),
            echo: listen(1234)?,
            sink: listen(1235)?,
            stop: Arc::default(),
        };
        let stop = Arc::clone(&host.stop);
        let thread = std::thread::spawn(move || {
            let mut figures = Vec::new();
            let outcome = host.run(&mut figures);
            (figures, outcome)
        });
        Ok(Self { stop, thread })
    }

    /// What was measured, once the guest is gone; and what went wrong, if anything did.
    pub(super) fn finish(self) -> (Figures, Result<()>) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .unwrap_or_else(|_| (Vec::new(), Err(anyhow::anyhow!("the vsock services panicked"))))
    }
}

/// The path of the service that the guest reaches at `port` of the host.
pub(super) fn service_path(base: &Path, port: u16) -> PathBuf {
    let mut path = base.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

struct Host {
    base: PathBuf,
    echo: UnixListener,
    sink: UnixListener,
    stop: Arc<AtomicBool>,
}

impl Host {
    fn run(&self, figures: &mut Figures) -> Result<()> {
        let mut stream = self.accept(&self.echo)?;
        let mut line = [0; 256];
        let length = stream.read(&mut line)?;
        stream.write_all(&line[..length])?;
        drop(stream);

        let sunk = sink(&mut self.accept(&self.sink)?).context("what the guest sends")?;
        figures.push(("vsock_up", sunk));
        let sent = bulk(&mut self.connect(5678)?).context("what the guest receives")?;
        figures.push(("vsock_down", sent));
        let echoed = round_trip(&mut self.connect(5679)?).context("the guest's echo")?;
        figures.push(("vsock_echo", echoed));
        Ok(())
    }

    fn accept(&self, listener: &UnixListener) -> Result<UnixStream> {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return with_timeouts(stream);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.pause()?,
                Err(error) => return Err(error).context("accept a connection of the guest"),
            }
        }
    }

    /// Connects to `port` of the guest, as soon as something listens there.
    fn connect(&self, port: u16) -> Result<UnixStream> {
        loop {
            let mut stream = with_timeouts(UnixStream::connect(&self.base)?)?;
            stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
            if answer(&mut stream).is_ok_and(|line| line.starts_with("OK ")) {
                return Ok(stream);
            }
            self.pause()?;
        }
    }

    fn pause(&self) -> Result<()> {
        ensure!(!self.stop.load(Ordering::Relaxed), "the guest ended before its vsock steps did");
        sleep(POLL);
        Ok(())
    }
}

fn with_timeouts(stream: UnixStream) -> Result<UnixStream> {
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
    stream.set_write_timeout(Some(IO_TIMEOUT))?;
    Ok(stream)
}

/// One line; byte by byte, because what follows it belongs to the stream.
fn answer(stream: &mut UnixStream) -> Result<String> {
    let mut line = String::new();
    let mut byte = [0];
    while stream.read(&mut byte)? == 1 && byte[0] != b'\n' && line.len() < 64 {
        line.push(char::from(byte[0]));
    }
    Ok(line)
}

/// Reads all there is; bytes a second.
fn sink(stream: &mut UnixStream) -> Result<f64> {
    let mut buffer = vec![0; 256 << 10];
    let started = Instant::now();
    let mut total = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            length => total += length as u64,
        }
    }
    ensure!(total == BULK_BYTES, "the guest sent {BULK_BYTES} bytes and {total} arrived");
    Ok(per_second(total, started))
}

/// Sends [`BULK_BYTES`] and waits until the guest says how many it got; bytes a second.
fn bulk(stream: &mut UnixStream) -> Result<f64> {
    let buffer = vec![0; 256 << 10];
    let started = Instant::now();
    let mut left = BULK_BYTES;
    while left > 0 {
        let length = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        stream.write_all(&buffer[..length])?;
        left -= length as u64;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut report = String::new();
    stream.read_to_string(&mut report)?;
    // The guest's dd counts blocks of 64 KiB; a part of one shows after the plus sign.
    if !report.contains(&format!("{}+0 records in", BULK_BYTES >> 16)) {
        bail!("{BULK_BYTES} bytes were sent and the guest says: {report}");
    }
    Ok(per_second(BULK_BYTES, started))
}

/// The median round trip of 64 bytes, in seconds.
fn round_trip(stream: &mut UnixStream) -> Result<f64> {
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    let (message, mut reply) = ([b'x'; 64], [0; 64]);
    for _ in 0..ROUND_TRIPS {
        let started = Instant::now();
        stream.write_all(&message)?;
        stream.read_exact(&mut reply)?;
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[ROUND_TRIPS / 2])
}

#[allow(clippy::cast_precision_loss, reason = "a figure of three digits")]
fn per_second(bytes: u64, started: Instant) -> f64 {
    bytes as f64 / started.elapsed().as_secs_f64()
}
