//! A disk of nothing: reads leave the guest's buffer as it is, writes vanish. For measuring everything but
//! the storage.

use std::io;

use outboard_common::ring::IoVecs;

use super::{Blocks, Image, Route, Store};
use crate::request::{ByteRange, ZeroRange};

/// See the module.
#[derive(Debug)]
pub struct NullImage {
    size: u64,
}

impl NullImage {
    /// A null disk of `size` bytes.
    #[must_use]
    pub fn open(size: u64) -> Store {
        Store { image: std::sync::Arc::new(Self { size }), route: Route::Inline }
    }
}

impl Image for NullImage {
    fn size(&self) -> io::Result<u64> {
        Ok(self.size)
    }

    fn blocks(&self) -> Blocks {
        Blocks { logical: 512, physical: 4096, discard: 4096 }
    }

    fn read(&self, _offset: u64, _data: &mut IoVecs) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, _offset: u64, _data: &mut IoVecs, _durable: bool) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _zero: ZeroRange) -> io::Result<()> {
        Ok(())
    }
}
