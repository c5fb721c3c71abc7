//! What the kernel is to hold, what it holds, and the steps between: rows and nexthop objects together.
//!
//! Pure; [`crate::writer`] carries the steps out. One turn is: [`Program::plan_routes`], apply those that
//! [stand alone](Step::stands_alone), [`Program::plan_nexthops`], apply, apply the other routes,
//! [`Program::retire_nexthops`], [`Program::plan_nexthops`] again. So an object is there before the first route that
//! names it, and goes after the last.
//!
//! Fail static: what an earlier incarnation left is held as it is until the part that supplies it says that it has
//! told everything ([`Program::release`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use cali_api::Cidr;
use cali_netlink::reconcile::{Drift, Op};
use cali_netlink::route::TABLE_LOCAL;
use cali_netlink::{IfIndex, Nexthop, NexthopTarget, Reconciler, Route, RouteKey, Target};

use crate::nexthops::{NexthopIds, is_ours};
use crate::render::{Devices, KernelSettings, Waiting, anchors, render, same_way};
use crate::table::{Selected, Way};

/// Which of the held routes are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// Workload and IPAM-derived routes: until the datastore is in sync.
    Datastore,
    /// Routes that BGP supplied, of one family: until bgpd's end of sync, and until the datastore is in sync.
    Bgp {
        /// IPv4 or IPv6.
        v4: bool,
    },
}

/// What to do with one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make it where nothing is.
    Add(Route),
    /// Put it in the place of a row of ours.
    Replace(Route),
    /// Remove a row of ours.
    Delete(Route),
    /// Somebody else's row is in the place.
    Refuse(Route),
}

impl Step {
    /// Whether it makes a row that needs nothing else. Such rows come first: nexthop objects may stand on them.
    #[must_use]
    pub const fn stands_alone(&self) -> bool {
        match self {
            Self::Add(route) | Self::Replace(route) => !matches!(route.target, Target::Nexthop(_)),
            Self::Delete(_) | Self::Refuse(_) => false,
        }
    }
}

/// Knowledge of what is ours, shared with the reconcilers' predicates.
#[derive(Debug, Default)]
struct Ours {
    /// Pools and blocks that we hold.
    prefixes: Vec<Cidr>,
    /// Rows that this process wrote, or found as it would have written them.
    written: BTreeSet<RouteKey>,
    /// While adopting, everything with our protocols is looked at (and held, never changed).
    adopting: bool,
    protocols: [u8; 2],
}

impl Ours {
    /// docs/architecture.md §5: protocol AND (nexthop id in our range, or prefix within a pool, block or announced set).
    fn claims(&self, key: &RouteKey, route: &Route) -> bool {
        let object = matches!(route.target, Target::Nexthop(id) if is_ours(id));
        let within = || {
            self.prefixes.iter().any(|pool| {
                pool.contains(key.prefix.ip()) && pool.prefix_len() <= key.prefix.prefix()
            })
        };
        // Nobody else writes rows of ours into that table.
        let local = route.table == TABLE_LOCAL;
        self.protocols.contains(&route.protocol)
            && (self.adopting || local || object || self.written.contains(key) || within())
    }
}

#[derive(Debug)]
struct Placed {
    selected: Selected,
    /// What it has in the kernel, or what is waited for.
    row: Result<Row, Waiting>,
}

/// A row and what it stands on.
#[derive(Debug)]
struct Row {
    key: RouteKey,
    /// Ids of the nexthop objects.
    objects: Vec<u32>,
    /// See [`crate::render::anchors`].
    anchors: Vec<RouteKey>,
}

/// See the module's head.
#[derive(Debug)]
pub struct Program {
    settings: KernelSettings,
    devices: Devices,
    ids: NexthopIds,
    routes: Reconciler<RouteKey, Route>,
    nexthops: Reconciler<u32, Nexthop>,
    placed: BTreeMap<Cidr, Placed>,
    /// Placed prefixes whose device is not there.
    waiting: BTreeSet<Cidr>,
    uses: BTreeMap<u32, usize>,
    /// Anchors, with the number of rows that stand on each.
    anchors: BTreeMap<RouteKey, usize>,
    retiring: BTreeSet<u32>,
    held: BTreeMap<RouteKey, Hold>,
    released: BTreeSet<Hold>,
    ours: Arc<Mutex<Ours>>,
}

