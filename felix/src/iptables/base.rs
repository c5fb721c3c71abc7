//! What stands whatever the policies are, and the rules that lead to it from the kernel's chains.
//!
//! | table, kernel's chain | chain | duty |
//! |---|---|---|
//! | raw PREROUTING | `cali-PREROUTING` | source addresses of workloads; outer VXLAN is not tracked |
//! | raw OUTPUT | `cali-OUTPUT` | outer VXLAN is not tracked |
//! | filter FORWARD | `cali-FORWARD` | policy of the sending, then of the receiving workload |
//! | filter FORWARD, at its end | | what policy allowed is accepted |
//! | filter INPUT | `cali-INPUT` | policy of a workload that talks to the host, and what the host takes from it |
//! | nat POSTROUTING, at its end | `cali-POSTROUTING` | NAT outgoing, after kube-proxy's masquerade |

use std::collections::BTreeMap;
use std::sync::Arc;

use super::names;
use super::program::{Chain, HookRules, Table};
use super::settings::{Allowed, Settings};
use crate::calc::{Direction, IpVersion};
use crate::compile::{HostAction, NEIGHBOUR_DISCOVERY};

const WORKLOAD_TO_HOST: &str = "cali-wl-to-host";
const NAT_OUTGOING: &str = "cali-nat-outgoing";

/// Interfaces of endpoints whose names have none of the workload prefixes, with their chains towards and from them.
pub(super) type Odd = BTreeMap<Arc<str>, [Arc<str>; 2]>;

pub(super) type Chains = Vec<((Table, Arc<str>), Chain)>;

/// The option of an interface whose name has the prefix.
fn beginning(option: &str, prefix: &str) -> String {
    // A match of 15 characters and the wildcard is the kernel's longest.
    let end = prefix.len().min(15);
    format!("{option} {}+", prefix.get(..end).unwrap_or(prefix))
}

fn prefixes(settings: &Settings) -> impl Iterator<Item = &str> {
    settings
        .common
        .workload_prefixes
        .iter()
        .map(|prefix| &**prefix)
}

/// All chains of this module.
pub(super) fn chains(settings: &Settings, version: IpVersion, odd: &Odd) -> Chains {
    let marks = settings.marks;
    let chain = |table, name: &str, rules, hooked| {
        let chain = Chain {
            hooked,
            ..Chain::new(name, rules)
        };
        ((table, Arc::from(name)), chain)
    };
    vec![
        chain(
            Table::Raw,
            "cali-PREROUTING",
            raw_prerouting(settings),
            true,
        ),
        chain(
            Table::Raw,
            "cali-OUTPUT",
            vec![untracked_vxlan(settings)],
            true,
        ),
        chain(
            Table::Nat,
            "cali-POSTROUTING",
            vec![format!("-j {NAT_OUTGOING}")],
            true,
        ),
        chain(Table::Nat, NAT_OUTGOING, nat_outgoing(version), false),
        chain(Table::Filter, "cali-FORWARD", forward(settings, odd), true),
        chain(Table::Filter, "cali-INPUT", input(settings, odd), true),
        chain(
            Table::Filter,
            WORKLOAD_TO_HOST,
            workload_to_host(settings, version),
            false,
        ),
        chain(Table::Filter, names::ALLOW, vec![marks.set_accept()], false),
        chain(Table::Filter, names::PASS, vec![marks.set_pass()], false),
    ]
}

