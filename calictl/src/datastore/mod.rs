//! `calictl datastore`: the lock, and the move of everything from one datastore to another.
//!
//! A move is `lock`, `export > FILE`, `import -f FILE` with the other datastore's settings, `unlock` there. The file has
//! Calico's form, so that it also moves a cluster from Calico's etcd to here. Both spellings work: `datastore lock` and
//! `datastore migrate lock`.

mod archive;
mod export;
mod import;

pub(crate) use archive::portable;

use std::path::PathBuf;

use anyhow::{Context, Result};
use cali_api::v3::{ClusterInformation, ClusterInformationSpec};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::{Datastore, Error};
use clap::Subcommand;

use crate::change::change;
use crate::{connection, output};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Step(Step),
    /// The same commands, as calicoctl spells them
    #[command(subcommand)]
    Migrate(Step),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Step {
    /// Stop all nodes from giving out addresses, so that the datastore can be copied
    Lock,
    /// End the lock
    Unlock,
    /// Print everything that the datastore holds; it must be locked
    Export,
    /// Fill an empty datastore with what another one exported; it stays locked
    Import {
        /// What `export` has printed; `-` is standard input
        #[arg(short, long, value_name = "FILE")]
        filename: PathBuf,
    },
}

pub(crate) async fn run(command: &Command) -> Result<()> {
    let (Command::Step(step) | Command::Migrate(step)) = command;
    let store = connection::open().await?;
    match step {
        Step::Lock => set_ready(store.as_ref(), false).await,
        Step::Unlock => set_ready(store.as_ref(), true).await,
        Step::Export => export::run(store.as_ref()).await,
        Step::Import { filename } => import::run(&store, filename).await,
    }
}

fn key() -> Key {
    Key::cluster(Kind::ClusterInformation, "default")
}

/// What the datastore says of itself; `None` in one that nobody has worked with.
pub(crate) async fn information(store: &dyn Datastore) -> Result<Option<ClusterInformationSpec>> {
    match store.get(&key()).await {
        Ok(found) => Ok(match &*found.object {
            AnyResource::ClusterInformation(information) => Some(information.spec.clone()),
            _ => None,
        }),
        Err(Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(error).context("cannot see whether the datastore is locked"),
    }
}

/// Whether nodes may give out addresses.
pub(crate) async fn is_locked(store: &dyn Datastore) -> Result<bool> {
    let information = information(store).await?;
    Ok(information.is_some_and(|information| information.is_locked()))
}

async fn set_ready(store: &dyn Datastore, ready: bool) -> Result<()> {
    change(store, &key(), |stored| {
        let mut information = match stored {
            Some(AnyResource::ClusterInformation(information)) => (**information).clone(),
            _ => ClusterInformation::named("default", ClusterInformationSpec::default()),
        };
        information.spec.datastore_ready = Some(ready);
        Ok::<_, Error>(information.into())
    })
    .await
    .context("the lock was not changed")?;
    output::line(if ready {
        "Datastore unlocked."
    } else {
        "Datastore locked."
    });
    Ok(())
}
