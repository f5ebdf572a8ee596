//! DAX in the passthrough: the two mapping operations, and the wrapping of every operation that may
//! move the end of a mapped file or look past it. See [`crate::dax`] for why.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::SetattrValid;

use super::{PassthroughFs, errno};
use crate::dax::Dax;
use crate::fuse::extension::{DaxWindow, MapRequest};

/// `fuse_attr.flags`: the guest may map the file (FUSE_ATTR_DAX).
const ATTR_DAX: u32 = 1 << 1;

/// FALLOCATE modes that move contents about.
const UPHEAVAL: i32 = libc::FALLOC_FL_COLLAPSE_RANGE | libc::FALLOC_FL_INSERT_RANGE;

impl PassthroughFs {
    /// The window, while there is a way to it.
    pub(super) fn dax_ready(&self) -> bool {
        self.dax.as_ref().is_some_and(Dax::is_ready)
    }

    pub(super) fn window_size(&self) -> u64 {
        if self.dax.is_some() { self.config.dax.window } else { 0 }
    }

    pub(super) fn set_window(&self, window: Option<Arc<dyn DaxWindow + Send + Sync>>) {
        if let Some(dax) = &self.dax {
            dax.set_window(window);
        }
    }

    /// A new guest: what an older one left mapped goes.
    pub(super) fn start_dax(&self) -> io::Result<()> {
        self.dax.as_ref().map_or(Ok(()), Dax::start_guest)
    }

    /// FUSE_ATTR_DAX for the inode `id` of this type and size.
    #[inline]
    pub(super) fn dax_flag(&self, id: u64, file_type: u32, size: u64) -> u32 {
        match &self.dax {
            Some(dax)
                if file_type == libc::S_IFREG
                    && dax.marks(size)
                    && dax.is_ready()
                    && dax.can_open(id, || self.open_for_vmm(id, false).map(drop)) =>
            {
                ATTR_DAX
            }
            _ => 0,
        }
    }

    /// The file as the VMM needs it: a strict one takes nothing that is not open for writing, and so
    /// cannot map files of read-only mounts, immutable ones, or programs that run.
    fn open_for_vmm(&self, id: u64, write: bool) -> io::Result<OwnedFd> {
        let strict = self.dax.as_ref().is_some_and(Dax::needs_writable);
        let access = if write || strict { libc::O_RDWR } else { libc::O_RDONLY };
        self.open_node(id, access | libc::O_NONBLOCK)
    }

    /// SETUPMAPPING. The guest names no handle; permissions were checked when it opened the file.
    pub(super) fn do_setup_mapping(&self, request: &MapRequest) -> io::Result<()> {
        let dax = self.dax.as_ref().ok_or(errno(libc::ENOSYS))?;
        if request.write {
            self.writable()?;
        }
        match self.inodes.kind(request.inode) {
            Some((libc::S_IFREG, _)) => {}
            Some(_) => return Err(errno(libc::ENODEV)),
            None => return Err(errno(libc::ESTALE)),
        }
        let file = self
            .open_for_vmm(request.inode, request.write)
            .inspect_err(|_| dax.cannot_open(request.inode))?;
        dax.set_up(request, self.for_guest(file)?)
    }

    /// REMOVEMAPPING.
    pub(super) fn do_remove_mapping(
        &self,
        ranges: &mut dyn Iterator<Item = (u64, u64)>,
    ) -> io::Result<()> {
        let dax = self.dax.as_ref().ok_or(errno(libc::ENOSYS))?;
        for (offset, len) in ranges {
            dax.remove(offset, len)?;
        }
        Ok(())
    }

    /// Makes the mappings of `id` fit the file, before the guest hears of it or after it was changed.
    #[inline]
    pub(super) fn refresh_mapping(&self, id: u64) -> io::Result<()> {
        self.dax.as_ref().map_or(Ok(()), |dax| dax.refresh(id))
    }

    /// Makes the mappings of `id` fit after an operation that may have to be done again, or must not.
    #[inline]
    fn refresh_after(&self, id: u64, repeatable: bool) -> io::Result<()> {
        match &self.dax {
            Some(dax) if repeatable => dax.refresh(id),
            Some(dax) => dax.refresh_later(id),
            None => Ok(()),
        }
    }

    /// Writes back what the guest changed in pages that are shown from a copy.
    pub(super) fn write_mappings_back(&self) -> io::Result<()> {
        self.dax.as_ref().map_or(Ok(()), Dax::write_back)
    }

    /// Runs `operation`, which may change the contents or grow the file `id`; `repeatable` when doing it
    /// twice is the same as once.
    #[inline]
    pub(super) fn growing<T>(
        &self,
        id: u64,
        repeatable: bool,
        operation: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        self.refresh_mapping(id)?;
        let done = operation()?;
        self.refresh_after(id, repeatable)?;
        Ok(done)
    }

    /// Runs `operation`, which truncates the file `id` to `size`.
    pub(super) fn truncating<T>(
        &self,
        id: u64,
        size: u64,
        operation: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if let Some(dax) = &self.dax {
            dax.before_resize(id, size)?;
        }
        let done = operation();
        // Done or not, the mappings fit what the file is now.
        self.refresh_mapping(id)?;
        done
    }

    /// Runs SETATTR's `operation`.
    pub(super) fn setting<T>(
        &self,
        id: u64,
        valid: SetattrValid,
        size: i64,
        operation: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if valid.contains(SetattrValid::SIZE) {
            return self.truncating(id, u64::try_from(size).unwrap_or(0), operation);
        }
        self.refresh_mapping(id)?;
        operation()
    }

    /// Runs FALLOCATE's `operation`.
    pub(super) fn allocating(
        &self,
        id: u64,
        mode: u32,
        operation: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let upheaval = mode.cast_signed() & UPHEAVAL != 0;
        if let (Some(dax), true) = (&self.dax, upheaval) {
            dax.before_upheaval(id)?;
        } else {
            self.refresh_mapping(id)?;
        }
        let done = operation();
        self.refresh_after(id, !upheaval)?;
        done
    }
}
