//! What a tap costs with no ring in front of it: a bare loop that does nothing but read and write the
//! frames that a back end would. No back end that moves its frames through a tap one call a frame is faster
//! on the machine it runs on, so our figures are shares of these.

#![allow(unsafe_code, reason = "a tap's ioctls, and writev")]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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
const RUN_TIME: Duration = Duration::from_secs(1);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PORT: u16 = 5001;

/// A tap in a name space of its own.
struct Tap {
    file: File,
    namespace: NetNs,
}

impl Tap {
    fn new(root: &ToolRoot, mtu: u32) -> Self {
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

    /// Sleeps until there is a frame.
    fn wait(&self) {
        let mut fds = [rustix::event::PollFd::new(&self.file, rustix::event::PollFlags::IN)];
        let limit = rustix::event::Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let _ = rustix::event::poll(&mut fds, Some(&limit));
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
fn cpu() -> f64 {
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

/// One end of a TCP connection that has neither losses nor congestion: the other is this machine's kernel.
struct End {
    tap: Tap,
    mss: usize,
    /// Next sequence number to send; the oldest that is not acknowledged.
    next: u32,
    unacknowledged: u32,
    /// Next sequence number to receive.
    expected: u32,
    /// What the other side takes, bytes, and the shift of its window field.
    window: u32,
    shift: u8,
    port: u16,
    scratch: Vec<u8>,
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// What a frame of the other side says.
struct Segment {
    flags: u8,
    sequence: u32,
    bytes: u32,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The ones' complement sum of `bytes`, folded.
fn sum(bytes: &[u8]) -> u16 {
    let pairs = bytes.chunks(2).map(|p| u32::from(u16::from_be_bytes([p[0], p[1]])));
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl End {
    fn new(root: &ToolRoot, mtu: u32) -> Self {
        Self {
            tap: Tap::new(root, mtu),
            mss: mtu as usize - 40,
            next: 1000,
            unacknowledged: 1000,
            expected: 0,
            window: 0,
            shift: 0,
            port: 40000,
            scratch: vec![0; 1 << 17],
        }
    }

    /// Headers of a segment of `payload` bytes; a SYN has options.
    fn headers(&self, flags: u8, payload: usize) -> Vec<u8> {
        let options: &[u8] = if flags & SYN != 0 {
            &[2, 4, (self.mss >> 8) as u8, self.mss as u8, 1, 3, 3, 7]
        } else {
            &[]
        };
        let tcp = 20 + options.len();
        let gso = payload > self.mss;
        let mut out = vec![1, u8::from(gso)];
        for field in [54, if gso { self.mss as u16 } else { 0 }, 34, 16, 0] {
            out.extend(field.to_le_bytes());
        }
        out.extend([&HOST_MAC[..], &ME, &[8, 0]].concat());
        let total = (20 + tcp + payload) as u16;
        let mut ip = vec![0x45, 0];
        ip.extend(total.to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0]);
        ip.extend(GUEST.octets());
        ip.extend(HOST.octets());
        let check = !sum(&ip);
        ip[10..12].copy_from_slice(&check.to_be_bytes());
        let length = ((tcp + payload) as u16).to_be_bytes();
        let pseudo = [&GUEST.octets()[..], &HOST.octets(), &[0, 6], &length].concat();
        out.extend(ip);
        let (from, to) = if self.port == PORT { (PORT, self.peer()) } else { (self.port, PORT) };
        out.extend(from.to_be_bytes());
        out.extend(to.to_be_bytes());
        out.extend(self.next.to_be_bytes());
        out.extend(self.expected.to_be_bytes());
        out.extend([(tcp as u8 / 4) << 4, flags, 0xff, 0xff]);
        out.extend(sum(&pseudo).to_be_bytes());
        out.extend([0, 0]);
        out.extend(options);
        out
    }

    /// The other side's port, where it dialled us: kept in the scratch of its SYN.
    fn peer(&self) -> u16 {
        u16::from_be_bytes([self.scratch[HEADER + 34], self.scratch[HEADER + 35]])
    }

    fn send(&mut self, flags: u8, payload: &[u8]) {
        let headers = self.headers(flags, payload.len());
        let parts = [
            libc::iovec { iov_base: headers.as_ptr().cast_mut().cast(), iov_len: headers.len() },
            libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() },
        ];
        let count = if payload.is_empty() { 1 } else { 2 };
        // SAFETY: both parts live, and are only read.
        let sent = unsafe { libc::writev(self.tap.file.as_raw_fd(), parts.as_ptr(), count) };
        assert_eq!(usize::try_from(sent).ok(), Some(headers.len() + payload.len()));
        let phantom = u32::from(flags & (SYN | FIN) != 0);
        self.next = self.next.wrapping_add(payload.len() as u32 + phantom);
    }

    /// Takes one frame into `room`, and notes what it acknowledges; `None`: there is none.
    fn take(&mut self, room: Option<&mut [u8]>) -> Option<Segment> {
        let room = room.unwrap_or(&mut self.scratch);
        loop {
            let len = self.tap.read(room)?;
            let frame = &room[HEADER..len];
            if frame.len() < 54 || frame[12..14] != [8, 0] || frame[23] != 6 {
                continue;
            }
            let tcp = &frame[34..];
            let offset = usize::from(tcp[12] >> 4) * 4;
            let flags = tcp[13];
            if flags & SYN != 0 {
                // Its only option of interest is the window's shift.
                let scale = tcp[20..offset].windows(3).find(|w| w[..2] == [3, 3]);
                self.shift = scale.map_or(0, |w| w[2]);
            }
            let window = u32::from(u16::from_be_bytes([tcp[14], tcp[15]]));
            self.window = window << if flags & SYN != 0 { 0 } else { self.shift };
            if flags & ACK != 0 {
                self.unacknowledged = word(tcp, 8);
            }
            let total = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
            let bytes = (total - 20 - offset) as u32;
            return Some(Segment { flags, sequence: word(tcp, 4), bytes });
        }
    }

    fn wait_for(&mut self, flags: u8) -> Segment {
        let begun = Instant::now();
        loop {
            match self.take(None) {
                Some(segment) if segment.flags & flags == flags => return segment,
                Some(_) => {}
                None => self.tap.wait(),
            }
            assert!(begun.elapsed() < Duration::from_secs(5), "no answer to the bare loop's TCP");
        }
    }

    /// Sends for [`RUN_TIME`]; Gbit per CPU second.
    fn pour(&mut self, payload: &[u8]) -> f64 {
        self.send(SYN, &[]);
        let answer = self.wait_for(SYN | ACK);
        self.expected = answer.sequence.wrapping_add(1);
        self.send(ACK, &[]);
        let size = (65_000 / self.mss).max(1) * self.mss;
        let mut pieces = payload.chunks_exact(size).cycle();
        let (begun, start, first) = (cpu(), Instant::now(), self.next);
        let mut bytes = 0u64;
        while start.elapsed() < RUN_TIME {
            for _ in 0..4 {
                let room = self.window.saturating_sub(self.next.wrapping_sub(self.unacknowledged));
                if (room as usize) < size {
                    self.tap.wait();
                    break;
                }
                self.send(ACK, pieces.next().unwrap());
                bytes += size as u64;
            }
            while self.take(None).is_some() {}
        }
        assert!(self.unacknowledged.wrapping_sub(first) > 0, "nothing was acknowledged");
        bytes as f64 * 8e-9 / (cpu() - begun)
    }

    /// Receives for [`RUN_TIME`]; Gbit per CPU second.
    fn drain(&mut self, payload: &mut [u8]) -> f64 {
        self.port = PORT;
        let dialled = self.wait_for(SYN);
        self.expected = dialled.sequence.wrapping_add(1);
        self.send(SYN | ACK, &[]);
        let mut at = 0;
        let (mut bytes, mut owed) = (0u64, 0);
        let (begun, start) = (cpu(), Instant::now());
        while start.elapsed() < RUN_TIME {
            let room = 1 << 17;
            at = if at + 2 * room > payload.len() { 0 } else { at + room };
            match self.take(Some(&mut payload[at..at + room])) {
                Some(segment) if segment.sequence == self.expected => {
                    self.expected = self.expected.wrapping_add(segment.bytes);
                    bytes += u64::from(segment.bytes);
                    owed += u32::from(segment.bytes > 0);
                }
                Some(_) => owed += 2,
                None if owed > 0 => {
                    self.send(ACK, &[]);
                    owed = 0;
                }
                None => self.tap.wait(),
            }
            if owed >= 2 {
                self.send(ACK, &[]);
                owed = 0;
            }
        }
        bytes as f64 * 8e-9 / (cpu() - begun)
    }
}

/// TCP between this machine's kernel and the bare loop, whose frames are as long as a guest's: Gbit per
/// CPU second of the loop.
pub(crate) fn tcp(root: &ToolRoot, mtu: u32, to_guest: bool) -> f64 {
    let mut end = End::new(root, mtu);
    let mut payload = vec![0x5a; PAYLOAD];
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, namespace) = (stop.clone(), end.tap.namespace.clone());
    let kernel = std::thread::spawn(move || {
        pin(0);
        namespace.run(move || if to_guest { dial(&stopped) } else { listen(&stopped) })
    });
    pin(1);
    let rate = if to_guest {
        end.drain(&mut payload)
    } else {
        // Its listener is a moment away.
        std::thread::sleep(Duration::from_millis(100));
        end.pour(&payload)
    };
    pin(0);
    stop.store(true, Ordering::Relaxed);
    // Whoever reads or writes there times out.
    kernel.join().unwrap().unwrap();
    rate
}

fn listen(stop: &AtomicBool) {
    let (mut stream, _) = TcpListener::bind((HOST, PORT)).unwrap().accept().unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut room = vec![0; 1 << 17];
    while !stop.load(Ordering::Relaxed) {
        let _ = stream.read(&mut room);
    }
}

fn dial(stop: &AtomicBool) {
    let to = SocketAddrV4::new(GUEST, PORT).into();
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5)).unwrap();
    stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    let piece = vec![0x5a; 1 << 17];
    while !stop.load(Ordering::Relaxed) {
        let _ = stream.write(&piece);
    }
}
