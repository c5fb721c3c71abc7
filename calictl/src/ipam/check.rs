//! `ipam check`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use cali_api::{AnyResource, Kind};
use cali_controllers::check::{Check, Held, Problem, check};
use cali_controllers::judge::Verdict;
use cali_ipam::collect::Inventory;
use serde::{Deserialize, Serialize};

use super::Cluster;
use crate::output;

/// Nodes that are listed.
const TOP: usize = 20;

/// The report, with calicoctl's fields.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Report {
    pub(super) version: String,
    #[serde(rename = "clusterGUID")]
    pub(super) cluster_guid: String,
    pub(super) datastore_locked: bool,
    pub(super) cluster_information_revision: String,
    pub(super) cluster_type: String,
    pub(super) allocations: BTreeMap<String, Vec<Entry>>,
    pub(super) leaked_handles: Vec<String>,
}

/// One holder of an address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Entry {
    pub(super) ip: String,
    pub(super) handle: String,
    pub(super) in_use: bool,
    pub(super) owners: Vec<String>,
}

/// The report's head: which cluster, and whether it is locked.
pub(super) async fn head(cluster: &Cluster) -> Result<Report> {
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..Report::default()
    };
    let found = cluster.find(Kind::ClusterInformation, "default").await?;
    if let Some((AnyResource::ClusterInformation(information), revision)) = found {
        report.datastore_locked = information.spec.is_locked();
        report.cluster_guid = information.spec.cluster_guid;
        report.cluster_type = information.spec.cluster_type;
        report.cluster_information_revision = revision;
    }
    Ok(report)
}

