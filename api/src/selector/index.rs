//! Which items match which selectors, kept up to date change by change.
//!
//! Items with the same labels and the same parents form a *class*, and a selector is evaluated once
//! per class, not once per item: a cluster's pods fall into few classes. A change costs what it
//! touches: an item that moves to a known class costs a comparison of two short lists; a new class
//! is evaluated against the selectors that could match it; new parent labels against the classes
//! that have this parent.
//!
//! An item's own labels win over its parents', and a former parent over a later one.
//!
//! A cluster whose pods have labels of their own each (stateful sets) has as many classes as pods. So a class is small: labels and
//! parents are numbers into tables that have each of them once.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::hash::Hash;
use std::sync::Arc;

use super::{Labels, Restriction, Selector};
use crate::Key;
use crate::kubernetes::{LABEL_NAMESPACE, LABEL_SERVICE_ACCOUNT};
use foldhash::{HashMap, HashSet};
use smallvec::SmallVec;

/// A pair of item and selector that began or ceased to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatchChange<I, S> {
    /// The item.
    pub item: I,
    /// The selector.
    pub selector: S,
    /// Whether it matches now.
    pub matches: bool,
}

/// What stands in a class, at which place.
type Place = (u32, u32);

/// An item, as far as an index must find its place.
pub trait Item: Clone + Eq + Hash {
    /// The places of items.
    type Places: Places<Self>;
}

/// Places of items.
pub trait Places<I>: Default {
    /// That of an item.
    fn get(&self, item: &I) -> Option<Place>;
    /// Gives an item its place, or takes it away.
    fn set(&mut self, item: &I, place: Option<Place>);
}

impl<I: Clone + Eq + Hash> Places<I> for HashMap<I, Place> {
    fn get(&self, item: &I) -> Option<Place> {
        Self::get(self, item).copied()
    }

    fn set(&mut self, item: &I, place: Option<Place>) {
        match place {
            Some(place) => self.insert(item.clone(), place),
            None => self.remove(item),
        };
    }
}

/// Places of items that are numbered from 0, without large gaps: by number.
#[derive(Debug, Default)]
pub struct ByNumber(Vec<Place>);

/// No class has this number.
const NOWHERE: Place = (u32::MAX, u32::MAX);

impl Places<u32> for ByNumber {
    fn get(&self, item: &u32) -> Option<Place> {
        let place = self.0.get(*item as usize).copied();
        place.filter(|place| *place != NOWHERE)
    }

    fn set(&mut self, item: &u32, place: Option<Place>) {
        let at = *item as usize;
        if at >= self.0.len() && place.is_some() {
            self.0.resize(at + 1, NOWHERE);
        }
        if let Some(slot) = self.0.get_mut(at) {
            *slot = place.unwrap_or(NOWHERE);
        }
    }
}

impl Item for u32 {
    type Places = ByNumber;
}

impl Item for Key {
    type Places = HashMap<Self, Place>;
}

/// How many labels of its own a class has, their numbers by label, and the numbers of its parents in their order.
type Identity = Arc<[u32]>;

fn own_labels(identity: &[u32]) -> &[u32] {
    identity
        .get(1..=identity.first().map_or(0, |count| *count as usize))
        .unwrap_or_default()
}

fn parents_of(identity: &[u32]) -> &[u32] {
    let own = identity.first().map_or(0, |count| *count as usize);
    identity.get(own + 1..).unwrap_or_default()
}

struct Class<I, S> {
    identity: Identity,
    items: SmallVec<[I; 2]>,
    matching: BTreeSet<S>,
}

struct Entry {
    selector: Selector,
    classes: HashSet<u32>,
}

/// A label with its value, and the classes that have it themselves.
struct Pair {
    label: Arc<str>,
    value: Arc<str>,
    classes: BTreeSet<u32>,
}

struct Parent {
    name: Arc<str>,
    labels: HashMap<Arc<str>, Arc<str>>,
    classes: BTreeSet<u32>,
}

/// Values of a label, and what has them.
type ByLabel<T> = HashMap<Arc<str>, HashMap<Arc<str>, T>>;

