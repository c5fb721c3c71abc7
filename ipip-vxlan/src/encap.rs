//! Pool modes, reduced to what routing needs.

use cali_api::Cidr;

/// When a tunnel is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// Between any two nodes.
    Always,
    /// Only between nodes whose addresses are in different subnets.
    CrossSubnet,
}

/// Encapsulation of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Encap {
    /// No tunnel: the underlay routes the pool's addresses.
    None,
    /// IP in IP (protocol 4), IPv4 only.
    Ipip(Scope),
    /// VXLAN.
    Vxlan(Scope),
}

impl Encap {
    /// Short text for status and logs, with the words of the IPPool resource.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Ipip(Scope::Always) => "IPIP Always",
            Self::Ipip(Scope::CrossSubnet) => "IPIP CrossSubnet",
            Self::Vxlan(Scope::Always) => "VXLAN Always",
            Self::Vxlan(Scope::CrossSubnet) => "VXLAN CrossSubnet",
        }
    }
}

/// A pool as routing sees it. A pool that is `disabled` gives out no new addresses, but the ones it gave
/// out are still routed, so it counts here as any other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Name of the IPPool resource, for explanations.
    pub name: String,
    /// The pool's prefix.
    pub cidr: Cidr,
    /// The pool's encapsulation.
    pub encap: Encap,
}
