//! TCP between this machine's kernel and an end of ours that never waits for its own: what its frames cost
//! whoever carries them, without a guest's scheduler and interrupts.
//!
//! The end speaks over a [`Wire`]: a bare tap, with nothing in between (the ceiling), or our daemon's rings.
//! Its frames are as long as a guest's. On a bare tap it is tried both ways, woken by each frame and looking
//! every [`LOOK`]; the better counts.

#![allow(unsafe_code, reason = "readv and writev of a tap")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testkit::driver::{Buffer, GuestQueue, RingFormat, Used};
use testkit::frontend::FrontEnd;
use testkit::memory::GuestRam;
use testkit::netns::NetNs;
use testkit::toolroot::ToolRoot;

use super::ceiling::{Tap, cpu};
use super::{Bulk, Daemon, HEADER, ME, attach_pair, cpu_seconds, ours, pin};

const RUN_TIME: Duration = Duration::from_secs(1);
/// How long a bare loop leaves the tap alone.
const LOOK: Duration = Duration::from_micros(100);
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PORT: u16 = 5001;
/// Bytes of a frame that the end looks at, with header.
const HEAD: usize = 160;
/// Payload of one super-frame, and the pieces of memory that it comes from or goes to.
const PIECE: usize = 1 << 16;
const PIECES: usize = 256;
/// Pieces that another CPU fills ahead.
const AHEAD: usize = 64;
/// Frames received before they are acknowledged, if more come at once.
const FRAMES_AN_ACK: u32 = 2;
/// As of Linux's driver.
const RING: u16 = 256;
const BUFFER: u32 = 4096;

/// Who carries the frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// Nobody: the end has the tap. Its memory is its own.
    Bare,
    /// Nobody, and another CPU writes what is sent and reads what is received, as a guest's does.
    BareShared,
    /// Our daemon, with these rings.
    Ours(RingFormat),
}

/// What frames go over.
trait Wire {
    /// Sends `headers`, the first being virtio's, and `payload` more bytes.
    fn send(&mut self, headers: &[u8], payload: usize);
    /// Takes one frame, and copies its first bytes; false: there is none.
    fn take(&mut self, head: &mut [u8; HEAD]) -> bool;
    /// Nothing can be done at the moment.
    fn wait(&mut self);
    /// CPU seconds so far of whoever carries the frames.
    fn cpu(&self) -> f64;
}

/// The other CPU's part with the pieces of memory.
struct Guest {
    /// Pieces that it filled or read,
    ready: AtomicUsize,
    /// and pieces that we sent or filled.
    done: AtomicUsize,
    stop: AtomicBool,
}