/// Values by number. A number that is free is given out again.
struct Slab<T> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    fn insert(&mut self, value: T) -> u32 {
        if let Some(number) = self.free.pop() {
            self.slots[number as usize] = Some(value);
            return number;
        }
        self.slots.push(Some(value));
        u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
    }

    fn get(&self, number: u32) -> Option<&T> {
        self.slots.get(number as usize)?.as_ref()
    }

    fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.slots.get_mut(number as usize)?.as_mut()
    }

    fn remove(&mut self, number: u32) -> Option<T> {
        let value = self.slots.get_mut(number as usize)?.take()?;
        self.free.push(number);
        Some(value)
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0u32..)
            .zip(&self.slots)
            .filter_map(|(number, slot)| Some((number, slot.as_ref()?)))
    }
}

/// What a selector sees of a class.
struct Effective<'a> {
    own: &'a [u32],
    pairs: &'a Slab<Pair>,
    parents: SmallVec<[&'a HashMap<Arc<str>, Arc<str>>; 2]>,
}

impl Effective<'_> {
    fn pairs(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        let own = self.own.iter().filter_map(|pair| self.pairs.get(*pair));
        own.map(|pair| (&pair.label, &pair.value))
            .chain(self.parents.iter().flat_map(|parent| parent.iter()))
    }
}

impl Labels for Effective<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let by_label = |pair: &u32| self.pairs.get(*pair).map(|pair| (*pair.label).cmp(key));
        let own = self
            .own
            .binary_search_by(|pair| by_label(pair).unwrap_or(Ordering::Less));
        if let Ok(at) = own {
            return self.pairs.get(self.own[at]).map(|pair| &*pair.value);
        }
        self.parents
            .iter()
            .find_map(|parent| parent.get(key))
            .map(|value| &**value)
    }
}

/// Labels that few objects share the value of.
const WHERE: [&str; 2] = [LABEL_NAMESPACE, LABEL_SERVICE_ACCOUNT];

/// A necessary condition by which the selectors that may match a class are found.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Bucket {
    /// Nothing is known.
    Any,
    /// The label is present.
    Present(Arc<str>),
    /// The label has this value.
    Value(Arc<str>, Arc<str>),
}

impl Bucket {
    /// The buckets of a selector: those of its narrowest restriction. Of equal ones that of where an object is: every namespace
    /// may have an application of the same name.
    fn of(selector: &Selector) -> Vec<Self> {
        let width = |restriction: &Restriction| match restriction {
            Restriction::OneOf(values) => values.len(),
            Restriction::Present => usize::MAX,
        };
        match selector
            .restrictions()
            .into_iter()
            .min_by_key(|(label, restriction)| (width(restriction), !WHERE.contains(&&**label)))
        {
            None => vec![Self::Any],
            Some((label, Restriction::Present)) => vec![Self::Present((*label).into())],
            Some((label, Restriction::OneOf(values))) => {
                let label: Arc<str> = (*label).into();
                values
                    .iter()
                    .map(|value| Self::Value(label.clone(), (**value).into()))
                    .collect()
            }
        }
    }
}

/// Index of items (`I`) and selectors (`S`).
pub struct LabelIndex<I: Item, S> {
    classes: Slab<Class<I, S>>,
    by_identity: HashMap<Identity, u32>,
    /// The class of an item, and where it stands in it.
    class_of: I::Places,
    pairs: Slab<Pair>,
    pair_of: ByLabel<u32>,
    parents: Slab<Parent>,
    /// Parents by each of their labels.
    parents_with: ByLabel<BTreeSet<u32>>,
    parent_of: HashMap<Arc<str>, u32>,
    selectors: HashMap<S, Entry>,
    /// Selectors by one condition that whatever they match must satisfy.
    buckets: HashMap<Bucket, HashSet<S>>,
    texts: Interner,
    /// Number of selector evaluations so far: what narrowing and sharing are measured by.
    pub evaluations: u64,
}

impl<I: Item, S> Default for LabelIndex<I, S> {
    fn default() -> Self {
        Self {
            classes: Slab::default(),
            by_identity: HashMap::default(),
            class_of: I::Places::default(),
            pairs: Slab::default(),
            pair_of: HashMap::default(),
            parents: Slab::default(),
            parents_with: HashMap::default(),
            parent_of: HashMap::default(),
            selectors: HashMap::default(),
            buckets: HashMap::default(),
            texts: Interner::default(),
            evaluations: 0,
        }
    }
}