impl Program {
    /// A program that has not seen the kernel yet.
    #[must_use]
    pub fn new(settings: KernelSettings) -> Self {
        let ours = Arc::new(Mutex::new(Ours {
            adopting: true,
            protocols: [settings.protocol, settings.bgp_protocol],
            ..Ours::default()
        }));
        let owner = ours.clone();
        let routes = Reconciler::new(move |key, route| {
            owner
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .claims(key, route)
        });
        Self {
            settings,
            devices: Devices::new(),
            ids: NexthopIds::default(),
            routes,
            nexthops: Reconciler::new(|id, _| is_ours(*id)),
            placed: BTreeMap::new(),
            waiting: BTreeSet::new(),
            uses: BTreeMap::new(),
            anchors: BTreeMap::new(),
            retiring: BTreeSet::new(),
            held: BTreeMap::new(),
            released: BTreeSet::new(),
            ours,
        }
    }

    /// How rows are written.
    #[must_use]
    pub const fn settings(&self) -> &KernelSettings {
        &self.settings
    }

    /// The kernel has no nexthop objects: everything is written without them from now on.
    pub fn do_without_nexthop_objects(&mut self) {
        if !self.settings.nexthop_objects {
            return;
        }
        self.settings.nexthop_objects = false;
        self.nexthops.set_desired([]);
        self.uses.clear();
        self.replace_where(|_| true);
    }

    /// Gives the routes to workloads an MTU of their own, or takes it away.
    pub fn set_workload_mtu(&mut self, mtu: Option<u32>) {
        if self.settings.workload_mtu != mtu {
            self.settings.workload_mtu = mtu;
            self.replace_where(|selected| matches!(selected.way, Way::Device { .. }));
        }
    }

    /// Replaces the prefixes that are ours by right: pools.
    pub fn set_prefixes(&mut self, prefixes: Vec<Cidr>) {
        if self.lock().prefixes == prefixes {
            return;
        }
        self.lock().prefixes = prefixes;
        // Whether a gateway needs an anchor depends on them.
        self.replace_where(|selected| match &selected.way {
            Way::Gateways(gateways) => gateways.iter().any(|gateway| gateway.address.is_ipv6()),
            Way::Blackhole | Way::Local | Way::Device { .. } => false,
        });
    }

    /// Replaces the devices that are up. Rows over others wait.
    pub fn set_devices(&mut self, devices: Devices) {
        if self.devices == devices {
            return;
        }
        let before = std::mem::replace(&mut self.devices, devices);
        let changed: BTreeSet<Arc<str>> = before
            .keys()
            .chain(self.devices.keys())
            .filter(|name| before.get(*name) != self.devices.get(*name))
            .cloned()
            .collect();
        self.replace_where(|selected| {
            selected
                .way
                .devices()
                .any(|device| changed.contains(device))
        });
    }

    /// The devices that are up.
    #[must_use]
    pub const fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Takes in the first dump and holds what it shows.
    pub fn adopt(&mut self, routes: Vec<Route>, nexthops: Vec<Nexthop>, now: Instant) {
        for nexthop in &nexthops {
            self.ids.adopt(nexthop);
            if is_ours(nexthop.id) {
                self.nexthops.desire(nexthop.id, nexthop.clone());
                self.retiring.insert(nexthop.id);
            }
        }
        self.nexthops.on_dump(
            nexthops.into_iter().map(|nexthop| (nexthop.id, nexthop)),
            now,
        );
        self.routes
            .on_dump(routes.into_iter().map(|route| (route.key(), route)), now);
        let seen: Vec<_> = self
            .routes
            .all_observed()
            .map(|(k, r)| (*k, r.clone()))
            .collect();
        for (key, route) in seen {
            let hold = if route.protocol == self.settings.bgp_protocol {
                Hold::Bgp {
                    v4: key.prefix.is_ipv4(),
                }
            } else {
                Hold::Datastore
            };
            if self.routes.desired(&key).is_none() && !self.is_released(hold) {
                self.routes.desire(key, route);
                self.held.insert(key, hold);
            }
        }
        self.lock().adopting = false;
    }

    /// BGP's paths are not placed before the datastore has told everything, so that nothing may go before.
    fn is_released(&self, hold: Hold) -> bool {
        self.released.contains(&hold) && self.released.contains(&Hold::Datastore)
    }

