//! The FUSE server: requests of a guest's kernel in, calls of a file system out.
//!
//! | room | what it holds |
//! |---|---|
//! | [`opcode`] | operations by number |
//! | [`wire`] | layouts and constants |
//! | [`request`] | pure parsers |
//! | [`dispatch`] | the server: one chain in, one call, one reply |
//! | [`reply`] | replies into a chain |
//! | [`extension`] | what a file system can do beyond upstream's trait |
//! | [`lock_waits`] | SETLKW requests that wait |
//! | `upstream` | READ and WRITE for file systems that know only upstream's trait |

pub mod dispatch;
pub mod extension;
pub mod lock_waits;
pub mod opcode;
pub mod reply;
pub mod request;
mod upstream;
pub mod wire;

pub use dispatch::{Limits, Outcome, Scratch, Server};
pub use extension::{Extension, LockRequest, Wait};
pub use opcode::Opcode;
