//! Man pages and shell completions from the same definition that parses the arguments.
//!
//! Only with the feature `docs`, for those who package a daemon: the generators would add a fifth to
//! the size of a daemon that never uses them.

use std::ffi::OsString;
use std::io::{self, Write};

use clap::Command;
use clap_complete::Shell;

/// The option that asks for a document. It is in no help text.
const OPTION: &str = "--generate";

/// What a command line `--generate KIND` asks for; other options do not matter.
pub(super) fn requested(arguments: impl IntoIterator<Item = OsString>) -> Option<String> {
    let mut arguments = arguments.into_iter().skip_while(|argument| argument != OPTION);
    arguments.next()?;
    Some(arguments.next().unwrap_or_default().to_string_lossy().into_owned())
}

/// Writes the document of this kind: `man`, or the name of a shell.
pub(super) fn write(kind: &str, mut command: Command, out: &mut impl Write) -> io::Result<()> {
    if kind == "man" {
        return clap_mangen::Man::new(command).render(out);
    }
    let shell: Shell = kind.parse().map_err(|_unknown| {
        let sentence = format!("{OPTION} makes man, bash, zsh and fish, not '{kind}'");
        io::Error::new(io::ErrorKind::InvalidInput, sentence)
    })?;
    let name = command.get_name().to_owned();
    // The generator panics when it cannot write, so it writes to memory.
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut text);
    out.write_all(&text)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::tests::Everything;
    use super::*;

    fn text(kind: &str) -> io::Result<String> {
        let mut out = Vec::new();
        write(kind, Everything::command(), &mut out)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn every_kind_knows_the_options() {
        for kind in ["man", "bash", "zsh", "fish"] {
            let text = text(kind).unwrap().replace("\\-", "-");
            assert!(text.contains("cpu-affinity"), "{kind}: {text}");
            assert!(text.contains("vhost-user-test"), "{kind}: {text}");
        }
        let error = text("pdf").unwrap_err().to_string();
        assert_eq!(error, "--generate makes man, bash, zsh and fish, not 'pdf'");
    }

    #[test]
    fn the_option_is_found_among_others() {
        let requested = |line: &str| requested(line.split(' ').map(OsString::from));
        assert_eq!(requested("--fd x --generate man"), Some("man".to_owned()));
        assert_eq!(requested("--generate"), Some(String::new()));
        assert_eq!(requested("--fd 3"), None);
    }
}
