//! What stands whatever the policies are: base chains, anti-spoofing, workload to host, NAT outgoing.
//!
//! | chain | hook, priority | duty |
//! |---|---|---|
//! | `cali-raw-prerouting` | prerouting −300 | source addresses of workloads; outer VXLAN and WireGuard are not tracked; untracked policy |
//! | `cali-raw-output` | output −300 | the source of outer IPIP; outer VXLAN and WireGuard are not tracked; untracked policy |
//! | `cali-forward-from-wl` | forward 0 | policy of the sending workload, or of the host endpoint that packets come in by |
//! | `cali-forward-to-wl` | forward +1 | service addresses that nobody serves; policy of the receiving workload, or of the host endpoint that packets leave by |
//! | `cali-input-from-wl` | input 0 | policy of a workload that talks to the host; of host endpoints |
//! | `cali-input-tunnels` | input 0 | encapsulated packets come from nodes only |
//! | `cali-input-host` | input +1 | what the host takes from workloads at all |
//! | `cali-mangle-prerouting` | prerouting −150 | policy of host endpoints before destination NAT |
//! | `cali-output-host` | output 0 | policy of host endpoints for what the host sends |
//! | `cali-mangle-postrouting` | postrouting −150 | the same, where the destination was translated |
//! | `cali-egress-dscp` | postrouting −150 | code points of workloads (`limits`) |
//! | `cali-nat-postrouting` | postrouting nat 110 | NAT outgoing, after kube-proxy's masquerade |
//!
//! Those of host endpoints are there only while there are host endpoints. What untracked policy or policy before
//! destination NAT accepts carries a mark past the host endpoint's later policy. Where kube-proxy works in IPVS mode, two more
//! marks tell what it forwards from what the host sends itself, and the chains of the input hook stand behind IPVS, see
//! [`super::ipvs`]. There is no other mark.
//!
//! Packets of established flows leave each policy chain early. The source check stands before
//! connection tracking and sees every packet.

use std::sync::Arc;

use cali_api::Cidr;
use cali_netlink::nft::{
    Base, BaseHook, Chain, ChainType, CmpOp, Expr, Family, FibResult, Hook, Key, Meta, NatKind,
    Policy, Reg, Rule, Verdict, ct_status, fib_flag, nat_flag,
};

use super::expr::{self, Side, cmp, counter};
use super::hosts::{Shape, Site};
use super::ipvs;
use super::limits::{Limited, ask_rates};
use super::names;
use super::program::{ChainProgram, SetProgram};
use super::rule::{network_elems, network_set, outermost};
use super::settings::{HostAction, Settings};
use crate::calc::{Direction, IpVersion, PoolNat, PortRange, TunnelPeers};

const IPIP: u8 = 4;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Multicast listener discovery and neighbour discovery, without which a workload has no IPv6
/// (RFC 2710, RFC 4861): queries, reports, solicitations and neighbour advertisements.
pub(crate) const NEIGHBOUR_DISCOVERY: [u8; 6] = [130, 131, 132, 133, 135, 136];

/// What a host takes besides.
pub(crate) const ROUTER_ADVERTISEMENT: [u8; 1] = [134];

const WORKLOAD_TO_HOST: &str = "cali-wl-to-host";

/// What the chains depend on.
#[derive(Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) settings: &'a Settings,
    pub(super) hosts: &'a Shape,
    pub(super) tunnels: &'a TunnelPeers,
    /// There are networks of service addresses.
    pub(super) services: bool,
    pub(super) limited: &'a Limited,
    /// kube-proxy works in IPVS mode.
    pub(super) ipvs: bool,
}

/// Chains that are there only while there are host endpoints.
const HOST_CHAINS: [&str; 3] = [
    "cali-mangle-prerouting",
    "cali-output-host",
    "cali-mangle-postrouting",
];

/// The chains of the input hook: without IPVS, and behind it. They have two names each because a chain cannot change its place.
const INPUT_FROM_WORKLOAD: [&str; 2] = ["cali-input-from-wl", "cali-ipvs-input-from-wl"];
const INPUT_HOST: [&str; 2] = ["cali-input-host", "cali-ipvs-input-host"];

