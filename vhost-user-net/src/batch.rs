//! Reads and writes of several frames in one system call.
//!
//! # Theory of operation
//! One read or write of a tap is one frame, so a plain loop pays a system call for each. An io_uring
//! takes a batch of them at once. No operation may wait (RWF_NOWAIT): the kernel does every one at
//! submission, in the order submitted. [`BatchIo::transfer`] returns
//! only when all results are there, so that the memory lent is free again. Without io_uring (an old
//! kernel, a policy) the same interface does plain `readv` and `writev`, and so it does for a single
//! frame, where the ring has nothing to save.
#![allow(
    unsafe_code,
    reason = "hands guest memory to the kernel through io_uring and readv/writev"
)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use io_uring::{IoUring, opcode, types};
use libc::{c_int, iovec};

/// Frames in one batch at the most.
pub const MAX_BATCH: usize = 64;
const RING_ENTRIES: u32 = 64;
/// Never wait: without it io_uring waits even where the descriptor is non-blocking.
const NO_WAIT: i32 = libc::RWF_NOWAIT;

/// The memory of one frame.
#[derive(Debug, Default)]
pub struct FrameMemory {
    parts: Vec<iovec>,
}

// SAFETY: the pointers lead into guest memory or buffers of the worker that owns this; whoever
// pushed them vouched for that.
unsafe impl Send for FrameMemory {}

impl FrameMemory {
    /// Forgets everything but the capacity.
    #[inline]
    pub fn clear(&mut self) {
        self.parts.clear();
    }

    /// Appends memory.
    #[inline]
    pub fn extend(&mut self, parts: &[iovec]) {
        self.parts.extend_from_slice(parts);
    }

    /// Appends a buffer of ours.
    #[inline]
    pub fn push(&mut self, base: *mut u8, len: usize) {
        self.parts.push(iovec { iov_base: base.cast(), iov_len: len });
    }

    /// Bytes in all.
    #[inline]
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.parts.iter().map(|p| p.iov_len).sum()
    }

    /// Parts so far.
    #[inline]
    #[must_use]
    pub fn parts(&self) -> usize {
        self.parts.len()
    }

    /// Copies bytes `skip .. skip + len` (fewer if there are no more) to the end of `out`.
    ///
    /// # Safety
    /// All memory of this frame is mapped until this returns.
    pub unsafe fn copy_to(&self, skip: usize, len: usize, out: &mut Vec<u8>) {
        let (mut skip, mut left) = (skip, len);
        for part in &self.parts {
            if skip >= part.iov_len {
                skip -= part.iov_len;
                continue;
            }
            let n = (part.iov_len - skip).min(left);
            let at = out.len();
            out.resize(at + n, 0);
            let from = part.iov_base.cast::<u8>().wrapping_add(skip);
            // SAFETY: within the part, which is mapped as the caller promised, and within `out`,
            // which is ours alone.
            unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr().wrapping_add(at), n) };
            skip = 0;
            left -= n;
            if left == 0 {
                return;
            }
        }
    }

    /// Appends the parts of everything after the first `skip` bytes to `out`.
    pub fn append_from(&self, mut skip: usize, out: &mut Vec<iovec>) {
        for part in &self.parts {
            if skip >= part.iov_len {
                skip -= part.iov_len;
                continue;
            }
            let base = part.iov_base.cast::<u8>().wrapping_add(skip);
            out.push(iovec { iov_base: base.cast(), iov_len: part.iov_len - skip });
            skip = 0;
        }
    }

    /// Copies `head` and then `bytes` into this memory; gives the bytes that found room.
    ///
    /// # Safety
    /// All memory of this frame is mapped until this returns.
    pub unsafe fn copy_from(&self, head: &[u8], bytes: &[u8]) -> usize {
        let mut from = [head, bytes];
        let mut copied = 0;
        for part in &self.parts {
            let (mut to, mut room) = (part.iov_base.cast::<u8>(), part.iov_len);
            for rest in &mut from {
                let n = rest.len().min(room);
                // SAFETY: within the part, which is mapped as the caller promised; `rest` is ours.
                unsafe { std::ptr::copy_nonoverlapping(rest.as_ptr(), to, n) };
                to = to.wrapping_add(n);
                room -= n;
                copied += n;
                *rest = rest.get(n..).unwrap_or(&[]);
            }
        }
        copied
    }

    fn count(&self) -> u32 {
        // More than the kernel takes (1,024) gives EINVAL, as it must.
        u32::try_from(self.parts.len()).unwrap_or(u32::MAX)
    }
}

