//! The FUSE server: requests of a guest's kernel in, calls of a file system out.
//!
//! | room | what it holds |
//! |---|---|
//! | [`opcode`] | operations by number |
//! | [`wire`] | layouts and pure parsers of requests |
//! | [`extension`] | what a file system can do beyond upstream's trait |
//! | [`upstream`] | READ and WRITE for file systems that know only upstream's trait |

pub mod extension;
pub mod opcode;
mod upstream;
pub mod wire;

pub use extension::Extension;
pub use opcode::Opcode;
