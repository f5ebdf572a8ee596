//! Old spellings: the command line of the C daemon and of early Rust ones, as words of today's.
//!
//! `-o key=value,key,…` becomes long options at the place where it stands, and the last of two that
//! contradict each other counts. A comma in a value is written `\,`.

use std::ffi::OsString;

/// An old option that cannot be translated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompatError {
    /// Nothing after `-o`.
    #[error("-o needs a list of options, like -o source=DIR,cache=auto")]
    NoList,
    /// A key that no version had.
    #[error("-o {0}: there is no such option (see virtiofsd --help)")]
    Unknown(String),
    /// A key with a value that has none, or without one that has.
    #[error("-o {0}: {1}")]
    Value(String, &'static str),
    /// Not UTF-8.
    #[error("-o {0}: not a text in UTF-8")]
    NotText(String),
}

/// What an old key became.
enum Now {
    /// This word.
    Word(&'static str),
    /// This option, with the same value.
    Option(&'static str),
}

/// The keys of `-o`.
const KEYS: &[(&str, Now)] = &[
    ("source", Now::Option("--shared-dir")),
    ("cache", Now::Option("--cache")),
    ("timeout", Now::Option("--timeout")),
    ("sandbox", Now::Option("--sandbox")),
    ("xattrmap", Now::Option("--xattrmap")),
    ("modcaps", Now::Option("--modcaps")),
    ("vhost_user_socket", Now::Option("--socket-path")),
    ("inode_file_handles", Now::Option("--inode-file-handles")),
    ("debug", Now::Word("--log-level=debug")),
    ("xattr", Now::Word("--xattr")),
    ("no_xattr", Now::Word("--no-xattr")),
    ("posix_acl", Now::Word("--posix-acl=always")),
    ("no_posix_acl", Now::Word("--posix-acl=never")),
    ("security_label", Now::Word("--security-label=always")),
    ("no_security_label", Now::Word("--security-label=never")),
    ("readdirplus", Now::Word("--readdirplus")),
    ("no_readdirplus", Now::Word("--no-readdirplus")),
    ("writeback", Now::Word("--writeback")),
    ("no_writeback", Now::Word("--no-writeback")),
    ("allow_direct_io", Now::Word("--allow-direct-io")),
    ("no_allow_direct_io", Now::Word("--no-allow-direct-io")),
    ("killpriv_v2", Now::Word("--killpriv-v2")),
    ("no_killpriv_v2", Now::Word("--no-killpriv-v2")),
    ("announce_submounts", Now::Word("--announce-submounts")),
    ("no_announce_submounts", Now::Word("--no-announce-submounts")),
    ("posix_lock", Now::Word("--posix-lock")),
    ("no_posix_lock", Now::Word("--no-posix-lock")),
    ("flock", Now::Word("--flock")),
    ("no_flock", Now::Word("--no-flock")),
];

/// Turns every old spelling in `command_line` (the program's name first) into today's words.
///
/// # Errors
/// The first key of `-o` that cannot be translated.
pub fn modernise(
    command_line: impl IntoIterator<Item = OsString>,
) -> Result<Vec<OsString>, CompatError> {
    let mut words = command_line.into_iter();
    let mut modern: Vec<OsString> = words.next().into_iter().collect();
    while let Some(word) = words.next() {
        let Some(text) = word.to_str() else {
            modern.push(word);
            continue;
        };
        match text {
            "--" => {
                modern.push(word);
                modern.extend(words.by_ref());
            }
            "-f" => {}
            "-d" => modern.push("--log-level=debug".into()),
            "--socket" => modern.push("--socket-path".into()),
            "-o" => {
                let list = words.next().ok_or(CompatError::NoList)?;
                translate(&as_text(list)?, &mut modern)?;
            }
            _ => {
                if let Some(path) = text.strip_prefix("--socket=") {
                    modern.push(format!("--socket-path={path}").into());
                } else if let Some(list) = text.strip_prefix("-o") {
                    translate(list.strip_prefix('=').unwrap_or(list), &mut modern)?;
                } else {
                    modern.push(word);
                }
            }
        }
    }
    Ok(modern)
}

fn as_text(list: OsString) -> Result<String, CompatError> {
    list.into_string().map_err(|list| CompatError::NotText(list.to_string_lossy().into_owned()))
}

/// Splits at commas that have no backslash before them.
fn split(list: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        match (c, parts.last_mut()) {
            (',', _) => parts.push(String::new()),
            ('\\', Some(part)) if chars.peek() == Some(&',') => part.extend(chars.next()),
            (c, Some(part)) => part.push(c),
            _ => {}
        }
    }
    parts
}

fn translate(list: &str, modern: &mut Vec<OsString>) -> Result<(), CompatError> {
    for part in split(list).iter().filter(|part| !part.is_empty()) {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (part.as_str(), None),
        };
        if matches!(key, "log_level" | "loglevel") {
            let value = value.ok_or_else(|| needs_value(part))?;
            modern.push(format!("--log-level={}", log_level(value)).into());
            continue;
        }
        let now = KEYS.iter().find(|(known, _)| *known == key).map(|(_, now)| now);
        match (now, value) {
            (None, _) => return Err(CompatError::Unknown(part.clone())),
            (Some(Now::Word(word)), None) => modern.push((*word).into()),
            (Some(Now::Option(option)), Some(value)) => {
                modern.push(format!("{option}={value}").into());
            }
            (Some(Now::Word(_)), Some(_)) => {
                return Err(CompatError::Value(part.clone(), "it takes no value"));
            }
            (Some(Now::Option(_)), None) => return Err(needs_value(part)),
        }
    }
    Ok(())
}

fn needs_value(part: &str) -> CompatError {
    CompatError::Value(part.to_owned(), "it needs a value")
}

/// The C daemon's names of log levels.
fn log_level(old: &str) -> &str {
    match old {
        "err" => "error",
        "warning" => "warn",
        other => other,
    }
}
