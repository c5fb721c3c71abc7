//! Keeps the desired chains and sets up to date, delta by delta.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::{Cidr, Key};
use cali_netlink::ipset::{SetMember, SetType};
use foldhash::HashMap;

use super::base::{self, Odd};
use super::dispatch::{self, Entry};
use super::names;
use super::program::{Chain, Program, SetProgram, Table};
use super::rule::{self, Literals};
use super::settings::Settings;
use crate::calc::{
    Action, Batch, Delta, Direction, Endpoint, IpSetId, IpSetKind, IpVersion, Member, PoolNat,
    Rules, TierDefault,
};
use crate::compile::DenyAction;
use crate::compile::names::policy_text;

const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];
const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];
/// Longest prefix of NFLOG (`NF_LOG_PREFIXLEN` is 128; iptables takes 63).
const LOG_PREFIX: usize = 63;

/// The desired state of both families.
pub struct Renderer {
    settings: Settings,
    program: Program,
    /// Sets that changed since somebody last asked.
    touched: BTreeSet<Arc<str>>,
    policies: HashMap<Key, Arc<Rules>>,
    profiles: HashMap<Arc<str>, Arc<Rules>>,
    endpoints: HashMap<Key, Arc<Endpoint>>,
    /// How many endpoints ask a policy in a direction; what nobody asks has no chain.
    asked: HashMap<(Key, Direction), usize>,
    /// Endpoints by interface; the first by name has it.
    interfaces: BTreeMap<Arc<str>, BTreeSet<Key>>,
    /// Sets of constants by the chain that uses them, and how many use each.
    literals: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    literal_users: HashMap<Arc<str>, usize>,
    dispatch_dirty: bool,
}

