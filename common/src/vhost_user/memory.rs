//! Guest memory: the table of regions that a front end shares, and the dirty log over it.
//!
//! # Theory of operation
//! A [`GuestMemory`] is an immutable table of mapped regions. The session makes a new one for every
//! SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG or log change and publishes it in [`SharedMemory`]; each
//! running queue holds an `Arc` of the table it last saw and looks at the generation, one atomic
//! load, before each batch. Publishing never waits for a queue: a front end may change memory while
//! a worker waits for that same front end (QEMU answers SHMEM_MAP with ADD_MEM_REG), and old regions
//! stay mapped until the last request that may point into them is done.
//!
//! vhost-user specification, "Memory region description", "Migration" (log).
#![allow(unsafe_code, reason = "hands out raw pointers into mapped guest memory")]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vm_memory::{FileOffset, MmapRegion};

use super::iotlb::{Iotlb, PERM_READ, PERM_WRITE};
use crate::ring::IoVecs;

/// Regions a front end may share, also the answer to GET_MAX_MEM_SLOTS. QEMU stops at 512.
pub const MAX_MEM_SLOTS: usize = 509;

/// Why a region or log was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Size 0, or an address range that wraps.
    #[error("memory region {guest_addr:#x}+{size:#x} is empty or wraps around")]
    BadRange {
        /// Guest physical address.
        guest_addr: u64,
        /// Size in bytes.
        size: u64,
    },
    /// Two regions cover the same guest address.
    #[error("memory region at {0:#x} overlaps another one")]
    Overlap(u64),
    /// The table is full.
    #[error("more than {MAX_MEM_SLOTS} memory regions")]
    TooMany,
    /// REM_MEM_REG of a region that is not in the table.
    #[error("there is no memory region at {0:#x} of that size")]
    NotFound(u64),
    /// The descriptor's file ends before the region does.
    #[error(
        "the file of the memory region at {guest_addr:#x} is {file_size:#x} bytes, the region needs {needed:#x}"
    )]
    ShortFile {
        /// Guest physical address.
        guest_addr: u64,
        /// The file's size in bytes.
        file_size: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The message came without its descriptor.
    #[error("a memory message came without its file descriptor")]
    NoFd,
    /// `mmap` or `fstat` failed.
    #[error("cannot map shared memory: {0}")]
    Map(String),
}

/// A region as the front end describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RegionInfo {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address in the front end's own address space; ring addresses are given in these terms.
    pub user_addr: u64,
    /// Where the region starts in its file, bytes.
    pub mmap_offset: u64,
}

impl RegionInfo {
    fn check(&self) -> Result<(), MemoryError> {
        let fits = |start: u64| start.checked_add(self.size).is_some();
        let ok = self.size != 0
            && fits(self.guest_addr)
            && fits(self.user_addr)
            && fits(self.mmap_offset);
        if ok {
            Ok(())
        } else {
            Err(MemoryError::BadRange { guest_addr: self.guest_addr, size: self.size })
        }
    }
}

/// Maps `size` bytes of `file` from `offset`, shared and writable, after checking that a regular
/// file is long enough (touching a page past its end would kill the daemon).
fn map_shared(
    file: File,
    offset: u64,
    size: u64,
    guest_addr: u64,
) -> Result<MmapRegion, MemoryError> {
    // Not `File::metadata`: its statx is not on every daemon's list of system calls.
    let stat = rustix::fs::fstat(&file).map_err(|e| MemoryError::Map(e.to_string()))?;
    let needed = offset.saturating_add(size);
    let file_size = u64::try_from(stat.st_size).unwrap_or(0);
    let regular =
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
    if regular && file_size < needed {
        return Err(MemoryError::ShortFile { guest_addr, file_size, needed });
    }
    let size = usize::try_from(size).map_err(|e| MemoryError::Map(e.to_string()))?;
    MmapRegion::from_file(FileOffset::new(file, offset), size)
        .map_err(|e| MemoryError::Map(e.to_string()))
}

/// One mapped region.
#[derive(Debug)]
pub struct Region {
    info: RegionInfo,
    map: MmapRegion,
}

impl Region {
    /// Maps a region from its descriptor.
    ///
    /// # Errors
    /// A bad range, a file too short, or no room to map.
    pub fn map(info: RegionInfo, fd: OwnedFd) -> Result<Self, MemoryError> {
        info.check()?;
        let map = map_shared(File::from(fd), info.mmap_offset, info.size, info.guest_addr)?;
        Ok(Self { info, map })
    }

