//! A store that counts its answers, and that can be made to wait with them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use cali_api::{AnyResource, Key, Kind, Revision};
use cali_datastore::{Datastore, Error, List, Versioned, WatchStream};
use tokio::sync::watch;

/// See the module's text.
pub struct Counted {
    store: Arc<dyn Datastore>,
    held: watch::Sender<bool>,
    answered: Mutex<BTreeMap<String, u64>>,
}

impl Counted {
    /// Over another store.
    #[must_use]
    pub fn new(store: Arc<dyn Datastore>) -> Arc<Self> {
        Arc::new(Self {
            store,
            held: watch::Sender::new(false),
            answered: Mutex::default(),
        })
    }

    /// Whether requests wait from now on.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// Answers so far, by request and kind of object.
    #[must_use]
    pub fn answered(&self) -> BTreeMap<String, u64> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, u64>> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn pass(&self, request: &str, kind: Kind) {
        // The sender is ours: it cannot be gone.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
        *self.lock().entry(format!("{request} {kind}")).or_default() += 1;
    }
}

#[async_trait]
impl Datastore for Counted {
    async fn get(&self, key: &Key) -> Result<Versioned, Error> {
        self.pass("get", key.kind).await;
        self.store.get(key).await
    }

    async fn list(&self, kind: Kind, namespace: Option<&str>) -> Result<List, Error> {
        self.pass("list", kind).await;
        self.store.list(kind, namespace).await
    }

    async fn create(&self, object: AnyResource) -> Result<Versioned, Error> {
        self.pass("create", object.kind()).await;
        self.store.create(object).await
    }

    async fn update(&self, object: AnyResource) -> Result<Versioned, Error> {
        self.pass("update", object.kind()).await;
        self.store.update(object).await
    }

    async fn delete(&self, key: &Key, revision: Option<&Revision>) -> Result<Versioned, Error> {
        self.pass("delete", key.kind).await;
        self.store.delete(key, revision).await
    }

    async fn watch(&self, kinds: &[Kind], from: &Revision) -> Result<WatchStream, Error> {
        for kind in kinds {
            self.pass("watch", *kind).await;
        }
        self.store.watch(kinds, from).await
    }
}
