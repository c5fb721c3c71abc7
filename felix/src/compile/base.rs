//! What stands whatever the policies are: base chains, anti-spoofing, workload to host, NAT outgoing.
//!
//! | chain | hook, priority | duty |
//! |---|---|---|
//! | `cali-raw-prerouting` | prerouting −300 | source addresses of workloads; outer VXLAN is not tracked |
//! | `cali-raw-output` | output −300 | outer VXLAN is not tracked |
//! | `cali-forward-from-wl` | forward 0 | policy of the sending workload |
//! | `cali-forward-to-wl` | forward +1 | policy of the receiving workload |
//! | `cali-input-from-wl` | input 0 | policy of a workload that talks to the host |
//! | `cali-input-host` | input +1 | what the host takes from workloads at all |
//! | `cali-nat-postrouting` | postrouting nat 110 | NAT outgoing, after kube-proxy's masquerade |
//!
//! Packets of established flows leave each policy chain early. The source check stands before
//! connection tracking and sees every packet.

use std::sync::Arc;

use cali_api::Cidr;
use cali_netlink::nft::{
    BaseHook, Chain, ChainType, CmpOp, Expr, FibResult, Hook, Key, Meta, Policy, Reg, Rule,
    Verdict, fib_flag, nat_flag,
};

use super::expr::{self, Side, cmp, counter};
use super::names;
use super::program::{ChainProgram, SetProgram};
use super::rule::{network_elems, network_set, outermost};
use super::settings::{HostAction, Settings};
use crate::calc::{IpVersion, PoolNat, PortRange};

const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Multicast listener discovery and neighbour discovery, without which a workload has no IPv6
/// (RFC 2710, RFC 4861): queries, reports, solicitations and neighbour advertisements.
pub(crate) const NEIGHBOUR_DISCOVERY: [u8; 6] = [130, 131, 132, 133, 135, 136];

const WORKLOAD_TO_HOST: &str = "cali-wl-to-host";

/// All chains of this module.
pub(super) fn chains(settings: &Settings) -> Vec<ChainProgram> {
    vec![
        raw_prerouting(settings),
        raw_output(settings),
        forward(
            settings,
            "cali-forward-from-wl",
            0,
            Meta::IifName,
            names::FROM_WORKLOAD,
        ),
        forward(
            settings,
            "cali-forward-to-wl",
            1,
            Meta::OifName,
            names::TO_WORKLOAD,
        ),
        input_from_workload(settings),
        workload_to_host(),
        input_host(settings),
        nat_postrouting(),
    ]
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

fn pool_set(what: &str, version: IpVersion) -> Arc<str> {
    match version {
        IpVersion::V4 => format!("cali40-{what}").into(),
        IpVersion::V6 => format!("cali60-{what}").into(),
    }
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

fn rule(parts: &[&[Expr]]) -> Rule {
    Rule::new(parts.concat())
}

fn drop() -> [Expr; 2] {
    [counter(), Expr::Verdict(Verdict::Drop)]
}

fn vxlan(settings: &Settings) -> Rule {
    let port = PortRange {
        first: settings.vxlan_port,
        last: settings.vxlan_port,
    };
    rule(&[
        &expr::protocol(UDP, false),
        &expr::port(Side::Destination, port, false),
        &[Expr::Notrack],
    ])
}

fn raw_prerouting(settings: &Settings) -> ChainProgram {
    let mut rules = Vec::new();
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
    // Only what comes from outside: a workload's own VXLAN stays tracked and under policy.
    let mut outer = settings
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
    outer.extend(vxlan(settings).exprs);
    rules.push(Rule::new(outer));
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

fn raw_output(settings: &Settings) -> ChainProgram {
    ChainProgram::new(
        base("cali-raw-output", ChainType::Filter, Hook::Output, -300),
        [vxlan(settings)],
    )
}

fn dispatch(key: Meta, map: &str) -> Rule {
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
fn forward(settings: &Settings, name: &str, priority: i32, key: Meta, map: &str) -> ChainProgram {
    let mut rules = vec![Rule::new(expr::accept_established()), dispatch(key, map)];
    for prefix in &settings.workload_prefixes {
        rules.push(
            rule(&[&expr::interface_prefix(key, prefix), &drop()])
                .comment("interface without policy"),
        );
    }
    ChainProgram::new(
        base(name, ChainType::Filter, Hook::Forward, priority),
        rules,
    )
}

fn input_from_workload(settings: &Settings) -> ChainProgram {
    let mut rules = vec![Rule::new(expr::accept_established())];
    for prefix in &settings.workload_prefixes {
        let to = [Expr::Verdict(Verdict::Goto(WORKLOAD_TO_HOST.into()))];
        rules.push(rule(&[&expr::interface_prefix(Meta::IifName, prefix), &to]));
    }
    ChainProgram::new(
        base("cali-input-from-wl", ChainType::Filter, Hook::Input, 0),
        rules,
    )
}

fn accept_neighbour_discovery() -> Vec<Rule> {
    let accept = [Expr::Verdict(Verdict::Accept)];
    NEIGHBOUR_DISCOVERY
        .iter()
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
    let mut rules = accept_neighbour_discovery();
    rules.push(dispatch(Meta::IifName, names::FROM_WORKLOAD));
    rules.push(Rule::new(drop()).comment("interface without policy"));
    ChainProgram::new(Chain::regular(WORKLOAD_TO_HOST), rules)
}

/// A base chain of its own: what policy accepted before has only left the chain before.
fn input_host(settings: &Settings) -> ChainProgram {
    let mut rules = Vec::new();
    if settings.host_action == HostAction::Drop {
        rules.push(Rule::new(expr::accept_established()));
        rules.extend(accept_neighbour_discovery());
        for prefix in &settings.workload_prefixes {
            let from = expr::interface_prefix(Meta::IifName, prefix);
            rules.push(rule(&[&from, &drop()]).comment("defaultEndpointToHostAction"));
        }
    }
    ChainProgram::new(
        base("cali-input-host", ChainType::Filter, Hook::Input, 1),
        rules,
    )
}

fn nat_postrouting() -> ChainProgram {
    let rules = [IpVersion::V4, IpVersion::V6].map(|version| {
        rule(&[
            &expr::family(version),
            &expr::address_in(Side::Source, version, pool_set("nat", version), false),
            &expr::address_in(Side::Destination, version, pool_set("pools", version), true),
            &[
                counter(),
                Expr::Masquerade {
                    flags: nat_flag::PROTO_RANDOM_FULLY,
                },
            ],
        ])
        .comment("NAT outgoing")
    });
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
