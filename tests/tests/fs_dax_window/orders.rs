//! Messages in every order: a mapping waits for the VMM while the VMM waits for us.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use testkit::driver::fs::{FsClient, Message, op};
use testkit::frontend::{BackendChannel, ShmemPolicy};
use testkit::memory::RamRegion;

use crate::share::*;

/// The VMM has mapped and not answered; it stops the ring, and starts it again.
#[test]
fn a_map_that_waits_survives_a_stop_of_its_ring() {
    let share = Share::new(&["--dax=always"]);
    let bytes = content(index(4 * PAGE + 9), 4);
    let _file = share.file("f", &bytes);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    for round in 0..5 {
        window.hold_answers(true);
        send(&mut guest, 1, 0, &set_up(inode, 0, 8 * PAGE, 0, true));
        await_map(&window);
        let base = guest.front_end.get_vring_base(1).unwrap();
        window.hold_answers(false);
        guest.front_end.start_queue(1, &guest.queues[1], base).unwrap();
        guest.queues[1].kick();
        assert_eq!(answer(&mut guest, 1), 0, "round {round}");
        let mut seen = vec![0; index(4 * PAGE)];
        window.read_window(0, &mut seen).unwrap();
        assert!(seen == bytes[..seen.len()]);
        let mut tail = [0; 9];
        window.read_window(4 * PAGE, &mut tail).unwrap();
        assert_eq!(tail, bytes[index(4 * PAGE)..]);
        assert_eq!(window.mapped(), 2);
        // The same with a mapping that is taken back.
        window.hold_answers(true);
        send(&mut guest, 1, 0, &remove(inode, 0, 8 * PAGE));
        let base = guest.front_end.get_vring_base(1).unwrap();
        window.hold_answers(false);
        guest.front_end.start_queue(1, &guest.queues[1], base).unwrap();
        guest.queues[1].kick();
        assert_eq!(answer(&mut guest, 1), 0, "round {round}");
        // What was interrupted is taken back with the next request at the latest.
        assert_eq!(errno(&mut guest, remove(inode, 0, WINDOW)), 0);
        assert_eq!(window.mapped(), 0);
        while window.requests.try_recv().is_ok() {}
    }
}

/// While a mapping waits for the VMM, the VMM's own requests are answered: all that it could do first.
#[test]
fn the_session_answers_while_a_map_waits() {
    let share = Share::new(&["--dax=always"]);
    let _file = share.file("f", &content(index(WINDOW), 5));
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    window.hold_answers(true);
    for queue in 1..4 {
        let at = queue as u64 * 16 * PAGE;
        send(&mut guest, queue, queue, &set_up(inode, at, 16 * PAGE, at, true));
    }
    await_map(&window);
    let more = RamRegion::new(1 << 40, 1 << 20).unwrap();
    guest.front_end.add_mem_region(&more).unwrap();
    assert_eq!(guest.front_end.get_shmem_config().unwrap()[0], WINDOW);
    guest.front_end.get_config(0, 40).unwrap();
    guest.front_end.remove_region(more.info()).unwrap();
    let base = guest.front_end.get_vring_base(4).unwrap();
    guest.front_end.start_queue(4, &guest.queues[4], base).unwrap();
    window.hold_answers(false);
    for queue in 1..4 {
        // Whom the stop of a ring interrupted is served when its own is started again.
        let base = guest.front_end.get_vring_base(queue).unwrap();
        guest.front_end.start_queue(queue, &guest.queues[usize::from(queue)], base).unwrap();
        guest.queues[usize::from(queue)].kick();
        assert_eq!(answer(&mut guest, queue.into()), 0);
    }
    assert_eq!(window.mapped(), 3);
}

/// A VMM that never answers leaves; the next one finds the daemon as if nothing had been.
#[test]
fn a_vmm_may_leave_while_a_map_waits() {
    let share = Share::new(&["--dax=always"]);
    let bytes = content(index(WINDOW), 6);
    let _file = share.file("f", &bytes);
    for _ in 0..3 {
        let (mut guest, window) = share.guest(QEMU);
        let inode = guest.lookup(ROOT, "f").unwrap();
        window.hold_answers(true);
        for queue in 1..4 {
            send(&mut guest, queue, queue, &set_up(inode, 0, PAGE, queue as u64 * PAGE, true));
        }
        await_map(&window);
        drop(guest);
    }
    let start = Instant::now();
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, WINDOW, 0, true)), 0);
    let mut seen = vec![0; index(WINDOW)];
    window.read_window(0, &mut seen).unwrap();
    assert!(seen == bytes && start.elapsed() < LONG);
}

