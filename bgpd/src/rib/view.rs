//! Looking at the table: for status, `routes` and explanations. Reads only.

use super::decision::Step;
use super::engine::Rib;
use super::event::{BestChange, Gateway, PeerSlot, RouteSource};
use super::hops::Hop;
use super::import::Refusal;
use super::table::{DestId, NO_FORWARDING, Table, mark};
use crate::wire::{Attributes, Family, NextHop, Nlri, Prefix};

/// What became of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PathStatus {
    /// Selected.
    Best,
    /// As good as the selected one up to the interior cost: also used for forwarding.
    Multipath,
    /// Usable, but another path is better; lost at this step.
    NotBest(Step),
    /// No route to the next hop.
    NextHopUnreachable,
    /// Refused at import.
    Refused(Refusal),
}

/// A path, for display.
#[derive(Clone, Debug)]
pub struct PathView<'a> {
    /// Destination.
    pub prefix: Prefix,
    /// Who announced it.
    pub peer: PeerSlot,
    /// Where it comes from.
    pub source: RouteSource,
    /// Path identifier of the peer.
    pub path_id: u32,
    /// Attributes after the import filter.
    pub attributes: &'a Attributes,
    /// Next hop; `None` for local routes.
    pub next_hop: Option<NextHop>,
    /// Interface of a local route.
    pub interface: Option<&'a str>,
    /// What became of it.
    pub status: PathStatus,
    /// The peer restarts.
    pub stale: bool,
}

/// Numbers of a peer, of one family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerCounts {
    /// Paths in the table, refused ones included.
    pub received: u32,
    /// Paths that were not refused.
    pub accepted: u32,
}

/// Sizes of the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RibCounts {
    /// Destinations, by family.
    pub prefixes: [usize; 2],
    /// Distinct attribute sets.
    pub attribute_sets: usize,
    /// Update groups.
    pub groups: usize,
    /// Routes that did not fit into a message.
    pub unfit: u64,
}

impl Rib {
    /// All paths of a prefix, selected one first.
    pub fn paths(&self, prefix: &Prefix) -> Vec<PathView<'_>> {
        let Some(family) = prefix.family().index() else {
            return Vec::new();
        };
        let table = &self.base.tables[family];
        table
            .find(prefix)
            .map(|id| self.views(table, id))
            .unwrap_or_default()
    }

    /// All paths of up to `count` destinations from number `from` on, and where to go on. Numbers are stable, so that a
    /// dump in pieces shows each lasting destination once.
    pub fn page(&self, family: Family, from: u32, count: u32) -> (Vec<PathView<'_>>, Option<u32>) {
        let Some(family) = family.index() else {
            return (Vec::new(), None);
        };
        let table = &self.base.tables[family];
        let stop = from.saturating_add(count).min(table.end());
        let views = (from..stop).flat_map(|id| self.views(table, id)).collect();
        (views, (stop < table.end()).then_some(stop))
    }

    /// What was last handed out about a prefix.
    pub fn best(&self, prefix: &Prefix) -> BestChange {
        let table = prefix.family().index().map(|f| &self.base.tables[f]);
        let dest = table.and_then(|table| Some(table.get(table.find(prefix)?)));
        let dest = dest.filter(|dest| dest.forwarding != NO_FORWARDING);
        BestChange {
            prefix: *prefix,
            best: dest.and_then(|dest| self.forwarding.get(dest.forwarding)),
            learned_from: dest.and_then(|dest| Some(PeerSlot(dest.best()?.peer))),
        }
    }

    /// What a peer has been told, or will be as soon as it reads.
    pub fn advertised(
        &self,
        slot: PeerSlot,
        family: Family,
    ) -> Vec<(Nlri, &Attributes, Option<NextHop>)> {
        let peer = self.peers.get(usize::from(slot.0)).and_then(Option::as_ref);
        let group = peer.and_then(|p| self.groups.get(p.group? as usize)?.as_ref());
        let (Some(group), Some(family)) = (group, family.index()) else {
            return Vec::new();
        };
        let told = group.told(&self.base, slot.0, family).into_iter();
        told.map(|(route, attr, hop)| {
            (
                route,
                self.base.attrs.get(attr),
                remote(self.base.hops.get(hop)),
            )
        })
        .collect()
    }

    /// Numbers of a peer.
    pub fn peer_counts(&self, slot: PeerSlot, family: Family) -> PeerCounts {
        let peer = self.peers.get(usize::from(slot.0)).and_then(Option::as_ref);
        match (peer, family.index()) {
            (Some(peer), Some(family)) => PeerCounts {
                received: peer.paths[family],
                accepted: peer.accepted[family],
            },
            _ => PeerCounts::default(),
        }
    }

    /// Sizes.
    pub fn counts(&self) -> RibCounts {
        let groups = || self.groups.iter().flatten();
        RibCounts {
            prefixes: [self.base.tables[0].len(), self.base.tables[1].len()],
            attribute_sets: self.base.attrs.len(),
            groups: groups().count(),
            unfit: groups().map(|g| g.unfit).sum(),
        }
    }

    /// Whether a peer still has stale routes of a family.
    pub fn has_stale(&self, slot: PeerSlot, family: Family) -> bool {
        let Some(family) = family.index() else {
            return false;
        };
        let table = &self.base.tables[family];
        (0..table.end())
            .flat_map(|id| table.get(id).paths.iter())
            .any(|p| p.peer == slot.0 && p.has(mark::STALE))
    }

    /// The tracked gateway of a path's next hop, as the tracker knows it.
    pub fn gateway_of(next_hop: &NextHop, scope: u32) -> Gateway {
        Gateway {
            addr: next_hop.gateway(),
            scope,
        }
    }

    fn views<'a>(&'a self, table: &'a Table, id: DestId) -> Vec<PathView<'a>> {
        let (dest, prefix) = (table.get(id), table.prefix(id));
        let context = self.base.context();
        let selection = context.select(&dest.paths);
        let status = |index: usize| {
            let path = &dest.paths[index];
            if let Some(refusal) = Refusal::from_marks(path.marks) {
                return PathStatus::Refused(refusal);
            }
            if !context.eligible(path) {
                return PathStatus::NextHopUnreachable;
            }
            if selection.best == Some(index) {
                return PathStatus::Best;
            }
            if selection.equal.contains(&(index as u16)) {
                return PathStatus::Multipath;
            }
            PathStatus::NotBest(context.lost_at(path, &dest.paths).unwrap_or(Step::PathId))
        };
        let view = |(index, path): (usize, &super::table::Path)| PathView {
            prefix,
            peer: PeerSlot(path.peer),
            source: self.base.source(path),
            path_id: path.path_id,
            attributes: self.base.attrs.get(path.attr),
            next_hop: remote(self.base.hops.get(path.hop)),
            interface: match self.base.hops.get(path.hop) {
                Hop::Local { interface, .. } => interface.as_deref(),
                Hop::Remote { .. } => None,
            },
            status: status(index),
            stale: path.has(mark::STALE | mark::LONG_LIVED),
        };
        dest.paths.iter().enumerate().map(view).collect()
    }
}

const fn remote(hop: &Hop) -> Option<NextHop> {
    match hop {
        Hop::Local { .. } => None,
        Hop::Remote { next_hop, .. } => Some(*next_hop),
    }
}
