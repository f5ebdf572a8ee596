//! The system calls of the passthrough that no safe wrapper covers. Nothing here knows about inodes.
#![allow(
    unsafe_code,
    reason = "raw system calls: statx, file handles, getdents64, OFD locks, vectored I/O"
)]

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_int, c_uint, iovec};

/// What every lookup and GETATTR asks `statx(2)` for.
pub(crate) const STATX_MASK: u32 = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;

/// Turns a system call's result into an `io::Result`, which allocates nothing.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// `statx(2)` of `name` in `dir`; the last component is never followed. An empty `name` means `dir`.
#[inline]
pub(crate) fn statx(
    dir: BorrowedFd<'_>,
    name: &CStr,
    flags: c_int,
    mask: u32,
) -> io::Result<libc::statx> {
    let mut out = MaybeUninit::<libc::statx>::uninit();
    let flags = flags | libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT | libc::AT_EMPTY_PATH;
    // SAFETY: `name` is NUL-terminated and `out` is as large as the kernel's structure.
    let result =
        unsafe { libc::statx(dir.as_raw_fd(), name.as_ptr(), flags, mask, out.as_mut_ptr()) };
    check(result.into())?;
    // SAFETY: the kernel filled all of it; fields it does not know are zero.
    Ok(unsafe { out.assume_init() })
}

/// `fstat(2)`, also of an O_PATH fd: what GETATTR needs and no more. The C library's goes by `fstatat(2)`.
#[inline]
pub(crate) fn fstat(fd: BorrowedFd<'_>) -> io::Result<libc::stat64> {
    let mut out = MaybeUninit::<libc::stat64>::zeroed();
    // SAFETY: `out` is as large as the kernel's structure, which on 64-bit machines is the C library's too.
    check(unsafe { libc::syscall(libc::SYS_fstat, fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: zeroed first, then filled.
    Ok(unsafe { out.assume_init() })
}

/// The most bytes of a file handle that the kernel has (MAX_HANDLE_SZ).
pub(crate) const MAX_HANDLE_BYTES: usize = 128;

/// `struct file_handle` with room for the largest one.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawHandle {
    len: c_uint,
    kind: c_int,
    data: [u8; MAX_HANDLE_BYTES],
}

impl RawHandle {
    /// A handle made of `data` (at most [`MAX_HANDLE_BYTES`]).
    pub(crate) fn new(kind: i32, data: &[u8]) -> Self {
        let mut raw = Self { len: 0, kind, data: [0; MAX_HANDLE_BYTES] };
        let n = data.len().min(MAX_HANDLE_BYTES);
        if let (Some(to), Some(from)) = (raw.data.get_mut(..n), data.get(..n)) {
            to.copy_from_slice(from);
        }
        raw.len = c_uint::try_from(n).unwrap_or(0);
        raw
    }

    /// The kernel's handle type.
    pub(crate) fn kind(&self) -> i32 {
        self.kind
    }

    /// The handle's bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.data.get(..self.len as usize).unwrap_or(&[])
    }
}

/// `name_to_handle_at(2)` without following `name`; an empty `name` means `dir` itself.
pub(crate) fn name_to_handle(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<RawHandle> {
    let mut raw = RawHandle::new(0, &[]);
    raw.len = 128;
    let mut mount_id: c_int = 0;
    // SAFETY: `raw` has room for `raw.len` bytes of handle, and `name` is NUL-terminated.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            dir.as_raw_fd(),
            name.as_ptr(),
            &raw mut raw,
            &raw mut mount_id,
            libc::AT_EMPTY_PATH,
        )
    };
    check(result)?;
    Ok(raw)
}

