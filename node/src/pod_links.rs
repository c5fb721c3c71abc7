//! Interfaces of running pods, both ends: the MTU.
//!
//! The far end of a pod's pair lies in the pod's namespace, which the kernel names by a number only. The namespace behind
//! the number is found among those that have a name ([`NAMED`]) and those of running processes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cali_netlink::{Error, IfIndex, Link, LinkChange, LinkKind, NetNs, Netlink};

/// Where container runtimes keep the names of namespaces.
const NAMED: [&str; 3] = ["/run/netns", "/var/run/netns", "/run/docker/netns"];

/// A pair of which one end at least has another MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pair {
    host: IfIndex,
    /// Number of the pod's namespace, and the index there.
    pod: (i32, IfIndex),
    host_differs: bool,
}

/// The host's ends.
fn workloads<'a>(
    links: impl IntoIterator<Item = &'a Link>,
    prefixes: &str,
) -> impl Iterator<Item = &'a Link> {
    let prefixes = prefixes.split(',').map(str::trim);
    let prefixes: Vec<&str> = prefixes.filter(|prefix| !prefix.is_empty()).collect();
    links.into_iter().filter(move |link| {
        let named = || prefixes.iter().any(|prefix| link.name.starts_with(prefix));
        link.kind == LinkKind::Veth && named()
    })
}

/// The largest MTU of a workload interface.
pub(crate) fn largest<'a>(
    links: impl IntoIterator<Item = &'a Link>,
    prefixes: &str,
) -> Option<u32> {
    workloads(links, prefixes).map(|link| link.mtu).max()
}

/// The pairs of workloads. The pods' ends are not seen from here. Pure.
fn pairs<'a>(links: impl IntoIterator<Item = &'a Link>, prefixes: &str, mtu: u32) -> Vec<Pair> {
    workloads(links, prefixes)
        .filter_map(|link| {
            Some(Pair {
                host: link.index,
                pod: (link.link_netns?, link.parent?),
                host_differs: link.mtu != mtu,
            })
        })
        .collect()
}

/// Gives the MTU to all workload interfaces. The host's end tells whether a pair has been done: it is changed last, so a
/// pair that was left half done is done again.
///
/// # Errors
/// The first that could not be changed; the others are done nevertheless.
pub async fn set_mtu<'a>(
    netlink: &Netlink,
    links: impl IntoIterator<Item = &'a Link>,
    prefixes: &str,
    mtu: u32,
) -> Result<(), Error> {
    let pairs: Vec<Pair> = pairs(links, prefixes, mtu)
        .into_iter()
        .filter(|pair| pair.host_differs)
        .collect();
    if pairs.is_empty() {
        return Ok(());
    }
    let mut namespaces = namespaces(netlink, &pairs);
    let change = LinkChange {
        mtu: Some(mtu),
        ..LinkChange::default()
    };
    let mut result = Ok(());
    for pair in pairs {
        let done = async {
            let (number, index) = pair.pod;
            if let Some(namespace) = namespaces.remove(&number) {
                Netlink::open(&namespace)?
                    .change_link(index, &change)
                    .await?;
            } else {
                tracing::warn!(
                    namespace = number,
                    "a pod's namespace is not found: the pod keeps its MTU on its own side"
                );
            }
            netlink.change_link(pair.host, &change).await
        };
        match done.await {
            // The pod has gone in the meantime.
            Err(error) if error.is_not_found() => {}
            Err(error) => result = Err(error),
            Ok(()) => {}
        }
    }
    result
}

/// The namespaces behind the numbers, as far as they are found.
fn namespaces(netlink: &Netlink, pairs: &[Pair]) -> BTreeMap<i32, NetNs> {
    let mut found = BTreeMap::new();
    let named = NAMED.iter().flat_map(|folder| entries(Path::new(folder)));
    let running = entries(Path::new("/proc")).map(|process| process.join("ns/net"));
    let mut seen = std::collections::BTreeSet::new();
    for path in named.chain(running) {
        if found.len() == pairs.len() {
            break;
        }
        let Ok(namespace) = NetNs::open_path(&path) else {
            continue;
        };
        // Many processes share few namespaces.
        if !namespace.id().is_ok_and(|id| seen.insert(id)) {
            continue;
        }
        if let Ok(Some(number)) = netlink.number_of(&namespace)
            && pairs.iter().any(|pair| pair.pod.0 == number)
        {
            found.insert(number, namespace);
        }
    }
    found
}

fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pairs_of_workloads_with_another_mtu_are_changed() {
        let link = |name: &str, mtu, kind| Link {
            index: 5,
            name: name.into(),
            kind,
            mac: None,
            mtu,
            up: true,
            carrier: true,
            noarp: false,
            master: None,
            parent: Some(2),
            link_netns: Some(3),
            alias: None,
            group: 0,
        };
        let links = [
            link("cali1", 1500, LinkKind::Veth),
            link("cali2", 1450, LinkKind::Veth),
            link("eth0", 1500, LinkKind::Veth),
            link("cali3", 1500, LinkKind::Dummy),
        ];
        let differs: Vec<bool> = pairs(&links, "cali,tap", 1450)
            .iter()
            .map(|pair| pair.host_differs)
            .collect();
        assert_eq!(differs, [true, false]);
    }
}
