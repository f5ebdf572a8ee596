//! The passthrough does what the system calls do: random operations through it on one directory and
//! directly on another leave equal trees and give equal errors.

#![allow(
    clippy::identity_op,
    clippy::bind_instead_of_map,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "tests may panic"
)]

use std::fs;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::{CreateIn, SetattrValid};
use fuse_backend_rs::api::filesystem::{FileSystem, GetxattrReply};
use proptest::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, XattrFlags};

use super::harness::*;
use crate::fuse::extension::{CopyRange, CreateContext, Extension};
use crate::passthrough::{InodeFileHandles, sys};

const NAMES: [&str; 3] = ["a", "b", "c"];
/// Open files at a time.
const SLOTS: usize = 3;

/// Up to three names.
type Place = Vec<usize>;

#[derive(Debug, Clone)]
enum Op {
    Mkdir(Place, u32),
    Mkfifo(Place),
    Symlink(Place),
    Create { at: Place, slot: usize, exclusive: bool, truncate: bool },
    Tmpfile { at: Place, slot: usize, name: Place },
    Open { at: Place, slot: usize, writes: bool },
    Close(usize),
    Write { slot: usize, offset: u64, len: usize, byte: u8 },
    Read { slot: usize, offset: u64, len: usize },
    Allocate { slot: usize, mode: i32, offset: u64, len: u64 },
    Seek { slot: usize, offset: u64, whence: i32 },
    Copy { from: usize, to: usize, from_offset: u64, to_offset: u64, len: u64 },
    Truncate { at: Place, size: i64 },
    Chmod(Place, u32),
    Utimes(Place, i64),
    Link(Place, Place),
    Rename(Place, Place, u32),
    Unlink(Place),
    Rmdir(Place),
    List(Place),
    Readlink(Place),
    SetXattr(Place, u8),
    GetXattr(Place),
    RemoveXattr(Place),
}

fn place() -> impl Strategy<Value = Place> {
    prop::collection::vec(0..NAMES.len(), 1..=3)
}

