//! The answer to "how is this prefix reached, which lives on that node?".

use std::collections::BTreeMap;
use std::net::IpAddr;

use cali_api::{Cidr, NodeName};
use cali_netlink::{IpNetwork, MacAddr, WgKey};

use crate::receives;
use crate::{Encap, IPIP_DEVICE, Pool, Receives, Scope, VXLAN_V4_DEVICE, VXLAN_V6_DEVICE};

/// A VXLAN tunnel endpoint: the address inside the overlay and the MAC of its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vtep {
    /// Overlay address, the gateway of the routes to the node.
    pub addr: IpAddr,
    /// MAC of the node's VXLAN device.
    pub mac: MacAddr,
}

/// What a node has published of its WireGuard device of one family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WgNode {
    /// Public key: the node's word that it encrypts.
    pub key: Option<WgKey>,
    /// Address of the device.
    pub address: Option<IpAddr>,
}

impl WgNode {
    const NONE: Self = Self {
        key: None,
        address: None,
    };
}

/// A node as the encapsulation sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The node's name.
    pub name: NodeName,
    /// Underlay IPv4 address with its subnet.
    pub v4: Option<IpNetwork>,
    /// Underlay IPv6 address with its subnet.
    pub v6: Option<IpNetwork>,
    /// IPv4 tunnel endpoint. Its presence is the node's word that its VXLAN device can receive.
    pub vtep_v4: Option<Vtep>,
    /// IPv6 tunnel endpoint.
    pub vtep_v6: Option<Vtep>,
    /// Address of the node's IPIP device.
    pub ipip: Option<IpAddr>,
    /// WireGuard over IPv4.
    pub wireguard_v4: WgNode,
    /// WireGuard over IPv6.
    pub wireguard_v6: WgNode,
    /// What it says that it receives; a node that says nothing is taken at its addresses.
    pub receives: Option<Receives>,
}

impl Endpoint {
    /// A node of which nothing but the name is known.
    #[must_use]
    pub const fn named(name: NodeName) -> Self {
        Self {
            name,
            v4: None,
            v6: None,
            vtep_v4: None,
            vtep_v6: None,
            ipip: None,
            wireguard_v4: WgNode::NONE,
            wireguard_v6: WgNode::NONE,
            receives: None,
        }
    }

    /// The underlay address of the family of `prefix`.
    #[must_use]
    pub const fn underlay(&self, v4: bool) -> Option<IpNetwork> {
        if v4 { self.v4 } else { self.v6 }
    }

    /// The VXLAN endpoint of one family.
    #[must_use]
    pub const fn vtep(&self, v4: bool) -> Option<Vtep> {
        if v4 { self.vtep_v4 } else { self.vtep_v6 }
    }

    /// WireGuard of one family.
    #[must_use]
    pub const fn wireguard(&self, v4: bool) -> WgNode {
        if v4 {
            self.wireguard_v4
        } else {
            self.wireguard_v6
        }
    }

    fn has_address(&self, addr: IpAddr) -> bool {
        self.underlay(addr.is_ipv4())
            .is_some_and(|net| net.ip() == addr)
    }
}

/// How to reach a prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Via {
    /// Through the underlay, towards this address of the node.
    Direct {
        /// Underlay address of the node (not necessarily a neighbour).
        gateway: IpAddr,
    },
    /// Through the VXLAN device; forwarding and neighbour entries lead to the node.
    Vxlan {
        /// Overlay address of the node's tunnel endpoint.
        gateway: IpAddr,
        /// Device that carries it.
        device: &'static str,
    },
    /// Through the IPIP device; the gateway is the outer destination.
    Ipip {
        /// Underlay address of the node.
        gateway: IpAddr,
        /// Device that carries it.
        device: &'static str,
    },
}

/// Why there is no answer yet. Each of these can pass when another resource arrives.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// No Node resource of that name.
    #[error("node {0} is not known")]
    UnknownNode(NodeName),
    /// The Node resource has no address of the family.
    #[error("node {node} has no IPv{family} address")]
    NoAddress {
        /// The node that lacks it.
        node: NodeName,
        /// 4 or 6.
        family: u8,
    },
    /// The pool asks for VXLAN, and the node has published no tunnel endpoint.
    #[error("node {node} has published no IPv{family} VXLAN tunnel address")]
    NoVtep {
        /// The node that lacks it.
        node: NodeName,
        /// 4 or 6.
        family: u8,
    },
    /// One end has not said yet that it receives this way: the barrier of a pool's edit.
    #[error("node {node} has not said yet that it receives '{way}'")]
    NotReady {
        /// The node that has not.
        node: NodeName,
        /// The way, as in the node's annotation.
        way: &'static str,
    },
    /// IPIP carries IPv4 only.
    #[error("pool {0} asks for IPIP, which cannot carry IPv6")]
    IpipIsV4Only(String),
}

