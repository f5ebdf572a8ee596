//! `--port`: the description of a switch's port on the command line.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use outboard_common::cli::SocketChoice;
use outboard_common::cli::values::{check_socket_path, split_commas};
use outboard_common::rate_limiter::{DirectionLimits, Limit, Limits};

use crate::control::MacAddr;
use crate::filter::Cidr;

/// A port as the operator describes it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PortConfig {
    /// Where the guest's VMM is met.
    pub socket: PathBuf,
    /// Dial the socket instead of listening on it.
    pub client: bool,
    /// The guest's address; `None`: any.
    pub mac: Option<MacAddr>,
    /// Ranges that the guest may send from; empty: any.
    pub allow_ip: Vec<Cidr>,
    /// No frames between this and other isolated ports.
    pub isolated: bool,
    /// Limits that differ from those of all ports.
    pub limits: Limits,
}

/// Why a port's description cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Not `KEY=VALUE`.
    #[error("{0:?} is not KEY=VALUE; a comma in a path is written twice")]
    NotKeyValue(String),
    /// A key that may be given once.
    #[error("{0} is given twice")]
    Twice(String),
    /// A value that the key cannot have.
    #[error("{key}: {why}")]
    BadValue {
        /// The key.
        key: String,
        /// What is wrong.
        why: String,
    },
    /// No socket.
    #[error("socket=PATH is missing")]
    NoSocket,
}

impl PortConfig {
    /// How its front end is met.
    #[must_use]
    pub fn choice(&self) -> SocketChoice {
        if self.client {
            SocketChoice::Dial(self.socket.clone())
        } else {
            SocketChoice::Listen(self.socket.clone())
        }
    }

    /// Its limits; what is not set is taken from `defaults`.
    #[must_use]
    pub fn limits_or(&self, defaults: Limits) -> Limits {
        let or = |own: DirectionLimits, other: DirectionLimits| DirectionLimits {
            ops: own.ops.or(other.ops),
            bytes: own.bytes.or(other.bytes),
        };
        Limits {
            read: or(self.limits.read, defaults.read),
            write: or(self.limits.write, defaults.write),
        }
    }

    fn set(&mut self, key: &str, text: &str) -> Result<(), String> {
        fn value<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
            text.parse().map_err(|error: T::Err| error.to_string())
        }
        let limit = || value::<Limit>(text).map(Some);
        match key {
            "socket" => {
                check_socket_path(Path::new(text)).map_err(|error| error.to_string())?;
                self.socket = text.into();
            }
            "client" => self.client = switch(text)?,
            "isolated" => self.isolated = switch(text)?,
            "mac" => self.mac = Some(value(text)?),
            "allow-ip" => self.allow_ip.push(value(text)?),
            "tx-packets" => self.limits.write.ops = limit()?,
            "tx-bytes" => self.limits.write.bytes = limit()?,
            "rx-packets" => self.limits.read.ops = limit()?,
            "rx-bytes" => self.limits.read.bytes = limit()?,
            _ => return Err("there is no such key".to_owned()),
        }
        Ok(())
    }
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

impl FromStr for PortConfig {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        let mut port = Self::default();
        let parts = split_commas(text);
        let mut seen: Vec<&str> = Vec::new();
        for part in &parts {
            let (key, value) =
                part.split_once('=').ok_or_else(|| PortError::NotKeyValue(part.clone()))?;
            if seen.contains(&key) && key != "allow-ip" {
                return Err(PortError::Twice(key.to_owned()));
            }
            seen.push(key);
            port.set(key, value).map_err(|why| PortError::BadValue { key: key.to_owned(), why })?;
        }
        if seen.contains(&"socket") { Ok(port) } else { Err(PortError::NoSocket) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_description_is_understood() {
        let text = "socket=/s,mac=52:54:00:12:34:56,isolated=on,allow-ip=10.0.0.5,allow-ip=fd00::/64,\
                    rx-packets=1K";
        let port: PortConfig = text.parse().unwrap();
        assert_eq!(port.choice(), SocketChoice::Listen("/s".into()));
        let with_comma: PortConfig = "socket=/a,,b,client=on".parse().unwrap();
        assert_eq!(with_comma.choice(), SocketChoice::Dial("/a,b".into()));
        assert!(port.isolated && port.mac.is_some() && port.allow_ip.len() == 2);
        let defaults = Limits { write: port.limits.read, ..Limits::default() };
        let limits = port.limits_or(defaults);
        assert_eq!(
            (limits.read.ops, limits.write.ops),
            (port.limits.read.ops, port.limits.read.ops)
        );
    }

    #[test]
    fn mistakes_are_told() {
        for (text, part) in [
            ("mac=52:54:00:12:34:56", "socket=PATH is missing"),
            ("/s", "not KEY=VALUE"),
            ("socket=", "the path is empty"),
            ("socket=/a,b", "written twice"),
            ("socket=/s,socket=/t", "socket is given twice"),
            ("socket=/s,mac=zz", "mac: "),
            ("socket=/s,isolated=maybe", "write on or off"),
            ("socket=/s,colour=red", "colour: there is no such key"),
        ] {
            let error = text.parse::<PortConfig>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