    /// The supplier has told everything: what is still only held goes, if it is ours.
    pub fn release(&mut self, hold: Hold) {
        self.released.insert(hold);
        let gone: Vec<RouteKey> = self
            .held
            .iter()
            .filter(|(_, held)| self.is_released(**held))
            .map(|(key, _)| *key)
            .collect();
        for key in gone {
            self.held.remove(&key);
            self.routes.undesire(&key);
        }
    }

    /// Rows that are held from an earlier incarnation.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Sets or removes the route of a prefix.
    pub fn place(&mut self, prefix: Cidr, selected: Option<Selected>) {
        let before = self.placed.remove(&prefix);
        self.waiting.remove(&prefix);
        let old_key = before
            .as_ref()
            .and_then(|placed| Some(placed.row.as_ref().ok()?.key));
        let mut new_key = None;
        if let Some(selected) = selected {
            let rendered = render(
                &prefix,
                &selected,
                &self.settings,
                &self.devices,
                &mut self.ids,
            );
            let anchors = anchors(
                &selected,
                &self.settings,
                &self.devices,
                &self.lock().prefixes,
            );
            let row = rendered.map(|rendered| {
                let key = rendered.route.key();
                let anchors = anchors.into_iter().map(|row| self.drop_anchor(row));
                let anchors = anchors.collect();
                for nexthop in &rendered.nexthops {
                    *self.uses.entry(nexthop.id).or_default() += 1;
                    self.retiring.remove(&nexthop.id);
                    self.nexthops.desire(nexthop.id, nexthop.clone());
                }
                self.held.remove(&key);
                if self.routes.observed(&key) == Some(&rendered.route) {
                    self.lock().written.insert(key);
                }
                self.routes.desire(key, rendered.route);
                new_key = Some(key);
                Row {
                    key,
                    objects: rendered.nexthops.iter().map(|nexthop| nexthop.id).collect(),
                    anchors,
                }
            });
            if row.is_err() {
                self.waiting.insert(prefix);
            }
            self.placed.insert(prefix, Placed { selected, row });
        }
        if let Some(old) = old_key
            && Some(old) != new_key
        {
            self.routes.undesire(&old);
        }
        if let Some(Placed { row: Ok(row), .. }) = before {
            for id in row.objects {
                self.unuse(id);
            }
            for key in row.anchors {
                self.weigh_anchor(&key);
            }
        }
    }

    /// The next steps for nexthop objects; sets come in id order, so members precede groups.
    pub fn plan_nexthops(&mut self, now: Instant) -> Vec<Op<u32, Nexthop>> {
        if self.settings.nexthop_objects || self.nexthops.all_observed().next().is_some() {
            self.nexthops.plan(now)
        } else {
            Vec::new()
        }
    }

    /// Reports the result of one nexthop step.
    pub fn on_nexthop_result<E: std::fmt::Display>(
        &mut self,
        op: &Op<u32, Nexthop>,
        result: Result<(), E>,
        now: Instant,
    ) {
        if result.is_ok()
            && let Op::Delete { key, .. } = op
            && !self.uses.contains_key(key)
        {
            self.ids.release(*key);
        }
        self.nexthops.on_result(op, result, now);
    }

    /// The next steps for rows.
    pub fn plan_routes(&mut self, now: Instant) -> Vec<(Op<RouteKey, Route>, Step)> {
        let ops = self.routes.plan(now);
        let protocols = [self.settings.protocol, self.settings.bgp_protocol];
        let ours = self.lock();
        let step = |op: &Op<RouteKey, Route>| match op {
            // Where we have written before, whoever has put something else there has changed an object of ours.
            Op::Set { key, value, .. } if ours.written.contains(key) => {
                Step::Replace(value.clone())
            }
            Op::Set {
                value, old: None, ..
            } => Step::Add(value.clone()),
            Op::Set {
                value,
                old: Some(old),
                ..
            } => {
                if protocols.contains(&old.protocol) || same_way(value, old) {
                    Step::Replace(value.clone())
                } else {
                    Step::Refuse(old.clone())
                }
            }
            Op::Delete { old, .. } => Step::Delete(old.clone()),
        };
        let steps: Vec<Step> = ops.iter().map(step).collect();
        ops.into_iter().zip(steps).collect()
    }

