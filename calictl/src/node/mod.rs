//! `calictl node`: the node that this command runs on.

mod checksystem;
mod leftovers;
mod path;
pub(crate) mod reports;
pub(crate) mod status;

use crate::diags;
use anyhow::{Context, Result};
use clap::{Subcommand, ValueEnum};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Whether Cali runs here, and its BGP peers
    Status(status::Status),
    /// Try out whether this host, and the paths to the other nodes, can do what Cali asks of them
    Checksystem {
        /// Accepted as `calicoctl` does and not read: what the kernel can do is tried out
        #[arg(short = 'f', long, value_name = "PATH")]
        kernel_config: Option<std::path::PathBuf>,
    },
    /// Remove what Calico or flannel has left on this host; shows what it would do, and does it with --yes
    Takeover(leftovers::Takeover),
    /// Remove every trace of Cali from this host; shows what it would do, and does it with --yes
    Cleanup(leftovers::Cleanup),
    /// Collect what somebody needs who is to find a fault of this node: one archive, secrets masked
    Diags(diags::node::Diags),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

pub(crate) async fn run(command: &Command) -> Result<ExitCode> {
    match command {
        Command::Status(arguments) => status::run(arguments).await,
        Command::Checksystem { .. } => checksystem::run().await,
        Command::Takeover(arguments) => leftovers::takeover(arguments).await,
        Command::Cleanup(arguments) => leftovers::cleanup(arguments).await,
        Command::Diags(arguments) => diags::node::run(arguments).await,
    }
}

pub(crate) fn now() -> Result<u64> {
    Ok(SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock stands before 1970")?
        .as_secs())
}