/// A VMM that is stuck costs one request its time, and nobody anything else.
#[test]
fn a_vmm_that_never_answers_fails_the_mapping_and_nothing_else() {
    const TIMEOUT: Duration = Duration::from_secs(1);
    let share = Share::new(&["--dax=always", "--dax-timeout=1"]);
    let bytes = content(index(16 * PAGE), 20);
    let file = share.file("f", &bytes);
    let _other = share.file("g", &bytes);
    let (mut guest, window) = share.guest(QEMU);
    let [inode, other] = ["f", "g"].map(|name| guest.lookup(ROOT, name).unwrap());
    let handle = guest.open(inode, libc::O_RDWR).unwrap();
    assert_eq!(errno(&mut guest, set_up(inode, 0, 8 * PAGE, 0, true)), 0);

    window.hold_answers(true);
    let start = Instant::now();
    let stuck = set_up(inode, 8 * PAGE, 8 * PAGE, 8 * PAGE, true);
    assert_eq!(errno(&mut guest, stuck.clone()), libc::ETIMEDOUT);
    assert!((TIMEOUT..LONG / 2).contains(&start.elapsed()), "{:?}", start.elapsed());

    let start = Instant::now();
    for inode in [inode, other] {
        assert_eq!(attributes(&mut guest, inode).attr.size, 16 * PAGE);
    }
    assert_eq!(errno(&mut guest, Message::read(inode, handle, 0, 4096)), 0);
    send(&mut guest, 2, 2, &Message::read(inode, handle, 0, 4096));
    assert_eq!(answer(&mut guest, 2), 0, "on another queue");
    assert_eq!(errno(&mut guest, stuck.clone()), libc::ETIMEDOUT, "and nobody waits again");
    // It may have mapped what it was asked for: a truncation would pull that from under it.
    assert_eq!(errno(&mut guest, truncate(inode, PAGE)), libc::ETIMEDOUT);
    assert_eq!(file.metadata().unwrap().len(), 16 * PAGE);
    assert!(start.elapsed() < TIMEOUT, "{:?}", start.elapsed());

    window.hold_answers(false);
    let start = Instant::now();
    while errno(&mut guest, stuck.clone()) != 0 {
        assert!(start.elapsed() < LONG, "the VMM answers again");
    }
    let mut live = BTreeMap::new();
    follow(&window, &mut live);
    assert_eq!((live.len(), window.mapped()), (2, 2));
    let mut seen = vec![0; index(8 * PAGE)];
    for at in [0, 8 * PAGE] {
        window.read_window(at, &mut seen).unwrap();
        assert!(seen == bytes[index(at)..index(at + 8 * PAGE)]);
    }
    assert_eq!(errno(&mut guest, truncate(inode, PAGE)), 0);
    window.touch_all().unwrap();
}

/// WRITE of `len` bytes to the end of a file.
fn append(inode: u64, handle: u64, len: u32) -> Message {
    let flags = u64::from(libc::O_APPEND.cast_unsigned());
    let body = [handle, 0, len.into(), 0, flags];
    Message { data_out: len, ..Message::new(op::WRITE, inode, &body) }
}

/// A READ or WRITE finds the file larger than what is mapped of it, has that mapped first, and waits: the
/// ring can be stopped all the same, and nothing is done twice.
#[test]
fn reads_and_writes_that_wait_for_the_vmm_let_go_of_their_ring() {
    let share = Share::new(&["--dax=always", "--dax-timeout=3600"]);
    let mut bytes = content(index(4 * PAGE), 21);
    let file = share.file("f", &bytes);
    let (mut guest, window) = share.guest(QEMU);
    let inode = guest.lookup(ROOT, "f").unwrap();
    let [handle, appending] =
        [0, libc::O_APPEND].map(|flag| guest.open(inode, libc::O_RDWR | flag).unwrap());
    assert_eq!(errno(&mut guest, set_up(inode, 0, 32 * PAGE, 0, true)), 0);
    for (round, what) in ["write", "read", "append"].into_iter().cycle().take(6).enumerate() {
        while window.requests.try_recv().is_ok() {}
        let more = content(index(PAGE), 30 + round as u64);
        let (from, _) = guest.data_at(1);
        guest.ram().write(from, &more);
        let message = match what {
            "write" => Message::write(inode, handle, bytes.len() as u64, 4096),
            "append" => append(inode, appending, 4096),
            _ => {
                file.write_all_at(&more, bytes.len() as u64).unwrap();
                Message::read(inode, handle, 0, 4096)
            }
        };
        bytes.extend(&more);
        window.hold_answers(true);
        send(&mut guest, 1, 1, &message);
        // The first of several may be an unmap.
        window.requests.recv_timeout(LONG).unwrap();
        let start = Instant::now();
        let base = guest.front_end.get_vring_base(1).unwrap();
        assert!(start.elapsed() < LONG / 4, "{what}: {:?}", start.elapsed());
        window.hold_answers(false);
        guest.front_end.start_queue(1, &guest.queues[1], base).unwrap();
        guest.queues[1].kick();
        assert_eq!(answer(&mut guest, 1), 0, "{what}");
        assert_eq!(attributes(&mut guest, inode).attr.size, bytes.len() as u64, "{what}");
        let mut seen = vec![0; index(PAGE)];
        for at in (0..bytes.len()).step_by(4096) {
            window.read_window(at as u64, &mut seen).unwrap();
            assert!(seen == bytes[at..at + 4096], "{what}, at {at}");
        }
    }
}

