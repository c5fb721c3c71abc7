//! Which workload endpoints which clients are to have: those of their node, and those that their selectors select.
//!
//! Each selector that any client asks for is here once and is evaluated once for all of them. What a client is to be told of
//! an endpoint follows from where its cursor stands ([`Scopes::verdict`]); nothing is kept for a client but the selectors that it named.
//!
//! An endpoint *moves* when it leaves a node or ceases to match a selector: by a change of its own, of a profile's labels, or because it is
//! gone. What it left is remembered, so that exactly those clients that may hold it are told. A client that is told of
//! an endpoint's end without having had it ignores it.
//!
//! Endpoints are named by the numbers of their slots in the cache, which has their keys; here is nothing of them while nobody asks for
//! a part. A number that is given out again may stand for another endpoint than a client's list meant: it is looked at when it is sent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::selector::Selector;
use cali_api::selector::index::{LabelIndex, MatchChange};
use cali_api::v3::WorkloadEndpoint;
use cali_api::{Key, StringMap};
use foldhash::{HashMap, HashSet};

/// What one client wants of the endpoints. It is given back with [`Scopes::end`].
#[derive(Debug)]
pub struct Interest {
    node: Arc<str>,
    /// By text. Without a number: everything, or what this version cannot read, which may be anything.
    selectors: BTreeMap<Arc<str>, Option<u32>>,
    numbers: HashSet<u32>,
    begun: bool,
}

impl Interest {
    /// The endpoints of this node.
    pub fn of_node(node: &str) -> Self {
        Self {
            node: node.into(),
            selectors: BTreeMap::new(),
            numbers: HashSet::default(),
            begun: false,
        }
    }

    /// Whether every endpoint is asked for.
    pub fn is_everything(&self) -> bool {
        self.selectors.len() > self.numbers.len()
    }
}

/// What follows from another set of selectors.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// These are to be sent, and of those it is to be said that they are gone.
    Items {
        /// Numbers.
        add: Vec<u32>,
        /// Keys: a number may stand for nothing any more when it is said.
        remove: Vec<Key>,
    },
    /// Every endpoint is to be sent.
    Everything,
    /// These are to be sent, and whatever else the client holds it is to forget.
    Only(Vec<u32>),
}

/// What a client is to be told of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Its newest version.
    Send,
    /// That it is gone, as far as the client is concerned.
    Remove,
    /// Nothing.
    Skip,
}

/// An endpoint, by its number. What is gone has no node.
#[derive(Debug, Default, Clone)]
struct Entry {
    node: Option<Arc<str>>,
    /// Number of the last change that concerns anybody; zero: none since somebody asks.
    sequence: u64,
}

/// What an endpoint left.
#[derive(Debug, Default)]
struct Left {
    /// Sequence number of the last time.
    moved: u64,
    selectors: Vec<u32>,
    nodes: Vec<Arc<str>>,
}

#[derive(Debug)]
struct Interned {
    text: Arc<str>,
    users: usize,
}

/// See the module's text.
#[derive(Default)]
pub struct Scopes {
    index: LabelIndex<u32, u32>,
    /// Clients that ask for a part.
    users: usize,
    entries: Vec<Entry>,
    left: HashMap<u32, Left>,
    nodes: HashMap<Arc<str>, BTreeSet<u32>>,
    /// Changes, by sequence number; each endpoint once, with its last one.
    log: BTreeMap<u64, u32>,
    selectors: HashMap<u32, Interned>,
    by_text: HashMap<Arc<str>, u32>,
    next_selector: u32,
}

impl std::fmt::Debug for Scopes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scopes")
            .field("endpoints", &self.endpoints())
            .field("selectors", &self.selectors.len())
            .finish_non_exhaustive()
    }
}

impl Scopes {
    /// Number of endpoints that are known here.
    pub fn endpoints(&self) -> usize {
        self.nodes.values().map(BTreeSet::len).sum()
    }

    /// Number of different selectors that are asked for.
    pub fn selectors(&self) -> usize {
        self.selectors.len()
    }

    /// Number of selector evaluations so far.
    pub fn evaluations(&self) -> u64 {
        self.index.evaluations
    }

    /// Whether any client asks for a part. While none does, nothing needs to be told here.
    pub fn is_asked(&self) -> bool {
        self.users > 0
    }

    /// A client is there. True for the first: what there is has to be told then.
    pub fn begin(&mut self, interest: &mut Interest) -> bool {
        if std::mem::replace(&mut interest.begun, true) {
            return false;
        }
        self.users += 1;
        self.users == 1
    }

