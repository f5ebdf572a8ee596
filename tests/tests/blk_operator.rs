//! What an operator does with vhost-user-blk: real block devices, the control and metrics sockets; and
//! the order in which each VMM attaches.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use testkit::daemon::Daemon;
use testkit::driver::blk::{BlkSlot, RequestType, S_OK, request};
use testkit::driver::{GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, F_LOG_ALL, F_PROTOCOL_FEATURES, FrontEnd};
use testkit::loop_device::LoopDevice;
use testkit::memory::{GuestRam, RamRegion};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::{virtio_blk as spec, virtio_config, virtio_ring};

const TIMEOUT: Duration = Duration::from_secs(10);
const IMAGE_BYTES: u64 = 16 << 20;

fn image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    let bytes: Vec<u8> = (0..IMAGE_BYTES).map(|i| (i / 512 % 251) as u8 | 1).collect();
    fs::write(&path, bytes).unwrap();
    path
}

fn start(dir: &Path, arguments: &[String]) -> Daemon {
    Daemon::start("vhost-user-blk", &dir.join("blk.sock"), arguments).unwrap()
}

/// One request to the control socket, and its answer.
fn ask(control: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(control).unwrap();
    writeln!(stream, "{request}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer
}

/// A block device made for the test.
trait Device {
    fn path(&self) -> &Path;
    /// Bytes of storage that its content takes.
    fn stored(&self) -> u64;
}

/// A loop device, and the file behind it.
struct Loop {
    device: LoopDevice,
    file: PathBuf,
}

impl Device for Loop {
    fn path(&self) -> &Path {
        self.device.path()
    }
    fn stored(&self) -> u64 {
        512 * std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&self.file).unwrap())
    }
}

/// A compressed RAM disk with the content of a file, until it is dropped.
struct Zram {
    device: PathBuf,
    sys: PathBuf,
}

impl Zram {
    /// `None` where the kernel has none, or does not let us have one more.
    fn of(file: &Path) -> Option<Self> {
        let number = fs::read_to_string("/sys/class/zram-control/hot_add").ok()?;
        let name = format!("zram{}", number.trim());
        let zram =
            Self { device: Path::new("/dev").join(&name), sys: Path::new("/sys/block").join(name) };
        fs::write(zram.sys.join("disksize"), IMAGE_BYTES.to_string()).ok()?;
        let device = fs::File::options().write(true).open(&zram.device).ok()?;
        device.write_all_at(&fs::read(file).unwrap(), 0).unwrap();
        device.sync_all().unwrap();
        Some(zram)
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let number: String =
            self.device.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
        let _ = fs::write(self.sys.join("reset"), "1");
        let _ = fs::write("/sys/class/zram-control/hot_remove", number);
    }
}

impl Device for Zram {
    fn path(&self) -> &Path {
        &self.device
    }
    fn stored(&self) -> u64 {
        let statistics = fs::read_to_string(self.sys.join("mm_stat")).unwrap();
        statistics.split_ascii_whitespace().next().unwrap().parse().unwrap()
    }
}

