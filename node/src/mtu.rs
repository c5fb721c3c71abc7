//! The MTU of pods: the underlay's, less what the encapsulations add that pools ask for or that still stand. It is written
//! to a file that the CNI server reads, and given to the pods that run, both ends of their interfaces.
//!
//! [`pod_mtu`] decides; [`MtuFile`] follows pools, settings and devices. A lower MTU is in force before this node says that
//! it receives an encapsulation that needs it ([`crate::word`]); a higher one comes after the devices that needed the lower
//! one are gone.
//!
//! A lower one reaches the routes to the pods first: the two ends of a pod's interface change one after the other, and what
//! is larger than the far end takes is dropped without a word, while a route that is too small for it answers the sender.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::v3::{EncapMode, FelixConfigurationSpec, IPPool};
use cali_api::{AnyResource, Key, Kind};
use cali_netlink::events::EventStream;
use cali_netlink::{Error, FollowedLinks, Link, Netlink};
use cali_routes::{Input, Writer, WriterGone};
use felix::dataplane::State;
use ipip_vxlan::{Overhead, TunnelState};
use regex::Regex;
use tokio::sync::{mpsc, watch};

use crate::pod_links;
use crate::startup::write_file;

/// Wait after a failure.
const RETRY: Duration = Duration::from_secs(2);
/// Notifications that come within this time are taken in together: a pod's interface comes with several.
const BURST: Duration = Duration::from_millis(5);
const BURST_LIMIT: usize = 1 << 16;
/// `mtuIfacePattern`: the names of physical devices, and of those in a container or virtual machine.
pub const UNDERLAY: &str = "^((en|wl|ww|sl|ib)[Pcopsx].*|(eth|wlan|wwan).*)";
/// MTU where no device matches, as in Calico.
const FALLBACK: u32 = 1460;
/// The kinds that matter here.
pub const KINDS: &[Kind] = &[Kind::IPPool, Kind::FelixConfiguration];

/// The largest MTU with which a pod's packet fits into every encapsulation that a pool or the settings ask for, and into
/// every tunnel device that stands.
pub fn pod_mtu<'a>(
    links: impl IntoIterator<Item = &'a Link>,
    underlay: &Regex,
    pools: impl IntoIterator<Item = &'a IPPool>,
    encrypted: [bool; 2],
    tunnels: &TunnelState,
) -> u32 {
    let operational = links
        .into_iter()
        .filter(|link| link.up && underlay.is_match(&link.name));
    let host = operational.map(|link| link.mtu).min().unwrap_or(FALLBACK);
    let overhead =
        |pool: &IPPool| match (pool.spec.vxlan(), pool.spec.ipip(), pool.spec.cidr.is_v4()) {
            (EncapMode::Never, EncapMode::Never, _) => 0,
            (EncapMode::Never, _, _) => Overhead::Ipip.bytes(),
            (_, _, true) => Overhead::VxlanV4.bytes(),
            (_, _, false) => Overhead::VxlanV6.bytes(),
        };
    let layers = [Overhead::WireguardV4, Overhead::WireguardV6];
    let layers = layers.iter().zip(encrypted).filter(|(_, on)| *on);
    let asked = pools
        .into_iter()
        .map(overhead)
        .chain(layers.map(|(layer, _)| layer.bytes()));
    let asked = host - asked.max().unwrap_or(0).min(host);
    let standing = tunnels.mtus.values().copied().min();
    asked.min(standing.unwrap_or(u32::MAX))
}

/// Keeps the file and the running pods right.
#[derive(Debug)]
pub struct MtuFile {
    /// Where the file is.
    pub path: PathBuf,
    /// The host's devices.
    pub netlink: Netlink,
    /// Name of this node, for its own settings.
    pub node: String,
    /// The routes to the pods.
    pub routes: Writer,
    /// Tunnel devices.
    pub dataplane: watch::Receiver<Arc<State>>,
    /// The MTU that all running pods have, for whoever waits for it.
    pub applied: watch::Sender<Option<u32>>,
}

/// What the MTU follows.
#[derive(Debug, Default)]
struct Wish {
    pools: BTreeMap<Key, IPPool>,
    settings: BTreeMap<Key, FelixConfigurationSpec>,
    devices: FollowedLinks,
    tunnels: TunnelState,
    /// The last pattern, and what it means.
    underlay: Option<(String, Regex)>,
    /// The routes to the pods have been told a lower MTU than the pods' interfaces may have.
    lowered: bool,
}

impl Wish {
    fn on_updates(&mut self, updates: Vec<cali_api::update::Update>) {
        for update in updates {
            match update.value.as_deref() {
                Some(AnyResource::IPPool(pool)) => {
                    self.pools.insert(update.key, (**pool).clone());
                }
                Some(AnyResource::FelixConfiguration(config)) => {
                    self.settings.insert(update.key, config.spec.clone());
                }
                _ => {
                    self.pools.remove(&update.key);
                    self.settings.remove(&update.key);
                }
            }
        }
    }

    /// A setting of this node, else of the cluster.
    fn setting<T>(
        &self,
        node: &str,
        get: impl Fn(&FelixConfigurationSpec) -> Option<T>,
    ) -> Option<T> {
        [format!("node.{node}"), "default".to_owned()]
            .into_iter()
            .filter_map(|name| {
                self.settings
                    .get(&Key::cluster(Kind::FelixConfiguration, name))
            })
            .find_map(get)
    }
}

