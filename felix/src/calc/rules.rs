//! Rules of policies and profiles as the kernel can enforce them: selectors become sets.
//!
//! A rule that cannot be used does not open anything: an Allow (or Log) rule is left out, a Deny or
//! Pass rule becomes a denial of everything, and either way a problem is reported.

use std::fmt::Write;
use std::sync::Arc;

use cali_api::selector::Selector;
use cali_api::v3;

use cali_api::kubernetes::{LABEL_NAMESPACE, LABEL_SERVICE_ACCOUNT, SERVICE_ACCOUNT_LABEL_PREFIX};
use sha2::{Digest, Sha256};

use super::output::{
    Action, Icmp, IpSetId, IpSetKind, IpVersion, PeerMatch, PortRange, Rule, Rules,
};
use super::services::ServiceName;

/// What a set holds.
#[derive(Debug, Clone)]
pub(super) enum SetSpec {
    /// The addresses of what the scope selects.
    Addresses(Selector),
    /// The named ports of what the scope selects.
    NamedPort {
        scope: Selector,
        protocol: u8,
        name: Arc<str>,
    },
    /// The endpoints of a service, with their ports or without.
    Service {
        service: ServiceName,
        with_ports: bool,
    },
}

impl SetSpec {
    /// What selects the set's items, where a selector does.
    pub(super) fn scope(&self) -> Option<&Selector> {
        match self {
            Self::Addresses(scope) | Self::NamedPort { scope, .. } => Some(scope),
            Self::Service { .. } => None,
        }
    }

    /// The service behind the set, and whether its ports count.
    pub(super) fn service(&self) -> Option<(&ServiceName, bool)> {
        match self {
            Self::Service {
                service,
                with_ports,
            } => Some((service, *with_ports)),
            _ => None,
        }
    }

    pub(super) fn kind(&self) -> IpSetKind {
        match self {
            Self::Addresses(_) => IpSetKind::Net,
            Self::NamedPort { .. } => IpSetKind::Port,
            Self::Service { with_ports, .. } => match with_ports {
                true => IpSetKind::Port,
                false => IpSetKind::Net,
            },
        }
    }

    /// What people read about the set.
    pub(super) fn origin(&self) -> Arc<str> {
        match self {
            Self::Addresses(scope) => scope.to_string().into(),
            Self::NamedPort {
                scope,
                protocol,
                name,
            } => format!("port {name} (protocol {protocol}) of {scope}").into(),
            Self::Service {
                service,
                with_ports,
            } => {
                let what = if *with_ports { "" } else { "addresses of " };
                format!("{what}service {}/{}", service.namespace, service.name).into()
            }
        }
    }

    fn id(&self) -> IpSetId {
        match self {
            Self::Addresses(scope) => identity("s", &scope.to_string()),
            Self::NamedPort {
                scope,
                protocol,
                name,
            } => identity("n", &format!("{scope},{protocol},{name}")),
            Self::Service {
                service,
                with_ports,
            } => {
                let prefix = if *with_ports { "svc" } else { "svcnoport" };
                identity(prefix, &format!("{}/{}", service.namespace, service.name))
            }
        }
    }
}

/// The same for equal texts, in every process.
fn identity(prefix: &str, text: &str) -> IpSetId {
    let digest = Sha256::digest(text);
    let id = digest
        .iter()
        .take(12)
        .fold(format!("{prefix}-"), |mut id, byte| {
            let _ = write!(id, "{byte:02x}");
            id
        });
    IpSetId(id.into())
}

/// Rules and the sets that they look up.
#[derive(Debug, Default)]
pub(super) struct Resolved {
    pub(super) rules: Rules,
    /// Sorted, each set once.
    pub(super) sets: Vec<(IpSetId, SetSpec)>,
    pub(super) problems: Vec<String>,
}

/// Resolves the rules of a policy in `namespace`, or of a cluster-wide one or a profile.
pub(super) fn resolve(
    namespace: Option<&str>,
    ingress: &[v3::Rule],
    egress: &[v3::Rule],
) -> Resolved {
    let mut resolved = Resolved::default();
    resolved.rules.ingress = resolved.direction(namespace, "ingress", ingress);
    resolved.rules.egress = resolved.direction(namespace, "egress", egress);
    resolved.sets.sort_by(|(a, _), (b, _)| a.cmp(b));
    resolved.sets.dedup_by(|(a, _), (b, _)| a == b);
    resolved
}

