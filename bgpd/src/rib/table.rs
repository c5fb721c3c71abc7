//! Destinations and their paths.

use std::hash::BuildHasher;
use std::net::IpAddr;
use std::ops::{Deref, DerefMut};

use foldhash::fast::RandomState;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

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

/// The paths of a destination; most destinations have one, which is kept in place.
#[derive(Debug, Default)]
pub(super) enum Paths {
    #[default]
    None,
    One(Path),
    #[expect(
        clippy::box_collection,
        reason = "a vector in place would make every destination 8 octets longer"
    )]
    Many(Box<Vec<Path>>),
}

impl Paths {
    pub(super) fn push(&mut self, path: Path) {
        match self {
            Self::None => *self = Self::One(path),
            Self::One(first) => *self = Self::Many(Box::new(vec![*first, path])),
            Self::Many(list) => list.push(path),
        }
    }

    /// Removes a path; the last one takes its place.
    pub(super) fn swap_remove(&mut self, at: usize) -> Option<Path> {
        match self {
            Self::One(path) if at == 0 => {
                let path = *path;
                *self = Self::None;
                Some(path)
            }
            Self::Many(list) if at < list.len() => {
                let path = list.swap_remove(at);
                if let [only] = list[..] {
                    *self = Self::One(only);
                }
                Some(path)
            }
            _ => None,
        }
    }
}

impl Deref for Paths {
    type Target = [Path];

    fn deref(&self) -> &[Path] {
        match self {
            Self::None => &[],
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(list) => list,
        }
    }
}

impl DerefMut for Paths {
    fn deref_mut(&mut self) -> &mut [Path] {
        match self {
            Self::None => &mut [],
            Self::One(path) => std::slice::from_mut(path),
            Self::Many(list) => list,
        }
    }
}

/// A destination; 40 octets. When `has_best`, the selected path is the first.
#[derive(Debug)]
pub(super) struct Dest {
    /// IPv4 address of the prefix; IPv6 addresses stand beside the destinations.
    bits: u32,
    len: u8,
    /// In the index; otherwise the number is free.
    used: bool,
    pub(super) has_best: bool,
    /// In the list of destinations to decide about.
    pub(super) touched: bool,
    /// The selected path was changed or removed since the last decision.
    pub(super) best_touched: bool,
    /// What the kernel was told last (number in the forwarding store), or `u32::MAX`.
    pub(super) forwarding: u32,
    /// Groups that have it in Adj-RIB-Out or in their list of changes.
    pub(super) holds: u16,
    pub(super) paths: Paths,
}

/// No forwarding entry.
pub(super) const NO_FORWARDING: u32 = u32::MAX;

const CHUNK: usize = 1024;

/// Numbers of eight neighbouring prefixes of one length, [`NOBODY`] where there is none. Peers announce prefixes that lie
/// beside each other, one after the other: so seven of eight look-ups find their part of the index in the cache.
type Block = [DestId; BLOCK];

const BLOCK: usize = 8;
const NOBODY: DestId = DestId::MAX;

/// Where a prefix is in the index.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    /// Network bits without the last three.
    block: u128,
    len: u8,
    /// The last three network bits.
    slot: usize,
}

impl Place {
    fn of(prefix: &Prefix) -> Self {
        let len = u32::from(prefix.len());
        let network = match prefix.addr() {
            IpAddr::V4(addr) => u128::from(u64::from(u32::from(addr)) >> (32 - len)),
            IpAddr::V6(addr) => u128::from(addr).checked_shr(128 - len).unwrap_or(0),
        };
        Self {
            block: network / BLOCK as u128,
            len: prefix.len(),
            slot: (network % BLOCK as u128) as usize,
        }
    }
}

/// The destinations of one family. Storage grows in chunks, so that growth never copies the table.
#[derive(Debug, Default)]
pub(super) struct Table {
    chunks: Vec<Vec<Dest>>,
    /// IPv6 addresses by destination; empty for IPv4.
    addresses: Vec<Vec<u128>>,
    free: Vec<DestId>,
    /// Blocks with at least one destination.
    index: HashTable<Block>,
    hasher: RandomState,
    /// Destinations in use.
    used: usize,
    touched: Vec<DestId>,
}

