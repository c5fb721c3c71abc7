//! `datastore export`: everything that a locked datastore holds.

use anyhow::{Context, Result, bail};
use cali_api::{AnyResource, Kind};
use cali_datastore::Datastore;

use super::archive::{self, ADDRESSES, RESOURCES, portable};
use crate::output;
use crate::progress::Progress;

/// Times that the addresses are read until twice the same was read: what was under way when the lock came may still arrive.
const ATTEMPTS: usize = 5;

pub(super) async fn run(store: &dyn Datastore) -> Result<()> {
    if !super::is_locked(store).await? {
        bail!(
            "the datastore is not locked, so nodes would go on changing it while it is copied: lock it first: calictl datastore lock"
        );
    }
    let found = store.get(&super::key()).await;
    let information = found
        .context("cannot read what the datastore says of itself")?
        .object;
    let progress = Progress::open_ended("Reading the addresses");
    let addresses = settled(store).await?;
    let mut resources = Vec::new();
    for kind in moved(store) {
        progress.now(format!(
            "Reading {} ({} resources so far)",
            kind.plural(),
            addresses.len() + resources.len()
        ));
        resources.extend(all(store, kind).await?);
    }
    drop(progress);
    output::write(archive::render(&resources, &information, &addresses)?);
    Ok(())
}

/// The kinds that are moved from or to a store, with their order. Where the store is a Kubernetes cluster, its own kinds stay
/// with it, and so do what are only views of them; a Node's settings are moved.
pub(super) fn moved(store: &dyn Datastore) -> impl Iterator<Item = Kind> + '_ {
    let has_own_cluster = !store.is_stored(Kind::Node);
    RESOURCES.into_iter().filter(move |kind| match kind {
        Kind::Node => true,
        kind if has_own_cluster => store.is_stored(*kind) && !kind.is_native(),
        _ => true,
    })
}

/// All objects of a kind. One that cannot be read would be lost, so that is an error.
pub(super) async fn all(store: &dyn Datastore, kind: Kind) -> Result<Vec<AnyResource>> {
    let list = store
        .list(kind, None)
        .await
        .with_context(|| format!("cannot list {}", kind.plural()))?;
    if let Some(bad) = list.undecodable.first() {
        bail!(
            "{} cannot be read and would be lost ({}): mend or delete it first",
            bad.key,
            bad.reason
        );
    }
    Ok(list
        .items
        .into_iter()
        .map(|item| (*item.object).clone())
        .collect())
}

/// The addresses, when they no longer change.
async fn settled(store: &dyn Datastore) -> Result<Vec<AnyResource>> {
    let mut before: Option<Vec<AnyResource>> = None;
    for _ in 0..ATTEMPTS {
        let mut now = Vec::new();
        for kind in ADDRESSES {
            now.extend(all(store, kind).await?);
        }
        let same = before.as_ref().is_some_and(|before| {
            before.len() == now.len()
                && before
                    .iter()
                    .zip(&now)
                    .all(|(old, new)| portable(old) == portable(new))
        });
        if same {
            return Ok(now);
        }
        before = Some(now);
    }
    bail!(
        "addresses are still given out or taken back although the datastore is locked: is there a node or controller of a version that does not heed the lock?"
    )
}
