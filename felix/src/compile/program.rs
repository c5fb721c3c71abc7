//! The content of one nf_tables table as values, found by name.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::elements::Elements;
use super::plan::PlanOutcome;
use cali_netlink::nft::{Chain, Elem, Family, Key, ListedChain, ListedRule, Rule, Set, TableName};

/// A rule with its place in the kernel, where that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledRule {
    /// The rule; its tag is the hash of its content.
    pub rule: Rule,
    /// The kernel's handle; `None` for rules that are not in the kernel or were never listed.
    pub handle: Option<u64>,
}

/// A chain and its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainProgram {
    /// The chain.
    pub chain: Chain,
    /// Its rules in order.
    pub rules: Vec<InstalledRule>,
}

impl ChainProgram {
    /// A chain with rules that are not in the kernel yet. Each gets the hash of its content as tag.
    pub fn new(chain: Chain, rules: impl IntoIterator<Item = Rule>) -> Self {
        let rules = rules
            .into_iter()
            .map(|rule| InstalledRule {
                rule: tagged(rule),
                handle: None,
            })
            .collect();
        Self { chain, rules }
    }

    /// The tags of the rules in order: equal lists mean equal content.
    pub fn tags(&self) -> impl Iterator<Item = Option<u64>> {
        self.rules.iter().map(|rule| rule.rule.tag)
    }
}

/// A set or map and its elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetProgram {
    /// The set.
    pub set: Set,
    /// Its elements.
    pub elements: Elements,
}

impl SetProgram {
    /// A set without elements.
    pub fn new(set: Set) -> Self {
        Self {
            set,
            elements: Elements::default(),
        }
    }

    /// The same set with elements.
    #[must_use]
    pub fn with(mut self, elements: impl IntoIterator<Item = Elem>) -> Self {
        self.elements.extend(elements);
        self
    }
}

/// Everything in one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The table.
    pub table: TableName,
    /// Whether the table is there: an empty program of a missing table still needs the table.
    pub exists: bool,
    /// Chains by name.
    pub chains: BTreeMap<Arc<str>, ChainProgram>,
    /// Sets and maps by name.
    pub sets: BTreeMap<Arc<str>, SetProgram>,
}

impl Program {
    /// The kernel before anything of ours is there.
    pub fn absent() -> Self {
        Self {
            table: TableName::new(Family::Inet, "calico"),
            exists: false,
            chains: BTreeMap::new(),
            sets: BTreeMap::new(),
        }
    }

    /// A table as the kernel lists it.
    pub fn listed(
        table: TableName,
        chains: impl IntoIterator<Item = ListedChain>,
        rules: impl IntoIterator<Item = ListedRule>,
        sets: impl IntoIterator<Item = (Set, Vec<Elem>)>,
    ) -> Self {
        let mut program = Self {
            table,
            exists: true,
            ..Self::absent()
        };
        for ListedChain { chain, .. } in chains {
            program.chains.insert(
                chain.name.clone(),
                ChainProgram {
                    chain,
                    rules: Vec::new(),
                },
            );
        }
        for ListedRule {
            chain,
            handle,
            rule,
            ..
        } in rules
        {
            if let Some(chain) = program.chains.get_mut(&chain) {
                chain.rules.push(InstalledRule {
                    rule,
                    handle: Some(handle),
                });
            }
        }
        for (set, elements) in sets {
            program
                .sets
                .insert(set.name.clone(), SetProgram::new(set).with(elements));
        }
        program
    }

    /// Takes over what `touched` names from `desired`, after the kernel took the transaction that
    /// [`super::plan_touched`] made of it and answered with `handles` for the rules that were added.
    /// Handles of rules that were left alone stay known.
    pub fn adopt(
        &mut self,
        desired: &Self,
        touched: &Touched,
        outcome: &PlanOutcome,
        handles: &[u64],
    ) {
        if outcome.rebuilds {
            *self = desired.clone();
        } else {
            self.adopt_touched(desired, touched);
        }
        // An incomplete answer tells nothing: the next change of the chain writes it anew.
        for ((chain, index), handle) in outcome
            .added
            .iter()
            .zip(handles)
            .filter(|_| outcome.added.len() == handles.len())
        {
            if let Some(rule) = self
                .chains
                .get_mut(chain)
                .and_then(|chain| chain.rules.get_mut(*index))
            {
                rule.handle = Some(*handle);
            }
        }
    }

