//! vhost-user-blk's requests, good and bad, over a real socket and both ring formats.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, geteuid, getrlimit};
use testkit::daemon::{Daemon, bin};
use testkit::driver::blk::{BlkSlot, RequestType, S_IOERR, S_OK, S_UNSUPP, request};
use testkit::driver::{Buffer, GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, BackendRequest, FrontEnd, ShmemPolicy};
use testkit::memory::{GuestRam, RamRegion};
use testkit::skip::skip;
use virtio_bindings::virtio_blk as spec;

const TIMEOUT: Duration = Duration::from_secs(10);
const SECTORS: u64 = 16 * 2048;

/// A running device with one attached guest.
struct Bench {
    frontend: FrontEnd,
    ram: Arc<GuestRam>,
    queue: GuestQueue,
    slot: BlkSlot,
    image: PathBuf,
    daemon: Daemon,
    _dirs: Vec<tempfile::TempDir>,
}

/// Starts the daemon with `arguments` on a new image (added unless `arguments` name a disk).
fn bench_with(format: RingFormat, arguments: &[&str], features: u64) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    let bytes: Vec<u8> = (0..SECTORS * 512).map(|i| (i / 512 % 251) as u8).collect();
    fs::write(&image, bytes).unwrap();
    let mut all: Vec<String> = arguments.iter().map(|a| (*a).to_owned()).collect();
    if !arguments.iter().any(|a| a.starts_with("--null") || a.starts_with("--memory")) {
        all.push(format!("--blk-file={}", image.display()));
    }
    let daemon = Daemon::start("vhost-user-blk", &dir.path().join("blk.sock"), &all).unwrap();
    let ram = GuestRam::new(16 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    let options = AttachOptions { features, ..AttachOptions::new(format) };
    let (mut queues, _) = frontend.attach(&ram, &options).unwrap();
    let slot = BlkSlot::new(&ram, 1 << 20).unwrap();
    Bench { frontend, queue: queues.remove(0), slot, ram, image, daemon, _dirs: vec![dir] }
}

fn bench(format: RingFormat, arguments: &[&str]) -> Bench {
    bench_with(format, arguments, u64::MAX)
}

impl Bench {
    fn run(&mut self, kind: RequestType, sector: u64, len: u32) -> u8 {
        request(&mut self.queue, &self.slot, (kind, sector, len), TIMEOUT).unwrap()
    }

    fn file(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        fs::File::open(&self.image).unwrap().read_exact_at(&mut out, sector * 512).unwrap();
        out
    }

