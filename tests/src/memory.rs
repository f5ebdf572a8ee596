//! Guest memory as a VMM has it: memfds, mapped here and shared with the daemon.
//!
//! # Theory of operation
//! [`GuestRam`] is one or more regions, each with a guest physical address, an address in "the front
//! end's own address space" (made up, and deliberately different from both the guest address and the
//! real mapping, so that a daemon that mixes them up fails) and a memfd. Tests write to it through
//! bounds-checked copies; rings use [`Area`], which does volatile and atomic accesses since the daemon
//! works on the same bytes at the same time. The allocator only grows: tests are short.
#![allow(unsafe_code, reason = "maps and accesses memory shared with the daemon under test")]

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, bail, ensure};
use outboard_common::vhost_user::memory::{GuestMemory, Region, RegionInfo, SharedMemory};
use rustix::mm::{MapFlags, ProtFlags};

/// Distance between a region's guest address and its made-up front-end address.
pub const USER_BASE: u64 = 0x7000_0000_0000;

/// One region of guest memory.
#[derive(Debug)]
pub struct RamRegion {
    info: RegionInfo,
    file: File,
    base: *mut u8,
    len: usize,
}

// SAFETY: shared memory that several processes use at once anyway; accesses are volatile or atomic.
unsafe impl Send for RamRegion {}
// SAFETY: as above.
unsafe impl Sync for RamRegion {}

impl RamRegion {
    /// A new region of `size` bytes of zeros at guest address `guest_addr`.
    ///
    /// # Errors
    /// No memory, or a size of 0.
    pub fn new(guest_addr: u64, size: u64) -> Result<Self> {
        let fd = rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, size)?;
        let user_addr = USER_BASE + guest_addr;
        Self::map(RegionInfo { guest_addr, size, user_addr, mmap_offset: 0 }, fd)
    }

    /// The region that `info` describes, of an existing file.
    ///
    /// # Errors
    /// The file cannot be mapped.
    pub fn map(info: RegionInfo, fd: OwnedFd) -> Result<Self> {
        let len = usize::try_from(info.size)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a fresh mapping at an address that the kernel chooses; unmapped in `drop`.
        let base = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, &fd, info.mmap_offset)
        }
        .context("cannot map guest memory")?;
        Ok(Self { info, file: File::from(fd), base: base.cast(), len })
    }

    /// The region as SET_MEM_TABLE describes it.
    #[must_use]
    pub fn info(&self) -> RegionInfo {
        self.info
    }

    /// The file to send along.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for RamRegion {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; every `Area` holds the `GuestRam` alive.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

/// The memory of one pretended guest.
#[derive(Debug)]
pub struct GuestRam {
    regions: Vec<RamRegion>,
    /// Next free guest address in the first region.
    next: Mutex<u64>,
}

impl GuestRam {
    /// One region of `size` bytes at guest address 0 (whose first page is never allocated).
    ///
    /// # Errors
    /// No memory.
    pub fn new(size: u64) -> Result<Arc<Self>> {
        Self::with_regions(&[(0, size)])
    }

    /// Regions at the given guest addresses and of the given sizes in bytes. Allocation uses the first.
    ///
    /// # Errors
    /// No memory.
    pub fn with_regions(layout: &[(u64, u64)]) -> Result<Arc<Self>> {
        let regions: Result<Vec<_>> =
            layout.iter().map(|&(addr, size)| RamRegion::new(addr, size)).collect();
        let first = layout.first().context("a guest needs memory")?.0;
        Ok(Arc::new(Self { regions: regions?, next: Mutex::new(first + 4096) }))
    }

    /// All regions.
    #[must_use]
    pub fn regions(&self) -> &[RamRegion] {
        &self.regions
    }

    /// The same memory as the engine's own table, for tests of rings without a socket.
    ///
    /// # Errors
    /// It cannot be mapped a second time.
    pub fn memory_table(&self) -> Result<GuestMemory> {
        let mut regions = Vec::new();
        for r in &self.regions {
            let fd = r.file.as_fd().try_clone_to_owned()?;
            regions.push(Arc::new(Region::map(r.info, fd)?));
        }
        Ok(GuestMemory::new(regions, None)?)
    }

    /// [`Self::memory_table`], published as a session does it.
    ///
    /// # Errors
    /// As there.
    pub fn shared_memory(&self) -> Result<Arc<SharedMemory>> {
        let shared = SharedMemory::default();
        shared.publish(self.memory_table()?);
        Ok(Arc::new(shared))
    }

