//! The input of `iptables-restore --noflush` that takes one family from what is there to the program.
//!
//! Two inputs, because iptables-nft cannot be relied on to delete a chain in the transaction that takes the last rule
//! leading to it: the first writes chains and hooks, the second removes what nobody refers to any more. Within a table
//! each input is one atomic step. A chain that is declared is emptied, so it is written as a whole; chains whose hashes
//! are as they should be are not mentioned.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::program::{Chain, Family, HookRules, Rule, Table};
use super::save::{Observed, ObservedRule};

/// A chain in its table.
pub type ChainKey = (Table, Arc<str>);

/// One line of input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The text.
    pub text: String,
    /// The chain that it is about, where it is one of ours.
    pub chain: Option<ChainKey>,
}

/// What to feed to `iptables-restore`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RestorePlan {
    /// Chains and hooks; empty when all is as it should be.
    pub write: Vec<Line>,
    /// Removals, to be done once `write` is; empty when there are none.
    pub remove: Vec<Line>,
    /// Chains that `write` writes.
    pub changed: BTreeSet<ChainKey>,
}

impl RestorePlan {
    /// Nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.write.is_empty() && self.remove.is_empty()
    }
}

/// Lines as one input.
#[must_use]
pub fn joined(lines: &[Line]) -> String {
    lines.iter().fold(String::new(), |mut text, line| {
        text.push_str(&line.text);
        text.push('\n');
        text
    })
}

/// The chain that a numbered line (from 1) is about.
#[must_use]
pub fn culprit(lines: &[Line], number: usize) -> Option<&ChainKey> {
    lines.get(number.checked_sub(1)?)?.chain.as_ref()
}

/// Compares and plans.
#[must_use]
pub fn plan_restore(seen: &Observed, wanted: &Family) -> RestorePlan {
    let mut plan = RestorePlan::default();
    for table in Table::ALL {
        let mut body = Vec::new();
        chains(seen, wanted, table, &mut body, &mut plan.changed);
        hooks(seen, wanted, table, &mut body);
        append_table(&mut plan.write, table, body);
        append_table(&mut plan.remove, table, removals(seen, wanted, table));
    }
    plan
}

fn plain(text: String) -> Line {
    Line { text, chain: None }
}

fn append_table(lines: &mut Vec<Line>, table: Table, body: Vec<Line>) {
    if !body.is_empty() {
        lines.push(plain(format!("*{table}")));
        lines.extend(body);
        lines.push(plain("COMMIT".to_owned()));
    }
}

fn same(seen: &Observed, key: &ChainKey, wanted: &Chain) -> bool {
    seen.chains.get(key).is_some_and(|chain| {
        let hashes = wanted.rules.iter().map(|rule| Some(&rule.hash));
        chain.hashes.iter().map(Option::as_ref).eq(hashes)
    })
}

fn chains(
    seen: &Observed,
    wanted: &Family,
    table: Table,
    body: &mut Vec<Line>,
    changed: &mut BTreeSet<ChainKey>,
) {
    let different: BTreeMap<&ChainKey, &Chain> = wanted
        .chains
        .iter()
        .filter(|((of, _), _)| *of == table)
        .filter(|(key, chain)| !same(seen, key, chain))
        .collect();
    // All names first: a rule may lead to any of them.
    for key in different.keys() {
        body.push(Line {
            text: format!(":{} - [0:0]", key.1),
            chain: Some((*key).clone()),
        });
        changed.insert((*key).clone());
    }
    for (key, chain) in different {
        body.extend(chain.rules.iter().map(|rule| Line {
            text: format!("-A {} {}", key.1, rule.line()),
            chain: Some(key.clone()),
        }));
    }
}

/// The rules that a place is to have, and those that it has.
type Place<'a> = (&'a str, HookRules, &'a [ObservedRule]);

/// The kernel's chains in which ours do not stand as they should.
fn misplaced<'a>(seen: &'a Observed, wanted: &'a Family, table: Table) -> Vec<Place<'a>> {
    let wishes = wanted.hooks.iter().filter(|((of, _), _)| *of == table);
    let mut places: BTreeMap<&str, (HookRules, &[ObservedRule])> = wishes
        .map(|((_, chain), rules)| (*chain, (rules.clone(), [].as_slice())))
        .collect();
    for ((_, chain), rules) in seen.hooks.iter().filter(|((of, _), _)| *of == table) {
        places.entry(chain).or_default().1 = rules;
    }
    places
        .into_iter()
        .map(|(place, (wish, found))| (place, wish, found))
        .filter(|(_, wish, found)| !in_place(found, wish))
        .collect()
}

/// In words, where ours do not stand as they should.
#[must_use]
pub fn misplaced_hooks(seen: &Observed, wanted: &Family) -> Vec<String> {
    let all = Table::ALL.into_iter().flat_map(|table| {
        let places = misplaced(seen, wanted, table);
        places.into_iter().map(move |(place, ..)| {
            format!("our rules in {place} of {table} are not in their place")
        })
    });
    all.collect()
}

fn hooks(seen: &Observed, wanted: &Family, table: Table, body: &mut Vec<Line>) {
    for (place, rules, found) in misplaced(seen, wanted, table) {
        let ours = found.iter().filter(|rule| rule.ours.is_some());
        body.extend(ours.map(|rule| plain(format!("-D {place} {}", rule.text))));
        let head = rules.head.iter().rev();
        body.extend(head.map(|rule| plain(format!("-I {place} {}", rule.line()))));
        body.extend(
            rules
                .tail
                .iter()
                .map(|rule| plain(format!("-A {place} {}", rule.line()))),
        );
    }
}

/// Whether ours stand first and last, as they should, and nowhere else.
fn in_place(found: &[ObservedRule], rules: &HookRules) -> bool {
    let ours = found.iter().filter(|rule| rule.ours.is_some()).count();
    let (head, tail) = (rules.head.len(), rules.tail.len());
    let is = |(found, wanted): (&ObservedRule, &Rule)| found.ours.as_ref() == Some(&wanted.hash);
    ours == head + tail
        && found.len() >= head + tail
        && found.iter().zip(&rules.head).all(is)
        && found[found.len() - tail..].iter().zip(&rules.tail).all(is)
}

fn removals(seen: &Observed, wanted: &Family, table: Table) -> Vec<Line> {
    let gone: Vec<&ChainKey> = seen
        .chains
        .keys()
        .filter(|key| key.0 == table && !wanted.chains.contains_key(*key))
        .collect();
    let line = |text: String, key: &ChainKey| Line {
        text,
        chain: Some(key.clone()),
    };
    // Emptied first: they may lead to each other.
    let emptied = gone
        .iter()
        .map(|key| line(format!(":{} - [0:0]", key.1), key));
    let removed = gone.iter().map(|key| line(format!("-X {}", key.1), key));
    emptied.chain(removed).collect()
}
