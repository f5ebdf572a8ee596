//! Outboard's `virtiofsd`: a directory of the host as a virtio-fs device.

pub mod cli;
pub mod device;
pub mod fuse;
pub mod handle_store;
pub mod inode_store;
pub mod passthrough;
pub mod slow_pool;
pub mod worker;
