//! A change of one stored object that other writers may change at the same time.

use cali_api::{AnyResource, Key};

use crate::{Datastore, Error};

/// Conflicting writes after which it is given up. Each of them means that somebody else got on.
const ATTEMPTS: usize = 20;

/// Reads an object, changes it and writes it with compare-and-swap; again if somebody else wrote in between. `change` says
/// whether there is something to write; it may run several times.
///
/// # Errors
/// [`Error::NotFound`] where there is no such object, or one of another type; [`Error::Conflict`] where twenty
/// writes lost; what the datastore says otherwise.
pub async fn edit<T>(
    store: &dyn Datastore,
    key: &Key,
    mut change: impl FnMut(&mut T) -> bool,
) -> Result<(), Error>
where
    T: Clone + Into<AnyResource>,
    for<'a> &'a T: TryFrom<&'a AnyResource>,
{
    let mut attempt = 0;
    loop {
        attempt += 1;
        let stored = store.get(key).await?;
        let Ok(object) = <&T>::try_from(stored.object.as_ref()) else {
            return Err(Error::NotFound { key: key.clone() });
        };
        let mut object = object.clone();
        if !change(&mut object) {
            return Ok(());
        }
        match store.update(object.into()).await {
            Ok(_) => return Ok(()),
            Err(Error::Conflict { .. }) if attempt < ATTEMPTS => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use cali_api::v3::{GlobalNetworkSet, GlobalNetworkSetSpec};
    use cali_api::{Kind, Resource};

    use super::*;
    use crate::sqlite::Sqlite;

    #[tokio::test]
    async fn nobodys_change_is_lost() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Sqlite::open(&folder.path().join("cali.db")).expect("a datastore");
        let key = Key::cluster(Kind::GlobalNetworkSet, "counted");
        let missing = edit(&store, &key, |_: &mut GlobalNetworkSet| true).await;
        assert!(
            matches!(missing, Err(Error::NotFound { .. })),
            "{missing:?}"
        );
        let object: GlobalNetworkSet = Resource::named("counted", GlobalNetworkSetSpec::default());
        store.create(object.into()).await.expect("the object");
        let count = |name: &'static str| {
            let (store, key) = (&store, &key);
            async move {
                for _ in 0..20 {
                    edit(store, key, |set: &mut GlobalNetworkSet| {
                        let label = set.metadata.labels.entry(name.to_owned()).or_default();
                        *label = (label.parse().unwrap_or(0) + 1).to_string();
                        true
                    })
                    .await
                    .expect("a write");
                }
            }
        };
        tokio::join!(count("a"), count("b"), count("c"));
        let stored = store.get(&key).await.expect("the object");
        let labels = &stored.object.metadata().labels;
        for name in ["a", "b", "c"] {
            assert_eq!(
                labels.get(name).map(String::as_str),
                Some("20"),
                "{labels:?}"
            );
        }
        let before = stored.revision.clone();
        edit(&store, &key, |_: &mut GlobalNetworkSet| false)
            .await
            .expect("nothing to write");
        assert_eq!(store.get(&key).await.expect("the object").revision, before);
    }
}
