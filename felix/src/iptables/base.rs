//! What stands whatever the policies are, and the rules that lead to it from the kernel's chains.
//!
//! | table, kernel's chain | chain | duty |
//! |---|---|---|
//! | raw PREROUTING | `cali-PREROUTING` | held flows; source addresses of workloads; outer VXLAN and WireGuard are not tracked; untracked policy |
//! | raw OUTPUT | `cali-OUTPUT` | the same of what the host sends |
//! | mangle PREROUTING | `cali-PREROUTING` | policy of host endpoints before destination NAT |
//! | filter FORWARD | `cali-FORWARD` | policy of the sending, then of the receiving side; service addresses that nobody serves |
//! | filter FORWARD, at its end | | what policy allowed is accepted |
//! | filter INPUT | `cali-INPUT` | encapsulated packets come from nodes only; policy of a workload that talks to the host, and what the host takes from it; policy of host endpoints |
//! | filter OUTPUT | `cali-OUTPUT` | policy of host endpoints for what the host sends |
//! | mangle POSTROUTING | `cali-POSTROUTING` | the same, where the destination was translated; code points of workloads |
//! | nat POSTROUTING, at its end | `cali-POSTROUTING` | NAT outgoing, after kube-proxy's masquerade |
//!
//! Those of host endpoints are there only while there are host endpoints. Before a host endpoint is asked the marks of
//! policy are cleared; what its policy accepts before connection tracking or destination NAT carries a mark of its own.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::Cidr;

use super::hosts::{self, Ways, accepts_early};
use super::program::{Chain, HookRules, Table};
use super::settings::{Allowed, Settings};
use super::{dispatch, held, names};
use crate::calc::{Direction, IpVersion, TunnelPeers};
use crate::compile::hosts::{SITES, Site};
use crate::compile::{DenyAction, HostAction, NEIGHBOUR_DISCOVERY};

const WORKLOAD_TO_HOST: &str = "cali-wl-to-host";
const NAT_OUTGOING: &str = "cali-nat-outgoing";
const SERVICES: &str = "cali-cidr-block";
const DSCP: &str = "cali-egress-dscp";

/// Interfaces of endpoints whose names have none of the workload prefixes, with their chains towards and from them.
pub(super) type Odd = BTreeMap<Arc<str>, [Arc<str>; 2]>;

pub(super) type Chains = Vec<((Table, Arc<str>), Chain)>;

/// What the chains depend on.
pub(super) struct Ground<'a> {
    pub(super) settings: &'a Settings,
    pub(super) ways: &'a Ways,
    pub(super) tunnels: &'a TunnelPeers,
    pub(super) odd: &'a Odd,
    /// There are networks of service addresses.
    pub(super) services: bool,
    /// Addresses of workloads whose packets out of the cluster get a code point.
    pub(super) dscp: &'a [(Cidr, u8)],
    /// Rules with a target for every way from (`-i`) or to (`-o`) a workload.
    pub(super) not_workloads: &'a dyn Fn(&str, &str) -> Vec<String>,
}

