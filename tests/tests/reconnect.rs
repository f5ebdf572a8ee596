//! Daemons die and come back, VMMs leave and others come: nothing acknowledged is lost, nothing in
//! flight is forgotten or done twice in the driver's eyes.

#![allow(clippy::unwrap_used, reason = "an unwrap that fails is a failing test")]

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use testkit::daemon::Daemon;
use testkit::driver::blk::{BlkSlot, RequestType, S_OK, request};
use testkit::driver::{GuestQueue, RingFormat};
use testkit::frontend::{AttachOptions, FrontEnd, Inflight};
use testkit::memory::GuestRam;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

const LONG: Duration = Duration::from_secs(20);
const SECTORS: u64 = 2048;
/// Sectors each slot writes to: its own, so that the expected content is known.
const SLOTS: u64 = 24;
/// Kills of each format's run.
const KILLS: u32 = 50;

struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below.max(1)
    }
}

/// One slot's requests: writes of ever new content to the slot's own sectors.
struct Writer {
    slot: BlkSlot,
    sector: u64,
    /// What the sector holds for sure, and what a write in flight may have put there.
    stored: u64,
    writing: Option<u64>,
}

fn pattern(number: u64, slot: u64) -> Vec<u8> {
    (0..64u64).flat_map(|i| (number * 1000 + slot * 70 + i).to_le_bytes()).collect()
}

struct Guest {
    ram: Arc<GuestRam>,
    queues: Vec<GuestQueue>,
    inflight: Option<Inflight>,
    writers: Vec<Writer>,
    next: u64,
}

impl Guest {
    fn attach(front_end: &mut FrontEnd, options: &AttachOptions) -> Self {
        let ram = GuestRam::new(16 << 20).unwrap();
        let (queues, inflight) = front_end.attach(&ram, options).unwrap();
        let writer = |i| Writer {
            slot: BlkSlot::new(&ram, 4096).unwrap(),
            sector: i * (SECTORS / SLOTS),
            stored: 0,
            writing: None,
        };
        let writers = (0..SLOTS).map(writer).collect();
        Self { ram, queues, inflight, writers, next: 1 }
    }

    /// Lets every idle writer begin a write, half of the time.
    fn submit(&mut self, dice: &mut Dice) {
        for (i, w) in (0u64..).zip(&mut self.writers) {
            if w.writing.is_some() || dice.roll(2) == 0 {
                continue;
            }
            w.slot.set_data(&pattern(self.next, i));
            let chain = w.slot.prepare(RequestType::OUT, w.sector, 512);
            if self.queues[0].add(&chain, i) {
                w.writing = Some(self.next);
                self.next += 1;
            }
        }
        self.queues[0].kick();
    }

    fn completed(&mut self, cookie: u64) {
        let w = &mut self.writers[usize::try_from(cookie).unwrap()];
        assert_eq!(w.slot.status(), S_OK, "an I/O error in the guest");
        w.stored = w.writing.take().expect("completed twice");
    }

    fn collect(&mut self) {
        while let Some(used) = self.queues[0].used() {
            self.completed(used.cookie);
        }
    }

    fn collect_all(&mut self) {
        while self.queues[0].outstanding() > 0 {
            let used = self.queues[0].wait(LONG).unwrap();
            self.completed(used.cookie);
        }
    }

    fn check(&self, image: &std::fs::File) {
        for (i, w) in (0u64..).zip(&self.writers) {
            let mut data = vec![0; 512];
            image.read_exact_at(&mut data, w.sector * 512).unwrap();
            let expected = if w.stored == 0 { vec![0; 512] } else { pattern(w.stored, i) };
            assert_eq!(data, expected, "sector {} after all was acknowledged", w.sector);
        }
    }
}

/// What a VMM believes the ring's base to be after its daemon died.
fn believed_base(queue: &GuestQueue, cautious: bool) -> u32 {
    let [_, avail, used] = queue.areas();
    if queue.initial_base() != 0 {
        // Packed: QEMU knows only what it knew at the start.
        queue.initial_base()
    } else if cautious {
        u32::from(used.load16(2, Ordering::Acquire))
    } else {
        u32::from(avail.load16(2, Ordering::Acquire))
    }
}

