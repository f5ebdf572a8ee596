//! The session's end and the worker's end of a worker's control channel.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use crate::ring::{Call, Queue};
use crate::sys::EventFd;

/// What the session asks of a worker.
#[derive(Debug)]
pub enum Command {
    /// Serve this queue from now on.
    Start(Box<Queue>),
    /// Finish what queue `index` has in flight and hand it back. Answer `None` if it is not here.
    Stop {
        /// Queue index.
        index: u16,
        /// Where to hand it back.
        reply: SyncSender<Option<Box<Queue>>>,
    },
    /// SET_VRING_KICK on a running ring.
    SetKick(u16, Option<Arc<EventFd>>),
    /// SET_VRING_CALL on a running ring.
    SetCall(u16, Call),
    /// SET_VRING_ERR on a running ring.
    SetErr(u16, Option<Arc<EventFd>>),
}

/// A worker's end: commands, and the descriptor that says when there are some.
#[derive(Debug)]
pub struct Control {
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    /// How the thread should behave.
    pub options: super::WorkerOptions,
}

impl Control {
    /// Readable when [`Self::next`] may have something.
    #[must_use]
    pub fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// Resets the wake-up. Call it before reading commands, then read until there are none.
    pub fn clear_wake(&self) {
        self.wake.drain();
    }

    /// The next command. `Ok(None)`: none now.
    ///
    /// # Errors
    /// The session is over: drop every queue and return.
    pub fn next(&self) -> Result<Option<Command>, SessionOver> {
        match self.commands.try_recv() {
            Ok(command) => Ok(Some(command)),
            Err(std::sync::mpsc::TryRecvError::Empty) => Ok(None),
            Err(std::sync::mpsc::TryRecvError::Disconnected) => Err(SessionOver),
        }
    }
}

/// The session dropped its end of the control channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the session is over")]
pub struct SessionOver;

/// The session's end.
#[derive(Debug)]
pub struct ControlHandle {
    commands: Option<Sender<Command>>,
    wake: Arc<EventFd>,
}

impl ControlHandle {
    /// Both ends of a new channel.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(options: super::WorkerOptions) -> io::Result<(Self, Control)> {
        let (sender, receiver) = channel();
        let wake = Arc::new(EventFd::new()?);
        let control = Control { commands: receiver, wake: wake.clone(), options };
        Ok((Self { commands: Some(sender), wake }, control))
    }

    /// Sends a command; a worker that is gone does not hear it.
    pub fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            // A failed send means that the thread ended; its queues ended with it.
            let _ = commands.send(command);
            self.wake.signal();
        }
    }

    /// Has queue `index` stopped; it comes once all it has in flight is done.
    #[must_use]
    pub fn stop(&self, index: u16) -> Receiver<Option<Box<Queue>>> {
        let (reply, answer) = std::sync::mpsc::sync_channel(1);
        self.send(Command::Stop { index, reply });
        answer
    }
}

impl Drop for ControlHandle {
    fn drop(&mut self) {
        // First the end of the channel, then the wake-up that makes the worker see it.
        self.commands = None;
        self.wake.signal();
    }
}
