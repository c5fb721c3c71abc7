//! Many Allow rules as few lookups.
//!
//! Rules that all allow, one after another, may be asked in any order: whichever matches, the packet passes. So a run
//! of them, within a policy or over the policies of a tier, becomes
//!
//! 1. a verdict map on `meta l4proto . th dport` that leads to a small chain with the rules of that port, and
//! 2. the rules without (few) ports.
//!
//! In both places the rules that look at nothing but one selector's set become ONE lookup in a map from address to the
//! chain that counts for the first policy with the address. Sets with more than [`Thresholds::small_set`]
//! members are looked up by themselves, after the map: they would be copied into each map that they are part of.
//!
//! What a run must not contain: anything but Allow. Deny, Pass and Log depend on what stands before them.
//!
//! Chains are named by their content, so that stacks share them. Counters are those of the policy that is first among
//! the matching ones of the same shape.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_netlink::nft::{
    Chain, DataType, Elem, Expr, Key, KeyType, Meta, Reg, Rule as NftRule, Set, Verdict,
};

use super::expr::{self, Side, counter};
use super::names;
use super::program::{ChainProgram, SetProgram};
use super::rule::{Rendered, Sets};
use super::stack::comment;
use crate::calc::{Action, Direction, IpSetId, IpVersion, Rule, Rules};

const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];
/// Ports of a rule that are dispatched one by one; a rule with more is asked by itself.
const PORTS: usize = 8;
/// What one policy costs at most where [`Thresholds::tier`] is concerned: a longer one has maps of its own.
const POLICY_COST: usize = 4;

/// From where on rules become lookups. The verdicts do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Thresholds {
    /// A run of so many rules within one policy is worth a map.
    pub policy: usize,
    /// Policies of a tier are written out together from so many rules on, of which four at most count for each.
    pub tier: usize,
    /// So many sets are looked up one by one.
    pub few_sets: usize,
    /// A set with more members is looked up by itself: it would be copied into each map that it is part of.
    pub small_set: usize,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            policy: 8,
            tier: 24,
            few_sets: 2,
            small_set: 256,
        }
    }
}

impl Thresholds {
    /// Everything that can be a lookup is one: for tests.
    pub const EAGER: Self = Self {
        policy: 1,
        tier: 1,
        few_sets: 0,
        small_set: 2,
    };

    /// Whether policies with so many rules each are to be written out together.
    pub(super) fn worth_in_tier(&self, lengths: impl Iterator<Item = usize>) -> bool {
        lengths.map(|len| len.min(POLICY_COST)).sum::<usize>() >= self.tier
    }

    /// How many rules from `from` on make a run that is worth it; 0 if it is not.
    pub(super) fn run_within(&self, rules: &[Rule], from: usize) -> usize {
        let run = rules[from..]
            .iter()
            .take_while(|rule| rule.action == Action::Allow)
            .count();
        if run >= self.policy { run } else { 0 }
    }
}

/// An Allow rule and whose it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowed<'a> {
    /// The policy as in comments.
    pub(super) owner: &'a str,
    /// Which of its rules.
    pub(super) number: usize,
    pub(super) rule: &'a Rule,
}

/// A map from address to the counting chain of the first set that has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Union {
    pub(super) version: IpVersion,
    /// Sets in order, and where their members lead.
    pub(super) parts: Vec<(IpSetId, Arc<str>)>,
}

/// Whether all rules of a direction allow.
pub(super) fn allows_only(rules: &Rules, direction: Direction) -> bool {
    rules
        .of(direction)
        .iter()
        .all(|rule| rule.action == Action::Allow)
}