    /// A request whose header has these bytes, with these buffers after it.
    fn raw(&mut self, header: &[u8], rest: &[Buffer]) -> u8 {
        self.ram.write(self.slot.header_addr(), header);
        self.ram.write(self.slot.status_addr(), &[0xaa]);
        let mut chain = vec![Buffer::readable(self.slot.header_addr(), header.len() as u32)];
        chain.extend_from_slice(rest);
        self.queue.request(&chain, TIMEOUT).unwrap();
        self.slot.status()
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn reads_and_writes(format: RingFormat, arguments: &[&str]) {
    let mut b = bench(format, arguments);
    for (sector, len) in
        [(0, 512), (1, 512), (8, 4096), (3, 65536), (SECTORS - 1, 512), (0, 1 << 20)]
    {
        assert_eq!(b.run(RequestType::IN, sector, len), S_OK);
        assert!(b.slot.data(len as usize) == b.file(sector, len as usize), "{sector}+{len}");
        let data: Vec<u8> = (0..len).map(|i| (i * 7 + len + sector as u32) as u8).collect();
        b.slot.set_data(&data);
        assert_eq!(b.run(RequestType::OUT, sector, len), S_OK);
        assert!(b.file(sector, len as usize) == data, "{sector}+{len}");
    }
    assert_eq!(b.run(RequestType::FLUSH, 0, 0), S_OK);
}

#[test]
fn reads_and_writes_whatever_the_cache() {
    for format in RingFormat::ALL {
        reads_and_writes(format, &[]);
    }
    reads_and_writes(RingFormat::Split, &["--buffered"]);
    reads_and_writes(RingFormat::Split, &["--write-cache=off"]);
    reads_and_writes(RingFormat::Packed, &["--poll-us=50"]);
}

/// Guest memory of the tests that register it: less than users may lock by default.
const SMALL_RAM: u64 = 2 << 20;
/// What those tests lock at the most.
const LOCKED_BYTES: u64 = 3 << 20;

/// A disk that registers guest memory, on storage that goes through the ring. `refused`: the daemon may not
/// lock so much memory. `None` after the test was counted as skipped.
fn registering(format: RingFormat, refused: bool) -> Option<Bench> {
    const TMPFS: rustix::fs::FsWord = 0x0102_1994;
    let limit = getrlimit(Resource::Memlock).maximum;
    if !refused && !geteuid().is_root() && limit.is_some_and(|bytes| bytes < LOCKED_BYTES) {
        skip("this user may not lock 3 MiB (ulimit -l)");
        return None;
    }
    // Not the usual place, which is a tmpfs on many machines, and is copied from on the worker's thread.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    if rustix::fs::statfs(dir.path()).unwrap().f_type == TMPFS {
        skip("the build directory is a tmpfs, which does not go through the ring");
        return None;
    }
    let image = dir.path().join("disk.img");
    fs::write(&image, vec![3; 1 << 20]).unwrap();
    let mut command = Command::new("prlimit");
    if refused {
        // The rings themselves count too, those of the user's other daemons included.
        command.arg(format!("--memlock={0}:{0}", SMALL_RAM - 4096));
        if geteuid().is_root() {
            command.args(["setpriv", "--bounding-set=-sys_resource,-ipc_lock"]);
        }
    }
    // A socket's path is short.
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("blk.sock");
    command.arg(bin("vhost-user-blk").unwrap()).arg("--register-memory");
    command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(&image);
    let daemon = Daemon::start_command("vhost-user-blk", command, &socket).unwrap();
    let ram = GuestRam::new(SMALL_RAM).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    let (mut queues, _) = frontend.attach(&ram, &AttachOptions::new(format)).unwrap();
    let slot = BlkSlot::new(&ram, 1 << 16).unwrap();
    let queue = queues.remove(0);
    Some(Bench { frontend, queue, slot, ram, image, daemon, _dirs: [dir, sockets].into() })
}

/// Guest memory that the daemon's process holds, KiB.
fn pinned_kib(daemon: &Daemon) -> u64 {
    let pid = *daemon.processes().last().unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Registered memory is pinned; memory that comes later is used all the same, and registered as soon as
/// nothing is in flight.
#[test]
fn registered_memory_is_used_and_followed() {
    for format in RingFormat::ALL {
        reads_and_writes(format, &["--register-memory"]);
        let Some(mut b) = registering(format, false) else { return };
        assert_eq!(b.run(RequestType::IN, 0, 4096), S_OK);
        assert!(b.slot.data(4096) == [3; 4096]);
        let before = SMALL_RAM / 1024;
        assert_eq!(pinned_kib(&b.daemon), before, "{}", b.daemon.log());
        let region = RamRegion::new(1 << 32, 1 << 20).unwrap();
        b.frontend.add_mem_region(&region).unwrap();
        assert_eq!(b.run(RequestType::IN, 0, 4096), S_OK);
        b.slot.set_data(&[5; 4096]);
        assert_eq!(b.run(RequestType::OUT, 8, 4096), S_OK);
        assert!(b.file(8, 4096) == [5; 4096]);
        assert_eq!(pinned_kib(&b.daemon), LOCKED_BYTES / 1024);
        b.frontend.remove_region(region.info()).unwrap();
        assert_eq!(b.run(RequestType::IN, 0, 4096), S_OK);
        assert_eq!(pinned_kib(&b.daemon), before);
    }
}

/// Who may not lock memory is told which limit it is, once, and has a disk that works.
#[test]
fn memory_that_cannot_be_registered_is_said_and_done_without() {
    let Some(mut b) = registering(RingFormat::Split, true) else { return };
    for _ in 0..3 {
        assert_eq!(b.run(RequestType::IN, 0, 4096), S_OK);
        assert!(b.slot.data(4096) == [3; 4096]);
    }
    assert_eq!(pinned_kib(&b.daemon), 0);
    assert_eq!(b.daemon.log().matches("LimitMEMLOCK").count(), 1, "{}", b.daemon.log());
}

#[test]
fn many_segments_in_odd_places() {
    let mut b = bench(RingFormat::Split, &[]);
    // Buffers that direct I/O cannot take: an odd address, and lengths that are no sectors.
    let data: Vec<u8> = (0..4096u32).map(|i| (i % 253) as u8).collect();
    let at = b.slot.data_addr() + 1;
    b.ram.write(at, &data);
    let mut parts = Vec::new();
    let mut from = 0;
    for len in [1u32, 511, 1000, 24, 2560] {
        parts.push(Buffer::readable(at + u64::from(from), len));
        from += len;
    }
    parts.push(Buffer::writable(b.slot.status_addr(), 1));
    assert_eq!(b.raw(&header(spec::VIRTIO_BLK_T_OUT, 9), &parts), S_OK);
    assert!(b.file(9, 4096) == data);

    // A header in pieces, and a status byte that shares its buffer with the data.
    let h = header(spec::VIRTIO_BLK_T_IN, 9);
    b.ram.write(b.slot.header_addr(), &h);
    let (ha, da) = (b.slot.header_addr(), b.slot.data_addr());
    let chain =
        [Buffer::readable(ha, 3), Buffer::readable(ha + 3, 13), Buffer::writable(da, 4096 + 1)];
    assert_eq!(b.queue.request(&chain, TIMEOUT).unwrap(), 4097);
    assert!(b.ram.bytes(da, 4096) == data);
    assert_eq!(b.ram.bytes(da + 4096, 1), [S_OK]);
}

#[test]
fn indirect_chains() {
    for format in RingFormat::ALL {
        let mut b = bench(format, &[]);
        let chain = b.slot.prepare_split(RequestType::IN, 5, 64 * 1024, 100);
        assert!(b.queue.add_indirect(&chain, 7).unwrap());
        b.queue.kick();
        assert_eq!(b.queue.wait(TIMEOUT).unwrap().cookie, 7);
        assert_eq!(b.slot.status(), S_OK);
        assert!(b.slot.data(64 * 1024) == b.file(5, 64 * 1024));
    }
}

#[test]
fn serial_number() {
    let mut b = bench(RingFormat::Split, &["--serial=disk-42"]);
    assert_eq!(b.run(RequestType::GET_ID, 0, 20), S_OK);
    assert_eq!(&b.slot.data(20), b"disk-42\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn bad_requests_get_their_status_and_nothing_else_happens() {
    for format in RingFormat::ALL {
        let mut b = bench(format, &[]);
        let before = fs::read(&b.image).unwrap();
        b.slot.set_data(&[0xee; 4096]);
        let (data, status) = (b.slot.data_addr(), Buffer::writable(b.slot.status_addr(), 1));
        let (to, from) = (Buffer::readable(data, 512), Buffer::writable(data, 512));
        let (r, w) = (spec::VIRTIO_BLK_T_IN, spec::VIRTIO_BLK_T_OUT);
        for sector in [SECTORS, SECTORS - 1 + (1 << 55), u64::MAX, u64::MAX / 512, 1 << 63] {
            assert_eq!(b.raw(&header(w, sector), &[to, status]), S_IOERR, "{sector}");
            assert_eq!(b.raw(&header(r, sector), &[from, status]), S_IOERR, "{sector}");
        }
        let odd = Buffer::readable(data, 100);
        assert_eq!(b.raw(&header(w, 0), &[odd, status]), S_IOERR);
        let long = [Buffer::readable(data, 1024), status];
        assert_eq!(b.raw(&header(w, SECTORS - 1), &long), S_IOERR, "half of it past the end");
        assert_eq!(b.raw(&header(w, 0), &[status]), S_IOERR, "no data");
        assert_eq!(b.raw(&header(r, 0), &[status]), S_IOERR, "no data");
        assert_eq!(b.raw(&[0; 7], &[status]), S_IOERR, "a short header");
        for kind in [2, 3, 5, 16, 24, 0x8000_0000, u32::MAX] {
            assert_eq!(b.raw(&header(kind, 0), &[to, status]), S_UNSUPP, "type {kind}");
        }
        // No room for a status at all.
        b.ram.write(b.slot.header_addr(), &header(w, 0));
        let chain = [Buffer::readable(b.slot.header_addr(), 16), to];
        assert_eq!(b.queue.request(&chain, TIMEOUT).unwrap(), 0);
        // Descriptors that lead nowhere.
        let nowhere = [Buffer::readable(1 << 40, 16), status];
        assert_eq!(b.queue.request(&nowhere, TIMEOUT).unwrap(), 0);
        assert!(fs::read(&b.image).unwrap() == before, "the disk changed");
        assert_eq!(b.run(RequestType::IN, 0, 4096), S_OK, "the device still works");
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut b = bench(RingFormat::Split, &["--read-only"]);
    assert_ne!(b.frontend.get_features().unwrap() & 1 << spec::VIRTIO_BLK_F_RO, 0);
    let before = fs::read(&b.image).unwrap();
    b.slot.set_data(&[1; 512]);
    assert_eq!(b.run(RequestType::OUT, 0, 512), S_IOERR);
    assert_ne!(b.run(RequestType::DISCARD, 0, 16), S_OK);
    assert_ne!(b.run(RequestType::WRITE_ZEROES, 0, 16), S_OK);
    assert_eq!(b.run(RequestType::FLUSH, 0, 0), S_OK);
    assert_eq!(b.run(RequestType::IN, 0, 512), S_OK);
    assert!(fs::read(&b.image).unwrap() == before);
}

#[test]
fn discards_and_zeroes() {
    for arguments in [&[][..], &["--buffered"], &["--write-cache=off"]] {
        let mut b = bench(RingFormat::Split, arguments);
        let used = || fs::metadata(&b.image).unwrap().blocks();
        let before = used();
        b.slot.set_range(2048, 4096, false);
        assert_eq!(
            request(&mut b.queue, &b.slot, (RequestType::DISCARD, 0, 16), TIMEOUT).unwrap(),
            S_OK
        );
        let after = fs::metadata(&b.image).unwrap().blocks();
        assert!(after + 4096 <= before, "2 MiB were given back: {before} → {after} sectors");

        for (sector, sectors, unmap) in [(9, 3, false), (8192, 1024, true), (8191, 1026, false)] {
            b.slot.set_range(sector, sectors, unmap);
            assert_eq!(b.run(RequestType::WRITE_ZEROES, 0, 16), S_OK);
            let len = sectors as usize * 512;
            assert!(b.file(sector, len).iter().all(|&x| x == 0), "{sector}+{sectors}");
        }
        assert!(b.file(8, 512).iter().all(|&x| x == 8), "the sector before is untouched");
        assert!(b.file(12, 512).iter().all(|&x| x == 12), "the sector after is untouched");
        assert_eq!(fs::metadata(&b.image).unwrap().len(), SECTORS * 512);
    }
}

#[test]
fn bad_segments() {
    let mut b = bench(RingFormat::Split, &[]);
    let before = fs::read(&b.image).unwrap();
    for (sector, sectors) in [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (0, u32::MAX)] {
        b.slot.set_range(sector, sectors, false);
        assert_eq!(b.run(RequestType::DISCARD, 0, 16), S_IOERR, "{sector}+{sectors}");
        assert_eq!(b.run(RequestType::WRITE_ZEROES, 0, 16), S_IOERR, "{sector}+{sectors}");
    }
    b.slot.set_range(0, 8, true);
    assert_eq!(b.run(RequestType::DISCARD, 0, 16), S_UNSUPP, "discard with the unmap flag");
    for len in [0, 15, 17, 16 * 17] {
        assert_eq!(b.run(RequestType::DISCARD, 0, len), S_IOERR, "{len} bytes of segments");
    }
    assert!(fs::read(&b.image).unwrap() == before, "the disk changed");
}

#[test]
fn memory_disk() {
    let mut b = bench(RingFormat::Packed, &["--memory=1M"]);
    let large: Vec<u8> = (0..1u32 << 20).map(|i| (i % 249) as u8).collect();
    b.slot.set_data(&large);
    assert_eq!(b.run(RequestType::OUT, 0, 1 << 20), S_OK);
    b.slot.set_data(&[0; 1 << 20]);
    assert_eq!(b.run(RequestType::IN, 0, 1 << 20), S_OK);
    assert!(b.slot.data(1 << 20) == large);
    assert_eq!(b.run(RequestType::OUT, 8, 1 << 20), S_IOERR, "past the end");
    b.slot.set_data(&[7; 1 << 16]);
    assert_eq!(b.run(RequestType::OUT, 100, 1 << 16), S_OK);
    b.slot.set_data(&[0; 1 << 16]);
    assert_eq!(b.run(RequestType::IN, 100, 1 << 16), S_OK);
    assert!(b.slot.data(1 << 16) == [7; 1 << 16]);
    assert_eq!(b.run(RequestType::IN, 2048, 512), S_IOERR);
    assert_eq!(b.run(RequestType::FLUSH, 0, 0), S_OK);
}

#[test]
fn configuration_space() {
    let b = bench(RingFormat::Split, &["--num-queues=4", "--queue-size=256"]);
    let config = b.frontend.get_config(0, 60).unwrap();
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes(), "seg_max");
    assert_eq!(config[20..24], 512u32.to_le_bytes(), "blk_size");
    assert_eq!(config[32], 1, "writeback");
    assert_eq!(config[34..36], [4, 0], "num_queues");
    assert!(b.frontend.set_config(0, &[0; 8]).is_err(), "the capacity is not writable");
    assert!(b.frontend.set_config(32, &[2]).is_err());
    b.frontend.set_config(32, &[0]).unwrap();
    assert_eq!(b.frontend.get_config(32, 1).unwrap(), [0]);
}

#[test]
fn a_resize_reaches_the_guest() {
    let mut b = bench(RingFormat::Split, &[]);
    let channel = b.frontend.open_backend_channel(ShmemPolicy::Refuse).unwrap();
    let resize = |sectors: u64| {
        fs::File::options().write(true).open(&b.image).unwrap().set_len(sectors * 512).unwrap();
    };
    resize(SECTORS * 2);
    assert_eq!(channel.requests.recv_timeout(TIMEOUT).unwrap(), BackendRequest::ConfigChange);
    assert_eq!(b.frontend.get_config(0, 8).unwrap(), (SECTORS * 2).to_le_bytes());
    resize(SECTORS / 2);
    let pid = rustix::process::Pid::from_raw(b.daemon.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::HUP).unwrap();
    assert_eq!(channel.requests.recv_timeout(TIMEOUT).unwrap(), BackendRequest::ConfigChange);
    assert_eq!(b.run(RequestType::IN, SECTORS / 2, 512), S_IOERR, "past the new end");
    assert_eq!(b.run(RequestType::IN, SECTORS / 2 - 1, 512), S_OK);
    assert_eq!(b.frontend.get_config(0, 8).unwrap(), (SECTORS / 2).to_le_bytes());
}

fn time_of(b: &mut Bench, kind: RequestType, count: u32) -> Duration {
    let start = std::time::Instant::now();
    for _ in 0..count {
        assert_eq!(b.run(kind, 0, 4096), S_OK);
    }
    start.elapsed()
}

#[test]
fn limits_hold_requests_back_and_reads_do_not_hold_writes() {
    let mut b = bench(RingFormat::Split, &["--read-iops=100:1"]);
    let reads = time_of(&mut b, RequestType::IN, 11);
    assert!(reads >= Duration::from_millis(95), "11 reads at 100/s took {reads:?}");
    assert!(reads <= Duration::from_millis(600), "11 reads at 100/s took {reads:?}");
    let writes = time_of(&mut b, RequestType::OUT, 50);
    assert!(writes < Duration::from_millis(300), "50 unlimited writes took {writes:?}");
}

#[test]
fn it_is_small_and_quiet_when_idle_and_leaves_quickly() {
    let mut b = bench(RingFormat::Split, &[]);
    assert_eq!(b.run(RequestType::IN, 0, 4096), S_OK);
    let before = b.daemon.cpu_time().unwrap();
    std::thread::sleep(Duration::from_secs(2));
    let spent = b.daemon.cpu_time().unwrap() - before;
    assert!(spent <= Duration::from_millis(10), "{spent:?} of CPU in two idle seconds");
    let start = std::time::Instant::now();
    let status = b.daemon.terminate(TIMEOUT).unwrap();
    assert!(status.success(), "{status}");
    assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
}

#[test]
fn waiting_for_a_guest_takes_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let file = format!("--blk-file={}", image.display());
    let daemon = Daemon::start("vhost-user-blk", &dir.path().join("s"), &[file]).unwrap();
    // It listens before it is done with starting and gives that part's memory back.
    let deadline = std::time::Instant::now() + TIMEOUT;
    let bytes = || daemon.private_bytes().unwrap();
    while bytes() >= 2 << 20 {
        assert!(std::time::Instant::now() < deadline, "{} bytes", bytes());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("disk.img");
    fs::File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
    path
}
