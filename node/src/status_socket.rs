//! The socket on which people and tools ask the node how it is (`cali_control::status`). Answers from what the parts publish;
//! asking changes nothing.

use std::sync::Arc;
use std::time::Duration;

use cali_control::status::{
    NODE_PROTOCOL, NodeRequest, NodeResponse, NodeStatus, OwnedRoute, Quarantined, Readiness,
    VERSION,
};
use cali_control::{Error, FrameReader, FrameWriter};
use cali_routes::{RouteStatus, Writer, WriterState};
use ipip_vxlan::TunnelState;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

/// Connections at one time; more wait.
const CONNECTIONS: usize = 32;
/// A client that asks nothing for so long is let go.
const IDLE: Duration = Duration::from_secs(60);
const PROGRAM: &str = concat!("cali-node ", env!("CARGO_PKG_VERSION"));

/// What does not change while the daemon runs.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Node name.
    pub node: String,
    /// Seconds since the Unix epoch.
    pub started_at: u64,
    /// BGP runs on this node.
    pub bgp: bool,
}

/// Addresses and notices, as they change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeView {
    /// With prefix length.
    pub ipv4: Option<String>,
    /// With prefix length.
    pub ipv6: Option<String>,
    /// The datastore has told everything.
    pub in_sync: bool,
    /// Things an operator should know.
    pub notices: Vec<String>,
}

/// Where the answers come from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Fixed facts.
    pub identity: Identity,
    /// The node itself.
    pub view: watch::Receiver<NodeView>,
    /// The route table.
    pub writer: Writer,
    /// The tunnels.
    pub tunnels: watch::Receiver<TunnelState>,
    /// The speaker's process.
    pub bgpd: watch::Receiver<Option<u32>>,
}

/// Serves until dropped by its owner.
pub async fn serve(listener: UnixListener, sources: Sources) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The semaphore is never closed.
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let sources = sources.clone();
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &sources).await {
                        tracing::debug!(%error, "status connection");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a status connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, sources: &Sources) -> Result<(), Error> {
    let (reader, writer) = stream.into_split();
    let mut reader = FrameReader::new(NODE_PROTOCOL, reader);
    let mut writer = FrameWriter::new(NODE_PROTOCOL, writer);
    writer.hello(VERSION, PROGRAM).await?;
    match tokio::time::timeout(IDLE, reader.hello()).await {
        Ok(hello) => hello?,
        Err(_) => return Ok(()),
    };
    loop {
        let request = match tokio::time::timeout(IDLE, reader.next::<NodeRequest>()).await {
            Ok(request) => request?,
            Err(_) => None,
        };
        let Some(request) = request else {
            return Ok(());
        };
        writer.send(&answer(request, sources).await).await?;
    }
}

async fn answer(request: NodeRequest, sources: &Sources) -> NodeResponse {
    match request {
        NodeRequest::Status => NodeResponse::Status(status(
            &sources.identity,
            &sources.view.borrow().clone(),
            &sources.writer.state().borrow().clone(),
            &sources.tunnels.borrow().clone(),
            *sources.bgpd.borrow(),
        )),
        NodeRequest::Routes => match sources.writer.view().await {
            Ok(routes) => NodeResponse::Routes(routes.into_iter().map(owned).collect()),
            Err(error) => NodeResponse::Error(error.to_string()),
        },
        NodeRequest::Endpoints => {
            NodeResponse::Error("this node does not report endpoints".to_owned())
        }
    }
}

/// Puts the parts' states together. Pure.
fn status(
    identity: &Identity,
    view: &NodeView,
    routes: &WriterState,
    tunnels: &TunnelState,
    bgpd: Option<u32>,
) -> NodeStatus {
    let part = |part: &str, reason: Option<String>| Readiness {
        part: part.to_owned(),
        ready: reason.is_none(),
        reason,
    };
    let mut readiness = vec![
        part(
            "datastore",
            (!view.in_sync).then(|| "not everything has been received yet".to_owned()),
        ),
        part(
            "routes",
            (routes.held > 0).then(|| {
                format!(
                    "{} routes of an earlier run are kept until confirmed",
                    routes.held
                )
            }),
        ),
        part(
            "tunnels",
            (!tunnels.problems.is_empty()).then(|| tunnels.problems.join("; ")),
        ),
    ];
    if identity.bgp {
        readiness.push(part(
            "bgpd",
            bgpd.is_none().then(|| "not running".to_owned()),
        ));
    }
    let fights = routes
        .fights
        .iter()
        .map(|route| format!("somebody else keeps changing {route}"));
    NodeStatus {
        node: identity.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_at: identity.started_at,
        ipv4: view.ipv4.clone(),
        ipv6: view.ipv6.clone(),
        readiness,
        quarantined: routes
            .quarantined
            .iter()
            .map(|(route, reason)| Quarantined {
                object: format!("route {route}"),
                reason: reason.clone(),
                caused_by: Vec::new(),
            })
            .collect(),
        notices: view.notices.iter().cloned().chain(fights).collect(),
        bgpd_pid: bgpd,
    }
}

fn owned(route: RouteStatus) -> OwnedRoute {
    OwnedRoute {
        prefix: route.prefix,
        kernel: route.kernel,
        source: route.source.as_str().to_owned(),
        because: route.because,
        programmed: route.programmed,
        problem: route.problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_not_ready_says_why() {
        let identity = Identity {
            node: "n1".into(),
            started_at: 1,
            bgp: true,
        };
        let routes = WriterState {
            held: 2,
            quarantined: vec![("10.0.0.0/26".into(), "EINVAL".into())],
            ..Default::default()
        };
        let tunnels = TunnelState {
            problems: vec!["vxlan.calico is somebody else's".into()],
            ..Default::default()
        };
        let status = status(&identity, &NodeView::default(), &routes, &tunnels, None);
        assert!(
            status
                .readiness
                .iter()
                .all(|part| !part.ready && part.reason.is_some()),
            "{:?}",
            status.readiness
        );
        assert_eq!(status.quarantined[0].object, "route 10.0.0.0/26");
        let quiet = NodeView {
            in_sync: true,
            ..Default::default()
        };
        let status = super::status(
            &identity,
            &quiet,
            &WriterState::default(),
            &TunnelState::default(),
            Some(7),
        );
        assert!(
            status.readiness.iter().all(|part| part.ready),
            "{:?}",
            status.readiness
        );
    }
}
