//! GETATTR, SETATTR, STATX, STATFS, ACCESS.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{SetattrValid, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::Context;
use rustix::fs::{Access, AtFlags, Gid, Mode, Timespec, Timestamps, Uid};

use super::data::OpenFile;
use super::sys::{self, FdName};
use super::{CreateContext, PassthroughFs, credentials, errno};
use crate::fuse::wire::init;
use crate::inode_store::NodeFd;

/// Where to find the inode of a request: an open file or the node.
enum Target {
    Open(Arc<OpenFile>),
    Node(NodeFd),
}

impl AsFd for Target {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        match self {
            Self::Open(file) => file.fd.as_fd(),
            Self::Node(fd) => fd.as_fd(),
        }
    }
}

impl PassthroughFs {
    /// `stat` as the guest shall see it.
    #[inline]
    pub(super) fn guest_stat(&self, stat: &libc::statx) -> stat64 {
        let mut out = sys::empty_stat();
        out.st_ino = stat.stx_ino;
        out.st_mode = stat.stx_mode.into();
        out.st_nlink = stat.stx_nlink.into();
        out.st_uid = self.config.uid_map.guest(stat.stx_uid);
        out.st_gid = self.config.gid_map.guest(stat.stx_gid);
        out.st_dev = libc::makedev(stat.stx_dev_major, stat.stx_dev_minor);
        out.st_rdev = libc::makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
        out.st_size = stat.stx_size.cast_signed();
        out.st_blksize = stat.stx_blksize.into();
        out.st_blocks = stat.stx_blocks.cast_signed();
        out.st_atime = stat.stx_atime.tv_sec;
        out.st_atime_nsec = stat.stx_atime.tv_nsec.into();
        out.st_mtime = stat.stx_mtime.tv_sec;
        out.st_mtime_nsec = stat.stx_mtime.tv_nsec.into();
        out.st_ctime = stat.stx_ctime.tv_sec;
        out.st_ctime_nsec = stat.stx_ctime.tv_nsec.into();
        out
    }

    fn target(&self, id: u64, handle: Option<u64>) -> io::Result<Target> {
        match handle {
            Some(handle) => self.file(id, handle).map(Target::Open),
            None => self.node_fd(id).map(Target::Node),
        }
    }

    /// As [`Self::target`], but a handle of a directory or a stale one does for the node.
    fn statx_of(
        &self,
        id: u64,
        handle: Option<u64>,
        flags: i32,
        mask: u32,
    ) -> io::Result<libc::statx> {
        if let Some(handle) = handle
            && let Ok(file) = self.file(id, handle)
        {
            return sys::statx(file.fd.as_fd(), c"", flags, mask);
        }
        self.statx_node(id, flags, mask)
    }

    /// GETATTR.
    #[inline]
    pub(super) fn do_getattr(
        &self,
        id: u64,
        handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let file = handle.and_then(|handle| self.file(id, handle).ok());
        let stat = match file {
            Some(file) => sys::fstat(file.fd.as_fd()),
            None => match self.inodes.fd(id) {
                Some(fd) => sys::fstat(fd.as_fd()),
                None => {
                    let stat = self.statx_cold(id, 0, libc::STATX_BASIC_STATS)?;
                    return Ok((self.guest_stat(&stat), self.timeout));
                }
            },
        };
        let mut stat = stat?;
        stat.st_uid = self.config.uid_map.guest(stat.st_uid);
        stat.st_gid = self.config.gid_map.guest(stat.st_gid);
        Ok((stat, self.timeout))
    }

    /// STATX.
    pub(super) fn do_statx(
        &self,
        id: u64,
        handle: Option<u64>,
        flags: u32,
        mask: u32,
    ) -> io::Result<(libc::statx, Duration)> {
        let sync = flags.cast_signed() & (libc::AT_STATX_FORCE_SYNC | libc::AT_STATX_DONT_SYNC);
        let mask = (mask | libc::STATX_BASIC_STATS) & (libc::STATX_BASIC_STATS | libc::STATX_BTIME);
        let mut stat = self.statx_of(id, handle, sync, mask)?;
        stat.stx_uid = self.config.uid_map.guest(stat.stx_uid);
        stat.stx_gid = self.config.gid_map.guest(stat.stx_gid);
        // The host's mounts are no business of the guest's.
        stat.stx_mask &= libc::STATX_BASIC_STATS | libc::STATX_BTIME;
        stat.stx_mnt_id = 0;
        Ok((stat, self.timeout))
    }

