//! The ordered stream of updates over the store.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::update::{SyncEvent, SyncStatus};
use cali_api::{AnyResource, Key, Kind};
use serde_json::json;
use tokio::sync::mpsc;

use super::{Store, namespace, network_set, object, pool, set_key};
use crate::sync;

/// What a reader of the stream knows.
#[derive(Debug, Default)]
pub struct View {
    /// Every object that exists, by its key.
    pub objects: BTreeMap<Key, Arc<AnyResource>>,
    /// Statuses in the order of arrival.
    pub statuses: Vec<SyncStatus>,
    /// Deletions of objects that the reader did not know.
    pub spurious_deletions: Vec<Key>,
}

impl View {
    /// Reads the stream until the condition holds.
    ///
    /// # Panics
    /// If the stream ends.
    pub async fn until(
        &mut self,
        stream: &mut mpsc::Receiver<SyncEvent>,
        mut holds: impl FnMut(&Self) -> bool,
    ) {
        while !holds(self) {
            match stream.recv().await.expect("the stream goes on") {
                SyncEvent::Status(status) => self.statuses.push(status),
                SyncEvent::Complete(_) => {}
                SyncEvent::Updates(updates) => {
                    for update in updates {
                        match update.value {
                            Some(value) => {
                                self.objects.insert(update.key, value);
                            }
                            None => {
                                if self.objects.remove(&update.key).is_none() {
                                    self.spurious_deletions.push(update.key);
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// Whether everything has been sent once.
    pub fn in_sync(&self) -> bool {
        self.statuses.last() == Some(&SyncStatus::InSync)
    }
}

/// Snapshot, marker, changes.
pub async fn sync_sends_everything_then_in_sync(store: Store) {
    for number in 0..30 {
        store
            .create(network_set("a", &format!("n{number}"), "10.0.0.0/8"))
            .await
            .expect("create");
    }
    let mut stream = sync::start(Arc::clone(&store), &[Kind::NetworkSet, Kind::IPPool]);
    let mut view = View::default();
    view.until(&mut stream, View::in_sync).await;
    assert_eq!(view.objects.len(), 30);
    assert_eq!(
        view.statuses,
        [
            SyncStatus::WaitForDatastore,
            SyncStatus::ResyncInProgress,
            SyncStatus::InSync
        ]
    );
    store.delete(&set_key("n3"), None).await.expect("delete");
    store
        .create(pool("p", "10.0.0.0/16"))
        .await
        .expect("create");
    let pool_key = Key::cluster(Kind::IPPool, "p");
    view.until(&mut stream, |v| {
        !v.objects.contains_key(&set_key("n3")) && v.objects.contains_key(&pool_key)
    })
    .await;
    assert_eq!(view.objects.len(), 30);
    assert!(view.spurious_deletions.is_empty());
}

/// A namespace is seen as its profile, for as long as it exists.
pub async fn sync_converts_native_objects_and_their_deletion(store: Store) {
    store
        .create(namespace("shop", "one"))
        .await
        .expect("create");
    let mut stream = sync::start(Arc::clone(&store), &[Kind::Profile, Kind::WorkloadEndpoint]);
    let mut view = View::default();
    view.until(&mut stream, View::in_sync).await;
    let profile = Key::cluster(Kind::Profile, "kns.shop");
    let built_in = Key::cluster(Kind::Profile, "projectcalico-default-allow");
    assert_eq!(
        view.objects.keys().collect::<Vec<_>>(),
        [&profile, &built_in]
    );
    let shown = |view: &View| {
        view.objects
            .get(&profile)
            .map(|p| p.to_json().to_string())
            .unwrap_or_default()
    };
    assert!(shown(&view).contains("one"));
    store.apply(namespace("shop", "two")).await.expect("apply");
    view.until(&mut stream, |v| shown(v).contains("two")).await;
    store
        .delete(&Key::cluster(Kind::K8sNamespace, "shop"), None)
        .await
        .expect("delete");
    view.until(&mut stream, |v| v.objects.len() == 1).await;
}

/// A stored Calico object hides the converted one, until it goes.
pub async fn sync_shows_the_stored_object_over_the_converted_one(store: Store) {
    let mut stream = sync::start(Arc::clone(&store), &[Kind::Profile]);
    let mut view = View::default();
    view.until(&mut stream, View::in_sync).await;
    let profile = Key::cluster(Kind::Profile, "kns.shop");
    let stored = object(json!({
        "apiVersion": "projectcalico.org/v3", "kind": "Profile",
        "metadata": {"name": "kns.shop"}, "spec": {"labelsToApply": {"by": "hand"}}
    }));
    let by_hand = |v: &View| {
        v.objects
            .get(&profile)
            .map(|p| p.to_json().to_string().contains("hand"))
    };
    store.create(stored).await.expect("create");
    view.until(&mut stream, |v| by_hand(v) == Some(true)).await;
    store
        .create(namespace("shop", "one"))
        .await
        .expect("create");
    store
        .create(namespace("other", "one"))
        .await
        .expect("create");
    view.until(&mut stream, |v| v.objects.len() == 3).await;
    assert_eq!(
        by_hand(&view),
        Some(true),
        "the namespace came, the stored profile still shows"
    );
    store.delete(&profile, None).await.expect("delete");
    view.until(&mut stream, |v| by_hand(v) == Some(false)).await;
    store
        .delete(&Key::cluster(Kind::K8sNamespace, "shop"), None)
        .await
        .expect("delete");
    view.until(&mut stream, |v| v.objects.len() == 2).await;
    assert!(view.spurious_deletions.is_empty());
}
