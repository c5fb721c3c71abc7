//! Addresses for pods and tunnels: blocks, affinities and handles in Calico's format.
//!
//! - [`block`], [`pools`], [`claim`] and [`reserve::state`] decide, without I/O and clock.
//! - [`Allocator`] carries the decisions out in the datastore, with compare-and-swap; [`tunnel`] keeps the addresses of
//!   the node's tunnel devices.
//! - [`collect`] is what garbage collection may do: everything, provided that nothing was written since it looked.
//! - [`reserve::Keeper`] hands addresses to pods from a reserve that was claimed ahead.
//!
//! What it does not do: decide which addresses are garbage (that belongs to the cluster-wide controllers), and anything in the kernel.

mod affinity;
mod allocator;
pub mod block;
pub mod claim;
pub mod collect;
mod error;
mod handles;
pub mod names;
mod objects;
mod owner;
pub mod pools;
pub mod reserve;
pub mod tunnel;

pub use allocator::{Allocator, Assigned, Request, TimeSource};
pub use error::Error;
pub use owner::Owner;
