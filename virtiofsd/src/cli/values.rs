//! Values of options, checked while they are parsed.

use std::str::FromStr;
use std::time::Duration;

use rustix::thread::CapabilitySet;

/// `--modcaps`: capabilities to keep or drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapabilityChanges {
    added: CapabilitySet,
    dropped: CapabilitySet,
}

/// Why a list of capabilities cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    /// No sign before it.
    #[error("'{0}' must begin with + (keep) or - (drop)")]
    NoSign(String),
    /// Not one that Linux has.
    #[error("there is no capability '{0}'")]
    Unknown(String),
}

impl CapabilityChanges {
    /// `set` with these changes.
    #[must_use]
    pub fn apply(self, set: CapabilitySet) -> CapabilitySet {
        (set | self.added) - self.dropped
    }
}

impl FromStr for CapabilityChanges {
    type Err = CapabilityError;

    fn from_str(text: &str) -> Result<Self, CapabilityError> {
        let mut changes = Self { added: CapabilitySet::empty(), dropped: CapabilitySet::empty() };
        for word in text.split(':').filter(|word| !word.is_empty()) {
            let (keep, name) = match (word.strip_prefix('+'), word.strip_prefix('-')) {
                (Some(name), _) => (true, name),
                (_, Some(name)) => (false, name),
                _ => return Err(CapabilityError::NoSign(word.to_owned())),
            };
            let upper = name.to_ascii_uppercase();
            let one = CapabilitySet::from_name(upper.strip_prefix("CAP_").unwrap_or(&upper))
                .ok_or_else(|| CapabilityError::Unknown(name.to_owned()))?;
            // The last word on a capability counts.
            changes.added.set(one, keep);
            changes.dropped.set(one, !keep);
        }
        Ok(changes)
    }
}

/// A number of seconds, with a fraction if need be.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a number of seconds");
    let seconds: f64 = text.parse().map_err(|_not_a_number| wrong())?;
    Duration::try_from_secs_f64(seconds).map_err(|_out_of_range| wrong())
}

/// From a thousandth of a second to a day.
pub(super) fn some_seconds(text: &str) -> Result<Duration, String> {
    let duration = seconds(text)?;
    let allowed = Duration::from_millis(1)..=Duration::from_secs(86_400);
    if allowed.contains(&duration) {
        return Ok(duration);
    }
    Err(format!("'{text}' is not from 0.001 to 86400 seconds"))
}
