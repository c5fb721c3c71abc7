//! Which neighbours a node has: the mesh, BGPPeers that select it, and BGPPeers whose peers it is (reverse
//! peering).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use cali_api::Cidr;
use cali_api::selector::Selector;
use cali_api::v3::{
    BGPPassword, BGPPeerSpec, NextHopMode as ApiNextHopMode, ReversePeering, SourceAddress,
};
use cali_control::status::PeerKind as Origin;

use super::policy::Policies;
use super::{HostRules, Local, NodeView, Resources, prefix};
use crate::rib::NextHopMode;
use crate::speaker::settings::{Exchange, Neighbour, SessionSettings};
use crate::transport::Protection;
use crate::wire::{AddPathMode, FamilySet};

/// What is needed to make neighbours of this node.
struct Maker<'a> {
    resources: &'a Resources,
    local: &'a Local,
    node: &'a NodeView,
    router_id: Ipv4Addr,
    local_as: u32,
    policies: &'a Policies<'a>,
}

/// A neighbour before it has policies and passwords.
struct Plan<'a> {
    address: IpAddr,
    port: u16,
    remote_as: u32,
    name: Option<String>,
    /// The neighbour, if it is a node of the cluster.
    node: Option<&'a NodeView>,
    /// A workload of this node.
    workload: bool,
    /// The BGPPeer is written for the other side: what it says of addresses and AS numbers is theirs.
    reversed: bool,
}

fn selects(selector: &str, labels: &cali_api::StringMap) -> Result<bool, String> {
    Selector::parse(selector)
        .map(|s| s.matches(labels))
        .map_err(|e| e.to_string())
}

pub(super) fn neighbours(
    resources: &Resources,
    local: &Local,
    router_id: Ipv4Addr,
    local_as: u32,
    policies: &Policies<'_>,
    host: &mut HostRules,
) -> BTreeMap<IpAddr, Neighbour> {
    let Some(node) = resources.nodes.get(&local.node) else {
        return BTreeMap::new();
    };
    let maker = Maker {
        resources,
        local,
        node,
        router_id,
        local_as,
        policies,
    };
    let mut out = BTreeMap::new();
    maker.mesh(&mut out, host);
    // Two passes, global ones first; an address that they name is not repeated by a narrower one.
    for global in [true, false] {
        for (name, spec) in &resources.peers {
            if (spec.node.is_empty() && spec.node_selector.is_empty()) == global {
                maker.explicit(name, spec, &mut out, host);
            }
        }
    }
    out
}

impl<'a> Maker<'a> {
    fn mesh(&self, out: &mut BTreeMap<IpAddr, Neighbour>, host: &mut HostRules) {
        let configuration = self.resources.configuration();
        if !configuration.mesh_enabled() || self.node.cluster_id().is_some() {
            return;
        }
        for (name, peer) in &self.resources.nodes {
            if *name == self.local.node || peer.cluster_id().is_some() {
                continue;
            }
            for plan in self.plans_of_node(name, peer) {
                let mut neighbour = self.neighbour(&plan, Origin::Mesh, &[], host);
                self.password(
                    &mut neighbour,
                    configuration.node_mesh_password.as_ref(),
                    host,
                );
                if let Some(time) = configuration.node_mesh_max_restart_time {
                    neighbour.session.restart_time = seconds(time.0);
                }
                out.insert(plan.address, neighbour);
            }
        }
    }

