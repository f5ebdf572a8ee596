//! Lets READ and WRITE of any `fuse-backend-rs` file system work on a chain's iovecs.
//!
//! These adapters allocate a small vector of slices for each call into the file system; they serve
//! plugged-in file systems, not our own hot path.
#![allow(unsafe_code, reason = "reads and writes guest memory behind a chain's iovecs")]

use std::io;

use fuse_backend_rs::api::filesystem::{Context, FileSystem, ZeroCopyReader, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use libc::iovec;
use outboard_common::ring::IoVecs;

use super::extension::{ReadRequest, WriteRequest};

/// READ through [`FileSystem::read`].
pub(super) fn read<F>(
    fs: &F,
    ctx: &Context,
    request: &ReadRequest,
    out: &IoVecs,
) -> io::Result<usize>
where
    F: FileSystem<Inode = u64, Handle = u64> + ?Sized,
{
    let mut cursor = Cursor::new(out);
    let size = u32::try_from(out.len()).unwrap_or(u32::MAX);
    fs.read(
        ctx,
        request.inode,
        request.handle,
        &mut cursor,
        size,
        request.offset,
        request.lock_owner,
        request.flags,
    )
}

/// WRITE through [`FileSystem::write`].
pub(super) fn write<F>(
    fs: &F,
    ctx: &Context,
    request: &WriteRequest,
    data: &IoVecs,
) -> io::Result<usize>
where
    F: FileSystem<Inode = u64, Handle = u64> + ?Sized,
{
    let mut cursor = Cursor::new(data);
    let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
    let fuse_flags = if request.kill_suidgid { super::wire::WRITE_KILL_SUIDGID } else { 0 };
    fs.write(
        ctx,
        request.inode,
        request.handle,
        &mut cursor,
        size,
        request.offset,
        request.lock_owner,
        request.delayed,
        request.flags,
        fuse_flags,
    )
}

/// A place in a list of guest memory ranges.
struct Cursor<'a> {
    /// Entries with something left; bytes of the first one already used are in `skip`.
    entries: &'a [iovec],
    skip: usize,
    left: usize,
}

impl<'a> Cursor<'a> {
    fn new(list: &'a IoVecs) -> Self {
        Self { entries: list.as_slice(), skip: 0, left: list.len() }
    }

    /// The next range, at most `max` bytes long.
    fn front(&self, max: usize) -> Option<(*mut u8, usize)> {
        let first = self.entries.first()?;
        let base = first.iov_base.cast::<u8>().wrapping_add(self.skip);
        Some((base, (first.iov_len - self.skip).min(max)))
    }

    fn advance(&mut self, mut n: usize) {
        n = n.min(self.left);
        self.left -= n;
        while let Some(first) = self.entries.first() {
            let rest = first.iov_len - self.skip;
            if n < rest {
                self.skip += n;
                return;
            }
            n -= rest;
            self.skip = 0;
            self.entries = self.entries.get(1..).unwrap_or(&[]);
        }
    }

    /// The next `count` bytes as upstream's slices.
    fn slices(&self, count: usize) -> Vec<FileVolatileSlice<'a>> {
        let mut left = count.min(self.left);
        let mut skip = self.skip;
        let mut slices = Vec::with_capacity(self.entries.len());
        for entry in self.entries {
            if left == 0 {
                break;
            }
            let n = (entry.iov_len - skip).min(left);
            let base = entry.iov_base.cast::<u8>().wrapping_add(skip);
            // SAFETY: the range lies in the chain's memory, mapped while the chain is held, which
            // outlives 'a.
            slices.push(unsafe { FileVolatileSlice::from_raw_ptr(base, n) });
            left -= n;
            skip = 0;
        }
        slices
    }
}

impl io::Write for Cursor<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some((base, n)) = self.front(data.len()) else { return Ok(0) };
        // SAFETY: `n` bytes are mapped at `base` and `data` is not guest memory.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), base, n) };
        self.advance(n);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Read for Cursor<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Some((base, n)) = self.front(out.len()) else { return Ok(0) };
        // SAFETY: `n` bytes are mapped at `base` and `out` is not guest memory.
        unsafe { std::ptr::copy_nonoverlapping(base, out.as_mut_ptr(), n) };
        self.advance(n);
        Ok(n)
    }
}

impl ZeroCopyWriter for Cursor<'_> {
    fn write_from(
        &mut self,
        f: &mut dyn FileReadWriteVolatile,
        count: usize,
        off: u64,
    ) -> io::Result<usize> {
        let slices = self.slices(count);
        if slices.is_empty() {
            return Ok(0);
        }
        let n = f.read_vectored_at_volatile(&slices, off)?;
        self.advance(n);
        Ok(n)
    }

    fn available_bytes(&self) -> usize {
        self.left
    }
}

impl ZeroCopyReader for Cursor<'_> {
    fn read_to(
        &mut self,
        f: &mut dyn FileReadWriteVolatile,
        count: usize,
        off: u64,
    ) -> io::Result<usize> {
        let slices = self.slices(count);
        if slices.is_empty() {
            return Ok(0);
        }
        let n = f.write_vectored_at_volatile(&slices, off)?;
        self.advance(n);
        Ok(n)
    }
}
