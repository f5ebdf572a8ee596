//! What a daemon counted, read from its metrics socket.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use outboard_common::metrics::Snapshot;

/// A daemon answers in well under a millisecond, unless it is stopped.
const PATIENCE: Duration = Duration::from_millis(300);
/// More is no snapshot, in bytes.
const ANSWER_MAX: u64 = 16 << 20;

/// Asks the daemon at `socket`.
pub(super) fn fetch(socket: &Path) -> io::Result<Snapshot> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /json HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut answer)?;
    let header_end = answer.windows(4).position(|four| four == b"\r\n\r\n");
    let body = header_end.map(|at| &answer[at + 4..]).ok_or(io::ErrorKind::InvalidData)?;
    Ok(serde_json::from_slice(body)?)
}