/// All chains of this module, and names of those that are not needed now.
pub(super) fn chains(ground: Ground<'_>) -> (Vec<ChainProgram>, Vec<Arc<str>>) {
    let settings = ground.settings;
    let mut chains = vec![
        raw_prerouting(ground),
        raw_output(ground),
        forward(ground, "cali-forward-from-wl", 0, Site::ForwardIn),
        forward(ground, "cali-forward-to-wl", 1, Site::ForwardOut),
        input_from_workload(ground),
        workload_to_host(),
        input_host(ground),
        nat_postrouting(settings),
    ];
    if ground.ipvs {
        chains.extend(ipvs::chains(ground));
    }
    chains.extend(
        [
            mangle_prerouting(ground),
            output_host(ground),
            mangle_postrouting(ground),
        ]
        .into_iter()
        .flatten(),
    );
    let absent = [INPUT_FROM_WORKLOAD, INPUT_HOST].into_iter().flatten();
    let absent = absent.chain(HOST_CHAINS).chain(ipvs::CHAINS);
    let absent = absent.map(Arc::from);
    let absent = absent.filter(|name: &Arc<str>| !chains.iter().any(|c| c.chain.name == *name));
    let absent = absent.collect();
    (chains, absent)
}

/// The way to the host endpoints of a site.
pub(super) fn to_hosts(hosts: &Shape, site: Site) -> Vec<Rule> {
    let mut rules = Vec::new();
    if hosts.named.contains(&site) {
        rules.push(dispatch(site.interface(), site.map()));
    }
    if hosts.all.contains(&site) {
        let to = [Expr::Verdict(Verdict::Goto(site.chain(None)))];
        let real = expr::interface_is_not(site.interface(), "lo");
        rules.push(rule(&[&real, &to]));
    }
    rules
}

/// What was accepted early is not asked about again.
fn accept_marked(ground: Ground<'_>) -> Option<Rule> {
    let accept = [Expr::Verdict(Verdict::Accept)];
    let marked = expr::has_mark(ground.settings.accept_mark);
    ground
        .hosts
        .accepts_early()
        .then(|| rule(&[&marked, &accept]).comment("accepted before"))
}

/// A mark that somebody else left means nothing.
fn clear_mark(ground: Ground<'_>) -> Option<Rule> {
    ground
        .hosts
        .accepts_early()
        .then(|| Rule::new(expr::set_mark(ground.settings.accept_mark, false)))
}

/// Host endpoints are not asked about encapsulated packets between nodes that we know.
fn encapsulated(ground: Ground<'_>, side: Side) -> Vec<Rule> {
    let accept = [Expr::Verdict(Verdict::Accept)];
    let mut rules = Vec::new();
    let mut add = |what: Vec<Expr>, version: IpVersion| {
        let known = expr::address_in(side, version, pool_set("nodes", version), false);
        rules.push(rule(&[&expr::family(version), &what, &known, &accept]));
    };
    if ground.tunnels.ipip {
        let ipip = expr::protocol(IPIP, false).to_vec();
        add(ipip, IpVersion::V4);
    }
    if ground.tunnels.vxlan {
        for version in [IpVersion::V4, IpVersion::V6] {
            add(udp_to(ground.settings.vxlan_port), version);
        }
    }
    let ports = ground.settings.wireguard_ports;
    for (version, port) in [IpVersion::V4, IpVersion::V6].into_iter().zip(ports) {
        if let Some(port) = port {
            add(udp_to(port), version);
        }
    }
    rules
}

/// `udp dport port`.
pub(super) fn udp_to(port: u16) -> Vec<Expr> {
    let range = PortRange {
        first: port,
        last: port,
    };
    let to_port = expr::port(Side::Destination, range, false);
    [&expr::protocol(UDP, false), to_port.as_slice()].concat()
}

/// The sets behind NAT outgoing: all pools, and those whose packets get the node's address outside.
pub(super) fn pool_sets(pools: &[PoolNat]) -> Vec<SetProgram> {
    let all: Vec<Cidr> = pools.iter().map(|pool| pool.cidr).collect();
    let nat: Vec<Cidr> = pools
        .iter()
        .filter(|pool| pool.nat_outgoing)
        .map(|pool| pool.cidr)
        .collect();
    [IpVersion::V4, IpVersion::V6]
        .into_iter()
        .flat_map(|version| {
            [
                (pool_set("pools", version), &all, version),
                (pool_set("nat", version), &nat, version),
            ]
        })
        .map(|(name, nets, version)| {
            network_set(name, version).with(network_elems(&outermost(nets, version)))
        })
        .collect()
}

