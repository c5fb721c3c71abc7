//! The task that owns the table and the kernel's routes.
//!
//! The loop reads: subscribe, dump, diff, apply, verify. Inputs come over a bounded channel; each batch is answered
//! once it has been handed to the kernel. Some things remove routes without any route event (link down, address
//! removal, nexthop deletion, a lost notification): each of them is followed by a dump of what depends on it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::{Cidr, NodeName};
use cali_netlink::events::{EventStream, Group};
use cali_netlink::reconcile::{Drift, Op};
use cali_netlink::{Error, IfIndex, Link, Netlink, Route, RouteKey};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::input::{
    Effect, Failed, Input, RefusedRoute, RouteStatus, WriterState, asked_for, feed,
};
use crate::kernel;
use crate::program::{Program, Step};
use crate::render::{KernelSettings, describe};
use crate::table::RouteTable;

/// Time in which further reasons for a look at the kernel are collected.
pub(crate) const SETTLE: Duration = Duration::from_millis(20);
/// Notifications that come within this time are taken in together.
const BURST: Duration = Duration::from_millis(5);
/// And at most this many.
const BURST_LIMIT: usize = 1 << 16;
/// The safety net: everything of ours is read again after this time.
const AUDIT: Duration = Duration::from_secs(300);
/// Batches that may wait.
const QUEUE: usize = 64;

/// The writer has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the route writer has ended")]
pub struct WriterGone;

enum Command {
    Apply(Vec<Input>, Option<oneshot::Sender<Vec<Failed>>>),
    View(oneshot::Sender<Vec<RouteStatus>>),
}

/// Access to a running writer. Clones share it; the writer ends when the last one is dropped.
#[derive(Debug, Clone)]
pub struct Writer {
    commands: mpsc::Sender<Command>,
    state: watch::Receiver<Arc<WriterState>>,
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Apply(inputs, _) => write!(f, "Apply({})", inputs.len()),
            Self::View(_) => f.write_str("View"),
        }
    }
}

impl Writer {
    /// Starts the writer for the node `local` in the namespace of `netlink`. What is in the kernel is adopted.
    ///
    /// # Errors
    /// The first dump or the subscription failed.
    pub fn start(
        local: NodeName,
        netlink: Netlink,
        settings: KernelSettings,
    ) -> Result<Self, Error> {
        let (commands, inbox) = mpsc::channel(QUEUE);
        let (state_out, state) = watch::channel(Arc::default());
        let events = netlink.events(Group::ROUTING)?;
        let mut task = Task::new(local, netlink, settings, state_out);
        task.adopt()?;
        tokio::spawn(task.run(inbox, events));
        Ok(Self { commands, state })
    }

    /// Hands in changes and waits until the kernel has them. The answer lists what is not programmed, of that which
    /// the changes asked for.
    ///
    /// # Errors
    /// [`WriterGone`].
    pub async fn apply(&self, inputs: Vec<Input>) -> Result<Vec<Failed>, WriterGone> {
        let (done, answer) = oneshot::channel();
        self.commands
            .send(Command::Apply(inputs, Some(done)))
            .await
            .map_err(|_| WriterGone)?;
        answer.await.map_err(|_| WriterGone)
    }

    /// Hands in changes; waits only while the queue is full.
    ///
    /// # Errors
    /// [`WriterGone`].
    pub async fn send(&self, inputs: Vec<Input>) -> Result<(), WriterGone> {
        self.commands
            .send(Command::Apply(inputs, None))
            .await
            .map_err(|_| WriterGone)
    }

    /// Every route with its owner and its reason.
    ///
    /// # Errors
    /// [`WriterGone`].
    pub async fn view(&self) -> Result<Vec<RouteStatus>, WriterGone> {
        let (done, answer) = oneshot::channel();
        self.commands
            .send(Command::View(done))
            .await
            .map_err(|_| WriterGone)?;
        answer.await.map_err(|_| WriterGone)
    }

    /// State that others act upon, as it changes.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<Arc<WriterState>> {
        self.state.clone()
    }
}

/// What has to be read from the kernel.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    pub(crate) links: bool,
    pub(crate) devices: BTreeSet<IfIndex>,
    pub(crate) nexthops: bool,
    pub(crate) all: bool,
    /// Next hops to be looked up again.
    pub(crate) reach: BTreeSet<IpAddr>,
    pub(crate) reach_all: bool,
}

