//! `calictl bgp peers`.

use super::{age, or_dash};
use crate::bgp_table::table;
use cali_control::status::{BgpStatus, PeerStatus, SessionState};

const HEADER: [&str; 9] = [
    "NEIGHBOR",
    "NAME",
    "AS",
    "STATE",
    "FOR",
    "RECEIVED",
    "ACCEPTED",
    "ADVERTISED",
    "INFO",
];

/// Why the session is not up, or how its path is watched.
fn info(peer: &PeerStatus) -> String {
    let mut parts: Vec<String> = Vec::new();
    if let Some(restart) = &peer.restart {
        parts.push(match restart.seconds_left {
            Some(left) => format!("restarting, its routes are kept for {left} s"),
            None => "restarting, its routes are kept".to_owned(),
        });
    }
    if peer.state != SessionState::Established {
        let reason = peer.info.clone();
        parts.extend(reason.or_else(|| peer.last_down.as_ref().map(|e| e.what.clone())));
    } else if peer.reflector_client {
        parts.push("our client".to_owned());
    }
    parts.extend(peer.bfd.as_ref().map(|bfd| format!("BFD {}", bfd.state)));
    parts.join("; ")
}

fn row(peer: &PeerStatus, now: u64) -> [String; 9] {
    [
        peer.address.to_string(),
        or_dash(peer.name.as_ref()),
        peer.remote_as.to_string(),
        peer.state.as_str().to_owned(),
        age(peer.since, now),
        peer.received.to_string(),
        peer.accepted.to_string(),
        peer.advertised.to_string(),
        info(peer),
    ]
}

pub(super) fn render(status: &BgpStatus, now: u64) -> String {
    let up = status
        .peers
        .iter()
        .filter(|p| p.state == SessionState::Established);
    let mut text = format!(
        "Router {}, AS {}, running for {}: {} of {} neighbors up\n",
        status.router_id,
        status.local_as,
        age(status.started_at, now),
        up.count(),
        status.peers.len(),
    );
    text.push_str(&format!(
        "{} IPv4 and {} IPv6 prefixes, {} of them from this node, {} paths\n",
        status.prefixes_v4,
        status.prefixes_v6,
        status.originated_v4 + status.originated_v6,
        status.paths,
    ));
    if status.restarting {
        text.push_str(
            "Restarting: waiting for the neighbors' routes before stale ones are removed\n",
        );
    }
    let mut sorted: Vec<&PeerStatus> = status.peers.iter().collect();
    sorted.sort_by_key(|peer| peer.address);
    let rows: Vec<[String; 9]> = sorted.into_iter().map(|peer| row(peer, now)).collect();
    if !rows.is_empty() {
        text.push_str(&table(&HEADER, &rows));
    }
    for notice in &status.notices {
        text.push_str(&format!("Left out: {notice}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::sample;
    use super::*;
    use cali_control::status::{Event, RestartStatus};

    #[test]
    fn all_neighbors_at_a_glance() {
        let down = PeerStatus {
            address: "10.9.9.9".parse().unwrap(),
            name: None,
            state: SessionState::Idle,
            since: 39_940,
            info: Some("no password: secret \"bgp\" has no key \"tor\"".into()),
            received: 0,
            accepted: 0,
            advertised: 0,
            bfd: None,
            ..sample::peer()
        };
        let away = PeerStatus {
            address: "10.0.0.10".parse().unwrap(),
            name: Some("node10".into()),
            state: SessionState::Active,
            since: 39_990,
            last_down: Some(Event {
                at: 39_990,
                what: "connection closed".into(),
            }),
            restart: Some(RestartStatus {
                families: vec!["ipv4".into()],
                seconds_left: Some(110),
            }),
            bfd: None,
            ..sample::peer()
        };
        let status = BgpStatus {
            peers: vec![down, away, sample::peer()],
            notices: vec!["BGPFilter f: does not exist; peers that name it go without it".into()],
            ..sample::status()
        };
        insta::assert_snapshot!(render(&status, 40_000));
    }
}
