//! Work that is done once for the whole cluster: garbage collection of addresses, blocks, affinities and handles; automatic
//! host endpoints; addresses of LoadBalancer services ([`load_balancer`]); certificates of Typha and its clients ([`certificates`]).
//!
//! - [`facts`] and [`judge`] say who uses an address; [`gc`] decides what is garbage and for how long it must have been,
//!   and carries that out with compare-and-swap; [`check`] compares everything with everything, for people.
//! - [`election`] lets several replicas run, of which one works.
//!
//! What it does not do: touch addresses of a live node that keeps its own journal (`cali-node`). Such a node hands out
//! and takes back addresses without asking the datastore, so only the node itself knows which of them are free. Its
//! addresses are collected when its Node is deleted.

pub mod certificates;
pub mod check;
pub mod election;
mod error;
pub mod facts;
pub mod gc;
pub mod host_endpoints;
pub mod judge;
pub mod load_balancer;
pub mod program;
pub mod run;
pub mod settings;

pub use error::Error;
