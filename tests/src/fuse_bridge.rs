//! A mount of the host that is served by a virtio-fs daemon: without a guest, but with a real kernel's
//! FUSE on one side and the real daemon, socket and rings on the other.
//!
//! # Theory of operation
//! The bridge mounts `/dev/fuse` and is, at the same time, the front end of the daemon's socket. Each
//! request that the kernel hands out is copied into a slot of the pretended guest's memory and made
//! available as a chain; what comes back used is written to `/dev/fuse` as the reply. FORGET,
//! BATCH_FORGET and INTERRUPT, which have no reply, go to the high-priority queue. Each request queue has
//! a thread and a clone of the fuse device (FUSE_DEV_IOC_CLONE), whose requests must be answered there.
//!
//! The only message changed is INIT's reply: the fuse device moves 1 MiB at a time at most.
#![allow(unsafe_code, reason = "the ioctl that clones a fuse device")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::driver::{Buffer, GuestQueue, RingFormat};
use crate::frontend::{AttachOptions, FrontEnd};
use crate::memory::GuestRam;

/// FUSE_DEV_IOC_CLONE, `_IOR(229, 0, uint32_t)`.
const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_e500;
/// The most data in one message: what the fuse device's default `max_pages` allows.
const MAX_DATA: usize = 1 << 20;
/// Room for a message: data, headers, names.
const SLOT: usize = MAX_DATA + 16384;
/// Requests of one queue in flight.
const SLOTS: usize = 16;
/// Entries of a ring.
const RING: u16 = 128;
/// Size of `fuse_in_header` and `fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Operations without a reply.
const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const INIT: u32 = 26;
/// How long a daemon may take for one FORGET before the test is given up.
const PATIENCE: Duration = Duration::from_secs(10);

/// How to mount.
#[derive(Debug, Clone, Copy)]
pub struct BridgeOptions {
    /// Request queues, each with a thread.
    pub queues: u16,
    /// Ring format.
    pub format: RingFormat,
}

impl Default for BridgeOptions {
    fn default() -> Self {
        Self { queues: 1, format: RingFormat::Split }
    }
}

/// A mounted daemon. Dropping it unmounts.
#[derive(Debug)]
pub struct FuseBridge {
    mountpoint: PathBuf,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    front_end: FrontEnd,
}

/// Whether this process may mount a fuse device.
#[must_use]
pub fn available() -> bool {
    rustix::process::geteuid().is_root() && Path::new("/dev/fuse").exists()
}

impl FuseBridge {
    /// Mounts what the daemon listening at `socket` shares at `mountpoint`, an empty directory.
    ///
    /// # Errors
    /// The daemon does not follow the protocol, or the kernel refuses the mount.
    pub fn mount(socket: &Path, mountpoint: &Path, options: BridgeOptions) -> Result<Self> {
        let mut front_end = FrontEnd::connect(socket)?;
        let slots = u64::from(options.queues) * (SLOTS * SLOT * 2) as u64;
        let ram = GuestRam::new((slots + (16 << 20)).next_multiple_of(2 << 20))?;
        let attach = AttachOptions {
            queues: options.queues + 1,
            queue_size: RING,
            inflight: false,
            ..AttachOptions::new(options.format)
        };
        let (queues, _) = front_end.attach(&ram, &attach)?;
        let mut queues = queues.into_iter();
        let first = queues.next().context("the device has no high-priority queue")?;
        let urgent =
            Arc::new(Mutex::new(Urgent { slot: ram.alloc(SLOT as u64, 4096)?, queue: first }));
        let device = open_device()?;
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
            device.as_raw_fd()
        );
        let data = std::ffi::CString::new(data)?;
        let flags = MountFlags::NODEV;
        rustix::mount::mount("outboard", mountpoint, "fuse.outboard", flags, Some(data.as_c_str()))
            .context("mount a fuse device")?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut bridge =
            Self { mountpoint: mountpoint.to_owned(), stop, threads: Vec::new(), front_end };
        let mut devices = vec![device];
        for _ in 1..options.queues {
            let clone = clone_device(&devices[0])?;
            devices.push(clone);
        }
        for (device, queue) in devices.into_iter().zip(queues) {
            let urgent = Arc::clone(&urgent);
            let mut lane = Lane::new(device, queue, &ram, urgent)?;
            let stop = Arc::clone(&bridge.stop);
            bridge.threads.push(std::thread::spawn(move || {
                if let Err(error) = lane.run(&stop) {
                    crate::daemon::show("fuse bridge", &format!("{error:#}"));
                }
            }));
        }
        Ok(bridge)
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// The connection to the daemon.
    #[must_use]
    pub fn front_end(&self) -> &FrontEnd {
        &self.front_end
    }
}

