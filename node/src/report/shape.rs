//! What the node knows in the words of CalicoNodeStatus. Pure.

use std::net::IpAddr;
use std::time::SystemTime;

use cali_api::v3::{
    BGPDaemonState, BGPDaemonStatus, BGPSessionState, CalicoNodeStatusStatus, NodeAgentStatus,
    NodeBGPStatus, NodePeer, NodePeerType, NodeRoute, NodeRouteOrigin, NodeRouteSource,
    NodeRouteType, NodeRoutesStatus, NodeStatusClass,
};
use cali_control::status::{
    BgpStatus, OwnedRoute, PeerKind, PeerStatus, RouteStatus, SessionState,
};
use cali_datastore::timestamp;

use super::instant;

/// Routes of one family in a report: a datastore is no place for a full table.
const ROUTES: usize = 2000;

/// The classes that are asked for. `bgp` is `None` while no speaker answers.
pub(super) fn status(
    classes: &[NodeStatusClass],
    bgp: Option<&BgpStatus>,
    routes: &[OwnedRoute],
    paths: &[RouteStatus],
    at: SystemTime,
) -> CalicoNodeStatusStatus {
    let mut status = CalicoNodeStatusStatus {
        last_updated: Some(timestamp::format(at)),
        ..CalicoNodeStatusStatus::default()
    };
    for class in classes {
        match class {
            NodeStatusClass::Agent => {
                // One process speaks for both families.
                let agent = agent(bgp);
                status.agent = NodeAgentStatus {
                    bird_v4: agent.clone(),
                    bird_v6: agent,
                };
            }
            NodeStatusClass::BGP => status.bgp = bgp.map(sessions).unwrap_or_default(),
            NodeStatusClass::Routes => {
                let peers = bgp.map_or(&[][..], |bgp| &bgp.peers);
                status.routes = NodeRoutesStatus {
                    routes_v4: of_family(true, routes, paths, peers),
                    routes_v6: of_family(false, routes, paths, peers),
                };
            }
        }
    }
    status
}

fn agent(bgp: Option<&BgpStatus>) -> BGPDaemonStatus {
    let time = |seconds| timestamp::format(instant(seconds));
    match bgp {
        None => BGPDaemonStatus {
            state: Some(BGPDaemonState::NotReady),
            ..BGPDaemonStatus::default()
        },
        Some(bgp) => BGPDaemonStatus {
            state: Some(BGPDaemonState::Ready),
            version: bgp.version.clone(),
            router_id: bgp.router_id.to_string(),
            last_boot_time: time(bgp.started_at),
            last_reconfiguration_time: time(bgp.configured_at),
        },
    }
}

fn sessions(bgp: &BgpStatus) -> NodeBGPStatus {
    let of = |v4: bool| -> Vec<NodePeer> {
        let mut peers: Vec<&PeerStatus> = bgp
            .peers
            .iter()
            .filter(|peer| peer.address.is_ipv4() == v4)
            .collect();
        peers.sort_by_key(|peer| peer.address);
        peers.into_iter().map(peer).collect()
    };
    let (peers_v4, peers_v6) = (of(true), of(false));
    let count = |peers: &[NodePeer], established: bool| {
        let counted = peers
            .iter()
            .filter(|peer| (peer.state == Some(BGPSessionState::Established)) == established);
        u32::try_from(counted.count()).unwrap_or(u32::MAX)
    };
    NodeBGPStatus {
        number_established_v4: count(&peers_v4, true),
        number_not_established_v4: count(&peers_v4, false),
        number_established_v6: count(&peers_v6, true),
        number_not_established_v6: count(&peers_v6, false),
        peers_v4,
        peers_v6,
    }
}

