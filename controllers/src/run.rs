//! The loop of one replica: leads or waits, and works while it leads.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cali_api::Kind;
use cali_datastore::{Datastore, WatchEvent, WatchStream};
use cali_ipam::Allocator;

use crate::certificates::keep::Certificates;
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

/// Runs until `stop` is done; then the lease is given back. Certificates are looked after where it is said where they are.
pub async fn run(
    store: Arc<dyn Datastore>,
    lock: &dyn Lock,
    mut election: Election,
    certificates: Option<Certificates>,
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
                reign = Some(tokio::spawn(work(Arc::clone(&store), certificates.clone())));
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
async fn work(store: Arc<dyn Datastore>, certificates: Option<Certificates>) {
    let services = Services {
        allocator: Allocator::for_load_balancers(Arc::clone(&store)),
        told: BTreeMap::new(),
    };
    tokio::join!(
        collect(Arc::clone(&store)),
        look_after(Arc::clone(&store), HostEndpoints::default()),
        look_after(Arc::clone(&store), services),
        renew(store, certificates),
    );
}

/// Looks after certificates, where there are any.
async fn renew(store: Arc<dyn Datastore>, certificates: Option<Certificates>) {
    let Some(certificates) = certificates else {
        return;
    };
    let mut told = BTreeSet::new();
    let mut wait = RETRY.0;
    loop {
        let pause = match certificates.pass(&store).await {
            Ok(done) => {
                for note in done.notes.difference(&told) {
                    tracing::warn!(note, "certificates");
                }
                told = done.notes;
                wait = RETRY.0;
                certificates.pause()
            }
            Err(error) => {
                tracing::warn!(%error, cause = ?std::error::Error::source(&error), retry_in = ?wait, "certificates are not looked after");
                let pause = wait;
                wait = (wait * 2).min(RETRY.1);
                pause
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// What is brought to order at once, after each change of some kinds, and regularly.
trait Keeper {
    const WHAT: &'static str;
    const KINDS: &'static [Kind];

    /// Looks at everything, and changes what has to be changed.
    fn pass(
        &mut self,
        store: &Arc<dyn Datastore>,
    ) -> impl Future<Output = Result<(), Error>> + Send;
}

/// The host endpoints of nodes.
#[derive(Default)]
struct HostEndpoints {
    told: Vec<String>,
}

impl Keeper for HostEndpoints {
    const WHAT: &'static str = "host endpoints";
    const KINDS: &'static [Kind] = &[
        Kind::Node,
        Kind::KubeControllersConfiguration,
        Kind::HostEndpoint,
    ];

    async fn pass(&mut self, store: &Arc<dyn Datastore>) -> Result<(), Error> {
        let settings = Settings::read(store.as_ref()).await?;
        let plan = host_endpoints::pass(store.as_ref(), &settings.host_endpoints).await?;
        if !plan.put.is_empty() || !plan.delete.is_empty() {
            tracing::info!(
                written = plan.put.len(),
                deleted = plan.delete.len(),
                "host endpoints of nodes"
            );
        }
        if plan.problems != self.told {
            for problem in &plan.problems {
                tracing::warn!(problem, "automatic host endpoints");
            }
            self.told = plan.problems;
        }
        Ok(())
    }
}

/// The addresses of LoadBalancer services.
struct Services {
    allocator: Allocator,
    told: BTreeMap<String, String>,
}

impl Keeper for Services {
    const WHAT: &'static str = "addresses of services";
    const KINDS: &'static [Kind] = &[
        Kind::K8sService,
        Kind::IPPool,
        Kind::KubeControllersConfiguration,
    ];

    async fn pass(&mut self, store: &Arc<dyn Datastore>) -> Result<(), Error> {
        let settings = Settings::read(store.as_ref()).await?;
        let done = load_balancer::pass(store, &self.allocator, settings.assign_ips).await?;
        if done.taken + done.released + done.written > 0 {
            tracing::info!(
                taken = done.taken,
                released = done.released,
                written = done.written,
                "addresses of services"
            );
        }
        if done.problems != self.told {
            for (service, problem) in &done.problems {
                tracing::warn!(service, problem, "a service has no address");
            }
            self.told = done.problems;
        }
        Ok(())
    }
}

/// Does so for ever; after an error again, later and later.
async fn look_after<K: Keeper>(store: Arc<dyn Datastore>, mut keeper: K) {
    let mut wait = RETRY.0;
    loop {
        match follow(&store, &mut keeper).await {
            Ok(()) => {
                wait = RETRY.0;
                tokio::time::sleep(GATHER).await;
            }
            Err(error) => {
                tracing::warn!(what = K::WHAT, %error, cause = ?std::error::Error::source(&error), retry_in = ?wait, "not looked after");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
        }
    }
}

/// One pass, and one for each change, until it is time to look at everything again.
async fn follow<K: Keeper>(store: &Arc<dyn Datastore>, keeper: &mut K) -> Result<(), Error> {
    // Watched before everything is read, so that no change is missed in between.
    let from = store.list(Kind::KubeControllersConfiguration, None).await;
    let from = from.map_err(Error::datastore("list the settings"))?;
    let watch = store.watch(K::KINDS, &from.revision).await;
    let mut watch = watch.map_err(Error::datastore("watch for changes"))?;
    let until = Instant::now() + RECONCILE;
    loop {
        keeper.pass(store).await?;
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
