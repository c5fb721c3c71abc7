//! Keeps the desired program up to date, delta by delta, and remembers what it touched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::{Cidr, Key as ObjectKey};
use cali_netlink::nft::{Chain, DataType, Expr, KeyType, Rule as NftRule, Set, Verdict};
use foldhash::HashMap;

use super::collapse::{Allowed, Thresholds, Union, allows_only, collapse};
use super::desired::Desired;
use super::evaluate::Suspects;
use super::host_policy::KeptOpen;
use super::hosts::Hosts;
use super::ipvs::Ipvs;
use super::known_sets::{KnownSets, Reshaped};
use super::limits::Limited;
use super::program::{ChainProgram, Program, SetProgram, Touched};
use super::rule::Rendered;
use super::settings::Settings;
use super::stack::{Endings, Place, Stack, ask, comment, deny_rest};
use super::{base, names};
use crate::calc::{
    Action, Batch, Delta, Direction, Endpoint, IpSetId, PoolNat, Rules, TierDefault, TunnelPeers,
};

pub(super) const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// Whose content a chain holds: what must be rendered again when something below changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Unit {
    // Stacks come first: what they use decides which other chains are wanted.
    Stack(Arc<str>),
    Policy(ObjectKey, Direction),
    Profile(Arc<str>, Direction),
}

impl Unit {
    fn chain(&self) -> Arc<str> {
        match self {
            Self::Stack(name) => name.clone(),
            Self::Policy(id, direction) => names::policy_chain(id, *direction),
            Self::Profile(name, direction) => names::profile_chain(name, *direction),
        }
    }
}

#[derive(Debug)]
struct KnownStack {
    stack: Stack,
    users: usize,
    /// Stacks that `Pass` leads to.
    next: Vec<Arc<str>>,
    /// Policies that are written out together with others.
    inlined: BTreeSet<ObjectKey>,
}

/// What a rendered chain depends on.
#[derive(Debug, Default)]
pub(super) struct Needs {
    sets: BTreeSet<IpSetId>,
    /// What is named by its content: sets, maps and chains.
    pub(super) shared: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
pub(super) struct KnownEndpoint {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) stacks: [Arc<str>; 2],
}

/// The desired state of table `inet calico`.
pub struct Compiler {
    pub(super) settings: Settings,
    pub(super) tunnel_peers: Arc<TunnelPeers>,
    pub(super) desired: Desired,
    pub(super) hosts: Hosts,
    pub(super) kept_open: KeptOpen,
    pub(super) limited: Limited,
    pub(super) ipvs: Ipvs,
    service_nets: Arc<[Cidr]>,
    sets: KnownSets,
    pub(super) policies: HashMap<ObjectKey, Arc<Rules>>,
    pub(super) profiles: HashMap<Arc<str>, Arc<Rules>>,
    pub(super) endpoints: HashMap<ObjectKey, KnownEndpoint>,
    /// Endpoints by interface. One interface belongs to one endpoint; should two claim it, the
    /// first by name has it.
    pub(super) interfaces: BTreeMap<Arc<str>, BTreeSet<ObjectKey>>,
    stacks: HashMap<Arc<str>, KnownStack>,
    /// Stacks that ask a policy or profile.
    askers: HashMap<Unit, BTreeSet<Arc<str>>>,
    /// Stacks in which a policy or profile is written out, wherever that would not need to be.
    writers: HashMap<Unit, BTreeSet<Arc<str>>>,
    needs: HashMap<Unit, Needs>,
    pub(super) set_users: HashMap<IpSetId, BTreeSet<Unit>>,
    /// How many units lead to what is named by its content.
    pub(super) shared_users: HashMap<Arc<str>, usize>,
    pub(super) unions: HashMap<Arc<str>, Union>,
    pub(super) set_unions: HashMap<IpSetId, BTreeSet<Arc<str>>>,
    dirty: BTreeSet<Unit>,
    /// Whose flows may have got another verdict, and the policies and profiles behind others.
    pub(super) suspects: Suspects,
    pub(super) changed_policies: BTreeSet<ObjectKey>,
    pub(super) changed_profiles: BTreeSet<Arc<str>>,
}

