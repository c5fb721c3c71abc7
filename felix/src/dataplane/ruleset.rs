//! The nf_tables program in the kernel: adopted at start, changed in one transaction per step, beside which there may be one for
//! what it prepares and one for sets that go ([`crate::compile::Plan`]), put right when somebody else changes it.
//!
//! [`Ruleset`] keeps what the kernel is believed to hold, so a step costs what it changes. Rules are compared by the
//! hash that they carry as user data. A transaction that the kernel refuses is tried again without the objects that
//! it objects to: those keep their former content, or drop everything if they have none, and are reported.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_netlink::Error;
use cali_netlink::nft::{
    Chain, Changed, Elem, Expr, Key, Nft, NftEvent, Object, Rejected, Rule, Set, TableName,
    Transaction, Verdict,
};
use tracing::{info, warn};

use crate::compile::{ChainProgram, Program, SetProgram, Touched, plan_touched};

/// A refused transaction is tried so often with fewer objects.
const TRIES: usize = 8;
/// Pause after a step that could not be done, doubled with each failure.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LIMIT: Duration = Duration::from_secs(30);
/// What is refused is tried again after this time, even if nothing changed.
const RETRY: Duration = Duration::from_secs(60);
/// Foreign changes within [`FIGHT_WINDOW`] that make a fight (docs/architecture.md §5).
const FIGHT_CHANGES: usize = 5;
const FIGHT_WINDOW: Duration = Duration::from_secs(60);
/// Time between two corrections during a fight.
const FIGHT_PAUSE: Duration = Duration::from_secs(30);

/// An object that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Chain or set.
    pub object: String,
    /// What the kernel said.
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Chain,
    Set,
}

/// See the module's head.
#[derive(Debug)]
pub struct Ruleset {
    nft: Nft,
    table: TableName,
    current: Program,
    /// Changes that are not in the kernel yet.
    open: Touched,
    refused: BTreeMap<(Kind, Arc<str>), String>,
    refused_at: Option<Instant>,
    /// Foreign changes that have not been looked at.
    foreign: BTreeSet<Changed>,
    foreign_by: BTreeSet<String>,
    lost_count: bool,
    corrections: VecDeque<Instant>,
    failures: u32,
    not_before: Option<Instant>,
    problem: Option<String>,
    /// Sets whose elements expire were made anew, without elements.
    emptied: bool,
}

impl Ruleset {
    /// Reads what the table holds and takes it over.
    ///
    /// # Errors
    /// The table cannot be read.
    pub fn adopt(nft: Nft) -> Result<Self, Error> {
        let table = Program::absent().table;
        let current = read_table(&nft, &table)?;
        info!(
            exists = current.exists,
            chains = current.chains.len(),
            sets = current.sets.len(),
            "adopted the rule set"
        );
        Ok(Self {
            nft,
            table,
            current,
            open: Touched::default(),
            refused: BTreeMap::new(),
            refused_at: None,
            foreign: BTreeSet::new(),
            foreign_by: BTreeSet::new(),
            lost_count: false,
            corrections: VecDeque::new(),
            failures: 0,
            not_before: None,
            problem: None,
            emptied: false,
        })
    }

