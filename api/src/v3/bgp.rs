//! BGPConfiguration and BGPPeer.

use std::fmt;
use std::net::{IpAddr, SocketAddrV6};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{GoDuration, LogLevel, Toggle};
use crate::text::{serde_as_text, text_enum};
use crate::{Asn, Cidr};

text_enum! {
    /// To what the BGP listener binds.
    pub enum BindMode { None = "None", NodeIP = "NodeIP" }
}

text_enum! {
    /// Which part of the cluster routes the BGP side puts into the kernel. The counterpart is
    /// the field of the same name of FelixConfiguration.
    pub enum ProgramClusterRoutes {
        Enabled = "Enabled",
        Disabled = "Disabled",
        EnabledIPIPOnly = "EnabledIPIPOnly",
        EnabledNoEncapOnly = "EnabledNoEncapOnly",
    }
}

/// Settings of BGP for the cluster (`default`) or one node (`node.<name>`).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BGPConfigurationSpec {
    /// Level of the BGP process's log.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_severity_screen: Option<LogLevel>,
    /// Whether every node peers with every other node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_to_node_mesh_enabled: Option<bool>,
    /// AS number of nodes that have none of their own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub as_number: Option<Asn>,
    /// Cluster IP ranges to advertise.
    #[serde(
        rename = "serviceLoadBalancerIPs",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub service_load_balancer_ips: Vec<ServiceCidr>,
    /// External IP ranges to advertise.
    #[serde(rename = "serviceExternalIPs", skip_serializing_if = "Vec::is_empty")]
    pub service_external_ips: Vec<ServiceCidr>,
    /// Cluster IP ranges to advertise.
    #[serde(rename = "serviceClusterIPs", skip_serializing_if = "Vec::is_empty")]
    pub service_cluster_ips: Vec<ServiceCidr>,
    /// Whether a load balancer range is advertised as a whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_load_balancer_aggregation: Option<Toggle>,
    /// Names for communities.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub communities: Vec<Community>,
    /// Communities to attach to prefixes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub prefix_advertisements: Vec<PrefixAdvertisement>,
    /// TCP port of the listener.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen_port: Option<u16>,
    /// TCP MD5 password of the mesh.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_mesh_password: Option<BGPPassword>,
    /// Restart time announced for graceful restart in the mesh.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_mesh_max_restart_time: Option<GoDuration>,
    /// To what the listener binds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bind_mode: Option<BindMode>,
    /// Patterns of interfaces whose addresses are not announced.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignored_interfaces: Vec<String>,
    /// Address at which local workloads reach the node's BGP speaker.
    #[serde(
        rename = "localWorkloadPeeringIPV4",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub local_workload_peering_ip_v4: Option<IpAddr>,
    /// The same for IPv6.
    #[serde(
        rename = "localWorkloadPeeringIPV6",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub local_workload_peering_ip_v6: Option<IpAddr>,
    /// Which cluster routes the BGP side programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program_cluster_routes: Option<ProgramClusterRoutes>,
    /// Metric of IPv4 routes in the kernel.
    #[serde(
        rename = "ipv4NormalRoutePriority",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv4_normal_route_priority: Option<u32>,
    /// Metric of IPv6 routes in the kernel.
    #[serde(
        rename = "ipv6NormalRoutePriority",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv6_normal_route_priority: Option<u32>,
}

impl BGPConfigurationSpec {
    /// The TCP port of BGP.
    pub const DEFAULT_LISTEN_PORT: u16 = 179;

    /// Whether the mesh is on; it is unless switched off.
    #[must_use]
    pub fn mesh_enabled(&self) -> bool {
        self.node_to_node_mesh_enabled.unwrap_or(true)
    }

    /// The AS number of nodes without one of their own.
    #[must_use]
    pub fn default_asn(&self) -> Asn {
        self.as_number.unwrap_or(Asn::DEFAULT)
    }

    /// The port to listen on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.listen_port.unwrap_or(Self::DEFAULT_LISTEN_PORT)
    }
}

/// A range of service addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceCidr {
    /// The range.
    pub cidr: Cidr,
}

/// A named community.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Community {
    /// How `prefixAdvertisements` refers to it.
    pub name: String,
    /// `aa:nn` (RFC 1997) or `aa:nn:mm` (RFC 8092).
    pub value: CommunityValue,
}

/// A community value: standard `aa:nn` or large `aa:nn:mm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CommunityValue {
    /// RFC 1997.
    Standard(u16, u16),
    /// RFC 8092.
    Large(u32, u32, u32),
}

/// A text that is no community.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a community (\"aa:nn\" with 16-bit numbers or \"aa:nn:mm\" with 32-bit numbers)"
)]
pub struct CommunityError(String);

impl fmt::Display for CommunityValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Standard(a, b) => write!(f, "{a}:{b}"),
            Self::Large(a, b, c) => write!(f, "{a}:{b}:{c}"),
        }
    }
}

impl FromStr for CommunityValue {
    type Err = CommunityError;

    fn from_str(text: &str) -> Result<Self, CommunityError> {
        let parts: Vec<&str> = text.split(':').collect();
        let value = match parts[..] {
            [a, b] => a
                .parse()
                .ok()
                .zip(b.parse().ok())
                .map(|(a, b)| Self::Standard(a, b)),
            [a, b, c] => match (a.parse(), b.parse(), c.parse()) {
                (Ok(a), Ok(b), Ok(c)) => Some(Self::Large(a, b, c)),
                _ => None,
            },
            _ => None,
        };
        value.ok_or_else(|| CommunityError(text.to_owned()))
    }
}

