//! From the datastore's objects to what this node must enforce.
//!
//! A pure, incremental graph: [`Input`] in, [`Batch`] out, no clock, no I/O. The same objects give
//! the same result in whatever order they arrive, and a change costs what it touches.

mod graph;
mod ipsets;
mod items;
mod labels;
mod local;
mod members;
mod numbered;
mod output;
mod rules;
mod services;
mod snapshot;
mod tunnel_peers;

use std::sync::Arc;

use cali_api::Key;
use cali_api::update::SyncEvent;
use cali_api::v3::WorkloadEndpoint;

pub use graph::Graph;
pub use output::{
    Action, Batch, Delta, Direction, Endpoint, HostEndpoint, HostInterface, Icmp, IpSetId,
    IpSetKind, IpVersion, Limit, Limits, Member, PeerMatch, PoolNat, PortRange, Rule, Rules,
    STAGES, Stage, TierDefault, TierPolicies, Tiers, TunnelPeers,
};
pub use snapshot::{Snapshot, Violation};

/// What the graph is told.
#[derive(Debug, Clone)]
pub enum Input {
    /// From the datastore.
    Sync(SyncEvent),
    /// From the CNI server: a local endpoint that the datastore may not have yet (or, with `None`,
    /// an announcement taken back). As soon as the datastore has the endpoint, its labels, ports
    /// and profiles count; interface and addresses stay the announced ones.
    Announce(Key, Option<Arc<WorkloadEndpoint>>),
}

#[cfg(test)]
pub(crate) mod tests;
