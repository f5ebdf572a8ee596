//! Raw images: regular files and block devices.
//!
//! # Theory of operation
//! An image that bypasses the page cache is opened twice, once with `O_DIRECT` and once without. What
//! is aligned as the file wants it (statx says how) goes through the first; the rest, which is rare
//! (firmware, odd partition tools), through the second: there the page cache is the bounce buffer and
//! the kernel does read-modify-write, keeps both views coherent, and orders them on `fdatasync`.
//!
//! On tmpfs and on RAM-backed block devices nothing ever waits for hardware, so a plain `preadv2` on
//! the worker's thread is cheaper than a trip through io_uring, which for tmpfs would hand each request
//! to a kernel thread.
#![allow(unsafe_code, reason = "preadv2/pwritev2 on guest memory, block device ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use outboard_common::ring::IoVecs;
use rustix::fs::{AtFlags, FallocateFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::{Blocks, Cache, Image, OpenError, OpenOptions, Route, Store, lock};
use crate::request::{ByteRange, SECTOR_SIZE, ZeroRange};

/// Vectors that one system call takes (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;
/// Alignment to assume for direct I/O when the system does not say.
const SAFE_ALIGNMENT: u32 = 4096;
/// Zeroes written at once where nothing better is possible.
const ZERO_CHUNK: usize = 64 << 10;

/// `_IO(0x12, 119)` and `_IO(0x12, 127)` of linux/fs.h.
const BLKDISCARD: libc::c_ulong = 0x1277;
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// What direct I/O has to be aligned to, bytes; powers of two.
#[derive(Debug, Clone, Copy)]
struct DirectAlignment {
    memory: usize,
    offset: u64,
}

/// A raw file or block device.
#[derive(Debug)]
pub struct RawImage {
    /// Without `O_DIRECT`.
    buffered: File,
    /// With it, where that is wanted and possible.
    direct: Option<(File, DirectAlignment)>,
    block_device: bool,
    blocks: Blocks,
}

/// Which of an image's two descriptors an operation goes to; the number is its place in
/// [`RawImage::descriptors`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Descriptor {
    /// Through the page cache.
    Buffered = 0,
    /// Past it.
    Direct = 1,
}

/// Whether data goes to or comes from the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From the image.
    Read,
    /// To the image, into whatever cache there is.
    Write,
    /// To the image, durable when done.
    WriteThrough,
}

/// Opens an image. Where that is allowed, reads of a guest do not count as looks at the file, which costs
/// each of them a few instructions, and a write once a day.
fn open_file(options: &OpenOptions, flags: i32) -> io::Result<File> {
    let open = |flags: i32| {
        std::fs::OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags | libc::O_CLOEXEC)
            .open(&options.path)
    };
    match open(flags | libc::O_NOATIME) {
        // Only the file's owner may.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(flags),
        result => result,
    }
}

fn open_error(path: &Path, read_only: bool) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| {
        let advice = match source.kind() {
            io::ErrorKind::NotFound => "check the path, or make the image first",
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !read_only => {
                "give this user write access, or serve it with --read-only"
            }
            io::ErrorKind::PermissionDenied => "give this user read access",
            _ => "check that it is a readable file or block device",
        };
        OpenError::Open { path, source, advice }
    }
}

/// Takes the lock that `options` ask for on `file`.
pub(super) fn take_lock(file: &File, options: &OpenOptions) -> Result<(), OpenError> {
    if !options.lock {
        return Ok(());
    }
    let path = || options.path.clone();
    match lock::lock(file, !options.read_only) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let pid = lock::holder(file, !options.read_only);
            let holder = pid.map_or(String::new(), |pid| format!(" (pid {pid})"));
            Err(OpenError::Busy { path: path(), holder })
        }
        Err(source) => Err(OpenError::Lock { path: path(), source }),
    }
}

