//! Open directories: OPENDIR, READDIR, READDIRPLUS, RELEASEDIR, FSYNCDIR.
//!
//! An open directory keeps what the kernel returned beyond what the guest had room for, so that the
//! guest's next request, which goes on where the last one ended, needs no system call. Any other
//! position starts from there afresh.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use fuse_backend_rs::api::filesystem::{DirEntry, Entry};

use super::{PassthroughFs, errno, sys};
use crate::fuse::extension::EntrySink;
use crate::inode_store::ROOT_ID;

/// Bytes asked of the kernel at a time; what the C library uses.
const BUFFER_BYTES: usize = 32 << 10;
/// Bytes of a `linux_dirent64` before its name: inode number, offset, record length, type.
const RECORD_HEADER: usize = 19;

/// An open directory.
#[derive(Debug)]
pub(super) struct OpenDir {
    fd: OwnedFd,
    inode: u64,
    stream: Mutex<Stream>,
}

/// Where reading a directory has got to.
#[derive(Debug, Default)]
struct Stream {
    buffer: Vec<u8>,
    /// The records not yet handed out are `buffer[start..end]`.
    start: usize,
    end: usize,
    /// The position of the record at `start`.
    position: u64,
}

/// One record of a directory.
#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    ino: u64,
    /// The position after it.
    next: u64,
    kind: u8,
    name: &'a CStr,
    /// Its length in the buffer.
    len: usize,
}

/// Takes the first record off `bytes`.
fn parse_record(bytes: &[u8]) -> Option<Record<'_>> {
    let ino = u64::from_ne_bytes(bytes.get(0..8)?.try_into().ok()?);
    let next = u64::from_ne_bytes(bytes.get(8..16)?.try_into().ok()?);
    let len = u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?).into();
    let kind = *bytes.get(18)?;
    let name = CStr::from_bytes_until_nul(bytes.get(RECORD_HEADER..len)?).ok()?;
    Some(Record { ino, next, kind, name, len })
}

impl OpenDir {
    /// `fd`, opened for node `inode`.
    pub(super) fn new(fd: OwnedFd, inode: u64) -> Self {
        Self { fd, inode, stream: Mutex::default() }
    }

    pub(super) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub(super) fn inode(&self) -> u64 {
        self.inode
    }

