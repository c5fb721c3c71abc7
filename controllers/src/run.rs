//! The loop of one replica: leads or waits, and collects while it leads.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::Kind;
use cali_datastore::{Datastore, WatchEvent, WatchStream};
use cali_ipam::Allocator;

use crate::election::{Election, Lock, take_turn};
use crate::error::Error;
use crate::gc::{self, Collector, Rules};
use crate::settings::Settings;

/// Waits between attempts after an error: doubled from the first to the last.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Deletions that come together are cleaned up after together.
const GATHER: Duration = Duration::from_secs(1);

/// Runs until `stop` is done; then the lease is given back.
pub async fn run(
    store: Arc<dyn Datastore>,
    lock: &dyn Lock,
    mut election: Election,
    stop: impl Future<Output = ()>,
) {
    let mut stop = std::pin::pin!(stop);
    let mut reign: Option<tokio::task::JoinHandle<()>> = None;
    let mut wait = RETRY.0;
    loop {
        let pause = match take_turn(lock, &mut election).await {
            Ok(pause) => {
                wait = RETRY.0;
                pause
            }
            Err(error) => {
                tracing::warn!(%error, cause = ?std::error::Error::source(&error), "cannot look at the leader's lease");
                wait = (wait * 2).min(RETRY.1);
                wait.min(election.pause())
            }
        };
        match (election.leads(Instant::now()), &reign) {
            (true, None) => {
                tracing::info!("leads from now on");
                reign = Some(tokio::spawn(lead(Arc::clone(&store))));
            }
            (false, Some(task)) => {
                tracing::warn!("leads no longer");
                task.abort();
                reign = None;
            }
            _ => {}
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = &mut stop => break,
        }
    }
    if let Some(task) = reign {
        task.abort();
        // Waits until nothing is written any more.
        let _ = task.await;
    }
    if let Some((lease, revision)) = election.resign(Instant::now())
        && let Err(error) = lock.write(&lease, Some(&revision)).await
    {
        tracing::warn!(%error, "the next leader has to wait until the lease runs out");
    }
}

/// Collects garbage: regularly, and when a node is deleted.
async fn lead(store: Arc<dyn Datastore>) {
    let allocator = Allocator::with_system_time(Arc::clone(&store), "");
    let mut collector = Collector::new(Rules::default());
    let mut wait = RETRY.0;
    let mut nodes: Option<WatchStream> = None;
    loop {
        let period = match turn(&store, &allocator, &mut collector, &mut nodes).await {
            Ok(period) => {
                wait = RETRY.0;
                period
            }
            Err(error) => {
                tracing::warn!(%error, cause = ?std::error::Error::source(&error), retry_in = ?wait, "garbage collection failed");
                let period = wait;
                wait = (wait * 2).min(RETRY.1);
                period
            }
        };
        let deleted = async {
            match nodes.as_mut() {
                Some(watch) => next_deletion(watch).await,
                None => std::future::pending().await,
            }
        };
        let broken = tokio::select! {
            () = tokio::time::sleep(period) => false,
            seen = deleted => !seen,
        };
        if broken {
            nodes = None;
        } else {
            tokio::time::sleep(GATHER.min(period)).await;
        }
    }
}

async fn turn(
    store: &Arc<dyn Datastore>,
    allocator: &Allocator,
    collector: &mut Collector,
    nodes: &mut Option<WatchStream>,
) -> Result<Duration, Error> {
    let settings = Settings::read(store.as_ref()).await?;
    collector.set_rules(settings.rules);
    if nodes.is_none() {
        // Watched before everything is read, so that no deletion is missed in between.
        let kinds = [Kind::Node, Kind::K8sNode];
        let from = store
            .list(Kind::Node, None)
            .await
            .map_err(Error::datastore("list nodes"))?
            .revision;
        let watch = store.watch(&kinds, &from).await;
        *nodes = Some(watch.map_err(Error::datastore("watch nodes"))?);
    }
    let (report, done) = gc::pass(store, allocator, collector, Instant::now(), false).await?;
    tracing::info!(
        blocks = report.blocks,
        candidates = report.candidates.len(),
        released = done.released.len(),
        blocks_given_up = done.blocks.len(),
        handles = done.handles.len(),
        failures = done.failures.len(),
        "collected garbage"
    );
    Ok(settings.period())
}

/// True when a node was deleted; false if the watch has ended.
async fn next_deletion(watch: &mut WatchStream) -> bool {
    loop {
        match watch.next().await {
            Some(Ok(WatchEvent::Deleted { .. })) => return true,
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return false,
        }
    }
}
