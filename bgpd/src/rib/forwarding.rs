//! What the kernel was told, interned: many prefixes have the same selected gateways.

use std::hash::BuildHasher;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use super::event::BestRoute;

#[derive(Debug)]
struct Slot {
    route: Arc<BestRoute>,
    hash: u64,
    refs: u32,
}

/// All distinct forwarding entries.
#[derive(Debug, Default)]
pub(super) struct ForwardingStore {
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    index: HashTable<u32>,
    hasher: RandomState,
}

impl ForwardingStore {
    /// The number of `route`, counted once more.
    pub(super) fn intern(&mut self, route: BestRoute) -> u32 {
        let hash = self.hasher.hash_one(&route);
        let slots = &mut self.slots;
        let known = |id: &u32| {
            slots[*id as usize]
                .as_ref()
                .is_some_and(|s| *s.route == route)
        };
        if let Some(&id) = self.index.find(hash, known) {
            if let Some(slot) = &mut slots[id as usize] {
                slot.refs += 1;
            }
            return id;
        }
        let slot = Some(Slot {
            route: Arc::new(route),
            hash,
            refs: 1,
        });
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
        let slots = &self.slots;
        let rehash = |id: &u32| slots[*id as usize].as_ref().map_or(0, |s| s.hash);
        self.index.insert_unique(hash, id, rehash);
        id
    }

    /// One more user.
    pub(super) fn retain(&mut self, id: u32) {
        if let Some(slot) = &mut self.slots[id as usize] {
            slot.refs += 1;
        }
    }

    pub(super) fn release(&mut self, id: u32) {
        let Some(slot) = &mut self.slots[id as usize] else {
            return;
        };
        slot.refs -= 1;
        if slot.refs == 0 {
            if let Ok(entry) = self.index.find_entry(slot.hash, |other| *other == id) {
                entry.remove();
            }
            self.slots[id as usize] = None;
            self.free.push(id);
        }
    }

    pub(super) fn get(&self, id: u32) -> Option<Arc<BestRoute>> {
        Some(Arc::clone(&self.slots.get(id as usize)?.as_ref()?.route))
    }
}
