//! The speaker: one task that owns the table ([`crate::rib`]) and everything that is decided once for all
//! neighbours; one task per neighbour ([`crate::session`]); one per listening socket.
//!
//! All that happens arrives on bounded queues and is handled in batches: a queue is drained, the table commits
//! once, and the result goes to the kernel's side ([`crate::sink`]) and to the neighbours that can take more.
//!
//! What it does not do: it reads no resources and no files; [`settings::Settings`] come from outside and are
//! applied by difference, so that only the neighbours concerned notice.

mod admission;
mod dump;
mod dynamic;
mod explain;
mod listening;
mod monitor;
mod neighbours;
mod paths;
mod restart;
pub mod settings;
mod status;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cali_control::status::{BgpRequest, BgpResponse};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};

use crate::bmp::{Feed, Station};
use crate::gr::{Heard, Progress, Restarter};
use crate::reach::Reach;
use crate::rib::{Gateway, NextHopState, PeerSlot, Rib};
use crate::session::PeerReport;
use crate::sink::Sink;
use crate::transport::{Connection, Transport};
use crate::wire::Prefix;
use admission::Admission;
use listening::Listening;
use monitor::Monitor;
use neighbours::Running;
use settings::Settings;
use table::Waiting;

/// Orders and connections that may wait for the speaker.
const QUEUE: usize = 1024;
/// Reports that may wait for the speaker. Each may hold as much as a connection reads at once.
const REPORTS: usize = 64;
/// Routes of one batch. More would only keep the first of them waiting, and memory busy.
const BATCH: usize = 16_384;

/// What surrounds a speaker.
pub struct Environment {
    /// Where connections come from.
    pub transport: Arc<dyn Transport>,
    /// Where best paths go.
    pub sink: Box<dyn Sink>,
    /// Whether next hops can be reached.
    pub reach: Box<dyn Reach>,
    /// Seed of all jitter.
    pub seed: u64,
    /// How long the removal of what an earlier process left, and End-of-RIB, wait for peers (RFC 4724 §4.1
    /// Selection_Deferral_Timer).
    pub deferral: Duration,
}

/// To a running speaker.
#[derive(Debug)]
pub enum Order {
    /// New settings.
    Configure(Box<Settings>),
    /// A request of the status socket.
    Ask(BgpRequest, oneshot::Sender<BgpResponse>),
    /// A BMP station has connected, and takes what comes through this.
    Monitor(Station, Feed),
    /// The process is about to end, and its peers shall keep its routes.
    PrepareRestart(oneshot::Sender<()>),
}

/// A handle to a running speaker. When the last one is dropped, the speaker ends without a word to its peers.
#[derive(Debug, Clone)]
pub struct Speaker {
    orders: mpsc::Sender<Order>,
}

/// The speaker has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the BGP speaker has ended")]
pub struct Ended;

impl Speaker {
    /// Starts a speaker with its first settings. Sessions begin at once, so the settings must be complete:
    /// what they do not originate is withdrawn from peers that kept it over our restart.
    #[must_use]
    pub fn start(
        environment: Environment,
        settings: Settings,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (orders, queue) = mpsc::channel(QUEUE);
        let task = tokio::spawn(State::new(environment, settings).run(queue));
        (Self { orders }, task)
    }

    /// Applies new settings.
    pub async fn configure(&self, settings: Settings) -> Result<(), Ended> {
        self.orders
            .send(Order::Configure(Box::new(settings)))
            .await
            .map_err(|_| Ended)
    }

    /// Tells a station about peers and their routes from now on; it has just connected and knows nothing.
    pub(crate) async fn monitor(&self, station: Station, feed: Feed) -> Result<(), Ended> {
        self.orders
            .send(Order::Monitor(station, feed))
            .await
            .map_err(|_| Ended)
    }

    /// Resolves when the speaker has ended.
    pub async fn ended(&self) {
        self.orders.closed().await;
    }

    /// Before a planned restart: lets neighbours know that silence on their paths means nothing (RFC 5882 §4.3.2).
    pub async fn prepare_restart(&self) -> Result<(), Ended> {
        let (done, finished) = oneshot::channel();
        self.orders
            .send(Order::PrepareRestart(done))
            .await
            .map_err(|_| Ended)?;
        finished.await.map_err(|_| Ended)
    }

    /// Serves a request.
    pub async fn ask(&self, request: BgpRequest) -> Result<BgpResponse, Ended> {
        let (answer, answered) = oneshot::channel();
        self.orders
            .send(Order::Ask(request, answer))
            .await
            .map_err(|_| Ended)?;
        answered.await.map_err(|_| Ended)
    }
}

/// Everything the speaker's task owns.
struct State {
    environment: Environment,
    settings: Settings,
    rib: Rib,
    neighbours: BTreeMap<IpAddr, Running>,
    slots: BTreeMap<PeerSlot, IpAddr>,
    listening: Vec<Listening>,
    admission: Admission,
    /// Neighbours and ranges whose password could not be set on a listening socket: nothing is accepted from them.
    unprotected: BTreeSet<Prefix>,
    paths: Option<paths::Watch>,
    monitors: Vec<Monitor>,
    restarter: Restarter<IpAddr>,
    /// Waits of our restart that end with this batch.
    progress: Progress,
    deferral_ends: Option<Instant>,
    restarting: watch::Sender<bool>,
    reports: (mpsc::Sender<PeerReport>, mpsc::Receiver<PeerReport>),
    accepted: (mpsc::Sender<Connection>, mpsc::Receiver<Connection>),
    /// Neighbours whose route queue is full, each waiting for room in it.
    waiting: FuturesUnordered<Waiting>,
    /// Next hops that the table asks about, with what it was told.
    watched: BTreeMap<Gateway, NextHopState>,
    recheck_at: Option<Instant>,
    started_at: u64,
    configured_at: u64,
    leaving: bool,
}

