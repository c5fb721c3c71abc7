//! The stations of a speaker: a task for each, started and ended by difference, so that a change of one leaves the
//! connections of the others alone.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::station::{self, Station};
use crate::speaker::Speaker;

/// How long all stations together may take to be told that we end.
const END: Duration = Duration::from_secs(2);

/// Keeps the connections to the stations of one speaker.
#[derive(Debug)]
pub struct Stations {
    speaker: Speaker,
    tasks: BTreeMap<Station, (watch::Sender<bool>, JoinHandle<()>)>,
}

impl Stations {
    /// No station yet.
    #[must_use]
    pub const fn new(speaker: Speaker) -> Self {
        Self {
            speaker,
            tasks: BTreeMap::new(),
        }
    }

    /// From now on these.
    pub fn follow(&mut self, stations: &[Station]) {
        self.tasks.retain(|station, (stop, _)| {
            let stays = stations.contains(station);
            if !stays {
                stop.send_replace(true);
            }
            stays
        });
        for station in stations {
            self.tasks.entry(station.clone()).or_insert_with(|| {
                let (stop, stopped) = watch::channel(false);
                let run = station::run(station.clone(), self.speaker.clone(), stopped);
                (stop, tokio::spawn(run))
            });
        }
    }

    /// Tells all stations that this is the end.
    pub async fn end(self) {
        let tasks = self.tasks.into_values().map(|(stop, task)| {
            stop.send_replace(true);
            task
        });
        let all = futures::future::join_all(tasks);
        let _ = tokio::time::timeout(END, all).await;
    }
}
