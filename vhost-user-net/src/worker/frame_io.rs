//! How a worker reaches its back end.
#![allow(unsafe_code, reason = "passes on what the callers promise about memory")]

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::batch::{BatchIo, FrameMemory, Transfer};
use crate::stream::{FrameStream, StreamError};

/// The way to the back end.
#[derive(Debug)]
pub(super) enum FrameIo {
    /// A descriptor on which each call is a frame.
    Calls(OwnedFd, Box<BatchIo>),
    /// A stream of frames.
    Stream(Box<FrameStream>),
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
            // SAFETY: as the caller promised.
            Self::Stream(stream) => unsafe { stream.transfer(kind, frames) },
        }
    }

    /// Whether a frame went out only in part; see [`FrameStream::has_rest`].
    pub(super) fn has_rest(&self) -> bool {
        match self {
            Self::Calls(..) => false,
            Self::Stream(stream) => stream.has_rest(),
        }
    }

    /// Whether several frames are one system call; a kernel that can do that has fine timers too.
    pub(super) fn has_ring(&self) -> bool {
        match self {
            Self::Calls(_, io) => io.has_ring(),
            Self::Stream(_) => false,
        }
    }

    pub(super) fn raw_fd(&self) -> RawFd {
        match self {
            Self::Calls(fd, _) => fd.as_raw_fd(),
            Self::Stream(stream) => stream.fd().as_raw_fd(),
        }
    }

    pub(super) fn take_error(&mut self) -> Option<StreamError> {
        match self {
            Self::Calls(..) => None,
            Self::Stream(stream) => stream.take_error(),
        }
    }
}
