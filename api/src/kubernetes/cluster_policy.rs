//! Policies of `policy.networking.k8s.io` become GlobalNetworkPolicies of Calico's fixed tiers.
//!
//! | kind | tier |
//! |---|---|
//! | ClusterNetworkPolicy, tier Admin | `kube-admin` |
//! | ClusterNetworkPolicy, tier Baseline | `kube-baseline` |
//! | AdminNetworkPolicy | `adminnetworkpolicy` |
//! | BaselineAdminNetworkPolicy | `baselineadminnetworkpolicy` |
//!
//! A rule that cannot be converted does not open anything: one that accepts is left out, one that denies or passes
//! becomes a denial of everything, and either way it is reported. A policy whose subject cannot be read is not applied.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};

use super::derived_metadata;
use super::policy::{pods, with_terms};
use crate::selector::Selector;
use crate::text::text_enum;
use crate::v3::{
    self, EntityRule, GlobalNetworkPolicySpec, Order, PolicyType, Port, Protocol, RuleMetadata,
};
use crate::{Net, ObjectMeta, Resource};

/// A ClusterNetworkPolicy (`v1alpha2`).
pub type ClusterNetworkPolicy = Resource<ClusterNetworkPolicySpec>;
/// An AdminNetworkPolicy (`v1alpha1`).
pub type AdminNetworkPolicy = Resource<AdminNetworkPolicySpec>;
/// A BaselineAdminNetworkPolicy (`v1alpha1`).
pub type BaselineAdminNetworkPolicy = Resource<BaselineAdminNetworkPolicySpec>;

text_enum! {
    /// Whether a policy comes before or after those of namespaces.
    pub enum ClusterTier { Admin = "Admin", Baseline = "Baseline" }
}

/// A ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterNetworkPolicySpec {
    /// Before or after the policies of namespaces.
    pub tier: ClusterTier,
    /// Place within the tier, 0 to 1000; smaller first.
    pub priority: i32,
    /// The pods that it applies to.
    pub subject: ClusterSubject,
    /// Rules for traffic to them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<ClusterRule>,
    /// Rules for traffic from them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<ClusterRule>,
}

/// An AdminNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminNetworkPolicySpec {
    /// Place among its kind, 0 to 1000; smaller first.
    pub priority: i32,
    /// The pods that it applies to.
    pub subject: ClusterSubject,
    /// Rules for traffic to them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<ClusterRule>,
    /// Rules for traffic from them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<ClusterRule>,
}

/// The one BaselineAdminNetworkPolicy, named `default`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaselineAdminNetworkPolicySpec {
    /// The pods that it applies to.
    pub subject: ClusterSubject,
    /// Rules for traffic to them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<ClusterRule>,
    /// Rules for traffic from them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<ClusterRule>,
}

/// Pods by namespace, or by namespace and label; exactly one of the two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterSubject {
    /// All pods of these namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPods>,
}

/// Some pods of some namespaces.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NamespacedPods {
    /// The namespaces; empty means all.
    pub namespace_selector: LabelSelector,
    /// The pods; empty means all.
    pub pod_selector: LabelSelector,
}

text_enum! {
    /// What a rule does. `Allow` is what `v1alpha1` calls `Accept`.
    pub enum ClusterAction { Accept = "Accept", Allow = "Allow", Deny = "Deny", Pass = "Pass" }
}

/// A rule of either direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterRule {
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// What to do.
    pub action: ClusterAction,
    /// Senders; of ingress rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<ClusterPeer>,
    /// Receivers; of egress rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<ClusterPeer>,
    /// Protocols and ports (`v1alpha2`); empty means all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub protocols: Vec<ClusterProtocol>,
    /// Protocols and ports (`v1alpha1`); empty means all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<ClusterPort>,
}

/// Whom a rule is about; exactly one field.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClusterPeer {
    /// All pods of these namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPods>,
    /// Networks; of egress rules.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<String>,
    /// Nodes; not supported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<LabelSelector>,
    /// Names of hosts; not supported.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub domain_names: Vec<String>,
}

/// A protocol with ports (`v1alpha2`); exactly one field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClusterProtocol {
    /// TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<DestinationPort>,
    /// UDP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp: Option<DestinationPort>,
    /// SCTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sctp: Option<DestinationPort>,
    /// A named port of the receiver, whatever its protocol.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub destination_named_port: String,
}

