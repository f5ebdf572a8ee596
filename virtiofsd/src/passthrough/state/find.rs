//! Paths of inodes: what the kernel remembers of an open one, and a search for the rest.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags, ResolveFlags, openat2};

use super::super::sys::{self, FdName};
use super::super::{PassthroughFs, errno, key_of};
use super::Place;
use crate::inode_store::restore::ListedNode;
use crate::inode_store::{Key, ROOT_ID};

/// Directories inside each other that a search goes into.
const MAX_DEPTH: usize = 512;

fn place_of(path: Vec<u8>) -> Place {
    match String::from_utf8(path) {
        Ok(path) => Place::Path(path),
        Err(error) => Place::Bytes(error.into_bytes()),
    }
}

impl PassthroughFs {
    /// Opens `path` below the shared directory, through no symbolic link.
    pub(super) fn open_path_below(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let root = self.node_fd(ROOT_ID)?;
        let path = CString::new(path).map_err(|_nul| errno(libc::EINVAL))?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(root.as_fd(), path.as_c_str(), flags, Mode::empty(), resolve)?)
    }

    /// What the kernel calls the file of `fd`.
    fn name_of(&self, fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
        let mut room = [MaybeUninit::<u8>::uninit(); libc::PATH_MAX as usize];
        let name = FdName::new(fd);
        let (path, _) = rustix::fs::readlinkat_raw(self.proc_fd(), name.as_c_str(), &mut room)?;
        Ok(path.to_vec())
    }

    /// Whether `path` leads to the inode `key`.
    fn leads_to(&self, path: &[u8], key: Key) -> bool {
        let stat = self
            .open_path_below(path)
            .and_then(|fd| sys::statx(fd.as_fd(), c"", 0, sys::STATX_MASK));
        stat.is_ok_and(|stat| key_of(&stat) == key)
    }

    /// The path of a node from the kernel's memory, if it leads there.
    fn remembered(&self, root: &[u8], node: &ListedNode) -> Option<Vec<u8>> {
        let fd = self.node_fd(node.id).ok()?;
        let path = self.name_of(fd.as_fd()).ok()?;
        let path = path.strip_prefix(root)?;
        let path = path.strip_prefix(b"/").unwrap_or(path);
        (!path.is_empty() && self.leads_to(path, node.info.key)).then(|| path.to_vec())
    }

    /// Fills in the paths of those `nodes` that have no place yet and can be found.
    pub(super) fn find_paths(&self, nodes: &[ListedNode], places: &mut [Option<Place>]) {
        let Ok(root) = self.node_fd(ROOT_ID).and_then(|fd| self.name_of(fd.as_fd())) else {
            return;
        };
        let root: &[u8] = if root == b"/" { b"" } else { &root };
        let mut missing = HashMap::new();
        for ((at, node), place) in nodes.iter().enumerate().zip(places.iter_mut()) {
            if place.is_some() {
                continue;
            }
            match self.remembered(root, node) {
                Some(path) => *place = Some(place_of(path)),
                None => drop(missing.insert(node.info.key, at)),
            }
        }
        if missing.is_empty() {
            return;
        }
        let Ok(top) = self.node_fd(ROOT_ID).and_then(|fd| self.list(fd.as_fd())) else { return };
        let mut search = Search { missing, places };
        search.walk(top, &mut Vec::new(), 0);
    }

    /// Looks again at each path found; what changed meanwhile is searched for anew, once.
    pub(super) fn confirm_paths(&self, nodes: &[ListedNode], places: &mut [Option<Place>]) {
        let mut wrong = false;
        for (node, place) in nodes.iter().zip(places.iter_mut()) {
            let path = match place {
                Some(Place::Path(path)) => path.as_bytes(),
                Some(Place::Bytes(path)) => path,
                _ => continue,
            };
            if !self.leads_to(path, node.info.key) {
                *place = None;
                wrong = true;
            }
        }
        if wrong {
            self.find_paths(nodes, places);
        }
    }

    /// Opens a directory for listing.
    fn list(&self, dir: BorrowedFd<'_>) -> io::Result<Dir> {
        let fd = self.reopen_fd(dir, libc::O_RDONLY | libc::O_DIRECTORY)?;
        Ok(Dir::new(fd)?)
    }
}

/// A search of the whole directory for what is still missing.
struct Search<'a> {
    missing: HashMap<Key, usize>,
    places: &'a mut [Option<Place>],
}

impl Search<'_> {
    fn walk(&mut self, mut dir: Dir, path: &mut Vec<u8>, depth: usize) {
        let mut inside = Vec::new();
        while let Some(Ok(entry)) = dir.read() {
            let name = entry.file_name();
            if self.missing.is_empty() || matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let Ok(fd) = dir.fd() else { return };
            let Ok(stat) = sys::statx(fd, name, 0, sys::STATX_MASK) else { continue };
            if let Some(at) = self.missing.remove(&key_of(&stat)) {
                let found = [path, name.to_bytes()].concat();
                if let Some(place) = self.places.get_mut(at) {
                    *place = Some(place_of(found));
                }
            }
            if super::super::lookup::type_of(&stat) == libc::S_IFDIR && depth < MAX_DEPTH {
                inside.push(name.to_owned());
            }
        }
        for name in inside {
            if self.missing.is_empty() {
                return;
            }
            let Ok(fd) = dir.fd() else { return };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = rustix::fs::openat(fd, name.as_c_str(), flags, Mode::empty());
            let Ok(child) = opened.and_then(Dir::new) else { continue };
            let before = path.len();
            path.extend_from_slice(name.to_bytes());
            path.push(b'/');
            self.walk(child, path, depth + 1);
            path.truncate(before);
        }
    }
}
