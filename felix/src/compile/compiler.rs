//! Keeps the desired program up to date, delta by delta, and remembers what it touched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::Key as ObjectKey;
use cali_netlink::nft::{
    Chain, DataType, Elem, Expr, Key, KeyType, Rule as NftRule, Set, Verdict, ct_state,
};
use foldhash::HashMap;

use super::desired::Desired;
use super::expr::{self, Side, counter};
use super::known_sets::KnownSets;
use super::program::{ChainProgram, Program, SetProgram, Touched};
use super::rule::Rendered;
use super::settings::Settings;
use super::stack::{Endings, Stack, ask, comment, deny_rest};
use super::{base, names};
use crate::calc::{
    Action, Batch, Delta, Direction, Endpoint, IpSetId, PoolNat, PortRange, Rules, TierDefault,
};

const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// Whose content a chain holds: what must be rendered again when something below changes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Unit {
    // Stacks come first: what they use decides which other chains are wanted.
    Stack(Arc<str>),
    Policy(ObjectKey, Direction),
    Profile(Arc<str>, Direction),
}

#[derive(Debug)]
struct KnownStack {
    stack: Stack,
    users: usize,
    /// Stacks that `Pass` leads to.
    next: Vec<Arc<str>>,
}

/// What a rendered chain depends on.
#[derive(Debug, Default)]
struct Needs {
    sets: BTreeSet<IpSetId>,
    literals: BTreeSet<Arc<str>>,
}

#[derive(Debug)]
struct KnownEndpoint {
    endpoint: Arc<Endpoint>,
    stacks: [Arc<str>; 2],
}

/// The desired state of table `inet calico`.
pub struct Compiler {
    settings: Settings,
    desired: Desired,
    sets: KnownSets,
    policies: HashMap<ObjectKey, Arc<Rules>>,
    profiles: HashMap<Arc<str>, Arc<Rules>>,
    endpoints: HashMap<ObjectKey, KnownEndpoint>,
    /// Endpoints by interface. One interface belongs to one endpoint; should two claim it, the
    /// first by name has it.
    interfaces: BTreeMap<Arc<str>, BTreeSet<ObjectKey>>,
    stacks: HashMap<Arc<str>, KnownStack>,
    /// Stacks that ask a policy or profile.
    askers: HashMap<Unit, BTreeSet<Arc<str>>>,
    needs: HashMap<Unit, Needs>,
    set_users: HashMap<IpSetId, BTreeSet<Unit>>,
    literal_users: HashMap<Arc<str>, usize>,
    dirty: BTreeSet<Unit>,
}

impl Default for Compiler {
    fn default() -> Self {
        let mut compiler = Self {
            settings: Settings::default(),
            desired: Desired {
                program: Program {
                    exists: true,
                    ..Program::absent()
                },
                touched: Touched::default(),
            },
            sets: KnownSets::default(),
            policies: HashMap::default(),
            profiles: HashMap::default(),
            endpoints: HashMap::default(),
            interfaces: BTreeMap::new(),
            stacks: HashMap::default(),
            askers: HashMap::default(),
            needs: HashMap::default(),
            set_users: HashMap::default(),
            literal_users: HashMap::default(),
            dirty: BTreeSet::new(),
        };
        for map in [names::FROM_WORKLOAD, names::TO_WORKLOAD] {
            compiler.desired.put_set(SetProgram::new(Set::verdict_map(
                map,
                KeyType::one(DataType::IfName),
            )));
        }
        compiler.put_base_chains();
        compiler.put_pools(&[]);
        compiler
    }
}

