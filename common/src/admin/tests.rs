use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::request::{parse_control, parse_http};
use super::*;
use crate::metrics::Snapshot;

#[derive(Default)]
struct Settings {
    iops: AtomicU64,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    iops: u64,
}

impl Control for Settings {
    fn on_request(&self, verb: &str, argument: Value) -> Result<Value, ControlError> {
        match verb {
            "set" => {
                let set: Set = serde_json::from_value(argument)?;
                if set.iops == 13 {
                    return Err(ControlError::Refused("13 brings bad luck".to_owned()));
                }
                self.iops.store(set.iops, Ordering::Relaxed);
                Ok(Value::Null)
            }
            "get" => Ok(json!({ "iops": self.iops.load(Ordering::Relaxed) })),
            _ => Err(ControlError::UnknownVerb { known: &["set", "get"] }),
        }
    }
}

struct Running {
    dir: TempDir,
    settings: Arc<Settings>,
    thread: Option<AdminThread>,
}

impl Running {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (metrics, control) = (dir.path().join("metrics"), dir.path().join("control"));
        let registry = Arc::new(Registry::new("vhost-user-test"));
        registry.device("disk").queue(0).kicks.add(42);
        let settings = Arc::new(Settings::default());
        let sockets = AdminSockets::bind(Some(&metrics), Some(&control)).unwrap();
        let thread = sockets.serve(registry, Arc::clone(&settings) as Arc<dyn Control>).unwrap();
        Self { dir, settings, thread }
    }

    /// Sends bytes, closes that direction if asked to, and reads until the end.
    fn exchange(&self, socket: &str, send: &[u8], close: bool) -> String {
        let mut stream = UnixStream::connect(self.dir.path().join(socket)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(send).unwrap();
        if close {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    fn ask(&self, line: &str) -> Value {
        serde_json::from_str(&self.exchange("control", line.as_bytes(), false)).unwrap()
    }
}

const KICKS: &str = "outboard_queue_kicks_total{device=\"disk\",queue=\"0\"} 42\n";

#[test]
fn a_silent_client_gets_the_text() {
    let running = Running::start();
    for close in [false, true] {
        let text = running.exchange("metrics", b"", close);
        assert!(text.starts_with("# HELP"), "{text}");
        assert!(text.contains(KICKS), "{text}");
    }
}

#[test]
fn http_gets_text_and_json() {
    let running = Running::start();
    let get = |target: &str| {
        let request = format!("GET {target} HTTP/1.1\r\nHost: d\r\nAccept: */*\r\n\r\n");
        let answer = running.exchange("metrics", request.as_bytes(), false);
        let (header, body) = answer.split_once("\r\n\r\n").unwrap();
        let length = format!("Content-Length: {}", body.len());
        assert!(header.lines().any(|line| line == length), "{header}");
        (header.lines().next().unwrap().to_owned(), body.to_owned())
    };
    let (status, body) = get("/metrics?x=1");
    assert_eq!(status, "HTTP/1.0 200 OK");
    assert!(body.contains(KICKS));
    let (status, body) = get("/json");
    assert_eq!(status, "HTTP/1.0 200 OK");
    let snapshot: Snapshot = serde_json::from_str(&body).unwrap();
    assert_eq!(snapshot.program, "vhost-user-test");
    assert_eq!(snapshot.devices[0].queues[0].kicks, 42);
    assert_eq!(get("/etc/passwd").0, "HTTP/1.0 404 Not Found");
    let answer = running.exchange("metrics", b"POST / HTTP/1.0\r\n\r\n", false);
    assert!(answer.starts_with("HTTP/1.0 405 "));
}

#[test]
fn one_line_asks_and_one_line_answers() {
    let running = Running::start();
    assert_eq!(running.ask("{\"set\":{\"iops\":1000}}\n"), json!({"ok": null}));
    assert_eq!(running.settings.iops.load(Ordering::Relaxed), 1000);
    assert_eq!(running.ask("{\"get\":null}\n"), json!({"ok": {"iops": 1000}}));
    // The end of the stream ends a line too.
    let answer = running.exchange("control", b"{\"get\":null}", true);
    assert_eq!(answer, "{\"ok\":{\"iops\":1000}}\n");
}

#[test]
fn a_bad_request_gets_a_sentence_and_changes_nothing() {
    let running = Running::start();
    for (line, expected) in [
        ("nonsense\n", "a request is one line"),
        ("[]\n", "a request is one line"),
        ("{}\n", "a request is one line"),
        ("{\"set\":{},\"get\":1}\n", "a request is one line"),
        ("{\"stop\":1}\n", "this daemon knows set, get"),
        ("{\"set\":{\"iops\":-1}}\n", "invalid value"),
        ("{\"set\":{\"iobs\":1}}\n", "unknown field `iobs`"),
        ("{\"set\":{\"iops\":13}}\n", "13 brings bad luck"),
    ] {
        let answer = running.ask(line);
        let message = answer["error"].as_str().unwrap();
        assert!(message.contains(expected), "{line}: {message}");
    }
    let long = "x".repeat(CONTROL_REQUEST_MAX + 1);
    assert!(running.ask(&long)["error"].as_str().unwrap().contains("at most 65536 bytes"));
    assert_eq!(running.settings.iops.load(Ordering::Relaxed), 0);
}

#[test]
fn clients_that_vanish_or_stall_do_no_harm() {
    let running = Running::start();
    for socket in ["metrics", "control"] {
        for _ in 0..20 {
            let mut stream = UnixStream::connect(running.dir.path().join(socket)).unwrap();
            stream.write_all(b"GE").unwrap();
        }
    }
    let _stalled = UnixStream::connect(running.dir.path().join("control")).unwrap();
    assert_eq!(running.ask("{\"get\":null}\n"), json!({"ok": {"iops": 0}}));
}

#[test]
fn the_control_socket_is_private_and_both_go_with_the_thread() {
    let mut running = Running::start();
    let control = running.dir.path().join("control");
    assert_eq!(control.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    running.thread.take().unwrap().join();
    assert!(!control.exists());
    assert!(!running.dir.path().join("metrics").exists());
}

#[test]
fn a_client_that_stalls_does_not_delay_the_end() {
    for (socket, sent) in [("control", &b"{\"get"[..]), ("control", b""), ("metrics", b"GET /")] {
        let mut running = Running::start();
        let mut stream = UnixStream::connect(running.dir.path().join(socket)).unwrap();
        stream.write_all(sent).unwrap();
        // Until the thread waits for the rest.
        thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        running.thread.take().unwrap().join();
        assert!(start.elapsed() < CONNECTION_TIME / 2, "{socket}: {:?}", start.elapsed());
    }
}

#[test]
fn without_sockets_there_is_no_thread() {
    let sockets = AdminSockets::bind(None, None).unwrap();
    let registry = Arc::new(Registry::new("vhost-user-test"));
    assert!(sockets.serve(registry, Arc::new(Settings::default())).unwrap().is_none());
}

#[test]
fn an_abandoned_socket_is_replaced_and_anything_else_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics");
    drop(UnixListener::bind(&path).unwrap());
    let bound = AdminSockets::bind(Some(&path), None).unwrap();
    let error = AdminSockets::bind(Some(&path), None).unwrap_err();
    let line = crate::cli::error_line(&error.into());
    assert!(line.ends_with("metrics: another process listens on it"), "{line}");
    drop(bound);

    std::fs::write(&path, "precious").unwrap();
    let error = AdminSockets::bind(Some(&path), None).unwrap_err();
    let line = crate::cli::error_line(&error.into());
    assert!(line.contains("not a socket"), "{line}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");

    let nowhere = dir.path().join("none/metrics");
    let line =
        crate::cli::error_line(&AdminSockets::bind(Some(&nowhere), None).unwrap_err().into());
    assert!(line.starts_with("error: cannot create the metrics socket "), "{line}");
    assert!(line.contains("No such file"), "{line}");
}

#[test]
fn what_is_not_http_is_told_apart_from_what_may_become_it() {
    for (bytes, expected) in [
        (&b""[..], HttpRequest::Incomplete),
        (b"GET / HT", HttpRequest::Incomplete),
        (b"GET / HTTP/1.0\r\nHost: x\r\n", HttpRequest::Incomplete),
        (b"GET / HTTP/1.0\n\n", HttpRequest::Get(Route::Metrics)),
        (b"GET /jsonx HTTP/1.0\r\n\r\n", HttpRequest::Get(Route::Unknown)),
        (b"hello\n", HttpRequest::Plain),
        (b"GET /\n", HttpRequest::Plain),
        (b"\x00\x01", HttpRequest::Plain),
        (b"\n", HttpRequest::Plain),
    ] {
        assert_eq!(parse_http(bytes), expected, "{}", bytes.escape_ascii());
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_http(&bytes);
        let _ = parse_control(&bytes);
    }
}