impl<I: Item, S: Clone + Ord + Hash> LabelIndex<I, S> {
    /// Adds an item or gives it other labels or parents.
    pub fn set_item<'a>(
        &mut self,
        item: I,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        parents: &[Arc<str>],
        changes: &mut Vec<MatchChange<I, S>>,
    ) {
        let identity = self.identity(labels, parents);
        let old = self.class_of.get(&item);
        let known = self.by_identity.get(&*identity).copied();
        if let (Some((old, _)), Some(known)) = (old, known)
            && old == known
        {
            return;
        }
        let new = known.unwrap_or_else(|| self.create_class(&identity));
        let none = BTreeSet::new();
        let matching = |class: u32| self.classes.get(class).map_or(&none, |it| &it.matching);
        let before = old.map_or(&none, |(class, _)| matching(class));
        let after = matching(new);
        let change = |selector: &S, matches| MatchChange {
            item: item.clone(),
            selector: selector.clone(),
            matches,
        };
        changes.extend(
            before
                .difference(after)
                .map(|selector| change(selector, false)),
        );
        changes.extend(
            after
                .difference(before)
                .map(|selector| change(selector, true)),
        );
        if let Some((class, at)) = old {
            self.leave_class(class, at);
        }
        if let Some(class) = self.classes.get_mut(new) {
            class.items.push(item.clone());
            let at = u32::try_from(class.items.len() - 1).unwrap_or(u32::MAX);
            self.class_of.set(&item, Some((new, at)));
        }
    }

    /// Removes an item.
    pub fn remove_item(&mut self, item: &I, changes: &mut Vec<MatchChange<I, S>>) {
        let Some((number, at)) = self.class_of.get(item) else {
            return;
        };
        self.class_of.set(item, None);
        let Some(class) = self.classes.get(number) else {
            return;
        };
        changes.extend(class.matching.iter().map(|selector| MatchChange {
            item: item.clone(),
            selector: selector.clone(),
            matches: false,
        }));
        self.leave_class(number, at);
    }

    /// Gives a parent its labels; none takes them away.
    pub fn set_parent<'a>(
        &mut self,
        name: &Arc<str>,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        changes: &mut Vec<MatchChange<I, S>>,
    ) {
        let labels: HashMap<Arc<str>, Arc<str>> = labels
            .into_iter()
            .map(|(key, value)| (self.texts.get(key), self.texts.get(value)))
            .collect();
        let number = self.parent(name);
        let Some(parent) = self.parents.get_mut(number) else {
            return;
        };
        if parent.labels != labels {
            for (label, value) in &parent.labels {
                leave(&mut self.parents_with, label, value, number);
            }
            for (label, value) in &labels {
                let values = self.parents_with.entry(label.clone()).or_default();
                values.entry(value.clone()).or_default().insert(number);
            }
            parent.labels = labels;
            let classes: Vec<u32> = parent.classes.iter().copied().collect();
            for class in classes {
                self.evaluate_class(class, changes);
            }
        }
        self.drop_unused_parent(number);
    }

    /// Adds a selector; an identity stands for one selector only.
    pub fn add_selector(
        &mut self,
        id: S,
        selector: Selector,
        changes: &mut Vec<MatchChange<I, S>>,
    ) {
        if self.selectors.contains_key(&id) {
            return;
        }
        let mut classes = HashSet::default();
        let candidates = self
            .candidates(&selector)
            .unwrap_or_else(|| self.classes.iter().map(|(number, _)| number).collect());
        for number in candidates {
            let Some(class) = self.classes.get_mut(number) else {
                continue;
            };
            self.evaluations += 1;
            if selector.matches(&effective(&class.identity, &self.pairs, &self.parents)) {
                classes.insert(number);
                class.matching.insert(id.clone());
                for item in &class.items {
                    changes.push(MatchChange {
                        item: item.clone(),
                        selector: id.clone(),
                        matches: true,
                    });
                }
            }
        }
        for bucket in Bucket::of(&selector) {
            self.buckets.entry(bucket).or_default().insert(id.clone());
        }
        self.selectors.insert(id, Entry { selector, classes });
    }

    /// The classes that a selector may match, by the restriction that leaves the fewest; `None` where no label must have
    /// a value.
    fn candidates(&self, selector: &Selector) -> Option<HashSet<u32>> {
        let with = |label: &str, value: &str| {
            let own = self.pair_number(label, value);
            let own = own.and_then(|pair| self.pairs.get(pair));
            let parents = self.parents_with.get(label).and_then(|of| of.get(value));
            let parents = parents.into_iter().flatten();
            let inherited = parents.filter_map(|number| self.parents.get(*number));
            own.map(|pair| &pair.classes)
                .into_iter()
                .chain(inherited.map(|parent| &parent.classes))
                .collect::<Vec<&BTreeSet<u32>>>()
        };
        selector
            .restrictions()
            .into_iter()
            .filter_map(|(label, restriction)| match restriction {
                Restriction::OneOf(values) => {
                    let found = values.iter().flat_map(|value| with(&label, value));
                    Some(found.collect::<Vec<_>>())
                }
                Restriction::Present => None,
            })
            .min_by_key(|found| found.iter().map(|classes| classes.len()).sum::<usize>())
            .map(|found| found.into_iter().flatten().copied().collect())
    }

    /// Removes a selector.
    pub fn remove_selector(&mut self, id: &S, changes: &mut Vec<MatchChange<I, S>>) {
        let Some(entry) = self.selectors.remove(id) else {
            return;
        };
        for bucket in Bucket::of(&entry.selector) {
            if let Some(group) = self.buckets.get_mut(&bucket) {
                group.remove(id);
                if group.is_empty() {
                    self.buckets.remove(&bucket);
                }
            }
        }
        for number in entry.classes {
            if let Some(class) = self.classes.get_mut(number) {
                class.matching.remove(id);
                for item in &class.items {
                    changes.push(MatchChange {
                        item: item.clone(),
                        selector: id.clone(),
                        matches: false,
                    });
                }
            }
        }
    }

    /// The selectors that match an item, sorted.
    pub fn selectors_of(&self, item: &I) -> impl Iterator<Item = &S> {
        self.class_of
            .get(item)
            .and_then(|(class, _)| self.classes.get(class))
            .into_iter()
            .flat_map(|class| &class.matching)
    }

    /// The items that a selector matches, in no order.
    pub fn items_of(&self, selector: &S) -> impl Iterator<Item = &I> {
        let classes = self
            .selectors
            .get(selector)
            .into_iter()
            .flat_map(|entry| &entry.classes);
        classes
            .filter_map(|class| self.classes.get(*class))
            .flat_map(|class| &class.items)
    }

    /// A pair or parent that nobody has yet makes the identity new, so that a class follows that has it.
    fn identity<'a>(
        &mut self,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        parents: &[Arc<str>],
    ) -> SmallVec<[u32; 16]> {
        let mut labels: SmallVec<[(&str, &str); 12]> = labels.into_iter().collect();
        labels.sort_unstable();
        labels.dedup_by(|later, former| later.0 == former.0);
        let mut identity = SmallVec::new();
        identity.push(u32::try_from(labels.len()).unwrap_or(u32::MAX));
        identity.extend(
            labels
                .into_iter()
                .map(|(label, value)| self.pair(label, value)),
        );
        identity.extend(parents.iter().map(|name| self.parent(name)));
        identity
    }

    fn pair_number(&self, label: &str, value: &str) -> Option<u32> {
        self.pair_of.get(label)?.get(value).copied()
    }

    fn pair(&mut self, label: &str, value: &str) -> u32 {
        if let Some(number) = self.pair_number(label, value) {
            return number;
        }
        let (label, value) = (self.texts.get(label), self.texts.get(value));
        let number = self.pairs.insert(Pair {
            label: label.clone(),
            value: value.clone(),
            classes: BTreeSet::new(),
        });
        self.pair_of.entry(label).or_default().insert(value, number);
        number
    }

    fn parent(&mut self, name: &str) -> u32 {
        if let Some(number) = self.parent_of.get(name) {
            return *number;
        }
        let name = self.texts.get(name);
        let number = self.parents.insert(Parent {
            name: name.clone(),
            labels: HashMap::default(),
            classes: BTreeSet::new(),
        });
        self.parent_of.insert(name, number);
        number
    }

    fn create_class(&mut self, identity: &[u32]) -> u32 {
        let identity: Identity = identity.into();
        let number = self.classes.insert(Class {
            identity: identity.clone(),
            items: SmallVec::new(),
            matching: BTreeSet::new(),
        });
        for parent in parents_of(&identity) {
            if let Some(parent) = self.parents.get_mut(*parent) {
                parent.classes.insert(number);
            }
        }
        for pair in own_labels(&identity) {
            if let Some(pair) = self.pairs.get_mut(*pair) {
                pair.classes.insert(number);
            }
        }
        self.by_identity.insert(identity, number);
        self.evaluate_class(number, &mut Vec::new());
        number
    }

    /// Evaluates every selector against one class and tells what changed for its items.
    fn evaluate_class(&mut self, number: u32, changes: &mut Vec<MatchChange<I, S>>) {
        let Some(class) = self.classes.get_mut(number) else {
            return;
        };
        let labels = effective(&class.identity, &self.pairs, &self.parents);
        // What matched so far is looked at again: a label that led to its bucket may have gone.
        let mut candidates: HashSet<S> = class.matching.iter().cloned().collect();
        let mut look = |bucket: Bucket| {
            candidates.extend(self.buckets.get(&bucket).into_iter().flatten().cloned())
        };
        look(Bucket::Any);
        for (label, value) in labels.pairs() {
            look(Bucket::Present(label.clone()));
            look(Bucket::Value(label.clone(), value.clone()));
        }
        for id in &candidates {
            let Some(entry) = self.selectors.get_mut(id) else {
                continue;
            };
            self.evaluations += 1;
            let matches = entry.selector.matches(&labels);
            let differs = if matches {
                entry.classes.insert(number)
            } else {
                entry.classes.remove(&number)
            };
            if !differs {
                continue;
            }
            if matches {
                class.matching.insert(id.clone());
            } else {
                class.matching.remove(id);
            }
            for item in &class.items {
                changes.push(MatchChange {
                    item: item.clone(),
                    selector: id.clone(),
                    matches,
                });
            }
        }
    }

    /// Takes the item that stands there out of a class; the last one takes its place.
    fn leave_class(&mut self, number: u32, at: u32) {
        let Some(class) = self.classes.get_mut(number) else {
            return;
        };
        class.items.swap_remove(at as usize);
        if let Some(moved) = class.items.get(at as usize) {
            self.class_of.set(moved, Some((number, at)));
        }
        if !class.items.is_empty() {
            return;
        }
        let Some(class) = self.classes.remove(number) else {
            return;
        };
        self.by_identity.remove(&class.identity);
        for pair in own_labels(&class.identity) {
            self.leave_pair(*pair, number);
        }
        for id in &class.matching {
            if let Some(entry) = self.selectors.get_mut(id) {
                entry.classes.remove(&number);
            }
        }
        for parent in parents_of(&class.identity) {
            if let Some(parent) = self.parents.get_mut(*parent) {
                parent.classes.remove(&number);
            }
            self.drop_unused_parent(*parent);
        }
    }

    fn leave_pair(&mut self, number: u32, class: u32) {
        let Some(pair) = self.pairs.get_mut(number) else {
            return;
        };
        pair.classes.remove(&class);
        if !pair.classes.is_empty() {
            return;
        }
        let Some(pair) = self.pairs.remove(number) else {
            return;
        };
        if let Some(values) = self.pair_of.get_mut(&pair.label) {
            values.remove(&pair.value);
            if values.is_empty() {
                self.pair_of.remove(&pair.label);
            }
        }
    }

    fn drop_unused_parent(&mut self, number: u32) {
        if self
            .parents
            .get(number)
            .is_some_and(|parent| parent.labels.is_empty() && parent.classes.is_empty())
            && let Some(parent) = self.parents.remove(number)
        {
            self.parent_of.remove(&parent.name);
        }
    }
}

