//! The graph: objects in, batches out.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;
use std::sync::Arc;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::v3::{FelixConfigurationSpec, WorkloadEndpoint};
use cali_api::{AnyResource, Cidr, Key, Kind, NodeName, StringMap};
use foldhash::HashMap;

use super::asks::Asks;
use super::ipsets::IpSets;
use super::local::{Decided, Local};
use super::output::{Batch, Delta, Endpoint, HostEndpoint, IpSetId, PoolNat, Rules};
use super::rules::{Resolved, SetSpec, resolve};
use super::tunnel_peers::PeerIndex;
use super::{Input, items};

/// Rules that consumers have, and the sets that they hold.
struct Active {
    rules: Arc<Rules>,
    sets: Vec<(IpSetId, SetSpec)>,
    problems: Vec<String>,
}

impl Active {
    fn is_complete(&self, sets: &IpSets) -> bool {
        self.sets.iter().all(|(id, _)| sets.is_complete(id))
    }

    fn release(&self, sets: &mut IpSets) {
        self.sets.iter().for_each(|(id, _)| sets.release(id));
    }
}

/// Policies or profiles: who uses them, and what of them consumers have.
struct Usage<K> {
    users: HashMap<K, usize>,
    active: HashMap<K, Active>,
    dirty: BTreeSet<K>,
    /// What takes the place of the active, once its sets are complete.
    next: BTreeMap<K, Active>,
    /// Active, and used by nobody any more.
    unused: BTreeSet<K>,
}

impl<K: Ord + Hash> Usage<K> {
    /// Whether consumers have it, or can be given it.
    fn is_ready(&self, key: &K, sets: &IpSets) -> bool {
        self.active.contains_key(key)
            || self
                .next
                .get(key)
                .is_some_and(|next| next.is_complete(sets))
    }
}

impl<K> Default for Usage<K> {
    fn default() -> Self {
        Self {
            users: HashMap::default(),
            active: HashMap::default(),
            dirty: BTreeSet::new(),
            next: BTreeMap::new(),
            unused: BTreeSet::new(),
        }
    }
}

/// What this node must enforce, kept up to date update by update.
pub struct Graph {
    node: NodeName,
    in_sync: bool,
    sequence: u64,
    local: Local,
    sets: IpSets,
    announced: BTreeMap<Key, Arc<WorkloadEndpoint>>,
    stored: HashMap<Key, Arc<AnyResource>>,
    profiles: HashMap<Arc<str>, Arc<AnyResource>>,
    pools: BTreeMap<Key, PoolNat>,
    service_nets: Arc<[Cidr]>,
    tunnel_peers: PeerIndex,
    configurations: BTreeMap<Key, Arc<AnyResource>>,
    /// What consumers have been told of.
    endpoints: HashMap<Key, Arc<Endpoint>>,
    hosts: HashMap<Key, Arc<HostEndpoint>>,
    /// What they are to be told instead, once all of its policies are active.
    next: BTreeMap<Key, Decided>,
    policy_usage: Usage<Key>,
    profile_usage: Usage<Arc<str>>,
    settings_dirty: bool,
    pools_dirty: bool,
    services_dirty: bool,
    /// Policies whose last version could not be used at all.
    refused: BTreeMap<Key, String>,
}

impl Graph {
    /// A graph for the endpoints of `node`.
    pub fn new(node: NodeName) -> Self {
        Self {
            node,
            in_sync: false,
            sequence: 0,
            local: Local::default(),
            sets: IpSets::default(),
            announced: BTreeMap::new(),
            stored: HashMap::default(),
            profiles: HashMap::default(),
            pools: BTreeMap::new(),
            service_nets: Arc::default(),
            tunnel_peers: PeerIndex::default(),
            configurations: BTreeMap::new(),
            endpoints: HashMap::default(),
            hosts: HashMap::default(),
            next: BTreeMap::new(),
            policy_usage: Usage::default(),
            profile_usage: Usage::default(),
            settings_dirty: true,
            pools_dirty: true,
            services_dirty: false,
            refused: BTreeMap::new(),
        }
    }

    /// A graph that is told of other nodes' endpoints as it [asks](Self::take_wanted) for them.
    pub fn asking(node: NodeName) -> Self {
        let mut graph = Self::new(node);
        graph.sets.asks = Asks::scoped();
        graph
    }