    /// The front end's description.
    #[must_use]
    pub fn info(&self) -> RegionInfo {
        self.info
    }

    /// The file behind the region.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.map.file_offset().map(FileOffset::file)
    }

    /// Where the region is mapped here, and its size in bytes.
    #[must_use]
    pub fn host_range(&self) -> (*mut u8, usize) {
        (self.map.as_ptr(), self.map.size())
    }

    #[inline]
    fn at(&self, offset: u64) -> *mut u8 {
        // Callers checked offset < size, and size fits usize since the region is mapped.
        self.map.as_ptr().wrapping_add(usize::try_from(offset).unwrap_or(usize::MAX))
    }
}

/// The table of everything a guest shares, and the dirty log if one is set.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// Sorted by guest address, no overlaps.
    regions: Vec<Arc<Region>>,
    log: Option<Arc<DirtyLog>>,
    /// Addresses in rings are I/O virtual ones.
    iotlb: Option<Arc<Iotlb>>,
}

impl GuestMemory {
    /// A table of `regions`, with `log` for migration.
    ///
    /// # Errors
    /// Overlapping or too many regions.
    pub fn new(
        mut regions: Vec<Arc<Region>>,
        log: Option<Arc<DirtyLog>>,
    ) -> Result<Self, MemoryError> {
        if regions.len() > MAX_MEM_SLOTS {
            return Err(MemoryError::TooMany);
        }
        regions.sort_by_key(|r| r.info.guest_addr);
        for pair in regions.windows(2) {
            if pair[0].info.guest_addr + pair[0].info.size > pair[1].info.guest_addr {
                return Err(MemoryError::Overlap(pair[1].info.guest_addr));
            }
        }
        Ok(Self { regions, log, iotlb: None })
    }

    /// The regions, by guest address.
    #[must_use]
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The dirty log, while the front end wants one.
    #[inline]
    #[must_use]
    pub fn log(&self) -> Option<&Arc<DirtyLog>> {
        self.log.as_ref()
    }

