//! BGPFilters and Calico's built-in import and export rules as policies.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::v3::{
    BGPFilterRule, BGPFilterSpec, CommunityValue, FilterAction, FilterOperation, MatchOperator,
    PeerType,
};

use super::originate::normal_priority;
use super::{HostRules, Resources, prefix};
use crate::policy::{
    Action, CidrMatch, CidrOperator, Condition, Edit, InterfacePattern, LocalKind, Policy,
    PolicyBuilder, PrefixSet, PriorityRange, Rule, SourceMatch, local_pref_of_priority,
};
use crate::wire::{Community, LargeCommunity, PeerKind, Prefix};

/// MULTI_EXIT_DISC (RFC 4271 §5.1.4) of routes that this node did not originate, towards external peers: worse than the
/// absent one of the node that did.
const TRANSIT_MED: u32 = 100;

/// Interfaces whose routes stay out of internal sessions: every node programs its tunnels itself.
const TUNNELS: [&str; 2] = ["*.cali", "*.calico"];
/// The same for IPIP, unless BGP supplies the routes over it.
const IPIP: &str = "tunl0";
/// Devices of the eBPF data plane.
const EBPF: &str = "bpf*.cali";

/// Which policy: names of BGPFilters, IPv4, import.
type Wanted = (Vec<String>, bool, bool);

/// The rules that end every import and export of this node, shared by all its peers; and the policies made so far, so
/// that a mesh of a thousand peers has two of them.
pub(super) struct Policies<'a> {
    filters: &'a BTreeMap<String, BGPFilterSpec>,
    /// By family, IPv4 first.
    import_tail: [Vec<Rule>; 2],
    export_tail: [Vec<Rule>; 2],
    made: RefCell<BTreeMap<Wanted, Arc<Policy>>>,
}

fn rule(origin: &str, conditions: Vec<Condition>, edits: Vec<Edit>, action: Action) -> Rule {
    Rule {
        origin: origin.into(),
        conditions,
        edits,
        action,
    }
}

fn pools(resources: &Resources, exported: bool) -> PrefixSet {
    let chosen = resources
        .pools
        .values()
        .filter(|p| p.disable_bgp_export != exported);
    chosen.filter_map(|p| prefix(&p.cidr)).collect()
}

/// Routes that are to be preferred over normal ones: of a workload that moves.
fn elevated(resources: &Resources, v4: bool) -> Condition {
    let normal = normal_priority(&resources.configuration(), v4);
    Condition::Priority(PriorityRange {
        min: 0,
        max: normal.saturating_sub(1),
    })
}

fn import_tail(resources: &Resources, v4: bool) -> Vec<Rule> {
    vec![rule(
        "preferred over local routes",
        vec![elevated(resources, v4)],
        vec![Edit::PreferOverLocal],
        Action::Next,
    )]
}

