//! Best paths from `bgpd` to the one route table of the node.
//!
//! ```text
//! bgpd                                   cali-node
//!   | -- Hello ------------------------------> |
//!   | <------------------------------- Hello -- |   routes of an earlier bgpd are kept, marked stale
//!   | -- Update (everything it knows) --------> |
//!   | -- EndOfSync(family) ------------------->  |   what is still stale in that family goes now
//!   | -- Update (changes) --------------------> |
//!   | <---- Applied{sequence, failed} --------- |
//! ```
//!
//! The connection's end removes nothing: the kernel forwards as it did until a new `bgpd` has said
//! [`ToNode::EndOfSync`]. That is what makes a crash or an upgrade of `bgpd` invisible to traffic (RFC 4724 §4.1,
//! "forwarding state preserved").

use cali_api::Cidr;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Name in the [`crate::Hello`].
pub const PROTOCOL: &str = "cali-routes";
/// Version of this protocol.
pub const VERSION: u32 = 1;

/// Address family of an end-of-sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    Ipv4,
    Ipv6,
}

/// One next hop of a best path. Several make an equal-cost route.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NextHop {
    /// BGP next hop as received; it need not be on-link, the route table resolves it.
    pub address: IpAddr,
    /// Interface name, for a link-local next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
}

/// The best path, or the equal-cost best paths, of one prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BestPath {
    pub prefix: Cidr,
    /// Never empty.
    pub next_hops: Vec<NextHop>,
    /// Address of the peer that the (first) path was learned from; for status.
    pub learned_from: IpAddr,
    /// LOCAL_PREF of the path, which Calico maps to the kernel metric; `None` where the path has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_pref: Option<u32>,
}

/// From `bgpd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToNode {
    /// Replaces the paths of each announced prefix and removes the withdrawn ones.
    Update {
        /// Rises by one with each update of a connection, from 1.
        sequence: u64,
        announced: Vec<BestPath>,
        withdrawn: Vec<Cidr>,
    },
    /// Everything that `bgpd` knows in this family has been sent: what an earlier one left and this one did not
    /// announce is removed.
    EndOfSync(Family),
}

/// A prefix that could not be programmed, and why, in words for an operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failed {
    pub prefix: Cidr,
    pub reason: String,
}

/// From `cali-node`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToBgpd {
    /// The update with this sequence number has been handed to the kernel.
    Applied { sequence: u64, failed: Vec<Failed> },
}
