//! Tells the datastore, after the runtime has been answered, which addresses a pod has: annotations on the Pod, or a
//! WorkloadEndpoint where there is no Pod. Tried until it succeeds or is overtaken by something newer for the same pod.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cali_api::kubernetes::{self, Pod, annotation};
use cali_api::v3::WorkloadEndpoint;
use cali_api::{AnyResource, Key, Kind};
use cali_datastore::{Datastore, Error, edit};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::pods::{Who, is_of, shows};

/// Waits between attempts after an error: doubled from the first to the last.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// What is to be told about a workload.
#[derive(Debug, Clone)]
pub(super) enum News {
    /// It has this endpoint.
    Up(Box<WorkloadEndpoint>),
    /// The endpoint of this sandbox is gone.
    Down { container_id: String },
}

/// The queue. Only the newest news of a workload is kept.
pub(super) struct Publisher {
    queue: Arc<Queue>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Queue {
    news: Mutex<BTreeMap<Who, News>>,
    wake: Notify,
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Who, News>> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Publisher {
    pub(super) fn start(store: Arc<dyn Datastore>, node: &str) -> Self {
        let queue = Arc::new(Queue::default());
        let task = tokio::spawn(run(store, node.to_owned(), Arc::clone(&queue)));
        Self { queue, task }
    }

    pub(super) fn tell(&self, who: Who, news: News) {
        self.queue.lock().insert(who, news);
        self.queue.wake.notify_one();
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run(store: Arc<dyn Datastore>, node: String, queue: Arc<Queue>) {
    let mut wait = RETRY.0;
    loop {
        let next = queue.lock().pop_first();
        let Some((who, news)) = next else {
            queue.wake.notified().await;
            continue;
        };
        match publish(store.as_ref(), &node, &who, &news).await {
            Ok(()) => wait = RETRY.0,
            Err(error) => {
                tracing::warn!(?who, error = %error, retry_in = ?wait, "the datastore does not show a pod's addresses yet");
                // Newer news that came meanwhile stay.
                queue.lock().entry(who).or_insert(news);
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(RETRY.1);
            }
        }
    }
}

async fn publish(store: &dyn Datastore, node: &str, who: &Who, news: &News) -> Result<(), Error> {
    match (who, news) {
        (Who::Pod { namespace, name }, news) => {
            let key = Key::namespaced(Kind::K8sPod, namespace.as_str(), name.as_str());
            annotate(store, &key, news).await
        }
        (Who::Container { .. }, News::Up(endpoint)) => {
            store.apply((**endpoint).clone().into()).await.map(|_| ())
        }
        (Who::Container { .. }, News::Down { container_id }) => {
            let key = who.endpoint_key(node);
            let found = match store.get(&key).await {
                Err(Error::NotFound { .. }) => return Ok(()),
                other => other?,
            };
            let of_another = matches!(found.object.as_ref(), AnyResource::WorkloadEndpoint(e) if e.spec.container_id != *container_id);
            if of_another {
                return Ok(());
            }
            match store.delete(&key, Some(&found.revision)).await {
                Err(Error::NotFound { .. }) => Ok(()),
                other => other.map(|_| ()),
            }
        }
    }
}

async fn annotate(store: &dyn Datastore, key: &Key, news: &News) -> Result<(), Error> {
    let told = edit(store, key, |pod: &mut Pod| tell(pod, news)).await;
    match told {
        // A pod that is gone needs no annotations.
        Err(Error::NotFound { .. }) => Ok(()),
        other => other.map(|_| ()),
    }
}

/// Puts the news on the pod; false if it shows them already or they are not of it.
fn tell(pod: &mut Pod, news: &News) -> bool {
    match news {
        News::Up(endpoint) => {
            let spec = &endpoint.spec;
            let annotations =
                kubernetes::address_annotations(&spec.ip_networks, &spec.container_id);
            if shows(pod, &annotations) {
                return false;
            }
            pod.metadata.annotations.extend(annotations);
        }
        News::Down { container_id } => {
            if !is_of(pod, container_id) {
                return false;
            }
            for name in [
                annotation::POD_IP,
                annotation::POD_IPS,
                annotation::CONTAINER_ID,
            ] {
                pod.metadata.annotations.remove(name);
            }
        }
    }
    true
}
