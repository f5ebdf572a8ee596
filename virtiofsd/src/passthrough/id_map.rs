//! Translation of user and group ids between guest and host (`--translate-uid`, `--translate-gid`).
//!
//! The two directions are independent lists of ranges; an id that no range names passes unchanged.

use std::fmt;
use std::str::FromStr;

/// Why a translation could not be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IdMapError {
    /// The word before the first colon is not a kind of translation.
    #[error(
        "unknown kind '{0}': expected guest, host, squash-guest, squash-host, forbid-guest or map"
    )]
    UnknownKind(String),
    /// Too few or too many numbers.
    #[error("'{text}' needs {wanted} numbers separated by colons")]
    WrongCount {
        /// The argument.
        text: String,
        /// Numbers expected after the kind.
        wanted: usize,
    },
    /// A number that is none, or does not fit 32 bits.
    #[error("'{0}' is not an id (0 to 4294967295)")]
    NotANumber(String),
    /// The range, or the range it maps to, goes past the last id.
    #[error("'{0}' goes past the largest id, or is empty")]
    OutOfRange(String),
    /// Two ranges of one direction share an id.
    #[error("'{0}' overlaps an earlier range in the same direction")]
    Overlap(String),
}

/// One `--translate-uid` or `--translate-gid` argument.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdRule {
    kind: Kind,
    from: u32,
    to: u32,
    count: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Guest,
    Host,
    SquashGuest,
    SquashHost,
    ForbidGuest,
    Map,
}

impl Kind {
    const ALL: [(&str, Self); 6] = [
        ("guest", Self::Guest),
        ("host", Self::Host),
        ("squash-guest", Self::SquashGuest),
        ("squash-host", Self::SquashHost),
        ("forbid-guest", Self::ForbidGuest),
        ("map", Self::Map),
    ];
}

impl FromStr for IdRule {
    type Err = IdMapError;

    fn from_str(text: &str) -> Result<Self, IdMapError> {
        let (word, rest) = text.split_once(':').unwrap_or((text, ""));
        let kind = Kind::ALL
            .iter()
            .find(|(name, _)| *name == word)
            .map(|&(_, kind)| kind)
            .ok_or_else(|| IdMapError::UnknownKind(word.to_owned()))?;
        let mut numbers = Vec::with_capacity(3);
        for part in rest.split(':') {
            numbers.push(part.parse().map_err(|_unfit| IdMapError::NotANumber(part.to_owned()))?);
        }
        let wanted = if kind == Kind::ForbidGuest { 2 } else { 3 };
        let (from, to, count): (u32, u32, u32) = match (kind, numbers.as_slice()) {
            (Kind::ForbidGuest, &[from, count]) => (from, 0, count),
            (Kind::ForbidGuest, _) => {
                return Err(IdMapError::WrongCount { text: text.to_owned(), wanted });
            }
            (_, &[from, to, count]) => (from, to, count),
            _ => return Err(IdMapError::WrongCount { text: text.to_owned(), wanted }),
        };
        let squashes = matches!(kind, Kind::SquashGuest | Kind::SquashHost | Kind::ForbidGuest);
        let last = count.checked_sub(1);
        let fits = |base: u32| last.and_then(|n| base.checked_add(n)).is_some();
        if !fits(from) || (!squashes && !fits(to)) {
            return Err(IdMapError::OutOfRange(text.to_owned()));
        }
        Ok(Self { kind, from, to, count })
    }
}

impl fmt::Display for IdRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            Kind::ALL.iter().find(|(_, kind)| *kind == self.kind).map_or("", |(name, _)| name);
        if self.kind == Kind::ForbidGuest {
            write!(f, "{name}:{}:{}", self.from, self.count)
        } else {
            write!(f, "{name}:{}:{}:{}", self.from, self.to, self.count)
        }
    }
}

/// What becomes of the ids of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The first id becomes this one, the second the next.
    Shift(u32),
    /// All become this one.
    Squash(u32),
    /// Not to be used.
    Forbid,
}

#[derive(Debug, Clone, Copy)]
struct Range {
    first: u32,
    last: u32,
    target: Target,
}

/// Translations of one kind of id, in both directions.
#[derive(Debug, Clone, Default)]
pub struct IdMap {
    /// Sorted by `first`, without overlaps.
    to_host: Vec<Range>,
    to_guest: Vec<Range>,
}

