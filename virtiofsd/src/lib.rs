//! Outboard's `virtiofsd`: a directory of the host as a virtio-fs device.

pub mod fuse;
