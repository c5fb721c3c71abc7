//! The loop of one replica: leads or waits, and works while it leads.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::Kind;
use cali_datastore::{Datastore, WatchEvent, WatchStream};
use cali_ipam::Allocator;

use crate::election::{Election, Lock, take_turn};
use crate::error::Error;
use crate::gc::{self, Collector, Rules};
use crate::host_endpoints;
use crate::load_balancer;
use crate::settings::Settings;

/// Waits between attempts after an error: doubled from the first to the last.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Deletions that come together are cleaned up after together.
const GATHER: Duration = Duration::from_secs(1);

/// Host endpoints are looked at anew after so long, whatever is heard (Calico's `reconcilerPeriod`).
const RECONCILE: Duration = Duration::from_secs(300);

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
                reign = Some(tokio::spawn(work(Arc::clone(&store))));
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

/// What a leader does.
async fn work(store: Arc<dyn Datastore>) {
    tokio::join!(
        collect(Arc::clone(&store)),
        keep_host_endpoints(Arc::clone(&store)),
        keep_services(store)
    );
}

/// Looks after host endpoints: when a node or the setting changes, and regularly.
async fn keep_host_endpoints(store: Arc<dyn Datastore>) {
    let mut wait = RETRY.0;
    loop {
        match follow_host_endpoints(store.as_ref()).await {
            Ok(()) => {
                wait = RETRY.0;
                tokio::time::sleep(GATHER).await;
            }
            Err(error) => {
                tracing::warn!(%error, cause = ?std::error::Error::source(&error), retry_in = ?wait, "host endpoints are not looked after");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
        }
    }
}

/// One pass, and one for each change, until it is time to look at everything again.
async fn follow_host_endpoints(store: &dyn Datastore) -> Result<(), Error> {
    // Watched before everything is read, so that no change is missed in between.
    let from = store.list(Kind::Node, None).await;
    let from = from.map_err(Error::datastore("list nodes"))?.revision;
    let kinds = [
        Kind::Node,
        Kind::KubeControllersConfiguration,
        Kind::HostEndpoint,
    ];
    let watch = store.watch(&kinds, &from).await;
    let mut watch = watch.map_err(Error::datastore("watch nodes"))?;
    let until = Instant::now() + RECONCILE;
    let mut told = Vec::new();
    loop {
        let settings = Settings::read(store).await?;
        let plan = host_endpoints::pass(store, &settings.host_endpoints).await?;
        if !plan.put.is_empty() || !plan.delete.is_empty() {
            tracing::info!(
                written = plan.put.len(),
                deleted = plan.delete.len(),
                "host endpoints of nodes"
            );
        }
        if plan.problems != told {
            for problem in &plan.problems {
                tracing::warn!(problem, "automatic host endpoints");
            }
            told = plan.problems;
        }
        let left = until.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, watch.next()).await {
            // Bookmarks and our own writes come here, too: a pass that finds nothing writes nothing.
            Ok(Some(Ok(_))) => tokio::time::sleep(GATHER).await,
            Ok(Some(Err(_)) | None) | Err(_) => return Ok(()),
        }
        while let Ok(Some(Ok(_))) = tokio::time::timeout(Duration::ZERO, watch.next()).await {}
    }
}

/// Looks after the addresses of LoadBalancer services: when a service, a pool or the setting changes, and regularly.
async fn keep_services(store: Arc<dyn Datastore>) {
    let allocator = Allocator::for_load_balancers(Arc::clone(&store));
    let mut wait = RETRY.0;
    loop {
        match follow_services(&store, &allocator).await {
            Ok(()) => {
                wait = RETRY.0;
                tokio::time::sleep(GATHER).await;
            }
            Err(error) => {
                tracing::warn!(%error, cause = ?std::error::Error::source(&error), retry_in = ?wait, "addresses of services are not looked after");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
        }
    }
}

/// One pass, and one for each change, until it is time to look at everything again.
async fn follow_services(store: &Arc<dyn Datastore>, allocator: &Allocator) -> Result<(), Error> {
    // Watched before everything is read, so that no change is missed in between.
    let from = store.list(Kind::IPPool, None).await;
    let from = from.map_err(Error::datastore("list pools"))?.revision;
    let kinds = [
        Kind::K8sService,
        Kind::IPPool,
        Kind::KubeControllersConfiguration,
    ];
    let watch = store.watch(&kinds, &from).await;
    let mut watch = watch.map_err(Error::datastore("watch services"))?;
    let until = Instant::now() + RECONCILE;
    let mut told = BTreeMap::new();
    loop {
        let settings = Settings::read(store.as_ref()).await?;
        let done = load_balancer::pass(store, allocator, settings.assign_ips).await?;
        if done.taken + done.released + done.written > 0 {
            tracing::info!(
                taken = done.taken,
                released = done.released,
                written = done.written,
                "addresses of services"
            );
        }
        if done.problems != told {
            for (service, problem) in &done.problems {
                tracing::warn!(service, problem, "a service has no address");
            }
            told = done.problems;
        }
        let left = until.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, watch.next()).await {
            // Bookmarks and our own writes come here, too: a pass that finds nothing writes nothing.
            Ok(Some(Ok(_))) => tokio::time::sleep(GATHER).await,
            Ok(Some(Err(_)) | None) | Err(_) => return Ok(()),
        }
        while let Ok(Some(Ok(_))) = tokio::time::timeout(Duration::ZERO, watch.next()).await {}
    }
}

/// Collects garbage: regularly, and when a node is deleted.
async fn collect(store: Arc<dyn Datastore>) {
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
