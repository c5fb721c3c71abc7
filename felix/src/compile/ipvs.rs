//! kube-proxy in IPVS mode: policy of what IPVS takes over.
//!
//! A service's address is one of the device `kube-ipvs0`, so a packet to it is delivered to the host. IPVS takes it out of the
//! input hook at priority 99 (`ip_vs_ops4`, `NF_IP_PRI_NAT_SRC - 1`), writes the chosen backend into it and sends it through the
//! output hook, without the interface that it came in by. So, while that device is there:
//!
//! | chain | hook, priority | duty |
//! |---|---|---|
//! | `cali-ipvs-mark` | input 0 | marks what came in by an interface, and what came from a workload |
//! | `cali-ipvs-input-from-wl` | input 101 | `cali-input-from-wl`, of what IPVS has left |
//! | `cali-ipvs-input-host` | input 102 | `cali-input-host` |
//! | `cali-ipvs-from-wl` | output 0 | policy of the sending workload, known by its address |
//! | `cali-ipvs-to-wl` | output 1 | policy of the receiving workload, or of the host endpoint that packets leave by |
//! | `cali-ipvs-unmark` | output 2 | clears the marks: a packet that carries this one through a tunnel would inherit them |
//!
//! What the host sends itself has no mark and an address of the host. The mark alone would do, but others may write over it;
//! the address alone would let through what borrows the host's. What came from a workload and has an address that no
//! workload has is dropped: one whose policy is not there yet or any more, or a link's own address.
//!
//! Replies need nothing here: IPVS translates them back in the forward hook, behind policy, where they are established.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::{Cidr, Key as ObjectKey};
use cali_netlink::nft::{
    CmpOp, Elem, Expr, FibResult, Hook, Key, KeyType, Meta, Reg, Rule, Set, Verdict, fib_flag,
};

use super::base::{
    Ground, accept_neighbour_discovery, base_chain, dispatch, drop, rates, rule, to_hosts,
};
use super::compiler::Compiler;
use super::expr::{self, Side, cmp};
use super::hosts::Site;
use super::limits::ask_rates;
use super::names;
use super::program::{ChainProgram, SetProgram};
use super::rule::address_type;
use super::settings::Settings;
use crate::calc::{Direction, IpVersion};

/// The device that kube-proxy puts the addresses of services on, by which its mode is known.
pub const DEVICE: &str = "kube-ipvs0";

/// Behind IPVS (99) and source NAT of the input hook (100).
pub(super) const BEHIND: i32 = 101;

/// `RTN_LOCAL` (`linux/rtnetlink.h`).
const LOCAL: u32 = 2;

const VERSIONS: [IpVersion; 2] = [IpVersion::V4, IpVersion::V6];

/// The verdict map from the addresses of local workloads to their chains.
fn map(version: IpVersion) -> &'static str {
    match version {
        IpVersion::V4 => "cali40-from-wl",
        IpVersion::V6 => "cali60-from-wl",
    }
}

/// Which workloads have which single addresses, and whether IPVS is at work.
#[derive(Debug, Default)]
pub(super) struct Ipvs {
    pub(super) active: bool,
    claims: BTreeMap<IpAddr, BTreeSet<ObjectKey>>,
}

/// The bits of packet marks: came in by an interface; came from a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Every packet that was delivered to the host by an interface.
    pub arrived: u32,
    /// Those of workloads among them.
    pub from_workload: u32,
}

fn has_mark(settings: &Settings) -> [Expr; 3] {
    expr::has_mark(settings.ipvs_marks.arrived)
}

/// Names of the chains of [`chains`].
pub(super) const CHAINS: [&str; 4] = [
    "cali-ipvs-mark",
    "cali-ipvs-from-wl",
    "cali-ipvs-to-wl",
    "cali-ipvs-unmark",
];

/// The chains of this module but for those of the input hook that [`base`] makes.
pub(super) fn chains(ground: Ground<'_>) -> [ChainProgram; 4] {
    [
        mark(ground),
        from_workload(ground),
        to_workload(ground),
        unmark(ground.settings),
    ]
}

