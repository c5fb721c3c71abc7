//! What the node tells over HTTP: liveness and readiness with reasons, metrics, and a page that a person can read.
//!
//! A watcher asks the parts every few seconds and keeps the latest [`Snapshot`]; every answer is made from it, so that
//! many askers cost nothing. Liveness means that the watcher still gets answers from the writer of routes, which is the
//! task that everything else waits for. Readiness is what `calictl node status` says.
//!
//! | variable | meaning | default |
//! |---|---|---|
//! | `FELIX_HEALTHENABLED` | serve liveness, readiness and the page | `false` |
//! | `FELIX_HEALTHHOST`, `FELIX_HEALTHPORT` | where | `localhost`, 9099 |
//! | `FELIX_PROMETHEUSMETRICSENABLED` | serve metrics | `false` |
//! | `FELIX_PROMETHEUSMETRICSHOST`, `FELIX_PROMETHEUSMETRICSPORT` | where | all addresses, 9091 |

mod metrics;
mod page;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_control::status::{
    BGP_PROTOCOL, BgpRequest, BgpResponse, BgpStatus, EndpointStatus, NodeStatus, VERSION,
};
use cali_control::{client, paths};
use cali_telemetry::{Endpoint, Expectation, Health, Registry, Reporter, Serving};
use tokio::sync::watch;
use typha::config::{ConfigError, Env};

use crate::report::figures;
use crate::status_socket::Sources;

/// Between two looks at the parts.
const PERIOD: Duration = Duration::from_secs(2);
/// A part that does not answer for so long does not live.
const LIVE_LIMIT: Duration = Duration::from_secs(90);
/// For one answer of `bgpd`.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Where to serve what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Liveness, readiness, page.
    pub health: Option<SocketAddr>,
    /// Metrics.
    pub metrics: Option<SocketAddr>,
}

impl Settings {
    /// Reads the variables of the module's table.
    ///
    /// # Errors
    /// One of them cannot be used.
    pub fn read(env: &Env) -> Result<Self, ConfigError> {
        Ok(Self {
            health: env.serving(
                "FELIX_HEALTHENABLED",
                ("FELIX_HEALTHHOST", IpAddr::V4(Ipv4Addr::LOCALHOST)),
                ("FELIX_HEALTHPORT", 9099),
            )?,
            metrics: env.serving(
                "FELIX_PROMETHEUSMETRICSENABLED",
                (
                    "FELIX_PROMETHEUSMETRICSHOST",
                    IpAddr::V6(Ipv6Addr::UNSPECIFIED),
                ),
                ("FELIX_PROMETHEUSMETRICSPORT", 9091),
            )?,
        })
    }
}

/// The node at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// As on the status socket.
    pub node: NodeStatus,
    /// As `bgpd` says; `None` while it does not answer, or does not run here.
    pub bgp: Option<BgpStatus>,
    /// Endpoints of this node.
    pub endpoints: Vec<EndpointStatus>,
    /// Routes that the node wants.
    pub routes: usize,
    /// Routes that wait for a device.
    pub waiting: usize,
    /// Remote tunnel endpoints in the kernel.
    pub tunnel_endpoints: usize,
    /// Changes of policy that were enforced so far.
    pub policy_changes: u64,
    /// From a change of policy to its enforcement: median and 99th percentile, in milliseconds; `None` before the first.
    pub policy_latency_ms: Option<[f64; 2]>,
    /// Seconds since the Unix epoch.
    pub now: u64,
}

/// The servers; dropping them ends them.
#[derive(Debug)]
pub struct Servers {
    _health: Option<Serving>,
    _metrics: Option<Serving>,
}

