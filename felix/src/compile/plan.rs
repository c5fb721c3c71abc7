//! The transactions that take the kernel from one program to another.
//!
//! One batch, in the one order in which every message finds what it needs: new sets and chains,
//! elements (gone before new, because ranges must not overlap on the way), rules, the ways into
//! chains; then, backwards, what nobody refers to any more. Rules that are the same on both sides are
//! not touched and keep their counters.
//!
//! Two things do not go into that batch, because a packet that is allowed before and after would meet the drop at the end:
//!
//! - The kernel makes the elements of interval sets visible after it has let packets into the new rules
//!   (`nft_set_commit_update` comes late in `nf_tables_commit`). Where such a set is new, all that is new and that nothing leads
//!   to yet makes a first batch of its own.
//! - A packet that is under way goes on through the rules as they were, but looks up the sets as they are now (`nft_do_chain`
//!   reads the generation once, `nft_set_elem_active` at each look-up): in a set that goes with its rules it would find nothing.
//!   Where sets go, what nobody refers to any more makes a last batch.

use std::sync::Arc;

use cali_netlink::nft::{Elem, Key, Position, Set, Transaction};

use super::program::{ChainProgram, Program, SetProgram, Touched, same_ends};

/// Planned transactions.
#[derive(Debug)]
pub struct Plan {
    /// What to send, in this order: what is prepared, the change, and the removal of sets and of what they lead to. Any may be
    /// empty. They ask the kernel for the handles of the rules that they add.
    pub steps: [Transaction; 3],
    /// What to tell [`Program::adopt`] once the kernel has taken all of them.
    pub outcome: PlanOutcome,
}

/// What a committed transaction leaves behind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlanOutcome {
    /// Chain and index of each added rule, in the order of the kernel's answers
    /// (`Committed::rule_handles`) to all steps.
    pub added: Vec<(Arc<str>, usize)>,
    /// Something in the kernel could only be put right by building the whole table anew.
    pub rebuilds: bool,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.iter().all(Transaction::is_empty)
    }

    /// Messages of all steps.
    pub fn messages(&self) -> usize {
        self.steps.iter().map(Transaction::len).sum()
    }

    /// Octets of all steps.
    pub fn bytes(&self) -> usize {
        self.steps.iter().map(Transaction::bytes).sum()
    }
}

/// The transactions from `current` to `desired`, looking at everything: for start and audit.
pub fn plan_transaction(current: &Program, desired: &Program) -> Plan {
    plan_touched(current, desired, &Touched::all(current, desired))
}

/// The transactions from `current` to `desired`, looking only at what `touched` names.
pub fn plan_touched(current: &Program, desired: &Program, touched: &Touched) -> Plan {
    if cannot_change(current, desired, touched) {
        let mut planner = Planner::new(desired);
        planner.step(Step::Change).delete_table();
        let absent = Program {
            exists: false,
            ..Program::absent()
        };
        planner.plan(&absent, desired, &Touched::all(&absent, desired));
        planner.outcome.rebuilds = true;
        return planner.finish();
    }
    let mut planner = Planner::new(desired);
    planner.plan(current, desired, touched);
    planner.finish()
}

/// Types of sets and hooks of base chains are fixed when they are made.
fn cannot_change(current: &Program, desired: &Program, touched: &Touched) -> bool {
    let set = |name| matches!((current.sets.get(name), desired.sets.get(name)), (Some(a), Some(b)) if !same_kind(&a.set, &b.set));
    let chain = |name| matches!((current.chains.get(name), desired.chains.get(name)), (Some(a), Some(b)) if a.chain.base != b.chain.base);
    touched.sets.iter().any(set) || touched.chains.iter().any(chain)
}

fn same_kind(a: &Set, b: &Set) -> bool {
    a.key == b.key && a.data == b.data && a.interval == b.interval && a.timeout == b.timeout
}

