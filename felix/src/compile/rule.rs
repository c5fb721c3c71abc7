//! One policy rule as kernel rules.
//!
//! A rule is a conjunction, and so is a kernel rule. Where the policy has a choice (several
//! networks, ports by number or by name, addresses in the exact or the interval set of a selector)
//! the choice becomes a set if it can, and otherwise one kernel rule for each alternative. All
//! alternatives have the same verdict, so that it does not matter which of them matches.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::Cidr;
use cali_netlink::nft::{DataType, Elem, Expr, Key, KeyType, Rule as NftRule, Set};

use super::collapse::{Thresholds, Union};
use super::expr::{self, Side};
use super::names;
use super::program::{ChainProgram, SetProgram};
use crate::calc::{IpSetId, IpVersion, PeerMatch, PortRange, Rule};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// What rendering needs to know of the sets in use.
pub(super) trait Sets {
    /// From where on rules become lookups.
    fn thresholds(&self) -> Thresholds;
    /// Whether the set has at most [`Thresholds::small_set`] members.
    fn is_small(&self, id: &IpSetId) -> bool;
    /// Whether any set has members of this family, so that each has a set of it.
    fn has_family(&self, version: IpVersion) -> bool;
    /// Whether the set has networks among its members, so that its interval set is there.
    fn has_networks(&self, id: &IpSetId, version: IpVersion) -> bool;
}

/// Kernel rules, and what they lead to that is named by its content.
#[derive(Debug, Default)]
pub(super) struct Rendered {
    pub(super) rules: Vec<NftRule>,
    /// Sets and maps of constants.
    pub(super) literals: BTreeMap<Arc<str>, SetProgram>,
    /// Chains that several places may share.
    pub(super) chains: BTreeMap<Arc<str>, ChainProgram>,
    /// Maps that follow the members of sets.
    pub(super) unions: BTreeMap<Arc<str>, Union>,
}

/// The alternatives of one condition, each a list of expressions; empty when it can never hold.
type Choice = Vec<Vec<Expr>>;

impl Rendered {
    /// Adds the kernel rules of `rule`: its matches and then `verdict`.
    pub(super) fn push(&mut self, rule: &Rule, sets: &impl Sets, verdict: &[Expr], comment: &str) {
        let mut bodies = Vec::new();
        if depends_on_family(rule) {
            for version in [IpVersion::V4, IpVersion::V6] {
                if rule.ip_version.is_none_or(|only| only == version) {
                    for body in self.bodies(rule, Some(version), sets) {
                        bodies.push(
                            expr::family(version)
                                .into_iter()
                                .chain(body)
                                .collect::<Vec<_>>(),
                        );
                    }
                }
            }
        } else {
            bodies = self.bodies(rule, None, sets);
        }
        for mut body in bodies {
            body.extend_from_slice(verdict);
            self.rules.push(NftRule::new(body).comment(comment));
        }
    }

    /// The matches of a rule for one family, or for both when nothing in it depends on the family.
    fn bodies(
        &mut self,
        rule: &Rule,
        version: Option<IpVersion>,
        sets: &impl Sets,
    ) -> Vec<Vec<Expr>> {
        let mut choices: Vec<Choice> = Vec::new();
        let protocol = rule.protocol.or_else(|| {
            // ICMP types mean nothing in other protocols.
            let icmp = if version? == IpVersion::V4 {
                ICMP
            } else {
                ICMPV6
            };
            (rule.icmp.is_some() || rule.not_icmp.is_some()).then_some(icmp)
        });
        if let Some(number) = protocol {
            choices.push(vec![expr::protocol(number, false).into()]);
        }
        if let Some(number) = rule.not_protocol {
            choices.push(vec![expr::protocol(number, true).into()]);
        }
        for (icmp, negated) in [(rule.icmp, false), (rule.not_icmp, true)] {
            match icmp.map(|icmp| (icmp.icmp_type, icmp.code)) {
                Some((Some(icmp_type), code)) => {
                    choices.push(vec![expr::icmp(icmp_type, code, negated).into()]);
                }
                // Not even one ICMP message of any type.
                Some((None, _)) if negated => choices.push(Choice::new()),
                _ => {}
            }
        }
        // Cheap comparisons stand before set lookups.
        for (side, peer) in [
            (Side::Destination, &rule.destination),
            (Side::Source, &rule.source),
        ] {
            self.ports(side, peer, version, sets, &mut choices);
        }
        if let Some(version) = version {
            for (side, peer) in [
                (Side::Source, &rule.source),
                (Side::Destination, &rule.destination),
            ] {
                self.addresses(side, peer, version, sets, &mut choices);
            }
        }
        choices
            .into_iter()
            .fold(vec![Vec::new()], |bodies, choice| {
                let joined =
                    |body: &Vec<Expr>, more: &Vec<Expr>| body.iter().chain(more).cloned().collect();
                bodies
                    .iter()
                    .flat_map(|body| choice.iter().map(move |more| joined(body, more)))
                    .collect()
            })
    }

