//! The socket on which people and tools ask the node how it is (`cali_control::status`). Answers from what the parts publish;
//! asking changes nothing.

use std::sync::Arc;
use std::time::Duration;

use cali_api::Key;
use cali_control::status::{
    EndpointStatus, NODE_PROTOCOL, NodeRequest, NodeResponse, NodeStatus, OwnedRoute, Quarantined,
    Readiness, RouteHop, VERSION,
};
use cali_control::{Error, FrameReader, FrameWriter};
use cali_routes::{RouteStatus, Way, WriterGone};
use felix::dataplane::{EndpointState, Handle, State};
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

/// Addresses of the node with their prefix lengths, as they change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeAddresses {
    /// The IPv4 address.
    pub ipv4: Option<String>,
    /// The IPv6 address.
    pub ipv6: Option<String>,
}

/// Where the answers come from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Fixed facts.
    pub identity: Identity,
    /// The node itself.
    pub addresses: watch::Receiver<NodeAddresses>,
    /// Rules, routes, tunnels and endpoints.
    pub dataplane: Handle,
    /// The speaker's process.
    pub bgpd: watch::Receiver<Option<u32>>,
}

impl Sources {
    /// The node as a whole, now.
    #[must_use]
    pub fn status(&self) -> NodeStatus {
        status(
            &self.identity,
            &self.addresses.borrow().clone(),
            &self.dataplane.state().borrow().clone(),
            *self.bgpd.borrow(),
        )
    }

    /// The node's endpoints, now.
    #[must_use]
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        let state = self.dataplane.state().borrow().clone();
        state
            .endpoints
            .iter()
            .map(|(key, state)| endpoint(key, state))
            .collect()
    }
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
        NodeRequest::Status => NodeResponse::Status(sources.status()),
        NodeRequest::Routes => match routes(sources).await {
            Ok(routes) => NodeResponse::Routes(routes),
            Err(error) => NodeResponse::Error(error.to_string()),
        },
        NodeRequest::Endpoints => NodeResponse::Endpoints(sources.endpoints()),
    }
}

/// The node's route table, now.
pub(crate) async fn routes(sources: &Sources) -> Result<Vec<OwnedRoute>, WriterGone> {
    let routes = sources.dataplane.routes().view().await?;
    Ok(routes.into_iter().map(owned).collect())
}

/// Puts the parts' states together. Pure.
fn status(
    identity: &Identity,
    addresses: &NodeAddresses,
    state: &State,
    bgpd: Option<u32>,
) -> NodeStatus {
    let part = |part: &str, reason: Option<String>| Readiness {
        part: part.to_owned(),
        ready: reason.is_none(),
        reason,
    };
    let held = state.routes.held;
    let waiting = state
        .endpoints
        .values()
        .filter(|endpoint| !endpoint.is_programmed())
        .count();
    let mut readiness = vec![
        part(
            "policy",
            (!state.ready).then(|| "not everything has been received and written yet".to_owned()),
        ),
        part(
            "endpoints",
            (waiting > 0)
                .then(|| format!("{waiting} of {} are not programmed", state.endpoints.len())),
        ),
        part(
            "routes",
            (held > 0).then(|| format!("{held} routes of an earlier run are kept until confirmed")),
        ),
        part(
            "tunnels",
            (!state.tunnels.problems.is_empty()).then(|| state.tunnels.problems.join("; ")),
        ),
    ];
    if identity.bgp {
        readiness.push(part(
            "bgpd",
            bgpd.is_none().then(|| "not running".to_owned()),
        ));
    }
    let quarantined = |object: String, reason: &str| Quarantined {
        object,
        reason: reason.to_owned(),
        caused_by: Vec::new(),
    };
    let routes = state.routes.quarantined.iter().map(|refused| Quarantined {
        object: format!("route {}", refused.route),
        reason: refused.reason.clone(),
        caused_by: refused.because.iter().cloned().collect(),
    });
    let rules = state
        .refused
        .iter()
        .map(|refused| quarantined(refused.object.clone(), &refused.reason));
    let unusable = state
        .unusable
        .iter()
        .map(|(key, reasons)| quarantined(key.to_string(), &reasons.join("; ")));
    let fights = state
        .routes
        .fights
        .iter()
        .map(|route| format!("somebody else keeps changing {route}"));
    NodeStatus {
        node: identity.node.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_at: identity.started_at,
        ipv4: addresses.ipv4.clone(),
        ipv6: addresses.ipv6.clone(),
        readiness,
        quarantined: routes.chain(rules).chain(unusable).collect(),
        notices: state.notices.iter().cloned().chain(fights).collect(),
        bgpd_pid: bgpd,
    }
}

