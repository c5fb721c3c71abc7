//! What the policy model says at host endpoints.

use std::net::IpAddr;

use cali_api::v3::{FelixConfigurationSpec, HostEndpoint, ProtoPort, TierAction};
use cali_api::{AnyResource, Key, Kind};

use super::{Model, Outcome, Packet, Reason, Sees, Verdict};
use crate::calc::Direction;

/// The way of a packet past a host endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// To the host itself.
    In,
    /// From the host itself.
    Out,
    /// In, to somebody beyond the host.
    ForwardIn,
    /// Out, from somebody beyond the host.
    ForwardOut,
}

impl Way {
    /// Seen from the endpoint.
    #[must_use]
    pub const fn direction(self) -> Direction {
        match self {
            Self::In | Self::ForwardIn => Direction::Ingress,
            Self::Out | Self::ForwardOut => Direction::Egress,
        }
    }
}

const ICMPV6: u8 = 58;
/// Listener discovery, router advertisements, neighbour discovery.
const NEIGHBOUR_DISCOVERY: [u8; 7] = [130, 131, 132, 133, 134, 135, 136];

impl Model {
    /// The host endpoint of an interface: one that names it, or else one that expects one of its addresses, or else
    /// that of all interfaces; of several the first by name.
    #[must_use]
    pub fn host_endpoint_on(
        &self,
        node: &str,
        interface: &str,
        addresses: &[IpAddr],
    ) -> Option<Key> {
        let find = |wanted: &dyn Fn(&HostEndpoint) -> bool| {
            self.objects
                .iter()
                .find_map(|(key, object)| match &**object {
                    AnyResource::HostEndpoint(host) if host.spec.node == node && wanted(host) => {
                        Some(key.clone())
                    }
                    _ => None,
                })
        };
        let expects = |host: &HostEndpoint| {
            let spec = &host.spec;
            let here = |addr: &IpAddr| addresses.contains(addr);
            spec.interface_name.is_empty() && spec.expected_ips.iter().any(here)
        };
        find(&|host| host.spec.interface_name == interface)
            .or_else(|| find(&expects))
            .or_else(|| find(&|host| host.spec.interface_name == "*").filter(|_| interface != "lo"))
    }

    /// What happens to a packet at a host endpoint. `wire` is the packet as it came in, before any translation of
    /// its destination; `packet` as it goes on.
    pub fn host_verdict(
        &self,
        endpoint: &Key,
        wire: &Packet,
        packet: &Packet,
        way: Way,
    ) -> Verdict {
        let Some(AnyResource::HostEndpoint(host)) =
            self.objects.get(endpoint).map(|object| &**object)
        else {
            return Verdict::deny(Reason::UnknownEndpoint);
        };
        if way != Way::ForwardOut
            && let Some(verdict) = self.early_verdict(host, wire, way)
        {
            return verdict;
        }
        let direction = way.direction();
        if matches!(way, Way::ForwardIn | Way::ForwardOut) {
            return self
                .stage_verdict(host, Sees::Forwarded, packet, direction)
                .unwrap_or(Verdict::allow(Reason::NotAsked));
        }
        let discovery = packet.icmp.is_some_and(|(kind, _)| {
            packet.protocol == ICMPV6 && NEIGHBOUR_DISCOVERY.contains(&kind)
        });
        if discovery {
            return Verdict::allow(Reason::NeighbourDiscovery);
        }
        if self.failsafe(&host.spec.node, packet, direction, false) {
            return Verdict::allow(Reason::Failsafe);
        }
        self.stage_verdict(host, Sees::Local, packet, direction)
            .unwrap_or_else(|| self.profile_verdict(&host.spec.profiles, packet, direction))
    }

    /// What policy before connection tracking and before destination NAT says. What it allows is final.
    fn early_verdict(&self, host: &HostEndpoint, wire: &Packet, way: Way) -> Option<Verdict> {
        let direction = way.direction();
        // `*` knows no untracked policy, and what is forwarded out is not seen there.
        if host.spec.interface_name != "*" && !self.failsafe(&host.spec.node, wire, direction, true)
        {
            let untracked = self.stage_verdict(host, Sees::Untracked, wire, direction);
            if untracked.is_some() {
                return untracked;
            }
        }
        if direction == Direction::Ingress
            && !self.failsafe(&host.spec.node, wire, direction, false)
        {
            return self.stage_verdict(host, Sees::PreDnat, wire, direction);
        }
        None
    }

    fn stage_verdict(
        &self,
        host: &HostEndpoint,
        sees: Sees,
        packet: &Packet,
        direction: Direction,
    ) -> Option<Verdict> {
        let labels = self.with_profiles(host.metadata.labels.clone(), &host.spec.profiles);
        let mut tiers = self.tiers(&labels, sees, direction);
        if matches!(sees, Sees::Untracked | Sees::PreDnat) {
            for (_, end, _) in &mut tiers {
                *end = TierAction::Pass;
            }
        }
        self.tiers_verdict(tiers, packet, direction, &mut Vec::new())
    }

    /// Whether the packet goes to a failsafe port, or (`answers`) is an answer from one.
    fn failsafe(&self, node: &str, packet: &Packet, direction: Direction, answers: bool) -> bool {
        let own = Key::cluster(Kind::FelixConfiguration, format!("node.{node}"));
        let all = Key::cluster(Kind::FelixConfiguration, "default");
        let of = |read: &dyn Fn(&FelixConfigurationSpec) -> Option<Vec<ProtoPort>>| {
            [&own, &all].into_iter().find_map(|key| {
                match self.objects.get(key).map(|object| &**object) {
                    Some(AnyResource::FelixConfiguration(found)) => read(&found.spec),
                    _ => None,
                }
            })
        };
        let unset = FelixConfigurationSpec::default();
        let inbound = of(&|spec| spec.failsafe_inbound_host_ports.clone())
            .unwrap_or_else(|| unset.failsafe_inbound());
        let outbound = of(&|spec| spec.failsafe_outbound_host_ports.clone())
            .unwrap_or_else(|| unset.failsafe_outbound());
        let (ports, others, peer) = match direction {
            Direction::Ingress => (inbound, outbound, packet.source),
            Direction::Egress => (outbound, inbound, packet.destination),
        };
        let hits = |port: &ProtoPort, number: u16| {
            port.protocol.number() == packet.protocol
                && port.port == number
                && port.net.is_none_or(|net| net.cidr().contains(peer))
        };
        ports.iter().any(|port| hits(port, packet.destination_port))
            || (answers && others.iter().any(|port| hits(port, packet.source_port)))
    }
}

impl Verdict {
    /// Whether the packet passes.
    #[must_use]
    pub fn is_allow(&self) -> bool {
        self.outcome == Outcome::Allow
    }
}