fn mark(ground: Ground<'_>) -> ChainProgram {
    let settings = ground.settings;
    let marks = settings.ipvs_marks;
    // Every packet counts, also of those that IPVS takes.
    let mut rules: Vec<Rule> = rates(ground, Direction::Egress).into_iter().collect();
    rules.push(Rule::new(expr::set_mark(
        marks.arrived | marks.from_workload,
        false,
    )));
    let real = expr::interface_is_not(Meta::IifName, "lo");
    rules.push(rule(&[&real, &expr::set_mark(marks.arrived, true)]));
    for prefix in &settings.workload_prefixes {
        let from = expr::interface_prefix(Meta::IifName, prefix);
        rules.push(rule(&[&from, &expr::set_mark(marks.from_workload, true)]));
    }
    ChainProgram::new(base_chain(CHAINS[0], (Hook::Input, 0)), rules)
}

/// What IPVS has left is the host's: whoever gets it sees no mark of ours.
pub(super) fn clear_marks(settings: &Settings) -> Rule {
    let marks = settings.ipvs_marks;
    Rule::new(expr::set_mark(marks.arrived | marks.from_workload, false))
}

/// What the host sends itself is no affair of these chains.
fn accept_own(settings: &Settings) -> Vec<Rule> {
    let accept = [Expr::Verdict(Verdict::Accept)];
    let unmarked = expr::has_no_mark(settings.ipvs_marks.arrived);
    let own = [
        Expr::Fib {
            result: FibResult::AddrType,
            flags: fib_flag::SADDR,
            dreg: Reg::R1,
        },
        cmp(CmpOp::Eq, Key::host32(LOCAL)),
    ];
    let mut rules = vec![rule(&[&unmarked, &own, &accept]).comment("the host's own")];
    // The host's own as well, partly without an address. IPVS takes nothing of the kind.
    rules.extend(accept_neighbour_discovery(true));
    rules
}

fn from_workload(ground: Ground<'_>) -> ChainProgram {
    let settings = ground.settings;
    let mut rules = vec![Rule::new(expr::accept_established())];
    rules.extend(accept_own(settings));
    for version in VERSIONS {
        let to = [
            expr::load_address(Side::Source, version, Reg::R1),
            Expr::VerdictMap {
                map: map(version).into(),
                sreg: Reg::R1,
            },
        ];
        rules.push(rule(&[&expr::family(version), &to]));
    }
    let from = expr::has_mark(settings.ipvs_marks.from_workload);
    rules.push(rule(&[&from, &drop()]).comment("address without policy"));
    ChainProgram::new(base_chain(CHAINS[1], (Hook::Output, 0)), rules)
}

fn to_workload(ground: Ground<'_>) -> ChainProgram {
    let settings = ground.settings;
    let mut rules = Vec::new();
    if ground.limited.rates(Direction::Ingress) {
        let ask = ask_rates(Direction::Ingress);
        rules.push(rule(&[&has_mark(settings), &ask.exprs]));
    }
    rules.push(Rule::new(expr::accept_established()));
    rules.extend(accept_own(settings));
    rules.push(dispatch(Meta::OifName, names::TO_WORKLOAD));
    for prefix in &settings.workload_prefixes {
        let to = expr::interface_prefix(Meta::OifName, prefix);
        rules.push(rule(&[&to, &drop()]).comment("interface without policy"));
    }
    rules.extend(to_hosts(ground.hosts, Site::ForwardOut));
    ChainProgram::new(base_chain(CHAINS[2], (Hook::Output, 1)), rules)
}

fn unmark(settings: &Settings) -> ChainProgram {
    let marked = has_mark(settings);
    let clear = clear_marks(settings);
    ChainProgram::new(
        base_chain(CHAINS[3], (Hook::Output, 2)),
        [rule(&[&marked, &clear.exprs])],
    )
}

