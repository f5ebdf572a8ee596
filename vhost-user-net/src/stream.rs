//! Frames on a stream socket, each behind its length: what user-mode network programs speak.
//!
//! # Theory of operation
//! On the wire a frame is four bytes of length (big endian) and the frame, without `virtio_net_hdr`;
//! QEMU's `-netdev stream` speaks the same. A batch of frames goes out in one `sendmsg` straight from
//! guest memory. Where the socket takes only a part, what is left of the frame it cut is kept and goes
//! first next time; the frames behind it were not taken at all. Incoming bytes are read in large pieces
//! and copied to where the frames go: where one frame ends is known only after the read.
#![allow(unsafe_code, reason = "hands guest memory to sendmsg, and copies frames into it")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::iovec;

use crate::batch::{FrameMemory, Transfer};
use crate::header::{ETHERNET_HEADER_SIZE, HEADER_SIZE, MAX_FRAME_SIZE};

/// Bytes of length before each frame.
const PREFIX: usize = 4;
/// Bytes read at once; several of the longest frames.
const INCOMING_SIZE: usize = 256 << 10;
/// Parts of memory in one `sendmsg`: the kernel's limit.
const PARTS_MAX: usize = 1024;

/// Why a stream cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The other side closed it.
    #[error("the other side ended")]
    Ended,
    /// The other side sent a length that no frame has.
    #[error("the other side announced a frame of {0} bytes")]
    Length(usize),
    /// The system refuses.
    #[error("the connection failed")]
    System(#[from] io::Error),
}

/// One connected stream of frames.
#[derive(Debug)]
pub struct FrameStream {
    socket: OwnedFd,
    /// Bytes read and not taken yet: `incoming[start..end]`.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// The rest of a frame that the socket cut: `outgoing[sent..]`.
    outgoing: Vec<u8>,
    sent: usize,
    /// Bytes of `virtio_net_hdr` before each frame in memory.
    header_size: usize,
    results: Vec<i32>,
    prefixes: Vec<[u8; PREFIX]>,
    parts: Vec<iovec>,
    error: Option<StreamError>,
}

// SAFETY: `parts` is empty between calls; everything else is plain data and a descriptor.
unsafe impl Send for FrameStream {}