    /// The elements of a set whose elements expire.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn expiring(&self, set: &Set) -> Result<Vec<Elem>, Error> {
        if !self.current.sets.contains_key(&set.name) {
            return Ok(Vec::new());
        }
        self.nft.elements(&self.table, set)
    }

    /// Adds and removes elements of sets whose elements expire: they are not part of the program. The sets are in the
    /// kernel already.
    ///
    /// # Errors
    /// The kernel refuses them.
    pub fn change_expiring(
        &mut self,
        set: &Set,
        gone: &[Elem],
        new: &[Elem],
    ) -> Result<(), Box<Rejected>> {
        let present = if gone.is_empty() {
            BTreeSet::new()
        } else {
            // An element that has expired cannot be removed, and would take the transaction with it.
            let listed = self.expiring(set).unwrap_or_default();
            listed.into_iter().map(|elem| elem.key).collect()
        };
        let gone: Vec<&Elem> = gone
            .iter()
            .filter(|elem| present.contains(&elem.key))
            .collect();
        let mut transaction = Transaction::new(self.table.clone());
        if !gone.is_empty() {
            transaction.delete_elements(set, gone);
        }
        if !new.is_empty() {
            transaction.add_elements(set, new);
        }
        if transaction.is_empty() {
            return Ok(());
        }
        self.nft.commit(transaction).map(|_| ()).map_err(Box::new)
    }

    /// Whether sets whose elements expire have lost them since the last call.
    pub fn take_emptied(&mut self) -> bool {
        std::mem::take(&mut self.emptied)
    }

    /// Whether the table is in the kernel.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.current.exists
    }

    /// Removes the table with everything in it: another backend enforces policy.
    ///
    /// # Errors
    /// The kernel's reason.
    pub fn remove(&mut self) -> Result<(), String> {
        let there = self.nft.tables().map_err(|error| error.to_string())?;
        if there.iter().any(|listed| listed.name == self.table) {
            self.unhook();
            let mut transaction = Transaction::new(self.table.clone());
            transaction.delete_table();
            self.nft
                .commit(transaction)
                .map_err(|rejected| rejected.to_string())?;
        }
        self.current = Program::absent();
        Ok(())
    }

    /// Empties the chains that packets enter by. A packet that is under way when a transaction is committed still meets the
    /// rules as they were, but the sets as they are now: where the sets go with the rules, it finds no match in them and
    /// meets the drop at the end. So nothing may be under way when the sets go.
    fn unhook(&mut self) {
        let mut transaction = Transaction::new(self.table.clone());
        for (name, chain) in &self.current.chains {
            if chain.chain.base.is_some() {
                transaction.flush_chain(name);
            }
        }
        if transaction.is_empty() {
            return;
        }
        // A chain that somebody else took away makes this fail; the table goes all the same.
        if let Err(rejected) = self.nft.commit(transaction) {
            warn!(%rejected, "the table's base chains cannot be emptied before it goes");
        }
    }

    /// Everything is to be compared with the wish at the next [`Self::apply`]: at start.
    pub fn touch_all(&mut self, desired: &Program) {
        self.open.merge(Touched::all(&self.current, desired));
    }

    /// These objects of the wish changed. A changed wish is tried at once, whatever the kernel said of the last one.
    pub fn touch(&mut self, touched: Touched) {
        self.refused.retain(|(kind, name), _| match kind {
            Kind::Chain => !touched.chains.contains(name),
            Kind::Set => !touched.sets.contains(name),
        });
        self.open.merge(touched);
    }

    /// Takes in notifications of nf_tables; true when our table was changed by somebody else.
    pub fn on_events(&mut self, events: impl IntoIterator<Item = NftEvent>) -> bool {
        let mut ports = BTreeSet::new();
        for event in events {
            match event {
                NftEvent::Change {
                    table,
                    object,
                    port,
                    ..
                } if table == self.table && port != self.nft.port() => {
                    ports.insert(port);
                    self.foreign.insert(object);
                }
                NftEvent::Commit { generation, port } if ports.contains(&port) => {
                    self.foreign_by
                        .insert(format!("{} (pid {})", generation.process, generation.pid));
                }
                _ => {}
            }
        }
        !self.foreign.is_empty()
    }

    /// Notifications were lost: the table is read again.
    pub fn on_overflow(&mut self) {
        self.lost_count = true;
    }

    /// When [`Self::apply`] has something to do; `None` when all is done.
    #[must_use]
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        if !self.open.is_empty() || !self.foreign.is_empty() || self.lost_count {
            return Some(self.not_before.unwrap_or(now));
        }
        self.refused_at.map(|at| at + RETRY)
    }

    /// Everything wanted is in the kernel, but for what it refused.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.open.is_empty() && self.foreign.is_empty() && !self.lost_count
    }

    /// Whether a chain is in the kernel as it should be.
    #[must_use]
    pub fn has_chain(&self, name: &str) -> bool {
        self.current.chains.contains_key(name)
            && !self.refused.contains_key(&(Kind::Chain, name.into()))
    }

    /// What the kernel refused.
    #[must_use]
    pub fn refused(&self) -> Vec<Refused> {
        self.refused
            .iter()
            .map(|((kind, name), reason)| {
                let kind = if *kind == Kind::Chain { "chain" } else { "set" };
                Refused {
                    object: format!("{kind} {name}"),
                    reason: reason.clone(),
                }
            })
            .collect()
    }

    /// Why nothing can be written at the moment.
    #[must_use]
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// Brings the kernel to the wish, as far as it lets us.
    pub fn apply(&mut self, desired: &Program, now: Instant) {
        if self.not_before.is_some_and(|at| at > now) {
            return;
        }
        self.not_before = None;
        if let Err(error) = self.look(desired, now) {
            self.back_off(now, error.to_string());
            return;
        }
        if self.not_before.is_some() {
            return;
        }
        if self.refused_at.is_some_and(|at| at + RETRY <= now) {
            self.retry_refused();
        }
        if !self.open.is_empty() {
            self.commit(desired, now);
        }
    }

    /// Reads what somebody else changed, says what was found, and marks it for correction.
    fn look(&mut self, desired: &Program, now: Instant) -> Result<(), Error> {
        if self.foreign.is_empty() && !self.lost_count {
            return Ok(());
        }
        let all = std::mem::take(&mut self.lost_count) || self.foreign.contains(&Changed::Table);
        let changed = std::mem::take(&mut self.foreign);
        let seen = if all {
            read_table(&self.nft, &self.table)?
        } else {
            self.read_parts(&changed)?
        };
        let found = differences(&self.current, &seen);
        let by: Vec<String> = std::mem::take(&mut self.foreign_by).into_iter().collect();
        self.current = seen;
        if found.is_empty() {
            return Ok(());
        }
        warn!(
            ?found,
            ?by,
            "the rule set was changed by somebody else; putting it right"
        );
        self.open.merge(Touched::all(&self.current, desired));
        self.corrections.push_back(now);
        while self
            .corrections
            .front()
            .is_some_and(|at| now.saturating_duration_since(*at) > FIGHT_WINDOW)
        {
            self.corrections.pop_front();
        }
        if self.corrections.len() > FIGHT_CHANGES {
            warn!(
                ?by,
                "the rule set is changed again and again; correcting it less often"
            );
            self.problem = Some(format!(
                "the rule set is changed again and again by {}",
                by.join(", ")
            ));
            self.not_before = Some(now + FIGHT_PAUSE);
        }
        Ok(())
    }

    /// The kernel's table with only these parts read anew.
    fn read_parts(&self, changed: &BTreeSet<Changed>) -> Result<Program, Error> {
        let mut seen = self.current.clone();
        let chains: BTreeSet<&Arc<str>> = changed
            .iter()
            .filter_map(|object| match object {
                Changed::Chain(name) | Changed::Rule(name, _) => Some(name),
                _ => None,
            })
            .collect();
        if !chains.is_empty() {
            let listed = self.nft.chains(Some(&self.table))?;
            for name in chains {
                seen.chains.remove(name);
                let chain = listed
                    .iter()
                    .filter(|chain| chain.chain.name == *name)
                    .cloned();
                let rules = self.nft.rules(&self.table, Some(name))?;
                let part = Program::listed(self.table.clone(), chain, rules, []);
                seen.chains.extend(part.chains);
            }
        }
        let sets: BTreeSet<&Arc<str>> = changed
            .iter()
            .filter_map(|object| match object {
                Changed::Set(name) | Changed::Elements(name) => Some(name),
                _ => None,
            })
            .collect();
        if !sets.is_empty() {
            let listed = self.nft.sets(&self.table)?;
            for name in sets {
                seen.sets.remove(name);
                if let Some(set) = listed.iter().find(|set| set.set.name == *name) {
                    let elements = self.nft.elements(&self.table, &set.set)?;
                    let part =
                        Program::listed(self.table.clone(), [], [], [(set.set.clone(), elements)]);
                    seen.sets.extend(part.sets);
                }
            }
        }
        Ok(seen)
    }

    fn commit(&mut self, desired: &Program, now: Instant) {
        let mut read_again = false;
        for _ in 0..TRIES {
            let effective = self.effective(desired);
            let plan = plan_touched(&self.current, &effective, &self.open);
            if plan.outcome.rebuilds {
                warn!(
                    "a set or base chain has another type than wanted; building the table anew in one transaction"
                );
            }
            match write(&self.nft, plan.steps) {
                Ok(handles) => {
                    let timed = |(name, set): (&Arc<str>, &SetProgram)| {
                        set.set.timeout
                            && (plan.outcome.rebuilds || !self.current.sets.contains_key(name))
                    };
                    self.emptied |= effective.sets.iter().any(timed);
                    self.current
                        .adopt(&effective, &self.open, &plan.outcome, &handles);
                    self.open = Touched::default();
                    self.failures = 0;
                    self.problem = None;
                    return;
                }
                Err(rejected) if !read_again => {
                    // Perhaps our belief is outdated: somebody has changed the table and the news is still on its way.
                    warn!(%rejected, "the kernel refused a transaction; reading the table again");
                    read_again = true;
                    match read_table(&self.nft, &self.table) {
                        Ok(seen) => self.current = seen,
                        Err(error) => return self.back_off(now, error.to_string()),
                    }
                    let all = Touched::all(&self.current, desired);
                    self.open.merge(all);
                }
                Err(rejected) => {
                    if !self.set_aside(&rejected, now) {
                        return self.back_off(now, rejected.to_string());
                    }
                }
            }
        }
        self.back_off(
            now,
            "the kernel refuses one object after the other".to_owned(),
        );
    }

    /// The wish without what the kernel refused.
    fn effective<'a>(&self, desired: &'a Program) -> Cow<'a, Program> {
        if self.refused.is_empty() {
            return Cow::Borrowed(desired);
        }
        let mut effective = desired.clone();
        for (kind, name) in self.refused.keys() {
            match kind {
                Kind::Chain => {
                    let Some(wanted) = desired.chains.get(name) else {
                        continue;
                    };
                    let former = self.current.chains.get(name).cloned();
                    match former.or_else(|| closed(&wanted.chain)) {
                        Some(chain) => effective.chains.insert(name.clone(), chain),
                        None => effective.chains.remove(name),
                    };
                }
                Kind::Set => {
                    let Some(wanted) = desired.sets.get(name) else {
                        continue;
                    };
                    let former = self.current.sets.get(name).cloned();
                    effective.sets.insert(
                        name.clone(),
                        former.unwrap_or_else(|| SetProgram::new(wanted.set.clone())),
                    );
                }
            }
        }
        Cow::Owned(effective)
    }

    /// Notes what the kernel objects to; false when it names nothing new that could be left out.
    fn set_aside(&mut self, rejected: &Rejected, now: Instant) -> bool {
        let mut progress = false;
        for failure in &rejected.failures {
            let key = match &failure.object {
                Object::Chain(_, name) | Object::Rule(_, name, _) => (Kind::Chain, name.clone()),
                Object::Set(_, name) | Object::Elements(_, name) => (Kind::Set, name.clone()),
                Object::Table(_) | Object::Flowtable(..) | Object::Batch => continue,
            };
            let reason = failure.error.to_string();
            warn!(object = %failure.object, reason, "the kernel refuses this; it keeps its former content");
            progress |= self.refused.insert(key, reason).is_none();
        }
        self.refused_at = progress.then_some(now).or(self.refused_at);
        progress
    }

    fn retry_refused(&mut self) {
        self.refused_at = None;
        for ((kind, name), _) in std::mem::take(&mut self.refused) {
            match kind {
                Kind::Chain => self.open.chains.insert(name),
                Kind::Set => self.open.sets.insert(name),
            };
        }
    }

    fn back_off(&mut self, now: Instant, reason: String) {
        let pause = PAUSE_FIRST
            .saturating_mul(1 << self.failures.min(10))
            .min(PAUSE_LIMIT);
        self.failures = self.failures.saturating_add(1);
        warn!(
            reason,
            ?pause,
            "the rule set cannot be written; trying again"
        );
        self.problem = Some(reason);
        self.not_before = Some(now + pause);
    }
}

