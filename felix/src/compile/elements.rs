//! The elements of one set, kept small: a cluster's sets have some hundred thousand of them, most of which are a key alone or
//! a key that leads to a chain.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_netlink::nft::{Data, Elem, Key, Verdict};

/// What an element says beside its key.
#[derive(Debug, PartialEq, Eq)]
enum More {
    Goto(Arc<str>),
    Other(Elem),
}

/// Nothing, in most cases. Programs share it.
type Rest = Option<Arc<More>>;

/// Elements in the order of their keys (the first value of a range).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Elements(BTreeMap<Key, Rest>);

fn split(elem: Elem) -> (Key, Rest) {
    let plain = elem.end.is_none()
        && elem.timeout.is_none()
        && elem.expires.is_none()
        && elem.counter.is_none()
        && elem.comment.is_none();
    match &elem.data {
        None if plain => (elem.key, None),
        Some(Data::Verdict(Verdict::Goto(chain))) if plain => {
            let chain = chain.clone();
            (elem.key, Some(Arc::new(More::Goto(chain))))
        }
        _ => (elem.key.clone(), Some(Arc::new(More::Other(elem)))),
    }
}

fn join(key: &Key, rest: &Rest) -> Elem {
    match rest.as_deref() {
        None => Elem::new(key.clone()),
        Some(More::Goto(chain)) => Elem::new(key.clone()).verdict(Verdict::Goto(chain.clone())),
        Some(More::Other(elem)) => elem.clone(),
    }
}

impl Elements {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The element with this key.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<Elem> {
        let (key, rest) = self.0.get_key_value(key)?;
        Some(join(key, rest))
    }

    /// Whether there is one with this key.
    #[must_use]
    pub fn contains_key(&self, key: &Key) -> bool {
        self.0.contains_key(key)
    }

    /// The last element that begins at this value or before.
    #[must_use]
    pub fn last_until(&self, value: &Key) -> Option<Elem> {
        let (key, rest) = self.0.range(..=value).next_back()?;
        Some(join(key, rest))
    }

    /// The keys in order.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.0.keys()
    }

    /// All in order.
    pub fn iter(&self) -> impl Iterator<Item = Elem> + '_ {
        self.0.iter().map(|(key, rest)| join(key, rest))
    }

    /// Adds or replaces one; whether that changed something.
    pub fn insert(&mut self, elem: Elem) -> bool {
        let (key, rest) = split(elem);
        if self.0.get(&key) == Some(&rest) {
            return false;
        }
        self.0.insert(key, rest);
        true
    }

    /// Has what another one has under this key, or nothing.
    pub fn follow(&mut self, other: &Self, key: &Key) {
        match other.0.get(key) {
            Some(rest) => self.0.insert(key.clone(), rest.clone()),
            None => self.0.remove(key),
        };
    }

    /// Takes one out; whether it was there.
    pub fn remove(&mut self, key: &Key) -> bool {
        self.0.remove(key).is_some()
    }
}

impl Extend<Elem> for Elements {
    fn extend<I: IntoIterator<Item = Elem>>(&mut self, elements: I) {
        self.0.extend(elements.into_iter().map(split));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn what_goes_in_comes_out() {
        let key = |last| Key::bytes(&[10, 0, 0, last]);
        let all = [
            Elem::new(key(1)),
            Elem::new(key(2)).verdict(Verdict::Goto("there".into())),
            Elem::new(key(3)).verdict(Verdict::Drop),
            Elem {
                end: Some(key(9)),
                ..Elem::new(key(4))
            },
            Elem {
                timeout: Some(Duration::from_secs(1)),
                comment: Some("why".into()),
                ..Elem::new(key(10)).verdict(Verdict::Goto("there".into()))
            },
        ];
        let mut elements = Elements::default();
        for elem in &all {
            assert!(elements.insert(elem.clone()));
            assert!(!elements.insert(elem.clone()), "it is there already");
            assert_eq!(elements.get(&elem.key).as_ref(), Some(elem));
        }
        assert_eq!(elements.iter().collect::<Vec<_>>(), all);
        assert_eq!(elements.last_until(&key(7)), Some(all[3].clone()));
        assert_eq!(elements.last_until(&key(0)), None);
        assert!(elements.insert(Elem::new(key(2))), "it leads nowhere now");
        assert!(elements.remove(&key(2)));
        assert!(!elements.remove(&key(2)));
        assert_eq!(elements.len(), 4);
    }
}
