//! What the kernel takes for the same transfers with no virtio in front of them: a bare `io_uring` loop
//! that keeps so many under way and does nothing else, so that no header is parsed, no ring in guest memory
//! is looked at and nobody kicks. Its figures are what is left to a daemon that does the same operations.
//!
//! How many go down at once makes a difference, since each batch has a doorbell and a wake-up. So there are
//! two: one submits whenever something has completed, as a daemon does; the other when half of the
//! depth has, which no daemon could wait for: it would hold a request back for others that may never come.

#![allow(unsafe_code, reason = "operations carry pointers")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use testkit::driver::blk::RequestType;

use super::{Figures, IMAGE_BYTES, Load, figures_of, pin, task_cpu_ns};

/// Memory that the transfers go to and come from: shared, as a guest's.
struct Memory {
    at: *mut u8,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        // SAFETY: a new mapping of its own.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED, "no memory");
        Self { at: at.cast(), len }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; the ring that used it is gone (see the fields' order in `Bare`).
        let _ = unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

struct Bare {
    ring: IoUring,
    memory: Memory,
    registered: bool,
    /// Completions to wait for.
    wanted: usize,
    random: u64,
    next: u64,
}

impl Bare {
    fn new(floor: &Floor, load: &Load) -> Self {
        let registered = floor.registered;
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT | libc::O_NOATIME);
        let file = options.open(&floor.path).unwrap();
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_submit_all()
            .build(256)
            .unwrap();
        ring.submitter().register_files(&[file.as_raw_fd()]).unwrap();
        let memory = Memory::new(load.depth * load.bytes as usize);
        if registered {
            let vector = libc::iovec { iov_base: memory.at.cast(), iov_len: memory.len };
            // SAFETY: mapped until after the ring is closed.
            unsafe { ring.submitter().register_buffers(&[vector]) }.unwrap();
        }
        let wanted = if floor.halves { load.depth.div_ceil(2) } else { 1 };
        Self { ring, memory, registered, wanted, random: 88_172_645, next: 0 }
    }

    fn submit(&mut self, load: &Load, slot: usize) {
        let offset = load.block(&mut self.random, &mut self.next) * u64::from(load.bytes);
        assert!(offset < IMAGE_BYTES);
        let data = self.memory.at.wrapping_add(slot * load.bytes as usize);
        let entry = self.entry(load, data, offset).user_data(slot as u64);
        // SAFETY: the memory is the loop's own, and lives until the ring is closed.
        unsafe { self.ring.submission().push(&entry) }.unwrap();
    }

    fn entry(&self, load: &Load, data: *mut u8, offset: u64) -> squeue::Entry {
        let (file, len) = (types::Fixed(0), load.bytes);
        match (load.kind == RequestType::OUT, self.registered) {
            (false, false) => opcode::Read::new(file, data, len).offset(offset).build(),
            (true, false) => opcode::Write::new(file, data, len).offset(offset).build(),
            (false, true) => opcode::ReadFixed::new(file, data, len, 0).offset(offset).build(),
            (true, true) => opcode::WriteFixed::new(file, data, len, 0).offset(offset).build(),
        }
    }

    fn run(&mut self, load: &Load, time: Duration) -> Figures {
        let mut begun = vec![Instant::now(); load.depth];
        let mut latencies: Vec<u64> = Vec::with_capacity(1 << 20);
        let mut done: Vec<(usize, i32)> = Vec::with_capacity(load.depth);
        let (cpu, start) = (task_cpu_ns("/proc/thread-self".as_ref()), Instant::now());
        for slot in 0..load.depth {
            self.submit(load, slot);
        }
        let (mut outstanding, end) = (load.depth, start + time);
        while outstanding > 0 {
            self.ring.submit_and_wait(self.wanted.min(outstanding)).unwrap();
            let now = Instant::now();
            done.extend(self.ring.completion().map(|c| (c.user_data() as usize, c.result())));
            for (slot, result) in done.drain(..) {
                assert_eq!(result, load.bytes as i32);
                latencies.push((now - begun[slot]).as_nanos() as u64);
                outstanding -= 1;
                if now < end {
                    self.submit(load, slot);
                    begun[slot] = now;
                    outstanding += 1;
                }
            }
        }
        let cpu = task_cpu_ns("/proc/thread-self".as_ref()) - cpu;
        figures_of(latencies, cpu, start.elapsed())
    }
}

/// A bare loop that runs when it is asked to.
pub(crate) struct Floor {
    pub(crate) name: &'static str,
    path: PathBuf,
    /// Its memory is registered with the ring.
    registered: bool,
    /// It waits for half of what is under way.
    halves: bool,
}

impl Floor {
    /// All kinds, on the image at `path`.
    pub(crate) fn kinds(path: &Path) -> [Self; 4] {
        let kind = |name, registered, halves| Self { name, path: path.into(), registered, halves };
        [
            kind("bare", false, false),
            kind("bare, halves", false, true),
            kind("bare, reg.", true, false),
            kind("bare, reg. h.", true, true),
        ]
    }

    /// One run, on the daemons' CPU while this thread spins on its own, as a client does.
    pub(crate) fn run(&self, load: &Load, time: Duration) -> Figures {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                pin(Some(0));
                Bare::new(self, load).run(load, time)
            });
            while !thread.is_finished() {
                std::hint::spin_loop();
            }
            thread.join().unwrap()
        })
    }
}
