//! `felix`: policy only. It programs the endpoints whose interfaces somebody else made, in the network namespace that
//! it is started in. All settings are environment variables.

use crate::dataplane::{BackendOverride, Config, Dataplane, Servers, StatusLog};
use anyhow::{Context, bail};
use cali_api::NodeName;
use cali_netlink::Netlink;
use cali_netlink::probe::{Capability, probe};
use cali_routes::Backend;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Policy enforcement for endpoints whose interfaces exist already.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Name of this node in the datastore; the host's name where nothing is said.
    #[arg(long, env = "FELIX_FELIXHOSTNAME")]
    node: Option<String>,
    /// What carries routes between nodes: bird, vxlan or none.
    #[arg(long, env = "CALICO_NETWORKING_BACKEND", default_value = "bird")]
    backend: String,
    /// Lowest severity that is logged.
    #[arg(long, env = "FELIX_LOGSEVERITYSCREEN", default_value = "info")]
    log: String,
}

fn backend(text: &str) -> anyhow::Result<Backend> {
    Ok(match text {
        "bird" => Backend::Bgp,
        "vxlan" => Backend::Vxlan,
        "none" => Backend::None,
        other => bail!("CALICO_NETWORKING_BACKEND is '{other}'; it can be bird, vxlan or none"),
    })
}

fn node_name(given: Option<String>) -> anyhow::Result<NodeName> {
    let name = given
        .or_else(|| std::env::var("NODENAME").ok())
        .or_else(|| std::env::var("HOSTNAME").ok())
        .or_else(|| std::fs::read_to_string("/proc/sys/kernel/hostname").ok())
        .map(|name| name.trim().to_lowercase())
        .filter(|name| !name.is_empty());
    Ok(NodeName::from(name.context(
        "this host has no name; set FELIX_FELIXHOSTNAME",
    )?))
}

/// Runs the program with the arguments and the environment of the process.
///
/// # Errors
/// It cannot start, or had to end.
#[tokio::main]
pub async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env()
        .or_else(|_| EnvFilter::try_new(arguments.log.to_lowercase()))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();

    let backend = backend(&arguments.backend)?;
    let missing: Vec<String> = probe(&[Capability::Root, Capability::NfTables])
        .await
        .into_iter()
        .filter_map(|(_, result)| result.err().map(|missing| missing.to_string()))
        .collect();
    if !missing.is_empty() {
        bail!("felix cannot run here: {}", missing.join("; "));
    }
    let node = node_name(arguments.node)?;
    let netlink = Netlink::current().context("cannot open netlink")?;
    let interest = typha::source::interest_from_env(node.as_str())?;
    let (interest, listener) = interest.unzip();
    let updates = typha::source::from_env(
        &typha::source::all_kinds(),
        node.as_str(),
        cali_control::paths::kept_updates("felix"),
        listener,
    )?;
    tracing::info!(%node, version = env!("CARGO_PKG_VERSION"), "starting");
    let config = Config {
        backend,
        enforcement: BackendOverride::from_env(),
        servers: Servers::from_env(),
        interest,
        ..Config::new(node)
    };
    let dataplane = Dataplane::start(config, netlink, updates, Box::<StatusLog>::default())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending; the kernel keeps what it has");
    drop(dataplane);
    Ok(())
}
