//! Requests: pure parsers from bytes to [`Request`], with no I/O.
//!
//! A message is a header, the operation's fixed part, names that end in NUL, and at its very end, for
//! operations that create something, extension records ([`CreateContext`]). WRITE is parsed without
//! its data, which stay in the guest's memory.
//!
//! Names are checked here, once for all file systems: not empty, no slash, not `.` and not `..`
//! (EXPORT_SUPPORT is never agreed on, so that no kernel sends the latter two).
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::ffi::CStr;

use zerocopy::FromBytes;

use super::Opcode;
use super::extension::{CopyRange, CreateContext, MapRequest, SecurityContext};
use super::wire::{self, InHeader};

/// Why a request was refused before any file system saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Too short, or lengths that contradict each other.
    #[error("the message is malformed")]
    Malformed,
    /// A name that no directory entry can have.
    #[error("the name is not one of a directory entry")]
    BadName,
}

impl RequestError {
    /// The errno of the reply.
    #[must_use]
    pub const fn errno(self) -> i32 {
        match self {
            Self::Malformed => libc::EIO,
            Self::BadName => libc::EINVAL,
        }
    }
}

/// What parsing needs to know of the session.
#[derive(Debug, Clone, Copy, Default)]
pub struct Dialect {
    /// SETXATTR_EXT was agreed on.
    pub setxattr_ext: bool,
}

