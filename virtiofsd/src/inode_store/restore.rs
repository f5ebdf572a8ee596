//! The whole store as a list, and back: for a session that moves to another process.
//!
//! Node ids must stay what they are, for the guest holds them, while identities may change: another
//! namespace numbers its mounts differently, and another machine its inodes. An id says in which shard
//! its node lies, and so does an identity; where these do not agree any more, the identity is found
//! through [`Elsewhere`], which is empty in a store that was not restored.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

use super::{
    Handle, InodeStore, Key, NewNode, Node, NodeFd, NodeInfo, ROOT_ID, SHARDS, read, shard_number,
    split, write,
};

/// Slots that a shard may be made to have by a saved state.
const MAX_SLOTS: usize = 1 << 24;

/// A node with all that the guest could tell from it.
#[derive(Debug)]
pub struct ListedNode {
    /// Its id.
    pub id: u64,
    /// Lookups that the guest has still to forget.
    pub lookups: u64,
    /// It can be found by identity: its last name is not known to be gone.
    pub indexed: bool,
    /// Everything else.
    pub info: NodeInfo,
    /// Its fd, if it is open.
    pub fd: Option<NodeFd>,
}

/// Identities whose nodes lie in other shards than their hash says.
#[derive(Debug, Default)]
pub(super) struct Elsewhere {
    ids: RwLock<HashMap<(Key, u64), u64>>,
    count: AtomicUsize,
}

impl Elsewhere {
    fn add(&self, key: Key, birth_ns: u64, id: u64) {
        let mut ids = self.ids.write().unwrap_or_else(PoisonError::into_inner);
        ids.insert((key, birth_ns), id);
        self.count.store(ids.len(), Ordering::Release);
    }

    #[inline]
    pub(super) fn find(&self, key: Key, birth_ns: u64) -> Option<u64> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let ids = self.ids.read().unwrap_or_else(PoisonError::into_inner);
        ids.get(&(key, birth_ns)).copied()
    }

    pub(super) fn remove(&self, key: Key, birth_ns: u64, id: u64) {
        if self.find(key, birth_ns) != Some(id) {
            return;
        }
        let mut ids = self.ids.write().unwrap_or_else(PoisonError::into_inner);
        ids.remove(&(key, birth_ns));
        self.count.store(ids.len(), Ordering::Release);
    }

    pub(super) fn clear(&self) {
        self.ids.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.count.store(0, Ordering::Release);
    }
}

impl Node {
    /// A slot without a node.
    fn empty() -> Self {
        Self {
            key: Key { ino: 0, mount: 0, dev: 0 },
            birth_ns: 0,
            lookups: AtomicU64::new(0),
            handle: Handle::None,
            fd: None,
            generation: 1,
            file_type: 0,
            used: AtomicBool::new(false),
            verified: AtomicBool::new(false),
            submount: false,
            indexed: false,
            live: false,
        }
    }
}

impl InodeStore {
    /// Identity and the rest of the shared directory.
    #[must_use]
    pub fn root_info(&self) -> NodeInfo {
        self.root().info.clone()
    }

    /// All nodes but the root.
    #[must_use]
    pub fn list(&self) -> Vec<ListedNode> {
        let mut all = Vec::with_capacity(self.len());
        for (number, lock) in self.shards.iter().enumerate() {
            let shard = read(lock);
            for (slot, node) in (0u32..).zip(&shard.nodes) {
                if node.live {
                    all.push(ListedNode {
                        id: super::join(number, slot, node.generation),
                        lookups: node.lookups.load(Ordering::Relaxed),
                        indexed: node.indexed,
                        info: node.info(),
                        fd: node.fd.clone(),
                    });
                }
            }
        }
        all
    }

    /// Puts a node of [`Self::list`] back under its id. Call [`Self::restored`] after the last.
    ///
    /// Returns false where that id cannot be: it is in use, or no id at all.
    pub fn restore(&self, id: u64, lookups: u64, indexed: bool, new: NewNode) -> bool {
        let (at, generation) = split(id);
        let number = usize::try_from(id).unwrap_or(0) & (SHARDS - 1);
        if id == ROOT_ID || generation == 0 || at >= MAX_SLOTS {
            return false;
        }
        let NewNode { info, fd } = new;
        let mut guard = write(self.shard(id));
        let shard = &mut *guard;
        if shard.nodes.len() <= at {
            shard.nodes.resize_with(at + 1, Node::empty);
        }
        let here = shard_number(info.key) == number;
        let known = here && shard.find(info.key, info.birth_ns).is_some();
        let Some(place) = shard.nodes.get_mut(at).filter(|node| !node.live) else { return false };
        let heats = fd.is_some() && info.handle != Handle::None;
        *place = Node {
            key: info.key,
            birth_ns: info.birth_ns,
            lookups: AtomicU64::new(lookups),
            handle: info.handle,
            fd,
            generation,
            file_type: u16::try_from(info.file_type >> 12).unwrap_or(0),
            used: AtomicBool::new(false),
            verified: AtomicBool::new(info.verified),
            submount: info.submount,
            indexed: indexed && here && !known,
            live: true,
        };
        let indexes = place.indexed;
        let Ok(slot) = u32::try_from(at) else { return false };
        if indexes {
            let nodes = &shard.nodes;
            shard.index.insert_unique(info.key.hash(), slot, |&other| {
                nodes.get(other as usize).map_or(0, |node| node.key.hash())
            });
        } else if indexed && !here {
            self.elsewhere.add(info.key, info.birth_ns, id);
        }
        let limit = self.hot_per_shard.load(Ordering::Relaxed);
        let cooled = if heats { shard.heat(slot, limit) } else { None };
        drop(guard);
        drop(cooled);
        self.count.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// All nodes are back: what is between them is free.
    pub fn restored(&self) {
        for lock in &self.shards {
            let mut guard = write(lock);
            let shard = &mut *guard;
            let slots = (0u32..).zip(&shard.nodes);
            shard.free = slots.filter(|(_, node)| !node.live).map(|(slot, _)| slot).collect();
        }
    }
}
