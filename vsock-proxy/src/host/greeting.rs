//! What a client of the host says first. Pure: bytes in, a [`Greeting`] out.
//!
//! ```text
//! CONNECT <port>\n      any case; the stream follows, its first bytes may come in the same write
//! passfd\n              then, with a descriptor: <port>[ keep]
//! ```
//! A greeting may come in pieces. It is looked at while it is still in the socket, so what follows
//! it is never ours to keep.
#![cfg_attr(not(test), warn(clippy::indexing_slicing, clippy::arithmetic_side_effects))]

use crate::packet::Port;

/// Bytes that a greeting may have, its line end included.
pub const GREETING_MAX: usize = 64;

/// What was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeting {
    /// Not a whole line yet.
    Incomplete,
    /// Connect to this port of the guest.
    Connect {
        /// The guest's port.
        port: Port,
        /// Bytes of the greeting; what follows is data.
        len: usize,
    },
    /// A descriptor follows.
    PassFd {
        /// Bytes of the greeting.
        len: usize,
    },
    /// Nothing we know: let go of the client.
    Nonsense,
}

/// A port as digits and nothing else.
fn port(word: &[u8]) -> Option<Port> {
    if word.is_empty() || !word.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(word).ok()?.parse().ok().map(Port)
}

/// The next word of `line`, and what follows it.
fn word(line: &[u8]) -> (&[u8], &[u8]) {
    let line = line.trim_ascii_start();
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    line.split_at_checked(end).unwrap_or((line, &[]))
}

/// Reads a client's first line from the first bytes it sent, [`GREETING_MAX`] of them if there are
/// so many.
#[must_use]
pub fn parse_greeting(bytes: &[u8]) -> Greeting {
    let Some(end) = bytes.iter().take(GREETING_MAX).position(|&b| b == b'\n') else {
        return if bytes.len() < GREETING_MAX { Greeting::Incomplete } else { Greeting::Nonsense };
    };
    let (line, len) = (bytes.get(..end).unwrap_or(&[]), end.saturating_add(1));
    let (verb, rest) = word(line);
    let (argument, rest) = word(rest);
    if !rest.trim_ascii().is_empty() {
        return Greeting::Nonsense;
    }
    if verb.eq_ignore_ascii_case(b"connect") {
        return port(argument).map_or(Greeting::Nonsense, |port| Greeting::Connect { port, len });
    }
    if verb.eq_ignore_ascii_case(b"passfd") && argument.is_empty() {
        return Greeting::PassFd { len };
    }
    Greeting::Nonsense
}

/// Reads the text that comes with a passed descriptor: the port, and whether to keep.
#[must_use]
pub fn parse_passed(bytes: &[u8]) -> Option<(Port, bool)> {
    let (first, rest) = word(bytes);
    let (second, rest) = word(rest);
    let keep = second.eq_ignore_ascii_case(b"keep");
    let ends = rest.trim_ascii().is_empty() && (keep || second.is_empty());
    port(first).filter(|_| ends).map(|port| (port, keep))
}

#[cfg(test)]
#[allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_the_known_clients_say() {
        let connect = |port, len| Greeting::Connect { port: Port(port), len };
        assert_eq!(parse_greeting(b"CONNECT 1024\n"), connect(1024, 13));
        assert_eq!(parse_greeting(b"connect 52\nGET /"), connect(52, 11));
        assert_eq!(parse_greeting(b"Connect  4294967295\r\n"), connect(u32::MAX, 21));
        assert_eq!(parse_greeting(b"passfd\n"), Greeting::PassFd { len: 7 });
        assert_eq!(parse_passed(b"1027"), Some((Port(1027), false)));
        assert_eq!(parse_passed(b"1027 keep"), Some((Port(1027), true)));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT 4294967296\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 0x10\n",
            "CONNECT 1 2\n",
            "CONNECT1\n",
            "GET / HTTP/1.1\r\n",
            "passfd 1\n",
            "\n",
        ] {
            assert_eq!(parse_greeting(line.as_bytes()), Greeting::Nonsense, "{line:?}");
        }
        assert_eq!(parse_greeting(&[b'C'; GREETING_MAX]), Greeting::Nonsense);
        for text in ["", "keep", "1 keeps", "1 keep it", "99999999999"] {
            assert_eq!(parse_passed(text.as_bytes()), None, "{text:?}");
        }
    }

    proptest! {
        /// A line in pieces is incomplete until its end, and what follows changes nothing.
        #[test]
        fn pieces_and_data_behind_make_no_difference(port: u32, data: Vec<u8>) {
            let line = format!("CONNECT {port}\n").into_bytes();
            for end in 0..line.len() {
                prop_assert_eq!(parse_greeting(&line[..end]), Greeting::Incomplete);
            }
            let len = line.len();
            let mut both = line;
            both.extend(data);
            prop_assert_eq!(parse_greeting(&both), Greeting::Connect { port: Port(port), len });
        }

        #[test]
        fn no_bytes_are_dangerous(bytes: Vec<u8>) {
            let _ = parse_greeting(&bytes);
            let _ = parse_passed(&bytes);
        }
    }
}
