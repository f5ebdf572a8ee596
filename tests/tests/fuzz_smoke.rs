//! A bounded, deterministic run of the fuzz targets: a simple mutator over a few seeds. Not a
//! substitute for fuzzing, but no change that breaks a parser at once gets past it.
//!
//! `OUTBOARD_FUZZ_RUNS=1000000 ./x test fuzz_smoke` makes it long; `OUTBOARD_FUZZ_SEED=N` makes it another
//! run. A failing one shows its input.

#[path = "../../fuzz/entries.rs"]
mod entries;

use std::time::{Duration, Instant};

/// Time for each target at the most, and runs at the least.
const TIME: Duration = Duration::from_millis(800);
const RUNS: u64 = 40;

struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap_or(0) % below.max(1)
    }

    fn byte(&mut self) -> u8 {
        // Small values and the extremes are where parsers decide.
        match self.roll(6) {
            0 => 0xff,
            1 | 2 => self.roll(256).to_le_bytes()[0],
            _ => self.roll(20).to_le_bytes()[0],
        }
    }

    fn mutate(&mut self, data: &mut Vec<u8>) {
        for _ in 0..=self.roll(6) {
            let at = self.roll(data.len());
            match self.roll(5) {
                0 if data.len() < 600 => data.insert(at.min(data.len()), self.byte()),
                1 if !data.is_empty() => {
                    data.remove(at);
                }
                2 if data.len() < 400 => {
                    let copy = data[at.min(data.len())..].to_vec();
                    data.extend(copy);
                }
                _ => {
                    let byte = self.byte();
                    if let Some(b) = data.get_mut(at) {
                        *b = byte;
                    }
                }
            }
        }
    }
}

/// A number of the environment.
fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")))
}

/// Shows the input that was worked on when a panic unwinds past it.
struct Input<'a>(&'a [u8]);

impl Drop for Input<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input was {:?}", self.0);
        }
    }
}

fn smoke(name: &str) {
    let entry = entries::ENTRIES.iter().find(|e| e.0 == name).map(|e| e.1);
    let run = entry.unwrap_or_else(|| panic!("there is no fuzz target {name}"));
    let seed = number("OUTBOARD_FUZZ_SEED").unwrap_or(0);
    let mut dice = Dice(0x5851_f42d_4c95_7f2d ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let (least, time) = match number("OUTBOARD_FUZZ_RUNS") {
        Some(runs) => (runs, Duration::ZERO),
        None => (RUNS, TIME),
    };
    let end = Instant::now() + time;
    let mut pool: Vec<Vec<u8>> =
        (0..16).map(|n| (0..n * 16).map(|_| dice.byte()).collect()).collect();
    let mut runs = 0;
    while runs < least || Instant::now() < end {
        let from = dice.roll(pool.len());
        let mut data = pool[from].clone();
        dice.mutate(&mut data);
        let input = Input(&data);
        run(input.0);
        drop(input);
        let to = dice.roll(pool.len());
        pool[to] = data;
        runs += 1;
    }
}

#[test]
fn wire() {
    smoke("wire");
}

#[test]
fn session() {
    smoke("session");
}

#[test]
fn rings() {
    smoke("rings");
}

#[test]
fn blk_request() {
    smoke("blk_request");
}

#[test]
fn fuse_request() {
    smoke("fuse_request");
}

#[test]
fn vsock_packet() {
    smoke("vsock_packet");
}

#[test]
fn net_header() {
    smoke("net_header");
}
