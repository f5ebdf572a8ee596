//! Test suites that are published as crates: installed once, into the cache.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::toolroot::cache_dir;

/// The program of crate `name` at `version`, installed now if it is not in the cache.
///
/// # Errors
/// When it cannot be fetched or built.
pub fn installed(name: &str, version: &str) -> Result<PathBuf> {
    let root = cache_dir()?.join("cargo-tools").join(format!("{name}-{version}"));
    let program = root.join("bin").join(name);
    fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
    let lock = File::create(root.join("lock"))?;
    lock.lock().context("lock the cache")?;
    if program.is_file() {
        return Ok(program);
    }
    let output = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["install", "--quiet", "--locked", "--version", version, name, "--root"])
        .arg(&root)
        .env("CARGO_TARGET_DIR", root.join("target"))
        .output()
        .context("run cargo install")?;
    if !output.status.success() {
        bail!("install {name} {version}: {}", String::from_utf8_lossy(&output.stderr));
    }
    // What was built on the way is of no use again.
    let _ = fs::remove_dir_all(root.join("target"));
    Ok(program)
}