/// What a protocol asks of the destination.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct DestinationPort {
    /// The port; all where none is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<PortOrRange>,
}

/// A port or several; exactly one field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PortOrRange {
    /// One port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<i32>,
    /// Several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<StartEnd>,
}

/// Ports from `start` to `end`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartEnd {
    /// The first.
    pub start: i32,
    /// The last.
    pub end: i32,
}

/// A port of a protocol (`v1alpha1`); exactly one field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ClusterPort {
    /// One port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_number: Option<ProtocolPort>,
    /// Several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_range: Option<ProtocolPorts>,
    /// A named port of the receiver, whatever its protocol.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub named_port: Option<String>,
}

/// A port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtocolPort {
    /// TCP where none is given.
    #[serde(default = "tcp")]
    pub protocol: String,
    /// The number.
    pub port: i32,
}

/// Ports from `start` to `end`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProtocolPorts {
    /// TCP where none is given.
    #[serde(default = "tcp")]
    pub protocol: String,
    /// The first.
    pub start: i32,
    /// The last.
    pub end: i32,
}

fn tcp() -> String {
    "TCP".to_owned()
}

/// What the three kinds have in common.
struct Parts<'a> {
    metadata: &'a ObjectMeta,
    name: String,
    tier: &'static str,
    order: Option<Order>,
    subject: &'a ClusterSubject,
    ingress: &'a [ClusterRule],
    egress: &'a [ClusterRule],
}

/// The policy in Calico's terms, or nothing if it cannot be told to which pods it applies.
#[must_use]
pub fn cluster_network_policy(
    policy: &ClusterNetworkPolicy,
    problems: &mut Vec<String>,
) -> Option<v3::GlobalNetworkPolicy> {
    let tier = match policy.spec.tier {
        ClusterTier::Admin => "kube-admin",
        ClusterTier::Baseline => "kube-baseline",
    };
    let parts = Parts {
        metadata: &policy.metadata,
        name: format!("kcnp.{tier}.{}", policy.metadata.name),
        tier,
        order: Some(Order(policy.spec.priority.into())),
        subject: &policy.spec.subject,
        ingress: &policy.spec.ingress,
        egress: &policy.spec.egress,
    };
    convert(&parts, problems)
}

/// The policy in Calico's terms, or nothing if it cannot be told to which pods it applies.
#[must_use]
pub fn admin_network_policy(
    policy: &AdminNetworkPolicy,
    problems: &mut Vec<String>,
) -> Option<v3::GlobalNetworkPolicy> {
    let tier = "adminnetworkpolicy";
    let parts = Parts {
        metadata: &policy.metadata,
        name: format!("kanp.{tier}.{}", policy.metadata.name),
        tier,
        order: Some(Order(policy.spec.priority.into())),
        subject: &policy.spec.subject,
        ingress: &policy.spec.ingress,
        egress: &policy.spec.egress,
    };
    convert(&parts, problems)
}

/// The policy in Calico's terms, or nothing if it cannot be told to which pods it applies.
#[must_use]
pub fn baseline_admin_network_policy(
    policy: &BaselineAdminNetworkPolicy,
    problems: &mut Vec<String>,
) -> Option<v3::GlobalNetworkPolicy> {
    let tier = "baselineadminnetworkpolicy";
    let parts = Parts {
        metadata: &policy.metadata,
        name: format!("kbanp.{tier}.{}", policy.metadata.name),
        tier,
        order: None,
        subject: &policy.spec.subject,
        ingress: &policy.spec.ingress,
        egress: &policy.spec.egress,
    };
    convert(&parts, problems)
}

fn convert(parts: &Parts<'_>, problems: &mut Vec<String>) -> Option<v3::GlobalNetworkPolicy> {
    let subject = selected(&parts.subject.namespaces, &parts.subject.pods);
    let (namespace_selector, selector) = match subject {
        Ok(selectors) => selectors,
        Err(problem) => {
            problems.push(format!("spec.subject: {problem}"));
            return None;
        }
    };
    let ingress = rules(parts.ingress, PolicyType::Ingress, problems);
    let egress = rules(parts.egress, PolicyType::Egress, problems);
    let mut types = Vec::new();
    if !parts.ingress.is_empty() {
        types.push(PolicyType::Ingress);
    }
    if !parts.egress.is_empty() {
        types.push(PolicyType::Egress);
    }
    Some(Resource::new(
        derived_metadata(parts.metadata, parts.name.clone()),
        GlobalNetworkPolicySpec {
            tier: parts.tier.to_owned(),
            order: parts.order,
            selector,
            namespace_selector,
            types,
            ingress,
            egress,
            ..GlobalNetworkPolicySpec::default()
        },
    ))
}

