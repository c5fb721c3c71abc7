//! From configuration to [`Settings`](crate::speaker::settings::Settings): Calico's resources ([`compile`]) or a file ([`standalone`]).
//! Pure: nothing is read here, everything comes in as values.

mod originate;
mod peers;
mod policy;
mod resources;
mod services;
pub mod standalone;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use cali_api::Cidr;
use cali_api::v3::BindMode;
use sha2::{Digest, Sha256};

use crate::speaker::settings::{HostRules, Settings};
use crate::wire::Prefix;
pub use originate::{DeviceRoute, DeviceRouteKind};
pub(crate) use resources::NodeView;
pub use resources::{KINDS, Resources};

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
    /// What the kernel forwards straight to an interface.
    pub devices: Arc<BTreeSet<DeviceRoute>>,
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

/// The settings of a node's speaker.
pub fn compile(resources: &Resources, local: &Local) -> Result<Settings, Problem> {
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
    let mut host = HostRules {
        not_programmed: services::ranges(&configuration).collect(),
        ..HostRules::default()
    };
    let blocks = originate::own_blocks(resources, name);
    let policies = policy::Policies::new(resources, name, &blocks);
    let neighbours = peers::neighbours(resources, local, router_id, local_as, &policies, &mut host);
    Ok(Settings {
        router_id,
        local_as,
        cluster_id: node.cluster_id(),
        listen: listen(resources, name, node),
        neighbours,
        ranges: Vec::new(),
        originated: originate::originated(resources, name, &blocks, &local.devices),
        host,
    })
}

/// Where a node listens: on all addresses of the families that it has, or on its own ones only (`bindMode`).
fn listen(resources: &Resources, name: &str, node: &NodeView) -> Vec<SocketAddr> {
    let port = resources.listen_port(name);
    let own: Vec<IpAddr> = node.addresses().collect();
    let any = [
        IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    ];
    let bind: Vec<IpAddr> = if resources.configuration().bind_mode == Some(BindMode::NodeIP) {
        own
    } else {
        let shared = |a: &IpAddr| own.iter().any(|o| o.is_ipv4() == a.is_ipv4());
        any.into_iter().filter(shared).collect()
    };
    let sockets = bind.into_iter().map(|ip| SocketAddr::new(ip, port));
    sockets.collect()
}
