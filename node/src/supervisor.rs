//! Keeps `bgpd` running, as a process that does not depend on the life of this one.
//!
//! `bgpd` holds the BGP sessions, so its end is visible to peers; the daemon's end must not be. Hence:
//! - `bgpd` is started in a session of its own and without a parent-death signal: when the daemon is killed, it goes on;
//! - a daemon that starts looks for a running `bgpd` (by its record, which names process and start time, and by the socket it listens on) and
//!   adopts it;
//! - a `bgpd` that ends is started again at once, and only with growing delays if it keeps ending;
//! - an orderly stop of the daemon ([`Supervisor::stop`]) ends it with SIGTERM, on which it closes silently, so that peers keep its routes (RFC 4724).

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use cali_netlink::{Process, Signal};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

/// A run of this length means that the program works.
const STEADY: Duration = Duration::from_secs(10);
const FIRST_DELAY: Duration = Duration::from_millis(200);
const LONGEST_DELAY: Duration = Duration::from_secs(10);
/// Time for an orderly end before the process is killed.
const GRACE: Duration = Duration::from_secs(5);

/// What to run, and where its record is kept.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Additions to the environment.
    pub environment: Vec<(OsString, OsString)>,
    /// File with process and start time.
    pub record: PathBuf,
    /// The socket that the program listens on, by which it is found when the record is missing.
    pub socket: PathBuf,
}

/// When to start again. Pure.
#[derive(Debug, Default)]
struct Restarts {
    short_runs: u32,
}

impl Restarts {
    /// The program ended after running so long: the wait before its next start.
    fn on_end(&mut self, ran: Duration) -> Duration {
        if ran >= STEADY {
            self.short_runs = 0;
            return Duration::ZERO;
        }
        self.short_runs += 1;
        match self.short_runs {
            1 => Duration::ZERO,
            n => FIRST_DELAY
                .saturating_mul(1 << (n - 2).min(16))
                .min(LONGEST_DELAY),
        }
    }
}

/// Identity of a process: numbers are used again, numbers with start times are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    pid: u32,
    /// Clock ticks from boot to start (`proc_pid_stat(5)`, field 22).
    started: u64,
}

impl Record {
    fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is in parentheses and may hold anything; the third (state) follows it.
        let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
        if fields.first() == Some(&"Z") {
            return None;
        }
        Some(Self {
            pid,
            started: fields.get(19)?.parse().ok()?,
        })
    }

    fn read(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }
}

/// The running program.
enum Running {
    Own(Box<Child>, Process),
    Adopted(Process),
}

impl Running {
    fn process(&self) -> &Process {
        match self {
            Self::Own(_, process) | Self::Adopted(process) => process,
        }
    }

    /// Waits for the end, and says how it ended where that can be known. Cancel safe.
    async fn ended(&mut self) -> String {
        match self {
            Self::Own(child, _) => match child.wait().await {
                Ok(status) => status.to_string(),
                Err(error) => format!("cannot be waited for: {error}"),
            },
            Self::Adopted(process) => match process.ended().await {
                Ok(()) => "ended (it was not our child)".to_owned(),
                Err(error) => format!("cannot be watched: {error}"),
            },
        }
    }
}