fn op() -> impl Strategy<Value = Op> {
    let slot = 0..SLOTS;
    let offset = prop_oneof![0_u64..100, 4000_u64..9000, Just(1 << 20)];
    let len = prop_oneof![0_usize..100, 3000_usize..9000];
    let allocation = prop_oneof![
        Just(0),
        Just(libc::FALLOC_FL_KEEP_SIZE),
        Just(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
        Just(libc::FALLOC_FL_ZERO_RANGE),
        Just(libc::FALLOC_FL_PUNCH_HOLE),
        Just(libc::FALLOC_FL_COLLAPSE_RANGE),
        Just(libc::FALLOC_FL_INSERT_RANGE),
    ];
    let mode = prop_oneof![Just(0o755_u32), Just(0o700), Just(0o1777), Just(0o2755), Just(0)];
    prop_oneof![
        3 => (place(), mode.clone()).prop_map(|(at, mode)| Op::Mkdir(at, mode)),
        1 => place().prop_map(Op::Mkfifo),
        1 => place().prop_map(Op::Symlink),
        5 => (place(), slot.clone(), any::<bool>(), any::<bool>()).prop_map(
            |(at, slot, exclusive, truncate)| Op::Create { at, slot, exclusive, truncate }),
        1 => (place(), slot.clone(), place()).prop_map(
            |(at, slot, name)| Op::Tmpfile { at, slot, name }),
        4 => (place(), slot.clone(), any::<bool>()).prop_map(
            |(at, slot, writes)| Op::Open { at, slot, writes }),
        1 => slot.clone().prop_map(Op::Close),
        5 => (slot.clone(), offset.clone(), len.clone(), any::<u8>()).prop_map(
            |(slot, offset, len, byte)| Op::Write { slot, offset, len, byte }),
        3 => (slot.clone(), offset.clone(), len).prop_map(
            |(slot, offset, len)| Op::Read { slot, offset, len }),
        2 => (slot.clone(), allocation, offset.clone(), offset.clone()).prop_map(
            |(slot, mode, offset, len)| Op::Allocate { slot, mode, offset, len }),
        1 => (slot.clone(), offset.clone(), 3_i32..=5).prop_map(
            |(slot, offset, whence)| Op::Seek { slot, offset, whence }),
        1 => (slot.clone(), slot, offset.clone(), offset.clone(), offset).prop_map(
            |(from, to, from_offset, to_offset, len)| Op::Copy { from, to, from_offset, to_offset, len }),
        1 => (place(), 0_i64..20_000).prop_map(|(at, size)| Op::Truncate { at, size }),
        1 => (place(), mode).prop_map(|(at, mode)| Op::Chmod(at, mode)),
        1 => (place(), 1_i64..2_000_000_000).prop_map(|(at, time)| Op::Utimes(at, time)),
        3 => (place(), place()).prop_map(|(from, to)| Op::Link(from, to)),
        4 => (place(), place(), 0_u32..=3).prop_map(|(from, to, flags)| Op::Rename(from, to, flags)),
        3 => place().prop_map(Op::Unlink),
        2 => place().prop_map(Op::Rmdir),
        2 => place().prop_map(Op::List),
        1 => place().prop_map(Op::Readlink),
        1 => (place(), any::<u8>()).prop_map(|(at, byte)| Op::SetXattr(at, byte)),
        1 => place().prop_map(Op::GetXattr),
        1 => place().prop_map(Op::RemoveXattr),
    ]
}

/// What an operation gave: data or an errno.
type Outcome = Result<Vec<u8>, i32>;

fn outcome<T>(result: io::Result<T>, show: impl FnOnce(T) -> Vec<u8>) -> Outcome {
    result.map(show).map_err(|error| error.raw_os_error().unwrap_or(-1))
}

fn nothing<T>(_: T) -> Vec<u8> {
    Vec::new()
}

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Through the passthrough.
struct Through {
    guest: Guest,
    slots: [Option<(u64, u64)>; SLOTS],
}

impl Through {
    /// The node of a place; forgotten by the caller.
    fn find(&self, place: &[usize]) -> io::Result<u64> {
        let mut inode = ROOT;
        for &name in place {
            let next = self.guest.lookup(inode, NAMES[name]).map(|entry| entry.inode);
            if inode != ROOT {
                self.guest.forget(inode);
            }
            inode = next?;
        }
        Ok(inode)
    }

    fn with<T>(&self, place: &[usize], run: impl FnOnce(u64) -> io::Result<T>) -> io::Result<T> {
        let inode = self.find(place)?;
        let result = run(inode);
        self.guest.forget(inode);
        result
    }

    fn at<T>(
        &self,
        place: &[usize],
        run: impl FnOnce(u64, &std::ffi::CStr) -> io::Result<T>,
    ) -> io::Result<T> {
        let (last, parents) = place.split_last().unwrap();
        self.with(parents, |parent| run(parent, &c(NAMES[*last])))
    }

    fn slot(&self, slot: usize) -> io::Result<(u64, u64)> {
        self.slots[slot].ok_or(errno(libc::EBADF))
    }

    fn close(&mut self, slot: usize) {
        if let Some((inode, handle)) = self.slots[slot].take() {
            self.guest.release(inode, handle);
            self.guest.forget(inode);
        }
    }

    /// Drops the lookup that making something counted.
    fn made(&self, entry: io::Result<fuse_backend_rs::api::filesystem::Entry>) -> io::Result<()> {
        entry.map(|entry| self.guest.forget(entry.inode))
    }

    fn names(&mut self, op: &Op) -> Outcome {
        let fs = &self.guest.fs;
        let done = match op {
            Op::Mkdir(at, mode) => {
                self.at(at, |dir, name| self.made(fs.mkdir(&root(), dir, name, *mode, 0)))
            }
            Op::Mkfifo(at) => self.at(at, |dir, name| {
                self.made(fs.mknod(&root(), dir, name, libc::S_IFIFO | 0o644, 0, 0))
            }),
            Op::Symlink(at) => {
                self.at(at, |dir, name| self.made(fs.symlink(&root(), c"../a/b", dir, name)))
            }
            Op::Link(from, to) => self.with(from, |inode| {
                self.at(to, |dir, name| self.made(fs.link(&root(), inode, dir, name)))
            }),
            Op::Rename(from, to, flags) => self.at(from, |dir, name| {
                self.at(to, |new_dir, new| fs.rename(&root(), dir, name, new_dir, new, *flags))
            }),
            Op::Unlink(at) => self.at(at, |dir, name| fs.unlink(&root(), dir, name)),
            Op::Rmdir(at) => self.at(at, |dir, name| fs.rmdir(&root(), dir, name)),
            Op::List(at) => {
                return outcome(self.with(at, |inode| self.guest.names(inode, 2)), |names| {
                    names.join(",").into_bytes()
                });
            }
            Op::Readlink(at) => {
                return outcome(self.with(at, |inode| fs.readlink(&root(), inode)), |text| text);
            }
            other => unreachable!("{other:?} is not about names"),
        };
        outcome(done, nothing)
    }

    fn attributes(&mut self, op: &Op) -> Outcome {
        let fs = &self.guest.fs;
        let mut attr = sys::empty_stat();
        let done = match op {
            Op::Truncate { at, size } => self.with(at, |inode| {
                attr.st_size = *size;
                fs.setattr(&root(), inode, attr, None, SetattrValid::SIZE).map(drop)
            }),
            Op::Chmod(at, mode) => self.with(at, |inode| {
                attr.st_mode = *mode;
                fs.setattr(&root(), inode, attr, None, SetattrValid::MODE).map(drop)
            }),
            Op::Utimes(at, time) => self.with(at, |inode| {
                attr.st_mtime = *time;
                attr.st_atime = *time;
                let valid = SetattrValid::MTIME | SetattrValid::ATIME;
                fs.setattr(&root(), inode, attr, None, valid).map(drop)
            }),
            Op::SetXattr(at, byte) => {
                self.with(at, |inode| fs.setxattr(&root(), inode, c"user.x", &[*byte; 9], 0))
            }
            Op::RemoveXattr(at) => self.with(at, |inode| fs.removexattr(&root(), inode, c"user.x")),
            Op::GetXattr(at) => {
                let value = self.with(at, |inode| fs.getxattr(&root(), inode, c"user.x", 64));
                return outcome(value, |reply| match reply {
                    GetxattrReply::Value(value) => value,
                    GetxattrReply::Count(count) => count.to_ne_bytes().into(),
                });
            }
            other => unreachable!("{other:?} is not about attributes"),
        };
        outcome(done, nothing)
    }

    fn open_files(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Create { at, slot, exclusive, truncate } => {
                self.close(*slot);
                let flags = libc::O_RDWR
                    | if *exclusive { libc::O_EXCL } else { 0 }
                    | if *truncate { libc::O_TRUNC } else { 0 };
                let made = self.at(at, |dir, name| {
                    self.guest.create_as(&root(), dir, name.to_str().unwrap(), flags, 0o644)
                });
                let done = made.map(|(entry, handle, _)| {
                    self.slots[*slot] = Some((entry.inode, handle.unwrap()));
                });
                outcome(done, nothing)
            }
            Op::Tmpfile { at, slot, name } => {
                self.close(*slot);
                let args =
                    CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, umask: 0, fuse_flags: 0 };
                let fs = &self.guest.fs;
                let made =
                    self.with(at, |dir| fs.tmpfile(&root(), &CreateContext::default(), dir, args));
                let linked = made.and_then(|(entry, handle, _)| {
                    let both = (entry.inode, handle.unwrap());
                    let linked = self
                        .at(name, |dir, name| self.made(fs.link(&root(), entry.inode, dir, name)));
                    Ok((both, linked))
                });
                let linked = linked.and_then(|(both, linked)| {
                    self.slots[*slot] = Some(both);
                    linked
                });
                outcome(linked, nothing)
            }
            Op::Open { at, slot, writes } => {
                self.close(*slot);
                let flags = if *writes { libc::O_RDWR } else { libc::O_RDONLY };
                let opened = self.find(at).and_then(|inode| {
                    self.guest
                        .open(inode, flags)
                        .map(|handle| (inode, handle))
                        .inspect_err(|_| self.guest.forget(inode))
                });
                outcome(opened.map(|both| self.slots[*slot] = Some(both)), nothing)
            }
            Op::Close(slot) => {
                self.close(*slot);
                Ok(Vec::new())
            }
            other => self.data(other),
        }
    }

    fn data(&self, op: &Op) -> Outcome {
        let fs = &self.guest.fs;
        match op {
            Op::Write { slot, offset, len, byte } => outcome(
                self.slot(*slot).and_then(|(inode, handle)| {
                    self.guest.write(inode, handle, *offset, &vec![*byte; *len])
                }),
                |n| n.to_ne_bytes().into(),
            ),
            Op::Read { slot, offset, len } => outcome(
                self.slot(*slot)
                    .and_then(|(inode, handle)| self.guest.read(inode, handle, *offset, *len)),
                |data| data,
            ),
            Op::Allocate { slot, mode, offset, len } => outcome(
                self.slot(*slot).and_then(|(inode, handle)| {
                    fs.fallocate(&root(), inode, handle, *mode as u32, *offset, *len)
                }),
                nothing,
            ),
            Op::Seek { slot, offset, whence } => outcome(
                self.slot(*slot).and_then(|(inode, handle)| {
                    fs.lseek(&root(), inode, handle, *offset, *whence as u32)
                }),
                |at| at.to_ne_bytes().into(),
            ),
            Op::Copy { from, to, from_offset, to_offset, len } => {
                let both = self.slot(*from).and_then(|from| Ok((from, self.slot(*to)?)));
                let copied = both.and_then(|((inode_in, handle_in), (inode_out, handle_out))| {
                    let range = CopyRange {
                        inode_in,
                        handle_in,
                        offset_in: *from_offset,
                        inode_out,
                        handle_out,
                        offset_out: *to_offset,
                        len: *len,
                        flags: 0,
                    };
                    fs.copy_file_range(&root(), &range)
                });
                outcome(copied, |n| n.to_ne_bytes().into())
            }
            other => unreachable!("{other:?} is not about data"),
        }
    }
}