/// `open_by_handle_at(2)`. `mount` is an fd, not of O_PATH, on the handle's file system.
pub(crate) fn open_by_handle(
    mount: BorrowedFd<'_>,
    raw: &RawHandle,
    flags: c_int,
) -> io::Result<OwnedFd> {
    // SAFETY: the handle is initialised for `raw.len` bytes; the kernel only reads it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            std::ptr::from_ref(raw),
            flags | libc::O_CLOEXEC,
        )
    };
    let fd = check(result)?;
    let fd = RawFd::try_from(fd).map_err(|_unfit| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the call just made this fd, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `getdents64(2)`: bytes of records put into `out`, 0 at the end of the directory.
pub(crate) fn getdents(dir: BorrowedFd<'_>, out: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `out.len()` bytes to `out`.
    let result = unsafe {
        libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), out.as_mut_ptr(), out.len())
    };
    Ok(usize::try_from(check(result)?).unwrap_or(0))
}

/// `lseek(2)` with any `whence`.
pub(crate) fn lseek(fd: BorrowedFd<'_>, offset: i64, whence: c_int) -> io::Result<u64> {
    // SAFETY: no memory is involved.
    let result = unsafe { libc::lseek64(fd.as_raw_fd(), offset, whence) };
    u64::try_from(result).map_err(|_unfit| io::Error::last_os_error())
}

/// `fallocate(2)` with any `mode`.
pub(crate) fn fallocate(fd: BorrowedFd<'_>, mode: c_int, offset: i64, len: i64) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::fallocate64(fd.as_raw_fd(), mode, offset, len) }.into()).map(drop)
}

/// `copy_file_range(2)` at given offsets; returns the bytes copied.
pub(crate) fn copy_file_range(
    from: BorrowedFd<'_>,
    mut from_offset: i64,
    to: BorrowedFd<'_>,
    mut to_offset: i64,
    len: usize,
    flags: u32,
) -> io::Result<u64> {
    // SAFETY: both offsets are locals that live through the call.
    let result = unsafe {
        libc::copy_file_range(
            from.as_raw_fd(),
            &raw mut from_offset,
            to.as_raw_fd(),
            &raw mut to_offset,
            len,
            flags,
        )
    };
    u64::try_from(result).map_err(|_unfit| io::Error::last_os_error())
}

/// `preadv2(2)` into memory that the caller vouches for.
///
/// # Safety
/// Every entry of `out` must be writable memory that nothing in this process holds a reference to.
#[inline]
pub(crate) unsafe fn preadv2(
    fd: BorrowedFd<'_>,
    out: &[iovec],
    offset: u64,
    flags: c_int,
) -> io::Result<usize> {
    let count = c_int::try_from(out.len().min(IOV_MAX)).unwrap_or(0);
    let offset =
        i64::try_from(offset).map_err(|_unfit| io::Error::from_raw_os_error(libc::EINVAL))?;
    if let ([one], 0) = (out, flags) {
        // A tenth cheaper than a list of one.
        // SAFETY: the caller promises that the entry is writable.
        let n = unsafe { libc::pread64(fd.as_raw_fd(), one.iov_base, one.iov_len, offset) };
        return usize::try_from(n).map_err(|_unfit| io::Error::last_os_error());
    }
    // SAFETY: the caller promises that the entries are writable.
    let n = unsafe { libc::preadv2(fd.as_raw_fd(), out.as_ptr(), count, offset, flags) };
    usize::try_from(n).map_err(|_unfit| io::Error::last_os_error())
}

/// `pwritev2(2)` from memory that the caller vouches for.
///
/// # Safety
/// Every entry of `data` must be readable memory.
#[inline]
pub(crate) unsafe fn pwritev2(
    fd: BorrowedFd<'_>,
    data: &[iovec],
    offset: u64,
    flags: c_int,
) -> io::Result<usize> {
    let count = c_int::try_from(data.len().min(IOV_MAX)).unwrap_or(0);
    let offset =
        i64::try_from(offset).map_err(|_unfit| io::Error::from_raw_os_error(libc::EINVAL))?;
    if let ([one], 0) = (data, flags) {
        // SAFETY: the caller promises that the entry is readable.
        let n = unsafe { libc::pwrite64(fd.as_raw_fd(), one.iov_base, one.iov_len, offset) };
        return usize::try_from(n).map_err(|_unfit| io::Error::last_os_error());
    }
    // SAFETY: the caller promises that the entries are readable.
    let n = unsafe { libc::pwritev2(fd.as_raw_fd(), data.as_ptr(), count, offset, flags) };
    usize::try_from(n).map_err(|_unfit| io::Error::last_os_error())
}

