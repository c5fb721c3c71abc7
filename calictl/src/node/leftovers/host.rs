//! Reads what is on this host. It decides nothing: [`super::plan`] does.

use super::owner::Owner;
use super::plan::{Host, Known};
use crate::connection;
use anyhow::{Context, Result};
use cali_api::{AnyResource, Kind, kubernetes};
use cali_control::{node_name, paths};
use cali_netlink::ipset::{IpSets, SetMember};
use cali_netlink::{IpNetwork, Netlink, Nft, RouteFilter};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long the datastore may take. Without it running pods are left alone.
const DATASTORE_LIMIT: Duration = Duration::from_secs(5);
/// The sets in which Calico keeps its pools.
const POOL_SETS: [&str; 2] = ["cali40all-ipam-pools", "cali60all-ipam-pools"];
const SUBNET_FILE: &str = "/run/flannel/subnet.env";
/// So many files are looked at in all: the places hold dozens.
const FILE_LIMIT: usize = 10_000;

pub(super) fn read(owner: Owner, netlink: &Netlink, root: &Path) -> Result<Host> {
    let (run_dir, state_dir) = (paths::run_dir(), paths::state_dir());
    let processes = processes();
    let running = |owner: Owner| {
        let found = processes
            .iter()
            .filter(move |(name, command)| owner.runs_as(name, command));
        found.map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    let nft = Nft::open(netlink.netns())?;
    let tables = nft.tables()?.into_iter().map(|table| table.name).collect();
    let mut sets = Vec::new();
    if !owner.sets().is_empty()
        && let Ok(all) = IpSets::open(netlink.netns())
    {
        for prefix in owner.sets() {
            sets.extend(all.names(prefix)?);
        }
    }
    let mut files = BTreeSet::new();
    for place in owner.places(&run_dir, &state_dir) {
        if is_anothers(root, &place) {
            continue;
        }
        walk(root, place, &mut files);
    }
    Ok(Host {
        running: running(owner),
        cali_runs: !running(Owner::Cali).is_empty(),
        links: netlink.dump_links()?,
        addresses: netlink.dump_addresses(None)?,
        routes: netlink.dump_routes(&RouteFilter::default())?,
        rules: netlink.dump_rules()?,
        // Kernels before 5.3 have none.
        nexthops: netlink.dump_nexthops().unwrap_or_default(),
        tables,
        iptables: iptables()?,
        sets,
        files,
        state_dir,
    })
}

/// Names and command lines of the processes in this network namespace, without this one.
fn processes() -> Vec<(String, String)> {
    let own = std::fs::read_link("/proc/self/ns/net").ok();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let process = |entry: std::fs::DirEntry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let folder = entry.path();
        let there = std::fs::read_link(folder.join("ns/net")).ok()?;
        if pid == std::process::id() || Some(there) != own {
            return None;
        }
        let name = std::fs::read_to_string(folder.join("comm")).ok()?;
        let command = std::fs::read(folder.join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        Some((name.trim().to_owned(), command))
    };
    entries.flatten().filter_map(process).collect()
}

/// What the `-save` programs that are installed print. The legacy tables are not brought into use by looking at them.
fn iptables() -> Result<BTreeMap<&'static str, String>> {
    let used = |file: &str| {
        std::fs::read_to_string(Path::new("/proc/self/net").join(file))
            .is_ok_and(|names| !names.trim().is_empty())
    };
    let mut all = BTreeMap::new();
    for (program, in_use) in [
        ("iptables-legacy", used("ip_tables_names")),
        ("ip6tables-legacy", used("ip6_tables_names")),
        ("iptables-nft", true),
        ("ip6tables-nft", true),
    ] {
        if !in_use {
            continue;
        }
        let output = match Command::new(format!("{program}-save")).output() {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                return Err(error).with_context(|| format!("cannot run {program}-save"));
            }
        };
        anyhow::ensure!(
            output.status.success(),
            "{program}-save says what is left on this host, and it ends with {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        all.insert(
            program,
            String::from_utf8_lossy(&output.stdout).into_owned(),
        );
    }
    Ok(all)
}

/// The plugin `loopback`, unless it is the link that `cali-node` makes where there was none.
fn is_anothers(root: &Path, place: &Path) -> bool {
    let here = root.join(place.strip_prefix("/").unwrap_or(place));
    place.ends_with("loopback")
        && !std::fs::read_link(here).is_ok_and(|to| to == Path::new("calico"))
}

/// The place and what is below it, as the host names it. Links are not followed.
fn walk(root: &Path, place: PathBuf, files: &mut BTreeSet<PathBuf>) {
    let here = root.join(place.strip_prefix("/").unwrap_or(&place));
    let Ok(found) = std::fs::symlink_metadata(&here) else {
        return;
    };
    if files.len() >= FILE_LIMIT {
        return;
    }
    if found.is_dir()
        && let Ok(entries) = std::fs::read_dir(&here)
    {
        for entry in entries.flatten() {
            walk(root, place.join(entry.file_name()), files);
        }
    }
    files.insert(place);
}

