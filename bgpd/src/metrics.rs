//! Prometheus metrics: the speaker's status ([`BgpStatus`]) as families, asked for at each scrape. The names are
//! listed in `docs/metrics-bgp.md`, which a test compares with [`NAMES`].

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cali_control::status::{
    BgpRequest, BgpResponse, BgpStatus, MessageCounts, PeerStatus, SessionState,
};
use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Result};
use tracing::warn;

use crate::speaker::Speaker;

/// How long a scrape waits for the speaker.
const LIMIT: Duration = Duration::from_secs(2);

/// Labels of what is told per peer.
const PEER: [&str; 3] = ["peer", "name", "type"];

/// Every metric: name, further labels, what it says.
pub const NAMES: &[(&str, &str, &str)] = &[
    ("bgp_peers", "state", "Neighbors by state of their session"),
    (
        "bgp_peer_up",
        "peer name type",
        "1 while the session with a neighbor is established",
    ),
    (
        "bgp_peer_state_since_seconds",
        "peer name type",
        "When the session reached its state, as a Unix time",
    ),
    (
        "bgp_peer_established_total",
        "peer name type",
        "Sessions established so far",
    ),
    (
        "bgp_peer_messages_total",
        "peer name type direction message",
        "BGP messages by direction (in, out) and type",
    ),
    (
        "bgp_peer_routes",
        "peer name type family stage",
        "Routes with a neighbor: received, accepted, advertised",
    ),
    (
        "bgp_peer_stale",
        "peer name type",
        "1 while the routes of a neighbor are kept although it is away",
    ),
    (
        "bgp_peer_bfd_up",
        "peer name type",
        "1 while BFD sees the path to a neighbor; only where it is configured",
    ),
    (
        "bgp_table_prefixes",
        "family",
        "Destinations with at least one path",
    ),
    (
        "bgp_originated_routes",
        "family",
        "Routes that start at this node",
    ),
    ("bgp_table_paths", "", "Paths in the table"),
    (
        "bgp_table_attribute_sets",
        "",
        "Distinct sets of path attributes",
    ),
    (
        "bgp_update_groups",
        "",
        "Groups of neighbors that are sent one stream",
    ),
    (
        "bgp_restarting",
        "",
        "1 until the first synchronisation after a start has ended",
    ),
    (
        "bgp_configured_seconds",
        "",
        "When the configuration was last changed, as a Unix time",
    ),
    (
        "bgp_left_out",
        "",
        "Objects that are left out of the configuration",
    ),
];

fn options(name: &str) -> Opts {
    let help = NAMES.iter().find(|(known, ..)| *known == name);
    Opts::new(name, help.map_or("", |(.., help)| help))
}

/// Makes families from rows of labels and values.
struct Families(Vec<MetricFamily>);

impl Families {
    fn gauge<const N: usize>(
        &mut self,
        name: &str,
        labels: &[&str],
        rows: impl IntoIterator<Item = ([String; N], u64)>,
    ) -> Result<()> {
        let vector = IntGaugeVec::new(options(name), labels)?;
        for (values, value) in rows {
            let values = values.each_ref().map(String::as_str);
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            vector.get_metric_with_label_values(&values)?.set(value);
        }
        self.0.extend(vector.collect());
        Ok(())
    }

    fn counter<const N: usize>(
        &mut self,
        name: &str,
        labels: &[&str],
        rows: impl IntoIterator<Item = ([String; N], u64)>,
    ) -> Result<()> {
        let vector = IntCounterVec::new(options(name), labels)?;
        for (values, value) in rows {
            let values = values.each_ref().map(String::as_str);
            vector.get_metric_with_label_values(&values)?.inc_by(value);
        }
        self.0.extend(vector.collect());
        Ok(())
    }

    fn single(&mut self, name: &str, value: u64) -> Result<()> {
        self.gauge::<0>(name, &[], [([], value)])
    }
}