/// Senders of encapsulated packets, by family.
pub(super) fn peer_sets(peers: &TunnelPeers) -> impl Iterator<Item = SetProgram> {
    [IpVersion::V4, IpVersion::V6].into_iter().map(|version| {
        network_set(pool_set("nodes", version), version)
            .with(network_elems(&outermost(&peers.sources, version)))
    })
}

/// Encapsulated packets for this host come from nodes only: inside them, anybody could claim any source address. What no
/// pool uses is somebody else's and passes.
pub(super) fn input_tunnels(settings: &Settings, peers: &TunnelPeers) -> ChainProgram {
    let mut rules = Vec::new();
    let mut only_nodes = |version, what: &[Expr], text: &str| {
        let stranger = expr::address_in(Side::Source, version, pool_set("nodes", version), true);
        rules.push(rule(&[&expr::family(version), what, &stranger, &drop()]).comment(text));
    };
    if peers.ipip {
        let what = expr::protocol(IPIP, false);
        only_nodes(IpVersion::V4, &what, "IPIP from an address of no node");
    }
    if peers.vxlan {
        let what = udp_to(settings.vxlan_port);
        for version in [IpVersion::V4, IpVersion::V6] {
            only_nodes(version, &what, "VXLAN from an address of no node");
        }
    }
    ChainProgram::new(
        base("cali-input-tunnels", ChainType::Filter, Hook::Input, 0),
        rules,
    )
}

/// The sets of service addresses.
pub(super) fn service_sets(nets: &[Cidr]) -> impl Iterator<Item = SetProgram> {
    [IpVersion::V4, IpVersion::V6].into_iter().map(|version| {
        network_set(pool_set("services", version), version)
            .with(network_elems(&outermost(nets, version)))
    })
}

/// A packet to a service that still has the service's address when it is forwarded has no endpoint: the network would
/// send it back, and it would go round until its life time ends.
fn unserved(ground: Ground<'_>) -> Vec<Rule> {
    let end = match ground.settings.service_loop {
        Some(deny) if ground.services => deny.expr(),
        _ => return Vec::new(),
    };
    let block = |version| {
        let service = expr::address_in(
            Side::Destination,
            version,
            pool_set("services", version),
            false,
        );
        let end = [counter(), end.clone()];
        rule(&[&expr::family(version), &service, &end]).comment("nobody serves this address")
    };
    [IpVersion::V4, IpVersion::V6].map(block).into()
}

pub(super) fn pool_set(what: &str, version: IpVersion) -> Arc<str> {
    match version {
        IpVersion::V4 => format!("cali40-{what}").into(),
        IpVersion::V6 => format!("cali60-{what}").into(),
    }
}

/// Hook and priority behind routing, where packets are changed but for their addresses.
pub(super) const POSTROUTING_MANGLE: (Hook, i32) = (Hook::Postrouting, -150);

pub(super) fn base_chain(name: &str, (hook, priority): (Hook, i32)) -> Chain {
    base(name, ChainType::Filter, hook, priority)
}

fn base(name: &str, chain_type: ChainType, hook: Hook, priority: i32) -> Chain {
    Chain::base(
        name,
        BaseHook {
            chain_type,
            hook,
            priority,
            policy: Policy::Accept,
        },
    )
}

pub(super) fn rule(parts: &[&[Expr]]) -> Rule {
    Rule::new(parts.concat())
}

pub(super) fn drop() -> [Expr; 2] {
    [counter(), Expr::Verdict(Verdict::Drop)]
}

fn untracked(port: u16) -> Vec<Expr> {
    [udp_to(port), vec![Expr::Notrack]].concat()
}

