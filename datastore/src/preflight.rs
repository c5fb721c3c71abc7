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
        // As the write itself does: a field that is left out has its default, which is then no change.
        let mut complete = object.clone();
        cali_api::defaults(&mut complete);
        if let Err(source) = admission::check(&complete, old.as_deref(), &others) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sqlite::Sqlite;
    use serde_json::json;

    #[tokio::test]
    async fn what_is_stored_with_its_defaults_is_accepted_again_without_them() {
        let folder = tempfile::tempdir().expect("make a folder");
        let store = Sqlite::open(&folder.path().join("cali.db")).expect("open a datastore");
        let pool = |mode: &str| {
            let value = json!({
                "apiVersion": "projectcalico.org/v3", "kind": "IPPool", "metadata": {"name": "p"},
                "spec": {"cidr": "10.0.0.0/16", "vxlanMode": mode},
            });
            AnyResource::from_json(value).expect("a pool")
        };
        store.apply(pool("Always")).await.expect("write the pool");
        for mode in ["Always", "Never"] {
            let refused = check(&store, &[pool(mode)]).await.expect("look");
            assert!(refused.is_empty(), "{refused:?}");
        }
    }
}
