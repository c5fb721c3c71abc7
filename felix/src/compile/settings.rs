//! The part of FelixConfiguration that shapes the rule set, with its defaults.

use std::net::Ipv4Addr;
use std::sync::Arc;

use cali_api::v3::{
    self, FelixConfigurationSpec, NatOutgoingExclusions, Port, ProtoPort, ServiceLoopPrevention,
};
use cali_netlink::nft::{Expr, Reject, Verdict};

use super::ipvs;
use super::log::LogRate;
use crate::calc::PortRange;

/// What becomes of a packet from a workload to its host that policy allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostAction {
    /// Nothing more: the host's own rules decide.
    Accept,
    /// It is dropped.
    Drop,
}

/// How packets are denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenyAction {
    /// Silently.
    Drop,
    /// With an ICMP "port unreachable".
    Reject,
}

/// How packets that leave the pools get another source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NatOutgoing {
    /// IPv4 packets get this address instead of that of the interface they leave by (`natOutgoingAddress`).
    pub address: Option<Ipv4Addr>,
    /// TCP and UDP get a source port of these (`natPortRange`).
    pub ports: Option<PortRange>,
    /// Packets to nodes keep their source (`natOutgoingExclusions`).
    pub spare_nodes: bool,
    /// Only where they leave by this interface (`iptablesNATOutgoingInterfaceFilter`).
    pub interface: Option<Arc<str>>,
}

impl From<&FelixConfigurationSpec> for NatOutgoing {
    fn from(spec: &FelixConfigurationSpec) -> Self {
        let ports = match spec.nat_port_range {
            Some(Port::Number(port)) => Some((port, port)),
            Some(Port::Range(first, last)) => Some((first, last)),
            Some(Port::Named(_)) | None => None,
        };
        Self {
            address: spec.nat_outgoing_address,
            ports: ports
                .filter(|(first, last)| first <= last && *last > 0)
                .map(|(first, last)| PortRange { first, last }),
            spare_nodes: spec.nat_outgoing_exclusions
                == Some(NatOutgoingExclusions::IPPoolsAndHostIPs),
            interface: spec
                .iptables_nat_outgoing_interface_filter
                .as_deref()
                .filter(|name| (1..16).contains(&name.len()))
                .map(Arc::from),
        }
    }
}

/// Settings of the rule set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Prefixes of the names of workload interfaces.
    pub workload_prefixes: Vec<Arc<str>>,
    /// Workload to host, after policy.
    pub host_action: HostAction,
    /// How denied packets end.
    pub deny: DenyAction,
    /// Whether packets that connection tracking cannot place are dropped.
    pub drop_invalid: bool,
    /// UDP port of VXLAN.
    pub vxlan_port: u16,
    /// UDP ports of WireGuard for IPv4 and IPv6, where it is enabled.
    pub wireguard_ports: [Option<u16>; 2],
    /// Whether workloads may send VXLAN themselves.
    pub allow_vxlan_from_workloads: bool,
    /// Whether workloads may send IPIP themselves.
    pub allow_ipip_from_workloads: bool,
    /// Ports of the host that no host endpoint's policy closes.
    pub failsafe_inbound: Vec<ProtoPort>,
    /// Ports of others that no host endpoint's policy closes.
    pub failsafe_outbound: Vec<ProtoPort>,
    /// The bit of packet marks that says: accepted before connection tracking or destination NAT.
    pub accept_mark: u32,
    /// The bits of packet marks by which is known what IPVS forwards.
    pub ipvs_marks: ipvs::Marks,
    /// NAT of what leaves the pools.
    pub nat: NatOutgoing,
    /// How packets to service addresses end that nobody serves; `None`: they go where routes lead.
    pub service_loop: Option<DenyAction>,
    /// How many packets rules with action Log write down; `None`: all.
    pub log_rate: Option<LogRate>,
}

impl Default for Settings {
    fn default() -> Self {
        Self::from(&FelixConfigurationSpec::default())
    }
}

impl From<&FelixConfigurationSpec> for Settings {
    fn from(spec: &FelixConfigurationSpec) -> Self {
        let prefixes = spec.interface_prefix.as_deref().unwrap_or("cali");
        let wireguard = ipip_vxlan::WireguardSettings::from(spec);
        // What validation lets pass has eight.
        let default = FelixConfigurationSpec::default();
        let bit = |index| {
            let own = spec.mark_bits().nth(index);
            own.or_else(|| default.mark_bits().nth(index))
                .unwrap_or_default()
        };
        Self {
            workload_prefixes: prefixes
                .split(',')
                .map(str::trim)
                .filter(|prefix| !prefix.is_empty())
                .map(Arc::from)
                .collect(),
            host_action: match spec.default_endpoint_to_host_action {
                Some(v3::EndpointToHostAction::Accept | v3::EndpointToHostAction::Return) => {
                    HostAction::Accept
                }
                Some(v3::EndpointToHostAction::Drop) | None => HostAction::Drop,
            },
            deny: match spec
                .nftables_filter_deny_action
                .or(spec.iptables_filter_deny_action)
            {
                Some(v3::DenyAction::Reject) => DenyAction::Reject,
                Some(v3::DenyAction::Drop) | None => DenyAction::Drop,
            },
            drop_invalid: !spec.disable_conntrack_invalid_check.unwrap_or(false),
            vxlan_port: spec.vxlan_port.unwrap_or(4789),
            wireguard_ports: [wireguard.v4, wireguard.v6]
                .map(|family| family.enabled.then_some(family.port)),
            allow_vxlan_from_workloads: spec.allow_vxlan_packets_from_workloads.unwrap_or(false),
            allow_ipip_from_workloads: spec.allow_ipip_packets_from_workloads.unwrap_or(false),
            failsafe_inbound: spec.failsafe_inbound(),
            failsafe_outbound: spec.failsafe_outbound(),
            accept_mark: bit(0),
            ipvs_marks: ipvs::Marks {
                arrived: bit(6),
                from_workload: bit(7),
            },
            nat: NatOutgoing::from(spec),
            service_loop: match spec.service_loop_prevention {
                Some(ServiceLoopPrevention::Disabled) => None,
                Some(ServiceLoopPrevention::Reject) => Some(DenyAction::Reject),
                Some(ServiceLoopPrevention::Drop) | None => Some(DenyAction::Drop),
            },
            log_rate: LogRate::of(spec),
        }
    }
}

impl Settings {
    /// UDP ports whose packets between nodes carry others: connection tracking is for what is inside.
    pub(crate) fn outer_ports(&self) -> impl Iterator<Item = u16> {
        std::iter::once(self.vxlan_port).chain(self.wireguard_ports.into_iter().flatten())
    }
}

impl DenyAction {
    /// The expression that ends a denied packet.
    pub(super) fn expr(self) -> Expr {
        match self {
            Self::Drop => Expr::Verdict(Verdict::Drop),
            // NFT_REJECT_ICMPX_PORT_UNREACH
            Self::Reject => Expr::Reject(Reject::Icmpx(1)),
        }
    }
}