    /// The same table with `region` added.
    ///
    /// # Errors
    /// Overlap, or the table is full.
    pub fn with_region(&self, region: Region) -> Result<Self, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(Arc::new(region));
        Ok(Self::new(regions, self.log.clone())?.with_iotlb(self.iotlb.clone()))
    }

    /// The same table without the region that `info` describes (its mmap offset and descriptor do
    /// not count, as the specification has it).
    ///
    /// # Errors
    /// No such region.
    pub fn without_region(&self, info: &RegionInfo) -> Result<Self, MemoryError> {
        let same = |r: &RegionInfo| {
            r.guest_addr == info.guest_addr && r.size == info.size && r.user_addr == info.user_addr
        };
        let at = self
            .regions
            .iter()
            .position(|r| same(&r.info))
            .ok_or(MemoryError::NotFound(info.guest_addr))?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self { regions, log: self.log.clone(), iotlb: self.iotlb.clone() })
    }

    /// The same table with another log.
    #[must_use]
    pub fn with_log(&self, log: Option<Arc<DirtyLog>>) -> Self {
        Self { regions: self.regions.clone(), log, iotlb: self.iotlb.clone() }
    }

    /// The same table with another translation of I/O virtual addresses.
    #[must_use]
    pub fn with_iotlb(&self, iotlb: Option<Arc<Iotlb>>) -> Self {
        Self { regions: self.regions.clone(), log: self.log.clone(), iotlb }
    }

    /// The translation of I/O virtual addresses, behind a virtual IOMMU.
    #[must_use]
    pub fn iotlb(&self) -> Option<&Arc<Iotlb>> {
        self.iotlb.as_ref()
    }

    #[inline]
    fn find(&self, guest_addr: u64) -> Option<&Region> {
        let region = match self.regions.as_slice() {
            [only] => only,
            regions => {
                let after = regions.partition_point(|r| r.info.guest_addr <= guest_addr);
                regions.get(after.checked_sub(1)?)?
            }
        };
        let inside = guest_addr.checked_sub(region.info.guest_addr)? < region.info.size;
        inside.then_some(region)
    }

    /// Where `len` bytes at the address `addr` of a ring's descriptor are, when they are contiguous here.
    #[inline]
    #[must_use]
    pub fn translate(&self, addr: u64, len: u64) -> Option<*mut u8> {
        if let Some(iotlb) = &self.iotlb {
            return self.translate_pieces(addr, len, |iova| iotlb.resolve(iova, PERM_READ));
        }
        let region = self.find(addr)?;
        let offset = addr - region.info.guest_addr;
        (len <= region.info.size - offset).then(|| region.at(offset))
    }

    /// Appends `len` bytes at the address `addr` of a ring's descriptor to `out`, across neighbouring
    /// regions if need be; `write` if the device will write them. False, with `out` in an
    /// unspecified but valid state, when any byte is not mapped.
    #[inline]
    #[must_use]
    pub fn append(&self, addr: u64, len: u32, write: bool, out: &mut IoVecs) -> bool {
        if self.iotlb.is_some() {
            return self.append_iova(addr, u64::from(len), write, out);
        }
        self.append_guest(addr, u64::from(len), out)
    }

    #[inline]
    fn append_guest(&self, guest_addr: u64, len: u64, out: &mut IoVecs) -> bool {
        let mut addr = guest_addr;
        let mut left = len;
        while left > 0 {
            let Some(region) = self.find(addr) else { return false };
            let offset = addr - region.info.guest_addr;
            let n = left.min(region.info.size - offset);
            let Ok(n_host) = usize::try_from(n) else { return false };
            let host = region.at(offset);
            // What is before a region's start, if anything, is another region's.
            let joins = offset > 0;
            // SAFETY: offset + n lies within the mapped region, which lives as long as this table;
            // the queue that made the chain keeps the table until the chain is pushed.
            unsafe { out.push_joined(host, n_host, joins) };
            left -= n;
            let Some(next) = addr.checked_add(n) else { return left == 0 };
            addr = next;
        }
        true
    }

    #[cold]
    fn append_iova(&self, iova: u64, len: u64, write: bool, out: &mut IoVecs) -> bool {
        let Some(iotlb) = &self.iotlb else { return false };
        let perm = if write { PERM_WRITE } else { PERM_READ };
        let (mut iova, mut left) = (iova, len);
        while left > 0 {
            let Some((user_addr, contiguous)) = iotlb.resolve(iova, perm) else { return false };
            let n = left.min(contiguous);
            let (Some(host), Ok(n_host)) = (self.translate_user(user_addr, n), usize::try_from(n))
            else {
                return false;
            };
            // SAFETY: `translate_user` found all n bytes in one mapped region of this table.
            unsafe { out.push(host, n_host) };
            left -= n;
            let Some(next) = iova.checked_add(n) else { return left == 0 };
            iova = next;
        }
        true
    }

    /// Whether addresses cannot be translated at present because the rings are being stopped.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.iotlb.as_ref().is_some_and(|iotlb| iotlb.is_interrupted())
    }

    /// Where the `len` bytes of a ring's area are that SET_VRING_ADDR gave as `addr`: an address of the
    /// front end's own, or an I/O virtual one. Asks for a translation that is missing, but does
    /// not wait for it.
    #[must_use]
    pub fn translate_ring(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let Some(iotlb) = &self.iotlb else { return self.translate_user(addr, len) };
        self.translate_pieces(addr, len, |iova| {
            let found = iotlb.lookup(iova, PERM_READ);
            if found.is_none() {
                iotlb.request(iova, PERM_READ | PERM_WRITE);
            }
            found
        })
    }

    /// Where `len` bytes at the I/O virtual address `addr` are. The pieces that `find` knows may be as small
    /// as pages: all must be there, in one run of the front end's memory.
    #[cold]
    fn translate_pieces(
        &self,
        addr: u64,
        len: u64,
        find: impl Fn(u64) -> Option<(u64, u64)>,
    ) -> Option<*mut u8> {
        let (mut done, mut start) = (0u64, None);
        while done < len {
            let (user_addr, contiguous) = find(addr.checked_add(done)?)?;
            let first = *start.get_or_insert(user_addr);
            if user_addr != first.checked_add(done)? {
                return None;
            }
            done = done.saturating_add(contiguous);
        }
        self.translate_user(start?, len)
    }

    /// Where `len` bytes at the front end's own address `user_addr` are (ring addresses come so).
    #[must_use]
    pub fn translate_user(&self, user_addr: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let offset = user_addr.checked_sub(r.info.user_addr)?;
            (offset < r.info.size && len <= r.info.size - offset).then(|| r.at(offset))
        })
    }

    /// The guest address of a host pointer that this table handed out.
    #[must_use]
    pub fn guest_addr_of(&self, host: *const u8) -> Option<u64> {
        self.regions.iter().find_map(|r| {
            let (base, size) = r.host_range();
            let offset = host.addr().checked_sub(base.addr())?;
            (offset < size).then(|| r.info.guest_addr + offset as u64)
        })
    }

    /// Marks `len` bytes at a host pointer of this table as written, when a log is set.
    #[inline]
    pub fn mark_dirty(&self, host: *const u8, len: usize) {
        if let Some(log) = &self.log
            && let Some(guest_addr) = self.guest_addr_of(host)
        {
            log.mark(guest_addr, len as u64);
        }
    }
}

