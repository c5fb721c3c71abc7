//! From the datastore's objects to what this node must enforce.
//!
//! A pure, incremental graph: [`Input`] in, [`Batch`] out, no clock, no I/O. The same objects give
//! the same result in whatever order they arrive, and a change costs what it touches.
//!
//! A graph may be [one that asks](Graph::asking): of other nodes' endpoints it is told those that it asks for by selector, and until all
//! of them are there, a policy that needs the selector is held back. An endpoint keeps what it had meanwhile; a new one is not told of. So
//! consumers never have a policy whose sets are incomplete.

mod asks;
mod graph;
mod ipsets;
mod items;
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
mod asks_tests;
#[cfg(test)]
pub(crate) mod tests;