impl Compiler {
    /// Takes a batch in.
    pub fn apply(&mut self, batch: &Batch) {
        for delta in &batch.deltas {
            self.apply_delta(delta);
        }
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
                    self.dirty.extend(self.needs.keys().cloned());
                    let interfaces: Vec<_> = self.interfaces.keys().cloned().collect();
                    interfaces
                        .iter()
                        .for_each(|interface| self.put_interface(interface));
                }
            }
            Delta::Pools(pools) => self.put_pools(pools),
            Delta::IpSetCreate {
                id,
                kind,
                origin,
                members,
            } => self
                .sets
                .create(&mut self.desired, id, *kind, origin, members),
            Delta::IpSetChange { id, added, removed } => {
                if self.sets.change(&mut self.desired, id, added, removed) {
                    self.dirty
                        .extend(self.set_users.get(id).into_iter().flatten().cloned());
                }
            }
            Delta::IpSetRemove { id } => self.sets.remove(&mut self.desired, id),
            Delta::Policy { id, rules } => {
                let former = self.policies.insert(id.clone(), rules.clone());
                for direction in DIRECTIONS {
                    let unit = Unit::Policy(id.clone(), direction);
                    let written_out =
                        passes(rules, direction) || former.iter().any(|old| passes(old, direction));
                    if written_out && let Some(stacks) = self.askers.get(&unit) {
                        self.dirty.extend(stacks.iter().cloned().map(Unit::Stack));
                    }
                    self.dirty.insert(unit);
                }
            }
            Delta::Profile { name, rules } => {
                self.profiles.insert(name.clone(), rules.clone());
                self.dirty
                    .extend(DIRECTIONS.map(|direction| Unit::Profile(name.clone(), direction)));
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

    fn put_base_chains(&mut self) {
        for chain in base::chains(&self.settings) {
            self.desired.put_chain(chain);
        }
    }

    fn put_pools(&mut self, pools: &[PoolNat]) {
        for set in base::pool_sets(pools) {
            self.desired.put_set(set);
        }
    }

    // ---- endpoints

    fn put_endpoint(&mut self, id: &ObjectKey, endpoint: &Arc<Endpoint>) {
        let stacks = DIRECTIONS.map(|direction| {
            self.acquire_stack(Stack {
                direction,
                tiers: endpoint.tiers(direction).to_vec(),
                profiles: endpoint.profiles.clone(),
            })
        });
        let known = KnownEndpoint {
            endpoint: endpoint.clone(),
            stacks,
        };
        let former = self.endpoints.insert(id.clone(), known);
        self.interfaces
            .entry(endpoint.interface.clone())
            .or_default()
            .insert(id.clone());
        if let Some(former) = former {
            if former.endpoint.interface != endpoint.interface {
                self.leave_interface(id, &former.endpoint.interface);
            }
            former
                .stacks
                .iter()
                .for_each(|name| self.release_stack(name));
        }
        self.put_interface(&endpoint.interface);
    }

    fn remove_endpoint(&mut self, id: &ObjectKey) {
        let Some(former) = self.endpoints.remove(id) else {
            return;
        };
        self.leave_interface(id, &former.endpoint.interface);
        former
            .stacks
            .iter()
            .for_each(|name| self.release_stack(name));
    }

    fn leave_interface(&mut self, id: &ObjectKey, interface: &Arc<str>) {
        if let Some(owners) = self.interfaces.get_mut(interface) {
            owners.remove(id);
            if owners.is_empty() {
                self.interfaces.remove(interface);
            }
        }
        self.put_interface(interface);
    }

    /// The chains of an interface and the way to them.
    fn put_interface(&mut self, interface: &Arc<str>) {
        let owner = self
            .interfaces
            .get(interface)
            .and_then(BTreeSet::first)
            .cloned();
        for (direction, map) in [
            (Direction::Ingress, names::TO_WORKLOAD),
            (Direction::Egress, names::FROM_WORKLOAD),
        ] {
            let name = names::endpoint_chain(interface, direction);
            let key = Key::ifname(interface);
            match owner
                .as_ref()
                .and_then(|id| Some((id, self.endpoints.get(id)?)))
            {
                Some((id, known)) => {
                    let stack = known.stacks[direction as usize].clone();
                    let chain = self.endpoint_chain(&name, id, direction, stack);
                    self.desired.put_chain(chain);
                    self.desired
                        .put_element(map, Elem::new(key).verdict(Verdict::Goto(name)));
                }
                None => {
                    self.desired.remove_chain(&name);
                    self.desired.remove_element(map, &key);
                }
            }
        }
    }

    fn endpoint_chain(
        &self,
        name: &Arc<str>,
        id: &ObjectKey,
        direction: Direction,
        stack: Arc<str>,
    ) -> ChainProgram {
        let mut rules = Vec::new();
        let drop = [counter(), Expr::Verdict(Verdict::Drop)];
        if self.settings.drop_invalid {
            let exprs = [expr::ct_state_any(ct_state::INVALID).as_slice(), &drop].concat();
            rules.push(NftRule::new(exprs).comment("invalid"));
        }
        if direction == Direction::Egress {
            if !self.settings.allow_vxlan_from_workloads {
                let port = PortRange {
                    first: self.settings.vxlan_port,
                    last: self.settings.vxlan_port,
                };
                let to_port = expr::port(Side::Destination, port, false);
                let exprs = [&expr::protocol(17, false), to_port.as_slice(), &drop].concat();
                rules.push(NftRule::new(exprs).comment("VXLAN from a workload"));
            }
            if !self.settings.allow_ipip_from_workloads {
                let exprs = [expr::protocol(4, false).as_slice(), &drop].concat();
                rules.push(NftRule::new(exprs).comment("IPIP from a workload"));
            }
        }
        rules.push(NftRule::new([Expr::Verdict(Verdict::Goto(stack))]));
        let chain = Chain {
            comment: Some(comment(&id.to_string())),
            ..Chain::regular(name.clone())
        };
        ChainProgram::new(chain, rules)
    }

    // ---- stacks

    fn acquire_stack(&mut self, stack: Stack) -> Arc<str> {
        let name = stack.name();
        if let Some(known) = self.stacks.get_mut(&name) {
            known.users += 1;
            return name;
        }
        for unit in askees(&stack) {
            self.askers
                .entry(unit.clone())
                .or_default()
                .insert(name.clone());
            self.dirty.insert(unit);
        }
        self.stacks.insert(
            name.clone(),
            KnownStack {
                stack,
                users: 1,
                next: Vec::new(),
            },
        );
        self.dirty.insert(Unit::Stack(name.clone()));
        name
    }

    fn release_stack(&mut self, name: &Arc<str>) {
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
        for unit in askees(&known.stack) {
            if let Some(stacks) = self.askers.get_mut(&unit) {
                stacks.remove(name);
                if stacks.is_empty() {
                    self.askers.remove(&unit);
                    self.dirty.insert(unit);
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
                // A policy that passes is written out where it is asked.
                let rules = self
                    .policies
                    .get(id)
                    .filter(|rules| !passes(rules, *direction))
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
        for (position, tier) in stack.reached().iter().enumerate() {
            for id in &tier.policies {
                let rules = self
                    .policies
                    .get(id)
                    .filter(|rules| passes(rules, direction))
                    .cloned();
                let Some(rules) = rules else {
                    rendered.rules.push(ask(names::policy_chain(id, direction)));
                    continue;
                };
                let pass = self.acquire_stack(stack.after(position));
                next.push(pass.clone());
                let owner = names::policy_text(id);
                let rules = rules.of(direction);
                Endings {
                    settings: &self.settings,
                    direction,
                    owner: &owner,
                    pass: Some(pass),
                }
                .render(rules, &self.sets, &mut rendered);
                sets.extend(rules.iter().flat_map(crate::calc::Rule::set_ids).cloned());
            }
            if tier.default_action == TierDefault::Deny {
                rendered.rules.push(deny_rest(
                    &self.settings,
                    &format!("end of tier {}", tier.tier),
                ));
            }
        }
        if stack.reaches_profiles() {
            let chains = stack
                .profiles
                .iter()
                .map(|profile| names::profile_chain(profile, direction));
            rendered.rules.extend(chains.map(ask));
            rendered
                .rules
                .push(deny_rest(&self.settings, "no profile allows it"));
        }
        let about = stack.comment();
        self.put_unit(
            &Unit::Stack(name.clone()),
            name,
            Some((rendered, sets, about)),
        );
        if let Some(known) = self.stacks.get_mut(name) {
            let former = std::mem::replace(&mut known.next, next);
            former.iter().for_each(|next| self.release_stack(next));
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
                for (name, literal) in rendered.literals {
                    let users = self.literal_users.entry(name.clone()).or_default();
                    *users += 1;
                    if *users == 1 {
                        self.desired.put_set(literal);
                    }
                    needs.literals.insert(name);
                }
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
        for name in former.literals {
            if let Some(users) = self.literal_users.get_mut(&name) {
                *users -= 1;
                if *users == 0 {
                    self.literal_users.remove(&name);
                    self.desired.remove_set(&name);
                }
            }
        }
        if !(needs.sets.is_empty()
            && needs.literals.is_empty()
            && !self.desired.program.chains.contains_key(chain))
        {
            self.needs.insert(unit.clone(), needs);
        }
    }
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