/// Sends the steps of a plan; returns the handles of all rules that they add.
pub(crate) fn write(nft: &Nft, steps: [Transaction; 3]) -> Result<Vec<u64>, Rejected> {
    let mut handles = Vec::new();
    for step in steps {
        handles.extend(nft.commit(step)?.rule_handles);
    }
    Ok(handles)
}

/// A chain that drops everything; none for base chains, where that would cut off the host.
fn closed(chain: &Chain) -> Option<ChainProgram> {
    let drop = Rule::new([Expr::Verdict(Verdict::Drop)]).comment("refused by the kernel: closed");
    chain
        .base
        .is_none()
        .then(|| ChainProgram::new(chain.clone(), [drop]))
}

fn read_table(nft: &Nft, table: &TableName) -> Result<Program, Error> {
    if !nft.tables()?.iter().any(|listed| listed.name == *table) {
        return Ok(Program {
            exists: false,
            ..Program::absent()
        });
    }
    let mut sets = Vec::new();
    for listed in nft.sets(table)? {
        let elements = nft.elements(table, &listed.set)?;
        sets.push((listed.set, elements));
    }
    let chains = nft.chains(Some(table))?;
    let rules = nft.rules(table, None)?;
    Ok(Program::listed(table.clone(), chains, rules, sets))
}