/// What a VMM and its guest do while mappings wait.
#[derive(Debug, Clone)]
enum Turn {
    /// The guest asks for this on that queue, and does not wait.
    Ask(usize, Wish),
    /// The VMM answers from now on, or carries out and keeps its answers.
    Hold(bool),
    /// The VMM gives the guest memory, or takes it.
    PlugMemory,
    UnplugMemory,
    /// A ring is stopped and started again.
    Restart(u16),
    /// All are, as for a pause of the guest.
    Pause,
    Config,
    WindowSize,
    /// The VMM opens another back-end channel.
    Channel,
    /// The device is reset; then another guest comes.
    Reset,
    /// The VMM goes away; then another one comes.
    Leave,
}

#[derive(Debug, Clone)]
enum Wish {
    Map(u64),
    Unmap(u64),
    Truncate(u64),
    Append,
    Look,
}

const QUEUES: usize = 4;

fn wish() -> impl Strategy<Value = Wish> {
    prop_oneof![
        4 => (0u64..8).prop_map(Wish::Map),
        2 => (0u64..8).prop_map(Wish::Unmap),
        1 => (0u64..20 * PAGE).prop_map(Wish::Truncate),
        1 => Just(Wish::Append),
        1 => Just(Wish::Look),
    ]
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        12 => (1..=QUEUES, wish()).prop_map(|(queue, wish)| Turn::Ask(queue, wish)),
        4 => any::<bool>().prop_map(Turn::Hold),
        2 => Just(Turn::PlugMemory),
        2 => Just(Turn::UnplugMemory),
        4 => (1..=4u16).prop_map(Turn::Restart),
        2 => Just(Turn::Pause),
        1 => Just(Turn::Config),
        1 => Just(Turn::WindowSize),
        1 => Just(Turn::Channel),
        1 => Just(Turn::Reset),
        1 => Just(Turn::Leave),
    ]
}

struct Vmm {
    policy: ShmemPolicy,
    guest: FsClient,
    window: Option<BackendChannel>,
    inode: u64,
    handle: u64,
    /// Queues whose request has not come back.
    asked: BTreeSet<usize>,
    plugged: Option<RamRegion>,
}

impl Vmm {
    fn new(share: &Share, policy: ShmemPolicy) -> Self {
        let (mut guest, window) = share.guest(policy);
        let inode = guest.lookup(ROOT, "f").unwrap();
        let handle = guest.open(inode, libc::O_RDWR | libc::O_APPEND).unwrap();
        let (asked, plugged) = (BTreeSet::new(), None);
        Self { policy, guest, window: Some(window), inode, handle, asked, plugged }
    }

    fn window(&self) -> &BackendChannel {
        self.window.as_ref().unwrap()
    }

    fn ask(&mut self, queue: usize, wish: &Wish) {
        if !self.asked.insert(queue) {
            return;
        }
        const LEN: u64 = 8 * PAGE;
        let message = match *wish {
            Wish::Map(slot) => set_up(self.inode, slot % 3 * LEN, LEN, slot * LEN, true),
            Wish::Unmap(slot) => remove(self.inode, slot * LEN, LEN),
            Wish::Truncate(size) => truncate(self.inode, size),
            Wish::Append => append(self.inode, self.handle, 700),
            Wish::Look => Message::new(op::GETATTR, self.inode, &[0u64; 2]),
        };
        send(&mut self.guest, queue, queue, &message);
    }

