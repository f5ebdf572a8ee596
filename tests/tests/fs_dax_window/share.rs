//! A shared directory, a daemon, and what a guest asks it for.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use testkit::daemon::Daemon;
pub(crate) use testkit::dax_story::content;
use testkit::driver::fs::{FsClient, Message, op};
use testkit::frontend::{BackendChannel, BackendRequest, ShmemPolicy};
use virtiofsd::fuse::wire::{AttrOut, SetattrIn};
use zerocopy::FromZeros;

pub(crate) const PAGE: u64 = 4096;
/// The smallest window: 512 pages.
pub(crate) const WINDOW: u64 = 2 << 20;
/// Where QEMU would have it in the guest's address space.
pub(crate) const QEMU: ShmemPolicy = ShmemPolicy::Qemu { window: 0x10_0000_0000 };
pub(crate) const LONG: Duration = Duration::from_secs(20);
/// What the daemon may have mapped at once: QEMU ends above 512 regions.
pub(crate) const CAP: usize = 400;
pub(crate) const ROOT: u64 = 1;
pub(crate) const ATTR_DAX: u32 = 1 << 1;

pub(crate) struct Share {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) daemon: Daemon,
}

impl Share {
    pub(crate) fn new(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("shared")).unwrap();
        let daemon = Self::daemon(dir.path(), "fs", arguments);
        Self { dir, daemon }
    }

    pub(crate) fn daemon(dir: &Path, socket: &str, arguments: &[&str]) -> Daemon {
        let shared = format!("--shared-dir={}", dir.join("shared").display());
        let mut all = vec!["--tag=t", "--num-request-queues=4", "--dax-window=2M", &shared];
        all.extend(arguments);
        Daemon::start("virtiofsd", &dir.join(socket), &all).unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("shared").join(name)
    }

    /// A file of `content`, open for reading and writing.
    pub(crate) fn file(&self, name: &str, content: &[u8]) -> File {
        fs::write(self.path(name), content).unwrap();
        OpenOptions::new().read(true).write(true).open(self.path(name)).unwrap()
    }

    pub(crate) fn guest(&self, policy: ShmemPolicy) -> (FsClient, BackendChannel) {
        FsClient::start_with_window(self.daemon.socket(), 4, 8, policy).unwrap()
    }
}

pub(crate) fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// SETUPMAPPING of `len` bytes of the file from `from` at `at` in the window.
pub(crate) fn set_up(inode: u64, from: u64, len: u64, at: u64, write: bool) -> Message {
    Message::new(op::SETUPMAPPING, inode, &[u64::MAX, from, len, u64::from(write), at])
}

/// REMOVEMAPPING of one range.
pub(crate) fn remove(inode: u64, at: u64, len: u64) -> Message {
    let mut body = 1u32.to_ne_bytes().to_vec();
    body.extend([at, len].iter().flat_map(|n| n.to_ne_bytes()));
    Message { opcode: op::REMOVEMAPPING, nodeid: inode, body, ..Message::default() }
}

pub(crate) fn truncate(inode: u64, size: u64) -> Message {
    let args = SetattrIn { valid: 1 << 3, size, ..SetattrIn::new_zeroed() };
    Message::new(op::SETATTR, inode, &args)
}

pub(crate) fn attributes(guest: &mut FsClient, inode: u64) -> AttrOut {
    guest.call(Message::new(op::GETATTR, inode, &[0u64; 2])).unwrap().get().unwrap()
}

pub(crate) fn errno(guest: &mut FsClient, message: Message) -> i32 {
    guest.call(message).unwrap().errno
}

/// How many histories of how many steps; `OUTBOARD_DAX_CASES` asks for more.
pub(crate) fn cases(few: u32) -> ProptestConfig {
    let cases = std::env::var("OUTBOARD_DAX_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases.unwrap_or(few)) }
}

/// What a VMM would hold after `requests`; stops the test at one that a VMM must never get.
pub(crate) fn follow(requests: &BackendChannel, live: &mut BTreeMap<u64, u64>) {
    for request in requests.requests.try_iter() {
        match request {
            BackendRequest::Map(at, len) => {
                assert!(len > 0 && at % PAGE == 0 && len % PAGE == 0, "{at:#x} {len:#x}");
                assert!(at < WINDOW && len <= WINDOW - at, "outside: {at:#x} {len:#x}");
                let before = live.range(..at + len).next_back();
                assert!(before.is_none_or(|(from, n)| from + n <= at), "overlaps: {at:#x}");
                live.insert(at, len);
            }
            BackendRequest::Unmap(at, len) => {
                assert_eq!(live.remove(&at), Some(len), "what was not mapped so: {at:#x}");
            }
            other => panic!("{other:?}"),
        }
        assert!(live.len() <= CAP, "{} mappings", live.len());
    }
}

/// Adds `message` on `queue` from `slot`, without waiting.
pub(crate) fn send(guest: &mut FsClient, queue: usize, slot: usize, message: &Message) {
    guest.add(queue, slot, message).unwrap();
    guest.queues[queue].kick();
}

pub(crate) fn answer(guest: &mut FsClient, queue: usize) -> i32 {
    let used = guest.queues[queue].wait(LONG).unwrap();
    guest.answer(index(used.cookie), used.len).unwrap().errno
}

pub(crate) fn await_map(window: &BackendChannel) {
    let request = window.requests.recv_timeout(LONG).unwrap();
    assert!(matches!(request, BackendRequest::Map(..)), "{request:?}");
}
