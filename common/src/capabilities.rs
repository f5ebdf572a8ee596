//! `--print-capabilities`: what a program says of itself to a management layer.
//!
//! QEMU's "Back-end program conventions" (docs/interop/vhost-user.rst): one JSON object
//! `{"type", "features"}` on stdout, exit code 0, and every other option ignored. So the command
//! line is searched for this one option before anything else looks at it.

use std::ffi::OsStr;
use std::io::{self, Write};

use serde::Serialize;

/// What a daemon offers.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Capabilities {
    /// The device type of the conventions: `block`, `fs`, `net`, `vsock`.
    #[serde(rename = "type")]
    pub device_type: &'static str,
    /// The optional features, each a command line option or a convention of that type.
    pub features: &'static [&'static str],
}

impl Capabilities {
    /// Writes the JSON object and a newline.
    ///
    /// # Errors
    /// What writing to `out` gives.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        out.write_all(b"\n")?;
        out.flush()
    }
}

/// Whether `--print-capabilities` is among the arguments (the program's name not included).
///
/// Arguments after `--` do not count.
pub fn requested<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> bool {
    arguments
        .into_iter()
        .take_while(|argument| argument.as_ref() != "--")
        .any(|argument| argument.as_ref() == "--print-capabilities")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_found_anywhere_before_the_end_of_options() {
        assert!(requested(["--print-capabilities"]));
        assert!(requested(["--fd", "nonsense", "--bogus", "--print-capabilities", "extra"]));
        assert!(!requested(["--", "--print-capabilities"]));
        assert!(!requested(["--print-capabilities=1"]));
        assert!(!requested(Vec::<&str>::new()));
    }

    #[test]
    fn the_output_is_one_json_object_with_type_and_features() {
        let capabilities =
            Capabilities { device_type: "block", features: &["blk-file", "read-only"] };
        let mut out = Vec::new();
        capabilities.write(&mut out).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"type": "block", "features": ["blk-file", "read-only"]})
        );
        assert_eq!(out.last(), Some(&b'\n'));
    }

    #[test]
    fn a_full_pipe_is_an_error_not_a_panic() {
        let capabilities = Capabilities { device_type: "fs", features: &[] };
        let mut nowhere: &mut [u8] = &mut [0; 3];
        assert!(capabilities.write(&mut nowhere).is_err());
    }
}