impl MtuFile {
    /// Runs until the stream or the notifications end.
    pub async fn run(
        mut self,
        mut events: mpsc::Receiver<SyncEvent>,
        mut links: EventStream,
    ) -> String {
        let mut wish = Wish::default();
        let mut in_sync = false;
        let mut again: Option<Instant> = None;
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    None => return "the stream of changes ended".to_owned(),
                    Some(SyncEvent::Status(status)) => in_sync |= status == SyncStatus::InSync,
                    Some(SyncEvent::Complete(_)) => {}
                    Some(SyncEvent::Updates(updates)) => wish.on_updates(updates),
                },
                burst = links.next_burst(BURST, BURST_LIMIT) => match burst {
                    Ok(burst) => {
                        let changes = burst.iter().filter(|event| wish.devices.on_event(event));
                        if changes.count() == 0 {
                            continue;
                        }
                    }
                    Err(error) => return error.to_string(),
                },
                changed = self.dataplane.changed() => {
                    if changed.is_err() {
                        return "the dataplane has ended".to_owned();
                    }
                    // Most of what changes there is about pods.
                    let state = self.dataplane.borrow_and_update();
                    if state.tunnels == wish.tunnels {
                        continue;
                    }
                    wish.tunnels = state.tunnels.clone();
                },
                () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now).into()), if again.is_some() => {}
            }
            again = None;
            if !in_sync {
                continue;
            }
            if let Err(error) = self.apply(&mut wish).await {
                tracing::warn!(%error, "the pods' MTU is not as it should be");
                again = Some(Instant::now() + RETRY);
            }
        }
    }

    async fn apply(&mut self, wish: &mut Wish) -> Result<(), MtuError> {
        let pattern = wish.setting(&self.node, |spec| {
            spec.mtu_iface_pattern
                .clone()
                .filter(|pattern| !pattern.is_empty())
        });
        let pattern = pattern.unwrap_or_else(|| UNDERLAY.to_owned());
        let encrypted = [
            wish.setting(&self.node, |spec| spec.wireguard_enabled),
            wish.setting(&self.node, |spec| spec.wireguard_enabled_v6),
        ]
        .map(|on| on.unwrap_or(false));
        let prefixes = wish
            .setting(&self.node, |spec| spec.interface_prefix.clone())
            .unwrap_or_else(|| "cali".to_owned());
        wish.tunnels = self.dataplane.borrow_and_update().tunnels.clone();
        let underlay = match wish.underlay.take() {
            Some((known, underlay)) if known == pattern => underlay,
            _ => Regex::new(&pattern).map_err(MtuError::Pattern)?,
        };
        let (_, underlay) = wish.underlay.insert((pattern, underlay));
        let links = wish.devices.look(&self.netlink).map_err(MtuError::Links)?;
        let pools = wish.pools.values();
        let mtu = pod_mtu(links.values(), underlay, pools, encrypted, &wish.tunnels);
        write_file(&self.path, mtu.to_string().as_bytes()).map_err(MtuError::File)?;
        if pod_links::largest(links.values(), &prefixes) > Some(mtu) {
            wish.lowered = true;
            let first = vec![Input::WorkloadMtu(Some(mtu))];
            self.routes.apply(first).await?;
        }
        pod_links::set_mtu(&self.netlink, links.values(), &prefixes, mtu)
            .await
            .map_err(MtuError::Pods)?;
        // Also what a failed attempt has left.
        if std::mem::take(&mut wish.lowered) {
            self.routes.send(vec![Input::WorkloadMtu(None)]).await?;
        }
        self.applied.send_if_modified(|applied| {
            let changed = *applied != Some(mtu);
            if changed {
                tracing::info!(mtu, "MTU of pods");
                *applied = Some(mtu);
            }
            changed
        });
        Ok(())
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
    #[error("the interfaces of running pods cannot be changed: {0}")]
    Pods(Error),
    #[error(transparent)]
    Routes(#[from] WriterGone),
}

#[cfg(test)]
mod tests {
    use cali_api::v3::IPPoolSpec;
    use cali_netlink::LinkKind;

    use super::*;

    fn link(name: &str, mtu: u32, up: bool) -> Link {
        Link {
            mtu,
            up,
            carrier: up,
            ..cali_netlink::testing::link(1, name, LinkKind::Physical)
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
        let mtu = |pools: &[IPPool]| {
            pod_mtu(
                &links,
                &underlay,
                pools,
                [false; 2],
                &TunnelState::default(),
            )
        };
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
        let none = TunnelState::default();
        assert_eq!(pod_mtu(&[], &underlay, [], [false; 2], &none), FALLBACK);
        assert_eq!(pod_mtu(&links, &underlay, [], [true, false], &none), 1440);
        assert_eq!(pod_mtu(&links, &underlay, [], [true, true], &none), 1420);
        let lingering = TunnelState {
            mtus: [("vxlan.calico".to_owned(), 1450)].into(),
            ..none
        };
        assert_eq!(
            pod_mtu(&links, &underlay, [], [false; 2], &lingering),
            1450,
            "a device that still receives"
        );
    }
}