/// For chains of what the host sends: what IPVS sends is asked elsewhere.
pub(super) fn accept_forwarded(settings: &Settings) -> Rule {
    let accept = [Expr::Verdict(Verdict::Accept)];
    rule(&[&has_mark(settings), &accept]).comment("forwarded by IPVS")
}

fn single(prefix: &Cidr) -> Option<IpAddr> {
    prefix.is_host().then(|| prefix.addr())
}

const fn version_of(address: IpAddr) -> IpVersion {
    match address {
        IpAddr::V4(_) => IpVersion::V4,
        IpAddr::V6(_) => IpVersion::V6,
    }
}

impl Compiler {
    /// kube-proxy works in IPVS mode, or does not any more.
    pub fn set_ipvs(&mut self, active: bool) {
        if self.ipvs.active == active {
            return;
        }
        self.ipvs.active = active;
        for version in VERSIONS {
            if active {
                let key = KeyType::one(address_type(version));
                let set = Set::verdict_map(map(version), key);
                self.desired.put_set(SetProgram::new(set));
            } else {
                self.desired.remove_set(&Arc::from(map(version)));
            }
        }
        let addresses: Vec<IpAddr> = self.ipvs.claims.keys().copied().collect();
        addresses
            .into_iter()
            .for_each(|address| self.put_source(address));
        self.put_base_chains();
    }

    /// Whether kube-proxy works in IPVS mode.
    #[must_use]
    pub const fn has_ipvs(&self) -> bool {
        self.ipvs.active
    }

    /// The endpoint claims these addresses, or does not any more.
    pub(super) fn claim(&mut self, id: &ObjectKey, addresses: &[Cidr], claims: bool) {
        for address in addresses.iter().filter_map(single) {
            let owners = self.ipvs.claims.entry(address).or_default();
            if claims {
                owners.insert(id.clone());
            } else {
                owners.remove(id);
                if owners.is_empty() {
                    self.ipvs.claims.remove(&address);
                }
            }
            self.put_source(address);
        }
    }

    /// The way from addresses of those who claim an interface: the first by name has it.
    pub(super) fn put_sources(&mut self, interface: &Arc<str>) {
        if !self.ipvs.active {
            return;
        }
        let ids = self.interfaces.get(interface).into_iter().flatten();
        let endpoints = ids.filter_map(|id| self.endpoints.get(id));
        let addresses: BTreeSet<IpAddr> = endpoints
            .flat_map(|known| known.endpoint.addresses.iter().filter_map(single))
            .collect();
        addresses
            .into_iter()
            .for_each(|address| self.put_source(address));
    }

    /// As the route to the address: of several that claim it, the first by name that has its interface.
    fn put_source(&mut self, address: IpAddr) {
        if !self.ipvs.active {
            return;
        }
        let map = map(version_of(address));
        let key = Key::ip(address);
        let has_interface = |id: &ObjectKey| {
            let interface = &self.endpoints.get(id)?.endpoint.interface;
            let first = self.interfaces.get(interface)?.first();
            (first == Some(id)).then(|| interface.clone())
        };
        let mut owners = self.ipvs.claims.get(&address).into_iter().flatten();
        match owners.find_map(has_interface) {
            Some(interface) => {
                let chain = names::endpoint_chain(&interface, Direction::Egress);
                self.desired
                    .put_element(map, Elem::new(key).verdict(Verdict::Goto(chain)));
            }
            None => self.desired.remove_element(map, &key),
        }
    }
}

#[cfg(test)]
mod tests {
    use cali_api::update::{SyncEvent, SyncStatus};
    use cali_netlink::nft::Data;
    use serde_json::json;

    use super::*;
    use crate::calc::tests::put;
    use crate::calc::{Graph, Input};
    use crate::compile::{Program, plan_transaction};

