//! Copies of files' last, partial pages.
//!
//! # Theory of operation
//! QEMU refuses to map a page that the file does not fill. For such a page the VMM is given a page of a
//! memory file of ours instead, with the same bytes. Beside each such *live* page the memory file holds
//! a *clean* copy, the bytes as we last saw them in the file. Where live and clean differ the guest has
//! written, and the difference is written to the file; where clean and file differ somebody else
//! has, and both pages are brought up to date. This happens at the operations by which a
//! program may expect to see other programs' data (open, getattr, read, write, fsync, flush, …), as with
//! a page cache that is written back at close.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::MemfdFlags;

use super::claims::PAGE;

const PAGE_BYTES: usize = 4096;

/// A page of the memory file, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TailSlot(u64);

impl TailSlot {
    /// Where the VMM maps the live page from.
    #[must_use]
    pub fn live_offset(self) -> u64 {
        self.0 * 2 * PAGE
    }

    fn clean_offset(self) -> u64 {
        self.live_offset() + PAGE
    }
}

#[derive(Debug)]
struct Tail {
    inode: u64,
    /// The bytes of the file that the page shows.
    range: Range<u64>,
    /// Claims that show it.
    users: usize,
}

/// All copied pages.
#[derive(Debug)]
pub struct Tails {
    memory: Arc<OwnedFd>,
    slots: BTreeMap<u64, Tail>,
    /// Slots that the memory file has room for.
    capacity: u64,
}

type Page = [u8; PAGE_BYTES];

impl Tails {
    /// None, in an empty memory file.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let memory = rustix::fs::memfd_create("dax-tails", MemfdFlags::CLOEXEC)?;
        let memory = Arc::new(memory);
        Ok(Self { memory, slots: BTreeMap::new(), capacity: 0 })
    }

    /// The memory file.
    #[must_use]
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// The memory file, to be kept for the time of a call.
    #[must_use]
    pub fn memory_handle(&self) -> Arc<OwnedFd> {
        self.memory.clone()
    }

    /// A page that shows `range` of `file`; the same one for all that ask for the same inode.
    ///
    /// # Errors
    /// The file cannot be read, or memory is full.
    pub fn acquire(
        &mut self,
        inode: u64,
        file: BorrowedFd<'_>,
        range: Range<u64>,
    ) -> io::Result<TailSlot> {
        if let Some((&slot, tail)) =
            self.slots.iter_mut().find(|(_, t)| t.inode == inode && t.range == range)
        {
            tail.users += 1;
            return Ok(TailSlot(slot));
        }
        let number =
            (0..self.capacity).find(|n| !self.slots.contains_key(n)).unwrap_or(self.capacity);
        let slot = TailSlot(number);
        if number == self.capacity {
            rustix::fs::ftruncate(self.memory(), (number + 1) * 2 * PAGE)?;
            self.capacity += 1;
        }
        let page = read_page(file, &range)?;
        write_all(self.memory(), &page, slot.live_offset())?;
        write_all(self.memory(), &page, slot.clean_offset())?;
        self.slots.insert(number, Tail { inode, range, users: 1 });
        Ok(slot)
    }

    /// Number of `slot` and what it shows.
    #[must_use]
    pub fn saved(&self, slot: TailSlot) -> Option<(u64, Range<u64>)> {
        self.slots.get(&slot.0).map(|tail| (slot.0, tail.range.clone()))
    }

    /// Goes on with the memory file of another process; its pages come next.
    ///
    /// # Errors
    /// It cannot be examined.
    pub fn go_on_in(&mut self, memory: OwnedFd) -> io::Result<()> {
        let size = u64::try_from(rustix::fs::fstat(&memory)?.st_size).unwrap_or(0);
        self.capacity = size / (2 * PAGE);
        self.memory = Arc::new(memory);
        self.slots.clear();
        Ok(())
    }

    /// Puts a user of slot `number` back.
    ///
    /// # Errors
    /// The memory file has no such slot, or it shows something else.
    pub fn restore(&mut self, number: u64, inode: u64, range: Range<u64>) -> io::Result<TailSlot> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let fits =
            range.start.is_multiple_of(PAGE) && range.end.checked_sub(range.start) <= Some(PAGE);
        if number >= self.capacity || !fits {
            return Err(invalid());
        }
        let fresh = Tail { inode, range: range.clone(), users: 0 };
        let tail = self.slots.entry(number).or_insert(fresh);
        if tail.inode != inode || tail.range != range {
            return Err(invalid());
        }
        tail.users += 1;
        Ok(TailSlot(number))
    }

    /// Whether `slot` shows `range` of `inode`.
    #[must_use]
    pub fn shows(&self, slot: TailSlot, inode: u64, range: &Range<u64>) -> bool {
        self.slots.get(&slot.0).is_some_and(|t| t.inode == inode && t.range == *range)
    }

    /// A claim needs its page no longer. Write back first.
    pub fn release(&mut self, slot: TailSlot) {
        if let Some(tail) = self.slots.get_mut(&slot.0) {
            tail.users -= 1;
            if tail.users == 0 {
                self.slots.remove(&slot.0);
            }
        }
    }

    /// Brings page and file together: the guest's changes go to the file, the file's to the page. When
    /// both changed the same byte, the guest's is the later one.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn sync(&self, slot: TailSlot, file: BorrowedFd<'_>) -> io::Result<()> {
        let Some(tail) = self.slots.get(&slot.0) else { return Ok(()) };
        let live = self.page(slot.live_offset())?;
        let clean = self.page(slot.clean_offset())?;
        let mut now = read_page(file, &tail.range)?;
        if live == clean && now == clean {
            return Ok(());
        }
        let len = usize::try_from(tail.range.end - tail.range.start).unwrap_or(0).min(PAGE_BYTES);
        for changed in differences(&live[..len], &clean[..len]) {
            let at = tail.range.start + changed.start as u64;
            write_all(file, &live[changed.clone()], at)?;
            now[changed.clone()].copy_from_slice(&live[changed]);
        }
        // Only what is different, so that a byte the guest writes meanwhile is not lost.
        for changed in differences(&now, &live) {
            write_all(
                self.memory(),
                &now[changed.clone()],
                slot.live_offset() + changed.start as u64,
            )?;
        }
        write_all(self.memory(), &now, slot.clean_offset())
    }

    fn page(&self, at: u64) -> io::Result<Page> {
        read_page(self.memory(), &(at..at + PAGE))
    }
}

