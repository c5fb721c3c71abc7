//! The table of BGP peers, in the form that `calicoctl node status` made familiar.

use crate::bgp::age;
use cali_api::v3::{BGPSessionState, NodeBGPStatus, NodePeer, NodePeerType};
use cali_control::status::{BgpStatus, PeerKind, PeerStatus, SessionState};
use std::net::IpAddr;

const HEADER: [&str; 5] = ["PEER ADDRESS", "PEER TYPE", "STATE", "SINCE", "INFO"];
const WIDE: [&str; 11] = [
    "PEER ADDRESS",
    "PEER TYPE",
    "STATE",
    "SINCE",
    "NAME",
    "AS",
    "UPTIME",
    "BFD",
    "RECEIVED / ACCEPTED",
    "ADVERTISED",
    "INFO",
];

/// Both families, each as a table or the words that there is no peer.
pub(crate) fn render(status: &BgpStatus, now: u64, wide: bool) -> String {
    let mut text = String::new();
    for (family, is_v4) in [("IPv4", true), ("IPv6", false)] {
        text.push_str(&format!("{family} BGP status\n"));
        let mut peers: Vec<&PeerStatus> = status
            .peers
            .iter()
            .filter(|peer| matches!(peer.address, IpAddr::V4(_)) == is_v4)
            .collect();
        peers.sort_by_key(|peer| (peer.kind, peer.address));
        if peers.is_empty() {
            text.push_str(&format!("No {family} peers found.\n\n"));
        } else {
            let rows: Vec<[String; 5]> = peers.iter().map(|peer| row(peer, now)).collect();
            text.push_str(&if wide {
                let rows: Vec<[String; 11]> = peers
                    .iter()
                    .zip(rows)
                    .map(|(peer, row)| wide_row(peer, row, now))
                    .collect();
                table(&WIDE, &rows)
            } else {
                table(&HEADER, &rows)
            });
            text.push('\n');
        }
    }
    text
}

fn row(peer: &PeerStatus, now: u64) -> [String; 5] {
    let state = match peer.state {
        SessionState::Established => "up",
        SessionState::Idle if peer.info.is_some() => "down",
        _ => "start",
    };
    let info = match &peer.info {
        Some(info) if peer.state != SessionState::Established => {
            format!("{} {info}", peer.state.as_str())
        }
        _ => peer.state.as_str().to_owned(),
    };
    [
        peer.address.to_string(),
        peer.kind.as_str().to_owned(),
        state.to_owned(),
        since(peer.since, now),
        info,
    ]
}

/// The same of a CalicoNodeStatus, which says less.
pub(crate) fn render_reported(status: &NodeBGPStatus) -> String {
    let mut text = String::new();
    for (family, peers) in [("IPv4", &status.peers_v4), ("IPv6", &status.peers_v6)] {
        text.push_str(&format!("{family} BGP status\n"));
        let rows: Vec<[String; 5]> = peers.iter().map(reported_row).collect();
        text.push_str(&if rows.is_empty() {
            format!("No {family} peers found.\n")
        } else {
            table(&HEADER, &rows)
        });
        text.push('\n');
    }
    text
}

fn reported_row(peer: &NodePeer) -> [String; 5] {
    let kind = match peer.type_ {
        Some(NodePeerType::NodeMesh) => PeerKind::Mesh.as_str(),
        Some(NodePeerType::NodePeer) => PeerKind::NodeSpecific.as_str(),
        Some(NodePeerType::GlobalPeer) => PeerKind::Global.as_str(),
        None => "-",
    };
    let state = match peer.state {
        Some(BGPSessionState::Established) => "up",
        Some(BGPSessionState::Idle | BGPSessionState::Close) => "down",
        _ => "start",
    };
    [
        peer.peer_ip.clone(),
        kind.to_owned(),
        state.to_owned(),
        peer.since.clone(),
        peer.state
            .map_or_else(String::new, |state| state.to_string()),
    ]
}

/// The familiar columns, and before the last of them how the session fares.
fn wide_row(peer: &PeerStatus, narrow: [String; 5], now: u64) -> [String; 11] {
    let [address, kind, state, at, info] = narrow;
    let established = peer.state == SessionState::Established;
    let dash = || "-".to_owned();
    let bfd = peer.bfd.as_ref().map(|bfd| match &bfd.reason {
        Some(reason) if bfd.state != "Up" => format!("{} ({reason})", bfd.state),
        _ => bfd.state.clone(),
    });
    [
        address,
        kind,
        state,
        at,
        peer.name.clone().unwrap_or_else(dash),
        peer.remote_as.to_string(),
        if established {
            age(peer.since, now)
        } else {
            dash()
        },
        bfd.unwrap_or_else(dash),
        format!("{} / {}", peer.received, peer.accepted),
        peer.advertised.to_string(),
        info,
    ]
}