/// Selectors of namespaces and of pods. Exactly one of the two ways must be used.
fn selected(
    namespaces: &Option<LabelSelector>,
    some: &Option<NamespacedPods>,
) -> Result<(String, String), String> {
    let (namespaces, labels) = match (namespaces, some) {
        (Some(namespaces), None) => (namespaces, None),
        (None, Some(some)) => (&some.namespace_selector, Some(&some.pod_selector)),
        _ => return Err("exactly one of namespaces and pods is needed".to_owned()),
    };
    let namespaces = with_terms(Selector::all(), namespaces)?;
    Ok((namespaces.to_string(), pods(labels)?.to_string()))
}

fn rules(
    rules: &[ClusterRule],
    direction: PolicyType,
    problems: &mut Vec<String>,
) -> Vec<v3::Rule> {
    let place = match direction {
        PolicyType::Ingress => "spec.ingress",
        PolicyType::Egress => "spec.egress",
    };
    let mut all = Vec::new();
    for (index, candidate) in rules.iter().enumerate() {
        match rule(candidate, direction) {
            Ok(converted) => all.extend(converted),
            Err(problem) => {
                let accepts = matches!(
                    candidate.action,
                    ClusterAction::Accept | ClusterAction::Allow
                );
                let outcome = if accepts {
                    "is left out"
                } else {
                    all.push(named(v3::Rule::new(v3::Action::Deny), &candidate.name));
                    "denies everything"
                };
                problems.push(format!("{place}[{index}] {outcome}: {problem}"));
            }
        }
    }
    all
}

fn named(mut rule: v3::Rule, name: &str) -> v3::Rule {
    if !name.is_empty() {
        let annotations = [("name".to_owned(), name.to_owned())].into_iter().collect();
        rule.metadata = Some(RuleMetadata { annotations });
    }
    rule
}

/// One rule for each peer and protocol. Ports are always those of the receiver.
fn rule(rule: &ClusterRule, direction: PolicyType) -> Result<Vec<v3::Rule>, String> {
    let action = match rule.action {
        ClusterAction::Accept | ClusterAction::Allow => v3::Action::Allow,
        ClusterAction::Deny => v3::Action::Deny,
        ClusterAction::Pass => v3::Action::Pass,
    };
    let (peers, others, list) = match direction {
        PolicyType::Ingress => (&rule.from, &rule.to, "from"),
        PolicyType::Egress => (&rule.to, &rule.from, "to"),
    };
    if peers.is_empty() || !others.is_empty() {
        return Err(format!(
            "{direction} rules need peers in {list}, and only there"
        ));
    }
    let protocols = protocols(rule)?;
    let mut all = Vec::new();
    for (index, candidate) in peers.iter().enumerate() {
        let entity =
            peer(candidate, direction).map_err(|problem| format!("{list}[{index}]: {problem}"))?;
        for (protocol, ports) in &protocols {
            let mut converted = v3::Rule {
                protocol: *protocol,
                ..v3::Rule::new(action)
            };
            match direction {
                PolicyType::Ingress => converted.source = entity.clone(),
                PolicyType::Egress => converted.destination = entity.clone(),
            }
            converted.destination.ports.clone_from(ports);
            all.push(named(converted, &rule.name));
        }
    }
    Ok(all)
}

fn peer(peer: &ClusterPeer, direction: PolicyType) -> Result<EntityRule, String> {
    if peer.nodes.is_some() {
        return Err("nodes are not supported as peers".to_owned());
    }
    if !peer.domain_names.is_empty() {
        return Err("domain names are not supported".to_owned());
    }
    if !peer.networks.is_empty() {
        if peer.namespaces.is_some() || peer.pods.is_some() || direction == PolicyType::Ingress {
            return Err("networks stand alone, and in egress rules only".to_owned());
        }
        let net = |text: &String| text.parse::<Net>().map_err(|error| error.to_string());
        return Ok(EntityRule {
            nets: peer.networks.iter().map(net).collect::<Result<_, _>>()?,
            ..EntityRule::default()
        });
    }
    let (namespace_selector, selector) = selected(&peer.namespaces, &peer.pods)?;
    Ok(EntityRule {
        selector,
        namespace_selector,
        ..EntityRule::default()
    })
}

