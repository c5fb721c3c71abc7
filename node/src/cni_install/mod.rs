//! Puts the CNI plugin and its configuration where the container runtime looks for them, and keeps them there.
//!
//! The order is the promise: programs first, then, once the node can serve a pod, the configuration list. A runtime
//! reports its network as ready when it finds a list, so a pod is never started on a node that cannot wire it.
//!
//! Which folders those are is judged by [`plan`] from the settings and the runtime's own configuration, as k3s and others
//! move them. The plugin has no credentials: it talks to the node's socket only, so no kubeconfig is written.

pub mod plan;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cali_cni::loopback;
use felix::dataplane::State;
use tokio::sync::watch;

use plan::{Install, PROGRAMS};

/// Between two looks at whether the files are still there.
const AUDIT: Duration = Duration::from_secs(30);

/// A file could not be installed.
#[derive(Debug, thiserror::Error)]
#[error("cannot install {path}: check that the folder is mounted and writable")]
pub struct InstallError {
    path: PathBuf,
    source: std::io::Error,
}

/// Reads the runtime's configuration files that exist.
#[must_use]
pub fn runtime_configurations(host_root: &Path) -> Vec<(PathBuf, String)> {
    plan::RUNTIME_CONFIGURATIONS
        .iter()
        .map(|path| host_root.join(path.trim_start_matches('/')))
        .filter_map(|path| {
            let text = std::fs::read_to_string(&path).ok()?;
            Some((path, text))
        })
        .collect()
}

/// Size, time of change and inode of a file: while they stay, so does its content, and it need not be read again.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    size: u64,
    changed: (i64, i64),
    inode: u64,
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        Some(Self {
            size: found.size(),
            changed: (found.ctime(), found.ctime_nsec()),
            inode: found.ino(),
        })
    }
}

/// Installed programs, as they were when last compared.
#[derive(Debug, Default)]
pub struct Seen(BTreeMap<PathBuf, Stamp>);

impl Seen {
    fn is_unchanged(&self, path: &Path) -> bool {
        let before = self.0.get(path);
        before.is_some() && before == Stamp::of(path).as_ref()
    }

    fn remember(&mut self, path: PathBuf) {
        if let Some(stamp) = Stamp::of(&path) {
            self.0.insert(path, stamp);
        }
    }
}

/// Copies the programs. Programs that are there already and equal are left alone, so that a read-only folder is fine
/// then; those that nobody has touched since `seen` are not read again.
///
/// # Errors
/// A program cannot be read or written.
pub fn apply_programs(install: &Install, from: &Path, seen: &mut Seen) -> Result<(), InstallError> {
    for program in PROGRAMS {
        let source = from.join(program);
        let targets = install
            .program_folders
            .iter()
            .map(|folder| folder.join(program));
        let doubtful: Vec<PathBuf> = targets.filter(|path| !seen.is_unchanged(path)).collect();
        if doubtful.is_empty() {
            continue;
        }
        let content = std::fs::read(&source).map_err(|source_error| InstallError {
            path: source.clone(),
            source: source_error,
        })?;
        for target in doubtful {
            let stays = !install.update_programs && target.exists()
                || std::fs::read(&target).is_ok_and(|there| there == content);
            if !stays {
                write_atomically(&target, &content, 0o755)?;
                tracing::info!(program = %target.display(), "CNI plugin installed");
            }
            seen.remember(target);
        }
    }
    Ok(())
}

/// Makes the plugin `loopback` a link to ours in each folder that has none: containerd starts no pod without it, and where nobody has
/// installed the plugins of the CNI project there is none. One that is there is never touched.
///
/// # Errors
/// The link cannot be made.
pub fn apply_loopback(install: &Install) -> Result<(), InstallError> {
    for folder in &install.program_folders {
        let target = folder.join(loopback::NAME);
        // Also where a link leads nowhere: it may be meant for the host's view of its files.
        if target.symlink_metadata().is_ok() {
            continue;
        }
        match std::os::unix::fs::symlink(PROGRAMS[0], &target) {
            Ok(()) => tracing::info!(program = %target.display(), "CNI plugin installed"),
            // Another was faster.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(source) => {
                return Err(InstallError {
                    path: target,
                    source,
                });
            }
        }
    }
    Ok(())
}

/// Writes the configuration list where it is not as it should be, and removes the one it replaces.
///
/// # Errors
/// The list cannot be written.
pub fn apply_list(install: &Install) -> Result<(), InstallError> {
    let target = install.list_folder.join(&install.list_name);
    if std::fs::read_to_string(&target).is_ok_and(|there| there == install.list) {
        return Ok(());
    }
    write_atomically(&target, install.list.as_bytes(), 0o600)?;
    tracing::info!(file = %target.display(), "CNI configuration written");
    if let Some(old) = &install.replaces {
        let old = install.list_folder.join(old);
        match std::fs::remove_file(&old) {
            Ok(()) => {
                tracing::info!(file = %old.display(), "CNI configuration of an earlier installation removed");
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(file = %old.display(), %error, "cannot remove the CNI configuration of an earlier installation");
            }
        }
    }
    Ok(())
}