/// What the datastore and the left-overs themselves say.
pub(super) async fn known(owner: Owner, pools: &[IpNetwork], host: &Host, root: &Path) -> Known {
    let mut known = Known {
        ranges: pools.to_vec(),
        pods: Err("the datastore was not asked".to_owned()),
    };
    if owner == Owner::Flannel {
        let file = root.join(SUBNET_FILE.trim_start_matches('/'));
        let text = std::fs::read_to_string(file).unwrap_or_default();
        known.ranges.extend(networks(&text));
        return known;
    }
    known.ranges.extend(recorded(&host.sets));
    let asked = tokio::time::timeout(DATASTORE_LIMIT, ask(&mut known)).await;
    if let Err(error) = asked.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer in time"))) {
        known.pods = Err(format!("{error:#}"));
    }
    known
}

/// `FLANNEL_NETWORK=10.244.0.0/16` and `FLANNEL_IPV6_NETWORK`, each with several separated by commas.
fn networks(text: &str) -> Vec<IpNetwork> {
    let values = text.lines().filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        matches!(name, "FLANNEL_NETWORK" | "FLANNEL_IPV6_NETWORK").then_some(value)
    });
    values
        .flat_map(|value| value.split(','))
        .filter_map(|network| network.trim().parse().ok())
        .collect()
}

/// Pools as members of Calico's sets.
fn recorded(sets: &[std::sync::Arc<str>]) -> Vec<IpNetwork> {
    let present = POOL_SETS
        .iter()
        .filter(|name| sets.iter().any(|set| **set == ***name));
    let read = |name: &str| {
        let sets = IpSets::open(&cali_netlink::NetNs::current().ok()?).ok()?;
        sets.get(name).ok()?
    };
    present
        .filter_map(|name| read(name))
        .flat_map(|set| set.members)
        .filter_map(|member| match member {
            SetMember::Net(address, length) => IpNetwork::new(address, length).ok(),
            _ => None,
        })
        .collect()
}

async fn ask(known: &mut Known) -> Result<()> {
    let store = connection::open().await?;
    for kind in [Kind::IPPool, Kind::BGPConfiguration] {
        for item in store.list(kind, None).await?.items {
            match &*item.object {
                AnyResource::IPPool(pool) => known.ranges.extend(network(pool.spec.cidr)),
                AnyResource::BGPConfiguration(bgp) => {
                    let spec = &bgp.spec;
                    let lists = [
                        &spec.service_cluster_ips,
                        &spec.service_external_ips,
                        &spec.service_load_balancer_ips,
                    ];
                    let services = lists.into_iter().flatten();
                    known
                        .ranges
                        .extend(services.filter_map(|range| network(range.cidr)));
                }
                _ => {}
            }
        }
    }
    let node = own_name().context("the name of this node is not known: set NODENAME")?;
    let mut pods = BTreeSet::new();
    for kind in [Kind::WorkloadEndpoint, Kind::K8sPod] {
        let list = store.list(kind, None).await?;
        let running = list
            .items
            .iter()
            .filter_map(|item| interface(&item.object, &node));
        pods.extend(running);
    }
    known.pods = Ok(pods);
    Ok(())
}

/// The interface of an endpoint, or of a pod that has not ended, of this node. A pod may run before it is an endpoint.
fn interface(object: &AnyResource, node: &str) -> Option<String> {
    match object {
        AnyResource::WorkloadEndpoint(endpoint) => {
            let spec = &endpoint.spec;
            (spec.node == node).then(|| spec.interface_name.clone())
        }
        AnyResource::K8sPod(pod) => {
            let status = pod
                .status
                .as_ref()
                .and_then(|status| status.phase.as_deref());
            let here = pod.spec.node_name.as_deref() == Some(node);
            if !here || matches!(status, Some("Succeeded" | "Failed")) {
                return None;
            }
            let metadata = &pod.metadata;
            Some(kubernetes::interface_name(
                metadata.namespace.as_deref()?,
                &metadata.name,
            ))
        }
        _ => None,
    }
}

fn network(range: impl std::fmt::Display) -> Option<IpNetwork> {
    range.to_string().parse().ok()
}

/// As `cali-node` finds it.
fn own_name() -> Option<String> {
    let variable = |name| std::env::var(name).ok();
    let text = |file: &Path| std::fs::read_to_string(file).ok();
    node_name(
        variable("NODENAME").as_deref(),
        text(&paths::state_dir().join("nodename")).as_deref(),
        variable("HOSTNAME").as_deref(),
        text(Path::new("/proc/sys/kernel/hostname")).as_deref(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flannels_file_names_its_networks() {
        let text = "FLANNEL_NETWORK=10.244.0.0/16,10.245.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\n\
                    FLANNEL_IPV6_NETWORK=fd00:10::/48\nFLANNEL_IPMASQ=true\n";
        let found: Vec<String> = networks(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.244.0.0/16", "10.245.0.0/16", "fd00:10::/48"]);
    }
}
