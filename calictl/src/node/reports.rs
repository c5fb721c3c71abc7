//! What other nodes say of themselves. A node answers a CalicoNodeStatus that names it: one is made for each node that is
//! asked, with an annotation that asks for everything, and deleted again. Where that cannot be, or a node does not answer,
//! a report counts that the node (perhaps one of Calico) keeps for somebody else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use cali_api::update::{SyncEvent, Update};
use cali_api::v3::{CalicoNodeStatus, CalicoNodeStatusSpec, NodeStatusClass};
use cali_api::{AnyResource, Key, Kind};
use cali_control::status::{NodeReport, REPORT_ANNOTATION, ReportQuery};
use cali_datastore::{Datastore, timestamp};
use futures::StreamExt;
use tokio::sync::mpsc;

use crate::converted;
use crate::progress::Progress;

/// Names of what we make begin so; what is left of a run that was killed is known by it.
const PREFIX: &str = "calictl.";
/// Age of what nobody waits for any more.
const LEFT_OVER: Duration = Duration::from_secs(600);
/// Writes at the same time.
const AT_ONCE: usize = 16;
/// A period for whom the first report is enough: there is no second before the resource is gone.
const NEVER_AGAIN: u32 = 86_400;

/// What is known of one node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    /// Its own words, just now.
    Report(Box<NodeReport>),
    /// What it keeps for somebody else.
    Standing(Box<CalicoNodeStatus>),
    /// Why there is nothing.
    Silent(String),
}

/// In words that a node did not answer.
pub(crate) fn silence(limit: Duration) -> String {
    format!(
        "no answer within {} s: cali-node does not run there, or does not reach the datastore",
        limit.as_secs()
    )
}

/// The names of the cluster's nodes, or those given, each of which must be one.
pub(crate) async fn names(store: &dyn Datastore, given: &[String]) -> Result<Vec<String>> {
    let nodes = converted::list(store, Kind::Node, None)
        .await
        .context("cannot list the nodes")?;
    let known: BTreeSet<&str> = nodes
        .iter()
        .map(|node| node.metadata().name.as_str())
        .collect();
    if let Some(unknown) = given.iter().find(|name| !known.contains(name.as_str())) {
        let some: Vec<&str> = known.iter().copied().take(10).collect();
        let more = if known.len() > some.len() {
            ", ..."
        } else {
            ""
        };
        bail!(
            "there is no node {unknown:?}; `calictl get nodes` lists those of the cluster: {}{more}",
            some.join(", ")
        );
    }
    if given.is_empty() {
        return Ok(known.into_iter().map(str::to_owned).collect());
    }
    Ok(given.to_vec())
}

/// Asks these nodes and waits until all have answered, at most for `limit`.
pub(crate) async fn ask(
    store: &Arc<dyn Datastore>,
    nodes: &[String],
    query: &ReportQuery,
    limit: Duration,
) -> Result<BTreeMap<String, Answer>> {
    let mut questions = Questions::of(nodes);
    let mut events = cali_datastore::sync::start(Arc::clone(store), &[Kind::CalicoNodeStatus]);
    let progress = Progress::of(nodes.len(), "Waiting for the nodes");
    let conversation = async {
        let query = match *query == ReportQuery::default() {
            true => String::new(),
            false => serde_json::to_string(query).unwrap_or_default(),
        };
        questions.refused = pose(store.as_ref(), &questions.names, NEVER_AGAIN, &query).await;
        while !questions.done()
            && let Some(event) = events.recv().await
        {
            if let SyncEvent::Updates(updates) = event {
                for update in updates {
                    if questions.on_update(&update) {
                        progress.step();
                    }
                }
            }
        }
    };
    let interrupted = tokio::select! {
        // Not in time: those that have answered have.
        _ = tokio::time::timeout(limit, conversation) => false,
        _ = tokio::signal::ctrl_c() => true,
    };
    drop(events);
    withdraw(store.as_ref(), &questions).await;
    drop(progress);
    if interrupted {
        bail!("interrupted");
    }
    Ok(questions.answers(limit))
}

