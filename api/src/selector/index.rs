//! Which items match which selectors, kept up to date change by change.
//!
//! Items with the same labels and the same parents form a *class*, and a selector is evaluated once
//! per class, not once per item: a cluster's pods fall into few classes. A change costs what it
//! touches: an item that moves to a known class costs a comparison of two short lists; a new class
//! is evaluated against the selectors that could match it; new parent labels against the classes
//! that have this parent.
//!
//! An item's own labels win over its parents', and a former parent over a later one.

use std::collections::BTreeSet;
use std::hash::Hash;
use std::sync::Arc;

use super::{Labels, Restriction, Selector};
use foldhash::{HashMap, HashSet};
use smallvec::SmallVec;

type LabelPairs = Arc<[(Arc<str>, Arc<str>)]>;

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

#[derive(Clone, PartialEq, Eq, Hash)]
struct ClassIdentity {
    labels: LabelPairs,
    parents: SmallVec<[Arc<str>; 2]>,
}

struct Class<I, S> {
    identity: ClassIdentity,
    items: HashSet<I>,
    matching: BTreeSet<S>,
}

struct Entry {
    selector: Selector,
    classes: HashSet<u32>,
}

#[derive(Default)]
struct Parent {
    labels: HashMap<Arc<str>, Arc<str>>,
    classes: HashSet<u32>,
}

/// What a selector sees of a class.
struct Effective<'a> {
    own: &'a [(Arc<str>, Arc<str>)],
    parents: SmallVec<[&'a HashMap<Arc<str>, Arc<str>>; 2]>,
}

impl Effective<'_> {
    fn pairs(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        let own = self.own.iter().map(|(label, value)| (label, value));
        own.chain(self.parents.iter().flat_map(|parent| parent.iter()))
    }
}