fn raw_prerouting(ground: Ground<'_>) -> ChainProgram {
    let settings = ground.settings;
    let mut rules: Vec<Rule> = clear_mark(ground).into_iter().collect();
    for prefix in &settings.workload_prefixes {
        let flags = fib_flag::SADDR | fib_flag::MARK | fib_flag::IIF;
        let spoofed = [
            Expr::Fib {
                result: FibResult::Oif,
                flags,
                dreg: Reg::R1,
            },
            cmp(CmpOp::Eq, Key::host32(0)),
        ];
        let from = expr::interface_prefix(Meta::IifName, prefix);
        rules.push(
            rule(&[&from, &spoofed, &drop()]).comment("source address is not the workload's"),
        );
    }
    // Only what comes from outside: a workload's own packets of the kind stay tracked and under policy.
    let outside = settings
        .workload_prefixes
        .iter()
        .fold(Vec::new(), |mut exprs, prefix| {
            let [load, _] = expr::interface_prefix(Meta::IifName, prefix);
            exprs.extend([
                load,
                cmp(
                    CmpOp::Neq,
                    Key::bytes(&prefix.as_bytes()[..prefix.len().min(15)]),
                ),
            ]);
            exprs
        });
    let outer = settings.outer_ports();
    rules.extend(outer.map(|port| Rule::new([outside.clone(), untracked(port)].concat())));
    rules.extend(to_hosts(ground.hosts, Site::RawIn));
    ChainProgram::new(
        base(
            "cali-raw-prerouting",
            ChainType::Filter,
            Hook::Prerouting,
            -300,
        ),
        rules,
    )
}

/// The kernel gives IPIP's outer packets the address that the route to the other node prefers, and the fall-back device of IPIP
/// takes no other. Where that is an address by which nobody knows this node, the others would take it for a stranger.
fn ipip_source(tunnels: &TunnelPeers) -> Option<Rule> {
    /// Of the header's checksum and source (RFC 791 §3.1), in bytes.
    const CHECKSUM: u32 = 10;
    const SOURCE: u32 = 12;
    let own = tunnels.own.filter(|_| tunnels.ipip)?;
    let nodes = pool_set("nodes", IpVersion::V4);
    let holds = |side, negated| expr::address_in(side, IpVersion::V4, nodes.clone(), negated);
    let set = [
        Expr::Immediate {
            dreg: Reg::R1,
            value: Key::ip(own.into()),
        },
        Expr::PayloadSet {
            base: Base::Network,
            offset: SOURCE,
            len: 4,
            sreg: Reg::R1,
            checksum: Some(CHECKSUM),
        },
    ];
    let ipip = expr::protocol(IPIP, false);
    let between = [holds(Side::Destination, false), holds(Side::Source, true)].concat();
    let parts: [&[Expr]; 4] = [&expr::family(IpVersion::V4), &ipip, &between, &set];
    Some(rule(&parts).comment("IPIP with the address that nodes know"))
}

fn raw_output(ground: Ground<'_>) -> ChainProgram {
    let mut rules: Vec<Rule> = clear_mark(ground).into_iter().collect();
    rules.extend(ipip_source(ground.tunnels));
    let outer = ground.settings.outer_ports();
    rules.extend(outer.map(|port| Rule::new(untracked(port))));
    rules.extend(to_hosts(ground.hosts, Site::RawOut));
    ChainProgram::new(
        base("cali-raw-output", ChainType::Filter, Hook::Output, -300),
        rules,
    )
}

fn mangle_prerouting(ground: Ground<'_>) -> Option<ChainProgram> {
    if !ground.hosts.has(Site::DnatIn) {
        return None;
    }
    let mut rules = vec![Rule::new(expr::accept_established())];
    rules.extend(accept_marked(ground));
    for prefix in &ground.settings.workload_prefixes {
        let from = expr::interface_prefix(Meta::IifName, prefix);
        rules.push(rule(&[&from, &[Expr::Verdict(Verdict::Accept)]]));
    }
    rules.extend(to_hosts(ground.hosts, Site::DnatIn));
    let hook = base(
        "cali-mangle-prerouting",
        ChainType::Filter,
        Hook::Prerouting,
        -150,
    );
    Some(ChainProgram::new(hook, rules))
}

/// What the host sends. Workloads are reached without policy of host endpoints, and where the
/// destination was translated the interface is known only later.
fn output_host(ground: Ground<'_>) -> Option<ChainProgram> {
    if !ground.hosts.has(Site::Out) {
        return None;
    }
    let accept = [Expr::Verdict(Verdict::Accept)];
    let mut rules = vec![Rule::new(expr::accept_established())];
    if ground.ipvs {
        rules.push(ipvs::accept_forwarded(ground.settings));
    }
    rules.extend(accept_marked(ground));
    for prefix in &ground.settings.workload_prefixes {
        let to = expr::interface_prefix(Meta::OifName, prefix);
        rules.push(rule(&[&to, &accept]));
    }
    rules.extend(encapsulated(ground, Side::Destination));
    let translated = expr::ct_status_any(ct_status::DNAT, false);
    rules.push(rule(&[&translated, &accept]).comment("asked after routing"));
    rules.extend(to_hosts(ground.hosts, Site::Out));
    let hook = base("cali-output-host", ChainType::Filter, Hook::Output, 0);
    Some(ChainProgram::new(hook, rules))
}

