//! What the nodes have reported, and what follows from two reports. No I/O, no clock: times are seconds since the epoch.

use std::collections::BTreeMap;
use std::time::Duration;

use cali_control::status::{NodeReport, SessionState};

/// Reports that may be missed until a node counts as silent.
const MISSED: u64 = 3;

/// Which node comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The one with the most to worry about.
    Trouble,
    Name,
    /// The one that denies the most.
    Denied,
}

impl Order {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Trouble => "trouble",
            Self::Name => "name",
            Self::Denied => "denied packets",
        }
    }
}

#[derive(Debug)]
pub(super) struct Model {
    nodes: BTreeMap<String, Node>,
    interval: Duration,
    /// When the nodes were asked first.
    asked: u64,
    pub(super) order: Order,
    /// The first row that is shown.
    pub(super) first: usize,
}

#[derive(Debug, Default)]
struct Node {
    last: Option<(NodeReport, u64)>,
    /// Denied packets per second between the last two reports.
    denied: Option<f64>,
    silence: Option<String>,
}

/// A node as it is shown.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) state: State,
    pub(super) version: String,
    /// Seconds.
    pub(super) up: Option<u64>,
    /// Sessions that are up, of how many; `None` without BGP.
    pub(super) sessions: Option<(usize, usize)>,
    pub(super) endpoints: u64,
    pub(super) routes: u64,
    /// Packets that were denied per second, and in all.
    pub(super) denied: (Option<f64>, Option<u64>),
    /// Milliseconds: half of the changes, and 99 of 100, took no longer.
    pub(super) latency: Option<[f64; 2]>,
    pub(super) troubles: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    /// It has not reported, or not for some time.
    Silent,
    NotReady,
    /// It is waited for.
    Asked,
    Ready,
}

impl Model {
    pub(super) fn of(nodes: &[String], interval: Duration, now: u64) -> Self {
        Self {
            nodes: nodes
                .iter()
                .map(|name| (name.clone(), Node::default()))
                .collect(),
            interval,
            asked: now,
            order: Order::Trouble,
            first: 0,
        }
    }

    pub(super) fn on_report(&mut self, name: &str, report: NodeReport, now: u64) {
        let node = self.nodes.entry(name.to_owned()).or_default();
        if let Some((before, at)) = &node.last {
            let counts = (before.figures.denied_packets, report.figures.denied_packets);
            node.denied = match counts {
                // A counter that has fallen was started again with its rule: nothing can be said.
                (Some(before), Some(after)) if after >= before && now > *at => {
                    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
                    let rate = (after - before) as f64 / (now - at) as f64;
                    Some(rate)
                }
                _ => None,
            };
        }
        node.last = Some((report, now));
        node.silence = None;
    }

    pub(super) fn on_silence(&mut self, name: &str, reason: String) {
        self.nodes.entry(name.to_owned()).or_default().silence = Some(reason);
    }

    pub(super) fn sort_otherwise(&mut self) {
        self.order = match self.order {
            Order::Trouble => Order::Name,
            Order::Name => Order::Denied,
            Order::Denied => Order::Trouble,
        };
        self.first = 0;
    }

    pub(super) fn scroll(&mut self, by: isize) {
        let last = self.nodes.len().saturating_sub(1);
        self.first = self.first.saturating_add_signed(by).min(last);
    }

    /// The nodes in their order.
    pub(super) fn rows(&self, now: u64) -> Vec<Row> {
        let late = self.interval.as_secs() * MISSED + 5;
        let mut rows: Vec<Row> = self
            .nodes
            .iter()
            .map(|(name, node)| node.row(name, now, late, self.asked))
            .collect();
        // Equal ones keep the order of their names.
        match self.order {
            Order::Name => {}
            Order::Trouble => {
                rows.sort_by(|a, b| (a.state, b.troubles.len()).cmp(&(b.state, a.troubles.len())))
            }
            Order::Denied => rows.sort_by(|a, b| {
                let rate = |row: &Row| row.denied.0.unwrap_or(-1.0);
                rate(b)
                    .total_cmp(&rate(a))
                    .then(b.denied.1.cmp(&a.denied.1))
            }),
        }
        rows
    }
}

