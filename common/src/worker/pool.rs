//! The workers of one session: made on demand, joined at the end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
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

    /// Takes the queues `indices` back from their workers, with nothing in flight; `None` for one that is not
    /// running. All are told before the first is waited for: they drain at the same time.
    #[must_use]
    pub fn stop(&self, device: &Arc<dyn Device>, indices: &[u16]) -> Vec<Option<Queue>> {
        await_queues(self.begin_stop(device, indices))
    }

    fn begin_stop(&self, device: &Arc<dyn Device>, indices: &[u16]) -> Vec<Option<Coming>> {
        let worker_of = |index| self.members.get(&device.worker_of(index));
        indices.iter().map(|&i| worker_of(i).map(|member| member.control.stop(i))).collect()
    }

    /// Sends a command about queue `index` to its worker.
    pub fn send(&self, device: &Arc<dyn Device>, index: u16, command: Command) {
        if let Some(member) = self.members.get(&device.worker_of(index)) {
            member.control.send(command);
        }
    }

    /// As [`Self::stop`], and ends all threads. They are told both at once.
    #[must_use]
    pub fn shut_down(&mut self, device: &Arc<dyn Device>, indices: &[u16]) -> Vec<Option<Queue>> {
        let coming = self.begin_stop(device, indices);
        let threads = self.hang_up();
        let queues = await_queues(coming);
        join(threads);
        queues
    }

    /// Tells all threads that the session is over.
    fn hang_up(&mut self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut self.members).into_values().map(|member| member.thread).collect()
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        join(self.hang_up());
    }
}

/// A queue on its way back.
type Coming = Receiver<Option<Box<Queue>>>;

fn await_queues(coming: Vec<Option<Coming>>) -> Vec<Option<Queue>> {
    let queue = |answer: Coming| answer.recv().ok().flatten().map(|queue| *queue);
    coming.into_iter().map(|answer| answer.and_then(queue)).collect()
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a worker thread panicked");
        }
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