/// One parsed request. Numbers are as the guest sent them.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "variants and fields are those of the operation in linux/fuse.h")]
pub enum Request<'a> {
    Lookup { name: &'a CStr },
    Forget { nlookup: u64 },
    BatchForget(Records<'a, wire::ForgetOne>),
    Getattr { handle: Option<u64> },
    Setattr(wire::SetattrIn),
    Readlink,
    Symlink { name: &'a CStr, target: &'a CStr, extra: CreateContext<'a> },
    Mknod { args: wire::MknodIn, name: &'a CStr, extra: CreateContext<'a> },
    Mkdir { args: wire::MkdirIn, name: &'a CStr, extra: CreateContext<'a> },
    Unlink { name: &'a CStr },
    Rmdir { name: &'a CStr },
    Rename { newdir: u64, flags: u32, old: &'a CStr, new: &'a CStr },
    Link { inode: u64, name: &'a CStr },
    Open(wire::OpenIn),
    Read(wire::ReadIn),
    Write(wire::WriteIn),
    Statfs,
    Release(wire::ReleaseIn),
    Fsync { handle: u64, datasync: bool },
    Setxattr { name: &'a CStr, value: &'a [u8], flags: u32, kill_sgid: bool },
    Getxattr { size: u32, name: &'a CStr },
    Listxattr { size: u32 },
    Removexattr { name: &'a CStr },
    Flush(wire::FlushIn),
    Init { args: wire::InitIn, flags2: u32 },
    Opendir(wire::OpenIn),
    Readdir(wire::ReadIn),
    Readdirplus(wire::ReadIn),
    Releasedir(wire::ReleaseIn),
    Fsyncdir { handle: u64, datasync: bool },
    Getlk(wire::LkIn),
    Setlk(wire::LkIn),
    Setlkw(wire::LkIn),
    Access { mask: u32 },
    Create { args: wire::CreateIn, name: &'a CStr, extra: CreateContext<'a> },
    Interrupt { unique: u64 },
    Bmap(wire::BmapIn),
    Destroy,
    Ioctl { args: wire::IoctlIn, data: &'a [u8] },
    Poll(wire::PollIn),
    NotifyReply,
    Fallocate(wire::FallocateIn),
    Lseek(wire::LseekIn),
    CopyFileRange { range: CopyRange, wide: bool },
    SetupMapping(MapRequest),
    RemoveMapping(Records<'a, wire::RemovemappingOne>),
    Syncfs,
    Tmpfile { args: wire::CreateIn, extra: CreateContext<'a> },
    Statx(wire::StatxIn),
}

/// An array of `T` at the end of a message, its length checked.
#[derive(Debug, Clone, Copy)]
pub struct Records<'a, T> {
    bytes: &'a [u8],
    kind: std::marker::PhantomData<T>,
}

impl<T: FromBytes> Iterator for Records<'_, T> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        let (record, rest) = T::read_from_prefix(self.bytes).ok()?;
        self.bytes = rest;
        Some(record)
    }
}

/// Reads a message's body from its front.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    #[inline]
    fn take<T: FromBytes>(&mut self) -> Result<T, RequestError> {
        // The bytes are the only thing that the error would carry.
        let Ok((value, rest)) = T::read_from_prefix(self.0) else {
            return Err(RequestError::Malformed);
        };
        self.0 = rest;
        Ok(value)
    }

    /// A string that ends in NUL.
    #[inline]
    fn string(&mut self) -> Result<&'a CStr, RequestError> {
        let Ok(string) = CStr::from_bytes_until_nul(self.0) else {
            return Err(RequestError::Malformed);
        };
        self.0 = self.0.get(string.to_bytes_with_nul().len()..).unwrap_or(&[]);
        Ok(string)
    }

    /// The name of a directory entry.
    #[inline]
    fn name(&mut self) -> Result<&'a CStr, RequestError> {
        let name = self.string()?;
        let bytes = name.to_bytes();
        let bad = bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/');
        if bad { Err(RequestError::BadName) } else { Ok(name) }
    }

    /// The name of an extended attribute.
    fn attribute(&mut self) -> Result<&'a CStr, RequestError> {
        let name = self.string()?;
        if name.is_empty() { Err(RequestError::BadName) } else { Ok(name) }
    }

    fn bytes(&mut self, len: u32) -> Result<&'a [u8], RequestError> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(RequestError::Malformed)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn records<T>(&mut self, count: u32) -> Result<Records<'a, T>, RequestError> {
        let len = usize::try_from(count).ok().and_then(|n| n.checked_mul(size_of::<T>()));
        let bytes = len.and_then(|len| self.0.get(..len)).ok_or(RequestError::Malformed)?;
        Ok(Records { bytes, kind: std::marker::PhantomData })
    }

    /// Cuts the extension records, whose length the header tells, off the end and parses them.
    fn extra(&mut self, header: &InHeader) -> Result<CreateContext<'a>, RequestError> {
        let len = usize::from(header.total_extlen).saturating_mul(8);
        if len == 0 {
            return Ok(CreateContext::default());
        }
        let at = self.0.len().checked_sub(len).ok_or(RequestError::Malformed)?;
        let (body, records) = self.0.split_at_checked(at).ok_or(RequestError::Malformed)?;
        self.0 = body;
        create_context(records)
    }
}

/// Parses extension records.
fn create_context(mut records: &[u8]) -> Result<CreateContext<'_>, RequestError> {
    let mut context = CreateContext::default();
    while !records.is_empty() {
        let head: wire::ExtHeader = Body(records).take()?;
        let size = usize::try_from(head.size).unwrap_or(usize::MAX);
        let record = records.get(size_of::<wire::ExtHeader>()..size);
        let mut record = Body(record.ok_or(RequestError::Malformed)?);
        match head.kind {
            0 => {}
            1..=wire::MAX_NR_SECCTX => {
                // The kernel sends at most one; any more would be of other security modules.
                let secctx: wire::Secctx = record.take()?;
                let name = record.attribute()?;
                let value = record.bytes(secctx.size)?;
                context.security = Some(SecurityContext { name, value });
            }
            wire::EXT_GROUPS => {
                let count: u32 = record.take()?;
                if count > 0 {
                    context.supplementary_group = Some(record.take()?);
                }
            }
            // A record of a later version: what it asks for was not agreed on.
            _ => {}
        }
        // Records are padded to 8 bytes, the last one too.
        records = records.get(size.next_multiple_of(8)..).unwrap_or(&[]);
    }
    Ok(context)
}

/// Parses the body of `opcode`: everything after the header, for WRITE without the data.
///
/// # Errors
/// The message is malformed, or a name is bad.
#[inline]
pub fn parse<'a>(
    opcode: Opcode,
    header: &InHeader,
    bytes: &'a [u8],
    dialect: Dialect,
) -> Result<Request<'a>, RequestError> {
    let mut body = Body(bytes);
    Ok(match opcode {
        Opcode::Lookup => Request::Lookup { name: body.name()? },
        Opcode::Getattr => {
            let args: wire::GetattrIn = body.take()?;
            Request::Getattr {
                handle: (args.getattr_flags & wire::GETATTR_FH != 0).then_some(args.fh),
            }
        }
        Opcode::Read => Request::Read(body.take()?),
        Opcode::Write => Request::Write(body.take()?),
        Opcode::Forget => Request::Forget { nlookup: body.take()? },
        Opcode::BatchForget => {
            let args: wire::BatchForgetIn = body.take()?;
            Request::BatchForget(body.records(args.count)?)
        }
        Opcode::Setattr => Request::Setattr(body.take()?),
        Opcode::Open => Request::Open(body.take()?),
        Opcode::Release => Request::Release(body.take()?),
        Opcode::Flush => Request::Flush(body.take()?),
        Opcode::Opendir => Request::Opendir(body.take()?),
        Opcode::Readdir => Request::Readdir(body.take()?),
        Opcode::Readdirplus => Request::Readdirplus(body.take()?),
        Opcode::Releasedir => Request::Releasedir(body.take()?),
        Opcode::Fsync | Opcode::Fsyncdir => fsync(opcode, &mut body)?,
        Opcode::Getlk => Request::Getlk(body.take()?),
        Opcode::Setlk => Request::Setlk(body.take()?),
        Opcode::Setlkw => Request::Setlkw(body.take()?),
        Opcode::Statx => Request::Statx(body.take()?),
        Opcode::Statfs => Request::Statfs,
        Opcode::Readlink => Request::Readlink,
        Opcode::Access => Request::Access { mask: body.take::<wire::AccessIn>()?.mask },
        Opcode::Fallocate => Request::Fallocate(body.take()?),
        Opcode::Lseek => Request::Lseek(body.take()?),
        Opcode::Syncfs => Request::Syncfs,
        Opcode::Setxattr | Opcode::Getxattr | Opcode::Listxattr | Opcode::Removexattr => {
            xattr(opcode, &mut body, dialect)?
        }
        Opcode::Symlink
        | Opcode::Mknod
        | Opcode::Mkdir
        | Opcode::Create
        | Opcode::Tmpfile
        | Opcode::Unlink
        | Opcode::Rmdir
        | Opcode::Rename
        | Opcode::Rename2
        | Opcode::Link => namespace(opcode, header, &mut body)?,
        _ => rare(opcode, header, &mut body)?,
    })
}

