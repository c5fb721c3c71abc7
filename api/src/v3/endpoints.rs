//! HostEndpoint, WorkloadEndpoint and Profile.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Deserializer, Serialize};

use super::rule::NumberOrText;
use super::{Protocol, Rule, WorkloadEndpoint};
use crate::kubernetes::{LABEL_NAMESPACE, LABEL_ORCHESTRATOR, LABEL_SERVICE_ACCOUNT};
use crate::metadata::StringMap;
use crate::text::text_enum;
use crate::{Cidr, MacAddr};

/// An interface of a node, or all of them (`*`), to which policy applies.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct HostEndpointSpec {
    /// The node.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// Name of the interface, `*` for all, or empty to find it by address.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub interface_name: String,
    /// Addresses of the interface.
    #[serde(rename = "expectedIPs", skip_serializing_if = "Vec::is_empty")]
    pub expected_ips: Vec<IpAddr>,
    /// Profiles in order of evaluation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<String>,
    /// Named ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<EndpointPort>,
}

/// A named port of a host endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointPort {
    /// The name.
    pub name: String,
    /// The protocol.
    pub protocol: Protocol,
    /// The number.
    pub port: u16,
}

/// The interface of a pod or another workload.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct WorkloadEndpointSpec {
    /// Who runs the workload, such as `k8s`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub orchestrator: String,
    /// The workload's name where it is no pod.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub workload: String,
    /// The node on which it runs.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// The container whose namespace the interface is in.
    #[serde(rename = "containerID", skip_serializing_if = "String::is_empty")]
    pub container_id: String,
    /// The pod's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pod: String,
    /// The interface's name within the workload.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub endpoint: String,
    /// The pod's service account.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub service_account_name: String,
    /// Addresses, as /32 and /128.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ip_networks: Vec<Cidr>,
    /// One-to-one NAT.
    #[serde(rename = "ipNATs", skip_serializing_if = "Vec::is_empty")]
    pub ip_nats: Vec<IPNAT>,
    /// Next hop of the workload's default route.
    #[serde(
        rename = "ipv4Gateway",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv4_gateway: Option<Ipv4Addr>,
    /// The same for IPv6.
    #[serde(
        rename = "ipv6Gateway",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub ipv6_gateway: Option<Ipv6Addr>,
    /// Profiles in order of evaluation.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<String>,
    /// The interface on the host.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub interface_name: String,
    /// Ethernet address of the workload's side.
    #[serde(
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub mac: Option<MacAddr>,
    /// Named ports and host ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<WorkloadEndpointPort>,
    /// Further prefixes that the workload may send from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow_spoofed_source_prefixes: Vec<Cidr>,
    /// Limits of bandwidth, packets and connections.
    #[serde(rename = "qosControls", skip_serializing_if = "Option::is_none")]
    pub qos_controls: Option<QoSControls>,
}

impl WorkloadEndpoint {
    /// What selectors see of an endpoint of this namespace, apart from its profiles' labels: its own labels, and what it is.
    #[must_use]
    pub fn effective_labels(&self, namespace: Option<&str>) -> StringMap {
        let mut labels = self.metadata.labels.clone();
        let mut put = |label: &str, value: &str| {
            if !value.is_empty() {
                labels.insert(label.to_owned(), value.to_owned());
            }
        };
        put(LABEL_NAMESPACE, namespace.unwrap_or_default());
        put(LABEL_ORCHESTRATOR, &self.spec.orchestrator);
        put(LABEL_SERVICE_ACCOUNT, &self.spec.service_account_name);
        labels
    }
}

/// A named or mapped port of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkloadEndpointPort {
    /// The name; may be empty for a mapped port.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The protocol.
    pub protocol: Protocol,
    /// The number within the workload.
    pub port: u16,
    /// The number on the host, or 0.
    #[serde(default, skip_serializing_if = "super::is_zero")]
    pub host_port: u16,
    /// The address on the host; absent means all.
    #[serde(
        default,
        rename = "hostIP",
        with = "crate::text::optional",
        skip_serializing_if = "Option::is_none"
    )]
    pub host_ip: Option<IpAddr>,
}

