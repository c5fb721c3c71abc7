//! The daemon `bgpd`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use crate::agent::{Agent, SetLevel};
use crate::bmp::{Station, Stations};
use crate::config::standalone::{self, Configuration};
use crate::config::{KINDS, Local};
use crate::metrics::Metrics;
use crate::passwords::Passwords;
use crate::sink::{Nowhere, Sink, kernel::Kernel, node::Node};
use crate::speaker::{Environment, Speaker};
use crate::transport::tcp::Tcp;
use crate::{control, devices, reach};
use anyhow::Context;
use cali_api::v3::LogLevel;
use cali_control::paths;
use cali_netlink::Netlink;
use cali_telemetry::{Endpoint, Registry, Serving};
use clap::{Parser, Subcommand};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use typha::secrets::Secrets;

/// How long End-of-RIB and the removal of stale routes wait for peers after a start.
const DEFERRAL: Duration = Duration::from_secs(90);

/// BGP speaker: of a Cali node (--node), or alone (--config).
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Runs as the speaker of this node, configured by the cluster's resources.
    #[arg(long, env = "NODENAME", value_name = "NAME")]
    node: Option<String>,
    /// Runs alone, configured by this file, and writes kernel routes itself.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How the BGP identifier of a node is chosen: "hash", an IPv4 address, or empty for the node's IPv4 address.
    #[arg(long, env = "CALICO_ROUTER_ID", default_value = "", value_name = "ID")]
    router_id: String,
    /// Folder with passwords of a node's peers, as FOLDER/SECRET/KEY; it counts before the cluster's secrets.
    #[arg(
        long,
        env = "CALI_BGP_SECRETS_DIR",
        default_value = "/etc/calico/bgp-secrets",
        value_name = "FOLDER"
    )]
    secrets: PathBuf,
    /// Serves Prometheus metrics at this address and port.
    #[arg(long, env = "CALI_BGP_METRICS_ADDRESS", value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// Monitoring stations (BMP, RFC 7854) of a node, each ADDRESS:PORT with ",before", ",after" or ",both": routes
    /// before or after the import policy. With --config the file names them.
    #[arg(
        long,
        env = "CALI_BGP_BMP_STATIONS",
        value_delimiter = ' ',
        value_name = "ADDRESS:PORT[,ROUTES]"
    )]
    bmp: Vec<Station>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Says whether a configuration file can be used.
    Check {
        /// The file.
        file: PathBuf,
    },
}

