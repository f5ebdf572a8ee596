//! GETATTR, LOOKUP, READ and WRITE allocate nothing: a counting allocator watches the server at work.
#![allow(unsafe_code, reason = "an allocator that counts, and buffers that stand for guest memory")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs::File;
use std::sync::Arc;

use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use outboard_common::ring::Chain;
use virtiofsd::fuse::extension::Wait;
use virtiofsd::fuse::{Limits, Outcome, Scratch, Server};
use virtiofsd::passthrough::{Config, PassthroughFs};

thread_local! {
    /// Allocations of this thread.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is the system's allocator's; counting touches a plain thread-local number.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: handed on from the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: handed on from the caller; the block came from `System`.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const READ: u32 = 15;
const WRITE: u32 = 16;

/// A message of FUSE: header, body, data.
fn message(opcode: u32, inode: u64, body: &[u8], data: usize) -> Vec<u8> {
    let len = u32::try_from(40 + body.len() + data).unwrap();
    let mut bytes = [len.to_ne_bytes(), opcode.to_ne_bytes()].concat();
    bytes.extend([7, inode].iter().flat_map(|word: &u64| word.to_ne_bytes()));
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes.resize(bytes.len() + data, 1);
    bytes
}

/// The body of READ and WRITE: 4 KiB at the file's beginning.
fn transfer(handle: u64) -> Vec<u8> {
    [handle, 0, 4096, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn hot_operations_do_not_allocate() {
    let dir = tempfile::TempDir::new_in("/dev/shm").unwrap();
    std::fs::write(dir.path().join("file"), [7; 8192]).unwrap();
    let root = File::open(dir.path()).unwrap().into();
    let proc_self_fd = File::open("/proc/self/fd").unwrap().into();
    let fs = PassthroughFs::new(Config::default(), root, proc_self_fd).unwrap();
    fs.prepare_thread().unwrap();
    let ctx = Context { uid: 0, gid: 0, pid: 1 };
    let inode = fs.lookup(&ctx, 1, c"file").unwrap().inode;
    let (handle, ..) = fs.open(&ctx, inode, libc::O_RDWR.cast_unsigned(), 0).unwrap();
    let handle = handle.unwrap();
    let server = Arc::new(Server::new(fs, Limits::default()));
    server.resume(Some(0));

    let mut answer = vec![0_u8; 16 << 10];
    let (mut chain, mut scratch) = (Chain::default(), Scratch::default());
    for (name, mut request, least) in [
        ("LOOKUP", message(LOOKUP, 1, b"file\0", 0), 144),
        ("GETATTR", message(GETATTR, inode, &[0; 16], 0), 120),
        ("READ", message(READ, inode, &transfer(handle), 0), 4112),
        ("WRITE", message(WRITE, inode, &transfer(handle), 4096), 24),
    ] {
        let mut allocated = 0;
        for round in 0..200 {
            chain.readable.clear();
            chain.writable.clear();
            // SAFETY: `request` outlives what the chain says of it, and nothing else uses it meanwhile.
            unsafe { chain.readable.push(request.as_mut_ptr(), request.len()) };
            // SAFETY: as above, for `answer`.
            unsafe { chain.writable.push(answer.as_mut_ptr(), answer.len()) };
            let before = COUNT.get();
            let outcome = server.handle(&mut chain, &mut scratch, Wait::Never);
            // The first rounds size the working space.
            if round >= 2 {
                allocated += COUNT.get() - before;
            }
            assert!(matches!(outcome, Outcome::Done(n) if n >= least), "{name}: {outcome:?}");
            assert_eq!(answer[4..8], [0; 4], "{name}: an error");
        }
        assert_eq!(allocated, 0, "{name} allocates");
    }
    assert!(COUNT.get() > 0, "the allocator does not count");
}
