//! The neighbours of a speaker: adding, changing and removing them, and what their tasks report.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use cali_control::status::Event;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::info;

use super::dynamic::Dynamic;
use super::restart::EndOfRib;
use super::settings::{Neighbour, SessionSettings, Settings};
use super::{State, unix_now};
use crate::fsm::{self, DownCause};
use crate::gr::{Heard, Helper, HelperTimer};
use crate::rib::{PeerId, PeerSlot, RibInput};
use crate::session::{Command, Counters, PeerReport, Report, Session, SessionUp, Surroundings};
use crate::wire::{ErrorCode, FamilySet, Notification, RefreshKind, cease};

/// Commands that may wait for a neighbour's task.
const COMMANDS: usize = 16;
/// How long a restarted neighbour may take until End-of-RIB.
const STALE_TIME: std::time::Duration = std::time::Duration::from_secs(240);

/// A neighbour with its task.
pub(super) struct Running {
    pub(super) commands: mpsc::Sender<Command>,
    task: JoinHandle<()>,
    pub(super) slot: PeerSlot,
    pub(super) config: Neighbour,
    /// Number of the current or last session.
    pub(super) epoch: u32,
    pub(super) live: Option<SessionUp>,
    /// The session's queue is full and is being waited for.
    pub(super) full: bool,
    /// End-of-RIB that waits for the end of our own restart.
    pub(super) end_of_rib: EndOfRib,
    pub(super) helper: Helper,
    pub(super) helper_timers: BTreeMap<HelperTimer, Instant>,
    pub(super) shown: Shown,
    /// It came by itself.
    pub(super) dynamic: Option<Dynamic>,
    pub(super) counters: Arc<Counters>,
}

/// What people see of a neighbour.
#[derive(Debug, Clone)]
pub(super) struct Shown {
    pub(super) state: fsm::State,
    pub(super) since: u64,
    pub(super) info: Option<String>,
    pub(super) established_count: u64,
    pub(super) updates_in: u64,
    pub(super) updates_out: u64,
    /// The last error or failed attempt; stays when a session stands again.
    pub(super) last_error: Option<Event>,
    /// How the last session ended.
    pub(super) last_down: Option<Event>,
}

impl Running {
    pub(super) fn next_timer(&self) -> Option<Instant> {
        let expires = self.dynamic.and_then(|d| d.expires);
        self.helper_timers.values().copied().chain(expires).min()
    }

    /// Resolves once the task has ended.
    pub(super) async fn ended(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "a neighbour's task failed");
        }
    }

    pub(super) const fn id(&self) -> PeerId {
        PeerId {
            slot: self.slot,
            epoch: self.epoch,
        }
    }
}

const fn ceased(subcode: u8) -> Notification {
    Notification::new(ErrorCode::Cease, subcode)
}

impl State {
    /// Applies new settings by their difference to the old ones.
    pub(super) async fn configure(&mut self, settings: Settings) {
        if settings == self.settings || self.leaving {
            return;
        }
        let old = std::mem::replace(&mut self.settings, settings.clone());
        self.configured_at = unix_now();
        self.rib.set_config(settings.rib());
        for address in old
            .neighbours
            .keys()
            .filter(|a| !settings.neighbours.contains_key(a))
        {
            self.remove(*address);
        }
        self.configure_dynamic(&old);
        self.listen().await;
        self.watch_paths().await;
        self.originate(&old.originated, &settings.originated);
        if old.host != settings.host {
            self.apply_host_rules(&old.host);
        }
        for (address, neighbour) in &settings.neighbours {
            match old.neighbours.get(address) {
                None => self.add(*address, neighbour, None),
                Some(before) if before != neighbour => self.change(*address, before, neighbour),
                Some(_) => {}
            }
        }
    }

    pub(super) fn add(&mut self, address: IpAddr, config: &Neighbour, dynamic: Option<Dynamic>) {
        let Some(slot) = self.rib.register() else {
            tracing::error!(peer = %address, "no room for another neighbour");
            return;
        };
        let (commands, queue) = mpsc::channel(COMMANDS);
        let counters = Arc::<Counters>::default();
        let surroundings = Surroundings {
            counters: Arc::clone(&counters),
            peer: address,
            transport: self.environment.transport.clone(),
            reports: self.reports.0.clone(),
            restarting: self.restarting.subscribe(),
            seed: self.environment.seed ^ hash(address),
        };
        if dynamic.is_none() {
            self.change_key(address, None, config.session.protection.password.as_deref());
        }
        let session = Session::new(surroundings, session_settings(config), queue);
        info!(peer = %address, name = config.name.as_deref(), "neighbour added");
        let running = Running {
            commands,
            task: tokio::spawn(session.run()),
            slot,
            config: config.clone(),
            epoch: 0,
            live: None,
            full: false,
            end_of_rib: EndOfRib::default(),
            helper: Helper::new(STALE_TIME),
            helper_timers: BTreeMap::new(),
            shown: Shown {
                state: fsm::State::Idle,
                since: unix_now(),
                info: config.session.blocked.clone(),
                established_count: 0,
                updates_in: 0,
                updates_out: 0,
                last_error: None,
                last_down: None,
            },
            dynamic,
            counters,
        };
        self.slots.insert(slot, address);
        self.neighbours.insert(address, running);
    }

