//! What the suppliers of routes say, before anything is chosen.

use std::net::IpAddr;
use std::sync::Arc;

use cali_api::NodeName;

/// Who proposes a route. The order is the preference among those that the kernel contract admits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// A local workload's address.
    Workload,
    /// A block of addresses that this node holds: what no workload uses is dropped here.
    LocalBlock,
    /// Set by the node itself or by configuration.
    Static,
    /// A block that another node holds, from the datastore.
    BlockAffinity,
    /// The best path of bgpd.
    Bgp,
}

impl Source {
    /// Every source, in order of preference.
    pub const ALL: [Self; 5] = [
        Self::Workload,
        Self::LocalBlock,
        Self::Static,
        Self::BlockAffinity,
        Self::Bgp,
    ];

    /// The word of the status socket.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Workload => "workload",
            Self::LocalBlock => "block",
            Self::Static => "static",
            Self::BlockAffinity => "affinity",
            Self::Bgp => "bgp",
        }
    }
}

/// A next hop as a routing protocol names it: not necessarily on-link.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NextHop {
    /// Its address.
    pub address: IpAddr,
    /// The interface, for a link-local address.
    pub interface: Option<Arc<str>>,
}

impl NextHop {
    /// A next hop that is looked up in the underlay.
    #[must_use]
    pub const fn new(address: IpAddr) -> Self {
        Self {
            address,
            interface: None,
        }
    }
}

/// What a source wants for a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouteSpec {
    /// Straight out of a local device, with scope link.
    Device {
        /// The workload's host-side device.
        device: Arc<str>,
        /// Preferred source address of this host towards it.
        source: Option<IpAddr>,
    },
    /// Drop.
    Blackhole,
    /// This host itself takes the packets, without an address on a device: nothing ever chooses it as a source.
    Local,
    /// The prefix lives on this node; the pool's mode decides how it is reached.
    Node(NodeName),
    /// The equal-cost next hops of a routing protocol. Never empty.
    NextHops(Vec<NextHop>),
}

/// A wish with its cause.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// What is wanted.
    pub spec: RouteSpec,
    /// Which resource or peer it comes from, for people.
    pub because: Arc<str>,
}

impl Candidate {
    /// A candidate from its parts.
    pub fn new(spec: RouteSpec, because: impl Into<Arc<str>>) -> Self {
        Self {
            spec,
            because: because.into(),
        }
    }
}
