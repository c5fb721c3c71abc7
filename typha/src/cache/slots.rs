//! Where the objects are: each in a numbered slot, by which everything else in the cache names it.
//!
//! A slot is found by its key through the key's position in the key space. A deletion that is remembered keeps its slot; once it is
//! forgotten, the number is given out again.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use bytes::Bytes;
use cali_api::Key;

#[derive(Debug)]
pub(super) struct Slot {
    pub(super) key: Key,
    pub(super) position: u64,
    /// The object, or its deletion.
    pub(super) encoded: Bytes,
    /// Number of its last change.
    pub(super) sequence: u64,
    pub(super) digest: u64,
    /// Not a deletion.
    pub(super) live: bool,
}

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Slots {
    all: Vec<Option<Slot>>,
    free: Vec<u32>,
    order: BTreeSet<(u64, u32)>,
}

impl Slots {
    pub(super) fn get(&self, number: u32) -> Option<&Slot> {
        self.all.get(number as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut Slot> {
        self.all.get_mut(number as usize)?.as_mut()
    }

    /// Two keys at one position are possible, if hardly.
    pub(super) fn find(&self, position: u64, key: &Key) -> Option<u32> {
        let mut here = self.order.range((position, 0)..=(position, u32::MAX));
        here.find(|(_, number)| self.get(*number).is_some_and(|slot| slot.key == *key))
            .map(|(_, number)| *number)
    }

    pub(super) fn insert(&mut self, slot: Slot) -> u32 {
        let position = slot.position;
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.all.push(None);
                // Memory ends long before the numbers do.
                u32::try_from(self.all.len() - 1).unwrap_or(u32::MAX)
            }
        };
        self.all[number as usize] = Some(slot);
        self.order.insert((position, number));
        number
    }

    pub(super) fn remove(&mut self, number: u32) {
        if let Some(slot) = self.all.get_mut(number as usize).and_then(Option::take) {
            self.order.remove(&(slot.position, number));
            self.free.push(number);
        }
    }

    /// The objects of a part of the key space.
    pub(super) fn live_in(&self, range: RangeInclusive<u64>) -> impl Iterator<Item = &Slot> {
        self.order
            .range((*range.start(), 0)..=(*range.end(), u32::MAX))
            .filter_map(|(_, number)| self.get(*number))
            .filter(|slot| slot.live)
    }

    /// All objects, with their numbers.
    pub(super) fn live(&self) -> impl Iterator<Item = (u32, &Slot)> {
        (0u32..)
            .zip(&self.all)
            .filter_map(|(number, slot)| Some((number, slot.as_ref().filter(|slot| slot.live)?)))
    }
}
