//! From configuration to [`Settings`](crate::speaker::settings::Settings): Calico's resources ([`compile`]) or a file ([`standalone`]).
//! Pure: nothing is read here, everything comes in as values.

mod peers;
mod policy;
pub mod standalone;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use cali_api::update::Update;
use cali_api::v3::{
    BGPConfigurationSpec, BGPFilterSpec, BGPPeerSpec, BindMode, BlockAffinitySpec,
    BlockAffinityState, IPPoolSpec, NodeSpec,
};
use cali_api::{AnyResource, Cidr, Kind, StringMap};
use sha2::{Digest, Sha256};

use crate::policy::{LocalKind, local_pref_of_priority};
use crate::rib::LocalRoute;
use crate::speaker::settings::Settings;
use crate::wire::{Attributes, Prefix};

/// Metric of a normal route in the kernel, which LOCAL_PREF is derived from.
pub(crate) const NORMAL_PRIORITY: u32 = 1024;

/// The kinds that a node's speaker is configured by.
pub const KINDS: [Kind; 6] = [
    Kind::BGPConfiguration,
    Kind::BGPPeer,
    Kind::BGPFilter,
    Kind::Node,
    Kind::IPPool,
    Kind::BlockAffinity,
];

/// How the BGP identifier is chosen (`CALICO_ROUTER_ID`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouterId {
    /// The node's IPv4 address.
    #[default]
    NodeAddress,
    /// Derived from the node's name, for nodes without IPv4.
    Hash,
    /// This one.
    Literal(Ipv4Addr),
}

impl std::str::FromStr for RouterId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => Ok(Self::NodeAddress),
            "hash" => Ok(Self::Hash),
            literal => literal.parse().map(Self::Literal).map_err(|_| {
                format!(
                    "CALICO_ROUTER_ID is {text:?}, which is neither \"hash\" nor an IPv4 address"
                )
            }),
        }
    }
}

/// What is known about this node beside the resources.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// Our node's name.
    pub node: String,
    /// How the identifier is chosen.
    pub router_id: RouterId,
    /// Passwords by secret name and key, as far as they are there.
    pub passwords: BTreeMap<(String, String), String>,
}

/// Why there can be no speaker with these resources, in words for an operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No Node resource of our name.
    #[error("there is no Node named {0:?} yet")]
    NoNode(String),
    /// The Node has no addresses for BGP.
    #[error("Node {0:?} has no BGP address (spec.bgp.ipv4Address or spec.bgp.ipv6Address)")]
    NoAddress(String),
    /// Nothing to make the identifier from.
    #[error(
        "Node {0:?} has no IPv4 address to take the BGP identifier from: set CALICO_ROUTER_ID to \"hash\" or to an address"
    )]
    NoRouterId(String),
}

/// A node, as far as BGP is concerned.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NodeView {
    pub(crate) labels: StringMap,
    pub(crate) spec: NodeSpec,
}

impl NodeView {
    fn bgp(&self) -> Option<&cali_api::v3::NodeBGPSpec> {
        self.spec.bgp.as_ref()
    }

    /// The node's own addresses, IPv4 first.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        [self.spec.ipv4(), self.spec.ipv6()]
            .into_iter()
            .flatten()
            .map(|net| net.ip())
    }

    pub(crate) fn address(&self, v4: bool) -> Option<IpAddr> {
        self.addresses().find(|a| a.is_ipv4() == v4)
    }

    pub(crate) fn asn(&self) -> Option<u32> {
        Some(self.bgp()?.as_number?.0)
    }

    pub(crate) fn cluster_id(&self) -> Option<Ipv4Addr> {
        self.bgp()?.route_reflector_cluster_id
    }
}

/// All resources that matter, kept up to date from the update stream.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resources {
    pub(crate) nodes: BTreeMap<String, NodeView>,
    pub(crate) configurations: BTreeMap<String, BGPConfigurationSpec>,
    pub(crate) peers: BTreeMap<String, BGPPeerSpec>,
    pub(crate) filters: BTreeMap<String, BGPFilterSpec>,
    pub(crate) pools: BTreeMap<String, IPPoolSpec>,
    pub(crate) affinities: BTreeMap<String, BlockAffinitySpec>,
}

fn put<T>(map: &mut BTreeMap<String, T>, name: &str, value: Option<T>) {
    match value {
        Some(value) => map.insert(name.to_owned(), value),
        None => map.remove(name),
    };
}

