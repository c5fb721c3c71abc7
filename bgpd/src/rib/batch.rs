//! What one evaluation found, sorted for packing: withdrawals by receivers, announcements by attributes, next hop and receivers.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::export::Out;
use super::hops::HopId;
use super::store::AttrId;
use crate::wire::Nlri;

/// Which members a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Target {
    All,
    Except(u16),
    Only(u16),
}

impl Target {
    pub(super) const fn includes(self, slot: u16) -> bool {
        match self {
            Self::All => true,
            Self::Except(other) => slot != other,
            Self::Only(other) => slot == other,
        }
    }
}

/// Announcements of one batch by attributes and next hop.
#[derive(Default)]
pub(super) struct Buckets {
    pub(super) index: HashMap<(AttrId, HopId, Target), usize, RandomState>,
    pub(super) list: Vec<(AttrId, HopId, Target, Vec<Nlri>)>,
}

impl Buckets {
    pub(super) fn add(&mut self, out: &Out, target: Target, route: Nlri) {
        let list = &mut self.list;
        let at = *self
            .index
            .entry((out.attr, out.hop, target))
            .or_insert_with(|| {
                list.push((out.attr, out.hop, target, Vec::new()));
                list.len() - 1
            });
        self.list[at].3.push(route);
    }
}

/// What one flush found.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) withdrawn: Vec<(Target, Vec<Nlri>)>,
    pub(super) buckets: Buckets,
}

impl Batch {
    pub(super) fn withdraw(&mut self, target: Target, route: Nlri) {
        match self
            .withdrawn
            .iter_mut()
            .find(|(other, _)| *other == target)
        {
            Some((_, routes)) => routes.push(route),
            None => self.withdrawn.push((target, vec![route])),
        }
    }
}
