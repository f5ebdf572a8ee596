//! FUSE messages: layouts and pure parsers. `include/uapi/linux/fuse.h`, version 7.45.
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

/// WRITE: clear set-user-id and set-group-id bits.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;

/// Bytes that a READDIRPLUS entry with a name of `name_len` bytes takes.
#[must_use]
pub const fn direntplus_size(name_len: usize) -> usize {
    // entry_out, dirent, the name, padding to 8 bytes.
    128usize.saturating_add(24).saturating_add(name_len).saturating_add(7) & !7
}