fn labels(peer: &PeerStatus) -> [String; 3] {
    [
        peer.address.to_string(),
        peer.name.clone().unwrap_or_default(),
        peer.kind.as_str().to_owned(),
    ]
}

fn messages(peer: &PeerStatus) -> Vec<([String; 5], u64)> {
    let named = |counts: &MessageCounts| {
        [
            ("open", counts.open),
            ("update", counts.update),
            ("notification", counts.notification),
            ("keepalive", counts.keepalive),
            ("route-refresh", counts.refresh),
        ]
    };
    let both = [("in", &peer.messages_in), ("out", &peer.messages_out)];
    let rows = both.iter().flat_map(|(direction, counts)| {
        named(counts).map(|(message, count)| {
            let [address, name, kind] = labels(peer);
            let values = [
                address,
                name,
                kind,
                (*direction).to_owned(),
                message.to_owned(),
            ];
            (values, count)
        })
    });
    rows.collect()
}

fn routes(peer: &PeerStatus) -> Vec<([String; 5], u64)> {
    let rows = peer.families.iter().flat_map(|family| {
        let stages = [
            ("received", family.received),
            ("accepted", family.accepted),
            ("advertised", family.advertised),
        ];
        stages.map(|(stage, count)| {
            let [address, name, kind] = labels(peer);
            let values = [address, name, kind, family.family.clone(), stage.to_owned()];
            (values, count)
        })
    });
    rows.collect()
}

/// All families for a status.
pub fn families(status: &BgpStatus) -> Result<Vec<MetricFamily>> {
    let peers = &status.peers;
    let each = |value: fn(&PeerStatus) -> u64| peers.iter().map(move |p| (labels(p), value(p)));
    let mut out = Families(Vec::new());
    let states = [
        SessionState::Idle,
        SessionState::Connect,
        SessionState::Active,
        SessionState::OpenSent,
        SessionState::OpenConfirm,
        SessionState::Established,
    ];
    let count = |state: SessionState| {
        let count = peers.iter().filter(|p| p.state == state).count() as u64;
        ([state.as_str().to_owned()], count)
    };
    out.gauge("bgp_peers", &["state"], states.map(count))?;
    out.gauge(
        "bgp_peer_up",
        &PEER,
        each(|p| u64::from(p.state == SessionState::Established)),
    )?;
    out.gauge("bgp_peer_state_since_seconds", &PEER, each(|p| p.since))?;
    out.counter(
        "bgp_peer_established_total",
        &PEER,
        each(|p| p.established_count),
    )?;
    let five = |a, b| [PEER[0], PEER[1], PEER[2], a, b];
    out.counter(
        "bgp_peer_messages_total",
        &five("direction", "message"),
        peers.iter().flat_map(messages),
    )?;
    out.gauge(
        "bgp_peer_routes",
        &five("family", "stage"),
        peers.iter().flat_map(routes),
    )?;
    out.gauge(
        "bgp_peer_stale",
        &PEER,
        each(|p| u64::from(p.restart.is_some())),
    )?;
    let watched = peers.iter().filter_map(|p| {
        let up = p.bfd.as_ref()?.state == "Up";
        Some((labels(p), u64::from(up)))
    });
    out.gauge("bgp_peer_bfd_up", &PEER, watched)?;
    let both = |v4, v6| [(["ipv4".to_owned()], v4), (["ipv6".to_owned()], v6)];
    let prefixes = both(status.prefixes_v4, status.prefixes_v6);
    out.gauge("bgp_table_prefixes", &["family"], prefixes)?;
    let originated = both(status.originated_v4, status.originated_v6);
    out.gauge("bgp_originated_routes", &["family"], originated)?;
    out.single("bgp_table_paths", status.paths)?;
    out.single("bgp_table_attribute_sets", status.attribute_sets)?;
    out.single("bgp_update_groups", status.update_groups)?;
    out.single("bgp_restarting", u64::from(status.restarting))?;
    out.single("bgp_configured_seconds", status.configured_at)?;
    out.single("bgp_left_out", status.notices.len() as u64)?;
    Ok(out.0)
}