/// Directly.
struct Direct {
    dir: tempfile::TempDir,
    slots: [Option<File>; SLOTS],
}

fn open_path(dir: impl AsFd, name: &str, more: OFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | more;
    Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?)
}

impl Direct {
    fn parent(&self, place: &[usize]) -> io::Result<OwnedFd> {
        let mut dir: OwnedFd = File::open(self.dir.path())?.into();
        for &name in place {
            dir = open_path(&dir, NAMES[name], OFlags::empty())?;
        }
        Ok(dir)
    }

    fn path(&self, place: &[usize]) -> io::Result<PathBuf> {
        self.parent(place)?; // no symbolic link on the way
        Ok(place.iter().fold(self.dir.path().to_owned(), |path, &name| path.join(NAMES[name])))
    }

    fn at(&self, place: &[usize]) -> io::Result<(OwnedFd, &'static str)> {
        let (last, parents) = place.split_last().unwrap();
        Ok((self.parent(parents)?, NAMES[*last]))
    }

    /// Regular files and directories only, as the passthrough has it.
    fn open(&self, place: &[usize], flags: OFlags) -> io::Result<File> {
        let path = self.path(place)?;
        let kind = fs::symlink_metadata(&path)?.file_type();
        if !kind.is_file() && !kind.is_dir() {
            return Err(errno(libc::EBADF));
        }
        Ok(rustix::fs::open(path, flags | OFlags::NOFOLLOW, Mode::empty())?.into())
    }

