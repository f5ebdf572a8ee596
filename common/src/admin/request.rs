//! Requests and answers of the two sockets, as pure functions on bytes.

use serde_json::{Map, Value};

/// Why a control request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Not a JSON object with one member.
    #[error("a request is one line with one JSON object of one member, like {{\"state\":null}}")]
    Malformed,
    /// The line is longer than this many bytes.
    #[error("a request has at most {0} bytes")]
    TooLong(usize),
    /// The daemon has no such verb.
    #[error("unknown request; this daemon knows {}", .known.join(", "))]
    UnknownVerb {
        /// The verbs it has.
        known: &'static [&'static str],
    },
    /// The argument is not what the verb takes.
    #[error("{0}")]
    Argument(#[from] serde_json::Error),
    /// The daemon cannot do it, or not now.
    #[error("{0}")]
    Refused(String),
}

/// What a metrics client has sent so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HttpRequest {
    /// It may become an HTTP request.
    Incomplete,
    /// It is none; the client gets the bare text.
    Plain,
    /// A complete GET.
    Get(Route),
    /// A complete request of another method.
    OtherMethod,
}

/// What can be got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    Metrics,
    Json,
    Unknown,
}

/// Decodes the header of an HTTP/1.x request. Only the request line matters.
pub(super) fn parse_http(bytes: &[u8]) -> HttpRequest {
    let Some(line_end) = bytes.iter().position(|byte| *byte == b'\n') else {
        // The longest prefix of any request line is printable.
        let printable = bytes.iter().all(|byte| (b' '..=b'~').contains(byte) || *byte == b'\r');
        return if printable { HttpRequest::Incomplete } else { HttpRequest::Plain };
    };
    let line = bytes[..line_end].trim_ascii_end();
    let mut words = line.split(|byte| *byte == b' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    let (Some(method), Some(target), Some(version)) = (method, target, version) else {
        return HttpRequest::Plain;
    };
    if !version.starts_with(b"HTTP/") {
        return HttpRequest::Plain;
    }
    if !ends_with_empty_line(bytes) {
        return HttpRequest::Incomplete;
    }
    if method != b"GET" {
        return HttpRequest::OtherMethod;
    }
    let path = target.split(|byte| *byte == b'?').next().unwrap_or_default();
    HttpRequest::Get(match path {
        b"/" | b"/metrics" => Route::Metrics,
        b"/json" => Route::Json,
        _ => Route::Unknown,
    })
}

fn ends_with_empty_line(bytes: &[u8]) -> bool {
    bytes.windows(4).any(|window| window == b"\r\n\r\n")
        || bytes.windows(2).any(|window| window == b"\n\n")
}

/// An HTTP answer.
pub(super) struct Answer {
    status: &'static str,
    content_type: &'static str,
    body: String,
}

impl Answer {
    pub(super) fn text(body: String) -> Self {
        Self { status: "200 OK", content_type: "text/plain; version=0.0.4; charset=utf-8", body }
    }

    pub(super) fn json(body: String) -> Self {
        Self { status: "200 OK", content_type: "application/json", body }
    }

    pub(super) fn not_found() -> Self {
        let body = "There are /metrics and /json.\n".to_owned();
        Self { status: "404 Not Found", ..Self::text(body) }
    }

    pub(super) fn method_not_allowed() -> Self {
        let body = "Only GET is served.\n".to_owned();
        Self { status: "405 Method Not Allowed", ..Self::text(body) }
    }

    /// Header and body.
    pub(super) fn http(self) -> Vec<u8> {
        let Self { status, content_type, body } = self;
        let length = body.len();
        format!(
            "HTTP/1.0 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\n\
             Connection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// Decodes a control request into its verb and argument.
pub(super) fn parse_control(line: &[u8]) -> Result<(String, Value), ControlError> {
    let object: Map<String, Value> =
        serde_json::from_slice(line).map_err(|_malformed| ControlError::Malformed)?;
    let mut members = object.into_iter();
    match (members.next(), members.next()) {
        (Some(member), None) => Ok(member),
        _ => Err(ControlError::Malformed),
    }
}

/// The line that answers a control request, newline included.
pub(super) fn reply(outcome: Result<Value, ControlError>) -> String {
    let answer = match outcome {
        Ok(value) => serde_json::json!({ "ok": value }),
        Err(error) => serde_json::json!({ "error": error.to_string() }),
    };
    format!("{answer}\n")
}