    /// What is asked for of other nodes' endpoints, by selector, and its number, when that has changed by the last [`Self::flush`]. It
    /// is answered with [`SyncEvent::Complete`].
    pub fn take_wanted(&mut self) -> Option<(u64, BTreeSet<Arc<str>>)> {
        if self.in_sync {
            self.sets.asks.take()
        } else {
            None
        }
    }

    /// Whether anything waits for endpoints that are asked for.
    pub fn is_waiting(&self) -> bool {
        let held = !self.policy_usage.next.is_empty() || !self.profile_usage.next.is_empty();
        held || !self.next.is_empty()
    }

    /// Whatever waits for endpoints that are asked for: policies, profiles, and endpoints that use them.
    pub fn waiting(&self) -> BTreeSet<Key> {
        let policies = self.policy_usage.next.keys().cloned();
        let profiles = self.profile_usage.next.keys();
        let profiles = profiles.map(|name| Key::cluster(Kind::Profile, name.clone()));
        policies
            .chain(profiles)
            .chain(self.next.keys().cloned())
            .collect()
    }

    /// Endpoints of this node that consumers have not been told of, because a policy of theirs is held back.
    pub fn held_back(&self) -> impl Iterator<Item = (&Key, &Endpoint)> {
        self.next.iter().filter_map(|(id, decided)| match decided {
            Decided::Workload(endpoint) if !self.endpoints.contains_key(id) => Some((id, endpoint)),
            _ => None,
        })
    }

    /// Takes one input in. Nothing comes out before [`Self::flush`].
    pub fn handle(&mut self, input: Input) {
        match input {
            Input::Sync(SyncEvent::Status(status)) => self.in_sync |= status == SyncStatus::InSync,
            Input::Sync(SyncEvent::Complete(number)) => self.sets.asks.on_complete(number),
            Input::Sync(SyncEvent::Updates(updates)) => updates
                .into_iter()
                .for_each(|update| self.on_update(update)),
            Input::Announce(key, endpoint) => {
                match endpoint {
                    Some(endpoint) => self.announced.insert(key.clone(), endpoint),
                    None => self.announced.remove(&key),
                };
                let stored = self.stored.get(&key).cloned();
                self.on_workload(&key, stored.as_deref());
            }
        }
    }

    /// Takes one object's new state in.
    pub fn on_update(&mut self, update: Update) {
        let Update { key, value, .. } = update;
        self.refused.remove(&key);
        match key.kind {
            Kind::WorkloadEndpoint => {
                // Of other nodes' endpoints only what the sets need is kept.
                match &value {
                    Some(value) if self.is_here(value) => {
                        self.stored.insert(key.clone(), value.clone())
                    }
                    _ => self.stored.remove(&key),
                };
                self.on_workload(&key, value.as_deref());
            }
            Kind::HostEndpoint | Kind::NetworkSet | Kind::GlobalNetworkSet => {
                self.on_item(&key, value.as_deref())
            }
            Kind::K8sEndpointSlice => {
                let slice = match value.as_deref() {
                    Some(AnyResource::K8sEndpointSlice(slice)) => Some(&**slice),
                    _ => None,
                };
                self.sets.set_slice(&key, slice);
            }
            Kind::NetworkPolicy | Kind::GlobalNetworkPolicy => self.on_policy(key, value.as_ref()),
            Kind::Profile => self.on_profile(key, value),
            Kind::Tier => {
                let tier = match value.as_deref() {
                    Some(AnyResource::Tier(tier)) => {
                        Some((tier.spec.order, tier.spec.end_action()))
                    }
                    _ => None,
                };
                self.local.set_tier(&key.name, tier);
            }
            Kind::Node => {
                let node = match value.as_deref() {
                    Some(AnyResource::Node(node)) => Some(&**node),
                    _ => None,
                };
                let here = *key.name == *self.node.as_str();
                self.tunnel_peers.set_node(key, node, here);
            }
            Kind::IPPool => {
                match value.as_deref() {
                    Some(AnyResource::IPPool(pool)) => {
                        self.tunnel_peers.set_pool(key.clone(), Some(pool));
                        let nat = PoolNat {
                            cidr: pool.spec.cidr,
                            nat_outgoing: pool.spec.nat_outgoing,
                        };
                        self.pools.insert(key, nat);
                    }
                    _ => {
                        self.tunnel_peers.set_pool(key.clone(), None);
                        self.pools.remove(&key);
                    }
                }
                self.pools_dirty = true;
            }
            Kind::BGPConfiguration if &*key.name == "default" => {
                let nets = items::service_nets(value.as_deref());
                self.services_dirty |= self.service_nets != nets;
                self.service_nets = nets;
            }
            Kind::FelixConfiguration => {
                match value {
                    Some(value) => self.configurations.insert(key, value),
                    None => self.configurations.remove(&key),
                };
                self.settings_dirty = true;
            }
            _ => {}
        }
    }

