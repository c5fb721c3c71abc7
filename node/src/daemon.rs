//! Connects the parts and keeps them running until a signal or the end of one of them.
//!
//! | part | reads | writes |
//! |---|---|---|
//! | fan-out | typha or the datastore | the streams of the parts |
//! | dataplane (`felix`) | everything, `bgpd`'s best paths, pods from the CNI server | kernel: rules, routes, tunnels, interfaces |
//! | CNI server | calls of the plugin, pods | interfaces of pods, their addresses |
//! | tunnel addresses | pools, own node, WireGuard's devices | IPAM, Node resource |
//! | own addresses | the host's interfaces | Node resource |
//! | MTU | pools, settings, devices | a file for the CNI server; interfaces of running pods |
//! | status reports | what the parts say, `bgpd` | CalicoNodeStatus resources that name this node |
//! | word | tunnels, MTU | what this node receives, in the Node resource |
//! | network condition | whether the dataplane is ready | `NetworkUnavailable` of the own node (Kubernetes) |
//! | warnings | what cannot be enforced | Events beside the objects (Kubernetes) |
//! | sockets | | status; best paths of `bgpd` |
//! | CNI install | whether the dataplane is ready | plugin and configuration where the runtime looks for them |
//! | health | what the parts say | liveness, readiness, metrics, a page |
//! | supervisor | | the process `bgpd` |
//!
//! **Fail static**: nothing in the kernel is taken back when the daemon ends, for whatever reason. An orderly stop ends `bgpd` as well (its
//! peers keep the routes, RFC 4724); a killed daemon leaves it running. A part that ends by itself ends the daemon with an error, so that
//! whatever runs it starts it anew: every part adopts what it finds.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cali_api::update::SyncEvent;
use cali_api::{AnyResource, Kind, NodeName};
use cali_cni::server::{Server, Settings as CniSettings};
use cali_control::paths;
use cali_datastore::Datastore;
use cali_ipam::Allocator;
use cali_ipam::reserve::{Keeper, Settings as KeeperSettings};
use cali_netlink::Netlink;
use cali_netlink::events::Group;
use cali_routes::{Backend, Input};
use felix::dataplane::{BackendOverride, Config, Dataplane, Handle, Servers, StatusLog};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use typha::config::Env;

use crate::capabilities::Lacking;
use crate::cni_install;
use crate::endpoints::Endpoints;
use crate::fan_out::FanOut;
use crate::health;
use crate::mtu::{self, MtuFile};
use crate::report;
use crate::routes_socket;
use crate::startup::settings::Settings;
use crate::startup::{self, StartError};
use crate::status_socket::{self, Identity, NodeAddresses, Sources};
use crate::supervisor::{Program, Supervisor};
use crate::tunnel_addresses::TunnelAddresses;
use crate::warnings;
use crate::word::{self, Teller};

