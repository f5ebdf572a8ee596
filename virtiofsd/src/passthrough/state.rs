//! A session as data: what a guest knows and has open, for a daemon that goes on in our place.
//!
//! # Theory of operation
//! The guest holds node ids and file handles, so these stay what they are; what they stand for has to
//! be found again. There are two ways to move. A *successor* on this machine inherits descriptors: open
//! files and the files that carry locks go as they are, locks included, inodes go as file handles
//! without being opened, and the VMM keeps what it has mapped of them (DAX). A *migration* (DEVICE_STATE) is bytes alone: the inode's path, found by the
//! kernel or else by searching the shared directory, or its file handle where both sides see the same
//! file system (`--migration-mode`); files are opened again with the flags they had.
//!
//! What cannot be found travels as lost, with the reason. The destination decides what that means
//! (`--migration-on-error`): no migration, or a node whose every use is `ESTALE`.
//!
//! The form is JSON, a record a line, from [`Record::Session`] to [`Record::End`]: it is written and read
//! as a stream, and half of it is not taken for all.

mod find;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use super::config::{MigrationMode, OnError};
use super::lookup::{identity_birth, type_of};
use super::sys::{self, RawHandle};
use super::{PassthroughFs, dir, errno, key_of};
use crate::dax::state::{SavedClaim, SavedWindow};
use crate::fuse::extension::Origin;
use crate::inode_store::restore::ListedNode;
use crate::inode_store::{Handle, Key, NewNode, NodeFd, NodeInfo, ROOT_ID};

/// Layout of the records; only the same one can be loaded.
const VERSION: u32 = 1;
/// Bytes of a record at the most: a path, each byte as a number, and little else.
const MAX_RECORD: u64 = 64 << 10;
/// The identity's mount of a lost node: no mount has it.
const NO_MOUNT: u32 = u32::MAX;

/// A file handle: the kernel's type, and bytes.
type SavedHandle = (i32, Vec<u8>);

/// Where an inode is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Place {
    /// At this path below the shared directory.
    Path(String),
    /// At this path, which is no text.
    Bytes(Vec<u8>),
    /// Its file handle opens it, on the shared directory's own mount.
    Handle(SavedHandle),
    /// The same, known to have this inode number and birth time: it need not be opened now.
    Known { handle: SavedHandle, ino: u64, birth_ns: u64, verified: bool },
    /// This descriptor of those that come along.
    Fd(usize),
    /// It cannot be found, for this reason.
    Lost(String),
}

#[derive(Debug, Serialize, Deserialize)]
enum Record {
    /// The first.
    Session {
        version: u32,
        flags: u64,
        root_ino: u64,
        root_dev: u32,
    },
    Node {
        id: u64,
        lookups: u64,
        file_type: u32,
        submount: bool,
        indexed: bool,
        place: Place,
        /// What the inode found must have as its handle.
        check: Option<SavedHandle>,
    },
    /// `fd`: among those that come along.
    File {
        handle: u64,
        node: u64,
        flags: i32,
        fd: Option<usize>,
    },
    Dir {
        handle: u64,
        node: u64,
        fd: Option<usize>,
    },
    Lock {
        node: u64,
        owner: u64,
        pid: u32,
        fd: usize,
    },
    /// The DAX window; its claims come after it.
    Window(SavedWindow),
    Claim(SavedClaim),
    /// The last.
    End,
}

fn saved_handle(handle: &Handle) -> Option<SavedHandle> {
    handle.parts().map(|(kind, bytes)| (kind, bytes.to_vec()))
}

/// Who comes after us.
enum To<'a> {
    /// A process that gets these descriptors.
    Successor(&'a mut Vec<OwnedFd>),
    Migration,
}

impl To<'_> {
    fn add(&mut self, fd: impl AsFd) -> anyhow::Result<Option<usize>> {
        let Self::Successor(fds) = self else { return Ok(None) };
        fds.push(fd.as_fd().try_clone_to_owned().context("a second descriptor of an open file")?);
        Ok(Some(fds.len() - 1))
    }
}

