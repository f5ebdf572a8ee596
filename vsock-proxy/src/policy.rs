//! Who may reach whom: what the operator allows, port by port.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

use crate::packet::Port;

/// A set of ports, written `22+1024-2000`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PortSet(Vec<(u32, u32)>);

/// A set of ports that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no set of ports, such as 22+1024-2000")]
pub struct BadPortSet(String);

impl FromStr for PortSet {
    type Err = BadPortSet;

    fn from_str(text: &str) -> Result<Self, BadPortSet> {
        let range = |part: &str| {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            let (from, to) = (from.parse().ok()?, to.parse().ok()?);
            (from <= to).then_some((from, to))
        };
        let ranges: Option<Vec<(u32, u32)>> = text.split('+').map(range).collect();
        ranges.map(Self).ok_or_else(|| BadPortSet(text.to_owned()))
    }
}

impl TryFrom<String> for PortSet {
    type Error = BadPortSet;

    fn try_from(text: String) -> Result<Self, BadPortSet> {
        text.parse()
    }
}

impl PortSet {
    /// Whether `port` is in the set.
    #[must_use]
    pub fn contains(&self, port: Port) -> bool {
        self.0.iter().any(|&(from, to)| (from..=to).contains(&port.0))
    }
}

/// What one guest and its host may do.
#[derive(Debug, Clone)]
pub struct Policy {
    /// The guest may not connect to anything.
    pub connect_only: bool,
    /// Ports that the guest may connect to; `None`: all.
    pub host_ports: Option<PortSet>,
    /// Ports of the guest that clients of the host may connect to; `None`: all.
    pub guest_ports: Option<PortSet>,
    /// Services of the host that are not at `PATH_PORT`.
    pub map: BTreeMap<u32, PathBuf>,
    /// Connections and waiting clients at one time.
    pub max_connections: u32,
}

impl Policy {
    /// Whether the guest may connect to `port` of the host or of a sibling.
    #[must_use]
    pub fn guest_may_reach(&self, port: Port) -> bool {
        !self.connect_only && self.host_ports.as_ref().is_none_or(|set| set.contains(port))
    }

    /// Whether clients of the host, and siblings, may connect to `port` of the guest.
    #[must_use]
    pub fn host_may_reach(&self, port: Port) -> bool {
        self.guest_ports.as_ref().is_none_or(|set| set.contains(port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_ports() {
        let set: PortSet = "22+1024-2000".parse().unwrap();
        for (port, is_in) in [(22, true), (23, false), (1024, true), (2000, true), (2001, false)] {
            assert_eq!(set.contains(Port(port)), is_in, "{port}");
        }
        for text in ["", "+", "1-", "5-4", "x", "1+", "4294967296", "-1"] {
            assert!(text.parse::<PortSet>().is_err(), "{text:?}");
        }
    }
}