/// Reports that go on: one per node every few seconds, until [`Feed::end`].
pub(crate) struct Feed {
    store: Arc<dyn Datastore>,
    events: mpsc::Receiver<SyncEvent>,
    questions: Questions,
}

impl Feed {
    pub(crate) async fn start(store: Arc<dyn Datastore>, nodes: &[String], seconds: u32) -> Self {
        let mut questions = Questions::of(nodes);
        let events = cali_datastore::sync::start(Arc::clone(&store), &[Kind::CalicoNodeStatus]);
        questions.refused = pose(store.as_ref(), &questions.names, seconds, "").await;
        Self {
            store,
            events,
            questions,
        }
    }

    /// The nodes that could not be asked, and why.
    pub(crate) fn refused(&self) -> impl Iterator<Item = (&String, &String)> {
        self.questions.refused.iter()
    }

    /// The next reports; `None` when the datastore's stream has ended. Cancel safe.
    pub(crate) async fn next(&mut self) -> Option<BTreeMap<String, NodeReport>> {
        loop {
            if let SyncEvent::Updates(updates) = self.events.recv().await? {
                for update in updates {
                    self.questions.on_update(&update);
                }
                if !self.questions.reports.is_empty() {
                    return Some(std::mem::take(&mut self.questions.reports));
                }
            }
        }
    }

    /// Nobody reads any more: the nodes need not report.
    pub(crate) async fn end(self) {
        withdraw(self.store.as_ref(), &self.questions).await;
    }
}

/// Makes the resources. Returns why the ones that could not be made were not, by node.
async fn pose(
    store: &dyn Datastore,
    names: &BTreeMap<String, String>,
    seconds: u32,
    query: &str,
) -> BTreeMap<String, String> {
    let made = names.iter().map(|(node, name)| async move {
        let mut object = CalicoNodeStatus::named(
            name.clone(),
            CalicoNodeStatusSpec {
                node: node.clone(),
                classes: vec![NodeStatusClass::Agent, NodeStatusClass::BGP],
                update_period_seconds: Some(seconds),
            },
        );
        object
            .metadata
            .annotations
            .insert(REPORT_ANNOTATION.to_owned(), query.to_owned());
        let error = store.create(object.into()).await.err()?;
        Some((node.clone(), format!("it cannot be asked: {error}")))
    });
    futures::stream::iter(made)
        .buffer_unordered(AT_ONCE)
        .filter_map(std::future::ready)
        .collect()
        .await
}

/// Deletes what was made here, and what a run that was killed has left. What cannot be deleted is left to the next run.
async fn withdraw(store: &dyn Datastore, questions: &Questions) {
    let own = questions.names.values().cloned();
    let gone = own.chain(questions.left_over.iter().cloned());
    futures::stream::iter(gone)
        .for_each_concurrent(AT_ONCE, |name| async move {
            let _ = store
                .delete(&Key::cluster(Kind::CalicoNodeStatus, name), None)
                .await;
        })
        .await;
}

/// What was asked and what came back. No I/O.
struct Questions {
    /// Resource by node.
    names: BTreeMap<String, String>,
    reports: BTreeMap<String, NodeReport>,
    standing: BTreeMap<String, CalicoNodeStatus>,
    refused: BTreeMap<String, String>,
    left_over: BTreeSet<String>,
    started: SystemTime,
}