/// What came along with the records.
struct Came {
    /// Descriptors not used yet.
    fds: Vec<Option<OwnedFd>>,
    /// The records are our predecessor's own.
    trusted: bool,
}

impl Came {
    fn new(origin: Origin) -> Self {
        match origin {
            Origin::Vmm => Self { fds: Vec::new(), trusted: false },
            Origin::Predecessor(fds) => {
                Self { fds: fds.into_iter().map(Some).collect(), trusted: true }
            }
        }
    }

    fn take(&mut self, at: usize) -> anyhow::Result<OwnedFd> {
        let fd = self.fds.get_mut(at).and_then(Option::take);
        fd.context("a descriptor of the saved state is missing")
    }
}

/// What is being put together from records.
#[derive(Default)]
struct Loading {
    /// Files that the VMM has mapped, by the number of their descriptor.
    mapped: HashMap<usize, Arc<OwnedFd>>,
    files: Vec<(u64, super::data::OpenFile)>,
    dirs: Vec<(u64, dir::OpenDir)>,
}

fn put(to: &mut dyn Write, record: &Record) -> anyhow::Result<()> {
    serde_json::to_writer(&mut *to, record)?;
    to.write_all(b"\n")?;
    Ok(())
}

impl PassthroughFs {
    /// Whether a session can be saved for another machine.
    pub(super) fn can_migrate(&self) -> bool {
        // Mappings of the guest's window are the VMM's, and cannot be made to move with it.
        self.dax.is_none()
    }

    /// Writes the session to `to`, for another machine or a VMM's file.
    pub(super) fn save_bytes(&self, to: &mut dyn Write) -> anyhow::Result<()> {
        ensure!(self.can_migrate(), "files that are mapped with DAX cannot be moved");
        ensure!(
            self.locks.list().is_empty() && !self.files.list().iter().any(|(_, f)| f.is_flocked()),
            "the guest holds locks on the host; these cannot move with it"
        );
        self.save_to(to, &mut To::Migration)
    }

    /// Writes the session to `to` for a process that gets the descriptors added to `fds` too.
    pub(super) fn save_with_fds(
        &self,
        to: &mut dyn Write,
        fds: &mut Vec<OwnedFd>,
    ) -> anyhow::Result<()> {
        self.save_to(to, &mut To::Successor(fds))
    }

    fn save_to(&self, to: &mut dyn Write, whom: &mut To<'_>) -> anyhow::Result<()> {
        let root = self.inodes.root_info().key;
        let flags = self.negotiated.load(Ordering::Relaxed);
        put(
            to,
            &Record::Session { version: VERSION, flags, root_ino: root.ino, root_dev: root.dev },
        )?;
        let nodes = self.inodes.list();
        let places = self.places(&nodes, whom)?;
        for (node, place) in nodes.iter().zip(places) {
            let verify = self.config.migration.verify_handles && matches!(whom, To::Migration);
            let record = Record::Node {
                id: node.id,
                lookups: node.lookups,
                file_type: node.info.file_type,
                submount: node.info.submount,
                indexed: node.indexed,
                place,
                check: if verify { self.handle_of(node) } else { None },
            };
            put(to, &record)?;
        }
        for (handle, file) in self.files.list() {
            let flags = rustix::fs::fcntl_getfl(&file.fd).context("flags of an open file")?;
            let flags = flags.bits().cast_signed();
            let fd = whom.add(&file.fd)?;
            put(to, &Record::File { handle, node: file.inode, flags, fd })?;
        }
        for (handle, dir) in self.dirs.list() {
            let fd = whom.add(dir.fd())?;
            put(to, &Record::Dir { handle, node: dir.inode(), fd })?;
        }
        for ((node, owner), fd, pid) in self.locks.list() {
            if let Some(fd) = whom.add(&*fd)? {
                put(to, &Record::Lock { node, owner, pid, fd })?;
            }
        }
        self.save_window(to, whom)?;
        put(to, &Record::End)
    }

