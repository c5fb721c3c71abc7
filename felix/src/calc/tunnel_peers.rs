//! Who may send encapsulated packets to this node: every node's addresses, and those that the settings name. And the address
//! that the others know this node by.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
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
    own: Option<Ipv4Addr>,
    told: Option<Arc<TunnelPeers>>,
    dirty: bool,
}

impl PeerIndex {
    /// A node, which may be this one.
    pub(super) fn set_node(&mut self, key: Key, node: Option<&Node>, here: bool) {
        self.dirty = true;
        let own = node.map(|node| [node.spec.ipv4(), node.spec.ipv6()]);
        let own = own.into_iter().flatten().flatten();
        let reached = node.iter().flat_map(|node| &node.spec.addresses);
        let reached = reached.filter_map(NodeAddress::ip);
        let addresses: Vec<IpAddr> = own.map(|network| network.ip()).chain(reached).collect();
        if here {
            // The same as where the tunnels of others lead.
            self.own = addresses.iter().find_map(|address| match address {
                IpAddr::V4(address) => Some(*address),
                IpAddr::V6(_) => None,
            });
        }
        if node.is_some() {
            let addresses = addresses.into_iter().map(Cidr::host).collect();
            self.nodes.insert(key, addresses);
        } else {
            self.nodes.remove(&key);
        }
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
            own: self.own,
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
    use cali_api::v3::{NodeBGPSpec, NodeSpec};

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
        index.set_node(key.clone(), Some(&node), false);
        let peers = index.take(&settings).unwrap();
        assert_eq!(peers.sources, ["10.0.0.1/32".parse().unwrap()]);
        assert_eq!(peers.own, None);
        index.set_node(key.clone(), Some(&node), false);
        assert_eq!(index.take(&settings), None);
        index.set_node(key, None, false);
        assert!(index.take(&settings).unwrap().sources.is_empty());
    }

    #[test]
    fn the_own_address_is_that_for_bgp_or_the_first_by_which_the_node_is_reached() {
        let mut index = PeerIndex::default();
        let key = Key::cluster(Kind::Node, "here".to_owned());
        let mut node = Node::named("here", NodeSpec::default());
        let own = |index: &mut PeerIndex, node: Option<&Node>| {
            index.set_node(key.clone(), node, true);
            let told = index.take(&FelixConfigurationSpec::default());
            told.map(|peers| peers.own.map(|own| own.to_string()))
        };
        node.spec.addresses = ["fd00::1", "10.0.0.2"]
            .map(|address| NodeAddress {
                address: address.into(),
                type_: String::new(),
            })
            .into();
        assert_eq!(own(&mut index, Some(&node)), Some(Some("10.0.0.2".into())));
        node.spec.bgp = Some(NodeBGPSpec {
            ipv4_address: Some("10.0.0.1/24".parse().unwrap()),
            ..NodeBGPSpec::default()
        });
        assert_eq!(own(&mut index, Some(&node)), Some(Some("10.0.0.1".into())));
        assert_eq!(own(&mut index, None), Some(None));
    }
}