/// The most entries that one vectored call takes.
const IOV_MAX: usize = 1024;

/// `fcntl(2)` with an open-file-description lock command; `lock` is changed by F_OFD_GETLK.
pub(crate) fn ofd_lock(
    fd: BorrowedFd<'_>,
    command: c_int,
    lock: &mut libc::flock64,
) -> io::Result<()> {
    // SAFETY: the lock commands read and write exactly one `flock64`.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    check(result.into()).map(drop)
}

/// A lock description with every field zero.
pub(crate) fn empty_lock() -> libc::flock64 {
    // SAFETY: plain integers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

/// A `stat64` with every field zero.
pub(crate) fn empty_stat() -> libc::stat64 {
    // SAFETY: plain integers, for which zero is a value.
    unsafe { std::mem::zeroed() }
}

/// `statvfs(3)` of the file system that `fd` is on.
pub(crate) fn statvfs(fd: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    let mut out = MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: `out` has room for the structure.
    check(unsafe { libc::fstatvfs64(fd.as_raw_fd(), out.as_mut_ptr()) }.into())?;
    // SAFETY: zeroed first, then filled.
    Ok(unsafe { out.assume_init() })
}

/// Gives the calling thread its own working directory and umask.
pub(crate) fn unshare_fs() -> io::Result<()> {
    // SAFETY: CLONE_FS affects only this thread's working directory, root and umask.
    check(unsafe { libc::unshare(libc::CLONE_FS) }.into()).map(drop)
}

/// Whether `name_to_handle_at` and friends refuse for want of support rather than for the object.
pub(crate) fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EPERM | libc::ENOSYS | libc::EOVERFLOW | libc::EINVAL)
    )
}

/// The name of an fd in `/proc/self/fd`, made without allocating.
pub(crate) struct FdName {
    text: [u8; 12],
    start: usize,
}

impl FdName {
    /// The name of `fd`.
    pub(crate) fn new(fd: BorrowedFd<'_>) -> Self {
        let mut text = [0_u8; 12];
        let mut start = text.len() - 1;
        let mut rest = fd.as_raw_fd().unsigned_abs();
        loop {
            start -= 1;
            text[start] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
            if rest == 0 {
                return Self { text, start };
            }
        }
    }

    /// As the system calls want it.
    pub(crate) fn as_c_str(&self) -> &CStr {
        self.text
            .get(self.start..)
            .and_then(|bytes| CStr::from_bytes_with_nul(bytes).ok())
            .unwrap_or(c"")
    }
}

/// Sets the calling thread's effective user id alone, unlike the C library, which sets every thread's.
pub(crate) fn set_thread_euid(uid: u32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::syscall(libc::SYS_setresuid, -1, uid, -1) }).map(drop)
}

/// Sets the calling thread's effective group id alone.
pub(crate) fn set_thread_egid(gid: u32) -> io::Result<()> {
    // SAFETY: no memory is involved.
    check(unsafe { libc::syscall(libc::SYS_setresgid, -1, gid, -1) }).map(drop)
}

/// Sets the calling thread's supplementary groups alone.
pub(crate) fn set_thread_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads `groups.len()` ids from `groups`.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).map(drop)
}

/// Gives the calling thread a mount name space of its own.
#[cfg(test)]
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: changes only which mounts this thread sees.
    check(unsafe { libc::unshare(libc::CLONE_NEWNS) }.into()).map(drop)
}
