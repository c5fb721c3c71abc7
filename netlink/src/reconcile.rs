//! The one reconcile pattern: desired map, observed map, and a planner that yields the operations between them.
//!
//! [`Reconciler`] is pure: no I/O, no clock (time comes in), no randomness. Its owner runs the loop
//! *subscribe, dump ([`Reconciler::on_dump`]), diff ([`Reconciler::plan`]), apply, report ([`Reconciler::on_result`])*,
//! and feeds what the kernel says on the way ([`Reconciler::on_observed`]).
//!
//! Invariants:
//! - an operation is only ever emitted for a key that is desired, or that the ownership predicate claims;
//! - a key whose operation failed is left alone until its back-off has passed, and never holds up other keys;
//! - a key that somebody else undoes again and again ([`FIGHT_UNDONE`] times in [`FIGHT_WINDOW`]) is put right only
//!   once in [`FIGHT_PAUSE`], and is listed by [`Reconciler::fights`].
//!
//! It does not order operations between subsystems (nexthop before route): that is the applier's job. Within one plan,
//! operations come sets first, then deletions, each in key order.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::{Duration, Instant},
};

/// First pause after a failed operation; doubled with every further failure.
pub const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// Longest pause after failed operations.
pub const BACKOFF_LIMIT: Duration = Duration::from_secs(60);
/// How often a key has to be undone within [`FIGHT_WINDOW`] to count as a fight.
pub const FIGHT_UNDONE: usize = 5;
/// The window in which undone operations are counted.
pub const FIGHT_WINDOW: Duration = Duration::from_secs(60);
/// How long a key that is fought over is left alone between two corrections.
pub const FIGHT_PAUSE: Duration = Duration::from_secs(30);

/// How long the notification of an own operation is waited for.
pub const ECHO_LIFE: Duration = Duration::from_secs(2);
/// How many notifications of own operations on one key are waited for.
const ECHO_LIMIT: usize = 8;

/// One operation of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op<K, V> {
    /// Make `key` be `value`; `old` is what is there now, as far as we know.
    Set {
        /// The key.
        key: K,
        /// What it must become.
        value: V,
        /// What was observed.
        old: Option<V>,
    },
    /// Remove `key`; `old` is what is there now.
    Delete {
        /// The key.
        key: K,
        /// What was observed.
        old: V,
    },
}

impl<K, V> Op<K, V> {
    /// The key that the operation is about.
    pub fn key(&self) -> &K {
        match self {
            Self::Set { key, .. } | Self::Delete { key, .. } => key,
        }
    }
}

/// Why a key is not programmed at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantine {
    /// What the kernel said.
    pub reason: String,
    /// Failures in a row.
    pub failures: u32,
    /// Not tried again before this time.
    pub until: Instant,
}

/// A key that somebody else keeps changing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fight {
    /// Since when it counts as a fight.
    pub since: Instant,
    /// Not corrected again before this time.
    pub until: Instant,
}

/// A foreign change to a key of ours, as noticed by [`Reconciler::on_observed`] or [`Reconciler::on_dump`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drift<K, V> {
    /// A desired object is gone.
    Missing {
        /// The key.
        key: K,
    },
    /// A desired object has another value.
    Changed {
        /// The key.
        key: K,
        /// What was seen.
        seen: V,
    },
    /// An object that we own, but do not want, has appeared.
    Unwanted {
        /// The key.
        key: K,
        /// What was seen.
        seen: V,
    },
}

/// All that is known of one key. One map holds it all, so that a step of a key costs one look-up.
#[derive(Debug)]
struct Entry<V> {
    desired: Option<V>,
    observed: Option<V>,
    /// Our last operation succeeded and nothing else has been seen since.
    confirmed: bool,
    /// An operation has been handed out and its result has not come back.
    in_flight: bool,
    /// What went wrong, or is waited for. Most keys have none.
    history: Option<Box<History<V>>>,
}

