//! Resource limits.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Outcome, StageError};

/// Lets the process lock and pin as much memory as its hard limit allows, and any amount if it may raise that.
/// What is refused stays as it was.
pub fn locked_memory() {
    let unlimited = Rlimit { current: None, maximum: None };
    if setrlimit(Resource::Memlock, unlimited).is_err() {
        let maximum = getrlimit(Resource::Memlock).maximum;
        // Up to the hard limit is always allowed.
        let _ = setrlimit(Resource::Memlock, Rlimit { current: maximum, maximum });
    }
}

/// Sets how many descriptors may be open at once, for good: the hard limit too.
///
/// Raising the hard limit needs `CAP_SYS_RESOURCE`; without it the number is what the hard limit
/// was, which [`Outcome::Partly`] says.
///
/// # Errors
/// [`StageError::System`] when even that is refused.
pub fn open_files(wanted: u64) -> Result<Outcome, StageError> {
    let set = |limit: u64| {
        setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) })
    };
    let failed = StageError::system("set the number of open files");
    let Err(error) = set(wanted) else {
        return Ok(Outcome::Applied);
    };
    match getrlimit(Resource::Nofile).maximum {
        Some(maximum) if maximum < wanted => {
            set(maximum).map_err(failed)?;
            Ok(Outcome::Partly(format!("{wanted} open files wanted, {maximum} allowed")))
        }
        _ => Err(failed(error)),
    }
}
