//! Keeps the desired chains and sets up to date, delta by delta.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::{Cidr, Key};
use cali_netlink::ipset::{SetMember, SetType};
use foldhash::HashMap;

use super::base::{self, Odd};
use super::dispatch::{self, Entry};
use super::hosts::Hosts;
use super::policies::places;
use super::program::{Chain, Program, SetProgram, Table};
use super::rule::{self, Literals};
use super::settings::Settings;
use super::{held, limits, names};
use crate::calc::{
    Batch, Delta, Direction, Endpoint, IpSetId, IpSetKind, IpVersion, Member, PoolNat, Rules,
    TierDefault, TierPolicies, TunnelPeers,
};
use crate::compile::{KeptOpen, outermost};

pub(super) const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];
pub(super) const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];
/// Somebody whose rules are asked for in a direction, in a table.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Asked {
    Policy(Key, Direction, Table),
    Profile(Arc<str>, Direction, Table),
}

/// The desired state of both families.
pub struct Renderer {
    pub(super) settings: Settings,
    program: Program,
    tunnels: Arc<TunnelPeers>,
    service_nets: Arc<[Cidr]>,
    pub(super) hosts: Hosts,
    pub(super) kept_open: KeptOpen,
    /// Sets that changed since somebody last asked.
    touched: BTreeSet<Arc<str>>,
    pub(super) policies: HashMap<Key, Arc<Rules>>,
    pub(super) profiles: HashMap<Arc<str>, Arc<Rules>>,
    pub(super) endpoints: HashMap<Key, Arc<Endpoint>>,
    /// How many endpoints ask; what nobody asks has no chain, but for profiles in the filter table.
    pub(super) asked: HashMap<Asked, usize>,
    /// Endpoints by interface; the first by name has it.
    pub(super) interfaces: BTreeMap<Arc<str>, BTreeSet<Key>>,
    /// Sets of constants by the chain that uses them, and how many use each.
    pub(super) literals: HashMap<(Table, Arc<str>), BTreeSet<Arc<str>>>,
    pub(super) literal_users: HashMap<Arc<str>, usize>,
    pub(super) dispatch_dirty: bool,
}

impl Default for Renderer {
    fn default() -> Self {
        let mut renderer = Self {
            settings: Settings::default(),
            program: Program::default(),
            tunnels: Arc::default(),
            service_nets: Arc::default(),
            hosts: Hosts::default(),
            kept_open: KeptOpen::default(),
            touched: BTreeSet::new(),
            policies: HashMap::default(),
            profiles: HashMap::default(),
            endpoints: HashMap::default(),
            asked: HashMap::default(),
            interfaces: BTreeMap::new(),
            literals: HashMap::default(),
            literal_users: HashMap::default(),
            dispatch_dirty: true,
        };
        renderer.put_pools(&[]);
        renderer.put_services();
        renderer.put_tunnel_peers();
        for (name, set) in held::sets() {
            renderer.touched.insert(name.clone());
            renderer.program.sets.insert(name, set);
        }
        renderer.put_dispatch();
        renderer
    }
}

impl Renderer {
    /// Takes a batch in.
    pub fn apply(&mut self, batch: &Batch) {
        for delta in &batch.deltas {
            self.apply_delta(delta);
        }
        self.put_dispatch_if_dirty();
    }

    pub(super) fn put_dispatch_if_dirty(&mut self) {
        if self.dispatch_dirty {
            self.put_dispatch();
        }
    }

    /// The desired program.
    #[must_use]
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Settings of the chains.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Sets that changed since the last call.
    pub fn take_touched_sets(&mut self) -> BTreeSet<Arc<str>> {
        std::mem::take(&mut self.touched)
    }

