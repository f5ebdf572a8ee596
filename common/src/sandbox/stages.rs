//! The stages, their order, and what happens when one cannot be done.

use std::fmt;

use super::landlock::PathRules;
use super::namespaces::{self, Namespace};
use super::seccomp::{Filter, Mode};
use super::{CapabilitySet, Outcome, SandboxError, StageError, capabilities, rlimits};

/// The stages, in the order in which they are entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Resource limits.
    Rlimits,
    /// Namespaces and a root of one's own.
    Namespaces,
    /// `PR_SET_NO_NEW_PRIVS`.
    NoNewPrivileges,
    /// Capabilities.
    Capabilities,
    /// Paths and ports.
    Landlock,
    /// System calls.
    Seccomp,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rlimits => "rlimits",
            Self::Namespaces => "namespaces",
            Self::NoNewPrivileges => "no-new-privileges",
            Self::Capabilities => "capabilities",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        })
    }
}

/// Enters stages one after the other.
#[derive(Debug)]
pub struct Stages {
    last: Option<Stage>,
}

impl Stages {
    /// Begins. Nothing is changed yet.
    ///
    /// # Errors
    /// [`SandboxError::Threads`] when the process has more than this one thread.
    pub fn begin() -> Result<Self, SandboxError> {
        // Without /proc nobody can tell; the later stages fail where it matters.
        let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
        if threads > 1 {
            return Err(SandboxError::Threads(threads));
        }
        Ok(Self { last: None })
    }

    /// Enters a stage without which the daemon must not serve.
    ///
    /// # Errors
    /// [`SandboxError::Stage`] when it cannot be done.
    ///
    /// # Panics
    /// When a later stage was entered already, which is a bug of the daemon.
    pub fn require(
        &mut self,
        stage: Stage,
        enter: impl FnOnce() -> Result<Outcome, StageError>,
    ) -> Result<(), SandboxError> {
        self.next(stage);
        let outcome = enter().map_err(|source| SandboxError::Stage { stage, source })?;
        report(stage, &outcome);
        Ok(())
    }

    /// Enters a stage that some environments do not allow; there the operator is warned.
    ///
    /// # Panics
    /// As [`Self::require`].
    pub fn attempt(&mut self, stage: Stage, enter: impl FnOnce() -> Result<Outcome, StageError>) {
        self.next(stage);
        match enter() {
            Ok(outcome) => report(stage, &outcome),
            Err(error) => {
                let error = anyhow::Error::from(error);
                tracing::warn!("going on without sandbox stage {stage}: {error:#}");
            }
        }
    }

    fn next(&mut self, stage: Stage) {
        assert!(self.last <= Some(stage), "sandbox stage {stage} after {:?}", self.last);
        self.last = Some(stage);
    }
}

fn report(stage: Stage, outcome: &Outcome) {
    match outcome {
        Outcome::Applied => tracing::debug!("sandbox stage {stage}: in force"),
        Outcome::Partly(why) => tracing::debug!("sandbox stage {stage}: partly in force: {why}"),
        Outcome::Unavailable(why) => tracing::debug!("sandbox stage {stage}: not in force: {why}"),
    }
}

/// No program this process starts gains privileges, whatever its file says.
///
/// # Errors
/// [`StageError::System`]
pub fn no_new_privileges() -> Result<Outcome, StageError> {
    rustix::thread::set_no_new_privs(true).map_err(StageError::system("forbid new privileges"))?;
    Ok(Outcome::Applied)
}

/// The sandbox of a daemon that needs nothing special.
#[derive(Debug)]
pub struct Plan {
    /// Descriptors that may be open at once.
    pub open_files: u64,
    /// Namespaces of its own.
    pub namespaces: &'static [Namespace],
    /// Capabilities that stay.
    pub capabilities: CapabilitySet,
    /// Paths that can still be opened.
    pub paths: PathRules,
    /// System calls that can still be made.
    pub syscalls: Filter,
    /// What happens on others.
    pub seccomp: Mode,
}

/// Enters every stage of `plan`.
///
/// Namespaces are attempted, since containers often forbid them, and so is the number of files;
/// everything else is required.
///
/// # Errors
/// [`SandboxError`] with the first required stage that cannot be done.
pub fn enter(plan: &Plan) -> Result<(), SandboxError> {
    let mut stages = Stages::begin()?;
    stages.attempt(Stage::Rlimits, || rlimits::open_files(plan.open_files));
    stages.attempt(Stage::Namespaces, || namespaces::unshare(plan.namespaces));
    stages.require(Stage::NoNewPrivileges, no_new_privileges)?;
    stages.require(Stage::Capabilities, || capabilities::keep(plan.capabilities))?;
    stages.require(Stage::Landlock, || plan.paths.apply())?;
    stages.require(Stage::Seccomp, || plan.syscalls.apply(plan.seccomp))
}
