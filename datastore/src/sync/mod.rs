//! From list and watch to one ordered stream of updates, for as long as the reader listens.
//!
//! One task per stored kind lists, then watches; a broken watch is resumed from where it stood, and only when the change
//! log no longer reaches back is the kind listed again and the difference sent (no spurious deletions). One more task
//! merges and converts ([`merge`]), and sends to the reader over a bounded channel: a slow reader slows the watches, and
//! the datastore's change log is the buffer. Once in sync, an outage of the datastore does not take that back.

mod merge;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use cali_api::update::{SyncEvent, SyncStatus, Update};
use cali_api::{Kind, Revision};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use self::merge::Merge;
use crate::error::Error;
use crate::store::{Datastore, List, WatchEvent};

/// Updates in one [`SyncEvent::Updates`], at most.
pub const MAX_BATCH: usize = 1000;
/// Events that wait for the reader.
const OUTPUT_BUFFER: usize = 64;
/// Events of all kinds that wait for the merging task.
const INPUT_BUFFER: usize = 1024;
/// Waits between attempts after an error: doubled from the first to the last.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Starts the stream of these kinds. It ends when the receiver is dropped.
///
/// Native kinds are converted to Calico's: ask for `Profile`, not for `K8sNamespace`. `K8sService` and
/// `K8sEndpointSlice` pass as they are. Order: changes of one kind arrive in the order of their commits. The first
/// events are `Status(WaitForDatastore)`, then `Status(ResyncInProgress)` once a list has been read, and
/// `Status(InSync)` after everything that was stored at the start has been sent.
///
/// Must be called inside a Tokio runtime.
pub fn start(store: Arc<dyn Datastore>, kinds: &[Kind]) -> mpsc::Receiver<SyncEvent> {
    let (sender, receiver) = mpsc::channel(OUTPUT_BUFFER);
    let wanted: BTreeSet<Kind> = kinds.iter().copied().collect();
    tokio::spawn(run(store, wanted, sender));
    receiver
}

/// What the task of one kind tells the merging task.
enum Input {
    Listed { kind: Kind, list: List },
    Event(WatchEvent),
}

async fn run(store: Arc<dyn Datastore>, wanted: BTreeSet<Kind>, sender: mpsc::Sender<SyncEvent>) {
    let stored: BTreeSet<Kind> = wanted
        .iter()
        .flat_map(|kind| merge::sources_of(*kind))
        .filter(|kind| store.is_stored(*kind))
        .collect();
    let (inputs, mut input) = mpsc::channel(INPUT_BUFFER);
    let mut tasks = JoinSet::new();
    for kind in &stored {
        tasks.spawn(follow(Arc::clone(&store), *kind, inputs.clone()));
    }
    drop(inputs);
    let views = wanted
        .iter()
        .copied()
        .filter(|kind| !store.is_stored(*kind))
        .collect();
    let mut stream = Stream {
        views,
        merge: Merge::new(wanted),
        unlisted: stored,
        status: SyncStatus::WaitForDatastore,
        sender,
    };
    // A reader that goes away ends the tasks: they are owned by the set.
    let reader = stream.sender.clone();
    tokio::select! {
        () = reader.closed() => {}
        _ = stream.run(&mut input) => {}
    }
}

struct Stream {
    merge: Merge,
    /// Wanted kinds that the store keeps no objects of; only what is built in is told of them itself.
    views: Vec<Kind>,
    unlisted: BTreeSet<Kind>,
    status: SyncStatus,
    sender: mpsc::Sender<SyncEvent>,
}

/// The reader has gone away.
struct Closed;

impl Stream {
    async fn run(&mut self, input: &mut mpsc::Receiver<Input>) -> Result<(), Closed> {
        self.send(SyncEvent::Status(self.status)).await?;
        if self.unlisted.is_empty() {
            self.become_status(SyncStatus::InSync).await?;
        }
        let mut ready = Vec::with_capacity(MAX_BATCH);
        loop {
            if input.recv_many(&mut ready, MAX_BATCH).await == 0 {
                return Ok(());
            }
            let mut updates = Vec::new();
            for one in ready.drain(..) {
                match one {
                    Input::Event(event) => self.on_event(event, &mut updates),
                    Input::Listed { kind, list } => {
                        if self.status == SyncStatus::WaitForDatastore {
                            self.become_status(SyncStatus::ResyncInProgress).await?;
                            for kind in std::mem::take(&mut self.views) {
                                updates.extend(self.merge.on_list(kind, Vec::new(), &[]));
                            }
                        }
                        for bad in &list.undecodable {
                            tracing::error!(object = %bad.key, reason = %bad.reason, "stored object cannot be read; its last good version stays in force");
                        }
                        updates.extend(self.merge.on_list(kind, list.items, &list.undecodable));
                        if self.unlisted.remove(&kind) && self.unlisted.is_empty() {
                            self.updates(&mut updates).await?;
                            self.become_status(SyncStatus::InSync).await?;
                        }
                    }
                }
            }
            for problem in self.merge.take_problems() {
                tracing::warn!(object = %problem.object, problem = problem.text, "part of an object cannot be used");
            }
            self.updates(&mut updates).await?;
        }
    }

