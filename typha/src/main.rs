//! The Typha server: `typha` with its settings in the environment (`TYPHA_*`, `DATASTORE_TYPE`, `CALI_SQLITE_PATH`).

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use typha::config::{self, Env};
use typha::server::Server;
use typha::source;

/// Fan-out cache between the datastore and the nodes. All settings are environment variables (TYPHA_*).
#[derive(Parser)]
#[command(version)]
struct Arguments {}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    Arguments::parse();
    let level = std::env::var("TYPHA_LOGSEVERITYSCREEN")
        .unwrap_or_else(|_| "info".into())
        .to_lowercase();
    let filter = EnvFilter::try_from_default_env().or_else(|_| EnvFilter::try_new(level))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();

    let server = Server::bind(config::server(&Env::of_process())?)?;
    let datastore = cali_datastore::open_from_env().context("cannot open the datastore")?;
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
