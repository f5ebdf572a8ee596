//! FUSE messages as they travel: layouts and constants. `include/uapi/linux/fuse.h`, version 7.45.
//!
//! Everything here is plain data in the host's byte order; nothing is trusted. Parsing is in
//! [`request`](super::request).
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![allow(missing_debug_implementations, reason = "zerocopy's derives make helper types without it")]

use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{stat64, statvfs64};
use fuse_backend_rs::api::filesystem::Entry;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Major version of the protocol.
pub const KERNEL_VERSION: u32 = 7;
/// Minor version of the protocol that this server speaks.
pub const KERNEL_MINOR_VERSION: u32 = 45;
/// The oldest minor version that a driver may speak: virtio-fs came with 7.31 kernels.
pub const MIN_MINOR_VERSION: u32 = 27;

/// INIT flags: `flags` in the low half, `flags2` in the high half.
pub mod init {
    /// Read requests may overlap.
    pub const ASYNC_READ: u64 = 1 << 0;
    /// POSIX locks are the server's.
    pub const POSIX_LOCKS: u64 = 1 << 1;
    /// OPEN may carry `O_TRUNC`.
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    /// `.` and `..` can be looked up.
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    /// Writes may be larger than a page.
    pub const BIG_WRITES: u64 = 1 << 5;
    /// The server applies the umask.
    pub const DONT_MASK: u64 = 1 << 6;
    /// BSD locks are the server's.
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    /// Cached pages go when the modification time changes.
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    /// READDIRPLUS is there.
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    /// The kernel chooses between READDIR and READDIRPLUS.
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    /// Direct I/O may be asynchronous.
    pub const ASYNC_DIO: u64 = 1 << 15;
    /// The guest's page cache collects writes.
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    /// OPEN may be answered with `ENOSYS`.
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    /// Lookups and READDIR of one directory may overlap.
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    /// POSIX ACLs are kept as extended attributes and enforced by the guest.
    pub const POSIX_ACL: u64 = 1 << 20;
    /// INIT's reply has `max_pages`.
    pub const MAX_PAGES: u64 = 1 << 22;
    /// Targets of symbolic links are cached.
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    /// OPENDIR may be answered with `ENOSYS`.
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    /// Cached pages go only when told.
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    /// INIT's reply has `map_alignment`.
    pub const MAP_ALIGNMENT: u64 = 1 << 26;
    /// Roots of submounts are marked.
    pub const SUBMOUNTS: u64 = 1 << 27;
    /// The server clears set-user-id, set-group-id and capabilities.
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    /// SETXATTR is the long form.
    pub const SETXATTR_EXT: u64 = 1 << 29;
    /// `flags2` counts.
    pub const INIT_EXT: u64 = 1 << 30;
    /// Creation carries a security label.
    pub const SECURITY_CTX: u64 = 1 << 32;
    /// DAX can be chosen for each inode.
    pub const HAS_INODE_DAX: u64 = 1 << 33;
    /// Creation carries the parent's group, if the caller has it.
    pub const CREATE_SUPP_GROUP: u64 = 1 << 34;
    /// Files open with DIRECT_IO can be mapped.
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    /// No file handles for NFS: `.` and `..` are never looked up.
    pub const NO_EXPORT_SUPPORT: u64 = 1 << 38;
    /// Id-mapped mounts: only creation carries the caller's ids.
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// GETATTR: the handle counts.
pub const GETATTR_FH: u32 = 1 << 0;
/// SETATTR: the handle counts.
pub const FATTR_FH: u32 = 1 << 6;
/// READ: the lock owner counts.
pub const READ_LOCKOWNER: u32 = 1 << 1;
/// WRITE: from the page cache, with a guessed handle.
pub const WRITE_CACHE: u32 = 1 << 0;
/// WRITE: the lock owner counts.
pub const WRITE_LOCKOWNER: u32 = 1 << 1;
/// WRITE: clear set-user-id and set-group-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// RELEASE: flush first.
pub const RELEASE_FLUSH: u32 = 1 << 0;
/// RELEASE: drop the BSD lock.
pub const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
/// FSYNC: data only.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// SETXATTR: clear the set-group-id bit.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// SETUPMAPPING: for writing.
pub const SETUPMAPPING_FLAG_WRITE: u64 = 1 << 0;
/// Extension records up to this type are security contexts; the type is their number.
pub const MAX_NR_SECCTX: u32 = 31;
/// Extension record of supplementary groups.
pub const EXT_GROUPS: u32 = 32;

macro_rules! layouts {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty,)* } = $size:literal)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
            #[repr(C)]
            #[allow(missing_docs, reason = "fields are named and explained in linux/fuse.h")]
            pub struct $name { $(pub $field: $ty,)* }
            const _: () = assert!(size_of::<$name>() == $size);
        )*
    };
}

