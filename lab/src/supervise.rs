//! Keeps the programs of a lab running, as a container runtime would with `restart: always`.
//!
//! The supervisor owns no state of its own: what is to run stands in the lab's folder, and programs outlive it. A
//! supervisor that starts finds the ones that still run by their process ids and only starts what is missing. A
//! changed file is noticed within [`TICK`].

use crate::plan::{Mount, Process};
use crate::state::{Folder, Pid, Running};
use cali_netlink::NetNs;
use cali_netlink::command::{Bind, Isolation};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often the processes are looked at.
pub const TICK: Duration = Duration::from_millis(50);
/// Delay before the second start of a program that ended; doubles up to [`LONGEST_DELAY`] while it keeps ending.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
/// A program that ran this long has not "kept ending".
const STEADY: Duration = Duration::from_secs(10);
/// How long a program may take to end after `SIGTERM` before it is killed.
const GRACE: Duration = Duration::from_secs(5);

/// When a program may be started again. Pure.
#[derive(Debug, Clone, Copy)]
struct Restart {
    last_start: Instant,
    delay: Duration,
}

impl Restart {
    fn first(now: Instant) -> Self {
        Self {
            last_start: now,
            delay: FIRST_DELAY,
        }
    }

    fn due(&self, now: Instant) -> bool {
        now.duration_since(self.last_start) >= self.delay
    }

    fn again(&self, now: Instant) -> Self {
        let steady = now.duration_since(self.last_start) >= STEADY;
        let delay = if steady {
            FIRST_DELAY
        } else {
            (self.delay * 2).min(LONGEST_DELAY)
        };
        Self {
            last_start: now,
            delay,
        }
    }
}

/// Runs until the lab is gone. Its end, by a signal, leaves all programs running.
pub fn run(folder: &Folder) -> io::Result<()> {
    let own = Pid::of(std::process::id())
        .ok_or_else(|| io::Error::other("cannot read /proc/self/stat"))?;
    if let Some(other) = folder.supervisor().filter(|other| *other != own) {
        return Err(io::Error::other(format!(
            "process {} supervises this lab already",
            other.pid
        )));
    }
    folder.save_supervisor(own)?;
    let mut running = folder.running()?;
    let mut restarts: BTreeMap<String, Restart> = BTreeMap::new();
    while folder.exists() {
        reap();
        let wanted = wanted(folder)?;
        let before = running.clone();
        end_unwanted(&mut running, &wanted);
        for process in &wanted {
            if running
                .pids
                .get(&process.name)
                .is_some_and(|pid| pid.alive())
            {
                continue;
            }
            if process.after.as_ref().is_some_and(|file| !file.exists()) {
                continue;
            }
            let now = Instant::now();
            if restarts
                .get(&process.name)
                .is_some_and(|restart| !restart.due(now))
            {
                continue;
            }
            let next = restarts
                .get(&process.name)
                .map_or_else(|| Restart::first(now), |restart| restart.again(now));
            restarts.insert(process.name.clone(), next);
            let again = running.pids.remove(&process.name).is_some();
            match start(process) {
                Ok(pid) => {
                    tracing::info!(process = process.name, pid = pid.pid, again, "started");
                    running.pids.insert(process.name.clone(), pid);
                }
                Err(error) => tracing::error!(process = process.name, %error, "cannot start"),
            }
        }
        if running != before {
            folder.save_running(&running)?;
        }
        std::thread::sleep(TICK);
    }
    Ok(())
}