/// Runs the program with the arguments and the environment of the process.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let log = tracing_subscriber::fmt()
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .with_env_filter(log_filter(None))
        .with_filter_reloading();
    let handle = log.reload_handle();
    log.init();
    let set_level = Box::new(move |level| {
        if let Err(error) = handle.reload(log_filter(level)) {
            tracing::warn!(%error, "the level of the log cannot be changed");
        }
    });
    let result = match &arguments {
        Arguments {
            command: Some(Command::Check { file }),
            ..
        } => check(file),
        // A file on the command line counts more than a node's name in the environment.
        Arguments {
            config: Some(file), ..
        } => run_alone(file, &arguments),
        Arguments {
            node: Some(node), ..
        } => run_on_node(node, &arguments, set_level),
        _ => Err(anyhow::anyhow!(
            "either --node NAME or --config FILE is needed"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bgpd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `CALI_LOG` counts before `logSeverityScreen`, and that before "info".
fn log_filter(level: Option<LogLevel>) -> EnvFilter {
    EnvFilter::try_from_env("CALI_LOG").unwrap_or_else(|_| {
        EnvFilter::new(match level {
            Some(LogLevel::Trace) => "trace",
            Some(LogLevel::Debug) => "debug",
            Some(LogLevel::Info) | None => "info",
            Some(LogLevel::Warning) => "warn",
            Some(LogLevel::Error | LogLevel::Fatal | LogLevel::Panic) => "error",
            Some(LogLevel::None) => "off",
        })
    })
}

fn read_configuration(file: &Path) -> anyhow::Result<Configuration> {
    let text =
        std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    standalone::parse(&text).with_context(|| file.display().to_string())
}

fn check(file: &Path) -> anyhow::Result<()> {
    let settings = read_configuration(file)?.settings;
    println!(
        "{}: {} neighbors, {} routes",
        file.display(),
        settings.neighbours.len(),
        settings.originated.len()
    );
    Ok(())
}

fn kernel() -> anyhow::Result<Netlink> {
    Netlink::current().context("bgpd needs the kernel's route tables")
}

fn environment(netlink: Netlink, sink: Box<dyn Sink>) -> Environment {
    Environment {
        transport: Arc::new(Tcp),
        sink,
        reach: Box::new(reach::Kernel::new(netlink)),
        seed: seed(),
        deferral: DEFERRAL,
    }
}

fn open_control() -> anyhow::Result<UnixListener> {
    let socket = paths::bgpd_socket();
    control::listen(&socket).with_context(|| format!("cannot open {}", socket.display()))
}

#[tokio::main]
async fn run_on_node(node: &str, arguments: &Arguments, set_level: SetLevel) -> anyhow::Result<()> {
    let netlink = kernel()?;
    let devices = devices::follow(netlink.clone()).context("cannot read the kernel's routes")?;
    let environment = environment(netlink, Box::new(Node::start(paths::routes_socket())));
    let local = Local {
        router_id: arguments.router_id.parse().map_err(anyhow::Error::msg)?,
        node: node.to_owned(),
        ..Local::default()
    };
    // Only workloads of this node can be peers.
    let endpoints = typha::source::interest_from_env(node)?.map(|(_, listener)| listener);
    let events = typha::source::from_env(&KINDS, node, paths::kept_updates("bgpd"), endpoints)
        .context("cannot follow the resources")?;
    let listener = open_control()?;
    let started = std::sync::OnceLock::new();
    let metrics = Metrics::default();
    let _serving = serve_metrics(arguments.metrics, &metrics).await?;
    let stations = std::sync::Mutex::new(None);
    let answers = control::Answers::default();
    let serve = |speaker: &Speaker| {
        metrics.of(speaker);
        // The agent starts one speaker only.
        let _ = started.set(speaker.clone());
        let mut told = Stations::new(speaker.clone());
        told.follow(&arguments.bmp);
        if let Ok(mut stations) = stations.lock() {
            *stations = Some(told);
        }
        tokio::spawn(control::serve(listener, speaker.clone(), answers.clone()));
    };
    let mut passwords = Passwords::in_folder(arguments.secrets.clone());
    if let Some(secrets) = Secrets::from_env().context("cannot read secrets")? {
        passwords = passwords.with_cluster(secrets);
    }
    let agent = Agent::new(local, passwords)
        .with_devices(devices)
        .with_log_level(set_level)
        .run(events, environment, serve);
    tokio::select! {
        task = agent => match task {
            Some(task) => {
                answers.given().await;
                task.await.context("the speaker failed")
            }
            None => anyhow::bail!("the stream of resources ended"),
        },
        signal = terminated() => {
            // Without a word to the peers: they keep our routes until we are back (graceful restart).
            tracing::info!(signal = signal?, "ending silently");
            if let Some(speaker) = started.get() {
                speaker.prepare_restart().await?;
            }
            let told = stations.lock().ok().and_then(|mut stations| stations.take());
            if let Some(stations) = told {
                stations.end().await;
            }
            Ok(())
        }
    }
}

#[tokio::main]
async fn run_alone(file: &Path, arguments: &Arguments) -> anyhow::Result<()> {
    let Configuration {
        settings,
        install,
        stations: named,
    } = read_configuration(file)?;
    let netlink = kernel()?;
    let sink: Box<dyn Sink> = if install {
        let kernel = Kernel::start(kernel()?, kernel()?);
        Box::new(kernel.context("cannot start the writer of routes")?)
    } else {
        Box::new(Nowhere)
    };
    let listener = open_control()?;
    let (speaker, mut task) = Speaker::start(environment(netlink, sink), settings);
    let metrics = Metrics::default();
    metrics.of(&speaker);
    let _serving = serve_metrics(arguments.metrics, &metrics).await?;
    let answers = control::Answers::default();
    tokio::spawn(control::serve(listener, speaker.clone(), answers.clone()));
    let mut stations = Stations::new(speaker.clone());
    stations.follow(&named);
    let mut reload = signal(SignalKind::hangup())?;
    loop {
        tokio::select! {
            end = &mut task => {
                answers.given().await;
                return end.context("the speaker failed");
            }
            _ = reload.recv() => match read_configuration(file) {
                Ok(next) => {
                    if next.install != install {
                        tracing::warn!("a change of install counts from the next start on");
                    }
                    speaker.configure(next.settings).await?;
                    stations.follow(&next.stations);
                }
                Err(error) => tracing::error!(error = format!("{error:#}"), "the old configuration stays"),
            },
            signal = terminated() => {
                tracing::info!(signal = signal?, "ending silently");
                speaker.prepare_restart().await?;
                stations.end().await;
                return Ok(());
            }
        }
    }
}

/// Serves metrics for as long as the returned value lives, where an address is named.
async fn serve_metrics(
    address: Option<SocketAddr>,
    metrics: &Metrics,
) -> anyhow::Result<Option<Serving>> {
    let Some(address) = address else {
        return Ok(None);
    };
    let registry = Registry::new();
    registry.register(Box::new(metrics.clone()))?;
    let serving = Endpoint::default().metrics(registry).serve(address).await;
    let serving = serving.with_context(|| format!("cannot serve metrics at {address}"))?;
    Ok(Some(serving))
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
