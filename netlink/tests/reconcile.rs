//! The reconciler against a model kernel: arbitrary wishes, foreign changes, failures, lost and late notifications.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use cali_netlink::reconcile::{BACKOFF_FIRST, Drift, FIGHT_PAUSE, FIGHT_UNDONE, Op, Reconciler};
use proptest::prelude::*;

type Key = u8;
type Value = u8;

/// Keys below 8 are ours; values from 200 on are somebody else's, wherever they are.
fn owns(key: &Key, value: &Value) -> bool {
    *key < 8 && *value < 200
}

/// A kernel that tells of every change, late.
#[derive(Default)]
struct Kernel {
    state: BTreeMap<Key, Value>,
    events: VecDeque<(Key, Option<Value>)>,
    failing: BTreeMap<Key, u8>,
    /// Every operation that was applied.
    log: Vec<Op<Key, Value>>,
}

impl Kernel {
    fn put(&mut self, key: Key, value: Option<Value>) {
        match value {
            Some(value) => self.state.insert(key, value),
            None => self.state.remove(&key),
        };
        self.events.push_back((key, value));
    }

    fn apply(&mut self, op: &Op<Key, Value>) -> Result<(), &'static str> {
        self.log.push(op.clone());
        if let Some(left) = self.failing.get_mut(op.key()).filter(|left| **left > 0) {
            *left -= 1;
            return Err("no");
        }
        match op {
            Op::Set { key, value, .. } => self.put(*key, Some(*value)),
            Op::Delete { key, .. } => self.put(*key, None),
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Step {
    Desire(Key, Value),
    Undesire(Key),
    Foreign(Key, Option<Value>),
    /// A change without a notification, as when a link goes down.
    Silent(Key, Option<Value>),
    Fail(Key, u8),
    Deliver(usize),
    Lose,
    Dump,
    Run,
    Wait(u16),
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0..12_u8;
    let value = prop_oneof![0..4_u8, 200..204_u8];
    prop_oneof![
        (0..8_u8, 0..4_u8).prop_map(|(key, value)| Step::Desire(key, value)),
        (0..8_u8).prop_map(Step::Undesire),
        (key.clone(), proptest::option::of(value.clone()))
            .prop_map(|(key, value)| Step::Foreign(key, value)),
        (key.clone(), proptest::option::of(value))
            .prop_map(|(key, value)| Step::Silent(key, value)),
        (key, 0..4_u8).prop_map(|(key, times)| Step::Fail(key, times)),
        (0..6_usize).prop_map(Step::Deliver),
        Just(Step::Lose),
        Just(Step::Dump),
        Just(Step::Run),
        (0..2000_u16).prop_map(Step::Wait),
    ]
}

struct World {
    kernel: Kernel,
    reconciler: Reconciler<Key, Value>,
    now: Instant,
}

impl World {
    fn new() -> Self {
        Self {
            kernel: Kernel::default(),
            reconciler: Reconciler::new(owns),
            now: Instant::now(),
        }
    }

    /// Keys 1 and 2 are as desired, and that is known.
    fn with_two() -> Self {
        let mut world = Self::new();
        world.dump();
        world.reconciler.desire(1, 1);
        world.reconciler.desire(2, 2);
        world.run();
        world.deliver(usize::MAX);
        world
    }

    fn dump(&mut self) {
        let dump: Vec<_> = self
            .kernel
            .state
            .iter()
            .map(|(key, value)| (*key, *value))
            .collect();
        self.reconciler.on_dump(dump, self.now);
    }

    fn deliver(&mut self, count: usize) -> Vec<Drift<Key, Value>> {
        let count = count.min(self.kernel.events.len());
        let events: Vec<_> = self.kernel.events.drain(..count).collect();
        events
            .into_iter()
            .filter_map(|(key, value)| self.reconciler.on_observed(&key, value, self.now))
            .collect()
    }

    fn run(&mut self) -> usize {
        let plan = self.reconciler.plan(self.now);
        for op in &plan {
            let result = self.kernel.apply(op);
            self.reconciler.on_result(op, result, self.now);
        }
        plan.len()
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Desire(key, value) => self.reconciler.desire(key, value),
            Step::Undesire(key) => drop(self.reconciler.undesire(&key)),
            Step::Foreign(key, value) => self.kernel.put(key, value),
            Step::Silent(key, value) => {
                self.kernel.put(key, value);
                self.kernel.events.pop_back();
            }
            Step::Fail(key, times) => drop(self.kernel.failing.insert(key, times)),
            Step::Deliver(count) => drop(self.deliver(count)),
            Step::Lose => self.kernel.events.clear(),
            Step::Dump => self.dump(),
            Step::Run => drop(self.run()),
            Step::Wait(millis) => self.now += Duration::from_millis(millis.into()),
        }
    }

    /// Nobody interferes any more; the owner dumps, and runs whenever something is due.
    fn settle(&mut self) {
        self.deliver(usize::MAX);
        self.dump();
        for _ in 0..1000 {
            self.run();
            self.deliver(usize::MAX);
            match self.reconciler.next_due(self.now) {
                Some(due) => self.now = self.now.max(due),
                None => return,
            }
        }
        panic!(
            "does not settle: {:?} {:?}",
            self.reconciler,
            self.kernel.log.last()
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_it_converges_and_spares_what_is_foreign(steps in proptest::collection::vec(step(), 0..60)) {
        let mut world = World::new();
        for step in steps {
            let before = world.kernel.log.len();
            let state = world.kernel.state.clone();
            world.step(step);
            for op in &world.kernel.log[before..] {
                match op {
                    Op::Set { key, value, .. } => prop_assert_eq!(world.reconciler.desired(key), Some(value)),
                    Op::Delete { key, .. } => {
                        prop_assert!(world.reconciler.desired(key).is_none());
                        prop_assert!(*key < 8, "deleted {key} of {state:?}");
                    }
                }
            }
        }
        world.settle();
        prop_assert!(world.reconciler.is_settled());
        prop_assert_eq!(world.reconciler.quarantined().count(), 0);
        for key in 0..12 {
            let seen = world.kernel.state.get(&key);
            match world.reconciler.desired(&key) {
                Some(wanted) => prop_assert_eq!(seen, Some(wanted)),
                None => prop_assert!(seen.is_none_or(|value| !owns(&key, value)), "{key} is left as {seen:?}"),
            }
        }
    }

    /// Without foreign changes no drift is ever reported, however late the notifications of our own changes come.
    #[test]
    fn own_echoes_are_no_drift(
        wishes in proptest::collection::vec((0..3_u8, proptest::option::of(0..3_u8), 0..3_usize), 0..40)
    ) {
        let mut world = World::new();
        world.dump();
        for (key, wish, delivered) in wishes {
            match wish {
                Some(value) => world.reconciler.desire(key, value),
                None => drop(world.reconciler.undesire(&key)),
            }
            world.run();
            let keys = world.kernel.events.len();
            // No more than the reconciler remembers may be late.
            let drifts = world.deliver(delivered.max(keys.saturating_sub(6)));
            prop_assert_eq!(drifts, []);
        }
        prop_assert_eq!(world.deliver(usize::MAX), []);
        prop_assert_eq!(world.run(), 0);
    }
}

#[test]
fn nothing_is_planned_before_the_first_dump() {
    let mut world = World::new();
    world.reconciler.desire(1, 1);
    assert_eq!(world.run(), 0);
    assert_eq!(world.reconciler.next_due(world.now), None);
    world.dump();
    assert_eq!(world.run(), 1);
}

#[test]
fn what_is_right_already_is_adopted_without_an_operation() {
    let mut world = World::new();
    world.kernel.put(1, Some(1));
    world.kernel.put(2, Some(2));
    world.kernel.put(9, Some(9));
    world.reconciler.desire(1, 1);
    world.dump();
    world.run();
    assert_eq!(world.kernel.log, [Op::Delete { key: 2, old: 2 }]);
}

#[test]
fn a_failing_key_waits_ever_longer_and_holds_up_nobody() {
    let mut world = World::new();
    world.dump();
    world.kernel.failing.insert(1, 3);
    world.reconciler.desire(1, 1);
    world.reconciler.desire(2, 2);
    assert_eq!(world.run(), 2);
    assert_eq!(world.kernel.state, BTreeMap::from([(2, 2)]));
    let start = world.now;
    let mut waits = Vec::new();
    while let Some(due) = world.reconciler.next_due(world.now) {
        assert_eq!(
            world
                .reconciler
                .quarantined()
                .next()
                .map(|(key, why)| (*key, why.reason.as_str())),
            Some((1, "no"))
        );
        waits.push(due - start);
        world.now = due;
        world.run();
    }
    assert_eq!(waits, [1, 3, 7].map(|times| BACKOFF_FIRST * times));
    assert_eq!(world.kernel.state, BTreeMap::from([(1, 1), (2, 2)]));
}

#[test]
fn a_new_wish_ends_the_quarantine() {
    let mut world = World::new();
    world.dump();
    world.kernel.failing.insert(1, 1);
    world.reconciler.desire(1, 1);
    world.run();
    assert_eq!(world.run(), 0);
    world.reconciler.desire(1, 2);
    assert_eq!(world.run(), 1);
}

#[test]
fn a_foreign_deletion_is_told_and_put_right_at_once() {
    let mut world = World::new();
    world.dump();
    world.reconciler.desire(1, 1);
    world.run();
    world.kernel.put(1, None);
    assert_eq!(world.deliver(usize::MAX), [Drift::Missing { key: 1 }]);
    assert_eq!(world.run(), 1);
    world.kernel.put(1, Some(3));
    assert_eq!(
        world.deliver(usize::MAX),
        [Drift::Changed { key: 1, seen: 3 }]
    );
    assert_eq!(world.run(), 1);
    world.kernel.put(5, Some(3));
    assert_eq!(
        world.deliver(usize::MAX),
        [Drift::Unwanted { key: 5, seen: 3 }]
    );
    assert_eq!(world.run(), 1);
    assert_eq!(world.kernel.state, BTreeMap::from([(1, 1)]));
}

#[test]
fn a_fight_is_named_and_slowed_down_and_ends() {
    let mut world = World::with_two();
    for round in 1..=FIGHT_UNDONE {
        world.now += Duration::from_secs(1);
        world.kernel.put(1, None);
        world.deliver(usize::MAX);
        let fighting = world.reconciler.fights(world.now).count();
        assert_eq!(
            fighting,
            usize::from(round == FIGHT_UNDONE),
            "round {round}"
        );
        world.run();
        world.deliver(usize::MAX);
    }
    assert_eq!(
        world.kernel.state,
        BTreeMap::from([(2, 2)]),
        "left alone for now"
    );
    assert_eq!(
        world.reconciler.next_due(world.now),
        Some(world.now + FIGHT_PAUSE)
    );
    world.kernel.put(2, None);
    world.deliver(usize::MAX);
    assert_eq!(world.run(), 1, "other keys are put right at once");
    world.now += FIGHT_PAUSE;
    assert_eq!(world.run(), 1);
    world.now += Duration::from_secs(61);
    assert_eq!(world.reconciler.fights(world.now).count(), 0);
}

#[test]
fn what_a_device_took_with_it_is_no_fight() {
    let mut world = World::with_two();
    for _ in 0..2 * FIGHT_UNDONE {
        world.now += Duration::from_secs(1);
        world.kernel.put(1, None);
        world.kernel.put(2, None);
        world.deliver(usize::MAX);
        world.reconciler.start_over(&1);
        world.run();
        world.deliver(usize::MAX);
    }
    assert_eq!(world.kernel.state, BTreeMap::from([(1, 1)]));
    let fights: Vec<_> = world.reconciler.fights(world.now).collect();
    assert!(matches!(fights[..], [(2, _)]), "{fights:?}");
}
