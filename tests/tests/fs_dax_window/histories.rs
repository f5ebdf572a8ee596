//! Random histories: whatever happens, what the window shows is what the file has.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use testkit::driver::fs::{FsClient, Message, op};
use testkit::frontend::{BackendChannel, ShmemPolicy};

use crate::share::*;

/// One step of somebody who has the file.
#[derive(Debug, Clone)]
enum Step {
    Map { slot: u64, page: u64, pages: u64 },
    Unmap { slot: u64 },
    Truncate { size: u64 },
    Write { at: u64, len: u64, seed: u64 },
    HostWrite { at: u64, len: u64, seed: u64 },
    StoreInWindow { slot: u64, at: u64, len: u64, seed: u64 },
    PunchHole { at: u64, len: u64 },
    Sync,
}

const SLOT_PAGES: u64 = 8;
const SLOTS: u64 = 8;
/// The file stays below this.
const MOST: u64 = 20 * PAGE;

fn step() -> impl Strategy<Value = Step> {
    let run = || (0..MOST, 1..3 * PAGE, any::<u64>());
    prop_oneof![
        4 => (0..SLOTS, 0u64..16, 1..=SLOT_PAGES)
            .prop_map(|(slot, page, pages)| Step::Map { slot, page, pages }),
        1 => (0..SLOTS).prop_map(|slot| Step::Unmap { slot }),
        3 => (0..MOST).prop_map(|size| Step::Truncate { size }),
        1 => (0..MOST / PAGE).prop_map(|pages| Step::Truncate { size: pages * PAGE }),
        3 => run().prop_map(|(at, len, seed)| Step::Write { at, len, seed }),
        2 => run().prop_map(|(at, len, seed)| Step::HostWrite { at, len, seed }),
        3 => (0..SLOTS, run())
            .prop_map(|(slot, (at, len, seed))| Step::StoreInWindow { slot, at, len, seed }),
        1 => run().prop_map(|(at, len, _)| Step::PunchHole { at, len }),
        1 => Just(Step::Sync),
    ]
}

/// A guest and the file as it should be.
struct Checker {
    policy: ShmemPolicy,
    guest: FsClient,
    window: BackendChannel,
    file: File,
    inode: u64,
    handle: u64,
    model: Vec<u8>,
    /// File offset and length of what each slot of the window shows, bytes.
    slots: BTreeMap<u64, (u64, u64)>,
}

impl Checker {
    fn new(share: &Share, policy: ShmemPolicy) -> Self {
        let model = content(index(5 * PAGE + 77), 1);
        let file = share.file("f", &model);
        let (mut guest, window) = share.guest(policy);
        let inode = guest.lookup(ROOT, "f").unwrap();
        let handle = guest.open(inode, libc::O_RDWR).unwrap();
        Self { policy, guest, window, file, inode, handle, model, slots: BTreeMap::new() }
    }

    fn done(&mut self, message: Message) {
        assert_eq!(errno(&mut self.guest, message), 0);
    }

    fn put(&mut self, at: u64, data: &[u8]) {
        let end = index(at) + data.len();
        if self.model.len() < end {
            self.model.resize(end, 0);
        }
        self.model[index(at)..end].copy_from_slice(data);
    }

