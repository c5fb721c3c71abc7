//! Reading and writing single objects, and lists.

use std::sync::Arc;

use cali_api::{AnyResource, Key, Kind};
use serde_json::{Value, json};

use super::{Store, network_set, object, pool, set_key};
use crate::{Error, Outcome, Versioned};

fn edited(stored: &Versioned, edit: impl FnOnce(&mut Value)) -> AnyResource {
    let mut value = stored.object.to_json();
    edit(&mut value);
    object(value)
}

fn text<'a>(stored: &'a Value, pointer: &str) -> &'a str {
    stored
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// A created object has a uid, a time and the revision that the call returned.
pub async fn create_gives_identity_and_revision(store: Store) {
    let created = store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    let read = store.get(&set_key("one")).await.expect("get");
    let value = read.object.to_json();
    assert_eq!(created.revision, read.revision);
    assert_eq!(
        text(&value, "/metadata/resourceVersion"),
        read.revision.as_str()
    );
    assert_eq!(text(&value, "/metadata/uid").len(), 36);
    assert!(text(&value, "/metadata/creationTimestamp").ends_with('Z'));
    assert_eq!(text(&value, "/spec/nets/0"), "10.0.0.0/8");
}

/// The second create of a name fails and changes nothing.
pub async fn create_twice_is_refused(store: Store) {
    let first = store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    let again = store.create(network_set("a", "one", "11.0.0.0/8")).await;
    assert!(
        matches!(again, Err(Error::AlreadyExists { .. })),
        "{again:?}"
    );
    assert_eq!(
        store.get(&set_key("one")).await.expect("get").revision,
        first.revision
    );
}

/// An object that was read cannot be created again by mistake.
pub async fn create_with_a_revision_is_refused(store: Store) {
    let first = store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    store.delete(&set_key("one"), None).await.expect("delete");
    let again = store.create(first.object.as_ref().clone()).await;
    assert!(matches!(again, Err(Error::Unsupported { .. })), "{again:?}");
}

/// Compare-and-swap.
pub async fn update_swaps_only_the_expected_revision(store: Store) {
    let first = store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    let second = store
        .update(edited(&first, |v| {
            v["spec"]["nets"] = json!(["11.0.0.0/8"])
        }))
        .await
        .expect("update");
    assert_ne!(first.revision, second.revision);
    let stale = store
        .update(edited(&first, |v| {
            v["spec"]["nets"] = json!(["12.0.0.0/8"])
        }))
        .await;
    assert!(matches!(stale, Err(Error::Conflict { .. })), "{stale:?}");
    let read = store.get(&set_key("one")).await.expect("get");
    assert_eq!(text(&read.object.to_json(), "/spec/nets/0"), "11.0.0.0/8");
    store.delete(&set_key("one"), None).await.expect("delete");
    let gone = store.update(edited(&second, |_| {})).await;
    assert!(matches!(gone, Err(Error::NotFound { .. })), "{gone:?}");
    let blind = store.update(network_set("a", "one", "10.0.0.0/8")).await;
    assert!(matches!(blind, Err(Error::Unsupported { .. })), "{blind:?}");
}

/// The writer of an update cannot change who the object is.
pub async fn update_keeps_identity(store: Store) {
    let first = store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    let second = store
        .update(edited(&first, |v| {
            v["metadata"]["uid"] = json!("11111111-2222-4333-8444-555555555555");
            v["metadata"]["labels"] = json!({});
        }))
        .await
        .expect("update");
    let (before, after) = (first.object.to_json(), second.object.to_json());
    assert_eq!(before["metadata"]["uid"], after["metadata"]["uid"]);
    assert_eq!(
        before["metadata"]["creationTimestamp"],
        after["metadata"]["creationTimestamp"]
    );
}

