//! Where best paths go: to the node's route table over its local socket, or straight into the kernel.

pub mod kernel;
pub mod memory;
pub mod node;

use std::net::IpAddr;

use crate::rib::Gateway;
use crate::wire::{Family, Prefix};

/// The best path, or the equally good best paths, of one prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Gateways, ascending; never empty.
    pub gateways: Vec<Gateway>,
    /// LOCAL_PREF of the path.
    pub local_pref: u32,
    /// The neighbour that the path was learned from.
    pub learned_from: Option<IpAddr>,
}

/// Takes best paths. Calls never wait: an implementation keeps the latest state of each prefix, so that its
/// memory is bounded by the table, and brings it out in its own task.
pub trait Sink: Send {
    /// Whether paths are of any interest; without it, none needs to be made up for [`Self::set`].
    fn takes_paths(&self) -> bool {
        true
    }
    /// The best path of a prefix; `None` when there is none any more.
    fn set(&mut self, prefix: Prefix, path: Option<Path>);
    /// The batch is complete: bring it out.
    fn flush(&mut self);
    /// Everything known of this family has been set: what an earlier process left and this one did not set goes.
    fn end_of_sync(&mut self, family: Family);
}

/// Best paths go nowhere: for a speaker that only passes routes on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nowhere;

impl Sink for Nowhere {
    fn takes_paths(&self) -> bool {
        false
    }

    fn set(&mut self, _prefix: Prefix, _path: Option<Path>) {}

    fn flush(&mut self) {}

    fn end_of_sync(&mut self, _family: Family) {}
}