impl FrameStream {
    /// A stream over `socket`, which is connected and non-blocking.
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            incoming: Vec::new(),
            start: 0,
            end: 0,
            outgoing: Vec::new(),
            sent: 0,
            header_size: HEADER_SIZE,
            results: Vec::new(),
            prefixes: Vec::new(),
            parts: Vec::new(),
            error: None,
        }
    }

    /// The socket, to wait on.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sets the bytes of `virtio_net_hdr` that precede each frame in memory.
    pub fn set_header_size(&mut self, bytes: usize) {
        self.header_size = bytes;
    }

    /// Whether a frame went out only in part. A write, even of no frames, goes on with it.
    #[must_use]
    pub fn has_rest(&self) -> bool {
        self.sent < self.outgoing.len() && self.error.is_none()
    }

    /// Why it cannot be used any more, told once.
    pub fn take_error(&mut self) -> Option<StreamError> {
        self.error.take()
    }

    /// As [`BatchIo::transfer`](crate::batch::BatchIo::transfer): a result for each frame, bytes with
    /// header or a negative error number. A write stops at the first frame that the socket has no room
    /// for; it and all after it get `EAGAIN`.
    ///
    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    pub unsafe fn transfer(&mut self, kind: Transfer, frames: &[FrameMemory]) -> &[i32] {
        self.results.clear();
        self.results.resize(frames.len(), -libc::EAGAIN);
        if self.error.is_some() {
            return &self.results;
        }
        let done = match kind {
            // SAFETY: as the caller promised.
            Transfer::Read => unsafe { self.read(frames) },
            // SAFETY: as the caller promised.
            Transfer::Write => unsafe { self.write(frames) },
        };
        self.error = done.err();
        &self.results
    }

    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    unsafe fn read(&mut self, frames: &[FrameMemory]) -> Result<(), StreamError> {
        for (at, frame) in frames.iter().enumerate() {
            let Some(len) = self.next_frame()? else { return Ok(()) };
            let bytes = &self.incoming[self.start + PREFIX..self.start + PREFIX + len];
            let header = [0; HEADER_SIZE];
            let header = &header[..self.header_size];
            // SAFETY: as the caller promised.
            let copied = unsafe { frame.copy_from(header, bytes) };
            self.start += PREFIX + len;
            self.results[at] = i32::try_from(copied).unwrap_or(i32::MAX);
        }
        Ok(())
    }

    /// Length of the frame that is first in `incoming`, whole; reads until there is one, or `None`.
    fn next_frame(&mut self) -> Result<Option<usize>, StreamError> {
        loop {
            let waiting = &self.incoming[self.start..self.end];
            if let Some((prefix, rest)) = waiting.split_first_chunk::<PREFIX>() {
                let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
                if !(ETHERNET_HEADER_SIZE..=MAX_FRAME_SIZE).contains(&len) {
                    return Err(StreamError::Length(len));
                }
                if rest.len() >= len {
                    return Ok(Some(len));
                }
            }
            if !self.read_more()? {
                return Ok(None);
            }
        }
    }

    /// Reads what is there; false if that is nothing.
    fn read_more(&mut self) -> Result<bool, StreamError> {
        if self.incoming.is_empty() {
            self.incoming.resize(INCOMING_SIZE, 0);
        }
        // What is left is less than one frame; it moves to the front, so there is always room.
        self.incoming.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        match rustix::io::read(&self.socket, &mut self.incoming[self.end..]) {
            Ok(0) => Err(StreamError::Ended),
            Ok(n) => {
                self.end += n;
                Ok(true)
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(ended(error.into())),
        }
    }

    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    unsafe fn write(&mut self, frames: &[FrameMemory]) -> Result<(), StreamError> {
        if !self.flush()? {
            return Ok(());
        }
        self.prefixes.clear();
        self.prefixes.extend(frames.iter().map(|frame| {
            // A checked frame is shorter than 2^17 bytes.
            let len = frame.bytes().saturating_sub(self.header_size);
            u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes()
        }));
        let mut from = 0;
        while let Some(frame) = frames.get(from) {
            if frame.parts() + 1 > PARTS_MAX {
                // A guest's mistake: no reason to end the connection, as the kernel's refusal would be.
                self.results[from] = -libc::EMSGSIZE;
                from += 1;
                continue;
            }
            let to = self.gather(frames, from);
            // SAFETY: as the caller promised; the prefixes are ours.
            let sent = unsafe { self.send_parts() };
            self.parts.clear();
            let Some(sent) = sent? else { return Ok(()) };
            // SAFETY: as the caller promised.
            let all = unsafe { self.settle(frames, from..to, sent) };
            if !all {
                return Ok(());
            }
            from = to;
        }
        Ok(())
    }

    /// Collects the parts of frames from `from` on, as many as one call takes; gives where to go on.
    fn gather(&mut self, frames: &[FrameMemory], from: usize) -> usize {
        for (at, frame) in frames.iter().enumerate().skip(from) {
            // A prefix more; the header's skipping takes none away in the worst case.
            if at > from && self.parts.len() + frame.parts() + 1 > PARTS_MAX {
                return at;
            }
            let prefix = self.prefixes[at].as_ptr().cast_mut();
            self.parts.push(iovec { iov_base: prefix.cast(), iov_len: PREFIX });
            frame.append_from(self.header_size, &mut self.parts);
        }
        frames.len()
    }

    /// Sends `parts`; `None`: there is no room.
    ///
    /// # Safety
    /// All memory of `parts` is mapped until this returns.
    unsafe fn send_parts(&mut self) -> Result<Option<usize>, StreamError> {
        // SAFETY: an all-zero message header is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.parts.as_mut_ptr();
        message.msg_iovlen = self.parts.len();
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: the header and its parts live during the call, as the caller promised.
        let sent = unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, flags) };
        if let Ok(sent) = usize::try_from(sent) {
            return Ok(Some(sent));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR | libc::ENOBUFS) => Ok(None),
            _ => Err(ended(error)),
        }
    }

    /// Puts down what became of frames `range` when `sent` of their bytes went out; true if all did.
    ///
    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    unsafe fn settle(
        &mut self,
        frames: &[FrameMemory],
        range: std::ops::Range<usize>,
        mut sent: usize,
    ) -> bool {
        for at in range {
            let bytes = frames[at].bytes();
            let on_wire = PREFIX + bytes.saturating_sub(self.header_size);
            if sent == 0 {
                return false;
            }
            self.results[at] = i32::try_from(bytes).unwrap_or(i32::MAX);
            if sent >= on_wire {
                sent -= on_wire;
                continue;
            }
            self.outgoing.clear();
            self.sent = 0;
            let prefix = self.prefixes[at];
            self.outgoing.extend_from_slice(prefix.get(sent..).unwrap_or(&[]));
            let skip = self.header_size + sent.saturating_sub(PREFIX);
            // SAFETY: as the caller promised.
            unsafe { frames[at].copy_to(skip, usize::MAX, &mut self.outgoing) };
            return false;
        }
        true
    }

    /// Sends the rest of a cut frame; true if there is none left.
    fn flush(&mut self) -> Result<bool, StreamError> {
        use rustix::net::{SendFlags, send};
        while self.sent < self.outgoing.len() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(&self.socket, &self.outgoing[self.sent..], flags) {
                Ok(n) => self.sent += n,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
                Err(error) => return Err(ended(error.into())),
            }
        }
        Ok(true)
    }
}

/// A connection that the other side's end reset has just ended.
fn ended(error: io::Error) -> StreamError {
    match error.raw_os_error() {
        Some(libc::ECONNRESET | libc::EPIPE) => StreamError::Ended,
        _ => StreamError::System(error),
    }
}

#[cfg(test)]
mod tests;