const fn place(id: DestId) -> (usize, usize) {
    (id as usize / CHUNK, id as usize % CHUNK)
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
        self.used
    }

    pub(super) fn get(&self, id: DestId) -> &Dest {
        let (chunk, at) = place(id);
        &self.chunks[chunk][at]
    }

    pub(super) fn get_mut(&mut self, id: DestId) -> &mut Dest {
        let (chunk, at) = place(id);
        &mut self.chunks[chunk][at]
    }

    /// The prefix of a destination.
    pub(super) fn prefix(&self, id: DestId) -> Prefix {
        let (chunk, at) = place(id);
        let dest = &self.chunks[chunk][at];
        match self.addresses.get(chunk) {
            Some(addresses) => Prefix::v6(addresses[at], dest.len),
            None => Prefix::v4(dest.bits, dest.len),
        }
    }

    fn hash(&self, at: Place) -> u64 {
        self.hasher.hash_one((at.block, at.len))
    }

    /// Whether this is the block of that place. Some destination of the block knows.
    fn is_block(&self, block: &Block, at: Place) -> bool {
        let known = match block[at.slot] {
            NOBODY => block.iter().copied().find(|id| *id != NOBODY),
            id => Some(id),
        };
        known.is_some_and(|id| {
            let other = Place::of(&self.prefix(id));
            (other.block, other.len) == (at.block, at.len)
        })
    }

    pub(super) fn find(&self, prefix: &Prefix) -> Option<DestId> {
        let at = Place::of(prefix);
        let block = self
            .index
            .find(self.hash(at), |block| self.is_block(block, at));
        block.map(|block| block[at.slot]).filter(|id| *id != NOBODY)
    }

    pub(super) fn find_or_insert(&mut self, prefix: Prefix) -> DestId {
        if let Some(id) = self.find(&prefix) {
            return id;
        }
        let (bits, address) = match prefix.addr() {
            IpAddr::V4(addr) => (u32::from(addr), None),
            IpAddr::V6(addr) => (0, Some(u128::from(addr))),
        };
        let dest = Dest {
            bits,
            len: prefix.len(),
            used: true,
            has_best: false,
            touched: false,
            best_touched: false,
            forwarding: NO_FORWARDING,
            holds: 0,
            paths: Paths::None,
        };
        let id = match self.free.pop() {
            Some(id) => {
                *self.get_mut(id) = dest;
                id
            }
            None => self.append(dest),
        };
        if let Some(address) = address {
            self.set_address(id, address);
        }
        self.used += 1;
        self.with_block(Place::of(&prefix), |block, at| {
            let block = block.or_insert([NOBODY; BLOCK]);
            block.into_mut()[at.slot] = id;
        });
        id
    }

    /// Changes the index at a place.
    fn with_block(&mut self, at: Place, change: impl FnOnce(Entry<'_, Block>, Place)) {
        // Taken out, because the comparisons look at the destinations.
        let mut index = std::mem::take(&mut self.index);
        let hash = self.hash(at);
        let rehash = |block: &Block| {
            let known = block.iter().copied().find(|id| *id != NOBODY);
            known.map_or(0, |id| self.hash(Place::of(&self.prefix(id))))
        };
        change(
            index.entry(hash, |block| self.is_block(block, at), rehash),
            at,
        );
        self.index = index;
    }

    fn append(&mut self, dest: Dest) -> DestId {
        if self.chunks.last().is_none_or(|c| c.len() == CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        let id = self.end();
        if let Some(last) = self.chunks.last_mut() {
            last.push(dest);
        }
        id
    }

    fn set_address(&mut self, id: DestId, address: u128) {
        let (chunk, at) = place(id);
        if chunk == self.addresses.len() {
            self.addresses.push(Vec::with_capacity(CHUNK));
        }
        let addresses = &mut self.addresses[chunk];
        if at == addresses.len() {
            addresses.push(address);
        } else {
            addresses[at] = address;
        }
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
        if !dest.used || !dest.paths.is_empty() || dest.holds > 0 || dest.touched {
            return;
        }
        dest.used = false;
        let at = Place::of(&self.prefix(id));
        self.with_block(at, |entry, at| {
            if let Entry::Occupied(mut block) = entry {
                block.get_mut()[at.slot] = NOBODY;
                if *block.get() == [NOBODY; BLOCK] {
                    block.remove();
                }
            }
        });
        self.used -= 1;
        self.free.push(id);
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