/// Whether two elements mean the same. Counters and remaining life time do not count.
fn same_element(a: &Elem, b: &Elem) -> bool {
    let end = |elem: &Elem| elem.end.clone().unwrap_or_else(|| elem.key.clone());
    a.key == b.key && a.data == b.data && end(a) == end(b)
}

/// Places in [`Plan::steps`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Preparation,
    Change,
    Removal,
}

struct Planner {
    steps: [Transaction; 3],
    outcome: PlanOutcome,
}

/// Changes of one set's elements.
struct ElementChanges<'a> {
    set: &'a Set,
    gone: Vec<Elem>,
    new: Vec<Elem>,
}

impl Planner {
    fn new(desired: &Program) -> Self {
        let step = || {
            let mut transaction = Transaction::new(desired.table.clone());
            transaction.echo_handles();
            transaction
        };
        Self {
            steps: [step(), step(), step()],
            outcome: PlanOutcome::default(),
        }
    }

    fn step(&mut self, step: Step) -> &mut Transaction {
        &mut self.steps[step as usize]
    }

    fn finish(self) -> Plan {
        Plan {
            steps: self.steps,
            outcome: self.outcome,
        }
    }

    fn plan(&mut self, current: &Program, desired: &Program, touched: &Touched) {
        if !current.exists && desired.exists {
            self.step(Step::Change).add_table();
        }
        let changes = element_changes(current, desired, touched);
        let (new, known): (Vec<_>, Vec<_>) = changes
            .iter()
            .partition(|change| !current.sets.contains_key(&change.set.name));
        let is_late = |change: &&ElementChanges<'_>| change.set.interval && !change.new.is_empty();
        // Without a table nothing is under way in it.
        let first = if current.exists && new.iter().any(is_late) {
            Step::Preparation
        } else {
            Step::Change
        };
        for name in &touched.sets {
            if let (None, Some(set)) = (current.sets.get(name), desired.sets.get(name)) {
                self.step(first).add_set(&set.set);
            }
        }
        let chains: Vec<_> = touched
            .chains
            .iter()
            .filter_map(|name| desired.chains.get(name))
            .map(|chain| (current.chains.get(&chain.chain.name), chain))
            .collect();
        // Packets enter a base chain as soon as it is there.
        let step_of = |former: Option<&ChainProgram>, chain: &ChainProgram| {
            if former.is_none() && chain.chain.base.is_none() {
                first
            } else {
                Step::Change
            }
        };
        for (former, chain) in &chains {
            if former.is_none() {
                self.step(step_of(*former, chain)).add_chain(&chain.chain);
            }
        }
        for change in known.iter().filter(|change| !change.gone.is_empty()) {
            self.step(Step::Change)
                .delete_elements(change.set, change.gone.iter());
        }
        // Values before rules, verdicts after them: a way into a chain comes last.
        self.add_elements(first, &new, |set| set.data.is_none());
        self.add_elements(Step::Change, &known, |set| set.data.is_none());
        for step in [Step::Preparation, Step::Change] {
            for (former, chain) in &chains {
                if step_of(*former, chain) == step {
                    self.rules(step, *former, chain);
                }
            }
        }
        self.add_elements(first, &new, |set| set.data.is_some());
        self.add_elements(Step::Change, &known, |set| set.data.is_some());

        self.remove(current, desired, touched);
    }