/// The rules in the kernel's chains.
pub(super) fn hooks(settings: &Settings) -> BTreeMap<(Table, &'static str), HookRules> {
    let mut all = BTreeMap::new();
    let mut hook = |table, chain: &'static str, tail: Vec<String>| {
        let lead = vec![format!("-j cali-{chain}")];
        let rules = match (settings.insert, tail) {
            (true, tail) => HookRules::new(chain, lead, tail),
            (false, tail) => HookRules::new(chain, Vec::new(), [lead, tail].concat()),
        };
        all.insert((table, chain), rules);
    };
    hook(Table::Raw, "PREROUTING", Vec::new());
    hook(Table::Raw, "OUTPUT", Vec::new());
    hook(Table::Filter, "INPUT", Vec::new());
    let accepted = match settings.filter_allow {
        Allowed::Accept => vec![format!("{} -j ACCEPT", settings.marks.accepted())],
        Allowed::Return => Vec::new(),
    };
    hook(Table::Filter, "FORWARD", accepted);
    // Always at the end: kube-proxy's mark is to be looked at, and cleared, before.
    let nat = HookRules::new(
        "POSTROUTING",
        Vec::new(),
        vec!["-j cali-POSTROUTING".to_owned()],
    );
    all.insert((Table::Nat, "POSTROUTING"), nat);
    all
}

fn untracked_vxlan(settings: &Settings) -> String {
    format!(
        "-p 17 -m udp --dport {} -j CT --notrack",
        settings.common.vxlan_port
    )
}

fn raw_prerouting(settings: &Settings) -> Vec<String> {
    let mut rules = Vec::new();
    for prefix in prefixes(settings) {
        let from = beginning("-i", prefix);
        rules.push(format!(
            "{from} -m rpfilter --validmark --invert -m comment --comment \"source address is not the workload's\" -j DROP"
        ));
        // A workload's own VXLAN stays tracked and under policy.
        rules.push(format!("{from} -j RETURN"));
    }
    rules.push(untracked_vxlan(settings));
    rules
}

fn forward(settings: &Settings, odd: &Odd) -> Vec<String> {
    let mut rules = vec![settings.marks.clear_all()];
    for (option, root, direction) in [
        ("-i", names::FROM_WORKLOAD, Direction::Egress),
        ("-o", names::TO_WORKLOAD, Direction::Ingress),
    ] {
        rules.extend(
            prefixes(settings).map(|prefix| format!("{} -j {root}", beginning(option, prefix))),
        );
        rules.extend(odd.iter().map(|(interface, chains)| {
            format!("{option} {interface} -j {}", chains[direction as usize])
        }));
    }
    rules
}

fn input(settings: &Settings, odd: &Odd) -> Vec<String> {
    let mut rules = vec![settings.marks.clear_all()];
    rules.extend(
        prefixes(settings)
            .map(|prefix| format!("{} -g {WORKLOAD_TO_HOST}", beginning("-i", prefix))),
    );
    rules.extend(odd.iter().map(|(interface, chains)| {
        format!("-i {interface} -j {}", chains[Direction::Egress as usize])
    }));
    rules
}

fn workload_to_host(settings: &Settings, version: IpVersion) -> Vec<String> {
    let mut rules = Vec::new();
    if version == IpVersion::V6 {
        let accept = |kind: &u8| format!("-p 58 -m icmp6 --icmpv6-type {kind} -j ACCEPT");
        rules.extend(NEIGHBOUR_DISCOVERY.iter().map(accept));
    }
    rules.push(format!("-j {}", names::FROM_WORKLOAD));
    rules.extend(match (settings.common.host_action, settings.host_accept) {
        (HostAction::Drop, _) => {
            Some("-m comment --comment defaultEndpointToHostAction -j DROP".to_owned())
        }
        (HostAction::Accept, true) => Some("-j ACCEPT".to_owned()),
        (HostAction::Accept, false) => None,
    });
    rules
}

fn nat_outgoing(version: IpVersion) -> Vec<String> {
    let (nat, pools) = pool_sets(version);
    vec![format!(
        "-m set --match-set {nat} src -m set ! --match-set {pools} dst -j MASQUERADE --random-fully"
    )]
}

/// The sets of pools whose packets get the node's address outside, and of all pools.
pub(super) fn pool_sets(version: IpVersion) -> (Arc<str>, Arc<str>) {
    (
        names::known_set("masq-ipam-pools", version),
        names::known_set("network-ip-pools", version),
    )
}