/// Starts the servers. The returned future keeps their answers current and belongs into a task of its own.
///
/// # Errors
/// An address cannot be bound.
pub async fn start(
    settings: &Settings,
    sources: Sources,
    registry: Registry,
) -> std::io::Result<(Servers, impl Future<Output = String> + Send + 'static)> {
    let health = Health::default();
    let now = Instant::now();
    let parts = Parts {
        dataplane: health.part(
            "dataplane",
            Expectation {
                report_within: Some(LIVE_LIMIT),
                decides_readiness: true,
            },
            now,
        ),
    };
    let (snapshots, latest) = watch::channel(None::<Arc<Snapshot>>);
    let page = {
        let latest = latest.clone();
        Arc::new(move || page::render(latest.borrow().as_deref()))
    };
    if let Err(error) = metrics::register(&registry, latest) {
        tracing::error!(%error, "a metric cannot be served");
    }
    let mut endpoint =
        Endpoint::default()
            .health(health)
            .page("/", "text/html; charset=utf-8", page);
    // One address for both: one server.
    if settings.health == settings.metrics {
        endpoint = endpoint.metrics(registry.clone());
    }
    let counted = registry.clone();
    let served = match settings.health {
        Some(address) => Some(endpoint.serve(address).await?),
        None => None,
    };
    let metrics = match settings.metrics {
        Some(address) if settings.health != settings.metrics => {
            Some(Endpoint::default().metrics(registry).serve(address).await?)
        }
        _ => None,
    };
    let servers = Servers {
        _health: served,
        _metrics: metrics,
    };
    let asked = settings.health.is_some() || settings.metrics.is_some();
    let observed = async move {
        if !asked {
            // Nobody can ask, so nothing is looked at.
            return std::future::pending().await;
        }
        observe(sources, &counted, parts, snapshots).await
    };
    Ok((servers, observed))
}

struct Parts {
    dataplane: Reporter,
}

async fn observe(
    sources: Sources,
    registry: &Registry,
    parts: Parts,
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
) -> String {
    loop {
        // Nothing to do, asked only for the answer: the writer of routes is alive.
        if sources.dataplane.routes().apply(Vec::new()).await.is_err() {
            return "the writer of routes has ended".to_owned();
        }
        let snapshot = take(&sources, registry).await;
        let reasons: Vec<String> = snapshot
            .node
            .readiness
            .iter()
            .filter(|part| !part.ready && decides(&part.part))
            .map(|part| {
                let reason = part.reason.as_deref().unwrap_or("no reason given");
                format!("{}: {reason}", part.part)
            })
            .collect();
        if reasons.is_empty() {
            parts.dataplane.ready(Instant::now(), "in sync");
        } else {
            parts
                .dataplane
                .not_ready(Instant::now(), reasons.join("; "));
        }
        snapshots.send_replace(Some(Arc::new(snapshot)));
        tokio::time::sleep(PERIOD).await;
    }
}

/// A pod that is being set up, or a route kept from before, does not make the node unable to serve others.
fn decides(part: &str) -> bool {
    matches!(part, "policy" | "bgpd")
}

async fn take(sources: &Sources, registry: &Registry) -> Snapshot {
    let state = sources.dataplane.state().borrow().clone();
    let bgp = if sources.identity.bgp {
        bgp_status().await
    } else {
        None
    };
    let (policy_changes, policy_latency_ms) = figures::policy_latency(registry);
    Snapshot {
        node: sources.status(),
        bgp,
        endpoints: sources.endpoints(),
        routes: state.routes.desired,
        waiting: state.routes.waiting.len(),
        tunnel_endpoints: state.tunnels.endpoints,
        policy_changes,
        policy_latency_ms,
        now: std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
    }
}

async fn bgp_status() -> Option<BgpStatus> {
    let answer: Result<BgpResponse, _> = client::ask(
        BGP_PROTOCOL,
        VERSION,
        concat!("cali-node ", env!("CARGO_PKG_VERSION")),
        &paths::bgpd_socket(),
        &BgpRequest::Status,
        ANSWER_LIMIT,
    )
    .await;
    match answer {
        Ok(BgpResponse::Status(status)) => Some(status),
        Ok(other) => {
            tracing::debug!(?other, "an unexpected answer of bgpd");
            None
        }
        Err(error) => {
            tracing::debug!(%error, "bgpd does not answer");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_the_variables() {
        let env: Env = [
            ("FELIX_HEALTHENABLED", "true"),
            ("FELIX_HEALTHHOST", "localhost"),
            ("FELIX_PROMETHEUSMETRICSENABLED", "true"),
            ("FELIX_PROMETHEUSMETRICSPORT", "9191"),
        ]
        .into_iter()
        .collect();
        assert_eq!(
            Settings::read(&env).unwrap(),
            Settings {
                health: Some("127.0.0.1:9099".parse().unwrap()),
                metrics: Some("[::]:9191".parse().unwrap()),
            }
        );
        let none: Env = std::iter::empty::<(String, String)>().collect();
        assert_eq!(
            Settings::read(&none).unwrap(),
            Settings {
                health: None,
                metrics: None
            }
        );
        let bad: Env = [("FELIX_HEALTHENABLED", "perhaps")].into_iter().collect();
        assert_eq!(
            Settings::read(&bad).unwrap_err().to_string(),
            "FELIX_HEALTHENABLED=\"perhaps\": must be true or false"
        );
    }
}