    fn save_window(&self, to: &mut dyn Write, whom: &mut To<'_>) -> anyhow::Result<()> {
        let Some(dax) = &self.dax else { return Ok(()) };
        let (window, claims) =
            dax.save(|fd| whom.add(fd)?.context("mapped files go to a successor"))?;
        put(to, &Record::Window(window))?;
        claims.into_iter().try_for_each(|claim| put(to, &Record::Claim(claim)))
    }

    /// Puts the window or a claim of it back.
    fn load_window(
        &self,
        record: Record,
        came: &mut Came,
        mapped: &mut HashMap<usize, Arc<OwnedFd>>,
    ) -> anyhow::Result<()> {
        let dax = self.dax.as_ref();
        let dax = dax.context("the guest uses DAX: the successor needs the same --dax options")?;
        match record {
            Record::Window(window) => dax.load(window, |fd| came.take(fd)),
            Record::Claim(claim) => {
                let file = match mapped.get(&claim.file()) {
                    Some(file) => file.clone(),
                    None => Arc::new(came.take(claim.file())?),
                };
                mapped.insert(claim.file(), file.clone());
                dax.load_claim(claim, file)
            }
            _ => Ok(()),
        }
    }

    /// The handle of a node, known or asked for.
    fn handle_of(&self, node: &ListedNode) -> Option<SavedHandle> {
        saved_handle(&node.info.handle).or_else(|| {
            let fd = node.fd.as_ref()?;
            let raw = sys::name_to_handle(fd.as_fd(), c"").ok()?;
            Some((raw.kind(), raw.bytes().to_vec()))
        })
    }

    /// Where each of `nodes` is.
    fn places(&self, nodes: &[ListedNode], whom: &mut To<'_>) -> anyhow::Result<Vec<Place>> {
        let root_mount = self.inodes.root_info().key.mount;
        let mut places: Vec<Option<Place>> = Vec::with_capacity(nodes.len());
        for node in nodes {
            let handle = || self.handle_of(node).filter(|_| node.info.key.mount == root_mount);
            places.push(match whom {
                To::Successor(_) => saved_handle(&node.info.handle)
                    .filter(|_| node.info.key.mount == root_mount)
                    .map(|handle| Place::Known {
                        handle,
                        ino: node.info.key.ino,
                        birth_ns: node.info.birth_ns,
                        verified: node.info.verified,
                    }),
                To::Migration => match self.config.migration.mode {
                    MigrationMode::FindPaths => None,
                    MigrationMode::FileHandles => Some(handle().map_or_else(
                        || {
                            Place::Lost(
                                "it has no file handle on the shared directory's mount".to_owned(),
                            )
                        },
                        Place::Handle,
                    )),
                },
            });
        }
        self.find_paths(nodes, &mut places);
        if self.config.migration.confirm_paths {
            self.confirm_paths(nodes, &mut places);
        }
        let mut all = Vec::with_capacity(nodes.len());
        for (node, place) in nodes.iter().zip(places) {
            let place = match (place, &node.fd) {
                (Some(place), _) => place,
                (None, Some(fd)) if matches!(whom, To::Successor(_)) => {
                    Place::Fd(whom.add(fd)?.context("a successor takes descriptors")?)
                }
                _ => Place::Lost("it has no path in the shared directory any more".to_owned()),
            };
            all.push(place);
        }
        Ok(all)
    }

    /// Becomes what was saved, in place of whatever is there. Returns the flags of INIT.
    pub(super) fn load_from(&self, from: &mut dyn Read, origin: Origin) -> anyhow::Result<u64> {
        self.reset();
        let loaded = self.load_records(from, Came::new(origin));
        if loaded.is_err() {
            self.reset();
        }
        loaded
    }

