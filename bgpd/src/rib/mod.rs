//! The routing information base: paths of all peers, route selection, and what each peer is told.
//!
//! [`Rib`] is a synchronous state machine without I/O and clock. Its owner (one task) does this:
//!
//! 1. [`Rib::handle`] any number of [`RibInput`]s: one batch. Inputs of a session that is gone (its
//!    [`PeerId::epoch`] is not the current one) are dropped;
//! 2. [`Rib::commit`]: selects routes again where something changed, and returns [`RibChanges`]: changed best
//!    routes for the kernel, next hops to watch, peers that have something to read;
//! 3. [`Rib::pull`] for a peer whenever its socket takes more: ready messages, at most as many octets as asked for.
//!
//! Peers with equal group keys share one encoded stream. Nobody waits for a slow reader: it leaves the
//! stream and is brought up to date from the table, with memory bounded by the size of the table.
//!
//! Invariants:
//! - an announcement always replaces the peer's former path for that prefix and path identifier, also when it
//!   is refused (loop, filter): then it acts as a withdrawal;
//! - a path takes part in selection only while its next hop is reachable;
//! - what a peer has been sent and not been withdrawn equals, once it has read everything, the routes that its
//!   group exports without those learned from the peer itself.

mod adj_out;
mod base;
mod batch;
mod decision;
mod engine;
mod event;
mod explain;
mod export;
mod forwarding;
mod group;
mod hops;
mod import;
mod member;
mod store;
mod table;
mod view;

pub use base::RibConfig;
pub use decision::Step;
pub use engine::Rib;
pub use event::{
    BestChange, BestRoute, Gateway, LocalRoute, NextHopMode, NextHopState, PeerConfig, PeerId,
    PeerSlot, RibChanges, RibInput, RouteSource,
};
pub use explain::WithheldRoute;
pub use export::Withheld;
pub use group::Pull;
pub use import::Refusal;
pub use view::{PathStatus, PathView, PeerCounts, RibCounts};
