//! Watches.

use cali_api::{Kind, Revision};

use super::{Store, namespace, network_set, pool, set_key};
use crate::{Error, WatchEvent, WatchStream};

async fn event(watch: &mut WatchStream) -> WatchEvent {
    loop {
        match watch
            .next()
            .await
            .expect("the watch goes on")
            .expect("no error")
        {
            WatchEvent::Bookmark(_) => {}
            other => return other,
        }
    }
}

fn told(event: &WatchEvent) -> String {
    match event {
        WatchEvent::Put(v) => format!("put {}", v.object.key()),
        WatchEvent::Deleted { key, .. } => format!("deleted {key}"),
        other => format!("{other:?}"),
    }
}

/// Changes after the list are told, also those before the watch began; a watch can resume from any event.
pub async fn watch_continues_a_list_without_a_gap(store: Store) {
    store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    let list = store.list(Kind::NetworkSet, None).await.expect("list");
    store
        .create(network_set("a", "two", "10.0.0.0/8"))
        .await
        .expect("create");
    store.delete(&set_key("one"), None).await.expect("delete");
    let mut watch = store
        .watch(&[Kind::NetworkSet], &list.revision)
        .await
        .expect("watch");
    let first = event(&mut watch).await;
    assert_eq!(told(&first), "put NetworkSet(a/two)");
    assert_eq!(told(&event(&mut watch).await), "deleted NetworkSet(a/one)");
    drop(watch);
    store
        .create(network_set("a", "three", "10.0.0.0/8"))
        .await
        .expect("create");
    let mut watch = store
        .watch(&[Kind::NetworkSet], first.revision())
        .await
        .expect("watch");
    assert_eq!(told(&event(&mut watch).await), "deleted NetworkSet(a/one)");
    assert_eq!(told(&event(&mut watch).await), "put NetworkSet(a/three)");
}

/// A watch of two kinds tells both, each in the order of its commits, and nothing else.
pub async fn watch_tells_only_its_kinds_in_commit_order(store: Store) {
    let from = store.list(Kind::Tier, None).await.expect("list").revision;
    let mut watch = store
        .watch(&[Kind::NetworkSet, Kind::IPPool], &from)
        .await
        .expect("watch");
    let mut expected = Vec::new();
    for number in 0..20 {
        let name = format!("n{number}");
        store
            .create(network_set("a", &name, "10.0.0.0/8"))
            .await
            .expect("create");
        store.create(namespace(&name, "x")).await.expect("create");
        store
            .create(pool(&name, &format!("10.{number}.0.0/16")))
            .await
            .expect("create");
        expected.push(format!("put NetworkSet(a/{name})"));
        expected.push(format!("put IPPool({name})"));
    }
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        seen.push(told(&event(&mut watch).await));
    }
    for kind in ["NetworkSet", "IPPool"] {
        let of_kind = |all: &[String]| -> Vec<String> {
            all.iter()
                .filter(|told| told.contains(kind))
                .cloned()
                .collect()
        };
        assert_eq!(of_kind(&seen), of_kind(&expected));
    }
}

/// A revision of another store, or of none, asks for a new list.
pub async fn foreign_revisions_are_gone(store: Store) {
    store
        .create(network_set("a", "one", "10.0.0.0/8"))
        .await
        .expect("create");
    for revision in ["no-number", "0", "9223372036854775807"] {
        let refused = store
            .watch(&[Kind::NetworkSet], &Revision::from(revision))
            .await;
        assert!(
            matches!(refused, Err(Error::RevisionGone { .. })),
            "{revision}: {refused:?}"
        );
    }
}