    /// Reports the result of one row's step.
    pub fn on_route_result<E: std::fmt::Display>(
        &mut self,
        op: &Op<RouteKey, Route>,
        result: Result<(), E>,
        now: Instant,
    ) {
        if result.is_ok() {
            match op {
                Op::Set { key, .. } => self.lock().written.insert(*key),
                Op::Delete { key, .. } => self.lock().written.remove(key),
            };
        }
        self.routes.on_result(op, result, now);
    }

    /// Gives up the objects that no route names any more, in the kernel or in the wish.
    pub fn retire_nexthops(&mut self) {
        if self.retiring.is_empty() {
            return;
        }
        let mut named: BTreeSet<u32> = self
            .routes
            .all_observed()
            .filter_map(|(_, route)| match route.target {
                Target::Nexthop(id) => Some(id),
                _ => None,
            })
            .collect();
        for (id, nexthop) in self.nexthops.all_observed() {
            if let NexthopTarget::Group(members) = &nexthop.target
                && named.contains(id)
            {
                named.extend(members.iter().map(|(member, _)| *member));
            }
        }
        let gone: Vec<u32> = self.retiring.difference(&named).copied().collect();
        for id in gone {
            self.retiring.remove(&id);
            if self.nexthops.undesire(&id).is_none() || self.nexthops.observed(&id).is_none() {
                self.ids.release(id);
            }
        }
    }

    /// Takes in one notification about a row.
    pub fn on_route_event(
        &mut self,
        route: Route,
        present: bool,
        now: Instant,
    ) -> Option<Drift<RouteKey, Route>> {
        let key = route.key();
        if !present {
            // Another row of the same key may go without ours being touched (another protocol's).
            let believed = self.routes.observed(&key)?;
            if believed.protocol != route.protocol {
                return None;
            }
        }
        self.routes.on_observed(&key, present.then_some(route), now)
    }

    /// Takes in one notification about a nexthop object. Its end takes all routes with it, without their own events.
    pub fn on_nexthop_event(
        &mut self,
        nexthop: Nexthop,
        present: bool,
        now: Instant,
    ) -> Option<Drift<u32, Nexthop>> {
        let id = nexthop.id;
        if !is_ours(id) {
            return None;
        }
        if !present {
            for key in self.keys_with(|route| route.target == Target::Nexthop(id)) {
                self.routes.on_observed(&key, None, now);
            }
        }
        self.nexthops
            .on_observed(&id, present.then_some(nexthop), now)
    }

    /// Takes in all nexthop objects. Those that went without a word went with their device (their deletion by somebody is told): that is no
    /// fight.
    pub fn on_nexthop_dump(
        &mut self,
        nexthops: Vec<Nexthop>,
        now: Instant,
    ) -> Vec<Drift<u32, Nexthop>> {
        let drifts = self.nexthops.on_dump(
            nexthops.into_iter().map(|nexthop| (nexthop.id, nexthop)),
            now,
        );
        for drift in &drifts {
            if let Drift::Missing { key } = drift {
                self.nexthops.start_over(key);
            }
        }
        drifts
    }

    /// Takes in all rows of our protocols.
    pub fn on_route_dump(
        &mut self,
        routes: Vec<Route>,
        now: Instant,
    ) -> Vec<Drift<RouteKey, Route>> {
        self.routes
            .on_dump(routes.into_iter().map(|route| (route.key(), route)), now)
    }

    /// Takes in the rows of our protocols over one device, of which the state or an address has changed. What is missing went
    /// with that: it is no fight.
    pub fn on_device_dump(
        &mut self,
        device: IfIndex,
        routes: Vec<Route>,
        now: Instant,
    ) -> Vec<Drift<RouteKey, Route>> {
        let mut seen: BTreeMap<RouteKey, Route> = routes
            .into_iter()
            .map(|route| (route.key(), route))
            .collect();
        let mut keys: BTreeSet<RouteKey> = seen.keys().copied().collect();
        keys.extend(self.keys_with(|route| self.goes_over(route, device)));
        let drifts: Vec<_> = keys
            .iter()
            .filter_map(|key| self.routes.on_observed(key, seen.remove(key), now))
            .collect();
        for key in &keys {
            self.routes.start_over(key);
        }
        drifts
    }