fn wanted(folder: &Folder) -> io::Result<Vec<Process>> {
    let mut wanted = match folder.plan() {
        Ok(plan) => plan.processes,
        // The folder goes away while `down` runs.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    wanted.extend(folder.extra()?);
    Ok(wanted)
}

fn end_unwanted(running: &mut Running, wanted: &[Process]) {
    running.pids.retain(|name, pid| {
        let keep = wanted.iter().any(|process| process.name == *name);
        if !keep && pid.alive() {
            signal(*pid, Signal::SIGTERM);
        }
        keep
    });
}

/// Starts a program in its namespace, in a session of its own, its output appended to its log.
fn start(process: &Process) -> io::Result<Pid> {
    if let Some(parent) = process.log.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&process.log)?;
    let namespace = NetNs::open(&process.namespace).map_err(io::Error::other)?;
    let mut command = if process.mounts.is_empty() {
        Command::new(&process.program)
    } else {
        let bind = |mount: &Mount| Bind {
            source: mount.source.clone(),
            target: mount.target.clone().into(),
            read_only: true,
        };
        let isolation = Isolation {
            binds: process.mounts.iter().map(bind).collect(),
            ..Isolation::default()
        };
        namespace
            .isolated_command(&process.program, &isolation)
            .map_err(io::Error::other)?
    };
    command
        .args(&process.args)
        .envs(&process.env)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0);
    // A child starts in the namespace of the thread that forks it.
    let child = namespace
        .run(move || command.spawn())
        .map_err(io::Error::other)??;
    Pid::of(child.id()).ok_or_else(|| io::Error::other("ended at once; see its log"))
}

/// Collects ended children, so that none stays a zombie.
fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        match status {
            WaitStatus::StillAlive => break,
            WaitStatus::Exited(pid, code) => tracing::warn!(pid = pid.as_raw(), code, "ended"),
            WaitStatus::Signaled(pid, signal, _) => {
                tracing::warn!(pid = pid.as_raw(), %signal, "killed")
            }
            _ => {}
        }
    }
}

fn signal(pid: Pid, signal: Signal) {
    if let Ok(raw) = i32::try_from(pid.pid)
        && pid.alive()
    {
        // A process that ended in between is what we want.
        let _ = kill(nix::unistd::Pid::from_raw(raw), signal);
    }
}

/// Ends every process of the list: `SIGTERM`, then `SIGKILL` after [`GRACE`].
pub fn end_all(pids: &[Pid]) {
    pids.iter().for_each(|pid| signal(*pid, Signal::SIGTERM));
    let limit = Instant::now() + GRACE;
    while pids.iter().any(|pid| pid.alive()) && Instant::now() < limit {
        std::thread::sleep(TICK);
    }
    pids.iter().for_each(|pid| signal(*pid, Signal::SIGKILL));
}

/// Ends what still runs in a network namespace (children that outlived their parent, such as a node's `bgpd`).
pub fn in_namespace(namespace: &str) -> Vec<Pid> {
    use std::os::unix::fs::MetadataExt;
    let Ok(wanted) =
        std::fs::metadata(format!("/run/netns/{namespace}")).map(|file| (file.dev(), file.ino()))
    else {
        return Vec::new();
    };
    let pids: Vec<Pid> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .filter(|pid: &u32| {
            std::fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|file| (file.dev(), file.ino()) == wanted)
        })
        .filter_map(Pid::of)
        .collect();
    end_all(&pids);
    pids
}

/// Ends the programs whose executable has been replaced by a newer build; the supervisor starts them again.
pub fn end_outdated(folder: &Folder) -> io::Result<Vec<String>> {
    let running = folder.running()?;
    let outdated: Vec<(String, Pid)> = running
        .pids
        .into_iter()
        .filter(|(_, pid)| pid.alive() && pid.outdated())
        .collect();
    outdated
        .iter()
        .for_each(|(_, pid)| signal(*pid, Signal::SIGTERM));
    Ok(outdated.into_iter().map(|(name, _)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_keeps_ending_is_started_less_and_less_often() {
        let mut now = Instant::now();
        let mut restart = Restart::first(now);
        let mut delays = Vec::new();
        for _ in 0..8 {
            delays.push(restart.delay.as_millis());
            now += restart.delay;
            assert!(restart.due(now));
            restart = restart.again(now);
        }
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
    }

    #[test]
    fn a_program_that_ran_long_is_started_again_at_once() {
        let start = Instant::now();
        let restart = Restart {
            last_start: start,
            delay: LONGEST_DELAY,
        };
        assert_eq!(restart.again(start + STEADY).delay, FIRST_DELAY);
    }
}