impl Drop for FuseBridge {
    fn drop(&mut self) {
        // A daemon that hangs must not hang the unmount; with the threads gone the kernel aborts.
        if rustix::mount::unmount(&self.mountpoint, UnmountFlags::empty()).is_err() {
            let _ = rustix::mount::unmount(&self.mountpoint, UnmountFlags::DETACH);
        }
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn open_device() -> Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/fuse", flags, rustix::fs::Mode::empty())
        .context("open /dev/fuse")?;
    Ok(fd.into())
}

/// Another device of the same mount.
fn clone_device(of: &File) -> Result<File> {
    let device = open_device()?;
    let fd = u32::try_from(of.as_raw_fd())?;
    // SAFETY: the ioctl reads one u32.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), FUSE_DEV_IOC_CLONE, &raw const fd) };
    ensure!(result == 0, "clone a fuse device: {}", io::Error::last_os_error());
    Ok(device)
}

/// The high-priority queue, one request at a time.
struct Urgent {
    queue: GuestQueue,
    slot: u64,
}

impl Urgent {
    fn send(&mut self, ram: &GuestRam, message: &[u8]) -> Result<()> {
        ram.write(self.slot, message);
        let len = u32::try_from(message.len())?;
        self.queue.request(&[Buffer::readable(self.slot, len)], PATIENCE)?;
        Ok(())
    }
}

/// One request queue and its fuse device.
struct Lane {
    device: File,
    queue: GuestQueue,
    urgent: Arc<Mutex<Urgent>>,
    ram: Arc<GuestRam>,
    /// Guest address of the first slot; a slot is room for a request and room for its reply.
    slots: u64,
    free: Vec<usize>,
    /// The operation in each slot.
    opcodes: [u32; SLOTS],
    message: Vec<u8>,
}

/// What the kernel had for us.
enum Received {
    Request,
    Nothing,
    Unmounted,
}

impl Lane {
    fn new(
        device: File,
        queue: GuestQueue,
        ram: &Arc<GuestRam>,
        urgent: Arc<Mutex<Urgent>>,
    ) -> Result<Self> {
        Ok(Self {
            device,
            queue,
            urgent,
            ram: Arc::clone(ram),
            slots: ram.alloc((SLOTS * SLOT * 2) as u64, 4096)?,
            free: (0..SLOTS).collect(),
            opcodes: [0; SLOTS],
            message: vec![0; SLOT],
        })
    }

    fn request_at(&self, slot: usize) -> u64 {
        self.slots + (slot * 2 * SLOT) as u64
    }

    fn reply_at(&self, slot: usize) -> u64 {
        self.request_at(slot) + SLOT as u64
    }

    fn run(&mut self, stop: &AtomicBool) -> Result<()> {
        while !stop.load(Ordering::Relaxed) {
            while let Some(used) = self.queue.used() {
                self.answer(usize::try_from(used.cookie)?, used.len)?;
            }
            if self.queue.enable_interrupts() {
                continue;
            }
            let ready = self.wait()?;
            if ready.0 {
                self.queue.call_fd().drain();
            }
            while ready.1 && !self.free.is_empty() {
                match self.receive()? {
                    Received::Request => {}
                    Received::Nothing => break,
                    Received::Unmounted => return Ok(()),
                }
            }
            self.queue.kick();
        }
        Ok(())
    }