/// The task that keeps a program running. Dropping it lets the program run on alone.
#[derive(Debug)]
pub struct Supervisor {
    pid: watch::Receiver<Option<u32>>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Supervisor {
    /// Adopts or starts the program. Must be called inside a Tokio runtime.
    pub fn start(program: Program) -> Self {
        let (publish, pid) = watch::channel(None);
        let (stop, stopping) = oneshot::channel();
        let task = tokio::spawn(keep_running(program, publish, stopping));
        Self {
            pid,
            stop: Some(stop),
            task,
        }
    }

    /// The program's process, while it runs.
    pub fn pid(&self) -> watch::Receiver<Option<u32>> {
        self.pid.clone()
    }

    /// Ends the program in an orderly way and waits for it, for a bounded time.
    pub async fn stop(mut self) {
        if let Some(stop) = self.stop.take() {
            // The task may have ended already.
            let _ = stop.send(());
        }
        let _ = (&mut self.task).await;
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn keep_running(
    program: Program,
    pid: watch::Sender<Option<u32>>,
    mut stopping: oneshot::Receiver<()>,
) {
    let mut restarts = Restarts::default();
    let mut adopted = adopt(&program).await;
    loop {
        let started = Instant::now();
        let ended = match adopted
            .take()
            .map_or_else(|| spawn(&program), |process| Ok(Running::Adopted(process)))
        {
            Ok(mut running) => {
                pid.send_replace(Some(running.process().pid()));
                let ended = tokio::select! {
                    ended = running.ended() => ended,
                    // An error means that the supervisor was dropped; the task is being aborted then.
                    _ = &mut stopping => return end(running).await,
                };
                pid.send_replace(None);
                ended
            }
            Err(error) => format!("cannot be started: {error}"),
        };
        let wait = restarts.on_end(started.elapsed());
        tracing::error!(program = %program.path.display(), ended, restart_in = ?wait, "program ended");
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = &mut stopping => return,
        }
    }
}

/// A program that an earlier daemon has left running.
async fn adopt(program: &Program) -> Option<Process> {
    let recorded =
        Record::read(&program.record).filter(|record| Record::of(record.pid) == Some(*record));
    let found = match recorded {
        Some(record) => record,
        None => {
            let stream = tokio::net::UnixStream::connect(&program.socket)
                .await
                .ok()?;
            Record::of(u32::try_from(stream.peer_cred().ok()?.pid()?).ok()?)?
        }
    };
    let process = Process::open(found.pid).ok()?;
    // Looked at again once it is held: before that the number could have passed to another.
    if Record::of(found.pid) != Some(found) {
        return None;
    }
    if let Err(error) = write_record(program, found) {
        tracing::warn!(%error, "cannot record the running program");
    }
    tracing::info!(program = %program.path.display(), pid = found.pid, "adopted the running program");
    Some(process)
}

fn spawn(program: &Program) -> io::Result<Running> {
    let child = Command::new(&program.path)
        .args(&program.arguments)
        .envs(
            program
                .environment
                .iter()
                .map(|(name, value)| (name, value)),
        )
        .stdin(Stdio::null())
        // Its own group: what ends the daemon at a terminal does not end it.
        .process_group(0)
        .kill_on_drop(false)
        .spawn()?;
    let pid = child
        .id()
        .ok_or_else(|| io::Error::other("ended at once"))?;
    if let Some(record) = Record::of(pid) {
        write_record(program, record)?;
    }
    tracing::info!(program = %program.path.display(), pid, "started");
    Ok(Running::Own(Box::new(child), Process::open(pid)?))
}

fn write_record(program: &Program, record: Record) -> io::Result<()> {
    let text = serde_json::to_vec(&record)?;
    crate::startup::write_file(&program.record, &text).map_err(io::Error::other)
}

async fn end(mut running: Running) {
    if let Err(error) = running.process().signal(Signal::SIGTERM) {
        tracing::debug!(%error, "it has ended already");
    }
    if tokio::time::timeout(GRACE, running.ended()).await.is_err() {
        tracing::warn!(
            pid = running.process().pid(),
            "did not end in time; killing it"
        );
        // It may end in this instant.
        let _ = running.process().signal(Signal::SIGKILL);
        running.ended().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_end_restarts_at_once_and_repeated_ones_wait_longer() {
        let mut restarts = Restarts::default();
        let short = Duration::from_secs(1);
        let waits: Vec<u64> = (0..5)
            .map(|_| restarts.on_end(short).as_millis() as u64)
            .collect();
        assert_eq!(waits, [0, 200, 400, 800, 1600]);
        for _ in 0..40 {
            assert!(restarts.on_end(short) <= LONGEST_DELAY);
        }
        assert_eq!(restarts.on_end(STEADY), Duration::ZERO);
        assert_eq!(restarts.on_end(short), Duration::ZERO);
    }
}
