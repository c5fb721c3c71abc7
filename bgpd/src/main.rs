//! The daemon `bgpd`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bgpd::agent::Agent;
use bgpd::config::{KINDS, Local};
use bgpd::sink::node::Node;
use bgpd::speaker::{Environment, Speaker};
use bgpd::transport::tcp::Tcp;
use bgpd::{control, reach};
use cali_control::paths;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// How long End-of-RIB and the removal of stale routes wait for peers after a start.
const DEFERRAL: Duration = Duration::from_secs(90);

/// BGP speaker: of a Cali node (--node).
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Runs as the speaker of this node, configured by the cluster's resources.
    #[arg(long, env = "NODENAME", value_name = "NAME")]
    node: String,
    /// How the BGP identifier is chosen: "hash", an IPv4 address, or empty for the node's IPv4 address.
    #[arg(long, env = "CALICO_ROUTER_ID", default_value = "", value_name = "ID")]
    router_id: String,
    /// Folder with passwords of peers, as FOLDER/SECRET/KEY.
    #[arg(
        long,
        env = "CALI_BGP_SECRETS_DIR",
        default_value = "/etc/calico/bgp-secrets",
        value_name = "FOLDER"
    )]
    secrets: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_env("CALI_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bgpd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let netlink =
        cali_netlink::Netlink::current().context("bgpd needs the kernel's route tables")?;
    let environment = Environment {
        transport: Arc::new(Tcp),
        sink: Box::new(Node::start(paths::routes_socket())),
        reach: Box::new(reach::Kernel::new(netlink)),
        seed: seed(),
        deferral: DEFERRAL,
    };
    let local = Local {
        router_id: arguments.router_id.parse().map_err(anyhow::Error::msg)?,
        node: arguments.node.clone(),
        ..Local::default()
    };
    let events =
        typha::source::from_env(&KINDS, &arguments.node).context("cannot follow the resources")?;
    let socket = paths::bgpd_socket();
    let listener =
        control::listen(&socket).with_context(|| format!("cannot open {}", socket.display()))?;
    let serve = |speaker: &Speaker| {
        tokio::spawn(control::serve(listener, speaker.clone()));
    };
    let agent = Agent::new(local, arguments.secrets).run(events, environment, serve);
    tokio::select! {
        task = agent => match task {
            Some(task) => task.await.context("the speaker failed"),
            None => anyhow::bail!("the stream of resources ended"),
        },
        signal = terminated() => {
            // Without a word to the peers: they keep our routes until we are back (graceful restart).
            tracing::info!(signal = signal?, "ending silently");
            Ok(())
        }
    }
}

async fn terminated() -> anyhow::Result<&'static str> {
    let (mut term, mut int) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    Ok(tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    })
}

/// Differs between processes, which is all that jitter asks for.
fn seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}