    fn on_event(&mut self, event: WatchEvent, updates: &mut Vec<Update>) {
        match event {
            WatchEvent::Put(object) => updates.extend(self.merge.on_put(object)),
            WatchEvent::Deleted { key, revision } => {
                updates.extend(self.merge.on_delete(&key, &revision))
            }
            WatchEvent::Undecodable(bad) => {
                tracing::error!(object = %bad.key, reason = %bad.reason, "written object cannot be read; its last good version stays in force");
            }
            WatchEvent::Bookmark(_) => {}
        }
    }

    async fn become_status(&mut self, status: SyncStatus) -> Result<(), Closed> {
        self.status = status;
        self.send(SyncEvent::Status(status)).await
    }

    async fn updates(&self, updates: &mut Vec<Update>) -> Result<(), Closed> {
        while !updates.is_empty() {
            let rest = updates.split_off(updates.len().min(MAX_BATCH));
            self.send(SyncEvent::Updates(std::mem::replace(updates, rest)))
                .await?;
        }
        Ok(())
    }

    async fn send(&self, event: SyncEvent) -> Result<(), Closed> {
        self.sender.send(event).await.map_err(|_| Closed)
    }
}

/// Lists and watches one stored kind until the merging task goes away.
async fn follow(store: Arc<dyn Datastore>, kind: Kind, inputs: mpsc::Sender<Input>) {
    let mut wait = RETRY.0;
    let mut position: Option<Revision> = None;
    loop {
        let error = match watch_once(store.as_ref(), kind, &mut position, &inputs, &mut wait).await
        {
            Ended::Reader => return,
            Ended::Failed(error) => error,
        };
        if matches!(error, Error::RevisionGone { .. }) {
            tracing::info!(
                kind = kind.plural(),
                "change log no longer reaches back; listing again"
            );
            position = None;
        } else {
            tracing::warn!(kind = kind.plural(), error = %error, cause = ?std::error::Error::source(&error), retry_in = ?wait, "cannot follow the datastore");
        }
        tokio::time::sleep(jittered(wait)).await;
        wait = (wait * 2).min(RETRY.1);
    }
}

/// Between half and all of a time, so that the readers of a server that comes back do not all come at once.
fn jittered(wait: Duration) -> Duration {
    use std::hash::{BuildHasher, Hasher};
    // Every new state has a random seed.
    let random = std::hash::RandomState::new().build_hasher().finish();
    wait / 2 + (wait / 2).mul_f64((random % 1024) as f64 / 1024.0)
}

enum Ended {
    Reader,
    Failed(Error),
}

async fn watch_once(
    store: &dyn Datastore,
    kind: Kind,
    position: &mut Option<Revision>,
    inputs: &mpsc::Sender<Input>,
    wait: &mut Duration,
) -> Ended {
    let from = match position.clone() {
        Some(from) => from,
        None => match store.list(kind, None).await {
            Err(e) => return Ended::Failed(e),
            Ok(list) => {
                let from = list.revision.clone();
                if inputs.send(Input::Listed { kind, list }).await.is_err() {
                    return Ended::Reader;
                }
                *position = Some(from.clone());
                from
            }
        },
    };
    let mut watch = match store.watch(&[kind], &from).await {
        Ok(watch) => watch,
        Err(e) => return Ended::Failed(e),
    };
    loop {
        match watch.next().await {
            None => {
                let closed = std::io::Error::from(std::io::ErrorKind::ConnectionAborted);
                return Ended::Failed(Error::unavailable(
                    format!("watch {}", kind.plural()),
                    closed,
                ));
            }
            Some(Err(e)) => return Ended::Failed(e),
            Some(Ok(event)) => {
                *wait = RETRY.0;
                *position = Some(event.revision().clone());
                if inputs.send(Input::Event(event)).await.is_err() {
                    return Ended::Reader;
                }
            }
        }
    }
}
