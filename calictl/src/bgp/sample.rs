//! Values for the tests of what people read.

use cali_api::Asn;
use cali_control::status::{
    BfdStatus, BgpStatus, FamilyStatus, MessageCounts, PeerKind, PeerStatus, RouteStatus,
    SessionState,
};

pub(crate) fn peer() -> PeerStatus {
    PeerStatus {
        address: [10, 0, 0, 2].into(),
        port: 179,
        name: Some("node2".into()),
        kind: PeerKind::Mesh,
        remote_as: Asn(64512),
        local_as: Asn(64512),
        state: SessionState::Established,
        since: 33_321,
        info: None,
        graceful_restart: false,
        hold_time: 240,
        capabilities: vec!["route-refresh".into(), "graceful-restart(120s)".into()],
        received: 3,
        accepted: 2,
        advertised: 1,
        updates_in: 5,
        updates_out: 4,
        established_count: 1,
        bfd: Some(BfdStatus {
            state: "Up".into(),
            reason: None,
            transmit_ms: 300,
            detection_ms: 900,
        }),
        local_address: Some([10, 0, 0, 1].into()),
        router_id: Some([10, 0, 0, 2].into()),
        last_error: None,
        last_down: None,
        messages_in: MessageCounts {
            open: 1,
            update: 5,
            keepalive: 84,
            ..MessageCounts::default()
        },
        messages_out: MessageCounts {
            open: 1,
            update: 4,
            keepalive: 85,
            refresh: 1,
            ..MessageCounts::default()
        },
        restart: None,
        families: vec![FamilyStatus {
            family: "ipv4".into(),
            received: 3,
            accepted: 2,
            advertised: 1,
        }],
        password: false,
        ttl_hops: None,
        reflector_client: false,
    }
}

pub(crate) fn status() -> BgpStatus {
    BgpStatus {
        version: "0".into(),
        router_id: [10, 0, 0, 1].into(),
        local_as: Asn(64512),
        started_at: 30_000,
        configured_at: 30_000,
        peers: vec![],
        prefixes_v4: 3,
        prefixes_v6: 0,
        restarting: false,
        notices: vec![],
        originated_v4: 1,
        originated_v6: 0,
        paths: 4,
        attribute_sets: 2,
        update_groups: 1,
    }
}

pub(crate) fn route(prefix: &str) -> RouteStatus {
    RouteStatus {
        prefix: prefix.parse().unwrap(),
        next_hop: Some([10, 0, 0, 2].into()),
        peer: Some([10, 0, 0, 2].into()),
        as_path: "64513".into(),
        origin: "igp".into(),
        local_pref: Some(100),
        med: None,
        communities: vec!["64512:1".into()],
        best: true,
        stale: false,
        multipath: false,
        local: None,
        reason: None,
    }
}
