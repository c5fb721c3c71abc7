//! One stream of changes to several parts of the daemon, each of which sees the kinds that it reads.
//!
//! A part that does not keep up holds back the others, and in the end the source, which coalesces: nothing is queued without
//! bound and nothing is lost.

use cali_api::Kind;
use cali_api::update::SyncEvent;
use tokio::sync::mpsc;

/// Events that may wait for one part.
const QUEUE: usize = 64;

/// The parts and what they read.
#[derive(Debug, Default)]
pub struct FanOut {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    name: &'static str,
    kinds: Vec<Kind>,
    events: mpsc::Sender<SyncEvent>,
}

/// A part has gone away.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ended {
    /// The source.
    #[error("the stream of changes ended")]
    Source,
    /// One of the parts.
    #[error("{0} has stopped reading changes")]
    Part(&'static str),
}

impl FanOut {
    /// Adds a part.
    pub fn part(&mut self, name: &'static str, kinds: &[Kind]) -> mpsc::Receiver<SyncEvent> {
        let (events, receiver) = mpsc::channel(QUEUE);
        self.parts.push(Part {
            name,
            kinds: kinds.to_vec(),
            events,
        });
        receiver
    }

    /// Every kind that some part reads.
    pub fn kinds(&self) -> Vec<Kind> {
        let mut kinds: Vec<Kind> = self
            .parts
            .iter()
            .flat_map(|part| part.kinds.iter().copied())
            .collect();
        kinds.sort();
        kinds.dedup();
        kinds
    }

    /// Passes events on until the source or a part ends.
    pub async fn run(self, mut source: mpsc::Receiver<SyncEvent>) -> Ended {
        while let Some(event) = source.recv().await {
            for part in &self.parts {
                let Some(event) = part.share(&event) else {
                    continue;
                };
                if part.events.send(event).await.is_err() {
                    return Ended::Part(part.name);
                }
            }
        }
        Ended::Source
    }
}

impl Part {
    /// What of an event is for this part.
    fn share(&self, event: &SyncEvent) -> Option<SyncEvent> {
        match event {
            SyncEvent::Status(status) => Some(SyncEvent::Status(*status)),
            SyncEvent::Complete(_) => {
                let concerned = self.kinds.contains(&Kind::WorkloadEndpoint);
                concerned.then(|| event.clone())
            }
            SyncEvent::Updates(updates) => {
                let own: Vec<_> = updates
                    .iter()
                    .filter(|u| self.kinds.contains(&u.key.kind))
                    .cloned()
                    .collect();
                (!own.is_empty()).then_some(SyncEvent::Updates(own))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cali_api::update::{SyncStatus, Update};
    use cali_api::{Key, Revision};

    use super::*;

    fn deletion(kind: Kind) -> Update {
        Update {
            key: Key::cluster(kind, "x"),
            value: None,
            revision: Revision::from("1"),
        }
    }

    #[tokio::test]
    async fn each_part_sees_its_kinds_and_every_status() {
        let mut fan_out = FanOut::default();
        let mut pools = fan_out.part("pools", &[Kind::IPPool]);
        let mut both = fan_out.part("both", &[Kind::Node, Kind::IPPool]);
        assert_eq!(fan_out.kinds(), [Kind::IPPool, Kind::Node]);
        let (source, events) = mpsc::channel(4);
        source
            .send(SyncEvent::Updates(vec![
                deletion(Kind::Node),
                deletion(Kind::Tier),
            ]))
            .await
            .unwrap();
        source
            .send(SyncEvent::Updates(vec![deletion(Kind::IPPool)]))
            .await
            .unwrap();
        source
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        drop(source);
        assert_eq!(fan_out.run(events).await, Ended::Source);
        let status = SyncEvent::Status(SyncStatus::InSync);
        let updates = |kind| SyncEvent::Updates(vec![deletion(kind)]);
        for expected in [updates(Kind::IPPool), status.clone()] {
            assert_eq!(pools.recv().await, Some(expected));
        }
        for expected in [updates(Kind::Node), updates(Kind::IPPool), status] {
            assert_eq!(both.recv().await, Some(expected));
        }
    }

    #[tokio::test]
    async fn a_part_that_ends_is_named() {
        let mut fan_out = FanOut::default();
        drop(fan_out.part("pools", &[Kind::IPPool]));
        let (source, events) = mpsc::channel(4);
        source
            .send(SyncEvent::Status(SyncStatus::InSync))
            .await
            .unwrap();
        assert_eq!(fan_out.run(events).await, Ended::Part("pools"));
    }
}