impl Guest {
    fn start(ram: &Arc<GuestRam>, base: u64, fills: bool) -> Arc<Self> {
        let it = Arc::new(Self {
            ready: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let (shared, ram) = (it.clone(), ram.clone());
        std::thread::spawn(move || {
            pin(0);
            shared.work(&ram, base, fills);
        });
        it
    }

    fn work(&self, ram: &GuestRam, base: u64, fills: bool) {
        let mut bytes = vec![0x5a; PIECE];
        while !self.stop.load(Ordering::Relaxed) {
            let (ready, done) =
                (self.ready.load(Ordering::Acquire), self.done.load(Ordering::Acquire));
            let at = base + (ready % PIECES * PIECE) as u64;
            if fills && ready < done + AHEAD {
                ram.write(at, &bytes);
            } else if !fills && ready < done {
                ram.read(at, &mut bytes);
            } else {
                std::thread::yield_now();
                continue;
            }
            self.ready.store(ready + 1, Ordering::Release);
        }
    }
}

/// The tap itself.
struct BareWire {
    tap: Tap,
    ram: Arc<GuestRam>,
    base: u64,
    piece: usize,
    guest: Option<Arc<Guest>>,
    to_guest: bool,
    /// Sleep until the next look, and not until the next frame.
    looks: bool,
}

impl BareWire {
    fn new(root: &ToolRoot, mtu: u32, shared: bool, bulk: &Bulk, looks: bool) -> Self {
        let to_guest = bulk.to_guest;
        let ram = GuestRam::new((PIECES * PIECE) as u64 + (1 << 20)).unwrap();
        let base = ram.alloc((PIECES * PIECE) as u64, 4096).unwrap();
        ram.fill(base, PIECES * PIECE, 0x5a);
        let guest = shared.then(|| Guest::start(&ram, base, !to_guest));
        let tap = Tap::new(root, mtu);
        bulk.control_tap(root, &tap.namespace);
        Self { tap, ram, base, piece: 0, guest, to_guest, looks }
    }

    /// The next piece of memory.
    fn next_piece(&mut self) -> *mut libc::c_void {
        let at = self.base + (self.piece % PIECES * PIECE) as u64;
        self.ram.pointer(at, PIECE).cast()
    }

    fn piece_done(&mut self) {
        self.piece += 1;
        if let Some(guest) = &self.guest {
            guest.done.store(self.piece, Ordering::Release);
        }
    }
}

impl Wire for BareWire {
    fn send(&mut self, headers: &[u8], payload: usize) {
        if let (Some(guest), true) = (&self.guest, payload > 0) {
            while guest.ready.load(Ordering::Acquire) <= self.piece {
                std::thread::sleep(LOOK);
            }
        }
        let parts = [
            libc::iovec { iov_base: headers.as_ptr().cast_mut().cast(), iov_len: headers.len() },
            libc::iovec { iov_base: self.next_piece(), iov_len: payload },
        ];
        let count = if payload == 0 { 1 } else { 2 };
        // SAFETY: both parts live, and are only read.
        let sent = unsafe { libc::writev(self.tap.file.as_raw_fd(), parts.as_ptr(), count) };
        assert_eq!(usize::try_from(sent).ok(), Some(headers.len() + payload));
        if payload > 0 {
            self.piece_done();
        }
    }

    fn take(&mut self, head: &mut [u8; HEAD]) -> bool {
        // A frame is longer than a piece by its headers, which have a place of their own.
        let parts = [
            libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: HEAD },
            libc::iovec { iov_base: self.next_piece(), iov_len: PIECE },
        ];
        // SAFETY: both parts live, and nobody else writes them now.
        let got = unsafe { libc::readv(self.tap.file.as_raw_fd(), parts.as_ptr(), 2) };
        if got > HEAD as isize && self.to_guest {
            self.piece_done();
        }
        got > 0
    }

    fn wait(&mut self) {
        if self.looks {
            return std::thread::sleep(LOOK);
        }
        let mut fds = [PollFd::new(&self.tap.file, PollFlags::IN)];
        let limit = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        let _ = poll(&mut fds, Some(&limit));
    }

    fn cpu(&self) -> f64 {
        cpu()
    }
}

impl Drop for BareWire {
    fn drop(&mut self) {
        if let Some(guest) = &self.guest {
            guest.stop.store(true, Ordering::Relaxed);
        }
    }
}

/// Our daemon's rings, without interrupts.
struct RingWire {
    rx: GuestQueue,
    tx: GuestQueue,
    ram: Arc<GuestRam>,
    /// Where the frames to send are made.
    out: u64,
    free: Vec<u64>,
    room: Vec<u8>,
    _frontend: FrontEnd,
    namespace: NetNs,
    daemon: Daemon,
    _dir: tempfile::TempDir,
}

impl RingWire {
    fn new(root: &ToolRoot, format: RingFormat, mtu: u32, bulk: &Bulk) -> Self {
        let namespace = NetNs::new(root).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let daemon = ours(root, &namespace, &dir.path().join("net.sock"));
        for line in [
            format!("link set tap0 address 02:00:00:00:00:01 mtu {mtu}"),
            "neighbour add 10.9.0.2 lladdr 02:00:00:00:00:09 dev tap0 nud permanent".to_owned(),
        ] {
            namespace.ip(root, &line).unwrap();
        }
        bulk.control_tap(root, &namespace);
        let ram = GuestRam::new(64 << 20).unwrap();
        let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
        let [mut rx, mut tx] = attach_pair(&mut frontend, &ram, format, RING);
        for _ in 0..RING {
            let at = ram.alloc(BUFFER.into(), 4096).unwrap();
            assert!(rx.add(&[Buffer::writable(at, BUFFER)], at));
        }
        rx.kick();
        tx.disable_interrupts();
        rx.disable_interrupts();
        // A frame is two descriptors: headers, payload.
        let slots = u64::from(RING / 2);
        let out = ram.alloc(slots * (PIECE + 4096) as u64, 4096).unwrap();
        let room = vec![0x5a; PIECE];
        let free = (0..slots).collect();
        Self { rx, tx, ram, out, free, room, _frontend: frontend, namespace, daemon, _dir: dir }
    }