    /// Calls `each` with the records from `offset` on, until it says false or the directory ends. An
    /// error ends it too; it is kept for the next call if something was handed out already.
    fn for_each(
        &self,
        offset: u64,
        each: &mut dyn FnMut(&Record<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = &mut *stream;
        // From the start always means anew: that is what rewinddir is for.
        if offset != stream.position || (offset == 0 && !stream.buffer.is_empty()) {
            let position = i64::try_from(offset).map_err(|_unfit| errno(libc::EINVAL))?;
            sys::lseek(self.fd.as_fd(), position, libc::SEEK_SET)?;
            (stream.start, stream.end, stream.position) = (0, 0, offset);
        }
        let mut any = false;
        loop {
            if stream.start == stream.end {
                stream.buffer.resize(BUFFER_BYTES, 0);
                match sys::getdents(self.fd.as_fd(), &mut stream.buffer) {
                    Ok(0) => return Ok(()),
                    Ok(n) => (stream.start, stream.end) = (0, n),
                    Err(_) if any => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
            let rest = stream.buffer.get(stream.start..stream.end).unwrap_or(&[]);
            let record = parse_record(rest).ok_or(errno(libc::EIO))?;
            match each(&record) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(_) if any => return Ok(()),
                Err(error) => return Err(error),
            }
            any = true;
            (stream.start, stream.position) = (stream.start + record.len, record.next);
        }
    }
}

impl PassthroughFs {
    fn dir(&self, id: u64, handle: u64) -> io::Result<Arc<OpenDir>> {
        let dir = self.dirs.get(handle).ok_or(errno(libc::EBADF))?;
        if dir.inode == id { Ok(dir) } else { Err(errno(libc::EBADF)) }
    }

    /// OPENDIR.
    pub(super) fn do_opendir(&self, id: u64) -> io::Result<u64> {
        let fd = self.open_node(id, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let fd = self.for_guest(fd)?;
        self.dirs.insert(OpenDir::new(fd, id)).ok_or(errno(libc::ENFILE))
    }

    /// RELEASEDIR.
    pub(super) fn do_releasedir(&self, handle: u64) -> io::Result<()> {
        self.dirs.remove(handle).map(drop).ok_or(errno(libc::EBADF))
    }

    /// FSYNCDIR.
    pub(super) fn do_fsyncdir(&self, id: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let dir = self.dir(id, handle)?;
        if data_only {
            rustix::fs::fdatasync(&dir.fd)?;
        } else {
            rustix::fs::fsync(&dir.fd)?;
        }
        Ok(())
    }

    /// READDIR: `add` returns false when the guest's buffer is full.
    pub(super) fn do_readdir(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<bool>,
    ) -> io::Result<()> {
        let dir = self.dir(id, handle)?;
        dir.for_each(offset, &mut |record| add(self.dir_entry(id, record, record.ino)))
    }

    /// READDIRPLUS.
    pub(super) fn do_readdirplus(
        &self,
        id: u64,
        handle: u64,
        offset: u64,
        sink: &mut dyn EntrySink,
    ) -> io::Result<()> {
        let dir = self.dir(id, handle)?;
        dir.for_each(offset, &mut |record| {
            let name = record.name;
            if !sink.fits(name.to_bytes().len()) {
                return Ok(false);
            }
            let itself = matches!(name.to_bytes(), b"." | b"..");
            let found = if itself {
                None
            } else {
                sys::statx(dir.fd.as_fd(), name, 0, sys::STATX_MASK)
                    .and_then(|stat| self.entry(id, dir.fd.as_fd(), name, stat))
                    .ok() // went away, or cannot be reached: the guest will find out if it cares
            };
            let entry = found.unwrap_or_default();
            let ino = if entry.inode == 0 { record.ino } else { entry.attr.st_ino };
            let added = sink.add(self.dir_entry(id, record, ino), &entry);
            if !added && entry.inode != 0 {
                self.do_forget(entry.inode, 1);
            }
            Ok(added)
        })
    }

    fn dir_entry<'a>(&self, id: u64, record: &Record<'a>, ino: u64) -> DirEntry<'a> {
        let name = record.name.to_bytes();
        // What is above the shared directory is no business of the guest's.
        let above = id == ROOT_ID && name == b"..";
        let ino =
            if above { self.inodes.info(ROOT_ID).map_or(ino, |info| info.key.ino) } else { ino };
        DirEntry { ino, offset: record.next, type_: record.kind.into(), name }
    }
}

/// Takes entries for upstream's form of READDIRPLUS, which says by a size whether one fitted.
pub(super) struct Callback<'a>(
    pub(super) &'a mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
);

impl EntrySink for Callback<'_> {
    fn fits(&self, _name_len: usize) -> bool {
        true // only trying tells
    }

    fn add(&mut self, dirent: DirEntry<'_>, entry: &Entry) -> bool {
        matches!((self.0)(dirent, *entry), Ok(size) if size > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_records_are_refused() {
        let mut record = vec![0_u8; 24];
        record[0] = 7;
        record[8] = 9;
        record[16] = 24;
        record[18] = libc::DT_REG;
        record[19] = b'x';
        let parsed = parse_record(&record).unwrap();
        assert_eq!((parsed.ino, parsed.next, parsed.kind, parsed.len), (7, 9, libc::DT_REG, 24));
        assert_eq!(parsed.name, c"x");
        for cut in 0..24 {
            assert_eq!(parse_record(&record[..cut]), None, "cut at {cut}");
        }
        record[19..].fill(b'x');
        assert_eq!(parse_record(&record), None, "no end of the name");
        record[16] = 3;
        assert_eq!(parse_record(&record), None, "shorter than its header");
    }
}
