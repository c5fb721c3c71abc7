//! From resources to the encapsulation's own view of them.

use std::net::IpAddr;

use cali_api::NodeName;
use cali_api::v3::{EncapMode, IPPool, Node};
use cali_netlink::{IpNetwork, MacAddr};

use crate::{Encap, Endpoint, Pool, RECEIVES_ANNOTATION, Scope, Vtep, WgNode, vtep_mac};

const fn scope(mode: Option<EncapMode>) -> Option<Scope> {
    match mode {
        Some(EncapMode::Always) => Some(Scope::Always),
        Some(EncapMode::CrossSubnet) => Some(Scope::CrossSubnet),
        Some(EncapMode::Never) | None => None,
    }
}

impl From<&IPPool> for Pool {
    fn from(pool: &IPPool) -> Self {
        let encap = match (scope(pool.spec.vxlan_mode), scope(pool.spec.ipip_mode)) {
            (Some(scope), _) => Encap::Vxlan(scope),
            (None, Some(scope)) => Encap::Ipip(scope),
            (None, None) => Encap::None,
        };
        Self {
            name: pool.metadata.name.clone(),
            cidr: pool.spec.cidr,
            encap,
        }
    }
}

impl From<&Node> for Endpoint {
    /// The underlay address is the one for BGP; a node without one is known by the first address that it is
    /// reached at, whose subnet is itself.
    fn from(node: &Node) -> Self {
        let name = node.metadata.name.as_str();
        let spec = &node.spec;
        let reached_at = |v4: bool| {
            let parsed = spec
                .addresses
                .iter()
                .filter_map(cali_api::v3::NodeAddress::ip);
            parsed
                .filter(|ip| ip.is_ipv4() == v4)
                .map(IpNetwork::from)
                .next()
        };
        let vtep = |addr: Option<IpAddr>, mac: Option<cali_api::MacAddr>, v6: bool| {
            let mac = mac.map_or_else(|| vtep_mac(name, v6), |mac| MacAddr(mac.0));
            addr.map(|addr| Vtep { addr, mac })
        };
        // A key that cannot be read is no key: the node is reached in its pools' own way.
        let wireguard = |key: &str, address| WgNode {
            key: key.parse().ok(),
            address,
        };
        let addresses = spec.wireguard.clone().unwrap_or_default();
        let status = node.status.clone().unwrap_or_default();
        let word = node.metadata.annotations.get(RECEIVES_ANNOTATION);
        Self {
            wireguard_v4: wireguard(
                &status.wireguard_public_key,
                addresses.interface_ipv4_address.map(IpAddr::V4),
            ),
            wireguard_v6: wireguard(
                &status.wireguard_public_key_v6,
                addresses.interface_ipv6_address.map(IpAddr::V6),
            ),
            receives: word.and_then(|word| word.parse().ok()),
            v4: spec.ipv4().or_else(|| reached_at(true)),
            v6: spec.ipv6().or_else(|| reached_at(false)),
            vtep_v4: vtep(
                spec.ipv4_vxlan_tunnel_addr.map(IpAddr::V4),
                spec.vxlan_tunnel_mac_addr,
                false,
            ),
            vtep_v6: vtep(
                spec.ipv6_vxlan_tunnel_addr.map(IpAddr::V6),
                spec.vxlan_tunnel_mac_addr_v6,
                true,
            ),
            ipip: spec
                .bgp
                .as_ref()
                .and_then(|bgp| bgp.ipv4_ipip_tunnel_addr)
                .map(IpAddr::V4),
            ..Self::named(NodeName::from(name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::AnyResource;

    #[test]
    fn calicos_node_and_pool_give_endpoint_and_mode() {
        let node = AnyResource::from_slice(
            br#"{"apiVersion":"projectcalico.org/v3","kind":"Node","metadata":{"name":"abc"},"spec":{
                "bgp":{"ipv4Address":"10.0.0.1/24"},"ipv4VXLANTunnelAddr":"192.168.1.1"}}"#,
        );
        let Ok(AnyResource::Node(node)) = node else {
            panic!("{node:?}");
        };
        let endpoint = Endpoint::from(&*node);
        assert_eq!(endpoint.v4.unwrap().to_string(), "10.0.0.1/24");
        let vtep = endpoint.vtep_v4.unwrap();
        assert_eq!(
            (vtep.addr.to_string(), vtep.mac.to_string()),
            ("192.168.1.1".into(), "66:a9:99:3e:36:47".into())
        );
        assert_eq!(endpoint.vtep_v6, None);

        let pool = AnyResource::from_slice(
            br#"{"apiVersion":"projectcalico.org/v3","kind":"IPPool","metadata":{"name":"overlay"},"spec":{
                "cidr":"192.168.0.0/16","vxlanMode":"CrossSubnet","ipipMode":"Never"}}"#,
        );
        let Ok(AnyResource::IPPool(pool)) = pool else {
            panic!("{pool:?}");
        };
        assert_eq!(Pool::from(&*pool).encap, Encap::Vxlan(Scope::CrossSubnet));
    }
}