impl Audit {
    fn is_empty(&self) -> bool {
        !(self.links || self.nexthops || self.all || self.reach_all)
            && self.devices.is_empty()
            && self.reach.is_empty()
    }
}

pub(crate) struct Task {
    netlink: Netlink,
    pub(crate) table: RouteTable,
    pub(crate) program: Program,
    pub(crate) links: BTreeMap<IfIndex, Link>,
    pub(crate) audit: Audit,
    audit_at: Option<Instant>,
    state: watch::Sender<Arc<WriterState>>,
}

impl Task {
    fn new(
        local: NodeName,
        netlink: Netlink,
        settings: KernelSettings,
        state: watch::Sender<Arc<WriterState>>,
    ) -> Self {
        Self {
            netlink,
            table: RouteTable::new(local),
            program: Program::new(settings),
            links: BTreeMap::new(),
            audit: Audit::default(),
            audit_at: None,
            state,
        }
    }

    fn adopt(&mut self) -> Result<(), Error> {
        self.read_links()?;
        let nexthops = kernel::dump_nexthops(&self.netlink)?;
        let routes = kernel::dump_routes(&self.netlink, self.program.settings(), None)?;
        info!(
            routes = routes.len(),
            nexthops = nexthops.len(),
            "adopted the routes of this node"
        );
        self.program.adopt(routes, nexthops, Instant::now());
        self.publish();
        Ok(())
    }

    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, mut events: EventStream) {
        let mut next_audit = Instant::now() + AUDIT;
        loop {
            let now = Instant::now();
            let due = [self.program.next_due(now), self.audit_at, Some(next_audit)];
            let due = due.into_iter().flatten().min().unwrap_or(next_audit);
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => {
                        // What somebody else did before is taken in before what is asked for is written.
                        match events.burst_so_far() {
                            Ok(burst) => self.on_burst(burst, Instant::now()),
                            Err(error) => return notifications_ended(&error),
                        }
                        self.on_command(command, &mut inbox);
                    }
                    None => return,
                },
                burst = events.next_burst(BURST, BURST_LIMIT) => match burst {
                    Ok(burst) => {
                        self.on_burst(burst, Instant::now());
                        self.turn();
                    }
                    Err(error) => return notifications_ended(&error),
                },
                () = tokio::time::sleep_until(due.into()) => {
                    if Instant::now() >= next_audit {
                        next_audit = Instant::now() + AUDIT;
                        self.audit.all = true;
                        self.audit.reach_all = true;
                    }
                    self.turn();
                }
            }
        }
    }

    fn on_command(&mut self, command: Command, inbox: &mut mpsc::Receiver<Command>) {
        let mut waiting = Vec::new();
        let mut next = Some(command);
        // What has queued up becomes one batch.
        while let Some(command) = next.take() {
            match command {
                Command::Apply(inputs, done) => {
                    let asked: BTreeSet<Cidr> = inputs.iter().filter_map(asked_for).collect();
                    let mut pools = false;
                    for input in inputs {
                        match feed(&mut self.table, input) {
                            Effect::None => {}
                            Effect::Pools => pools = true,
                            Effect::WorkloadMtu(mtu) => self.program.set_workload_mtu(mtu),
                            Effect::Release(hold) => {
                                // What the table selects must be placed before what is held may go.
                                self.select();
                                self.program.release(hold);
                            }
                        }
                    }
                    if pools {
                        self.program.set_prefixes(
                            self.table
                                .resolver()
                                .pools()
                                .map(|pool| pool.cidr)
                                .collect(),
                        );
                        // What was not ours before may be now.
                        self.audit.all = true;
                    }
                    if let Some(done) = done {
                        waiting.push((done, asked));
                    }
                }
                Command::View(done) => {
                    self.turn();
                    // The asker may have gone.
                    let _ = done.send(self.view());
                }
            }
            next = inbox.try_recv().ok();
        }
        self.turn();
        self.look_for_devices(waiting.iter().flat_map(|(_, asked)| asked));
        for (done, asked) in waiting {
            let failed = asked.into_iter().filter_map(|prefix| {
                let reason = self.problem_of(&prefix)?;
                Some(Failed { prefix, reason })
            });
            let _ = done.send(failed.collect());
        }
    }

    /// Selects, reads what has to be read, and writes until nothing is left to do now.
    fn turn(&mut self) {
        let now = Instant::now();
        if !self.audit.is_empty() && self.audit_at.is_none() {
            self.audit_at = Some(now + SETTLE);
        }
        if self.audit_at.is_some_and(|at| at <= now) {
            self.audit_at = None;
            self.run_audit(now);
        }
        self.select();
        self.write(now);
        self.publish();
    }

    /// Takes the table's changes over, and asks the underlay what the table needs to know.
    fn select(&mut self) {
        loop {
            for (prefix, selected) in self.table.take_changes() {
                self.program.place(prefix, selected);
            }
            let open = self.table.unanswered_next_hops();
            if open.is_empty() {
                return;
            }
            for address in open {
                let reach = kernel::reach(&self.netlink, &self.links, address);
                self.table.set_reach(address, reach);
            }
        }
    }

    fn write(&mut self, now: Instant) {
        let steps = self.program.plan_routes(now);
        let wrote = !steps.is_empty();
        let (alone, others): (Vec<_>, Vec<_>) =
            steps.into_iter().partition(|(_, step)| step.stands_alone());
        self.write_routes(&alone, now);
        self.write_nexthops(now);
        self.write_routes(&others, now);
        if wrote {
            self.program.retire_nexthops();
            self.write_nexthops(now);
        }
    }

    fn write_routes(&mut self, steps: &[(Op<RouteKey, Route>, Step)], now: Instant) {
        if steps.is_empty() {
            return;
        }
        let (results, outdated) = kernel::apply_routes(&self.netlink, steps);
        for ((op, step), result) in steps.iter().zip(results) {
            if let Err(reason) = &result {
                warn!(?step, reason, "route not programmed");
            }
            self.program.on_route_result(op, result, now);
        }
        self.audit.all |= outdated;
    }

    fn write_nexthops(&mut self, now: Instant) {
        let mut ops = self.program.plan_nexthops(now);
        if ops.is_empty() {
            return;
        }
        let results = kernel::apply_nexthops(&self.netlink, &mut ops);
        let mut without = false;
        for (op, result) in ops.iter().zip(results) {
            if let Err(error) = &result {
                without |= kernel::means_no_objects(error);
                warn!(%error, "nexthop object not programmed");
            }
            self.program.on_nexthop_result(op, result, now);
        }
        if without {
            warn!("this kernel has no nexthop objects; routes are written without them");
            self.program.do_without_nexthop_objects();
        }
    }

    /// Reads what may have changed without a word.
    fn run_audit(&mut self, now: Instant) {
        let audit = std::mem::take(&mut self.audit);
        if let Err(error) = self.try_audit(&audit, now) {
            warn!(%error, "cannot read the kernel's routes; trying again");
            self.audit = Audit {
                all: true,
                links: true,
                nexthops: true,
                reach_all: true,
                ..audit
            };
            self.audit_at = Some(now + SETTLE * 10);
        }
    }

    fn try_audit(&mut self, audit: &Audit, now: Instant) -> Result<(), Error> {
        if audit.links || audit.all {
            self.read_links()?;
        }
        let mut drifts = Vec::new();
        if audit.nexthops || audit.all {
            let nexthops = kernel::dump_nexthops(&self.netlink)?;
            for drift in self.program.on_nexthop_dump(nexthops, now) {
                warn!(found = ?drift, "nexthop object was changed by somebody else; putting it right");
            }
        }
        if audit.all {
            let routes = kernel::dump_routes(&self.netlink, self.program.settings(), None)?;
            drifts = self.program.on_route_dump(routes, now);
        } else {
            for device in &audit.devices {
                let routes =
                    kernel::dump_routes(&self.netlink, self.program.settings(), Some(*device))?;
                drifts.extend(self.program.on_device_dump(*device, routes, now));
            }
        }
        for drift in &drifts {
            log_drift(drift);
        }
        let again: Vec<IpAddr> = if audit.reach_all || audit.all {
            self.table.needed_next_hops().collect()
        } else {
            audit.reach.iter().copied().collect()
        };
        for address in again {
            let reach = kernel::reach(&self.netlink, &self.links, address);
            if self.table.set_reach(address, reach.clone()) {
                info!(next_hop = %address, ?reach, "the way to a next hop changed");
            }
        }
        Ok(())
    }

    /// Somebody waits for these routes: a device that they need may be there, and the news of it on its way.
    fn look_for_devices<'a>(&mut self, asked: impl Iterator<Item = &'a Cidr>) {
        let missing: BTreeSet<Arc<str>> = asked
            .filter_map(|prefix| self.program.missing_device(prefix))
            .collect();
        let mut found = false;
        for name in missing {
            match self.netlink.link_by_name(&name) {
                Ok(link) => found |= link.is_some_and(|link| self.on_fresh_link(link)),
                Err(error) => warn!(%error, "cannot look for the device of a route"),
            }
        }
        if found {
            self.turn();
        }
    }

    /// Takes in a device as it is now; true where routes can go over it that could not before.
    pub(crate) fn on_fresh_link(&mut self, link: Link) -> bool {
        let better = link.up && !self.links.get(&link.index).is_some_and(|known| known.up);
        if better {
            self.links.insert(link.index, link);
            self.program.set_devices(kernel::usable(&self.links));
        }
        better
    }

    /// The device as the kernel has it; what cannot be read now is read with the next audit.
    pub(crate) fn fresh_link(&mut self, index: IfIndex) -> Option<Link> {
        self.netlink.link_by_index(index).unwrap_or_else(|error| {
            warn!(%error, "cannot look at a device; reading all of them");
            self.audit.links = true;
            None
        })
    }

    fn read_links(&mut self) -> Result<(), Error> {
        self.links = self
            .netlink
            .dump_links()?
            .into_iter()
            .map(|link| (link.index, link))
            .collect();
        self.program.set_devices(kernel::usable(&self.links));
        Ok(())
    }

    /// The resource or peer that a row comes from.
    fn because(&self, key: &RouteKey) -> Option<String> {
        let prefix = Cidr::new(key.prefix.network(), key.prefix.prefix()).ok()?;
        let selected = self.table.selected(&prefix)?;
        Some(selected.because.to_string())
    }

    fn problem_of(&self, prefix: &Cidr) -> Option<String> {
        if self.table.selected(prefix).is_some() {
            return self.program.state_of(prefix).err();
        }
        let row = self.table.row(prefix)?;
        row.problem.map(ToString::to_string)
    }

    fn view(&self) -> Vec<RouteStatus> {
        let settings = self.program.settings();
        let mut rows = Vec::new();
        for row in self.table.view() {
            let Some(source) = row
                .selected
                .map(|selected| selected.source)
                .or_else(|| row.sources.first().copied())
            else {
                continue;
            };
            let state = row.selected.map(|_| self.program.state_of(&row.prefix));
            rows.push(RouteStatus {
                prefix: row.prefix,
                kernel: row
                    .selected
                    .map(|selected| describe(&row.prefix, selected, settings))
                    .unwrap_or_default(),
                source,
                because: row
                    .selected
                    .map(|selected| selected.because.to_string())
                    .unwrap_or_default(),
                programmed: matches!(state, Some(Ok(()))),
                problem: state
                    .and_then(Result::err)
                    .or_else(|| row.problem.map(ToString::to_string)),
                way: row.selected.map(|selected| selected.way.clone()),
            });
        }
        rows
    }

    fn publish(&self) {
        let name = |index: &IfIndex| self.links.get(index).map(|link| link.name.clone());
        let state = WriterState {
            gateways: self
                .program
                .gateways_in_use()
                .filter_map(|(device, gateway)| Some((name(&device)?, gateway)))
                .collect(),
            held: self.program.held(),
            desired: self.program.routes().all_desired().count(),
            waiting: self.program.waiting().collect(),
            quarantined: self
                .program
                .routes()
                .quarantined()
                .map(|(key, failure)| RefusedRoute {
                    route: key.to_string(),
                    reason: failure.reason.clone(),
                    because: self.because(key),
                })
                .collect(),
            fights: self
                .program
                .routes()
                .fights(Instant::now())
                .map(|(key, _)| key.to_string())
                .collect(),
        };
        self.state.send_if_modified(|current| {
            let changed = **current != state;
            if changed {
                *current = Arc::new(state);
            }
            changed
        });
    }
}

/// One line per event that a person would want to count.
pub(crate) fn log_drift(drift: &Drift<RouteKey, Route>) {
    match drift {
        Drift::Missing { key } => {
            warn!(route = %key, found = "nothing", "route was removed by somebody else; putting it back")
        }
        Drift::Changed { key, seen } => {
            warn!(route = %key, found = %seen, "route was changed by somebody else; putting it right")
        }
        Drift::Unwanted { key, seen } => {
            warn!(route = %key, found = %seen, "route of ours appeared that nobody wants; removing it")
        }
    }
}

/// Without notifications only the audit is left; that is not how this is meant to run.
fn notifications_ended(error: &Error) {
    warn!(%error, "route notifications have ended");
}
