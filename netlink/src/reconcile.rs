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

/// What we know of one key's doing, beside its desired and observed value.
#[derive(Debug, Clone)]
struct Track<V> {
    failure: Option<Quarantine>,
    /// When a state that we had confirmed was changed by somebody else.
    undone: VecDeque<Instant>,
    fight: Option<Fight>,
    /// Our last operation succeeded and nothing else has been seen since.
    confirmed: bool,
    /// An operation has been handed out and its result has not come back.
    in_flight: bool,
    /// What notifications of our own successful operations will still say.
    echoes: VecDeque<(Instant, Option<V>)>,
}

impl<V> Default for Track<V> {
    fn default() -> Self {
        Self {
            failure: None,
            undone: VecDeque::new(),
            fight: None,
            confirmed: false,
            in_flight: false,
            echoes: VecDeque::new(),
        }
    }
}

type Owns<K, V> = Box<dyn Fn(&K, &V) -> bool + Send + Sync>;

/// Desired and observed state of one kernel subsystem, and the way between them.
pub struct Reconciler<K, V> {
    desired: BTreeMap<K, V>,
    observed: BTreeMap<K, V>,
    tracks: BTreeMap<K, Track<V>>,
    dirty: BTreeSet<K>,
    owns: Owns<K, V>,
    synced: bool,
    /// Notifications are taken in, among them those of own operations.
    notified: bool,
}

