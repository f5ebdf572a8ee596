//! Guests of one process that may connect to each other.
//!
//! # Theory of operation
//! Each VM has a worker of its own, and workers share nothing. When a guest asks for a connection to
//! a sibling, its worker makes a socket pair, keeps one end as the host's side and puts the other into
//! the sibling's [`Mailbox`]; from there on both workers do what they do for any host's client. One
//! byte of the pair says that the sibling accepted; its closing says that it refused.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use outboard_common::sys::EventFd;
use rustix::net::{AddressFamily, SocketFlags, socketpair};

use crate::packet::{Cid, Port, SocketType};

/// Calls that may wait for a worker.
const CALLS_MAX: usize = 1024;

/// What says that a sibling accepted.
pub(crate) const ACCEPTED: [u8; 1] = [b'+'];

/// A guest wants to connect to another.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) stream: OwnedFd,
    pub(crate) socket_type: SocketType,
    pub(crate) from: (Cid, Port),
    pub(crate) port: Port,
}

/// Where a worker is called.
#[derive(Debug)]
pub(crate) struct Mailbox {
    calls: Mutex<VecDeque<Call>>,
    wake: EventFd,
}

impl Mailbox {
    fn new() -> io::Result<Self> {
        Ok(Self { calls: Mutex::new(VecDeque::new()), wake: EventFd::new()? })
    }

    fn put(&self, call: Call) -> bool {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        if calls.len() >= CALLS_MAX {
            return false;
        }
        calls.push_back(call);
        drop(calls);
        self.wake.signal();
        true
    }

    /// The next call. Empty the wake-up first, with [`Self::clear_wake`].
    pub(crate) fn next(&self) -> Option<Call> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Resets the wake-up.
    pub(crate) fn clear_wake(&self) {
        self.wake.drain();
    }

    /// Readable when there are calls.
    pub(crate) fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[derive(Debug)]
struct Member {
    groups: Vec<String>,
    mailbox: Arc<Mailbox>,
}

/// The guests that are running, by CID.
#[derive(Debug, Default)]
pub struct Siblings {
    running: Mutex<HashMap<Cid, Member>>,
}

impl Siblings {
    /// A guest runs from now on, until the membership is dropped.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub(crate) fn join(self: &Arc<Self>, cid: Cid, groups: &[String]) -> io::Result<Membership> {
        let mailbox = Arc::new(Mailbox::new()?);
        let member = Member { groups: groups.to_vec(), mailbox: mailbox.clone() };
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(cid, member);
        Ok(Membership { siblings: self.clone(), cid, groups: groups.to_vec(), mailbox })
    }
}

/// One running guest among its siblings.
#[derive(Debug)]
pub(crate) struct Membership {
    siblings: Arc<Siblings>,
    cid: Cid,
    groups: Vec<String>,
    /// Calls for this guest.
    pub(crate) mailbox: Arc<Mailbox>,
}

impl Membership {
    /// Calls `port` of the sibling `to`. `None`: there is no such sibling, or it is overwhelmed.
    pub(crate) fn call(
        &self,
        to: Cid,
        port: Port,
        from: Port,
        socket_type: SocketType,
    ) -> Option<OwnedFd> {
        let running = self.siblings.running.lock().unwrap_or_else(PoisonError::into_inner);
        let member = running.get(&to).filter(|_| to != self.cid)?;
        if !member.groups.iter().any(|group| self.groups.contains(group)) {
            return None;
        }
        let mailbox = member.mailbox.clone();
        drop(running);
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, socket_type.host(), flags, None).ok()?;
        let call = Call { stream: theirs, socket_type, from: (self.cid, from), port };
        mailbox.put(call).then_some(ours)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut running = self.siblings.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.get(&self.cid).is_some_and(|m| Arc::ptr_eq(&m.mailbox, &self.mailbox)) {
            running.remove(&self.cid);
        }
    }
}