impl Resolved {
    fn direction(&mut self, namespace: Option<&str>, place: &str, rules: &[v3::Rule]) -> Vec<Rule> {
        let mut all = Vec::with_capacity(rules.len());
        for (number, rule) in rules.iter().enumerate() {
            let mut sets = Vec::new();
            match resolve_rule(namespace, place, rule, &mut sets) {
                Ok(rule) => {
                    self.sets.append(&mut sets);
                    all.push(rule);
                }
                Err(problem) => {
                    let denies = matches!(rule.action, v3::Action::Deny | v3::Action::Pass);
                    let outcome = if denies {
                        "denies everything"
                    } else {
                        "is left out"
                    };
                    self.problems
                        .push(format!("{place}[{number}] {outcome}: {problem}"));
                    if denies {
                        all.push(Rule::any(Action::Deny));
                    }
                }
            }
        }
        all
    }
}

fn resolve_rule(
    namespace: Option<&str>,
    place: &str,
    rule: &v3::Rule,
    sets: &mut Vec<(IpSetId, SetSpec)>,
) -> Result<Rule, String> {
    let protocol = rule.protocol.map(v3::Protocol::number);
    let icmp = |icmp: &v3::Icmp| Icmp {
        icmp_type: icmp.type_,
        code: icmp.code,
    };
    // Who a packet comes from is a matter of ingress rules, where it goes to one of egress rules.
    let (mine, peer) = match place {
        "ingress" => (&rule.destination, &rule.source),
        _ => (&rule.source, &rule.destination),
    };
    if mine.services.is_some() {
        return Err(format!(
            "services cannot stand on this side of an {place} rule"
        ));
    }
    let with_ports = place != "ingress";
    if with_ports
        && peer.services.is_some()
        && !(peer.ports.is_empty() && peer.not_ports.is_empty())
    {
        return Err("services have ports of their own and exclude others".to_owned());
    }
    Ok(Rule {
        action: match rule.action {
            v3::Action::Allow => Action::Allow,
            v3::Action::Deny => Action::Deny,
            v3::Action::Log => Action::Log,
            v3::Action::Pass => Action::Pass,
        },
        ip_version: match rule.ip_version {
            None => None,
            Some(4) => Some(IpVersion::V4),
            Some(6) => Some(IpVersion::V6),
            Some(other) => return Err(format!("ipVersion {other} is neither 4 nor 6")),
        },
        protocol,
        not_protocol: rule.not_protocol.map(v3::Protocol::number),
        icmp: rule.icmp.as_ref().map(icmp),
        not_icmp: rule.not_icmp.as_ref().map(icmp),
        source: resolve_side(namespace, &rule.source, protocol, false, sets)
            .map_err(|error| format!("source: {error}"))?,
        destination: resolve_side(namespace, &rule.destination, protocol, true, sets)
            .map_err(|error| format!("destination: {error}"))?,
    })
}

/// Reads a selector, with the field's name in the error.
pub(super) fn parse(field: &str, text: &str) -> Result<Selector, String> {
    Selector::parse(text).map_err(|error| format!("{field} {text:?}: {error}"))
}