impl Default for Compiler {
    fn default() -> Self {
        let mut compiler = Self {
            settings: Settings::default(),
            tunnel_peers: Arc::default(),
            desired: Desired {
                program: Program {
                    exists: true,
                    ..Program::absent()
                },
                touched: Touched::default(),
            },
            hosts: Hosts::default(),
            kept_open: KeptOpen::default(),
            limited: Limited::default(),
            ipvs: Ipvs::default(),
            service_nets: Arc::default(),
            sets: KnownSets::default(),
            policies: HashMap::default(),
            profiles: HashMap::default(),
            endpoints: HashMap::default(),
            interfaces: BTreeMap::new(),
            stacks: HashMap::default(),
            askers: HashMap::default(),
            writers: HashMap::default(),
            needs: HashMap::default(),
            set_users: HashMap::default(),
            shared_users: HashMap::default(),
            unions: HashMap::default(),
            set_unions: HashMap::default(),
            dirty: BTreeSet::new(),
            suspects: Suspects::default(),
            changed_policies: BTreeSet::new(),
            changed_profiles: BTreeSet::new(),
        };
        for map in [names::FROM_WORKLOAD, names::TO_WORKLOAD] {
            compiler.desired.put_set(SetProgram::new(Set::verdict_map(
                map,
                KeyType::one(DataType::IfName),
            )));
        }
        compiler.put_base_chains();
        compiler.put_pools(&[]);
        compiler.put_services();
        compiler.put_tunnel_peers();
        compiler
    }
}

impl Compiler {
    /// A compiler that sees other costs than the kernel has: for tests.
    #[must_use]
    pub fn with_thresholds(thresholds: Thresholds) -> Self {
        let mut compiler = Self::default();
        compiler.sets.thresholds = thresholds;
        compiler
    }

    /// Takes a batch in.
    pub fn apply(&mut self, batch: &Batch) {
        for delta in &batch.deltas {
            self.apply_delta(delta);
        }
        self.render_dirty();
    }

    pub(super) fn render_dirty(&mut self) {
        while let Some(unit) = self.dirty.pop_first() {
            self.render(&unit);
        }
    }

    /// The desired program.
    pub fn program(&self) -> &Program {
        &self.desired.program
    }

