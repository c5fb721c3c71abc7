//! `bgpd` on a node: its settings follow the cluster's resources.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cali_api::update::{SyncEvent, SyncStatus};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::config::{Local, Notice, Resources, compile};
use crate::speaker::settings::Settings;
use crate::speaker::{Environment, Speaker};

/// Changes that arrive within this time are applied together.
const COALESCE: Duration = Duration::from_millis(20);
/// How often secrets are looked at again.
const SECRETS: Duration = Duration::from_secs(10);

/// Reads passwords from a folder laid out as Kubernetes mounts secrets: `FOLDER/SECRET/KEY`.
fn read_passwords(folder: &Path, resources: &Resources) -> BTreeMap<(String, String), String> {
    let mut out = BTreeMap::new();
    for (secret, key) in resources.secrets() {
        // Names come from resources; they must not lead out of the folder.
        let plain =
            |name: &str| !name.is_empty() && name != ".." && name != "." && !name.contains('/');
        if !plain(&secret) || !plain(&key) {
            continue;
        }
        match std::fs::read_to_string(folder.join(&secret).join(&key)) {
            Ok(text) => {
                out.insert((secret, key), text.trim_end_matches('\n').to_owned());
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => warn!(secret, key, %error, "cannot read a password"),
        }
    }
    out
}

/// Follows the update stream and keeps a speaker configured by it.
pub struct Agent {
    resources: Resources,
    local: Local,
    secrets: PathBuf,
    applied: Option<Settings>,
    notices: Vec<Notice>,
    problem: Option<String>,
}

impl Agent {
    /// An agent for a node whose passwords lie in this folder.
    #[must_use]
    pub fn new(local: Local, secrets: PathBuf) -> Self {
        Self {
            resources: Resources::default(),
            local,
            secrets,
            applied: None,
            notices: Vec::new(),
            problem: None,
        }
    }

    /// Settings that differ from those applied last, if there can be a speaker now.
    fn next_settings(&mut self) -> Option<Settings> {
        self.local.passwords = read_passwords(&self.secrets, &self.resources);
        match compile(&self.resources, &self.local) {
            Ok((settings, notices)) => {
                self.problem = None;
                for notice in notices.iter().filter(|n| !self.notices.contains(n)) {
                    warn!(
                        object = notice.object,
                        reason = notice.reason,
                        "left out of the configuration"
                    );
                }
                self.notices = notices;
                (self.applied.as_ref() != Some(&settings)).then_some(settings)
            }
            Err(problem) => {
                let text = problem.to_string();
                if self.problem.as_ref() != Some(&text) {
                    warn!(
                        problem = text,
                        "no BGP configuration for this node; the last one stays"
                    );
                }
                self.problem = Some(text);
                None
            }
        }
    }

    /// Runs until the stream ends. The speaker starts when all resources are known; it is handed to `started`.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<SyncEvent>,
        environment: Environment,
        started: impl FnOnce(&Speaker),
    ) -> Option<JoinHandle<()>> {
        let mut waiting = Some((environment, started));
        let mut running: Option<(Speaker, JoinHandle<()>)> = None;
        let mut in_sync = false;
        let mut due = Instant::now() + SECRETS;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    None => return running.map(|(_, task)| task),
                    Some(SyncEvent::Status(status)) => {
                        in_sync |= status == SyncStatus::InSync;
                        info!(?status, "resources");
                    }
                    Some(SyncEvent::Updates(updates)) => {
                        for update in &updates {
                            self.resources.apply(update);
                        }
                    }
                },
                () = ended(&running) => return running.map(|(_, task)| task),
                () = sleep_until(due) => {
                    due = Instant::now() + SECRETS;
                    if !in_sync {
                        continue;
                    }
                    let Some(settings) = self.next_settings() else { continue };
                    self.applied = Some(settings.clone());
                    info!(peers = settings.neighbours.len(), blocks = settings.originated.len(), "applying configuration");
                    match &running {
                        Some((speaker, task)) => {
                            if speaker.configure(settings).await.is_err() || task.is_finished() {
                                return running.map(|(_, task)| task);
                            }
                        }
                        None => {
                            let Some((environment, started)) = waiting.take() else { continue };
                            let pair = Speaker::start(environment, settings);
                            started(&pair.0);
                            running = Some(pair);
                        }
                    }
                    continue;
                }
            }
            if in_sync {
                due = due.min(Instant::now() + COALESCE);
            }
        }
    }
}

/// Resolves when the speaker has ended (it was drained); never while there is none.
async fn ended(running: &Option<(Speaker, JoinHandle<()>)>) {
    match running {
        Some((speaker, _)) => speaker.ended().await,
        None => std::future::pending().await,
    }
}