    fn give_back(&mut self, used: &Used) {
        assert!(self.rx.add(&[Buffer::writable(used.cookie, BUFFER)], used.cookie));
    }
}

impl Wire for RingWire {
    fn send(&mut self, headers: &[u8], payload: usize) {
        while let Some(used) = self.tx.used() {
            self.free.push(used.cookie);
        }
        let slot = loop {
            if let Some(slot) = self.free.pop() {
                break slot;
            }
            std::thread::yield_now();
            self.free.extend(self.tx.used().map(|used| used.cookie));
        };
        let at = self.out + slot * (PIECE + 4096) as u64;
        self.ram.write(at, headers);
        let mut parts = vec![Buffer::readable(at, headers.len() as u32)];
        if payload > 0 {
            self.ram.write(at + 4096, &self.room[..payload]);
            parts.push(Buffer::readable(at + 4096, payload as u32));
        }
        assert!(self.tx.add(&parts, slot));
        self.tx.kick();
    }

    fn take(&mut self, head: &mut [u8; HEAD]) -> bool {
        let Some(first) = self.rx.used() else { return false };
        self.ram.read(first.cookie, head);
        let buffers = u16::from_le_bytes([head[10], head[11]]);
        self.ram.read(first.cookie, &mut self.room[..first.len as usize]);
        self.give_back(&first);
        for _ in 1..buffers {
            let next = self.rx.used().unwrap();
            self.ram.read(next.cookie, &mut self.room[..next.len as usize]);
            self.give_back(&next);
        }
        self.rx.kick();
        true
    }

    fn wait(&mut self) {
        std::thread::yield_now();
    }