/// In words, what differs between belief and kernel.
fn differences(believed: &Program, seen: &Program) -> Vec<String> {
    let mut found = Vec::new();
    if believed.exists && !seen.exists {
        found.push(format!("table {} is gone", believed.table));
        return found;
    }
    for (name, chain) in &believed.chains {
        match seen.chains.get(name) {
            None => found.push(format!("chain {name} is gone")),
            Some(other) if !chain.tags().eq(other.tags()) => {
                found.push(format!(
                    "chain {name} has {} rules instead of {}",
                    other.rules.len(),
                    chain.rules.len()
                ));
            }
            Some(_) => {}
        }
    }
    for (name, set) in &believed.sets {
        match seen.sets.get(name) {
            // What expires is not part of the program.
            Some(_) if set.set.timeout => {}
            None => found.push(format!("set {name} is gone")),
            Some(other) => {
                let same = |key| match (set.elements.get(key), other.elements.get(key)) {
                    (Some(a), Some(b)) => a.data == b.data && last(&a) == last(&b),
                    _ => false,
                };
                let keys: BTreeSet<_> = set.elements.keys().chain(other.elements.keys()).collect();
                let different = keys.into_iter().filter(|key| !same(key)).count();
                if different > 0 {
                    found.push(format!("{different} elements of set {name} differ"));
                }
            }
        }
    }
    let added = |what: &str, name: &Arc<str>| format!("{what} {name} appeared");
    found.extend(
        seen.chains
            .keys()
            .filter(|name| !believed.chains.contains_key(*name))
            .map(|n| added("chain", n)),
    );
    found.extend(
        seen.sets
            .keys()
            .filter(|name| !believed.sets.contains_key(*name))
            .map(|n| added("set", n)),
    );
    found
}

/// The last value of an element; a single value is its own last.
fn last(elem: &Elem) -> &Key {
    elem.end.as_ref().unwrap_or(&elem.key)
}