fn endpoint(key: &Key, state: &EndpointState) -> EndpointStatus {
    let namespace = key.namespace.as_deref().unwrap_or_default();
    EndpointStatus {
        endpoint: format!("{namespace}/{}", key.name),
        interface: state.interface.to_string(),
        addresses: state
            .addresses
            .iter()
            .map(|address| address.addr())
            .collect(),
        policies: state.policies.iter().map(ToString::to_string).collect(),
        programmed: state.is_programmed(),
        problem: state.problem.clone(),
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
        encapsulation: route
            .way
            .as_ref()
            .and_then(Way::encapsulation)
            .map(str::to_owned),
        hops: route.way.as_ref().map(hops).unwrap_or_default(),
    }
}

fn hops(way: &Way) -> Vec<RouteHop> {
    let hop = |gateway, device: &str| RouteHop {
        gateway,
        device: device.to_owned(),
    };
    match way {
        Way::Device { device, .. } => vec![hop(None, device)],
        Way::Blackhole | Way::Local => Vec::new(),
        Way::Gateways(gateways) => gateways
            .iter()
            .map(|gateway| hop(Some(gateway.address), &gateway.device))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use cali_routes::{RefusedRoute, WriterState};
    use ipip_vxlan::TunnelState;

    use super::*;

    #[test]
    fn whatever_is_not_ready_says_why() {
        let identity = Identity {
            node: "n1".into(),
            started_at: 1,
            bgp: true,
        };
        let state = |held, ready, tunnels: &[&str], problem: Option<&str>| State {
            ready,
            routes: Arc::new(WriterState {
                held,
                quarantined: vec![RefusedRoute {
                    route: "10.0.0.0/26".into(),
                    reason: "EINVAL".into(),
                    because: Some("BlockAffinity n-10-0-0-0-26".into()),
                }],
                ..Default::default()
            }),
            tunnels: TunnelState {
                problems: tunnels.iter().map(|t| (*t).to_owned()).collect(),
                ..Default::default()
            },
            endpoints: std::collections::BTreeMap::from([(
                Key::namespaced(cali_api::Kind::WorkloadEndpoint, "ns", "pod"),
                EndpointState {
                    interface: "cali1".into(),
                    addresses: Vec::new(),
                    policies: Vec::new(),
                    problem: problem.map(str::to_owned),
                },
            )]),
            ..Default::default()
        };
        let addresses = NodeAddresses::default();
        let bad = status(
            &identity,
            &addresses,
            &state(2, false, &["vxlan.calico is somebody else's"], Some("down")),
            None,
        );
        assert!(
            bad.readiness
                .iter()
                .all(|part| !part.ready && part.reason.is_some()),
            "{:?}",
            bad.readiness
        );
        assert_eq!(bad.quarantined[0].object, "route 10.0.0.0/26");
        assert_eq!(
            bad.quarantined[0].caused_by,
            ["BlockAffinity n-10-0-0-0-26"]
        );
        let good = status(&identity, &addresses, &state(0, true, &[], None), Some(7));
        assert!(
            good.readiness.iter().all(|part| part.ready),
            "{:?}",
            good.readiness
        );
    }
}