    fn ports(
        &mut self,
        side: Side,
        peer: &PeerMatch,
        version: Option<IpVersion>,
        sets: &impl Sets,
        choices: &mut Vec<Choice>,
    ) {
        // In a set that nobody of the family is in, nothing is found.
        let looked_up = version.filter(|version| sets.has_family(*version));
        let mut choice = Choice::new();
        match merge_ports(&peer.ports).as_slice() {
            [] => {}
            [range] => choice.push(expr::port(side, *range, false).into()),
            ranges => {
                let set = self.port_set(ranges);
                choice.push(expr::port_in_literal(side, set, false).into());
            }
        }
        if let Some(version) = looked_up {
            for id in &peer.port_sets {
                choice.push(
                    expr::port_in(side, version, names::exact_set(id, version), false).into(),
                );
            }
        }
        if !(peer.ports.is_empty() && peer.port_sets.is_empty()) {
            choices.push(choice);
        }
        match merge_ports(&peer.not_ports).as_slice() {
            [] => {}
            [range] => choices.push(vec![expr::port(side, *range, true).into()]),
            ranges => {
                let set = self.port_set(ranges);
                choices.push(vec![expr::port_in_literal(side, set, true).into()]);
            }
        }
        if let Some(version) = looked_up {
            for id in &peer.not_port_sets {
                choices.push(vec![
                    expr::port_in(side, version, names::exact_set(id, version), true).into(),
                ]);
            }
        }
    }

    fn addresses(
        &mut self,
        side: Side,
        peer: &PeerMatch,
        version: IpVersion,
        sets: &impl Sets,
        choices: &mut Vec<Choice>,
    ) {
        if !peer.nets.is_empty() {
            match outermost(&peer.nets, version).as_slice() {
                [] => choices.push(Choice::new()),
                [net] if net.is_default() => {}
                [net] => choices.push(vec![expr::network(side, *net, false)]),
                nets => {
                    let set = self.net_set(nets, version);
                    choices.push(vec![expr::address_in(side, version, set, false).into()]);
                }
            }
        }
        match outermost(&peer.not_nets, version).as_slice() {
            [] => {}
            [net] if net.is_default() => choices.push(Choice::new()),
            [net] => choices.push(vec![expr::network(side, *net, true)]),
            nets => {
                let set = self.net_set(nets, version);
                choices.push(vec![expr::address_in(side, version, set, true).into()]);
            }
        }
        if !sets.has_family(version) {
            if !peer.sets.is_empty() {
                choices.push(Choice::new());
            }
            return;
        }
        for id in &peer.sets {
            let mut choice =
                vec![expr::address_in(side, version, names::exact_set(id, version), false).into()];
            if sets.has_networks(id, version) {
                choice.push(
                    expr::address_in(side, version, names::wide_set(id, version), false).into(),
                );
            }
            choices.push(choice);
        }
        for id in &peer.not_sets {
            choices.push(vec![
                expr::address_in(side, version, names::exact_set(id, version), true).into(),
            ]);
            if sets.has_networks(id, version) {
                choices.push(vec![
                    expr::address_in(side, version, names::wide_set(id, version), true).into(),
                ]);
            }
        }
    }

