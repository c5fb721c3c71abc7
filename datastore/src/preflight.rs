//! Would these writes be accepted? Asked for a whole set of objects before the first one is written, so that a set
//! with one bad object leaves nothing behind.

use cali_api::{AnyResource, Key};

use crate::{Datastore, Error, admission};

/// An object of the set that would be refused.
#[derive(Debug, thiserror::Error)]
#[error("object {position} of the set: {source}")]
pub struct Refused {
    /// Position in the set, from 0.
    pub position: usize,
    /// Why.
    #[source]
    pub source: Error,
}

/// Checks every object against its kind's rules, what is stored, and the objects before it in the set. Another
/// writer may still come in between: each write is checked again in its own transaction.
pub async fn check(store: &dyn Datastore, set: &[AnyResource]) -> Result<Vec<Refused>, Error> {
    let mut refused = Vec::new();
    for (position, object) in set.iter().enumerate() {
        let key = object.key();
        let old = match store.get(&key).await {
            Ok(found) => Some(found.object),
            Err(Error::NotFound { .. } | Error::Undecodable { .. }) => None,
            Err(other) => return Err(other),
        };
        let others = if admission::compares_with_others(object.kind()) {
            peers(store, &key, &set[..position]).await?
        } else {
            Vec::new()
        };
        if let Err(source) = admission::check(object, old.as_deref(), &others) {
            refused.push(Refused { position, source });
        }
    }
    Ok(refused)
}

/// The other objects of the kind as they will be: stored ones, with those of the set in their place.
async fn peers(
    store: &dyn Datastore,
    key: &Key,
    earlier: &[AnyResource],
) -> Result<Vec<AnyResource>, Error> {
    let mut peers: Vec<AnyResource> = earlier
        .iter()
        .filter(|other| other.kind() == key.kind)
        .cloned()
        .collect();
    let list = store.list(key.kind, None).await?;
    let stored = list
        .items
        .iter()
        .filter(|item| !earlier.iter().any(|other| other.key() == item.object.key()));
    peers.extend(stored.map(|item| item.object.as_ref().clone()));
    Ok(peers)
}