fn start(dir: &tempfile::TempDir, extra: &[&str]) -> Daemon {
    let socket = dir.path().join("blk.sock");
    let mut arguments = vec![format!("--blk-file={}", dir.path().join("image").display())];
    arguments.extend(extra.iter().map(|&s| s.to_owned()));
    Daemon::start("vhost-user-blk", &socket, &arguments).unwrap()
}

fn image(dir: &tempfile::TempDir) -> std::fs::File {
    let path = dir.path().join("image");
    let file =
        std::fs::File::options().read(true).write(true).create(true).truncate(false).open(path);
    let file = file.unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file
}

/// Random writes, and a daemon that is killed again and again in the middle of them.
fn killed_under_load(format: RingFormat, features: u64, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let file = image(&dir);
    let mut dice = Dice(seed);
    let mut daemon = start(&dir, &[]);
    let mut front_end = FrontEnd::connect(daemon.socket()).unwrap();
    let options = AttachOptions { features, ..AttachOptions::new(format) };
    let mut guest = Guest::attach(&mut front_end, &options);
    assert!(guest.inflight.is_some(), "INFLIGHT_SHMFD is offered");
    for kill in 0..KILLS {
        for _ in 0..dice.roll(6) {
            guest.submit(&mut dice);
            guest.collect();
        }
        guest.submit(&mut dice);
        if dice.roll(2) == 0 {
            std::thread::sleep(Duration::from_micros(dice.roll(400)));
        }
        daemon.kill().unwrap();
        // The guest goes on adding while nobody is there.
        guest.submit(&mut dice);
        drop(front_end);
        daemon = start(&dir, &[]);
        front_end = FrontEnd::connect(daemon.socket()).unwrap();
        front_end
            .reattach(&guest.ram, &guest.queues, guest.inflight.as_ref(), |q| {
                believed_base(q, kill % 2 == 0)
            })
            .unwrap();
        if dice.roll(4) == 0 {
            guest.collect_all();
            guest.check(&file);
        }
    }
    guest.collect_all();
    guest.check(&file);
}

#[test]
fn nothing_is_lost_when_the_daemon_is_killed_split() {
    killed_under_load(RingFormat::Split, u64::MAX, 0x1111_2222_3333);
    killed_under_load(RingFormat::Split, 0, 0x9999_2222_3333);
}

#[test]
fn nothing_is_lost_when_the_daemon_is_killed_packed() {
    killed_under_load(RingFormat::Packed, u64::MAX, 0x4444_5555_6666);
    killed_under_load(RingFormat::Packed, 0, 0x7777_5555_6666);
}

/// The daemon is stopped in an orderly way and started anew, without the front end having been asked
/// for a base: an upgrade, for it.
#[test]
fn a_restart_is_a_pause() {
    for format in RingFormat::ALL {
        let dir = tempfile::tempdir().unwrap();
        let file = image(&dir);
        let mut dice = Dice(77);
        let mut daemon = start(&dir, &[]);
        let mut front_end = FrontEnd::connect(daemon.socket()).unwrap();
        let mut guest = Guest::attach(&mut front_end, &AttachOptions::new(format));
        for _ in 0..10 {
            guest.submit(&mut dice);
            let status = daemon.terminate(Duration::from_secs(5)).unwrap();
            assert!(status.success(), "{status}");
            guest.submit(&mut dice);
            drop(front_end);
            daemon = start(&dir, &[]);
            front_end = FrontEnd::connect(daemon.socket()).unwrap();
            front_end
                .reattach(&guest.ram, &guest.queues, guest.inflight.as_ref(), |q| {
                    believed_base(q, true)
                })
                .unwrap();
            guest.collect_all();
            guest.check(&file);
        }
    }
}

