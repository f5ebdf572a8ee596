//! The inodes that the guest knows, found by node id and by identity.
//!
//! # Theory of operation
//! An inode that the guest has looked up has a [`Node`]: its identity ([`Key`]: inode number, device,
//! mount; and the birth time, which tells a reused inode number apart), the kernel's file handle, the
//! number of lookups the guest has still to forget, and, while it is *hot*, an `O_PATH` fd. A node with
//! a file handle may lose its fd at any time, since the handle can open it again; so the number of
//! open fds is bounded whatever the number of nodes. A node without a handle keeps its fd ("pinned").
//!
//! Nodes lie in slots of 16 shards, each under one reader-writer lock. A node id names shard, slot and
//! the slot's generation, so a lookup by id is an array access, and an id that the guest made up or has
//! forgotten finds nothing. The index by identity holds 4-byte slot numbers only; it hashes through the
//! slots. An identity and its index entry are in the same shard, so that no call takes two locks.
//! Lookups of known inodes and every use by id take the lock for reading and write atomics only.
//!
//! Cooling is the clock algorithm: using a node marks it; when a shard has its share of hot nodes, the
//! hand passes over marked ones, unmarking them, and takes the fd of the first unmarked one. The fd is
//! reference-counted: a request that runs with it keeps it open until it is done.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use hashbrown::HashTable;

use restore::Elsewhere;

pub mod restore;

/// Shards; a power of two.
const SHARDS: usize = 16;
const SHARD_BITS: u32 = SHARDS.trailing_zeros();
/// Bytes of a file handle kept in the node itself; ext4 needs 8, tmpfs 12, xfs 12, btrfs 20.
const INLINE_HANDLE: usize = 20;

/// The node id of the shared directory (FUSE_ROOT_ID).
pub const ROOT_ID: u64 = 1;

/// What makes two names the same inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Inode number.
    pub ino: u64,
    /// Mount the inode was reached through (`stx_mnt_id`).
    pub mount: u32,
    /// Device, as the kernel packs it: 12 bits of major, 20 of minor.
    pub dev: u32,
}

impl Key {
    #[inline]
    fn hash(self) -> u64 {
        // The finaliser of splitmix64: inode numbers are dense, and every bit must count.
        let mut x = self.ino ^ (u64::from(self.dev) << 40) ^ (u64::from(self.mount) << 20);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

/// The kernel's file handle of an inode, kept small.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handle {
    /// There is none; the node keeps its fd.
    None,
    /// A handle of at most 20 bytes.
    Inline {
        /// The kernel's handle type.
        kind: u8,
        /// Bytes used.
        len: u8,
        /// The handle.
        data: [u8; INLINE_HANDLE],
    },
    /// A longer handle, or one with an unusual type.
    Boxed(Arc<(i32, Box<[u8]>)>),
}

impl Handle {
    /// Keeps a handle of type `kind`.
    #[must_use]
    pub fn new(kind: i32, bytes: &[u8]) -> Self {
        let mut data = [0; INLINE_HANDLE];
        match (u8::try_from(kind), u8::try_from(bytes.len()), data.get_mut(..bytes.len())) {
            (Ok(kind), Ok(len), Some(room)) => {
                room.copy_from_slice(bytes);
                Self::Inline { kind, len, data }
            }
            _ => Self::Boxed(Arc::new((kind, bytes.into()))),
        }
    }

    /// Type and bytes, if there is a handle.
    #[must_use]
    pub fn parts(&self) -> Option<(i32, &[u8])> {
        match self {
            Self::None => None,
            Self::Inline { kind, len, data } => {
                Some(((*kind).into(), data.get(..usize::from(*len))?))
            }
            Self::Boxed(both) => Some((both.0, &both.1)),
        }
    }
}

/// An fd of a node, held open while this lives.
#[derive(Debug, Clone)]
pub struct NodeFd(Arc<OwnedFd>);

impl NodeFd {
    /// Shares `fd`.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }
}

impl AsFd for NodeFd {
    #[inline]
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a caller learns of a node.
#[derive(Debug, Clone)]
pub struct NodeInfo {
    /// Identity.
    pub key: Key,
    /// Birth time, nanoseconds since the epoch, 0 if unknown.
    pub birth_ns: u64,
    /// File type, the `S_IFMT` bits of the mode.
    pub file_type: u32,
    /// A directory on which something else is mounted than on its parent.
    pub submount: bool,
    /// The handle was found to open this very inode.
    pub verified: bool,
    /// The file handle.
    pub handle: Handle,
}

/// A node to add.
#[derive(Debug)]
pub struct NewNode {
    /// Everything but the fd.
    pub info: NodeInfo,
    /// An `O_PATH` fd; needed if there is no handle.
    pub fd: Option<NodeFd>,
}

#[derive(Debug)]
struct Node {
    key: Key,
    birth_ns: u64,
    lookups: AtomicU64,
    handle: Handle,
    fd: Option<NodeFd>,
    generation: u32,
    file_type: u16,
    used: AtomicBool,
    verified: AtomicBool,
    submount: bool,
    /// In the index by identity; no longer so once its last name is gone.
    indexed: bool,
    /// The slot holds a node.
    live: bool,
}

impl Node {
    fn info(&self) -> NodeInfo {
        NodeInfo {
            key: self.key,
            birth_ns: self.birth_ns,
            file_type: u32::from(self.file_type) << 12,
            submount: self.submount,
            verified: self.verified.load(Ordering::Relaxed),
            handle: self.handle.clone(),
        }
    }
}

#[derive(Debug, Default)]
struct Shard {
    nodes: Vec<Node>,
    free: Vec<u32>,
    index: HashTable<u32>,
    /// Slots of the nodes whose fd can be taken away, and the clock's hand in it.
    hot: Vec<u32>,
    hand: usize,
}

impl Shard {
    #[inline]
    fn find(&self, key: Key, birth_ns: u64) -> Option<u32> {
        let same = |&slot: &u32| {
            self.nodes
                .get(slot as usize)
                .is_some_and(|node| node.key == key && node.birth_ns == birth_ns)
        };
        self.index.find(key.hash(), same).copied()
    }

