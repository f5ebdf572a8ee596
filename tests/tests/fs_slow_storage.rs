//! Slow storage holds up no queue: a file system whose names take long stands for a disk that has nothing in
//! memory. Fast storage costs no change of threads, as long as nobody else waits. The device runs in this
//! process, behind a real session.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::ffi::CStr;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::{JoinHandle, current, sleep};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem};
use outboard_common::metrics::Registry;
use outboard_common::ring::IoVecs;
use outboard_common::sys::EventFd;
use outboard_common::vhost_user::session::{Session, SessionOptions};
use testkit::driver::fs::{FsClient, Message, op};
use virtiofsd::device::{DeviceOptions, FsDevice};
use virtiofsd::fuse::extension::ReadRequest;
use virtiofsd::fuse::{Extension, Limits, Wait};

const PATIENCE: Duration = Duration::from_secs(10);
const SLOW: Duration = Duration::from_millis(100);
/// The inode of a file whose LOOKUP was done by a slow thread; others have [`INLINE`].
const HANDED_OVER: u64 = 3;
const INLINE: u64 = 2;

/// Every name is there; `slow` takes long.
struct Names;

impl FileSystem for Names {
    type Inode = u64;
    type Handle = u64;

    fn lookup(&self, _: &Context, _: u64, name: &CStr) -> io::Result<Entry> {
        if name == c"slow" {
            sleep(SLOW);
        }
        let inode = if current().name() == Some("slow") { HANDED_OVER } else { INLINE };
        Ok(Entry { inode, ..Entry::default() })
    }
}

impl Extension for Names {
    /// Takes waiting, little of it. A byte comes from a queue's worker, two come from a slow thread.
    fn read_into(&self, _: &Context, _: &ReadRequest, _: &IoVecs, wait: Wait) -> io::Result<usize> {
        match wait {
            Wait::Never => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            Wait::Briefly => Ok(1),
            Wait::Allowed | Wait::ForLock => Ok(2),
        }
    }
}

fn lookup(name: &str) -> Message {
    let body = [name.as_bytes(), b"\0"].concat();
    Message { opcode: op::LOOKUP, nodeid: 1, body, ..Message::default() }
}

fn inode_of(guest: &mut FsClient, name: &str) -> u64 {
    guest.call(lookup(name)).unwrap().u64_at(0).unwrap()
}

/// A guest of such a file system, and the thread that serves it until the guest is gone.
fn start() -> (FsClient, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let serving = std::thread::spawn(move || {
        let options = DeviceOptions {
            name: "fs0".to_owned(),
            tag: None,
            request_queues: Some(1),
            slow_threads: 4,
            dax_timeout: PATIENCE,
            limits: Limits::default(),
            metrics: Registry::new("virtiofsd").device("fs0"),
        };
        let device = Arc::new(FsDevice::new(Names, options));
        let (stream, _) = listener.accept().unwrap();
        let metrics = vec![Arc::default(), Arc::default()];
        Session::new(device, stream, metrics, SessionOptions::default())
            .serve(&EventFd::new().unwrap());
    });
    (FsClient::start(&socket, 1, 4).unwrap(), serving)
}

/// How many slow names hold up their queue before one is handed over; then that none does any more.
fn slow_names_inline() -> usize {
    let (mut guest, serving) = start();
    // As long as storage is fast, names are looked up by the queue's own worker.
    assert_eq!(inode_of(&mut guest, "fast"), INLINE);
    let inline = (0..4).take_while(|_| inode_of(&mut guest, "slow") == INLINE).count();
    // Whatever comes then is done beside it.
    guest.add(1, 1, &lookup("slow")).unwrap();
    guest.add(1, 2, &lookup("fast")).unwrap();
    guest.queues[1].kick();
    for expected in [2, 1] {
        let used = guest.queues[1].wait(PATIENCE).unwrap();
        assert_eq!(used.cookie, expected, "a fast name waited for a slow one");
        let answer = guest.answer(usize::try_from(expected).unwrap(), used.len).unwrap();
        assert_eq!(answer.u64_at(0).unwrap(), HANDED_OVER);
    }
    // When names are fast again, the way through the slow threads is given up. (On a busy machine some
    // of these take long.)
    assert!((0..1000).any(|_| inode_of(&mut guest, "fast") == INLINE), "it stays slow for ever");
    drop(guest);
    serving.join().unwrap();
    inline
}

#[test]
fn one_slow_name_holds_up_its_queue_and_no_other_one_does() {
    // Where the worker had to give its CPU to others meanwhile, a second one decides.
    let counts: Vec<usize> = (0..4).map(|_| slow_names_inline()).collect();
    assert!(counts.iter().all(|&n| n <= 2) && counts.contains(&1), "{counts:?}");
}

#[test]
fn who_is_alone_is_served_without_a_change_of_threads() {
    let (mut guest, serving) = start();
    let read = Message::read(2, 0, 0, 4096);
    // What little is read says by whom, after the header.
    let mut alone = || guest.call(read.clone()).unwrap().len - 16;
    assert_eq!(alone(), 2, "nothing was known of the storage yet");
    assert!((0..1000).any(|_| alone() == 1), "the worker never waits itself");
    // Two at a time need not wait for each other, unless the worker was so fast as to see only one.
    let mut handed_over = 0;
    for _ in 0..100 {
        for slot in [1, 2] {
            guest.add(1, slot, &read).unwrap();
        }
        guest.queues[1].kick();
        for _ in [1, 2] {
            let used = guest.queues[1].wait(PATIENCE).unwrap();
            let answer = guest.answer(usize::try_from(used.cookie).unwrap(), used.len).unwrap();
            handed_over += u32::from(answer.len - 16 == 2);
        }
    }
    assert!(handed_over > 150, "{handed_over} of 200");
    drop(guest);
    serving.join().unwrap();
}