/// The alignment for direct I/O on `file`, `None` when it has none.
fn direct_alignment(file: &File, block_device: bool) -> Option<DirectAlignment> {
    let statx = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let (memory, offset) = match statx {
        Ok(s) if s.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            (s.stx_dio_mem_align, s.stx_dio_offset_align)
        }
        _ if block_device => {
            let size = rustix::fs::ioctl_blksszget(file).unwrap_or(SAFE_ALIGNMENT);
            (size, size)
        }
        _ => (SAFE_ALIGNMENT, SAFE_ALIGNMENT),
    };
    // 0 is how the system says that there is no direct I/O.
    (memory.is_power_of_two() && offset.is_power_of_two())
        .then(|| DirectAlignment { memory: memory as usize, offset: u64::from(offset) })
}

/// Whether `file` is a block device that is memory alone: zram, brd.
fn is_ram_device(file: &File) -> bool {
    let Ok(stat) = rustix::fs::fstat(file) else { return false };
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let device = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).unwrap_or_default();
    let name = device.file_name().and_then(|n| n.to_str()).unwrap_or("");
    let kind = name.trim_end_matches(|c: char| c.is_ascii_digit());
    kind == "zram" || kind == "ram"
}

/// Whether `file` is on a file system that is memory alone.
fn is_in_memory(file: &File) -> bool {
    const TMPFS: rustix::fs::FsWord = 0x0102_1994;
    const RAMFS: rustix::fs::FsWord = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|s| matches!(s.f_type, TMPFS | RAMFS))
}

/// Block sizes of `file`; `wanted` is the operator's.
fn blocks_of(file: &File, block_device: bool, options: &OpenOptions) -> Result<Blocks, OpenError> {
    // A file's blocks are the guest's own affair: 512 fits every partition table.
    let (least, physical) = if block_device {
        let logical = rustix::fs::ioctl_blksszget(file).unwrap_or(512);
        (logical, rustix::fs::ioctl_blkpbszget(file).unwrap_or(logical))
    } else {
        let size = rustix::fs::fstat(file).map_or(0, |s| u32::try_from(s.st_blksize).unwrap_or(0));
        (512, if size.is_power_of_two() { size.min(4096) } else { 4096 })
    };
    let logical = options.block_size.unwrap_or(least);
    if !logical.is_power_of_two() || logical < least || logical > 4096.max(least) {
        let path = options.path.clone();
        return Err(OpenError::BlockSize { path, block_size: logical, minimum: least });
    }
    let physical = physical.max(logical);
    Ok(Blocks { logical, physical, discard: physical })
}