/// Reads, writes, discards and zeroes on a device with the content of `image`.
fn whole_device(dir: &Path, device: &dyn Device) {
    let daemon = start(dir, &[format!("--blk-file={}", device.path().display())]);
    let ram = GuestRam::new(16 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    let (mut queues, _) = frontend.attach(&ram, &AttachOptions::new(RingFormat::Split)).unwrap();
    assert_eq!(frontend.get_config(0, 8).unwrap(), (IMAGE_BYTES / 512).to_le_bytes());
    let (queue, slot) = (&mut queues[0], BlkSlot::new(&ram, 1 << 20).unwrap());
    let mut run = |kind, sector, len| request(queue, &slot, (kind, sector, len), TIMEOUT).unwrap();
    let on_device = |sector: u64, len: usize| {
        let mut bytes = vec![0; len];
        fs::File::open(device.path()).unwrap().read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    };

    slot.set_data(&[0xa5; 1 << 20]);
    assert_eq!(run(RequestType::OUT, 2048, 1 << 20), S_OK);
    assert_eq!(run(RequestType::FLUSH, 0, 0), S_OK);
    assert!(on_device(2048, 1 << 20) == [0xa5; 1 << 20]);
    slot.set_data(&[0; 4096]);
    assert_eq!(run(RequestType::IN, 2048, 4096), S_OK);
    assert!(slot.data(4096) == [0xa5; 4096]);

    let before = device.stored();
    slot.set_range(8192, 8192, false);
    assert_eq!(run(RequestType::DISCARD, 0, 16), S_OK);
    let after = device.stored();
    assert!(after + (4 << 20) <= before, "4 MiB were given back: {before} → {after} bytes");
    for (sector, sectors, unmap) in [(16, 8, false), (20480, 2048, true)] {
        slot.set_range(sector, sectors, unmap);
        assert_eq!(run(RequestType::WRITE_ZEROES, 0, 16), S_OK);
        assert!(on_device(sector, sectors as usize * 512).iter().all(|&b| b == 0), "{sector}");
    }
    assert!(on_device(15, 512).iter().all(|&b| b == 15), "the sector before is untouched");
    assert!(on_device(24, 512).iter().all(|&b| b == 25), "the sector after is untouched");
}

#[test]
fn a_whole_block_device_is_read_written_discarded_and_zeroed() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "device.img");
    // Where there is one, it goes the other way: on the worker's thread.
    if let Some(zram) = Zram::of(&file) {
        whole_device(dir.path(), &zram);
    }
    if let Some(device) = LoopDevice::for_test(&file) {
        whole_device(dir.path(), &Loop { device, file });
    }
}

