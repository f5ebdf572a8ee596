//! What a descriptor chain costs in the ring itself: nanoseconds to pop, push and publish chains of one
//! descriptor in batches of 32, ours and `virtio-queue`'s, in turn in one run.
//!
//! Only the device's side is timed; the driver fills the ring and collects between batches. Both
//! sides check the buffer against guest memory and turn it into a host pointer.

#![allow(clippy::print_stdout, reason = "a benchmark prints its results")]

use std::hint::black_box;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use outboard_common::ring::inflight::region_size;
use outboard_common::ring::{Chain, InflightRegion, Queue};
use testkit::driver::{Buffer, EVENT_IDX, GuestQueue, RingFormat};
use testkit::memory::GuestRam;
use virtio_queue::{Queue as PeerQueue, QueueT};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, MmapRegion, VolatileSlice,
};

const SIZE: u16 = 256;
const BATCH: u32 = 32;
const ROUNDS: usize = 9;
const ROUND: Duration = Duration::from_millis(150);
const MEMORY: u64 = 64 << 20;

/// One contender.
struct Bench {
    name: String,
    driver: GuestQueue,
    device: Device,
    samples: Vec<f64>,
}

enum Device {
    Ours(Box<Queue>, Chain),
    Peer(Box<PeerQueue>, GuestMemoryMmap),
}

impl Device {
    /// Takes and returns a batch of chains.
    #[inline(never)]
    fn batch(&mut self) -> Result<u32> {
        let mut done = 0;
        match self {
            Self::Ours(queue, chain) => {
                while queue.pop(chain) {
                    black_box(chain.readable.as_slice());
                    queue.push(chain, 0);
                    done += 1;
                }
                queue.publish();
            }
            Self::Peer(queue, memory) => {
                while let Some(chain) = queue.pop_descriptor_chain(&*memory) {
                    let head = chain.head_index();
                    for d in chain {
                        let slice: VolatileSlice<'_, _> =
                            memory.get_slice(d.addr(), d.len() as usize)?;
                        black_box(slice);
                    }
                    queue.add_used(&*memory, head, 0)?;
                    done += 1;
                }
                black_box(queue.needs_notification(&*memory)?);
            }
        }
        Ok(done)
    }
}

impl Bench {
    fn new(name: &str, features: u64, tracked: bool) -> Result<Self> {
        let ram = GuestRam::new(MEMORY)?;
        let driver = GuestQueue::new(&ram, SIZE, features)?;
        let packed = features & RingFormat::Packed.features() == RingFormat::Packed.features();
        let record = if tracked {
            let map = Arc::new(MmapRegion::new(region_size(SIZE, packed))?);
            Some(InflightRegion::of_queue(&map, 0, SIZE, packed).context("record")?)
        } else {
            None
        };
        let queue = driver.device_side(&ram.shared_memory()?, driver.initial_base(), record)?;
        let device = Device::Ours(Box::new(queue), Chain::new());
        Ok(Self { name: name.to_owned(), driver, device, samples: Vec::new() })
    }

    fn peer(name: &str, features: u64) -> Result<Self> {
        let ram = GuestRam::new(MEMORY)?;
        let driver = GuestQueue::new(&ram, SIZE, features)?;
        let file = ram.regions()[0].file().as_fd().try_clone_to_owned()?.into();
        let range = (GuestAddress(0), usize::try_from(MEMORY)?, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range])?;
        let mut queue = PeerQueue::new(SIZE)?;
        queue.set_size(SIZE);
        queue.set_event_idx(features & EVENT_IDX != 0);
        let [desc, avail, used] = driver.areas();
        queue.set_desc_table_address(Some(u32::try_from(desc.addr())?), Some(0));
        queue.set_avail_ring_address(Some(u32::try_from(avail.addr())?), Some(0));
        queue.set_used_ring_address(Some(u32::try_from(used.addr())?), Some(0));
        queue.set_ready(true);
        let device = Device::Peer(Box::new(queue), memory);
        Ok(Self { name: name.to_owned(), driver, device, samples: Vec::new() })
    }

    /// One round: nanoseconds a chain.
    fn round(&mut self) -> Result<()> {
        let (mut spent, mut chains) = (Duration::ZERO, 0u32);
        let end = Instant::now() + ROUND;
        // The driver wants no interrupts: the ring is measured, not the system call.
        self.driver.disable_interrupts();
        while Instant::now() < end {
            for i in 0..BATCH {
                let at = 0x10_0000 + u64::from(i) * 0x1_0000;
                assert!(self.driver.add(&[Buffer::readable(at, 4096)], 0), "the ring has room");
            }
            let start = Instant::now();
            let done = self.device.batch()?;
            spent += start.elapsed();
            assert_eq!(done, BATCH, "every chain was there");
            chains += done;
            while self.driver.used().is_some() {}
            self.driver.disable_interrupts();
        }
        self.samples.push(spent.as_secs_f64() * 1e9 / f64::from(chains));
        Ok(())
    }

    fn median(&mut self) -> f64 {
        self.samples.sort_by(f64::total_cmp);
        self.samples[self.samples.len() / 2]
    }
}

fn main() -> Result<()> {
    let split = RingFormat::Split.features() | EVENT_IDX;
    let packed = RingFormat::Packed.features() | EVENT_IDX;
    let mut benches = [
        Bench::peer("virtio-queue, split", split)?,
        Bench::new("ours, split", split, false)?,
        Bench::new("ours, split, inflight record", split, true)?,
        Bench::new("ours, packed", packed, false)?,
        Bench::new("ours, packed, inflight record", packed, true)?,
    ];
    for _ in 0..ROUNDS {
        for bench in &mut benches {
            bench.round()?;
        }
    }
    println!("ns a chain (pop, push, publish in batches of {BATCH}; median of {ROUNDS} rounds)");
    let mut peer = None;
    for bench in &mut benches {
        let ns = bench.median();
        let peer = *peer.get_or_insert(ns);
        println!("{:32} {ns:6.1}   {:5.2} of virtio-queue", bench.name, ns / peer);
    }
    Ok(())
}
