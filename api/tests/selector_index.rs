//! The index of labels says of each change exactly which pairs of item and selector begin and cease to match: compared with the plain meaning.
#![allow(
    clippy::unwrap_used,
    reason = "outside test functions too, this is test code"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::StringMap;
use cali_api::selector::Selector;
use cali_api::selector::index::LabelIndex;
use proptest::prelude::*;

const SELECTORS: [&str; 8] = [
    "a == 'x'",
    "a in {'x', 'y'} && has(b)",
    "has(c)",
    "a != 'x'",
    "all()",
    "b == 'y' || c == 'x'",
    "c == 'y'",
    "!has(a)",
];

#[derive(Debug, Clone)]
enum Step {
    Item(u32, StringMap, Vec<u8>),
    NoItem(u32),
    Parent(u8, StringMap),
    Select(usize),
    Forget(usize),
}

fn labels() -> impl Strategy<Value = StringMap> {
    let label = prop::sample::select(vec!["a", "b", "c"]);
    let value = prop::sample::select(vec!["x", "y"]);
    let pairs = prop::collection::vec((label, value), 0..3);
    pairs.prop_map(|pairs| {
        let pairs = pairs.into_iter();
        pairs
            .map(|(label, value)| (label.to_owned(), value.to_owned()))
            .collect()
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6u32, labels(), prop::collection::vec(0..3u8, 0..3))
            .prop_map(|(item, labels, parents)| Step::Item(item, labels, parents)),
        1 => (0..6u32).prop_map(Step::NoItem),
        2 => (0..3u8, labels()).prop_map(|(parent, labels)| Step::Parent(parent, labels)),
        2 => (0..SELECTORS.len()).prop_map(Step::Select),
        1 => (0..SELECTORS.len()).prop_map(Step::Forget),
    ]
}

fn pairs(labels: &StringMap) -> impl Iterator<Item = (&str, &str)> {
    labels
        .iter()
        .map(|(label, value)| (label.as_str(), value.as_str()))
}

fn parent(number: u8) -> Arc<str> {
    format!("p{number}").into()
}

/// Own labels before those of parents, a former parent before a later one.
fn effective(own: &StringMap, parents: &[u8], known: &BTreeMap<u8, StringMap>) -> StringMap {
    let mut all = own.clone();
    for labels in parents.iter().filter_map(|parent| known.get(parent)) {
        for (label, value) in labels {
            all.entry(label.clone()).or_insert_with(|| value.clone());
        }
    }
    all
}

proptest! {
    #[test]
    fn changes_add_up_to_what_matches(steps in prop::collection::vec(step(), 1..60)) {
        let mut index = LabelIndex::<u32, usize>::default();
        let mut items = BTreeMap::<u32, (StringMap, Vec<u8>)>::new();
        let mut parents = BTreeMap::<u8, StringMap>::new();
        let mut selected = BTreeSet::<usize>::new();
        let mut seen = BTreeSet::<(u32, usize)>::new();
        for step in steps {
            let mut changes = Vec::new();
            match step {
                Step::Item(item, labels, of) => {
                    let names: Vec<Arc<str>> = of.iter().copied().map(parent).collect();
                    index.set_item(item, pairs(&labels), &names, &mut changes);
                    items.insert(item, (labels, of));
                }
                Step::NoItem(item) => {
                    index.remove_item(&item, &mut changes);
                    items.remove(&item);
                }
                Step::Parent(number, labels) => {
                    index.set_parent(&parent(number), pairs(&labels), &mut changes);
                    parents.insert(number, labels);
                }
                Step::Select(at) => {
                    let selector = Selector::parse(SELECTORS[at]).unwrap();
                    index.add_selector(at, selector, &mut changes);
                    selected.insert(at);
                }
                Step::Forget(at) => {
                    index.remove_selector(&at, &mut changes);
                    selected.remove(&at);
                }
            }
            for change in changes {
                let pair = (change.item, change.selector);
                let new = if change.matches { seen.insert(pair) } else { seen.remove(&pair) };
                prop_assert!(new, "{change:?} is told twice");
            }
            let mut right = BTreeSet::new();
            for (item, (labels, of)) in &items {
                let labels = effective(labels, of, &parents);
                let matching = selected.iter().filter(|at| Selector::parse(SELECTORS[**at]).unwrap().matches(&labels));
                right.extend(matching.map(|at| (*item, *at)));
            }
            prop_assert_eq!(&seen, &right);
            let by_item: BTreeSet<(u32, usize)> = items.keys()
                .flat_map(|item| index.selectors_of(item).map(|at| (*item, *at)).collect::<Vec<_>>())
                .collect();
            prop_assert_eq!(&by_item, &right);
            let by_selector: BTreeSet<(u32, usize)> = selected.iter()
                .flat_map(|at| index.items_of(at).map(|item| (*item, *at)).collect::<Vec<_>>())
                .collect();
            prop_assert_eq!(&by_selector, &right);
        }
    }
}
