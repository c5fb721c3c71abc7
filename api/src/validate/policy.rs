//! Policies, tiers, profiles and their rules.

use super::Findings;
use crate::Net;
use crate::v3::{
    Action, EntityRule, GlobalNetworkPolicySpec, Icmp, NetworkPolicySpec, PolicyType, Port,
    ProfileSpec, Rule, StagedAction, StagedGlobalNetworkPolicySpec, StagedNetworkPolicySpec,
    TierAction, TierSpec,
};

/// Most rules of one direction.
const MAX_RULES: usize = 1024;
/// Most networks of one list.
const MAX_NETS: usize = 256;
/// Most ports of one list.
const MAX_PORTS: usize = 50;

/// What the kinds of policies have in common.
struct Policy<'a> {
    selector: &'a str,
    namespace_selector: &'a str,
    service_account_selector: &'a str,
    types: &'a [PolicyType],
    ingress: &'a [Rule],
    egress: &'a [Rule],
    global: bool,
}

fn policy(policy: &Policy<'_>, findings: &mut Findings) {
    findings.selector("spec.selector", policy.selector, false);
    findings.selector("spec.namespaceSelector", policy.namespace_selector, false);
    findings.selector(
        "spec.serviceAccountSelector",
        policy.service_account_selector,
        false,
    );
    let repeated = policy
        .types
        .iter()
        .enumerate()
        .any(|(index, kind)| policy.types[..index].contains(kind));
    findings.require(!repeated, "spec.types", "lists a direction twice");
    rules(
        "spec.ingress",
        policy.ingress,
        PolicyType::Ingress,
        policy.global,
        findings,
    );
    rules(
        "spec.egress",
        policy.egress,
        PolicyType::Egress,
        policy.global,
        findings,
    );
}

pub(super) fn network_policy(spec: &NetworkPolicySpec, findings: &mut Findings) {
    policy(
        &Policy {
            selector: &spec.selector,
            namespace_selector: "",
            service_account_selector: &spec.service_account_selector,
            types: &spec.types,
            ingress: &spec.ingress,
            egress: &spec.egress,
            global: false,
        },
        findings,
    );
}

pub(super) fn global_network_policy(spec: &GlobalNetworkPolicySpec, findings: &mut Findings) {
    policy(
        &Policy {
            selector: &spec.selector,
            namespace_selector: &spec.namespace_selector,
            service_account_selector: &spec.service_account_selector,
            types: &spec.types,
            ingress: &spec.ingress,
            egress: &spec.egress,
            global: true,
        },
        findings,
    );
    findings.require(
        !(spec.do_not_track && spec.pre_dnat),
        "spec.preDNAT",
        "excludes doNotTrack",
    );
    for (set, path) in [
        (spec.do_not_track, "spec.doNotTrack"),
        (spec.pre_dnat, "spec.preDNAT"),
    ] {
        findings.require(!set || spec.apply_on_forward, path, "needs applyOnForward");
    }
    if spec.pre_dnat {
        findings.require(
            spec.egress.is_empty(),
            "spec.egress",
            "must be empty with preDNAT",
        );
        findings.require(
            !spec.types.contains(&PolicyType::Egress),
            "spec.types",
            "may not contain Egress with preDNAT",
        );
    }
}

pub(super) fn staged_network_policy(spec: &StagedNetworkPolicySpec, findings: &mut Findings) {
    let (action, committed) = spec.committed();
    network_policy(&committed, findings);
    let empty = NetworkPolicySpec {
        tier: committed.tier.clone(),
        types: committed.types.clone(),
        ..Default::default()
    };
    findings.require(
        action != StagedAction::Delete || committed == empty,
        "spec.stagedAction",
        "Delete leaves all other fields empty",
    );
}