impl RawImage {
    /// Opens the image, locks it and looks at what it can do.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(options: &OpenOptions) -> Result<Store, OpenError> {
        let path = &options.path;
        // O_NONBLOCK: opening a FIFO by mistake must not hang.
        let buffered =
            open_file(options, libc::O_NONBLOCK).map_err(open_error(path, options.read_only))?;
        let kind = buffered.metadata().map_err(open_error(path, options.read_only))?.file_type();
        let block_device = kind.is_block_device();
        if !kind.is_file() && !block_device {
            return Err(OpenError::Kind(path.clone()));
        }
        take_lock(&buffered, options)?;
        let blocks = blocks_of(&buffered, block_device, options)?;
        let in_memory = !block_device && is_in_memory(&buffered);
        let inline = in_memory || (block_device && is_ram_device(&buffered));
        let direct = match options.cache {
            Cache::Buffered => None,
            // Page cache is all there is.
            Cache::Auto if in_memory => None,
            wanted => {
                let opened = open_file(options, libc::O_DIRECT).ok();
                let direct =
                    opened.and_then(|f| direct_alignment(&f, block_device).map(|a| (f, a)));
                if direct.is_none() && wanted == Cache::Direct {
                    return Err(OpenError::NoDirect(path.clone()));
                }
                direct
            }
        };
        let image = Arc::new(Self { buffered, direct, block_device, blocks });
        image.check_size(path)?;
        let route = if inline { Route::Inline } else { Route::Ring(image.clone()) };
        Ok(Store { image, route })
    }

    /// An image on a memory file.
    #[must_use]
    pub fn in_memory(file: File) -> Store {
        let blocks = Blocks { logical: 512, physical: 4096, discard: 4096 };
        let image = Self { buffered: file, direct: None, block_device: false, blocks };
        Store { image: Arc::new(image), route: Route::Inline }
    }

    fn check_size(&self, path: &Path) -> Result<(), OpenError> {
        let size = self.size().map_err(open_error(path, true))?;
        let (path, block_size) = (path.to_owned(), self.blocks.logical);
        if size < SECTOR_SIZE {
            return Err(OpenError::TooSmall { path, size });
        }
        if !size.is_multiple_of(u64::from(block_size)) {
            return Err(OpenError::Misaligned { path, size, block_size });
        }
        Ok(())
    }

    /// The descriptors to register with a ring, in [`Descriptor`]'s order.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let direct = self.direct.as_ref().map(|(f, _)| f.as_raw_fd());
        std::iter::once(self.buffered.as_raw_fd()).chain(direct).collect()
    }

    /// Where a transfer of `data` at `offset` can go.
    #[inline]
    #[must_use]
    pub fn route(&self, offset: u64, data: &IoVecs) -> Descriptor {
        let Some((_, align)) = &self.direct else { return Descriptor::Buffered };
        let in_file = (offset | data.len() as u64) & (align.offset - 1) == 0;
        let in_memory = data
            .as_slice()
            .iter()
            .all(|v| (v.iov_base.addr() | v.iov_len) & (align.memory - 1) == 0);
        if in_file && in_memory { Descriptor::Direct } else { Descriptor::Buffered }
    }

    /// The io_uring operation for as much of `data` as one can take. `registered` is the number of the
    /// registered memory that has all of it.
    #[inline]
    #[must_use]
    pub fn entry(
        transfer: Transfer,
        descriptor: Descriptor,
        offset: u64,
        data: &IoVecs,
        registered: Option<u16>,
    ) -> squeue::Entry {
        let fd = types::Fixed(descriptor as u32);
        let flags = if transfer == Transfer::WriteThrough { libc::RWF_DSYNC } else { 0 };
        match (data.as_slice(), transfer, registered) {
            ([one], Transfer::Read, Some(number)) => {
                opcode::ReadFixed::new(fd, one.iov_base.cast(), clamp(one.iov_len), number)
                    .offset(offset)
                    .build()
            }
            ([one], _, Some(number)) => {
                opcode::WriteFixed::new(fd, one.iov_base.cast(), clamp(one.iov_len), number)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            ([one], Transfer::Read, None) => {
                opcode::Read::new(fd, one.iov_base.cast(), clamp(one.iov_len))
                    .offset(offset)
                    .build()
            }
            ([one], _, None) => opcode::Write::new(fd, one.iov_base.cast(), clamp(one.iov_len))
                .offset(offset)
                .rw_flags(flags)
                .build(),
            (many, Transfer::Read, _) => {
                opcode::Readv::new(fd, many.as_ptr(), clamp(many.len().min(IOV_MAX)))
                    .offset(offset)
                    .build()
            }
            (many, _, _) => opcode::Writev::new(fd, many.as_ptr(), clamp(many.len().min(IOV_MAX)))
                .offset(offset)
                .rw_flags(flags)
                .build(),
        }
    }

    /// The io_uring operation for a flush.
    #[must_use]
    pub fn flush_entry() -> squeue::Entry {
        opcode::Fsync::new(types::Fixed(Descriptor::Buffered as u32))
            .flags(types::FsyncFlags::DATASYNC)
            .build()
    }

    /// Moves all of `data`, on this thread.
    fn transfer(&self, transfer: Transfer, mut offset: u64, data: &mut IoVecs) -> io::Result<()> {
        let mut descriptor = self.route(offset, data);
        while !data.is_empty() {
            let fd = match (&self.direct, descriptor) {
                (Some((file, _)), Descriptor::Direct) => file.as_raw_fd(),
                _ => self.buffered.as_raw_fd(),
            };
            let vectors = data.as_slice();
            let count = i32::try_from(vectors.len().min(IOV_MAX)).unwrap_or(1);
            let at = i64::try_from(offset).map_err(io::Error::other)?;
            let flags = if transfer == Transfer::WriteThrough { libc::RWF_DSYNC } else { 0 };
            let done = match transfer {
                // SAFETY: `IoVecs` vouches for the ranges, and the array has `count` entries.
                Transfer::Read => unsafe { libc::preadv2(fd, vectors.as_ptr(), count, at, 0) },
                // SAFETY: as above.
                _ => unsafe { libc::pwritev2(fd, vectors.as_ptr(), count, at, flags) },
            };
            match usize::try_from(done) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    data.advance(n);
                    offset = offset.saturating_add(n as u64);
                    descriptor = self.route(offset, data);
                }
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    // The file system wanted something aligned that it had not told of.
                    error
                        if error.raw_os_error() == Some(libc::EINVAL)
                            && descriptor == Descriptor::Direct =>
                    {
                        descriptor = Descriptor::Buffered;
                    }
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    fn fallocate(&self, flags: FallocateFlags, range: ByteRange) -> Result<(), Errno> {
        let flags = flags | FallocateFlags::KEEP_SIZE;
        loop {
            match rustix::fs::fallocate(&self.buffered, flags, range.offset, range.len) {
                Err(Errno::INTR) => {}
                result => return result,
            }
        }
    }

    fn ioctl(&self, request: libc::c_ulong, range: ByteRange) -> Result<(), Errno> {
        let argument = [range.offset, range.len];
        // SAFETY: both requests read two u64, which outlive the call.
        let result = unsafe { libc::ioctl(self.buffered.as_raw_fd(), request, argument.as_ptr()) };
        if result == 0 {
            return Ok(());
        }
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let zeroes = vec![0u8; ZERO_CHUNK];
        let (mut offset, mut left) = (range.offset, range.len);
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(ZERO_CHUNK).min(ZERO_CHUNK);
            let chunk = zeroes.get(..n).unwrap_or(&zeroes);
            self.buffered.write_all_at(chunk, offset)?;
            offset = offset.saturating_add(n as u64);
            left -= n as u64;
        }
        Ok(())
    }
}

