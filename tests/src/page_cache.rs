//! What of a file this machine has in memory. mincore(2); util-linux's `fincore`, which tells the same, is not
//! on every machine.
#![allow(unsafe_code, reason = "maps a file and asks the kernel about the mapping")]

use std::fs::File;
use std::io;
use std::path::Path;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags};
use rustix::param::page_size;

/// How many pages of `file` are in the page cache.
///
/// # Errors
/// When the file is empty, or cannot be opened and mapped.
pub fn resident_pages(file: &Path) -> io::Result<u64> {
    let file = File::open(file)?;
    let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    // SAFETY: the mapping is new, of no use to anybody else, and nothing reads through it.
    let at = unsafe {
        rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, &file, 0)
    }?;
    let mut pages = vec![0u8; len.div_ceil(page_size())];
    // SAFETY: `at` is the start of a mapping of `len` bytes, and `pages` has a byte for each page of it.
    let result = unsafe { libc::mincore(at, len, pages.as_mut_ptr()) };
    let error = io::Error::last_os_error();
    // SAFETY: the mapping was made above and nothing refers to it.
    unsafe { rustix::mm::munmap(at, len) }?;
    if result != 0 {
        return Err(error);
    }
    Ok(pages.iter().filter(|&&page| page & 1 != 0).count() as u64)
}