/// The connection is lost, the daemon and the VMM are not.
#[test]
fn a_lost_connection_is_a_pause() {
    for format in RingFormat::ALL {
        let dir = tempfile::tempdir().unwrap();
        let file = image(&dir);
        let mut dice = Dice(78);
        let daemon = start(&dir, &[]);
        let mut front_end = FrontEnd::connect(daemon.socket()).unwrap();
        let mut guest = Guest::attach(&mut front_end, &AttachOptions::new(format));
        for _ in 0..20 {
            guest.submit(&mut dice);
            drop(front_end);
            front_end = FrontEnd::connect(daemon.socket()).unwrap();
            front_end
                .reattach(&guest.ram, &guest.queues, guest.inflight.as_ref(), |q| {
                    believed_base(q, true)
                })
                .unwrap();
            guest.submit(&mut dice);
        }
        guest.collect_all();
        guest.check(&file);
    }
}

/// The driver resets its ring between two lives of a session with the same inflight file: the record
/// must not hold the ring where it was.
#[test]
fn a_reset_ring_starts_at_its_beginning() {
    for format in RingFormat::ALL {
        let dir = tempfile::tempdir().unwrap();
        let _file = image(&dir);
        let daemon = start(&dir, &[]);
        let mut front_end = FrontEnd::connect(daemon.socket()).unwrap();
        let mut guest = Guest::attach(&mut front_end, &AttachOptions::new(format));
        for round in 0..6u64 {
            let slot = &guest.writers[0].slot;
            for i in 0..3 + round {
                let status = request(&mut guest.queues[0], slot, (RequestType::IN, i, 512), LONG);
                assert_eq!(status.unwrap(), S_OK, "{format:?} {round}");
            }
            // As QEMU does it, or with a device reset that asks for no base.
            match round % 3 {
                0 => {
                    front_end.get_vring_base(0).unwrap();
                }
                1 => {
                    front_end.set_vring_enable(0, false).unwrap();
                    front_end.get_vring_base(0).unwrap();
                }
                _ => front_end.reset_device().unwrap(),
            }
            let queue = GuestQueue::new(&guest.ram, 128, guest.queues[0].features()).unwrap();
            front_end.start_queue(0, &queue, queue.initial_base()).unwrap();
            guest.queues[0] = queue;
        }
    }
}

/// A front end without INFLIGHT_SHMFD, such as cloud-hypervisor's, whose ring is IN_ORDER: the used
/// index alone says what to do again.
#[test]
fn an_in_order_ring_is_replayed_without_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(&dir);
    let mut dice = Dice(79);
    let mut daemon = start(&dir, &[]);
    let mut front_end = FrontEnd::connect(daemon.socket()).unwrap();
    let options = AttachOptions {
        protocol_features: !VhostUserProtocolFeatures::INFLIGHT_SHMFD.bits(),
        ..AttachOptions::new(RingFormat::Split)
    };
    let mut guest = Guest::attach(&mut front_end, &options);
    assert!(guest.inflight.is_none());
    if guest.queues[0].features() & testkit::driver::IN_ORDER == 0 {
        return;
    }
    for _ in 0..25 {
        guest.submit(&mut dice);
        std::thread::sleep(Duration::from_micros(dice.roll(300)));
        daemon.kill().unwrap();
        drop(front_end);
        daemon = start(&dir, &[]);
        front_end = FrontEnd::connect(daemon.socket()).unwrap();
        // It gives the available index.
        front_end.reattach(&guest.ram, &guest.queues, None, |q| believed_base(q, false)).unwrap();
        guest.collect_all();
        guest.check(&file);
    }
}

/// One VMM after another, each with its own ring format, each leaving in the middle of its work.
#[test]
fn one_guest_after_another() {
    let dir = tempfile::tempdir().unwrap();
    let file = image(&dir);
    let mut dice = Dice(80);
    let mut daemon = start(&dir, &[]);
    for turn in 0..12 {
        let mut front_end = FrontEnd::connect(daemon.socket()).unwrap();
        let options = AttachOptions::new(RingFormat::ALL[turn % 2]);
        let mut guest = Guest::attach(&mut front_end, &options);
        guest.submit(&mut dice);
        if turn % 3 == 0 {
            guest.collect_all();
            for w in guest.writers.iter().filter(|w| w.stored != 0) {
                let mut data = vec![0; 512];
                file.read_exact_at(&mut data, w.sector * 512).unwrap();
                assert_eq!(data, pattern(w.stored, w.sector / (SECTORS / SLOTS)));
            }
        }
    }
    assert!(daemon.is_running());
}
