//! Best paths straight into the kernel's main table, for a `bgpd` that stands alone.
//!
//! A thread of its own owns the kernel's side: it sets what the table says, finds out once a second what is there
//! (which also sees what the kernel removes without a notification), and puts right what others changed. A second one sends, so
//! that the next portion is prepared while the kernel works on the one before. Routes that an
//! earlier process left stay as they are until end-of-sync, also where a first peer has offered another way by then: what
//! the whole table said is better than what a part of it says (RFC 4724 §4.1 defers the selection). New prefixes are
//! installed at once. At the end nothing is removed: the kernel goes on forwarding.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, Sender, SyncSender, TrySendError, channel, sync_channel,
};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cali_netlink::reconcile::{Op, Reconciler};
use cali_netlink::{Change, Netlink, ReadyRoutes, route};
use ipnetwork::IpNetwork;
use tracing::{info, warn};

use super::{Path, Sink};
use crate::rib::Gateway;
use crate::wire::{Family, Prefix};

/// Protocol number of our routes (`RTPROT_BGP`, `include/uapi/linux/rtnetlink.h`).
pub const PROTOCOL: u8 = 186;
/// How often the kernel is looked at.
const AUDIT: Duration = Duration::from_secs(1);
/// Looking takes at most this part of the time, however many routes there are.
const AUDIT_SHARE: u32 = 20;
/// While routes change at shorter intervals than this, or are being written, the look is put off: what is written is what the
/// table says.
const CALM: Duration = Duration::from_millis(200);
/// It is put off so long at most.
const AUDIT_PATIENCE: Duration = Duration::from_secs(2);
/// Metric of our routes: behind those that an administrator adds without one.
const METRIC: u32 = 1024;

/// Prefixes that are planned, and sent, at once.
const PORTION: usize = 2048;
/// Portions with the sender: one in the kernel's hands, one that is ready.
const AHEAD: usize = 2;

type Key = route::RouteKey;
type Operation = Op<Key, route::Route>;
/// What is to be done, also as the messages that do it.
type Order = (Vec<Operation>, ReadyRoutes);
type Results = Vec<cali_netlink::Result<()>>;

/// What the table said since the writer last looked.
#[derive(Default)]
struct Wanted {
    changed: BTreeMap<Prefix, Option<Path>>,
    synced: BTreeSet<Family>,
    /// The table is gone.
    ended: bool,
}

/// The sink of a `bgpd` that stands alone.
pub struct Kernel {
    wanted: Arc<Mutex<Wanted>>,
    wake: SyncSender<()>,
}

impl Kernel {
    /// Starts the threads that write into a namespace: one socket of it is for looking, one for writing.
    pub fn start(look: Netlink, write: Netlink) -> std::io::Result<Self> {
        let wanted = Arc::new(Mutex::new(Wanted::default()));
        let (wake, woken) = sync_channel(1);
        let (orders, ordered) = channel();
        let (done, finished) = channel();
        let waker = wake.clone();
        thread("kernel-send", move || send(&write, &ordered, &done, &waker))?;
        let writer = Writer::new(look, Arc::clone(&wanted), orders, finished);
        thread("kernel-routes", move || writer.run(&woken))?;
        Ok(Self { wanted, wake })
    }