/// The option of an interface whose name has the prefix.
pub(super) fn beginning(option: &str, prefix: &str) -> String {
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

/// Whether a chain is of this module.
pub(super) fn is_base(name: &str) -> bool {
    const OWN: [&str; 12] = [
        "cali-PREROUTING",
        "cali-OUTPUT",
        "cali-POSTROUTING",
        "cali-FORWARD",
        "cali-INPUT",
        WORKLOAD_TO_HOST,
        NAT_OUTGOING,
        SERVICES,
        DSCP,
        held::CHAIN,
        names::ALLOW,
        names::PASS,
    ];
    OWN.contains(&name) || SITES.iter().any(|site| names::host_dispatch(*site) == name)
}

/// All chains of this module.
pub(super) fn chains(ground: &Ground<'_>, version: IpVersion) -> Chains {
    let (settings, ways) = (ground.settings, ground.ways);
    let chain = |table, name: &str, rules| ((table, Arc::from(name)), Chain::new(name, rules));
    let hooked = |table, name: &str, rules| {
        let chain = Chain {
            hooked: true,
            ..Chain::new(name, rules)
        };
        ((table, Arc::from(name)), chain)
    };
    let mut all = vec![
        hooked(
            Table::Raw,
            "cali-PREROUTING",
            raw_prerouting(ground, version),
        ),
        hooked(Table::Raw, "cali-OUTPUT", raw_output(ground, version)),
        chain(Table::Raw, held::CHAIN, held::rules(version)),
        hooked(
            Table::Nat,
            "cali-POSTROUTING",
            vec![format!("-j {NAT_OUTGOING}")],
        ),
        chain(Table::Nat, NAT_OUTGOING, nat_outgoing(settings, version)),
        hooked(Table::Filter, "cali-FORWARD", forward(ground)),
        hooked(Table::Filter, "cali-INPUT", input(ground, version)),
        chain(
            Table::Filter,
            WORKLOAD_TO_HOST,
            workload_to_host(settings, version),
        ),
    ];
    if let Some(end) = unserved(ground) {
        let to = format!("-m set --match-set {} dst", service_set(version));
        let about = "-m comment --comment \"nobody serves this address\"";
        let rules = vec![format!("{to} {about} {end}")];
        all.push(chain(Table::Filter, SERVICES, rules));
    }
    if ways.contains_key(&Site::DnatIn) {
        let rules = mangle_prerouting(ground);
        all.push(hooked(Table::Mangle, "cali-PREROUTING", rules));
    }
    if has_postrouting(ground) {
        let rules = mangle_postrouting(ground, version);
        all.push(hooked(Table::Mangle, "cali-POSTROUTING", rules));
    }
    if !ground.dscp.is_empty() {
        all.push(chain(Table::Mangle, DSCP, dscp(ground, version)));
    }
    if ways.contains_key(&Site::Out) {
        let rules = output(ground, version);
        all.push(hooked(Table::Filter, "cali-OUTPUT", rules));
    }
    for site in SITES {
        let option = match site.direction() {
            Direction::Ingress => "-i",
            Direction::Egress => "-o",
        };
        let workloads = (ground.not_workloads)(option, "-j RETURN");
        all.extend(hosts::dispatch(site, ways, workloads));
    }
    let marks = settings.marks;
    for table in [Table::Raw, Table::Mangle, Table::Filter] {
        let used = |site: &&Site| hosts::table(**site) == table && ways.contains_key(site);
        if table == Table::Filter || SITES.iter().any(|site| used(&site)) {
            all.push(chain(table, names::ALLOW, vec![marks.set_accept()]));
            all.push(chain(table, names::PASS, vec![marks.set_pass()]));
        }
    }
    all
}

fn has_postrouting(ground: &Ground<'_>) -> bool {
    ground.ways.contains_key(&Site::Post) || !ground.dscp.is_empty()
}

/// The rules in the kernel's chains.
pub(super) fn hooks(ground: &Ground<'_>) -> BTreeMap<(Table, &'static str), HookRules> {
    let (settings, ways) = (ground.settings, ground.ways);
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
    for (used, table, chain) in [
        (
            ways.contains_key(&Site::DnatIn),
            Table::Mangle,
            "PREROUTING",
        ),
        (has_postrouting(ground), Table::Mangle, "POSTROUTING"),
        (ways.contains_key(&Site::Out), Table::Filter, "OUTPUT"),
    ] {
        if used {
            hook(table, chain, Vec::new());
        }
    }
    // Always at the end: kube-proxy's mark is to be looked at, and cleared, before.
    let nat = HookRules::new(
        "POSTROUTING",
        Vec::new(),
        vec!["-j cali-POSTROUTING".to_owned()],
    );
    all.insert((Table::Nat, "POSTROUTING"), nat);
    all
}

/// What carries others between nodes is not tracked: what is inside is.
fn untracked_outer(settings: &Settings) -> impl Iterator<Item = String> {
    let ports = settings.common.outer_ports();
    ports.map(|port| format!("-p 17 -m udp --dport {port} -j CT --notrack"))
}

/// Asks the host endpoints of a site; what they leave carries no mark of policy but theirs.
fn ask(ground: &Ground<'_>, site: Site) -> Vec<String> {
    if !ground.ways.contains_key(&site) {
        return Vec::new();
    }
    vec![
        ground.settings.marks.clear_all(),
        format!("-j {}", names::host_dispatch(site)),
    ]
}

/// A mark that somebody else left means nothing.
fn clear_marks(ground: &Ground<'_>) -> Option<String> {
    (!ground.ways.is_empty()).then(|| ground.settings.marks.clear_of_hosts())
}

/// Untracked policy, and what it has accepted.
fn untracked(ground: &Ground<'_>, site: Site) -> Vec<String> {
    let mut rules = ask(ground, site);
    if !rules.is_empty() {
        let marks = ground.settings.marks;
        for target in ["-j CT --notrack", &marks.set_early(), "-j ACCEPT"] {
            rules.push(format!("{} {target}", marks.accepted()));
        }
    }
    rules
}

fn raw_prerouting(ground: &Ground<'_>, version: IpVersion) -> Vec<String> {
    let settings = ground.settings;
    let mut rules = vec![held::find(version)];
    rules.extend(clear_marks(ground));
    for prefix in prefixes(settings) {
        let from = beginning("-i", prefix);
        rules.push(format!(
            "{from} -m rpfilter --validmark --invert -m comment --comment \"source address is not the workload's\" -j DROP"
        ));
        // A workload's own packets of the kind stay tracked and under policy.
        rules.push(format!("{from} -j RETURN"));
    }
    rules.extend(untracked_outer(settings));
    rules.extend(untracked(ground, Site::RawIn));
    rules
}

fn raw_output(ground: &Ground<'_>, version: IpVersion) -> Vec<String> {
    let mut rules = vec![held::find(version)];
    rules.extend(clear_marks(ground));
    rules.extend(untracked_outer(ground.settings));
    rules.extend(untracked(ground, Site::RawOut));
    rules
}

const ESTABLISHED: &str = "-m conntrack --ctstate RELATED,ESTABLISHED";

/// What was accepted early, where anything can be.
fn accepted_early(ground: &Ground<'_>, target: impl std::fmt::Display) -> Option<String> {
    accepts_early(ground.ways).then(|| format!("{} -j {target}", ground.settings.marks.early()))
}

fn mangle_prerouting(ground: &Ground<'_>) -> Vec<String> {
    let (marks, allowed) = (ground.settings.marks, ground.settings.mangle_allow);
    let mut rules = vec![format!("{ESTABLISHED} -j {allowed}")];
    rules.extend(accepted_early(ground, allowed));
    rules.extend(ask(ground, Site::DnatIn));
    rules.push(format!("{} {}", marks.accepted(), marks.set_early()));
    rules.push(format!("{} -j {allowed}", marks.accepted()));
    rules
}

/// How a packet ends that still has a service's address when it is forwarded: nobody serves it, and the network would
/// send it back until its life time ends.
fn unserved(ground: &Ground<'_>) -> Option<&'static str> {
    let end = ground.settings.common.service_loop;
    end.filter(|_| ground.services).map(|end| match end {
        DenyAction::Drop => "-j DROP",
        DenyAction::Reject => "-j REJECT",
    })
}

/// Code points of what workloads send out of the cluster.
fn dscp(ground: &Ground<'_>, version: IpVersion) -> Vec<String> {
    let own = ground.dscp.iter();
    own.filter(|(address, _)| IpVersion::of(address.addr()) == version)
        .map(|(address, code)| format!("-s {address} -j DSCP --set-dscp {code:#04x}"))
        .collect()
}

fn mangle_postrouting(ground: &Ground<'_>, version: IpVersion) -> Vec<String> {
    let (marks, allowed) = (ground.settings.marks, ground.settings.mangle_allow);
    let mut rules = Vec::new();
    if !ground.dscp.is_empty() {
        let (_, pools) = pool_sets(version);
        let nodes = node_set(version);
        let outside = format!("-m set ! --match-set {pools} dst -m set ! --match-set {nodes} dst");
        rules.push(format!("{outside} -j {DSCP}"));
    }
    if !ground.ways.contains_key(&Site::Post) {
        return rules;
    }
    // Only the host's own packets whose destination was translated carry the mark.
    rules.push(format!(
        "-m mark --mark 0x0/{:#x} -j RETURN",
        marks.translated
    ));
    rules.push(format!("{ESTABLISHED} -j {allowed}"));
    rules.extend(accepted_early(ground, allowed));
    rules.extend(ask(ground, Site::Post));
    rules.push(format!("{} -j {allowed}", marks.accepted()));
    rules
}

fn forward(ground: &Ground<'_>) -> Vec<String> {
    let (settings, odd) = (ground.settings, ground.odd);
    let mut rules = vec![settings.marks.clear_all()];
    for (option, root, direction, site) in [
        (
            "-i",
            names::FROM_WORKLOAD,
            Direction::Egress,
            Site::ForwardIn,
        ),
        (
            "-o",
            names::TO_WORKLOAD,
            Direction::Ingress,
            Site::ForwardOut,
        ),
    ] {
        rules.extend(
            prefixes(settings).map(|prefix| format!("{} -j {root}", beginning(option, prefix))),
        );
        rules.extend(odd.iter().map(|(interface, chains)| {
            format!("{option} {interface} -j {}", chains[direction as usize])
        }));
        if ground.ways.contains_key(&site) {
            // What was accepted early is still asked about where it leaves.
            let early = match site {
                Site::ForwardIn if accepts_early(ground.ways) => {
                    format!("{} ", settings.marks.not_early())
                }
                _ => String::new(),
            };
            rules.push(format!(
                "{early}-m conntrack ! --ctstate RELATED,ESTABLISHED -j {}",
                names::host_dispatch(site)
            ));
        }
    }
    if unserved(ground).is_some() {
        rules.push(format!("-j {SERVICES}"));
    }
    rules
}

/// Encapsulated packets: from or to nodes that we know (`known`), or from strangers. Inside them, anybody could claim any
/// source address. What no pool uses is somebody else's.
fn encapsulated(
    ground: &Ground<'_>,
    version: IpVersion,
    known: bool,
    word: &str,
    target: &str,
) -> Vec<String> {
    let not = if known { "" } else { "! " };
    let nodes = format!("-m set {not}--match-set {} {word}", node_set(version));
    let mut rules = Vec::new();
    if ground.tunnels.ipip && version == IpVersion::V4 {
        rules.push(format!("-p 4 {nodes} {target}"));
    }
    if ground.tunnels.vxlan {
        let port = ground.settings.common.vxlan_port;
        rules.push(format!("-p 17 -m udp --dport {port} {nodes} {target}"));
    }
    // WireGuard knows by itself whom it listens to.
    let wireguard = ground.settings.common.wireguard_ports[version as usize];
    if let Some(port) = wireguard.filter(|_| known) {
        rules.push(format!("-p 17 -m udp --dport {port} {nodes} {target}"));
    }
    rules
}

fn input(ground: &Ground<'_>, version: IpVersion) -> Vec<String> {
    let (settings, odd) = (ground.settings, ground.odd);
    let marks = settings.marks;
    let stranger = "-m comment --comment \"encapsulated, from an address of no node\" -j DROP";
    let mut rules = encapsulated(ground, version, false, "src", stranger);
    rules.push(marks.clear_all());
    rules.extend(
        prefixes(settings)
            .map(|prefix| format!("{} -g {WORKLOAD_TO_HOST}", beginning("-i", prefix))),
    );
    rules.extend(odd.iter().map(|(interface, chains)| {
        format!("-i {interface} -j {}", chains[Direction::Egress as usize])
    }));
    if ground.ways.contains_key(&Site::In) {
        let allowed = settings.filter_allow;
        rules.push(format!("{ESTABLISHED} -j {allowed}"));
        let accept = format!("-j {allowed}");
        rules.extend(encapsulated(ground, version, true, "src", &accept));
        rules.extend(accepted_early(ground, allowed));
        rules.push(format!("-j {}", names::host_dispatch(Site::In)));
        rules.push(format!("{} -j {allowed}", marks.accepted()));
    }
    rules
}

/// What the host sends. Workloads are reached without policy of host endpoints, and where the destination was translated
/// the interface is known only later.
fn output(ground: &Ground<'_>, version: IpVersion) -> Vec<String> {
    let (marks, allowed) = (ground.settings.marks, ground.settings.filter_allow);
    let mut rules = vec![format!("{ESTABLISHED} -j {allowed}")];
    rules.extend(accepted_early(ground, allowed));
    rules.extend((ground.not_workloads)("-o", "-j RETURN"));
    let accept = format!("-j {allowed}");
    rules.extend(encapsulated(ground, version, true, "dst", &accept));
    let translated = "-m conntrack --ctstate DNAT";
    rules.push(format!("{translated} {}", marks.set_translated()));
    rules.push(format!(
        "{translated} -m comment --comment \"asked after routing\" -j RETURN"
    ));
    rules.extend(ask(ground, Site::Out));
    rules.push(format!("{} -j {allowed}", marks.accepted()));
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

fn nat_outgoing(settings: &Settings, version: IpVersion) -> Vec<String> {
    let (nat, pools) = pool_sets(version);
    let how = &settings.common.nat;
    let mut leaving = format!("-m set --match-set {nat} src -m set ! --match-set {pools} dst");
    if how.spare_nodes {
        leaving.push_str(&format!(" -m set ! --match-set {} dst", node_set(version)));
    }
    if let Some(interface) = how
        .interface
        .as_deref()
        .filter(|name| dispatch::usable(name))
    {
        leaving.insert_str(0, &format!("-o {interface} "));
    }
    let own_address = how.address.filter(|_| version == IpVersion::V4);
    let mut rules = Vec::new();
    if let Some(range) = how.ports {
        let ports = format!("{}-{}", range.first, range.last);
        let target = match own_address {
            Some(address) => format!("-j SNAT --to-source {address}:{ports}"),
            None => format!("-j MASQUERADE --to-ports {ports}"),
        };
        for protocol in ["6", "17"] {
            rules.push(format!("-p {protocol} {leaving} {target} --random-fully"));
        }
    }
    let target = match own_address {
        Some(address) => format!("-j SNAT --to-source {address}"),
        None => "-j MASQUERADE".to_owned(),
    };
    rules.push(format!("{leaving} {target} --random-fully"));
    rules
}

/// The networks of service addresses.
pub(super) fn service_set(version: IpVersion) -> Arc<str> {
    names::known_set("service-nets", version)
}

/// The addresses of all nodes.
pub(super) fn node_set(version: IpVersion) -> Arc<str> {
    names::known_set("all-hosts-net", version)
}

/// The sets of pools whose packets get the node's address outside, and of all pools.
pub(super) fn pool_sets(version: IpVersion) -> (Arc<str>, Arc<str>) {
    (
        names::known_set("masq-ipam-pools", version),
        names::known_set("network-ip-pools", version),
    )
}
