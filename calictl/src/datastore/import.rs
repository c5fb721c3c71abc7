//! `datastore import`: what another datastore exported, into an empty one.
//!
//! Everything is checked before the first write. An import that broke off can be run again: what stands there already just as
//! it is to be written counts as done.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::etcd::portable::entry;
use cali_datastore::{Datastore, Error};
use futures::{StreamExt, TryStreamExt};

use super::archive::{ADDRESSES, Archive, portable};
use super::export::{all, moved};
use crate::change::{change, change_stored};
use crate::manifests::{self, Document};
use crate::output;
use crate::progress::Progress;

/// Writes under way at a time.
const AT_ONCE: usize = 16;

/// Objects that are named where they stand in the way.
const NAMED: usize = 5;

pub(super) async fn run(store: &Arc<dyn Datastore>, file: &Path) -> Result<()> {
    let progress = Progress::open_ended(format!("Reading {}", file.display()));
    let archive = Archive::read(file)?;
    ensure_locked(&archive.information, file)?;
    progress.now("Comparing with the datastore to fill");
    let plan = plan(store.as_ref(), archive).await?;
    drop(progress);
    let information = plan.information.clone();
    change(store.as_ref(), &super::key(), |stored| {
        let mut object = information.clone();
        object.metadata_mut().resource_version =
            stored.and_then(|stored| stored.metadata().resource_version.clone());
        Ok::<_, Error>(object)
    })
    .await
    .context("cannot lock the datastore for the import")?;
    let written = write_all(store, &plan.resources).await? + plan.resources_there;
    output::line(format!("Successfully applied {written} resource(s)"));
    output::line("Importing IPAM resources");
    let written = write_all(store, &plan.addresses).await? + plan.addresses_there;
    output::line(format!("Successfully applied {written} IPAM resource(s)"));
    for left in &plan.left {
        output::line(left);
    }
    output::line(
        "Datastore information successfully imported. Let the nodes use this datastore, then unlock it: calictl datastore unlock",
    );
    Ok(())
}

fn ensure_locked(information: &AnyResource, file: &Path) -> Result<()> {
    if let AnyResource::ClusterInformation(information) = information
        && !information.spec.is_locked()
    {
        bail!(
            "{} was exported from a datastore that was not locked, so it may miss what was given out meanwhile: lock that one (calictl datastore lock) and export again",
            file.display()
        );
    }
    Ok(())
}

/// What is to be written.
struct Plan {
    information: AnyResource,
    resources: Vec<(Kind, Vec<AnyResource>)>,
    /// How many of them stand there already.
    resources_there: usize,
    addresses: Vec<(Kind, Vec<AnyResource>)>,
    addresses_there: usize,
    /// What is not moved, in words.
    left: Vec<String>,
}

async fn plan(store: &dyn Datastore, archive: Archive) -> Result<Plan> {
    let Archive {
        resources,
        information,
        addresses,
    } = archive;
    ensure_target(store, &information).await?;
    let kinds: Vec<Kind> = moved(store).collect();
    let mut left = Vec::new();
    let (resources, stays): (Vec<Document>, Vec<Document>) = resources
        .into_iter()
        .partition(|document| kinds.contains(&document.value.kind()));
    let mut staying: BTreeMap<Kind, usize> = BTreeMap::new();
    for document in &stays {
        *staying.entry(document.value.kind()).or_default() += 1;
    }
    for (kind, count) in staying {
        left.push(format!(
            "{count} {} are the Kubernetes cluster's own and were left to it",
            kind.plural()
        ));
    }
    let (resources, nodes): (Vec<Document>, Vec<Document>) = resources
        .into_iter()
        .partition(|document| document.value.kind() != Kind::Node || store.is_stored(Kind::Node));
    manifests::check(store, &resources).await?;
    let (mut known, mut absent) = (Vec::new(), Vec::new());
    for node in nodes {
        match store.get(&node.value.key()).await {
            Ok(_) => known.push(node.value),
            Err(Error::NotFound { .. }) => absent.push(node.value.metadata().name.clone()),
            Err(error) => return Err(anyhow!(error).context("cannot look for the nodes")),
        }
    }
    if !absent.is_empty() {
        left.push(format!(
            "{} are no nodes of the Kubernetes cluster and were left out: {}",
            absent.len(),
            absent.join(", ")
        ));
    }
    let resources: Vec<AnyResource> = resources
        .into_iter()
        .map(|document| document.value)
        .collect();
    let (mut in_the_way, mut resources_there, mut addresses_there) = (Vec::new(), 0, 0);
    let mut to_write = Vec::new();
    for kind in kinds {
        if kind == Kind::Node && !store.is_stored(kind) {
            to_write.push((kind, std::mem::take(&mut known)));
            continue;
        }
        let (missing, there) = compare(store, kind, &resources, &mut in_the_way).await?;
        resources_there += there;
        to_write.push((kind, missing));
    }
    let mut blocks = Vec::new();
    for kind in ADDRESSES {
        let (missing, there) = compare(store, kind, &addresses, &mut in_the_way).await?;
        addresses_there += there;
        blocks.push((kind, missing));
    }
    refuse(&in_the_way)?;
    Ok(Plan {
        information,
        resources: to_write,
        resources_there,
        addresses: blocks,
        addresses_there,
        left,
    })
}

