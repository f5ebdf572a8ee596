//! qcow2 images with backing chains, through the `imago` crate.
//!
//! # Theory of operation
//! imago is built for blocking calls here, and is called from the threads of a [`pool`](super::pool):
//! its metadata caches have their own locks, so several requests go on at once. Data passes through
//! a buffer of ours, since imago works on slices and guest memory must never become one.
//!
//! Every file of the chain is opened by us: the image with an exclusive lock when it is writable, all
//! the others read-only with a shared lock. The format is never guessed from content, since a guest
//! could write a qcow2 header into its raw disk and so name any file of the host.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File as ImagoFile;
use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::io_buffers::IoBuffer;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, StorageOpenOptions};
use outboard_common::ring::IoVecs;

use super::raw::take_lock;
use super::{Blocks, Cache, Image, OpenError, OpenOptions, Route, Store};
use crate::request::{ByteRange, SECTOR_SIZE, ZeroRange};

/// Data moved at once: bounds the memory that a request takes.
const CHUNK: usize = 1 << 20;
/// qcow2's first bytes, and its version.
const MAGIC: [u8; 4] = *b"QFI\xfb";

type Access = FormatAccess<ImagoFile>;

/// A qcow2 image.
#[derive(Debug)]
pub struct Qcow2Image {
    /// Only discards need it alone.
    access: RwLock<Access>,
    mem_align: usize,
    blocks: Blocks,
}

/// Opens the files of a chain as [`OpenOptions`] say.
#[derive(Debug, Clone)]
struct Gate {
    options: OpenOptions,
}

impl Gate {
    fn open(&self, path: &Path, writable: bool) -> Result<ImagoFile, OpenError> {
        let options =
            OpenOptions { path: path.to_owned(), read_only: !writable, ..self.options.clone() };
        let failed = |source| OpenError::Qcow2 { path: path.to_owned(), source };
        let mut direct = options.cache != Cache::Buffered;
        let mut opened = open_with(&options, direct);
        if direct && options.cache == Cache::Auto && opened.is_err() {
            direct = false;
            opened = open_with(&options, false);
        }
        let file = opened.map_err(failed)?;
        take_lock(&file, &options)?;
        let how = StorageOpenOptions::new().filename(path).write(writable).direct(direct);
        ImagoFile::from_open_file(file, how).map_err(failed)
    }
}

fn open_with(options: &OpenOptions, direct: bool) -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | if direct { libc::O_DIRECT } else { 0 };
    std::fs::OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .custom_flags(flags)
        .open(&options.path)
}

impl ImplicitOpenGate<ImagoFile> for Gate {
    fn open_format<F: FormatDriverBuilder<ImagoFile>>(&mut self, builder: F) -> io::Result<Access> {
        Ok(FormatAccess::new(builder.open(self.clone())?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<ImagoFile> {
        let path = options.get_filename().map(PathBuf::from).ok_or(io::ErrorKind::InvalidInput)?;
        self.open(&path, options.get_writable()).map_err(io::Error::other)
    }
}

/// Whether the file starts like a qcow2 image, for a better message than imago's.
fn has_magic(path: &Path) -> io::Result<bool> {
    let mut start = [0; 4];
    Ok(File::open(path)?.read_exact_at(&mut start, 0).is_ok() && start == MAGIC)
}

impl Qcow2Image {
    /// Opens an image and its backing chain.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(options: &OpenOptions) -> Result<Store, OpenError> {
        let failed = |source| OpenError::Qcow2 { path: options.path.clone(), source };
        if !has_magic(&options.path).map_err(failed)? {
            return Err(failed(io::Error::other("it is not in qcow2 format")));
        }
        let gate = Gate { options: options.clone() };
        let file = gate.open(&options.path, !options.read_only)?;
        let qcow2 = Qcow2::<ImagoFile>::builder(file)
            .write(!options.read_only)
            .open(gate)
            .map_err(failed)?;
        let access = FormatAccess::new(qcow2);
        let least = u32::try_from(access.req_align()).unwrap_or(512).clamp(512, 4096);
        let logical = options.block_size.unwrap_or(512);
        if !logical.is_power_of_two() || !(512..=4096).contains(&logical) {
            let (path, minimum) = (options.path.clone(), 512);
            return Err(OpenError::BlockSize { path, block_size: logical, minimum });
        }
        let size = access.size();
        if size < SECTOR_SIZE {
            return Err(OpenError::TooSmall { path: options.path.clone(), size });
        }
        let blocks = Blocks { logical, physical: 4096.max(least), discard: 64 << 10 };
        let mem_align = access.mem_align().max(1);
        let image = Self { access: RwLock::new(access), mem_align, blocks };
        Ok(Store { image: Arc::new(image), route: Route::Threads })
    }

    /// A panicking holder (a bug of imago's) leaves the lock usable; what it holds is imago's to
    /// check.
    fn shared(&self) -> RwLockReadGuard<'_, Access> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Access> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image for Qcow2Image {
    fn size(&self) -> io::Result<u64> {
        Ok(self.shared().size())
    }

    fn blocks(&self) -> Blocks {
        self.blocks
    }

    fn read(&self, offset: u64, data: &mut IoVecs) -> io::Result<()> {
        let access = self.shared();
        let mut offset = offset;
        while !data.is_empty() {
            let n = data.len().min(CHUNK);
            let mut buffer = IoBuffer::new(n, self.mem_align)?;
            access.read(&mut buffer, offset)?;
            data.write(buffer.as_ref().into_slice());
            offset = offset.saturating_add(n as u64);
        }
        Ok(())
    }

    fn write(&self, offset: u64, data: &mut IoVecs, durable: bool) -> io::Result<()> {
        let access = self.shared();
        let mut offset = offset;
        while !data.is_empty() {
            let n = data.len().min(CHUNK);
            let mut buffer = IoBuffer::new(n, self.mem_align)?;
            data.read(buffer.as_mut().into_slice());
            access.write(&buffer, offset)?;
            offset = offset.saturating_add(n as u64);
        }
        drop(access);
        if durable { self.flush() } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        let access = self.shared();
        access.flush()?;
        access.sync()
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.alone().discard_to_any(range.offset, range.len)
    }

    fn zero(&self, zero: ZeroRange) -> io::Result<()> {
        let ByteRange { offset, len } = zero.range;
        if zero.unmap {
            self.alone().discard_to_zero(offset, len)
        } else {
            self.shared().write_zeroes(offset, len)
        }
    }
}

#[cfg(test)]
mod tests;