impl Labels for Effective<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        if let Ok(at) = self.own.binary_search_by(|(name, _)| (**name).cmp(key)) {
            return Some(&self.own[at].1);
        }
        self.parents
            .iter()
            .find_map(|parent| parent.get(key))
            .map(|value| &**value)
    }
}

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
    /// The buckets of a selector: those of its narrowest restriction.
    fn of(selector: &Selector) -> Vec<Self> {
        let width = |restriction: &Restriction| match restriction {
            Restriction::OneOf(values) => values.len(),
            Restriction::Present => usize::MAX,
        };
        match selector
            .restrictions()
            .into_iter()
            .min_by_key(|(_, restriction)| width(restriction))
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
pub struct LabelIndex<I, S> {
    classes: HashMap<u32, Class<I, S>>,
    next_class: u32,
    by_identity: HashMap<ClassIdentity, u32>,
    class_of: HashMap<I, u32>,
    parents: HashMap<Arc<str>, Parent>,
    /// Classes by label and value of their own, by which the classes that a new selector may match are found.
    own: HashMap<Arc<str>, HashMap<Arc<str>, HashSet<u32>>>,
    selectors: HashMap<S, Entry>,
    /// Selectors by one condition that whatever they match must satisfy.
    buckets: HashMap<Bucket, HashSet<S>>,
    texts: Interner,
    /// Number of selector evaluations so far: what narrowing and sharing are measured by.
    pub evaluations: u64,
}

impl<I, S> Default for LabelIndex<I, S> {
    fn default() -> Self {
        Self {
            classes: HashMap::default(),
            next_class: 0,
            by_identity: HashMap::default(),
            class_of: HashMap::default(),
            parents: HashMap::default(),
            own: HashMap::default(),
            selectors: HashMap::default(),
            buckets: HashMap::default(),
            texts: Interner::default(),
            evaluations: 0,
        }
    }
}

impl<I: Clone + Eq + Hash, S: Clone + Ord + Hash> LabelIndex<I, S> {
    /// Adds an item or gives it other labels or parents.
    pub fn set_item<'a>(
        &mut self,
        item: I,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        parents: &[Arc<str>],
        changes: &mut Vec<MatchChange<I, S>>,
    ) {
        let identity = self.identity(labels, parents);
        let old = self.class_of.get(&item).copied();
        if old.is_some_and(|class| self.classes[&class].identity == identity) {
            return;
        }
        let new = match self.by_identity.get(&identity) {
            Some(class) => *class,
            None => self.create_class(identity),
        };
        self.class_of.insert(item.clone(), new);
        if let Some(class) = self.classes.get_mut(&new) {
            class.items.insert(item.clone());
        }
        let none = BTreeSet::new();
        let before = old.map_or(&none, |class| &self.classes[&class].matching);
        let after = &self.classes[&new].matching;
        for selector in before.difference(after) {
            changes.push(MatchChange {
                item: item.clone(),
                selector: selector.clone(),
                matches: false,
            });
        }
        for selector in after.difference(before) {
            changes.push(MatchChange {
                item: item.clone(),
                selector: selector.clone(),
                matches: true,
            });
        }
        if let Some(old) = old {
            self.leave_class(&item, old);
        }
    }

    /// Removes an item.
    pub fn remove_item(&mut self, item: &I, changes: &mut Vec<MatchChange<I, S>>) {
        let Some(class) = self.class_of.remove(item) else {
            return;
        };
        for selector in &self.classes[&class].matching {
            changes.push(MatchChange {
                item: item.clone(),
                selector: selector.clone(),
                matches: false,
            });
        }
        self.leave_class(item, class);
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
        let parent = self.parents.entry(name.clone()).or_default();
        if parent.labels == labels {
            self.drop_unused_parent(name);
            return;
        }
        parent.labels = labels;
        let classes: Vec<u32> = parent.classes.iter().copied().collect();
        for class in classes {
            self.evaluate_class(class, changes);
        }
        self.drop_unused_parent(name);
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
            .unwrap_or_else(|| self.classes.keys().copied().collect());
        for number in candidates {
            let Some(class) = self.classes.get_mut(&number) else {
                continue;
            };
            self.evaluations += 1;
            if selector.matches(&effective(&class.identity, &self.parents)) {
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
            let own = self
                .own
                .get(label)
                .and_then(|values| values.get(value))
                .into_iter()
                .flatten();
            let inherited = self
                .parents
                .values()
                .filter(move |parent| parent.labels.get(label).is_some_and(|it| **it == *value))
                .flat_map(|parent| &parent.classes);
            own.chain(inherited).copied().collect::<Vec<u32>>()
        };
        selector
            .restrictions()
            .into_iter()
            .filter_map(|(label, restriction)| match restriction {
                Restriction::OneOf(values) => {
                    let found = values.iter().flat_map(|value| with(&label, value));
                    Some(found.collect::<Vec<u32>>())
                }
                Restriction::Present => None,
            })
            .min_by_key(Vec::len)
            .map(|found| found.into_iter().collect())
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
            if let Some(class) = self.classes.get_mut(&number) {
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
            .into_iter()
            .flat_map(|class| &self.classes[class].matching)
    }

    /// The items that a selector matches, in no order.
    pub fn items_of(&self, selector: &S) -> impl Iterator<Item = &I> {
        let classes = self
            .selectors
            .get(selector)
            .into_iter()
            .flat_map(|entry| &entry.classes);
        classes
            .filter_map(|class| self.classes.get(class))
            .flat_map(|class| &class.items)
    }

    fn identity<'a>(
        &mut self,
        labels: impl IntoIterator<Item = (&'a str, &'a str)>,
        parents: &[Arc<str>],
    ) -> ClassIdentity {
        let mut pairs: Vec<_> = labels
            .into_iter()
            .map(|(key, value)| (self.texts.get(key), self.texts.get(value)))
            .collect();
        pairs.sort_unstable();
        pairs.dedup_by(|later, former| later.0 == former.0);
        ClassIdentity {
            labels: pairs.into(),
            parents: parents.iter().map(|name| self.texts.get(name)).collect(),
        }
    }

    fn create_class(&mut self, identity: ClassIdentity) -> u32 {
        let number = self.next_class;
        self.next_class = self.next_class.wrapping_add(1);
        for name in &identity.parents {
            self.parents
                .entry(name.clone())
                .or_default()
                .classes
                .insert(number);
        }
        for (label, value) in &*identity.labels {
            self.own
                .entry(label.clone())
                .or_default()
                .entry(value.clone())
                .or_default()
                .insert(number);
        }
        self.by_identity.insert(identity.clone(), number);
        self.classes.insert(
            number,
            Class {
                identity,
                items: HashSet::default(),
                matching: BTreeSet::new(),
            },
        );
        self.evaluate_class(number, &mut Vec::new());
        number
    }

    /// Evaluates every selector against one class and tells what changed for its items.
    fn evaluate_class(&mut self, number: u32, changes: &mut Vec<MatchChange<I, S>>) {
        let Some(class) = self.classes.get_mut(&number) else {
            return;
        };
        let labels = effective(&class.identity, &self.parents);
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

    fn leave_class(&mut self, item: &I, number: u32) {
        let Some(class) = self.classes.get_mut(&number) else {
            return;
        };
        class.items.remove(item);
        if !class.items.is_empty() {
            return;
        }
        let Some(class) = self.classes.remove(&number) else {
            return;
        };
        self.by_identity.remove(&class.identity);
        for (label, value) in &*class.identity.labels {
            self.forget_own(label, value, number);
        }
        for id in &class.matching {
            if let Some(entry) = self.selectors.get_mut(id) {
                entry.classes.remove(&number);
            }
        }
        for name in &class.identity.parents {
            if let Some(parent) = self.parents.get_mut(name) {
                parent.classes.remove(&number);
            }
            self.drop_unused_parent(name);
        }
    }

    fn forget_own(&mut self, label: &str, value: &str, number: u32) {
        let Some(values) = self.own.get_mut(label) else {
            return;
        };
        if let Some(classes) = values.get_mut(value) {
            classes.remove(&number);
            if classes.is_empty() {
                values.remove(value);
            }
        }
        if values.is_empty() {
            self.own.remove(label);
        }
    }

    fn drop_unused_parent(&mut self, name: &Arc<str>) {
        if self
            .parents
            .get(name)
            .is_some_and(|parent| parent.labels.is_empty() && parent.classes.is_empty())
        {
            self.parents.remove(name);
        }
    }
}

fn effective<'a>(
    identity: &'a ClassIdentity,
    parents: &'a HashMap<Arc<str>, Parent>,
) -> Effective<'a> {
    Effective {
        own: &identity.labels,
        parents: identity
            .parents
            .iter()
            .filter_map(|name| parents.get(name))
            .map(|parent| &parent.labels)
            .collect(),
    }
}

/// One copy of each text. Texts that nobody holds any more are dropped when the store has doubled.
#[derive(Default)]
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