    /// `len` bytes at a multiple of `align` (a power of two) that no one else gets; their guest address.
    ///
    /// # Errors
    /// The first region is full.
    pub fn alloc(&self, len: u64, align: u64) -> Result<u64> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let addr = next.next_multiple_of(align.max(1));
        let info = self.regions[0].info;
        ensure!(addr + len <= info.guest_addr + info.size, "the pretended guest is out of memory");
        *next = addr + len;
        Ok(addr)
    }

    /// The front end's own address of guest address `addr`, as SET_VRING_ADDR wants it.
    #[must_use]
    pub fn user_addr(&self, addr: u64) -> u64 {
        USER_BASE + addr
    }

    /// `len` bytes at guest address `addr`, for repeated access.
    ///
    /// # Errors
    /// Not inside one region.
    pub fn area(self: &Arc<Self>, addr: u64, len: usize) -> Result<Area> {
        let base = self.host(addr, len)?;
        Ok(Area { base, len, addr, _ram: self.clone() })
    }

    /// Where the `len` bytes at guest address `addr` are in this process, to be lent to the kernel.
    ///
    /// # Panics
    /// Not inside one region: a mistake in the test.
    #[must_use]
    pub fn pointer(&self, addr: u64, len: usize) -> *mut u8 {
        self.host(addr, len).expect("guest address")
    }

    fn host(&self, addr: u64, len: usize) -> Result<*mut u8> {
        for r in &self.regions {
            let Some(offset) = addr.checked_sub(r.info.guest_addr) else { continue };
            if offset < r.info.size && len as u64 <= r.info.size - offset {
                return Ok(r.base.wrapping_add(usize::try_from(offset)?));
            }
        }
        bail!("{addr:#x}+{len:#x} is not memory of the pretended guest")
    }

    /// Copies `data` to guest address `addr`.
    ///
    /// # Panics
    /// Not inside one region: a mistake in the test.
    pub fn write(&self, addr: u64, data: &[u8]) {
        let to = self.host(addr, data.len()).expect("guest address");
        // SAFETY: in bounds by `host`, and `data` is not guest memory.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
    }

    /// Copies from guest address `addr`.
    ///
    /// # Panics
    /// Not inside one region: a mistake in the test.
    pub fn read(&self, addr: u64, out: &mut [u8]) {
        let from = self.host(addr, out.len()).expect("guest address");
        // SAFETY: in bounds by `host`, and `out` is not guest memory.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) };
    }

    /// `len` bytes from guest address `addr`.
    ///
    /// # Panics
    /// Not inside one region: a mistake in the test.
    #[must_use]
    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.read(addr, &mut out);
        out
    }

    /// Sets `len` bytes at guest address `addr` to `value`.
    ///
    /// # Panics
    /// Not inside one region: a mistake in the test.
    pub fn fill(&self, addr: u64, len: usize, value: u8) {
        let to = self.host(addr, len).expect("guest address");
        // SAFETY: in bounds by `host`.
        unsafe { std::ptr::write_bytes(to, value, len) };
    }
}

/// A piece of guest memory that is accessed often: a ring, an event area. Little-endian.
#[derive(Debug, Clone)]
pub struct Area {
    base: *mut u8,
    len: usize,
    addr: u64,
    _ram: Arc<GuestRam>,
}

// SAFETY: as for `RamRegion`.
unsafe impl Send for Area {}

impl Area {
    /// Guest address.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "an area is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    #[inline]
    fn at(&self, offset: usize, size: usize) -> *mut u8 {
        assert!(offset + size <= self.len && offset.is_multiple_of(size), "access within the area");
        self.base.wrapping_add(offset)
    }

    /// Reads 16 bits at byte `offset`.
    #[inline]
    #[must_use]
    pub fn load16(&self, offset: usize, order: Ordering) -> u16 {
        let p = self.at(offset, 2);
        // SAFETY: in bounds and aligned by `at` (areas are made at aligned addresses).
        u16::from_le(unsafe { AtomicU16::from_ptr(p.cast()) }.load(order))
    }

    /// Writes 16 bits at byte `offset`.
    #[inline]
    pub fn store16(&self, offset: usize, value: u16, order: Ordering) {
        let p = self.at(offset, 2);
        // SAFETY: as in `load16`.
        unsafe { AtomicU16::from_ptr(p.cast()) }.store(value.to_le(), order);
    }

    /// Reads 32 bits at byte `offset`.
    #[inline]
    #[must_use]
    pub fn load32(&self, offset: usize) -> u32 {
        let p = self.at(offset, 4);
        // SAFETY: as in `load16`.
        u32::from_le(unsafe { AtomicU32::from_ptr(p.cast()) }.load(Ordering::Relaxed))
    }

    /// Writes 32 bits at byte `offset`.
    #[inline]
    pub fn store32(&self, offset: usize, value: u32) {
        let p = self.at(offset, 4);
        // SAFETY: as in `load16`.
        unsafe { AtomicU32::from_ptr(p.cast()) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// Writes 64 bits at byte `offset`.
    #[inline]
    pub fn store64(&self, offset: usize, value: u64) {
        let p = self.at(offset, 8);
        // SAFETY: as in `load16`.
        unsafe { AtomicU64::from_ptr(p.cast()) }.store(value.to_le(), Ordering::Relaxed);
    }
}
