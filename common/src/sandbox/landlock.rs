//! Landlock: the paths that can still be opened. It works without privileges.
//!
//! Descriptors that are open already are not concerned. Programs can never be executed, and TCP
//! ports can neither be bound nor connected to; from Linux 6.12 on signals and abstract Unix sockets
//! outside the sandbox are out of reach too.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Outcome, StageError};

/// The newest set of rights that the rules below were written for.
const NEWEST: ABI = ABI::V9;

/// What may be done with a path and everything beneath it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Open for reading; list.
    Read,
    /// Open for reading and writing, truncate, device ioctls. Nothing is created or removed.
    ReadWrite,
    /// Make and remove Unix sockets in this directory, and connect to those there.
    Sockets,
    /// Everything but executing: for a shared directory.
    Everything,
}

impl Access {
    fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        match self {
            Self::Read => read,
            Self::ReadWrite => read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev,
            Self::Sockets => {
                AccessFs::ReadDir
                    | AccessFs::MakeSock
                    | AccessFs::RemoveFile
                    | AccessFs::ResolveUnix
            }
            Self::Everything => AccessFs::from_all(NEWEST) & !AccessFs::Execute,
        }
    }
}

/// The paths that stay within reach; without any, no path does.
#[derive(Debug, Clone, Default)]
pub struct PathRules {
    rules: Vec<(PathBuf, Access)>,
}

impl PathRules {
    /// No path.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds a path, which has to exist when the rules are applied.
    #[must_use]
    pub fn allow(mut self, path: impl Into<PathBuf>, access: Access) -> Self {
        self.rules.push((path.into(), access));
        self
    }

    /// Puts the rules in force for this thread and those it starts.
    ///
    /// # Errors
    /// [`StageError::Path`] for a path that is not there, [`StageError::Landlock`].
    pub fn apply(&self) -> Result<Outcome, StageError> {
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            .scope(Scope::from_all(NEWEST))?
            .create()?;
        for (path, access) in &self.rules {
            ruleset = ruleset.add_rule(rule(path, *access)?)?;
        }
        Ok(match ruleset.restrict_self()?.ruleset {
            RulesetStatus::FullyEnforced => Outcome::Applied,
            RulesetStatus::PartiallyEnforced => {
                Outcome::Partly("this kernel does not know all of the rights".to_owned())
            }
            RulesetStatus::NotEnforced => {
                Outcome::Unavailable("this kernel has no landlock".to_owned())
            }
        })
    }
}

fn rule(path: &Path, access: Access) -> Result<PathBeneath<OwnedFd>, StageError> {
    let failed = |error: Errno| StageError::Path {
        action: "allow access to",
        path: path.to_owned(),
        source: error.into(),
    };
    let opened = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let opened = opened.map_err(failed)?;
    let mode = rustix::fs::fstat(&opened).map_err(failed)?.st_mode;
    let rights = match FileType::from_raw_mode(mode) {
        FileType::Directory => access.rights(),
        // Rights over what is in a directory mean nothing for a file, and the kernel refuses them.
        _ => access.rights() & AccessFs::from_file(NEWEST),
    };
    Ok(PathBeneath::new(opened, rights))
}