fn fsync<'a>(opcode: Opcode, body: &mut Body<'a>) -> Result<Request<'a>, RequestError> {
    let args: wire::FsyncIn = body.take()?;
    let (handle, datasync) = (args.fh, args.fsync_flags & wire::FSYNC_FDATASYNC != 0);
    Ok(if opcode == Opcode::Fsync {
        Request::Fsync { handle, datasync }
    } else {
        Request::Fsyncdir { handle, datasync }
    })
}

fn xattr<'a>(
    opcode: Opcode,
    body: &mut Body<'a>,
    dialect: Dialect,
) -> Result<Request<'a>, RequestError> {
    Ok(match opcode {
        Opcode::Setxattr => {
            let args: wire::SetxattrIn = body.take()?;
            let ext: wire::SetxattrExt =
                if dialect.setxattr_ext { body.take()? } else { Default::default() };
            let name = body.attribute()?;
            Request::Setxattr {
                name,
                value: body.bytes(args.size)?,
                flags: args.flags,
                kill_sgid: ext.setxattr_flags & wire::SETXATTR_ACL_KILL_SGID != 0,
            }
        }
        Opcode::Getxattr => {
            let size = body.take::<wire::GetxattrSize>()?.size;
            Request::Getxattr { size, name: body.attribute()? }
        }
        Opcode::Listxattr => Request::Listxattr { size: body.take::<wire::GetxattrSize>()?.size },
        _ => Request::Removexattr { name: body.attribute()? },
    })
}

