//! What a running lab remembers on disk: its plan, and the process ids of its programs.

use crate::plan::{Plan, Process};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Programs that were started after the plan (the servers in pods), and everything's process ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// By process name.
    pub pids: BTreeMap<String, Pid>,
}

/// A process id together with its start time, so that a reused id is never taken for the old process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pid {
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: clock ticks after boot.
    pub started: u64,
}

impl Pid {
    /// The process with this id, as it is now.
    pub fn of(pid: u32) -> Option<Self> {
        start_time(pid).map(|started| Self { pid, started })
    }

    /// Whether this very process still exists and is not a zombie.
    pub fn alive(self) -> bool {
        start_time(self.pid) == Some(self.started)
    }

    /// Whether the file it was started from has been replaced since (a new build).
    pub fn outdated(self) -> bool {
        std::fs::read_link(format!("/proc/{}/exe", self.pid))
            .is_ok_and(|exe| exe.to_string_lossy().ends_with(" (deleted)"))
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may itself hold blanks and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (state != "Z" && state != "X").then_some(started)
}

/// The folder of one lab.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(root: &Path, lab: &str) -> Self {
        Self(root.join(lab))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn exists(&self) -> bool {
        self.0.join("plan.json").exists()
    }

    pub fn plan(&self) -> io::Result<Plan> {
        read(&self.0.join("plan.json"))
    }

    pub fn save_plan(&self, plan: &Plan) -> io::Result<()> {
        write(&self.0.join("plan.json"), plan)
    }

    /// Programs beside those of the plan: one per pod.
    pub fn extra(&self) -> io::Result<Vec<Process>> {
        or_default(read(&self.0.join("extra.json")))
    }

    pub fn save_extra(&self, extra: &[Process]) -> io::Result<()> {
        write(&self.0.join("extra.json"), &extra)
    }

    pub fn running(&self) -> io::Result<Running> {
        or_default(read(&self.0.join("running.json")))
    }

    pub fn save_running(&self, running: &Running) -> io::Result<()> {
        write(&self.0.join("running.json"), running)
    }

    /// The supervisor's own process id, if it runs.
    pub fn supervisor(&self) -> Option<Pid> {
        read::<Pid>(&self.0.join("supervisor.json"))
            .ok()
            .filter(|pid| pid.alive())
    }

    pub fn save_supervisor(&self, pid: Pid) -> io::Result<()> {
        write(&self.0.join("supervisor.json"), &pid)
    }
}

fn or_default<T: Default>(result: io::Result<T>) -> io::Result<T> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        other => other,
    }
}

fn read<T: DeserializeOwned>(file: &Path) -> io::Result<T> {
    serde_json::from_slice(&std::fs::read(file)?).map_err(io::Error::from)
}

/// Replaces the file in one step, so that a reader never sees half of it.
fn write<T: Serialize>(file: &Path, value: &T) -> io::Result<()> {
    if let Some(parent) = file.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temporary, serde_json::to_vec_pretty(value)?)?;
    std::fs::rename(&temporary, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_recognised_by_its_start_time() {
        let own = Pid::of(std::process::id()).unwrap();
        assert!(own.alive());
        assert!(
            !Pid {
                started: own.started + 1,
                ..own
            }
            .alive()
        );
        assert!(Pid::of(u32::MAX).is_none());
    }

    #[test]
    fn a_folder_without_files_reads_as_empty() {
        let root = tempfile::tempdir().unwrap();
        let folder = Folder::new(root.path(), "x");
        assert!(!folder.exists());
        assert_eq!(folder.running().unwrap(), Running::default());
        assert!(folder.supervisor().is_none());
    }
}