    fn adopt_touched(&mut self, desired: &Self, touched: &Touched) {
        self.exists = desired.exists;
        for name in &touched.chains {
            match desired.chains.get(name) {
                Some(chain) => {
                    let mut chain = chain.clone();
                    if let Some(old) = self.chains.get(name) {
                        keep_handles(&old.rules, &mut chain.rules);
                    }
                    self.chains.insert(name.clone(), chain);
                }
                None => {
                    self.chains.remove(name);
                }
            }
        }
        for name in &touched.sets {
            match desired.sets.get(name) {
                Some(set) => self.sets.insert(name.clone(), set.clone()),
                None => self.sets.remove(name),
            };
        }
        for (name, keys) in &touched.elements {
            let (Some(set), Some(wanted)) = (self.sets.get_mut(name), desired.sets.get(name))
            else {
                continue;
            };
            for key in keys {
                set.elements.follow(&wanted.elements, key);
            }
        }
    }
}

/// Objects whose desired content may have changed: what a plan has to look at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Chains.
    pub chains: BTreeSet<Arc<str>>,
    /// Sets as a whole.
    pub sets: BTreeSet<Arc<str>>,
    /// Single elements of sets that stay, by the elements' keys.
    pub elements: BTreeMap<Arc<str>, BTreeSet<Key>>,
}

impl Touched {
    /// Whether nothing is named.
    pub fn is_empty(&self) -> bool {
        self.chains.is_empty() && self.sets.is_empty() && self.elements.is_empty()
    }

    /// Names one element, unless its whole set is named already.
    pub(super) fn element(&mut self, set: &Arc<str>, key: &Key) {
        if !self.sets.contains(set) {
            self.elements
                .entry(set.clone())
                .or_default()
                .insert(key.clone());
        }
    }

    /// Everything that occurs in either program.
    pub fn all(current: &Program, desired: &Program) -> Self {
        Self {
            chains: current
                .chains
                .keys()
                .chain(desired.chains.keys())
                .cloned()
                .collect(),
            sets: current
                .sets
                .keys()
                .chain(desired.sets.keys())
                .cloned()
                .collect(),
            elements: BTreeMap::new(),
        }
    }

    /// Adds what the other one names: for a change that waits for a retry.
    pub fn merge(&mut self, other: Self) {
        self.chains.extend(other.chains);
        self.sets.extend(other.sets);
        for (set, keys) in other.elements {
            self.elements.entry(set).or_default().extend(keys);
        }
    }
}

/// How many rules at the start and at the end are the same.
pub(super) fn same_ends(old: &[InstalledRule], new: &[InstalledRule]) -> (usize, usize) {
    let same = |(a, b): &(&InstalledRule, &InstalledRule)| {
        a.rule.tag.is_some() && a.rule.tag == b.rule.tag
    };
    let head = old.iter().zip(new).take_while(same).count();
    let tail = old[head..]
        .iter()
        .rev()
        .zip(new[head..].iter().rev())
        .take_while(same)
        .count();
    (head, tail)
}

fn keep_handles(old: &[InstalledRule], new: &mut [InstalledRule]) {
    let (head, tail) = same_ends(old, new);
    for (from, to) in old.iter().zip(new.iter_mut()).take(head) {
        to.handle = from.handle;
    }
    for (from, to) in old.iter().rev().zip(new.iter_mut().rev()).take(tail) {
        to.handle = from.handle;
    }
}

fn tagged(mut rule: Rule) -> Rule {
    let mut hash = Fnv1a(0xcbf2_9ce4_8422_2325);
    rule.exprs.hash(&mut hash);
    rule.comment.hash(&mut hash);
    rule.tag = Some(hash.finish());
    rule
}

/// FNV-1a: the same value in every process, unlike the standard library's seeded hashers.
struct Fnv1a(u64);

impl Hasher for Fnv1a {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
