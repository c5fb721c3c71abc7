//! The pools that a new cluster gets. Pure.

use cali_api::Cidr;
use cali_api::v3::{EncapMode, IPPool, IPPoolSpec};
use ipnetwork::IpNetwork;

use super::settings::{PoolWish, Settings};

/// Name of the default IPv4 pool.
pub const DEFAULT_V4: &str = "default-ipv4-ippool";
/// Name of the default IPv6 pool.
pub const DEFAULT_V6: &str = "default-ipv6-ippool";

/// The default pools to create: for each family one, if there is no pool of that family yet. `host` are the host's own
/// addresses, which the built-in ranges avoid; `random` makes the IPv6 range unique (RFC 4193 §3.2).
pub fn plan_default_pools(
    settings: &Settings,
    existing: &[Cidr],
    host: &[IpNetwork],
    random: [u8; 5],
) -> Vec<IPPool> {
    if settings.no_default_pools {
        return Vec::new();
    }
    let missing = |v4: bool| !existing.iter().any(|cidr| cidr.is_v4() == v4);
    let mut pools = Vec::new();
    if missing(true)
        && let Some(cidr) = settings.pool_v4.cidr.unwrap_or_else(|| built_in_v4(host))
    {
        pools.push(pool(DEFAULT_V4, cidr, &settings.pool_v4));
    }
    if settings.ipv6_support
        && has_v6(host)
        && missing(false)
        && let Some(cidr) = settings.pool_v6.cidr.unwrap_or_else(|| built_in_v6(random))
    {
        pools.push(pool(DEFAULT_V6, cidr, &settings.pool_v6));
    }
    pools
}

/// A kernel without IPv6 has not even `::1`.
fn has_v6(host: &[IpNetwork]) -> bool {
    host.iter().any(IpNetwork::is_ipv6)
}

/// 192.168.0.0/16, or the first of 172.16.0.0/16 to 172.31.0.0/16 that the host is not part of.
fn built_in_v4(host: &[IpNetwork]) -> Option<Cidr> {
    let candidates =
        std::iter::once([192, 168, 0, 0]).chain((16..=31).map(|second| [172, second, 0, 0]));
    let overlaps = |cidr: &Cidr| {
        host.iter().any(|network| {
            Cidr::masked(network.ip(), network.prefix()).is_ok_and(|own| own.overlaps(cidr))
        })
    };
    candidates
        .filter_map(|octets| Cidr::new(octets.into(), 16).ok())
        .find(|cidr| !overlaps(cidr))
}

/// A unique local /48 (RFC 4193 §3.1): `fd`, then 40 random bits.
fn built_in_v6(random: [u8; 5]) -> Option<Cidr> {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[1..6].copy_from_slice(&random);
    Cidr::new(octets.into(), 48).ok()
}

fn pool(name: &str, cidr: Cidr, wish: &PoolWish) -> IPPool {
    IPPool::named(
        name,
        IPPoolSpec {
            ipip_mode: Some(wish.ipip),
            vxlan_mode: Some(wish.vxlan),
            block_size: Some(wish.block_size.max(cidr.prefix_len())),
            node_selector: wish.node_selector.clone(),
            nat_outgoing: wish.nat_outgoing,
            disable_bgp_export: wish.disable_bgp_export,
            ..IPPoolSpec::new(cidr)
        },
    )
}

/// Whether a pool needs a tunnel of this kind on every node that may use it.
pub fn uses(mode: EncapMode) -> bool {
    mode != EncapMode::Never
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::startup::settings::HostNames;

    fn planned(env: &[(&str, &str)], existing: &[&str], host: &[&str]) -> Vec<String> {
        let names = HostNames {
            remembered: None,
            hostname: "h".into(),
        };
        let settings = Settings::read(
            &env.iter().copied().collect(),
            &names,
            std::path::Path::new("/s"),
        )
        .unwrap();
        let existing: Vec<Cidr> = existing.iter().map(|c| c.parse().unwrap()).collect();
        let host: Vec<IpNetwork> = host.iter().map(|a| a.parse().unwrap()).collect();
        let pools = plan_default_pools(&settings, &existing, &host, [1, 2, 3, 4, 5]);
        pools
            .iter()
            .map(|pool| format!("{} {}", pool.metadata.name, pool.spec.cidr))
            .collect()
    }

    #[test]
    fn a_pool_of_each_missing_family_is_made() {
        let host = ["10.0.0.1/24", "::1/128"];
        let (v4, v6) = (
            "default-ipv4-ippool 192.168.0.0/16",
            "default-ipv6-ippool fd01:203:405::/48",
        );
        assert_eq!(planned(&[], &[], &host), [v4, v6]);
        assert_eq!(planned(&[], &["10.244.0.0/16"], &host), [v6]);
        assert_eq!(planned(&[("FELIX_IPV6SUPPORT", "false")], &[], &host), [v4]);
        assert_eq!(
            planned(&[], &[], &["10.0.0.1/24"]),
            [v4],
            "no IPv6 in the kernel"
        );
        assert!(planned(&[("NO_DEFAULT_POOLS", "true")], &[], &host).is_empty());
        assert_eq!(
            planned(&[("CALICO_IPV4POOL_CIDR", "none")], &[], &host),
            [v6]
        );
    }

    #[test]
    fn built_in_range_avoids_the_hosts_own_networks() {
        let host = ["192.168.7.1/24", "172.16.3.4/12"];
        assert!(
            planned(&[], &[], &host).is_empty(),
            "every range is taken: none is better than a wrong one"
        );
        assert_eq!(
            planned(&[], &[], &["192.168.7.1/24"]),
            ["default-ipv4-ippool 172.16.0.0/16"]
        );
    }
}
