//! Destinations and their paths.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use smallvec::SmallVec;

use super::hops::HopId;
use super::store::AttrId;
use crate::wire::Prefix;

/// Number of a destination; stable while it has paths or someone must still be told about it.
pub(super) type DestId = u32;

/// Marks of a path.
pub(super) mod mark {
    /// The peer restarts (RFC 4724); goes unless announced again.
    pub(in crate::rib) const STALE: u16 = 1;
    /// Kept beyond that (RFC 9494): least preferred.
    pub(in crate::rib) const LONG_LIVED: u16 = 2;
    /// Not yet repeated since BoRR (RFC 7313).
    pub(in crate::rib) const UNREFRESHED: u16 = 4;
    /// An import rule prefers it over local routes.
    pub(in crate::rib) const PREFERRED: u16 = 8;
    /// Where the reason of a refusal starts (three bits, 0: accepted).
    pub(in crate::rib) const REFUSAL_SHIFT: u16 = 8;
}

/// One path; 20 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Path {
    pub(super) attr: AttrId,
    pub(super) hop: HopId,
    /// Identifier given by the peer.
    pub(super) path_id: u32,
    /// Slot of the peer.
    pub(super) peer: u16,
    /// Our identifier: unique among the destination's paths, stable for the path (RFC 7911 §3).
    pub(super) local_id: u16,
    pub(super) marks: u16,
}

impl Path {
    pub(super) const fn has(&self, mark: u16) -> bool {
        self.marks & mark != 0
    }

    /// Refused by a loop check or filter: kept for display, never selected.
    pub(super) const fn is_refused(&self) -> bool {
        self.marks >> mark::REFUSAL_SHIFT != 0
    }
}

/// A destination. When `has_best`, the selected path is the first.
#[derive(Debug)]
pub(super) struct Dest {
    pub(super) prefix: Prefix,
    pub(super) has_best: bool,
    /// In the list of destinations to decide about.
    pub(super) touched: bool,
    /// The selected path was changed or removed since the last decision.
    pub(super) best_touched: bool,
    /// Groups that have it in Adj-RIB-Out or in their list of changes.
    pub(super) holds: u16,
    /// What the kernel was told last (number in the forwarding store), or `u32::MAX`.
    pub(super) forwarding: u32,
    pub(super) paths: SmallVec<[Path; 1]>,
}

/// No forwarding entry.
pub(super) const NO_FORWARDING: u32 = u32::MAX;

const CHUNK: usize = 1024;

/// The destinations of one family. Storage grows in chunks, so that growth never copies the table.
#[derive(Debug, Default)]
pub(super) struct Table {
    chunks: Vec<Vec<Dest>>,
    free: Vec<DestId>,
    index: HashTable<DestId>,
    hasher: RandomState,
    touched: Vec<DestId>,
}

impl Table {
    /// One more than the largest number in use.
    pub(super) fn end(&self) -> DestId {
        match self.chunks.last() {
            Some(last) => ((self.chunks.len() - 1) * CHUNK + last.len()) as DestId,
            None => 0,
        }
    }

    /// Number of destinations in use.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    pub(super) fn get(&self, id: DestId) -> &Dest {
        &self.chunks[id as usize / CHUNK][id as usize % CHUNK]
    }

    pub(super) fn get_mut(&mut self, id: DestId) -> &mut Dest {
        &mut self.chunks[id as usize / CHUNK][id as usize % CHUNK]
    }

    pub(super) fn find(&self, prefix: &Prefix) -> Option<DestId> {
        let hash = self.hasher.hash_one(prefix);
        self.index
            .find(hash, |id| self.get(*id).prefix == *prefix)
            .copied()
    }

    pub(super) fn find_or_insert(&mut self, prefix: Prefix) -> DestId {
        let hash = self.hasher.hash_one(prefix);
        if let Some(&id) = self.index.find(hash, |id| self.get(*id).prefix == prefix) {
            return id;
        }
        let dest = Dest {
            prefix,
            has_best: false,
            touched: false,
            best_touched: false,
            holds: 0,
            forwarding: NO_FORWARDING,
            paths: SmallVec::new(),
        };
        let id = match self.free.pop() {
            Some(id) => {
                *self.get_mut(id) = dest;
                id
            }
            None => {
                if self.chunks.last().is_none_or(|c| c.len() == CHUNK) {
                    self.chunks.push(Vec::with_capacity(CHUNK));
                }
                let id = self.end();
                if let Some(last) = self.chunks.last_mut() {
                    last.push(dest);
                }
                id
            }
        };
        let (chunks, hasher) = (&self.chunks, &self.hasher);
        let rehash = |id: &DestId| {
            hasher.hash_one(chunks[*id as usize / CHUNK][*id as usize % CHUNK].prefix)
        };
        self.index.insert_unique(hash, id, rehash);
        id
    }

    /// To be decided about at the next commit.
    pub(super) fn touch(&mut self, id: DestId) {
        let dest = self.get_mut(id);
        if !dest.touched {
            dest.touched = true;
            self.touched.push(id);
        }
    }

    pub(super) fn take_touched(&mut self) -> Vec<DestId> {
        std::mem::take(&mut self.touched)
    }

    /// One hold less; see [`Dest::holds`].
    pub(super) fn unhold(&mut self, id: DestId) {
        self.get_mut(id).holds -= 1;
        self.free_if_unused(id);
    }

    pub(super) fn free_if_unused(&mut self, id: DestId) {
        let dest = self.get_mut(id);
        if !dest.paths.is_empty() || dest.holds > 0 || dest.touched {
            return;
        }
        let prefix = dest.prefix;
        let hash = self.hasher.hash_one(prefix);
        if let Ok(entry) = self.index.find_entry(hash, |other| *other == id) {
            entry.remove();
            self.free.push(id);
        }
    }
}

impl Dest {
    pub(super) fn position(&self, peer: u16, path_id: u32) -> Option<usize> {
        self.paths
            .iter()
            .position(|p| p.peer == peer && p.path_id == path_id)
    }

    /// The smallest identifier that no path of the destination has.
    pub(super) fn unused_local_id(&self) -> u16 {
        let len = u16::try_from(self.paths.len()).unwrap_or(u16::MAX - 1);
        (1..=len + 1)
            .find(|id| self.paths.iter().all(|p| p.local_id != *id))
            .unwrap_or(u16::MAX)
    }

    /// The selected path.
    pub(super) fn best(&self) -> Option<&Path> {
        self.paths.first().filter(|_| self.has_best)
    }

    /// Notes that the path at `index` is about to change.
    pub(super) fn changing(&mut self, index: usize) {
        if index == 0 && self.has_best {
            self.best_touched = true;
        }
    }
}
