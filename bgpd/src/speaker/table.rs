//! Between the table and the world: settings of sessions, originated routes, best paths, and feeding peers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::warn;

use super::State;
use super::neighbours::Running;
use super::settings::HostRules;
use crate::policy::DEFAULT_LOCAL_PREF;
use crate::reach::RECHECK;
use crate::rib::{BestChange, Gateway, LocalRoute, PeerConfig, PeerId, RibInput, RouteSource};
use crate::session::{Command, SessionUp};
use crate::sink::Path;
use crate::wire::{ErrorCode, Family, NextHop, Notification, PeerKind, Prefix, cease};

/// Octets that a neighbour is handed at once.
const PORTION: usize = 64 * 1024;

/// Destinations that are read from the table at once.
const PAGE: u32 = 1024;

/// A neighbour whose queue is full; resolves to it and its session when there is room.
pub(super) type Waiting = Pin<Box<dyn Future<Output = (IpAddr, u32)> + Send>>;

impl State {
    /// What the table must know about a session.
    pub(super) fn rib_config(
        &self,
        address: IpAddr,
        running: &Running,
        up: &SessionUp,
    ) -> Arc<PeerConfig> {
        let exchange = &running.config.exchange;
        let negotiated = &up.negotiated;
        let (session_v4, session_v6) = match up.local.ip().to_canonical() {
            IpAddr::V4(v4) => (Some(v4), None),
            IpAddr::V6(v6) => (None, Some(NextHop::V6(v6))),
        };
        let scope = match up.remote {
            std::net::SocketAddr::V6(v6) => v6.scope_id(),
            std::net::SocketAddr::V4(_) => 0,
        };
        Arc::new(PeerConfig {
            codec: negotiated.codec,
            local_as: negotiated.local_as,
            remote_as: negotiated.remote_as,
            remote_id: negotiated.remote_id,
            remote_addr: address,
            scope,
            local_v4: session_v4.or(exchange.local_v4),
            local_v6: session_v6.or(exchange.local_v6),
            next_hop: exchange.next_hop,
            reflector_client: exchange.reflector_client,
            allow_own_as: exchange.allow_own_as,
            enforce_first_as: negotiated.codec.peer == PeerKind::Ebgp,
            long_lived: !negotiated.long_lived.is_empty(),
            enhanced_refresh: negotiated.enhanced_refresh,
            max_prefixes: exchange.max_prefixes,
            import: Arc::clone(&exchange.import),
            export: Arc::clone(&exchange.export),
        })
    }

    /// Originates the difference.
    pub(super) fn originate(
        &mut self,
        old: &BTreeMap<Prefix, LocalRoute>,
        new: &BTreeMap<Prefix, LocalRoute>,
    ) {
        for prefix in old.keys().filter(|p| !new.contains_key(p)) {
            self.rib.handle(RibInput::Retract(*prefix));
        }
        for (prefix, route) in new {
            if old.get(prefix) != Some(route) {
                self.rib.handle(RibInput::Originate(route.clone()));
            }
        }
    }

    /// Ends the batch: routes are selected, and everything that follows from it is done.
    pub(super) fn commit(&mut self) {
        loop {
            let (watch, unwatch) = self.rib.take_watches();
            self.watch(watch, &unwatch);
            let changes = self.rib.commit();
            for change in changes.best {
                self.best(change);
            }
            self.environment.sink.flush();
            for peer in changes.ready {
                let address = self.slots.get(&peer.slot).copied();
                let full = |a: &IpAddr| self.neighbours.get(a).is_some_and(|n| n.full);
                if let Some(address) = address.filter(|a| !full(a)) {
                    self.feed(address, peer.epoch);
                }
            }
            for peer in changes.over_limit {
                self.over_limit(peer);
            }
            if !self.watch(changes.watch, &changes.unwatch) {
                return self.end_restart();
            }
        }
    }

    /// Starts and ends the watch of gateways, and tells the table the state of the new ones. Whether there are any.
    fn watch(&mut self, watch: Vec<Gateway>, unwatch: &[Gateway]) -> bool {
        for gateway in unwatch {
            self.watched.remove(gateway);
        }
        if watch.is_empty() {
            return false;
        }
        for gateway in watch {
            let state = self.environment.reach.state(gateway);
            self.watched.insert(gateway, state);
            self.rib.handle(RibInput::NextHop { gateway, state });
        }
        self.recheck_at
            .get_or_insert_with(|| Instant::now() + RECHECK);
        true
    }

