//! Which pools serve a request, and in which order their blocks are tried. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cali_api::Cidr;
use cali_api::selector::Selector;
use cali_api::v3::{AllowedUse, IPPoolSpec};

use crate::error::{Error, family};

/// A pool with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    /// Name of the resource.
    pub name: String,
    /// Its specification.
    pub spec: IPPoolSpec,
}

/// What is asked of the pools.
#[derive(Debug, Clone)]
pub struct Demand<'a> {
    /// IPv4 or IPv6.
    pub v4: bool,
    /// What the address is for.
    pub allowed_use: AllowedUse,
    /// Names or CIDRs; they override the selectors of the pools.
    pub requested: &'a [String],
    /// Labels of the node.
    pub node_labels: &'a BTreeMap<String, String>,
    /// Labels of the pod's namespace, where there is one.
    pub namespace_labels: Option<&'a BTreeMap<String, String>>,
}

/// The pools that may be used, in the order in which they are tried.
pub fn eligible<'a>(pools: &'a [Pool], demand: &Demand<'_>) -> Result<Vec<&'a Pool>, Error> {
    let of_family = || pools.iter().filter(|p| p.spec.cidr.is_v4() == demand.v4);
    let mut reasons = Vec::new();
    let chosen: Vec<&Pool> = if demand.requested.is_empty() {
        of_family()
            .filter(|pool| keep(pool, excluded(pool, demand), &mut reasons))
            .collect()
    } else {
        let mut named = Vec::new();
        for name in demand.requested {
            let pool = of_family()
                .find(|p| p.name == *name || p.spec.cidr.to_string() == *name)
                .ok_or_else(|| Error::UnknownPool {
                    name: name.clone(),
                    family: family(demand.v4),
                })?;
            if keep(pool, forbidden(pool, demand.allowed_use), &mut reasons) {
                named.push(pool);
            }
        }
        named
    };
    if chosen.is_empty() {
        return Err(Error::NoPool {
            family: family(demand.v4),
            reason: if reasons.is_empty() {
                String::new()
            } else {
                format!(": {}", reasons.join(", "))
            },
        });
    }
    Ok(chosen)
}

fn keep(pool: &Pool, refusal: Option<&'static str>, reasons: &mut Vec<String>) -> bool {
    if let Some(reason) = refusal {
        reasons.push(format!("{} {reason}", pool.name));
    }
    refusal.is_none()
}

/// Why a pool cannot be used even if it is asked for by name.
fn forbidden(pool: &Pool, allowed_use: AllowedUse) -> Option<&'static str> {
    if pool.spec.disabled {
        Some("is disabled")
    } else if !pool.spec.allows(allowed_use) {
        Some("does not allow this use")
    } else {
        None
    }
}

fn excluded(pool: &Pool, demand: &Demand<'_>) -> Option<&'static str> {
    if let Some(reason) = forbidden(pool, demand.allowed_use) {
        return Some(reason);
    }
    if !pool.spec.is_automatic() {
        return Some("is only used when asked for");
    }
    if !selects(&pool.spec.node_selector, demand.node_labels) {
        return Some("does not select this node");
    }
    let namespace = &pool.spec.namespace_selector;
    match demand.namespace_labels {
        _ if namespace.is_empty() => None,
        Some(labels) if selects(namespace, labels) => None,
        _ => Some("does not select this namespace"),
    }
}

/// Whether a pool's selector takes a node; the empty one takes all, a broken one none.
pub fn selects(selector: &str, labels: &BTreeMap<String, String>) -> bool {
    selector.is_empty() || Selector::parse(selector).is_ok_and(|s| s.matches(labels))
}

/// The blocks of a pool in the order in which a node tries them: from a place that depends on the node's name (so that
/// nodes rarely meet), then onwards and around.
pub fn candidates(pool: &IPPoolSpec, node: &str) -> impl Iterator<Item = Cidr> + use<> {
    let cidr = pool.cidr;
    let block = pool.block_prefix_len().max(cidr.prefix_len());
    // Pools have at most 2^64 blocks that are looked at; an IPv6 /48 with /122 blocks has 2^74.
    let count = 1_u128 << u32::from(block - cidr.prefix_len()).min(64);
    let start = u128::from(fnv1(node)) % count;
    (0..count).map(move |step| nth_block(&cidr, block, (start + step) % count))
}

/// The block that an address of a pool lies in.
pub fn block_of(pool: &IPPoolSpec, address: IpAddr) -> Option<Cidr> {
    if !pool.cidr.contains(address) {
        return None;
    }
    Cidr::masked(address, pool.block_prefix_len().max(pool.cidr.prefix_len())).ok()
}

fn nth_block(pool: &Cidr, block: u8, index: u128) -> Cidr {
    let width: u8 = if pool.is_v4() { 32 } else { 128 };
    let offset = index.checked_shl(u32::from(width - block)).unwrap_or(0);
    let address = match pool.addr() {
        IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(
            base.to_bits().wrapping_add(offset as u32),
        )),
        IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(base.to_bits().wrapping_add(offset))),
    };
    // The prefix length is that of a pool or longer, and both were read as valid.
    Cidr::masked(address, block).unwrap_or(*pool)
}

