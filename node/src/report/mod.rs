//! Answers CalicoNodeStatus: writes what this node's sessions and routes are into every such resource that names this node,
//! at once when it appears or changes and then as often as it asks for.
//!
//! Who cannot reach the node's sockets reads it there: `calictl node status --node` makes such a resource, waits for the
//! report, and deletes it.

pub(crate) mod figures;
mod schedule;
mod shape;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cali_api::update::SyncEvent;
use cali_api::v3::{CalicoNodeStatus, NodeStatusClass};
use cali_api::{AnyResource, Key, Kind};
use cali_control::status::{
    BGP_PROTOCOL, BgpRequest, BgpResponse, NodeReport, OwnedRoute, PackedRoutes, REPORT_ANNOTATION,
    ReportQuery, RouteStatus, SessionState, VERSION,
};
use cali_control::{client, paths};
use cali_datastore::{Datastore, Error as DatastoreError, edit};
use cali_netlink::NetNs;
use cali_telemetry::Registry;
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::schedule::Schedule;
use crate::status_socket::{self, Sources};

/// A report that could not be written is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);
/// For one answer of `bgpd`.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// The task's parts.
pub struct Teller {
    /// Where the resources are.
    pub datastore: Arc<dyn Datastore>,
    /// What is reported.
    pub sources: Sources,
    /// What the parts count.
    pub registry: Registry,
    /// Where the rules are.
    pub netns: NetNs,
}

/// Kubernetes takes 256 KiB of annotations in all.
const ANNOTATION_LIMIT: usize = 200 << 10;
/// Of these for routes.
const ROUTES_LIMIT: usize = 150 << 10;

/// The node at one moment.
struct Now {
    report: NodeReport,
    routes: Vec<OwnedRoute>,
    paths: Vec<RouteStatus>,
    at: SystemTime,
}

impl Teller {
    /// Runs until the stream of changes ends.
    pub async fn run(self, mut events: mpsc::Receiver<SyncEvent>) -> String {
        let mut schedule = Schedule::of_node(&self.sources.identity.node);
        loop {
            let due = schedule.next();
            tokio::select! {
                event = events.recv() => match event {
                    None => return "the stream of changes ended".to_owned(),
                    Some(SyncEvent::Status(_) | SyncEvent::Complete(_)) => {}
                    Some(SyncEvent::Updates(updates)) => for update in &updates {
                        let value = match update.value.as_deref() {
                            Some(AnyResource::CalicoNodeStatus(asked)) => Some(&**asked),
                            _ => None,
                        };
                        schedule.on_update(&update.key.name, value, Instant::now());
                    },
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.tell(&mut schedule).await;
                }
            }
        }
    }

    /// Writes everything that is due.
    async fn tell(&self, schedule: &mut Schedule) {
        let due = schedule.take_due(Instant::now());
        let asks = |class| due.iter().any(|asked| asked.classes.contains(&class));
        let with_paths = asks(NodeStatusClass::Routes);
        let with_routes = with_paths || due.iter().any(|asked| asked.with_query);
        let now = self.look(with_routes, with_paths).await;
        for asked in due {
            match self.write(&asked.name, &now).await {
                Ok(()) => {}
                Err(DatastoreError::NotFound { .. }) => schedule.forget(&asked.name),
                Err(error) => {
                    tracing::warn!(object = asked.name, %error, cause = crate::cause(&error), "cannot write the report of CalicoNodeStatus; trying again");
                    schedule.again(&asked.name, Instant::now() + RETRY);
                }
            }
        }
    }

    async fn look(&self, with_routes: bool, with_paths: bool) -> Now {
        let bgp = match self.ask(BgpRequest::Status).await {
            Some(BgpResponse::Status(status)) => Some(status),
            _ => None,
        };
        let (mut routes, mut paths) = (Vec::new(), Vec::new());
        if with_routes {
            routes = status_socket::routes(&self.sources)
                .await
                .unwrap_or_default();
        }
        if with_paths
            && let Some(BgpResponse::Routes(found)) =
                self.ask(BgpRequest::Routes { within: None }).await
        {
            paths = found;
        }
        let (registry, netns) = (self.registry.clone(), self.netns.clone());
        let state = self.sources.dataplane.state().borrow().clone();
        let figures =
            tokio::task::spawn_blocking(move || figures::take(&registry, &netns, &state)).await;
        Now {
            report: NodeReport {
                node: self.sources.status(),
                bgp,
                figures: figures.unwrap_or_default(),
                routes: None,
            },
            routes,
            paths,
            at: SystemTime::now(),
        }
    }

