//! What a disk is made of: a raw file or block device, memory, nothing at all, or a qcow2 image.
//!
//! # Theory of operation
//! [`Image`] is the blocking interface that every kind has. How the worker uses it is the store's
//! [`Route`]: a raw file on a disk goes through the worker's io_uring and `Image` is only for the rare
//! operations (discard, zeroes); memory answers at once on the worker's thread; qcow2, whose metadata
//! has to be read and written in order, works on a small pool of threads ([`pool`]).

pub mod lock;
pub mod memory;
pub mod null;
pub mod pool;
pub mod qcow2;
pub mod raw;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use outboard_common::ring::IoVecs;

use self::raw::RawImage;
use crate::request::{ByteRange, SECTOR_SIZE, ZeroRange};

/// Why an image cannot be served: found before any socket exists, and told to the operator.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// `open` failed.
    #[error("cannot open image {path}: {source}; {advice}")]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do about it.
        advice: &'static str,
    },
    /// Neither a file nor a block device.
    #[error("image {0} is neither a regular file nor a block device; give one of these")]
    Kind(PathBuf),
    /// Less than one sector.
    #[error(
        "image {path} has {size} bytes, less than one sector of {SECTOR_SIZE}; enlarge it with truncate -s"
    )]
    TooSmall {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Not a whole number of blocks.
    #[error(
        "the size of image {path}, {size} bytes, is not a multiple of its block size of {block_size}; round it up with truncate -s %{block_size}"
    )]
    Misaligned {
        /// The image.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The block size in bytes.
        block_size: u32,
    },
    /// Somebody else uses it.
    #[error(
        "image {path} is in use by another process{holder}; stop that one, or open both read-only"
    )]
    Busy {
        /// The image.
        path: PathBuf,
        /// Who, where that is known.
        holder: String,
    },
    /// The lock could not be tried.
    #[error("cannot lock image {path}: {source}; give lock=off if its file system has no locks")]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `--direct` where there is no direct I/O.
    #[error(
        "image {0} is on a file system without direct I/O; leave --direct out or give --buffered"
    )]
    NoDirect(PathBuf),
    /// A block size smaller than the device can do, or no power of two.
    #[error(
        "image {path} cannot have blocks of {block_size} bytes; give a power of two from {minimum} to 4096"
    )]
    BlockSize {
        /// The image.
        path: PathBuf,
        /// What was asked for.
        block_size: u32,
        /// The least that is possible.
        minimum: u32,
    },
    /// A qcow2 image that cannot be used.
    #[error(
        "cannot use qcow2 image {path}: {source}; see qemu-img check and qemu-img info --backing-chain"
    )]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// What imago said.
        source: io::Error,
    },
    /// A memory store could not be made.
    #[error("cannot make a memory disk of {size} bytes: {source}; give a smaller size")]
    Memory {
        /// Bytes asked for.
        size: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// What the guest is told about an image's blocks, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Logical block size.
    pub logical: u32,
    /// Physical block size.
    pub physical: u32,
    /// What discards should be aligned to.
    pub discard: u32,
}

/// The blocking interface of an image. All methods may be called from several threads at once.
pub trait Image: Send + Sync + std::fmt::Debug {
    /// Its size now, bytes.
    ///
    /// # Errors
    /// The system's.
    fn size(&self) -> io::Result<u64>;

    /// What to tell the guest.
    fn blocks(&self) -> Blocks;

    /// Fills all of `data` from `offset` on.
    ///
    /// # Errors
    /// The system's; `data` is partly filled then.
    fn read(&self, offset: u64, data: &mut IoVecs) -> io::Result<()>;

    /// Stores all of `data` from `offset` on; `durable`: not only in a cache.
    ///
    /// # Errors
    /// The system's; any part may have been stored.
    fn write(&self, offset: u64, data: &mut IoVecs, durable: bool) -> io::Result<()>;

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The system's; it is unknown what is durable.
    fn flush(&self) -> io::Result<()>;

    /// Forgets `range`, which then reads as anything. Does nothing where that is not possible.
    ///
    /// # Errors
    /// The system's.
    fn discard(&self, range: ByteRange) -> io::Result<()>;

    /// Has a range read as zeroes.
    ///
    /// # Errors
    /// The system's; any part may have been zeroed.
    fn zero(&self, zero: ZeroRange) -> io::Result<()>;
}

/// How a worker carries out reads, writes and flushes.
#[derive(Debug, Clone)]
pub enum Route {
    /// Through the worker's io_uring, on this image's descriptors.
    Ring(Arc<RawImage>),
    /// On the worker's thread, since nothing can block.
    Inline,
    /// On other threads.
    Threads,
}

/// An opened image and how to use it.
#[derive(Debug, Clone)]
pub struct Store {
    /// The image.
    pub image: Arc<dyn Image>,
    /// How reads, writes and flushes go.
    pub route: Route,
}

impl Store {
    /// Its size in whole sectors, as far as it can be told.
    ///
    /// # Errors
    /// The system's.
    pub fn sectors(&self) -> io::Result<u64> {
        Ok(self.image.size()? / SECTOR_SIZE)
    }
}

/// What an operator wants of an image file.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// The file.
    pub path: PathBuf,
    /// Never write.
    pub read_only: bool,
    /// How to treat the page cache.
    pub cache: Cache,
    /// Logical block size; `None`: the image's own.
    pub block_size: Option<u32>,
    /// Hold a lock that keeps others from writing.
    pub lock: bool,
}

/// How to treat the host's page cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Bypass it where that is possible.
    #[default]
    Auto,
    /// Bypass it, or fail.
    Direct,
    /// Use it.
    Buffered,
}