/// FNV-1, 32 bits (Fowler, Noll, Vo), as Calico seeds the walk.
fn fnv1(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash: u32, byte| {
        hash.wrapping_mul(0x0100_0193) ^ u32::from(byte)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn pool(name: &str, cidr: &str) -> Pool {
        Pool {
            name: name.to_owned(),
            spec: IPPoolSpec::new(cidr.parse().unwrap()),
        }
    }

    fn names(result: Result<Vec<&Pool>, Error>) -> Result<Vec<String>, String> {
        result
            .map(|pools| pools.iter().map(|p| p.name.clone()).collect())
            .map_err(|e| e.to_string())
    }

    fn demand<'a>(requested: &'a [String], labels: &'a BTreeMap<String, String>) -> Demand<'a> {
        Demand {
            v4: true,
            allowed_use: AllowedUse::Workload,
            requested,
            node_labels: labels,
            namespace_labels: None,
        }
    }

    #[test]
    fn disabled_manual_and_unselected_pools_are_left_out_with_the_reason() {
        let mut pools = vec![
            pool("a", "10.0.0.0/16"),
            pool("b", "10.1.0.0/16"),
            pool("c", "10.2.0.0/16"),
            pool("six", "fd00::/64"),
        ];
        pools[0].spec.disabled = true;
        pools[1].spec.node_selector = "rack == 'r1'".to_owned();
        let labels = BTreeMap::from([("rack".to_owned(), "r2".to_owned())]);
        assert_eq!(
            names(eligible(&pools, &demand(&[], &labels))),
            Ok(vec!["c".to_owned()])
        );
        pools[2].spec.namespace_selector = "team == 'x'".to_owned();
        assert_eq!(
            names(eligible(&pools, &demand(&[], &labels))),
            Err("no IPv4 pool can be used: a is disabled, b does not select this node, c does not select this namespace".to_owned())
        );
    }

    #[test]
    fn a_pool_asked_for_overrides_selectors_but_not_disabled() {
        let mut pools = vec![pool("a", "10.0.0.0/16"), pool("b", "10.1.0.0/16")];
        pools[1].spec.node_selector = "rack == 'r1'".to_owned();
        let labels = BTreeMap::new();
        let wanted = ["10.1.0.0/16".to_owned()];
        assert_eq!(
            names(eligible(&pools, &demand(&wanted, &labels))),
            Ok(vec!["b".to_owned()])
        );
        pools[1].spec.disabled = true;
        assert!(eligible(&pools, &demand(&wanted, &labels)).is_err());
        let unknown = ["nope".to_owned()];
        assert!(matches!(
            eligible(&pools, &demand(&unknown, &labels)),
            Err(Error::UnknownPool { .. })
        ));
    }

    #[test]
    fn every_block_is_a_candidate_once_from_a_place_of_the_node() {
        let pool = pool("a", "10.0.0.0/20");
        let all: Vec<Cidr> = candidates(&pool.spec, "node1").collect();
        assert_eq!(all.len(), 64);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 64);
        assert!(
            all.iter()
                .all(|b| b.prefix_len() == 26 && pool.spec.cidr.contains_cidr(b))
        );
        assert_ne!(all[0], candidates(&pool.spec, "node2").next().unwrap());
    }

    #[test]
    fn huge_and_tiny_pools_have_candidates() {
        let huge = pool("a", "fd00::/48");
        assert!(
            huge.spec
                .cidr
                .contains_cidr(&candidates(&huge.spec, "n").next().unwrap())
        );
        let tiny = pool("b", "10.0.0.1/32");
        assert_eq!(
            candidates(&tiny.spec, "n").collect::<Vec<_>>(),
            [tiny.spec.cidr]
        );
    }
}