/// Which way frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From the descriptor into memory.
    Read,
    /// From memory to the descriptor.
    Write,
}

/// The batches of one worker on one descriptor.
pub struct BatchIo {
    ring: Option<IoUring>,
    fd: RawFd,
    results: Vec<i32>,
    /// Frames that found no room while one after them did; they go first.
    late: VecDeque<Vec<u8>>,
}

impl std::fmt::Debug for BatchIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BatchIo").field("ring", &self.ring.is_some()).field("fd", &self.fd).finish()
    }
}

/// A ring with `fd` registered in it as file 0.
fn ring(fd: RawFd) -> std::io::Result<IoUring> {
    let ring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .build(RING_ENTRIES)?;
    ring.submitter().register_files(&[fd])?;
    Ok(ring)
}

impl BatchIo {
    /// Batches on `fd`, which is non-blocking and outlives this. To be made on the thread that uses
    /// it. `plain`: without io_uring even where there is one.
    #[must_use]
    pub fn new(fd: BorrowedFd<'_>, plain: bool) -> Self {
        let fd = fd.as_raw_fd();
        let ring = if plain {
            None
        } else {
            ring(fd)
                .inspect_err(
                    |error| tracing::debug!(%error, "no io_uring: one system call a frame"),
                )
                .ok()
        };
        Self { ring, fd, results: Vec::new(), late: VecDeque::new() }
    }

    /// Whether it uses io_uring.
    #[must_use]
    pub fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Whether frames wait that were said to be written. A write, even of no frames, goes on with them.
    #[inline]
    #[must_use]
    pub fn has_rest(&self) -> bool {
        !self.late.is_empty()
    }

    /// Reads or writes one frame for each of `frames` (at most [`MAX_BATCH`]), in order. Gives for
    /// each the bytes, or a negative error number. All frames that found no room (`EAGAIN`) are at the end.
    ///
    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    pub unsafe fn transfer(&mut self, kind: Transfer, frames: &[FrameMemory]) -> &[i32] {
        self.results.clear();
        self.results.resize(frames.len(), -libc::EAGAIN);
        if kind == Transfer::Write && self.has_rest() && !self.write_late() {
            return &self.results;
        }
        match &mut self.ring {
            Some(ring) if frames.len() > 1 && frames.len() <= MAX_BATCH => {
                // SAFETY: as the caller promised.
                unsafe { in_ring(ring, kind, frames, &mut self.results) };
                if self.results.first() == Some(&-libc::EOPNOTSUPP) {
                    // A device driver that knows no RWF_NOWAIT. None of the batch was done.
                    self.ring = None;
                    // SAFETY: as the caller promised.
                    unsafe { one_by_one(self.fd, kind, frames, &mut self.results) };
                } else if kind == Transfer::Write {
                    // SAFETY: as the caller promised.
                    unsafe { self.keep_late(frames) };
                }
            }
            _ => {
                // SAFETY: as the caller promised.
                unsafe { one_by_one(self.fd, kind, frames, &mut self.results) };
            }
        }
        &self.results
    }