    /// What cannot be used of the objects that this node needs, by object.
    pub fn problems(&self) -> BTreeMap<Key, Vec<String>> {
        let mut all: BTreeMap<Key, Vec<String>> = BTreeMap::new();
        for (key, problem) in &self.refused {
            all.entry(key.clone()).or_default().push(problem.clone());
        }
        let policies = self
            .policy_usage
            .active
            .iter()
            .map(|(key, active)| (key.clone(), active));
        let profiles = self.profile_usage.active.iter();
        let profiles =
            profiles.map(|(name, active)| (Key::cluster(Kind::Profile, name.clone()), active));
        for (key, active) in policies
            .chain(profiles)
            .filter(|(_, active)| !active.problems.is_empty())
        {
            all.entry(key)
                .or_default()
                .extend(active.problems.iter().cloned());
        }
        all
    }

    /// Numbers of local endpoints, active policies, all policies and sets.
    pub fn sizes(&self) -> [usize; 4] {
        [
            self.endpoints.len(),
            self.policy_usage.active.len(),
            self.local.policies(),
            self.sets.len(),
        ]
    }

    /// The changes since the last flush; `None` without any, and before the datastore is in sync and what is asked for first is here.
    pub fn flush(&mut self) -> Option<Batch> {
        if !self.in_sync {
            return None;
        }
        let (mut endpoints_gone, mut hosts_gone) = (Vec::new(), Vec::new());
        self.stage_endpoints(&mut endpoints_gone, &mut hosts_gone);
        self.prepare();
        if !self.sets.asks.has_begun() {
            return None;
        }
        let mut deltas = Vec::new();
        if std::mem::take(&mut self.settings_dirty) {
            self.tunnel_peers.touch();
            deltas.push(Delta::Settings(Arc::new(self.settings())));
        }
        if self.tunnel_peers.is_dirty() {
            let settings = self.settings();
            deltas.extend(self.tunnel_peers.take(&settings).map(Delta::TunnelPeers));
        }
        if std::mem::take(&mut self.pools_dirty) {
            let mut pools: Vec<PoolNat> = self.pools.values().copied().collect();
            pools.sort_unstable();
            deltas.push(Delta::Pools(pools.into()));
        }
        if std::mem::take(&mut self.services_dirty) {
            deltas.push(Delta::ServiceNets(self.service_nets.clone()));
        }
        let endpoints = self.tell_endpoints();
        // What the former endpoints alone used is not needed any more.
        self.prepare();
        let policies = promote(&mut self.policy_usage, &mut self.sets);
        let profiles = promote(&mut self.profile_usage, &mut self.sets);
        let policies_gone = retire(&mut self.policy_usage, &mut self.sets);
        let profiles_gone = retire(&mut self.profile_usage, &mut self.sets);
        let (sets, sets_gone) = self.sets.take();
        deltas.extend(sets);
        deltas.extend(
            policies
                .into_iter()
                .map(|(id, rules)| Delta::Policy { id, rules }),
        );
        deltas.extend(
            profiles
                .into_iter()
                .map(|(name, rules)| Delta::Profile { name, rules }),
        );
        deltas.extend(endpoints);
        deltas.extend(
            endpoints_gone
                .into_iter()
                .map(|id| Delta::EndpointRemove { id }),
        );
        deltas.extend(
            hosts_gone
                .into_iter()
                .map(|id| Delta::HostEndpointRemove { id }),
        );
        deltas.extend(
            profiles_gone
                .into_iter()
                .map(|name| Delta::ProfileRemove { name }),
        );
        deltas.extend(
            policies_gone
                .into_iter()
                .map(|id| Delta::PolicyRemove { id }),
        );
        deltas.extend(sets_gone);
        let first = self.sequence == 0;
        if deltas.is_empty() && !first {
            return None;
        }
        self.sequence += 1;
        Some(Batch {
            sequence: self.sequence,
            in_sync: first,
            deltas,
        })
    }