/// What happened to a key, beside its desired and observed value.
#[derive(Debug)]
struct History<V> {
    failure: Option<Quarantine>,
    /// When a state that we had confirmed was changed by somebody else.
    undone: VecDeque<Instant>,
    fight: Option<Fight>,
    /// What notifications of our own successful operations will still say.
    echoes: VecDeque<(Instant, Option<V>)>,
}

type Owns<K, V> = Box<dyn Fn(&K, &V) -> bool + Send + Sync>;

/// Desired and observed state of one kernel subsystem, and the way between them.
pub struct Reconciler<K, V> {
    entries: BTreeMap<K, Entry<V>>,
    /// Keys whose two values may differ, without those whose operation is under way.
    dirty: BTreeSet<K>,
    /// Operations whose results have not come back.
    in_flight: usize,
    owns: Owns<K, V>,
    synced: bool,
    /// Notifications are taken in, among them those of own operations.
    notified: bool,
}

impl<K, V> std::fmt::Debug for Reconciler<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reconciler")
            .field("keys", &self.entries.len())
            .field("dirty", &self.dirty.len())
            .field("in_flight", &self.in_flight)
            .field("synced", &self.synced)
            .finish()
    }
}

impl<K: Ord + Clone, V: PartialEq + Clone> Reconciler<K, V> {
    /// An empty reconciler. `owns` says whether an observed object that is not desired is ours to delete.
    ///
    /// Nothing is planned before the first [`Self::on_dump`].
    pub fn new(owns: impl Fn(&K, &V) -> bool + Send + Sync + 'static) -> Self {
        Self {
            entries: BTreeMap::new(),
            dirty: BTreeSet::new(),
            in_flight: 0,
            owns: Box::new(owns),
            synced: false,
            notified: true,
        }
    }

    /// For an owner that only dumps, and never calls [`Self::on_observed`]: nothing is kept for the sake of notifications.
    #[must_use]
    pub fn without_notifications(mut self) -> Self {
        self.notified = false;
        self
    }

    /// Wants `key` to be `value`. A changed wish ends the key's quarantine.
    pub fn desire(&mut self, key: K, value: V) {
        let entry = self.entries.entry(key.clone()).or_default();
        if entry.desired.as_ref() == Some(&value) {
            return;
        }
        entry.desired = Some(value);
        entry.wish_changed();
        self.dirty.insert(key);
    }

    /// No longer wants `key`. It is deleted if it is observed and owned.
    pub fn undesire(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.get_mut(key)?;
        let old = entry.desired.take()?;
        entry.wish_changed();
        self.dirty.insert(key.clone());
        Some(old)
    }