impl Default for Renderer {
    fn default() -> Self {
        let mut renderer = Self {
            settings: Settings::default(),
            program: Program::default(),
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
                for direction in DIRECTIONS {
                    self.remove_chain(&names::policy_chain(id, direction));
                }
            }
            Delta::ProfileRemove { name } => {
                self.profiles.remove(name);
                for direction in DIRECTIONS {
                    self.remove_chain(&names::profile_chain(name, direction));
                }
            }
            Delta::Endpoint { id, endpoint } => self.put_endpoint(id, endpoint),
            Delta::EndpointRemove { id } => {
                if let Some(former) = self.endpoints.remove(id) {
                    self.ask(&former, false);
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
        self.dispatch_dirty = true;
    }

    // ---- sets

    fn put_set(
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
        };
        if self.program.sets.get(&name) != Some(&set) {
            self.touched.insert(name.clone());
            self.program.sets.insert(name, set);
        }
    }

    fn remove_set(&mut self, name: &Arc<str>) {
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

    // ---- policies and profiles

    fn put_policy(&mut self, id: &Key, rules: &Rules) {
        let owner = policy_text(id);
        for direction in DIRECTIONS {
            let chain = names::policy_chain(id, direction);
            if self.asked.contains_key(&(id.clone(), direction)) {
                self.put_rules(chain, &owner, rules, direction, true);
            } else {
                self.remove_chain(&chain);
            }
        }
    }

    /// Counts the policies that an endpoint asks. Those that are asked for the first or no longer get or lose their chain.
    fn ask(&mut self, endpoint: &Endpoint, more: bool) {
        for direction in DIRECTIONS {
            let tiers = endpoint.tiers(direction).iter();
            for id in tiers.flat_map(|tier| &tier.policies) {
                let key = (id.clone(), direction);
                let before = self.asked.get(&key).copied().unwrap_or_default();
                let after = if more {
                    before + 1
                } else {
                    before.saturating_sub(1)
                };
                if after == 0 {
                    self.asked.remove(&key);
                } else {
                    self.asked.insert(key, after);
                }
                if (before == 0) != (after == 0)
                    && let Some(rules) = self.policies.get(id).cloned()
                {
                    self.put_policy(id, &rules);
                }
            }
        }
    }

    fn put_profile(&mut self, name: &Arc<str>, rules: &Rules) {
        let owner = format!("pro/{name}");
        for direction in DIRECTIONS {
            let chain = names::profile_chain(name, direction);
            self.put_rules(chain, &owner, rules, direction, false);
        }
    }

    fn put_rules(
        &mut self,
        chain: Arc<str>,
        owner: &str,
        rules: &Rules,
        direction: Direction,
        may_pass: bool,
    ) {
        let mut literals = Literals::new();
        for version in VERSIONS {
            let mut texts = Vec::new();
            for (number, rule) in rules.of(direction).iter().enumerate() {
                let target = match rule.action {
                    Action::Allow => format!("-g {}", names::ALLOW),
                    Action::Deny => self.deny(),
                    Action::Pass if may_pass => format!("-g {}", names::PASS),
                    // A profile has nothing to pass on to: the next profile is asked.
                    Action::Pass => "-j RETURN".to_owned(),
                    Action::Log => log(owner, direction, number),
                };
                for matches in rule::matches(rule, version, &mut literals) {
                    let space = if matches.is_empty() { "" } else { " " };
                    texts.push(format!("{matches}{space}{target}"));
                }
            }
            remark(&mut texts, &format!("{owner} {direction}"));
            self.put_chain(version, Table::Filter, chain.clone(), texts);
        }
        self.put_literals(&chain, literals);
    }

    fn deny(&self) -> String {
        match self.settings.common.deny {
            DenyAction::Drop => "-j DROP".to_owned(),
            DenyAction::Reject => "-j REJECT".to_owned(),
        }
    }

    /// The sets of constants that a chain uses now; those of its former rules go with their last user.
    fn put_literals(&mut self, chain: &Arc<str>, literals: Literals) {
        let names: BTreeSet<Arc<str>> = literals.keys().cloned().collect();
        for (name, (version, nets)) in literals {
            let users = self.literal_users.entry(name.clone()).or_default();
            *users += 1;
            if *users == 1 {
                let members = nets.into_iter().flat_map(rule::members).collect();
                self.put_set(name, SetType::Net, version, members);
            }
        }
        let former = if names.is_empty() {
            self.literals.remove(chain)
        } else {
            self.literals.insert(chain.clone(), names)
        };
        for name in former.into_iter().flatten() {
            if let Some(users) = self.literal_users.get_mut(&name) {
                *users -= 1;
                if *users == 0 {
                    self.literal_users.remove(&name);
                    self.remove_set(&name);
                }
            }
        }
    }

    fn put_chain(&mut self, version: IpVersion, table: Table, name: Arc<str>, texts: Vec<String>) {
        let chain = Chain::new(&name, texts);
        let chains = &mut self.program.family_mut(version).chains;
        chains.insert((table, name), chain);
    }

    fn remove_chain(&mut self, name: &Arc<str>) {
        for version in VERSIONS {
            let chains = &mut self.program.family_mut(version).chains;
            chains.remove(&(Table::Filter, name.clone()));
        }
        self.put_literals(name, Literals::new());
    }

    // ---- endpoints

    fn put_endpoint(&mut self, id: &Key, endpoint: &Arc<Endpoint>) {
        let former = self.endpoints.insert(id.clone(), endpoint.clone());
        self.ask(endpoint, true);
        if let Some(former) = &former {
            self.ask(former, false);
        }
        self.interfaces
            .entry(endpoint.interface.clone())
            .or_default()
            .insert(id.clone());
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
                    self.remove_chain(&name);
                    self.dispatch_dirty = true;
                }
            }
        }
    }

    fn endpoint_rules(&self, id: &Key, endpoint: &Endpoint, direction: Direction) -> Vec<String> {
        let (marks, common) = (self.settings.marks, &self.settings.common);
        let allowed = format!("{} -j RETURN", marks.accepted());
        let mut rules = vec!["-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned()];
        remark(&mut rules, &id.to_string());
        if common.drop_invalid {
            rules.push("-m conntrack --ctstate INVALID -j DROP".to_owned());
        }
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
        for tier in endpoint.tiers(direction) {
            rules.push(marks.clear_pass());
            for policy in &tier.policies {
                let chain = names::policy_chain(policy, direction);
                rules.push(format!("{} -j {chain}", marks.not_passed()));
                rules.push(allowed.clone());
            }
            if tier.default_action == TierDefault::Deny {
                let about = comment(&format!("end of tier {}", tier.tier));
                rules.push(format!("{} {about} {}", marks.not_passed(), self.deny()));
            }
        }
        for profile in &endpoint.profiles {
            rules.push(format!("-j {}", names::profile_chain(profile, direction)));
            rules.push(allowed.clone());
        }
        rules.push(format!(
            "{} {}",
            comment("no profile allows it"),
            self.deny()
        ));
        rules
    }

    /// The ways to the endpoints, and everything else that stands whatever the policies are.
    fn put_dispatch(&mut self) {
        self.dispatch_dirty = false;
        let usable = |interface: &&Arc<str>| dispatch::usable(interface);
        let names: Vec<&Arc<str>> = self.interfaces.keys().filter(usable).collect();
        let prefixes = &self.settings.common.workload_prefixes;
        let is_prefixed = |name: &str| prefixes.iter().any(|prefix| name.starts_with(&**prefix));
        let chain = |name: &str, direction| names::endpoint_chain(name, direction);
        let odd: Odd = names
            .iter()
            .filter(|name| !is_prefixed(name))
            .map(|name| {
                (
                    (*name).clone(),
                    DIRECTIONS.map(|direction| chain(name, direction)),
                )
            })
            .collect();
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
        for version in VERSIONS {
            let family = self.program.family_mut(version);
            let is_way = |name: &str| {
                name.starts_with(names::FROM_WORKLOAD) || name.starts_with(names::TO_WORKLOAD)
            };
            family.chains.retain(|(_, name), _| !is_way(name));
            for (name, rules) in &ways {
                let chain = Chain::new(name, rules.clone());
                family.chains.insert((Table::Filter, name.clone()), chain);
            }
            family
                .chains
                .extend(base::chains(&self.settings, version, &odd));
            family.hooks = base::hooks(&self.settings);
        }
    }
}

/// Text that needs no care between double quotes, at most `limit` bytes of it.
fn plain(text: &str, limit: usize) -> String {
    let harmless =
        |c: char| (c.is_ascii_graphic() || c == ' ') && !matches!(c, '"' | '\\' | '\'' | '`');
    text.chars()
        .map(|c| if harmless(c) { c } else { '_' })
        .take(limit)
        .collect()
}

/// iptables takes comments of 255 bytes.
fn comment(text: &str) -> String {
    format!("-m comment --comment \"{}\"", plain(text, 200))
}

/// Says whose chain this is, with its first rule.
fn remark(rules: &mut [String], text: &str) {
    if let Some(first) = rules.first_mut() {
        *first = format!("{} {first}", comment(text));
    }
}

fn log(owner: &str, direction: Direction, number: usize) -> String {
    let group = match direction {
        Direction::Ingress => 1,
        Direction::Egress => 2,
    };
    let prefix = plain(&format!("log {owner} {direction} {number}"), LOG_PREFIX);
    format!("-j NFLOG --nflog-group {group} --nflog-prefix \"{prefix}\" --nflog-size 128")
}
