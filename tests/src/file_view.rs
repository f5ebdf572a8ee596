//! A part of a file in this process's memory, as a VMM shows it to its guest.
//!
//! A guest that touches a page behind the end of the file takes its VMM down (SIGBUS). Here the same
//! access is an error: it goes through `/proc/self/mem`, where the kernel does the faulting.
#![allow(unsafe_code, reason = "maps parts of files and unmaps them")]

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags};

/// A shared mapping; dropping it unmaps.
#[derive(Debug)]
pub struct FileView {
    base: *mut std::ffi::c_void,
    len: usize,
}

// SAFETY: an address that is never turned into a reference.
unsafe impl Send for FileView {}
// SAFETY: as above.
unsafe impl Sync for FileView {}

fn own_memory() -> Result<&'static File> {
    static MEMORY: OnceLock<File> = OnceLock::new();
    if let Some(memory) = MEMORY.get() {
        return Ok(memory);
    }
    let memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem")?;
    Ok(MEMORY.get_or_init(|| memory))
}

impl FileView {
    /// Maps `len` bytes of `file` from `offset`, for writing too if `write`.
    ///
    /// # Errors
    /// What `mmap` refuses: a range of no whole pages, or `write` of a file that is open for reading.
    pub fn map(file: impl AsFd, offset: u64, len: u64, write: bool) -> Result<Self> {
        let len = usize::try_from(len)?;
        let prot = if write { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address that the kernel chooses; unmapped in `drop`.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, offset)
        }
        .context("mmap")?;
        Ok(Self { base, len })
    }

    fn address(&self, at: u64, len: usize) -> Result<u64> {
        let end = usize::try_from(at)?.checked_add(len).context("a range that wraps")?;
        ensure!(end <= self.len, "outside of the mapping");
        Ok(self.base.addr() as u64 + at)
    }

    /// Reads what the mapping shows at `at`.
    ///
    /// # Errors
    /// The file ends before: the access would be a SIGBUS.
    pub fn read(&self, at: u64, out: &mut [u8]) -> Result<()> {
        let address = self.address(at, out.len())?;
        own_memory()?.read_exact_at(out, address).context("SIGBUS")
    }

    /// Stores `data` at `at`.
    ///
    /// # Errors
    /// The file ends before, or the mapping is for reading alone: SIGBUS or SIGSEGV.
    pub fn write(&self, at: u64, data: &[u8]) -> Result<()> {
        let address = self.address(at, data.len())?;
        own_memory()?.write_all_at(data, address).context("SIGBUS or SIGSEGV")
    }
}

impl Drop for FileView {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, to which nothing refers.
        let _ = unsafe { rustix::mm::munmap(self.base, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_file_and_what_kills_a_vmm_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096 + 10).unwrap();
        let view = FileView::map(&file, 0, 3 * 4096, true).unwrap();
        view.write(4090, b"across pages").unwrap();
        let mut seen = [0; 12];
        file.read_exact_at(&mut seen, 4090).unwrap();
        assert_eq!(&seen, b"across pages");
        assert!(view.read(2 * 4096, &mut seen).is_err(), "the page behind the end");
        file.set_len(0).unwrap();
        assert!(view.read(0, &mut seen).is_err() && view.write(0, b"x").is_err());
        file.set_len(4096).unwrap();
        let reader = FileView::map(&file, 0, 4096, false).unwrap();
        reader.read(0, &mut seen).unwrap();
        assert!(reader.write(0, b"x").is_err());
    }
}
