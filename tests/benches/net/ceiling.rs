//! What a tap costs with no ring in front of it: a bare loop that does nothing but read and write the
//! frames that a back end would. No back end that moves its frames through a tap one call a frame is faster
//! on the machine it runs on, so our figures are shares of these.

#![allow(unsafe_code, reason = "a tap's ioctls, and writev")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use testkit::netns::NetNs;
use testkit::toolroot::ToolRoot;

use super::{HEADER, ME, flood, frame, pin};

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
/// Checksums, TCP super-frames of both kinds.
const OFFLOADS: libc::c_ulong = 7;

const BATCH: usize = 32;
/// Memory that payload comes from and goes to: more than the second cache, as a guest's is.
const PAYLOAD: usize = 16 << 20;
const FRAMES: usize = 50_000;
/// How long frames gather before the loop reads them.
const GATHER: Duration = Duration::from_micros(100);

/// A tap in a name space of its own.
pub(crate) struct Tap {
    pub(crate) file: File,
    pub(crate) namespace: NetNs,
}

impl Tap {
    pub(crate) fn new(root: &ToolRoot, mtu: u32) -> Self {
        let namespace = NetNs::new(root).unwrap();
        let file = namespace.run(open).unwrap();
        for line in [
            format!("link set tap0 address 02:00:00:00:00:01 mtu {mtu} txqueuelen 1000 up"),
            "address add 10.9.0.1/24 dev tap0".to_owned(),
            "neighbour add 10.9.0.2 lladdr 02:00:00:00:00:09 dev tap0 nud permanent".to_owned(),
        ] {
            namespace.ip(root, &line).unwrap();
        }
        Self { file, namespace }
    }

    /// Reads one frame; its bytes, or `None` if there is none.
    fn read(&self, to: &mut [u8]) -> Option<usize> {
        (&self.file).read(to).ok()
    }
}

/// A non-blocking tap `tap0` with `virtio_net_hdr`.
fn open() -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open("/dev/net/tun").unwrap();
    // SAFETY: all-zero is a valid request.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = *from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes one request, which lives.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) }, 0);
    let size = HEADER as libc::c_int;
    // SAFETY: the kernel reads one int.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) }, 0);
    // SAFETY: a plain number.
    assert_eq!(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETOFFLOAD, OFFLOADS) }, 0);
    file
}

/// CPU time of this thread, seconds.
pub(crate) fn cpu() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Mpps per CPU second: out of the guest, into it. The first is the better of one `write` a frame and
/// batches of an io_uring.
pub(crate) fn frames(root: &ToolRoot, bytes: usize) -> (f64, f64) {
    let tap = Tap::new(root, 65520);
    pin(1);
    let out = [&[0; HEADER][..], &frame([0xff; 6], bytes)].concat();
    let rates = (write_each(&tap, &out).max(write_batches(&tap, &out)), read_each(&tap, bytes));
    pin(0);
    rates
}

fn write_each(tap: &Tap, out: &[u8]) -> f64 {
    let begun = cpu();
    for _ in 0..FRAMES {
        assert_eq!((&tap.file).write(out).unwrap(), out.len());
    }
    FRAMES as f64 / (cpu() - begun) / 1e6
}

fn write_batches(tap: &Tap, out: &[u8]) -> f64 {
    let made = io_uring::IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(BATCH as u32);
    let Ok(mut ring) = made else { return 0.0 };
    ring.submitter().register_files(&[tap.file.as_raw_fd()]).unwrap();
    let entry = io_uring::opcode::Write::new(
        io_uring::types::Fixed(0),
        out.as_ptr(),
        u32::try_from(out.len()).unwrap(),
    )
    .rw_flags(libc::RWF_NOWAIT)
    .build();
    let begun = cpu();
    for _ in 0..FRAMES / BATCH {
        for _ in 0..BATCH {
            // SAFETY: `out` lives until all are done, which is awaited below.
            unsafe { ring.submission().push(&entry) }.unwrap();
        }
        ring.submit_and_wait(BATCH).unwrap();
        assert!(
            ring.completion()
                .all(|done: io_uring::cqueue::Entry| done.result() == out.len() as i32)
        );
    }
    (FRAMES / BATCH * BATCH) as f64 / (cpu() - begun) / 1e6
}

/// Frames of another CPU's sender. The loop sleeps between looks, so that it is never woken for a few.
fn read_each(tap: &Tap, bytes: usize) -> f64 {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, namespace) = (stop.clone(), tap.namespace.clone());
    let sender = std::thread::spawn(move || {
        pin(0);
        let frame = frame(ME, bytes);
        namespace.run(move || flood(&frame, &stopped)).unwrap();
    });
    let mut to = vec![0; PAYLOAD];
    let mut rooms = to.chunks_exact_mut(2048);
    let mut frames = 0;
    let begun = cpu();
    while frames < 4 * FRAMES {
        let Some(room) = rooms.next() else {
            rooms = to.chunks_exact_mut(2048);
            continue;
        };
        if tap.read(room).is_some() {
            frames += 1;
        } else {
            std::thread::sleep(GATHER);
        }
    }
    let seconds = cpu() - begun;
    stop.store(true, Ordering::Relaxed);
    sender.join().unwrap();
    frames as f64 / seconds / 1e6
}
