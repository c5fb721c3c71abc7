//! One watch of the API server, kept up over the server's regular ends of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::{Kind, Revision};
use futures::TryStreamExt;
use kube::Client;
use kube::core::params::WatchParams;
use kube::core::{Request, Status, WatchEvent as Raw};
use serde_json::Value;
use tokio::sync::mpsc;

use super::{Cluster, Scope, decode};
use crate::error::Error;
use crate::store::WatchEvent;

/// The API server ends a watch after at most this time, in seconds, and is asked again.
const WATCH_SECONDS: u32 = 290;
/// Nothing at all for so long is a failure: longer than a watch lasts.
pub(super) const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 30);
/// The same of a server that has sent a bookmark: it sends one every minute.
const SILENCE_AFTER_BOOKMARK: Duration = Duration::from_secs(150);
/// A watch that ends sooner without a word is taken as a failure.
const TOO_SOON: Duration = Duration::from_secs(1);
/// How often it is asked whether a kind that the cluster does not serve has come.
const NOT_SERVED_POLL: Duration = Duration::from_secs(10);

type Sender = mpsc::Sender<Result<WatchEvent, Error>>;

/// What one watch of one native or Calico kind is for.
pub(super) struct Follower {
    pub(super) cluster: Arc<Cluster>,
    /// The kind that is watched.
    pub(super) source: Kind,
    /// The kind that is told; differs from `source` for views.
    pub(super) told: Kind,
    /// Field selector; all objects without one.
    pub(super) fields: Option<String>,
    pub(super) position: Revision,
    /// How long the server may say nothing.
    pub(super) silence: Duration,
    pub(super) sender: Sender,
}

fn gone(status: &Status) -> bool {
    status.code == 410 || status.reason == "Expired" || status.reason == "Gone"
}

impl Follower {
    /// Sends events until the watch fails or the reader goes.
    pub(super) async fn run(mut self) {
        loop {
            let started = Instant::now();
            let error = match self.once().await {
                Ok(true) if started.elapsed() > TOO_SOON => continue,
                Ok(true) => self.unavailable("the API server ended the watch at once"),
                Ok(false) => return,
                Err(error) => error,
            };
            // The reader may have gone as well.
            let _ = self.sender.send(Err(error)).await;
            return;
        }
    }

    fn unavailable(&self, cause: impl Into<crate::Cause>) -> Error {
        Error::unavailable(format!("watch {}", self.source.plural()), cause)
    }

    fn failed(&self, error: kube::Error) -> Error {
        match error {
            kube::Error::Api(status) if gone(&status) => Error::RevisionGone {
                revision: self.position.clone(),
            },
            other => self.unavailable(other),
        }
    }

    /// One request; true when the server ended it regularly, false when the reader is gone.
    async fn once(&mut self) -> Result<bool, Error> {
        let path = self.cluster.place(self.source)?.path(None);
        let mut parameters = WatchParams::default().timeout(WATCH_SECONDS);
        if let Some(fields) = &self.fields {
            parameters = parameters.fields(fields);
        }
        let request = Request::new(path)
            .watch(&parameters, self.position.as_str())
            .map_err(|error| self.unavailable(error))?;
        let client: &Client = &self.cluster.client;
        let events = client
            .request_events::<Value>(request)
            .await
            .map_err(|error| self.failed(error))?;
        let mut events = std::pin::pin!(events);
        loop {
            // A connection that is lost is ended by the kernel (see `connect`); this is for a server that hangs.
            let event = match tokio::time::timeout(self.silence, events.try_next()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) => return Ok(true),
                Ok(Err(error)) => return Err(self.failed(error)),
                Err(late) => return Err(self.unavailable(late)),
            };
            for told in self.translate(event)? {
                if self.sender.send(Ok(told)).await.is_err() {
                    return Ok(false);
                }
            }
        }
    }

    fn translate(&mut self, event: Raw<Value>) -> Result<Vec<WatchEvent>, Error> {
        let (object, deleted) = match event {
            Raw::Added(object) | Raw::Modified(object) => (object, false),
            Raw::Deleted(object) => (object, true),
            Raw::Bookmark(bookmark) => {
                self.position = bookmark.metadata.resource_version.into();
                self.silence = SILENCE_AFTER_BOOKMARK;
                return Ok(vec![WatchEvent::Bookmark(self.position.clone())]);
            }
            Raw::Error(status) => return Err(self.failed(kube::Error::Api(status))),
        };
        if let Some(revision) = object
            .pointer("/metadata/resourceVersion")
            .and_then(Value::as_str)
        {
            self.position = Revision::from(revision);
        }
        let revision = self.position.clone();
        Ok(decode(self.source, self.told, object)
            .into_iter()
            .map(|decoded| match (decoded, deleted) {
                (Ok(object), false) => WatchEvent::Put(object),
                (Err(bad), false) => WatchEvent::Undecodable(bad),
                (Ok(object), true) => WatchEvent::Deleted {
                    key: object.object.key(),
                    revision: revision.clone(),
                },
                (Err(bad), true) => WatchEvent::Deleted {
                    key: bad.key,
                    revision: revision.clone(),
                },
            })
            .collect())
    }

    /// For a kind that the cluster does not serve: waits until it does, then asks the reader to list.
    pub(super) async fn run_not_served(self) {
        loop {
            tokio::select! {
                () = self.sender.closed() => return,
                () = tokio::time::sleep(NOT_SERVED_POLL) => {}
            }
            if matches!(
                self.cluster
                    .page(self.source, Scope::default(), None, 1)
                    .await,
                Ok(Some(_))
            ) {
                let error = Error::RevisionGone {
                    revision: self.position,
                };
                let _ = self.sender.send(Err(error)).await;
                return;
            }
        }
    }
}