fn resolve_side(
    namespace: Option<&str>,
    side: &v3::EntityRule,
    protocol: Option<u8>,
    with_ports: bool,
    sets: &mut Vec<(IpSetId, SetSpec)>,
) -> Result<PeerMatch, String> {
    let mut want = |spec: SetSpec| {
        let id = spec.id();
        sets.push((id.clone(), spec));
        id
    };
    let mut peer = PeerMatch {
        nets: side.nets.iter().map(|net| net.cidr()).collect(),
        not_nets: side.not_nets.iter().map(|net| net.cidr()).collect(),
        ..PeerMatch::default()
    };
    if let Some(service) = &side.services {
        let spec = SetSpec::Service {
            service: service_name(namespace, side, service)?,
            with_ports,
        };
        let id = want(spec);
        if with_ports {
            peer.port_sets.push(id);
        } else {
            peer.sets.push(id);
        }
    }
    let positive = positive_scope(namespace, side)?;
    match (&positive, side.not_selector.is_empty()) {
        // One set for both: an address in the first and not in the second.
        (Some(scope), false) => {
            let scope = scope
                .clone()
                .and(parse("notSelector", &side.not_selector)?.negated());
            peer.sets.push(want(SetSpec::Addresses(scope)));
        }
        (Some(scope), true) => peer.sets.push(want(SetSpec::Addresses(scope.clone()))),
        (None, false) => {
            let scope = parse("notSelector", &side.not_selector)?;
            peer.not_sets.push(want(SetSpec::Addresses(scope)));
        }
        (None, true) => {}
    }
    let scope = positive.unwrap_or_default();
    for (ports, ranges, named) in [
        (&side.ports, &mut peer.ports, &mut peer.port_sets),
        (
            &side.not_ports,
            &mut peer.not_ports,
            &mut peer.not_port_sets,
        ),
    ] {
        for port in ports {
            match port {
                v3::Port::Number(number) => ranges.push(PortRange {
                    first: *number,
                    last: *number,
                }),
                v3::Port::Range(first, last) => ranges.push(PortRange {
                    first: *first,
                    last: *last,
                }),
                v3::Port::Named(name) => {
                    let protocol =
                        protocol.ok_or_else(|| format!("port {name:?} needs a protocol"))?;
                    let name = name.as_str().into();
                    named.push(want(SetSpec::NamedPort {
                        scope: scope.clone(),
                        protocol,
                        name,
                    }));
                }
            }
        }
    }
    if protocol.is_none() && !(side.ports.is_empty() && side.not_ports.is_empty()) {
        return Err("ports need a protocol".to_owned());
    }
    Ok(peer)
}

/// The service that a side names: in the policy's own namespace unless it says which.
fn service_name(
    namespace: Option<&str>,
    side: &v3::EntityRule,
    service: &v3::ServiceMatch,
) -> Result<ServiceName, String> {
    let alone = side.nets.is_empty()
        && side.not_nets.is_empty()
        && side.selector.is_empty()
        && side.not_selector.is_empty()
        && side.namespace_selector.is_empty()
        && side.service_accounts.is_none();
    if !alone {
        return Err("services exclude networks, selectors and service accounts".to_owned());
    }
    let namespace = Some(service.namespace.as_str())
        .filter(|name| !name.is_empty())
        .or(namespace)
        .ok_or("services.namespace is required in a policy without a namespace")?;
    if service.name.is_empty() {
        return Err("services.name is required".to_owned());
    }
    Ok(ServiceName {
        namespace: namespace.into(),
        name: service.name.as_str().into(),
    })
}

/// What the positive selectors of a side select; `None` when it has none. Within a namespaced policy
/// they mean the policy's own namespace unless there is a namespace selector.
fn positive_scope(
    namespace: Option<&str>,
    side: &v3::EntityRule,
) -> Result<Option<Selector>, String> {
    if side.selector.is_empty()
        && side.namespace_selector.is_empty()
        && side.service_accounts.is_none()
    {
        return Ok(None);
    }
    let mut scope = parse("selector", &side.selector)?;
    if !side.namespace_selector.is_empty() {
        scope = scope.and(parse("namespaceSelector", &side.namespace_selector)?.of_namespaces());
    } else if let Some(namespace) = namespace {
        scope = scope.and(Selector::equals(LABEL_NAMESPACE, namespace));
    }
    if let Some(accounts) = &side.service_accounts {
        if !accounts.selector.is_empty() {
            let selector = parse("serviceAccounts.selector", &accounts.selector)?;
            scope = scope.and(selector.with_label_prefix(SERVICE_ACCOUNT_LABEL_PREFIX));
        }
        if !accounts.names.is_empty() {
            scope = scope.and(Selector::is_in(
                LABEL_SERVICE_ACCOUNT,
                accounts.names.iter().map(String::as_str),
            ));
        }
    }
    Ok(Some(scope))
}