    fn cpu(&self) -> f64 {
        cpu_seconds(&self.daemon)
    }
}

/// One end of a TCP connection that has neither losses nor congestion: the other is this machine's kernel.
struct End<W> {
    wire: W,
    mss: usize,
    /// Next sequence number to send; the oldest that is not acknowledged.
    next: u32,
    unacknowledged: u32,
    /// Next sequence number to receive.
    expected: u32,
    /// What the other side takes, bytes, and the shift of its window field.
    window: u32,
    shift: u8,
    /// Ours and the other side's.
    ports: [u16; 2],
    /// The first bytes of the frame taken last.
    head: [u8; HEAD],
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

impl<W: Wire> End<W> {
    fn new(wire: W, mtu: u32) -> Self {
        Self {
            wire,
            mss: mtu as usize - 40,
            next: 1000,
            unacknowledged: 1000,
            expected: 0,
            window: 0,
            shift: 0,
            ports: [40000, PORT],
            head: [0; HEAD],
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
        for port in self.ports {
            out.extend(port.to_be_bytes());
        }
        out.extend(self.next.to_be_bytes());
        out.extend(self.expected.to_be_bytes());
        out.extend([(tcp as u8 / 4) << 4, flags, 0xff, 0xff]);
        out.extend(sum(&pseudo).to_be_bytes());
        out.extend([0, 0]);
        out.extend(options);
        out
    }

    fn send(&mut self, flags: u8, payload: usize) {
        let headers = self.headers(flags, payload);
        self.wire.send(&headers, payload);
        let phantom = u32::from(flags & (SYN | FIN) != 0);
        self.next = self.next.wrapping_add(payload as u32 + phantom);
    }

    /// Takes one frame, and notes what it acknowledges; `None`: there is none.
    fn take(&mut self) -> Option<Segment> {
        while self.wire.take(&mut self.head) {
            let frame = &self.head[HEADER..];
            if frame[12..14] != [8, 0] || frame[23] != 6 {
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
        None
    }

    fn wait_for(&mut self, flags: u8) -> Segment {
        let begun = Instant::now();
        loop {
            match self.take() {
                Some(segment) if segment.flags & flags == flags => return segment,
                Some(_) => {}
                None => self.wire.wait(),
            }
            assert!(begun.elapsed() < Duration::from_secs(5), "no answer to the bare loop's TCP");
        }
    }

    /// Sends for [`RUN_TIME`]; Gbit per CPU second.
    fn pour(&mut self) -> f64 {
        self.send(SYN, 0);
        let answer = self.wait_for(SYN | ACK);
        self.expected = answer.sequence.wrapping_add(1);
        self.send(ACK, 0);
        let size = (65_000 / self.mss).max(1) * self.mss;
        let (begun, start, first) = (self.wire.cpu(), Instant::now(), self.next);
        let mut bytes = 0u64;
        while start.elapsed() < RUN_TIME {
            while self.take().is_some() {}
            let room = self.window.saturating_sub(self.next.wrapping_sub(self.unacknowledged));
            let frames = room as usize / size;
            for _ in 0..frames {
                self.send(ACK, size);
                bytes += size as u64;
            }
            if frames == 0 {
                self.wire.wait();
            }
        }
        assert!(self.unacknowledged.wrapping_sub(first) > 0, "nothing was acknowledged");
        bytes as f64 * 8e-9 / (self.wire.cpu() - begun)
    }

    /// Receives for [`RUN_TIME`]; Gbit per CPU second.
    fn drain(&mut self) -> f64 {
        self.ports = [PORT, 0];
        let dialled = self.wait_for(SYN);
        self.ports[1] = u16::from_be_bytes([self.head[HEADER + 34], self.head[HEADER + 35]]);
        self.expected = dialled.sequence.wrapping_add(1);
        self.send(SYN | ACK, 0);
        let (mut bytes, mut owed) = (0u64, 0);
        let (begun, start) = (self.wire.cpu(), Instant::now());
        while start.elapsed() < RUN_TIME {
            match self.take() {
                Some(segment) if segment.sequence == self.expected => {
                    self.expected = self.expected.wrapping_add(segment.bytes);
                    bytes += u64::from(segment.bytes);
                    owed += u32::from(segment.bytes > 0);
                }
                Some(_) => owed += FRAMES_AN_ACK,
                None if owed > 0 => {
                    self.send(ACK, 0);
                    owed = 0;
                }
                None => self.wire.wait(),
            }
            if owed >= FRAMES_AN_ACK {
                self.send(ACK, 0);
                owed = 0;
            }
        }
        bytes as f64 * 8e-9 / (self.wire.cpu() - begun)
    }
}

/// TCP between this machine's kernel and an end of ours: Gbit per CPU second of whoever carries its frames.
pub(crate) fn tcp(root: &ToolRoot, carrier: Carrier, mtu: u32, bulk: &Bulk) -> f64 {
    match carrier {
        Carrier::Ours(format) => {
            let wire = RingWire::new(root, format, mtu, bulk);
            let namespace = wire.namespace.clone();
            run(End::new(wire, mtu), &namespace, bulk.to_guest)
        }
        Carrier::Bare | Carrier::BareShared => {
            let shared = carrier == Carrier::BareShared;
            let rates = [false, true].map(|looks| {
                let wire = BareWire::new(root, mtu, shared, bulk, looks);
                let namespace = wire.tap.namespace.clone();
                pin(1);
                let rate = run(End::new(wire, mtu), &namespace, bulk.to_guest);
                pin(0);
                rate
            });
            rates[0].max(rates[1])
        }
    }
}

fn run<W: Wire>(mut end: End<W>, namespace: &NetNs, to_guest: bool) -> f64 {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, namespace) = (stop.clone(), namespace.clone());
    let kernel = std::thread::spawn(move || {
        pin(0);
        namespace.run(move || if to_guest { dial(&stopped) } else { listen(&stopped) })
    });
    let rate = if to_guest {
        end.drain()
    } else {
        // Its listener is a moment away.
        std::thread::sleep(Duration::from_millis(100));
        end.pour()
    };
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