layouts! {
    /// `fuse_in_header`.
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    } = 40
    /// `fuse_out_header`.
    OutHeader { len: u32, error: i32, unique: u64, } = 16
    /// `fuse_attr`.
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32,
        mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32,
        blksize: u32, flags: u32,
    } = 88
    /// `fuse_entry_out`.
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32,
        attr_valid_nsec: u32, attr: Attr,
    } = 128
    /// `fuse_attr_out`.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, } = 104
    /// `fuse_forget_one`.
    ForgetOne { nodeid: u64, nlookup: u64, } = 16
    /// `fuse_batch_forget_in`.
    BatchForgetIn { count: u32, dummy: u32, } = 8
    /// `fuse_getattr_in`.
    GetattrIn { getattr_flags: u32, dummy: u32, fh: u64, } = 16
    /// `fuse_setattr_in`.
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64,
        ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32,
        gid: u32, unused5: u32,
    } = 88
    /// `fuse_mknod_in`.
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32, } = 16
    /// `fuse_mkdir_in`.
    MkdirIn { mode: u32, umask: u32, } = 8
    /// `fuse_rename2_in`.
    Rename2In { newdir: u64, flags: u32, padding: u32, } = 16
    /// `fuse_open_in`.
    OpenIn { flags: u32, open_flags: u32, } = 8
    /// `fuse_create_in`.
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, } = 16
    /// `fuse_open_out`.
    OpenOut { fh: u64, open_flags: u32, backing_id: u32, } = 16
    /// `fuse_release_in`.
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, } = 24
    /// `fuse_flush_in`.
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, } = 24
    /// `fuse_read_in`.
    ReadIn {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    } = 40
    /// `fuse_write_in`.
    WriteIn {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    } = 40
    /// `fuse_write_out`.
    WriteOut { size: u32, padding: u32, } = 8
    /// `fuse_kstatfs`.
    Kstatfs {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32,
        frsize: u32, padding: u32, spare: [u32; 6],
    } = 80
    /// `fuse_fsync_in`.
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32, } = 16
    /// The short form of `fuse_setxattr_in`.
    SetxattrIn { size: u32, flags: u32, } = 8
    /// What SETXATTR_EXT adds to it.
    SetxattrExt { setxattr_flags: u32, padding: u32, } = 8
    /// `fuse_getxattr_in` and `fuse_getxattr_out`.
    GetxattrSize { size: u32, padding: u32, } = 8
    /// `fuse_file_lock`.
    FileLock { start: u64, end: u64, lock_type: u32, pid: u32, } = 24
    /// `fuse_lk_in`.
    LkIn { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32, } = 48
    /// `fuse_access_in`.
    AccessIn { mask: u32, padding: u32, } = 8
    /// The part of `fuse_init_in` that all versions have.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, } = 16
    /// `fuse_init_out`.
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16,
        flags2: u32, max_stack_depth: u32, request_timeout: u16, unused: [u16; 11],
    } = 64
    /// `fuse_bmap_in`.
    BmapIn { block: u64, blocksize: u32, padding: u32, } = 16
    /// `fuse_ioctl_in`.
    IoctlIn { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, } = 32
    /// `fuse_ioctl_out`.
    IoctlOut { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, } = 16
    /// `fuse_poll_in`.
    PollIn { fh: u64, kh: u64, flags: u32, events: u32, } = 24
    /// `fuse_poll_out`.
    PollOut { revents: u32, padding: u32, } = 8
    /// `fuse_fallocate_in`.
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, } = 32
    /// `fuse_dirent`, without the name.
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32, } = 24
    /// `fuse_lseek_in`.
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32, } = 24
    /// `fuse_copy_file_range_in`.
    CopyFileRangeIn {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    } = 56
    /// `fuse_setupmapping_in`.
    SetupmappingIn { fh: u64, foffset: u64, len: u64, flags: u64, moffset: u64, } = 40
    /// `fuse_removemapping_one`.
    RemovemappingOne { moffset: u64, len: u64, } = 16
    /// `fuse_statx_in`.
    StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, } = 24
    /// `fuse_sx_time`.
    SxTime { tv_sec: i64, tv_nsec: u32, reserved: i32, } = 16
    /// `fuse_statx`.
    Statx {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16,
        spare0: u16, ino: u64, size: u64, blocks: u64, attributes_mask: u64, atime: SxTime,
        btime: SxTime, ctime: SxTime, mtime: SxTime, rdev_major: u32, rdev_minor: u32, dev_major: u32,
        dev_minor: u32, spare2: [u64; 14],
    } = 256
    /// `fuse_statx_out`.
    StatxOut { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx, } = 288
    /// Head of a record of what a creating request brings along: `fuse_ext_header`, and
    /// `fuse_secctx_header` whose number of contexts is in `kind`.
    ExtHeader { size: u32, kind: u32, } = 8
    /// `fuse_secctx`: the size of the value that follows the name.
    Secctx { size: u32, padding: u32, } = 8
}

