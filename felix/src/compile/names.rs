//! Names of chains and sets: readable, stable, and short enough for the kernel.

use std::fmt::Write;
use std::sync::Arc;

use cali_api::{Key, Kind};
use sha2::{Digest, Sha256};

use crate::calc::{Direction, IpSetId, IpVersion};

/// Chains get this many bytes at most; the kernel takes 255 (`NFT_NAME_MAXLEN`), people fewer.
const MAX: usize = 120;

fn bounded(name: String) -> Arc<str> {
    if name.len() <= MAX {
        return name.into();
    }
    let digest = digest(&name);
    let mut cut = MAX - digest.len() - 1;
    while !name.is_char_boundary(cut) {
        cut -= 1;
    }
    format!("{}_{digest}", &name[..cut]).into()
}

/// The first 80 bits of SHA-256 in hexadecimal.
pub(super) fn digest(text: &str) -> String {
    Sha256::digest(text)
        .iter()
        .take(10)
        .fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
}

/// A policy as Calico writes it in log prefixes and chain names, e.g. `np/ns/name`.
pub fn policy_text(id: &Key) -> String {
    let kind = match id.kind {
        Kind::NetworkPolicy => "np",
        Kind::GlobalNetworkPolicy => "gnp",
        _ => id.kind.plural(),
    };
    match &id.namespace {
        Some(namespace) => format!("{kind}/{namespace}/{}", id.name),
        None => format!("{kind}/{}", id.name),
    }
}

/// Whether `object`, what a refusal of the kernel names, is a chain of this policy.
pub fn is_chain_of(object: &str, policy: &Key) -> bool {
    let text = policy_text(policy);
    object.split(' ').any(|word| {
        let prefixes = ["cali-pi-", "cali-po-"].into_iter();
        prefixes
            .filter_map(|prefix| word.strip_prefix(prefix))
            .any(|rest| rest == text)
    })
}

pub(super) fn policy_chain(id: &Key, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-pi-",
        Direction::Egress => "cali-po-",
    };
    bounded(format!("{prefix}{}", policy_text(id)))
}

pub(super) fn profile_chain(name: &str, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-pri-",
        Direction::Egress => "cali-pro-",
    };
    bounded(format!("{prefix}{name}"))
}

/// The chain of an endpoint: `cali-tw-` towards the workload, `cali-fw-` from it.
pub(super) fn endpoint_chain(interface: &str, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-tw-",
        Direction::Egress => "cali-fw-",
    };
    bounded(format!("{prefix}{interface}"))
}

/// The chain of an endpoint's packet rate.
pub(super) fn rate_chain(interface: &str, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-rt-",
        Direction::Egress => "cali-rf-",
    };
    bounded(format!("{prefix}{interface}"))
}

/// A chain of a host endpoint.
pub(super) fn host_chain(prefix: &str, interface: &str) -> Arc<str> {
    bounded(format!("{prefix}{interface}"))
}

pub(super) fn stack_chain(direction: Direction, content: &str) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-si-",
        Direction::Egress => "cali-so-",
    };
    format!("{prefix}{}", digest(content)).into()
}

/// The set of single addresses (or of addresses with ports) of an IP set.
pub(super) fn exact_set(id: &IpSetId, version: IpVersion) -> Arc<str> {
    match version {
        IpVersion::V4 => format!("cali40{id}").into(),
        IpVersion::V6 => format!("cali60{id}").into(),
    }
}

/// The set of networks of an IP set.
pub(super) fn wide_set(id: &IpSetId, version: IpVersion) -> Arc<str> {
    match version {
        IpVersion::V4 => format!("cali40w{id}").into(),
        IpVersion::V6 => format!("cali60w{id}").into(),
    }
}

/// A set that belongs to the text of rules: ports or networks, named by its content.
pub(super) fn literal_set(what: &str, content: &str) -> Arc<str> {
    format!("cali-{what}-{}", digest(content)).into()
}

/// A chain of rules for one port, named by its content.
pub(super) fn leaf_chain(content: &str) -> Arc<str> {
    format!("cali-l-{}", digest(content)).into()
}

/// Where packets are counted that a map let pass for a policy.
pub(super) fn counting_chain(owner: &str, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-ai-",
        Direction::Egress => "cali-ao-",
    };
    bounded(format!("{prefix}{owner}"))
}

/// The map from addresses to counting chains, named by its parts.
pub(super) fn union_map(version: IpVersion, parts: &[(IpSetId, Arc<str>)]) -> Arc<str> {
    let text = parts
        .iter()
        .map(|(id, chain)| format!("{id} {chain}"))
        .collect::<Vec<_>>()
        .join(",");
    let family = match version {
        IpVersion::V4 => 4,
        IpVersion::V6 => 6,
    };
    format!("cali{family}0u-{}", digest(&text)).into()
}

pub(super) const FROM_WORKLOAD: &str = "cali-from-wl";
pub(super) const TO_WORKLOAD: &str = "cali-to-wl";
