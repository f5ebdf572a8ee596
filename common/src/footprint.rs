//! Memory that only the start-up needed, given back once a daemon serves.
//!
//! Most of a small daemon's resident memory is code that runs once: parsing arguments, building
//! filters, relocation. The kernel would reclaim it under pressure; a pod with many daemons is
//! better off without the wait.
#![allow(unsafe_code, reason = "walking the program's own segments and advising the kernel")]

use std::ffi::{c_int, c_void};

/// Gives unused heap and the pages of the program's code and constants back to the kernel.
///
/// What runs on is read again from the page cache, page by page, so call this once, when the
/// daemon begins to wait for its front end.
pub fn give_back_startup_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: trims free memory of the C library's allocator.
    unsafe {
        libc::malloc_trim(0)
    };
    advise_on_clean_segments(libc::MADV_DONTNEED);
}

/// Gives the kernel this advice on the program's segments that are never written: code, constants.
fn advise_on_clean_segments(advice: c_int) {
    let data = std::ptr::from_ref(&advice).cast_mut().cast();
    // SAFETY: the callback has the right signature, and `data` is what it takes it for.
    unsafe { libc::dl_iterate_phdr(Some(advise_on_program), data) };
}

/// Looks at the first object only, the program. Libraries are shared with other processes and cost
/// nothing.
extern "C" fn advise_on_program(
    program: *mut libc::dl_phdr_info,
    _size: usize,
    advice: *mut c_void,
) -> c_int {
    const LAST: c_int = 1;
    // SAFETY: `advise_on_clean_segments` passes a number that lives during the call.
    let Some(advice) = (unsafe { advice.cast::<c_int>().as_ref() }) else { return LAST };
    // SAFETY: the loader passes a structure that lives during the call.
    let Some(program) = (unsafe { program.as_ref() }) else { return LAST };
    // SAFETY: the loader's count is that of the table.
    let headers =
        unsafe { std::slice::from_raw_parts(program.dlpi_phdr, program.dlpi_phnum.into()) };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        // The sums are addresses of this process, and it has 64 bits.
        #[allow(clippy::cast_possible_truncation, reason = "usize is u64 on all targets")]
        let (start, length) =
            ((program.dlpi_addr + header.p_vaddr) as usize, header.p_memsz as usize);
        // Not rustix's: its first question is a system call that no daemon's list has.
        // SAFETY: asks for a number.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let (first, end) = (start & !(page - 1), (start + length) & !(page - 1));
        let address = std::ptr::with_exposed_provenance_mut(first);
        // SAFETY: whole pages of a private file mapping that is never written: what is dropped
        // comes back from the file unchanged. A failure changes nothing.
        unsafe { libc::madvise(address, end.saturating_sub(first), *advice) };
    }
    LAST
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_file_kib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    #[test]
    fn code_pages_go_and_come_back() {
        let status = crate::sandbox::tests::in_child(|| {
            // A forked child starts without the pages of files.
            advise_on_clean_segments(libc::MADV_POPULATE_READ);
            let before = resident_file_kib();
            give_back_startup_memory();
            let after = resident_file_kib();
            assert!(after < before / 2, "{before} KiB before, {after} KiB after");
            // The program still runs, code that was dropped included.
            assert_eq!(format!("{:?}", vec![1, 2]), "[1, 2]");
        });
        assert_eq!(status.exit_status(), Some(0), "{status:?}");
    }
}