/// The runs in which `a` and `b` differ.
fn differences(a: &[u8], b: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for i in (0..a.len().min(b.len())).filter(|&i| a[i] != b[i]) {
        match runs.last_mut() {
            Some(run) if run.end == i => run.end += 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}

/// The bytes of `range`, at most a page, with zeroes after them and after the file's end.
fn read_page(file: BorrowedFd<'_>, range: &Range<u64>) -> io::Result<Page> {
    let mut page = [0; PAGE_BYTES];
    let len = usize::try_from(range.end - range.start).unwrap_or(PAGE_BYTES).min(PAGE_BYTES);
    let mut done = 0;
    while done < len {
        match rustix::io::pread(file, &mut page[done..len], range.start + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(page)
}

fn write_all(file: BorrowedFd<'_>, mut data: &[u8], mut at: u64) -> io::Result<()> {
    while !data.is_empty() {
        match rustix::io::pwrite(file, data, at) {
            Ok(n) => {
                data = &data[n..];
                at += n as u64;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn both_sides_changes_meet() {
        let file = tempfile::tempfile().unwrap();
        file.write_at(b"hello tail", 4096).unwrap();
        let mut tails = Tails::new().unwrap();
        let range = 4096..4106;
        let slot = tails.acquire(7, file.as_fd(), range.clone()).unwrap();
        assert_eq!(tails.acquire(7, file.as_fd(), range).unwrap(), slot, "one page for one place");
        // The guest writes through its mapping, the host through the file.
        write_all(tails.memory(), b"J", slot.live_offset()).unwrap();
        file.write_at(b"T", 4096 + 6).unwrap();
        tails.sync(slot, file.as_fd()).unwrap();
        let mut now = [0; 10];
        file.read_exact_at(&mut now, 4096).unwrap();
        assert_eq!(&now, b"Jello Tail");
        assert_eq!(&tails.page(slot.live_offset()).unwrap()[..11], b"Jello Tail\0");
        // What the guest writes past the end of the file stays out of it.
        write_all(tails.memory(), b"junk", slot.live_offset() + 100).unwrap();
        tails.sync(slot, file.as_fd()).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 4106);
        tails.release(slot);
        tails.release(slot);
        assert!(tails.slots.is_empty());
    }
}