    /// SETATTR.
    pub(super) fn do_setattr(
        &self,
        id: u64,
        attr: &stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.writable()?;
        let target = self.target(id, handle)?;
        let kill = self.has(init::HANDLE_KILLPRIV_V2) && valid.contains(SetattrValid::KILL_SUIDGID);
        if valid.contains(SetattrValid::MODE) {
            credentials::set_fsetid(true)?;
            set_mode(self, &target, attr.st_mode)?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            credentials::set_fsetid(true)?;
            self.set_owner(&target, attr, valid)?;
            self.drop_moved_capability(target.as_fd())?;
        }
        if valid.contains(SetattrValid::SIZE) {
            credentials::set_fsetid(!kill)?;
            self.set_size(id, &target, attr.st_size)?;
            self.drop_moved_capability(target.as_fd())?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            set_times(&target, attr, valid)?;
        }
        let stat = sys::statx(target.as_fd(), c"", 0, libc::STATX_BASIC_STATS)?;
        Ok((self.guest_stat(&stat), self.timeout))
    }

    fn set_owner(&self, target: &Target, attr: &stat64, valid: SetattrValid) -> io::Result<()> {
        let uid = match valid.contains(SetattrValid::UID) {
            true => Some(self.config.uid_map.host(attr.st_uid).ok_or(errno(libc::EPERM))?),
            false => None,
        };
        let gid = match valid.contains(SetattrValid::GID) {
            true => Some(self.config.gid_map.host(attr.st_gid).ok_or(errno(libc::EPERM))?),
            false => None,
        };
        if uid == Some(u32::MAX) || gid == Some(u32::MAX) {
            return Err(errno(libc::EINVAL));
        }
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(target.as_fd(), c"", uid, gid, flags)?;
        Ok(())
    }

    fn set_size(&self, id: u64, target: &Target, size: i64) -> io::Result<()> {
        let size = u64::try_from(size).map_err(|_unfit| errno(libc::EINVAL))?;
        if let Target::Open(file) = target
            && file.writes
        {
            rustix::fs::ftruncate(file.fd.as_fd(), size)?;
            return Ok(());
        }
        let fd = self.open_node(id, libc::O_WRONLY | libc::O_NONBLOCK)?;
        rustix::fs::ftruncate(&fd, size)?;
        Ok(())
    }

    /// STATFS.
    pub(super) fn do_statfs(&self, id: u64) -> io::Result<statvfs64> {
        sys::statvfs(self.node_fd(id)?.as_fd())
    }

    /// ACCESS: only sent by kernels that leave permissions to the server.
    pub(super) fn do_access(&self, ctx: &Context, id: u64, mask: u32) -> io::Result<()> {
        let access = Access::from_bits(mask).ok_or(errno(libc::EINVAL))?;
        if access.contains(Access::WRITE_OK) {
            self.writable()?;
        }
        let fd = self.node_fd(id)?;
        let name = FdName::new(fd.as_fd());
        let _acting = self.act_as(ctx, &CreateContext::default())?;
        rustix::fs::accessat(self.proc_fd(), name.as_c_str(), access, AtFlags::EACCESS)?;
        Ok(())
    }
}

fn set_mode(fs: &PassthroughFs, target: &Target, mode: u32) -> io::Result<()> {
    let mode = Mode::from_raw_mode(mode & 0o7777);
    match target {
        Target::Open(file) => rustix::fs::fchmod(file.fd.as_fd(), mode)?,
        Target::Node(fd) => {
            let name = FdName::new(fd.as_fd());
            rustix::fs::chmodat(fs.proc_fd(), name.as_c_str(), mode, AtFlags::empty())?;
        }
    }
    Ok(())
}

fn set_times(target: &Target, attr: &stat64, valid: SetattrValid) -> io::Result<()> {
    let pick = |set, now, tv_sec, tv_nsec| {
        if !valid.contains(set) {
            return Timespec { tv_sec: 0, tv_nsec: libc::UTIME_OMIT };
        }
        if valid.contains(now) {
            return Timespec { tv_sec: 0, tv_nsec: libc::UTIME_NOW };
        }
        Timespec { tv_sec, tv_nsec }
    };
    for nsec in [attr.st_atime_nsec, attr.st_mtime_nsec] {
        // The special values are the kernel's to give, not the guest's.
        if !(0..1_000_000_000).contains(&nsec) {
            return Err(errno(libc::EINVAL));
        }
    }
    let times = Timestamps {
        last_access: pick(
            SetattrValid::ATIME,
            SetattrValid::ATIME_NOW,
            attr.st_atime,
            attr.st_atime_nsec,
        ),
        last_modification: pick(
            SetattrValid::MTIME,
            SetattrValid::MTIME_NOW,
            attr.st_mtime,
            attr.st_mtime_nsec,
        ),
    };
    rustix::fs::utimensat(target.as_fd(), c"", &times, AtFlags::EMPTY_PATH)?;
    Ok(())
}