/// Calico's `calico_export_to_bgp_peers`, in its order.
fn export_tail(
    resources: &Resources,
    node: &str,
    blocks: &BTreeSet<Prefix>,
    v4: bool,
) -> Vec<Rule> {
    let configuration = resources.configuration();
    let interface = |name: &str| Condition::Interface(InterfacePattern::new(name));
    let internal = || Condition::PeerType(PeerKind::Ibgp);
    let mut tail = vec![rule(
        "IPPool disableBGPExport",
        vec![Condition::CoveredBy(pools(resources, false))],
        vec![],
        Action::Reject,
    )];
    use cali_api::v3::ProgramClusterRoutes as Program;
    let ipip_by_bgp = matches!(
        configuration.program_cluster_routes,
        Some(Program::Enabled | Program::EnabledIPIPOnly)
    );
    let tunnels = TUNNELS.into_iter().chain((!ipip_by_bgp).then_some(IPIP));
    tail.extend(tunnels.map(|name| {
        rule(
            "tunnel device",
            vec![internal(), interface(name)],
            vec![],
            Action::Reject,
        )
    }));
    tail.push(rule(
        "eBPF device",
        vec![interface(EBPF)],
        vec![],
        Action::Reject,
    ));
    tail.extend(advertisements(resources, node));
    let own: PrefixSet = blocks.iter().copied().collect();
    tail.extend([
        rule(
            "own block",
            vec![Condition::OneOf(own.clone())],
            vec![],
            Action::Accept,
        ),
        rule(
            "moving workload",
            vec![Condition::CoveredBy(own.clone()), elevated(resources, v4)],
            vec![],
            Action::Accept,
        ),
        rule(
            "inside own block",
            vec![Condition::CoveredBy(own)],
            vec![],
            Action::Reject,
        ),
        rule(
            "service",
            vec![Condition::Source(SourceMatch::Local(LocalKind::Service))],
            vec![],
            Action::Accept,
        ),
    ]);
    let this = resources.nodes.get(node);
    if this.and_then(super::NodeView::cluster_id).is_some() {
        let ranges = configuration
            .service_load_balancer_ips
            .iter()
            .chain(&configuration.service_external_ips);
        let reflected: PrefixSet = ranges.filter_map(|r| prefix(&r.cidr)).collect();
        tail.push(rule(
            "reflected service",
            vec![Condition::CoveredBy(reflected)],
            vec![],
            Action::Accept,
        ));
    }
    // Calico offers every pool's routes to external peers, another node's too. Without a metric such a router sees the
    // block's own node and all the others as equal, and may send packets in a circle between itself and one of them.
    tail.push(rule(
        "another node's route inside an IPPool",
        vec![
            Condition::PeerType(PeerKind::Ebgp),
            Condition::Source(SourceMatch::RemotePeers),
            Condition::CoveredBy(pools(resources, true)),
        ],
        vec![Edit::SetMed(TRANSIT_MED)],
        Action::Accept,
    ));
    tail.push(rule(
        "inside an IPPool",
        vec![Condition::CoveredBy(pools(resources, true))],
        vec![],
        Action::Accept,
    ));
    tail
}

impl<'a> Policies<'a> {
    pub(super) fn new(resources: &'a Resources, node: &str, blocks: &BTreeSet<Prefix>) -> Self {
        Self {
            filters: &resources.filters,
            import_tail: [true, false].map(|v4| import_tail(resources, v4)),
            export_tail: [true, false].map(|v4| export_tail(resources, node, blocks, v4)),
            made: RefCell::default(),
        }
    }

    /// Import policy of a peer of this family with these BGPFilters: what no rule refuses is accepted.
    pub(super) fn import(&self, names: &[String], v4: bool, host: &mut HostRules) -> Arc<Policy> {
        self.policy(names, v4, true, host)
    }

    /// Export policy of a peer of this family with these BGPFilters: only what a rule accepts is sent.
    pub(super) fn export(&self, names: &[String], v4: bool, host: &mut HostRules) -> Arc<Policy> {
        self.policy(names, v4, false, host)
    }

    fn policy(
        &self,
        names: &[String],
        v4: bool,
        import: bool,
        host: &mut HostRules,
    ) -> Arc<Policy> {
        let wanted = (names.to_vec(), v4, import);
        if let Some(made) = self.made.borrow().get(&wanted) {
            return Arc::clone(made);
        }
        let tails = if import {
            &self.import_tail
        } else {
            &self.export_tail
        };
        let rules = self.filter_rules(names, host, |f| match (import, v4) {
            (true, true) => ("importV4", &f.import_v4),
            (true, false) => ("importV6", &f.import_v6),
            (false, true) => ("exportV4", &f.export_v4),
            (false, false) => ("exportV6", &f.export_v6),
        });
        let tail = tails[usize::from(!v4)].iter().cloned();
        let policy = PolicyBuilder::default().rules(rules).rules(tail);
        let policy = Arc::new(policy.build(import));
        self.made.borrow_mut().insert(wanted, Arc::clone(&policy));
        policy
    }

