//! How a worker reaches its back end.
#![allow(unsafe_code, reason = "passes on what the callers promise about memory")]

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::rework::Rework;
use crate::batch::{BatchIo, FrameMemory, Transfer};
use crate::stream::{FrameStream, StreamError};

/// The way to the back end.
#[derive(Debug)]
pub(super) enum FrameIo {
    /// A descriptor on which each call is a frame.
    Calls(OwnedFd, Box<BatchIo>),
    /// The same, with frames that a guest may not take as they come.
    Reworked(OwnedFd, Box<BatchIo>, Box<Reworked>),
    /// A stream of frames.
    Stream(Box<FrameStream>),
}

/// What [`FrameIo::Reworked`] needs beside the descriptor.
#[derive(Debug)]
pub(super) struct Reworked {
    pub(super) rework: Rework,
    /// Those of the last read.
    results: Vec<i32>,
}

impl Reworked {
    pub(super) fn new(rework: Rework) -> Self {
        Self { rework, results: Vec::new() }
    }

    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    unsafe fn read(&mut self, io: &mut BatchIo, frames: &[FrameMemory]) -> &[i32] {
        self.results.clear();
        // SAFETY: as the caller promised.
        let given = unsafe { self.rework.give(frames, &mut self.results) };
        let rest = frames.get(given..).unwrap_or(&[]);
        if !rest.is_empty() {
            // SAFETY: as the caller promised.
            self.results.extend_from_slice(unsafe { io.transfer(Transfer::Read, rest) });
            let read = self.results.get_mut(given..).unwrap_or(&mut []);
            // SAFETY: as the caller promised.
            unsafe { self.rework.look(rest, read) };
        }
        &self.results
    }
}

impl FrameIo {
    /// Reads or writes one frame for each of `frames`; see [`BatchIo::transfer`].
    ///
    /// # Safety
    /// All memory of `frames` is mapped until this returns.
    pub(super) unsafe fn transfer(&mut self, kind: Transfer, frames: &[FrameMemory]) -> &[i32] {
        match self {
            // SAFETY: as the caller promised.
            Self::Calls(_, io) => unsafe { io.transfer(kind, frames) },
            Self::Reworked(_, io, more) if kind == Transfer::Read && more.rework.is_needed() => {
                // SAFETY: as the caller promised.
                unsafe { more.read(io, frames) }
            }
            // SAFETY: as the caller promised.
            Self::Reworked(_, io, _) => unsafe { io.transfer(kind, frames) },
            // SAFETY: as the caller promised.
            Self::Stream(stream) => unsafe { stream.transfer(kind, frames) },
        }
    }

    /// Whether something is still to be written; see [`FrameStream::has_rest`] and [`BatchIo::has_rest`].
    #[inline]
    pub(super) fn has_rest(&self) -> bool {
        match self {
            Self::Calls(_, io) | Self::Reworked(_, io, _) => io.has_rest(),
            Self::Stream(stream) => stream.has_rest(),
        }
    }

    /// Whether several frames are one system call; a kernel that can do that has fine timers too.
    pub(super) fn has_ring(&self) -> bool {
        match self {
            Self::Calls(_, io) | Self::Reworked(_, io, _) => io.has_ring(),
            Self::Stream(_) => false,
        }
    }

    /// Whether the next read gives frames that were taken from the descriptor already: no event tells of them.
    pub(super) fn holds_frames(&self) -> bool {
        matches!(self, Self::Reworked(_, _, more) if more.rework.holds_frames())
    }

    /// Forgets such frames: they were for the driver before this one.
    pub(super) fn forget_frames(&mut self) {
        if let Self::Reworked(_, _, more) = self {
            more.rework.forget_frames();
        }
    }

    /// What the guest takes, and the bytes of header before its frames.
    pub(super) fn set_guest(&mut self, offloads: u64, header_size: usize) {
        if let Self::Reworked(_, _, more) = self {
            more.rework.set_guest(offloads, header_size);
        }
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        match self {
            Self::Calls(fd, _) | Self::Reworked(fd, ..) => fd.as_raw_fd(),
            Self::Stream(stream) => stream.fd().as_raw_fd(),
        }
    }

    pub(super) fn take_error(&mut self) -> Option<StreamError> {
        match self {
            Self::Calls(..) | Self::Reworked(..) => None,
            Self::Stream(stream) => stream.take_error(),
        }
    }
}