    fn slot(&self, slot: usize) -> io::Result<&File> {
        self.slots[slot].as_ref().ok_or(errno(libc::EBADF))
    }

    fn names(&mut self, op: &Op) -> Outcome {
        let done: io::Result<()> = (|| {
            match op {
                Op::Mkdir(at, mode) => {
                    let (dir, name) = self.at(at)?;
                    rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(*mode))?;
                }
                Op::Mkfifo(at) => {
                    let (dir, name) = self.at(at)?;
                    rustix::fs::mknodat(dir, name, FileType::Fifo, Mode::from_raw_mode(0o644), 0)?;
                }
                Op::Symlink(at) => {
                    let (dir, name) = self.at(at)?;
                    rustix::fs::symlinkat("../a/b", dir, name)?;
                }
                Op::Link(from, to) => {
                    self.parent(from)?;
                    let ((from, name), (to, new)) = (self.at(from)?, self.at(to)?);
                    rustix::fs::linkat(from, name, to, new, AtFlags::empty())?;
                }
                Op::Rename(from, to, flags) => {
                    let ((from, name), (to, new)) = (self.at(from)?, self.at(to)?);
                    let flags = RenameFlags::from_bits(*flags).unwrap();
                    rustix::fs::renameat_with(from, name, to, new, flags)?;
                }
                Op::Unlink(at) => {
                    let (dir, name) = self.at(at)?;
                    rustix::fs::unlinkat(dir, name, AtFlags::empty())?;
                }
                Op::Rmdir(at) => {
                    let (dir, name) = self.at(at)?;
                    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?;
                }
                other => unreachable!("{other:?} is not about names"),
            }
            Ok(())
        })();
        outcome(done, nothing)
    }

    fn shown(&self, op: &Op) -> Outcome {
        match op {
            Op::List(at) => {
                let names = self.open(at, OFlags::RDONLY | OFlags::DIRECTORY).and_then(|_| {
                    let entries = fs::read_dir(self.path(at)?)?;
                    let mut names: Vec<String> = entries
                        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                        .collect();
                    names.sort();
                    Ok(names)
                });
                outcome(names, |names| names.join(",").into_bytes())
            }
            Op::Readlink(at) => {
                let text = self
                    .parent(at)
                    .and_then(|fd| Ok(rustix::fs::readlinkat(fd, c"", Vec::new())?.into_bytes()));
                outcome(text, |text| text)
            }
            other => unreachable!("{other:?} shows nothing"),
        }
    }

    fn attributes(&mut self, op: &Op) -> Outcome {
        let done: io::Result<Vec<u8>> = (|| {
            match op {
                Op::Truncate { at, size } => {
                    let file = self.open(at, OFlags::WRONLY)?;
                    rustix::fs::ftruncate(file, (*size).try_into().unwrap())?;
                }
                Op::Chmod(at, mode) => {
                    let mode = Mode::from_raw_mode(*mode);
                    let fd = self.parent(at)?;
                    let name = sys::FdName::new(fd.as_fd());
                    let proc = File::open("/proc/self/fd")?;
                    rustix::fs::chmodat(proc, name.as_c_str(), mode, AtFlags::empty())?;
                }
                Op::Utimes(at, time) => {
                    let (dir, name) = self.at(at)?;
                    let time = rustix::fs::Timespec { tv_sec: *time, tv_nsec: 0 };
                    let times =
                        rustix::fs::Timestamps { last_access: time, last_modification: time };
                    rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)?;
                }
                Op::SetXattr(at, byte) => {
                    rustix::fs::lsetxattr(
                        self.path(at)?,
                        "user.x",
                        &[*byte; 9],
                        XattrFlags::empty(),
                    )?;
                }
                Op::RemoveXattr(at) => rustix::fs::lremovexattr(self.path(at)?, "user.x")?,
                Op::GetXattr(at) => {
                    let mut value = vec![0; 64];
                    let n = rustix::fs::lgetxattr(self.path(at)?, "user.x", &mut value)?;
                    value.truncate(n);
                    return Ok(value);
                }
                other => unreachable!("{other:?} is not about attributes"),
            }
            Ok(Vec::new())
        })();
        outcome(done, |data| data)
    }

    fn open_files(&mut self, op: &Op) -> Outcome {
        match op {
            Op::Create { at, slot, exclusive, truncate } => {
                self.slots[*slot] = None;
                let done = self.create(at, *exclusive, *truncate);
                outcome(done.map(|file| self.slots[*slot] = Some(file)), nothing)
            }
            Op::Tmpfile { at, slot, name } => {
                self.slots[*slot] = None;
                let made = self.parent(at).and_then(|dir| {
                    let flags = OFlags::TMPFILE | OFlags::RDWR;
                    Ok(rustix::fs::openat(dir, ".", flags, Mode::from_raw_mode(0o644))?)
                });
                let linked = made.and_then(|fd| {
                    let from = sys::FdName::new(fd.as_fd()).as_c_str().to_owned();
                    self.slots[*slot] = Some(fd.into());
                    let (dir, name) = self.at(name)?;
                    let proc = File::open("/proc/self/fd")?;
                    rustix::fs::linkat(proc, from, dir, name, AtFlags::SYMLINK_FOLLOW)?;
                    Ok(())
                });
                outcome(linked, nothing)
            }
            Op::Open { at, slot, writes } => {
                self.slots[*slot] = None;
                let flags = if *writes { OFlags::RDWR } else { OFlags::RDONLY };
                outcome(self.open(at, flags).map(|file| self.slots[*slot] = Some(file)), nothing)
            }
            Op::Close(slot) => {
                self.slots[*slot] = None;
                Ok(Vec::new())
            }
            other => self.data(other),
        }
    }

    fn create(&self, at: &[usize], exclusive: bool, truncate: bool) -> io::Result<File> {
        let (dir, name) = self.at(at)?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW;
        match rustix::fs::openat(&dir, name, flags | OFlags::EXCL, Mode::from_raw_mode(0o644)) {
            Err(rustix::io::Errno::EXIST) if !exclusive => {}
            other => return Ok(other?.into()),
        }
        let path = open_path(&dir, name, OFlags::empty())?;
        match FileType::from_raw_mode(rustix::fs::fstat(path)?.st_mode) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(errno(libc::EISDIR)),
            _ => return Err(errno(libc::ENXIO)),
        }
        let flags = OFlags::RDWR | if truncate { OFlags::TRUNC } else { OFlags::empty() };
        Ok(rustix::fs::openat(dir, name, flags, Mode::empty())?.into())
    }

    fn data(&self, op: &Op) -> Outcome {
        match op {
            Op::Write { slot, offset, len, byte } => outcome(
                self.slot(*slot).and_then(|file| file.write_at(&vec![*byte; *len], *offset)),
                |n| n.to_ne_bytes().into(),
            ),
            Op::Read { slot, offset, len } => {
                let mut data = vec![0; *len];
                let n = self.slot(*slot).and_then(|file| file.read_at(&mut data, *offset));
                outcome(n, |n| data[..n].to_vec())
            }
            Op::Allocate { slot, mode, offset, len } => {
                let (offset, len) = (offset.cast_signed(), len.cast_signed());
                let done = self
                    .slot(*slot)
                    .and_then(|file| sys::fallocate(file.as_fd(), *mode, offset, len));
                outcome(done, nothing)
            }
            Op::Seek { slot, offset, whence } => {
                let at = self
                    .slot(*slot)
                    .and_then(|file| sys::lseek(file.as_fd(), offset.cast_signed(), *whence));
                outcome(at, |at| at.to_ne_bytes().into())
            }
            Op::Copy { from, to, from_offset, to_offset, len } => {
                let copied = self.slot(*from).and_then(|from| {
                    let mut from_offset = *from_offset;
                    let mut to_offset = *to_offset;
                    let (to, len) = (self.slot(*to)?, usize::try_from(*len).unwrap());
                    let n = rustix::fs::copy_file_range(
                        from,
                        Some(&mut from_offset),
                        to,
                        Some(&mut to_offset),
                        len,
                    )?;
                    Ok(u64::try_from(n).unwrap())
                });
                outcome(copied, |n| n.to_ne_bytes().into())
            }
            other => unreachable!("{other:?} is not about data"),
        }
    }
}