    /// Replaces the whole wish.
    pub fn set_desired(&mut self, desired: impl IntoIterator<Item = (K, V)>) {
        let next: BTreeMap<K, V> = desired.into_iter().collect();
        let gone: Vec<K> = self
            .all_desired()
            .filter(|(key, _)| !next.contains_key(key))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.undesire(&key);
        }
        for (key, value) in next {
            self.desire(key, value);
        }
    }

    /// What `key` is wanted to be.
    pub fn desired(&self, key: &K) -> Option<&V> {
        self.entries.get(key)?.desired.as_ref()
    }

    /// What `key` is, as far as we know.
    pub fn observed(&self, key: &K) -> Option<&V> {
        self.entries.get(key)?.observed.as_ref()
    }

    /// What is wanted, in key order.
    pub fn all_desired(&self) -> impl Iterator<Item = (&K, &V)> {
        let entries = self.entries.iter();
        entries.filter_map(|(key, entry)| Some((key, entry.desired.as_ref()?)))
    }

    /// What is there, as far as we know, in key order.
    pub fn all_observed(&self) -> impl Iterator<Item = (&K, &V)> {
        let entries = self.entries.iter();
        entries.filter_map(|(key, entry)| Some((key, entry.observed.as_ref()?)))
    }

    /// A first dump has been taken in.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Whether an observed object is one of ours: wanted, or claimed by the predicate.
    fn is_ours(&self, key: &K, value: &V) -> bool {
        self.desired(key).is_some() || (self.owns)(key, value)
    }

    /// Takes in a full dump and says which of our objects differ from what we believed.
    ///
    /// Foreign objects may be part of the dump; they are ignored, unless they sit on a desired key.
    pub fn on_dump(
        &mut self,
        dump: impl IntoIterator<Item = (K, V)>,
        now: Instant,
    ) -> Vec<Drift<K, V>> {
        let mut seen: BTreeMap<K, V> = dump
            .into_iter()
            .filter(|(key, value)| self.is_ours(key, value))
            .collect();
        let first = !self.synced;
        let mut keys: Vec<K> = seen.keys().chain(self.entries.keys()).cloned().collect();
        // Two ascending runs: one merge.
        keys.sort();
        keys.dedup();
        let mut drifts = Vec::new();
        for key in keys {
            let value = seen.remove(&key);
            let drift = self.take_in(&key, value, now);
            if !first {
                drifts.extend(drift);
            }
        }
        self.synced = true;
        drifts
    }

    /// Takes in one notification (`None`: the object is gone) and says whether it is a foreign change.
    ///
    /// What we did ourselves comes back as a notification too, perhaps after we have done the next thing to the same
    /// key. Such an echo is older than what we know, and is passed over.
    pub fn on_observed(&mut self, key: &K, value: Option<V>, now: Instant) -> Option<Drift<K, V>> {
        let entry = self.entries.get_mut(key);
        if let Some(history) = entry.and_then(|entry| entry.history.as_mut())
            && history.is_echo(value.as_ref(), now)
        {
            return None;
        }
        if let Some(value) = &value
            && !self.is_ours(key, value)
        {
            // A foreign object has replaced ours on a key that we no longer want.
            if let Some(entry) = self.entries.get_mut(key) {
                entry.observed = None;
            }
            self.forget_idle(key, now);
            return None;
        }
        self.take_in(key, value, now)
    }

    fn take_in(&mut self, key: &K, value: Option<V>, now: Instant) -> Option<Drift<K, V>> {
        if value.is_none() && !self.entries.contains_key(key) {
            return None;
        }
        let entry = self.entries.entry(key.clone()).or_default();
        let drift = entry.drift(key, value.as_ref());
        entry.observed = value;
        if drift.is_some() {
            entry.confirmed = false;
            entry.history_mut().note_undone(now);
        }
        if entry.desired == entry.observed {
            // What is wanted is there, whoever put it there: nothing left to fail.
            entry.forget_failure();
            self.forget_idle(key, now);
        } else {
            self.dirty.insert(key.clone());
        }
        drift
    }

    /// The operations that are due now. Each stays handed out until its [`Self::on_result`].
    pub fn plan(&mut self, now: Instant) -> Vec<Op<K, V>> {
        if !self.synced {
            return Vec::new();
        }
        let mut sets = Vec::new();
        let mut deletes = Vec::new();
        for key in std::mem::take(&mut self.dirty) {
            let Some(entry) = self.entries.get_mut(&key) else {
                continue;
            };
            if entry.desired == entry.observed {
                entry.forget_failure();
                self.forget_idle(&key, now);
                continue;
            }
            if entry.in_flight {
                // Its result brings it up again.
                continue;
            }
            if entry.pause(now).is_some() {
                self.dirty.insert(key);
                continue;
            }
            match (&entry.desired, &entry.observed) {
                (Some(value), old) => sets.push(Op::Set {
                    value: value.clone(),
                    old: old.clone(),
                    key,
                }),
                (None, Some(old)) if (self.owns)(&key, old) => deletes.push(Op::Delete {
                    old: old.clone(),
                    key,
                }),
                (None, _) => {
                    // Not ours: it only was in the way while the key was wanted.
                    entry.observed = None;
                    entry.forget_failure();
                    self.forget_idle(&key, now);
                    continue;
                }
            }
            entry.in_flight = true;
            self.in_flight += 1;
        }
        sets.extend(deletes);
        sets
    }

    /// The result of one operation of a plan. Every operation needs its result. A deletion of what is gone already is
    /// a success: the applier says so.
    pub fn on_result<E: std::fmt::Display>(
        &mut self,
        op: &Op<K, V>,
        result: Result<(), E>,
        now: Instant,
    ) {
        let key = op.key();
        let entry = self.entries.entry(key.clone()).or_default();
        if std::mem::take(&mut entry.in_flight) {
            self.in_flight -= 1;
        }
        match result {
            Ok(()) => {
                entry.forget_failure();
                if self.notified {
                    entry.history_mut().await_echo(op, now);
                }
                entry.observed = match op {
                    Op::Set { value, .. } => Some(value.clone()),
                    Op::Delete { .. } => None,
                };
                entry.confirmed = entry.observed.is_some();
            }
            Err(error) => {
                entry.confirmed = false;
                entry.history_mut().note_failure(error.to_string(), now);
            }
        }
        if entry.desired == entry.observed {
            entry.forget_failure();
            self.dirty.remove(key);
            self.forget_idle(key, now);
        } else {
            self.dirty.insert(key.clone());
        }
    }

    /// Drops the memory of a key that matters no more: not wanted, not seen, not fought over.
    fn forget_idle(&mut self, key: &K, now: Instant) {
        let Some(entry) = self.entries.get_mut(key) else {
            return;
        };
        if entry
            .history
            .as_ref()
            .is_some_and(|history| history.is_idle(now))
        {
            entry.history = None;
        }
        let known = entry.desired.is_some() || entry.observed.is_some();
        if !known && !entry.in_flight && entry.history.is_none() {
            self.entries.remove(key);
        }
    }

    /// When [`Self::plan`] will have something to do; `None` if nothing is open.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        if !self.synced {
            return None;
        }
        self.dirty
            .iter()
            .filter_map(|key| match self.entries.get(key) {
                Some(entry) if entry.in_flight => None,
                Some(entry) => Some(entry.pause(now).unwrap_or(now)),
                None => Some(now),
            })
            .min()
    }

    /// Everything wanted is there, and nothing of ours beside it.
    pub fn is_settled(&self) -> bool {
        self.synced && self.in_flight == 0 && self.dirty.is_empty()
    }

    fn histories(&self) -> impl Iterator<Item = (&K, &History<V>)> {
        let entries = self.entries.iter();
        entries.filter_map(|(key, entry)| Some((key, entry.history.as_deref()?)))
    }

    /// Objects that are not programmed, with the reason.
    pub fn quarantined(&self) -> impl Iterator<Item = (&K, &Quarantine)> {
        self.histories()
            .filter_map(|(key, history)| Some((key, history.failure.as_ref()?)))
    }

    /// Why an object is not programmed; `None` while nothing has failed.
    pub fn quarantine_of(&self, key: &K) -> Option<&Quarantine> {
        let entry = self.entries.get(key)?;
        entry.history.as_ref()?.failure.as_ref()
    }

    /// Objects that somebody else keeps undoing.
    pub fn fights(&self, now: Instant) -> impl Iterator<Item = (&K, &Fight)> {
        self.histories().filter_map(move |(key, history)| {
            let fight = history.fight.as_ref()?;
            let lately = history
                .undone
                .back()
                .is_some_and(|at| now.saturating_duration_since(*at) <= FIGHT_WINDOW);
            lately.then_some((key, fight))
        })
    }

    /// What befell a key so far was nobody's doing on it (its device went, and took it with it, or could not have it yet): it
    /// does not count as a fight or a failure, and it is put right at once.
    pub fn start_over(&mut self, key: &K) {
        let entry = self.entries.get_mut(key);
        if let Some(history) = entry.and_then(|entry| entry.history.as_mut()) {
            history.failure = None;
            history.fight = None;
            history.undone.clear();
        }
    }
}