    /// An endpoint is new or has changed; with sequence number zero, it was there before anybody asked.
    pub fn put(
        &mut self,
        sequence: u64,
        number: u32,
        namespace: Option<&str>,
        endpoint: &WorkloadEndpoint,
    ) {
        let at = number as usize;
        if self.entries.len() <= at {
            self.entries.resize(at + 1, Entry::default());
        }
        let node = endpoint.spec.node.as_str();
        let entry = &mut self.entries[at];
        if entry.node.as_deref() != Some(node) {
            let node: Arc<str> = match self.nodes.get_key_value(node) {
                Some((known, _)) => Arc::clone(known),
                None => node.into(),
            };
            if let Some(former) = entry.node.replace(Arc::clone(&node)) {
                self.leave_node(number, &former, sequence);
            }
            self.nodes.entry(node).or_default().insert(number);
        }
        let labels = endpoint.effective_labels(namespace);
        let parents: Vec<Arc<str>> = endpoint
            .spec
            .profiles
            .iter()
            .map(|name| name.as_str().into())
            .collect();
        let mut changes = Vec::new();
        self.index
            .set_item(number, pairs(&labels), &parents, &mut changes);
        self.note(&changes, sequence);
        self.relog(number, sequence);
    }

    /// An endpoint is gone.
    pub fn remove(&mut self, sequence: u64, number: u32) {
        let entry = self.entries.get_mut(number as usize);
        let Some(node) = entry.and_then(|entry| entry.node.take()) else {
            return;
        };
        let mut changes = Vec::new();
        self.index.remove_item(&number, &mut changes);
        self.note(&changes, sequence);
        self.leave_node(number, &node, sequence);
        self.relog(number, sequence);
    }

    /// Nobody is told of this deletion any more.
    pub fn forget(&mut self, number: u32) {
        if let Some(entry) = self.entries.get_mut(number as usize)
            && entry.node.is_none()
        {
            self.log.remove(&entry.sequence);
            entry.sequence = 0;
            self.left.remove(&number);
        }
    }

    fn leave_node(&mut self, number: u32, node: &Arc<str>, sequence: u64) {
        let left = self.left.entry(number).or_default();
        if !left.nodes.contains(node) {
            left.nodes.push(Arc::clone(node));
        }
        left.moved = left.moved.max(sequence);
        if let Some(numbers) = self.nodes.get_mut(node) {
            numbers.remove(&number);
            if numbers.is_empty() {
                self.nodes.remove(node);
            }
        }
    }

    /// A profile gives these labels to the endpoints that name it. Those that move by it are numbered on from `head`.
    pub fn set_profile(&mut self, head: &mut u64, name: &Arc<str>, labels: &StringMap) {
        let mut changes = Vec::new();
        self.index.set_parent(name, pairs(labels), &mut changes);
        let moved: BTreeSet<u32> = changes.iter().map(|change| change.item).collect();
        let first = *head;
        for number in moved {
            *head += 1;
            self.relog(number, *head);
        }
        // Later than any cursor from before.
        self.note(&changes, first + 1);
    }

    fn note(&mut self, changes: &[MatchChange<u32, u32>], sequence: u64) {
        for change in changes {
            if change.matches {
                if let Some(left) = self.left.get_mut(&change.item) {
                    left.selectors.retain(|it| *it != change.selector);
                }
                continue;
            }
            let left = self.left.entry(change.item).or_default();
            // Those that nobody asks for any more need no memory.
            left.selectors.retain(|it| self.selectors.contains_key(it));
            if !left.selectors.contains(&change.selector) {
                left.selectors.push(change.selector);
            }
            left.moved = left.moved.max(sequence);
        }
    }

    fn relog(&mut self, number: u32, sequence: u64) {
        if let Some(entry) = self.entries.get_mut(number as usize)
            && sequence > 0
        {
            self.log.remove(&entry.sequence);
            entry.sequence = sequence;
            self.log.insert(sequence, number);
        }
    }

    /// The changes after a cursor, the oldest first.
    pub fn since(&self, cursor: u64) -> impl Iterator<Item = (u64, u32)> {
        self.log
            .range(cursor + 1..)
            .map(|(sequence, number)| (*sequence, *number))
    }

    /// What a client whose cursor stands there is to be told of an endpoint.
    pub fn verdict(&self, interest: &Interest, number: u32, cursor: u64) -> Verdict {
        if self.has(interest, number) {
            return Verdict::Send;
        }
        let may_hold = |left: &Left| {
            let mut selectors = left.selectors.iter();
            left.moved > cursor
                && (selectors.any(|selector| interest.numbers.contains(selector))
                    || left.nodes.contains(&interest.node))
        };
        if self.left.get(&number).is_some_and(may_hold) {
            Verdict::Remove
        } else {
            Verdict::Skip
        }
    }

