//! Mistakes of an operator end vhost-user-blk with one clear sentence and exit code 1, before any socket
//! exists.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::daemon::{Daemon, bin};

/// Runs the daemon with `arguments`, which must not start; returns what it said.
fn refused(socket: &Path, arguments: &[String]) -> String {
    let output = Command::new(bin("vhost-user-blk").unwrap())
        .arg(format!("--socket-path={}", socket.display()))
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {text}");
    assert!(!socket.exists(), "{arguments:?} left a socket behind");
    assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
    assert!(text.starts_with("error: "), "{text}");
    text
}

fn image(dir: &Path, name: &str, len: u64) -> PathBuf {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(len).unwrap();
    path
}

#[test]
fn images_that_cannot_be_served() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("blk.sock");
    let small = image(dir.path(), "small", 100);
    let odd = image(dir.path(), "odd", 5000);
    let good = image(dir.path(), "good", 1 << 20);
    let at = |path: &Path, rest: &str| vec![format!("--blk-file={}{rest}", path.display())];
    for (arguments, expected) in [
        (
            at(&dir.path().join("none"), ""),
            "No such file or directory (os error 2); check the path",
        ),
        (at(&small, ""), "100 bytes, less than one sector of 512; enlarge it"),
        (at(&odd, ""), "5000 bytes, is not a multiple of its block size of 512; round it up"),
        (at(dir.path(), ",readonly=on"), "neither a regular file nor a block device"),
        (at(&good, ",format=qcow2"), "it is not in qcow2 format"),
        (at(&good, ",block-size=3"), "a block size of 3 bytes is impossible"),
        (at(Path::new("/dev/zero"), ""), "neither a regular file nor a block device"),
        (vec!["--direct".into(), "--buffered".into(), "--null=1M".into()], "cannot be used with"),
        (Vec::new(), "no disk is given; use --blk-file"),
    ] {
        let text = refused(&socket, &arguments);
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn an_image_that_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let file = format!("--blk-file={}", image(dir.path(), "disk", 1 << 20).display());
    let first = Daemon::start("vhost-user-blk", &dir.path().join("first"), &[&file]).unwrap();
    let text = refused(&dir.path().join("second"), std::slice::from_ref(&file));
    assert!(text.contains("is in use by another process; stop that one, or open both"), "{text}");
    drop(first);
    Daemon::start("vhost-user-blk", &dir.path().join("second"), &[&file]).unwrap();
}

#[test]
fn capabilities_whatever_the_rest() {
    let output = Command::new(bin("vhost-user-blk").unwrap())
        .args(["--blk-file=/nowhere", "--print-capabilities", "--nonsense"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value, serde_json::json!({"type": "block", "features": ["blk-file", "read-only"]}));
}