    fn port_set(&mut self, ranges: &[PortRange]) -> Arc<str> {
        // Elements of an interval set need a transaction before their rule (`plan`).
        let exact = ranges.iter().all(|range| range.first == range.last);
        let text = |range: &PortRange| match exact {
            true => range.first.to_string(),
            false => format!("{}-{}", range.first, range.last),
        };
        let content = ranges.iter().map(text).collect::<Vec<_>>().join(",");
        let name = names::literal_set("p", &content);
        self.literals.entry(name.clone()).or_insert_with(|| {
            let key = KeyType::one(DataType::InetService);
            let (set, element): (_, fn(&PortRange) -> Elem) = if exact {
                let port = |range: &PortRange| Elem::new(Key::port(range.first));
                (Set::exact(name.clone(), key), port)
            } else {
                let ports =
                    |range: &PortRange| Elem::range(Key::port(range.first), Key::port(range.last));
                (Set::interval(name.clone(), key), ports)
            };
            SetProgram::new(set).with(ranges.iter().map(element))
        });
        name
    }

    fn net_set(&mut self, nets: &[Cidr], version: IpVersion) -> Arc<str> {
        let text = nets
            .iter()
            .map(Cidr::to_string)
            .collect::<Vec<_>>()
            .join(",");
        let name = names::literal_set("n", &text);
        self.literals
            .entry(name.clone())
            .or_insert_with(|| network_set(name.clone(), version).with(network_elems(nets)));
        name
    }
}

/// An interval set of addresses.
pub(super) fn network_set(name: Arc<str>, version: IpVersion) -> SetProgram {
    SetProgram::new(Set::interval(name, KeyType::one(address_type(version))))
}

/// Elements of an interval set. They must not overlap.
pub(super) fn network_elems(nets: &[Cidr]) -> impl Iterator<Item = Elem> {
    nets.iter().map(|net| {
        let (first, last) = expr::bounds(*net);
        Elem::range(Key::ip(first), Key::ip(last))
    })
}

/// The type of an address in a set's key.
pub(super) fn address_type(version: IpVersion) -> DataType {
    match version {
        IpVersion::V4 => DataType::Ipv4Addr,
        IpVersion::V6 => DataType::Ipv6Addr,
    }
}

/// The networks of one family without those that others cover, sorted.
pub(crate) fn outermost(nets: &[Cidr], version: IpVersion) -> Vec<Cidr> {
    let mut sorted: Vec<Cidr> = nets
        .iter()
        .filter(|net| IpVersion::of(net.addr()) == version)
        .copied()
        .collect();
    sorted.sort_unstable();
    let mut kept: Vec<Cidr> = Vec::with_capacity(sorted.len());
    for net in sorted {
        if kept.last().is_none_or(|outer| !outer.contains_cidr(&net)) {
            kept.push(net);
        }
    }
    kept
}

/// Sorted ranges that neither overlap nor touch.
pub(crate) fn merge_ports(ranges: &[PortRange]) -> Vec<PortRange> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<PortRange> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match merged.last_mut() {
            Some(last) if u32::from(range.first) <= u32::from(last.last) + 1 => {
                last.last = last.last.max(range.last)
            }
            _ => merged.push(range),
        }
    }
    merged
}

fn depends_on_family(rule: &Rule) -> bool {
    let addresses = |peer: &PeerMatch| {
        !(peer.nets.is_empty() && peer.not_nets.is_empty() && peer.set_ids().next().is_none())
    };
    let untyped = (rule.icmp.is_some() || rule.not_icmp.is_some()) && rule.protocol.is_none();
    rule.ip_version.is_some() || untyped || addresses(&rule.source) || addresses(&rule.destination)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u16, last: u16) -> PortRange {
        PortRange { first, last }
    }

    #[test]
    fn ports_that_touch_become_one_range() {
        let merged = merge_ports(&[
            range(8080, 8090),
            range(80, 80),
            range(81, 443),
            range(8085, 9000),
            range(65535, 65535),
        ]);
        assert_eq!(
            merged,
            [range(80, 443), range(8080, 9000), range(65535, 65535)]
        );
    }

    #[test]
    fn covered_networks_are_left_out_of_a_rule() {
        let nets = ["10.1.0.0/16", "10.0.0.0/8", "fd00::/8", "192.168.0.1/32"]
            .map(|net| net.parse().unwrap());
        assert_eq!(
            outermost(&nets, IpVersion::V4),
            ["10.0.0.0/8", "192.168.0.1/32"].map(|net| net.parse().unwrap())
        );
    }
}