/// Adds the kernel rules of a run.
pub(super) fn collapse<'a>(
    items: impl IntoIterator<Item = Allowed<'a>>,
    direction: Direction,
    sets: &impl Sets,
    into: &mut Rendered,
) {
    type AtPort<'a> = Vec<(Allowed<'a>, Arc<Rule>)>;
    let mut by_port: BTreeMap<(u8, u16), AtPort<'a>> = BTreeMap::new();
    let mut rest: Vec<(Allowed<'a>, Arc<Rule>)> = Vec::new();
    for item in items {
        match ports(item.rule) {
            Some((protocol, ports)) => {
                let residual = Arc::new(without_ports(item.rule));
                for port in ports {
                    let key = (protocol, port);
                    by_port
                        .entry(key)
                        .or_default()
                        .push((item, residual.clone()));
                }
            }
            None => rest.push((item, Arc::new(item.rule.clone()))),
        }
    }
    if let [((_, _), only)] = by_port.iter().collect::<Vec<_>>().as_slice()
        && only.len() <= sets.thresholds().few_sets
    {
        // A map for one port is not worth it.
        rest.extend(
            only.iter()
                .map(|(item, _)| (*item, Arc::new(item.rule.clone()))),
        );
        by_port.clear();
    }
    if !by_port.is_empty() {
        let mut leaves = Vec::with_capacity(by_port.len());
        for ((protocol, port), items) in by_port {
            let mut leaf = Rendered::default();
            alternatives(&items, direction, sets, &mut leaf);
            let chain = leaf_chain(protocol, port, leaf.rules);
            leaves.push((protocol, port, chain.chain.name.clone()));
            into.chains.insert(chain.chain.name.clone(), chain);
            into.chains.append(&mut leaf.chains);
            into.literals.append(&mut leaf.literals);
            into.unions.append(&mut leaf.unions);
        }
        dispatch(&leaves, into);
    }
    alternatives(&rest, direction, sets, into);
}

/// The protocol and the ports by which a rule can be found; `None` if it must be asked by itself.
fn ports(rule: &Rule) -> Option<(u8, Vec<u16>)> {
    let protocol = rule
        .protocol
        .filter(|number| matches!(number, 6 | 17 | 132))?;
    let peer = &rule.destination;
    let only_numbers =
        peer.port_sets.is_empty() && peer.not_ports.is_empty() && peer.not_port_sets.is_empty();
    let count: usize = peer
        .ports
        .iter()
        .map(|range| usize::from(range.last - range.first) + 1)
        .sum();
    let fits = only_numbers
        && rule.not_protocol.is_none()
        && rule.icmp.is_none()
        && rule.not_icmp.is_none()
        && (1..=PORTS).contains(&count);
    let mut all: Vec<u16> = Vec::with_capacity(count.min(PORTS));
    if fits {
        all.extend(peer.ports.iter().flat_map(|range| range.first..=range.last));
        all.sort_unstable();
        all.dedup();
    }
    fits.then_some((protocol, all))
}

/// What is left to ask where protocol and port are known.
fn without_ports(rule: &Rule) -> Rule {
    let mut residual = rule.clone();
    residual.protocol = None;
    residual.destination.ports.clear();
    residual
}

