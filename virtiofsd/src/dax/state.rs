//! The window as data, for a daemon that goes on in our place: the VMM keeps its mappings meanwhile.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use super::claims::{Claim, PAGE, Pieces};
use super::{Dax, Vmm};

/// The window but for its claims.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedWindow {
    /// Bytes of it.
    size: u64,
    /// The VMM maps plainly.
    plain: bool,
    /// Which descriptor is the memory file of the copied pages.
    tails: usize,
    /// Ranges that the VMM may have mapped and nobody wants.
    stale: Vec<(u64, u64)>,
    /// Files whose mappings are to be refreshed.
    owed: Vec<u64>,
}

/// One range of the window that the guest has taken.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedClaim {
    offset: u64,
    len: u64,
    inode: u64,
    file_offset: u64,
    write: bool,
    /// Which descriptor is the file.
    file: usize,
    parts: Vec<u64>,
    /// The copied page behind these, and the bytes of the file that it shows.
    tail: Option<(u64, Range<u64>)>,
}

impl Dax {
    /// What a successor needs; its descriptors are given to `add`, which numbers them.
    ///
    /// # Errors
    /// Those of `add`.
    pub fn save(
        &self,
        mut add: impl FnMut(&OwnedFd) -> anyhow::Result<usize>,
    ) -> anyhow::Result<(SavedWindow, Vec<SavedClaim>)> {
        let state = self.lock();
        let window = SavedWindow {
            size: self.options.window,
            plain: self.options.vmm == Vmm::Plain,
            tails: add(&state.tails.memory_handle())?,
            stale: state.stale.clone(),
            owed: state.owed.clone(),
        };
        // A descriptor a file, not one a range of it.
        let mut known: HashMap<(u64, bool), usize> = HashMap::new();
        let mut claims = Vec::new();
        for (offset, claim) in state.claims.iter() {
            let key = (claim.inode, claim.write);
            let file = match known.get(&key) {
                Some(&file) => file,
                None => add(&claim.file)?,
            };
            known.insert(key, file);
            let tail = claim.pieces.tail.and_then(|slot| state.tails.saved(slot));
            claims.push(SavedClaim {
                offset,
                len: claim.len,
                inode: claim.inode,
                file_offset: claim.file_offset,
                write: claim.write,
                file,
                parts: claim.pieces.parts.clone(),
                tail,
            });
        }
        Ok((window, claims))
    }

    /// Goes on with a window of another process; its claims come next, one by one.
    ///
    /// # Errors
    /// That process was started with other options.
    pub fn load(
        &self,
        saved: SavedWindow,
        take: impl FnOnce(usize) -> anyhow::Result<OwnedFd>,
    ) -> anyhow::Result<()> {
        ensure!(
            saved.size == self.options.window && saved.plain == (self.options.vmm == Vmm::Plain),
            "--dax-window and --dax-vmm must be those of the daemon that is replaced"
        );
        let mut state = self.lock();
        state.tails.go_on_in(take(saved.tails)?)?;
        state.stale = saved.stale;
        state.owed = saved.owed;
        Ok(())
    }

    /// Puts a claim where the guest has it.
    ///
    /// # Errors
    /// It can be none.
    pub fn load_claim(&self, saved: SavedClaim, file: Arc<OwnedFd>) -> anyhow::Result<()> {
        let mut state = self.lock();
        let free = state.claims.covered(saved.offset, saved.len)?.is_empty();
        let parts = saved.parts.iter().try_fold(0u64, |sum, &len| sum.checked_add(len));
        let mapped = parts.and_then(|n| n.checked_add(if saved.tail.is_some() { PAGE } else { 0 }));
        let fits = mapped.is_some_and(|n| n.is_multiple_of(PAGE) && n <= saved.len);
        let tail = saved.tail.map(|(slot, range)| state.tails.restore(slot, saved.inode, range));
        let tail = tail.transpose().context("a copied page of a mapped file")?;
        let pieces = Pieces { parts: saved.parts, tail };
        ensure!(free && fits, "a mapping of the saved state can be none");
        let claim = Claim {
            len: saved.len,
            inode: saved.inode,
            file_offset: saved.file_offset,
            write: saved.write,
            file,
            pieces,
        };
        state.claims.insert(saved.offset, claim);
        self.active.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}

impl SavedClaim {
    /// Which descriptor is its file.
    #[must_use]
    pub fn file(&self) -> usize {
        self.file
    }
}
