//! Policies of `networking.k8s.io/v1` become policies of tier `default`.
//!
//! They only ever allow: a part that cannot be converted is left out and reported, and grants
//! nothing. What they deny follows from the end of the tier.

use std::collections::BTreeMap;

use k8s_openapi::api::networking::v1::{NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{
    LABEL_ORCHESTRATOR, NETWORK_POLICY_ORDER, NETWORK_POLICY_PREFIX, NetworkPolicy,
    ORCHESTRATOR_KUBERNETES, derived_metadata,
};
use crate::selector::Selector;
use crate::v3::{
    self, Action, DEFAULT_TIER, EntityRule, NetworkPolicySpec, Order, PolicyType, Port, Protocol,
    Rule,
};
use crate::{Net, Resource};

/// Characters of label names and values that a selector expression can hold.
fn expressible(name: &str, values: &[String]) -> Result<(), String> {
    let legal =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'/' | b'-');
    if name.is_empty() || name.len() > 512 || !name.bytes().all(legal) {
        return Err(format!("{name:?} is not a label name"));
    }
    match values.iter().find(|value| value.contains(['\'', '"'])) {
        Some(value) => Err(format!("{value:?} is not a label value")),
        None => Ok(()),
    }
}

/// Adds the terms of a label selector to a selector.
pub(super) fn with_terms(
    mut selector: Selector,
    terms: &LabelSelector,
) -> Result<Selector, String> {
    for (name, value) in terms.match_labels.iter().flatten() {
        expressible(name, std::slice::from_ref(value))?;
        selector = selector.and(Selector::equals(name, value));
    }
    for term in terms.match_expressions.iter().flatten() {
        let values = term.values.as_deref().unwrap_or_default();
        expressible(&term.key, values)?;
        let texts = values.iter().map(String::as_str);
        selector = selector.and(match term.operator.as_str() {
            "In" => Selector::is_in(&term.key, texts),
            "NotIn" => Selector::is_not_in(&term.key, texts),
            "Exists" => Selector::has(&term.key),
            "DoesNotExist" => Selector::has(&term.key).negated(),
            other => return Err(format!("{other:?} is not an operator of label selectors")),
        });
    }
    Ok(selector)
}

/// Pods with these labels; all pods for none.
pub(super) fn pods(terms: Option<&LabelSelector>) -> Result<Selector, String> {
    let pods = Selector::equals(LABEL_ORCHESTRATOR, ORCHESTRATOR_KUBERNETES);
    terms.map_or(Ok(pods.clone()), |terms| with_terms(pods, terms))
}

fn peer(peer: &NetworkPolicyPeer) -> Result<EntityRule, String> {
    if let Some(block) = &peer.ip_block {
        let net = |text: &String| text.parse::<Net>().map_err(|error| error.to_string());
        return Ok(EntityRule {
            nets: vec![net(&block.cidr)?],
            not_nets: block
                .except
                .iter()
                .flatten()
                .map(net)
                .collect::<Result<_, _>>()?,
            ..EntityRule::default()
        });
    }
    if peer.pod_selector.is_none() && peer.namespace_selector.is_none() {
        return Err("a peer needs ipBlock, podSelector or namespaceSelector".to_owned());
    }
    let namespaces = peer
        .namespace_selector
        .as_ref()
        .map(|terms| with_terms(Selector::all(), terms))
        .transpose()?;
    Ok(EntityRule {
        selector: pods(peer.pod_selector.as_ref())?.to_string(),
        namespace_selector: namespaces
            .map(|selector| selector.to_string())
            .unwrap_or_default(),
        ..EntityRule::default()
    })
}

/// The ports of one protocol; without ranges and names, all of them.
#[derive(Default)]
struct PortSet {
    everything: bool,
    ranges: Vec<(u16, u16)>,
    names: Vec<String>,
}