pub(super) async fn run(
    cluster: &Cluster,
    show_all: bool,
    show_problems: bool,
    file: Option<&Path>,
) -> Result<()> {
    let found = check(&cluster.inventory, &cluster.facts);
    output::write(render(
        &cluster.inventory,
        &found,
        show_all,
        show_all || show_problems,
    ));
    if let Some(file) = file {
        let mut report = head(cluster).await?;
        for (address, held) in &found.held {
            report
                .allocations
                .entry(address.to_string())
                .or_default()
                .push(entry(address.to_string(), held));
        }
        let leaked = found.problems.iter().filter_map(|problem| match problem {
            Problem::HandleWithoutAddresses { handle } => Some(handle.clone()),
            _ => None,
        });
        report.leaked_handles = leaked.collect();
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

fn entry(ip: String, held: &Held) -> Entry {
    Entry {
        ip,
        handle: held.owner.handle().unwrap_or_default().to_owned(),
        in_use: !matches!(held.verdict, Verdict::Orphan(_)),
        owners: vec![held.owner.to_string()],
    }
}

fn render(inventory: &Inventory, found: &Check, show_all: bool, show_problems: bool) -> String {
    let mut text =
        "Checking IPAM for inconsistencies...\n\nLoading all IPAM blocks...\n".to_owned();
    let mut say = |line: String| {
        let _ = writeln!(text, "{line}");
    };
    say(format!("Found {} IPAM blocks.", inventory.blocks.len()));
    for block in &inventory.blocks {
        let owner = block
            .affinity()
            .map_or_else(|| "none".to_owned(), ToString::to_string);
        say(format!(" IPAM block {} affinity={owner}:", block.cidr()));
    }
    say(format!(
        "IPAM blocks record {} allocations.\n",
        found.held.len()
    ));
    say("Loading all IPAM pools...".to_owned());
    for pool in &inventory.pools {
        say(format!("  {}", pool.spec.cidr));
    }
    let active = inventory.pools.iter().filter(|p| !p.spec.disabled).count();
    say(format!("Found {active} active IP pools.\n"));
    say(format!(
        "Loading all nodes.\nFound {} node tunnel IPs.\n",
        found.tunnels
    ));
    say(format!(
        "Loading all workload endpoints.\nFound {} workload IPs.\nWorkloads and nodes are using {} IPs.\n",
        found.used.len() - found.tunnels.min(found.used.len()),
        found.used.len()
    ));
    if found.foreign > 0 {
        say(format!(
            "{} of them are in no active IP pool and not allocated here: another IPAM plugin's.\n",
            found.foreign
        ));
    }
    say("Loading all handles".to_owned());
    say(format!(
        "Looking for top (up to {TOP}) nodes by allocations..."
    ));
    let mut nodes: Vec<(&String, usize)> = found.by_node.iter().map(|(n, c)| (n, *c)).collect();
    nodes.sort_by_key(|(name, count)| (std::cmp::Reverse(*count), *name));
    for (name, count) in nodes.iter().take(TOP) {
        say(format!("  {name} has {count} allocations"));
    }
    if let Some((_, most)) = nodes.first() {
        let median = nodes[nodes.len() / 2].1;
        say(format!(
            "Node with most allocations has {most}; median is {median}"
        ));
    }
    if show_all {
        for (address, held) in &found.held {
            say(format!("  {address} is held by {}", held.owner));
        }
    }
    for (before, after, wanted) in scans(found) {
        if let Some(before) = before {
            say(format!("\n{before}"));
        }
        let matching: Vec<&Problem> = found.problems.iter().filter(|p| wanted(p)).collect();
        if show_problems {
            for problem in &matching {
                say(format!("  {}", line(problem)));
            }
        }
        say(after.replace("{}", &matching.len().to_string()));
    }
    say(format!(
        "\nCheck complete; found {} problems.",
        found.problems.len()
    ));
    text
}

type Scan = (Option<&'static str>, String, fn(&Problem) -> bool);

fn scans(found: &Check) -> [Scan; 6] {
    [
        (
            Some("Scanning for IPs that are allocated but not actually in use..."),
            "Found {} IPs that are allocated in IPAM but not actually in use.".to_owned(),
            |p| matches!(p, Problem::NotUsed { .. }),
        ),
        (
            Some("Scanning for IPs that are in use by a workload or node but not allocated in IPAM..."),
            "Found {} in-use IPs that are not in active IP pools.".to_owned(),
            |p| matches!(p, Problem::NotInPool { .. }),
        ),
        (
            None,
            "Found {} in-use IPs that are in active IP pools but have no corresponding IPAM allocation."
                .to_owned(),
            |p| matches!(p, Problem::NotAllocated { .. }),
        ),
        (
            Some("Scanning for IPAM handles with no matching IPs..."),
            format!(
                "Found {{}} handles with no matching IPs (and {} handles with matches).",
                found.sound_handles
            ),
            |p| matches!(p, Problem::HandleWithoutAddresses { .. }),
        ),
        (
            Some("Scanning for IPs with missing handle..."),
            "Found {} handles mentioned in blocks with no matching handle resource.".to_owned(),
            |p| matches!(p, Problem::AddressWithoutHandle { .. }),
        ),
        (
            Some("Scanning for invalid blocks..."),
            "Found {} invalid blocks.".to_owned(),
            |p| matches!(p, Problem::InvalidBlock { .. }),
        ),
    ]
}

fn line(problem: &Problem) -> String {
    match problem {
        Problem::NotUsed {
            address,
            handle,
            orphan,
        } => {
            let handle = handle.as_deref().unwrap_or("no handle");
            format!("{address} leaked; {handle}: {orphan}")
        }
        Problem::NotInPool { address, user } => {
            format!("{address} in use by {user} and not in any active pool.")
        }
        Problem::NotAllocated { address, user } => {
            format!(
                "{address} in use by {user} and in active IPAM pool but has no IPAM allocation."
            )
        }
        Problem::HandleWithoutAddresses { handle } => {
            format!("{handle} doesn't have any active IPs")
        }
        Problem::AddressWithoutHandle { address, handle } => {
            format!(
                "{handle} doesn't have a handle resource, or it does not name the block of {address}"
            )
        }
        Problem::InvalidBlock { block, reason } => format!("{block}: {reason}"),
    }
}
