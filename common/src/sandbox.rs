//! wip
pub mod seccomp;
