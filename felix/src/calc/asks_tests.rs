//! A graph that is told of other nodes' endpoints as it asks for them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cali_api::selector::{Layered, Selector};
use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::v3::WorkloadEndpoint;
use cali_api::{AnyResource, Key, Kind, StringMap};
use proptest::prelude::*;
use serde_json::json;

use super::tests::{any_step, gone, pod, policy, put, web};
use super::*;

/// A graph that asks, the server that it asks, and a graph that is told everything.
struct Rig {
    graph: Graph,
    snapshot: Snapshot,
    plain: Graph,
    everything: Snapshot,
    /// The datastore, as the server has it.
    objects: BTreeMap<Key, Arc<AnyResource>>,
    /// What the server sends by, and what it has not taken up.
    told: BTreeSet<Arc<str>>,
    asked: Option<(u64, BTreeSet<Arc<str>>)>,
    /// Endpoints that the graph has.
    sent: BTreeSet<Key>,
}

impl Rig {
    fn new(updates: impl IntoIterator<Item = Update>) -> Self {
        let mut rig = Self {
            graph: Graph::asking("here".into()),
            snapshot: Snapshot::default(),
            plain: Graph::new("here".into()),
            everything: Snapshot::default(),
            objects: BTreeMap::new(),
            told: BTreeSet::new(),
            asked: None,
            sent: BTreeSet::new(),
        };
        for update in updates {
            rig.update(update);
        }
        for graph in [&mut rig.graph, &mut rig.plain] {
            graph.handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
        }
        rig.flush();
        rig
    }

    fn update(&mut self, update: Update) {
        match &update.value {
            Some(value) => self.objects.insert(update.key.clone(), value.clone()),
            None => self.objects.remove(&update.key),
        };
        self.plain.on_update(update.clone());
        if update.key.kind != Kind::WorkloadEndpoint {
            self.graph.on_update(update);
        } else if self.sent.contains(&update.key) {
            // A change that is in the part goes out once only.
            self.sent.remove(&update.key);
            self.send(&update.key, true);
        }
        self.send_part();
    }

    /// Sends what is in the part and has not been sent, and takes back what is not in it.
    fn send_part(&mut self) {
        let endpoints: Vec<Key> = self
            .objects
            .keys()
            .filter(|key| key.kind == Kind::WorkloadEndpoint)
            .chain(&self.sent)
            .cloned()
            .collect();
        for key in endpoints {
            self.send(&key, false);
        }
    }

    fn send(&mut self, key: &Key, had: bool) {
        let had = had || self.sent.contains(key);
        let found = self
            .objects
            .get(key)
            .filter(|value| self.is_in_part(key, value));
        match found.cloned() {
            Some(_) if self.sent.contains(key) => {}
            Some(value) => {
                self.sent.insert(key.clone());
                self.graph.on_update(Update {
                    key: key.clone(),
                    value: Some(value),
                    revision: "1".into(),
                });
            }
            None if had => {
                self.sent.remove(key);
                self.graph.on_update(gone(key.clone()));
            }
            None => {}
        }
    }

    fn is_in_part(&self, key: &Key, value: &AnyResource) -> bool {
        let AnyResource::WorkloadEndpoint(endpoint) = value else {
            return false;
        };
        let own = endpoint.effective_labels(key.namespace.as_deref());
        let labels = Layered {
            own: &own,
            inherited: &[self.inherited(endpoint)],
        };
        let selects = |text: &Arc<str>| Selector::parse(text).unwrap().matches(&labels);
        endpoint.spec.node == "here" || self.told.iter().any(selects)
    }

    fn inherited(&self, endpoint: &WorkloadEndpoint) -> StringMap {
        let mut all = StringMap::new();
        for name in endpoint.spec.profiles.iter().rev() {
            let key = Key::cluster(Kind::Profile, name.as_str());
            if let Some(AnyResource::Profile(profile)) = self.objects.get(&key).map(|it| &**it) {
                all.extend(profile.spec.labels_to_apply.clone());
            }
        }
        all
    }

    /// The server takes up what was asked for, and says when it is done.
    fn answer(&mut self) {
        if let Some((number, selectors)) = self.asked.take() {
            self.told = selectors;
            self.send_part();
            self.graph.handle(Input::Sync(SyncEvent::Complete(number)));
        }
        self.flush();
    }

    fn flush(&mut self) -> Vec<Delta> {
        if let Some(batch) = self.plain.flush() {
            self.everything.apply(&batch).unwrap();
        }
        let batch = self.graph.flush();
        if let Some(asked) = self.graph.take_wanted() {
            self.asked = Some(asked);
        }
        let Some(batch) = batch else {
            return Vec::new();
        };
        self.snapshot
            .apply(&batch)
            .unwrap_or_else(|violation| panic!("{violation}: {batch:#?}"));
        // Whatever consumers look up is whole.
        for (id, members) in &self.snapshot.sets {
            if let Some(whole) = self.everything.sets.get(id) {
                assert_eq!(members, whole, "set {id}");
            }
        }
        batch.deltas
    }
}