    /// Waits until a chain may be used, or, with room for it, a request is there.
    fn wait(&self) -> Result<(bool, bool)> {
        let call = self.queue.call_fd();
        let device: BorrowedFd<'_> = self.device.as_fd();
        let wanted = if self.free.is_empty() { PollFlags::empty() } else { PollFlags::IN };
        let mut fds = [PollFd::new(call, PollFlags::IN), PollFd::from_borrowed_fd(device, wanted)];
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok((!fds[0].revents().is_empty(), !fds[1].revents().is_empty()))
    }

    /// Takes a request from the kernel and makes it available to the daemon.
    fn receive(&mut self) -> Result<Received> {
        let n = match rustix::io::read(&self.device, self.message.as_mut_slice()) {
            Ok(n) => n,
            Err(rustix::io::Errno::AGAIN) => return Ok(Received::Nothing),
            // Given up by its caller before we had it.
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::INTR) => {
                return Ok(Received::Request);
            }
            Err(rustix::io::Errno::NODEV | rustix::io::Errno::CONNABORTED) => {
                return Ok(Received::Unmounted);
            }
            Err(error) => bail!("read from the fuse device: {error}"),
        };
        let message = self.message.get(..n).context("more than the buffer")?;
        let header: &[u8] = message.get(..IN_HEADER).context("a request without a header")?;
        let opcode = u32::from_ne_bytes(header[4..8].try_into()?);
        if matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT) {
            let mut urgent = self.urgent.lock().unwrap_or_else(PoisonError::into_inner);
            urgent.send(&self.ram, message)?;
            return Ok(Received::Request);
        }
        let slot = self.free.pop().context("a request without a slot")?;
        let (request, reply) = (self.request_at(slot), self.reply_at(slot));
        self.ram.write(request, message);
        let mut buffers = vec![Buffer::readable(request, u32::try_from(IN_HEADER)?)];
        if n > IN_HEADER {
            let rest = u32::try_from(n - IN_HEADER)?;
            buffers.push(Buffer::readable(request + IN_HEADER as u64, rest));
        }
        buffers.push(Buffer::writable(reply, u32::try_from(OUT_HEADER)?));
        buffers
            .push(Buffer::writable(reply + OUT_HEADER as u64, u32::try_from(SLOT - OUT_HEADER)?));
        self.opcodes[slot] = opcode;
        ensure!(self.queue.add(&buffers, slot as u64), "the ring is full");
        Ok(Received::Request)
    }

    /// Gives the daemon's reply to the kernel.
    fn answer(&mut self, slot: usize, len: u32) -> Result<()> {
        let mut reply = self.ram.bytes(self.reply_at(slot), usize::try_from(len)?);
        if self.opcodes[slot] == INIT {
            limit_init(&mut reply);
        }
        self.free.push(slot);
        match rustix::io::write(&self.device, &reply) {
            // The caller was killed, or the mount is gone.
            Ok(_) | Err(rustix::io::Errno::NOENT | rustix::io::Errno::NODEV) => Ok(()),
            Err(error) => bail!(
                "the kernel refuses the reply to operation {}: {error}: {:?}",
                self.opcodes[slot],
                reply.get(..reply.len().min(64))
            ),
        }
    }
}

/// Lowers `max_write` and `max_pages` in INIT's reply to what the fuse device moves.
fn limit_init(reply: &mut [u8]) {
    const MAX_WRITE: usize = OUT_HEADER + 20;
    const MAX_PAGES: usize = OUT_HEADER + 28;
    if let Some(field) = reply.get_mut(MAX_WRITE..MAX_WRITE + 4) {
        let value = u32::from_ne_bytes(field.try_into().unwrap_or_default());
        field.copy_from_slice(&value.min(1 << 20).to_ne_bytes());
    }
    if let Some(field) = reply.get_mut(MAX_PAGES..MAX_PAGES + 2) {
        let value = u16::from_ne_bytes(field.try_into().unwrap_or_default());
        field.copy_from_slice(&value.min(256).to_ne_bytes());
    }
}