impl PortSet {
    fn add(&mut self, port: &NetworkPolicyPort) -> Result<(), String> {
        let number =
            |value: i32| u16::try_from(value).map_err(|_| format!("{value} is not a port number"));
        match (&port.port, port.end_port) {
            (None, None) => self.everything = true,
            (None, Some(_)) => return Err("endPort needs port".to_owned()),
            (Some(IntOrString::Int(from)), to) => {
                let (from, to) = (number(*from)?, number(to.unwrap_or(*from))?);
                if to < from {
                    return Err(format!("port range {from}:{to} ends before it starts"));
                }
                self.ranges.push((from, to));
            }
            (Some(IntOrString::String(_)), Some(_)) => {
                return Err("endPort needs a numeric port".to_owned());
            }
            (Some(IntOrString::String(name)), None) => match name.parse::<Port>() {
                Ok(Port::Number(number)) => self.ranges.push((number, number)),
                Ok(Port::Named(name)) => self.names.push(name),
                _ => return Err(format!("{name:?} is not a port name")),
            },
        }
        Ok(())
    }

    /// Ascending, adjacent ranges merged, names last.
    fn into_ports(mut self) -> Vec<Port> {
        if self.everything {
            return Vec::new();
        }
        self.ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (from, to) in self.ranges {
            match merged.last_mut() {
                Some((_, end)) if u32::from(from) <= u32::from(*end) + 1 => *end = to.max(*end),
                _ => merged.push((from, to)),
            }
        }
        self.names.sort_unstable();
        self.names.dedup();
        let numeric = merged.into_iter().map(|(from, to)| {
            if from == to {
                Port::Number(from)
            } else {
                Port::Range(from, to)
            }
        });
        numeric
            .chain(self.names.into_iter().map(Port::Named))
            .collect()
    }
}

/// Ports by protocol, or nothing where every protocol and port is meant.
fn ports_by_protocol(
    ports: &[NetworkPolicyPort],
    place: &str,
    problems: &mut Vec<String>,
) -> Option<BTreeMap<Protocol, PortSet>> {
    let mut sets: BTreeMap<Protocol, PortSet> = BTreeMap::new();
    if ports
        .iter()
        .any(|port| port.port.is_none() && port.protocol.is_none() && port.end_port.is_none())
    {
        return None;
    }
    for (index, port) in ports.iter().enumerate() {
        let protocol = port
            .protocol
            .as_deref()
            .unwrap_or("TCP")
            .parse::<Protocol>();
        let mut added = PortSet::default();
        let usable = protocol
            .map_err(|error| error.to_string())
            .and_then(|protocol| added.add(port).map(|()| protocol));
        match usable {
            Ok(protocol) => {
                let set = sets.entry(protocol).or_default();
                set.everything |= added.everything;
                set.ranges.extend(added.ranges);
                set.names.extend(added.names);
            }
            Err(problem) => problems.push(format!("{place}.ports[{index}]: {problem}")),
        }
    }
    Some(sets)
}

/// One rule for each protocol and peer. Ports are always those of the receiver.
fn rules(
    peers: &[NetworkPolicyPeer],
    ports: &[NetworkPolicyPort],
    direction: PolicyType,
    place: &str,
    problems: &mut Vec<String>,
) -> Vec<Rule> {
    let (list, mut entities) = match direction {
        PolicyType::Ingress => ("from", Vec::new()),
        PolicyType::Egress => ("to", Vec::new()),
    };
    for (index, candidate) in peers.iter().enumerate() {
        match peer(candidate) {
            Ok(entity) => entities.push(entity),
            Err(problem) => problems.push(format!("{place}.{list}[{index}]: {problem}")),
        }
    }
    if peers.is_empty() {
        entities.push(EntityRule::default());
    }
    let mut protocols: Vec<(Option<Protocol>, Vec<Port>)> = vec![(None, Vec::new())];
    if !ports.is_empty()
        && let Some(sets) = ports_by_protocol(ports, place, problems)
    {
        protocols = sets
            .into_iter()
            .map(|(protocol, set)| (Some(protocol), set.into_ports()))
            .collect();
    }
    let mut rules = Vec::new();
    for (protocol, ports) in &protocols {
        for entity in &entities {
            let mut rule = Rule {
                protocol: *protocol,
                ..Rule::new(Action::Allow)
            };
            match direction {
                PolicyType::Ingress => rule.source = entity.clone(),
                PolicyType::Egress => rule.destination = entity.clone(),
            }
            rule.destination.ports.clone_from(ports);
            rules.push(rule);
        }
    }
    rules
}

