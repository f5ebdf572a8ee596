//! A guest without a kernel: calls the passthrough as the FUSE server does.
#![allow(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]
#![allow(unsafe_code, reason = "hands buffers to the passthrough as guest memory")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry, FileSystem};
use outboard_common::ring::IoVecs;
use tempfile::TempDir;

use crate::fuse::extension::{
    CreateContext, Created, EntrySink, Extension, ReadRequest, Wait, WriteRequest,
};
use crate::passthrough::{Config, InodeFileHandles, PassthroughFs};

pub(super) const ROOT: u64 = 1;
pub(super) const MODES: [InodeFileHandles; 2] = [InodeFileHandles::Never, InodeFileHandles::Prefer];

/// A shared directory and what shares it.
pub(super) struct Guest {
    pub(super) fs: PassthroughFs,
    pub(super) dir: TempDir,
}

pub(super) fn context(uid: u32, gid: u32) -> Context {
    Context { uid, gid, pid: 1 }
}

pub(super) fn root() -> Context {
    context(0, 0)
}

pub(super) fn c(name: &str) -> CString {
    CString::new(name).unwrap()
}

pub(super) fn errno_of<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.expect_err("must fail").raw_os_error().unwrap()
}

/// Shares `path` with a guest that has every feature.
pub(super) fn share(path: &Path, config: Config) -> PassthroughFs {
    let dir: OwnedFd = File::open(path).unwrap().into();
    let proc: OwnedFd = File::open("/proc/self/fd").unwrap().into();
    let fs = PassthroughFs::new(config, dir, proc).unwrap();
    fs.negotiate(u64::MAX).unwrap();
    fs
}

impl Guest {
    pub(super) fn new(config: Config) -> Self {
        Self::new_in(&std::env::temp_dir(), config)
    }

    pub(super) fn new_in(parent: &Path, config: Config) -> Self {
        let dir = TempDir::new_in(parent).unwrap();
        Self { fs: share(dir.path(), config), dir }
    }

    pub(super) fn with_handles(mode: InodeFileHandles) -> Self {
        Self::new(Config { inode_file_handles: mode, xattr: true, ..Config::default() })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn lookup(&self, parent: u64, name: &str) -> io::Result<Entry> {
        self.fs.lookup(&root(), parent, &c(name))
    }

    pub(super) fn create_as(
        &self,
        ctx: &Context,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> io::Result<Created> {
        let args = CreateIn { flags: flags as u32, mode, umask: 0, fuse_flags: 0 };
        self.fs.create_with(ctx, &CreateContext::default(), parent, &c(name), args)
    }

    /// Makes and opens a file.
    pub(super) fn create(&self, parent: u64, name: &str) -> (u64, u64) {
        let (entry, handle, _) =
            self.create_as(&root(), parent, name, libc::O_RDWR | libc::O_EXCL, 0o644).unwrap();
        (entry.inode, handle.unwrap())
    }

    pub(super) fn open(&self, inode: u64, flags: i32) -> io::Result<u64> {
        self.fs.open(&root(), inode, flags as u32, 0).map(|(handle, ..)| handle.unwrap())
    }

    pub(super) fn read(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        len: usize,
    ) -> io::Result<Vec<u8>> {
        let mut data = vec![0_u8; len];
        let mut out = IoVecs::new();
        // SAFETY: `data` outlives `out`.
        unsafe { out.push(data.as_mut_ptr(), len) };
        let request = ReadRequest { inode, handle, offset, lock_owner: None, flags: 0 };
        let n = self.fs.read_into(&root(), &request, &out, Wait::Allowed)?;
        data.truncate(n);
        Ok(data)
    }

    pub(super) fn write(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
    ) -> io::Result<usize> {
        self.write_with(inode, handle, offset, data, false)
    }

    pub(super) fn write_with(
        &self,
        inode: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
        kill_suidgid: bool,
    ) -> io::Result<usize> {
        let mut list = IoVecs::new();
        // SAFETY: `data` outlives `list`, and writing only reads it.
        unsafe { list.push(data.as_ptr().cast_mut(), data.len()) };
        let request = WriteRequest {
            inode,
            handle,
            offset,
            lock_owner: None,
            delayed: false,
            kill_suidgid,
            flags: 0,
        };
        self.fs.write_from(&root(), &request, &list, Wait::Allowed)
    }

    pub(super) fn release(&self, inode: u64, handle: u64) {
        self.fs.release(&root(), inode, 0, handle, false, false, None).unwrap();
    }

    pub(super) fn forget(&self, inode: u64) {
        self.fs.forget(&root(), inode, 1);
    }

    /// All names of a directory, read with room for `room` entries at a time.
    pub(super) fn names(&self, inode: u64, room: usize) -> io::Result<Vec<String>> {
        let (handle, _) = self.fs.opendir(&root(), inode, 0)?;
        let handle = handle.unwrap();
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let mut left = room;
            let before = names.len();
            self.fs.readdir(&root(), inode, handle, 0, offset, &mut |entry| {
                if left == 0 {
                    return Ok(0);
                }
                left -= 1;
                offset = entry.offset;
                names.push(String::from_utf8_lossy(entry.name).into_owned());
                Ok(1)
            })?;
            if names.len() == before {
                break;
            }
        }
        self.fs.releasedir(&root(), inode, 0, handle)?;
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }

    /// All entries of a directory with their attributes.
    pub(super) fn names_plus(&self, inode: u64, room: usize) -> Vec<(String, Entry)> {
        let (handle, _) = self.fs.opendir(&root(), inode, 0).unwrap();
        let handle = handle.unwrap();
        let mut all = Vec::new();
        let mut offset = 0;
        loop {
            let mut sink = Sink { room, entries: Vec::new(), offset };
            self.fs.readdirplus_into(&root(), inode, handle, 0, offset, &mut sink).unwrap();
            if sink.entries.is_empty() {
                break;
            }
            offset = sink.offset;
            all.append(&mut sink.entries);
        }
        self.fs.releasedir(&root(), inode, 0, handle).unwrap();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

struct Sink {
    room: usize,
    entries: Vec<(String, Entry)>,
    offset: u64,
}

impl EntrySink for Sink {
    fn fits(&self, _name_len: usize) -> bool {
        self.entries.len() < self.room
    }

    fn add(&mut self, dirent: DirEntry<'_>, entry: &Entry) -> bool {
        self.offset = dirent.offset;
        self.entries.push((String::from_utf8_lossy(dirent.name).into_owned(), *entry));
        true
    }
}

/// Whether the test runs as root, which several promises need.
pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