impl<K, V> std::fmt::Debug for Reconciler<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reconciler")
            .field("desired", &self.desired.len())
            .field("observed", &self.observed.len())
            .field("dirty", &self.dirty.len())
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
            desired: BTreeMap::new(),
            observed: BTreeMap::new(),
            tracks: BTreeMap::new(),
            dirty: BTreeSet::new(),
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
        if self.desired.get(&key) == Some(&value) {
            return;
        }
        if let Some(track) = self.tracks.get_mut(&key) {
            track.failure = None;
            track.confirmed = false;
        }
        self.desired.insert(key.clone(), value);
        self.dirty.insert(key);
    }

    /// No longer wants `key`. It is deleted if it is observed and owned.
    pub fn undesire(&mut self, key: &K) -> Option<V> {
        let old = self.desired.remove(key)?;
        if let Some(track) = self.tracks.get_mut(key) {
            track.failure = None;
            track.confirmed = false;
        }
        self.dirty.insert(key.clone());
        Some(old)
    }

    /// Replaces the whole wish.
    pub fn set_desired(&mut self, desired: impl IntoIterator<Item = (K, V)>) {
        let next: BTreeMap<K, V> = desired.into_iter().collect();
        let gone: Vec<K> = self
            .desired
            .keys()
            .filter(|key| !next.contains_key(key))
            .cloned()
            .collect();
        for key in gone {
            self.undesire(&key);
        }
        for (key, value) in next {
            self.desire(key, value);
        }
    }

    /// What is wanted.
    pub fn desired(&self) -> &BTreeMap<K, V> {
        &self.desired
    }

    /// What is there, as far as we know.
    pub fn observed(&self) -> &BTreeMap<K, V> {
        &self.observed
    }

    /// A first dump has been taken in.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Whether an observed object is one of ours: wanted, or claimed by the predicate.
    fn is_ours(&self, key: &K, value: &V) -> bool {
        self.desired.contains_key(key) || (self.owns)(key, value)
    }

    /// Takes in a full dump and says which of our objects differ from what we believed.
    ///
    /// Foreign objects may be part of the dump; they are ignored, unless they sit on a desired key.
    pub fn on_dump(
        &mut self,
        dump: impl IntoIterator<Item = (K, V)>,
        now: Instant,
    ) -> Vec<Drift<K, V>> {
        let seen: BTreeMap<K, V> = dump
            .into_iter()
            .filter(|(key, value)| self.is_ours(key, value))
            .collect();
        let first = !self.synced;
        let mut keys: BTreeSet<K> = seen.keys().cloned().collect();
        keys.extend(self.observed.keys().cloned());
        keys.extend(self.desired.keys().cloned());
        let mut drifts = Vec::new();
        let mut seen = seen;
        for key in keys {
            let value = seen.remove(&key);
            let drift = self.take_in(&key, value, now);
            if !first {
                drifts.extend(drift);
            }
        }
        self.synced = true;
        self.forget_idle(now);
        drifts
    }

    /// Takes in one notification (`None`: the object is gone) and says whether it is a foreign change.
    ///
    /// What we did ourselves comes back as a notification too, perhaps after we have done the next thing to the same
    /// key. Such an echo is older than what we know, and is passed over.
    pub fn on_observed(&mut self, key: &K, value: Option<V>, now: Instant) -> Option<Drift<K, V>> {
        if let Some(track) = self.tracks.get_mut(key)
            && track.is_echo(value.as_ref(), now)
        {
            return None;
        }
        if let Some(value) = &value
            && !self.is_ours(key, value)
        {
            // A foreign object has replaced ours on a key that we no longer want.
            self.observed.remove(key);
            return None;
        }
        self.take_in(key, value, now)
    }

    fn take_in(&mut self, key: &K, value: Option<V>, now: Instant) -> Option<Drift<K, V>> {
        let wish = self.desired.get(key);
        let right = wish == value.as_ref();
        let changed = self.observed.get(key) != value.as_ref();
        let track = self.tracks.get(key).cloned().unwrap_or_default();
        let drift = if right || !changed || track.in_flight {
            None
        } else {
            match (wish, &value) {
                // Something that we had confirmed, or had seen right, is no longer right.
                (Some(_), None) => Some(Drift::Missing { key: key.clone() }),
                (Some(wish), Some(seen))
                    if self.observed.get(key) == Some(wish) || track.confirmed =>
                {
                    Some(Drift::Changed {
                        key: key.clone(),
                        seen: seen.clone(),
                    })
                }
                (Some(_), Some(_)) => None,
                (None, Some(seen)) => Some(Drift::Unwanted {
                    key: key.clone(),
                    seen: seen.clone(),
                }),
                (None, None) => None,
            }
        };
        let drift = drift.filter(|drift| match drift {
            Drift::Missing { .. } => track.confirmed || self.observed.contains_key(key),
            Drift::Changed { .. } | Drift::Unwanted { .. } => true,
        });
        match value {
            Some(value) => {
                self.observed.insert(key.clone(), value);
            }
            None => {
                self.observed.remove(key);
            }
        }
        if right {
            // What is wanted is there, whoever put it there: nothing left to fail.
            if let Some(track) = self.tracks.get_mut(key) {
                track.failure = None;
            }
        } else {
            self.dirty.insert(key.clone());
        }
        if drift.is_some() {
            self.note_undone(key, now);
        }
        drift
    }

    /// Counts a foreign change, and declares a fight when there are too many of them.
    fn note_undone(&mut self, key: &K, now: Instant) {
        let track = self.tracks.entry(key.clone()).or_default();
        track.confirmed = false;
        track.undone.push_back(now);
        while track
            .undone
            .front()
            .is_some_and(|at| now.saturating_duration_since(*at) > FIGHT_WINDOW)
            || track.undone.len() > FIGHT_UNDONE
        {
            track.undone.pop_front();
        }
        if track.undone.len() >= FIGHT_UNDONE {
            let since = track.fight.as_ref().map_or(now, |fight| fight.since);
            track.fight = Some(Fight {
                since,
                until: now + FIGHT_PAUSE,
            });
        } else {
            track.fight = None;
        }
    }

    /// The operations that are due now. Each stays handed out until its [`Self::on_result`].
    pub fn plan(&mut self, now: Instant) -> Vec<Op<K, V>> {
        if !self.synced {
            return Vec::new();
        }
        let mut sets = Vec::new();
        let mut deletes = Vec::new();
        let mut later = BTreeSet::new();
        for key in std::mem::take(&mut self.dirty) {
            let wish = self.desired.get(&key);
            let seen = self.observed.get(&key);
            if wish == seen {
                self.nothing_to_do(&key, now);
                continue;
            }
            if self
                .tracks
                .get(&key)
                .is_some_and(|track| track.in_flight || track.pause(now).is_some())
            {
                later.insert(key);
                continue;
            }
            let op = match (wish, seen) {
                (Some(value), old) => Op::Set {
                    key: key.clone(),
                    value: value.clone(),
                    old: old.cloned(),
                },
                (None, Some(old)) if (self.owns)(&key, old) => Op::Delete {
                    key: key.clone(),
                    old: old.clone(),
                },
                (None, _) => {
                    // Not ours: it only was in the way while the key was wanted.
                    self.observed.remove(&key);
                    self.nothing_to_do(&key, now);
                    continue;
                }
            };
            self.tracks.entry(key.clone()).or_default().in_flight = true;
            match op {
                Op::Set { .. } => sets.push(op),
                Op::Delete { .. } => deletes.push(op),
            }
            later.insert(key);
        }
        self.dirty = later;
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
        let track = self.tracks.entry(op.key().clone()).or_default();
        track.in_flight = false;
        match result {
            Ok(()) => {
                track.failure = None;
                if self.notified {
                    track.await_echo(op, now);
                }
                match op {
                    Op::Set { key, value, .. } => {
                        track.confirmed = true;
                        self.observed.insert(key.clone(), value.clone());
                    }
                    Op::Delete { key, .. } => {
                        track.confirmed = false;
                        self.observed.remove(key);
                    }
                }
            }
            Err(error) => {
                track.confirmed = false;
                let failures = track
                    .failure
                    .as_ref()
                    .map_or(0, |failure| failure.failures)
                    .saturating_add(1);
                let pause = BACKOFF_FIRST
                    .saturating_mul(1 << (failures - 1).min(16))
                    .min(BACKOFF_LIMIT);
                track.failure = Some(Quarantine {
                    reason: error.to_string(),
                    failures,
                    until: now + pause,
                });
            }
        }
        let key = op.key();
        if self.desired.get(key) == self.observed.get(key) {
            self.dirty.remove(key);
            self.nothing_to_do(&key.clone(), now);
        } else {
            self.dirty.insert(key.clone());
        }
    }

    /// The key is as it is wanted, whatever failed before.
    fn nothing_to_do(&mut self, key: &K, now: Instant) {
        if let Some(track) = self.tracks.get_mut(key) {
            track.failure = None;
        }
        if !self.desired.contains_key(key)
            && self.tracks.get(key).is_some_and(|track| track.is_idle(now))
        {
            self.tracks.remove(key);
        }
    }

    /// Drops the memory of keys that are neither wanted, nor seen, nor fought over.
    fn forget_idle(&mut self, now: Instant) {
        let (desired, observed) = (&self.desired, &self.observed);
        self.tracks.retain(|key, track| {
            desired.contains_key(key) || observed.contains_key(key) || !track.is_idle(now)
        });
    }

    /// When [`Self::plan`] will have something to do; `None` if nothing is open.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        if !self.synced {
            return None;
        }
        self.dirty
            .iter()
            .filter_map(|key| match self.tracks.get(key) {
                Some(track) if track.in_flight => None,
                Some(track) => Some(track.pause(now).unwrap_or(now)),
                None => Some(now),
            })
            .min()
    }

    /// Everything wanted is there, and nothing of ours beside it.
    pub fn is_settled(&self) -> bool {
        self.synced && self.dirty.is_empty()
    }

    /// Objects that are not programmed, with the reason.
    pub fn quarantined(&self) -> impl Iterator<Item = (&K, &Quarantine)> {
        self.tracks
            .iter()
            .filter_map(|(key, track)| Some((key, track.failure.as_ref()?)))
    }

    /// Objects that somebody else keeps undoing.
    pub fn fights(&self, now: Instant) -> impl Iterator<Item = (&K, &Fight)> {
        self.tracks.iter().filter_map(move |(key, track)| {
            let fight = track.fight.as_ref()?;
            let lately = track
                .undone
                .back()
                .is_some_and(|at| now.saturating_duration_since(*at) <= FIGHT_WINDOW);
            lately.then_some((key, fight))
        })
    }

    /// Lets every key that failed be tried at once (an operator, or a new link, says that things have changed).
    pub fn retry_now(&mut self, which: impl Fn(&K) -> bool, now: Instant) {
        for (key, track) in &mut self.tracks {
            if which(key)
                && let Some(failure) = &mut track.failure
            {
                failure.failures = 0;
                failure.until = now;
            }
        }
    }
}