/// Takes a parent from those that have a label.
fn leave(by_label: &mut ByLabel<BTreeSet<u32>>, label: &str, value: &str, parent: u32) {
    let Some(values) = by_label.get_mut(label) else {
        return;
    };
    if let Some(parents) = values.get_mut(value) {
        parents.remove(&parent);
        if parents.is_empty() {
            values.remove(value);
        }
    }
    if values.is_empty() {
        by_label.remove(label);
    }
}

fn effective<'a>(
    identity: &'a [u32],
    pairs: &'a Slab<Pair>,
    parents: &'a Slab<Parent>,
) -> Effective<'a> {
    Effective {
        own: own_labels(identity),
        pairs,
        parents: parents_of(identity)
            .iter()
            .filter_map(|parent| parents.get(*parent))
            .map(|parent| &parent.labels)
            .collect(),
    }
}

/// One copy of each text. Texts that nobody holds any more are dropped when the store has doubled.
#[derive(Debug, Default)]
pub struct Interner {
    texts: HashSet<Arc<str>>,
    sweep_at: usize,
}

impl Interner {
    /// The one copy of this text.
    pub fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return known.clone();
        }
        if self.texts.len() >= self.sweep_at.max(1024) {
            self.texts.retain(|text| Arc::strong_count(text) > 1);
            self.sweep_at = self.texts.len() * 2;
        }
        let text: Arc<str> = text.into();
        self.texts.insert(text.clone());
        text
    }
}