fn mangle_postrouting(ground: Ground<'_>) -> Option<ChainProgram> {
    if !ground.hosts.has(Site::Post) {
        return None;
    }
    let accept = [Expr::Verdict(Verdict::Accept)];
    // Only what the host itself sends has no interface that it came in by.
    let forwarded = [
        Expr::Meta {
            key: Meta::Iif,
            dreg: Reg::R1,
        },
        cmp(CmpOp::Neq, Key::host32(0)),
    ];
    let mut rules = vec![
        rule(&[&forwarded, &accept]),
        rule(&[&expr::ct_status_any(ct_status::DNAT, true), &accept]),
        Rule::new(expr::accept_established()),
    ];
    rules.extend(accept_marked(ground));
    for prefix in &ground.settings.workload_prefixes {
        let to = expr::interface_prefix(Meta::OifName, prefix);
        rules.push(rule(&[&to, &accept]));
    }
    rules.extend(to_hosts(ground.hosts, Site::Post));
    let hook = base(
        "cali-mangle-postrouting",
        ChainType::Filter,
        Hook::Postrouting,
        -150,
    );
    Some(ChainProgram::new(hook, rules))
}

pub(super) fn dispatch(key: Meta, map: &str) -> Rule {
    Rule::new([
        Expr::Meta { key, dreg: Reg::R1 },
        Expr::VerdictMap {
            map: map.into(),
            sreg: Reg::R1,
        },
    ])
}

/// One direction of forwarded traffic. Workload interfaces that the map does not know have no
/// policy yet: nothing passes.
fn forward(ground: Ground<'_>, name: &str, priority: i32, site: Site) -> ChainProgram {
    let (key, map) = match site.interface() {
        Meta::OifName => (Meta::OifName, names::TO_WORKLOAD),
        key => (key, names::FROM_WORKLOAD),
    };
    let direction = match site {
        Site::ForwardOut => Direction::Ingress,
        _ => Direction::Egress,
    };
    let mut rules: Vec<Rule> = rates(ground, direction).into_iter().collect();
    rules.push(Rule::new(expr::accept_established()));
    if direction == Direction::Ingress {
        rules.extend(unserved(ground));
    }
    rules.push(dispatch(key, map));
    for prefix in &ground.settings.workload_prefixes {
        rules.push(
            rule(&[&expr::interface_prefix(key, prefix), &drop()])
                .comment("interface without policy"),
        );
    }
    if ground.hosts.has(site) {
        // What was accepted early is still asked about where it leaves.
        rules.extend(accept_marked(ground).filter(|_| site == Site::ForwardIn));
        rules.extend(to_hosts(ground.hosts, site));
    }
    ChainProgram::new(
        base(name, ChainType::Filter, Hook::Forward, priority),
        rules,
    )
}

pub(super) fn rates(ground: Ground<'_>, direction: Direction) -> Option<Rule> {
    ground
        .limited
        .rates(direction)
        .then(|| ask_rates(direction))
}

/// What IPVS takes is not the host's: with it, the host's part begins behind.
fn input_chain(ground: Ground<'_>, [name, behind]: [&str; 2], place: i32) -> Chain {
    if ground.ipvs {
        base_chain(behind, (Hook::Input, ipvs::BEHIND + place))
    } else {
        base_chain(name, (Hook::Input, place))
    }
}

fn input_from_workload(ground: Ground<'_>) -> ChainProgram {
    let mut rules: Vec<Rule> = if ground.ipvs {
        vec![ipvs::clear_marks(ground.settings)]
    } else {
        rates(ground, Direction::Egress).into_iter().collect()
    };
    rules.push(Rule::new(expr::accept_established()));
    for prefix in &ground.settings.workload_prefixes {
        let to = [Expr::Verdict(Verdict::Goto(WORKLOAD_TO_HOST.into()))];
        rules.push(rule(&[&expr::interface_prefix(Meta::IifName, prefix), &to]));
    }
    if ground.hosts.has(Site::In) {
        rules.extend(encapsulated(ground, Side::Source));
        rules.extend(accept_marked(ground));
        rules.extend(to_hosts(ground.hosts, Site::In));
    }
    ChainProgram::new(input_chain(ground, INPUT_FROM_WORKLOAD, 0), rules)
}

