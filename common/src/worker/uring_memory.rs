//! Guest memory that the kernel holds ready for a ring, so that it need not find a request's pages anew.
//!
//! # Theory of operation
//! All regions of one memory table are registered, in pieces that the kernel takes. A table is replaced
//! only while no operation is under way, since those name their piece by number; until then the old
//! table serves on. What it does not have, such as memory just plugged in, goes the usual way. What a
//! newer table does not have any more stays pinned meanwhile, and mapped, so that no other memory can
//! be at its addresses.
#![allow(unsafe_code, reason = "registers guest memory with io_uring")]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use io_uring::Submitter;

use crate::vhost_user::memory::GuestMemory;

/// Bytes of one piece at the most: the kernel's limit.
const PIECE: usize = 1 << 30;

/// A registered memory table.
#[derive(Debug)]
pub(super) struct RegisteredMemory {
    table: Arc<GuestMemory>,
    /// Addresses of the pieces in this process, ascending; empty when the kernel refused them. A piece's
    /// place is its number.
    pieces: Vec<Range<usize>>,
}

impl RegisteredMemory {
    /// Registers all of `table`, which must have nothing registered before it. When that is refused, the
    /// value says so by having no pieces, so that it is not tried with each request.
    pub(super) fn register(
        submitter: &Submitter<'_>,
        table: Arc<GuestMemory>,
    ) -> (Self, io::Result<()>) {
        let pieces = pieces(&table);
        let vectors: Vec<libc::iovec> = pieces
            .iter()
            .map(|piece| libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(piece.start),
                iov_len: piece.len(),
            })
            .collect();
        // SAFETY: the pieces are mapped shared memory, and stay so as long as the value has the table.
        let result = unsafe { submitter.register_buffers(&vectors) };
        let pieces = if result.is_ok() { pieces } else { Vec::new() };
        (Self { table, pieces }, result)
    }

    /// Whether it is `table` that is registered, or was refused.
    pub(super) fn is_of(&self, table: &Arc<GuestMemory>) -> bool {
        Arc::ptr_eq(&self.table, table)
    }

    /// Gives the kernel its pages back.
    pub(super) fn unregister(self, submitter: &Submitter<'_>) -> io::Result<()> {
        if self.pieces.is_empty() { Ok(()) } else { submitter.unregister_buffers() }
    }

    /// The number of the piece that has all of `buffer`.
    #[inline]
    pub(super) fn piece_of(&self, buffer: &libc::iovec) -> Option<u16> {
        let start = buffer.iov_base.addr();
        let at = self.pieces.partition_point(|piece| piece.start <= start).checked_sub(1)?;
        let room = self.pieces.get(at)?.end.checked_sub(start)?;
        if buffer.iov_len <= room { u16::try_from(at).ok() } else { None }
    }
}

fn pieces(table: &GuestMemory) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    for region in table.regions() {
        let (base, size) = region.host_range();
        let (mut start, end) = (base.expose_provenance(), base.addr().saturating_add(size));
        while start < end {
            let next = end.min(start.saturating_add(PIECE));
            pieces.push(start..next);
            start = next;
        }
    }
    pieces.sort_unstable_by_key(|piece| piece.start);
    pieces
}