/// Deletion with and without a revision.
pub async fn delete_honours_the_revision(store: Store) {
    let first = store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    let second = store
        .update(edited(&first, |v| {
            v["spec"]["nets"] = json!(["11.0.0.0/8"])
        }))
        .await
        .expect("update");
    let stale = store.delete(&set_key("one"), Some(&first.revision)).await;
    assert!(matches!(stale, Err(Error::Conflict { .. })), "{stale:?}");
    let deleted = store
        .delete(&set_key("one"), Some(&second.revision))
        .await
        .expect("delete");
    assert_eq!(
        text(&deleted.object.to_json(), "/spec/nets/0"),
        "11.0.0.0/8"
    );
    for result in [
        store.get(&set_key("one")).await,
        store.delete(&set_key("one"), None).await,
    ] {
        assert!(matches!(result, Err(Error::NotFound { .. })), "{result:?}");
    }
}

/// A name that is used again is another object.
pub async fn recreated_object_has_another_identity(store: Store) {
    let first = store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    store.delete(&set_key("one"), None).await.expect("delete");
    let second = store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    assert_ne!(first.revision, second.revision);
    assert_ne!(
        first.object.to_json()["metadata"]["uid"],
        second.object.to_json()["metadata"]["uid"]
    );
}

/// `Node` of Calico and `Node` of Kubernetes do not meet.
pub async fn native_and_calico_kinds_of_one_name_are_apart(store: Store) {
    let node = |version: &str| {
        object(
            json!({"apiVersion": version, "kind": "Node", "metadata": {"name": "n1"}, "spec": {}}),
        )
    };
    store
        .create(node("projectcalico.org/v3"))
        .await
        .expect("create Calico's node");
    store
        .create(node("v1"))
        .await
        .expect("create Kubernetes' node");
    store
        .delete(&Key::cluster(Kind::K8sNode, "n1"), None)
        .await
        .expect("delete");
    store
        .get(&Key::cluster(Kind::Node, "n1"))
        .await
        .expect("Calico's node is still there");
}

/// Lists are of one kind, in one namespace or all, and ordered.
pub async fn list_is_limited_to_kind_and_namespace(store: Store) {
    for (ns, name) in [("b", "two"), ("a", "one"), ("a", "zero")] {
        store
            .create(network_set(ns, name, "10.0.0.0/8"))
            .await
            .expect("create");
    }
    store
        .create(pool("p", "10.1.0.0/16"))
        .await
        .expect("create");
    let names = |list: crate::List| -> Vec<String> {
        list.items
            .iter()
            .map(|v| v.object.key().to_string())
            .collect()
    };
    let all = names(store.list(Kind::NetworkSet, None).await.expect("list"));
    assert_eq!(
        all,
        [
            "NetworkSet(a/one)",
            "NetworkSet(a/zero)",
            "NetworkSet(b/two)"
        ]
    );
    let one = names(store.list(Kind::NetworkSet, Some("b")).await.expect("list"));
    assert_eq!(one, ["NetworkSet(b/two)"]);
    assert!(
        store
            .list(Kind::Tier, None)
            .await
            .expect("list")
            .items
            .is_empty()
    );
}

/// Validation happens in the store, for create and update.
pub async fn invalid_objects_are_refused(store: Store) {
    let bad_pool = |size: u8| {
        object(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "IPPool",
            "metadata": {"name": "bad"}, "spec": {"cidr": "10.0.0.0/16", "blockSize": size}
        }))
    };
    let refused = store.create(bad_pool(12)).await;
    assert!(
        matches!(&refused, Err(Error::Invalid { fields, .. }) if !fields.is_empty()),
        "{refused:?}"
    );
    let missing = store.get(&Key::cluster(Kind::IPPool, "bad")).await;
    assert!(
        matches!(missing, Err(Error::NotFound { .. })),
        "{missing:?}"
    );
    let good = store.create(bad_pool(26)).await.expect("create");
    let refused = store
        .update(edited(&good, |v| v["spec"]["blockSize"] = json!(27)))
        .await;
    assert!(
        matches!(refused, Err(Error::Invalid { .. })),
        "block size is immutable: {refused:?}"
    );
}

