//! Resource limits.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Outcome, StageError};

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