    fn apply_delta(&mut self, delta: &Delta) {
        match delta {
            Delta::Settings(spec) => {
                let settings = Settings::from(&**spec);
                if settings != self.settings {
                    self.settings = settings;
                    self.put_everything();
                }
            }
            Delta::Pools(pools) => self.put_pools(pools),
            Delta::ServiceNets(nets) => {
                self.service_nets = nets.clone();
                self.put_services();
                self.dispatch_dirty = true;
            }
            Delta::TunnelPeers(peers) => {
                self.tunnels = peers.clone();
                self.put_tunnel_peers();
                self.dispatch_dirty = true;
            }
            Delta::HostEndpoint { id, endpoint } => self.put_host(id, Some(endpoint)),
            Delta::HostEndpointRemove { id } => self.put_host(id, None),
            Delta::IpSetCreate {
                id, kind, members, ..
            } => {
                let kind = match kind {
                    IpSetKind::Net => SetType::Net,
                    IpSetKind::Port => SetType::IpPort,
                };
                for version in VERSIONS {
                    self.put_set(names::ip_set(id, version), kind, version, BTreeSet::new());
                }
                self.change_members(id, members, &[]);
            }
            Delta::IpSetChange { id, added, removed } => self.change_members(id, added, removed),
            Delta::IpSetRemove { id } => {
                for version in VERSIONS {
                    self.remove_set(&names::ip_set(id, version));
                }
            }
            Delta::Policy { id, rules } => {
                self.policies.insert(id.clone(), rules.clone());
                self.put_policy(id, rules);
            }
            Delta::Profile { name, rules } => {
                self.profiles.insert(name.clone(), rules.clone());
                self.put_profile(name, rules);
            }
            Delta::PolicyRemove { id } => {
                self.policies.remove(id);
                for (direction, table) in places() {
                    self.remove_chain(table, &names::policy_chain(id, direction));
                }
            }
            Delta::ProfileRemove { name } => {
                self.profiles.remove(name);
                for (direction, table) in places() {
                    self.remove_chain(table, &names::profile_chain(name, direction));
                }
            }
            Delta::Endpoint { id, endpoint } => self.put_endpoint(id, endpoint),
            Delta::EndpointRemove { id } => {
                if let Some(former) = self.endpoints.remove(id) {
                    self.dispatch_dirty |= former.limits.dscp.is_some();
                    self.ask_all(&former, false);
                    self.leave_interface(id, &former.interface);
                }
            }
        }
    }

    fn put_everything(&mut self) {
        for (id, rules) in self.policies.clone() {
            self.put_policy(&id, &rules);
        }
        for (name, rules) in self.profiles.clone() {
            self.put_profile(&name, &rules);
        }
        let interfaces: Vec<Arc<str>> = self.interfaces.keys().cloned().collect();
        interfaces
            .iter()
            .for_each(|interface| self.put_interface(interface));
        self.put_hosts();
        self.dispatch_dirty = true;
    }

    // ---- sets

    pub(super) fn put_set(
        &mut self,
        name: Arc<str>,
        kind: SetType,
        version: IpVersion,
        members: BTreeSet<SetMember>,
    ) {
        let set = SetProgram {
            kind,
            v6: version == IpVersion::V6,
            members,
            timeout: None,
        };
        if self.program.sets.get(&name) != Some(&set) {
            self.touched.insert(name.clone());
            self.program.sets.insert(name, set);
        }
    }

    pub(super) fn remove_set(&mut self, name: &Arc<str>) {
        if self.program.sets.remove(name).is_some() {
            self.touched.insert(name.clone());
        }
    }

    fn change_members(&mut self, id: &IpSetId, added: &[Member], removed: &[Member]) {
        for (members, add) in [(removed, false), (added, true)] {
            for member in members {
                let (version, parts): (IpVersion, Vec<SetMember>) = match *member {
                    Member::Net(net) => (IpVersion::of(net.addr()), rule::members(net).collect()),
                    Member::Port {
                        addr,
                        protocol,
                        port,
                    } => (
                        IpVersion::of(addr),
                        vec![SetMember::Port(addr, protocol, port)],
                    ),
                };
                let name = names::ip_set(id, version);
                let Some(set) = self.program.sets.get_mut(&name) else {
                    continue;
                };
                for part in parts {
                    if add {
                        set.members.insert(part);
                    } else {
                        set.members.remove(&part);
                    }
                }
                self.touched.insert(name);
            }
        }
    }

    fn put_pools(&mut self, pools: &[PoolNat]) {
        for version in VERSIONS {
            let of = |only_nat: bool| -> BTreeSet<SetMember> {
                let nets: Vec<Cidr> = pools
                    .iter()
                    .filter(|pool| IpVersion::of(pool.cidr.addr()) == version)
                    .filter(|pool| pool.nat_outgoing || !only_nat)
                    .map(|pool| pool.cidr)
                    .collect();
                nets.into_iter().flat_map(rule::members).collect()
            };
            let (nat, all) = base::pool_sets(version);
            self.put_set(nat, SetType::Net, version, of(true));
            self.put_set(all, SetType::Net, version, of(false));
        }
    }

    fn put_services(&mut self) {
        for version in VERSIONS {
            let nets = outermost(&self.service_nets, version);
            let members = nets.into_iter().flat_map(rule::members).collect();
            self.put_set(base::service_set(version), SetType::Net, version, members);
        }
    }

    /// Senders of encapsulated packets.
    fn put_tunnel_peers(&mut self) {
        let peers = self.tunnels.clone();
        for version in VERSIONS {
            let nets = outermost(&peers.sources, version);
            let members = nets.into_iter().flat_map(rule::members).collect();
            self.put_set(base::node_set(version), SetType::Net, version, members);
        }
    }

