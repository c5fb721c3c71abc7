//! `calictl node status`: whether Cali runs, and its BGP sessions.

use crate::bgp::age;
use crate::output::{self, Form};
use crate::{bgp_table, connection, sockets};
use anyhow::{Result, bail};
use cali_control::paths::run_dir;
use cali_control::status::{
    BgpRequest, BgpResponse, BgpStatus, NodeRequest, NodeResponse, NodeStatus, ReportQuery,
    SessionState,
};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use super::reports::{self, Answer};

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// This node of the cluster, wherever it is (repeatable): it is asked by way of the datastore
    #[arg(long, value_name = "NAME", conflicts_with = "all")]
    node: Vec<String>,
    /// Every node of the cluster, a line each; everything about each with `-o wide`
    #[arg(long)]
    all: bool,
    /// How long other nodes may take to answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    timeout: u64,
    /// How it is printed
    #[arg(short, long, value_enum, default_value_t = Form::Table)]
    output: Form,
}

/// What the daemons of this node say of themselves; `None` for one that does not run.
pub(crate) struct Local {
    pub(crate) node: Option<NodeStatus>,
    pub(crate) bgp: Option<BgpStatus>,
}

impl Local {
    pub(crate) async fn ask() -> Result<Self> {
        let run_dir = run_dir();
        let node = match sockets::node(&run_dir, NodeRequest::Status).await {
            Ok(NodeResponse::Status(status)) => Some(status),
            Ok(other) => bail!("the node answered {other:?}"),
            Err(error) if sockets::nobody_listens(&error) => None,
            Err(error) => return Err(error.context("cali-node does not answer")),
        };
        let bgp = match sockets::bgp(&run_dir, BgpRequest::Status).await {
            Ok(BgpResponse::Status(status)) => Some(status),
            Ok(other) => bail!("bgpd answered {other:?}"),
            Err(error) if sockets::nobody_listens(&error) => None,
            Err(error) => return Err(error.context("bgpd does not answer")),
        };
        Ok(Self { node, bgp })
    }
}