    fn restart(&mut self, index: u16) {
        let base = self.guest.front_end.get_vring_base(index).unwrap();
        let queue = &mut self.guest.queues[usize::from(index)];
        self.guest.front_end.start_queue(index, queue, base).unwrap();
        queue.kick();
    }

    fn pause(&mut self) {
        let bases = [1, 2, 3, 4].map(|i| self.guest.front_end.get_vring_base(i).unwrap());
        for (index, base) in (1..).zip(bases) {
            let queue = &mut self.guest.queues[usize::from(index)];
            self.guest.front_end.start_queue(index, queue, base).unwrap();
            queue.kick();
        }
    }

    fn turn(&mut self, turn: &Turn) {
        match turn {
            Turn::Ask(queue, wish) => self.ask(*queue, wish),
            Turn::Hold(held) => self.window().hold_answers(*held),
            Turn::PlugMemory if self.plugged.is_none() => {
                let more = RamRegion::new(1 << 40, 1 << 20).unwrap();
                self.guest.front_end.add_mem_region(&more).unwrap();
                self.plugged = Some(more);
            }
            Turn::UnplugMemory => {
                if let Some(more) = self.plugged.take() {
                    self.guest.front_end.remove_region(more.info()).unwrap();
                }
            }
            Turn::PlugMemory => {}
            Turn::Restart(index) => self.restart(*index),
            Turn::Pause => self.pause(),
            Turn::Config => drop(self.guest.front_end.get_config(0, 40).unwrap()),
            Turn::WindowSize => {
                assert_eq!(self.guest.front_end.get_shmem_config().unwrap()[0], WINDOW);
            }
            Turn::Channel => {
                let old = self.window.take().unwrap();
                let new = self.guest.front_end.replace_backend_channel(old, self.policy);
                self.window = Some(new.unwrap());
                // Whom that interrupted goes on when its ring does.
                self.pause();
            }
            // What comes then is another guest.
            Turn::Reset => drop(self.guest.front_end.reset_device()),
            Turn::Leave => {}
        }
    }

    /// The VMM is well again: all that the guest asked for comes back, and the file is what it sees.
    fn finish(mut self, path: &Path) {
        self.window().hold_answers(false);
        self.pause();
        for queue in std::mem::take(&mut self.asked) {
            self.guest.queues[queue].wait(LONG).unwrap();
        }
        let all = set_up(self.inode, 0, 32 * PAGE, 0, true);
        assert_eq!(errno(&mut self.guest, all), 0, "the window can be used");
        let bytes = fs::read(path).unwrap();
        for at in (0..bytes.len()).step_by(4096) {
            let mut seen = vec![0; (bytes.len() - at).min(4096)];
            self.window().read_window(at as u64, &mut seen).unwrap();
            assert!(seen == bytes[at..at + seen.len()], "at {at}");
        }
        if self.policy == QEMU {
            self.window().touch_all().unwrap();
        }
    }
}

/// The limit for a VMM's answer is an hour here: who waits for another would wait that long, and the front
/// end's own limit of 20 seconds would end the test.
fn no_order_deadlocks(policy: ShmemPolicy, vmm: &str) {
    let share = Share::new(&["--dax=always", "--dax-timeout=3600", vmm]);
    let file = share.file("f", &[]);
    // A hang takes as long each time it is tried again.
    let cases = ProptestConfig { max_shrink_iters: 8, ..cases(25) };
    proptest!(cases, |(turns in proptest::collection::vec(turn(), 1..40))| {
        file.set_len(0).unwrap();
        file.write_all_at(&content(index(5 * PAGE + 99), 1), 0).unwrap();
        let mut vmm = Vmm::new(&share, policy);
        for turn in &turns {
            vmm.turn(turn);
            if matches!(turn, Turn::Reset | Turn::Leave) {
                // The daemon serves one VMM at a time.
                drop(vmm);
                vmm = Vmm::new(&share, policy);
            }
        }
        vmm.finish(&share.path("f"));
    });
}

#[test]
fn no_order_of_messages_deadlocks_with_a_vmm_that_sends_memory_first() {
    no_order_deadlocks(QEMU, "--dax-vmm=qemu");
}

#[test]
fn no_order_of_messages_deadlocks_with_a_plain_vmm() {
    no_order_deadlocks(ShmemPolicy::Plain, "--dax-vmm=plain");
}