    /// Whether an endpoint exists and is asked for.
    pub fn has(&self, interest: &Interest, number: u32) -> bool {
        let entry = self.entries.get(number as usize);
        let node = entry.and_then(|entry| entry.node.as_ref());
        node.is_some_and(|node| {
            *node == interest.node
                || interest.is_everything()
                || self
                    .index
                    .selectors_of(&number)
                    .any(|selector| interest.numbers.contains(selector))
        })
    }

    /// All that is asked for, but for an interest in everything.
    pub fn all_of(&self, interest: &Interest) -> Vec<u32> {
        let mut all: Vec<u32> = self
            .nodes
            .get(&interest.node)
            .into_iter()
            .flatten()
            .copied()
            .collect();
        for selector in &interest.numbers {
            all.extend(self.index.items_of(selector));
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// The client, whose cursor stands there, wants these selectors instead. `key` knows the keys of the numbers.
    pub fn change(
        &mut self,
        interest: &mut Interest,
        wanted: &BTreeSet<Arc<str>>,
        cursor: u64,
        key: impl Fn(u32) -> Option<Key>,
    ) -> Change {
        let was_everything = interest.is_everything();
        let gone: Vec<Arc<str>> = interest
            .selectors
            .keys()
            .filter(|text| !wanted.contains(*text))
            .cloned()
            .collect();
        let gone_numbers: Vec<u32> = gone
            .iter()
            .filter_map(|text| interest.selectors.get(text).copied().flatten())
            .collect();
        let mut leaving: BTreeSet<u32> = BTreeSet::new();
        if !was_everything {
            for selector in &gone_numbers {
                leaving.extend(self.index.items_of(selector));
            }
            // What the client has not been told yet it would be told by what it wanted then.
            let untold = self
                .since(cursor)
                .filter(|(_, number)| self.verdict(interest, *number, cursor) == Verdict::Remove);
            leaving.extend(untold.map(|(_, number)| number));
        }
        let mut added = Vec::new();
        for text in wanted {
            if !interest.selectors.contains_key(text) {
                added.push((Arc::clone(text), self.intern(text)));
            }
        }
        let mut coming: Vec<u32> = Vec::new();
        if !was_everything {
            for selector in added.iter().filter_map(|(_, number)| *number) {
                let items = self.index.items_of(&selector).copied();
                coming.extend(items.filter(|number| !self.has(interest, *number)));
            }
            coming.sort_unstable();
            coming.dedup();
        }
        for text in &gone {
            interest.selectors.remove(text);
        }
        for selector in &gone_numbers {
            interest.numbers.remove(selector);
        }
        interest
            .numbers
            .extend(added.iter().filter_map(|(_, number)| *number));
        interest.selectors.extend(added);
        let change = match (was_everything, interest.is_everything()) {
            (false, true) => Change::Everything,
            (true, false) => Change::Only(self.all_of(interest)),
            (true, true) => Change::Items {
                add: Vec::new(),
                remove: Vec::new(),
            },
            (false, false) => Change::Items {
                add: coming,
                remove: leaving
                    .into_iter()
                    .filter(|number| !self.has(interest, *number))
                    .filter_map(key)
                    .collect(),
            },
        };
        gone_numbers
            .into_iter()
            .for_each(|selector| self.release(selector));
        change
    }

    /// The client is gone.
    pub fn end(&mut self, interest: Interest) {
        for selector in interest.numbers {
            self.release(selector);
        }
        if interest.begun {
            self.users -= 1;
        }
        if self.users == 0 {
            let mut index = LabelIndex::default();
            index.evaluations = self.index.evaluations;
            *self = Self {
                index,
                ..Self::default()
            };
        }
    }

    /// The number of a selector; none for one that may select anything.
    fn intern(&mut self, text: &Arc<str>) -> Option<u32> {
        if let Some(number) = self.by_text.get(text) {
            if let Some(known) = self.selectors.get_mut(number) {
                known.users += 1;
            }
            return Some(*number);
        }
        // What a later version's client may write selects who knows what.
        let selector = Selector::parse(text).ok().filter(|it| !it.is_all())?;
        let number = self.next_selector;
        self.next_selector = self.next_selector.wrapping_add(1);
        self.index.add_selector(number, selector, &mut Vec::new());
        self.by_text.insert(Arc::clone(text), number);
        let interned = Interned {
            text: Arc::clone(text),
            users: 1,
        };
        self.selectors.insert(number, interned);
        Some(number)
    }

    fn release(&mut self, number: u32) {
        let Some(known) = self.selectors.get_mut(&number) else {
            return;
        };
        known.users -= 1;
        if known.users == 0 {
            self.by_text.remove(&known.text);
            self.selectors.remove(&number);
            self.index.remove_selector(&number, &mut Vec::new());
        }
    }
}

fn pairs(labels: &StringMap) -> impl Iterator<Item = (&str, &str)> {
    labels
        .iter()
        .map(|(label, value)| (label.as_str(), value.as_str()))
}