    /// What changed since the last call.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.desired.touched)
    }

    fn apply_delta(&mut self, delta: &Delta) {
        match delta {
            Delta::Settings(spec) => {
                let settings = Settings::from(&**spec);
                if settings != self.settings {
                    self.settings = settings;
                    self.put_base_chains();
                    self.put_tunnel_peers();
                    self.put_hosts();
                    self.dirty.extend(self.needs.keys().cloned());
                    let interfaces: Vec<_> = self.interfaces.keys().cloned().collect();
                    interfaces
                        .iter()
                        .for_each(|interface| self.put_interface(interface));
                }
            }
            Delta::Pools(pools) => self.put_pools(pools),
            Delta::ServiceNets(nets) => {
                self.service_nets = nets.clone();
                self.put_services();
                self.put_base_chains();
            }
            Delta::TunnelPeers(peers) => {
                self.tunnel_peers = peers.clone();
                self.put_tunnel_peers();
                self.put_base_chains();
            }
            Delta::HostEndpoint { id, endpoint } => self.put_host(id, Some(endpoint)),
            Delta::HostEndpointRemove { id } => self.put_host(id, None),
            Delta::IpSetCreate {
                id,
                kind,
                origin,
                members,
            } => {
                let reshaped = self
                    .sets
                    .create(&mut self.desired, id, *kind, origin, members);
                self.render_users(id, reshaped);
            }
            Delta::IpSetChange { id, added, removed } => {
                self.suspect_members(id, added, removed);
                let reshaped = self.sets.change(&mut self.desired, id, added, removed);
                self.render_users(id, reshaped);
                self.update_unions(id, added, removed);
            }
            Delta::IpSetRemove { id } => {
                let reshaped = self.sets.remove(&mut self.desired, id);
                self.render_users(id, reshaped);
            }
            Delta::Policy { id, rules } => {
                let former = self.policies.insert(id.clone(), rules.clone());
                if former.is_some() {
                    self.changed_policies.insert(id.clone());
                }
                for direction in DIRECTIONS {
                    let unit = Unit::Policy(id.clone(), direction);
                    let passes =
                        passes(rules, direction) || former.iter().any(|old| passes(old, direction));
                    let reshaped = former.as_ref().is_none_or(|old| {
                        allows_only(old, direction) != allows_only(rules, direction)
                            || old.of(direction).len() != rules.of(direction).len()
                    });
                    for name in self.askers.get(&unit).into_iter().flatten() {
                        let inlined = || {
                            let known = self.stacks.get(name);
                            known.is_some_and(|known| known.inlined.contains(id))
                        };
                        if passes || reshaped || inlined() {
                            self.dirty.insert(Unit::Stack(name.clone()));
                        }
                    }
                    self.render_writers(&unit);
                    self.dirty.insert(unit);
                }
            }
            Delta::Profile { name, rules } => {
                if self.profiles.insert(name.clone(), rules.clone()).is_some() {
                    self.changed_profiles.insert(name.clone());
                }
                for direction in DIRECTIONS {
                    let unit = Unit::Profile(name.clone(), direction);
                    self.render_writers(&unit);
                    self.dirty.insert(unit);
                }
            }
            Delta::PolicyRemove { id } => {
                self.policies.remove(id);
                self.dirty
                    .extend(DIRECTIONS.map(|direction| Unit::Policy(id.clone(), direction)));
            }
            Delta::ProfileRemove { name } => {
                self.profiles.remove(name);
                self.dirty
                    .extend(DIRECTIONS.map(|direction| Unit::Profile(name.clone(), direction)));
            }
            Delta::Endpoint { id, endpoint } => self.put_endpoint(id, endpoint),
            Delta::EndpointRemove { id } => self.remove_endpoint(id),
        }
    }

    /// Puts the place for forbidden flows up, or takes it away, see [`super::held_set`].
    pub fn set_holding(&mut self, holding: bool) {
        let (chains, sets) = super::held::names();
        if holding {
            // What is there may be in use.
            if !self.desired.program.sets.contains_key(&sets[0]) {
                for set in super::held::sets() {
                    self.desired.put_set(set);
                }
            }
            for chain in super::held::chains() {
                self.desired.put_chain(chain);
            }
        } else {
            chains
                .iter()
                .for_each(|chain| self.desired.remove_chain(chain));
            sets.iter().for_each(|set| self.desired.remove_set(set));
        }
    }

    pub(super) fn put_base_chains(&mut self) {
        let (chains, absent) = base::chains(base::Ground {
            settings: &self.settings,
            hosts: &self.hosts.shape,
            tunnels: &self.tunnel_peers,
            services: !self.service_nets.is_empty(),
            limited: &self.limited,
            ipvs: self.ipvs.active,
        });
        for chain in chains {
            self.desired.put_chain(chain);
        }
        absent
            .iter()
            .for_each(|name| self.desired.remove_chain(name));
    }

    /// Stacks that have the rules of a policy or profile written out must be rendered again.
    fn render_writers(&mut self, unit: &Unit) {
        let stacks = self.writers.get(unit).into_iter().flatten();
        self.dirty.extend(stacks.cloned().map(Unit::Stack));
    }

    /// What looks a set up must be rendered again.
    fn render_users(&mut self, id: &IpSetId, reshaped: Reshaped) {
        match reshaped {
            Reshaped::Nothing => {}
            Reshaped::Set => self
                .dirty
                .extend(self.set_users.get(id).into_iter().flatten().cloned()),
            Reshaped::Family => self
                .dirty
                .extend(self.set_users.values().flatten().cloned()),
        }
    }

    fn put_tunnel_peers(&mut self) {
        for set in base::peer_sets(&self.tunnel_peers) {
            self.desired.put_set(set);
        }
        let chain = base::input_tunnels(&self.settings, &self.tunnel_peers);
        self.desired.put_chain(chain);
    }

    fn put_pools(&mut self, pools: &[PoolNat]) {
        for set in base::pool_sets(pools) {
            self.desired.put_set(set);
        }
    }

    fn put_services(&mut self) {
        for set in base::service_sets(&self.service_nets) {
            self.desired.put_set(set);
        }
    }

    // ---- stacks

    pub(super) fn acquire_stack(&mut self, stack: Stack) -> Arc<str> {
        let name = stack.name();
        if let Some(known) = self.stacks.get_mut(&name) {
            known.users += 1;
            return name;
        }
        let users = if stack.place.writes_out() {
            &mut self.writers
        } else {
            &mut self.askers
        };
        for unit in askees(&stack) {
            users.entry(unit.clone()).or_default().insert(name.clone());
            if !self.desired.program.chains.contains_key(&unit.chain()) {
                self.dirty.insert(unit);
            }
        }
        self.stacks.insert(
            name.clone(),
            KnownStack {
                stack,
                users: 1,
                next: Vec::new(),
                inlined: BTreeSet::new(),
            },
        );
        self.dirty.insert(Unit::Stack(name.clone()));
        name
    }

    /// The direction of a stack and the policies that its chain asks.
    pub(super) fn asked_by(
        &self,
        name: &Arc<str>,
    ) -> (Direction, impl Iterator<Item = &ObjectKey>) {
        let known = self.stacks.get(name);
        let direction = known.map_or(Direction::Ingress, |known| known.stack.direction);
        let tiers = known.into_iter().flat_map(|known| known.stack.reached());
        (direction, tiers.flat_map(|tier| &tier.policies))
    }

    pub(super) fn release_stack(&mut self, name: &Arc<str>) {
        let Some(known) = self.stacks.get_mut(name) else {
            return;
        };
        known.users -= 1;
        // It may be wanted again by a later delta of the batch.
        if known.users == 0 {
            self.dirty.insert(Unit::Stack(name.clone()));
        }
    }

    fn drop_stack(&mut self, name: &Arc<str>) {
        let Some(known) = self.stacks.remove(name) else {
            return;
        };
        let users = if known.stack.place.writes_out() {
            &mut self.writers
        } else {
            &mut self.askers
        };
        for unit in askees(&known.stack) {
            if let Some(stacks) = users.get_mut(&unit) {
                stacks.remove(name);
                if stacks.is_empty() {
                    users.remove(&unit);
                    self.dirty.insert(unit);
                } else if let Unit::Policy(id, _) = &unit
                    && !known.inlined.contains(id)
                {
                    // Perhaps the others have it written out.
                    let inlines = |stack: &Arc<str>| {
                        let other = self.stacks.get(stack);
                        other.is_some_and(|other| other.inlined.contains(id))
                    };
                    if stacks.iter().any(inlines) {
                        self.dirty.insert(unit);
                    }
                }
            }
        }
        self.put_unit(&Unit::Stack(name.clone()), name, None);
        known.next.iter().for_each(|next| self.release_stack(next));
    }

    // ---- rendering

    fn render(&mut self, unit: &Unit) {
        match unit {
            Unit::Stack(name) => match self.stacks.get(name) {
                Some(known) if known.users > 0 => self.render_stack(name),
                _ => self.drop_stack(name),
            },
            Unit::Policy(id, direction) => {
                let chain = names::policy_chain(id, *direction);
                // A policy that passes is written out where it is asked; others, where that is worth it.
                let by_itself = self.askers.get(unit).into_iter().flatten().any(|stack| {
                    let known = self.stacks.get(stack);
                    known.is_some_and(|known| !known.inlined.contains(id))
                });
                let rules = self
                    .policies
                    .get(id)
                    .filter(|rules| by_itself && !passes(rules, *direction))
                    .cloned();
                self.render_rules(
                    unit,
                    &chain,
                    &names::policy_text(id),
                    rules.as_deref(),
                    *direction,
                    &id.to_string(),
                );
            }
            Unit::Profile(name, direction) => {
                let chain = names::profile_chain(name, *direction);
                let rules = self.profiles.get(name).cloned();
                let owner = format!("pro/{name}");
                self.render_rules(
                    unit,
                    &chain,
                    &owner,
                    rules.as_deref(),
                    *direction,
                    &format!("Profile({name})"),
                );
            }
        }
    }

    fn render_rules(
        &mut self,
        unit: &Unit,
        chain: &Arc<str>,
        owner: &str,
        rules: Option<&Rules>,
        direction: Direction,
        about: &str,
    ) {
        let Some(rules) = rules.filter(|_| self.askers.contains_key(unit)) else {
            self.put_unit(unit, chain, None);
            return;
        };
        let mut rendered = Rendered::default();
        let rules = rules.of(direction);
        Endings {
            settings: &self.settings,
            place: Place::Endpoint,
            direction,
            owner,
            pass: None,
        }
        .render(rules, &self.sets, &mut rendered);
        let sets = rules
            .iter()
            .flat_map(crate::calc::Rule::set_ids)
            .cloned()
            .collect();
        self.put_unit(unit, chain, Some((rendered, sets, comment(about))));
    }

    fn render_stack(&mut self, name: &Arc<str>) {
        let Some(stack) = self.stacks.get(name).map(|known| known.stack.clone()) else {
            return;
        };
        let direction = stack.direction;
        let mut rendered = Rendered::default();
        let mut sets = BTreeSet::new();
        let mut next = Vec::new();
        let mut inlined = BTreeSet::new();
        for (position, tier) in stack.reached().iter().enumerate() {
            let mut asked = 0;
            while let Some(id) = tier.policies.get(asked) {
                // What is written out has verdicts of its own.
                let run = if stack.place.writes_out() {
                    Vec::new()
                } else {
                    self.allow_run(&tier.policies[asked..], direction)
                };
                if !run.is_empty() {
                    let texts: Vec<String> =
                        run.iter().map(|(id, _)| names::policy_text(id)).collect();
                    let items = run.iter().zip(&texts).flat_map(|((_, rules), owner)| {
                        let numbered = rules.of(direction).iter().enumerate();
                        numbered.map(|(number, rule)| Allowed {
                            owner,
                            number,
                            rule,
                        })
                    });
                    collapse(items, direction, &self.sets, &mut rendered);
                    for (id, rules) in &run {
                        inlined.insert((*id).clone());
                        let rules = rules.of(direction).iter();
                        sets.extend(rules.flat_map(crate::calc::Rule::set_ids).cloned());
                    }
                    asked += run.len();
                    continue;
                }
                asked += 1;
                let rules = self
                    .policies
                    .get(id)
                    .filter(|rules| stack.place.writes_out() || passes(rules, direction))
                    .cloned();
                let Some(rules) = rules else {
                    rendered.rules.push(ask(names::policy_chain(id, direction)));
                    continue;
                };
                let pass =
                    passes(&rules, direction).then(|| self.acquire_stack(stack.after(position)));
                let owner = names::policy_text(id);
                let rules = rules.of(direction);
                let written = rendered.rules.len();
                Endings {
                    settings: &self.settings,
                    place: stack.place,
                    direction,
                    owner: &owner,
                    pass: pass.clone(),
                }
                .render(rules, &self.sets, &mut rendered);
                if let Some(pass) = pass {
                    // A rule that can match nobody at present is not written.
                    if leads_to(&rendered.rules[written..], &pass) {
                        next.push(pass);
                    } else {
                        self.release_stack(&pass);
                    }
                }
                sets.extend(rules.iter().flat_map(crate::calc::Rule::set_ids).cloned());
            }
            if tier.default_action == TierDefault::Deny {
                rendered.rules.push(deny_rest(
                    &self.settings,
                    stack.place,
                    &format!("end of tier {}", tier.tier),
                ));
            }
        }
        if stack.reaches_profiles() {
            for profile in &stack.profiles {
                if !stack.place.writes_out() {
                    let chain = names::profile_chain(profile, direction);
                    rendered.rules.push(ask(chain));
                    continue;
                }
                let rules = self.profiles.get(profile).cloned().unwrap_or_default();
                let rules = rules.of(direction);
                let owner = format!("pro/{profile}");
                Endings {
                    settings: &self.settings,
                    place: stack.place,
                    direction,
                    owner: &owner,
                    pass: None,
                }
                .render(rules, &self.sets, &mut rendered);
                sets.extend(rules.iter().flat_map(crate::calc::Rule::set_ids).cloned());
            }
            let reason = "no profile allows it";
            rendered
                .rules
                .push(deny_rest(&self.settings, stack.place, reason));
        }
        let about = stack.comment();
        self.put_unit(
            &Unit::Stack(name.clone()),
            name,
            Some((rendered, sets, about)),
        );
        if let Some(known) = self.stacks.get_mut(name) {
            let former = std::mem::replace(&mut known.next, next);
            let were = std::mem::replace(&mut known.inlined, inlined);
            // Whether a policy needs a chain of its own may have changed.
            let moved = were.symmetric_difference(&known.inlined);
            self.dirty
                .extend(moved.map(|id| Unit::Policy(id.clone(), direction)));
            former.iter().for_each(|next| self.release_stack(next));
        }
    }

    /// The policies at the start of these that are to be written out together.
    fn allow_run<'a>(
        &self,
        policies: &'a [ObjectKey],
        direction: Direction,
    ) -> Vec<(&'a ObjectKey, Arc<Rules>)> {
        let run: Vec<(&ObjectKey, Arc<Rules>)> = policies
            .iter()
            .map_while(|id| {
                let rules = self.policies.get(id)?;
                allows_only(rules, direction).then(|| (id, rules.clone()))
            })
            .collect();
        let lengths = run.iter().map(|(_, rules)| rules.of(direction).len());
        if self.sets.thresholds.worth_in_tier(lengths) {
            run
        } else {
            Vec::new()
        }
    }

    /// Puts a unit's chain and what it looks up in place; `None` takes them away.
    fn put_unit(
        &mut self,
        unit: &Unit,
        chain: &Arc<str>,
        content: Option<(Rendered, BTreeSet<IpSetId>, String)>,
    ) {
        let mut needs = Needs::default();
        match content {
            Some((rendered, sets, about)) => {
                needs.sets = sets;
                self.put_shared(&rendered, &mut needs);
                let chain = Chain {
                    comment: Some(about),
                    ..Chain::regular(chain.clone())
                };
                self.desired
                    .put_chain(ChainProgram::new(chain, rendered.rules));
            }
            None => self.desired.remove_chain(chain),
        }
        for id in &needs.sets {
            self.set_users
                .entry(id.clone())
                .or_default()
                .insert(unit.clone());
        }
        let former = self.needs.remove(unit).unwrap_or_default();
        for id in former.sets.difference(&needs.sets) {
            if let Some(users) = self.set_users.get_mut(id) {
                users.remove(unit);
                if users.is_empty() {
                    self.set_users.remove(id);
                }
            }
        }
        for name in former.shared {
            self.release_shared(&name);
        }
        if !(needs.sets.is_empty()
            && needs.shared.is_empty()
            && !self.desired.program.chains.contains_key(chain))
        {
            self.needs.insert(unit.clone(), needs);
        }
    }
}

fn leads_to(rules: &[NftRule], chain: &Arc<str>) -> bool {
    let leads = |expr: &Expr| matches!(expr, Expr::Verdict(Verdict::Goto(to) | Verdict::Jump(to)) if to == chain);
    rules.iter().flat_map(|rule| &rule.exprs).any(leads)
}

fn passes(rules: &Rules, direction: Direction) -> bool {
    rules
        .of(direction)
        .iter()
        .any(|rule| rule.action == Action::Pass)
}

/// The policies and profiles that the chain of a stack leads to.
fn askees(stack: &Stack) -> impl Iterator<Item = Unit> {
    let direction = stack.direction;
    let policies = stack.reached().iter().flat_map(|tier| &tier.policies);
    let profiles = stack.profiles.iter().filter(|_| stack.reaches_profiles());
    policies
        .map(move |id| Unit::Policy(id.clone(), direction))
        .chain(profiles.map(move |name| Unit::Profile(name.clone(), direction)))
}
