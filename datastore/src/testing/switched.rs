//! A store that can be taken away, and that counts what is asked of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use async_trait::async_trait;
use cali_api::{AnyResource, Key, Kind, Revision};

use crate::error::Error;
use crate::store::{Datastore, List, Versioned, WatchStream};

/// See the module's text. While it is away every operation fails; watches that run already say nothing of it.
pub struct Switched {
    store: Arc<dyn Datastore>,
    away: AtomicBool,
    asked: AtomicUsize,
}

impl Switched {
    /// Over another store; there.
    #[must_use]
    pub fn new(store: Arc<dyn Datastore>) -> Arc<Self> {
        Arc::new(Self {
            store,
            away: AtomicBool::new(false),
            asked: AtomicUsize::new(0),
        })
    }

    /// Takes it away, or brings it back.
    pub fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::SeqCst);
    }

    /// The store itself, whether it is away or not.
    #[must_use]
    pub fn behind(&self) -> &dyn Datastore {
        self.store.as_ref()
    }

    /// Operations so far, those that failed included.
    #[must_use]
    pub fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn check(&self) -> Result<(), Error> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.away.load(Ordering::SeqCst) {
            return Err(Error::Unavailable {
                operation: "reach the store".to_owned(),
                source: "it was switched off".into(),
            });
        }
        Ok(())
    }
}

#[async_trait]
impl Datastore for Switched {
    async fn get(&self, key: &Key) -> Result<Versioned, Error> {
        self.check()?;
        self.store.get(key).await
    }

    async fn list(&self, kind: Kind, namespace: Option<&str>) -> Result<List, Error> {
        self.check()?;
        self.store.list(kind, namespace).await
    }

    async fn create(&self, object: AnyResource) -> Result<Versioned, Error> {
        self.check()?;
        self.store.create(object).await
    }

    async fn update(&self, object: AnyResource) -> Result<Versioned, Error> {
        self.check()?;
        self.store.update(object).await
    }

    async fn delete(&self, key: &Key, revision: Option<&Revision>) -> Result<Versioned, Error> {
        self.check()?;
        self.store.delete(key, revision).await
    }

    async fn watch(&self, kinds: &[Kind], from: &Revision) -> Result<WatchStream, Error> {
        self.check()?;
        self.store.watch(kinds, from).await
    }
}