    /// Keeps copies of the frames that found no room though a later one of the batch did: there was some
    /// by then.
    ///
    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    #[inline]
    unsafe fn keep_late(&mut self, frames: &[FrameMemory]) {
        let Some(end) = self.results.iter().rposition(|&r| r != -libc::EAGAIN) else { return };
        for (frame, result) in frames.iter().zip(&mut self.results).take(end) {
            if *result == -libc::EAGAIN {
                let mut bytes = Vec::with_capacity(frame.bytes());
                // SAFETY: as the caller promised.
                unsafe { frame.copy_to(0, usize::MAX, &mut bytes) };
                *result = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
                self.late.push_back(bytes);
            }
        }
    }

    /// Writes frames that are late; true if none is left.
    #[cold]
    fn write_late(&mut self) -> bool {
        while let Some(bytes) = self.late.front() {
            // SAFETY: whoever made this promised that the descriptor outlives it.
            let fd = unsafe { BorrowedFd::borrow_raw(self.fd) };
            if rustix::io::write(fd, bytes) == Err(rustix::io::Errno::AGAIN) {
                return false;
            }
            // Anything else is final, as it would have been in time.
            self.late.pop_front();
        }
        true
    }
}

/// # Safety
/// All memory of `frames` is mapped until this returns.
unsafe fn in_ring(ring: &mut IoUring, kind: Transfer, frames: &[FrameMemory], results: &mut [i32]) {
    let file = types::Fixed(0);
    {
        let mut submission = ring.submission();
        for (i, frame) in frames.iter().enumerate() {
            let (parts, count) = (frame.parts.as_ptr(), frame.count());
            let entry = match (kind, frame.parts.as_slice()) {
                (Transfer::Read, _) => {
                    opcode::Readv::new(file, parts, count).rw_flags(NO_WAIT).build()
                }
                (Transfer::Write, [only]) => {
                    let len = u32::try_from(only.iov_len).unwrap_or(u32::MAX);
                    opcode::Write::new(file, only.iov_base.cast(), len).rw_flags(NO_WAIT).build()
                }
                (Transfer::Write, _) => {
                    opcode::Writev::new(file, parts, count).rw_flags(NO_WAIT).build()
                }
            };
            // SAFETY: the memory outlives this function, which returns only with every result; the
            // queue has RING_ENTRIES = MAX_BATCH places and is empty between calls.
            let pushed = unsafe { submission.push(&entry.user_data(i as u64)) };
            debug_assert!(pushed.is_ok());
        }
    }
    let mut left = frames.len();
    while left > 0 {
        // An interrupted or overflowing wait is no reason to stop: memory is still lent.
        let waited = ring.submit_and_wait(left);
        for done in ring.completion() {
            let at = usize::try_from(done.user_data()).unwrap_or(usize::MAX);
            if let Some(result) = results.get_mut(at) {
                *result = done.result();
            }
            left = left.saturating_sub(1);
        }
        if let Err(error) = waited {
            let again =
                matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY));
            assert!(again, "io_uring_enter on a ring of ours fails: {error}");
        }
    }
}