    fn step(&mut self, step: &Step) {
        let size = self.model.len() as u64;
        match *step {
            Step::Map { slot, page, pages } => {
                let at = slot * SLOT_PAGES * PAGE;
                // A slot is taken whole, as Linux does.
                self.done(remove(self.inode, at, SLOT_PAGES * PAGE));
                self.done(set_up(self.inode, page * PAGE, pages * PAGE, at, true));
                self.slots.insert(slot, (page * PAGE, pages * PAGE));
            }
            Step::Unmap { slot } => {
                let at = slot * SLOT_PAGES * PAGE;
                self.done(remove(self.inode, at, SLOT_PAGES * PAGE));
                self.slots.remove(&slot);
            }
            Step::Truncate { size } => {
                self.done(truncate(self.inode, size));
                self.model.resize(index(size), 0);
            }
            Step::Write { at, len, seed } => {
                let data = content(index(len), seed);
                let (from, _) = self.guest.data_at(0);
                self.guest.ram().write(from, &data);
                let len = u32::try_from(len).unwrap();
                self.done(Message::write(self.inode, self.handle, at, len));
                self.put(at, &data);
            }
            Step::HostWrite { at, len, seed } => {
                // Inside the file: what the host does to its size, a guest sees when it asks.
                let len = len.min(size.saturating_sub(at));
                let data = content(index(len), seed);
                self.file.write_all_at(&data, at).unwrap();
                if len > 0 {
                    self.put(at, &data);
                }
            }
            Step::StoreInWindow { slot, at, len, seed } => self.store(slot, at, len, seed),
            Step::PunchHole { at, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let body = [self.handle, at, len, u64::from(mode.cast_unsigned())];
                self.done(Message::new(op::FALLOCATE, self.inode, &body));
                let (at, end) = (at.min(size), (at + len).min(size));
                self.model[index(at)..index(end)].fill(0);
            }
            Step::Sync => self.done(Message::new(op::FSYNC, self.inode, &[self.handle, 0])),
        }
    }

    /// The guest stores to a page it has mapped.
    fn store(&mut self, slot: u64, at: u64, len: u64, seed: u64) {
        let Some(&(from, mapped)) = self.slots.get(&slot) else { return };
        let size = self.model.len() as u64;
        // Within one page, inside the mapping and the file.
        let at = from + at % mapped;
        let end = (at + len).min(at - at % PAGE + PAGE).min(size);
        if at >= end {
            return;
        }
        let data = content(index(end - at), seed);
        self.window.write_window(slot * SLOT_PAGES * PAGE + at - from, &data).unwrap();
        self.put(at, &data);
    }

    /// The guest asks for the attributes, and what it then sees in its mappings is the file.
    fn check(&mut self, after: &Step) {
        let size = self.model.len() as u64;
        assert_eq!(attributes(&mut self.guest, self.inode).attr.size, size, "{after:?}");
        for (&slot, &(from, mapped)) in &self.slots {
            for at in (from..(from + mapped).min(size)).step_by(index(PAGE)) {
                let len = PAGE.min(size - at);
                let mut page = vec![0; index(len)];
                let shown = slot * SLOT_PAGES * PAGE + at - from;
                self.window.read_window(shown, &mut page).unwrap();
                let wanted = &self.model[index(at)..index(at + len)];
                assert!(page == wanted, "{after:?}: slot {slot}, page at {at} of {size}");
            }
        }
        // A page that is mapped and not in the file would end QEMU.
        if self.policy == QEMU {
            self.window.touch_all().unwrap();
        }
        let on_host = fs::read(format!("/proc/self/fd/{}", fd_number(&self.file))).unwrap();
        assert!(on_host == self.model, "{after:?}: the file on the host");
    }
}

fn fd_number(file: &File) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(file)
}

fn the_window_shows_the_file(policy: ShmemPolicy, vmm: &str) {
    let share = Share::new(&["--dax=always", vmm]);
    proptest!(cases(40), |(steps in proptest::collection::vec(step(), 1..60))| {
        let mut checker = Checker::new(&share, policy);
        for step in &steps {
            checker.step(step);
            checker.check(step);
        }
        // A file that loses its name stays what it is for those who have it mapped.
        fs::write(share.path("other"), b"other").unwrap();
        fs::rename(share.path("other"), share.path("f")).unwrap();
        checker.check(&Step::Sync);
    });
}

#[test]
fn random_histories_through_a_window_that_checks() {
    the_window_shows_the_file(QEMU, "--dax-vmm=qemu");
}

#[test]
fn random_histories_through_a_plain_window() {
    the_window_shows_the_file(ShmemPolicy::Plain, "--dax-vmm=plain");
}