impl Questions {
    fn of(nodes: &[String]) -> Self {
        let started = SystemTime::now();
        // Two that ask at the same time do not disturb each other.
        let stamp = started
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos());
        let unique = format!("{:x}-{:x}", stamp, std::process::id());
        let names = nodes
            .iter()
            .map(|node| (node.clone(), format!("{PREFIX}{unique}.{node}")));
        Self {
            names: names.collect(),
            reports: BTreeMap::new(),
            standing: BTreeMap::new(),
            refused: BTreeMap::new(),
            left_over: BTreeSet::new(),
            started,
        }
    }

    /// Whether this was the answer of a node.
    fn on_update(&mut self, update: &Update) -> bool {
        let Some(AnyResource::CalicoNodeStatus(object)) = update.value.as_deref() else {
            return false;
        };
        let node = &object.spec.node;
        if self.names.get(node) == Some(&object.metadata.name) {
            let said = object.metadata.annotations.get(REPORT_ANNOTATION);
            let report = said.and_then(|text| serde_json::from_str(text).ok());
            return report
                .is_some_and(|report| self.reports.insert(node.clone(), report).is_none());
        }
        if object.metadata.name.starts_with(PREFIX) {
            let made = object.metadata.creation_timestamp.as_deref();
            let age = made
                .and_then(timestamp::parse)
                .and_then(|made| self.started.duration_since(made).ok());
            if age.is_some_and(|age| age > LEFT_OVER) {
                self.left_over.insert(object.metadata.name.clone());
            }
            return false;
        }
        let reports_sessions = object.spec.classes.contains(&NodeStatusClass::BGP);
        if object.status.is_some() && reports_sessions && self.names.contains_key(node) {
            self.standing.insert(node.clone(), (**object).clone());
        }
        false
    }

    fn done(&self) -> bool {
        self.names
            .keys()
            .all(|node| self.reports.contains_key(node) || self.refused.contains_key(node))
    }

    fn answers(mut self, limit: Duration) -> BTreeMap<String, Answer> {
        let mut answers = BTreeMap::new();
        for node in self.names.keys() {
            let answer = if let Some(report) = self.reports.remove(node) {
                Answer::Report(Box::new(report))
            } else if let Some(standing) = self.standing.remove(node) {
                Answer::Standing(Box::new(standing))
            } else {
                Answer::Silent(self.refused.remove(node).unwrap_or_else(|| silence(limit)))
            };
            answers.insert(node.clone(), answer);
        }
        answers
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::Revision;
    use cali_control::status::Figures;

    fn update(name: &str, node: &str, made: &str, annotation: Option<&str>) -> Update {
        let mut object = CalicoNodeStatus::named(
            name,
            CalicoNodeStatusSpec {
                node: node.into(),
                classes: vec![NodeStatusClass::BGP],
                update_period_seconds: Some(10),
            },
        );
        object.status = Some(cali_api::v3::CalicoNodeStatusStatus::default());
        object.metadata.creation_timestamp = Some(made.to_owned());
        object
            .metadata
            .annotations
            .extend(annotation.map(|text| (REPORT_ANNOTATION.to_owned(), text.to_owned())));
        Update {
            key: Key::cluster(Kind::CalicoNodeStatus, name),
            value: Some(Arc::new(object.into())),
            revision: Revision::from("1"),
        }
    }

    fn report(node: &str) -> String {
        serde_json::to_string(&NodeReport {
            node: cali_control::status::NodeStatus {
                node: node.into(),
                version: "0".into(),
                pid: 1,
                started_at: 0,
                ipv4: None,
                ipv6: None,
                readiness: Vec::new(),
                quarantined: Vec::new(),
                notices: Vec::new(),
                bgpd_pid: None,
            },
            bgp: None,
            figures: Figures::default(),
            routes: None,
        })
        .expect("plain data")
    }

    #[test]
    fn a_node_answers_keeps_a_report_or_is_silent() {
        let nodes = ["n1", "n2", "n3"].map(str::to_owned);
        let mut questions = Questions::of(&nodes);
        let own = questions.names["n1"].clone();
        questions.on_update(&update(&own, "n1", "2026-01-01T00:00:00Z", Some("")));
        assert!(!questions.done(), "nothing was said yet");
        questions.on_update(&update(
            &own,
            "n1",
            "2026-01-01T00:00:00Z",
            Some(&report("n1")),
        ));
        questions.on_update(&update("kept", "n2", "2026-01-01T00:00:00Z", None));
        questions.on_update(&update(
            "calictl.old.n2",
            "n2",
            "2026-01-01T00:00:00Z",
            None,
        ));
        assert_eq!(questions.left_over, ["calictl.old.n2".to_owned()].into());
        questions.refused.insert("n3".into(), "forbidden".into());
        let answers = questions.answers(Duration::from_secs(5));
        assert!(matches!(&answers["n1"], Answer::Report(report) if report.node.node == "n1"));
        assert!(matches!(&answers["n2"], Answer::Standing(kept) if kept.metadata.name == "kept"));
        assert_eq!(answers["n3"], Answer::Silent("forbidden".into()));
    }
}