#[test]
fn the_control_socket_lists_limits_and_resizes() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "a.img");
    let control = dir.path().join("control");
    let arguments = [
        format!("--blk-file={}", file.display()),
        format!("--control-socket={}", control.display()),
    ];
    let daemon = start(dir.path(), &arguments);
    let ram = GuestRam::new(4 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    let (mut queues, _) = frontend.attach(&ram, &AttachOptions::new(RingFormat::Packed)).unwrap();
    let (queue, slot) = (&mut queues[0], BlkSlot::new(&ram, 4096).unwrap());
    let mut read = || request(queue, &slot, (RequestType::IN, 0, 4096), TIMEOUT).unwrap();
    let info = ask(&control, r#"{"info": null}"#);
    assert!(info.contains(&format!("\"sectors\":{}", IMAGE_BYTES / 512)), "{info}");

    let limit = r#"{"limits": {"limits": {"read": {"ops": "50:1"}}}}"#;
    let answer = ask(&control, limit);
    assert!(answer.contains("50") && !answer.contains("error"), "{answer}");
    let begun = Instant::now();
    for _ in 0..6 {
        assert_eq!(read(), S_OK);
    }
    assert!(begun.elapsed() >= Duration::from_millis(90), "{:?}", begun.elapsed());
    assert!(!ask(&control, r#"{"limits": {"limits": {}}}"#).contains("error"));
    let begun = Instant::now();
    for _ in 0..40 {
        assert_eq!(read(), S_OK);
    }
    assert!(begun.elapsed() < Duration::from_millis(700), "unlimited: {:?}", begun.elapsed());

    fs::File::options().write(true).open(&file).unwrap().set_len(IMAGE_BYTES * 2).unwrap();
    let answer = ask(&control, r#"{"resize": null}"#);
    assert!(answer.contains(&format!("\"sectors\":{}", IMAGE_BYTES / 256)), "{answer}");
    for wrong in [
        r#"{"resize": {"disk": "none"}}"#,
        r#"{"limits": {"limits": {"bogus": 1}}}"#,
        r#"{"limits": {"limits": {"read": {"ops": "x"}}}}"#,
        r#"{"stop": null}"#,
        "nonsense",
    ] {
        assert!(ask(&control, wrong).contains("error"), "{wrong}");
    }
    assert_eq!(read(), S_OK, "the disk still works");
}

/// What the metrics socket says of the series that begins with `name`; 0 when it is not there.
fn metric(socket: &Path, name: &str) -> f64 {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let of_series = |line: &&str| line.starts_with(name);
    let values = text.lines().filter(of_series).filter_map(|line| line.rsplit(' ').next());
    values.filter_map(|value| value.parse::<f64>().ok()).sum()
}

#[test]
fn latencies_and_requests_in_flight_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "a.img");
    let metrics = dir.path().join("metrics");
    let arguments = [
        format!("--blk-file={}", file.display()),
        format!("--metrics-socket={}", metrics.display()),
        "--read-iops=2:1".to_owned(),
    ];
    let daemon = start(dir.path(), &arguments);
    let ram = GuestRam::new(4 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    let (mut queues, _) = frontend.attach(&ram, &AttachOptions::new(RingFormat::Split)).unwrap();
    let queue = &mut queues[0];
    let slots: Vec<BlkSlot> = (0..3).map(|_| BlkSlot::new(&ram, 4096).unwrap()).collect();
    for (slot, cookie) in slots.iter().zip(0..) {
        assert!(queue.add(&slot.prepare(RequestType::IN, 0, 4096), cookie));
    }
    queue.kick();
    queue.wait(TIMEOUT).unwrap();
    // The limit holds back the two others for half a second and more.
    assert_eq!(metric(&metrics, "outboard_blk_in_flight{"), 2.0);
    queue.wait(TIMEOUT).unwrap();
    queue.wait(TIMEOUT).unwrap();
    assert_eq!(metric(&metrics, "outboard_blk_in_flight{"), 0.0);
    let measured = metric(&metrics, "outboard_blk_request_seconds_count{");
    assert!((1.0..=3.0).contains(&measured), "{measured} of 3");
    assert!(metric(&metrics, "outboard_blk_request_seconds_sum{") > 0.0);
}

/// As when a guest is migrated while it reads from a disk through io_uring.
#[test]
fn pages_that_io_uring_fills_are_in_the_dirty_log() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "a.img");
    let daemon = start(dir.path(), &[format!("--blk-file={}", file.display())]);
    let ram = GuestRam::new(8 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    let (mut queues, _) = frontend.attach(&ram, &AttachOptions::new(RingFormat::Split)).unwrap();
    let queue = &mut queues[0];
    let slots: Vec<BlkSlot> = (0..16).map(|_| BlkSlot::new(&ram, 64 << 10).unwrap()).collect();
    let log = RamRegion::new(0, 4096).unwrap();
    frontend.set_log_base(256, 0, log.file().as_fd()).unwrap();
    frontend.set_features(frontend.features | F_LOG_ALL).unwrap();
    let before = ram.bytes(0, 8 << 20);
    for (slot, at) in slots.iter().zip(0u64..) {
        let chain = slot.prepare_split(RequestType::IN, at * 256, 64 << 10, 4);
        assert!(queue.add(&chain, at));
    }
    queue.kick();
    for _ in &slots {
        queue.wait(TIMEOUT).unwrap();
    }
    let mut bits = [0; 256];
    log.file().read_exact_at(&mut bits, 0).unwrap();
    let is_dirty = |page: u64| bits[page as usize / 8] >> (page % 8) & 1 != 0;
    let after = ram.bytes(0, 8 << 20);
    let mut changed = 0;
    for slot in &slots {
        assert_eq!(slot.status(), S_OK);
        for page in slot.data_addr() / 4096..(slot.data_addr() + (64 << 10)) / 4096 {
            let range = page as usize * 4096..(page as usize + 1) * 4096;
            changed += u32::from(before[range.clone()] != after[range]);
            assert!(is_dirty(page), "page {page}");
        }
    }
    assert_eq!(changed, 256, "every page was filled");
    assert!(bits.contains(&0), "not everything is called dirty");
}

/// Reads and writes a little on a queue, whatever has been negotiated.
fn works(queue: &mut GuestQueue, slot: &BlkSlot) {
    let mut run = |kind, sector| request(queue, slot, (kind, sector, 4096), TIMEOUT).unwrap();
    slot.set_data(&[0x5c; 4096]);
    assert_eq!(run(RequestType::OUT, 40), S_OK);
    slot.set_data(&[0; 4096]);
    assert_eq!(run(RequestType::IN, 40), S_OK);
    assert!(slot.data(4096) == [0x5c; 4096]);
}

/// CONFIG and nothing else, one queue of 256, 60 bytes of configuration; memory before rings, no ring is
/// acknowledged; a PATCH reads the configuration again.
#[test]
fn firecrackers_sequence() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "a.img");
    let daemon = start(dir.path(), &[format!("--blk-file={}", file.display())]);
    let ram = GuestRam::new(8 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    frontend.set_owner().unwrap();
    let wanted = 1 << virtio_config::VIRTIO_F_VERSION_1
        | 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX
        | 1 << spec::VIRTIO_BLK_F_RO
        | 1 << spec::VIRTIO_BLK_F_FLUSH
        | F_PROTOCOL_FEATURES;
    let offered = frontend.get_features().unwrap();
    assert_ne!(offered & F_PROTOCOL_FEATURES, 0);
    let features = offered & wanted;
    // Set once before the guest is there, and again with what its driver acknowledged.
    frontend.set_features(features).unwrap();
    assert!(frontend.get_protocol_features().unwrap() & Protocol::CONFIG.bits() != 0);
    frontend.set_protocol_features(Protocol::CONFIG.bits()).unwrap();
    let config = frontend.get_config(0, 60).unwrap();
    assert_eq!(config[..8], (IMAGE_BYTES / 512).to_le_bytes());
    frontend.set_features(features).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    let mut queue = GuestQueue::new(&ram, 256, features & !F_PROTOCOL_FEATURES).unwrap();
    frontend.set_vring_num(0, 256).unwrap();
    frontend.set_vring_addr(0, queue.addresses(), None).unwrap();
    frontend.set_vring_base(0, 0).unwrap();
    frontend.set_vring_call(0, Some(queue.call_fd().as_fd())).unwrap();
    frontend.set_vring_kick(0, Some(queue.kick_fd().as_fd())).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    works(&mut queue, &BlkSlot::new(&ram, 4096).unwrap());
    fs::File::options().write(true).open(&file).unwrap().set_len(IMAGE_BYTES * 2).unwrap();
    let config = frontend.get_config(0, 60).unwrap();
    assert_eq!(config[..8], (IMAGE_BYTES / 256).to_le_bytes());
}

/// Features, then protocol features, then features again with the driver's choice; all rings set up with
/// the inflight file first, enabled only after the last.
#[test]
fn cloud_hypervisors_sequence() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "a.img");
    let arguments = [format!("--blk-file={}", file.display()), "--num-queues=2".to_owned()];
    let daemon = start(dir.path(), &arguments);
    let ram = GuestRam::new(8 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    frontend.set_owner().unwrap();
    let offered = frontend.get_features().unwrap();
    let not_theirs = 1 << virtio_config::VIRTIO_F_RING_PACKED | F_LOG_ALL;
    let features = offered & !not_theirs;
    let protocol = Protocol::CONFIG
        | Protocol::MQ
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::REPLY_ACK
        | Protocol::INFLIGHT_SHMFD
        | Protocol::LOG_SHMFD;
    let agreed = frontend.get_protocol_features().unwrap() & protocol.bits();
    frontend.set_protocol_features(agreed).unwrap();
    assert!(frontend.get_queue_num().unwrap() >= 2);
    assert_eq!(frontend.get_config(0, 60).unwrap()[34..36], [2, 0]);
    frontend.set_features(features).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    let inflight = frontend.get_inflight(2, 128).unwrap();
    frontend.set_inflight(&inflight).unwrap();
    let ring_features = features & !F_PROTOCOL_FEATURES;
    let mut queues: Vec<GuestQueue> =
        (0..2).map(|_| GuestQueue::new(&ram, 128, ring_features).unwrap()).collect();
    for (index, queue) in (0..).zip(&queues) {
        frontend.set_vring_num(index, 128).unwrap();
        frontend.set_vring_addr(index, queue.addresses(), None).unwrap();
        frontend.set_vring_base(index, 0).unwrap();
        frontend.set_vring_call(index, Some(queue.call_fd().as_fd())).unwrap();
        frontend.set_vring_kick(index, Some(queue.kick_fd().as_fd())).unwrap();
    }
    for index in 0..2 {
        frontend.set_vring_enable(index, true).unwrap();
    }
    // Memory that is plugged in while the rings run.
    frontend.add_mem_region(&RamRegion::new(1 << 32, 1 << 20).unwrap()).unwrap();
    let slot = BlkSlot::new(&ram, 4096).unwrap();
    queues.iter_mut().for_each(|queue| works(queue, &slot));
    // A paused VM: disabled and taken back, then set up and enabled as before.
    for (index, queue) in (0..).zip(&queues) {
        frontend.set_vring_enable(index, false).unwrap();
        let base = frontend.get_vring_base(index).unwrap();
        frontend.set_vring_base(index, base).unwrap();
        frontend.set_vring_call(index, Some(queue.call_fd().as_fd())).unwrap();
        frontend.set_vring_kick(index, Some(queue.kick_fd().as_fd())).unwrap();
        frontend.set_vring_enable(index, true).unwrap();
    }
    queues.iter_mut().for_each(|queue| works(queue, &slot));
}