pub(super) async fn run(status: &Status) -> Result<ExitCode> {
    if status.all || !status.node.is_empty() {
        return of_others(status).await;
    }
    let Local { node, bgp } = Local::ask().await?;
    if status.output == Form::Json {
        output::line(serde_json::to_string_pretty(
            &json!({"node": node, "bgp": bgp}),
        )?);
        return Ok(if node.is_some() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let Some(node) = node else {
        bail!("Calico process is not running.");
    };
    let wide = status.output == Form::Wide;
    output::write(render(&node, bgp.as_ref(), super::now()?, wide));
    Ok(ExitCode::SUCCESS)
}

/// Ends with 1 if a node says nothing.
async fn of_others(status: &Status) -> Result<ExitCode> {
    let store = connection::open().await?;
    let nodes = reports::names(store.as_ref(), &status.node).await?;
    let limit = cali_lab::patient(Duration::from_secs(status.timeout.max(1)));
    let answers = reports::ask(&store, &nodes, &ReportQuery::default(), limit).await?;
    let now = super::now()?;
    match status.output {
        Form::Json if status.all || answers.len() > 1 => {
            let list: Vec<Value> = answers.iter().map(|(name, of)| json_of(name, of)).collect();
            output::line(serde_json::to_string_pretty(&list)?);
        }
        Form::Json => {
            for (name, answer) in &answers {
                output::line(serde_json::to_string_pretty(&json_of(name, answer))?);
            }
        }
        Form::Table if status.all => output::write(summary(&answers, now)),
        form => {
            let texts: Vec<String> = answers
                .iter()
                .map(|(name, answer)| one(name, answer, now, form == Form::Wide))
                .collect();
            output::write(texts.join("\n"));
        }
    }
    let silent = |answer: &Answer| matches!(answer, Answer::Silent(_));
    Ok(if answers.values().any(silent) {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// As `-o json` of the node itself; `problem` where there is nothing else, `report` where another's question is answered.
fn json_of(name: &str, answer: &Answer) -> Value {
    match answer {
        Answer::Report(report) => json!({"name": name, "node": report.node, "bgp": report.bgp}),
        Answer::Standing(kept) => {
            json!({"name": name, "node": null, "bgp": null, "report": kept.status})
        }
        Answer::Silent(problem) => {
            json!({"name": name, "node": null, "bgp": null, "problem": problem})
        }
    }
}

/// One node with its name above what it would say itself.
fn one(name: &str, answer: &Answer, now: u64, wide: bool) -> String {
    match answer {
        Answer::Report(report) if wide => render(&report.node, report.bgp.as_ref(), now, true),
        Answer::Report(report) => {
            let text = render(&report.node, report.bgp.as_ref(), now, false);
            format!("Node {name}\n{text}")
        }
        Answer::Standing(kept) => {
            let status = kept.status.clone().unwrap_or_default();
            let at = status.last_updated.as_deref().unwrap_or("an unknown time");
            format!(
                "Node {name}\nAs CalicoNodeStatus({}) had it at {at}; the node does not answer now.\n\n{}",
                kept.metadata.name,
                bgp_table::render_reported(&status.bgp)
            )
        }
        Answer::Silent(problem) => format!("Node {name}\nDoes not report: {problem}\n"),
    }
}

/// A line per node.
fn summary(answers: &BTreeMap<String, Answer>, now: u64) -> String {
    let header = [
        "NODE",
        "READY",
        "VERSION",
        "UPTIME",
        "BGP SESSIONS",
        "PROBLEMS",
    ];
    let rows: Vec<[String; 6]> = answers
        .iter()
        .map(|(name, answer)| row(name, answer, now))
        .collect();
    bgp_table::table(&header, &rows)
}

fn row(name: &str, answer: &Answer, now: u64) -> [String; 6] {
    let dash = || "-".to_owned();
    let name = name.to_owned();
    match answer {
        Answer::Report(report) => {
            let node = &report.node;
            let ready = node.readiness.iter().all(|part| part.ready);
            let sessions = report.bgp.as_ref().map_or_else(dash, |bgp| {
                let up = bgp
                    .peers
                    .iter()
                    .filter(|peer| peer.state == SessionState::Established);
                format!("{} of {} up", up.count(), bgp.peers.len())
            });
            [
                name,
                if ready { "yes" } else { "no" }.to_owned(),
                node.version.clone(),
                age(node.started_at, now),
                sessions,
                problems(node),
            ]
        }
        Answer::Standing(kept) => {
            let status = kept.status.clone().unwrap_or_default();
            let bgp = &status.bgp;
            let up = bgp.number_established_v4 + bgp.number_established_v6;
            let down = bgp.number_not_established_v4 + bgp.number_not_established_v6;
            [
                name,
                "?".to_owned(),
                dash(),
                dash(),
                format!("{up} of {} up", up + down),
                format!(
                    "does not answer; as of {}",
                    status.last_updated.as_deref().unwrap_or("an unknown time")
                ),
            ]
        }
        Answer::Silent(problem) => [
            name,
            "?".to_owned(),
            dash(),
            dash(),
            dash(),
            problem.clone(),
        ],
    }
}

/// The first thing that is wrong, and how many more there are.
fn problems(node: &NodeStatus) -> String {
    let parts = node
        .readiness
        .iter()
        .filter(|part| !part.ready)
        .map(|part| {
            let reason = part.reason.as_deref().unwrap_or("not ready");
            format!("{}: {reason}", part.part)
        });
    let refused = node
        .quarantined
        .iter()
        .map(|object| format!("{}: {}", object.object, object.reason));
    let all: Vec<String> = parts.chain(refused).collect();
    match &all[..] {
        [] => "none".to_owned(),
        [only] => only.clone(),
        [first, rest @ ..] => format!("{first} (and {} more)", rest.len()),
    }
}

/// First what scripts know, then what only we can say.
fn render(node: &NodeStatus, bgp: Option<&BgpStatus>, now: u64, wide: bool) -> String {
    let mut text = "Calico process is running.\n\n".to_owned();
    if wide {
        text.push_str(&who(node, now));
    }
    match bgp {
        Some(bgp) => text.push_str(&bgp_table::render(bgp, now, wide)),
        None => text.push_str("The BGP backend process (bgpd) is not running.\n\n"),
    }
    for part in node.readiness.iter().filter(|part| !part.ready) {
        text.push_str(&format!(
            "Not ready: {}: {}\n",
            part.part,
            part.reason.as_deref().unwrap_or("no reason given")
        ));
    }
    for object in &node.quarantined {
        let causes = if object.caused_by.is_empty() {
            String::new()
        } else {
            format!(" (from {})", object.caused_by.join(", "))
        };
        text.push_str(&format!(
            "Quarantined: {}: {}{causes}\n",
            object.object, object.reason
        ));
    }
    for notice in &node.notices {
        text.push_str(&format!("Note: {notice}\n"));
    }
    text
}

fn who(node: &NodeStatus, now: u64) -> String {
    let addresses: Vec<&str> = [&node.ipv4, &node.ipv6]
        .into_iter()
        .filter_map(|address| address.as_deref())
        .collect();
    format!(
        "Node {} ({}), version {}, up {}\n\n",
        node.node,
        if addresses.is_empty() {
            "no address yet".to_owned()
        } else {
            addresses.join(", ")
        },
        node.version,
        age(node.started_at, now),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::v3::CalicoNodeStatus;
    use cali_control::status::{Figures, NodeReport, Quarantined, Readiness};

    fn node() -> NodeStatus {
        NodeStatus {
            node: "n".into(),
            version: "0".into(),
            pid: 1,
            started_at: 0,
            ipv4: Some("10.0.0.1/24".into()),
            ipv6: None,
            readiness: vec![
                Readiness {
                    part: "policy".into(),
                    ready: true,
                    reason: None,
                },
                Readiness {
                    part: "datastore".into(),
                    ready: false,
                    reason: Some("not in sync".into()),
                },
            ],
            quarantined: vec![Quarantined {
                object: "route 10.0.0.0/26".into(),
                reason: "no such device".into(),
                caused_by: vec!["BlockAffinity(n-10-0-0-0-26)".into()],
            }],
            notices: vec!["a kernel without nexthop objects".into()],
            bgpd_pid: None,
        }
    }

    #[test]
    fn what_is_wrong_stands_below_the_tables() {
        let expected = "\
Calico process is running.

The BGP backend process (bgpd) is not running.

Not ready: datastore: not in sync
Quarantined: route 10.0.0.0/26: no such device (from BlockAffinity(n-10-0-0-0-26))
Note: a kernel without nexthop objects
";
        assert_eq!(render(&node(), None, 0, false), expected);
    }

    #[test]
    fn a_line_per_node_and_everything_about_each() {
        let good = NodeStatus {
            readiness: Vec::new(),
            quarantined: Vec::new(),
            ..node()
        };
        let report = |node, bgp| {
            let figures = Figures::default();
            Answer::Report(Box::new(NodeReport {
                node,
                bgp,
                figures,
                routes: None,
            }))
        };
        let mut kept = CalicoNodeStatus::named("kept", Default::default());
        kept.status = Some(
            serde_json::from_value(json!({
                "lastUpdated": "2026-01-01T00:00:00Z",
                "bgp": {
                    "numberEstablishedV4": 1,
                    "peersV4": [{"peerIP": "10.0.0.2", "type": "NodeMesh", "state": "Established", "since": "09:19:28"}],
                },
            }))
            .expect("a status"),
        );
        let answers = BTreeMap::from(
            [
                ("n1", report(good, Some(crate::bgp::sample::status()))),
                ("n2", report(node(), None)),
                ("n3", Answer::Standing(Box::new(kept))),
                ("n4", Answer::Silent("no answer within 10 s".into())),
            ]
            .map(|(name, answer)| (name.to_owned(), answer)),
        );
        insta::assert_snapshot!(summary(&answers, 40_000));
        let all: Vec<String> = answers
            .iter()
            .map(|(name, answer)| one(name, answer, 40_000, false))
            .collect();
        insta::assert_snapshot!(all.join("\n"));
    }

    #[test]
    fn wide_says_which_node_it_is_and_since_when() {
        let text = render(&node(), None, 7270, true);
        assert!(
            text.contains("\nNode n (10.0.0.1/24), version 0, up 02:01:10\n"),
            "{text}"
        );
    }
}