    /// Everything that the batches so far add up to, as one batch: for a consumer that starts now. To be asked right
    /// after [`Self::flush`], when nothing is open.
    pub fn whole(&self) -> Batch {
        let mut pools: Vec<PoolNat> = self.pools.values().copied().collect();
        pools.sort_unstable();
        let mut deltas = vec![
            Delta::Settings(Arc::new(self.settings())),
            Delta::Pools(pools.into()),
            Delta::ServiceNets(self.service_nets.clone()),
        ];
        deltas.extend(self.tunnel_peers.told().map(Delta::TunnelPeers));
        deltas.extend(self.sets.whole());
        let policies = self.policy_usage.active.iter();
        deltas.extend(policies.map(|(id, active)| Delta::Policy {
            id: id.clone(),
            rules: active.rules.clone(),
        }));
        let profiles = self.profile_usage.active.iter();
        deltas.extend(profiles.map(|(name, active)| Delta::Profile {
            name: name.clone(),
            rules: active.rules.clone(),
        }));
        let endpoints = self.endpoints.iter();
        deltas.extend(endpoints.map(|(id, endpoint)| Delta::Endpoint {
            id: id.clone(),
            endpoint: endpoint.clone(),
        }));
        let hosts = self.hosts.iter();
        deltas.extend(hosts.map(|(id, endpoint)| Delta::HostEndpoint {
            id: id.clone(),
            endpoint: endpoint.clone(),
        }));
        Batch {
            sequence: self.sequence,
            in_sync: true,
            deltas,
        }
    }

    fn is_here(&self, value: &AnyResource) -> bool {
        matches!(value, AnyResource::WorkloadEndpoint(endpoint) if endpoint.spec.node == self.node.as_str())
    }

    fn on_workload(&mut self, key: &Key, stored: Option<&AnyResource>) {
        let stored = match stored {
            Some(AnyResource::WorkloadEndpoint(stored)) => Some(&**stored),
            _ => None,
        };
        let announced = self.announced.get(key);
        let Some(object) = stored.or(announced.map(Arc::as_ref)) else {
            self.sets.remove_item(key);
            self.local.remove_endpoint(key);
            return;
        };
        // The announcement was made by whoever plugged the interface in.
        let place = announced.map_or(&object.spec, |announced| &announced.spec);
        let here = place.node == self.node.as_str() && !place.interface_name.is_empty();
        let local = here.then(|| items::local_workload(object, place));
        let found = items::workload(key, object, place);
        match local {
            Some(local) => self.local.set_endpoint(key, pairs(&found.labels), local),
            None => self.local.remove_endpoint(key),
        }
        self.sets
            .set_item(key, pairs(&found.labels), &found.parents, found.item);
    }

    /// What has addresses but is no workload. Host endpoints of this node have policy, too.
    fn on_item(&mut self, key: &Key, value: Option<&AnyResource>) {
        let local = match value {
            Some(AnyResource::HostEndpoint(host)) if host.spec.node == self.node.as_str() => {
                items::local_host(&host.spec)
            }
            _ => None,
        };
        let found = items::other(key, value);
        match (&found, local) {
            (Some(found), Some(local)) => self.local.set_endpoint(key, pairs(&found.labels), local),
            _ => self.local.remove_endpoint(key),
        }
        match found {
            Some(found) => {
                self.sets
                    .set_item(key, pairs(&found.labels), &found.parents, found.item);
            }
            None => self.sets.remove_item(key),
        }
    }

    fn on_policy(&mut self, key: Key, value: Option<&Arc<AnyResource>>) {
        match value {
            Some(value) => match self.local.set_policy(&key, value) {
                Ok(()) => {
                    self.policy_usage.dirty.insert(key);
                }
                Err(problem) => {
                    self.refused.insert(key, problem);
                }
            },
            None => self.local.remove_policy(&key),
        }
    }