fn namespace<'a>(
    opcode: Opcode,
    header: &InHeader,
    body: &mut Body<'a>,
) -> Result<Request<'a>, RequestError> {
    Ok(match opcode {
        Opcode::Symlink => {
            let extra = body.extra(header)?;
            Request::Symlink { name: body.name()?, target: body.string()?, extra }
        }
        Opcode::Mknod => {
            let extra = body.extra(header)?;
            Request::Mknod { args: body.take()?, name: body.name()?, extra }
        }
        Opcode::Mkdir => {
            let extra = body.extra(header)?;
            Request::Mkdir { args: body.take()?, name: body.name()?, extra }
        }
        Opcode::Create => {
            let extra = body.extra(header)?;
            Request::Create { args: body.take()?, name: body.name()?, extra }
        }
        // Its name is not one: the kernel sends "/".
        Opcode::Tmpfile => Request::Tmpfile { extra: body.extra(header)?, args: body.take()? },
        Opcode::Unlink => Request::Unlink { name: body.name()? },
        Opcode::Rmdir => Request::Rmdir { name: body.name()? },
        Opcode::Rename => {
            let newdir = body.take()?;
            Request::Rename { newdir, flags: 0, old: body.name()?, new: body.name()? }
        }
        Opcode::Rename2 => {
            let args: wire::Rename2In = body.take()?;
            let (newdir, flags) = (args.newdir, args.flags);
            Request::Rename { newdir, flags, old: body.name()?, new: body.name()? }
        }
        _ => Request::Link { inode: body.take()?, name: body.name()? },
    })
}

fn rare<'a>(
    opcode: Opcode,
    header: &InHeader,
    body: &mut Body<'a>,
) -> Result<Request<'a>, RequestError> {
    Ok(match opcode {
        Opcode::Init => {
            let args = body.take()?;
            // Only drivers that know INIT_EXT send more.
            Request::Init { args, flags2: body.take().unwrap_or(0) }
        }
        Opcode::Destroy => Request::Destroy,
        Opcode::Interrupt => Request::Interrupt { unique: body.take()? },
        Opcode::Bmap => Request::Bmap(body.take()?),
        Opcode::Poll => Request::Poll(body.take()?),
        Opcode::Ioctl => {
            let args: wire::IoctlIn = body.take()?;
            Request::Ioctl { args, data: body.bytes(args.in_size)? }
        }
        Opcode::CopyFileRange | Opcode::CopyFileRange64 => {
            let args: wire::CopyFileRangeIn = body.take()?;
            let range = CopyRange {
                inode_in: header.nodeid,
                handle_in: args.fh_in,
                offset_in: args.off_in,
                inode_out: args.nodeid_out,
                handle_out: args.fh_out,
                offset_out: args.off_out,
                len: args.len,
                flags: args.flags,
            };
            Request::CopyFileRange { range, wide: opcode == Opcode::CopyFileRange64 }
        }
        Opcode::SetupMapping => {
            let args: wire::SetupmappingIn = body.take()?;
            Request::SetupMapping(MapRequest {
                inode: header.nodeid,
                handle: args.fh,
                file_offset: args.foffset,
                len: args.len,
                write: args.flags & wire::SETUPMAPPING_FLAG_WRITE != 0,
                window_offset: args.moffset,
            })
        }
        Opcode::RemoveMapping => {
            let count = body.take()?;
            Request::RemoveMapping(body.records(count)?)
        }
        _ => Request::NotifyReply,
    })
}

#[cfg(test)]
mod tests;