    fn load_records(&self, from: &mut dyn Read, mut came: Came) -> anyhow::Result<u64> {
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        let mut next = || -> anyhow::Result<Record> {
            line.clear();
            Read::take(&mut from, MAX_RECORD).read_until(b'\n', &mut line)?;
            serde_json::from_slice(&line).context("a record of the saved state")
        };
        let Record::Session { version, flags, root_ino, root_dev } = next()? else {
            bail!("the saved state does not begin as one does");
        };
        ensure!(version == VERSION, "the saved state has version {version}, not {VERSION}");
        // A predecessor's window comes back with the session, which is resumed after this.
        let window = came.trusted && self.dax.is_some();
        let unknown = flags & !self.offered(flags, window)?;
        ensure!(
            unknown == 0,
            "the guest uses what this daemon does not offer (FUSE flags {unknown:#x}): start it with the \
             options of the one before"
        );
        self.negotiated.store(flags, Ordering::Relaxed);
        let root = self.inodes.root_info().key;
        let same_root = (root.ino, root.dev) == (root_ino, root_dev);
        let mut loading = Loading::default();
        loop {
            match next()? {
                Record::Session { .. } => bail!("the saved state begins twice"),
                Record::End => break,
                Record::Node { id, lookups, file_type, submount, indexed, place, check } => {
                    ensure!(
                        same_root || !matches!(place, Place::Known { .. }),
                        "the successor shares another directory"
                    );
                    let found = self.find(place, file_type, submount, check, &mut came);
                    let found = found.with_context(|| format!("inode {id:#x}"));
                    let (new, known) = match found {
                        Ok(new) => (new, true),
                        Err(error) => (self.lost(id, file_type, error)?, false),
                    };
                    let mount = new.info.key.mount;
                    if !self.inodes.restore(id, lookups, indexed && known, new) {
                        self.mounts.release(mount);
                        bail!("inode {id:#x} is there twice, or can be none");
                    }
                }
                record @ (Record::Window(_) | Record::Claim(_)) => {
                    self.load_window(record, &mut came, &mut loading.mapped)?;
                }
                record => self.load_open(record, &mut came, &mut loading)?,
            }
        }
        self.inodes.restored();
        ensure!(
            self.files.restore(loading.files) && self.dirs.restore(loading.dirs),
            "a handle of the saved state can be none"
        );
        Ok(flags)
    }

    /// What stands for an inode that was not found, if that is allowed.
    fn lost(&self, id: u64, file_type: u32, error: anyhow::Error) -> anyhow::Result<NewNode> {
        if self.config.migration.on_error == OnError::Abort {
            return Err(error);
        }
        tracing::warn!(error = format!("{error:#}"), "the guest will get errors for an inode");
        let key = Key { ino: id, mount: NO_MOUNT, dev: u32::MAX };
        let info = NodeInfo {
            key,
            birth_ns: 0,
            file_type,
            submount: false,
            verified: false,
            handle: Handle::None,
        };
        Ok(NewNode { info, fd: None })
    }

    /// Puts an open file, an open directory or a lock back.
    fn load_open(
        &self,
        record: Record,
        came: &mut Came,
        loading: &mut Loading,
    ) -> anyhow::Result<()> {
        match record {
            Record::File { handle, node, flags, fd } => {
                // As OPEN would have it now: what is read-only stays so.
                let flags = self.host_flags((flags & !libc::O_TRUNC).cast_unsigned());
                let opened = flags.map_err(anyhow::Error::from).and_then(|flags| {
                    let fd = match fd {
                        Some(fd) => came.take(fd)?,
                        None => self.open_node(node, flags)?,
                    };
                    Ok((fd, flags))
                });
                if let Some((fd, flags)) = self.tolerated(opened.context("an open file"))? {
                    loading.files.push((handle, self.open_file_of(node, fd, flags)));
                }
            }
            Record::Dir { handle, node, fd } => {
                // Opened anew, it is on this process' own mount.
                let flags = libc::O_RDONLY | libc::O_DIRECTORY;
                let opened = match (self.open_node(node, flags), fd) {
                    (Ok(opened), _) => Ok(opened),
                    (Err(_), Some(fd)) => came.take(fd),
                    (Err(error), None) => Err(error.into()),
                };
                if let Some(fd) = self.tolerated(opened.context("an open directory"))? {
                    loading.dirs.push((handle, dir::OpenDir::new(fd, node)));
                }
            }
            Record::Lock { node, owner, pid, fd } => {
                self.locks.restore((node, owner), came.take(fd)?, pid);
            }
            _ => {}
        }
        Ok(())
    }

