//! Workers: the threads that serve queues.
//!
//! The session talks to a worker through its [`Control`]: commands in a channel, an eventfd to wake it.
//! [`EventLoop`] is the loop for devices driven by file descriptors (net, vsock, fs); blk has its
//! own around io_uring and reads the same `Control`.

mod control;
mod event_loop;
mod habit;
mod pool;
mod uring_loop;
mod uring_memory;

pub use control::{Command, Control, ControlHandle};
pub use event_loop::{Context, EventLoop, Progress, QueueHandler, Queues};
pub use pool::WorkerPool;
pub use uring_loop::{UringContext, UringHandler, UringLoop};

use std::time::Duration;

/// How a worker's thread behaves; the same for all workers of a device.
#[derive(Debug, Clone, Default)]
pub struct WorkerOptions {
    /// How long to look for work before going to sleep, at the most. Zero: sleep at once.
    pub poll: Duration,
    /// CPUs the threads may run on, one for each worker in turn; empty: anywhere.
    pub cpus: Vec<usize>,
}

impl From<&crate::cli::WorkerArgs> for WorkerOptions {
    fn from(args: &crate::cli::WorkerArgs) -> Self {
        let cpus = args
            .cpu_affinity
            .as_ref()
            .map_or_else(Vec::new, |list| list.cpus().iter().map(|&c| usize::from(c)).collect());
        Self { poll: args.poll(), cpus }
    }
}