    pub(super) fn remove(&mut self, address: IpAddr) {
        let Some(running) = self.neighbours.remove(&address) else {
            return;
        };
        info!(peer = %address, "neighbour removed");
        self.command(&running, Command::Stop(ceased(cease::PEER_DECONFIGURED)));
        if running.dynamic.is_none() {
            self.change_key(
                address,
                running.config.session.protection.password.as_deref(),
                None,
            );
        }
        self.admission.forget(address);
        self.slots.remove(&running.slot);
        if let Some(live) = &running.live {
            self.monitor_down(address, running.slot, live, None);
            self.rib.handle(RibInput::PeerDown {
                peer: running.id(),
                retain: FamilySet::EMPTY,
            });
        }
        self.rib
            .handle(RibInput::PeerRemoved { slot: running.slot });
        let progress = self.restarter.on(Heard::Gone { peer: address });
        self.on_progress(progress);
    }

    pub(super) fn change(&mut self, address: IpAddr, before: &Neighbour, after: &Neighbour) {
        let Some(running) = self.neighbours.get_mut(&address) else {
            return;
        };
        running.config = after.clone();
        if session_settings(before) != session_settings(after) {
            info!(peer = %address, "neighbour changed: its session begins again");
            let command = Command::Configure(session_settings(after));
            let running = &self.neighbours[&address];
            self.command(running, command);
            let named = running.dynamic.is_none();
            let password = |n: &Neighbour| n.session.protection.password.clone();
            if named {
                self.change_key(
                    address,
                    password(before).as_deref(),
                    password(after).as_deref(),
                );
            }
            return;
        }
        let refresh = before.exchange.import != after.exchange.import
            || before.exchange.allow_own_as != after.exchange.allow_own_as;
        if before.exchange == after.exchange {
            return;
        }
        info!(peer = %address, refresh, "neighbour changed: its routes are evaluated again");
        let running = &self.neighbours[&address];
        if let Some(live) = &running.live {
            let config = self.rib_config(address, running, live);
            let peer = running.id();
            self.rib.handle(RibInput::PeerChanged { peer, config });
            if refresh {
                self.command(&self.neighbours[&address], Command::Refresh);
            }
        }
    }

    /// A neighbour's task takes commands at any time, so a full queue means one that is about to end.
    pub(super) fn command(&self, running: &Running, command: Command) {
        if let Err(error) = running.commands.try_send(command) {
            tracing::error!(%error, "a neighbour's task does not take commands");
        }
    }

    /// Ends everything with Cease: for a node that leaves.
    pub(super) fn drain(&mut self, text: Option<&str>) {
        self.leaving = true;
        let notify = match text {
            Some(text) => Notification::cease_with_text(cease::ADMIN_SHUTDOWN, text),
            None => ceased(cease::ADMIN_SHUTDOWN),
        };
        self.listening.clear();
        for running in self.neighbours.values() {
            self.command(running, Command::Stop(notify.clone()));
        }
        self.monitor_leaving(&DownCause::Sent(notify));
    }

    /// Takes in what a neighbour's task reports. Returns how many routes it held, counting a message without any as one.
    pub(super) fn on_report(&mut self, (address, epoch, report): PeerReport) -> usize {
        let Some(running) = self.neighbours.get_mut(&address) else {
            return 1;
        };
        let mut routes = 1;
        match report {
            Report::State { state, info } => {
                if state != running.shown.state {
                    running.shown.since = unix_now();
                }
                running.shown.state = state;
                if let Some(dynamic) = &mut running.dynamic {
                    dynamic.on_state(state, Instant::now());
                }
                if let Some(what) = &info
                    && running.shown.info != info
                {
                    running.shown.last_error = Some(now(what.clone()));
                }
                running.shown.info = info;
            }
            Report::Up(up) => {
                running.epoch = epoch;
                running.shown.established_count += 1;
                self.session_up(address, *up);
                self.monitor_up(address);
            }
            Report::Down(cause) => {
                running.shown.last_down = Some(now(cause.describe()));
                self.session_down(address, epoch, &cause);
            }
            Report::Updates(updates) => {
                running.shown.updates_in += updates.len() as u64;
                let peer = PeerId {
                    slot: running.slot,
                    epoch,
                };
                for update in updates {
                    routes += update.routes();
                    let end = update.as_end_of_rib();
                    self.monitor_update(address, &update);
                    self.rib.update(peer, &update);
                    if let Some(family) = end {
                        self.end_of_rib(address, family);
                    }
                }
            }
            Report::Refresh(refresh) => {
                let (peer, family) = (
                    PeerId {
                        slot: running.slot,
                        epoch,
                    },
                    refresh.family,
                );
                match refresh.kind {
                    RefreshKind::Request => {
                        self.rib.handle(RibInput::RefreshRequested { peer, family })
                    }
                    RefreshKind::Begin => self.rib.handle(RibInput::RefreshBegin { peer, family }),
                    RefreshKind::End => {
                        self.rib.handle(RibInput::RefreshEnd { peer, family });
                        self.monitor_refreshed(address, family);
                    }
                    RefreshKind::Unknown(_) => {}
                }
            }
        }
        routes
    }
}

fn now(what: String) -> Event {
    Event {
        at: unix_now(),
        what,
    }
}

/// What its session depends on. A port of 0 cannot be dialled; a neighbour without one only accepts.
fn session_settings(config: &Neighbour) -> SessionSettings {
    let mut session = config.session.clone();
    session.passive |= session.port == 0;
    session.bfd = None;
    session
}

/// Spreads the seeds of neighbours.
fn hash(address: IpAddr) -> u64 {
    use std::hash::BuildHasher;
    foldhash::fast::FixedState::default().hash_one(address)
}