#[test]
fn nothing_is_said_before_what_is_asked_for_first_is_there() {
    let mut rig = Rig::new(web());
    assert_eq!(rig.snapshot.sequence, 0);
    let (number, selectors) = rig.asked.clone().unwrap();
    assert_eq!(number, 1);
    let selectors: Vec<&str> = selectors.iter().map(|text| &**text).collect();
    assert_eq!(selectors.len(), 1, "{selectors:?}");
    assert!(selectors[0].contains("app"), "{selectors:?}");
    rig.answer();
    assert_eq!(rig.snapshot, rig.everything);
    assert_eq!(rig.snapshot.sets.values().next().unwrap().1.len(), 1);
}

#[test]
fn an_endpoint_keeps_its_policy_until_the_sets_of_the_next_are_there() {
    let mut rig = Rig::new(web());
    rig.answer();
    let before = rig.snapshot.clone();
    let spec = json!({"selector": "app == 'web'", "types": ["Ingress"],
        "ingress": [{"action": "Allow", "source": {"selector": "app == 'cache'"}}]});
    rig.update(put(pod(
        "prod",
        "cache",
        "there",
        json!({"app": "cache"}),
        "10.0.1.2/32",
    )));
    rig.update(put(policy("prod", "web", spec.clone())));
    assert_eq!(rig.flush(), []);
    // Another policy of the same endpoint waits as well, and a change of what is in force does not.
    rig.update(put(policy("prod", "second", spec)));
    rig.update(put(pod(
        "prod",
        "db2",
        "there",
        json!({"app": "db"}),
        "10.0.1.3/32",
    )));
    let deltas = rig.flush();
    assert!(
        matches!(deltas.as_slice(), [Delta::IpSetChange { added, .. }] if added.len() == 1),
        "{deltas:?}"
    );
    assert_eq!(rig.snapshot.policies, before.policies);
    assert_eq!(rig.snapshot.endpoints, before.endpoints);
    assert_eq!(rig.graph.waiting().len(), 3, "{:?}", rig.graph.waiting());
    rig.answer();
    assert!(rig.graph.waiting().is_empty());
    let mut seen = rig.snapshot.clone();
    seen.sequence = rig.everything.sequence;
    assert_eq!(seen, rig.everything);
}

#[test]
fn a_new_endpoint_is_not_told_of_before_its_policy_and_does_not_hold_up_others() {
    let mut rig = Rig::new(web());
    rig.answer();
    let spec = json!({"selector": "app == 'new'", "types": ["Ingress"],
        "ingress": [{"action": "Allow", "source": {"selector": "app == 'cache'"}}]});
    rig.update(put(policy("prod", "new", spec)));
    rig.update(put(pod(
        "prod",
        "new",
        "here",
        json!({"app": "new"}),
        "10.0.0.2/32",
    )));
    rig.update(put(pod(
        "prod",
        "web2",
        "here",
        json!({"app": "web"}),
        "10.0.0.3/32",
    )));
    rig.flush();
    assert_eq!(rig.snapshot.endpoints.len(), 2, "the first and web2");
    let held: Vec<&Key> = rig.graph.held_back().map(|(key, _)| key).collect();
    assert_eq!(
        held,
        [&Key::namespaced(
            Kind::WorkloadEndpoint,
            "prod",
            "here-k8s-new-eth0"
        )]
    );
    rig.answer();
    assert_eq!(rig.snapshot.endpoints.len(), 3);
    assert_eq!(rig.graph.held_back().count(), 0);
}

#[test]
fn less_is_asked_for_when_less_is_needed_and_nothing_waits_for_it() {
    let mut rig = Rig::new(web());
    rig.answer();
    rig.update(gone(Key::namespaced(Kind::NetworkPolicy, "prod", "web")));
    rig.flush();
    assert_eq!(rig.asked, Some((2, BTreeSet::new())));
    assert_eq!(rig.snapshot.policies.len(), 0);
    assert!(rig.graph.waiting().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever changes while answers are late: consumers have no set that lacks anything, and in the end all that a graph has that
    /// is told everything.
    #[test]
    fn late_answers_leave_no_trace_and_no_set_is_ever_incomplete(
        steps in prop::collection::vec((any_step(), 0..4_u8), 1..60),
    ) {
        let mut rig = Rig::new([]);
        for (update, then) in steps {
            rig.update(update);
            match then {
                0 => {}
                1 => rig.answer(),
                _ => drop(rig.flush()),
            }
        }
        // An answer may make more necessary: nothing here does, but what was asked last is answered.
        rig.flush();
        rig.answer();
        rig.answer();
        let mut seen = rig.snapshot.clone();
        seen.sequence = rig.everything.sequence;
        prop_assert_eq!(seen, rig.everything);
        prop_assert!(rig.graph.waiting().is_empty());
        prop_assert_eq!(rig.graph.problems(), rig.plain.problems());
    }
}
