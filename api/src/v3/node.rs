//! Node: what Calico knows about a node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::{Asn, Cidr, MacAddr};

/// A node of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeSpec {
    /// Addresses and identity for BGP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bgp: Option<NodeBGPSpec>,
    /// Address of `vxlan.calico`.
    #[serde(
        rename = "ipv4VXLANTunnelAddr",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv4_vxlan_tunnel_addr: Option<Ipv4Addr>,
    /// Ethernet address of `vxlan.calico`.
    #[serde(
        rename = "vxlanTunnelMACAddr",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub vxlan_tunnel_mac_addr: Option<MacAddr>,
    /// Address of `vxlan-v6.calico`.
    #[serde(
        rename = "ipv6VXLANTunnelAddr",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv6_vxlan_tunnel_addr: Option<Ipv6Addr>,
    /// Ethernet address of `vxlan-v6.calico`.
    #[serde(
        rename = "vxlanTunnelMACAddrV6",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub vxlan_tunnel_mac_addr_v6: Option<MacAddr>,
    /// The node's names in orchestrators.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub orch_refs: Vec<OrchRef>,
    /// Addresses of the WireGuard interfaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wireguard: Option<NodeWireguardSpec>,
    /// Addresses at which the node is reached.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<NodeAddress>,
    /// The node's interfaces.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<NodeInterface>,
}

impl NodeSpec {
    /// The node's IPv4 address with its subnet.
    #[must_use]
    pub fn ipv4(&self) -> Option<IpNetwork> {
        self.bgp.as_ref()?.ipv4_address
    }

    /// The node's IPv6 address with its subnet.
    #[must_use]
    pub fn ipv6(&self) -> Option<IpNetwork> {
        self.bgp.as_ref()?.ipv6_address
    }
}

/// Addresses and identity for BGP.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeBGPSpec {
    /// The node's AS number, where it is not the cluster's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub as_number: Option<Asn>,
    /// IPv4 address with its subnet.
    #[serde(
        rename = "ipv4Address",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv4_address: Option<IpNetwork>,
    /// IPv6 address with its subnet.
    #[serde(
        rename = "ipv6Address",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv6_address: Option<IpNetwork>,
    /// Address of `tunl0`.
    #[serde(
        rename = "ipv4IPIPTunnelAddr",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv4_ipip_tunnel_addr: Option<Ipv4Addr>,
    /// Makes the node a route reflector of this cluster (RFC 4456).
    #[serde(
        rename = "routeReflectorClusterID",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub route_reflector_cluster_id: Option<Ipv4Addr>,
}

/// The node's name in an orchestrator.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OrchRef {
    /// The name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node_name: String,
    /// The orchestrator, such as `k8s`.
    pub orchestrator: String,
}

/// Addresses of the WireGuard interfaces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeWireguardSpec {
    /// Address of `wireguard.cali`.
    #[serde(
        rename = "interfaceIPv4Address",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub interface_ipv4_address: Option<Ipv4Addr>,
    /// Address of `wg-v6.cali`.
    #[serde(
        rename = "interfaceIPv6Address",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub interface_ipv6_address: Option<Ipv6Addr>,
}

/// Address type of the node's BGP addresses.
pub const CALICO_NODE_IP: &str = "CalicoNodeIP";

/// An address at which the node is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeAddress {
    /// The address, with or without its subnet.
    pub address: String,
    /// `CalicoNodeIP`, `InternalIP` or `ExternalIP`.
    #[serde(default, rename = "type", skip_serializing_if = "String::is_empty")]
    pub type_: String,
}

impl NodeAddress {
    /// The address without its subnet.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        self.address.split('/').next()?.parse().ok()
    }
}

/// An interface of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeInterface {
    /// Its name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Its addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<String>,
}

/// What the node has published about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct NodeStatus {
    /// Public key of `wireguard.cali`, base64.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub wireguard_public_key: String,
    /// Public key of `wg-v6.cali`, base64.
    #[serde(
        rename = "wireguardPublicKeyV6",
        skip_serializing_if = "String::is_empty"
    )]
    pub wireguard_public_key_v6: String,
    /// The ranges that Kubernetes gave to the node.
    #[serde(rename = "podCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<Cidr>,
}