    pub(super) fn put_chain(
        &mut self,
        version: IpVersion,
        table: Table,
        name: Arc<str>,
        texts: Vec<String>,
    ) {
        let chain = Chain::new(&name, texts);
        let chains = &mut self.program.family_mut(version).chains;
        chains.insert((table, name), chain);
    }

    pub(super) fn remove_chain(&mut self, table: Table, name: &Arc<str>) {
        let key = (table, name.clone());
        for version in VERSIONS {
            self.program.family_mut(version).chains.remove(&key);
        }
        self.put_literals(&key, Literals::new());
    }

    // ---- endpoints

    fn put_endpoint(&mut self, id: &Key, endpoint: &Arc<Endpoint>) {
        let former = self.endpoints.insert(id.clone(), endpoint.clone());
        self.ask_all(endpoint, true);
        if let Some(former) = &former {
            self.ask_all(former, false);
        }
        self.interfaces
            .entry(endpoint.interface.clone())
            .or_default()
            .insert(id.clone());
        // Code points stand by address in a chain for all.
        let had = former.as_ref().is_some_and(|old| old.limits.dscp.is_some());
        self.dispatch_dirty |= had || endpoint.limits.dscp.is_some();
        if let Some(former) = former.filter(|former| former.interface != endpoint.interface) {
            self.leave_interface(id, &former.interface);
        }
        self.put_interface(&endpoint.interface);
    }

    fn leave_interface(&mut self, id: &Key, interface: &Arc<str>) {
        if let Some(owners) = self.interfaces.get_mut(interface) {
            owners.remove(id);
            if owners.is_empty() {
                self.interfaces.remove(interface);
            }
        }
        self.put_interface(interface);
    }

    /// The chains of an interface.
    fn put_interface(&mut self, interface: &Arc<str>) {
        let owner = self.interfaces.get(interface).and_then(BTreeSet::first);
        let endpoint = owner.and_then(|id| Some((id.clone(), self.endpoints.get(id)?.clone())));
        for direction in DIRECTIONS {
            let name = names::endpoint_chain(interface, direction);
            let rate = endpoint.as_ref();
            let rate = rate.and_then(|(_, endpoint)| endpoint.limits.of(direction).packets);
            self.put_rate(interface, direction, rate);
            match &endpoint {
                Some((id, endpoint)) => {
                    let texts = self.endpoint_rules(id, endpoint, direction);
                    for version in VERSIONS {
                        self.dispatch_dirty |= !self
                            .program
                            .family(version)
                            .chains
                            .contains_key(&(Table::Filter, name.clone()));
                        self.put_chain(version, Table::Filter, name.clone(), texts.clone());
                    }
                }
                None => {
                    self.remove_chain(Table::Filter, &name);
                    self.dispatch_dirty = true;
                }
            }
        }
    }