/// The time of day within a day (as BIRD prints it), the date before that; both in UTC.
pub(crate) fn since(at: u64, now: u64) -> String {
    if now.saturating_sub(at) < 24 * 3600 {
        let second = at % 86_400;
        return format!(
            "{:02}:{:02}:{:02}",
            second / 3600,
            second / 60 % 60,
            second % 60
        );
    }
    let (year, month, day) = date(at / 86_400);
    format!("{year:04}-{month:02}-{day:02}")
}

/// Days since 1970-01-01 to a date of the Gregorian calendar (Hinnant, "chrono-compatible low-level date algorithms").
fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * day_of_year + 2) / 153;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day_of_year - (153 * month_index + 2) / 5 + 1)
}

/// ASCII borders, centred headings, cells to the left.
pub(crate) fn table<R: AsRef<[String]>>(header: &[&str], rows: &[R]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|name| name.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row.as_ref()) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let border: String = widths
        .iter()
        .map(|width| format!("+{}", "-".repeat(width + 2)))
        .collect::<String>()
        + "+\n";
    let mut text = border.clone();
    for (width, cell) in widths.iter().zip(header) {
        text.push_str(&format!("| {cell:^width$} "));
    }
    text.push_str("|\n");
    text.push_str(&border);
    for row in rows {
        for (width, cell) in widths.iter().zip(row.as_ref()) {
            text.push_str(&format!("| {cell:<width$} "));
        }
        text.push_str("|\n");
    }
    text.push_str(&border);
    text
}

/// The same without the columns that are empty in every row.
pub(crate) fn table_of_used<const N: usize>(header: &[&str; N], rows: &[[String; N]]) -> String {
    let used: Vec<usize> = (0..N)
        .filter(|column| rows.iter().any(|row| !row[*column].is_empty()))
        .collect();
    let header: Vec<&str> = used.iter().map(|column| header[*column]).collect();
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|row| used.iter().map(|column| row[*column].clone()).collect())
        .collect();
    table(&header, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::Asn;

    fn peer(address: &str, kind: PeerKind, state: SessionState, info: Option<&str>) -> PeerStatus {
        PeerStatus {
            address: address.parse().unwrap(),
            port: 179,
            name: None,
            kind,
            remote_as: Asn(64512),
            local_as: Asn(64512),
            state,
            since: 33_321,
            info: info.map(str::to_owned),
            graceful_restart: false,
            hold_time: 240,
            capabilities: vec![],
            received: 0,
            accepted: 0,
            advertised: 0,
            updates_in: 0,
            updates_out: 0,
            established_count: 0,
            bfd: None,
            ..crate::bgp::sample::peer()
        }
    }

    #[test]
    fn the_table_is_the_one_that_scripts_know() {
        let status = BgpStatus {
            version: "0".into(),
            router_id: [10, 0, 0, 1].into(),
            local_as: Asn(64512),
            started_at: 0,
            configured_at: 0,
            peers: vec![
                peer(
                    "10.9.9.9",
                    PeerKind::Global,
                    SessionState::Idle,
                    Some("password secret bgp/pw is missing"),
                ),
                peer("10.1.2.3", PeerKind::Mesh, SessionState::Established, None),
            ],
            prefixes_v4: 0,
            prefixes_v6: 0,
            restarting: false,
            ..crate::bgp::sample::status()
        };
        let expected = "\
IPv4 BGP status
+--------------+-------------------+-------+----------+----------------------------------------+
| PEER ADDRESS |     PEER TYPE     | STATE |  SINCE   |                  INFO                  |
+--------------+-------------------+-------+----------+----------------------------------------+
| 10.1.2.3     | node-to-node mesh | up    | 09:15:21 | Established                            |
| 10.9.9.9     | global            | down  | 09:15:21 | Idle password secret bgp/pw is missing |
+--------------+-------------------+-------+----------+----------------------------------------+

IPv6 BGP status
No IPv6 peers found.

";
        assert_eq!(render(&status, 40_000, false), expected);
    }

    #[test]
    fn more_columns_say_how_each_session_fares() {
        let status = BgpStatus {
            peers: vec![
                crate::bgp::sample::peer(),
                peer(
                    "10.9.9.9",
                    PeerKind::Global,
                    SessionState::Active,
                    Some("connection refused"),
                ),
            ],
            ..crate::bgp::sample::status()
        };
        insta::assert_snapshot!(render(&status, 40_000, true));
    }

    #[test]
    fn an_older_change_shows_its_date() {
        assert_eq!(since(951_782_400, 1_800_000_000), "2000-02-29");
        assert_eq!(since(1_795_132_800, 1_800_000_000), "2026-11-20");
    }
}