    #[inline]
    fn get(&self, id: u64) -> Option<&Node> {
        let (slot, generation) = split(id);
        self.nodes.get(slot).filter(|node| node.live && node.generation == generation)
    }

    fn get_mut(&mut self, id: u64) -> Option<&mut Node> {
        let (slot, generation) = split(id);
        self.nodes.get_mut(slot).filter(|node| node.live && node.generation == generation)
    }

    fn unindex(&mut self, slot: usize) {
        let Some(node) = self.nodes.get_mut(slot) else { return };
        if !std::mem::take(&mut node.indexed) {
            return;
        }
        let hash = node.key.hash();
        if let Ok(entry) = self.index.find_entry(hash, |&other| other as usize == slot) {
            entry.remove();
        }
    }

    /// Takes the node out; its fd is returned to be closed when the lock is gone.
    fn remove(&mut self, slot: usize) -> Option<NodeFd> {
        self.unindex(slot);
        let node = self.nodes.get_mut(slot)?;
        node.live = false;
        node.generation = node.generation.wrapping_add(1).max(1);
        let hot = node.fd.is_some() && node.handle != Handle::None;
        node.handle = Handle::None;
        let fd = node.fd.take();
        let slot = u32::try_from(slot).ok()?;
        if hot && let Some(at) = self.hot.iter().position(|&other| other == slot) {
            self.hot.swap_remove(at);
        }
        self.free.push(slot);
        fd
    }