/// The target may be new, or locked by whoever prepared it.
async fn ensure_target(store: &dyn Datastore, information: &AnyResource) -> Result<()> {
    let Some(found) = super::information(store).await? else {
        return Ok(());
    };
    if !found.is_locked() {
        bail!(
            "the datastore to fill is in use (ClusterInformation default says that it is ready): if nothing in it is needed, lock it first: calictl datastore lock"
        );
    }
    if let AnyResource::ClusterInformation(new) = information
        && !found.cluster_guid.is_empty()
        && found.cluster_guid != new.spec.cluster_guid
    {
        bail!(
            "the datastore to fill belongs to another cluster: its GUID is {}, that of the export is {}",
            found.cluster_guid,
            new.spec.cluster_guid
        );
    }
    Ok(())
}

/// Of one kind: what is missing, and how many stand there as they are to be. Anything else stands in the way.
async fn compare(
    store: &dyn Datastore,
    kind: Kind,
    wanted: &[AnyResource],
    in_the_way: &mut Vec<Key>,
) -> Result<(Vec<AnyResource>, usize)> {
    let wanted: Vec<&AnyResource> = wanted
        .iter()
        .filter(|object| object.kind() == kind)
        .collect();
    let by_key: HashMap<Key, usize> = (0..wanted.len())
        .rev()
        .map(|at| (wanted[at].key(), at))
        .collect();
    let mut there = BTreeSet::new();
    for stored in all(store, kind).await? {
        let key = stored.key();
        let same = by_key.get(&key).filter(|at| {
            let mut complete = wanted[**at].clone();
            cali_api::defaults(&mut complete);
            if ADDRESSES.contains(&kind) {
                entry(&complete) == entry(&stored)
            } else {
                portable(&complete) == portable(&stored)
            }
        });
        match same {
            Some(at) => drop(there.insert(*at)),
            None => in_the_way.push(key),
        }
    }
    let missing = (0..wanted.len()).filter(|at| !there.contains(at));
    let missing = missing.map(|at| wanted[at].clone()).collect();
    Ok((missing, there.len()))
}

fn refuse(in_the_way: &[Key]) -> Result<()> {
    if in_the_way.is_empty() {
        return Ok(());
    }
    let mut names: Vec<String> = in_the_way
        .iter()
        .take(NAMED)
        .map(ToString::to_string)
        .collect();
    if in_the_way.len() > NAMED {
        names.push(format!("{} more", in_the_way.len() - NAMED));
    }
    bail!(
        "the datastore to fill is not empty, and nothing was written: it has {}; delete these, or import into an empty one",
        names.join(", ")
    )
}

/// Writes objects, one kind after the other.
async fn write_all(
    store: &Arc<dyn Datastore>,
    kinds: &[(Kind, Vec<AnyResource>)],
) -> Result<usize> {
    let count = kinds.iter().map(|(_, objects)| objects.len()).sum();
    let progress = Progress::of(count, "Writing");
    for (kind, objects) in kinds {
        progress.now(format!("Writing {}", kind.plural()));
        write_kind(store, *kind, objects, &progress).await?;
    }
    Ok(count)
}

/// Writes objects of one kind, several at a time.
async fn write_kind(
    store: &Arc<dyn Datastore>,
    kind: Kind,
    objects: &[AnyResource],
    progress: &Progress,
) -> Result<()> {
    let is_view = !store.is_stored(kind);
    let writes = objects.iter().map(|object| {
        let (store, mut object) = (Arc::clone(store), object.clone());
        async move {
            let key = object.key();
            let written = if is_view {
                settings_of_node(store.as_ref(), &key, &object).await
            } else {
                let metadata = object.metadata_mut();
                metadata.resource_version = None;
                metadata.uid = None;
                metadata.creation_timestamp = None;
                store.create(object).await.map(drop)
            };
            progress.step();
            written.with_context(|| {
                format!(
                    "cannot import {key}; what was written stays, and the import can be run again"
                )
            })
        }
    });
    futures::stream::iter(writes)
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

/// Gives a Node of Kubernetes what Calico's Node says.
async fn settings_of_node(
    store: &dyn Datastore,
    key: &Key,
    wanted: &AnyResource,
) -> Result<(), Error> {
    change_stored(store, key, |stored| {
        let mut node = stored.clone();
        if let (AnyResource::Node(node), AnyResource::Node(wanted)) = (&mut node, wanted) {
            node.spec = wanted.spec.clone();
        }
        Ok(node)
    })
    .await
}