impl<V> Track<V> {
    /// Nothing of it matters for what comes.
    fn is_idle(&self, now: Instant) -> bool {
        let old = |at: Option<&Instant>, life| {
            at.is_none_or(|at| now.saturating_duration_since(*at) > life)
        };
        !self.in_flight
            && old(self.undone.back(), FIGHT_WINDOW)
            && old(self.echoes.back().map(|(at, _)| at), ECHO_LIFE)
    }

    /// The operation will be announced by the kernel.
    fn await_echo<K>(&mut self, op: &Op<K, V>, now: Instant)
    where
        V: Clone,
    {
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
    fn is_echo(&mut self, value: Option<&V>, now: Instant) -> bool
    where
        V: PartialEq,
    {
        while self
            .echoes
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > ECHO_LIFE)
        {
            self.echoes.pop_front();
        }
        match self
            .echoes
            .iter()
            .position(|(_, echo)| echo.as_ref() == value)
        {
            Some(at) => {
                self.echoes.drain(..=at);
                true
            }
            None => false,
        }
    }

    /// Until when the key is to be left alone, if that is in the future.
    fn pause(&self, now: Instant) -> Option<Instant> {
        let failure = self.failure.as_ref().map(|failure| failure.until);
        let fight = self.fight.as_ref().map(|fight| fight.until);
        failure.max(fight).filter(|until| *until > now)
    }
}
