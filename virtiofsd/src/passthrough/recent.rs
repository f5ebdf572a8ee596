//! Names just looked up, so that a GETATTR that follows need not open the inode.
//!
//! A new inode has no fd. To open it by its handle, to see that it is the right one, and to close it when it is
//! forgotten costs three system calls; to ask for its name again costs one, and shows by the same
//! identity that it is the right one. That pays once: an inode used twice is better open.

use std::ffi::CStr;
use std::sync::{Mutex, TryLockError};

/// Names kept. The next use of an inode follows its LOOKUP soon or not at all.
const NAMES: usize = 64;
/// Longest name kept, with its NUL, bytes.
const NAME_BYTES: usize = 48;

/// `inode` was found as `text` in `parent`. No inode has the number 0.
#[derive(Debug)]
struct Name {
    inode: u64,
    parent: u64,
    text: [u8; NAME_BYTES],
}

/// The names; whoever finds one in use by another thread does without.
#[derive(Debug)]
pub(super) struct RecentNames([Mutex<Name>; NAMES]);

impl RecentNames {
    pub(super) fn new() -> Self {
        let none = |_| Mutex::new(Name { inode: 0, parent: 0, text: [0; NAME_BYTES] });
        Self(std::array::from_fn(none))
    }

    /// Runs `what` with the entry that is `inode`'s or would be.
    fn with<T>(&self, inode: u64, what: impl FnOnce(&mut Name) -> Option<T>) -> Option<T> {
        let at = usize::try_from(inode % NAMES as u64).ok()?;
        match self.0.get(at)?.try_lock() {
            Ok(mut name) => what(&mut name),
            Err(TryLockError::Poisoned(name)) => what(&mut name.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Keeps where `inode` was found, if the name is not too long.
    pub(super) fn note(&self, inode: u64, parent: u64, name: &CStr) {
        let bytes = name.to_bytes_with_nul();
        self.with(inode, |entry| {
            entry.text.get_mut(..bytes.len())?.copy_from_slice(bytes);
            (entry.inode, entry.parent) = (inode, parent);
            Some(())
        });
    }

    /// Runs `what` with the parent and the name that `inode` was found under, which are forgotten.
    pub(super) fn take<T>(
        &self,
        inode: u64,
        what: impl FnOnce(u64, &CStr) -> Option<T>,
    ) -> Option<T> {
        self.with(inode, |entry| {
            if entry.inode != inode {
                return None;
            }
            entry.inode = 0;
            what(entry.parent, CStr::from_bytes_until_nul(&entry.text).ok()?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_found_once_and_for_its_inode_only() {
        let names = RecentNames::new();
        let found = |inode| names.take(inode, |parent, name| Some((parent, name.to_owned())));
        names.note(5, 1, c"five");
        assert_eq!(found(5 + NAMES as u64), None);
        assert_eq!(found(5), Some((1, c"five".to_owned())));
        assert_eq!(found(5), None);
        // A later one in its place, shorter.
        names.note(5, 1, c"a longer name");
        names.note(5 + NAMES as u64, 2, c"b");
        assert_eq!((found(5), found(5 + NAMES as u64)), (None, Some((2, c"b".to_owned()))));
        // One that does not fit is not kept, nor half of it.
        let long = std::ffi::CString::new("x".repeat(NAME_BYTES)).unwrap();
        names.note(7, 1, &long);
        assert_eq!(found(7), None);
    }
}
