//! Which encapsulations the pools use, and the nodes that may send them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use cali_api::v3::{EncapMode, IPPoolSpec, NodeSpec};
use cali_api::{Key, NodeName};
use foldhash::HashMap;

use super::output::Tunnels;

/// Pools and nodes as far as tunnels go.
#[derive(Debug, Default)]
pub(super) struct Encapsulation {
    pools: BTreeMap<Key, (bool, bool)>,
    nodes: HashMap<NodeName, Vec<IpAddr>>,
    told: Option<Tunnels>,
    dirty: bool,
}

impl Encapsulation {
    /// A pool appeared, changed or is gone.
    pub(super) fn set_pool(&mut self, key: &Key, spec: Option<&IPPoolSpec>) {
        match spec {
            Some(spec) => {
                let uses = |mode: Option<EncapMode>| mode.is_some_and(|m| m != EncapMode::Never);
                let modes = (uses(spec.ipip_mode), uses(spec.vxlan_mode));
                self.pools.insert(key.clone(), modes);
            }
            None => {
                self.pools.remove(key);
            }
        }
        self.dirty = true;
    }

    /// A node appeared, changed or is gone.
    pub(super) fn set_node(&mut self, name: &str, spec: Option<&NodeSpec>) {
        match spec {
            Some(spec) => {
                let own = [spec.ipv4(), spec.ipv6()];
                let mut addresses: BTreeSet<IpAddr> =
                    own.into_iter().flatten().map(|net| net.ip()).collect();
                addresses.extend(spec.addresses.iter().filter_map(|address| address.ip()));
                let addresses = addresses.into_iter().collect();
                if self.nodes.get(name) == Some(&addresses) {
                    return;
                }
                self.nodes.insert(name.into(), addresses);
            }
            None => {
                self.nodes.remove(name);
            }
        }
        self.dirty = true;
    }

    /// The state, if it is another than at the last call.
    pub(super) fn take(&mut self) -> Option<Tunnels> {
        if !std::mem::take(&mut self.dirty) && self.told.is_some() {
            return None;
        }
        let nodes: BTreeSet<IpAddr> = self.nodes.values().flatten().copied().collect();
        let tunnels = Tunnels {
            ipip: self.pools.values().any(|(ipip, _)| *ipip),
            vxlan: self.pools.values().any(|(_, vxlan)| *vxlan),
            nodes: nodes.into_iter().collect(),
        };
        (self.told.as_ref() != Some(&tunnels)).then(|| {
            self.told = Some(tunnels.clone());
            tunnels
        })
    }
}
