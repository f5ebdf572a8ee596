//! Tests that cannot run here.
//!
//! The test harness has no run-time skip, so a skipped test returns early and looks passed. To
//! be counted for what it is, it also writes a line to the file `$OUTBOARD_SKIPPED`, which
//! `./x test` sums up. With `OUTBOARD_NO_SKIP=1` (continuous integration) a skip is a failure.

use std::fs::OpenOptions;
use std::io::Write;

/// Says that the running test is skipped, and why. The caller returns right after it.
///
/// # Panics
/// With `OUTBOARD_NO_SKIP=1` in the environment.
pub fn skip(why: &str) {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let line = format!("SKIPPED: {test}: {}\n", why.replace('\n', " "));
    let _ = std::io::stderr().write_all(line.as_bytes());
    assert!(
        std::env::var_os("OUTBOARD_NO_SKIP").is_none_or(|value| value != "1"),
        "OUTBOARD_NO_SKIP is set and this test cannot run: {why}"
    );
    if let Some(path) = std::env::var_os("OUTBOARD_SKIPPED") {
        // One write, so that lines of parallel tests do not mix.
        let _ = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .and_then(|mut file| file.write_all(line.as_bytes()));
    }
}
