//! QEMU's monitor: one JSON object a line. QEMU docs/interop/qmp-spec.rst.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// Far above what any command takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often a migration's state is asked for.
const POLL: Duration = Duration::from_millis(20);

/// A connection to the monitor of a running QEMU.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects to the monitor at `socket`, which QEMU may be about to make.
    ///
    /// # Errors
    /// There is none.
    pub fn connect(socket: &Path) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("connect to {}", socket.display()));
                }
                Err(_) => std::thread::sleep(POLL),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self { lines: BufReader::new(stream) };
        ensure!(qmp.line()?.get("QMP").is_some(), "the monitor does not greet");
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(self.lines.read_line(&mut line)? > 0, "QEMU closed its monitor");
        serde_json::from_str(&line).with_context(|| format!("the monitor says {line:?}"))
    }

    /// Runs `command` and returns what it returned.
    ///
    /// # Errors
    /// It failed, or QEMU is gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.lines.get_mut().write_all(format!("{request}\n").as_bytes())?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            // Everything else is an event.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Moves the guest to the QEMU that waits at `uri`.
    ///
    /// # Errors
    /// The guest stayed here; the error says why.
    pub fn migrate(&mut self, uri: &str) -> Result<()> {
        self.execute("migrate", &json!({ "uri": uri }))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let state = self.execute("query-migrate", &json!({}))?;
            match state.get("status").and_then(Value::as_str) {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("the migration failed: {state}"),
                _ if Instant::now() > deadline => bail!("the migration takes too long: {state}"),
                _ => std::thread::sleep(POLL),
            }
        }
    }
}