/// Everything under `path` worth comparing, one line an inode name.
fn tree(path: &Path, prefix: &str, out: &mut Vec<String>) {
    let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(Result::unwrap).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let meta = fs::symlink_metadata(entry.path()).unwrap();
        let name = format!("{prefix}/{}", entry.file_name().display());
        let kind = meta.file_type();
        let data = if kind.is_file() { fs::read(entry.path()).unwrap() } else { Vec::new() };
        let target = fs::read_link(entry.path()).ok();
        let mut value = [0; 64];
        let xattr = rustix::fs::lgetxattr(entry.path(), "user.x", &mut value).ok();
        let size = if kind.is_dir() { 0 } else { meta.size() };
        let digest =
            data.iter().fold(0_u64, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        out.push(format!(
            "{name} {:o} {} {size} {digest:x} {target:?} {:?} {} {}",
            meta.mode(),
            meta.nlink(),
            xattr.map(|n| value[..n].to_vec()),
            meta.uid(),
            if meta.mtime() < 1_700_000_000 { meta.mtime() } else { 0 },
        ));
        if kind.is_dir() {
            tree(&entry.path(), &name, out);
        }
    }
}

fn compare(mode: InodeFileHandles, ops: &[Op]) {
    let mut through = Through { guest: Guest::with_handles(mode), slots: [None; SLOTS] };
    through.guest.fs.prepare_thread().unwrap();
    let mut direct =
        Direct { dir: tempfile::TempDir::new().unwrap(), slots: [const { None }; SLOTS] };
    for (step, op) in ops.iter().enumerate() {
        let (got, expected) = match op {
            Op::List(_) | Op::Readlink(_) => (through.names(op), direct.shown(op)),
            Op::Mkdir(..)
            | Op::Mkfifo(_)
            | Op::Symlink(_)
            | Op::Link(..)
            | Op::Rename(..)
            | Op::Unlink(_)
            | Op::Rmdir(_) => (through.names(op), direct.names(op)),
            Op::Truncate { .. }
            | Op::Chmod(..)
            | Op::Utimes(..)
            | Op::SetXattr(..)
            | Op::GetXattr(_)
            | Op::RemoveXattr(_) => (through.attributes(op), direct.attributes(op)),
            _ => (through.open_files(op), direct.open_files(op)),
        };
        assert_eq!(got, expected, "step {step}: {op:?} of {ops:#?}");
    }
    let (mut left, mut right) = (Vec::new(), Vec::new());
    tree(through.guest.dir.path(), "", &mut left);
    tree(direct.dir.path(), "", &mut right);
    assert_eq!(left, right, "{ops:#?}");
    for slot in 0..SLOTS {
        through.close(slot);
    }
    assert_eq!(
        through.guest.fs.inode_count(),
        0,
        "a lookup was counted and not given out: {ops:#?}"
    );
    assert_eq!(through.guest.fs.open_count(), 0);
}

fn cases() -> u32 {
    std::env::var("OUTBOARD_PROPERTY_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(64)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_passthrough_does_what_the_system_calls_do(
        handles in any::<bool>(),
        ops in prop::collection::vec(op(), 1..120),
    ) {
        let mode = if handles { InodeFileHandles::Prefer } else { InodeFileHandles::Never };
        compare(mode, &ops);
    }
}