pub(super) fn staged_global_network_policy(
    spec: &StagedGlobalNetworkPolicySpec,
    findings: &mut Findings,
) {
    let (action, committed) = spec.committed();
    global_network_policy(&committed, findings);
    let empty = GlobalNetworkPolicySpec {
        tier: committed.tier.clone(),
        types: committed.types.clone(),
        ..Default::default()
    };
    findings.require(
        action != StagedAction::Delete || committed == empty,
        "spec.stagedAction",
        "Delete leaves all other fields empty",
    );
}

pub(super) fn profile(spec: &ProfileSpec, findings: &mut Findings) {
    rules(
        "spec.ingress",
        &spec.ingress,
        PolicyType::Ingress,
        true,
        findings,
    );
    rules(
        "spec.egress",
        &spec.egress,
        PolicyType::Egress,
        true,
        findings,
    );
}

/// Tiers whose place and verdict are fixed.
const FIXED_TIERS: [(&str, f64, TierAction); 3] = [
    ("default", 1_000_000.0, TierAction::Deny),
    ("kube-admin", 1_000.0, TierAction::Pass),
    ("kube-baseline", 10_000_000.0, TierAction::Pass),
];

pub(super) fn tier(name: &str, spec: &TierSpec, findings: &mut Findings) {
    let Some((_, order, action)) = FIXED_TIERS.iter().find(|(fixed, ..)| *fixed == name) else {
        return;
    };
    if spec
        .order
        .is_none_or(|given| given.0.total_cmp(order).is_ne())
    {
        findings.add(
            "spec.order",
            format!("is fixed at {order} for tier {name:?}"),
        );
    }
    if spec.end_action() != *action {
        findings.add(
            "spec.defaultAction",
            format!("is fixed at {action} for tier {name:?}"),
        );
    }
}

fn rules(path: &str, rules: &[Rule], direction: PolicyType, global: bool, findings: &mut Findings) {
    if rules.len() > MAX_RULES {
        findings.add(path, format!("has more than {MAX_RULES} rules"));
    }
    for (index, candidate) in rules.iter().enumerate() {
        rule(
            &format!("{path}[{index}]"),
            candidate,
            direction,
            global,
            findings,
        );
    }
}

fn rule(path: &str, rule: &Rule, direction: PolicyType, global: bool, findings: &mut Findings) {
    let field = |name: &str| format!("{path}.{name}");
    if rule
        .ip_version
        .is_some_and(|version| version != 4 && version != 6)
    {
        findings.add(field("ipVersion"), "must be 4 or 6");
    }
    for (side, entity_rule) in [("source", &rule.source), ("destination", &rule.destination)] {
        entity(&field(side), entity_rule, global, findings);
        let ports = !entity_rule.ports.is_empty() || !entity_rule.not_ports.is_empty();
        if ports && !rule.protocol.is_some_and(crate::v3::Protocol::has_ports) {
            findings.add(
                field("protocol"),
                format!("must be TCP, UDP or SCTP, for {side} has ports"),
            );
        }
    }
    icmp(&field("icmp"), rule, rule.icmp, findings);
    icmp(&field("notICMP"), rule, rule.not_icmp, findings);
    families(path, rule, findings);

    let (allowed, other, allowed_name, other_name) = match direction {
        PolicyType::Ingress => (&rule.source, &rule.destination, "source", "destination"),
        PolicyType::Egress => (&rule.destination, &rule.source, "destination", "source"),
    };
    if other.services.is_some() {
        findings.add(
            field(&format!("{other_name}.services")),
            format!("is only allowed in the {allowed_name} of {direction} rules"),
        );
    }
    if direction == PolicyType::Egress
        && allowed.services.is_some()
        && !(allowed.ports.is_empty() && allowed.not_ports.is_empty())
    {
        findings.add(
            field("destination.ports"),
            "must be empty with services, which have ports of their own",
        );
    }
    if rule.http.is_some() {
        findings.require(
            rule.action == Action::Allow,
            &field("http"),
            "is only allowed with action Allow",
        );
        findings.require(
            direction == PolicyType::Ingress,
            &field("http"),
            "is not allowed in egress rules",
        );
        let tcp = rule.protocol.is_none_or(|protocol| protocol.number() == 6);
        findings.require(tcp, &field("http"), "needs protocol TCP");
    }
}

