//! What a guest shall do, and the script that is its first process.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The script that is every guest's process 1.
const INIT: &str = include_str!("../../jobs/init.sh");

/// A shell script for a guest, with its parameters.
#[derive(Debug, Clone)]
pub struct Job {
    script: String,
    parameters: Vec<(String, String)>,
    tools: Vec<String>,
    programs: Vec<PathBuf>,
}

impl Job {
    /// The job of the file `tests/jobs/NAME.sh`.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn named(name: &str) -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("jobs").join(format!("{name}.sh"));
        let script =
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(Self::from_script(&script))
    }

    /// A job of a few commands, for a test that needs no file.
    #[must_use]
    pub fn from_script(script: &str) -> Self {
        Self {
            script: script.to_owned(),
            parameters: Vec::new(),
            tools: Vec::new(),
            programs: Vec::new(),
        }
    }

    /// Gives the script the shell variable `name`.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.parameters.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Names a program the script runs besides busybox, such as `/usr/bin/fio`, which a guest
    /// that boots from an archive must be given with its libraries.
    #[must_use]
    pub fn tool(mut self, path: &str) -> Self {
        self.tools.push(path.to_owned());
        self
    }

    /// Gives the script a program of the host, one of the workspace, as `/job/NAME`. It may need no
    /// library but the C library and its like.
    #[must_use]
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.programs.push(path.into());
        self
    }

    /// The programs of the host, by their names in `/job`.
    pub(super) fn programs(&self) -> impl Iterator<Item = (String, &Path)> {
        self.programs.iter().map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, path.as_path())
        })
    }

    pub(super) fn tools(&self) -> &[String] {
        &self.tools
    }

    /// The files of the guest's directory `/job`; `guest` names the directory of its modules.
    pub(super) fn files(&self, guest: &str) -> Result<[(&'static str, String); 3]> {
        let mut variables = format!("GUEST='{guest}'\n");
        for (name, value) in &self.parameters {
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            ensure!(!name.is_empty() && name.chars().all(word), "{name:?} is no shell variable");
            writeln!(variables, "{name}='{}'", value.replace('\'', r"'\''"))?;
        }
        Ok([("init", INIT.to_owned()), ("job.sh", self.script.clone()), ("variables", variables)])
    }
}
