//! A change of one stored object that other writers may change at the same time.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::Duration;

use cali_api::{AnyResource, Key};

use crate::{Datastore, Error};

/// Conflicting writes after which it is given up. Each of them means that somebody else got on.
const ATTEMPTS: u32 = 12;

/// The longest pause after the first conflict, which doubles up to [`LONGEST_PAUSE`]. Without one, writers that are as quick
/// as each other can lose to one another for as long as they try.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// How long to wait after so many conflicts: anything up to a bound that doubles.
fn pause(conflicts: u32) -> Duration {
    let longest = FIRST_PAUSE
        .saturating_mul(1 << conflicts.saturating_sub(1).min(16))
        .min(LONGEST_PAUSE);
    // Every new state has a random seed.
    let random = RandomState::new().build_hasher().finish();
    longest.mul_f64(random as f64 / u64::MAX as f64)
}

/// Reads an object, changes it and writes it with compare-and-swap; again after a short pause if somebody else wrote in
/// between. `change` says whether there is something to write; it may run several times. Returns whether it wrote.
///
/// # Errors
/// [`Error::NotFound`] where there is no such object, or one of another type; [`Error::Conflict`] where twelve
/// writes lost; what the datastore says otherwise.
pub async fn edit<T>(
    store: &dyn Datastore,
    key: &Key,
    mut change: impl FnMut(&mut T) -> bool,
) -> Result<bool, Error>
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
            return Ok(false);
        }
        let mut object: AnyResource = object.into();
        // Whatever `change` made of it: compared with what was read.
        object.metadata_mut().resource_version = Some(stored.revision);
        match store.update(object).await {
            Ok(_) => return Ok(true),
            Err(Error::Conflict { .. }) if attempt < ATTEMPTS => {
                tokio::time::sleep(pause(attempt)).await;
            }
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
        let wrote = edit(&store, &key, |_: &mut GlobalNetworkSet| false).await;
        assert!(matches!(wrote, Ok(false)), "{wrote:?}");
        assert_eq!(store.get(&key).await.expect("the object").revision, before);
    }
}