/// The bitmap of pages written, one bit per 4 KiB page, in memory that the front end shares.
/// vhost-user specification, "Migration".
#[derive(Debug)]
pub struct DirtyLog {
    map: MmapRegion,
}

/// The log's page size, whatever the guest's or host's is.
const LOG_PAGE_SIZE: u64 = 4096;

impl DirtyLog {
    /// Maps the log from SET_LOG_BASE's descriptor.
    ///
    /// # Errors
    /// A size of 0, a file too short, or no room to map.
    pub fn map(fd: OwnedFd, offset: u64, size: u64) -> Result<Self, MemoryError> {
        if size == 0 {
            return Err(MemoryError::BadRange { guest_addr: 0, size });
        }
        Ok(Self { map: map_shared(File::from(fd), offset, size, 0)? })
    }

    /// The file behind the log, for handing the session over: file, offset and size in bytes.
    #[must_use]
    pub fn backing(&self) -> Option<(&File, u64, u64)> {
        self.map.file_offset().map(|f| (f.file(), f.start(), self.map.size() as u64))
    }

    /// Marks the pages of `len` bytes at `guest_addr`. Pages past the log's end are left out, as
    /// the front end sized it.
    pub fn mark(&self, guest_addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = guest_addr / LOG_PAGE_SIZE;
        let last = guest_addr.saturating_add(len - 1) / LOG_PAGE_SIZE;
        for page in first..=last {
            let Ok(byte) = usize::try_from(page / 8) else { return };
            if byte >= self.map.size() {
                return;
            }
            // SAFETY: `byte` lies within the mapping, which lives as long as `self`; the front end
            // uses atomic operations on it too.
            let cell = unsafe { AtomicU8::from_ptr(self.map.as_ptr().wrapping_add(byte)) };
            cell.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
        // The front end must see the mark no later than the used entry that follows.
        std::sync::atomic::fence(Ordering::Release);
    }
}

/// The current memory table of one session, published to its queues.
#[derive(Debug, Default)]
pub struct SharedMemory {
    generation: AtomicU64,
    current: Mutex<Arc<GuestMemory>>,
}

impl SharedMemory {
    /// The current table.
    #[must_use]
    pub fn load(&self) -> Arc<GuestMemory> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts `memory` in place of the current table. Queues see it at their next batch.
    pub fn publish(&self, memory: GuestMemory) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Arc::new(memory);
        // Release: who sees the new number, then locks, finds the new table.
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Changes with every [`Self::publish`].
    #[inline]
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }
}

/// A queue's own view of [`SharedMemory`].
#[derive(Debug)]
pub(crate) struct MemoryView {
    shared: Arc<SharedMemory>,
    seen: u64,
    current: Arc<GuestMemory>,
    /// Tables that requests in flight may still point into.
    retired: Vec<Arc<GuestMemory>>,
}

impl MemoryView {
    pub(crate) fn new(shared: Arc<SharedMemory>) -> Self {
        let seen = shared.generation();
        let current = shared.load();
        Self { shared, seen, current, retired: Vec::new() }
    }

    /// Takes a newer table if there is one; true if so. Tables that nothing in flight needs go.
    #[inline]
    pub(crate) fn refresh(&mut self, in_flight: u32) -> bool {
        if self.shared.generation() == self.seen {
            if in_flight == 0 && !self.retired.is_empty() {
                self.retired.clear();
            }
            return false;
        }
        self.seen = self.shared.generation();
        let old = std::mem::replace(&mut self.current, self.shared.load());
        if in_flight > 0 {
            self.retired.push(old);
        }
        true
    }

    #[inline]
    pub(crate) fn get(&self) -> &GuestMemory {
        &self.current
    }

    #[inline]
    pub(crate) fn table(&self) -> &Arc<GuestMemory> {
        &self.current
    }
}