/// # Safety
/// All memory of `frames` is mapped until this returns.
unsafe fn one_by_one(fd: RawFd, kind: Transfer, frames: &[FrameMemory], results: &mut [i32]) {
    for (frame, result) in frames.iter().zip(results.iter_mut()) {
        let count = c_int::try_from(frame.parts.len()).unwrap_or(c_int::MAX);
        let parts = frame.parts.as_ptr();
        let bytes = match kind {
            // SAFETY: as the caller promised.
            Transfer::Read => unsafe { libc::readv(fd, parts, count) },
            // SAFETY: as the caller promised.
            Transfer::Write => unsafe { libc::writev(fd, parts, count) },
        };
        *result = i32::try_from(bytes).unwrap_or(i32::MAX);
        if bytes < 0 {
            *result = -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            if *result == -libc::EAGAIN {
                // Room that comes between two frames would let the second go before the first.
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn memory(buffers: &mut [Vec<u8>]) -> FrameMemory {
        let mut frame = FrameMemory::default();
        for b in buffers {
            frame.push(b.as_mut_ptr(), b.len());
        }
        frame
    }

    /// A seqpacket pair keeps frames apart as a tap does.
    fn frames_keep_their_order(plain: bool) {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut out = BatchIo::new(a.as_fd(), plain);
        let mut into = BatchIo::new(b.as_fd(), plain);
        let mut sent: Vec<Vec<Vec<u8>>> =
            (1..=5u8).map(|i| vec![vec![i; usize::from(i)], vec![100 + i; 3]]).collect();
        let frames: Vec<_> = sent.iter_mut().map(|f| memory(f)).collect();
        // SAFETY: `sent` outlives the call.
        let results = unsafe { out.transfer(Transfer::Write, &frames) };
        assert_eq!(results, [4, 5, 6, 7, 8]);
        let mut got: Vec<Vec<Vec<u8>>> = (0..7).map(|_| vec![vec![0; 2], vec![0; 100]]).collect();
        let frames: Vec<_> = got.iter_mut().map(|f| memory(f)).collect();
        // SAFETY: `got` outlives the call.
        let results = unsafe { into.transfer(Transfer::Read, &frames) }.to_vec();
        assert_eq!(results, [4, 5, 6, 7, 8, -libc::EAGAIN, -libc::EAGAIN]);
        for i in 0..5 {
            let flat = got[i].concat();
            assert_eq!(flat[..i + 4], sent[i].concat());
        }
    }

    #[test]
    fn frames_keep_their_order_in_a_ring() {
        frames_keep_their_order(false);
    }

    #[test]
    fn frames_keep_their_order_without_a_ring() {
        frames_keep_their_order(true);
    }

    #[test]
    fn a_frame_that_found_no_room_goes_before_the_next_batch() {
        let (a, b) = std::os::unix::net::UnixDatagram::pair().unwrap();
        for socket in [&a, &b] {
            socket.set_nonblocking(true).unwrap();
        }
        let mut io = BatchIo::new(a.as_fd(), false);
        let mut sent: Vec<_> = (1..=4u8).map(|i| vec![vec![i; 10]]).collect();
        let frames: Vec<_> = sent.iter_mut().map(|f| memory(f)).collect();
        io.results = vec![10, -libc::EAGAIN, 10, -libc::EAGAIN];
        // SAFETY: `sent` outlives the calls.
        unsafe { io.keep_late(&frames) };
        assert_eq!(io.results, [10, 10, 10, -libc::EAGAIN]);
        assert!(io.has_rest());
        // SAFETY: as above.
        let results = unsafe { io.transfer(Transfer::Write, &frames[3..]) };
        assert_eq!(results, [10]);
        assert!(!io.has_rest());
        let mut room = [0; 20];
        for byte in [2, 4] {
            assert_eq!((b.recv(&mut room).unwrap(), room[0]), (10, byte));
        }
        // Without room nothing goes.
        io.late.push_back(vec![5; 10]);
        while a.send(&[0; 10]).is_ok() {}
        // SAFETY: as above.
        let results = unsafe { io.transfer(Transfer::Write, &frames) };
        assert!(results.iter().all(|&r| r == -libc::EAGAIN));
        assert!(io.has_rest());
    }

    #[test]
    fn an_error_of_one_frame_does_not_stop_the_others() {
        let (a, _b) = std::os::unix::net::UnixDatagram::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        let mut io = BatchIo::new(a.as_fd(), false);
        let (mut good, mut huge) = (vec![vec![1u8; 10]], vec![vec![1u8; 4 << 20]]);
        let frames = [memory(&mut good), memory(&mut huge), memory(&mut good)];
        // SAFETY: the buffers outlive the call.
        let results = unsafe { io.transfer(Transfer::Write, &frames) };
        assert_eq!(results, [10, -libc::EMSGSIZE, 10]);
    }
}
