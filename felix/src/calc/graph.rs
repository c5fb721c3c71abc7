//! The graph: objects in, batches out.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::Hash;
use std::sync::Arc;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::v3::{FelixConfigurationSpec, WorkloadEndpoint};
use cali_api::{AnyResource, Cidr, Key, Kind, NodeName, StringMap};
use foldhash::HashMap;

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

/// Policies or profiles: who uses them, and what of them consumers have.
struct Usage<K> {
    users: HashMap<K, usize>,
    active: HashMap<K, Active>,
    dirty: BTreeSet<K>,
}

impl<K> Default for Usage<K> {
    fn default() -> Self {
        Self {
            users: HashMap::default(),
            active: HashMap::default(),
            dirty: BTreeSet::new(),
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
    endpoints: HashMap<Key, Arc<Endpoint>>,
    hosts: HashMap<Key, Arc<HostEndpoint>>,
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
            policy_usage: Usage::default(),
            profile_usage: Usage::default(),
            settings_dirty: true,
            pools_dirty: true,
            services_dirty: false,
            refused: BTreeMap::new(),
        }
    }

    /// Takes one input in. Nothing comes out before [`Self::flush`].
    pub fn handle(&mut self, input: Input) {
        match input {
            Input::Sync(SyncEvent::Status(status)) => self.in_sync |= status == SyncStatus::InSync,
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
                self.tunnel_peers.set_node(key, node);
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

    /// The changes since the last flush; `None` without any, and before the datastore is in sync.
    pub fn flush(&mut self) -> Option<Batch> {
        if !self.in_sync {
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
        let (endpoints, endpoints_gone) = self.flush_endpoints();
        let (policies, policies_gone) = self.flush_policies();
        let (profiles, profiles_gone) = self.flush_profiles();
        let (sets, sets_gone) = self.sets.take();
        for part in [
            sets,
            policies,
            profiles,
            endpoints,
            endpoints_gone,
            profiles_gone,
            policies_gone,
            sets_gone,
        ] {
            deltas.extend(part);
        }
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

    fn flush_endpoints(&mut self) -> (Vec<Delta>, Vec<Delta>) {
        let (mut live, mut gone) = (Vec::new(), Vec::new());
        for (id, new) in self.local.take() {
            match new {
                Some(Decided::Workload(new)) => live.extend(self.put_workload(id, new)),
                Some(Decided::Host(new)) => live.extend(self.put_host(id, new)),
                None => {
                    if let Some(old) = self.endpoints.remove(&id) {
                        self.count_users(workload_policies(&old), &old.profiles, false);
                        gone.push(Delta::EndpointRemove { id });
                    } else if let Some(old) = self.hosts.remove(&id) {
                        self.count_users(old.policies().collect(), &old.profiles, false);
                        gone.push(Delta::HostEndpointRemove { id });
                    }
                }
            }
        }
        (live, gone)
    }

    fn put_workload(&mut self, id: Key, new: Endpoint) -> Option<Delta> {
        let old = self.endpoints.get(&id).cloned();
        if old.as_deref() == Some(&new) {
            return None;
        }
        self.count_users(workload_policies(&new), &new.profiles, true);
        if let Some(old) = &old {
            self.count_users(workload_policies(old), &old.profiles, false);
        }
        let endpoint = Arc::new(new);
        self.endpoints.insert(id.clone(), endpoint.clone());
        Some(Delta::Endpoint { id, endpoint })
    }

    fn put_host(&mut self, id: Key, new: HostEndpoint) -> Option<Delta> {
        let old = self.hosts.get(&id).cloned();
        if old.as_deref() == Some(&new) {
            return None;
        }
        self.count_users(new.policies().collect(), &new.profiles, true);
        if let Some(old) = &old {
            self.count_users(old.policies().collect(), &old.profiles, false);
        }
        let endpoint = Arc::new(new);
        self.hosts.insert(id.clone(), endpoint.clone());
        Some(Delta::HostEndpoint { id, endpoint })
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

    fn flush_policies(&mut self) -> (Vec<Delta>, Vec<Delta>) {
        let local = &self.local;
        let (changed, gone) =
            flush_usage(&mut self.policy_usage, &mut self.sets, |key| {
                match local.rules(key) {
                    Some(Ok([ingress, egress])) => {
                        resolve(key.namespace.as_deref(), &ingress, &egress)
                    }
                    Some(Err(problem)) => Resolved {
                        problems: vec![problem],
                        ..Resolved::default()
                    },
                    None => Resolved::default(),
                }
            });
        (
            changed
                .into_iter()
                .map(|(id, rules)| Delta::Policy { id, rules })
                .collect(),
            gone.into_iter()
                .map(|id| Delta::PolicyRemove { id })
                .collect(),
        )
    }

    fn flush_profiles(&mut self) -> (Vec<Delta>, Vec<Delta>) {
        let profiles = &self.profiles;
        let (changed, gone) =
            flush_usage(
                &mut self.profile_usage,
                &mut self.sets,
                |name| match profiles.get(name).map(|profile| &**profile) {
                    Some(AnyResource::Profile(profile)) => {
                        resolve(None, &profile.spec.ingress, &profile.spec.egress)
                    }
                    _ => Resolved::default(),
                },
            );
        (
            changed
                .into_iter()
                .map(|(name, rules)| Delta::Profile { name, rules })
                .collect(),
            gone.into_iter()
                .map(|name| Delta::ProfileRemove { name })
                .collect(),
        )
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

type Flushed<K> = (Vec<(K, Arc<Rules>)>, Vec<K>);

/// Brings what consumers have of policies or profiles up to date: the changed ones, and those that
/// nobody uses any more.
fn flush_usage<K: Clone + Ord + Hash>(
    usage: &mut Usage<K>,
    sets: &mut IpSets,
    resolve: impl Fn(&K) -> Resolved,
) -> Flushed<K> {
    let mut flushed: Flushed<K> = (Vec::new(), Vec::new());
    for key in std::mem::take(&mut usage.dirty) {
        if !usage.users.contains_key(&key) {
            if let Some(former) = usage.active.remove(&key) {
                former.sets.iter().for_each(|(id, _)| sets.release(id));
                flushed.1.push(key);
            }
            continue;
        }
        let resolved = resolve(&key);
        // New sets first: what both versions use is never without a user.
        resolved
            .sets
            .iter()
            .for_each(|(id, spec)| sets.acquire(id, spec));
        let former = usage.active.get(&key);
        let unchanged = former
            .filter(|former| *former.rules == resolved.rules)
            .map(|former| former.rules.clone());
        let rules = unchanged
            .clone()
            .unwrap_or_else(|| Arc::new(resolved.rules));
        let active = Active {
            rules: rules.clone(),
            sets: resolved.sets,
            problems: resolved.problems,
        };
        if let Some(former) = usage.active.insert(key.clone(), active) {
            former.sets.iter().for_each(|(id, _)| sets.release(id));
        }
        if unchanged.is_none() {
            flushed.0.push((key, rules));
        }
    }
    flushed
}