    /// A node with these pods: name, interface, addresses.
    fn node(pods: &[(&str, &str, &[&str])]) -> Compiler {
        let mut graph = Graph::new("here".into());
        for (name, interface, addresses) in pods {
            graph.on_update(put(json!({"apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
                "metadata": {"namespace": "a", "name": format!("here-k8s-{name}-eth0")},
                "spec": {"orchestrator": "k8s", "node": "here", "pod": name, "endpoint": "eth0", "interfaceName": interface,
                         "ipNetworks": addresses, "profiles": []}})));
        }
        graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
        let mut compiler = Compiler::default();
        compiler.apply(&graph.flush().expect("a batch"));
        compiler
    }

    fn base_chains(program: &Program) -> BTreeMap<&str, (Hook, i32)> {
        let chains = program.chains.values();
        chains
            .filter_map(|chain| {
                let base = chain.chain.base.as_ref()?;
                Some((&*chain.chain.name, (base.hook, base.priority)))
            })
            .collect()
    }

    fn ways(program: &Program, version: IpVersion) -> Vec<(IpAddr, String)> {
        let set = program.sets.get(map(version));
        let elements = set.into_iter().flat_map(|set| set.elements.iter());
        elements
            .map(|elem| {
                let to = match &elem.data {
                    Some(Data::Verdict(Verdict::Goto(chain))) => chain.to_string(),
                    other => format!("{other:?}"),
                };
                (elem.key.as_ip().expect("an address"), to)
            })
            .collect()
    }

    #[test]
    fn the_hosts_part_moves_behind_ipvs_and_back_in_one_change() {
        let mut compiler = node(&[("p", "cali1", &["10.0.0.1/32", "fd00::1/128"])]);
        let without = compiler.program().clone();
        assert!(
            !base_chains(&without)
                .keys()
                .any(|name| name.contains("ipvs"))
        );
        compiler.set_ipvs(true);
        let with = compiler.program().clone();
        let placed = base_chains(&with);
        for (name, place) in [
            ("cali-ipvs-mark", (Hook::Input, 0)),
            ("cali-ipvs-input-from-wl", (Hook::Input, 101)),
            ("cali-ipvs-input-host", (Hook::Input, 102)),
            ("cali-ipvs-from-wl", (Hook::Output, 0)),
            ("cali-ipvs-to-wl", (Hook::Output, 1)),
            ("cali-ipvs-unmark", (Hook::Output, 2)),
        ] {
            assert_eq!(placed.get(name), Some(&place), "{name}");
        }
        for name in ["cali-input-from-wl", "cali-input-host"] {
            assert!(!placed.contains_key(name), "{name} twice");
        }
        // Nobody is without either between two transactions: the new ones come before or with the end of the former.
        let plan = plan_transaction(&without, &with);
        assert!(!plan.outcome.rebuilds);
        let used = plan.steps.iter().filter(|step| !step.is_empty());
        assert_eq!(used.count(), 1, "{:?}", plan.steps);
        let plan = plan_transaction(&with, &without);
        assert!(!plan.outcome.rebuilds);
        assert!(plan.steps[0].is_empty() && !plan.steps[1].is_empty() && !plan.steps[2].is_empty());
        compiler.set_ipvs(false);
        assert_eq!(compiler.program(), &without);
    }

    #[test]
    fn an_address_leads_to_the_chain_of_whoever_has_the_route() {
        let mut compiler = node(&[
            ("a", "cali1", &["10.0.0.1/32", "fd00::1/128"]),
            ("b", "cali2", &["10.0.0.1/32", "10.0.0.2/32"]),
            ("c", "cali2", &["10.0.0.3/32"]),
        ]);
        assert_eq!(ways(compiler.program(), IpVersion::V4), []);
        compiler.set_ipvs(true);
        let way =
            |address: &str, chain: &str| (address.parse().expect("an address"), chain.to_owned());
        assert_eq!(
            ways(compiler.program(), IpVersion::V4),
            [
                way("10.0.0.1", "cali-fw-cali1"),
                way("10.0.0.2", "cali-fw-cali2")
            ],
            "the first by name has a disputed address, or interface"
        );
        assert_eq!(
            ways(compiler.program(), IpVersion::V6),
            [way("fd00::1", "cali-fw-cali1")]
        );
    }
}
