//! What host endpoints' policy says about one flow of the host itself, from the enforced state; and the ports that the
//! lock-out guard keeps open.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use cali_api::Key as ObjectKey;
use cali_api::v3::ProtoPort;

use super::compiler::Compiler;
use super::evaluate::Suspects;
use crate::calc::{Direction, HostEndpoint, HostInterface, STAGES, Stage};
use crate::verdict::Packet;

/// Senders that are looked at for one host endpoint.
const CANDIDATES: usize = 256;

/// What the lock-out guard keeps open: like fail-safe ports, each for one peer or for all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeptOpen {
    /// Ports of this host.
    pub inbound: Vec<ProtoPort>,
    /// Ports of others.
    pub outbound: Vec<ProtoPort>,
}

impl Compiler {
    /// The host endpoints that an interface may be under: its own, or that of all others.
    fn hosts_of(&self, address: Option<IpAddr>) -> Vec<(ObjectKey, Arc<HostEndpoint>)> {
        let placed = self.hosts.placed();
        let Some(address) = address else {
            return placed.into_values().collect();
        };
        let all = placed.get(&None);
        let found = self.hosts.interfaces_of(address).filter_map(|interface| {
            let own = placed.get(&Some(interface.clone()));
            own.or(all.filter(|_| &**interface != "lo")).cloned()
        });
        found.collect()
    }

    /// Whether there are host endpoints on this node.
    pub fn has_hosts(&self) -> bool {
        !self.hosts.placed().is_empty()
    }

    /// Whose policy forbids a flow that ends (`Ingress`) or begins (`Egress`) on the host, at the interface that has
    /// `own`, or at any where that is not known. `None` where nobody forbids it. What the lock-out guard keeps open does
    /// not count.
    pub fn host_forbids(
        &self,
        own: Option<IpAddr>,
        packet: &Packet,
        direction: Direction,
    ) -> Option<ObjectKey> {
        let hosts = self.hosts_of(own).into_iter();
        hosts
            .filter(|(_, host)| !self.host_allows(host, packet, direction))
            .map(|(id, _)| id)
            .next()
    }

    fn host_allows(&self, host: &HostEndpoint, packet: &Packet, direction: Direction) -> bool {
        let failsafe = match direction {
            Direction::Ingress => &self.settings.failsafe_inbound,
            Direction::Egress => &self.settings.failsafe_outbound,
        };
        let peer = match direction {
            Direction::Ingress => packet.source,
            Direction::Egress => packet.destination,
        };
        if is_among(failsafe, packet, peer) {
            return true;
        }
        let untracked = host.interface != HostInterface::All;
        for stage in STAGES {
            let asked = match stage {
                Stage::Untracked => untracked,
                Stage::PreDnat => direction == Direction::Ingress,
                Stage::Forward => false,
                Stage::Normal => true,
            };
            if asked
                && let Some(allowed) =
                    self.tiers_allow(host.stage(stage).of(direction), packet, direction)
            {
                return allowed;
            }
        }
        self.profiles_allow(&host.profiles, packet, direction)
    }

    /// Addresses that the policy of host endpoints names as senders, and two that it does not: one of each family. Who
    /// may reach this host at all is among those that they stand for.
    pub fn named_senders(&self) -> BTreeSet<IpAddr> {
        let mut found = BTreeSet::from([
            IpAddr::from([198, 51, 100, 254]),
            IpAddr::from([0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0xfffe]),
        ]);
        for (_, host) in self.hosts.placed().into_values() {
            let policies = host.policies().filter_map(|id| self.policies.get(id));
            let profiles = host
                .profiles
                .iter()
                .filter_map(|name| self.profiles.get(name));
            for rule in policies.chain(profiles).flat_map(|rules| &rules.ingress) {
                found.extend(rule.source.nets.iter().map(|net| net.addr()));
                for set in &rule.source.sets {
                    found.extend(self.some_members(set, 16));
                }
                if found.len() > CANDIDATES {
                    return found;
                }
            }
        }
        found
    }

    /// Keeps these ports open besides the fail-safe ones; true where that changes anything.
    pub fn set_kept_open(&mut self, kept: KeptOpen) -> bool {
        if self.kept_open == kept {
            return false;
        }
        self.kept_open = kept;
        self.put_hosts();
        self.render_dirty();
        true
    }

    /// Addresses by which others reach this host: not those of loopback, of the ways to workloads, and of single links.
    pub fn host_addresses(&self) -> BTreeSet<IpAddr> {
        let prefixes = &self.settings.workload_prefixes;
        let is_workload = |name: &str| prefixes.iter().any(|prefix| name.starts_with(&**prefix));
        let of_link = |addr: &IpAddr| match addr {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_loopback(),
            IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.is_loopback(),
        };
        let all = self.hosts.interfaces();
        all.filter(|(name, _)| !is_workload(name))
            .flat_map(|(_, addresses)| addresses.iter().copied())
            .filter(|addr| !of_link(addr))
            .collect()
    }

    /// Whether the guard keeps a flow open.
    pub fn is_kept_open(&self, packet: &Packet, direction: Direction) -> bool {
        let (kept, peer) = match direction {
            Direction::Ingress => (&self.kept_open.inbound, packet.source),
            Direction::Egress => (&self.kept_open.outbound, packet.destination),
        };
        is_among(kept, packet, peer)
    }

    /// Addresses of nodes.
    pub fn nodes(&self) -> BTreeSet<IpAddr> {
        let sources = self.tunnel_peers.sources.iter();
        sources
            .filter(|net| net.is_host())
            .map(|net| net.addr())
            .collect()
    }

    /// Adds the addresses of host endpoints that ask one of these policies or profiles.
    pub(super) fn suspect_hosts(
        &self,
        policies: &BTreeSet<ObjectKey>,
        profiles: &BTreeSet<Arc<str>>,
        suspects: &mut Suspects,
    ) {
        for (interface, (_, host)) in self.hosts.placed() {
            if host.policies().any(|id| policies.contains(id))
                || host.profiles.iter().any(|name| profiles.contains(name))
            {
                suspects
                    .addresses
                    .extend(self.hosts.addresses(interface.as_deref()));
            }
        }
    }
}

fn is_among(ports: &[ProtoPort], packet: &Packet, peer: IpAddr) -> bool {
    ports.iter().any(|port| {
        port.protocol.number() == packet.protocol
            && port.port == packet.destination_port
            && port
                .net
                .as_ref()
                .is_none_or(|net| net.cidr().contains(peer))
    })
}
