//! Best paths straight into the kernel's main table, for a `bgpd` that stands alone.
//!
//! A thread of its own owns the kernel's side: it sets what the table says, finds out once a second what is there
//! (which also sees what the kernel removes without a notification), and puts right what others changed. Routes that an
//! earlier process left stay as they are until end-of-sync, also where a first peer has offered another way by then: what
//! the whole table said is better than what a part of it says (RFC 4724 §4.1 defers the selection). New prefixes are
//! installed at once. At the end nothing is removed: the kernel goes on forwarding.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cali_netlink::reconcile::{Op, Reconciler};
use cali_netlink::{Change, Netlink, route};
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
/// Metric of our routes: behind those that an administrator adds without one.
const METRIC: u32 = 1024;

type Key = route::RouteKey;

#[derive(Default)]
struct Wanted {
    paths: BTreeMap<Prefix, Path>,
    changed: BTreeSet<Prefix>,
    synced: BTreeSet<Family>,
}

/// The sink of a `bgpd` that stands alone.
pub struct Kernel {
    wanted: Arc<Mutex<Wanted>>,
    wake: SyncSender<()>,
}

impl Kernel {
    /// Starts the thread that writes into this namespace.
    pub fn start(netlink: Netlink) -> std::io::Result<Self> {
        let wanted = Arc::new(Mutex::new(Wanted::default()));
        let (wake, woken) = sync_channel(1);
        let shared = Arc::clone(&wanted);
        std::thread::Builder::new()
            .name("kernel-routes".to_owned())
            .spawn(move || Writer::new(netlink, shared).run(&woken))?;
        Ok(Self { wanted, wake })
    }

    fn wake(&self) {
        // Full: the thread is about to look anyway.
        if let Err(TrySendError::Disconnected(())) = self.wake.try_send(()) {
            tracing::error!("the thread that writes routes has ended");
        }
    }
}

fn with<T>(wanted: &Mutex<Wanted>, act: impl FnOnce(&mut Wanted) -> T) -> T {
    act(&mut wanted.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Sink for Kernel {
    fn set(&mut self, prefix: Prefix, path: Option<Path>) {
        with(&self.wanted, |w| {
            match path {
                Some(path) => w.paths.insert(prefix, path),
                None => w.paths.remove(&prefix),
            };
            w.changed.insert(prefix);
        });
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
    routes: Reconciler<Key, route::Route>,
    synced: Arc<Mutex<Synced>>,
    /// What an earlier process left, as it was found.
    left: Option<BTreeMap<Key, route::Route>>,
    audit_at: Instant,
}

impl Writer {
    fn new(netlink: Netlink, wanted: Arc<Mutex<Wanted>>) -> Self {
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
            routes: Reconciler::new(ours),
            synced,
            left: None,
            audit_at: Instant::now(),
        }
    }

    fn run(mut self, woken: &Receiver<()>) {
        loop {
            let now = Instant::now();
            if now >= self.audit_at {
                self.audit(now);
            }
            self.take_over();
            self.apply();
            let wait = self.audit_at.saturating_duration_since(Instant::now());
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
        let paths = with(&self.wanted, |w| w.paths.clone());
        let mut resolved = BTreeMap::new();
        let rows = paths
            .iter()
            .filter_map(|(p, path)| self.row(*p, path, &mut resolved));
        let rows: Vec<_> = rows.map(|r| (r.key(), r)).collect();
        self.routes.set_desired(rows);
        self.audit_at = now + AUDIT.max(now.elapsed() * AUDIT_SHARE);
    }

    /// Takes what has changed since the last time.
    fn take_over(&mut self) {
        let (changed, synced) = with(&self.wanted, |w| {
            let prefixes = std::mem::take(&mut w.changed);
            let changed: Vec<_> = prefixes
                .into_iter()
                .map(|p| (p, w.paths.get(&p).cloned()))
                .collect();
            let synced = Synced {
                v4: w.synced.contains(&Family::IPV4_UNICAST),
                v6: w.synced.contains(&Family::IPV6_UNICAST),
            };
            (changed, synced)
        });
        let mut resolved = BTreeMap::new();
        for (prefix, path) in changed {
            let row = path.and_then(|p| self.row(prefix, &p, &mut resolved));
            match (row, key(prefix)) {
                (Some(row), _) => self.routes.desire(row.key(), row),
                (None, Some(key)) => drop(self.routes.undesire(&key)),
                (None, None) => {}
            }
        }
        let mut known = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        if *known != synced {
            *known = synced;
            // What an earlier process left is ours from now on: look again.
            self.audit_at = Instant::now();
        }
    }

    fn apply(&mut self) {
        let now = Instant::now();
        let ops = self.routes.plan(now);
        if ops.is_empty() {
            return;
        }
        let changes: Vec<Change<route::Route>> = ops.iter().map(change).collect();
        let results = self.netlink.apply_routes(&changes);
        for (op, result) in ops.iter().zip(results) {
            if let Err(error) = &result {
                warn!(route = %op.key(), %error, "the kernel refused a route");
            }
            self.routes.on_result(op, result, now);
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

fn change(op: &Op<Key, route::Route>) -> Change<route::Route> {
    match op {
        Op::Set { value, .. } => Change::Replace(value.clone()),
        Op::Delete { old, .. } => Change::Delete(old.clone()),
    }
}
