//! Names of chains and sets, within the kernel's narrow limits, and the hashes of rules.

use std::sync::Arc;

use cali_api::Key;
use cali_netlink::ipset::NAME_LIMIT;
use sha2::{Digest, Sha224, Sha256};

use crate::calc::{Direction, IpSetId, IpVersion};
use crate::compile::hosts::Site;
use crate::compile::names::policy_text;

/// Longest name of a chain (`XT_EXTENSION_MAXNAMELEN` without its NUL).
const CHAIN_LIMIT: usize = 28;

/// Beginnings of the names of our sets, IPv4 and IPv6.
pub const SET_PREFIXES: [&str; 2] = ["cali40", "cali60"];

pub(super) const FROM_WORKLOAD: &str = "cali-from-wl-dispatch";
pub(super) const TO_WORKLOAD: &str = "cali-to-wl-dispatch";
/// Sets the mark "allowed".
pub(super) const ALLOW: &str = OWN_CHAIN;
/// A chain of the filter table that Calico does not have.
pub const OWN_CHAIN: &str = "cali-allow";
/// Sets the mark "passed on".
pub(super) const PASS: &str = "cali-pass";

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// base64url without padding, `length` characters of it at most.
fn base64url(bytes: &[u8], length: usize) -> String {
    let bit = |at: usize| bytes.get(at / 8).map_or(0, |byte| byte >> (7 - at % 8) & 1);
    let digits = (bytes.len() * 8).div_ceil(6).min(length);
    (0..digits)
        .map(|digit| {
            let value = (0..6).fold(0_u8, |value, offset| value << 1 | bit(digit * 6 + offset));
            char::from(ALPHABET[usize::from(value)])
        })
        .collect()
}

/// A name that fits: `prefix` and `rest`, or the hash of what is too long.
fn bounded(prefix: &str, rest: &str, limit: usize) -> Arc<str> {
    if prefix.len() + rest.len() <= limit {
        return format!("{prefix}{rest}").into();
    }
    let room = limit.saturating_sub(prefix.len() + 1);
    let hash = base64url(&Sha256::digest(rest), room);
    format!("{prefix}_{hash}").into()
}

pub(super) fn policy_chain(id: &Key, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-pi-",
        Direction::Egress => "cali-po-",
    };
    bounded(prefix, &policy_text(id), CHAIN_LIMIT)
}

pub(super) fn profile_chain(name: &str, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-pri-",
        Direction::Egress => "cali-pro-",
    };
    bounded(prefix, name, CHAIN_LIMIT)
}

/// The chain of an endpoint: `cali-tw-` towards the workload, `cali-fw-` from it.
pub(super) fn endpoint_chain(interface: &str, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-tw-",
        Direction::Egress => "cali-fw-",
    };
    bounded(prefix, interface, CHAIN_LIMIT)
}

/// The chain of an endpoint's packet rate.
pub(super) fn rate_chain(interface: &str, direction: Direction) -> Arc<str> {
    let prefix = match direction {
        Direction::Ingress => "cali-rt-",
        Direction::Egress => "cali-rf-",
    };
    bounded(prefix, interface, CHAIN_LIMIT)
}

/// The chain of the interfaces whose names begin with `beginning`, below the dispatch chain `root`.
pub(super) fn dispatch_chain(root: &str, beginning: &str) -> Arc<str> {
    bounded(&format!("{root}-"), beginning, CHAIN_LIMIT)
}

/// The chain of a host endpoint: of an interface, or of all others.
pub(super) fn host_chain(site: Site, interface: Option<&str>) -> Arc<str> {
    // Calico's name for the chains of `*`. No interface can have it: it is too long.
    let rest = interface.unwrap_or("any-interface-at-all");
    bounded(site.prefix(), rest, CHAIN_LIMIT)
}

/// The chain that leads to the host endpoints of a site.
pub(super) const fn host_dispatch(site: Site) -> &'static str {
    match site {
        Site::ForwardIn => "cali-from-hep-forward",
        Site::ForwardOut => "cali-to-hep-forward",
        Site::RawIn | Site::DnatIn | Site::In => "cali-from-host-endpoint",
        Site::RawOut | Site::Out | Site::Post => "cali-to-host-endpoint",
    }
}

/// Flows that policy forbade while they were established, by the destination's port and by the source's: an IP set holds
/// one port of a packet, and what is in both is held.
pub(super) fn held_sets(version: IpVersion) -> [Arc<str>; 2] {
    ["held-dst", "held-src"].map(|name| known_set(name, version))
}

fn family(version: IpVersion) -> &'static str {
    SET_PREFIXES[version as usize]
}

/// The set of a selector or named port.
pub(super) fn ip_set(id: &IpSetId, version: IpVersion) -> Arc<str> {
    let id = id.as_str();
    let prefix = family(version);
    if prefix.len() + id.len() <= NAME_LIMIT {
        return format!("{prefix}{id}").into();
    }
    // One dash less makes room for the identities of this program's graph.
    bounded(prefix, &id.replacen('-', "", 1), NAME_LIMIT)
}

/// A set that Calico knows by name, such as `network-ip-pools`.
pub(super) fn known_set(name: &str, version: IpVersion) -> Arc<str> {
    bounded(family(version), name, NAME_LIMIT)
}

/// A set of networks that belongs to the text of rules, named by its content.
pub(super) fn literal_set(content: &str, version: IpVersion) -> Arc<str> {
    let hash = base64url(&Sha256::digest(content), 20);
    format!("{}n:{hash}", family(version)).into()
}

/// The hashes of a chain's rules: each covers the chain's name, all rules before and its own text.
pub(super) fn hashes<'a>(chain: &str, rules: impl IntoIterator<Item = &'a str>) -> Vec<Arc<str>> {
    let mut last = Sha224::digest(chain);
    rules
        .into_iter()
        .map(|text| {
            let mut hash = Sha224::new();
            hash.update(last);
            hash.update(text);
            last = hash.finalize();
            base64url(&last, 16).into()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64url_is_that_of_rfc_4648() {
        assert_eq!(base64url(b"fooba", 100), "Zm9vYmE");
        assert_eq!(base64url(&[0xfb, 0xff, 0xbf], 100), "-_-_");
        assert_eq!(base64url(b"foobar", 4), "Zm9v");
    }

    #[test]
    fn names_stay_within_the_kernels_limits_and_apart() {
        let long = |tail: &str| {
            profile_chain(&format!("kns.{}{tail}", "x".repeat(60)), Direction::Ingress)
        };
        assert_eq!(&*profile_chain("open", Direction::Ingress), "cali-pri-open");
        assert_eq!(long("a").len(), CHAIN_LIMIT);
        assert_ne!(long("a"), long("b"));
        assert!(long("a").starts_with("cali-pri-_"));
        let id = IpSetId("s-0123456789abcdef01234567".into());
        assert_eq!(
            &*ip_set(&id, IpVersion::V6),
            "cali60s0123456789abcdef01234567"
        );
        assert_eq!(literal_set("x", IpVersion::V4).len(), 28);
    }

    #[test]
    fn a_hash_covers_what_comes_before() {
        let one = hashes("cali-a", ["-j ACCEPT", "-j DROP"]);
        let two = hashes("cali-a", ["-j RETURN", "-j DROP"]);
        assert_eq!(one[0].len(), 16);
        assert_ne!(one[1], two[1]);
        assert_eq!(one, hashes("cali-a", ["-j ACCEPT", "-j DROP"]));
        assert_ne!(one, hashes("cali-b", ["-j ACCEPT", "-j DROP"]));
    }
}
