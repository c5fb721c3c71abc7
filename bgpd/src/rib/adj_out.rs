//! Adj-RIB-Out of a group: what its members were told.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use super::export::{Out, Outs};
use super::store::AttrId;
use super::table::DestId;

/// One family's routes, by destination: an array when each destination has one route at most, a map with add-path.
#[derive(Debug)]
pub(super) enum AdjOut {
    Single(Vec<Out>),
    Multi(HashMap<DestId, Outs, RandomState>),
}

impl AdjOut {
    pub(super) fn new(add_path: bool) -> Self {
        if add_path {
            Self::Multi(HashMap::default())
        } else {
            Self::Single(Vec::new())
        }
    }

    /// Routes of a destination.
    pub(super) fn get(&self, id: DestId) -> Outs {
        match self {
            Self::Single(list) => list
                .get(id as usize)
                .filter(|out| out.attr != AttrId::NONE)
                .map(|out| (0, *out))
                .into_iter()
                .collect(),
            Self::Multi(map) => map.get(&id).cloned().unwrap_or_default(),
        }
    }

    /// The route with this path identifier.
    pub(super) fn route(&self, id: DestId, path_id: u32) -> Option<Out> {
        match self {
            Self::Single(list) => list
                .get(id as usize)
                .filter(|out| out.attr != AttrId::NONE)
                .copied(),
            Self::Multi(map) => map
                .get(&id)?
                .iter()
                .find(|(other, _)| *other == path_id)
                .map(|(_, out)| *out),
        }
    }

    /// Replaces the routes of a destination. The caller takes care of references.
    pub(super) fn set(&mut self, id: DestId, outs: Outs) {
        match self {
            Self::Single(list) => {
                let index = id as usize;
                if index >= list.len() {
                    if outs.is_empty() {
                        return;
                    }
                    list.resize(index + 1, Out::NONE);
                }
                list[index] = outs.first().map_or(Out::NONE, |(_, out)| *out);
            }
            Self::Multi(map) if outs.is_empty() => {
                map.remove(&id);
            }
            Self::Multi(map) => {
                map.insert(id, outs);
            }
        }
    }

    /// Destinations with at least one route, ascending.
    pub(super) fn destinations(&self) -> Vec<DestId> {
        match self {
            Self::Single(list) => (0..list.len() as DestId)
                .filter(|id| list[*id as usize].attr != AttrId::NONE)
                .collect(),
            Self::Multi(map) => {
                let mut ids: Vec<DestId> = map.keys().copied().collect();
                ids.sort_unstable();
                ids
            }
        }
    }
}