    /// The addresses of another node in the families that we have as well.
    fn plans_of_node<'b>(&self, name: &str, peer: &'b NodeView) -> Vec<Plan<'b>> {
        let shared = peer
            .addresses()
            .filter(|a| self.node.address(a.is_ipv4()).is_some());
        shared
            .map(|address| Plan {
                address,
                port: self.resources.listen_port(name),
                remote_as: peer
                    .asn()
                    .unwrap_or(self.resources.configuration().default_asn().0),
                name: Some(name.to_owned()),
                node: Some(peer),
                workload: false,
                reversed: false,
            })
            .collect()
    }

    fn explicit(
        &self,
        name: &str,
        spec: &BGPPeerSpec,
        out: &mut BTreeMap<IpAddr, Neighbour>,
        host: &mut HostRules,
    ) {
        let plans = match self.plan(name, spec, host) {
            Ok(plans) => plans,
            Err(reason) => return host.notice(format!("BGPPeer {name}"), reason),
        };
        for plan in plans {
            let origin = if plan.workload {
                Origin::LocalWorkload
            } else if spec.node.is_empty() && spec.node_selector.is_empty() {
                Origin::Global
            } else {
                Origin::NodeSpecific
            };
            let taken = out
                .get(&plan.address)
                .is_some_and(|n| n.origin != Origin::Mesh && n.session.port == plan.port);
            if taken || self.node.addresses().any(|own| own == plan.address) {
                continue;
            }
            let mut neighbour = self.neighbour(&plan, origin, &spec.filters, host);
            self.apply(&mut neighbour, &plan, spec);
            self.password(&mut neighbour, spec.password.as_ref(), host);
            out.insert(plan.address, neighbour);
            let gateway = spec.reachable_by.filter(|_| !plan.reversed);
            if let (Some(gateway), Some(to)) = (gateway, prefix(&Cidr::host(plan.address))) {
                host.static_routes.insert(to, gateway);
            }
        }
    }

    /// The neighbours that a BGPPeer gives this node, from either side.
    fn plan(
        &self,
        name: &str,
        spec: &BGPPeerSpec,
        host: &mut HostRules,
    ) -> Result<Vec<Plan<'a>>, String> {
        let mut plans = Vec::new();
        if !spec.local_workload_selector.is_empty() {
            if self.has_peer(&self.local.node, self.node, spec)? {
                plans.extend(self.workloads(name, spec, host)?);
            }
            return Ok(plans);
        }
        if self.has_peer(&self.local.node, self.node, spec)? {
            plans.extend(self.forward(spec)?);
        }
        // Reverse: we are the peer of those nodes that the BGPPeer selects.
        if spec.reverse_peering != Some(ReversePeering::Manual) && self.is_peer(spec)? {
            for (name, other) in &self.resources.nodes {
                if *name != self.local.node && self.has_peer(name, other, spec)? {
                    let theirs = self.plans_of_node(name, other).into_iter().filter(|p| {
                        spec.peer_ip
                            .is_none_or(|ip| ip.ip.is_ipv4() == p.address.is_ipv4())
                    });
                    plans.extend(theirs.map(|plan| Plan {
                        remote_as: presented(spec, plan.remote_as),
                        reversed: true,
                        ..plan
                    }));
                }
            }
        }
        Ok(plans)
    }

    /// Whether a node is one of those that have this peer.
    fn has_peer(&self, name: &str, node: &NodeView, spec: &BGPPeerSpec) -> Result<bool, String> {
        if !spec.node.is_empty() {
            return Ok(spec.node == name);
        }
        if !spec.node_selector.is_empty() {
            return selects(&spec.node_selector, &node.labels);
        }
        Ok(true)
    }

    /// Whether our node is what this BGPPeer peers with.
    fn is_peer(&self, spec: &BGPPeerSpec) -> Result<bool, String> {
        if !spec.peer_selector.is_empty() {
            return selects(&spec.peer_selector, &self.node.labels);
        }
        let port = self.resources.listen_port(&self.local.node);
        Ok(spec.peer_ip.is_some_and(|peer| {
            self.node.addresses().any(|own| own == peer.ip) && peer.port.is_none_or(|p| p == port)
        }) && spec.as_number.is_some_and(|a| a.0 == self.local_as))
    }

    /// Workloads of this node as peers: they dial, from addresses of their own.
    fn workloads(
        &self,
        name: &str,
        spec: &BGPPeerSpec,
        host: &mut HostRules,
    ) -> Result<Vec<Plan<'a>>, String> {
        let Some(remote_as) = spec.as_number else {
            return Err("has localWorkloadSelector but no asNumber".to_owned());
        };
        let configuration = self.resources.configuration();
        let mut plans = Vec::new();
        let workloads = &self.resources.workloads;
        for (workload, view) in workloads.iter().filter(|(_, w)| w.node == self.local.node) {
            if !selects(&spec.local_workload_selector, &view.labels)? {
                continue;
            }
            for address in &view.addresses {
                let (field, peering) = if address.is_ipv4() {
                    (
                        "localWorkloadPeeringIPV4",
                        configuration.local_workload_peering_ip_v4,
                    )
                } else {
                    (
                        "localWorkloadPeeringIPV6",
                        configuration.local_workload_peering_ip_v6,
                    )
                };
                if peering.is_none() {
                    host.notice(
                        format!("BGPPeer {name}"),
                        format!("BGPConfiguration default has no {field}: workloads have no address to peer with but the node's own"),
                    );
                }
                plans.push(Plan {
                    address: *address,
                    port: 179,
                    remote_as: remote_as.0,
                    name: Some(workload.clone()),
                    node: None,
                    workload: true,
                    reversed: false,
                });
            }
        }
        Ok(plans)
    }

    fn forward(&self, spec: &BGPPeerSpec) -> Result<Vec<Plan<'a>>, String> {
        if !spec.peer_selector.is_empty() {
            let mut plans = Vec::new();
            // Where both ends are selected, either way, both present the BGPPeer's AS number.
            let mutual = self.is_peer(spec)?;
            for (name, other) in &self.resources.nodes {
                if *name == self.local.node || !selects(&spec.peer_selector, &other.labels)? {
                    continue;
                }
                let mutual = mutual && self.has_peer(name, other, spec)?;
                plans.extend(
                    self.plans_of_node(name, other)
                        .into_iter()
                        .map(|plan| Plan {
                            remote_as: if mutual {
                                presented(spec, plan.remote_as)
                            } else {
                                plan.remote_as
                            },
                            ..plan
                        }),
                );
            }
            return Ok(plans);
        }
        let Some(peer) = spec.peer_ip else {
            return Err("has neither peerIP nor peerSelector".to_owned());
        };
        if self.node.address(peer.ip.is_ipv4()).is_none() {
            return Ok(Vec::new());
        }
        let known = self
            .resources
            .nodes
            .iter()
            .find(|(_, n)| n.addresses().any(|a| a == peer.ip));
        let port = peer
            .port
            .unwrap_or_else(|| known.map_or(179, |(name, _)| self.resources.listen_port(name)));
        let Some(remote_as) = spec.as_number else {
            return Err("has peerIP but no asNumber".to_owned());
        };
        Ok(vec![Plan {
            address: peer.ip,
            port,
            remote_as: remote_as.0,
            name: known.map(|(name, _)| name.clone()),
            node: known.map(|(_, node)| node),
            workload: false,
            reversed: false,
        }])
    }

    fn neighbour(
        &self,
        plan: &Plan<'_>,
        origin: Origin,
        filters: &[String],
        host: &mut HostRules,
    ) -> Neighbour {
        let v4 = plan.address.is_ipv4();
        let mut session = SessionSettings::new(self.local_as, self.router_id, Some(plan.remote_as));
        session.port = plan.port;
        session.source = self.node.address(v4).filter(|_| !plan.workload);
        session.passive = plan.workload;
        // Several paths reach a node through a route reflector (Calico's `add paths on`).
        session.add_path = AddPathMode::BOTH;
        session.families = if v4 { FamilySet::IPV4 } else { FamilySet::IPV6 };
        let import = self.policies.import(filters, v4, host);
        let export = self.policies.export(filters, v4, host);
        Neighbour {
            name: plan.name.clone(),
            origin,
            session,
            exchange: Exchange::new(import, export),
        }
    }

    /// The fields of a BGPPeer that shape the session and the exchange.
    fn apply(&self, neighbour: &mut Neighbour, plan: &Plan<'_>, spec: &BGPPeerSpec) {
        let session = &mut neighbour.session;
        if !plan.reversed {
            session.local_as = presented(spec, self.local_as);
        }
        session.protection.ttl_hops = spec.ttl_security.filter(|hops| *hops > 0);
        if spec.source_address == Some(SourceAddress::None) {
            session.source = None;
        }
        if let Some(time) = spec.max_restart_time {
            session.restart_time = seconds(time.0);
        }
        if let Some(time) = spec.keepalive_time {
            session.keepalive = Some(seconds(time.0).max(1));
        }
        let external = session.local_as != plan.remote_as;
        let exchange = &mut neighbour.exchange;
        exchange.next_hop = match spec.next_hop_mode {
            Some(ApiNextHopMode::Own) => NextHopMode::SelfAddress,
            Some(ApiNextHopMode::Keep) => NextHopMode::Keep,
            Some(ApiNextHopMode::Auto) | None if spec.keep_original_next_hop && external => {
                NextHopMode::Keep
            }
            Some(ApiNextHopMode::Auto) | None => NextHopMode::Auto,
        };
        exchange.allow_own_as = spec
            .num_allowed_local_as_numbers
            .map_or(0, |n| u8::try_from(n).unwrap_or(u8::MAX));
        let theirs = plan.node.and_then(NodeView::cluster_id);
        exchange.reflector_client = self
            .node
            .cluster_id()
            .filter(|own| !external && theirs != Some(*own));
    }

    /// A password that is not there blocks the session: it must not run unprotected.
    fn password(
        &self,
        neighbour: &mut Neighbour,
        wanted: Option<&BGPPassword>,
        host: &mut HostRules,
    ) {
        let Some(secret) = wanted.and_then(|p| p.secret_key_ref.as_ref()) else {
            return;
        };
        let of = (secret.name.clone(), secret.key.clone());
        let password = self.local.passwords.get(&of);
        host.secrets.insert(of);
        match password {
            Some(password) => {
                neighbour.session.protection = Protection {
                    password: Some(password.clone()),
                    ..neighbour.session.protection.clone()
                };
            }
            None => {
                neighbour.session.blocked = Some(format!(
                    "no password: secret {:?} has no key {:?}",
                    secret.name, secret.key
                ));
            }
        }
    }
}

/// The AS number that the nodes which a BGPPeer is written for present (`localASNumber`).
fn presented(spec: &BGPPeerSpec, otherwise: u32) -> u32 {
    spec.local_as_number.map_or(otherwise, |asn| asn.0)
}

fn seconds(duration: Duration) -> u16 {
    u16::try_from(duration.as_secs()).unwrap_or(u16::MAX)
}