/// Two pools never share an address, whoever comes second and however it is written.
pub async fn overlapping_pools_are_refused(store: Store) {
    store
        .create(pool("one", "10.0.0.0/16"))
        .await
        .expect("create");
    for cidr in ["10.0.128.0/24", "10.0.0.0/8"] {
        let refused = store.create(pool("two", cidr)).await;
        let Err(error @ Error::Invalid { .. }) = refused else {
            panic!("{cidr}: {refused:?}")
        };
        assert!(
            error.to_string().contains("IPPool(one)"),
            "the other pool is named: {error}"
        );
    }
    store
        .create(pool("two", "10.1.0.0/16"))
        .await
        .expect("a neighbour is no overlap");
    let mut racers = tokio::task::JoinSet::new();
    for number in 0..8 {
        let store = Arc::clone(&store);
        racers.spawn(async move {
            store
                .create(pool(&format!("racer{number}"), "10.2.0.0/16"))
                .await
                .is_ok()
        });
    }
    let winners = racers
        .join_all()
        .await
        .into_iter()
        .filter(|won| *won)
        .count();
    assert_eq!(winners, 1, "pools of one range created at the same time");
}

/// Readers see complete objects.
pub async fn defaults_are_filled_in(store: Store) {
    let created = store
        .create(pool("one", "10.0.0.0/16"))
        .await
        .expect("create");
    assert_eq!(
        created.object.to_json().pointer("/spec/blockSize"),
        Some(&json!(26))
    );
}

/// The three outcomes of apply.
pub async fn apply_creates_updates_and_leaves_alone(store: Store) {
    let first = store
        .apply(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("apply");
    let same = store
        .apply(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("apply");
    let other = store
        .apply(network_set("a", "one", "11.0.0.0/8"))
        .await
        .expect("apply");
    assert_eq!(
        [first.outcome, same.outcome, other.outcome],
        [Outcome::Created, Outcome::Unchanged, Outcome::Updated]
    );
    assert_eq!(first.stored.revision, same.stored.revision);
    let plain_pool = store.apply(pool("p", "10.0.0.0/16")).await.expect("apply");
    let again = store.apply(pool("p", "10.0.0.0/16")).await.expect("apply");
    assert_eq!(
        again.outcome,
        Outcome::Unchanged,
        "defaults are no difference"
    );
    assert_eq!(again.stored.revision, plain_pool.stored.revision);
}

/// A pod's manifest can be applied again without taking its address from it.
pub async fn apply_keeps_what_others_own(store: Store) {
    let pod = |annotations: Value, status: Value| {
        object(json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "namespace": "a", "annotations": annotations},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]},
            "status": status
        }))
    };
    let written = json!({"cni.projectcalico.org/podIP": "10.0.0.1/32", "mine": "old"});
    store
        .create(pod(written, json!({"podIP": "10.0.0.1"})))
        .await
        .expect("create");
    let manifest = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "namespace": "a", "annotations": {"mine": "new"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}
    });
    let applied = store.apply(object(manifest)).await.expect("apply");
    let value = applied.stored.object.to_json();
    assert_eq!(
        value["metadata"]["annotations"]["cni.projectcalico.org/podIP"],
        "10.0.0.1/32"
    );
    assert_eq!(value["metadata"]["annotations"]["mine"], "new");
    assert_eq!(value["status"]["podIP"], "10.0.0.1");
}

/// Read, change, compare-and-swap, by many at once: every change survives.
pub async fn concurrent_updates_lose_nothing(store: Store) {
    store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4 {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            for round in 0..10 {
                loop {
                    let read = store.get(&set_key("one")).await.expect("get");
                    let label = format!("w{writer}r{round}");
                    match store
                        .update(edited(&read, |v| {
                            v["metadata"]["labels"][&label] = json!("x")
                        }))
                        .await
                    {
                        Ok(_) => break,
                        Err(Error::Conflict { .. }) => {}
                        Err(e) => panic!("{e}"),
                    }
                }
            }
        });
    }
    writers.join_all().await;
    let read = store
        .get(&set_key("one"))
        .await
        .expect("get")
        .object
        .to_json();
    assert_eq!(
        read["metadata"]["labels"]
            .as_object()
            .map(serde_json::Map::len),
        Some(4 * 10 + 1)
    );
}
