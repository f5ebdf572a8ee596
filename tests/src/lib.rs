//! The testkit: everything that tests of several daemons share.

pub mod driver;
pub mod frontend;
pub mod memory;
