//! The daemon of a node: `cali-node`, with its settings in the environment, named as Calico names them.

use std::path::Path;
use std::process::ExitCode;

use crate::cni_install::plan::host_root;
use crate::startup::settings::{HostNames, Settings};
use crate::{capabilities, daemon};
use anyhow::Context;
use cali_control::paths;
use cali_netlink::{Netlink, sysctl};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use typha::config::Env;

/// The daemon of a node. All settings are environment variables.
#[derive(Parser)]
#[command(version)]
struct Arguments {}

/// Runs the program with the arguments and the environment of the process.
#[must_use]
pub fn main() -> ExitCode {
    Arguments::parse();
    let filter = EnvFilter::try_from_env("CALI_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cali-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn run() -> anyhow::Result<()> {
    let env = Env::of_process();
    sysctl::go_through(Path::new(host_root(&env)));
    capabilities::check_essential().await?;
    let state_dir = paths::state_dir();
    let names = HostNames {
        remembered: std::fs::read_to_string(state_dir.join("nodename")).ok(),
        hostname: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default(),
    };
    let settings = Settings::read(&env, &names, &state_dir)?;
    let datastore = cali_datastore::open_from_env().context("cannot open the datastore")?;
    let netlink = Netlink::current().context("cannot talk to the kernel")?;
    tracing::info!(
        node = settings.node_name,
        version = env!("CARGO_PKG_VERSION"),
        "starting"
    );
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    Ok(daemon::run(settings, datastore, netlink, stop).await?)
}