impl Node {
    fn row(&self, name: &str, now: u64, late: u64, asked: u64) -> Row {
        let mut row = Row {
            name: name.to_owned(),
            state: State::Asked,
            version: String::new(),
            up: None,
            sessions: None,
            endpoints: 0,
            routes: 0,
            denied: (self.denied, None),
            latency: None,
            troubles: Vec::new(),
        };
        if let Some(reason) = &self.silence {
            row.state = State::Silent;
            row.troubles.push(reason.clone());
        }
        let Some((report, at)) = &self.last else {
            let waited = now.saturating_sub(asked);
            if row.state == State::Asked && waited > late {
                row.state = State::Silent;
                row.troubles.push(format!(
                    "no answer for {waited} s: cali-node does not run there, or does not reach the datastore"
                ));
            }
            return row;
        };
        let (node, figures) = (&report.node, &report.figures);
        row.version.clone_from(&node.version);
        row.up = Some(now.saturating_sub(node.started_at));
        row.endpoints = figures.endpoints;
        row.routes = figures.routes;
        row.denied.1 = figures.denied_packets;
        row.latency = figures.policy_latency_ms;
        let age = now.saturating_sub(*at);
        row.state = if age > late {
            row.troubles.push(format!("has not reported for {age} s"));
            State::Silent
        } else if node.readiness.iter().all(|part| part.ready) {
            State::Ready
        } else {
            State::NotReady
        };
        for part in node.readiness.iter().filter(|part| !part.ready) {
            let reason = part.reason.as_deref().unwrap_or("not ready");
            row.troubles.push(format!("{}: {reason}", part.part));
        }
        if let Some(bgp) = &report.bgp {
            let down = |peer: &&_| !is_up(peer);
            row.sessions = Some((
                bgp.peers.iter().filter(|peer| is_up(peer)).count(),
                bgp.peers.len(),
            ));
            for peer in bgp.peers.iter().filter(down) {
                let who = peer
                    .name
                    .as_deref()
                    .map_or_else(String::new, |name| format!(" ({name})"));
                let why = peer
                    .info
                    .clone()
                    .or_else(|| peer.last_down.as_ref().map(|down| down.what.clone()))
                    .map_or_else(String::new, |why| format!(": {why}"));
                row.troubles.push(format!(
                    "session with {}{who} is {}{why}",
                    peer.address,
                    peer.state.as_str()
                ));
            }
        }
        for object in &node.quarantined {
            row.troubles
                .push(format!("{}: {}", object.object, object.reason));
        }
        row.troubles.extend(node.notices.iter().cloned());
        row
    }
}

fn is_up(peer: &cali_control::status::PeerStatus) -> bool {
    peer.state == SessionState::Established
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bgp::sample;
    use cali_control::status::{Figures, NodeStatus, PeerStatus, Readiness};

    fn report(node: &str, ready: bool, denied: u64) -> NodeReport {
        NodeReport {
            node: NodeStatus {
                node: node.into(),
                version: "0.1.0".into(),
                pid: 1,
                started_at: 1000,
                ipv4: None,
                ipv6: None,
                readiness: vec![Readiness {
                    part: "policy".into(),
                    ready,
                    reason: (!ready).then(|| "not in sync".into()),
                }],
                quarantined: Vec::new(),
                notices: Vec::new(),
                bgpd_pid: None,
            },
            bgp: Some(sample::status()),
            figures: Figures {
                policy_changes: 7,
                policy_latency_ms: Some([2.0, 50.0]),
                denied_packets: Some(denied),
                flows_ended: 0,
                endpoints: 30,
                routes: 120,
            },
            routes: None,
        }
    }

    /// Four nodes: well, with a session down, not ready, and silent.
    pub(in crate::top) fn sample() -> Model {
        let names = ["n1", "n2", "n3", "n4"].map(str::to_owned);
        let mut model = Model::of(&names, Duration::from_secs(3), 4590);
        model.on_report("n1", report("n1", true, 100), 4600);
        model.on_report("n1", report("n1", true, 160), 4603);
        let mut down = report("n2", true, 0);
        if let Some(bgp) = &mut down.bgp {
            bgp.peers.push(PeerStatus {
                address: [10, 0, 0, 9].into(),
                name: None,
                state: SessionState::Active,
                info: Some("connection refused".into()),
                ..sample::peer()
            });
        }
        model.on_report("n2", down, 4603);
        model.on_report("n3", report("n3", false, 0), 4603);
        model.on_silence("n4", "it cannot be asked: forbidden".into());
        model
    }

    #[test]
    fn rates_come_from_two_reports_and_trouble_comes_first() {
        let mut model = sample();
        let names = |model: &Model, now| {
            let rows = model.rows(now);
            rows.into_iter().map(|row| row.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&model, 4604), ["n4", "n3", "n2", "n1"]);
        let rows = model.rows(4604);
        assert_eq!(rows[3].denied, (Some(20.0), Some(160)));
        assert_eq!(rows[1].troubles, ["policy: not in sync"]);
        let (up, all) = rows[2].sessions.expect("sessions");
        assert_eq!(all - up, 1);
        assert!(rows[2].troubles[0].ends_with("is Active: connection refused"));
        model.sort_otherwise();
        assert_eq!(names(&model, 4604), ["n1", "n2", "n3", "n4"]);
        model.sort_otherwise();
        assert_eq!(names(&model, 4604)[0], "n1");
        // A rule that was made anew counts from nothing.
        model.on_report("n1", report("n1", true, 5), 4606);
        let rows = model.rows(4606);
        assert_eq!(
            rows.iter().find(|row| row.name == "n1").expect("n1").denied,
            (None, Some(5))
        );
    }

    #[test]
    fn a_node_that_never_reports_is_silent_after_a_while() {
        let model = Model::of(&["n1".to_owned()], Duration::from_secs(3), 100);
        assert_eq!(model.rows(103)[0].state, State::Asked);
        let row = &model.rows(130)[0];
        assert_eq!(row.state, State::Silent);
        assert!(row.troubles[0].starts_with("no answer for 30 s"), "{row:?}");
    }

    #[test]
    fn a_node_that_stops_reporting_is_silent() {
        let model = sample();
        let rows = model.rows(4630);
        let row = rows.iter().find(|row| row.name == "n1").expect("n1");
        assert_eq!(row.state, State::Silent);
        assert_eq!(row.troubles, ["has not reported for 27 s"]);
    }
}
