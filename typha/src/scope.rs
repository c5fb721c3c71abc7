//! Which workload endpoints which clients are to have: those of their node, and those that their selectors select.
//!
//! Each selector that any client asks for is here once and is evaluated once for all of them. What a client is to be told of
//! an endpoint follows from where its cursor stands ([`Scopes::verdict`]); nothing is kept for a client but the selectors that it named.
//!
//! An endpoint *moves* when it leaves a node or ceases to match a selector: by a change of its own, of a profile's labels, or because it is
//! gone. What it left is remembered, so that exactly those clients that may hold it are told. A client that is told of
//! an endpoint's end without having had it ignores it.

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
}

impl Interest {
    /// The endpoints of this node.
    pub fn of_node(node: &str) -> Self {
        Self {
            node: node.into(),
            selectors: BTreeMap::new(),
            numbers: HashSet::default(),
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

#[derive(Debug)]
struct Entry {
    key: Key,
    position: u64,
    node: Arc<str>,
    /// Whether it exists. What is gone is here until its deletion is forgotten.
    live: bool,
    /// Sequence number of the last change that concerns anybody.
    sequence: u64,
    /// Sequence number of the last time that it left something.
    moved: u64,
    left: Vec<u32>,
    left_nodes: Vec<Arc<str>>,
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
    entries: HashMap<u32, Entry>,
    numbers: HashMap<Key, u32>,
    next_number: u32,
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
            .field(
                "endpoints",
                &self.nodes.values().map(BTreeSet::len).sum::<usize>(),
            )
            .field("selectors", &self.selectors.len())
            .finish_non_exhaustive()
    }
}

impl Scopes {
    /// Number of different selectors that are asked for.
    pub fn selectors(&self) -> usize {
        self.selectors.len()
    }

    /// Number of selector evaluations so far.
    pub fn evaluations(&self) -> u64 {
        self.index.evaluations
    }

    /// An endpoint is new or has changed.
    pub fn put(&mut self, sequence: u64, key: &Key, position: u64, endpoint: &WorkloadEndpoint) {
        let number = match self.numbers.get(key) {
            Some(number) => *number,
            None => {
                let number = self.next_number;
                self.next_number = self.next_number.wrapping_add(1);
                self.numbers.insert(key.clone(), number);
                let entry = Entry {
                    key: key.clone(),
                    position,
                    node: "".into(),
                    live: false,
                    sequence: 0,
                    moved: 0,
                    left: Vec::new(),
                    left_nodes: Vec::new(),
                };
                self.entries.insert(number, entry);
                number
            }
        };
        let node = endpoint.spec.node.as_str();
        let Some(entry) = self.entries.get_mut(&number) else {
            return;
        };
        if !entry.live || *entry.node != *node {
            let node: Arc<str> = match self.nodes.get_key_value(node) {
                Some((known, _)) => Arc::clone(known),
                None => node.into(),
            };
            let former = std::mem::replace(&mut entry.node, Arc::clone(&node));
            if std::mem::replace(&mut entry.live, true) {
                entry.leave_node(&former, sequence);
                remove_from(&mut self.nodes, &former, number);
            }
            self.nodes.entry(node).or_default().insert(number);
        }
        let labels = endpoint.effective_labels(key.namespace.as_deref());
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
    pub fn remove(&mut self, sequence: u64, key: &Key) {
        let Some(number) = self.numbers.get(key).copied() else {
            return;
        };
        let mut changes = Vec::new();
        self.index.remove_item(&number, &mut changes);
        self.note(&changes, sequence);
        if let Some(entry) = self.entries.get_mut(&number) {
            entry.live = false;
            let node = Arc::clone(&entry.node);
            entry.leave_node(&node, sequence);
            remove_from(&mut self.nodes, &node, number);
        }
        self.relog(number, sequence);
    }

    /// Nobody is told of this deletion any more.
    pub fn forget(&mut self, key: &Key) {
        let Some(number) = self.numbers.get(key).copied() else {
            return;
        };
        if let Some(entry) = self.entries.get(&number)
            && !entry.live
        {
            self.log.remove(&entry.sequence);
            self.entries.remove(&number);
            self.numbers.remove(key);
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
            let Some(entry) = self.entries.get_mut(&change.item) else {
                continue;
            };
            if change.matches {
                entry.left.retain(|selector| *selector != change.selector);
            } else {
                // Those that nobody asks for any more need no memory.
                let known = &self.selectors;
                entry.left.retain(|selector| known.contains_key(selector));
                if !entry.left.contains(&change.selector) {
                    entry.left.push(change.selector);
                }
                entry.moved = entry.moved.max(sequence);
            }
        }
    }

    fn relog(&mut self, number: u32, sequence: u64) {
        if let Some(entry) = self.entries.get_mut(&number) {
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
        let Some(entry) = self.entries.get(&number) else {
            return Verdict::Skip;
        };
        if self.selects(interest, number, entry) {
            return Verdict::Send;
        }
        let may_hold = || {
            entry
                .left
                .iter()
                .any(|selector| interest.numbers.contains(selector))
                || entry.left_nodes.contains(&interest.node)
        };
        if entry.moved > cursor && may_hold() {
            Verdict::Remove
        } else {
            Verdict::Skip
        }
    }

    fn selects(&self, interest: &Interest, number: u32, entry: &Entry) -> bool {
        entry.live
            && (entry.node == interest.node
                || interest.is_everything()
                || self
                    .index
                    .selectors_of(&number)
                    .any(|selector| interest.numbers.contains(selector)))
    }

    /// Whether an endpoint exists and is asked for.
    pub fn has(&self, interest: &Interest, number: u32) -> bool {
        self.entries
            .get(&number)
            .is_some_and(|entry| self.selects(interest, number, entry))
    }

    /// [`Self::has`], by key.
    pub fn has_key(&self, interest: &Interest, key: &Key) -> bool {
        self.numbers
            .get(key)
            .is_some_and(|number| self.has(interest, *number))
    }

    /// Position and key of what has the number.
    pub fn slot(&self, number: u32) -> Option<(u64, &Key)> {
        let entry = self.entries.get(&number)?;
        Some((entry.position, &entry.key))
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

    /// The client, whose cursor stands there, wants these selectors instead.
    pub fn change(
        &mut self,
        interest: &mut Interest,
        wanted: &BTreeSet<Arc<str>>,
        cursor: u64,
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
                    .filter_map(|number| self.entries.get(&number))
                    .map(|entry| entry.key.clone())
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

impl Entry {
    fn leave_node(&mut self, node: &Arc<str>, sequence: u64) {
        if !self.left_nodes.contains(node) {
            self.left_nodes.push(Arc::clone(node));
        }
        self.moved = self.moved.max(sequence);
    }
}

fn remove_from(nodes: &mut HashMap<Arc<str>, BTreeSet<u32>>, node: &Arc<str>, number: u32) {
    if let Some(numbers) = nodes.get_mut(node) {
        numbers.remove(&number);
        if numbers.is_empty() {
            nodes.remove(node);
        }
    }
}

fn pairs(labels: &StringMap) -> impl Iterator<Item = (&str, &str)> {
    labels
        .iter()
        .map(|(label, value)| (label.as_str(), value.as_str()))
}