    fn filter_rules(
        &self,
        names: &[String],
        host: &mut HostRules,
        part: impl Fn(&BGPFilterSpec) -> (&'static str, &Vec<BGPFilterRule>),
    ) -> Vec<Rule> {
        let mut out = Vec::new();
        for name in names {
            let Some(filter) = self.filters.get(name) else {
                host.notice(
                    format!("BGPFilter {name}"),
                    "does not exist; peers that name it go without it",
                );
                continue;
            };
            let (label, rules) = part(filter);
            for (number, one) in rules.iter().enumerate() {
                out.push(filter_rule(
                    &format!("BGPFilter {name} {label}[{number}]"),
                    one,
                ));
            }
        }
        out
    }
}

/// `prefixAdvertisements` of the node's own BGPConfiguration, else of the cluster's.
fn advertisements(resources: &Resources, node: &str) -> Vec<Rule> {
    let cluster = resources.configuration();
    let own = resources.node_configuration(node);
    let listed = own
        .map(|c| &c.prefix_advertisements)
        .filter(|list| !list.is_empty())
        .unwrap_or(&cluster.prefix_advertisements);
    let value = |text: &str| {
        let named = cluster
            .communities
            .iter()
            .find(|c| c.name == text)
            .map(|c| c.value);
        named.or_else(|| text.parse().ok())
    };
    let mut rules = Vec::new();
    for advertisement in listed {
        let Some(cidr) = prefix(&advertisement.cidr) else {
            continue;
        };
        let edits: Vec<Edit> = advertisement
            .communities
            .iter()
            .filter_map(|text| value(text))
            .map(add_community)
            .collect();
        let inside = Condition::CoveredBy([cidr].into_iter().collect());
        rules.push(rule(
            "prefixAdvertisements",
            vec![inside],
            edits,
            Action::Next,
        ));
    }
    rules
}

fn standard(a: u16, b: u16) -> Community {
    Community(u32::from(a) << 16 | u32::from(b))
}

fn add_community(value: CommunityValue) -> Edit {
    match value {
        CommunityValue::Standard(a, b) => Edit::AddCommunity(standard(a, b)),
        CommunityValue::Large(global, local1, local2) => Edit::AddLargeCommunity(LargeCommunity {
            global,
            local1,
            local2,
        }),
    }
}

fn has_community(value: CommunityValue) -> Condition {
    match value {
        CommunityValue::Standard(a, b) => Condition::Community(standard(a, b)),
        CommunityValue::Large(global, local1, local2) => {
            Condition::LargeCommunity(LargeCommunity {
                global,
                local1,
                local2,
            })
        }
    }
}

fn filter_rule(origin: &str, one: &BGPFilterRule) -> Rule {
    let mut conditions = Vec::new();
    let length = one.prefix_length.unwrap_or_default();
    match one.cidr.as_ref().and_then(prefix) {
        Some(cidr) => {
            let operator = match one.match_operator {
                Some(MatchOperator::Equal) => CidrOperator::Equal,
                Some(MatchOperator::NotEqual) => CidrOperator::NotEqual,
                Some(MatchOperator::NotIn) => CidrOperator::NotIn,
                Some(MatchOperator::In) | None => CidrOperator::In,
            };
            conditions.push(Condition::Cidr(
                CidrMatch::new(cidr, operator).with_length(length.min, length.max),
            ));
        }
        None if one.prefix_length.is_some() => conditions.push(Condition::Length {
            min: length.min.unwrap_or(0),
            max: length.max.unwrap_or(128),
        }),
        None => {}
    }
    if one.source.is_some() {
        conditions.push(Condition::Source(SourceMatch::RemotePeers));
    }
    if !one.interface.is_empty() {
        conditions.push(Condition::Interface(InterfacePattern::new(&one.interface)));
    }
    if let Some(kind) = one.peer_type {
        conditions.push(Condition::PeerType(match kind {
            PeerType::External => PeerKind::Ebgp,
            PeerType::Internal => PeerKind::Ibgp,
        }));
    }
    if let Some(communities) = &one.communities {
        conditions.extend(communities.values.iter().copied().map(has_community));
    }
    if !one.as_path_prefix.is_empty() {
        conditions.push(Condition::AsPathPrefix(
            one.as_path_prefix.iter().map(|a| a.0).collect(),
        ));
    }
    if let Some(priority) = one.priority {
        conditions.push(Condition::Priority(PriorityRange {
            min: priority,
            max: priority,
        }));
    }
    let action = match one.action {
        FilterAction::Accept => Action::Accept,
        FilterAction::Reject => Action::Reject,
    };
    rule(
        origin,
        conditions,
        one.operations.iter().flat_map(edits).collect(),
        action,
    )
}

fn edits(operation: &FilterOperation) -> Vec<Edit> {
    let mut out = Vec::new();
    if let Some(add) = &operation.add_community {
        out.push(add_community(add.value));
    }
    if let Some(prepend) = &operation.prepend_as_path {
        out.push(Edit::PrependAsPath(
            prepend.prefix.iter().map(|a| a.0).collect(),
        ));
    }
    if let Some(set) = &operation.set_priority {
        out.push(Edit::SetLocalPref(local_pref_of_priority(set.value)));
    }
    out
}
