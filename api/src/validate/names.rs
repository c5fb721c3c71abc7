//! Names and labels.

use super::Findings;
use crate::kubernetes::{LABEL_NAMESPACE, NETWORK_POLICY_PREFIX};
use crate::{AnyResource, Kind};

/// A label of RFC 1123.
fn is_dns_label(text: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(legal)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Labels joined by dots, 253 characters at most.
fn is_dns_subdomain(text: &str) -> bool {
    let part = |part: &str| {
        let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        !part.is_empty()
            && part.bytes().all(legal)
            && !part.starts_with('-')
            && !part.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(part)
}

/// `name` or `tier.name`.
fn is_policy_name(text: &str) -> bool {
    match text.split_once('.') {
        Some((tier, name)) => is_dns_label(tier) && is_dns_subdomain(name) && !name.contains('.'),
        None => is_dns_subdomain(text),
    }
}

/// Name of a network interface (`IFNAMSIZ`).
pub(super) fn is_interface_name(text: &str) -> bool {
    let legal =
        |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b':' | b'-');
    (1..=15).contains(&text.len()) && text.bytes().all(legal)
}

pub(super) fn check(object: &AnyResource, findings: &mut Findings) {
    let metadata = object.metadata();
    let (kind, name) = (object.kind(), metadata.name.as_str());
    let path = "metadata.name";
    match kind {
        Kind::Tier => findings.require(
            is_dns_label(name),
            path,
            "must be a DNS label: lower-case letters, digits and \"-\", 63 characters at most",
        ),
        Kind::NetworkPolicy | Kind::StagedNetworkPolicy => {
            let converted = [NETWORK_POLICY_PREFIX, "ossg.default."]
                .iter()
                .any(|prefix| name.strip_prefix(prefix).is_some_and(is_dns_subdomain));
            findings.require(converted || is_policy_name(name), path, "must be \"name\" or \"tier.name\" of DNS labels");
        }
        Kind::GlobalNetworkPolicy | Kind::StagedGlobalNetworkPolicy => {
            findings.require(is_policy_name(name), path, "must be \"name\" or \"tier.name\" of DNS labels");
        }
        Kind::K8sNamespace | Kind::K8sPod | Kind::K8sService | Kind::K8sNode | Kind::K8sServiceAccount => {
            findings.require(is_dns_subdomain(name), path, "must be a DNS name");
        }
        _ => findings.require(
            is_dns_subdomain(name),
            path,
            "must be a DNS name: lower-case letters, digits, \"-\" and \".\", 253 characters at most",
        ),
    }
    match (kind.is_namespaced(), &metadata.namespace) {
        (true, None) => findings.add("metadata.namespace", format!("is required for kind {kind}")),
        (false, Some(_)) => findings.add(
            "metadata.namespace",
            format!("kind {kind} is not namespaced"),
        ),
        (true, Some(namespace)) => {
            findings.require(
                is_dns_label(namespace),
                "metadata.namespace",
                "must be a DNS label",
            );
        }
        (false, None) => {}
    }
    if matches!(kind, Kind::NetworkSet | Kind::GlobalNetworkSet)
        && metadata.labels.contains_key(LABEL_NAMESPACE)
    {
        findings.add(
            format!("metadata.labels.{LABEL_NAMESPACE}"),
            "is set by the system",
        );
    }
}
