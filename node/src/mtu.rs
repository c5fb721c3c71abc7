//! The MTU of pods: the underlay's, less what the pools' encapsulations add. Written to a file that the CNI server reads.
//!
//! [`pod_mtu`] decides; [`MtuFile`] follows pools and settings.

use std::collections::BTreeMap;
use std::path::PathBuf;

use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::v3::{EncapMode, IPPool};
use cali_api::{AnyResource, Key, Kind};
use cali_netlink::events::{Event, EventStream};
use cali_netlink::{Error, Link, Netlink};
use ipip_vxlan::Overhead;
use regex::Regex;
use tokio::sync::mpsc;

use crate::startup::write_file;

/// `mtuIfacePattern`: the names of physical devices, and of those in a container or virtual machine.
pub const UNDERLAY: &str = "^((en|wl|ww|sl|ib)[Pcopsx].*|(eth|wlan|wwan).*)";
/// MTU where no device matches, as in Calico.
const FALLBACK: u32 = 1460;
/// The kinds that matter here.
pub const KINDS: &[Kind] = &[Kind::IPPool, Kind::FelixConfiguration];

/// The largest MTU with which a pod's packet fits into every encapsulation that a pool names.
pub fn pod_mtu<'a>(
    links: &[Link],
    underlay: &Regex,
    pools: impl IntoIterator<Item = &'a IPPool>,
) -> u32 {
    let operational = links
        .iter()
        .filter(|link| link.up && underlay.is_match(&link.name));
    let host = operational.map(|link| link.mtu).min().unwrap_or(FALLBACK);
    let overhead =
        |pool: &IPPool| match (pool.spec.vxlan(), pool.spec.ipip(), pool.spec.cidr.is_v4()) {
            (EncapMode::Never, EncapMode::Never, _) => 0,
            (EncapMode::Never, _, _) => Overhead::Ipip.bytes(),
            (_, _, true) => Overhead::VxlanV4.bytes(),
            (_, _, false) => Overhead::VxlanV6.bytes(),
        };
    host - pools.into_iter().map(overhead).max().unwrap_or(0).min(host)
}

/// Keeps the file right.
#[derive(Debug)]
pub struct MtuFile {
    /// Where it is.
    pub path: PathBuf,
    /// The host's devices.
    pub netlink: Netlink,
    /// Name of this node, for its own settings.
    pub node: String,
}

impl MtuFile {
    /// Runs until the stream or the notifications end.
    pub async fn run(
        self,
        mut events: mpsc::Receiver<SyncEvent>,
        mut links: EventStream,
    ) -> String {
        let mut pools: BTreeMap<Key, IPPool> = BTreeMap::new();
        let mut patterns: BTreeMap<Key, String> = BTreeMap::new();
        let mut in_sync = false;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    None => return "the stream of changes ended".to_owned(),
                    Some(SyncEvent::Status(status)) => in_sync |= status == SyncStatus::InSync,
                    Some(SyncEvent::Updates(updates)) => {
                        for update in updates {
                            match update.value.as_deref() {
                                Some(AnyResource::IPPool(pool)) => drop(pools.insert(update.key, (**pool).clone())),
                                Some(AnyResource::FelixConfiguration(config)) => {
                                    let pattern = config.spec.mtu_iface_pattern.clone().unwrap_or_default();
                                    patterns.insert(update.key, pattern);
                                }
                                _ => {
                                    pools.remove(&update.key);
                                    patterns.remove(&update.key);
                                }
                            }
                        }
                    }
                },
                event = links.next() => match event {
                    Ok(Event::Link(_) | Event::Overflow) => {}
                    Ok(_) => continue,
                    Err(error) => return error.to_string(),
                },
            }
            if in_sync && let Err(error) = self.write(&pools, &self.underlay(&patterns)) {
                tracing::warn!(%error, "the pods' MTU is not known");
            }
        }
    }

    /// The pattern of this node, else of the cluster, else the built-in one.
    fn underlay(&self, patterns: &BTreeMap<Key, String>) -> String {
        let keys = [format!("node.{}", self.node), "default".to_owned()];
        let mut set = keys
            .into_iter()
            .filter_map(|name| patterns.get(&Key::cluster(Kind::FelixConfiguration, name)));
        set.find(|pattern| !pattern.is_empty())
            .cloned()
            .unwrap_or_else(|| UNDERLAY.to_owned())
    }

    fn write(&self, pools: &BTreeMap<Key, IPPool>, underlay: &str) -> Result<(), MtuError> {
        let underlay = Regex::new(underlay).map_err(MtuError::Pattern)?;
        let mtu = pod_mtu(
            &self.netlink.dump_links().map_err(MtuError::Links)?,
            &underlay,
            pools.values(),
        );
        write_file(&self.path, mtu.to_string().as_bytes()).map_err(MtuError::File)
    }
}

#[derive(Debug, thiserror::Error)]
enum MtuError {
    #[error("mtuIfacePattern is not a regular expression: {0}")]
    Pattern(regex::Error),
    #[error("the devices cannot be read: {0}")]
    Links(Error),
    #[error(transparent)]
    File(crate::startup::StartError),
}

#[cfg(test)]
mod tests {
    use cali_api::v3::IPPoolSpec;
    use cali_netlink::LinkKind;

    use super::*;

    fn link(name: &str, mtu: u32, up: bool) -> Link {
        Link {
            index: 1,
            name: name.into(),
            kind: LinkKind::Physical,
            mac: None,
            mtu,
            up,
            carrier: up,
            noarp: false,
            master: None,
            parent: None,
            link_netns: None,
            alias: None,
            group: 0,
        }
    }

    fn pool(cidr: &str, vxlan: EncapMode, ipip: EncapMode) -> IPPool {
        let spec = IPPoolSpec::new(cidr.parse().unwrap());
        IPPool::named(
            cidr,
            IPPoolSpec {
                vxlan_mode: Some(vxlan),
                ipip_mode: Some(ipip),
                ..spec
            },
        )
    }

    #[test]
    fn the_smallest_underlay_less_the_largest_overhead() {
        use EncapMode::{Always, CrossSubnet, Never};
        let underlay = Regex::new(UNDERLAY).unwrap();
        let links = [
            link("eth0", 9000, true),
            link("enp3s0", 1500, true),
            link("eth1", 1400, false),
            link("cali123", 1200, true),
            link("lo", 65536, true),
        ];
        let mtu = |pools: &[IPPool]| pod_mtu(&links, &underlay, pools);
        assert_eq!(mtu(&[]), 1500);
        assert_eq!(mtu(&[pool("10.0.0.0/16", Never, Always)]), 1480);
        assert_eq!(
            mtu(&[
                pool("10.0.0.0/16", Never, Always),
                pool("10.1.0.0/16", CrossSubnet, Never)
            ]),
            1450
        );
        assert_eq!(mtu(&[pool("fd00::/48", Always, Never)]), 1430);
        assert_eq!(pod_mtu(&[], &underlay, []), FALLBACK);
    }
}