serde_as_text!(CommunityValue, "a community \"aa:nn\" or \"aa:nn:mm\"");

/// Communities for the routes within a prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefixAdvertisement {
    /// The prefix.
    pub cidr: Cidr,
    /// Names from `communities`, or literal values.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub communities: Vec<String>,
}

/// Where a TCP MD5 password is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BGPPassword {
    /// A Secret in the namespace of the node's daemon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_key_ref: Option<SecretKeySelector>,
}

/// One entry of a Secret.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct SecretKeySelector {
    /// The Secret's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The entry.
    pub key: String,
    /// Whether its absence is no fault.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optional: Option<bool>,
}

text_enum! {
    /// What becomes of the next hop of exported routes.
    pub enum NextHopMode {
        /// The protocol's own rule (RFC 4271 §5.1.3).
        Auto = "Auto",
        /// Our address.
        Own = "Self",
        /// Unchanged.
        Keep = "Keep",
    }
}

text_enum! {
    /// The source address of a session.
    pub enum SourceAddress { UseNodeIP = "UseNodeIP", None = "None" }
}

text_enum! {
    /// Whether the selected peers are configured for the reverse direction by themselves.
    pub enum ReversePeering { Auto = "Auto", Manual = "Manual" }
}

/// The address of a peer: `IP`, `IPv4:port` or `[IPv6]:port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerAddress {
    /// The address.
    pub ip: IpAddr,
    /// The TCP port, where it is not 179.
    pub port: Option<u16>,
}

/// A text that is no peer address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a peer address (IP, IPv4:port or [IPv6]:port)")]
pub struct PeerAddressError(String);

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.ip, self.port) {
            (ip, None) => ip.fmt(f),
            (IpAddr::V4(ip), Some(port)) => write!(f, "{ip}:{port}"),
            (IpAddr::V6(ip), Some(port)) => write!(f, "[{ip}]:{port}"),
        }
    }
}

impl FromStr for PeerAddress {
    type Err = PeerAddressError;

    fn from_str(text: &str) -> Result<Self, PeerAddressError> {
        if let Ok(ip) = text.parse() {
            return Ok(Self { ip, port: None });
        }
        let address = match text.parse::<SocketAddrV6>() {
            Ok(v6) if v6.scope_id() == 0 => Some((IpAddr::V6(*v6.ip()), v6.port())),
            Ok(_) => None,
            Err(_) => text
                .parse::<std::net::SocketAddrV4>()
                .ok()
                .map(|v4| (IpAddr::V4(*v4.ip()), v4.port())),
        };
        match address {
            Some((ip, port)) if port != 0 => Ok(Self {
                ip,
                port: Some(port),
            }),
            _ => Err(PeerAddressError(text.to_owned())),
        }
    }
}

serde_as_text!(PeerAddress, "a peer address (IP, IPv4:port or [IPv6]:port)");

/// A BGP peer of all nodes, of some nodes, or between nodes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct BGPPeerSpec {
    /// The one node that has this peer.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// The nodes that have this peer; exclusive with `node`; neither means all.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node_selector: String,
    /// The peer's address.
    #[serde(
        rename = "peerIP",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub peer_ip: Option<PeerAddress>,
    /// The peer's AS number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub as_number: Option<Asn>,
    /// The AS number that we present.
    #[serde(rename = "localASNumber", skip_serializing_if = "Option::is_none")]
    pub local_as_number: Option<Asn>,
    /// The nodes that are the peers; exclusive with `peerIP`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub peer_selector: String,
    /// Deprecated form of `nextHopMode: Keep`.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub keep_original_next_hop: bool,
    /// What becomes of the next hop of exported routes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_hop_mode: Option<NextHopMode>,
    /// TCP MD5 password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password: Option<BGPPassword>,
    /// The source address of the session.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_address: Option<SourceAddress>,
    /// Restart time announced for graceful restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_restart_time: Option<GoDuration>,
    /// Interval of keepalives.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keepalive_time: Option<GoDuration>,
    /// How often our own AS number may occur in a received path.
    #[serde(
        rename = "numAllowedLocalASNumbers",
        skip_serializing_if = "Option::is_none"
    )]
    pub num_allowed_local_as_numbers: Option<u32>,
    /// Hops to the peer for TTL security (RFC 5082).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl_security: Option<u8>,
    /// Gateway of a static route to the peer.
    #[serde(
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub reachable_by: Option<IpAddr>,
    /// BGPFilters in order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub filters: Vec<String>,
    /// Local workloads that are the peers.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub local_workload_selector: String,
    /// Whether selected nodes peer back by themselves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reverse_peering: Option<ReversePeering>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_addresses_survive_their_text() {
        for text in ["192.0.2.1", "192.0.2.1:1790", "fd00::1", "[fd00::1]:1790"] {
            assert_eq!(text.parse::<PeerAddress>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "192.0.2.1:",
            "192.0.2.1:0",
            "[fd00::1]",
            "host:179",
            "[fe80::1%2]:179",
        ] {
            assert!(text.parse::<PeerAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn communities_survive_their_text() {
        for text in ["65000:1", "4200000000:1:2"] {
            assert_eq!(text.parse::<CommunityValue>().unwrap().to_string(), text);
        }
        for text in ["", "1", "65536:1", "1:2:3:4", "a:b"] {
            assert!(text.parse::<CommunityValue>().is_err(), "{text}");
        }
    }
}
