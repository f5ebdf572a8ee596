//! The system log: one datagram an event to `/dev/log`.
//!
//! A line is `<PRI>program[pid]: text` without a time stamp; every receiver of this socket
//! (journald, rsyslog, syslog-ng, busybox) puts its own time on such a line, which is also right in
//! a sandbox where the daemon does not know the time zone.
//!
//! The socket is connected before the sandbox closes and is never opened again. Sending does not
//! block: when the receiver is slow or gone, lines are dropped.

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use super::LogError;

const DEV_LOG: &str = "/dev/log";

/// The facility "system daemons" of RFC 5424, table 1, in its place in the priority.
const FACILITY_DAEMON: u8 = 3 << 3;

/// A connected socket of the system log.
#[derive(Debug)]
pub struct Syslog {
    socket: UnixDatagram,
    program: &'static str,
}

impl Syslog {
    /// Connects to the system log of this machine. `program` names the sender in every line.
    ///
    /// # Errors
    /// [`LogError::Syslog`] when nobody listens there.
    pub fn connect(program: &'static str) -> Result<Self, LogError> {
        Self::connect_to(Path::new(DEV_LOG), program)
            .map_err(|source| LogError::Syslog { path: DEV_LOG, source })
    }

    pub(super) fn connect_to(path: &Path, program: &'static str) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, program })
    }
}

/// Writes one event.
#[derive(Debug)]
pub struct SyslogLine<'a> {
    syslog: &'a Syslog,
    severity: u8,
}

impl<'a> MakeWriter<'a> for Syslog {
    type Writer = SyslogLine<'a>;

    fn make_writer(&'a self) -> SyslogLine<'a> {
        SyslogLine { syslog: self, severity: severity(Level::INFO) }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> SyslogLine<'a> {
        SyslogLine { syslog: self, severity: severity(*event.level()) }
    }
}

impl Write for SyslogLine<'_> {
    /// Sends one whole line; the subscriber hands over an event in one piece.
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let mut line = Vec::with_capacity(text.len() + 64);
        let priority = FACILITY_DAEMON | self.severity;
        // The pid is asked for each time: entering a PID namespace forks.
        write!(line, "<{priority}>{}[{}]: ", self.syslog.program, std::process::id())?;
        line.extend_from_slice(text.trim_ascii_end());
        self.syslog.socket.send(&line)?;
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The severity of RFC 5424, table 2.
fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}
