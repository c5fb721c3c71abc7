//! Read, change, write; and again where another writer was faster. Every command that changes a stored resource does it here.

use cali_api::{AnyResource, Key};
use cali_datastore::{Datastore, Error};

/// Attempts of a change that meets another writer.
const ATTEMPTS: usize = 5;

/// Writes what `edit` makes of the stored resource, or of nothing (`None`) where there is none yet. `edit` may run several
/// times. A result that names another revision than the stored one is refused, as its author has not seen what is stored.
pub(crate) async fn change<E: From<Error>>(
    store: &dyn Datastore,
    key: &Key,
    mut edit: impl FnMut(Option<&AnyResource>) -> Result<AnyResource, E>,
) -> Result<(), E> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let found = match store.get(key).await {
            Ok(found) => Some(found),
            Err(Error::NotFound { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let mut object = edit(found.as_ref().map(|found| &*found.object))?;
        let revision = &mut object.metadata_mut().resource_version;
        let written = match found {
            Some(found) => {
                revision.get_or_insert(found.revision);
                store.update(object).await
            }
            None => {
                *revision = None;
                store.create(object).await
            }
        };
        match written {
            Err(Error::Conflict { .. } | Error::AlreadyExists { .. } | Error::NotFound { .. })
                if attempt < ATTEMPTS => {}
            other => return other.map(drop).map_err(E::from),
        }
    }
}

/// [`change`] of what must exist.
pub(crate) async fn change_stored<E: From<Error>>(
    store: &dyn Datastore,
    key: &Key,
    mut edit: impl FnMut(&AnyResource) -> Result<AnyResource, E>,
) -> Result<(), E> {
    change(store, key, |stored| match stored {
        Some(stored) => edit(stored),
        None => Err(Error::NotFound { key: key.clone() }.into()),
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_api::Kind;
    use cali_datastore::sqlite::Sqlite;
    use serde_json::json;
    use std::path::Path;

    fn tier(order: f64) -> AnyResource {
        AnyResource::from_json(json!({
            "apiVersion": "projectcalico.org/v3", "kind": "Tier", "metadata": {"name": "t"}, "spec": {"order": order},
        }))
        .expect("a tier")
    }

    /// Another writer, with a runtime of its own.
    fn create_elsewhere(path: &Path, object: AnyResource) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .expect("a runtime");
                runtime.block_on(async {
                    let store = Sqlite::open(path).expect("a store");
                    store.create(object).await.expect("created");
                });
            });
        });
    }

    #[tokio::test]
    async fn a_change_that_was_overtaken_is_made_again_of_what_stands_then() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("cali.db");
        let store = Sqlite::open(&path).expect("a store");
        let key = Key::cluster(Kind::Tier, "t");
        let missing = change_stored(&store, &key, |_| Ok::<_, Error>(tier(1.0))).await;
        assert!(
            matches!(missing, Err(Error::NotFound { .. })),
            "{missing:?}"
        );
        let mut seen = Vec::new();
        change(&store, &key, |stored| {
            seen.push(stored.map(|stored| stored.to_json()["spec"]["order"].clone()));
            if seen.len() == 1 {
                create_elsewhere(&path, tier(5.0));
            }
            let mut object = stored.cloned().unwrap_or_else(|| tier(0.0));
            if let AnyResource::Tier(tier) = &mut object {
                tier.spec.order = tier
                    .spec
                    .order
                    .map(|order| cali_api::v3::Order(order.0 + 1.0));
            }
            Ok::<_, Error>(object)
        })
        .await
        .expect("changed");
        assert_eq!(seen, [None, Some(json!(5))]);
        let stands = store.get(&key).await.expect("the tier");
        assert_eq!(stands.object.to_json()["spec"]["order"], json!(6));
        // What names a revision that is not the stored one any more is not written.
        let mut old = tier(9.0);
        old.metadata_mut().resource_version = Some("1".into());
        let refused = change(&store, &key, |_| Ok::<_, Error>(old.clone())).await;
        assert!(
            matches!(refused, Err(Error::Conflict { .. })),
            "{refused:?}"
        );
    }
}
