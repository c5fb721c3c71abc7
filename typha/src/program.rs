//! The Typha server: `typha` with its settings in the environment (`TYPHA_*`, `DATASTORE_TYPE`, `CALI_SQLITE_PATH`).

use crate::config::{self, Env};
use crate::server::Server;
use crate::source;
use anyhow::Context;
use cali_telemetry::Endpoint;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Fan-out cache between the datastore and the nodes. All settings are environment variables (TYPHA_*).
#[derive(Parser)]
#[command(version)]
struct Arguments {}

/// Runs the program with the arguments and the environment of the process.
///
/// # Errors
/// It cannot start, or had to end.
#[tokio::main]
pub async fn main() -> anyhow::Result<()> {
    Arguments::parse();
    let env = Env::of_process();
    let level = config::log_level(env.get("TYPHA_LOGSEVERITYSCREEN").unwrap_or("info"));
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(level))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();

    let server = Server::bind(config::server(&env)?)?;
    let [health, metrics] = config::telemetry(&env)?;
    let mut served = Vec::new();
    if let Some(address) = health {
        let endpoint = Endpoint::default().health(server.health());
        served.push(endpoint.serve(address).await.context("TYPHA_HEALTHPORT")?);
    }
    if let Some(address) = metrics {
        let endpoint = Endpoint::default().metrics(server.registry());
        let serving = endpoint.serve(address).await;
        served.push(serving.context("TYPHA_PROMETHEUSMETRICSPORT")?);
    }
    let datastore = match env.get("TYPHA_DATASTORETYPE") {
        Some(kind) if env.get("DATASTORE_TYPE").is_none() => cali_datastore::open(kind),
        _ => cali_datastore::open_from_env(),
    };
    let datastore = datastore.context("cannot open the datastore")?;
    let source = cali_datastore::sync::start(datastore, &source::all_kinds());
    tracing::info!(address = %server.local_addr()?, version = env!("CARGO_PKG_VERSION"), "serving");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    server
        .run(source, async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
        .await?;
    Ok(())
}
