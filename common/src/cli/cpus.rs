//! Lists of CPUs that can be had: a mistake in `--cpu-affinity` is told before anything is served.

use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::values::CpuList;

/// Why workers cannot run where they should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum CpuError {
    /// There is no such CPU.
    #[error("this machine has no CPU {0}")]
    Missing(u16),
    /// There is, and others have it.
    #[error("CPU {0} is not for this process: it is outside its cpuset, or switched off")]
    Withheld(u16),
}

/// Parses a list and tries all its CPUs, with the calling thread.
pub(super) fn usable_cpus(text: &str) -> Result<CpuList, Box<dyn std::error::Error + Send + Sync>> {
    let list: CpuList = text.parse()?;
    // Who may not even ask is told by the worker.
    let Ok(before) = sched_getaffinity(None) else { return Ok(list) };
    let checked = check(list.cpus(), can_run_on, exists);
    sched_setaffinity(None, &before)?;
    checked?;
    Ok(list)
}

fn check(
    cpus: &[u16],
    can_run_on: impl Fn(u16) -> bool,
    exists: impl Fn(u16) -> bool,
) -> Result<(), CpuError> {
    match cpus.iter().find(|cpu| !can_run_on(**cpu)) {
        None => Ok(()),
        Some(&cpu) if exists(cpu) => Err(CpuError::Withheld(cpu)),
        Some(&cpu) => Err(CpuError::Missing(cpu)),
    }
}

/// Moves the calling thread to `cpu`: the question that a worker will ask. What a thread runs on at
/// present is no answer, for it may have been started with less than its cpuset.
fn can_run_on(cpu: u16) -> bool {
    let mut set = CpuSet::new();
    set.set(cpu.into());
    sched_setaffinity(None, &set).is_ok()
}

fn exists(cpu: u16) -> bool {
    Path::new(&format!("/sys/devices/system/cpu/cpu{cpu}")).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cpu_that_cannot_be_had_is_named() {
        let ours = |cpu| cpu < 2;
        let there = |cpu| cpu < 4;
        assert_eq!(check(&[1, 0], ours, there), Ok(()));
        assert_eq!(check(&[0, 3, 900], ours, there), Err(CpuError::Withheld(3)));
        assert_eq!(check(&[0, 900, 3], ours, there), Err(CpuError::Missing(900)));
        assert!(CpuError::Withheld(3).to_string().contains("cpuset"));
    }

    #[test]
    fn the_calling_thread_stays_where_it_was() {
        let before = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|cpu| before.is_set(*cpu)).unwrap();
        assert_eq!(usable_cpus(&first.to_string()).unwrap().cpus().len(), 1);
        assert!(usable_cpus("1023").is_err() || before.is_set(1023));
        assert!(sched_getaffinity(None).unwrap() == before);
    }
}
