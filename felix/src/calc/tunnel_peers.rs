//! Who may send encapsulated packets to this node: every node's addresses, and those that the settings name.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::v3::{EncapMode, FelixConfigurationSpec, IPPool, Node, NodeAddress};
use cali_api::{Cidr, Key};

use super::output::TunnelPeers;

/// Follows nodes and pools.
#[derive(Debug, Default)]
pub(super) struct PeerIndex {
    nodes: BTreeMap<Key, Vec<Cidr>>,
    /// (IPIP, VXLAN) of each pool.
    modes: BTreeMap<Key, (bool, bool)>,
    told: Option<Arc<TunnelPeers>>,
    dirty: bool,
}

impl PeerIndex {
    pub(super) fn set_node(&mut self, key: Key, node: Option<&Node>) {
        self.dirty = true;
        let Some(node) = node else {
            self.nodes.remove(&key);
            return;
        };
        let own = [node.spec.ipv4(), node.spec.ipv6()];
        let own = own.into_iter().flatten().map(|network| network.ip());
        let reached = node.spec.addresses.iter().filter_map(NodeAddress::ip);
        let addresses = own.chain(reached).map(Cidr::host).collect();
        self.nodes.insert(key, addresses);
    }

    pub(super) fn set_pool(&mut self, key: Key, pool: Option<&IPPool>) {
        self.dirty = true;
        let Some(pool) = pool else {
            self.modes.remove(&key);
            return;
        };
        let modes = (
            pool.spec.ipip() != EncapMode::Never,
            pool.spec.vxlan() != EncapMode::Never,
        );
        self.modes.insert(key, modes);
    }

    pub(super) fn touch(&mut self) {
        self.dirty = true;
    }

    /// Something that counts has changed since the last [`Self::take`], or nothing was ever taken.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty || self.told.is_none()
    }

    /// What was last told.
    pub(super) fn told(&self) -> Option<Arc<TunnelPeers>> {
        self.told.clone()
    }

    /// The senders, if they are others than before.
    pub(super) fn take(&mut self, settings: &FelixConfigurationSpec) -> Option<Arc<TunnelPeers>> {
        self.dirty = false;
        let external = settings.external_nodes_cidr_list.iter().flatten();
        let mut sources: Vec<Cidr> = self
            .nodes
            .values()
            .flatten()
            .copied()
            .chain(external.map(|net| net.cidr()))
            .collect();
        sources.sort_unstable();
        sources.dedup();
        let peers = Arc::new(TunnelPeers {
            sources,
            ipip: self.modes.values().any(|(ipip, _)| *ipip),
            vxlan: self.modes.values().any(|(_, vxlan)| *vxlan),
        });
        (self.told.as_ref() != Some(&peers)).then(|| {
            self.told = Some(peers.clone());
            peers
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::Kind;
    use cali_api::v3::NodeSpec;

    #[test]
    fn addresses_of_all_nodes_are_told_once() {
        let mut index = PeerIndex::default();
        let settings = FelixConfigurationSpec::default();
        let key = Key::cluster(Kind::Node, "n".to_owned());
        let node = Node::named(
            "n",
            NodeSpec {
                addresses: vec![NodeAddress {
                    address: "10.0.0.1/24".into(),
                    type_: String::new(),
                }],
                ..NodeSpec::default()
            },
        );
        index.set_node(key.clone(), Some(&node));
        let peers = index.take(&settings).unwrap();
        assert_eq!(peers.sources, ["10.0.0.1/32".parse().unwrap()]);
        index.set_node(key.clone(), Some(&node));
        assert_eq!(index.take(&settings), None);
        index.set_node(key, None);
        assert!(index.take(&settings).unwrap().sources.is_empty());
    }
}