    fn on_profile(&mut self, key: Key, value: Option<Arc<AnyResource>>) {
        let none = StringMap::new();
        let labels = match value.as_deref() {
            Some(AnyResource::Profile(profile)) => &profile.spec.labels_to_apply,
            _ => &none,
        };
        self.local.set_parent(&key.name, pairs(labels));
        self.sets.set_parent(&key.name, pairs(labels));
        match &value {
            Some(value) => self.profiles.insert(key.name.clone(), value.clone()),
            None => self.profiles.remove(&key.name),
        };
        self.profile_usage.dirty.insert(key.name);
    }

    /// What is decided anew: it counts as a user of its policies from now on, beside what consumers have.
    fn stage_endpoints(&mut self, endpoints_gone: &mut Vec<Key>, hosts_gone: &mut Vec<Key>) {
        for (id, new) in self.local.take() {
            if let Some(former) = self.next.remove(&id) {
                self.count_decided(&former, false);
            }
            match new {
                Some(new) => {
                    let known = match &new {
                        Decided::Workload(new) => {
                            self.endpoints.get(&id).is_some_and(|old| **old == *new)
                        }
                        Decided::Host(new) => self.hosts.get(&id).is_some_and(|old| **old == *new),
                    };
                    if !known {
                        self.count_decided(&new, true);
                        self.next.insert(id, new);
                    }
                }
                None => {
                    if let Some(old) = self.endpoints.remove(&id) {
                        self.count_users(workload_policies(&old), &old.profiles, false);
                        endpoints_gone.push(id);
                    } else if let Some(old) = self.hosts.remove(&id) {
                        self.count_users(old.policies().collect(), &old.profiles, false);
                        hosts_gone.push(id);
                    }
                }
            }
        }
    }

    /// Those of them that use nothing that has to be held back take the place of what consumers have.
    fn tell_endpoints(&mut self) -> Vec<Delta> {
        let ready = |decided: &Decided| {
            let (policies, profiles) = used_by(decided);
            policies
                .into_iter()
                .all(|key| self.policy_usage.is_ready(key, &self.sets))
                && profiles
                    .iter()
                    .all(|name| self.profile_usage.is_ready(name, &self.sets))
        };
        let ready: Vec<Key> = self
            .next
            .iter()
            .filter(|(_, decided)| ready(decided))
            .map(|(id, _)| id.clone())
            .collect();
        let mut told = Vec::with_capacity(ready.len());
        for id in ready {
            match self.next.remove(&id) {
                Some(Decided::Workload(new)) => {
                    let endpoint = Arc::new(new);
                    if let Some(old) = self.endpoints.insert(id.clone(), endpoint.clone()) {
                        self.count_users(workload_policies(&old), &old.profiles, false);
                    }
                    told.push(Delta::Endpoint { id, endpoint });
                }
                Some(Decided::Host(new)) => {
                    let endpoint = Arc::new(new);
                    if let Some(old) = self.hosts.insert(id.clone(), endpoint.clone()) {
                        self.count_users(old.policies().collect(), &old.profiles, false);
                    }
                    told.push(Delta::HostEndpoint { id, endpoint });
                }
                None => {}
            }
        }
        told
    }

    fn count_decided(&mut self, decided: &Decided, more: bool) {
        let (policies, profiles) = used_by(decided);
        self.count_users(policies, profiles, more);
    }

    /// Counts each policy and profile of an endpoint once.
    fn count_users(&mut self, policies: BTreeSet<&Key>, profiles: &[Arc<str>], more: bool) {
        for key in policies {
            count(&mut self.policy_usage, key, more);
        }
        for name in profiles.iter().collect::<BTreeSet<_>>() {
            count(&mut self.profile_usage, name, more);
        }
    }

    /// Finds out what is needed of the policies and profiles that are used or have changed, and asks for the sets.
    fn prepare(&mut self) {
        let local = &self.local;
        prepare(&mut self.policy_usage, &mut self.sets, |key| {
            match local.rules(key) {
                Some(Ok([ingress, egress])) => resolve(key.namespace.as_deref(), &ingress, &egress),
                Some(Err(problem)) => Resolved {
                    problems: vec![problem],
                    ..Resolved::default()
                },
                None => Resolved::default(),
            }
        });
        let profiles = &self.profiles;
        prepare(
            &mut self.profile_usage,
            &mut self.sets,
            |name| match profiles.get(name).map(|profile| &**profile) {
                Some(AnyResource::Profile(profile)) => {
                    resolve(None, &profile.spec.ingress, &profile.spec.egress)
                }
                _ => Resolved::default(),
            },
        );
    }