/// Bytes that a READDIR entry with a name of `name_len` bytes takes.
#[must_use]
pub const fn dirent_size(name_len: usize) -> usize {
    size_of::<Dirent>().saturating_add(name_len).saturating_add(7) & !7
}

/// Bytes that a READDIRPLUS entry with a name of `name_len` bytes takes.
#[must_use]
pub const fn direntplus_size(name_len: usize) -> usize {
    size_of::<EntryOut>().saturating_add(dirent_size(name_len))
}

/// A device number as FUSE has it: the kernel's 32-bit encoding, which for majors below 4096 has the
/// bits of a `dev_t`.
#[must_use]
pub const fn encode_dev(dev: u64) -> u32 {
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// The nanoseconds of a time stamp; they are always below 10^9.
fn nsec(n: i64) -> u32 {
    u32::try_from(n).unwrap_or(0)
}

impl Attr {
    /// The attributes `st` with FUSE's own `flags`.
    #[inline]
    #[must_use]
    #[allow(clippy::useless_conversion, reason = "field widths differ between architectures")]
    pub fn new(st: &stat64, flags: u32) -> Self {
        Self {
            ino: st.st_ino,
            size: st.st_size.cast_unsigned(),
            blocks: st.st_blocks.cast_unsigned(),
            atime: st.st_atime.cast_unsigned(),
            mtime: st.st_mtime.cast_unsigned(),
            ctime: st.st_ctime.cast_unsigned(),
            atimensec: nsec(st.st_atime_nsec),
            mtimensec: nsec(st.st_mtime_nsec),
            ctimensec: nsec(st.st_ctime_nsec),
            mode: st.st_mode,
            nlink: u32::try_from(st.st_nlink).unwrap_or(u32::MAX),
            uid: st.st_uid,
            gid: st.st_gid,
            rdev: encode_dev(st.st_rdev),
            blksize: u32::try_from(st.st_blksize).unwrap_or(4096),
            flags,
        }
    }
}

impl AttrOut {
    /// A GETATTR reply.
    #[inline]
    #[must_use]
    pub fn new(st: &stat64, flags: u32, valid: Duration) -> Self {
        Self {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr: Attr::new(st, flags),
        }
    }
}

impl EntryOut {
    /// A LOOKUP reply.
    #[inline]
    #[must_use]
    pub fn new(entry: &Entry) -> Self {
        Self {
            nodeid: entry.inode,
            generation: entry.generation,
            entry_valid: entry.entry_timeout.as_secs(),
            attr_valid: entry.attr_timeout.as_secs(),
            entry_valid_nsec: entry.entry_timeout.subsec_nanos(),
            attr_valid_nsec: entry.attr_timeout.subsec_nanos(),
            attr: Attr::new(&entry.attr, entry.attr_flags),
        }
    }
}

impl SetattrIn {
    /// The values to set, in the form that upstream's trait takes.
    #[must_use]
    pub fn to_stat(&self) -> stat64 {
        let mut st: stat64 = zeroed_stat();
        st.st_mode = self.mode;
        st.st_uid = self.uid;
        st.st_gid = self.gid;
        st.st_size = self.size.cast_signed();
        st.st_atime = self.atime.cast_signed();
        st.st_mtime = self.mtime.cast_signed();
        st.st_ctime = self.ctime.cast_signed();
        st.st_atime_nsec = i64::from(self.atimensec);
        st.st_mtime_nsec = i64::from(self.mtimensec);
        st.st_ctime_nsec = i64::from(self.ctimensec);
        st
    }
}

/// A `stat64` of zeroes.
#[must_use]
pub fn zeroed_stat() -> stat64 {
    Entry::default().attr
}

#[allow(clippy::unnecessary_cast, reason = "field widths differ between architectures")]
impl Kstatfs {
    /// A STATFS reply.
    #[must_use]
    pub fn new(st: &statvfs64) -> Self {
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Self {
            blocks: st.f_blocks,
            bfree: st.f_bfree,
            bavail: st.f_bavail,
            files: st.f_files,
            ffree: st.f_ffree,
            bsize: narrow(st.f_bsize as u64),
            namelen: narrow(st.f_namemax as u64),
            frsize: narrow(st.f_frsize as u64),
            ..Self::default()
        }
    }
}

impl StatxOut {
    /// A STATX reply.
    #[must_use]
    pub fn new(stx: &libc::statx, valid: Duration) -> Self {
        let time = |t: &libc::statx_timestamp| SxTime {
            tv_sec: t.tv_sec,
            tv_nsec: t.tv_nsec,
            reserved: 0,
        };
        let stat = Statx {
            mask: stx.stx_mask,
            blksize: stx.stx_blksize,
            attributes: stx.stx_attributes,
            nlink: stx.stx_nlink,
            uid: stx.stx_uid,
            gid: stx.stx_gid,
            mode: stx.stx_mode,
            ino: stx.stx_ino,
            size: stx.stx_size,
            blocks: stx.stx_blocks,
            attributes_mask: stx.stx_attributes_mask,
            atime: time(&stx.stx_atime),
            btime: time(&stx.stx_btime),
            ctime: time(&stx.stx_ctime),
            mtime: time(&stx.stx_mtime),
            rdev_major: stx.stx_rdev_major,
            rdev_minor: stx.stx_rdev_minor,
            dev_major: stx.stx_dev_major,
            dev_minor: stx.stx_dev_minor,
            ..Statx::default()
        };
        Self {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            stat,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn device_numbers_survive(major in 0u32..4096, minor in 0u32..(1 << 20)) {
            let dev = libc::makedev(major, minor);
            prop_assert_eq!(u64::from(encode_dev(dev)), dev);
        }
    }

    #[test]
    fn entries_are_padded_to_eight_bytes() {
        assert_eq!(dirent_size(1), 32);
        assert_eq!(dirent_size(8), 32);
        assert_eq!(dirent_size(9), 40);
        assert_eq!(direntplus_size(8), 160);
    }
}
