//! One watch: etcd's answers as events of the datastore.

use std::time::Duration;

use cali_api::{Kind, Revision};
use etcd_client::{EventType, WatchClient, WatchOptions, WatchResponse};
use tokio::sync::mpsc;

use super::layout::Range;
use super::{decode, found};
use crate::error::Error;
use crate::store::WatchEvent;

type Source = etcd_client::WatchStream;

/// Asks for all changes of a range after a revision.
pub(super) async fn start(
    mut client: WatchClient,
    range: Range,
    after: i64,
) -> Result<Source, etcd_client::Error> {
    let options = WatchOptions::new()
        .with_range(range.end)
        .with_start_revision(after + 1)
        .with_progress_notify();
    client.watch(range.start, Some(options)).await
}

/// Reads a watch until it ends.
pub(super) struct Follower {
    source: Source,
    kinds: Vec<Kind>,
    /// Everything up to this revision has been told. One answer holds all changes of a revision.
    position: i64,
    /// An answer that came with the beginning.
    pending: Option<WatchResponse>,
}

impl Follower {
    pub(super) fn new(source: Source, kinds: Vec<Kind>, after: i64) -> Self {
        Self {
            source,
            kinds,
            position: after,
            pending: None,
        }
    }

    fn gone(&self) -> Error {
        Error::RevisionGone {
            revision: Revision::from(self.position.to_string()),
        }
    }

    /// Waits for etcd's word that the watch has begun. That its revision is compacted can also be told later.
    pub(super) async fn begin(&mut self, limit: Duration) -> Result<(), Error> {
        let failed = |error: crate::Cause| Error::unavailable("watch etcd", error);
        let first = tokio::time::timeout(limit, self.source.message())
            .await
            .map_err(|late| failed(late.into()))?
            .map_err(|error| failed(error.into()))?
            .ok_or_else(|| failed("etcd ended the watch".into()))?;
        if first.compact_revision() > 0 {
            return Err(self.gone());
        }
        if first.canceled() {
            return Err(failed(first.cancel_reason().to_owned().into()));
        }
        self.pending = Some(first);
        Ok(())
    }

    /// Sends events until the watch or the reader ends.
    pub(super) async fn run(mut self, sender: mpsc::Sender<Result<WatchEvent, Error>>) {
        loop {
            let answer = match self.pending.take() {
                Some(answer) => Ok(Some(answer)),
                None => self.source.message().await,
            };
            let error = match answer {
                Ok(Some(answer)) if answer.compact_revision() > 0 => self.gone(),
                Ok(Some(answer)) if answer.canceled() => {
                    Error::unavailable("watch etcd", answer.cancel_reason().to_owned())
                }
                Ok(Some(answer)) => {
                    for event in self.events(&answer) {
                        if sender.send(Ok(event)).await.is_err() {
                            return;
                        }
                    }
                    continue;
                }
                Ok(None) => Error::unavailable("watch etcd", "etcd ended the watch"),
                Err(error) => Error::unavailable("watch etcd", error),
            };
            // The reader may have gone as well.
            let _ = sender.send(Err(error)).await;
            return;
        }
    }

    fn events(&mut self, answer: &WatchResponse) -> Vec<WatchEvent> {
        let mut events = Vec::with_capacity(answer.events().len());
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            self.position = self.position.max(kv.mod_revision());
            let Some(found) =
                found(kv).filter(|found| self.kinds.contains(&found.located.key.kind))
            else {
                continue;
            };
            events.push(match event.event_type() {
                EventType::Delete => WatchEvent::Deleted {
                    key: found.located.key,
                    revision: Revision::from(found.revision.to_string()),
                },
                EventType::Put => match decode(found) {
                    Ok(object) => WatchEvent::Put(object),
                    Err(bad) => WatchEvent::Undecodable(bad),
                },
            });
        }
        if answer.events().is_empty()
            && let Some(header) = answer.header()
            && !answer.created()
            && header.revision() > self.position
        {
            // A progress notice: everything up to this revision has been told.
            self.position = header.revision();
            events.push(WatchEvent::Bookmark(Revision::from(
                self.position.to_string(),
            )));
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::{range, range_of_all};
    use super::*;

    #[test]
    fn several_kinds_are_watched_as_one_range() {
        let all = range_of_all(&[Kind::IPPool, Kind::IPAMConfiguration]).unwrap();
        for kind in [Kind::IPPool, Kind::IPAMConfiguration] {
            let one = range(kind, None);
            assert!(all.start <= one.start && one.end <= all.end);
        }
        assert_eq!(range_of_all(&[]), None);
    }
}