impl<V> Default for Entry<V> {
    fn default() -> Self {
        Self {
            desired: None,
            observed: None,
            confirmed: false,
            in_flight: false,
            history: None,
        }
    }
}

impl<V: PartialEq + Clone> Entry<V> {
    fn history_mut(&mut self) -> &mut History<V> {
        self.history.get_or_insert_default()
    }

    fn forget_failure(&mut self) {
        if let Some(history) = &mut self.history {
            history.failure = None;
        }
    }

    fn wish_changed(&mut self) {
        self.confirmed = false;
        self.forget_failure();
    }

    /// What somebody else has done, if `seen` is not what we know.
    fn drift<K: Clone>(&self, key: &K, seen: Option<&V>) -> Option<Drift<K, V>> {
        let (wish, known) = (self.desired.as_ref(), self.observed.as_ref());
        if wish == seen || known == seen || self.in_flight {
            return None;
        }
        let key = || key.clone();
        match (wish, seen) {
            // Something that we had confirmed, or had seen right, is no longer right.
            (Some(_), None) => {
                (self.confirmed || known.is_some()).then(|| Drift::Missing { key: key() })
            }
            (Some(_), Some(seen)) => (known == wish || self.confirmed).then(|| Drift::Changed {
                key: key(),
                seen: seen.clone(),
            }),
            (None, Some(seen)) => Some(Drift::Unwanted {
                key: key(),
                seen: seen.clone(),
            }),
            (None, None) => None,
        }
    }

