//! Real guests: a Linux kernel that runs one shell job and powers off.
//!
//! A job is a file of `tests/jobs`. [`uml`] boots User Mode Linux (one CPU, a second, needs
//! nothing of the host); [`qemu`] boots QEMU for what needs several CPUs, several queues,
//! reconnection or a DAX window. Both run the same job in the same environment: busybox and the
//! tools of the tool root, the job's parameters as shell variables, the drivers loaded.

pub mod initrd;
mod job;
pub mod qemu;
pub mod qmp;
mod running;
pub mod uml;

pub use job::Job;
pub use qemu::QemuGuest;
pub use running::{GuestResult, RunningGuest};
pub use uml::UmlGuest;

/// The kind of a virtio device, with the number the virtio specification gives it (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum VirtioId {
    /// Network card.
    Net = 1,
    /// Block device.
    Blk = 2,
    /// Sockets between guest and host.
    Vsock = 19,
    /// File system.
    Fs = 26,
}
