//! Cost of one operation inside the passthrough, without queue or guest, in ns: the best of a few
//! rounds. `cargo bench -p virtiofsd --bench passthrough [DIRECTORY]`, default `/dev/shm`.
#![allow(unsafe_code, reason = "hands a buffer to the passthrough as guest memory")]
#![allow(clippy::print_stdout, reason = "prints its results")]

use std::error::Error;
use std::ffi::CString;
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::time::Instant;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use outboard_common::ring::IoVecs;
use virtiofsd::fuse::extension::{CreateContext, Extension, ReadRequest, Wait, WriteRequest};
use virtiofsd::passthrough::{Config, InodeFileHandles, PassthroughFs};

const ROUNDS: usize = 7;
const FILES: usize = 1000;

/// Runs `op` `count` times a round; prints the best round's ns per call.
fn measure(
    name: &str,
    count: usize,
    mut op: impl FnMut(usize) -> io::Result<()>,
) -> io::Result<()> {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for n in 0..count {
            op(n)?;
        }
        let ns = start.elapsed().as_secs_f64() * 1e9;
        best = best.min(ns / f64::from(u32::try_from(count).unwrap_or(u32::MAX)));
    }
    println!("{name:<40} {best:>9.0} ns");
    Ok(())
}

fn share(
    path: &std::path::Path,
    mode: InodeFileHandles,
    hot_fds: usize,
) -> Result<PassthroughFs, Box<dyn Error>> {
    let config = Config { inode_file_handles: mode, hot_fds, ..Config::default() };
    let fs =
        PassthroughFs::new(config, File::open(path)?.into(), File::open("/proc/self/fd")?.into())?;
    fs.negotiate(u64::MAX)?;
    fs.prepare_thread()?;
    Ok(fs)
}

#[allow(clippy::too_many_lines, reason = "a list of measurements, one after another")]
fn run(parent: &str, mode: InodeFileHandles) -> Result<(), Box<dyn Error>> {
    let dir = tempfile::TempDir::new_in(parent)?;
    let ctx = Context { uid: 0, gid: 0, pid: 1 };
    let fs = share(dir.path(), mode, 2048)?;
    let names: Vec<CString> =
        (0..FILES).map(|n| CString::new(format!("file-{n}"))).collect::<Result<_, _>>()?;
    for name in &names {
        std::fs::write(dir.path().join(name.to_str()?), [7; 128 << 10])?;
    }
    let inodes: Vec<u64> = names
        .iter()
        .map(|name| fs.lookup(&ctx, 1, name).map(|entry| entry.inode))
        .collect::<Result<_, _>>()?;
    let count = 100_000;
    println!("{parent}, inode-file-handles={mode:?}");
    measure("getattr, 1000 inodes", count, |n| {
        black_box(fs.getattr(&ctx, inodes[n % FILES], None)?);
        Ok(())
    })?;
    measure("lookup, known", count, |n| {
        black_box(fs.lookup(&ctx, 1, &names[n % FILES])?);
        Ok(())
    })?;
    let (handle, ..) = fs.open(&ctx, inodes[0], libc::O_RDWR.cast_unsigned(), 0)?;
    let handle = handle.unwrap_or(0);
    let mut buffer = vec![0_u8; 128 << 10];
    for (name, len) in [("4K", 4096), ("128K", 128 << 10)] {
        let mut list = IoVecs::new();
        // SAFETY: `buffer` outlives `list`.
        unsafe { list.push(buffer.as_mut_ptr(), len) };
        let read = ReadRequest { inode: inodes[0], handle, offset: 0, lock_owner: None, flags: 0 };
        measure(&format!("read {name}"), count / 4, |_| {
            black_box(fs.read_into(&ctx, &read, &list, Wait::Never)?);
            Ok(())
        })?;
        let write = WriteRequest {
            inode: inodes[0],
            handle,
            offset: 0,
            lock_owner: None,
            delayed: false,
            kill_suidgid: false,
            flags: 0,
        };
        measure(&format!("write {name}"), count / 4, |_| {
            black_box(fs.write_from(&ctx, &write, &list, Wait::Allowed)?);
            Ok(())
        })?;
    }
    measure("open + release", count / 4, |n| {
        let inode = inodes[n % FILES];
        let (handle, ..) = fs.open(&ctx, inode, 0, 0)?;
        fs.release(&ctx, inode, 0, handle.unwrap_or(0), false, false, None)
    })?;
    measure("lookup, unknown, + forget", count / 4, |n| {
        let entry = fs.lookup(&ctx, 1, &names[n % FILES])?;
        fs.forget(&ctx, entry.inode, u64::MAX);
        Ok(())
    })?;
    let args =
        CreateIn { flags: libc::O_RDWR.cast_unsigned(), mode: 0o644, umask: 0, fuse_flags: 0 };
    measure("create + release + unlink + forget", count / 10, |_| {
        let (entry, handle, _) =
            fs.create_with(&ctx, &CreateContext::default(), 1, c"new", args)?;
        fs.release(&ctx, entry.inode, 0, handle.unwrap_or(0), false, false, None)?;
        fs.unlink(&ctx, 1, c"new")?;
        fs.forget(&ctx, entry.inode, 1);
        Ok(())
    })?;
    let cold = share(dir.path(), mode, 0)?;
    let inodes: Vec<u64> = names
        .iter()
        .map(|name| cold.lookup(&ctx, 1, name).map(|entry| entry.inode))
        .collect::<Result<_, _>>()?;
    measure("getattr, cold", count / 4, |n| {
        black_box(cold.getattr(&ctx, inodes[n % FILES], None)?);
        Ok(())
    })?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let parent = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let parent = parent.unwrap_or_else(|| "/dev/shm".to_owned());
    for mode in [InodeFileHandles::Prefer, InodeFileHandles::Never] {
        run(&parent, mode)?;
    }
    Ok(())
}