/// One-to-one NAT between an external address and one of the workload's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IPNAT {
    /// One of the workload's addresses.
    #[serde(rename = "internalIP")]
    pub internal_ip: IpAddr,
    /// The address that is translated to it.
    #[serde(rename = "externalIP")]
    pub external_ip: IpAddr,
}

/// Limits of a workload's traffic. Zero or absent means no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct QoSControls {
    /// Bits per second towards the workload.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub ingress_bandwidth: u64,
    /// Bits.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub ingress_burst: u64,
    /// Bits per second.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub ingress_peakrate: u64,
    /// Bytes.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub ingress_minburst: u64,
    /// Bits per second from the workload.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub egress_bandwidth: u64,
    /// Bits.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub egress_burst: u64,
    /// Bits per second.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub egress_peakrate: u64,
    /// Bytes.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub egress_minburst: u64,
    /// Packets per second.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub ingress_packet_rate: u64,
    /// Packets.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub ingress_packet_burst: u64,
    /// Packets per second.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub egress_packet_rate: u64,
    /// Packets.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub egress_packet_burst: u64,
    /// Connections.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub ingress_max_connections: u64,
    /// Connections.
    #[serde(skip_serializing_if = "super::is_zero")]
    pub egress_max_connections: u64,
    /// Differentiated services code point of what the workload sends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dscp: Option<Dscp>,
}

text_enum! {
    /// The named code points of RFC 2474, 2597 and 3246.
    pub enum DscpName {
        DF = "DF", EF = "EF",
        AF11 = "AF11", AF12 = "AF12", AF13 = "AF13", AF21 = "AF21", AF22 = "AF22", AF23 = "AF23",
        AF31 = "AF31", AF32 = "AF32", AF33 = "AF33", AF41 = "AF41", AF42 = "AF42", AF43 = "AF43",
        CS0 = "CS0", CS1 = "CS1", CS2 = "CS2", CS3 = "CS3", CS4 = "CS4", CS5 = "CS5", CS6 = "CS6",
    }
}

/// A differentiated services code point: a number up to 63 or a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Dscp {
    /// By number.
    Number(u8),
    /// By name.
    Name(DscpName),
}

impl<'de> Deserialize<'de> for Dscp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NumberOrText(|text| {
            let number = text
                .parse()
                .ok()
                .filter(|number| *number < 64)
                .map(Self::Number);
            let value = number.or_else(|| text.parse().ok().map(Self::Name));
            value.ok_or_else(|| {
                format!("{text:?} is not a code point (0 to 63, or a name such as EF)")
            })
        }))
    }
}

impl Dscp {
    /// The six bits on the wire.
    #[must_use]
    pub const fn value(self) -> u8 {
        match self {
            Self::Number(number) => number,
            Self::Name(name) => match name {
                DscpName::DF | DscpName::CS0 => 0,
                DscpName::EF => 46,
                DscpName::AF11 => 10,
                DscpName::AF12 => 12,
                DscpName::AF13 => 14,
                DscpName::AF21 => 18,
                DscpName::AF22 => 20,
                DscpName::AF23 => 22,
                DscpName::AF31 => 26,
                DscpName::AF32 => 28,
                DscpName::AF33 => 30,
                DscpName::AF41 => 34,
                DscpName::AF42 => 36,
                DscpName::AF43 => 38,
                DscpName::CS1 => 8,
                DscpName::CS2 => 16,
                DscpName::CS3 => 24,
                DscpName::CS4 => 32,
                DscpName::CS5 => 40,
                DscpName::CS6 => 48,
            },
        }
    }
}

/// Rules and labels that endpoints take over by listing the profile.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ProfileSpec {
    /// Rules for traffic to the endpoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<Rule>,
    /// Rules for traffic from the endpoint.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<Rule>,
    /// Labels that the endpoint inherits; its own win.
    #[serde(skip_serializing_if = "StringMap::is_empty")]
    pub labels_to_apply: StringMap,
}