    fn tolerated<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if self.config.migration.on_error == OnError::Abort => Err(error),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "the guest will get errors");
                Ok(None)
            }
        }
    }

    /// The inode at `place`, as a node.
    fn find(
        &self,
        place: Place,
        file_type: u32,
        submount: bool,
        check: Option<SavedHandle>,
        came: &mut Came,
    ) -> anyhow::Result<NewNode> {
        let root = self.inodes.root_info().key;
        let fd = match place {
            Place::Lost(why) => bail!("{why}"),
            Place::Known { handle: (kind, bytes), ino, birth_ns, verified } => {
                ensure!(came.trusted, "a file handle without proof is for a successor only");
                ensure!(
                    self.mounts.count(root.mount),
                    "file handles cannot be opened here (see --inode-file-handles)"
                );
                let key = Key { ino, ..root };
                let handle = Handle::new(kind, &bytes);
                let info = NodeInfo { key, birth_ns, file_type, submount, verified, handle };
                return Ok(NewNode { info, fd: None });
            }
            Place::Fd(at) => {
                let fd = came.take(at)?;
                let stat = sys::statx(fd.as_fd(), c"", 0, sys::STATX_MASK)?;
                // Of the old process' mount, which this one cannot reach otherwise.
                let key = Key { mount: NO_MOUNT, ..key_of(&stat) };
                let handle = Handle::None;
                let info =
                    NodeInfo { key, birth_ns: 0, file_type, submount, verified: true, handle };
                return Ok(NewNode { info, fd: Some(NodeFd::new(fd)) });
            }
            Place::Path(path) => self.open_path_below(path.as_bytes())?,
            Place::Bytes(path) => self.open_path_below(&path)?,
            Place::Handle((kind, bytes)) => {
                // A handle may name any inode of the file system, also one that is not shared.
                ensure!(
                    self.config.migration.mode == MigrationMode::FileHandles,
                    "the saved state has file handles, which lead out of the shared directory too: if \
                     whoever sends it is trusted, start this daemon with --migration-mode=file-handles"
                );
                let mount = self.mounts.get(root.mount);
                let mount = mount.as_ref().and_then(|mount| mount.fd());
                let mount = mount
                    .context("file handles cannot be opened here (see --inode-file-handles)")?;
                sys::open_by_handle(mount, &RawHandle::new(kind, &bytes), libc::O_PATH)
                    .context("opening its file handle")?
            }
        };
        if let Some((kind, bytes)) = check {
            let now = sys::name_to_handle(fd.as_fd(), c"").context("its file handle")?;
            ensure!(
                now.kind() == kind && now.bytes() == bytes,
                "what is at its place is another inode"
            );
        }
        Ok(self.node_of(fd, file_type, submount)?)
    }

    /// A node for what `fd` is, which must be a `file_type`.
    fn node_of(&self, fd: OwnedFd, file_type: u32, submount: bool) -> std::io::Result<NewNode> {
        let stat = sys::statx(fd.as_fd(), c"", 0, sys::STATX_MASK)?;
        if type_of(&stat) != file_type {
            return Err(errno(libc::ESTALE));
        }
        let key = key_of(&stat);
        // A file's own mount may not be known yet; a probe of it needs a directory.
        let handle = if self.mounts.get(key.mount).is_some() || file_type == libc::S_IFDIR {
            self.mounts.acquire(fd.as_fd(), c"", key)?
        } else {
            Handle::None
        };
        let birth_ns = identity_birth(&stat, &handle);
        let pinned = handle == Handle::None;
        let info = NodeInfo { key, birth_ns, file_type, submount, verified: true, handle };
        Ok(NewNode { info, fd: pinned.then(|| NodeFd::new(fd)) })
    }
}

/// The node id of the shared directory is not among those saved.
const _: () = assert!(ROOT_ID == 1, "the root is node 1 in every session");
