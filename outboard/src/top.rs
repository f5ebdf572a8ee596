//! `outboard top`: what the devices of running pods do, live or once as text.

mod rates;
mod screen;
mod source;

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use outboard_common::metrics::Snapshot;

use self::rates::Rates;
use crate::cli::TopArgs;
use crate::state::PodState;
use crate::watch;

/// The columns of both outputs.
const HEADER: [&str; 10] =
    ["POD", "DEVICE", "KIND", "TO GUEST", "FROM GUEST", "IOPS", "P50", "P99", "DEPTH", "DROPS"];

/// The last look at each daemon, by its metrics socket.
#[derive(Debug, Default)]
struct Watcher {
    seen: HashMap<PathBuf, (Instant, Snapshot)>,
}

/// One device's line.
#[derive(Debug, Clone)]
struct Line {
    cells: [String; HEADER.len()],
    /// Its daemon does not answer.
    down: bool,
}

impl Watcher {
    /// Looks at every device of `pods`. A device that was not seen before has no rates yet.
    fn look(&mut self, pods: &[PodState]) -> Vec<Line> {
        let mut seen = HashMap::new();
        let mut lines = Vec::new();
        for (pod, device) in pods.iter().flat_map(|pod| pod.devices.iter().map(move |d| (pod, d))) {
            let now = Instant::now();
            let fetched = source::fetch(&device.metrics).ok();
            let down = fetched.is_none();
            let mut rates = None;
            if let Some(snapshot) = fetched {
                if let Some((then, before)) = self.seen.get(&device.metrics) {
                    rates = Some(Rates::between(before, &snapshot, now - *then));
                }
                seen.insert(device.metrics.clone(), (now, snapshot));
            }
            let [to, from, iops, p50, p99, depth, drops] = cells(rates.as_ref(), down);
            let (pod, name, kind) = (pod.name.clone(), device.name.clone(), device.kind.word());
            let cells = [pod, name, kind.to_owned(), to, from, iops, p50, p99, depth, drops];
            lines.push(Line { cells, down });
        }
        self.seen = seen;
        lines
    }
}

fn cells(rates: Option<&Rates>, down: bool) -> [String; 7] {
    let Some(rates) = rates else {
        return [if down { "down" } else { "-" }, "-", "-", "-", "-", "-", "-"].map(str::to_owned);
    };
    let time = |ns: Option<u64>| ns.map_or_else(|| "-".to_owned(), nanoseconds);
    [
        bytes(rates.to_guest),
        bytes(rates.from_guest),
        format!("{:.0}", rates.requests),
        time(rates.p50_ns),
        time(rates.p99_ns),
        rates.depth.map_or_else(|| "-".to_owned(), |depth| format!("{depth:.1}")),
        rates.drops.to_string(),
    ]
}

/// Bytes a second, in powers of 1024 like sizes in pod files.
fn bytes(rate: f64) -> String {
    let mut rate = rate;
    for unit in ["B/s", "K/s", "M/s", "G/s"] {
        if rate < 1000.0 {
            return if unit == "B/s" {
                format!("{rate:.0}{unit}")
            } else {
                format!("{rate:.1}{unit}")
            };
        }
        rate /= 1024.0;
    }
    format!("{rate:.1}T/s")
}

/// A latency, which is an upper bound within a factor of two.
fn nanoseconds(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns}ns"),
        1_000..1_000_000 => format!("{}us", ns / 1_000),
        1_000_000..1_000_000_000 => format!("{}ms", ns / 1_000_000),
        _ => format!("{}s", ns / 1_000_000_000),
    }
}

/// `outboard top`.
///
/// # Errors
/// A named pod does not run, or the terminal cannot be used.
pub fn run(args: &TopArgs) -> Result<()> {
    if args.once {
        return once(args);
    }
    let mut watcher = Watcher::default();
    screen::show(args.interval, || Ok(watcher.look(&watch::find(&args.pods)?)))
}

/// One table, measured over one interval.
fn once(args: &TopArgs) -> Result<()> {
    let mut watcher = Watcher::default();
    watcher.look(&watch::find(&args.pods)?);
    thread::sleep(args.interval);
    let lines = watcher.look(&watch::find(&args.pods)?);
    let mut rows = vec![HEADER.map(str::to_owned)];
    rows.extend(lines.into_iter().map(|line| line.cells));
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(watch::columns(&rows).as_bytes())
        .and_then(|()| stdout.flush())
        .context("cannot write to stdout")
}

/// How long a key press may wait to be seen.
const KEY_POLL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (rate, text) in [
            (0.0, "0B/s"),
            (999.0, "999B/s"),
            (1000.0, "1.0K/s"),
            (3.5 * 1024.0 * 1024.0, "3.5M/s"),
        ] {
            assert_eq!(bytes(rate), text);
        }
        for (ns, text) in [(512, "512ns"), (65_536, "65us"), (1 << 27, "134ms"), (1 << 33, "8s")] {
            assert_eq!(nanoseconds(ns), text);
        }
    }

    #[test]
    fn a_daemon_that_does_not_answer_is_down() {
        let [first, ..] = cells(None, true);
        assert_eq!(first, "down");
        let [first, ..] = cells(None, false);
        assert_eq!(first, "-");
    }
}