    fn endpoint_rules(&self, id: &Key, endpoint: &Endpoint, direction: Direction) -> Vec<String> {
        let (marks, common) = (self.settings.marks, &self.settings.common);
        let limit = endpoint.limits.of(direction);
        let mut rules = Vec::new();
        if limit.packets.is_some() {
            let chain = names::rate_chain(&endpoint.interface, direction);
            rules.push(format!("-j {chain}"));
        }
        rules.push("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned());
        remark(&mut rules, &id.to_string());
        if common.drop_invalid {
            rules.push("-m conntrack --ctstate INVALID -j DROP".to_owned());
        }
        rules.extend(limit.connections.map(limits::connections));
        rules.push(marks.clear_all());
        if direction == Direction::Egress {
            if !common.allow_vxlan_from_workloads {
                rules.push(format!(
                    "-p 17 -m udp --dport {} -j DROP",
                    common.vxlan_port
                ));
            }
            if !common.allow_ipip_from_workloads {
                rules.push("-p 4 -j DROP".to_owned());
            }
        }
        self.tier_rules(
            &mut rules,
            endpoint.tiers(direction),
            direction,
            Table::Filter,
        );
        self.profile_rules(&mut rules, &endpoint.profiles, direction, Table::Filter);
        rules
    }

    /// Asks tier after tier; the end of one that denies ends it.
    pub(super) fn tier_rules(
        &self,
        rules: &mut Vec<String>,
        tiers: &[TierPolicies],
        direction: Direction,
        table: Table,
    ) {
        let marks = self.settings.marks;
        for tier in tiers {
            rules.push(marks.clear_pass());
            for policy in &tier.policies {
                let chain = names::policy_chain(policy, direction);
                rules.push(format!("{} -j {chain}", marks.not_passed()));
                rules.push(format!("{} -j RETURN", marks.accepted()));
            }
            if tier.default_action == TierDefault::Deny {
                let about = comment(&format!("end of tier {}", tier.tier));
                rules.push(format!(
                    "{} {about} {}",
                    marks.not_passed(),
                    self.deny(table)
                ));
            }
        }
    }

    /// Asks the profiles, and denies what none allows.
    pub(super) fn profile_rules(
        &self,
        rules: &mut Vec<String>,
        profiles: &[Arc<str>],
        direction: Direction,
        table: Table,
    ) {
        for profile in profiles {
            rules.push(format!("-j {}", names::profile_chain(profile, direction)));
            rules.push(format!("{} -j RETURN", self.settings.marks.accepted()));
        }
        let about = comment("no profile allows it");
        rules.push(format!("{about} {}", self.deny(table)));
    }

    /// The ways to the endpoints, and everything else that stands whatever the policies are.
    fn put_dispatch(&mut self) {
        self.dispatch_dirty = false;
        let prefixes = &self.settings.common.workload_prefixes;
        let is_prefixed = |name: &str| prefixes.iter().any(|prefix| name.starts_with(&**prefix));
        let chain = |name: &str, direction| names::endpoint_chain(name, direction);
        let odd: Odd = self
            .odd_interfaces()
            .map(|name| {
                let chains = DIRECTIONS.map(|direction| chain(name, direction));
                (name.clone(), chains)
            })
            .collect();
        let names: Vec<&Arc<str>> = self.usable_interfaces().collect();
        let entries = |direction| -> Vec<Entry> {
            let prefixed = names.iter().filter(|name| is_prefixed(name));
            prefixed
                .map(|name| ((*name).clone(), chain(name, direction)))
                .collect()
        };
        let mut ways = dispatch::chains(names::FROM_WORKLOAD, "-i", &entries(Direction::Egress));
        ways.extend(dispatch::chains(
            names::TO_WORKLOAD,
            "-o",
            &entries(Direction::Ingress),
        ));
        let dscp = self.code_points();
        let ground = base::Ground {
            settings: &self.settings,
            ways: &self.hosts.ways,
            tunnels: &self.tunnels,
            odd: &odd,
            services: !self.service_nets.is_empty(),
            dscp: &dscp,
            not_workloads: &|option, target| self.workload_ways(option, target),
        };
        let built = VERSIONS.map(|version| base::chains(&ground, version));
        let hooks = base::hooks(&ground);
        for (version, base) in VERSIONS.into_iter().zip(built) {
            let family = self.program.family_mut(version);
            let is_way = |name: &str| {
                name.starts_with(names::FROM_WORKLOAD) || name.starts_with(names::TO_WORKLOAD)
            };
            family
                .chains
                .retain(|(_, name), _| !is_way(name) && !base::is_base(name));
            for (name, rules) in &ways {
                let chain = Chain::new(name, rules.clone());
                family.chains.insert((Table::Filter, name.clone()), chain);
            }
            family.chains.extend(base);
            family.hooks = hooks.clone();
        }
    }

    fn usable_interfaces(&self) -> impl Iterator<Item = &Arc<str>> {
        let all = self.interfaces.keys();
        all.filter(|interface| dispatch::usable(interface))
    }

    /// Interfaces of workloads whose names do not say so.
    fn odd_interfaces(&self) -> impl Iterator<Item = &Arc<str>> {
        let prefixes = &self.settings.common.workload_prefixes;
        self.usable_interfaces()
            .filter(move |name| !prefixes.iter().any(|prefix| name.starts_with(&**prefix)))
    }

    /// A rule for every way from (`-i`) or to (`-o`) a workload.
    pub(super) fn workload_ways(&self, option: &str, target: &str) -> Vec<String> {
        let prefixes = self.settings.common.workload_prefixes.iter();
        let prefixed = prefixes.map(|prefix| base::beginning(option, prefix));
        let odd = self.odd_interfaces();
        prefixed
            .chain(odd.map(|interface| format!("{option} {interface}")))
            .map(|from| format!("{from} {target}"))
            .collect()
    }
}

/// Text that needs no care between double quotes, at most `limit` bytes of it.
pub(super) fn plain(text: &str, limit: usize) -> String {
    let harmless =
        |c: char| (c.is_ascii_graphic() || c == ' ') && !matches!(c, '"' | '\\' | '\'' | '`');
    text.chars()
        .map(|c| if harmless(c) { c } else { '_' })
        .take(limit)
        .collect()
}

/// iptables takes comments of 255 bytes.
pub(super) fn comment(text: &str) -> String {
    format!("-m comment --comment \"{}\"", plain(text, 200))
}

/// Says whose chain this is, with its first rule.
pub(super) fn remark(rules: &mut [String], text: &str) {
    if let Some(first) = rules.first_mut() {
        *first = format!("{} {first}", comment(text));
    }
}
