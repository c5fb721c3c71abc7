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
}

impl SetSpec {
    pub(super) fn scope(&self) -> &Selector {
        match self {
            Self::Addresses(scope) | Self::NamedPort { scope, .. } => scope,
        }
    }

    pub(super) fn kind(&self) -> IpSetKind {
        match self {
            Self::Addresses(_) => IpSetKind::Net,
            Self::NamedPort { .. } => IpSetKind::Port,
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
            match resolve_rule(namespace, rule, &mut sets) {
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
    rule: &v3::Rule,
    sets: &mut Vec<(IpSetId, SetSpec)>,
) -> Result<Rule, String> {
    let protocol = rule.protocol.map(v3::Protocol::number);
    let icmp = |icmp: &v3::Icmp| Icmp {
        icmp_type: icmp.type_,
        code: icmp.code,
    };
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
        source: resolve_side(namespace, &rule.source, protocol, sets)
            .map_err(|error| format!("source: {error}"))?,
        destination: resolve_side(namespace, &rule.destination, protocol, sets)
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
    sets: &mut Vec<(IpSetId, SetSpec)>,
) -> Result<PeerMatch, String> {
    if side.services.is_some() {
        return Err("services are not supported".to_owned());
    }
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