    /// This node's configuration over the cluster's, field by field.
    fn settings(&self) -> FelixConfigurationSpec {
        let own = format!("node.{}", self.node.as_str());
        let mut merged = serde_json::Map::new();
        for name in ["default", own.as_str()] {
            let key = Key::cluster(Kind::FelixConfiguration, name);
            if let Some(AnyResource::FelixConfiguration(found)) =
                self.configurations.get(&key).map(|found| &**found)
                && let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(&found.spec)
            {
                merged.extend(fields);
            }
        }
        serde_json::from_value(merged.into()).unwrap_or_default()
    }
}

fn pairs(labels: &StringMap) -> impl Iterator<Item = (&str, &str)> {
    labels
        .iter()
        .map(|(label, value)| (label.as_str(), value.as_str()))
}

fn workload_policies(endpoint: &Endpoint) -> BTreeSet<&Key> {
    let tiers = endpoint.ingress.iter().chain(&endpoint.egress);
    tiers.flat_map(|tier| &tier.policies).collect()
}

fn used_by(decided: &Decided) -> (BTreeSet<&Key>, &[Arc<str>]) {
    match decided {
        Decided::Workload(endpoint) => (workload_policies(endpoint), &endpoint.profiles),
        Decided::Host(endpoint) => (endpoint.policies().collect(), &endpoint.profiles),
    }
}

fn count<K: Clone + Ord + Hash>(usage: &mut Usage<K>, key: &K, more: bool) {
    let users = usage.users.entry(key.clone()).or_default();
    *users = if more {
        *users + 1
    } else {
        users.saturating_sub(1)
    };
    let unused = *users == 0;
    if unused {
        usage.users.remove(key);
    }
    // Only the first and the last user change what consumers need; the flush finds out which.
    if unused || !usage.active.contains_key(key) {
        usage.dirty.insert(key.clone());
    }
}

/// Resolves what has changed among policies or profiles and is used, and acquires its sets.
fn prepare<K: Clone + Ord + Hash>(
    usage: &mut Usage<K>,
    sets: &mut IpSets,
    resolve: impl Fn(&K) -> Resolved,
) {
    for key in std::mem::take(&mut usage.dirty) {
        if !usage.users.contains_key(&key) {
            if let Some(next) = usage.next.remove(&key) {
                next.release(sets);
            }
            if usage.active.contains_key(&key) {
                usage.unused.insert(key);
            }
            continue;
        }
        usage.unused.remove(&key);
        let resolved = resolve(&key);
        // New sets first: what both versions use is never without a user.
        resolved
            .sets
            .iter()
            .for_each(|(id, spec)| sets.acquire(id, spec));
        let next = Active {
            rules: Arc::new(resolved.rules),
            sets: resolved.sets,
            problems: resolved.problems,
        };
        if let Some(former) = usage.next.insert(key, next) {
            former.release(sets);
        }
    }
}

/// Makes active what has complete sets. Returns what is new to consumers.
fn promote<K: Clone + Ord + Hash>(usage: &mut Usage<K>, sets: &mut IpSets) -> Vec<(K, Arc<Rules>)> {
    let ready: Vec<K> = usage
        .next
        .iter()
        .filter(|(_, next)| next.is_complete(sets))
        .map(|(key, _)| key.clone())
        .collect();
    let mut changed = Vec::new();
    for key in ready {
        let Some(mut next) = usage.next.remove(&key) else {
            continue;
        };
        let former = usage.active.remove(&key);
        match former.as_ref().filter(|former| former.rules == next.rules) {
            Some(former) => next.rules = former.rules.clone(),
            None => changed.push((key.clone(), next.rules.clone())),
        }
        usage.active.insert(key, next);
        if let Some(former) = former {
            former.release(sets);
        }
    }
    changed
}

/// Takes away what nobody uses any more.
fn retire<K: Clone + Ord + Hash>(usage: &mut Usage<K>, sets: &mut IpSets) -> Vec<K> {
    let mut gone = Vec::new();
    for key in std::mem::take(&mut usage.unused) {
        if usage.users.contains_key(&key) {
            continue;
        }
        if let Some(former) = usage.active.remove(&key) {
            former.release(sets);
            gone.push(key);
        }
    }
    gone
}