/// For a workload, or for a host, which also takes router advertisements.
pub(super) fn accept_neighbour_discovery(host: bool) -> Vec<Rule> {
    let accept = [Expr::Verdict(Verdict::Accept)];
    NEIGHBOUR_DISCOVERY
        .iter()
        .chain(ROUTER_ADVERTISEMENT.iter().filter(|_| host))
        .map(|kind| {
            rule(&[
                &expr::protocol(ICMPV6, false),
                &expr::icmp(*kind, None, false),
                &accept,
            ])
        })
        .collect()
}

fn workload_to_host() -> ChainProgram {
    let mut rules = accept_neighbour_discovery(false);
    rules.push(dispatch(Meta::IifName, names::FROM_WORKLOAD));
    rules.push(Rule::new(drop()).comment("interface without policy"));
    ChainProgram::new(Chain::regular(WORKLOAD_TO_HOST), rules)
}

/// A base chain of its own: what policy accepted before has only left the chain before.
fn input_host(ground: Ground<'_>) -> ChainProgram {
    let settings = ground.settings;
    let mut rules = Vec::new();
    if settings.host_action == HostAction::Drop {
        rules.push(Rule::new(expr::accept_established()));
        rules.extend(accept_neighbour_discovery(false));
        for prefix in &settings.workload_prefixes {
            let from = expr::interface_prefix(Meta::IifName, prefix);
            rules.push(rule(&[&from, &drop()]).comment("defaultEndpointToHostAction"));
        }
    }
    ChainProgram::new(input_chain(ground, INPUT_HOST, 1), rules)
}

fn nat_postrouting(settings: &Settings) -> ChainProgram {
    let nat = &settings.nat;
    let mut rules = Vec::new();
    for version in [IpVersion::V4, IpVersion::V6] {
        let mut leaving = expr::family(version).to_vec();
        let mut holds = |side, set, negated| {
            leaving.extend(expr::address_in(
                side,
                version,
                pool_set(set, version),
                negated,
            ));
        };
        holds(Side::Source, "nat", false);
        holds(Side::Destination, "pools", true);
        if nat.spare_nodes {
            holds(Side::Destination, "nodes", true);
        }
        if let Some(interface) = &nat.interface {
            leaving.extend([
                Expr::Meta {
                    key: Meta::OifName,
                    dreg: Reg::R1,
                },
                cmp(CmpOp::Eq, Key::ifname(interface)),
            ]);
        }
        let mut translate = |protocol: Option<u8>, ports| {
            let protocol =
                protocol.map_or_else(Vec::new, |number| expr::protocol(number, false).to_vec());
            let target = translation(settings, version, ports);
            rules.push(rule(&[&leaving, &protocol, &[counter()], &target]).comment("NAT outgoing"));
        };
        for protocol in [TCP, UDP] {
            if let Some(ports) = nat.ports {
                translate(Some(protocol), Some(ports));
            }
        }
        translate(None, None);
    }
    ChainProgram::new(
        base(
            "cali-nat-postrouting",
            ChainType::Nat,
            Hook::Postrouting,
            110,
        ),
        rules,
    )
}

/// The new source: an address of the settings, or of the interface.
fn translation(settings: &Settings, version: IpVersion, ports: Option<PortRange>) -> Vec<Expr> {
    let load = |dreg, value| Expr::Immediate { dreg, value };
    let mut exprs = Vec::new();
    let port = ports.map(|range| {
        exprs.push(load(Reg::R1, Key::port(range.first)));
        exprs.push(load(Reg::R2, Key::port(range.last)));
        (Reg::R1, Reg::R2)
    });
    let flags = nat_flag::PROTO_RANDOM_FULLY;
    match settings.nat.address.filter(|_| version == IpVersion::V4) {
        Some(address) => {
            exprs.push(load(Reg::R3, Key::ip(address.into())));
            exprs.push(Expr::Nat {
                kind: NatKind::Snat,
                family: Family::Ip,
                addr: Some((Reg::R3, Reg::R3)),
                port,
                flags,
            });
        }
        None => exprs.push(Expr::Masquerade { port, flags }),
    }
    exprs
}