pub(crate) fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

impl State {
    fn new(environment: Environment, settings: Settings) -> Self {
        let now = unix_now();
        let awaited = settings
            .neighbours
            .iter()
            .filter(|(_, n)| n.session.blocked.is_none())
            .map(|(address, n)| (*address, n.session.families));
        Self {
            rib: Rib::new(settings.rib()),
            restarter: Restarter::new(awaited),
            progress: Progress::default(),
            deferral_ends: Some(Instant::now() + environment.deferral),
            environment,
            settings,
            neighbours: BTreeMap::new(),
            slots: BTreeMap::new(),
            listening: Vec::new(),
            admission: Admission::default(),
            unprotected: BTreeSet::new(),
            paths: None,
            monitors: Vec::new(),
            restarting: watch::Sender::new(true),
            reports: mpsc::channel(REPORTS),
            accepted: mpsc::channel(QUEUE),
            waiting: FuturesUnordered::new(),
            watched: BTreeMap::new(),
            recheck_at: None,
            started_at: now,
            configured_at: now,
            leaving: false,
        }
    }

    async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        let first = self.settings.clone();
        self.listen().await;
        self.watch_paths().await;
        self.originate(&BTreeMap::new(), &first.originated);
        self.apply_host_rules(&settings::HostRules::default());
        for (address, neighbour) in &first.neighbours {
            self.add(*address, neighbour, None);
        }
        let progress = self.restarter.poll();
        self.on_progress(progress);
        self.commit();
        loop {
            let timer = self.next_timer();
            let far = Instant::now() + Duration::from_secs(86_400);
            tokio::select! {
                order = orders.recv() => match order {
                    None => return,
                    Some(Order::Configure(settings)) => self.configure(*settings).await,
                    Some(Order::Ask(request, answer)) => {
                        let response = self.answer(request);
                        // The asker may have gone away.
                        let _ = answer.send(response);
                    }
                    Some(Order::Monitor(station, feed)) => self.monitor(&station, feed),
                    Some(Order::PrepareRestart(done)) => {
                        self.leave_paths().await;
                        let _ = done.send(());
                    }
                },
                Some(report) = self.reports.1.recv() => self.on_reports(report).await,
                Some(report) = paths::next_report(&mut self.paths) => self.on_path(report),
                Some(connection) = self.accepted.1.recv() => self.on_accepted(connection),
                Some((address, epoch)) = self.waiting.next(), if !self.waiting.is_empty() => {
                    self.feed(address, epoch);
                }
                () = monitor::room(&self.monitors), if !self.monitors.is_empty() => self.monitor_more(),
                () = sleep_until(timer.unwrap_or(far)), if timer.is_some() => self.on_timers(),
            }
            self.commit();
            if self.leaving {
                self.leave_paths().await;
                return self.wait_for_goodbyes().await;
            }
        }
    }

    /// Takes this report and those that wait behind it. As long as there are more, the neighbours' tasks get the
    /// processor before the table commits: a commit costs as many portions as there are peers to tell, so one
    /// commit for the messages of hundreds of peers is much cheaper than one for each.
    async fn on_reports(&mut self, first: PeerReport) {
        let mut taken = self.on_report(first);
        loop {
            let before = taken;
            while taken < BATCH {
                let Ok(report) = self.reports.1.try_recv() else {
                    break;
                };
                taken += self.on_report(report);
            }
            if taken == before || taken >= BATCH {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    /// The neighbours' tasks end by themselves after Stop, and bound their own goodbye.
    async fn wait_for_goodbyes(self) {
        futures::future::join_all(self.neighbours.into_values().map(Running::ended)).await;
    }

    fn next_timer(&self) -> Option<Instant> {
        let helpers = self.neighbours.values().filter_map(Running::next_timer);
        helpers
            .chain(self.deferral_ends)
            .chain(self.recheck_at)
            .chain(self.monitors.iter().map(|m| m.statistics_at))
            .min()
    }

    fn on_timers(&mut self) {
        let now = Instant::now();
        if self.deferral_ends.is_some_and(|at| at <= now) {
            self.deferral_ends = None;
            tracing::info!("no longer waiting for peers: the restart is over");
            let progress = self.restarter.on(Heard::Deferred);
            self.on_progress(progress);
        }
        if self.recheck_at.is_some_and(|at| at <= now) {
            self.recheck();
        }
        self.helper_timers(now);
        self.monitor_statistics(now);
        self.forget_dynamic(now);
    }

    /// Everything that peers can tell about these families has been taken in. What follows from it waits until
    /// the batch is committed: paths must reach the kernel's side before the end of its synchronisation.
    fn on_progress(&mut self, progress: Progress) {
        self.progress = self.progress.and(progress);
    }

    /// Carries out what the waits that ended with this batch were for.
    fn end_restart(&mut self) {
        let progress = std::mem::take(&mut self.progress);
        if progress.is_empty() {
            return;
        }
        for family in progress.complete.iter() {
            self.environment.sink.end_of_sync(family);
        }
        if self.restarter.is_complete() {
            self.deferral_ends = None;
        }
        if !self.restarter.is_restarting() {
            self.restarting.send_replace(false);
        }
        self.release_end_of_rib();
    }
}