    /// What nobody refers to any more.
    fn remove(&mut self, current: &Program, desired: &Program, touched: &Touched) {
        let sets: Vec<_> = touched
            .sets
            .iter()
            .filter_map(|name| Some((name, current.sets.get(name)?)))
            .filter(|(name, _)| !desired.sets.contains_key(*name))
            .collect();
        let chains: Vec<_> = touched
            .chains
            .iter()
            .filter_map(|name| Some((name, current.chains.get(name)?)))
            .filter(|(name, _)| !desired.chains.contains_key(*name))
            .collect();
        let into = self.step(if sets.is_empty() {
            Step::Change
        } else {
            Step::Removal
        });
        // Chains may refer to each other, so all are empty before the first one goes.
        for (name, chain) in &chains {
            if !chain.rules.is_empty() {
                into.flush_chain(name);
            }
        }
        // And the elements of a map hold the chains that they lead to.
        for (name, set) in &sets {
            if set.set.data.is_some() && !set.elements.is_empty() {
                into.flush_set(name);
            }
            into.delete_set(name);
        }
        for (name, _) in &chains {
            into.delete_chain(name);
        }
    }

    fn add_elements(
        &mut self,
        step: Step,
        changes: &[&ElementChanges<'_>],
        which: impl Fn(&Set) -> bool,
    ) {
        for change in changes
            .iter()
            .filter(|change| which(change.set) && !change.new.is_empty())
        {
            self.step(step).add_elements(change.set, change.new.iter());
        }
    }

    fn rules(&mut self, step: Step, current: Option<&ChainProgram>, desired: &ChainProgram) {
        let old = current.map_or(&[][..], |chain| &chain.rules);
        let new = desired.rules.as_slice();
        let name = &desired.chain.name;
        let (head, tail) = same_ends(old, new);
        let replaced = &old[head..old.len() - tail];
        let added = head..new.len() - tail;
        if replaced.is_empty() && added.is_empty() {
            return;
        }
        let position = match old.get(old.len() - tail) {
            Some(next) => next.handle.map(Position::Before),
            None => Some(Position::Last),
        };
        let handles: Option<Vec<u64>> = replaced.iter().map(|rule| rule.handle).collect();
        if let (Some(position), Some(handles)) = (position, handles) {
            for index in added {
                self.step(step).add_rule(name, position, &new[index].rule);
                self.outcome.added.push((name.clone(), index));
            }
            handles
                .iter()
                .for_each(|handle| self.step(step).delete_rule(name, *handle));
            return;
        }
        // Without handles rules cannot be told apart: all of them are written again.
        self.step(step).flush_chain(name);
        for (index, rule) in new.iter().enumerate() {
            self.step(step).append_rule(name, &rule.rule);
            self.outcome.added.push((name.clone(), index));
        }
    }
}

fn element_changes<'a>(
    current: &'a Program,
    desired: &'a Program,
    touched: &'a Touched,
) -> Vec<ElementChanges<'a>> {
    let mut all = Vec::new();
    for name in &touched.sets {
        let Some(wanted) = desired.sets.get(name) else {
            continue;
        };
        // Elements that expire are not part of the program.
        if wanted.set.timeout {
            continue;
        }
        let known = current.sets.get(name);
        let keys = known
            .into_iter()
            .flat_map(|set| set.elements.keys())
            .chain(wanted.elements.keys());
        all.push(changes_of(known, wanted, keys));
    }
    for (name, keys) in &touched.elements {
        if let (false, Some(wanted)) = (touched.sets.contains(name), desired.sets.get(name)) {
            all.push(changes_of(current.sets.get(name), wanted, keys.iter()));
        }
    }
    all
}

fn changes_of<'a>(
    current: Option<&'a SetProgram>,
    desired: &'a SetProgram,
    keys: impl Iterator<Item = &'a Key>,
) -> ElementChanges<'a> {
    let mut changes = ElementChanges {
        set: &desired.set,
        gone: Vec::new(),
        new: Vec::new(),
    };
    let mut keys: Vec<&Key> = keys.collect();
    keys.sort_unstable();
    keys.dedup();
    for key in keys {
        match (
            current.and_then(|set| set.elements.get(key)),
            desired.elements.get(key),
        ) {
            (Some(old), Some(new)) if same_element(&old, &new) => {}
            (old, new) => {
                changes.gone.extend(old);
                changes.new.extend(new);
            }
        }
    }
    changes
}
