//! `ipam release`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cali_controllers::check::{Check, check};
use cali_controllers::gc::apply::release;
use cali_controllers::gc::plan::{Allocation, Leak};
use cali_controllers::judge::{Orphan, Verdict};

use super::Cluster;
use super::check::{Report, head};
use crate::output;
use crate::progress::Progress;

pub(super) async fn one(cluster: &Cluster, address: IpAddr, force: bool) -> Result<()> {
    let found = check(&cluster.inventory, &cluster.facts);
    let Some(held) = found.held.get(&address) else {
        bail!("{address} is not assigned");
    };
    match &held.verdict {
        Verdict::Used(user) if !force => {
            bail!(
                "{address} is held by {} and may be in use ({user:?}); --force releases it all the same",
                held.owner
            );
        }
        Verdict::Used(_) => {
            let refused = cluster
                .allocator
                .release(&[address], held.owner.handle())
                .await?;
            if !refused.is_empty() {
                bail!("{address} has another owner by now");
            }
        }
        Verdict::Orphan(orphan) => {
            let leak = leak(cluster, &found, address, orphan)?;
            let released = release(&cluster.store, &cluster.allocator, &leak).await?;
            if released.is_empty() {
                bail!("{address} has another owner by now, or is in use");
            }
        }
    }
    output::line(format_args!("Successfully released IP address {address}"));
    Ok(())
}

fn leak(cluster: &Cluster, found: &Check, address: IpAddr, orphan: &Orphan) -> Result<Leak> {
    let held = found.held.get(&address).context("it is not assigned")?;
    let block = cluster
        .inventory
        .blocks
        .iter()
        .find(|b| b.cidr().contains(address))
        .context("it is in no block")?;
    Ok(Leak {
        addresses: vec![Allocation {
            address,
            block: block.cidr(),
            affinity: block.affinity().cloned(),
            owner: held.owner.clone(),
        }],
        orphan: orphan.clone(),
        waited: Duration::ZERO,
    })
}

pub(super) async fn from_reports(cluster: &Cluster, files: &[PathBuf], force: bool) -> Result<()> {
    let now = head(cluster).await?;
    let mut reports = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read {}", file.display()))?;
        let report: Report = serde_json::from_str(&text)
            .with_context(|| format!("{} is no report", file.display()))?;
        if report.cluster_guid != now.cluster_guid {
            bail!("{} is a report of another cluster", file.display());
        }
        if report.version != now.version && !force {
            bail!(
                "{} was written by version {}, this is {}; --force uses it all the same",
                file.display(),
                report.version,
                now.version
            );
        }
        reports.push(report);
    }
    let current = reports
        .iter()
        .any(|r| r.cluster_information_revision == now.cluster_information_revision);
    if !(current && now.datastore_locked || force) {
        bail!(
            "the datastore must be locked, and one report be made since then; --force releases all the same, after a look at each address"
        );
    }
    let unused = reports
        .iter()
        .map(unused)
        .reduce(|a, b| &a & &b)
        .unwrap_or_default();
    let found = check(&cluster.inventory, &cluster.facts);
    output::line(format_args!("Releasing {} old IPs...", unused.len()));
    let mut count = 0;
    let progress = Progress::of(unused.len(), "Releasing addresses");
    for (ip, handle) in &unused {
        progress.step();
        let Ok(address) = ip.parse::<IpAddr>() else {
            continue;
        };
        let Some(held) = found.held.get(&address) else {
            continue;
        };
        let same = held.owner.handle().unwrap_or_default() == handle;
        // A report may be old: what it calls unused must be so now.
        if let (true, Verdict::Orphan(orphan)) = (same, &held.verdict) {
            let leak = leak(cluster, &found, address, orphan)?;
            count += release(&cluster.store, &cluster.allocator, &leak)
                .await?
                .len();
        }
    }
    drop(progress);
    output::line(format_args!("Released {count} IPs successfully"));
    let handles = reports
        .iter()
        .map(|r| r.leaked_handles.iter().collect::<BTreeSet<_>>())
        .reduce(|a, b| &a & &b)
        .unwrap_or_default();
    output::line(format_args!("Deleting {} handles...", handles.len()));
    for stored in &cluster.inventory.handles {
        if !handles.contains(&stored.handle_id) {
            continue;
        }
        for cidr in stored.block.keys().filter_map(|text| text.parse().ok()) {
            cluster
                .allocator
                .forget_stale(&stored.handle_id, &cidr)
                .await?;
        }
        cluster.allocator.forget_empty(&stored.handle_id).await?;
    }
    Ok(())
}

fn unused(report: &Report) -> BTreeSet<(String, String)> {
    let entries = report.allocations.values().flatten();
    entries
        .filter(|e| !e.in_use)
        .map(|e| (e.ip.clone(), e.handle.clone()))
        .collect()
}