/// Pools and nodes, and the decision per (prefix, node). Pure: same inputs, same answers, in any order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolver {
    local: NodeName,
    pools: BTreeMap<String, Pool>,
    nodes: BTreeMap<NodeName, Endpoint>,
}

impl Resolver {
    /// A resolver for the node named `local`, with no pools and no nodes.
    #[must_use]
    pub const fn new(local: NodeName) -> Self {
        Self {
            local,
            pools: BTreeMap::new(),
            nodes: BTreeMap::new(),
        }
    }

    /// Name of the node that asks.
    #[must_use]
    pub const fn local_name(&self) -> &NodeName {
        &self.local
    }

    /// The node that asks, once its Node resource is known.
    #[must_use]
    pub fn local(&self) -> Option<&Endpoint> {
        self.nodes.get(&self.local)
    }

    /// Adds or replaces a pool; true when that changed something.
    pub fn set_pool(&mut self, pool: Pool) -> bool {
        if self.pools.get(&pool.name) == Some(&pool) {
            return false;
        }
        self.pools.insert(pool.name.clone(), pool);
        true
    }

    /// Forgets a pool; true when it was known.
    pub fn remove_pool(&mut self, name: &str) -> bool {
        self.pools.remove(name).is_some()
    }

    /// Adds or replaces a node; true when that changed something.
    pub fn set_node(&mut self, node: Endpoint) -> bool {
        if self.nodes.get(&node.name) == Some(&node) {
            return false;
        }
        self.nodes.insert(node.name.clone(), node);
        true
    }

    /// Forgets a node; true when it was known.
    pub fn remove_node(&mut self, name: &NodeName) -> bool {
        self.nodes.remove(name).is_some()
    }