fn peer(peer: &PeerStatus) -> NodePeer {
    NodePeer {
        peer_ip: peer.address.to_string(),
        type_: match peer.kind {
            PeerKind::Mesh => Some(NodePeerType::NodeMesh),
            PeerKind::NodeSpecific => Some(NodePeerType::NodePeer),
            PeerKind::Global => Some(NodePeerType::GlobalPeer),
            // Calico has no word for them.
            PeerKind::LocalWorkload | PeerKind::Static => None,
        },
        state: Some(match peer.state {
            SessionState::Idle => BGPSessionState::Idle,
            SessionState::Connect => BGPSessionState::Connect,
            SessionState::Active => BGPSessionState::Active,
            SessionState::OpenSent => BGPSessionState::OpenSent,
            SessionState::OpenConfirm => BGPSessionState::OpenConfirm,
            SessionState::Established => BGPSessionState::Established,
        }),
        since: timestamp::format(instant(peer.since)),
    }
}

/// What the kernel has, then what BGP knows beside it.
fn of_family(
    v4: bool,
    routes: &[OwnedRoute],
    paths: &[RouteStatus],
    peers: &[PeerStatus],
) -> Vec<NodeRoute> {
    let fib = routes
        .iter()
        .filter(|route| route.programmed && route.prefix.is_v4() == v4)
        .map(|route| in_kernel(route, peers));
    let rib = paths
        .iter()
        .filter(|path| !path.best && !path.multipath && path.prefix.is_v4() == v4)
        .filter_map(|path| beside(path, peers));
    fib.chain(rib).take(ROUTES).collect()
}

fn in_kernel(route: &OwnedRoute, peers: &[PeerStatus]) -> NodeRoute {
    let hop = route.hops.first();
    let gateway = hop.and_then(|hop| hop.gateway);
    NodeRoute {
        type_: Some(NodeRouteType::Fib),
        destination: route.prefix.to_string(),
        gateway: gateway.map_or_else(|| "N/A".to_owned(), |gateway| gateway.to_string()),
        interface: hop.map_or_else(|| "N/A".to_owned(), |hop| hop.device.clone()),
        learned_from: match route.source.as_str() {
            "bgp" => learned(
                route
                    .because
                    .strip_prefix("BGP peer ")
                    .and_then(|peer| peer.parse().ok()),
                peers,
            ),
            // As BIRD calls what is not its own: straight to a workload, set by the node, or put there by Felix.
            "workload" => origin(NodeRouteSource::Direct),
            "block" | "static" => origin(NodeRouteSource::Static),
            _ => origin(NodeRouteSource::Kernel),
        },
    }
}

fn beside(path: &RouteStatus, peers: &[PeerStatus]) -> Option<NodeRoute> {
    Some(NodeRoute {
        type_: Some(NodeRouteType::Rib),
        destination: path.prefix.to_string(),
        gateway: path.next_hop?.to_string(),
        interface: "N/A".to_owned(),
        learned_from: learned(Some(path.peer?), peers),
    })
}

fn origin(source: NodeRouteSource) -> NodeRouteOrigin {
    NodeRouteOrigin {
        source_type: Some(source),
        peer_ip: String::new(),
    }
}

