//! Floors: the barest system calls that an operation cannot do without, in a plain loop of this process. No
//! ring, no message, no identity of inodes, no other thread to wake. No daemon gets below.

use std::fs;
use std::path::Path;

use anyhow::Result;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::time::{ClockId, clock_gettime};

use super::cases::{ENTRIES, place};

/// Does so many operations in the shared directory.
pub(crate) type Floor = fn(&Path, usize) -> Result<()>;

/// CPU microseconds of this thread for each of `count` operations of `floor`.
pub(crate) fn measure(floor: Floor, shared: &Path, count: usize) -> Result<f64> {
    floor(shared, (count / 20).max(1))?;
    let begun = thread_us();
    floor(shared, count)?;
    Ok((thread_us() - begun) / count as f64)
}

fn thread_us() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 * 1e6 + time.tv_nsec as f64 / 1e3
}

fn directory(path: &Path) -> Result<std::os::fd::OwnedFd> {
    Ok(rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?)
}

fn look_up(dir: &std::os::fd::OwnedFd, name: &str) -> Result<()> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID;
    std::hint::black_box(rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, mask)?);
    Ok(())
}

/// GETATTR: `fstat`.
pub(crate) fn getattr(shared: &Path, n: usize) -> Result<()> {
    let file = fs::File::open(shared.join("file"))?;
    for _ in 0..n {
        std::hint::black_box(rustix::fs::fstat(&file)?);
    }
    Ok(())
}

/// LOOKUP: `statx` of a name.
pub(crate) fn lookup(shared: &Path, n: usize) -> Result<()> {
    let dir = directory(shared)?;
    (0..n).try_for_each(|_| look_up(&dir, "file"))
}

/// READ of 4 KiB: `pread`.
pub(crate) fn read(shared: &Path, n: usize) -> Result<()> {
    let file = fs::File::open(shared.join("file"))?;
    let mut room = [0; 4096];
    for i in 0..n {
        rustix::io::pread(&file, &mut room, place(i, 4096))?;
    }
    Ok(())
}

/// LOOKUP and GETATTR of a new inode: `statx` of its name, and again. To find it later, when its name may be
/// another, takes a handle or a descriptor besides.
pub(crate) fn stat_each(shared: &Path, n: usize) -> Result<()> {
    let dir = directory(&shared.join("many"))?;
    for i in 0..n {
        let name = format!("entry-{}", i % ENTRIES);
        look_up(&dir, &name)?;
        look_up(&dir, &name)?;
    }
    Ok(())
}

/// CREATE, RELEASE and UNLINK: `openat`, `fstat`, `close`, `unlinkat`.
pub(crate) fn create_unlink(shared: &Path, n: usize) -> Result<()> {
    let dir = directory(shared)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for i in 0..n {
        let name = format!("floor-{}", i % 100);
        let file = rustix::fs::openat(&dir, &name, flags, Mode::from_raw_mode(0o644))?;
        std::hint::black_box(rustix::fs::fstat(&file)?);
        drop(file);
        rustix::fs::unlinkat(&dir, &name, AtFlags::empty())?;
    }
    Ok(())
}