    /// All pools.
    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.pools.values()
    }

    /// All nodes but the local one.
    pub fn remotes(&self) -> impl Iterator<Item = &Endpoint> {
        self.nodes.values().filter(|node| node.name != self.local)
    }

    /// A node by name.
    #[must_use]
    pub fn node(&self, name: &NodeName) -> Option<&Endpoint> {
        self.nodes.get(name)
    }

    /// The node that has this underlay address.
    #[must_use]
    pub fn node_with_address(&self, addr: IpAddr) -> Option<&Endpoint> {
        self.nodes.values().find(|node| node.has_address(addr))
    }

    /// The pool that contains `prefix`, the narrowest if several do.
    #[must_use]
    pub fn pool_of(&self, prefix: &Cidr) -> Option<&Pool> {
        self.pools
            .values()
            .filter(|pool| pool.cidr.contains_cidr(prefix))
            .max_by_key(|pool| pool.cidr.prefix_len())
    }

    /// Encapsulation of `prefix`; a prefix outside all pools has none.
    #[must_use]
    pub fn encap_of(&self, prefix: &Cidr) -> Encap {
        self.pool_of(prefix).map_or(Encap::None, |pool| pool.encap)
    }

    /// How to reach `prefix`, which lives on node `next_hop`.
    ///
    /// # Errors
    /// [`Unresolved`] says which resource or field is still missing.
    pub fn resolve(&self, prefix: &Cidr, next_hop: &NodeName) -> Result<Via, Unresolved> {
        let node = self
            .nodes
            .get(next_hop)
            .ok_or_else(|| Unresolved::UnknownNode(next_hop.clone()))?;
        let v4 = prefix.is_v4();
        let family = if v4 { 4 } else { 6 };
        let gateway = node
            .underlay(v4)
            .ok_or_else(|| Unresolved::NoAddress {
                node: next_hop.clone(),
                family,
            })?
            .ip();
        let via = self.way(prefix, node, gateway)?;
        // Outside all pools nobody has edited anything.
        if self.pool_of(prefix).is_some() {
            self.barrier(node, &via)?;
        }
        Ok(via)
    }

    /// Both ends have to have said that they receive this way.
    ///
    /// # Errors
    /// [`Unresolved::NotReady`] names the end that has not.
    pub fn barrier(&self, node: &Endpoint, via: &Via) -> Result<(), Unresolved> {
        let silent = self
            .local()
            .into_iter()
            .chain([node])
            .find(|end| end.receives.is_some_and(|receives| !receives.covers(via)));
        match silent {
            None => Ok(()),
            Some(end) => Err(Unresolved::NotReady {
                node: end.name.clone(),
                way: receives::name(via),
            }),
        }
    }

    fn way(&self, prefix: &Cidr, node: &Endpoint, gateway: IpAddr) -> Result<Via, Unresolved> {
        let v4 = prefix.is_v4();
        let family = if v4 { 4 } else { 6 };
        let direct = Via::Direct { gateway };
        match self.encap_of(prefix) {
            Encap::None => Ok(direct),
            Encap::Ipip(Scope::CrossSubnet) | Encap::Vxlan(Scope::CrossSubnet)
                if self.on_local_subnet(gateway) =>
            {
                Ok(direct)
            }
            Encap::Ipip(_) if v4 => Ok(Via::Ipip {
                gateway,
                device: IPIP_DEVICE,
            }),
            Encap::Ipip(_) => Err(Unresolved::IpipIsV4Only(
                self.pool_of(prefix)
                    .map(|pool| pool.name.clone())
                    .unwrap_or_default(),
            )),
            Encap::Vxlan(_) => {
                let vtep = node.vtep(v4).ok_or_else(|| Unresolved::NoVtep {
                    node: node.name.clone(),
                    family,
                })?;
                let device = if v4 { VXLAN_V4_DEVICE } else { VXLAN_V6_DEVICE };
                Ok(Via::Vxlan {
                    gateway: vtep.addr,
                    device,
                })
            }
        }
    }

    /// How to reach `prefix` when a routing protocol names the next hop by address. An address that belongs
    /// to no node (a route reflector's, a router's) is reached directly.
    ///
    /// # Errors
    /// As [`Resolver::resolve`].
    pub fn resolve_address(&self, prefix: &Cidr, next_hop: IpAddr) -> Result<Via, Unresolved> {
        match self.node_with_address(next_hop) {
            Some(node) if node.name != self.local => self.resolve(prefix, &node.name.clone()),
            _ => Ok(Via::Direct { gateway: next_hop }),
        }
    }

    /// Calico's rule of "same subnet": the other node's address is inside the subnet of this node's address.
    #[must_use]
    pub fn on_local_subnet(&self, addr: IpAddr) -> bool {
        self.local()
            .and_then(|local| local.underlay(addr.is_ipv4()))
            .is_some_and(|subnet| subnet.contains(addr))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> NodeName {
        NodeName::from(text)
    }

    fn node(id: u8, subnet: u8) -> Endpoint {
        Endpoint {
            v4: Some(format!("10.{subnet}.0.{id}/24").parse().unwrap()),
            v6: Some(format!("fd00:{subnet}::{id}/64").parse().unwrap()),
            vtep_v4: Some(Vtep {
                addr: IpAddr::from([192, 168, id, 1]),
                mac: MacAddr([0x66, 0, 0, 0, 0, id]),
            }),
            ..Endpoint::named(name(&format!("node{id}")))
        }
    }

    /// node1 (local) and node2 in one subnet, node3 in another.
    fn resolver(encap: Encap) -> Resolver {
        let mut resolver = Resolver::new(name("node1"));
        for endpoint in [node(1, 1), node(2, 1), node(3, 2)] {
            assert!(resolver.set_node(endpoint));
        }
        for (pool, cidr) in [("v4", "192.168.0.0/16"), ("v6", "fd99::/48")] {
            resolver.set_pool(Pool {
                name: pool.into(),
                cidr: cidr.parse().unwrap(),
                encap,
            });
        }
        resolver
    }

    fn via(resolver: &Resolver, prefix: &str, to: &str) -> Result<Via, Unresolved> {
        resolver.resolve(&prefix.parse().unwrap(), &name(to))
    }

    const B2: &str = "192.168.2.0/26";
    const B3: &str = "192.168.3.0/26";

    fn direct(gateway: [u8; 4]) -> Result<Via, Unresolved> {
        Ok(Via::Direct {
            gateway: gateway.into(),
        })
    }

    fn vxlan(gateway: [u8; 4]) -> Result<Via, Unresolved> {
        Ok(Via::Vxlan {
            gateway: gateway.into(),
            device: "vxlan.calico",
        })
    }

    #[test]
    fn no_encapsulation_is_direct_everywhere() {
        let r = resolver(Encap::None);
        assert_eq!(via(&r, B2, "node2"), direct([10, 1, 0, 2]));
        assert_eq!(via(&r, B3, "node3"), direct([10, 2, 0, 3]));
    }

    #[test]
    fn vxlan_always_tunnels_everywhere() {
        let r = resolver(Encap::Vxlan(Scope::Always));
        assert_eq!(via(&r, B2, "node2"), vxlan([192, 168, 2, 1]));
        assert_eq!(via(&r, B3, "node3"), vxlan([192, 168, 3, 1]));
    }

    #[test]
    fn cross_subnet_tunnels_only_between_subnets() {
        let r = resolver(Encap::Vxlan(Scope::CrossSubnet));
        assert_eq!(via(&r, B2, "node2"), direct([10, 1, 0, 2]));
        assert_eq!(via(&r, B3, "node3"), vxlan([192, 168, 3, 1]));
        let r = resolver(Encap::Ipip(Scope::CrossSubnet));
        assert_eq!(via(&r, B2, "node2"), direct([10, 1, 0, 2]));
        assert_eq!(
            via(&r, B3, "node3"),
            Ok(Via::Ipip {
                gateway: [10, 2, 0, 3].into(),
                device: "tunl0"
            })
        );
    }

    #[test]
    fn a_node_that_moves_into_our_subnet_becomes_direct() {
        let mut r = resolver(Encap::Vxlan(Scope::CrossSubnet));
        let mut moved = node(3, 2);
        moved.v4 = Some("10.1.0.33/24".parse().unwrap());
        assert!(r.set_node(moved));
        assert_eq!(via(&r, B3, "node3"), direct([10, 1, 0, 33]));
    }

    #[test]
    fn a_peer_is_not_tunnelled_to_before_it_has_published_its_endpoint() {
        let mut r = resolver(Encap::Vxlan(Scope::Always));
        let mut silent = node(2, 1);
        silent.vtep_v4 = None;
        r.set_node(silent);
        assert_eq!(
            via(&r, B2, "node2"),
            Err(Unresolved::NoVtep {
                node: name("node2"),
                family: 4
            })
        );
    }

    #[test]
    fn a_way_is_used_only_after_both_ends_have_said_that_they_receive_it() {
        let mut r = resolver(Encap::Vxlan(Scope::Always));
        let say = |r: &mut Resolver, id, word: Option<&str>| {
            let mut node = node(id, 1);
            node.receives = word.and_then(|word| word.parse().ok());
            r.set_node(node);
        };
        let not_ready = |id: &str| {
            Err(Unresolved::NotReady {
                node: name(id),
                way: "vxlan",
            })
        };
        say(&mut r, 2, Some("direct"));
        assert_eq!(via(&r, B2, "node2"), not_ready("node2"));
        say(&mut r, 2, Some("direct,vxlan"));
        assert_eq!(via(&r, B2, "node2"), vxlan([192, 168, 2, 1]));
        say(&mut r, 1, Some("direct"));
        assert_eq!(via(&r, B2, "node2"), not_ready("node1"));
        say(&mut r, 1, Some("direct,vxlan"));
        // One that says nothing is one of Calico's.
        say(&mut r, 2, None);
        assert_eq!(via(&r, B2, "node2"), vxlan([192, 168, 2, 1]));
    }

    #[test]
    fn ipip_refuses_ipv6_and_names_the_pool() {
        let r = resolver(Encap::Ipip(Scope::Always));
        assert_eq!(
            via(&r, "fd99::/122", "node3"),
            Err(Unresolved::IpipIsV4Only("v6".into()))
        );
    }

    #[test]
    fn the_narrowest_pool_decides() {
        let mut r = resolver(Encap::Vxlan(Scope::Always));
        r.set_pool(Pool {
            name: "inner".into(),
            cidr: "192.168.2.0/24".parse().unwrap(),
            encap: Encap::None,
        });
        assert_eq!(via(&r, B2, "node2"), direct([10, 1, 0, 2]));
        assert_eq!(via(&r, B3, "node3"), vxlan([192, 168, 3, 1]));
        assert!(r.remove_pool("inner"));
        assert_eq!(via(&r, B2, "node2"), vxlan([192, 168, 2, 1]));
    }

    #[test]
    fn a_next_hop_address_that_is_a_node_is_resolved_as_that_node() {
        let r = resolver(Encap::Vxlan(Scope::Always));
        let prefix = B3.parse().unwrap();
        assert_eq!(
            r.resolve_address(&prefix, [10, 2, 0, 3].into()),
            vxlan([192, 168, 3, 1])
        );
        assert_eq!(
            r.resolve_address(&prefix, [10, 1, 0, 254].into()),
            direct([10, 1, 0, 254])
        );
    }

    #[test]
    fn unchanged_input_reports_no_change() {
        let mut r = resolver(Encap::None);
        assert!(!r.set_node(node(2, 1)));
        assert!(r.remove_node(&name("node2")));
        assert_eq!(
            via(&r, B2, "node2"),
            Err(Unresolved::UnknownNode(name("node2")))
        );
    }
}
