//! What the enforced state says about one flow: the same rules and sets that the kernel has, evaluated here.
//!
//! The dataplane asks it which established flows a change forbids. Unlike [`crate::verdict`], which reads the
//! objects of the whole cluster, it needs nothing that the compiler does not hold anyway, and an answer costs
//! a few lookups. Tests hold the two against each other.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::{Cidr, Key as ObjectKey};
use cali_netlink::nft::Key;

use super::compiler::{Compiler, Unit};
use super::names;
use crate::calc::{
    Action, Direction, Icmp, IpSetId, IpVersion, Member, PeerMatch, Rule, Rules, TierDefault,
    TierPolicies,
};
use crate::verdict::Packet;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Whose flows may have got another verdict.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Suspects {
    /// Everybody's.
    pub all: bool,
    /// Those of these addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Those of all addresses in these networks.
    pub networks: BTreeSet<Cidr>,
}

impl Suspects {
    /// Whether nobody is suspected.
    pub fn is_empty(&self) -> bool {
        !self.all && self.addresses.is_empty() && self.networks.is_empty()
    }

    /// Adds a network or a single address.
    pub fn add(&mut self, net: Cidr) {
        if net.is_host() {
            self.addresses.insert(net.addr());
        } else {
            self.networks.insert(net);
        }
    }

    /// Adds all of another one.
    pub fn merge(&mut self, other: Self) {
        self.all |= other.all;
        self.addresses.extend(other.addresses);
        self.networks.extend(other.networks);
    }

    /// Whether flows of this address are meant.
    pub fn covers(&self, addr: IpAddr) -> bool {
        self.all
            || self.addresses.contains(&addr)
            || self.networks.iter().any(|net| net.contains(addr))
    }
}

/// Whether a change of a set's members can forbid what was allowed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Narrows {
    by_addition: bool,
    by_removal: bool,
}

impl Narrows {
    fn rules(&mut self, rules: &[Rule], id: &IpSetId) {
        for rule in rules {
            for peer in [&rule.source, &rule.destination] {
                let positive = peer.sets.contains(id) || peer.port_sets.contains(id);
                let negative = peer.not_sets.contains(id) || peer.not_port_sets.contains(id);
                match rule.action {
                    Action::Allow => {
                        self.by_removal |= positive;
                        self.by_addition |= negative;
                    }
                    Action::Deny | Action::Pass => {
                        self.by_addition |= positive;
                        self.by_removal |= negative;
                    }
                    Action::Log => {}
                }
            }
        }
    }

    const fn both(self) -> bool {
        self.by_addition && self.by_removal
    }
}

impl Compiler {
    /// Whether the endpoint's policy lets a flow with this first packet pass; `None` for an endpoint that is not known.
    pub fn allows(
        &self,
        endpoint: &ObjectKey,
        packet: &Packet,
        direction: Direction,
    ) -> Option<bool> {
        let endpoint = &self.endpoints.get(endpoint)?.endpoint;
        let by_tiers = self.tiers_allow(endpoint.tiers(direction), packet, direction);
        Some(by_tiers.unwrap_or_else(|| self.profiles_allow(&endpoint.profiles, packet, direction)))
    }

