//! How a daemon locks itself in, so that a guest that breaks the device gains next to nothing.
//!
//! # Theory of operation
//! A daemon enters its sandbox after it has opened what it needs and before it starts a thread:
//! most of these limits belong to a thread, and the threads it starts later inherit them. It calls
//! the stages in this order ([`Stages`] insists on it), each for a reason:
//!
//! 1. **rlimits**: raising a limit needs a capability that goes later.
//! 2. **namespaces**: making them needs capabilities, and helper programs (`newuidmap`) that gain
//!    privileges when they start.
//! 3. **no new privileges**: from here on no program it could start gains any. The next stages need
//!    this when the daemon is not root.
//! 4. **capabilities**: all are dropped but those the device needs.
//! 5. **landlock**: only the named paths can be opened, no TCP port bound or connected to.
//! 6. **seccomp**: only the listed system calls can be made. Last, because the stages before need
//!    calls that the daemon does not.
//!
//! A stage that is *required* ends the start when it cannot be done; one that is *attempted* warns.
//! What a kernel does not have at all (landlock before Linux 5.13) is noted at debug level.
//! [`enter`] does it all for a daemon that needs nothing special.

use std::io;
use std::path::PathBuf;

pub mod capabilities;
pub mod landlock;
pub mod namespaces;
pub mod rlimits;
pub mod seccomp;
pub mod stages;

pub use rustix::thread::CapabilitySet;
pub use stages::{Plan, Stage, Stages, enter};

/// What came of a stage that did not fail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All of it is in force.
    Applied,
    /// Some of it is, and the rest is not to be had here.
    Partly(String),
    /// This kernel does not have it, or it was switched off.
    Unavailable(String),
}

/// Why a stage could not be done.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A path could not be opened or used.
    #[error("cannot {action} {}", path.display())]
    Path {
        /// What was being done to the path.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Capabilities that the device needs and the process does not have.
    #[error("the capabilities {0} are needed; run as root, or give them to this program")]
    MissingCapabilities(String),
    /// Landlock refused the rules.
    #[error("the path rules are not accepted")]
    Landlock(#[from] ::landlock::RulesetError),
    /// The system call filter cannot be built.
    #[error("the system call filter cannot be built")]
    FilterBuild(#[from] seccompiler::BackendError),
    /// The system call filter cannot be installed.
    #[error("the system call filter cannot be installed")]
    FilterInstall(#[from] seccompiler::Error),
    /// A program that maps user ids failed.
    #[error("{program} failed; are there ranges for this user in /etc/subuid and /etc/subgid?")]
    IdMapProgram {
        /// `newuidmap` or `newgidmap`.
        program: &'static str,
    },
}

impl StageError {
    /// For `map_err` on a call of `rustix` or `std`.
    fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::System { action, source: error.into() }
    }
}

/// Why a daemon is not in its sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A required stage could not be done.
    #[error("sandbox stage {stage}")]
    Stage {
        /// Which one.
        stage: Stage,
        /// Why not.
        source: StageError,
    },
    /// Threads that are running already would stay outside.
    #[error("the sandbox has to be entered before threads start, but there are {0}")]
    Threads(usize),
}

#[cfg(test)]
pub(crate) mod tests;
