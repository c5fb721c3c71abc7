//! One policy rule as matches of iptables.
//!
//! Where the policy has a choice that no single match covers (ports by number or by name, more ports than `multiport`
//! takes), there is one kernel rule for each alternative; all have the same target. A list of networks becomes a set of
//! constants. A rule that can match no packet of a family is left out of it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::Cidr;
use cali_netlink::ipset::SetMember;

use super::names;
use crate::calc::{Icmp, IpVersion, PeerMatch, PortRange, Rule};
use crate::compile::{merge_ports, outermost};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Protocols that `multiport` knows: TCP, UDP, DCCP, SCTP, UDP-Lite.
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];
/// Ports that one `multiport` takes (`XT_MULTI_PORTS`); a range counts twice.
const MULTIPORT_SLOTS: usize = 15;

/// Sets of constants by name.
pub(super) type Literals = BTreeMap<Arc<str>, (IpVersion, Vec<Cidr>)>;

/// Alternatives of one condition; empty when it can never hold.
type Choice = Vec<String>;

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

impl Side {
    const fn word(self) -> &'static str {
        match self {
            Self::Source => "src",
            Self::Destination => "dst",
        }
    }

    const fn address(self) -> &'static str {
        match self {
            Self::Source => "-s",
            Self::Destination => "-d",
        }
    }

    const fn ports(self) -> &'static str {
        match self {
            Self::Source => "--sports",
            Self::Destination => "--dports",
        }
    }
}

/// The matches of a rule for one family, one text for each kernel rule; empty text where everything matches.
pub(super) fn matches(rule: &Rule, version: IpVersion, literals: &mut Literals) -> Vec<String> {
    if rule.ip_version.is_some_and(|only| only != version) {
        return Vec::new();
    }
    let own_icmp = match version {
        IpVersion::V4 => ICMP,
        IpVersion::V6 => ICMPV6,
    };
    let typed = rule.icmp.is_some() || rule.not_icmp.is_some();
    let protocol = rule.protocol.or(typed.then_some(own_icmp));
    if typed && protocol != Some(own_icmp) {
        // Types of the other family's ICMP, or of no ICMP at all.
        return Vec::new();
    }
    let mut choices: Vec<Choice> = Vec::new();
    choices.extend(protocol.map(|number| vec![format!("-p {number}")]));
    choices.extend(
        rule.not_protocol
            .filter(|_| protocol.is_none())
            .map(|number| vec![format!("! -p {number}")]),
    );
    if rule.not_protocol.is_some() && rule.not_protocol == protocol {
        return Vec::new();
    }
    for (icmp, negated) in [(rule.icmp, false), (rule.not_icmp, true)] {
        choices.extend(icmp.and_then(|icmp| icmp_choice(icmp, version, negated)));
    }
    for (side, peer) in [
        (Side::Destination, &rule.destination),
        (Side::Source, &rule.source),
    ] {
        ports(side, peer, protocol, version, &mut choices);
    }
    for (side, peer) in [
        (Side::Source, &rule.source),
        (Side::Destination, &rule.destination),
    ] {
        addresses(side, peer, version, literals, &mut choices);
    }
    choices
        .into_iter()
        .fold(vec![String::new()], |bodies, choice| {
            let joined = |body: &String, more: &String| match body.is_empty() {
                true => more.clone(),
                false => format!("{body} {more}"),
            };
            bodies
                .iter()
                .flat_map(|body| choice.iter().map(move |more| joined(body, more)))
                .collect()
        })
}

fn icmp_choice(icmp: Icmp, version: IpVersion, negated: bool) -> Option<Choice> {
    let Some(icmp_type) = icmp.icmp_type else {
        // Any message of the protocol, or none at all.
        return negated.then(Choice::new);
    };
    let number = match icmp.code {
        Some(code) => format!("{icmp_type}/{code}"),
        None => icmp_type.to_string(),
    };
    let not = if negated { "! " } else { "" };
    Some(vec![match version {
        IpVersion::V4 => format!("-m icmp {not}--icmp-type {number}"),
        IpVersion::V6 => format!("-m icmp6 {not}--icmpv6-type {number}"),
    }])
}