/// Why the daemon could not start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Start-up.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The host.
    #[error(transparent)]
    Host(#[from] Lacking),
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
    /// The reserve of addresses.
    #[error("cannot open the reserve of addresses")]
    Reserve(#[source] cali_ipam::Error),
    /// A setting of the CNI installation or of the health port.
    #[error(transparent)]
    Setting(#[from] typha::config::ConfigError),
    /// The health or metrics port.
    #[error("cannot serve health or metrics")]
    Health(#[source] std::io::Error),
    /// The CNI server.
    #[error(transparent)]
    Cni(#[from] cali_cni::server::StartError),
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
    let mut parts = Parts::default();
    let running = start(&settings, datastore, netlink, &mut parts).await?;
    let result = tokio::select! {
        ended = parts.first_end() => Err(ended),
        () = stop => Ok(()),
    };
    match &result {
        // Orderly: the speaker goes too, silently. New pods are to go elsewhere until the next start.
        Ok(()) => {
            tracing::info!("stopping; the kernel stays as it is");
            word::tell_shutdown(running.datastore.as_ref(), &settings.node_name).await;
            if let Some(supervisor) = running.supervisor {
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

/// What must live as long as the daemon and has no end of its own.
struct Running {
    datastore: Arc<dyn Datastore>,
    supervisor: Option<Supervisor>,
    _cni: Server,
    _dataplane: Dataplane,
    _health: health::Servers,
}

async fn start(
    settings: &Settings,
    datastore: Arc<dyn Datastore>,
    netlink: Netlink,
    parts: &mut Parts,
) -> Result<Running, DaemonError> {
    let kernel = |part| move |source| DaemonError::Kernel { part, source };
    let mut fan_out = FanOut::default();
    let (reports, netns) = (datastore.clone(), netlink.netns().clone());

    let updates = fan_out.part("dataplane", &typha::source::all_kinds());
    // Of the endpoints of other nodes, the dataplane alone needs any.
    let (interest, listener) = typha::source::interest_from_env(&settings.node_name)?.unzip();
    let config = Config {
        backend: settings.backend,
        enforcement: BackendOverride::from_env(),
        servers: Servers::from_env(),
        interest,
        ..Config::new(NodeName::from(settings.node_name.as_str()))
    };
    let registry = config.metrics.clone();
    let dataplane = Dataplane::start(
        config,
        netlink.clone(),
        updates,
        Box::<StatusLog>::default(),
    );
    let dataplane = dataplane.map_err(kernel("rules, routes and tunnels"))?;
    let handle = dataplane.handle().clone();

    let events = fan_out.part("tunnel addresses", &[Kind::IPPool, Kind::Node]);
    let allocator = Allocator::with_system_time(datastore.clone(), &settings.node_name);
    let addresses = TunnelAddresses {
        datastore: datastore.clone(),
        allocator: allocator.clone(),
        dataplane: handle.state(),
    };
    parts.run_forever("tunnel addresses", addresses.run(events));

    let events = netlink
        .events(startup::follow::GROUPS)
        .map_err(kernel("addresses"))?;
    let following =
        startup::follow::follow(settings.clone(), datastore.clone(), netlink.clone(), events);
    parts.run("own addresses", following);

    let events = fan_out.part("MTU", mtu::KINDS);
    let links = netlink.events(&[Group::Link]).map_err(kernel("devices"))?;
    let path = paths::state_dir().join("mtu");
    let (applied, pods) = watch::channel(None);
    let file = MtuFile {
        path,
        netlink: netlink.clone(),
        node: settings.node_name.clone(),
        routes: handle.routes().clone(),
        dataplane: handle.state(),
        applied,
    };
    parts.run("MTU", file.run(events, links));
    let teller = Teller {
        datastore: datastore.clone(),
        node: settings.node_name.clone(),
        state: handle.state(),
        pods,
    };
    parts.run("word", teller.run());
    let network = word::tell_network(
        datastore.clone(),
        settings.node_name.clone(),
        handle.state(),
    );
    parts.run("network condition", network);

    let warnings = warnings::run(
        datastore.clone(),
        settings.node_name.clone(),
        handle.state(),
    );
    parts.run("warnings", warnings);

    let mut keeper = KeeperSettings::new(paths::state_dir().join("ipam.journal"));
    if let Some(addresses) = settings.address_reserve {
        keeper.keep(addresses);
    }
    let keeper = Keeper::open(allocator, keeper)
        .await
        .map_err(DaemonError::Reserve)?;
    let sink = Endpoints::new(handle.clone(), &netlink).map_err(kernel("connection tracking"))?;
    let at_the_end = datastore.clone();
    let cni = CniSettings::new(settings.node_name.clone());
    let cni = Server::start(cni, datastore, keeper, netlink, Arc::new(sink))?;

    let routes_socket = listen(paths::routes_socket(), 0o600)?;
    parts.run_forever(
        "routes socket",
        routes_socket::serve(routes_socket, handle.routes().clone()),
    );
    let bgp = settings.backend == Backend::Bgp;
    if !bgp {
        parts.run("BGP routes", forget_bgp(handle.clone()));
    }
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
    let (address, addresses) = watch::channel(NodeAddresses::default());
    let events = fan_out.part("own node", &[Kind::Node]);
    parts.run(
        "own node",
        follow_addresses(settings.node_name.clone(), events, address),
    );
    let sources = Sources {
        identity,
        addresses,
        dataplane: handle.clone(),
        bgpd,
    };
    let events = fan_out.part("status reports", &[Kind::CalicoNodeStatus]);
    let reports = report::Teller {
        datastore: reports,
        sources: sources.clone(),
        registry: registry.clone(),
        netns,
    };
    parts.run("status reports", reports.run(events));
    let env = Env::of_process();
    let served = health::Settings::read(&env)?;
    let (health, observed) = health::start(&served, sources.clone(), registry)
        .await
        .map_err(DaemonError::Health)?;
    parts.run("health", observed);
    if let Some(install) = cni_install(&env, settings)? {
        let from = own_folder().unwrap_or_else(|| "/".into());
        parts.run(
            "CNI install",
            cni_install::keep(install, from, handle.state()),
        );
    }
    parts.run_forever(
        "status socket",
        status_socket::serve(status_socket, sources),
    );

    let source = typha::source::from_env(
        &fan_out.kinds(),
        &settings.node_name,
        paths::kept_updates("node"),
        listener,
    )?;
    parts.run("changes", fan_out.run(source));
    Ok(Running {
        datastore: at_the_end,
        supervisor,
        _cni: cni,
        _dataplane: dataplane,
        _health: health,
    })
}

fn listen(path: PathBuf, mode: u32) -> Result<tokio::net::UnixListener, DaemonError> {
    routes_socket::bind(&path, mode).map_err(|source| DaemonError::Socket { path, source })
}

/// Where this program stands; the others stand beside it.
fn own_folder() -> Option<PathBuf> {
    Some(std::env::current_exe().ok()?.parent()?.to_owned())
}

fn cni_install(
    env: &Env,
    settings: &Settings,
) -> Result<Option<cni_install::plan::Install>, DaemonError> {
    let root = Path::new(cni_install::plan::host_root(env));
    let configurations = cni_install::runtime_configurations(root);
    Ok(cni_install::plan::plan_install(
        env,
        &configurations,
        settings.pool_v6.cidr.is_some_and(|pool| pool.is_some()),
        |path| path.exists(),
    )?)
}

/// `bgpd` from the folder of this program, else from `PATH`.
fn bgpd(settings: &Settings) -> Program {
    let beside = own_folder()
        .map(|folder| folder.join("bgpd"))
        .filter(|path| path.exists());
    Program {
        path: beside.unwrap_or_else(|| "bgpd".into()),
        arguments: Vec::new(),
        environment: vec![("NODENAME".into(), settings.node_name.clone().into())],
        record: paths::run_dir().join("bgpd.pid"),
        socket: paths::bgpd_socket(),
    }
}

/// Nobody else will say that what an earlier `bgpd` left is no longer wanted. Said once the other routes stand.
async fn forget_bgp(dataplane: Handle) -> String {
    let mut state = dataplane.state();
    let ready = state.wait_for(|state| state.ready).await.is_ok();
    let ends = [true, false].map(|v4| Input::BgpEndOfSync { v4 });
    if !ready || dataplane.routes().send(ends.to_vec()).await.is_err() {
        return "the dataplane has ended".to_owned();
    }
    std::future::pending().await
}

/// The addresses of the own node, for status.
async fn follow_addresses(
    node: String,
    mut events: mpsc::Receiver<SyncEvent>,
    addresses: watch::Sender<NodeAddresses>,
) -> String {
    while let Some(event) = events.recv().await {
        let SyncEvent::Updates(updates) = event else {
            continue;
        };
        for update in updates {
            if let Some(AnyResource::Node(own)) = update.value.as_deref()
                && own.metadata.name == node
            {
                let show = |address: Option<ipnetwork::IpNetwork>| {
                    address.map(|address| address.to_string())
                };
                addresses.send_replace(NodeAddresses {
                    ipv4: show(own.spec.ipv4()),
                    ipv6: show(own.spec.ipv6()),
                });
            }
        }
    }
    "the stream of changes ended".to_owned()
}
