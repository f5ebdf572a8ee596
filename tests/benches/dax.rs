//! `./x bench dax`: reads of a mapped image with DAX and without, in one guest, in turn.
//!
//! The guest is emulated, so its figures are small; what counts is the ratio, and the guest memory that
//! the page cache takes.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::daemon::Daemon;
use testkit::guests::{Job, QemuGuest};
use testkit::toolroot::ToolRoot;

const IMAGE_MIB: usize = 64;
const ROUNDS: usize = 3;
const TIMEOUT: Duration = Duration::from_secs(400);

/// Sequential reads the first time and again, KiB/s; mapped random reads a second; page cache, KiB.
type Figures = [f64; 4];

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn main() -> Result<()> {
    let root = ToolRoot::guests()?;
    let dir = tempfile::tempdir()?;
    let shared = dir.path().join("shared");
    fs::create_dir(&shared)?;
    fs::write(shared.join("image"), vec![0x5a; IMAGE_MIB << 20])?;
    let arguments = [
        "--tag=shared".to_owned(),
        "--num-request-queues=1".to_owned(),
        "--dax=always".to_owned(),
        format!("--shared-dir={}", shared.display()),
    ];
    let daemon = Daemon::start("virtiofsd", &dir.path().join("fs"), &arguments)?;
    let device =
        "vhost-user-test-device-pci,chardev=@,virtio-id=26,num_vqs=2,config_size=40,vq_size=1024";
    let guest = QemuGuest::new(root)
        .memory_mib(1024, 1024)
        .device_arguments(daemon.socket(), vec!["-device".to_owned(), device.to_owned()]);
    let job =
        Job::named("fs-dax-bench")?.tool("/usr/bin/fio").set("SIZE", &format!("{IMAGE_MIB}M"));
    let result = guest.run(&job, TIMEOUT)?;
    ensure!(result.exit_code == Some(0), "the guest failed:\n{}", result.console);
    let of = |mode: &str| -> Result<Figures> {
        let mut columns: [Vec<f64>; 4] = Default::default();
        for round in 1..=ROUNDS {
            let line = result.value(&format!("{mode}_{round}")).context("a round is missing")?;
            for (column, word) in columns.iter_mut().zip(line.split_whitespace()) {
                column.push(word.parse()?);
            }
        }
        Ok(columns.map(median))
    };
    let (dax, plain) = (of("always")?, of("never")?);
    println!("{IMAGE_MIB} MiB image, one QEMU guest, median of {ROUNDS} rounds in turn");
    println!("{:44} {:>12} {:>12} {:>8}", "", "DAX", "no DAX", "ratio");
    let rows = [
        "1M sequential, first time, KiB/s",
        "1M sequential, again, KiB/s",
        "4k random, mapped, IOPS",
        "guest page cache, KiB",
    ];
    for ((name, dax), plain) in rows.iter().zip(dax).zip(plain) {
        println!("{name:44} {dax:12.0} {plain:12.0} {:8.2}", dax / plain.max(1.0));
    }
    println!("daemon: {:?} of CPU time", daemon.cpu_time()?);
    Ok(())
}
