//! `bgpd` on a node: its settings follow the cluster's resources.

use std::time::Duration;

use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::v3::LogLevel;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use crate::config::{Local, Resources, compile};
use crate::devices::Devices;
use crate::passwords::Passwords;
use crate::speaker::settings::Settings;
use crate::speaker::{Environment, Speaker};

/// Changes that arrive within this time are applied together.
const COALESCE: Duration = Duration::from_millis(20);
/// How often the folder with passwords is looked at again.
const SECRETS: Duration = Duration::from_secs(10);
/// How soon a first configuration is tried again that waits for secrets.
const SOON: Duration = Duration::from_millis(50);

/// Follows the update stream and keeps a speaker configured by it.
pub struct Agent {
    resources: Resources,
    local: Local,
    passwords: Passwords,
    applied: Option<Settings>,
    /// The first configuration waits for secrets.
    waits: bool,
    problem: Option<String>,
    devices: Option<watch::Receiver<Devices>>,
    set_level: Option<SetLevel>,
    level: Option<LogLevel>,
}

/// Sets how much the log says; `None` is what the environment asked for.
pub type SetLevel = Box<dyn Fn(Option<LogLevel>) + Send>;

impl Agent {
    /// An agent for a node whose passwords come from there.
    #[must_use]
    pub fn new(local: Local, passwords: Passwords) -> Self {
        Self {
            resources: Resources::of_node(&local.node),
            local,
            passwords,
            applied: None,
            waits: false,
            problem: None,
            devices: None,
            set_level: None,
            level: None,
        }
    }

    /// Announces also what the kernel forwards straight to interfaces.
    #[must_use]
    pub fn with_devices(mut self, devices: watch::Receiver<Devices>) -> Self {
        self.devices = Some(devices);
        self
    }

    /// Lets `logSeverityScreen` take effect.
    #[must_use]
    pub fn with_log_level(mut self, set: SetLevel) -> Self {
        self.set_level = Some(set);
        self
    }

    /// Settings that differ from those applied last, if there can be a speaker now.
    fn next_settings(&mut self) -> Option<Settings> {
        self.local.passwords = self.passwords.read(&self.resources.secrets());
        if let Some(devices) = &mut self.devices {
            self.local.devices = Devices::clone(&devices.borrow_and_update());
        }
        self.follow_level();
        match compile(&self.resources, &self.local) {
            // Only what this node's own peers need is read.
            Ok(settings)
                if !self.passwords.want(&settings.host.secrets) && self.applied.is_none() =>
            {
                self.waits = true;
                None
            }
            Ok(settings) => {
                self.problem = None;
                let known = self.applied.as_ref().map_or(&[][..], |a| &a.host.notices);
                for notice in settings.host.notices.iter().filter(|n| !known.contains(n)) {
                    warn!(
                        object = notice.object,
                        reason = notice.reason,
                        "left out of the configuration"
                    );
                }
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

    fn follow_level(&mut self) {
        let level = self.resources.log_level(&self.local.node);
        if level != self.level {
            self.level = level;
            if let Some(set) = &self.set_level {
                set(level);
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
        let mut devices = self.devices.clone();
        loop {
            let mut matters = true;
            tokio::select! {
                event = events.recv() => match event {
                    None => return running.map(|(_, task)| task),
                    Some(SyncEvent::Status(status)) => {
                        in_sync |= status == SyncStatus::InSync;
                        info!(?status, "resources");
                    }
                    Some(SyncEvent::Complete(_)) => matters = false,
                    Some(SyncEvent::Updates(updates)) => {
                        matters = false;
                        for update in &updates {
                            matters |= self.resources.apply(update);
                        }
                    }
                },
                () = changed(&mut devices) => {}
                () = self.passwords.changed() => {}
                () = ended(&running) => return running.map(|(_, task)| task),
                () = sleep_until(due) => {
                    due = Instant::now() + SECRETS;
                    if !in_sync {
                        continue;
                    }
                    let Some(settings) = self.next_settings() else {
                        if std::mem::take(&mut self.waits) {
                            due = Instant::now() + SOON;
                        }
                        continue;
                    };
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
            if in_sync && matters {
                due = due.min(Instant::now() + COALESCE);
            }
        }
    }
}

/// Resolves when the kernel's routes to interfaces have changed; never where they are not followed.
async fn changed(devices: &mut Option<watch::Receiver<Devices>>) {
    let ended = match devices {
        Some(devices) => devices.changed().await.is_err(),
        None => true,
    };
    if ended {
        std::future::pending::<()>().await;
    }
}

/// Resolves when the speaker has ended (it was drained); never while there is none.
async fn ended(running: &Option<(Speaker, JoinHandle<()>)>) {
    match running {
        Some((speaker, _)) => speaker.ended().await,
        None => std::future::pending().await,
    }
}
