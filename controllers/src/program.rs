//! `cali-controllers`: the cluster-wide controllers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::election::{Election, StoredLock};
use crate::gc::{self, Collector, Rules};
use crate::run;
use anyhow::{Context, Result};
use cali_ipam::Allocator;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Cluster-wide controllers of Cali: garbage collection of addresses.
#[derive(Debug, Parser)]
#[command(name = "cali-controllers", version)]
struct Arguments {
    /// Look once, write nothing, report what would be done; addresses of deleted pods show as candidates
    #[arg(long)]
    dry_run: bool,
    /// Print the report as JSON
    #[arg(long, requires = "dry_run")]
    json: bool,
    /// Name of this replica in the election
    #[arg(long, env = "CALI_CONTROLLERS_NAME")]
    name: Option<String>,
    /// Seconds that a lease holds
    #[arg(long, env = "CALI_CONTROLLERS_LEASE_SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    lease_seconds: u64,
}

/// Runs the program with the arguments and the environment of the process.
///
/// # Errors
/// It cannot start, or had to end.
#[tokio::main]
pub async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let store = cali_datastore::open_from_env().context("cannot open the datastore")?;
    if arguments.dry_run {
        let allocator = Allocator::with_system_time(Arc::clone(&store), "");
        let mut collector = Collector::new(Rules::default());
        let pass = gc::pass(&store, &allocator, &mut collector, Instant::now(), true).await;
        let (report, _) = pass.context("cannot look for garbage")?;
        if arguments.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{report}");
        }
        return Ok(());
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = arguments
        .name
        .unwrap_or_else(|| format!("{}-{}", host.trim(), std::process::id()));
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?,
        signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?,
    );
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let lock = StoredLock::new(Arc::clone(&store));
    let election = Election::new(name, Duration::from_secs(arguments.lease_seconds));
    run::run(store, &lock, election, stop).await;
    Ok(())
}
