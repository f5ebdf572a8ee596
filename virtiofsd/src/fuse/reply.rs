//! Replies: a header and a payload into the writable part of a chain.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::io;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};
use outboard_common::ring::IoVecs;
use zerocopy::{Immutable, IntoBytes};

use super::extension::EntrySink;
use super::wire::{self, Dirent, EntryOut, OutHeader};

/// Bytes of a reply's header.
pub const HEADER_SIZE: usize = size_of::<OutHeader>();

/// Where the reply to one request goes. Every method that writes a reply returns its length in
/// bytes, 0 when the guest left no room even for a header.
#[derive(Debug)]
pub struct Reply<'a> {
    writable: &'a mut IoVecs,
    unique: u64,
}

/// The errno of an error of a file system; `EIO` for one that has none.
#[must_use]
pub fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// The length of a whole reply, which a u32 holds since the payload fitted in a chain.
fn total(payload: usize) -> u32 {
    u32::try_from(HEADER_SIZE.saturating_add(payload)).unwrap_or(u32::MAX)
}

impl<'a> Reply<'a> {
    /// A reply to request `unique` in `writable`.
    #[inline]
    pub fn new(writable: &'a mut IoVecs, unique: u64) -> Self {
        Self { writable, unique }
    }

    /// Room for a payload, bytes.
    #[inline]
    #[must_use]
    pub fn room(&self) -> usize {
        self.writable.len().saturating_sub(HEADER_SIZE)
    }

    /// The header of a reply with `payload` bytes.
    #[inline]
    fn header(&self, payload: usize) -> OutHeader {
        OutHeader { len: total(payload), error: 0, unique: self.unique }
    }

    /// An error reply.
    #[inline]
    pub fn error(self, errno: i32) -> u32 {
        let len = total(0);
        let header = OutHeader { len, error: errno.saturating_neg(), unique: self.unique };
        if self.writable.write_obj(&header) { len } else { 0 }
    }

    /// Success without a payload.
    #[inline]
    pub fn ok(self) -> u32 {
        self.bytes(&[])
    }

    /// Success with `payload`; `EIO` if it does not fit.
    #[inline]
    pub fn bytes(self, payload: &[u8]) -> u32 {
        if payload.len() > self.room() {
            return self.error(libc::EIO);
        }
        let header = self.header(payload.len());
        if !self.writable.write_obj(&header) {
            return 0;
        }
        self.writable.write(payload);
        header.len
    }

    /// Success with a struct.
    #[inline]
    pub fn obj<T: IntoBytes + Immutable>(self, payload: &T) -> u32 {
        self.bytes(payload.as_bytes())
    }

    /// Success with a struct and bytes after it.
    pub fn obj_and_bytes<T: IntoBytes + Immutable>(self, first: &T, rest: &[u8]) -> u32 {
        let payload = size_of::<T>().saturating_add(rest.len());
        if payload > self.room() {
            return self.error(libc::EIO);
        }
        let header = self.header(payload);
        if !self.writable.write_obj(&header) {
            return 0;
        }
        self.writable.write(first.as_bytes());
        self.writable.write(rest);
        header.len
    }

    /// The outcome of an operation without a payload.
    #[inline]
    pub fn result(self, result: io::Result<()>) -> u32 {
        match result {
            Ok(()) => self.ok(),
            Err(e) => self.error(errno(&e)),
        }
    }

    /// The outcome of an operation whose payload `make` makes.
    #[inline]
    pub fn map<T, P: IntoBytes + Immutable>(
        self,
        result: io::Result<T>,
        make: impl FnOnce(T) -> P,
    ) -> u32 {
        match result {
            Ok(value) => self.obj(&make(value)),
            Err(e) => self.error(errno(&e)),
        }
    }

    /// Success with a payload that `fill` puts straight into guest memory, at most `max` bytes; it
    /// returns how many. `head` is working space.
    #[inline]
    pub fn fill(
        self,
        max: usize,
        head: &mut IoVecs,
        fill: impl FnOnce(&mut IoVecs) -> io::Result<usize>,
    ) -> io::Result<u32> {
        if self.writable.split_front(HEADER_SIZE, head) < HEADER_SIZE {
            return Ok(0);
        }
        self.writable.truncate(max);
        let (header, filled) = match fill(self.writable) {
            Ok(n) => (OutHeader { len: total(n), error: 0, unique: self.unique }, Ok(())),
            Err(e) => {
                let error = errno(&e).saturating_neg();
                (OutHeader { len: total(0), error, unique: self.unique }, Err(e))
            }
        };
        // Who has the request done elsewhere must find the header untouched.
        if let Err(e) = filled
            && errno(&e) == libc::EAGAIN
        {
            return Err(e);
        }
        head.write_obj(&header);
        Ok(header.len)
    }
}

/// Collects directory entries in their wire form.
#[derive(Debug)]
pub struct Listing<'a> {
    bytes: &'a mut Vec<u8>,
    max: usize,
}

impl<'a> Listing<'a> {
    /// An empty listing of at most `max` bytes, in the reused buffer `bytes`.
    pub fn new(bytes: &'a mut Vec<u8>, max: usize) -> Self {
        bytes.clear();
        Self { bytes, max }
    }

    fn left(&self) -> usize {
        self.max.saturating_sub(self.bytes.len())
    }

    fn push(&mut self, dirent: &DirEntry<'_>) {
        let padded = self.bytes.len().saturating_add(wire::dirent_size(dirent.name.len()));
        let head = Dirent {
            ino: dirent.ino,
            off: dirent.offset,
            namelen: u32::try_from(dirent.name.len()).unwrap_or(u32::MAX),
            kind: dirent.type_,
        };
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(dirent.name);
        self.bytes.resize(padded, 0);
    }

    /// Adds a READDIR entry; returns its size, or 0 when it does not fit.
    pub fn add_plain(&mut self, dirent: &DirEntry<'_>) -> usize {
        let size = wire::dirent_size(dirent.name.len());
        if size > self.left() {
            return 0;
        }
        self.push(dirent);
        size
    }
}

impl EntrySink for Listing<'_> {
    fn fits(&self, name_len: usize) -> bool {
        wire::direntplus_size(name_len) <= self.left()
    }

    fn add(&mut self, dirent: DirEntry<'_>, entry: &Entry) -> bool {
        if !self.fits(dirent.name.len()) {
            return false;
        }
        self.bytes.extend_from_slice(EntryOut::new(entry).as_bytes());
        self.push(&dirent);
        true
    }
}