fn ports(
    side: Side,
    peer: &PeerMatch,
    protocol: Option<u8>,
    version: IpVersion,
    choices: &mut Vec<Choice>,
) {
    let has_ports = protocol.is_some_and(|number| WITH_PORTS.contains(&number));
    let word = side.word();
    if !(peer.ports.is_empty() && peer.port_sets.is_empty()) {
        let mut choice = Choice::new();
        if has_ports {
            choice.extend(multiports(&peer.ports, |ports| {
                format!("-m multiport {} {ports}", side.ports())
            }));
        }
        // A member says its protocol itself.
        choice.extend(peer.port_sets.iter().map(|id| {
            format!(
                "-m set --match-set {} {word},{word}",
                names::ip_set(id, version)
            )
        }));
        choices.push(choice);
    }
    if has_ports {
        for ports in multiports(&peer.not_ports, |ports| {
            format!("-m multiport ! {} {ports}", side.ports())
        }) {
            choices.push(vec![ports]);
        }
    }
    choices.extend(peer.not_port_sets.iter().map(|id| {
        vec![format!(
            "-m set ! --match-set {} {word},{word}",
            names::ip_set(id, version)
        )]
    }));
}

/// Port lists of at most [`MULTIPORT_SLOTS`].
fn multiports(ranges: &[PortRange], text: impl Fn(&str) -> String) -> Vec<String> {
    let mut all = Vec::new();
    let (mut list, mut used) = (Vec::new(), 0);
    for range in merge_ports(ranges) {
        let slots = if range.first == range.last { 1 } else { 2 };
        if used + slots > MULTIPORT_SLOTS {
            all.push(text(&std::mem::take(&mut list).join(",")));
            used = 0;
        }
        used += slots;
        list.push(match slots {
            1 => range.first.to_string(),
            _ => format!("{}:{}", range.first, range.last),
        });
    }
    if !list.is_empty() {
        all.push(text(&list.join(",")));
    }
    all
}

fn addresses(
    side: Side,
    peer: &PeerMatch,
    version: IpVersion,
    literals: &mut Literals,
    choices: &mut Vec<Choice>,
) {
    let word = side.word();
    // iptables takes one address of each side.
    let mut has_address = false;
    for (nets, negated) in [(&peer.nets, false), (&peer.not_nets, true)] {
        let not = if negated { "! " } else { "" };
        let outer = outermost(nets, version);
        match outer.as_slice() {
            // Only networks of the other family: nothing here can match.
            [] if !negated && !nets.is_empty() => choices.push(Choice::new()),
            [] => {}
            [net] if net.is_default() && negated => choices.push(Choice::new()),
            [net] if net.is_default() => {}
            [net] if !has_address => {
                choices.push(vec![format!("{not}{} {net}", side.address())]);
                has_address = true;
            }
            nets => {
                let set = literal(nets, version, literals);
                choices.push(vec![format!("-m set {not}--match-set {set} {word}")]);
            }
        }
    }
    for (sets, not) in [(&peer.sets, ""), (&peer.not_sets, "! ")] {
        choices.extend(sets.iter().map(|id| {
            vec![format!(
                "-m set {not}--match-set {} {word}",
                names::ip_set(id, version)
            )]
        }));
    }
}

fn literal(nets: &[Cidr], version: IpVersion, literals: &mut Literals) -> Arc<str> {
    let text: Vec<String> = nets.iter().map(Cidr::to_string).collect();
    let name = names::literal_set(&text.join(","), version);
    literals
        .entry(name.clone())
        .or_insert_with(|| (version, nets.to_vec()));
    name
}

/// A network as members of a `hash:net`, which cannot hold the network of everything.
pub(super) fn members(net: Cidr) -> impl Iterator<Item = SetMember> {
    let halves = net.is_default().then(|| match net.addr() {
        IpAddr::V4(_) => [
            SetMember::Net([0, 0, 0, 0].into(), 1),
            SetMember::Net([128, 0, 0, 0].into(), 1),
        ],
        IpAddr::V6(_) => {
            let upper = [0x8000, 0, 0, 0, 0, 0, 0, 0];
            [
                SetMember::Net([0_u16; 8].into(), 1),
                SetMember::Net(upper.into(), 1),
            ]
        }
    });
    let whole = halves
        .is_none()
        .then(|| SetMember::Net(net.addr(), net.prefix_len()));
    halves.into_iter().flatten().chain(whole)
}
