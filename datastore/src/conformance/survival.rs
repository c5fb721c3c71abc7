//! The stream of updates while the datastore fails and comes back, checked update by update.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cali_api::update::SyncEvent;
use cali_api::{AnyResource, Key, Kind, Revision};

use super::{Store, network_set, set_key};
use crate::{Error, sync};

/// Objects that are changed all the time and never deleted.
const KEPT: usize = 8;
/// Changes between two troubles.
const STEPS: usize = 25;
/// Nothing here takes that long unless it hangs.
const LIMIT: Duration = Duration::from_secs(300);
const COUNTER: &str = "counter";

/// A call that is repeated until the datastore answers.
async fn insist<T>(mut call: impl AsyncFnMut() -> Result<T, Error>) -> Result<T, Error> {
    loop {
        match call().await {
            Err(error) if error.is_transient() => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            other => return other,
        }
    }
}

fn numbered(name: &str, counter: usize) -> AnyResource {
    let mut object = network_set("a", name, "10.0.0.0/8");
    let labels = &mut object.metadata_mut().labels;
    labels.insert(COUNTER.to_owned(), counter.to_string());
    object
}

fn counter(object: &AnyResource) -> usize {
    let text = object.labels().get(COUNTER).map_or("0", String::as_str);
    text.parse().expect("the test's counter")
}

async fn set(store: &Store, name: &str, counter: usize) {
    insist(async || store.apply(numbered(name, counter)).await)
        .await
        .expect("apply");
}

async fn drop_set(store: &Store, name: &str) {
    match insist(async || store.delete(&set_key(name), None).await).await {
        // An earlier try was carried out, though its answer was lost.
        Ok(_) | Err(Error::NotFound { .. }) => {}
        Err(error) => panic!("delete {name}: {error}"),
    }
}

/// What a reader of the stream must never see.
#[derive(Default)]
struct Reader {
    seen: BTreeMap<Key, (Revision, usize)>,
}

impl Reader {
    fn take(&mut self, event: SyncEvent) {
        let SyncEvent::Updates(updates) = event else {
            return;
        };
        for update in updates {
            let name = update.key.to_string();
            match update.value {
                Some(object) => {
                    let now = counter(&object);
                    if let Some((_, before)) = self.seen.get(&update.key) {
                        assert!(*before <= now, "{name} went back from {before} to {now}");
                    }
                    self.seen.insert(update.key, (update.revision, now));
                }
                None => {
                    assert!(!name.contains("kept"), "{name} was never deleted");
                    assert!(
                        self.seen.remove(&update.key).is_some(),
                        "{name} was not there"
                    );
                }
            }
        }
    }
}

/// Changes objects while `trouble` strikes `rounds` times; the stream's reader sees no object go that was not deleted, no
/// object go back, and in the end just what is stored.
pub async fn stream_survives(store: Store, rounds: usize, mut trouble: impl AsyncFnMut(usize)) {
    for number in 0..KEPT {
        set(&store, &format!("kept{number}"), 0).await;
    }
    let mut stream = sync::start(Arc::clone(&store), &[Kind::NetworkSet]);
    let (done, mut finished) = tokio::sync::watch::channel(false);
    let reader = async {
        let mut reader = Reader::default();
        let mut wanted: Option<BTreeMap<Key, Revision>> = None;
        loop {
            let seen: BTreeMap<Key, Revision> = reader
                .seen
                .iter()
                .map(|(key, (revision, _))| (key.clone(), revision.clone()))
                .collect();
            if wanted.as_ref() == Some(&seen) {
                return seen.len();
            }
            tokio::select! {
                event = stream.recv() => reader.take(event.expect("the stream goes on")),
                _ = finished.changed(), if wanted.is_none() => {
                    let list = insist(async || store.list(Kind::NetworkSet, None).await).await.expect("list");
                    wanted = Some(list.items.iter().map(|item| (item.object.key(), item.revision.clone())).collect());
                }
            }
        }
    };
    let writer = async {
        let mut count = 0;
        for round in 0..rounds {
            for step in 0..STEPS {
                count += 1;
                set(&store, &format!("kept{}", count % KEPT), count).await;
                let passing = format!("passing{}", step % 5);
                if step % 2 == 0 {
                    set(&store, &passing, count).await;
                } else {
                    drop_set(&store, &passing).await;
                }
                if step == STEPS / 2 {
                    trouble(round).await;
                }
            }
        }
        done.send(true).expect("the reader is there");
    };
    let ((), seen) = tokio::join!(writer, tokio::time::timeout(LIMIT, reader));
    let seen = seen.expect("the stream comes to what is stored");
    assert!(seen >= KEPT, "only {seen} objects");
}
