//! `cali-controllers`: the cluster-wide controllers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::certificates::Lifetimes;
use crate::certificates::keep::Certificates;
use crate::election::{Election, StoredLock};
use crate::gc::{self, Collector, Rules};
use crate::run;
use anyhow::{Context, Result};
use cali_ipam::Allocator;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Cluster-wide controllers of Cali: garbage collection of addresses, host endpoints, addresses of services, certificates.
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
    /// Namespace of the Secrets typha-certs and node-certs
    #[arg(long, env = "NAMESPACE", default_value = "kube-system")]
    namespace: String,
    /// Namespace of the Secret cali-ca-private
    #[arg(
        long,
        env = "CALI_AUTHORITY_NAMESPACE",
        default_value = "cali-certificates"
    )]
    authority_namespace: String,
    /// Seconds that a certificate holds; it is renewed after two thirds of them
    #[arg(long, env = "CALI_CERTIFICATE_SECONDS", default_value_t = Lifetimes::default().certificate.as_secs(), value_parser = clap::value_parser!(u64).range(LIFE))]
    certificate_seconds: u64,
    /// Seconds that an authority holds; its successor is introduced after two thirds of them
    #[arg(long, env = "CALI_AUTHORITY_SECONDS", default_value_t = Lifetimes::default().authority.as_secs(), value_parser = clap::value_parser!(u64).range(LIFE))]
    authority_seconds: u64,
    /// Seconds after which every daemon has what was written into a Secret
    #[arg(long, env = "CALI_CERTIFICATE_SETTLE_SECONDS", default_value_t = Lifetimes::default().settle.as_secs(), value_parser = clap::value_parser!(u64).range(LIFE))]
    certificate_settle_seconds: u64,
}

/// Up to a hundred years.
const LIFE: std::ops::RangeInclusive<u64> = 1..=3_155_760_000;

impl Arguments {
    /// Which certificates to look after: the API server alone keeps Secrets.
    fn certificates(&self) -> Result<Option<Certificates>> {
        if std::env::var("DATASTORE_TYPE").as_deref() != Ok("kubernetes") {
            return Ok(None);
        }
        let lifetimes = Lifetimes {
            certificate: Duration::from_secs(self.certificate_seconds),
            authority: Duration::from_secs(self.authority_seconds),
            settle: Duration::from_secs(self.certificate_settle_seconds),
        };
        let lifetimes = lifetimes.check().map_err(|reason| {
            anyhow::anyhow!("CALI_CERTIFICATE_SECONDS, CALI_AUTHORITY_SECONDS, CALI_CERTIFICATE_SETTLE_SECONDS: {reason}")
        })?;
        Ok(Some(Certificates {
            namespace: self.namespace.clone(),
            authority_namespace: self.authority_namespace.clone(),
            lifetimes,
        }))
    }
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
    let certificates = arguments.certificates()?;
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
    run::run(store, &lock, election, certificates, stop).await;
    Ok(())
}