    /// Makes `slot` one of at most `limit` hot ones; returns the fd of the one that cooled for it.
    fn heat(&mut self, slot: u32, limit: usize) -> Option<NodeFd> {
        if self.hot.len() < limit {
            self.hot.push(slot);
            return None;
        }
        // Twice round at most: the first round unmarks.
        for _ in 0..self.hot.len() * 2 {
            self.hand = (self.hand + 1) % self.hot.len();
            let Some(place) = self.hot.get_mut(self.hand) else { break };
            let Some(node) = self.nodes.get_mut(*place as usize) else { break };
            if !node.used.swap(false, Ordering::Relaxed) {
                *place = slot;
                return node.fd.take();
            }
        }
        self.hot.push(slot);
        None
    }
}

/// Slot and generation of a node id.
#[inline]
#[allow(clippy::cast_possible_truncation, reason = "takes halves of a 64-bit id apart")]
fn split(id: u64) -> (usize, u32) {
    ((id as u32 >> SHARD_BITS) as usize, (id >> 32) as u32)
}

/// The inodes that the guest knows.
#[derive(Debug)]
pub struct InodeStore {
    root: RwLock<Arc<RootNode>>,
    shards: [RwLock<Shard>; SHARDS],
    hot_per_shard: AtomicUsize,
    count: AtomicUsize,
    elsewhere: Elsewhere,
}

/// The shared directory.
#[derive(Debug)]
struct RootNode {
    info: NodeInfo,
    fd: NodeFd,
}

fn read(lock: &RwLock<Shard>) -> RwLockReadGuard<'_, Shard> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write(lock: &RwLock<Shard>) -> RwLockWriteGuard<'_, Shard> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl InodeStore {
    /// A store that knows the shared directory only, and keeps about `hot_limit` fds open for nodes
    /// that have handles.
    #[must_use]
    pub fn new(root: NodeInfo, fd: NodeFd, hot_limit: usize) -> Self {
        Self {
            root: RwLock::new(Arc::new(RootNode { info: root, fd })),
            shards: std::array::from_fn(|_| RwLock::new(Shard::default())),
            hot_per_shard: AtomicUsize::new((hot_limit / SHARDS).max(2)),
            count: AtomicUsize::new(0),
            elsewhere: Elsewhere::default(),
        }
    }

    #[inline]
    fn shard(&self, id: u64) -> &RwLock<Shard> {
        // The mask keeps the index in range.
        &self.shards[usize::try_from(id).unwrap_or(0) & (SHARDS - 1)]
    }

    fn root(&self) -> Arc<RootNode> {
        Arc::clone(&self.root.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nodes known, without the root.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether only the root is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The fd of a hot or pinned node.
    #[inline]
    #[must_use]
    pub fn fd(&self, id: u64) -> Option<NodeFd> {
        if id == ROOT_ID {
            return Some(self.root().fd.clone());
        }
        let shard = read(self.shard(id));
        let node = shard.get(id)?;
        let fd = node.fd.clone()?;
        if !node.used.load(Ordering::Relaxed) {
            node.used.store(true, Ordering::Relaxed);
        }
        Some(fd)
    }

    /// What is known of a node.
    #[must_use]
    pub fn info(&self, id: u64) -> Option<NodeInfo> {
        if id == ROOT_ID {
            return Some(self.root().info.clone());
        }
        read(self.shard(id)).get(id).map(Node::info)
    }

    /// Identity and birth time of a node that is still found by them; not the root's.
    #[inline]
    #[must_use]
    pub fn identity(&self, id: u64) -> Option<(Key, u64)> {
        let shard = read(self.shard(id));
        let node = shard.get(id).filter(|node| node.indexed)?;
        Some((node.key, node.birth_ns))
    }

    /// File type (`S_IFMT` bits) and whether it is a submount; cheaper than [`Self::info`].
    #[inline]
    #[must_use]
    pub fn kind(&self, id: u64) -> Option<(u32, bool)> {
        if id == ROOT_ID {
            return Some((libc::S_IFDIR, false));
        }
        let shard = read(self.shard(id));
        shard.get(id).map(|node| (u32::from(node.file_type) << 12, node.submount))
    }

    /// The mount that a node is on.
    #[must_use]
    pub fn mount(&self, id: u64) -> Option<u32> {
        if id == ROOT_ID {
            return Some(self.root().info.key.mount);
        }
        read(self.shard(id)).get(id).map(|node| node.key.mount)
    }

    /// Finds a node by identity and counts a lookup for it.
    #[inline]
    #[must_use]
    pub fn look_up(&self, key: Key, birth_ns: u64) -> Option<u64> {
        let number = shard_number(key);
        let shard = read(self.shards.get(number)?);
        let Some(slot) = shard.find(key, birth_ns) else {
            drop(shard);
            let id = self.elsewhere.find(key, birth_ns)?;
            let shard = read(self.shard(id));
            shard.get(id)?.lookups.fetch_add(1, Ordering::Relaxed);
            return Some(id);
        };
        let node = shard.nodes.get(slot as usize)?;
        node.lookups.fetch_add(1, Ordering::Relaxed);
        Some(join(number, slot, node.generation))
    }

    /// Finds a node by identity without counting.
    #[must_use]
    pub fn peek(&self, key: Key, birth_ns: u64) -> Option<u64> {
        let number = shard_number(key);
        let shard = read(self.shards.get(number)?);
        let Some(slot) = shard.find(key, birth_ns) else {
            return self.elsewhere.find(key, birth_ns);
        };
        shard.nodes.get(slot as usize).map(|node| join(number, slot, node.generation))
    }

    /// Adds a node with one lookup and returns true beside its id; if another thread was faster, counts
    /// the lookup there and returns false. `None` when the table is full.
    pub fn insert(&self, new: NewNode) -> Option<(u64, bool)> {
        let key = new.info.key;
        let number = shard_number(key);
        let mut guard = write(self.shards.get(number)?);
        let shard = &mut *guard;
        if let Some(slot) = shard.find(key, new.info.birth_ns) {
            let node = shard.nodes.get(slot as usize)?;
            node.lookups.fetch_add(1, Ordering::Relaxed);
            return Some((join(number, slot, node.generation), false));
        }
        let reusable = new.info.handle != Handle::None;
        let heats = reusable && new.fd.is_some();
        let mut node = Node {
            key,
            birth_ns: new.info.birth_ns,
            lookups: AtomicU64::new(1),
            handle: new.info.handle,
            fd: new.fd,
            generation: 1,
            file_type: u16::try_from(new.info.file_type >> 12).unwrap_or(0),
            used: AtomicBool::new(false),
            verified: AtomicBool::new(new.info.verified),
            submount: new.info.submount,
            indexed: true,
            live: true,
        };
        let slot = match shard.free.pop() {
            Some(slot) => {
                let place = shard.nodes.get_mut(slot as usize)?;
                node.generation = place.generation;
                *place = node;
                slot
            }
            None => {
                let slot = u32::try_from(shard.nodes.len()).ok()?;
                if slot > u32::MAX >> SHARD_BITS {
                    return None;
                }
                shard.nodes.push(node);
                slot
            }
        };
        let nodes = &shard.nodes;
        shard.index.insert_unique(key.hash(), slot, |&other| {
            nodes.get(other as usize).map_or(0, |node| node.key.hash())
        });
        let generation = shard.nodes.get(slot as usize).map_or(1, |node| node.generation);
        let cooled =
            if heats { shard.heat(slot, self.hot_per_shard.load(Ordering::Relaxed)) } else { None };
        drop(guard);
        drop(cooled);
        self.count.fetch_add(1, Ordering::Relaxed);
        Some((join(number, slot, generation), true))
    }

    /// Gives a node an fd that was opened by its handle, and says that the handle is its own. Returns
    /// the fd to use: another thread's, if that was faster.
    pub fn set_fd(&self, id: u64, fd: NodeFd) -> NodeFd {
        let mut shard = write(self.shard(id));
        let Some(node) = shard.get_mut(id) else { return fd };
        if let Some(there) = &node.fd {
            return there.clone();
        }
        node.fd = Some(fd.clone());
        // Not marked: what is used just once cools first.
        *node.used.get_mut() = false;
        *node.verified.get_mut() = true;
        let (slot, _) = split(id);
        let limit = self.hot_per_shard.load(Ordering::Relaxed);
        let cooled = u32::try_from(slot).ok().and_then(|slot| shard.heat(slot, limit));
        drop(shard);
        drop(cooled);
        fd
    }

    /// Notes that the node's handle opens this very inode.
    pub fn set_verified(&self, id: u64) {
        if let Some(node) = read(self.shard(id)).get(id) {
            node.verified.store(true, Ordering::Relaxed);
        }
    }

    /// Takes a node out of the index by identity: its last name is gone, and the next inode with this
    /// number is another one.
    pub fn detach(&self, id: u64) {
        if id == ROOT_ID {
            return;
        }
        let mut shard = write(self.shard(id));
        if let Some(node) = shard.get(id) {
            self.elsewhere.remove(node.key, node.birth_ns, id);
            shard.unindex(split(id).0);
        }
    }

    /// Takes back `count` lookups; a node without any goes. Returns its identity then.
    pub fn forget(&self, id: u64, count: u64) -> Option<Key> {
        if id == ROOT_ID {
            return None;
        }
        {
            let shard = read(self.shard(id));
            let node = shard.get(id)?;
            let take = |left: u64| Some(left.saturating_sub(count));
            // Cannot fail: the closure always returns Some.
            let before =
                node.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
            if before > count {
                return None;
            }
        }
        let mut shard = write(self.shard(id));
        let node = shard.get_mut(id)?;
        if *node.lookups.get_mut() > 0 {
            return None;
        }
        let key = node.key;
        self.elsewhere.remove(key, node.birth_ns, id);
        let fd = shard.remove(split(id).0);
        drop(shard);
        drop(fd);
        self.count.fetch_sub(1, Ordering::Relaxed);
        Some(key)
    }

    /// Closes the fds of all nodes that can do without; returns how many that were.
    pub fn cool_all(&self) -> usize {
        let mut cooled = Vec::new();
        for lock in &self.shards {
            let mut guard = write(lock);
            let shard = &mut *guard;
            for slot in shard.hot.drain(..) {
                if let Some(node) = shard.nodes.get_mut(slot as usize) {
                    cooled.extend(node.fd.take());
                }
            }
        }
        cooled.len()
    }

    /// Forgets everything but the root; `gone` is told each identity.
    pub fn clear_with(&self, gone: &mut dyn FnMut(Key)) {
        self.elsewhere.clear();
        for lock in &self.shards {
            let mut shard = write(lock);
            for slot in 0..shard.nodes.len() {
                let Some(node) = shard.nodes.get(slot).filter(|node| node.live) else { continue };
                gone(node.key);
                drop(shard.remove(slot));
                self.count.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

#[inline]
#[allow(clippy::cast_possible_truncation, reason = "keeps the low bits of a hash")]
fn shard_number(key: Key) -> usize {
    // The table uses the hash's low bits and its top seven; take others.
    (key.hash() >> 48) as usize & (SHARDS - 1)
}

#[inline]
fn join(shard: usize, slot: u32, generation: u32) -> u64 {
    (u64::from(generation) << 32) | u64::from(slot << SHARD_BITS) | (shard as u64)
}

#[cfg(test)]
mod tests;
