//! Which service gets and keeps which address. Pure.
//!
//! A service's addresses are those that its handle holds, so that a controller which was killed between giving an address
//! and showing it finds it again. What a service shows is written from what is held, never the other way round.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cali_api::Key;
use cali_api::kubernetes::Service;
use cali_api::v3::{AllowedUse, AssignIPs};
use cali_ipam::pools::Pool;
use sha2::{Digest, Sha256};

/// Class of services that are ours whatever the setting is.
pub const CLASS: &str = "calico";
/// Beginning of our handles.
pub const HANDLE_PREFIX: &str = "lb-";

const POOLS_V4: &str = "projectcalico.org/ipv4pools";
const POOLS_V6: &str = "projectcalico.org/ipv6pools";
const ADDRESSES: &str = "projectcalico.org/loadBalancerIPs";

/// What a service asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// The service.
    pub key: Key,
    /// Under which its addresses are held.
    pub handle: String,
    /// It wants an IPv4 and an IPv6 address.
    pub families: [bool; 2],
    /// Names or CIDRs of pools; empty: any.
    pub pools: [Vec<String>; 2],
    /// These addresses and no others; empty: any.
    pub exact: Vec<IpAddr>,
    /// What it shows now.
    pub shown: Vec<IpAddr>,
}

/// What is to be done for one service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Work {
    /// Held addresses that stay, in the order in which they are shown.
    pub keep: Vec<IpAddr>,
    /// Held addresses that go.
    pub release: Vec<IpAddr>,
    /// Addresses to be taken: exactly these.
    pub take: Vec<IpAddr>,
    /// Addresses to be taken: one of IPv4, one of IPv6.
    pub any: [bool; 2],
}

/// What a service says of itself; `None`: it is none of ours. The error says which annotation cannot be used.
pub fn wish(service: &Service, assign: AssignIPs) -> Option<Result<Wish, String>> {
    let annotations = &service.metadata.annotations;
    let text = |name: &str| annotations.get(name).filter(|text| !text.trim().is_empty());
    let asks = [POOLS_V4, POOLS_V6, ADDRESSES]
        .iter()
        .any(|name| text(name).is_some());
    let spec = &service.spec;
    let ours = spec.type_.as_deref() == Some("LoadBalancer")
        && match spec.load_balancer_class.as_deref() {
            Some(class) => class == CLASS,
            None => assign == AssignIPs::AllServices || asks,
        };
    if !ours || service.metadata.deletion_timestamp.is_some() {
        return None;
    }
    Some(read(service, text))
}

fn read<'a>(
    service: &'a Service,
    text: impl Fn(&str) -> Option<&'a String>,
) -> Result<Wish, String> {
    let list = |name: &str| -> Result<Vec<String>, String> {
        text(name).map_or_else(
            || Ok(Vec::new()),
            |text| {
                serde_json::from_str(text)
                    .map_err(|error| format!("annotation {name}: no JSON list of texts: {error}"))
            },
        )
    };
    let mut exact = Vec::new();
    for text in list(ADDRESSES)? {
        let address: IpAddr = text
            .parse()
            .map_err(|_| format!("annotation {ADDRESSES}: {text:?} is no address"))?;
        if exact
            .iter()
            .any(|other: &IpAddr| other.is_ipv4() == address.is_ipv4())
        {
            return Err(format!(
                "annotation {ADDRESSES}: more than one address of a family"
            ));
        }
        exact.push(address);
    }
    let spec = &service.spec;
    // The field that came before the annotation.
    if exact.is_empty()
        && let Some(text) = spec
            .load_balancer_ip
            .as_deref()
            .filter(|text| !text.is_empty())
    {
        let address = text.parse();
        exact.push(address.map_err(|_| format!("loadBalancerIP: {text:?} is no address"))?);
    }
    let named = spec.ip_families.clone().unwrap_or_default();
    let family = |name: &str| named.iter().any(|family| family == name);
    // An API server names the families; other stores hold what people wrote.
    let families = [family("IPv4") || named.is_empty(), family("IPv6")];
    let uid = service.metadata.uid.as_deref().unwrap_or_default();
    let key = service.key();
    Ok(Wish {
        handle: handle(&key, uid),
        key,
        families,
        pools: [list(POOLS_V4)?, list(POOLS_V6)?],
        exact,
        shown: shown(service),
    })
}

/// As Calico forms it: a service that is made anew has another one.
pub fn handle(key: &Key, uid: &str) -> String {
    let namespace = key.namespace.as_deref().unwrap_or("default");
    let digest = Sha256::digest(format!("{}-{namespace}-{uid}", key.name).as_bytes());
    let mut text = HANDLE_PREFIX.to_owned();
    for byte in digest {
        use std::fmt::Write;
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The addresses that a service shows.
pub fn shown(service: &Service) -> Vec<IpAddr> {
    let ingress = service
        .status
        .as_ref()
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_ref());
    let addresses = ingress.into_iter().flatten();
    addresses
        .filter_map(|one| one.ip.as_deref()?.parse().ok())
        .collect()
}

/// Compares what a service asks for with what it holds.
pub fn plan(wish: &Wish, held: &BTreeSet<IpAddr>, pools: &[Pool]) -> Work {
    let mut work = Work::default();
    let mut has = [false; 2];
    // What is shown stays before what is not, and only one of a family.
    let shown_first = wish.shown.iter().filter(|shown| held.contains(shown));
    let rest = held.iter().filter(|address| !wish.shown.contains(address));
    for address in shown_first.chain(rest) {
        let family = usize::from(address.is_ipv6());
        if !has[family] && fits(wish, *address, pools) {
            has[family] = true;
            work.keep.push(*address);
        } else if !work.keep.contains(address) {
            work.release.push(*address);
        }
    }
    if wish.exact.is_empty() {
        work.any = [0, 1].map(|family| wish.families[family] && !has[family]);
    } else {
        let missing = wish
            .exact
            .iter()
            .filter(|address| !work.keep.contains(address));
        work.take = missing.copied().collect();
    }
    work
}

fn fits(wish: &Wish, address: IpAddr, pools: &[Pool]) -> bool {
    let family = usize::from(address.is_ipv6());
    if !wish.exact.is_empty() {
        return wish.exact.contains(&address);
    }
    let named = &wish.pools[family];
    wish.families[family]
        && (named.is_empty()
            || pools.iter().any(|pool| {
                let cidr = &pool.spec.cidr;
                cidr.contains(address) && named.iter().any(|name| is_named(pool, name))
            }))
}

fn is_named(pool: &Pool, name: &str) -> bool {
    *name == pool.name || *name == pool.spec.cidr.to_string()
}

/// Why an address may not be given to a service.
pub fn refusal(address: IpAddr, pools: &[Pool]) -> Option<String> {
    let pool = pools.iter().find(|pool| pool.spec.cidr.contains(address));
    match pool {
        None => Some(format!("{address} is in no IP pool")),
        Some(pool) if !pool.spec.allows(AllowedUse::LoadBalancer) => Some(format!(
            "{address} is in IP pool {}, whose allowedUses has no LoadBalancer",
            pool.name
        )),
        Some(_) => None,
    }
}

/// Handles of ours under which addresses are held and that no service has any more.
pub fn abandoned<'a>(
    held: &'a BTreeMap<String, BTreeSet<IpAddr>>,
    wanted: &'a BTreeSet<String>,
) -> impl Iterator<Item = &'a str> {
    let handles = held.keys().filter(|handle| !wanted.contains(*handle));
    handles.map(String::as_str)
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