/// Protocol features before the owner, the call descriptor last but one, and every queue enabled before it
/// has a kick descriptor.
#[test]
fn crosvms_sequence() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "a.img");
    let daemon = start(dir.path(), &[format!("--blk-file={}", file.display())]);
    let ram = GuestRam::new(8 << 20).unwrap();
    let mut frontend = FrontEnd::connect(daemon.socket()).unwrap();
    frontend.set_owner().unwrap();
    let offered = frontend.get_features().unwrap();
    let features = offered & !(1 << virtio_config::VIRTIO_F_RING_PACKED | F_LOG_ALL);
    let protocol = Protocol::CONFIG | Protocol::MQ | Protocol::BACKEND_REQ;
    let agreed = frontend.get_protocol_features().unwrap() & protocol.bits();
    frontend.set_protocol_features(agreed).unwrap();
    frontend.set_features(features).unwrap();
    frontend.get_config(0, 60).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    let mut queue = GuestQueue::new(&ram, 256, features & !F_PROTOCOL_FEATURES).unwrap();
    frontend.set_vring_num(0, 256).unwrap();
    frontend.set_vring_addr(0, queue.addresses(), None).unwrap();
    frontend.set_vring_base(0, 0).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    frontend.set_vring_call(0, Some(queue.call_fd().as_fd())).unwrap();
    frontend.set_vring_kick(0, Some(queue.kick_fd().as_fd())).unwrap();
    works(&mut queue, &BlkSlot::new(&ram, 4096).unwrap());
}

/// From exec to a socket that takes connections, and what the idle process holds. Only a release build
/// (`OUTBOARD_BIN_DIR`) is held to the figures that are promised.
#[test]
fn it_is_ready_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(dir.path(), "a.img");
    let mut times: Vec<Duration> = (0..9)
        .map(|round| {
            let socket = dir.path().join(format!("s{round}"));
            let mut command = Command::new(testkit::daemon::bin("vhost-user-blk").unwrap());
            command.arg(format!("--socket-path={}", socket.display()));
            command.arg(format!("--blk-file={}", file.display()));
            let begun = Instant::now();
            let mut child = command.spawn().unwrap();
            while UnixStream::connect(&socket).is_err() {
                assert!(begun.elapsed() < TIMEOUT, "it never listens");
                std::thread::sleep(Duration::from_micros(100));
            }
            let ready = begun.elapsed();
            child.kill().unwrap();
            child.wait().unwrap();
            ready
        })
        .collect();
    times.sort_unstable();
    eprintln!("ready after {:?} (least), {:?} (median)", times[0], times[4]);
    let most =
        if cfg!(debug_assertions) { Duration::from_secs(1) } else { Duration::from_millis(10) };
    assert!(times[0] <= most, "{times:?}");
}
