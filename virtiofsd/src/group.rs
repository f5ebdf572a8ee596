//! `--socket-group`: who may connect besides the daemon's own user.
#![allow(unsafe_code, reason = "the C library's group database has no safe form")]

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The id of the group `name`, which may also be a number.
pub(crate) fn id_of(name: &str) -> io::Result<u32> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let missing = || io::Error::new(io::ErrorKind::NotFound, "there is no such group");
    let name = CString::new(name).map_err(|_nul_inside| missing())?;
    look_up(&name)?.ok_or_else(missing)
}

fn look_up(name: &CStr) -> io::Result<Option<u32>> {
    // A group of many members needs a large buffer.
    let mut buffer = vec![0; 1 << 20];
    let mut entry = MaybeUninit::<libc::group>::uninit();
    let mut found = std::ptr::null_mut();
    // SAFETY: the name ends in NUL, and all pointers are to values of the right type that outlive the
    // call; the length is the buffer's.
    let error = unsafe {
        libc::getgrnam_r(
            name.as_ptr(),
            entry.as_mut_ptr(),
            buffer.as_mut_ptr(),
            buffer.len(),
            &raw mut found,
        )
    };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    if found.is_null() {
        return Ok(None);
    }
    // SAFETY: the call succeeded and found a group, so it filled `entry`.
    Ok(Some(unsafe { entry.assume_init() }.gr_gid))
}

/// Gives the socket at `path` to group `gid`, whose members may connect.
pub(crate) fn give(path: &Path, gid: u32) -> io::Result<()> {
    std::os::unix::fs::chown(path, None, Some(gid))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_name_and_number() {
        assert_eq!(id_of("root").unwrap(), 0);
        assert_eq!(id_of("1234").unwrap(), 1234);
        assert!(id_of("no-such-group-here").is_err());
    }
}