    /// Looks at all watched gateways again.
    pub(super) fn recheck(&mut self) {
        self.recheck_at = (!self.watched.is_empty()).then(|| Instant::now() + RECHECK);
        for (gateway, known) in &mut self.watched {
            let state = self.environment.reach.state(*gateway);
            if state != *known {
                tracing::info!(gateway = %gateway.addr, ?state, "reachability of a next hop changed");
                *known = state;
                self.rib.handle(RibInput::NextHop {
                    gateway: *gateway,
                    state,
                });
            }
        }
    }

    fn best(&mut self, change: BestChange) {
        if !self.environment.sink.takes_paths() {
            return;
        }
        let gateway = self.settings.host.static_routes.get(&change.prefix);
        let path = match gateway {
            Some(gateway) => Some(fixed(*gateway)),
            None => self.learned(&change),
        };
        self.environment.sink.set(change.prefix, path);
    }

    /// The path that the kernel gets, if there is one for it.
    fn learned(&self, change: &BestChange) -> Option<Path> {
        let best = change.best.as_ref()?;
        let learned = matches!(best.source, RouteSource::Bgp(_)) && !best.gateways.is_empty();
        if !learned || self.settings.host.not_programmed.covers(&change.prefix) {
            return None;
        }
        Some(Path {
            gateways: best.gateways.clone(),
            local_pref: best.local_pref,
            learned_from: change
                .learned_from
                .and_then(|slot| self.slots.get(&slot).copied()),
        })
    }

    /// Brings the kernel's side in line with new rules about it. The table is gone through only where service ranges changed.
    pub(super) fn apply_host_rules(&mut self, old: &HostRules) {
        let new = self.settings.host.clone();
        let mut concerned: BTreeSet<Prefix> = BTreeSet::new();
        for (prefix, gateway) in old.static_routes.iter().chain(&new.static_routes) {
            let same = |rules: &HostRules| rules.static_routes.get(prefix) == Some(gateway);
            if !(same(old) && same(&new)) {
                concerned.insert(*prefix);
            }
        }
        if old.not_programmed != new.not_programmed {
            for family in Family::SUPPORTED {
                let mut from = Some(0);
                while let Some(start) = from {
                    let (views, next) = self.rib.page(family, start, PAGE);
                    let moved = views.iter().map(|v| v.prefix).filter(|prefix| {
                        old.not_programmed.covers(prefix) != new.not_programmed.covers(prefix)
                    });
                    concerned.extend(moved);
                    from = next;
                }
            }
        }
        for prefix in concerned {
            let change = self.rib.best(&prefix);
            self.best(change);
        }
        self.environment.sink.flush();
    }

    /// Hands a neighbour what the table has for it, until there is nothing more or its queue is full.
    pub(super) fn feed(&mut self, address: IpAddr, epoch: u32) {
        let converged = self.restarter.converged();
        let Some(running) = self.neighbours.get_mut(&address) else {
            return;
        };
        if running.epoch != epoch {
            return;
        }
        running.full = false;
        let peer = running.id();
        let Some(live) = &running.live else { return };
        let mut more = true;
        while more {
            let Ok(permit) = live.routes.try_reserve() else {
                break;
            };
            let pull = self.rib.pull(peer, PORTION);
            more = pull.more;
            let messages =
                running
                    .end_of_rib
                    .pass(pull.messages, converged, &live.negotiated.codec);
            if messages.is_empty() {
                continue;
            }
            running.shown.updates_out += messages.len() as u64;
            permit.send(messages);
        }
        // End-of-RIB that was kept back comes after all routes.
        let mut due = running.end_of_rib.is_due(converged);
        if !more
            && due
            && let Ok(permit) = live.routes.try_reserve()
        {
            permit.send(
                running
                    .end_of_rib
                    .release(converged, &live.negotiated.codec),
            );
            due = false;
        }
        if !(more || due) || live.routes.is_closed() {
            return;
        }
        running.full = true;
        let routes = live.routes.clone();
        self.waiting.push(Box::pin(async move {
            // The permit is given back: only the room counts.
            let _ = routes.reserve().await;
            (address, epoch)
        }));
    }

    fn over_limit(&mut self, peer: PeerId) {
        let Some(address) = self.slots.get(&peer.slot) else {
            return;
        };
        let Some(running) = self.neighbours.get(address) else {
            return;
        };
        warn!(peer = %address, "more prefixes than allowed: the session ends");
        self.command(
            running,
            Command::Reset(Notification::new(ErrorCode::Cease, cease::MAX_PREFIXES)),
        );
    }
}

/// A route that the configuration gives.
fn fixed(gateway: IpAddr) -> Path {
    Path {
        gateways: vec![Gateway {
            addr: gateway,
            scope: 0,
        }],
        local_pref: DEFAULT_LOCAL_PREF,
        learned_from: None,
    }
}