    /// What these tiers say of a first packet; `None` where none of them decides.
    pub(super) fn tiers_allow(
        &self,
        tiers: &[TierPolicies],
        packet: &Packet,
        direction: Direction,
    ) -> Option<bool> {
        'tiers: for tier in tiers {
            for policy in &tier.policies {
                let rules = self.policies.get(policy);
                match rules.and_then(|rules| self.decide(rules, packet, direction)) {
                    Some(Action::Allow) => return Some(true),
                    Some(Action::Deny) => return Some(false),
                    Some(Action::Pass) => continue 'tiers,
                    Some(Action::Log) | None => {}
                }
            }
            if tier.default_action == TierDefault::Deny {
                return Some(false);
            }
        }
        None
    }

    /// What these profiles say of it; nothing is allowed that none of them allows.
    pub(super) fn profiles_allow(
        &self,
        profiles: &[Arc<str>],
        packet: &Packet,
        direction: Direction,
    ) -> bool {
        for profile in profiles {
            let rules = self.profiles.get(profile);
            match rules.and_then(|rules| self.decide(rules, packet, direction)) {
                Some(Action::Allow) => return true,
                Some(Action::Deny) => return false,
                Some(Action::Pass | Action::Log) | None => {}
            }
        }
        false
    }

    /// The action of the first rule that decides.
    fn decide(&self, rules: &Rules, packet: &Packet, direction: Direction) -> Option<Action> {
        let deciding = rules.of(direction).iter();
        deciding
            .filter(|rule| rule.action != Action::Log)
            .find(|rule| self.matches(rule, packet))
            .map(|rule| rule.action)
    }

    pub(super) fn matches(&self, rule: &Rule, packet: &Packet) -> bool {
        let version = IpVersion::of(packet.destination);
        let icmp_of_family = match version {
            IpVersion::V4 => ICMP,
            IpVersion::V6 => ICMPV6,
        };
        let about_icmp = rule.icmp.is_some() || rule.not_icmp.is_some();
        let protocol = rule.protocol.or(about_icmp.then_some(icmp_of_family));
        let is = |icmp: &Icmp| match (icmp.icmp_type, packet.icmp) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(kind), Some((its, code))) => {
                kind == its && icmp.code.is_none_or(|wanted| wanted == code)
            }
        };
        rule.ip_version.is_none_or(|only| only == version)
            && protocol.is_none_or(|number| number == packet.protocol)
            && rule
                .not_protocol
                .is_none_or(|number| number != packet.protocol)
            && rule.icmp.as_ref().is_none_or(is)
            && !rule.not_icmp.as_ref().is_some_and(is)
            && self.peer_matches(
                &rule.source,
                packet.source,
                packet.source_port,
                packet.protocol,
            )
            && self.peer_matches(
                &rule.destination,
                packet.destination,
                packet.destination_port,
                packet.protocol,
            )
    }

    fn peer_matches(&self, peer: &PeerMatch, addr: IpAddr, port: u16, protocol: u8) -> bool {
        let within = |nets: &[Cidr]| nets.iter().any(|net| net.contains(addr));
        let in_set = |id: &IpSetId| self.set_contains(id, addr);
        let named = |id: &IpSetId| self.port_set_contains(id, addr, protocol, port);
        let numbered = |ranges: &[crate::calc::PortRange]| {
            ranges
                .iter()
                .any(|range| (range.first..=range.last).contains(&port))
        };
        let any_port = peer.ports.is_empty() && peer.port_sets.is_empty();
        (peer.nets.is_empty() || within(&peer.nets))
            && !within(&peer.not_nets)
            && peer.sets.iter().all(in_set)
            && !peer.not_sets.iter().any(in_set)
            && (any_port || numbered(&peer.ports) || peer.port_sets.iter().any(named))
            && !numbered(&peer.not_ports)
            && !peer.not_port_sets.iter().any(named)
    }

    fn set_contains(&self, id: &IpSetId, addr: IpAddr) -> bool {
        let version = IpVersion::of(addr);
        let key = Key::ip(addr);
        let sets = &self.program().sets;
        if sets
            .get(&names::exact_set(id, version))
            .is_some_and(|set| set.elements.contains_key(&key))
        {
            return true;
        }
        // Ranges do not overlap: only the last that begins at or before the address can hold it.
        sets.get(&names::wide_set(id, version))
            .and_then(|set| set.elements.last_until(&key))
            .is_some_and(|elem| *elem.end.as_ref().unwrap_or(&elem.key) >= key)
    }

    /// Some addresses of a set.
    pub(super) fn some_members(&self, id: &IpSetId, most: usize) -> Vec<IpAddr> {
        let versions = [IpVersion::V4, IpVersion::V6].into_iter();
        let names = versions
            .flat_map(|version| [names::exact_set(id, version), names::wide_set(id, version)]);
        let sets = names.filter_map(|name| self.program().sets.get(&name));
        sets.flat_map(|set| set.elements.keys().take(most).filter_map(Key::as_ip))
            .collect()
    }

    fn port_set_contains(&self, id: &IpSetId, addr: IpAddr, protocol: u8, port: u16) -> bool {
        let key = Key::concat(&[Key::ip(addr), Key::byte(protocol), Key::port(port)]);
        self.program()
            .sets
            .get(&names::exact_set(id, IpVersion::of(addr)))
            .is_some_and(|set| set.elements.contains_key(&key))
    }

    /// Notes whose flows a change of a set may forbid. A set that only lets more pass suspects nobody.
    pub(super) fn suspect_members(&mut self, id: &IpSetId, added: &[Member], removed: &[Member]) {
        let mut narrows = Narrows::default();
        for unit in self.set_users.get(id).into_iter().flatten() {
            match unit {
                Unit::Policy(policy, direction) => {
                    if let Some(rules) = self.policies.get(policy) {
                        narrows.rules(rules.of(*direction), id);
                    }
                }
                Unit::Profile(profile, direction) => {
                    if let Some(rules) = self.profiles.get(profile) {
                        narrows.rules(rules.of(*direction), id);
                    }
                }
                // Policies that pass, and what is written out together.
                Unit::Stack(stack) => {
                    let (direction, policies) = self.asked_by(stack);
                    for rules in policies.filter_map(|policy| self.policies.get(policy)) {
                        narrows.rules(rules.of(direction), id);
                    }
                }
            }
            if narrows.both() {
                break;
            }
        }
        let meant = |member: &Member| match member {
            Member::Net(net) => *net,
            Member::Port { addr, .. } => Cidr::host(*addr),
        };
        let added = added.iter().filter(|_| narrows.by_addition);
        let removed = removed.iter().filter(|_| narrows.by_removal);
        for member in added.chain(removed) {
            self.suspects.add(meant(member));
        }
    }

    /// Whose flows may have got another verdict since the last call.
    pub fn take_suspects(&mut self) -> Suspects {
        let mut suspects = std::mem::take(&mut self.suspects);
        let policies = std::mem::take(&mut self.changed_policies);
        let profiles = std::mem::take(&mut self.changed_profiles);
        if policies.is_empty() && profiles.is_empty() {
            return suspects;
        }
        self.suspect_hosts(&policies, &profiles, &mut suspects);
        for known in self.endpoints.values() {
            let endpoint = &known.endpoint;
            let mut asked = endpoint
                .ingress
                .iter()
                .chain(&endpoint.egress)
                .flat_map(|tier| &tier.policies);
            if asked.any(|policy| policies.contains(policy))
                || endpoint
                    .profiles
                    .iter()
                    .any(|profile| profiles.contains(profile))
            {
                endpoint.addresses.iter().for_each(|net| suspects.add(*net));
            }
        }
        suspects
    }
}
