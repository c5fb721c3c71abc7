//! The graph as a whole: what its consumers can rely on, whatever happens in whatever order.

use std::sync::Arc;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{AnyResource, Key, Kind, Revision};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

pub(super) fn object(value: Value) -> Arc<AnyResource> {
    Arc::new(AnyResource::from_json(value).unwrap())
}

pub(crate) fn put(value: Value) -> Update {
    let value = object(value);
    Update {
        key: value.key(),
        value: Some(value),
        revision: Revision::from("1"),
    }
}

pub(super) fn gone(key: Key) -> Update {
    Update {
        key,
        value: None,
        revision: Revision::from("2"),
    }
}

pub(super) fn pod(namespace: &str, name: &str, node: &str, labels: Value, address: &str) -> Value {
    json!({
        "apiVersion": "projectcalico.org/v3", "kind": "WorkloadEndpoint",
        "metadata": {"namespace": namespace, "name": format!("{node}-k8s-{name}-eth0"), "labels": labels},
        "spec": {
            "node": node, "orchestrator": "k8s", "pod": name, "endpoint": "eth0",
            "interfaceName": format!("cali{namespace}{name}"), "ipNetworks": [address],
            "profiles": [format!("kns.{namespace}")],
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        },
    })
}

pub(super) fn policy(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "projectcalico.org/v3", "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name}, "spec": spec,
    })
}