    fn wake(&self) {
        // Full: the thread is about to look anyway.
        if let Err(TrySendError::Disconnected(())) = self.wake.try_send(()) {
            tracing::error!("the thread that writes routes has ended");
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        with(&self.wanted, |w| w.ended = true);
        self.wake();
    }
}

fn thread(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    builder.spawn(run).map(drop)
}

/// Brings portions into the kernel, one after the other.
fn send(
    netlink: &Netlink,
    orders: &Receiver<Order>,
    done: &Sender<(Vec<Operation>, Results)>,
    wake: &SyncSender<()>,
) {
    for (ops, ready) in orders {
        let results = netlink.apply_ready_routes(ready);
        if done.send((ops, results)).is_err() {
            return;
        }
        // Full: the thread is about to look anyway.
        let _ = wake.try_send(());
    }
}

fn with<T>(wanted: &Mutex<Wanted>, act: impl FnOnce(&mut Wanted) -> T) -> T {
    act(&mut wanted.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Sink for Kernel {
    fn set(&mut self, prefix: Prefix, path: Option<Path>) {
        with(&self.wanted, |w| w.changed.insert(prefix, path));
    }

    fn flush(&mut self) {
        self.wake();
    }

    fn end_of_sync(&mut self, family: Family) {
        with(&self.wanted, |w| w.synced.insert(family));
        self.wake();
    }
}

/// Families whose left-overs may be removed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Synced {
    v4: bool,
    v6: bool,
}

struct Writer {
    netlink: Netlink,
    wanted: Arc<Mutex<Wanted>>,
    /// Taken over, and not planned yet.
    waiting: BTreeMap<Prefix, Option<Path>>,
    paths: BTreeMap<Prefix, Path>,
    routes: Reconciler<Key, route::Route>,
    orders: Sender<Order>,
    finished: Receiver<(Vec<Operation>, Results)>,
    /// Portions with the sender.
    ahead: usize,
    synced: Arc<Mutex<Synced>>,
    /// What an earlier process left, as it was found.
    left: Option<BTreeMap<Key, route::Route>>,
    audit_at: Instant,
    /// When the table last said something, or something was on its way to the kernel.
    busy_at: Option<Instant>,
}

/// Whether it is time to look at the kernel.
fn is_audit_due(now: Instant, audit_at: Instant, busy_at: Option<Instant>) -> bool {
    let calm = busy_at.is_none_or(|busy| now.saturating_duration_since(busy) >= CALM);
    now >= audit_at && (calm || now >= audit_at + AUDIT_PATIENCE)
}

impl Writer {
    fn new(
        netlink: Netlink,
        wanted: Arc<Mutex<Wanted>>,
        orders: Sender<Order>,
        finished: Receiver<(Vec<Operation>, Results)>,
    ) -> Self {
        let synced = Arc::new(Mutex::new(Synced::default()));
        let known = Arc::clone(&synced);
        let ours = move |_: &Key, route: &route::Route| {
            let synced = *known.lock().unwrap_or_else(PoisonError::into_inner);
            let swept = if route.prefix.is_ipv4() {
                synced.v4
            } else {
                synced.v6
            };
            route.protocol == PROTOCOL && swept
        };
        Self {
            netlink,
            wanted,
            waiting: BTreeMap::new(),
            paths: BTreeMap::new(),
            // What is there is found out by looking only.
            routes: Reconciler::new(ours).without_notifications(),
            orders,
            finished,
            ahead: 0,
            synced,
            left: None,
            audit_at: Instant::now(),
            busy_at: None,
        }
    }

    fn run(mut self, woken: &Receiver<()>) {
        loop {
            self.take_results();
            let now = Instant::now();
            if self.ahead > 0 || !self.waiting.is_empty() {
                self.busy_at = Some(now);
            }
            // The first look comes first: nothing is planned before it.
            let due = is_audit_due(now, self.audit_at, self.busy_at) || !self.routes.is_synced();
            if due && self.ahead == 0 {
                self.audit(now);
            }
            if self.take_over() {
                return;
            }
            if self.ahead < AHEAD {
                let more = self.take_portion();
                if !self.apply() {
                    return;
                }
                if more && self.ahead < AHEAD {
                    continue;
                }
            }
            // What is with the sender wakes this thread when it is done.
            let wait = match self.ahead {
                0 => self
                    .audit_at
                    .saturating_duration_since(Instant::now())
                    .max(CALM),
                _ => AUDIT,
            };
            if woken.recv_timeout(wait) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
        }
    }

    /// Looks at what is there, and resolves all gateways anew.
    fn audit(&mut self, now: Instant) {
        let filter = route::RouteFilter {
            protocol: Some(PROTOCOL),
            ..Default::default()
        };
        match self.netlink.dump_routes(&filter) {
            Ok(dump) => {
                let rows: Vec<_> = dump
                    .into_iter()
                    .map(route::Route::normalised)
                    .map(|r| (r.key(), r))
                    .collect();
                self.left
                    .get_or_insert_with(|| rows.iter().cloned().collect());
                for drift in self.routes.on_dump(rows, now) {
                    info!(?drift, "found a route that somebody else changed");
                }
            }
            Err(error) => warn!(%error, "cannot look at the kernel's routes"),
        }
        let mut resolved = BTreeMap::new();
        let paths = self.paths.iter();
        let rows = paths.filter_map(|(p, path)| self.row(*p, path, &mut resolved));
        let rows: Vec<_> = rows.map(|r| (r.key(), r)).collect();
        self.routes.set_desired(rows);
        self.audit_at = now + AUDIT.max(now.elapsed() * AUDIT_SHARE);
    }

    /// Takes what has changed since the last time. Whether the table is gone.
    fn take_over(&mut self) -> bool {
        let (changed, synced, ended) = with(&self.wanted, |w| {
            let synced = Synced {
                v4: w.synced.contains(&Family::IPV4_UNICAST),
                v6: w.synced.contains(&Family::IPV6_UNICAST),
            };
            (std::mem::take(&mut w.changed), synced, w.ended)
        });
        if !changed.is_empty() {
            self.busy_at = Some(Instant::now());
        }
        if self.waiting.is_empty() {
            self.waiting = changed;
        } else {
            self.waiting.extend(changed);
        }
        let mut known = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != synced {
            *known = synced;
            // What an earlier process left is ours from now on: look again.
            self.audit_at = Instant::now();
        }
        ended
    }

    /// Wants a portion of what was taken over. Whether there is more of it.
    fn take_portion(&mut self) -> bool {
        let mut resolved = BTreeMap::new();
        for _ in 0..PORTION {
            let Some((prefix, path)) = self.waiting.pop_first() else {
                break;
            };
            let row = path
                .as_ref()
                .and_then(|p| self.row(prefix, p, &mut resolved));
            match (row, key(prefix)) {
                (Some(row), Some(key)) => self.routes.desire(key, row),
                (None, Some(key)) => drop(self.routes.undesire(&key)),
                (_, None) => {}
            }
            match path {
                Some(path) => self.paths.insert(prefix, path),
                None => self.paths.remove(&prefix),
            };
        }
        !self.waiting.is_empty()
    }

    /// Hands the sender what is to be done. Whether it still works.
    fn apply(&mut self) -> bool {
        let mut ops = self.routes.plan(Instant::now());
        while !ops.is_empty() {
            let rest = ops.split_off(ops.len().min(PORTION));
            self.ahead += 1;
            let ready = ReadyRoutes::new(ops.iter().map(change).collect());
            if self.orders.send((ops, ready)).is_err() {
                tracing::error!("the thread that sends routes has ended");
                return false;
            }
            ops = rest;
        }
        true
    }

    fn take_results(&mut self) {
        while let Ok((ops, results)) = self.finished.try_recv() {
            self.ahead -= 1;
            let now = Instant::now();
            for (op, result) in ops.iter().zip(results) {
                if let Err(error) = &result {
                    warn!(route = %op.key(), %error, "the kernel refused a route");
                }
                self.routes.on_result(op, result, now);
            }
        }
    }

    /// The row of a prefix: what an earlier process left as long as the family is not in sync, then what the path says.
    fn row(
        &self,
        prefix: Prefix,
        path: &Path,
        resolved: &mut BTreeMap<Gateway, Option<route::Hop>>,
    ) -> Option<route::Route> {
        let synced = *self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        let in_sync = if prefix.addr().is_ipv4() {
            synced.v4
        } else {
            synced.v6
        };
        let left = self.left.as_ref().filter(|_| !in_sync);
        match left.and_then(|left| left.get(&key(prefix)?)) {
            Some(left) => Some(left.clone()),
            None => self.render(prefix, path, resolved),
        }
    }

    /// The row of a path; `None` while no gateway can be reached.
    fn render(
        &self,
        prefix: Prefix,
        path: &Path,
        resolved: &mut BTreeMap<Gateway, Option<route::Hop>>,
    ) -> Option<route::Route> {
        let mut hops: Vec<route::Hop> = Vec::new();
        for gateway in &path.gateways {
            let hop = resolved
                .entry(*gateway)
                .or_insert_with(|| self.resolve(*gateway));
            hops.extend(hop.clone().filter(|h| !hops.contains(h)));
        }
        let target = match hops.len() {
            0 => return None,
            1 => route::Target::Hop(hops.remove(0)),
            _ => route::Target::Multipath(hops),
        };
        let mut row = route::Route::new(network(prefix)?, PROTOCOL, target);
        row.metric = METRIC;
        Some(row.normalised())
    }

    /// The way to a gateway: itself where it is a neighbour, else what leads to it.
    fn resolve(&self, gateway: Gateway) -> Option<route::Hop> {
        if gateway.scope != 0 {
            return Some(route::Hop::via(gateway.addr, gateway.scope));
        }
        let decision = self.netlink.lookup_route(gateway.addr).ok()?;
        let via: IpAddr = decision.gateway.unwrap_or(gateway.addr);
        Some(route::Hop::via(via, decision.oif?))
    }
}

fn network(prefix: Prefix) -> Option<IpNetwork> {
    IpNetwork::new(prefix.addr(), prefix.len()).ok()
}

fn key(prefix: Prefix) -> Option<Key> {
    let mut row = route::Route::new(network(prefix)?, PROTOCOL, route::Target::None);
    row.metric = METRIC;
    Some(row.key())
}

fn change(op: &Operation) -> Change<route::Route> {
    match op {
        Op::Set { value, .. } => Change::Replace(value.clone()),
        Op::Delete { old, .. } => Change::Delete(old.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_is_put_off_while_routes_change_but_not_for_ever() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!is_audit_due(at(999), at(1000), None));
        assert!(is_audit_due(at(1000), at(1000), None));
        assert!(!is_audit_due(at(1000), at(1000), Some(at(900))));
        assert!(is_audit_due(at(1100), at(1000), Some(at(900))));
        assert!(is_audit_due(at(3000), at(1000), Some(at(2999))));
    }
}