/// A length for an SQE; what does not fit is left for the next operation.
#[inline]
fn clamp(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(1 << 30)
}

/// Whether the system cannot do an operation at all.
fn unsupported(e: Errno) -> bool {
    matches!(e, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY | Errno::INVAL | Errno::NODEV)
}

impl Image for RawImage {
    fn size(&self) -> io::Result<u64> {
        // Works for files and devices alike; the file position is used nowhere.
        Ok(rustix::fs::seek(&self.buffered, SeekFrom::End(0))?)
    }

    fn blocks(&self) -> Blocks {
        self.blocks
    }

    fn read(&self, offset: u64, data: &mut IoVecs) -> io::Result<()> {
        self.transfer(Transfer::Read, offset, data)
    }

    fn write(&self, offset: u64, data: &mut IoVecs, durable: bool) -> io::Result<()> {
        let transfer = if durable { Transfer::WriteThrough } else { Transfer::Write };
        self.transfer(transfer, offset, data)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.buffered)?)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        if range.len == 0 {
            return Ok(());
        }
        let result = if self.block_device {
            self.ioctl(BLKDISCARD, range)
        } else {
            self.fallocate(FallocateFlags::PUNCH_HOLE, range)
        };
        match result {
            // A discard is a hint.
            Err(e) if unsupported(e) => Ok(()),
            result => Ok(result?),
        }
    }

    fn zero(&self, zero: ZeroRange) -> io::Result<()> {
        let range = zero.range;
        if range.len == 0 {
            return Ok(());
        }
        let mut result = Err(Errno::OPNOTSUPP);
        if zero.unmap {
            result = self.fallocate(FallocateFlags::PUNCH_HOLE, range);
        }
        if result.is_err_and(unsupported) {
            result = self.fallocate(FallocateFlags::ZERO_RANGE, range);
        }
        if self.block_device && result.is_err_and(unsupported) {
            result = self.ioctl(BLKZEROOUT, range);
        }
        match result {
            Err(e) if unsupported(e) => self.write_zeroes(range),
            result => Ok(result?),
        }
    }
}

#[cfg(test)]
mod tests;