type ProtocolPortsList = Vec<(Option<Protocol>, Vec<Port>)>;

/// Protocols with their ports; one entry without either where nothing is asked.
fn protocols(rule: &ClusterRule) -> Result<ProtocolPortsList, String> {
    let mut all: ProtocolPortsList = Vec::new();
    let mut named = |name: &str| -> Result<(), String> {
        match name.parse::<Port>() {
            Ok(port @ Port::Named(_)) => {
                let every = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
                all.extend(every.map(|protocol| (Some(protocol), vec![port.clone()])));
                Ok(())
            }
            _ => Err(format!("{name:?} is not the name of a port")),
        }
    };
    for protocol in &rule.protocols {
        if !protocol.destination_named_port.is_empty() {
            named(&protocol.destination_named_port)?;
        }
    }
    for port in &rule.ports {
        if let Some(name) = &port.named_port {
            named(name)?;
        }
    }
    for entry in &rule.protocols {
        let given = [
            (Protocol::Tcp, &entry.tcp),
            (Protocol::Udp, &entry.udp),
            (Protocol::Sctp, &entry.sctp),
        ];
        let mut given = given
            .into_iter()
            .filter_map(|(protocol, ports)| Some((protocol, ports.as_ref()?)));
        match (given.next(), given.next()) {
            (Some((protocol, ports)), None) if entry.destination_named_port.is_empty() => {
                all.push((Some(protocol), destination_ports(ports)?));
            }
            (None, None) if !entry.destination_named_port.is_empty() => {}
            _ => {
                return Err(
                    "exactly one of tcp, udp, sctp and destinationNamedPort is needed".into(),
                );
            }
        }
    }
    for entry in &rule.ports {
        let (protocol, ports) = match (&entry.port_number, &entry.port_range, &entry.named_port) {
            (Some(port), None, None) => (&port.protocol, Port::Number(number(port.port)?)),
            (None, Some(ports), None) => (&ports.protocol, range(ports.start, ports.end)?),
            (None, None, Some(_)) => continue,
            _ => return Err("exactly one of portNumber, portRange and namedPort is needed".into()),
        };
        let protocol: Protocol = protocol.parse().map_err(|e| format!("{e}"))?;
        if !protocol.has_ports() {
            return Err(format!("protocol {protocol} has no ports"));
        }
        all.push((Some(protocol), vec![ports]));
    }
    if all.is_empty() {
        all.push((None, Vec::new()));
    }
    Ok(all)
}

fn destination_ports(ports: &DestinationPort) -> Result<Vec<Port>, String> {
    let Some(port) = &ports.destination_port else {
        return Ok(Vec::new());
    };
    match (port.number, &port.range) {
        (Some(port), None) => Ok(vec![Port::Number(number(port)?)]),
        (None, Some(ports)) => Ok(vec![range(ports.start, ports.end)?]),
        _ => Err("exactly one of number and range is needed".to_owned()),
    }
}

fn number(port: i32) -> Result<u16, String> {
    u16::try_from(port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| format!("{port} is not a port number"))
}

