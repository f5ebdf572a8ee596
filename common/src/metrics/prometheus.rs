//! A snapshot as Prometheus text (exposition format 0.0.4).
//!
//! All series of one name stand together under one `HELP` and one `TYPE` line, as the format wants,
//! so the series of all devices are gathered by name first.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use super::{HistogramSnapshot, Kind, Snapshot, Value};

/// What every name begins with.
const PREFIX: &str = "outboard_";

/// The smallest and largest bucket that get a line: 1 µs and 17 s. The sums stay exact.
const FIRST_BUCKET: usize = 10;
const LAST_BUCKET: usize = 34;

/// All series of one name.
struct Family<'a> {
    help: &'a str,
    kind: Kind,
    samples: Vec<Sample<'a>>,
}

struct Sample<'a> {
    device: &'a str,
    queue: Option<u16>,
    value: Value,
}

impl Snapshot {
    /// Writes the text that a Prometheus server scrapes.
    ///
    /// # Errors
    /// What writing to `out` gives.
    pub fn write_prometheus(&self, out: &mut impl Write) -> fmt::Result {
        writeln!(out, "# HELP {PREFIX}info The program and its version.")?;
        writeln!(out, "# TYPE {PREFIX}info gauge")?;
        let (program, version) = (Escaped(&self.program), Escaped(&self.version));
        writeln!(out, "{PREFIX}info{{program=\"{program}\",version=\"{version}\"}} 1")?;
        for (name, family) in self.families() {
            let kind = match family.kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            writeln!(out, "# HELP {PREFIX}{name} {}", Escaped(family.help))?;
            writeln!(out, "# TYPE {PREFIX}{name} {kind}")?;
            for sample in &family.samples {
                sample.write(name, out)?;
            }
        }
        Ok(())
    }

    fn families<'a>(&'a self) -> BTreeMap<&'a str, Family<'a>> {
        let mut families = BTreeMap::new();
        let mut add = |name, help, sample: Sample<'a>| {
            let kind = sample.value.kind();
            let family =
                families.entry(name).or_insert_with(|| Family { help, kind, samples: Vec::new() });
            family.samples.push(sample);
        };
        for device in &self.devices {
            for queue in &device.queues {
                for (name, help, value) in queue.counters() {
                    let value = Value::Counter(value);
                    add(
                        name,
                        help,
                        Sample { device: &device.name, queue: Some(queue.queue), value },
                    );
                }
            }
            for series in &device.series {
                let value = series.value.clone();
                let sample = Sample { device: &device.name, queue: series.queue, value };
                add(&series.name, &series.help, sample);
            }
        }
        families
    }
}

impl Sample<'_> {
    fn write(&self, name: &str, out: &mut impl Write) -> fmt::Result {
        match &self.value {
            Value::Counter(value) | Value::Gauge(value) => {
                writeln!(out, "{PREFIX}{name}{{{}}} {value}", self.labels())
            }
            Value::Histogram(histogram) => self.write_histogram(name, histogram, out),
        }
    }

    fn write_histogram(
        &self,
        name: &str,
        histogram: &HistogramSnapshot,
        out: &mut impl Write,
    ) -> fmt::Result {
        let labels = self.labels();
        let mut up_to = 0_u64;
        for (bucket, values) in histogram.buckets.iter().enumerate() {
            up_to = up_to.wrapping_add(*values);
            if (FIRST_BUCKET..=LAST_BUCKET).contains(&bucket) {
                let bound = Seconds(1 << bucket);
                writeln!(out, "{PREFIX}{name}_bucket{{{labels},le=\"{bound}\"}} {up_to}")?;
            }
        }
        writeln!(out, "{PREFIX}{name}_bucket{{{labels},le=\"+Inf\"}} {up_to}")?;
        writeln!(out, "{PREFIX}{name}_sum{{{labels}}} {}", Seconds(histogram.sum_ns))?;
        writeln!(out, "{PREFIX}{name}_count{{{labels}}} {up_to}")
    }

    fn labels(&self) -> Labels<'_> {
        Labels { device: self.device, queue: self.queue }
    }
}

#[derive(Clone, Copy)]
struct Labels<'a> {
    device: &'a str,
    queue: Option<u16>,
}

impl fmt::Display for Labels<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device=\"{}\"", Escaped(self.device))?;
        match self.queue {
            Some(queue) => write!(f, ",queue=\"{queue}\""),
            None => Ok(()),
        }
    }
}

/// Nanoseconds, written exactly as seconds.
struct Seconds(u64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.0 / 1_000_000_000, self.0 % 1_000_000_000)
    }
}

/// Text with backslash, quote and newline escaped, as label values want it.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}