impl Resources {
    /// Takes a change. Kinds outside [`KINDS`] are ignored.
    pub fn apply(&mut self, update: &Update) {
        let name = &*update.key.name;
        macro_rules! spec {
            ($variant:ident) => {
                match update.value.as_deref() {
                    Some(AnyResource::$variant(resource)) => Some(resource.spec.clone()),
                    _ => None,
                }
            };
        }
        match update.key.kind {
            Kind::Node => {
                let node = match update.value.as_deref() {
                    Some(AnyResource::Node(node)) => Some(NodeView {
                        labels: node.metadata.labels.clone(),
                        spec: node.spec.clone(),
                    }),
                    _ => None,
                };
                put(&mut self.nodes, name, node);
            }
            Kind::BGPConfiguration => put(&mut self.configurations, name, spec!(BGPConfiguration)),
            Kind::BGPPeer => put(&mut self.peers, name, spec!(BGPPeer)),
            Kind::BGPFilter => put(&mut self.filters, name, spec!(BGPFilter)),
            Kind::IPPool => put(&mut self.pools, name, spec!(IPPool)),
            Kind::BlockAffinity => put(&mut self.affinities, name, spec!(BlockAffinity)),
            _ => {}
        }
    }

    /// The cluster's settings.
    pub(crate) fn configuration(&self) -> BGPConfigurationSpec {
        self.configurations
            .get("default")
            .cloned()
            .unwrap_or_default()
    }

    /// The cluster's listen port, or the node's own.
    pub(crate) fn listen_port(&self, node: &str) -> u16 {
        let own = self
            .configurations
            .get(&format!("node.{node}"))
            .and_then(|c| c.listen_port);
        own.unwrap_or_else(|| self.configuration().port())
    }

    /// The names of secrets that peers of any node refer to.
    #[must_use]
    pub fn secrets(&self) -> BTreeSet<(String, String)> {
        let mesh = self.configuration().node_mesh_password;
        let peers = self.peers.values().filter_map(|p| p.password.clone());
        let selectors = mesh
            .into_iter()
            .chain(peers)
            .filter_map(|p| p.secret_key_ref);
        selectors.map(|s| (s.name, s.key)).collect()
    }
}

/// The identifier that Calico derives from a node's name: the first four octets of its SHA-256, kept out of
/// the multicast range.
fn hashed_router_id(node: &str) -> Ipv4Addr {
    let digest = Sha256::digest(node.as_bytes());
    let first = if digest[0] > 223 {
        digest[0] - 32
    } else {
        digest[0]
    };
    Ipv4Addr::new(first, digest[1], digest[2], digest[3])
}

pub(crate) fn prefix(cidr: &Cidr) -> Option<Prefix> {
    Prefix::new(cidr.addr(), cidr.prefix_len())
}

/// Something that is left out, and why; the rest is applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// The object, as `BGPPeer name`.
    pub object: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The settings of a node's speaker.
pub fn compile(resources: &Resources, local: &Local) -> Result<(Settings, Vec<Notice>), Problem> {
    let name = &local.node;
    let node = resources
        .nodes
        .get(name)
        .ok_or_else(|| Problem::NoNode(name.clone()))?;
    if node.addresses().next().is_none() {
        return Err(Problem::NoAddress(name.clone()));
    }
    let router_id = match local.router_id {
        RouterId::Literal(id) => id,
        RouterId::Hash => hashed_router_id(name),
        RouterId::NodeAddress => match node.address(true) {
            Some(IpAddr::V4(v4)) => v4,
            _ => return Err(Problem::NoRouterId(name.clone())),
        },
    };
    let configuration = resources.configuration();
    let local_as = node.asn().unwrap_or(configuration.default_asn().0);
    let port = resources.listen_port(name);
    let any = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let own: Vec<IpAddr> = node.addresses().collect();
    let bind = if configuration.bind_mode == Some(BindMode::NodeIP) {
        own
    } else {
        any.into_iter()
            .filter(|a| own.iter().any(|o| o.is_ipv4() == a.is_ipv4()))
            .collect()
    };
    let mut notices = Vec::new();
    let blocks = own_blocks(resources, name);
    let policies = policy::Policies::new(resources, name, &blocks);
    let neighbours = peers::neighbours(
        resources,
        local,
        router_id,
        local_as,
        &policies,
        &mut notices,
    );
    let settings = Settings {
        router_id,
        local_as,
        cluster_id: node.cluster_id(),
        listen: bind
            .into_iter()
            .map(|ip| SocketAddr::new(ip, port))
            .collect(),
        neighbours,
        ranges: Vec::new(),
        originated: blocks
            .iter()
            .map(|block| (*block, block_route(*block)))
            .collect(),
    };
    Ok((settings, notices))
}

/// The confirmed blocks of this node.
fn own_blocks(resources: &Resources, node: &str) -> BTreeSet<Prefix> {
    let own = resources.affinities.values().filter(|a| {
        a.node == node
            && a.state == BlockAffinityState::Confirmed
            && !a.deleted
            && a.type_
                .is_none_or(|t| t == cali_api::v3::AffinityType::Host)
    });
    own.filter_map(|a| prefix(&a.cidr)).collect()
}

fn block_route(prefix: Prefix) -> LocalRoute {
    let attributes = Attributes {
        local_pref: Some(local_pref_of_priority(NORMAL_PRIORITY)),
        ..Attributes::default()
    };
    LocalRoute {
        prefix,
        attributes,
        kind: LocalKind::Block,
        interface: None::<Arc<str>>,
    }
}
