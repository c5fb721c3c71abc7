//! Connects the parts and keeps them running until a signal or the end of one of them.
//!
//! | part | reads | writes |
//! |---|---|---|
//! | fan-out | typha or the datastore | the streams of the parts |
//! | routes | datastore, `bgpd` | kernel routes |
//! | tunnels | pools, nodes, routes in use | kernel devices, FDB, neighbours |
//! | tunnel addresses | pools, own node | IPAM, Node resource |
//! | sockets | | status, and best paths of `bgpd` |
//! | supervisor | | the process `bgpd` |
//!
//! **Fail static**: nothing in the kernel is taken back when the daemon ends, for whatever reason. An orderly stop ends `bgpd` as well (its
//! peers keep the routes, RFC 4724); a killed daemon leaves it running. A part that ends by itself ends the daemon with an error, so that
//! whatever runs it starts it anew: every part adopts what it finds.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::v3::IPPool;
use cali_api::{AnyResource, Kind, NodeName};
use cali_control::paths;
use cali_datastore::Datastore;
use cali_ipam::Allocator;
use cali_netlink::Netlink;
use cali_routes::{Backend, Input, KernelSettings, Writer, WriterGone};
use ipip_vxlan::{GatewaysInUse, Tunnels, Wish};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::capabilities::{Lacking, check_pools};
use crate::fan_out::FanOut;
use crate::route_feed::{self, RouteFeed};
use crate::routes_socket;
use crate::startup::settings::Settings;
use crate::startup::{self, StartError};
use crate::status_socket::{self, Identity, NodeView, Sources};
use crate::supervisor::{Program, Supervisor};
use crate::tunnel_addresses::TunnelAddresses;