/// Asks the speaker at each scrape. Needs the multi-threaded runtime: a scrape waits where it is, for as long as the
/// speaker needs to answer.
#[derive(Clone, Default)]
pub struct Metrics {
    speaker: Arc<OnceLock<Speaker>>,
}

impl Metrics {
    /// From now on there is a speaker. There is one in the life of a process.
    pub fn of(&self, speaker: &Speaker) {
        // A second one cannot be.
        let _ = self.speaker.set(speaker.clone());
    }

    fn ask(&self) -> Option<BgpStatus> {
        let speaker = self.speaker.get()?;
        let question = tokio::time::timeout(LIMIT, speaker.ask(BgpRequest::Status));
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        match tokio::task::block_in_place(|| runtime.block_on(question)) {
            Ok(Ok(BgpResponse::Status(status))) => Some(status),
            _ => {
                warn!("the speaker does not answer: a scrape goes without its metrics");
                None
            }
        }
    }
}

impl Collector for Metrics {
    fn desc(&self) -> Vec<&Desc> {
        Vec::new()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = self.ask().map(|status| families(&status));
        families.and_then(Result::ok).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::{Encoder, TextEncoder};
    use std::collections::BTreeSet;

    fn status() -> BgpStatus {
        let text = r#"{"version":"0","router_id":"10.0.0.1","local_as":64512,"started_at":1,"configured_at":2,
            "prefixes_v4":3,"prefixes_v6":1,"restarting":false,"paths":5,"originated_v4":1,"notices":["BGPPeer x: y"],
            "peers":[{"address":"10.0.0.2","port":179,"name":"node2","kind":"Mesh","remote_as":64512,"local_as":64512,
            "state":"Established","since":7,"info":null,"graceful_restart":false,"hold_time":240,"capabilities":[],
            "received":2,"accepted":1,"advertised":1,"updates_in":1,"updates_out":1,"established_count":3,
            "bfd":{"state":"Up","reason":null,"transmit_ms":300,"detection_ms":900},
            "messages_in":{"open":1,"update":2,"notification":0,"keepalive":9,"refresh":0},
            "families":[{"family":"ipv4","received":2,"accepted":1,"advertised":1}]}]}"#;
        serde_json::from_str(text).unwrap()
    }

    fn text(status: &BgpStatus) -> String {
        let mut out = Vec::new();
        let families = families(status).unwrap();
        TextEncoder::new().encode(&families, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_status_becomes_these_lines() {
        let text = text(&status());
        let who = r#"name="node2",peer="10.0.0.2",type="node-to-node mesh""#;
        for line in [
            r#"bgp_peers{state="Established"} 1"#.to_owned(),
            r#"bgp_table_prefixes{family="ipv4"} 3"#.to_owned(),
            "bgp_left_out 1".to_owned(),
            format!("bgp_peer_up{{{who}}} 1"),
            format!("bgp_peer_established_total{{{who}}} 3"),
        ] {
            assert!(
                text.lines().any(|seen| seen == line),
                "no {line} in\n{text}"
            );
        }
    }

    #[test]
    fn every_name_is_served_and_listed_in_the_documentation() {
        let served: BTreeSet<String> = families(&status())
            .unwrap()
            .iter()
            .map(|family| family.name().to_owned())
            .collect();
        let known: BTreeSet<String> = NAMES.iter().map(|(name, ..)| (*name).to_owned()).collect();
        assert_eq!(served, known);
        let page = include_str!("../../docs/metrics-bgp.md");
        for (name, labels, help) in NAMES {
            let labels: Vec<String> = labels
                .split_whitespace()
                .map(|l| format!("`{l}`"))
                .collect();
            let labels = if labels.is_empty() {
                "–".to_owned()
            } else {
                labels.join(" ")
            };
            let row = format!("| `{name}` | {labels} | {help} |");
            assert!(page.lines().any(|line| line == row), "missing: {row}");
        }
    }
}