/// Rules of which any may match.
fn alternatives(
    items: &[(Allowed<'_>, Arc<Rule>)],
    direction: Direction,
    sets: &impl Sets,
    into: &mut Rendered,
) {
    let any = Rule::any(Action::Allow);
    if let Some((item, _)) = items.iter().find(|(_, residual)| **residual == any) {
        // Whatever else is there.
        push(item, &any, direction, sets, into);
        return;
    }
    let mut seen: BTreeSet<&Rule> = BTreeSet::new();
    let mut parts: Vec<(&IpSetId, &Allowed<'_>, &Rule)> = Vec::new();
    let mut others = Vec::new();
    for (item, residual) in items {
        if !seen.insert(residual) {
            continue;
        }
        match only_set(residual, direction) {
            Some(id) if sets.is_small(id) => parts.push((id, item, residual)),
            _ => others.push((item, residual)),
        }
    }
    if parts.len() <= sets.thresholds().few_sets {
        for (_, item, residual) in parts {
            push(item, residual, direction, sets, into);
        }
    } else {
        union(&parts, direction, sets, into);
    }
    for (item, residual) in others {
        push(item, residual, direction, sets, into);
    }
}

/// The set of the peer, if a rule looks at nothing else.
fn only_set(rule: &Rule, direction: Direction) -> Option<&IpSetId> {
    let (peer, own) = match direction {
        Direction::Ingress => (&rule.source, &rule.destination),
        Direction::Egress => (&rule.destination, &rule.source),
    };
    let [id] = peer.sets.as_slice() else {
        return None;
    };
    let nothing_else = own.is_any()
        && peer.nets.is_empty()
        && peer.not_nets.is_empty()
        && peer.not_sets.is_empty()
        && peer.ports.is_empty()
        && peer.port_sets.is_empty()
        && peer.not_ports.is_empty()
        && peer.not_port_sets.is_empty()
        && rule.ip_version.is_none()
        && rule.protocol.is_none()
        && rule.not_protocol.is_none()
        && rule.icmp.is_none()
        && rule.not_icmp.is_none();
    nothing_else.then_some(id)
}

fn push(
    item: &Allowed<'_>,
    residual: &Rule,
    direction: Direction,
    sets: &impl Sets,
    into: &mut Rendered,
) {
    let verdict = [counter(), Expr::Verdict(Verdict::Accept)];
    let text = comment(&format!("{} {direction} {} allow", item.owner, item.number));
    into.push(residual, sets, &verdict, &text);
}

/// One lookup for all these sets.
fn union(
    parts: &[(&IpSetId, &Allowed<'_>, &Rule)],
    direction: Direction,
    sets: &impl Sets,
    into: &mut Rendered,
) {
    let side = match direction {
        Direction::Ingress => Side::Source,
        Direction::Egress => Side::Destination,
    };
    let mut led = Vec::with_capacity(parts.len());
    for (id, item, _) in parts {
        let chain = counting_chain(item.owner, direction);
        led.push(((*id).clone(), chain.chain.name.clone()));
        into.chains.insert(chain.chain.name.clone(), chain);
    }
    for version in VERSIONS
        .into_iter()
        .filter(|version| sets.has_family(*version))
    {
        let name = names::union_map(version, &led);
        let mut exprs = expr::family(version).to_vec();
        exprs.push(expr::load_address(side, version, Reg::R1));
        exprs.push(Expr::VerdictMap {
            map: name.clone(),
            sreg: Reg::R1,
        });
        into.rules.push(NftRule::new(exprs));
        let parts = led.clone();
        into.unions.insert(name, Union { version, parts });
    }
    // The networks among the members are in interval sets.
    for (id, item, _) in parts {
        let verdict = [counter(), Expr::Verdict(Verdict::Accept)];
        let text = comment(&format!("{} {direction} {} allow", item.owner, item.number));
        for version in VERSIONS {
            if sets.has_networks(id, version) {
                let lookup = expr::address_in(side, version, names::wide_set(id, version), false);
                let exprs = [&expr::family(version)[..], &lookup, &verdict].concat();
                into.rules.push(NftRule::new(exprs).comment(text.clone()));
            }
        }
    }
}

/// Where a policy's packets are counted that a map let pass.
fn counting_chain(owner: &str, direction: Direction) -> ChainProgram {
    let rule = NftRule::new([counter(), Expr::Verdict(Verdict::Accept)])
        .comment(comment(&format!("{owner} {direction} allow")));
    let chain = Chain {
        comment: Some(comment(owner)),
        ..Chain::regular(names::counting_chain(owner, direction))
    };
    ChainProgram::new(chain, [rule])
}

fn leaf_chain(protocol: u8, port: u16, rules: Vec<NftRule>) -> ChainProgram {
    let mut chain = ChainProgram::new(Chain::regular("cali-l"), rules);
    let text = chain
        .tags()
        .map(|tag| format!("{:x}", tag.unwrap_or_default()))
        .collect::<Vec<_>>()
        .join(",");
    chain.chain.name = names::leaf_chain(&format!("{protocol} {port} {text}"));
    let name = match protocol {
        6 => "tcp",
        17 => "udp",
        _ => "sctp",
    };
    chain.chain.comment = Some(format!("allowed to {name} port {port}"));
    chain
}

/// `meta l4proto . th dport vmap`.
fn dispatch(leaves: &[(u8, u16, Arc<str>)], into: &mut Rendered) {
    let text = leaves
        .iter()
        .map(|(protocol, port, leaf)| format!("{protocol} {port} {leaf}"))
        .collect::<Vec<_>>()
        .join(",");
    let map = names::literal_set("d", &text);
    let key = KeyType::concat(&[DataType::InetProto, DataType::InetService]);
    let elements = leaves.iter().map(|(protocol, port, leaf)| {
        Elem::new(Key::concat(&[Key::byte(*protocol), Key::port(*port)]))
            .verdict(Verdict::Jump(leaf.clone()))
    });
    let set = SetProgram::new(Set::verdict_map(map.clone(), key)).with(elements);
    into.literals.insert(map.clone(), set);
    into.rules.push(NftRule::new([
        Expr::Meta {
            key: Meta::L4Proto,
            dreg: Reg::word(0),
        },
        expr::load_port(Side::Destination, Reg::word(1)),
        Expr::VerdictMap {
            map,
            sreg: Reg::word(0),
        },
    ]));
}
