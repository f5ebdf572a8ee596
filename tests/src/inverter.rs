//! The smallest whole device, for tests of the session: it writes back what it reads, inverted.

use outboard_common::device::{Device, RING_FEATURES, WorkerBody};
use outboard_common::ring::Chain;
use outboard_common::worker::{Context, EventLoop, Progress, QueueHandler};

/// Bytes inverted at once. A hostile chain may be as long as guest memory, and longer.
const PIECE: usize = 4096;

/// A device with two queues, each with a worker of its own. A chain is answered with the inverted bytes
/// of its readable part, as many as there is room for.
#[derive(Debug, Clone, Copy)]
pub struct Inverter;

struct Worker(Chain);

impl QueueHandler for Worker {
    fn on_kick(&mut self, index: u16, cx: &mut Context) -> Progress {
        let Some(queue) = cx.queues.get(index) else { return Progress::Emptied };
        let mut bytes = [0; PIECE];
        while queue.pop(&mut self.0) {
            let mut written = 0;
            while !self.0.readable.is_empty() && !self.0.writable.is_empty() {
                let n = self.0.readable.read(&mut bytes);
                bytes[..n].iter_mut().for_each(|byte| *byte = !*byte);
                written += self.0.writable.write(&bytes[..n]);
            }
            queue.push(&mut self.0, u32::try_from(written).unwrap_or(u32::MAX));
        }
        Progress::Emptied
    }
}

impl Device for Inverter {
    fn name(&self) -> &str {
        "inverter"
    }
    fn queue_count(&self) -> u16 {
        2
    }
    fn features(&self) -> u64 {
        RING_FEATURES
    }
    fn read_config(&self, _offset: u32, _out: &mut [u8]) {}
    fn worker_of(&self, queue: u16) -> usize {
        usize::from(queue)
    }
    fn worker(&self, _worker: usize) -> anyhow::Result<WorkerBody> {
        let event_loop = EventLoop::new(Worker(Chain::new()))?;
        Ok(Box::new(move |control| event_loop.run(control)))
    }
}
