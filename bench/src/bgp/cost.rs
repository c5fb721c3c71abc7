//! What a daemon costs: processor time and memory of every process in its network namespace, from `/proc`.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use cali_netlink::NetNs;

/// One look at all processes of a namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Time on a processor, of all threads that live.
    pub cpu: Duration,
    /// Resident memory now, in octets.
    pub resident: u64,
    /// The sum of each process's highest resident memory, in octets.
    pub peak: u64,
}

/// Processes whose network namespace is this one.
pub fn processes(namespace: &NetNs) -> Result<Vec<u32>> {
    let (_, inode) = namespace.id()?;
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")
        .context("cannot read /proc")?
        .flatten()
    {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        // A process that ended meanwhile has no namespace.
        if fs::metadata(entry.path().join("ns/net")).is_ok_and(|m| m.ino() == inode) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// Looks at all processes of a namespace.
pub fn look(namespace: &NetNs) -> Result<Cost> {
    let mut cost = Cost::default();
    for pid in processes(namespace)? {
        let one = of_process(pid);
        cost.cpu += one.cpu;
        cost.resident += one.resident;
        cost.peak += one.peak;
    }
    Ok(cost)
}

/// Looks at one process; nothing of one that has ended.
#[must_use]
pub fn of_process(pid: u32) -> Cost {
    let folder = Path::new("/proc").join(pid.to_string());
    let status = fs::read_to_string(folder.join("status")).unwrap_or_default();
    let kilobytes = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok())
            .unwrap_or(0)
    };
    Cost {
        cpu: threads(&folder),
        resident: kilobytes("VmRSS:") * 1024,
        peak: kilobytes("VmHWM:") * 1024,
    }
}

/// `/proc/PID/task/TID/schedstat`: nanoseconds on a processor come first (`Documentation/scheduler/sched-stats.rst`).
fn threads(folder: &Path) -> Duration {
    let tasks = fs::read_dir(folder.join("task")).into_iter().flatten();
    let nanoseconds = tasks.flatten().filter_map(|task| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

/// Processor time of this program.
#[must_use]
pub fn own_cpu() -> Duration {
    threads(Path::new("/proc/self"))
}

/// Busy time of all processors since boot, in clock ticks of 10 ms (`proc(5)`, `/proc/stat`).
pub fn machine_busy() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let fields: Vec<u64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|f| f.parse().ok())
        .collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|n| fields.get(*n)).sum();
    Ok(Duration::from_millis(busy * 10))
}

/// Processor, cores, memory and kernel, in one line.
#[must_use]
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str| -> BTreeMap<String, String> {
        text.lines()
            .filter_map(|l| l.split_once(':'))
            .map(|(k, v)| (k.trim().to_owned(), v.trim().to_owned()))
            .collect()
    };
    let (cpu, memory) = (field(&read("/proc/cpuinfo")), field(&read("/proc/meminfo")));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kilobytes: u64 = memory
        .get("MemTotal")
        .and_then(|m| m.split(' ').next()?.parse().ok())
        .unwrap_or(0);
    format!(
        "{cores} cores of {}, {} GB, Linux {}",
        cpu.get("model name")
            .map_or("an unknown processor", String::as_str),
        kilobytes >> 20,
        read("/proc/sys/kernel/osrelease").trim()
    )
}
