//! Values on command lines and in configuration files: sizes, durations, CPU lists, socket paths.
//!
//! Pure functions from text to a checked value; each error is a sentence for the operator.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use serde::{Deserialize, Serialize};

/// Longest path of a Unix socket in bytes: `sun_path` less its final NUL.
pub const SOCKET_PATH_MAX: usize = 107;

/// One past the highest CPU number that can be named (`CPU_SETSIZE` of the C library).
pub const CPU_MAX: u16 = 1024;

/// A text that is not the value it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not a size.
    #[error("not a size: write a whole number of bytes, or one followed by K, M, G or T")]
    Size,
    /// Not a duration.
    #[error("not a duration: write a whole number followed by us, ms, s, m or h")]
    Duration,
    /// The number does not fit.
    #[error("the number is too large")]
    TooLarge,
    /// Not a list of CPUs.
    #[error("not a list of CPUs: write numbers and ranges, like 0-3,8")]
    CpuList,
    /// A CPU number that no system has.
    #[error("CPU numbers go up to {}", CPU_MAX - 1)]
    CpuNumber,
    /// A CPU is named more than once.
    #[error("CPU {0} is listed twice")]
    CpuTwice(u16),
    /// An empty path.
    #[error("the path is empty")]
    PathEmpty,
    /// A path that does not fit a socket address.
    #[error("the path has {0} bytes, but the path of a Unix socket has at most {SOCKET_PATH_MAX}")]
    PathTooLong(usize),
    /// A path with a NUL byte.
    #[error("the path has a NUL byte in it")]
    PathNul,
}

/// Splits a description (`KEY=VALUE,KEY=VALUE`) at single commas; two commas are one in the text.
#[must_use]
pub fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
    }
    parts
}

/// A number of bytes: `512`, `64K`, `1M`, `2G`, `1T`, in powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "TextOrNumber", into = "u64")]
pub struct Size(pub u64);

impl Size {
    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl From<Size> for u64 {
    fn from(size: Size) -> Self {
        size.0
    }
}

impl FromStr for Size {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let (digits, shift) = match text.as_bytes().last() {
            Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
            Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
            Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
            Some(b't' | b'T') => (&text[..text.len() - 1], 40),
            _ => (text, 0),
        };
        let number = whole_number(digits, ValueError::Size)?;
        number.checked_mul(1 << shift).map(Self).ok_or(ValueError::TooLarge)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A configuration file may write a size as a number or as text with a suffix.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a size is a whole number of bytes, or a text like \"64K\"")]
enum TextOrNumber {
    Number(u64),
    Text(String),
}

impl TryFrom<TextOrNumber> for Size {
    type Error = ValueError;

    fn try_from(value: TextOrNumber) -> Result<Self, ValueError> {
        match value {
            TextOrNumber::Number(bytes) => Ok(Self(bytes)),
            TextOrNumber::Text(text) => text.parse(),
        }
    }
}

/// Reads a duration: `250us`, `10ms`, `5s`, `2m`, `1h`, or a bare `0`.
///
/// # Errors
/// [`ValueError::Duration`] without a known unit, [`ValueError::TooLarge`] past `u64` microseconds.
pub fn duration(text: &str) -> Result<Duration, ValueError> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    // Longer units first, or `ms` would be read as seconds.
    let units =
        [("us", 1), ("ms", 1_000), ("s", 1_000_000), ("m", 60_000_000), ("h", 3_600_000_000)];
    for (unit, microseconds) in units {
        if let Some(digits) = text.strip_suffix(unit) {
            let number = whole_number(digits, ValueError::Duration)?;
            let total: Option<u64> = number.checked_mul(microseconds);
            return total.map(Duration::from_micros).ok_or(ValueError::TooLarge);
        }
    }
    Err(ValueError::Duration)
}

/// Decimal digits only: no sign, no space, at least one.
fn whole_number(digits: &str, malformed: ValueError) -> Result<u64, ValueError> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(malformed);
    }
    // Only overflow is left to go wrong.
    digits.parse().ok().ok_or(ValueError::TooLarge)
}

/// A list of CPUs in the order it was written, each once; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(Vec<u16>);

impl CpuList {
    /// The CPUs, in the order written.
    pub fn cpus(&self) -> &[u16] {
        &self.0
    }

    /// The CPU for the worker with this index; the list repeats when there are more workers.
    pub fn cpu_of_worker(&self, worker: usize) -> u16 {
        self.0[worker % self.0.len()]
    }
}

impl FromStr for CpuList {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (cpu_number(first)?, cpu_number(last)?);
            if first > last {
                return Err(ValueError::CpuList);
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(ValueError::CpuTwice(cpu));
                }
                cpus.push(cpu);
            }
        }
        Ok(Self(cpus))
    }
}

fn cpu_number(text: &str) -> Result<u16, ValueError> {
    let number = whole_number(text.trim(), ValueError::CpuList)?;
    match u16::try_from(number) {
        Ok(cpu) if cpu < CPU_MAX => Ok(cpu),
        _ => Err(ValueError::CpuNumber),
    }
}

/// Checks that a path can be the address of a Unix socket.
///
/// # Errors
/// The reason why it cannot.
pub fn check_socket_path(path: &Path) -> Result<(), ValueError> {
    let bytes = path.as_os_str().as_bytes();
    match bytes.len() {
        0 => Err(ValueError::PathEmpty),
        length if length > SOCKET_PATH_MAX => Err(ValueError::PathTooLong(length)),
        _ if bytes.contains(&0) => Err(ValueError::PathNul),
        _ => Ok(()),
    }
}

/// A clap value parser for the path of a Unix socket.
pub fn socket_path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().try_map(|text: OsString| {
        let path = PathBuf::from(text);
        check_socket_path(&path).map(|()| path)
    })
}