    async fn ask(&self, request: BgpRequest) -> Option<BgpResponse> {
        if !self.sources.identity.bgp {
            return None;
        }
        client::ask(
            BGP_PROTOCOL,
            VERSION,
            concat!("cali-node ", env!("CARGO_PKG_VERSION")),
            &paths::bgpd_socket(),
            &request,
            ANSWER_LIMIT,
        )
        .await
        .inspect_err(|error| tracing::debug!(%error, "bgpd does not answer"))
        .ok()
    }

    async fn write(&self, name: &str, now: &Now) -> Result<(), DatastoreError> {
        let key = Key::cluster(Kind::CalicoNodeStatus, name);
        edit(&*self.datastore, &key, |object: &mut CalicoNodeStatus| {
            report(object, now);
            true
        })
        .await?;
        Ok(())
    }
}

/// Puts the report into the resource. Pure.
fn report(object: &mut CalicoNodeStatus, now: &Now) {
    object.status = Some(shape::status(
        &object.spec.classes,
        now.report.bgp.as_ref(),
        &now.routes,
        &now.paths,
        now.at,
    ));
    if let Some(annotation) = object.metadata.annotations.get_mut(REPORT_ANNOTATION) {
        *annotation = match serde_json::from_str::<ReportQuery>(annotation) {
            Ok(query) if query.routes.is_some() => text_of(&with_routes(now, &query)),
            // Nothing, or what was reported before.
            _ => text_of(&now.report),
        };
    }
}

/// The report with the routes that are asked for; those with a problem stay the longest. Pure.
fn with_routes(now: &Now, query: &ReportQuery) -> NodeReport {
    let wanted = query.routes.clone().unwrap_or_default();
    let mut routes: Vec<OwnedRoute> = now
        .routes
        .iter()
        .filter(|route| wanted.wants(route))
        .cloned()
        .collect();
    routes.sort_by_key(|route| route.programmed && route.problem.is_none());
    NodeReport {
        routes: Some(PackedRoutes::pack(&routes, ROUTES_LIMIT)),
        ..now.report.clone()
    }
}

/// A report that fits into an annotation. Where not everything does, peers without a session stay the longest, and a notice
/// says how many are left out. Pure.
fn text_of(report: &NodeReport) -> String {
    // Plain data: it can be written.
    let text = |report: &NodeReport| serde_json::to_string(report).unwrap_or_default();
    let whole = text(report);
    if whole.len() <= ANNOTATION_LIMIT {
        return whole;
    }
    let mut part = report.clone();
    part.node.quarantined.truncate(50);
    part.node.notices.truncate(50);
    let all = part.bgp.as_ref().map_or(0, |bgp| bgp.peers.len());
    if let Some(bgp) = &mut part.bgp {
        bgp.notices.truncate(50);
        bgp.peers
            .sort_by_key(|peer| peer.state == SessionState::Established);
    }
    loop {
        let shown = part.bgp.as_ref().map_or(0, |bgp| bgp.peers.len());
        let mut said = part.clone();
        if let Some(bgp) = said.bgp.as_mut().filter(|_| shown < all) {
            bgp.notices
                .push(format!("{} peers do not fit into this report", all - shown));
        }
        let said = text(&said);
        if said.len() <= ANNOTATION_LIMIT || shown == 0 {
            return said;
        }
        if let Some(bgp) = &mut part.bgp {
            bgp.peers.truncate(shown / 2);
        }
    }
}

/// Seconds since the Unix epoch as an instant.
fn instant(seconds: u64) -> SystemTime {
    UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds))
        .unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use cali_control::status::{Figures, NodeStatus};

    use super::*;

    #[test]
    fn a_report_that_is_too_long_keeps_what_is_wrong() {
        let mut bgp = shape::tests::bgp();
        let down = bgp.peers[1].clone();
        bgp.peers = vec![bgp.peers[0].clone(); 2000];
        bgp.peers.push(down.clone());
        let report = NodeReport {
            node: NodeStatus {
                node: "n".into(),
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
            bgp: Some(bgp),
            figures: Figures::default(),
            routes: None,
        };
        let text = text_of(&report);
        assert!(text.len() <= ANNOTATION_LIMIT, "{}", text.len());
        let said: NodeReport = serde_json::from_str(&text).unwrap();
        let said = said.bgp.unwrap();
        assert_eq!(said.peers[0].address, down.address);
        let left_out = 2001 - said.peers.len();
        assert_eq!(
            said.notices,
            [format!("{left_out} peers do not fit into this report")]
        );
    }
}
