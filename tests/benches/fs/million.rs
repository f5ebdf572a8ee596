//! A million files: what the daemon keeps for each.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{FileType, Mode};
use testkit::daemon::Daemon;
use testkit::driver::fs::{FsClient, Message, op};

use super::cases::list_once;
use super::{CONTESTANTS, start};

const DIRECTORIES: usize = 100;
const FILES_EACH: usize = 10_000;

/// Makes the files in `shared`.
fn prepare(shared: &Path) -> Result<()> {
    for directory in 0..DIRECTORIES {
        let path = shared.join(format!("d{directory}"));
        fs::create_dir_all(&path)?;
        let dir = fs::File::open(&path)?;
        for file in 0..FILES_EACH {
            let name = format!("file-{file}");
            rustix::fs::mknodat(&dir, name, FileType::RegularFile, Mode::RUSR, 0)?;
        }
    }
    Ok(())
}

/// Private memory of the daemon, bytes.
fn private(daemon: &Daemon) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/smaps_rollup", daemon.pid()))?;
    let lines = text.lines().filter(|line| line.starts_with("Private_"));
    let kilobytes =
        lines.filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok());
    Ok(kilobytes.sum::<u64>() << 10)
}

/// Lists everything with READDIRPLUS, stats everything, and says what the daemon holds then.
pub(crate) fn run(root: &testkit::toolroot::ToolRoot, dir: &Path) -> Result<()> {
    let shared = dir.join("million");
    prepare(&shared)?;
    println!(
        "\na million files, listed (READDIRPLUS) and stat'ed; aims: < 250 bytes, < 4096 descriptors"
    );
    println!(
        "{:16} {:>12} {:>12} {:>12} {:>12}",
        "", "bytes/inode", "descriptors", "list, s", "stat, s"
    );
    // Without file handles the peer needs a descriptor for each file.
    for contestant in
        CONTESTANTS.iter().filter(|one| !one.arguments.contains(&"--inode-file-handles=never"))
    {
        let daemon = start(root, contestant, dir, &shared, &[], true)?;
        let mut client = FsClient::start(daemon.socket(), 1, 16)?;
        let before = private(&daemon)?;
        let (mut inodes, begin) = (Vec::new(), Instant::now());
        for directory in 0..DIRECTORIES {
            let inode = client.lookup(1, &format!("d{directory}"))?;
            list_once(&mut client, inode, op::READDIRPLUS, &mut inodes)?;
        }
        ensure!(inodes.len() == DIRECTORIES * FILES_EACH, "{} files", inodes.len());
        let (listed, begin) = (begin.elapsed(), Instant::now());
        client.pump(1, 16, inodes.len(), |i| Message::new(op::GETATTR, inodes[i], &[0u64; 2]))?;
        let (stated, grown) = (begin.elapsed(), private(&daemon)?.saturating_sub(before));
        let fds =
            fs::read_dir(format!("/proc/{}/fd", daemon.pid())).context("descriptors")?.count();
        println!(
            "{:16} {:>12.0} {fds:>12} {:>12.2} {:>12.2}",
            contestant.name,
            grown as f64 / inodes.len() as f64,
            listed.as_secs_f64(),
            stated.as_secs_f64()
        );
    }
    Ok(())
}
