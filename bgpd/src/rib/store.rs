//! Interned attributes: each distinct set exists once, counted by its users.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use crate::policy::DEFAULT_LOCAL_PREF;
use crate::wire::{Attributes, Community};

/// Number of an interned attribute set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct AttrId(u32);

impl AttrId {
    /// No attributes: marks an unused entry.
    pub(super) const NONE: Self = Self(u32::MAX);
}

/// What route selection reads of an attribute set, so that a comparison touches no heap.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DecisionKey {
    pub(super) local_pref: u32,
    pub(super) med: u32,
    /// Neighbouring AS, 0 for our own.
    pub(super) neighbor_as: u32,
    /// ORIGINATOR_ID, 0 when absent.
    pub(super) originator: u32,
    pub(super) hops: u16,
    pub(super) cluster_len: u16,
    pub(super) origin: u8,
    pub(super) no_export: bool,
    pub(super) no_advertise: bool,
    pub(super) llgr_stale: bool,
    pub(super) no_llgr: bool,
}

impl DecisionKey {
    fn of(a: &Attributes) -> Self {
        let short = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        Self {
            local_pref: a.local_pref.unwrap_or(DEFAULT_LOCAL_PREF),
            med: a.med.unwrap_or(0),
            neighbor_as: a.as_path.neighbor_as().unwrap_or(0),
            originator: a.originator_id.map_or(0, u32::from),
            hops: short(a.as_path.hops()),
            cluster_len: short(a.cluster_list.len()),
            origin: a.origin as u8,
            no_export: a.has_community(Community::NO_EXPORT)
                || a.has_community(Community::NO_EXPORT_SUBCONFED),
            no_advertise: a.has_community(Community::NO_ADVERTISE),
            llgr_stale: a.has_community(Community::LLGR_STALE),
            no_llgr: a.has_community(Community::NO_LLGR),
        }
    }
}

#[derive(Debug)]
struct Slot {
    attributes: Attributes,
    hash: u64,
    refs: u32,
    key: DecisionKey,
}

/// All attribute sets in use.
#[derive(Debug, Default)]
pub(super) struct AttrStore {
    slots: Vec<Slot>,
    free: Vec<u32>,
    index: HashTable<u32>,
    hasher: RandomState,
}

impl AttrStore {
    /// The number of `attributes`, counted once more.
    pub(super) fn intern(&mut self, attributes: &Attributes) -> AttrId {
        let hash = self.hasher.hash_one(attributes);
        let slots = &mut self.slots;
        let known = |id: &u32| {
            let slot = &slots[*id as usize];
            slot.hash == hash && slot.attributes == *attributes
        };
        if let Some(&id) = self.index.find(hash, known) {
            slots[id as usize].refs += 1;
            return AttrId(id);
        }
        let key = DecisionKey::of(attributes);
        let slot = Slot {
            attributes: attributes.clone(),
            hash,
            refs: 1,
            key,
        };
        let id = match self.free.pop() {
            Some(id) => {
                slots[id as usize] = slot;
                id
            }
            None => {
                slots.push(slot);
                (slots.len() - 1) as u32
            }
        };
        self.index
            .insert_unique(hash, id, |id| slots[*id as usize].hash);
        AttrId(id)
    }

    /// One more user.
    pub(super) fn retain(&mut self, id: AttrId) {
        self.slots[id.0 as usize].refs += 1;
    }

    /// One user less; the last one frees the set.
    pub(super) fn release(&mut self, id: AttrId) {
        let slot = &mut self.slots[id.0 as usize];
        slot.refs -= 1;
        if slot.refs == 0 {
            let hash = slot.hash;
            slot.attributes = Attributes::default();
            if let Ok(entry) = self.index.find_entry(hash, |other| *other == id.0) {
                entry.remove();
            }
            self.free.push(id.0);
        }
    }

    pub(super) fn get(&self, id: AttrId) -> &Attributes {
        &self.slots[id.0 as usize].attributes
    }

    pub(super) fn key(&self, id: AttrId) -> &DecisionKey {
        &self.slots[id.0 as usize].key
    }

    /// Number of distinct sets in use.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}