/// What would be in force if a staged Kubernetes policy were committed.
#[must_use]
pub fn staged_network_policy(
    staged: &v3::StagedKubernetesNetworkPolicy,
    problems: &mut Vec<String>,
) -> Option<v3::NetworkPolicy> {
    let spec = &staged.spec;
    let types = spec.policy_types.iter().map(ToString::to_string);
    let policy = Resource::new(
        staged.metadata.clone(),
        super::NetworkPolicySpec {
            pod_selector: Some(spec.pod_selector.clone()),
            ingress: Some(spec.ingress.clone()),
            egress: Some(spec.egress.clone()),
            policy_types: Some(types.collect()),
        },
    );
    network_policy(&policy, problems)
}

/// The policy in Calico's terms, or nothing if it cannot be told to which pods it applies.
#[must_use]
pub fn network_policy(
    policy: &NetworkPolicy,
    problems: &mut Vec<String>,
) -> Option<v3::NetworkPolicy> {
    let selector = match pods(policy.spec.pod_selector.as_ref()) {
        Ok(selector) => selector,
        Err(problem) => {
            problems.push(format!("spec.podSelector: {problem}"));
            return None;
        }
    };
    let mut ingress = Vec::new();
    for (index, rule) in policy.spec.ingress.iter().flatten().enumerate() {
        let (peers, ports) = (
            rule.from.as_deref().unwrap_or_default(),
            rule.ports.as_deref().unwrap_or_default(),
        );
        ingress.extend(rules(
            peers,
            ports,
            PolicyType::Ingress,
            &format!("spec.ingress[{index}]"),
            problems,
        ));
    }
    let mut egress = Vec::new();
    for (index, rule) in policy.spec.egress.iter().flatten().enumerate() {
        let (peers, ports) = (
            rule.to.as_deref().unwrap_or_default(),
            rule.ports.as_deref().unwrap_or_default(),
        );
        egress.extend(rules(
            peers,
            ports,
            PolicyType::Egress,
            &format!("spec.egress[{index}]"),
            problems,
        ));
    }

    let mut types = Vec::new();
    for text in policy.spec.policy_types.iter().flatten() {
        match text.parse() {
            Ok(direction) => types.push(direction),
            Err(error) => problems.push(format!("spec.policyTypes: {error}")),
        }
    }
    if types.is_empty() {
        // An API server fills the types in this way when an object is written; the embedded
        // datastore keeps what users wrote.
        types.push(PolicyType::Ingress);
        if !egress.is_empty() {
            types.push(PolicyType::Egress);
        }
    }
    for (direction, rules) in [
        (PolicyType::Ingress, &mut ingress),
        (PolicyType::Egress, &mut egress),
    ] {
        if !types.contains(&direction) && !rules.is_empty() {
            problems.push(format!(
                "{direction} rules without policy type {direction} have no effect"
            ));
            rules.clear();
        }
    }

    let mut metadata = derived_metadata(
        &policy.metadata,
        format!("{NETWORK_POLICY_PREFIX}{}", policy.metadata.name),
    );
    metadata.namespace = Some(
        policy
            .metadata
            .namespace
            .clone()
            .unwrap_or_else(|| "default".to_owned()),
    );
    Some(Resource::new(
        metadata,
        NetworkPolicySpec {
            tier: DEFAULT_TIER.to_owned(),
            order: Some(Order(NETWORK_POLICY_ORDER)),
            ingress,
            egress,
            selector: selector.to_string(),
            types,
            ..NetworkPolicySpec::default()
        },
    ))
}