impl IdMap {
    /// Builds the map of `rules`.
    ///
    /// # Errors
    /// Two rules of the same direction name the same id.
    pub fn new(rules: &[IdRule]) -> Result<Self, IdMapError> {
        let mut map = Self::default();
        for rule in rules {
            let (from, to, count) = (rule.from, rule.to, rule.count);
            let added = match rule.kind {
                Kind::Guest => add(&mut map.to_host, from, count, Target::Shift(to)),
                Kind::Host => add(&mut map.to_guest, from, count, Target::Shift(to)),
                Kind::SquashGuest => add(&mut map.to_host, from, count, Target::Squash(to)),
                Kind::SquashHost => add(&mut map.to_guest, from, count, Target::Squash(to)),
                Kind::ForbidGuest => add(&mut map.to_host, from, count, Target::Forbid),
                Kind::Map => {
                    add(&mut map.to_host, from, count, Target::Shift(to))
                        && add(&mut map.to_guest, to, count, Target::Shift(from))
                }
            };
            if !added {
                return Err(IdMapError::Overlap(rule.to_string()));
            }
        }
        Ok(map)
    }

    /// Whether every id passes unchanged.
    #[must_use]
    pub fn is_identity(&self) -> bool {
        self.to_host.is_empty() && self.to_guest.is_empty()
    }

    /// The host's id of a guest's; `None` if the guest may not use it.
    #[inline]
    #[must_use]
    pub fn host(&self, id: u32) -> Option<u32> {
        translate(&self.to_host, id)
    }

    /// The guest's id of a host's.
    #[inline]
    #[must_use]
    pub fn guest(&self, id: u32) -> u32 {
        translate(&self.to_guest, id).unwrap_or(id)
    }
}

/// Adds a range in order; false if it overlaps one that is there.
fn add(ranges: &mut Vec<Range>, first: u32, count: u32, target: Target) -> bool {
    let last = first.saturating_add(count.saturating_sub(1));
    let at = ranges.partition_point(|range| range.last < first);
    if ranges.get(at).is_some_and(|next| next.first <= last) {
        return false;
    }
    ranges.insert(at, Range { first, last, target });
    true
}

#[inline]
fn translate(ranges: &[Range], id: u32) -> Option<u32> {
    if ranges.is_empty() {
        return Some(id);
    }
    let at = ranges.partition_point(|range| range.last < id);
    match ranges.get(at) {
        Some(range) if range.first <= id => match range.target {
            Target::Shift(to) => Some(to.wrapping_add(id.wrapping_sub(range.first))),
            Target::Squash(to) => Some(to),
            Target::Forbid => None,
        },
        _ => Some(id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(rules: &[&str]) -> Result<IdMap, IdMapError> {
        let rules: Result<Vec<IdRule>, _> = rules.iter().map(|rule| rule.parse()).collect();
        IdMap::new(&rules?)
    }

    #[test]
    fn each_kind_translates_in_its_direction_only() {
        let guest = map(&["guest:0:1000:10"]).unwrap();
        assert_eq!(
            (guest.host(0), guest.host(9), guest.host(10)),
            (Some(1000), Some(1009), Some(10))
        );
        assert_eq!(guest.guest(1000), 1000);
        let host = map(&["host:1000:0:10"]).unwrap();
        assert_eq!((host.guest(1005), host.host(5)), (5, Some(5)));
        let squash = map(&["squash-guest:0:501:4294967295", "squash-host:0:7:100"]).unwrap();
        assert_eq!((squash.host(12345), squash.host(u32::MAX)), (Some(501), Some(u32::MAX)));
        assert_eq!((squash.guest(99), squash.guest(100)), (7, 100));
        let both = map(&["map:100:200:5"]).unwrap();
        assert_eq!((both.host(104), both.guest(204)), (Some(204), 104));
        let forbid = map(&["forbid-guest:0:1000", "map:1000:1000:1"]).unwrap();
        assert_eq!((forbid.host(0), forbid.host(999), forbid.host(1000)), (None, None, Some(1000)));
    }

    #[test]
    fn wrong_rules_name_what_is_wrong() {
        assert!(matches!(map(&["quest:0:0:1"]), Err(IdMapError::UnknownKind(_))));
        assert!(matches!(map(&["guest:0:0"]), Err(IdMapError::WrongCount { wanted: 3, .. })));
        assert!(matches!(
            map(&["forbid-guest:0:0:1"]),
            Err(IdMapError::WrongCount { wanted: 2, .. })
        ));
        assert!(matches!(map(&["guest:-1:0:1"]), Err(IdMapError::NotANumber(_))));
        assert!(matches!(map(&["guest:1:0:4294967296"]), Err(IdMapError::NotANumber(_))));
        assert!(matches!(map(&["guest:2:0:4294967295"]), Err(IdMapError::OutOfRange(_))));
        assert!(matches!(map(&["guest:0:5:0"]), Err(IdMapError::OutOfRange(_))));
        assert!(matches!(map(&["guest:0:9:5", "squash-guest:4:1:1"]), Err(IdMapError::Overlap(_))));
        assert!(map(&["guest:0:9:5", "guest:5:1:1", "host:0:3:9"]).is_ok());
    }

    #[test]
    fn a_rule_prints_as_it_was_written() {
        for text in ["guest:1:2:3", "forbid-guest:1:2", "squash-host:5:6:7"] {
            assert_eq!(text.parse::<IdRule>().unwrap().to_string(), text);
        }
    }
}