/// Why the daemon could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Start-up.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The host.
    #[error(transparent)]
    Host(#[from] Lacking),
    /// The pools could not be read.
    #[error("cannot read the pools")]
    Pools(#[source] cali_datastore::Error),
    /// The source of changes.
    #[error(transparent)]
    Source(#[from] typha::source::SourceError),
    /// The kernel refused a subscription or dump at the start.
    #[error("cannot take over {part} from the kernel")]
    Kernel {
        /// Which part.
        part: &'static str,
        /// Why.
        source: cali_netlink::Error,
    },
    /// A socket.
    #[error("cannot listen on {path}")]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A part ended by itself.
    #[error("{part} ended: {reason}")]
    Ended {
        /// Which part.
        part: &'static str,
        /// Why.
        reason: String,
    },
}

/// Runs the node until `stop` is done.
pub async fn run(
    settings: Settings,
    datastore: Arc<dyn Datastore>,
    netlink: Netlink,
    stop: impl Future<Output = ()>,
) -> Result<(), DaemonError> {
    startup::prepare(&settings, &datastore, &netlink).await?;
    check_pools(
        &read_pools(datastore.as_ref())
            .await
            .map_err(DaemonError::Pools)?,
    )
    .await?;
    let mut parts = Parts::default();
    let supervisor = start(&settings, datastore, netlink, &mut parts)?;
    let result = tokio::select! {
        ended = parts.first_end() => Err(ended),
        () = stop => Ok(()),
    };
    match &result {
        // Orderly: the speaker goes too, silently.
        Ok(()) => {
            tracing::info!("stopping; the kernel stays as it is");
            if let Some(supervisor) = supervisor {
                supervisor.stop().await;
            }
        }
        // The next start adopts the speaker.
        Err(error) => tracing::error!(%error, "ending; the kernel and bgpd stay as they are"),
    }
    result
}

/// The running parts: the first that ends ends the daemon.
#[derive(Default)]
struct Parts(JoinSet<(&'static str, String)>);

impl Parts {
    fn run<F>(&mut self, name: &'static str, work: F)
    where
        F: Future<Output: std::fmt::Display> + Send + 'static,
    {
        self.0.spawn(async move { (name, work.await.to_string()) });
    }

    fn run_forever(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            work.await;
            (name, "its task returned".to_owned())
        });
    }

    async fn first_end(&mut self) -> DaemonError {
        match self.0.join_next().await {
            Some(Ok((part, reason))) => DaemonError::Ended { part, reason },
            Some(Err(error)) => DaemonError::Ended {
                part: "a part",
                reason: error.to_string(),
            },
            // Not reached: there are parts.
            None => DaemonError::Ended {
                part: "the daemon",
                reason: "it has no parts".to_owned(),
            },
        }
    }
}

async fn read_pools(datastore: &dyn Datastore) -> Result<Vec<IPPool>, cali_datastore::Error> {
    let list = datastore.list(Kind::IPPool, None).await?;
    let pool = |object: &AnyResource| match object {
        AnyResource::IPPool(pool) => Some((**pool).clone()),
        _ => None,
    };
    Ok(list
        .items
        .iter()
        .filter_map(|item| pool(&item.object))
        .collect())
}

fn start(
    settings: &Settings,
    datastore: Arc<dyn Datastore>,
    netlink: Netlink,
    parts: &mut Parts,
) -> Result<Option<Supervisor>, DaemonError> {
    let local = NodeName::from(settings.node_name.as_str());
    let mut fan_out = FanOut::default();

    let kernel = |part| move |source| DaemonError::Kernel { part, source };
    let writer = Writer::start(local.clone(), netlink.clone(), KernelSettings::default())
        .map_err(kernel("routes"))?;
    let feed = RouteFeed::new(local.clone(), settings.backend);
    let (wish_out, wish) = watch::channel(Wish::new(feed.resolver().clone()));
    let (in_use_out, in_use) = watch::channel(GatewaysInUse::new());
    let tunnels = Tunnels::start(netlink, wish, in_use).map_err(kernel("tunnels"))?;
    let tunnel_state = tunnels.state();
    let (view_out, view) = watch::channel(NodeView::default());
    parts.run(
        "gateways in use",
        follow_gateways(writer.clone(), in_use_out),
    );
    let events = fan_out.part("routes", route_feed::KINDS);
    parts.run(
        "routes",
        feed_routes(feed, events, writer.clone(), wish_out, view_out, tunnels),
    );

    let events = fan_out.part("tunnel addresses", &[Kind::IPPool, Kind::Node]);
    let allocator = Allocator::with_system_time(datastore.clone(), &settings.node_name);
    let addresses = TunnelAddresses {
        datastore,
        allocator,
    };
    parts.run_forever("tunnel addresses", addresses.run(events));

    let routes_socket = listen(paths::routes_socket(), 0o600)?;
    parts.run_forever(
        "routes socket",
        routes_socket::serve(routes_socket, writer.clone()),
    );

    let bgp = settings.backend == Backend::Bgp;
    let supervisor = bgp.then(|| Supervisor::start(bgpd(settings)));
    let bgpd = supervisor
        .as_ref()
        .map_or_else(|| watch::channel(None).1, Supervisor::pid);
    // Readable by all, as Calico's status is not a secret: `calictl node status` works without root.
    let status_socket = listen(paths::node_socket(), 0o666)?;
    let started_at = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let identity = Identity {
        node: settings.node_name.clone(),
        started_at,
        bgp,
    };
    let sources = Sources {
        identity,
        view,
        writer,
        tunnels: tunnel_state,
        bgpd,
    };
    parts.run_forever(
        "status socket",
        status_socket::serve(status_socket, sources),
    );

    let source = typha::source::from_env(&fan_out.kinds(), &settings.node_name)?;
    parts.run("changes", fan_out.run(source));
    Ok(supervisor)
}

fn listen(path: PathBuf, mode: u32) -> Result<tokio::net::UnixListener, DaemonError> {
    routes_socket::bind(&path, mode).map_err(|source| DaemonError::Socket { path, source })
}

/// `bgpd` from the folder of this program, else from `PATH`.
fn bgpd(settings: &Settings) -> Program {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join("bgpd")))
        .filter(|path| path.exists());
    Program {
        path: beside.unwrap_or_else(|| "bgpd".into()),
        arguments: Vec::new(),
        environment: vec![("NODENAME".into(), settings.node_name.clone().into())],
        record: paths::run_dir().join("bgpd.pid"),
        socket: paths::bgpd_socket(),
    }
}

/// Tells the tunnels what routes still need.
async fn follow_gateways(writer: Writer, in_use: watch::Sender<GatewaysInUse>) -> WriterGone {
    let mut state = writer.state();
    loop {
        let gateways = state.borrow_and_update().gateways.clone();
        in_use.send_if_modified(|current| {
            let changed = *current != gateways;
            *current = gateways;
            changed
        });
        if state.changed().await.is_err() {
            return WriterGone;
        }
    }
}

/// Feeds the route table and the tunnels from the datastore. Owns the tunnels: they end with it.
async fn feed_routes(
    mut feed: RouteFeed,
    mut events: mpsc::Receiver<SyncEvent>,
    writer: Writer,
    wish: watch::Sender<Wish>,
    view: watch::Sender<NodeView>,
    _tunnels: Tunnels,
) -> String {
    while let Some(event) = events.recv().await {
        let in_sync = event == SyncEvent::Status(SyncStatus::InSync);
        let inputs = feed.on_event(&event);
        // Devices before routes: what a route leads to should be there first.
        wish.send_modify(|wish| {
            wish.resolver = feed.resolver().clone();
            wish.settings = feed.tunnel_settings();
            wish.in_sync |= in_sync;
        });
        view.send_if_modified(|view| {
            let before = view.clone();
            let local = feed.resolver().local();
            view.ipv4 = local
                .and_then(|node| node.v4)
                .map(|address| address.to_string());
            view.ipv6 = local
                .and_then(|node| node.v6)
                .map(|address| address.to_string());
            view.notices = feed.notices().to_vec();
            view.in_sync |= in_sync;
            *view != before
        });
        if let Err(error) = writer.send(inputs).await {
            return error.to_string();
        }
        if in_sync && !feed.uses_bgp() {
            // Nobody else will say that what an earlier bgpd left is no longer wanted.
            let ends = [true, false].map(|v4| Input::BgpEndOfSync { v4 });
            if let Err(error) = writer.send(ends.to_vec()).await {
                return error.to_string();
            }
        }
    }
    "the stream of changes ended".to_owned()
}
