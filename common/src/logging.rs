//! Log lines: one line an event, to stderr or to the system log.
//!
//! A daemon calls [`init`] once, before it opens anything. What a guest can provoke is logged
//! through [`warn_limited!`](crate::warn_limited), so that a guest cannot fill a disk.
//!
//! Logging never stops a daemon: a line that cannot be written (a closed pipe, a full socket of the
//! system log) is dropped.

use std::io::{self, IsTerminal};

use clap::ValueEnum;
use tracing::level_filters::LevelFilter;

use crate::cli::LogArgs;

mod rate_limit;
mod syslog;

pub use rate_limit::{Admitted, RateLimit};
pub use syslog::Syslog;

/// For the expansion of [`warn_limited!`](crate::warn_limited) in other crates.
#[doc(hidden)]
pub use tracing;

/// The least severe kind of event that is logged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// Nothing is logged.
    Off,
    /// The daemon cannot do what it was asked to.
    Error,
    /// Something is wrong, often with a guest, and the daemon goes on.
    Warn,
    /// What an operator wants to know: start, connections, stop.
    #[default]
    Info,
    /// Decisions and messages of the protocol.
    Debug,
    /// Single requests.
    Trace,
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Off => Self::OFF,
            Level::Error => Self::ERROR,
            Level::Warn => Self::WARN,
            Level::Info => Self::INFO,
            Level::Debug => Self::DEBUG,
            Level::Trace => Self::TRACE,
        }
    }
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The socket of the system log cannot be used.
    #[error("cannot reach the system log at {path}")]
    Syslog {
        /// The socket that was tried.
        path: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// [`init`] ran twice.
    #[error("logging is set up already")]
    Twice,
}

/// Starts logging for the whole process. `program` names it in the system log. Where there is no system
/// log, in a container perhaps, stderr takes its place, and its first line says so.
///
/// # Errors
/// [`LogError::Twice`] on a second call.
pub fn init(arguments: &LogArgs, program: &'static str) -> Result<(), LogError> {
    // Internal errors are not logged: the subscriber reports them with `eprintln!`, which panics
    // when stderr is a closed pipe.
    let builder = tracing_subscriber::fmt()
        .compact()
        .with_max_level(LevelFilter::from(arguments.log_level))
        .log_internal_errors(false);
    let syslog = arguments.syslog.then(|| Syslog::connect(program)).transpose();
    let (syslog, missing) = match syslog {
        Ok(syslog) => (syslog, None),
        Err(error) => (None, Some(anyhow::Error::from(error))),
    };
    let installed = if let Some(syslog) = syslog {
        let builder = builder.without_time().with_level(false).with_ansi(false);
        tracing::subscriber::set_global_default(builder.with_writer(syslog).finish())
    } else {
        let builder = builder.with_ansi(io::stderr().is_terminal());
        tracing::subscriber::set_global_default(builder.with_writer(io::stderr).finish())
    };
    installed.map_err(|_already_set| LogError::Twice)?;
    if let Some(error) = missing {
        tracing::warn!("{error:#}; logging to stderr");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
