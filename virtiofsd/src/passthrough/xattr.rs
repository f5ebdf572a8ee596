//! Extended attributes: SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, and labels of new files.
//!
//! The system calls take a path, and there is none for an inode; but each thread works in
//! `/proc/self/fd`, where the fd's number is one, for inodes of every type and without opening them.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
use rustix::fs::XattrFlags;

use super::sys::FdName;
use super::xattr_map::ClientName;
use super::{CreateContext, PassthroughFs, credentials, errno};
use crate::fuse::wire::init;

/// The kernel's limit on a value and on a list of names.
const XATTR_SIZE_MAX: usize = 65536;
/// The attributes that ACLs are kept in.
const ACL_PREFIX: &[u8] = b"system.posix_acl_";
const ACL_ACCESS: &CStr = c"system.posix_acl_access";

impl PassthroughFs {
    /// The host's name of an attribute.
    fn host_name<'a>(&self, name: &'a CStr) -> io::Result<ClientName<'a>> {
        if !self.config.uses_xattr() {
            return Err(errno(libc::ENOSYS));
        }
        // Without the feature, the guest would change ACLs that its kernel does not check.
        if name.to_bytes().starts_with(ACL_PREFIX) && !self.has(init::POSIX_ACL) {
            return Err(errno(libc::ENOTSUP));
        }
        match &self.config.xattr_map {
            None => Ok(ClientName::Same(name)),
            Some(map) => map.client(name).map_err(errno),
        }
    }

    /// SETXATTR.
    pub(super) fn do_setxattr(
        &self,
        id: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> io::Result<()> {
        self.writable()?;
        let name = self.host_name(name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(errno(libc::EINVAL))?;
        let fd = self.node_fd(id)?;
        self.prepare_thread()?;
        // Setting an access ACL changes the mode; without the capability, it loses set-group-id.
        credentials::set_fsetid(!(kill_sgid && name.as_c_str() == ACL_ACCESS))?;
        let path = FdName::new(fd.as_fd());
        rustix::fs::setxattr(path.as_c_str(), name.as_c_str(), value, flags)?;
        Ok(())
    }

    /// GETXATTR. Size 0 asks for the size.
    pub(super) fn do_getxattr(&self, id: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let name = self.host_name(name)?;
        let fd = self.node_fd(id)?;
        self.prepare_thread()?;
        let path = FdName::new(fd.as_fd());
        if size == 0 {
            let n = rustix::fs::getxattr_query(path.as_c_str(), name.as_c_str())?;
            return Ok(GetxattrReply::Count(u32::try_from(n).unwrap_or(u32::MAX)));
        }
        let size = usize::try_from(size).unwrap_or(XATTR_SIZE_MAX).min(XATTR_SIZE_MAX);
        let mut value = vec![0; size];
        let n = rustix::fs::getxattr(path.as_c_str(), name.as_c_str(), &mut value)?;
        value.truncate(n);
        Ok(GetxattrReply::Value(value))
    }

    /// LISTXATTR. Size 0 asks for the size.
    pub(super) fn do_listxattr(&self, id: u64, size: u32) -> io::Result<ListxattrReply> {
        if !self.config.uses_xattr() {
            return Err(errno(libc::ENOSYS));
        }
        let fd = self.node_fd(id)?;
        self.prepare_thread()?;
        let path = FdName::new(fd.as_fd());
        let mut names = vec![0; XATTR_SIZE_MAX];
        let n = rustix::fs::listxattr(path.as_c_str(), &mut names)?;
        names.truncate(n);
        let names = self.guest_names(names);
        if size == 0 {
            return Ok(ListxattrReply::Count(u32::try_from(names.len()).unwrap_or(u32::MAX)));
        }
        if names.len() > usize::try_from(size).unwrap_or(usize::MAX) {
            return Err(errno(libc::ERANGE));
        }
        Ok(ListxattrReply::Names(names))
    }

    /// A list of the host's names as the guest shall see it.
    fn guest_names(&self, names: Vec<u8>) -> Vec<u8> {
        let acl = self.has(init::POSIX_ACL);
        if acl && self.config.xattr_map.is_none() {
            return names;
        }
        let mut out = Vec::with_capacity(names.len());
        for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let shown = match &self.config.xattr_map {
                None => Some(name),
                Some(map) => map.server(name),
            };
            let shown = shown.filter(|name| !name.is_empty());
            if let Some(name) = shown.filter(|name| acl || !name.starts_with(ACL_PREFIX)) {
                out.extend_from_slice(name);
                out.push(0);
            }
        }
        out
    }

    /// REMOVEXATTR.
    pub(super) fn do_removexattr(&self, id: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        let name = self.host_name(name)?;
        let fd = self.node_fd(id)?;
        self.prepare_thread()?;
        let path = FdName::new(fd.as_fd());
        rustix::fs::removexattr(path.as_c_str(), name.as_c_str())?;
        Ok(())
    }

    /// The contents or the owner of `fd` change: takes away file capabilities that the host's kernel
    /// does not know for such, as it would itself.
    #[inline]
    pub(super) fn drop_moved_capability(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match &self.moved_capability {
            None => Ok(()),
            Some(name) => self.remove_if_there(fd, name),
        }
    }

    #[cold]
    fn remove_if_there(&self, fd: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        self.prepare_thread()?;
        let path = FdName::new(fd);
        match rustix::fs::removexattr(path.as_c_str(), name) {
            Ok(()) | Err(rustix::io::Errno::NODATA | rustix::io::Errno::NOTSUP) => Ok(()),
            // User attributes exist for regular files and directories only.
            Err(rustix::io::Errno::PERM) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives the label that came with its creation to the new inode `fd`.
    pub(super) fn label(&self, fd: BorrowedFd<'_>, extra: &CreateContext<'_>) -> io::Result<()> {
        let Some(security) = extra.security else { return Ok(()) };
        let name = self.host_name(security.name)?;
        self.prepare_thread()?;
        let path = FdName::new(fd);
        rustix::fs::setxattr(
            path.as_c_str(),
            name.as_c_str(),
            security.value,
            XattrFlags::empty(),
        )?;
        Ok(())
    }
}