fn icmp(path: &str, rule: &Rule, icmp: Option<Icmp>, findings: &mut Findings) {
    let Some(icmp) = icmp else { return };
    findings.require(
        icmp.type_ != Some(255),
        path,
        "type must be between 0 and 254",
    );
    findings.require(
        icmp.code.is_none() || icmp.type_.is_some(),
        path,
        "code needs type",
    );
    let version = match rule.protocol.map(crate::v3::Protocol::number) {
        Some(1) => 4,
        Some(58) => 6,
        _ => {
            findings.add(path, "needs protocol ICMP or ICMPv6");
            return;
        }
    };
    if rule.ip_version.is_some_and(|given| given != version) {
        findings.add(
            path,
            format!(
                "protocol and ipVersion contradict each other: the protocol belongs to IPv{version}"
            ),
        );
    }
}

/// One rule is about one family.
fn families(path: &str, rule: &Rule, findings: &mut Findings) {
    let lists = [
        &rule.source.nets,
        &rule.source.not_nets,
        &rule.destination.nets,
        &rule.destination.not_nets,
    ];
    let has = |v4: bool| {
        lists
            .iter()
            .any(|list| list.iter().any(|net| net.cidr().is_v4() == v4))
    };
    let (v4, v6) = (has(true), has(false));
    if v4 && v6 {
        findings.add(path, "mixes IPv4 and IPv6 networks");
    } else if (v4 && rule.ip_version == Some(6)) || (v6 && rule.ip_version == Some(4)) {
        findings.add(
            format!("{path}.ipVersion"),
            "contradicts the networks of the rule",
        );
    }
}

fn entity(path: &str, entity: &EntityRule, global: bool, findings: &mut Findings) {
    let field = |name: &str| format!("{path}.{name}");
    findings.selector(&field("selector"), &entity.selector, false);
    findings.selector(&field("notSelector"), &entity.not_selector, false);
    findings.selector(
        &field("namespaceSelector"),
        &entity.namespace_selector,
        true,
    );
    for (name, nets) in [("nets", &entity.nets), ("notNets", &entity.not_nets)] {
        findings.require(
            nets.len() <= MAX_NETS,
            &field(name),
            "has more than 256 entries",
        );
    }
    if entity
        .not_nets
        .iter()
        .any(|net: &Net| net.cidr().is_default())
    {
        findings.add(field("notNets"), "excludes every address");
    }
    for (name, ports) in [("ports", &entity.ports), ("notPorts", &entity.not_ports)] {
        findings.require(
            ports.len() <= MAX_PORTS,
            &field(name),
            "has more than 50 entries",
        );
        if ports
            .iter()
            .any(|port| matches!(port, Port::Number(0) | Port::Range(0, _)))
        {
            findings.add(field(name), "port 0 cannot be matched");
        }
    }
    if let Some(accounts) = &entity.service_accounts {
        findings.selector(
            &field("serviceAccounts.selector"),
            &accounts.selector,
            false,
        );
    }
    if let Some(service) = &entity.services {
        findings.require(
            !service.name.is_empty(),
            &field("services.name"),
            "is required",
        );
        findings.require(
            !global || !service.namespace.is_empty(),
            &field("services.namespace"),
            "is required in a policy without a namespace",
        );
        let alone = entity.nets.is_empty()
            && entity.not_nets.is_empty()
            && entity.selector.is_empty()
            && entity.not_selector.is_empty()
            && entity.namespace_selector.is_empty()
            && entity.service_accounts.is_none();
        findings.require(
            alone,
            &field("services"),
            "excludes networks, selectors and service accounts",
        );
    }
}