    /// When something is due again that failed or is fought over.
    #[must_use]
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        [self.routes.next_due(now), self.nexthops.next_due(now)]
            .into_iter()
            .flatten()
            .min()
    }

    /// The rows of the kernel, as far as we know.
    #[must_use]
    pub const fn routes(&self) -> &Reconciler<RouteKey, Route> {
        &self.routes
    }

    /// Whether the selected route of a prefix is in the kernel.
    ///
    /// # Errors
    /// The reason why it is not.
    pub fn state_of(&self, prefix: &Cidr) -> Result<(), String> {
        let Some(placed) = self.placed.get(prefix) else {
            return Err("no route is selected".into());
        };
        let key = &placed.row.as_ref().map_err(ToString::to_string)?.key;
        if self.routes.desired(key) == self.routes.observed(key) {
            return Ok(());
        }
        let failure = self.routes.quarantine_of(key);
        Err(failure.map_or_else(|| "being written".into(), |failure| failure.reason.clone()))
    }

    /// Selected routes that wait for their device, with the reason.
    pub fn waiting(&self) -> impl Iterator<Item = (Cidr, String)> + '_ {
        self.waiting.iter().filter_map(|prefix| {
            let waiting = self.placed.get(prefix)?.row.as_ref().err()?;
            Some((*prefix, waiting.to_string()))
        })
    }

    /// The device that a selected route waits for.
    #[must_use]
    pub fn missing_device(&self, prefix: &Cidr) -> Option<Arc<str>> {
        match self.placed.get(prefix)?.row.as_ref().err()? {
            Waiting::Device(device) => Some(device.clone()),
            Waiting::Ids(_) => None,
        }
    }

    /// Devices and gateways of the rows in the kernel: what must not be taken away from under them.
    pub fn gateways_in_use(&self) -> impl Iterator<Item = (IfIndex, std::net::IpAddr)> + '_ {
        self.nexthops
            .all_observed()
            .filter_map(|(_, nexthop)| match nexthop.target {
                NexthopTarget::Gateway { gateway, oif, .. } => Some((oif, gateway)),
                _ => None,
            })
    }

    fn goes_over(&self, route: &Route, device: IfIndex) -> bool {
        match &route.target {
            Target::None => false,
            Target::Hop(hop) => hop.oif == Some(device),
            Target::Multipath(hops) => hops.iter().any(|hop| hop.oif == Some(device)),
            Target::Nexthop(id) => self.object_over(*id, device),
        }
    }

    fn object_over(&self, id: u32, device: IfIndex) -> bool {
        match self.ids.target(id) {
            Some(NexthopTarget::Gateway { oif, .. } | NexthopTarget::Device { oif, .. }) => {
                *oif == device
            }
            Some(NexthopTarget::Group(members)) => members
                .iter()
                .any(|(member, _)| *member != id && self.object_over(*member, device)),
            _ => false,
        }
    }

    fn keys_with(&self, wanted: impl Fn(&Route) -> bool) -> Vec<RouteKey> {
        self.routes
            .all_observed()
            .filter(|(_, route)| wanted(route))
            .map(|(key, _)| *key)
            .collect()
    }

    fn unuse(&mut self, id: u32) {
        if let Some(count) = self.uses.get_mut(&id) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.uses.remove(&id);
                self.retiring.insert(id);
            }
        }
    }

    fn drop_anchor(&mut self, anchor: Route) -> RouteKey {
        let key = anchor.key();
        *self.anchors.entry(key).or_default() += 1;
        self.held.remove(&key);
        self.routes.desire(key, anchor);
        key
    }

    fn weigh_anchor(&mut self, key: &RouteKey) {
        if let Some(count) = self.anchors.get_mut(key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.anchors.remove(key);
                self.routes.undesire(key);
            }
        }
    }

    fn replace_where(&mut self, wanted: impl Fn(&Selected) -> bool) {
        let again: Vec<(Cidr, Selected)> = self
            .placed
            .iter()
            .filter(|(_, placed)| wanted(&placed.selected))
            .map(|(prefix, placed)| (*prefix, placed.selected.clone()))
            .collect();
        for (prefix, selected) in again {
            self.place(prefix, Some(selected));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ours> {
        self.ours.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
