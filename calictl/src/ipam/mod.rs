//! `calictl ipam`: addresses, who holds them, what is wrong, and the settings they are given by.

mod check;
mod configure;
mod release;
mod show;
mod split;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use cali_api::{AnyResource, Key, Kind};
use cali_controllers::facts::Facts;
use cali_controllers::gc;
use cali_datastore::{Datastore, Error};
use cali_ipam::Allocator;
use cali_ipam::collect::Inventory;
use clap::Subcommand;

use crate::connection;
use crate::progress::Progress;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show how much of the pools is in use, or who holds an address
    Show {
        /// Show who holds this address
        #[arg(long)]
        ip: Option<IpAddr>,
        /// Show the blocks as well
        #[arg(long)]
        show_blocks: bool,
        /// Show the addresses that nodes borrow from each other's blocks
        #[arg(long)]
        show_borrowed: bool,
        /// Show the settings of address management
        #[arg(long)]
        show_configuration: bool,
    },
    /// Compare what is stored with who is in the cluster
    Check {
        /// Print every address
        #[arg(long)]
        show_all_ips: bool,
        /// Print the addresses that have a problem
        #[arg(long)]
        show_problem_ips: bool,
        /// Write a report that `release --from-report` takes
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Take addresses back that nobody uses
    Release {
        /// This address
        #[arg(long, required_unless_present = "from_report")]
        ip: Option<IpAddr>,
        /// Everything that all of these reports found unused (repeatable)
        #[arg(long, value_name = "FILE", conflicts_with = "ip")]
        from_report: Vec<PathBuf>,
        /// Also an address that is in use, and reports of an unlocked datastore
        #[arg(long)]
        force: bool,
    },
    /// Change the settings of address management
    Configure(configure::Configure),
    /// Cut a pool into smaller ones, in a locked datastore
    Split(split::Split),
}

/// What every command looks at.
struct Cluster {
    store: Arc<dyn Datastore>,
    allocator: Allocator,
    inventory: Inventory,
    facts: Facts,
}

impl Cluster {
    async fn read() -> Result<Self> {
        let store = connection::open().await?;
        let allocator = Allocator::with_system_time(Arc::clone(&store), "");
        let _progress = Progress::open_ended("Reading addresses, workloads and nodes");
        let (inventory, facts) = gc::read(&store, &allocator)
            .await
            .context("cannot read the addresses")?;
        Ok(Self {
            store,
            allocator,
            inventory,
            facts,
        })
    }

    async fn find(&self, kind: Kind, name: &str) -> Result<Option<(AnyResource, String)>> {
        match self.store.get(&Key::cluster(kind, name)).await {
            Ok(found) => Ok(Some((
                found.object.as_ref().clone(),
                found.revision.to_string(),
            ))),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(other) => Err(other.into()),
        }
    }
}

pub(crate) async fn run(command: &Command) -> Result<()> {
    match command {
        Command::Configure(configure) => return configure::run(configure).await,
        Command::Split(split) => return split::run(split).await,
        _ => {}
    }
    let cluster = Cluster::read().await?;
    match command {
        Command::Show { ip: Some(ip), .. } => {
            crate::output::write(show::address(&cluster.inventory, *ip));
            Ok(())
        }
        Command::Show {
            show_blocks,
            show_borrowed,
            show_configuration,
            ..
        } => show::run(&cluster, *show_blocks, *show_borrowed, *show_configuration).await,
        Command::Check {
            show_all_ips,
            show_problem_ips,
            output,
        } => {
            check::run(
                &cluster,
                *show_all_ips,
                *show_problem_ips,
                output.as_deref(),
            )
            .await
        }
        Command::Release {
            ip: Some(ip),
            force,
            ..
        } => release::one(&cluster, *ip, *force).await,
        Command::Release {
            from_report, force, ..
        } => release::from_reports(&cluster, from_report, *force).await,
        Command::Configure(_) | Command::Split(_) => Ok(()),
    }
}
