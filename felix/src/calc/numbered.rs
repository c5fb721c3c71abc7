//! Everything in the cluster that has addresses, by key and by number. A large cluster has some hundred thousand of them, and
//! this node needs few: each costs little more than its name.

use std::hash::BuildHasher;
use std::sync::Arc;

use cali_api::Key;
use cali_api::selector::index::Interner;
use foldhash::fast::RandomState;
use hashbrown::HashTable;

use super::ipsets::Item;

/// A number stands for one item as long as it is here, and for another one afterwards.
#[derive(Default)]
pub(super) struct Numbered {
    numbers: HashTable<u32>,
    hasher: RandomState,
    slots: Vec<Option<(Key, Item)>>,
    free: Vec<u32>,
    namespaces: Interner,
}

impl Numbered {
    /// The number of a key, of which this is the hash.
    fn find(&self, hash: u64, key: &Key) -> Option<u32> {
        let is = |number: &u32| {
            let slot = self.slots.get(*number as usize).and_then(Option::as_ref);
            slot.is_some_and(|(known, _)| known == key)
        };
        self.numbers.find(hash, is).copied()
    }

    /// What has the number.
    pub(super) fn item(&self, number: u32) -> Option<&Item> {
        let slot = self.slots.get(number as usize)?;
        slot.as_ref().map(|(_, item)| item)
    }

    /// Puts an item in the place of what the key had, which is returned.
    pub(super) fn put(&mut self, key: &Key, item: Item) -> (u32, Item) {
        let hash = self.hasher.hash_one(key);
        if let Some(number) = self.find(hash, key)
            && let Some(Some((_, known))) = self.slots.get_mut(number as usize)
        {
            return (number, std::mem::replace(known, item));
        }
        let key = Key {
            kind: key.kind,
            namespace: key.namespace.as_deref().map(|ns| self.namespaces.get(ns)),
            name: Arc::clone(&key.name),
        };
        let number = match self.free.pop() {
            Some(number) => {
                self.slots[number as usize] = Some((key, item));
                number
            }
            None => {
                self.slots.push(Some((key, item)));
                u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
            }
        };
        let (slots, hasher) = (&self.slots, &self.hasher);
        self.numbers.insert_unique(hash, number, |number| {
            let slot = slots.get(*number as usize).and_then(Option::as_ref);
            slot.map_or(0, |(key, _)| hasher.hash_one(key))
        });
        (number, Item::default())
    }

    /// Takes an item out.
    pub(super) fn remove(&mut self, key: &Key) -> Option<(u32, Item)> {
        let hash = self.hasher.hash_one(key);
        let number = self.find(hash, key)?;
        let is = |known: &u32| *known == number;
        self.numbers.find_entry(hash, is).ok()?.remove();
        let (_, item) = self.slots.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some((number, item))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::Kind;

    #[test]
    fn numbers_stand_for_their_keys_until_they_go_and_are_used_again() {
        let key = |number: u32| {
            Key::namespaced(
                Kind::NetworkSet,
                format!("ns{}", number % 3),
                format!("s{number}"),
            )
        };
        let item = |number: u32| Item {
            nets: [cali_api::Cidr::host(std::net::IpAddr::from(
                number.to_be_bytes(),
            ))]
            .into_iter()
            .collect(),
            ports: Box::default(),
        };
        let mut all = Numbered::default();
        let number_of = |all: &Numbered, key: &Key| all.find(all.hasher.hash_one(key), key);
        for number in 0..1000 {
            assert_eq!(
                all.put(&key(number), item(number)),
                (number, Item::default())
            );
        }
        assert_eq!(all.put(&key(7), item(8)), (7, item(7)), "replaced");
        for number in (0..1000).step_by(2) {
            assert_eq!(all.remove(&key(number)), Some((number, item(number))));
            assert_eq!(all.remove(&key(number)), None);
        }
        for number in 0..1000 {
            let there = number % 2 == 1;
            assert_eq!(number_of(&all, &key(number)).is_some(), there, "{number}");
            assert_eq!(all.item(number).is_some(), there, "{number}");
        }
        let (number, _) = all.put(&key(5000), item(5000));
        assert!(number < 1000, "a number is used again");
        assert_eq!(all.item(number), Some(&item(5000)));
        assert_eq!(number_of(&all, &key(5000)), Some(number));
    }
}