fn range(start: i32, end: i32) -> Result<Port, String> {
    let (from, to) = (number(start)?, number(end)?);
    if from > to {
        return Err(format!("port range {from}:{to} ends before it starts"));
    }
    Ok(Port::Range(from, to))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::AnyResource;
    use crate::kubernetes::convert;

    fn converted(version: &str, kind: &str, spec: Value) -> (Value, Vec<String>) {
        let manifest = json!({
            "apiVersion": format!("policy.networking.k8s.io/{version}"), "kind": kind,
            "metadata": {"name": "one"}, "spec": spec,
        });
        let object = AnyResource::from_json(manifest).unwrap();
        let conversion = convert(&object);
        let resources = conversion.resources.iter().map(AnyResource::to_json);
        (resources.collect(), conversion.problems)
    }

    #[test]
    fn a_cluster_policy_becomes_a_policy_of_a_fixed_tier() {
        let spec = json!({
            "tier": "Admin", "priority": 7,
            "subject": {"namespaces": {"matchLabels": {"env": "prod"}}},
            "ingress": [{"name": "first", "action": "Pass",
                         "from": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "x"}}}}],
                         "protocols": [{"tcp": {"destinationPort": {"number": 80}}},
                                       {"udp": {"destinationPort": {"range": {"start": 5, "end": 9}}}}]}],
            "egress": [{"action": "Deny", "to": [{"networks": ["10.0.0.0/8", "fd00::/8"]}]}],
        });
        let (made, problems) = converted("v1alpha2", "ClusterNetworkPolicy", spec);
        assert_eq!(problems, Vec::<String>::new());
        let pods = "projectcalico.org/orchestrator == \"k8s\"";
        let source =
            json!({"selector": format!("{pods} && app == \"x\""), "namespaceSelector": "all()"});
        assert_eq!(made[0]["metadata"]["name"], "kcnp.kube-admin.one");
        let spec = &made[0]["spec"];
        assert_eq!(
            (&spec["tier"], &spec["order"]),
            (&json!("kube-admin"), &json!(7))
        );
        assert_eq!(spec["namespaceSelector"], "env == \"prod\"");
        assert_eq!(spec["types"], json!(["Ingress", "Egress"]));
        assert_eq!(
            spec["ingress"],
            json!([
                {"action": "Pass", "protocol": "TCP", "source": source, "destination": {"ports": [80]},
                 "metadata": {"annotations": {"name": "first"}}},
                {"action": "Pass", "protocol": "UDP", "source": source, "destination": {"ports": ["5:9"]},
                 "metadata": {"annotations": {"name": "first"}}},
            ])
        );
        assert_eq!(
            spec["egress"],
            json!([{"action": "Deny", "destination": {"nets": ["10.0.0.0/8", "fd00::/8"]}}])
        );
    }

    #[test]
    fn admin_policies_of_the_first_version_have_tiers_of_their_own() {
        let rule = json!({"action": "Allow", "from": [{"namespaces": {}}],
                          "ports": [{"portNumber": {"port": 80}}, {"portRange": {"protocol": "SCTP", "start": 1, "end": 2}},
                                    {"namedPort": "web"}]});
        let subject = json!({"pods": {"namespaceSelector": {}, "podSelector": {}}});
        for (kind, tier, spec) in [
            (
                "AdminNetworkPolicy",
                "adminnetworkpolicy",
                json!({"priority": 3, "subject": subject, "ingress": [rule]}),
            ),
            (
                "BaselineAdminNetworkPolicy",
                "baselineadminnetworkpolicy",
                json!({"subject": subject, "ingress": [rule]}),
            ),
        ] {
            let (made, problems) = converted("v1alpha1", kind, spec);
            assert_eq!(problems, Vec::<String>::new());
            let spec = &made[0]["spec"];
            assert_eq!(spec["tier"], tier);
            assert_eq!(spec["types"], json!(["Ingress"]));
            let ports = |index: usize| {
                (
                    &spec["ingress"][index]["protocol"],
                    &spec["ingress"][index]["destination"]["ports"],
                )
            };
            assert_eq!(spec["ingress"].as_array().unwrap().len(), 5, "{spec}");
            assert_eq!(ports(2), (&json!("SCTP"), &json!(["web"])));
            assert_eq!(ports(3), (&json!("TCP"), &json!([80])));
            assert_eq!(ports(4), (&json!("SCTP"), &json!(["1:2"])));
        }
    }

    #[test]
    fn what_cannot_be_converted_opens_nothing() {
        let rule = |action: &str| json!({"action": action, "to": [{"nodes": {}}]});
        let spec = json!({"tier": "Baseline", "priority": 0, "subject": {"namespaces": {}},
                          "egress": [rule("Accept"), rule("Pass"), rule("Deny")]});
        let (made, problems) = converted("v1alpha2", "ClusterNetworkPolicy", spec);
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert_eq!(
            made[0]["spec"]["egress"],
            json!([{"action": "Deny"}, {"action": "Deny"}])
        );
        let spec = json!({"tier": "Admin", "priority": 0, "subject": {}, "egress": []});
        let (made, problems) = converted("v1alpha2", "ClusterNetworkPolicy", spec);
        assert_eq!((made, problems.len()), (json!([]), 1));
    }
}