pub(super) fn profile(namespace: &str, labels: Value) -> Value {
    json!({
        "apiVersion": "projectcalico.org/v3", "kind": "Profile", "metadata": {"name": format!("kns.{namespace}")},
        "spec": {"ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}], "labelsToApply": labels},
    })
}

/// A graph and the state that its batches add up to; every batch is checked against the contract.
struct Rig {
    graph: Graph,
    snapshot: Snapshot,
}

impl Rig {
    fn synced(updates: impl IntoIterator<Item = Update>) -> Self {
        let mut rig = Self {
            graph: Graph::new("here".into()),
            snapshot: Snapshot::default(),
        };
        updates
            .into_iter()
            .for_each(|update| rig.graph.on_update(update));
        assert_eq!(
            rig.graph.flush(),
            None,
            "nothing is said before the datastore is in sync"
        );
        rig.graph
            .handle(Input::Sync(SyncEvent::Status(SyncStatus::InSync)));
        rig.flush();
        rig
    }

    fn flush(&mut self) -> Vec<Delta> {
        let Some(batch) = self.graph.flush() else {
            return Vec::new();
        };
        self.snapshot
            .apply(&batch)
            .unwrap_or_else(|violation| panic!("{violation}: {batch:#?}"));
        batch.deltas
    }

    fn put(&mut self, value: Value) -> Vec<Delta> {
        self.graph.on_update(put(value));
        self.flush()
    }
}

pub(crate) fn web() -> Vec<Update> {
    let allow_db = json!({"selector": "app == 'web'", "types": ["Ingress"],
        "ingress": [{"action": "Allow", "protocol": "TCP", "source": {"selector": "app == 'db'"},
                     "destination": {"ports": [80]}}]});
    vec![
        put(profile("prod", json!({"pcns.env": "prod"}))),
        put(pod(
            "prod",
            "web",
            "here",
            json!({"app": "web"}),
            "10.0.0.1/32",
        )),
        put(pod(
            "prod",
            "db",
            "there",
            json!({"app": "db"}),
            "10.0.1.1/32",
        )),
        put(policy("prod", "web", allow_db)),
    ]
}

#[test]
fn a_pods_label_change_is_one_member_of_one_set() {
    let mut rig = Rig::synced(web());
    let deltas = rig.put(pod(
        "prod",
        "db2",
        "there",
        json!({"app": "db"}),
        "10.0.1.2/32",
    ));
    assert!(
        matches!(deltas.as_slice(), [Delta::IpSetChange { added, removed, .. }]
            if *added == [Member::Net("10.0.1.2/32".parse().unwrap())] && removed.is_empty()),
        "{deltas:?}"
    );
    assert_eq!(
        rig.put(pod(
            "prod",
            "other",
            "there",
            json!({"app": "x"}),
            "10.0.1.3/32"
        )),
        []
    );
    let evaluations = rig.put(pod(
        "prod",
        "db2",
        "there",
        json!({"app": "x"}),
        "10.0.1.2/32",
    ));
    assert!(
        matches!(evaluations.as_slice(), [Delta::IpSetChange { removed, .. }] if removed.len() == 1)
    );
}

#[test]
fn policies_that_concern_no_local_endpoint_cost_no_sets() {
    let mut rig = Rig::synced(web());
    let elsewhere = json!({"selector": "app == 'db'", "ingress": [{"action": "Allow", "source": {"selector": "has(x)"}}]});
    assert_eq!(rig.put(policy("prod", "db", elsewhere)), []);
    assert_eq!(rig.snapshot.sets.len(), 1);
    rig.graph
        .on_update(gone(Key::namespaced(Kind::NetworkPolicy, "prod", "web")));
    let deltas = rig.flush();
    assert!(
        matches!(
            deltas.as_slice(),
            [
                Delta::Endpoint { .. },
                Delta::PolicyRemove { .. },
                Delta::IpSetRemove { .. }
            ]
        ),
        "{deltas:?}"
    );
}

#[test]
fn namespace_labels_reach_the_pods_of_the_namespace() {
    let mut rig = Rig::synced(web());
    let from_prod = json!({"selector": "all()", "ingress": [{"action": "Allow", "source": {"namespaceSelector": "env == 'prod'"}}]});
    rig.put(policy("prod", "from-prod", from_prod));
    let members = |rig: &Rig| {
        rig.snapshot
            .sets
            .values()
            .map(|(_, members)| members.len())
            .max()
    };
    assert_eq!(members(&rig), Some(2));
    rig.put(profile("prod", json!({"pcns.env": "test"})));
    assert_eq!(
        members(&rig),
        Some(1),
        "only the set of databases has a member left"
    );
}

#[test]
fn tiers_and_policies_are_asked_in_their_order() {
    let any = |tier: &str, order: Option<i64>| json!({"tier": tier, "order": order, "selector": "all()", "types": ["Ingress"]});
    let mut rig = Rig::synced(web());
    for (name, order) in [
        ("late", json!(200)),
        ("early", json!(100)),
        ("last", Value::Null),
    ] {
        rig.put(
            json!({"apiVersion": "projectcalico.org/v3", "kind": "Tier", "metadata": {"name": name},
                       "spec": {"order": order, "defaultAction": "Pass"}}),
        );
    }
    for (name, tier, order) in [
        ("l", "late", None),
        ("z", "early", Some(1)),
        ("a", "early", Some(2)),
        ("b", "early", None),
        ("x", "last", None),
        ("n", "missing", None),
    ] {
        rig.put(policy("prod", name, any(tier, order)));
    }
    let endpoint = rig.snapshot.endpoints.values().next().unwrap();
    let order: Vec<(String, Vec<String>)> = endpoint
        .ingress
        .iter()
        .map(|tier| {
            (
                tier.tier.to_string(),
                tier.policies
                    .iter()
                    .map(|key| key.name.to_string())
                    .collect(),
            )
        })
        .collect();
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let expected = [
        ("early", names(&["z", "a", "b"])),
        ("late", names(&["l"])),
        ("default", names(&["web"])),
        ("last", names(&["x"])),
    ];
    assert_eq!(
        order,
        expected.map(|(tier, policies)| (tier.to_owned(), policies))
    );
    assert_eq!(
        endpoint.egress,
        [],
        "a policy for ingress does not count for egress"
    );
}

#[test]
fn a_bad_rule_opens_nothing() {
    let mut rig = Rig::synced(web());
    let bad = json!({"selector": "all()", "types": ["Ingress"], "ingress": [
        {"action": "Allow", "source": {"selector": "app =="}},
        {"action": "Deny", "source": {"selector": "app =="}},
    ]});
    rig.put(policy("prod", "bad", bad));
    let key = Key::namespaced(Kind::NetworkPolicy, "prod", "bad");
    assert_eq!(
        rig.snapshot.policies[&key].ingress,
        [Rule::any(Action::Deny)]
    );
    assert_eq!(
        rig.graph.problems()[&key].len(),
        2,
        "{:?}",
        rig.graph.problems()
    );
}

#[test]
fn a_policy_with_a_bad_selector_leaves_its_former_version() {
    let mut rig = Rig::synced(web());
    assert_eq!(
        rig.put(policy("prod", "web", json!({"selector": "app = 'web'"}))),
        []
    );
    let key = Key::namespaced(Kind::NetworkPolicy, "prod", "web");
    assert!(rig.graph.problems().contains_key(&key));
    rig.put(policy("prod", "web", json!({"selector": "app == 'web'"})));
    assert!(
        rig.graph.problems().is_empty(),
        "{:?}",
        rig.graph.problems()
    );
}

#[test]
fn an_announced_endpoint_stands_before_the_datastore_has_it() {
    let mut rig = Rig::synced(web());
    let AnyResource::WorkloadEndpoint(new) = &*object(pod(
        "prod",
        "new",
        "here",
        json!({"app": "web"}),
        "10.0.0.9/32",
    )) else {
        unreachable!("built as one")
    };
    let key = new.key();
    rig.graph.handle(Input::Announce(
        key.clone(),
        Some(Arc::new((**new).clone())),
    ));
    rig.flush();
    assert_eq!(rig.snapshot.endpoints[&key].ingress.len(), 1);
    // The datastore knows the labels better, the announcement the address.
    rig.put(pod(
        "prod",
        "new",
        "here",
        json!({"app": "other"}),
        "10.0.0.10/32",
    ));
    assert_eq!(rig.snapshot.endpoints[&key].ingress, []);
    assert_eq!(
        rig.snapshot.endpoints[&key].addresses,
        ["10.0.0.9/32".parse().unwrap()]
    );
    rig.graph.handle(Input::Announce(key.clone(), None));
    rig.flush();
    assert_eq!(
        rig.snapshot.endpoints[&key].addresses,
        ["10.0.0.10/32".parse().unwrap()]
    );
}

/// One object that may be there in one of a few versions, or not at all.
pub(crate) fn any_step() -> impl Strategy<Value = Update> {
    let label = prop_oneof![Just("a"), Just("b"), Just("c")];
    let namespace = prop_oneof![Just("one"), Just("two")];
    let order = prop_oneof![Just(Value::Null), Just(json!(1)), Just(json!(2))];
    let tier = prop_oneof![Just("default"), Just("top"), Just("unwritten")];
    let selector = prop_oneof![
        Just("all()".to_owned()),
        label.clone().prop_map(|value| format!("app == '{value}'")),
        label
            .clone()
            .prop_map(|value| format!("app != '{value}' && has(app)")),
        Just("has(missing)".to_owned()),
        Just("broken ==".to_owned()),
    ];
    let rule = (selector.clone(), prop_oneof![Just(""), Just("all()"), Just("env == 'x'"), Just("global()")], 0..4_u8)
        .prop_map(|(selector, namespaces, form)| match form {
            0 => json!({"action": "Allow", "source": {"selector": selector, "namespaceSelector": namespaces}}),
            1 => json!({"action": "Deny", "source": {"notSelector": selector}}),
            2 => json!({"action": "Pass", "protocol": "TCP", "destination": {"selector": selector, "ports": ["http", 80]}}),
            _ => json!({"action": "Allow", "source": {"nets": ["10.0.0.0/8"], "selector": selector}}),
        });
    prop_oneof![
        4 => (namespace.clone(), 0..6_u8, label.clone(), any::<bool>(), any::<bool>()).prop_map(|(ns, n, label, here, there)| {
            let node = if n % 2 == 0 { "here" } else { "there" };
            let value = pod(ns, &format!("p{n}"), node, json!({"app": label}), &format!("10.0.{}.{n}/32", u8::from(here)));
            if there { put(value) } else { gone(object(value).key()) }
        }),
        3 => (namespace.clone(), 0..4_u8, tier, order, selector.clone(), prop::collection::vec(rule, 0..3), any::<bool>(), 0..4_u8)
            .prop_map(|(ns, n, tier, order, selector, rules, egress, there)| {
                let types = if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
                let spec = json!({"tier": tier, "order": order, "selector": selector, "types": types,
                                  "ingress": rules, "egress": if egress { json!(rules) } else { json!([]) }});
                if there == 0 { gone(Key::namespaced(Kind::NetworkPolicy, ns, format!("n{n}"))) } else { put(policy(ns, &format!("n{n}"), spec)) }
            }),
        1 => (namespace.clone(), prop_oneof![Just("x"), Just("y")]).prop_map(|(ns, env)| put(profile(ns, json!({"pcns.env": env})))),
        1 => namespace.clone().prop_map(|ns| gone(Key::cluster(Kind::Profile, format!("kns.{ns}")))),
        1 => (any::<bool>(), 1..3_u8).prop_map(|(pass, order)| put(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "Tier", "metadata": {"name": "top"},
            "spec": {"order": order, "defaultAction": if pass { "Pass" } else { "Deny" }}}))),
        1 => Just(gone(Key::cluster(Kind::Tier, "top"))),
        2 => (namespace, 0..3_u8, label, prop::collection::vec(0..4_u8, 0..4), any::<bool>()).prop_map(|(ns, n, label, nets, there)| {
            let nets: Vec<&str> = nets.iter().map(|net| ["10.0.0.0/16", "10.0.0.0/24", "10.0.0.2/32", "fd00::/64"][usize::from(*net)]).collect();
            let value = json!({"apiVersion": "projectcalico.org/v3", "kind": "NetworkSet",
                "metadata": {"namespace": ns, "name": format!("s{n}"), "labels": {"app": label}}, "spec": {"nets": nets}});
            if there { put(value) } else { gone(object(value).key()) }
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// The history leaves no trace: after any updates in any order, with flushes anywhere, the graph
    /// has said the same as one that only ever saw the last version of each object.
    #[test]
    fn any_history_says_the_same_as_a_fresh_start(
        steps in prop::collection::vec((any_step(), any::<bool>()), 1..60),
        seed in any::<u64>(),
    ) {
        let mut rig = Rig::synced([]);
        let mut last: Vec<Update> = Vec::new();
        let readable = |update: &Update| match update.value.as_deref() {
            // What keeps a former version depends on history by design.
            Some(AnyResource::NetworkPolicy(policy)) => !policy.spec.selector.starts_with("broken"),
            _ => true,
        };
        for (update, flush) in steps.into_iter().filter(|(update, _)| readable(update)) {
            last.retain(|other| other.key != update.key);
            last.push(update.clone());
            rig.graph.on_update(update);
            if flush {
                rig.flush();
            }
        }
        rig.flush();
        last.retain(|update| update.value.is_some());
        // Any order will do; this one is a rotation and a swap of what was last.
        if !last.is_empty() {
            let by = usize::try_from(seed % 97).unwrap() % last.len();
            last.rotate_left(by);
            last.reverse();
        }
        let fresh = Rig::synced(last);
        let mut seen = rig.snapshot.clone();
        seen.sequence = fresh.snapshot.sequence;
        prop_assert_eq!(seen, fresh.snapshot);
        prop_assert_eq!(rig.graph.problems(), fresh.graph.problems());
    }
}
