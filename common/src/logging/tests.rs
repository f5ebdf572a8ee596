use std::io::Write;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

use super::*;
use crate::warn_limited;

#[test]
fn so_many_lines_a_second_then_a_count() {
    let limit = RateLimit::per_second(2);
    let start = Instant::now();
    assert_eq!(limit.admit(start), Some(Admitted { suppressed: 0, last: false }));
    assert_eq!(limit.admit(start), Some(Admitted { suppressed: 0, last: true }));
    for millisecond in 0..1000 {
        assert_eq!(limit.admit(start + Duration::from_millis(millisecond)), None);
    }
    let later = start + Duration::from_secs(1);
    assert_eq!(limit.admit(later), Some(Admitted { suppressed: 1000, last: false }));
    assert_eq!(limit.admit(later), Some(Admitted { suppressed: 0, last: true }));
}

/// A writer that keeps the lines.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Kept {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[test]
fn a_flood_from_one_place_is_cut_and_the_arguments_are_not_evaluated() {
    let kept = Kept::default();
    let subscriber = tracing_subscriber::fmt().with_writer(kept.clone()).with_ansi(false).finish();
    let mut evaluated = 0;
    tracing::subscriber::with_default(subscriber, || {
        for _ in 0..1000 {
            warn_limited!(queue = 3, "bad descriptor {}", {
                evaluated += 1;
                evaluated
            });
        }
    });
    let text = String::from_utf8(kept.0.lock().unwrap().clone()).unwrap();
    let lines = text.lines().filter(|line| line.contains("bad descriptor")).count();
    // The loop can cross the end of one second.
    assert!((5..=10).contains(&lines), "{text}");
    assert_eq!(evaluated, lines);
    assert!(text.contains("queue=3"), "{text}");
    assert!(text.contains("suppressed for a second"), "{text}");
}

#[test]
fn a_line_of_the_system_log_has_priority_program_and_pid() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let receiver = UnixDatagram::bind(&path).unwrap();
    let syslog = Syslog::connect_to(&path, "vhost-user-test").unwrap();
    let subscriber = tracing_subscriber::fmt()
        .compact()
        .without_time()
        .with_level(false)
        .with_ansi(false)
        .with_writer(syslog)
        .finish();
    tracing::subscriber::with_default(subscriber, || {
        tracing::error!("it broke");
        tracing::warn!("careful");
        tracing::info!("hello");
        tracing::debug!("not at this level");
    });
    let pid = std::process::id();
    let mut buffer = [0; 256];
    for (priority, text) in [(27, "it broke"), (28, "careful"), (30, "hello")] {
        let length = receiver.recv(&mut buffer).unwrap();
        let line = String::from_utf8_lossy(&buffer[..length]);
        assert!(line.starts_with(&format!("<{priority}>vhost-user-test[{pid}]: ")), "{line}");
        assert!(line.ends_with(text), "{line}");
    }
    receiver.set_nonblocking(true).unwrap();
    assert!(receiver.recv(&mut buffer).is_err());
}

#[test]
fn a_system_log_that_does_not_read_or_is_gone_does_not_block() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let receiver = UnixDatagram::bind(&path).unwrap();
    let syslog = Syslog::connect_to(&path, "vhost-user-test").unwrap();
    let mut refused = 0;
    for _ in 0..100_000 {
        if syslog.make_writer().write(b"line").is_err() {
            refused += 1;
            break;
        }
    }
    assert_eq!(refused, 1, "the socket's queue never filled");
    drop(receiver);
    assert!(syslog.make_writer().write(b"line").is_err());
}

#[test]
fn no_system_log_is_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let error = Syslog::connect_to(&dir.path().join("none"), "x").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let error = anyhow::Error::from(LogError::Syslog { path: "/dev/log", source: error });
    let line = crate::cli::error_line(&error);
    assert!(line.starts_with("error: cannot reach the system log at /dev/log: No such file"));
}

/// Runs in a process of its own without the harness' capture, which would take the place of stderr.
#[test]
fn a_reader_of_stderr_that_went_away_does_not_stop_the_daemon() {
    const NAME: &str = "logging::tests::a_reader_of_stderr_that_went_away_does_not_stop_the_daemon";
    const INSIDE: &str = "OUTBOARD_TEST_INSIDE";
    if std::env::var_os(INSIDE).is_some() {
        init(&LogArgs::default(), "vhost-user-test").unwrap();
        tracing::error!("nobody reads this");
        assert!(init(&LogArgs::default(), "vhost-user-test").is_err());
        return;
    }
    let (reader, writer) = UnixStream::pair().unwrap();
    drop(reader);
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", NAME])
        .env(INSIDE, "1")
        .stderr(std::os::fd::OwnedFd::from(writer))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