    /// Until when the key is to be left alone, if that is in the future.
    fn pause(&self, now: Instant) -> Option<Instant> {
        let history = self.history.as_ref()?;
        let failure = history.failure.as_ref().map(|failure| failure.until);
        let fight = history.fight.as_ref().map(|fight| fight.until);
        failure.max(fight).filter(|until| *until > now)
    }
}

impl<V> Default for History<V> {
    fn default() -> Self {
        Self {
            failure: None,
            undone: VecDeque::new(),
            fight: None,
            echoes: VecDeque::new(),
        }
    }
}

impl<V: PartialEq + Clone> History<V> {
    /// Nothing of it matters for what comes.
    fn is_idle(&self, now: Instant) -> bool {
        let old = |at: Option<&Instant>, life| {
            at.is_none_or(|at| now.saturating_duration_since(*at) > life)
        };
        self.failure.is_none()
            && old(self.undone.back(), FIGHT_WINDOW)
            && old(self.echoes.back().map(|(at, _)| at), ECHO_LIFE)
    }

    /// Counts a foreign change, and declares a fight when there are too many of them.
    fn note_undone(&mut self, now: Instant) {
        self.undone.push_back(now);
        let old = |at: &Instant| now.saturating_duration_since(*at) > FIGHT_WINDOW;
        while self.undone.front().is_some_and(old) || self.undone.len() > FIGHT_UNDONE {
            self.undone.pop_front();
        }
        self.fight = (self.undone.len() >= FIGHT_UNDONE).then(|| Fight {
            since: self.fight.as_ref().map_or(now, |fight| fight.since),
            until: now + FIGHT_PAUSE,
        });
    }

    fn note_failure(&mut self, reason: String, now: Instant) {
        let before = self.failure.as_ref().map_or(0, |failure| failure.failures);
        let failures = before.saturating_add(1);
        let pause = BACKOFF_FIRST
            .saturating_mul(1 << (failures - 1).min(16))
            .min(BACKOFF_LIMIT);
        self.failure = Some(Quarantine {
            reason,
            failures,
            until: now + pause,
        });
    }

    /// The operation will be announced by the kernel.
    fn await_echo<K>(&mut self, op: &Op<K, V>, now: Instant) {
        if self.echoes.len() == ECHO_LIMIT {
            self.echoes.pop_front();
        }
        let announced = match op {
            Op::Set { value, .. } => Some(value.clone()),
            Op::Delete { .. } => None,
        };
        self.echoes.push_back((now, announced));
    }

    /// Whether `value` is what an own operation announced; those before it will not come any more.
    fn is_echo(&mut self, value: Option<&V>, now: Instant) -> bool {
        let old = |(at, _): &(Instant, Option<V>)| now.saturating_duration_since(*at) > ECHO_LIFE;
        while self.echoes.front().is_some_and(old) {
            self.echoes.pop_front();
        }
        let at = self
            .echoes
            .iter()
            .position(|(_, echo)| echo.as_ref() == value);
        at.map(|at| self.echoes.drain(..=at)).is_some()
    }
}
