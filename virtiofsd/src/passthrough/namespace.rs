//! Names: MKDIR, MKNOD, SYMLINK, LINK, UNLINK, RMDIR, RENAME, READLINK.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use fuse_backend_rs::api::filesystem::{Context, Entry};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};

use super::sys::{self, FdName};
use super::{CreateContext, PassthroughFs, component, errno};

/// What to make.
#[derive(Debug, Clone, Copy)]
pub(super) enum New<'a> {
    /// A directory with this mode.
    Directory(u32),
    /// Anything else but a link: mode with type, device number as the kernel encodes it.
    Node(u32, u32),
    /// A symbolic link to this.
    Symlink(&'a CStr),
}

impl PassthroughFs {
    /// MKDIR, MKNOD, SYMLINK: makes `new` as the caller and looks it up.
    pub(super) fn do_make(
        &self,
        ctx: &Context,
        extra: &CreateContext<'_>,
        parent: u64,
        name: &CStr,
        new: New<'_>,
        umask: u32,
    ) -> io::Result<Entry> {
        self.writable()?;
        component(name)?;
        let dir = self.node_fd(parent)?;
        {
            let _masked = self.masked(umask)?;
            let _acting = self.act_as(ctx, extra)?;
            make(dir.as_fd(), name, new)?;
        }
        if extra.security.is_some() {
            self.label_new(dir.as_fd(), name, new, extra)?;
        }
        self.do_lookup(parent, name)
    }

    /// Labels what was just made; takes it away again if that fails.
    fn label_new(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        new: New<'_>,
        extra: &CreateContext<'_>,
    ) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = rustix::fs::openat(dir, name, flags, Mode::empty())?;
        self.label(path.as_fd(), extra).inspect_err(|_| {
            let flags = match new {
                New::Directory(_) => AtFlags::REMOVEDIR,
                New::Node(..) | New::Symlink(_) => AtFlags::empty(),
            };
            let _ = rustix::fs::unlinkat(dir, name, flags);
        })
    }

    /// LINK: another name for `id`.
    pub(super) fn do_link(&self, id: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.writable()?;
        component(name)?;
        let fd = self.node_fd(id)?;
        let dir = self.node_fd(parent)?;
        let from = FdName::new(fd.as_fd());
        rustix::fs::linkat(self.proc_fd(), from.as_c_str(), &dir, name, AtFlags::SYMLINK_FOLLOW)?;
        self.do_lookup(parent, name)
    }

    /// UNLINK and RMDIR.
    pub(super) fn do_remove(&self, parent: u64, name: &CStr, directory: bool) -> io::Result<()> {
        self.writable()?;
        component(name)?;
        let dir = self.node_fd(parent)?;
        let victim = sys::statx(dir.as_fd(), name, 0, sys::STATX_MASK)?;
        let flags = if directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&dir, name, flags)?;
        self.forget_identity(&victim);
        Ok(())
    }

    /// RENAME and RENAME2.
    pub(super) fn do_rename(
        &self,
        parent: u64,
        name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.writable()?;
        component(name)?;
        component(new_name)?;
        let from = self.node_fd(parent)?;
        let to = self.node_fd(new_parent)?;
        let flags = RenameFlags::from_bits(flags).ok_or(errno(libc::EINVAL))?;
        let replaces = !flags.intersects(RenameFlags::EXCHANGE | RenameFlags::NOREPLACE);
        let victim = match sys::statx(to.as_fd(), new_name, 0, sys::STATX_MASK) {
            Ok(victim) if replaces => Some(victim),
            _ => None,
        };
        if flags.is_empty() {
            rustix::fs::renameat(&from, name, &to, new_name)?;
        } else {
            rustix::fs::renameat_with(&from, name, &to, new_name, flags)?;
        }
        if let Some(victim) = victim {
            // Renaming one of an inode's names onto another of them does nothing at all.
            let now = sys::statx(to.as_fd(), new_name, 0, sys::STATX_MASK);
            let same = now.is_ok_and(|now| super::key_of(&now) == super::key_of(&victim));
            if !same {
                self.forget_identity(&victim);
            }
        }
        Ok(())
    }

    /// READLINK.
    pub(super) fn do_readlink(&self, id: u64) -> io::Result<Vec<u8>> {
        let fd = self.node_fd(id)?;
        let mut room = [MaybeUninit::<u8>::uninit(); libc::PATH_MAX as usize];
        let (target, _) = rustix::fs::readlinkat_raw(&fd, c"", &mut room)?;
        Ok(target.to_vec())
    }
}

fn make(dir: BorrowedFd<'_>, name: &CStr, new: New<'_>) -> io::Result<()> {
    match new {
        New::Directory(mode) => {
            rustix::fs::mkdirat(dir, name, Mode::from_raw_mode(mode & 0o7777))?;
        }
        New::Node(mode, rdev) => {
            let kind = match mode & libc::S_IFMT {
                0 => FileType::RegularFile,
                _ => FileType::from_raw_mode(mode),
            };
            if matches!(kind, FileType::Unknown | FileType::Directory | FileType::Symlink) {
                return Err(errno(libc::EINVAL));
            }
            let mode = Mode::from_raw_mode(mode & 0o7777);
            rustix::fs::mknodat(dir, name, kind, mode, rdev.into())?;
        }
        New::Symlink(target) => rustix::fs::symlinkat(target, dir, name)?,
    }
    Ok(())
}