/// Installs once the dataplane is ready, then keeps the files as they should be. Ends only when the dataplane ends.
pub async fn keep(
    install: Install,
    from: PathBuf,
    mut state: watch::Receiver<Arc<State>>,
) -> String {
    if state.wait_for(|state| state.ready).await.is_err() {
        return "the dataplane has ended".to_owned();
    }
    let mut told = None;
    let mut seen = Seen::default();
    loop {
        let result = apply_programs(&install, &from, &mut seen)
            .and_then(|()| apply_loopback(&install))
            .and_then(|()| apply_list(&install));
        let problem = result.err().map(|error| {
            let cause = &error.source;
            format!("{error}: {cause}")
        });
        if problem != told {
            if let Some(problem) = &problem {
                tracing::error!(%problem, "the container runtime cannot use this node's network");
            }
            told = problem;
        }
        tokio::select! {
            () = tokio::time::sleep(AUDIT) => {}
            ended = async { while state.changed().await.is_ok() {} } => {
                let () = ended;
                return "the dataplane has ended".to_owned();
            }
        }
    }
}

/// A reader sees the old file or the new one, never half of it.
fn write_atomically(target: &Path, content: &[u8], mode: u32) -> Result<(), InstallError> {
    let error = |source| InstallError {
        path: target.to_owned(),
        source,
    };
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let draft = target.with_file_name(format!(".{name}.new"));
    let write = || -> std::io::Result<()> {
        if let Some(folder) = target.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&draft)?;
        file.write_all(content)?;
        // A draft of an earlier attempt keeps its mode.
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        std::fs::rename(&draft, target)
    };
    write().map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn install(folder: &Path) -> Install {
        Install {
            program_folders: vec![folder.join("bin"), folder.join("more")],
            list_folder: folder.join("net.d"),
            list_name: "10-calico.conflist".into(),
            replaces: Some("05-old.conflist".into()),
            list: "{}\n".into(),
            update_programs: true,
        }
    }

    #[test]
    fn programs_then_list_appear_whole_and_the_old_list_goes() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        std::fs::create_dir_all(&from).unwrap();
        std::fs::create_dir_all(folder.path().join("net.d")).unwrap();
        for program in PROGRAMS {
            std::fs::write(from.join(program), program.as_bytes()).unwrap();
        }
        let old = folder.path().join("net.d/05-old.conflist");
        std::fs::write(&old, "{}").unwrap();
        let install = install(folder.path());
        apply_programs(&install, &from, &mut Seen::default()).unwrap();
        apply_list(&install).unwrap();
        for program in PROGRAMS {
            for at in ["bin", "more"] {
                let path = folder.path().join(at).join(program);
                assert_eq!(std::fs::read(&path).unwrap(), program.as_bytes());
                let mode = std::fs::metadata(&path).unwrap().permissions().mode();
                assert_eq!(mode & 0o777, 0o755, "{}", path.display());
            }
        }
        let list = folder.path().join("net.d/10-calico.conflist");
        assert_eq!(std::fs::read_to_string(&list).unwrap(), "{}\n");
        assert!(!old.exists());
        let left: Vec<_> = std::fs::read_dir(folder.path().join("net.d"))
            .unwrap()
            .collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[test]
    fn a_program_that_somebody_changed_or_took_away_is_put_back() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        std::fs::create_dir_all(&from).unwrap();
        for program in PROGRAMS {
            std::fs::write(from.join(program), program.as_bytes()).unwrap();
        }
        let install = install(folder.path());
        let mut seen = Seen::default();
        apply_programs(&install, &from, &mut seen).unwrap();
        let changed = folder.path().join("bin/calico");
        let gone = folder.path().join("more/calico-ipam");
        std::fs::write(&changed, "CALICO").unwrap();
        std::fs::remove_file(&gone).unwrap();
        apply_programs(&install, &from, &mut seen).unwrap();
        assert_eq!(std::fs::read(&changed).unwrap(), b"calico");
        assert_eq!(std::fs::read(&gone).unwrap(), b"calico-ipam");
    }

    #[test]
    fn a_program_that_is_there_stays_where_updates_are_not_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        std::fs::create_dir_all(&from).unwrap();
        std::fs::create_dir_all(folder.path().join("bin")).unwrap();
        for program in PROGRAMS {
            std::fs::write(from.join(program), "new").unwrap();
            std::fs::write(folder.path().join("bin").join(program), "old").unwrap();
        }
        let mut install = install(folder.path());
        install.program_folders.truncate(1);
        install.update_programs = false;
        apply_programs(&install, &from, &mut Seen::default()).unwrap();
        let calico = folder.path().join("bin/calico");
        assert_eq!(std::fs::read_to_string(calico).unwrap(), "old");
    }

    #[test]
    fn loopback_is_linked_where_there_is_none_and_left_alone_where_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let (own, others) = (
            folder.path().join("bin/loopback"),
            folder.path().join("more/loopback"),
        );
        for path in [&own, &others] {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        }
        std::fs::write(&others, "somebody's").unwrap();
        for _ in 0..2 {
            apply_loopback(&install(folder.path())).unwrap();
            assert_eq!(std::fs::read_link(&own).unwrap(), Path::new("calico"));
            assert_eq!(std::fs::read_to_string(&others).unwrap(), "somebody's");
        }
    }
}
