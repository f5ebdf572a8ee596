//! Configuration files in TOML, with errors that point at the line.
//!
//! A daemon's configuration is a `serde` type with `deny_unknown_fields`, so that a misspelt option is
//! an error. Checks that `serde` cannot make use [`toml::Spanned`] and [`ConfigFile::error_at`].

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Larger files, in bytes, are not configurations.
const SIZE_MAX: u64 = 1024 * 1024;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What is in it makes no sense, at this place.
    #[error("{place}: {message}")]
    Content {
        /// Where.
        place: Place,
        /// What is wrong, in one line.
        message: String,
    },
}

/// A place in a file, written `path:line:column`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The character in the line, from 1.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

/// A configuration as text.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    path: PathBuf,
    text: String,
}

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`ConfigError::Read`]; also for a file that is not UTF-8 or larger than 1 MiB.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let mut text = String::new();
        let outcome = File::open(path)
            .and_then(|file| file.take(SIZE_MAX + 1).read_to_string(&mut text))
            .and_then(|_| match u64::try_from(text.len()) {
                Ok(0..=SIZE_MAX) => Ok(()),
                _ => Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is larger than 1 MiB")),
            });
        match outcome {
            Ok(()) => Ok(Self::from_text(path, text)),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    /// Text that is said to come from `path`.
    pub fn from_text(path: &Path, text: String) -> Self {
        Self { path: path.to_owned(), text }
    }

    /// The text, for those who look at it themselves.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Decodes the text.
    ///
    /// # Errors
    /// [`ConfigError::Content`] with the first mistake.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text)
            .map_err(|error| self.error_at(error.span().unwrap_or_default(), error.message()))
    }

    /// An error about the text at `span` (bytes, as [`toml::Spanned`] gives them).
    pub fn error_at(&self, span: Range<usize>, message: &str) -> ConfigError {
        // A span that came from another text must not panic.
        let mut start = span.start.min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &self.text[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let place = Place {
            path: self.path.clone(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        };
        let words: Vec<&str> = message.split_whitespace().collect();
        ConfigError::Content { place, message: words.join(" ") }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;
    use toml::Spanned;

    use super::*;
    use crate::cli::values::Size;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Configuration {
        disk: Vec<Disk>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Disk {
        path: Spanned<PathBuf>,
        cache: Option<Size>,
    }

    fn parse(text: &str) -> Result<Configuration, String> {
        let file = ConfigFile::from_text(Path::new("disks.toml"), text.to_owned());
        file.parse().map_err(|error: ConfigError| error.to_string())
    }

    #[test]
    fn a_good_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disks.toml");
        std::fs::write(&path, "[[disk]]\npath = \"/a\"\ncache = \"4K\"\n").unwrap();
        let file = ConfigFile::read(&path).unwrap();
        let configuration: Configuration = file.parse().unwrap();
        assert_eq!(configuration.disk[0].cache, Some(Size(4096)));
        let span = configuration.disk[0].path.span();
        let error = file.error_at(span, "there is\n no such file").to_string();
        assert!(error.ends_with("disks.toml:2:8: there is no such file"), "{error}");
    }

    #[test]
    fn a_mistake_is_one_line_with_its_place() {
        for (text, place, reason) in [
            ("[[disk]]\npath = \"/a\"\nsize = 1\n", "disks.toml:3:1: ", "unknown field `size`"),
            ("[[disk]]\npath = 5\n", "disks.toml:2:8: ", "invalid type: integer `5`"),
            ("[[disk]]\npath = \"/a\"\ncache = \"4Q\"\n", "disks.toml:3:9: ", "not a size"),
            ("# é\n[[disk]\n", "disks.toml:2:8: ", ""),
            ("[[disk]]\n", "disks.toml:1:1: ", "missing field `path`"),
            ("", "disks.toml:1:1: ", "missing field `disk`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(place) && error.contains(reason), "{text:?}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let chain =
            |path: &Path| format!("{:#}", anyhow::Error::from(ConfigFile::read(path).unwrap_err()));
        let missing = chain(&dir.path().join("none"));
        assert!(missing.starts_with("cannot read the configuration /"), "{missing}");
        assert!(missing.contains("No such file"), "{missing}");
        let binary = dir.path().join("binary");
        std::fs::write(&binary, [0xff, 0xfe]).unwrap();
        assert!(chain(&binary).contains("UTF-8"));
        assert!(chain(Path::new("/dev/zero")).contains("larger than 1 MiB"));
        assert!(chain(dir.path()).contains("directory"));
    }

    proptest! {
        #[test]
        fn no_text_and_no_span_panics(text in "\\PC{0,40}", start: usize, end: usize) {
            let file = ConfigFile::from_text(Path::new("x"), text);
            let _ = file.parse::<Configuration>();
            let _ = file.error_at(start..end, "message");
        }
    }
}