fn learned(from: Option<IpAddr>, peers: &[PeerStatus]) -> NodeRouteOrigin {
    let mesh = peers
        .iter()
        .any(|peer| Some(peer.address) == from && peer.kind == PeerKind::Mesh);
    NodeRouteOrigin {
        source_type: Some(if mesh {
            NodeRouteSource::NodeMesh
        } else {
            NodeRouteSource::BGPPeer
        }),
        peer_ip: from.map(|from| from.to_string()).unwrap_or_default(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use cali_control::status::RouteHop;

    use super::*;

    pub(in crate::report) fn bgp() -> BgpStatus {
        let peer = |address: &str, kind: &str, state: &str| {
            serde_json::json!({
                "address": address, "port": 179, "name": null, "kind": kind, "remote_as": 64512, "local_as": 64512,
                "state": state, "since": 1_800_000_000u64, "info": null, "graceful_restart": false, "hold_time": 240,
                "capabilities": [], "received": 0, "accepted": 0, "advertised": 0, "updates_in": 0, "updates_out": 0,
                "established_count": 1
            })
        };
        serde_json::from_value(serde_json::json!({
            "version": "0.1.0", "router_id": "10.0.0.1", "local_as": 64512, "started_at": 1_800_000_000u64,
            "configured_at": 1_800_000_060u64, "prefixes_v4": 1, "prefixes_v6": 0, "restarting": false,
            "peers": [
                peer("10.0.0.2", "Mesh", "Established"),
                peer("10.0.0.9", "Global", "Active"),
                peer("fd00::9", "LocalWorkload", "Idle"),
            ],
        }))
        .unwrap()
    }

    fn route(
        prefix: &str,
        source: &str,
        because: &str,
        hop: Option<(Option<&str>, &str)>,
    ) -> OwnedRoute {
        OwnedRoute {
            prefix: prefix.parse().unwrap(),
            kernel: String::new(),
            source: source.into(),
            because: because.into(),
            programmed: true,
            problem: None,
            hops: hop
                .map(|(gateway, device)| RouteHop {
                    gateway: gateway.map(|gateway| gateway.parse().unwrap()),
                    device: device.into(),
                })
                .into_iter()
                .collect(),
            encapsulation: None,
        }
    }

    #[test]
    fn a_report_has_the_classes_that_are_asked_for() {
        let paths: Vec<RouteStatus> = serde_json::from_value(serde_json::json!([
            {"prefix": "10.0.3.0/26", "next_hop": "10.0.0.9", "peer": "10.0.0.9", "as_path": "", "origin": "IGP",
             "local_pref": null, "med": null, "communities": [], "best": false, "stale": false, "reason": null},
            {"prefix": "10.0.3.0/26", "next_hop": "10.0.0.2", "peer": "10.0.0.2", "as_path": "", "origin": "IGP",
             "local_pref": null, "med": null, "communities": [], "best": true, "stale": false, "reason": null},
        ]))
        .unwrap();
        let routes = [
            route(
                "10.0.1.7/32",
                "workload",
                "WorkloadEndpoint(a/b)",
                Some((None, "cali1")),
            ),
            route("10.0.1.0/26", "block", "IPAMBlock(x)", None),
            route(
                "10.0.3.0/26",
                "bgp",
                "BGP peer 10.0.0.2",
                Some((Some("10.0.0.2"), "eth0")),
            ),
        ];
        let all = [
            NodeStatusClass::Agent,
            NodeStatusClass::BGP,
            NodeStatusClass::Routes,
        ];
        let at = instant(1_800_000_100);
        let status = status(&all, Some(&bgp()), &routes, &paths, at);
        assert_eq!(status.agent.bird_v4.state, Some(BGPDaemonState::Ready));
        assert_eq!(status.agent.bird_v6.router_id, "10.0.0.1");
        let counts = (
            status.bgp.number_established_v4,
            status.bgp.number_not_established_v4,
            status.bgp.number_not_established_v6,
        );
        assert_eq!(counts, (1, 1, 1));
        assert_eq!(status.bgp.peers_v4[0].type_, Some(NodePeerType::NodeMesh));
        assert_eq!(status.bgp.peers_v6[0].type_, None);
        let told: Vec<String> = status
            .routes
            .routes_v4
            .iter()
            .map(|route| {
                let from = &route.learned_from;
                let words = [
                    route.type_.unwrap().as_str(),
                    &route.destination,
                    &route.gateway,
                    &route.interface,
                    from.source_type.unwrap().as_str(),
                    &from.peer_ip,
                ];
                words.join(" ").trim_end().to_owned()
            })
            .collect();
        assert_eq!(
            told,
            [
                "FIB 10.0.1.7/32 N/A cali1 Direct",
                "FIB 10.0.1.0/26 N/A N/A Static",
                "FIB 10.0.3.0/26 10.0.0.2 eth0 NodeMesh 10.0.0.2",
                "RIB 10.0.3.0/26 10.0.0.9 N/A BGPPeer 10.0.0.9",
            ]
        );
        let none = super::status(&[NodeStatusClass::Agent], None, &routes, &paths, at);
        assert_eq!(none.agent.bird_v4.state, Some(BGPDaemonState::NotReady));
        assert!(none.bgp.peers_v4.is_empty() && none.routes.routes_v4.is_empty());
    }
}
