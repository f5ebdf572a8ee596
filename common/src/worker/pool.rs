//! The workers of one session: made on demand, joined at the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::Context as _;

use super::{Command, ControlHandle, WorkerOptions};
use crate::device::Device;
use crate::ring::Queue;

#[derive(Debug)]
struct Member {
    control: ControlHandle,
    thread: JoinHandle<()>,
}

/// The worker threads of one device. Dropping it ends them.
#[derive(Debug, Default)]
pub struct WorkerPool {
    options: WorkerOptions,
    members: BTreeMap<usize, Member>,
}

impl WorkerPool {
    /// An empty pool whose threads will behave as `options` say.
    #[must_use]
    pub fn new(options: WorkerOptions) -> Self {
        Self { options, members: BTreeMap::new() }
    }

    /// Hands `queue` to its worker, making that if need be.
    ///
    /// # Errors
    /// The device could not make the worker, or the system no thread.
    pub fn start(&mut self, device: &Arc<dyn Device>, queue: Queue) -> anyhow::Result<()> {
        let worker = device.worker_of(queue.index());
        if !self.members.contains_key(&worker) {
            let member = self.spawn(device, worker)?;
            self.members.insert(worker, member);
        }
        if let Some(member) = self.members.get(&worker) {
            member.control.send(Command::Start(Box::new(queue)));
        }
        Ok(())
    }

    fn spawn(&self, device: &Arc<dyn Device>, worker: usize) -> anyhow::Result<Member> {
        let name = format!("{}-q{worker}", device.name());
        let body = device.worker(worker).with_context(|| format!("worker {name}"))?;
        let (control, worker_end) =
            ControlHandle::new(self.options.clone()).context("control channel")?;
        let cpu = self.options.cpus.get(worker % self.options.cpus.len().max(1)).copied();
        let thread = std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || {
                if let Some(cpu) = cpu {
                    pin(cpu);
                }
                body(worker_end);
            })
            .with_context(|| format!("thread {name}"))?;
        Ok(Member { control, thread })
    }

    /// Takes queue `index` back from its worker, with nothing in flight. `None` if it is not running.
    #[must_use]
    pub fn stop(&self, device: &Arc<dyn Device>, index: u16) -> Option<Queue> {
        let member = self.members.get(&device.worker_of(index))?;
        member.control.stop(index).map(|queue| *queue)
    }

    /// Sends a command about queue `index` to its worker.
    pub fn send(&self, device: &Arc<dyn Device>, index: u16, command: Command) {
        if let Some(member) = self.members.get(&device.worker_of(index)) {
            member.control.send(command);
        }
    }

    /// Ends all threads and waits for them.
    pub fn shut_down(&mut self) {
        let threads: Vec<_> = std::mem::take(&mut self.members)
            .into_values()
            .map(|m| (m.control, m.thread))
            .collect();
        for (control, thread) in threads {
            drop(control);
            if thread.join().is_err() {
                tracing::error!("a worker thread panicked");
            }
        }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.shut_down();
    }
}

/// Pins the calling thread to `cpu`, or says why that failed.
fn pin(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    if cpu < rustix::thread::CpuSet::MAX_CPU {
        set.set(cpu);
    }
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(cpu, %error, "cannot pin a worker; it runs anywhere");
    }
}
