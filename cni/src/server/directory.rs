//! The pods of this node and the namespaces, followed all the time: an `ADD` asks nobody.
//!
//! What was learned stays while the datastore is away. A pod that is not known yet is waited for; after that the datastore
//! is asked once, in case it is the watch that is late.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cali_api::kubernetes::Pod;
use cali_api::{AnyResource, Key, Kind, StringMap};
use cali_control::cni::Failure;
use cali_datastore::{Datastore, Error, List, Versioned, WatchEvent, WatchStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::pods::{Known, Who};
use crate::spec::{code, failure, failure_of};

/// Waits between attempts to follow: doubled from the first to the last.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// Static pods: the kubelet's identity of a pod whose object in the API server has another one.
const MIRROR: &str = "kubernetes.io/config.mirror";

#[derive(Debug, Clone, Default)]
struct Namespace {
    annotations: StringMap,
    labels: StringMap,
}

#[derive(Debug, Default)]
struct View {
    pods: BTreeMap<(String, String), Pod>,
    namespaces: BTreeMap<String, Namespace>,
    /// Pods have been listed; namespaces have been listed.
    listed: (bool, bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Followed {
    Pods,
    Namespaces,
}

/// See the module's text.
pub(super) struct Directory {
    view: Arc<watch::Sender<View>>,
    store: Arc<dyn Datastore>,
    node: String,
    /// Once there are any: Kubernetes never changes them.
    pod_cidrs: OnceLock<Vec<String>>,
    _tasks: JoinSet<()>,
}

impl Directory {
    /// Begins to follow.
    pub(super) fn start(store: Arc<dyn Datastore>, node: &str) -> Self {
        let view = Arc::new(watch::Sender::new(View::default()));
        let mut tasks = JoinSet::new();
        for what in [Followed::Pods, Followed::Namespaces] {
            let follower = Follower {
                what,
                store: Arc::clone(&store),
                node: node.to_owned(),
                view: Arc::clone(&view),
            };
            tasks.spawn(follower.run());
        }
        Self {
            view,
            store,
            node: node.to_owned(),
            pod_cidrs: OnceLock::new(),
            _tasks: tasks,
        }
    }

    /// Waits until everything has been read once since the start.
    pub(super) async fn complete(&self) {
        let mut view = self.view.subscribe();
        // The sender lives as long as this object.
        let _ = view.wait_for(|view| view.listed == (true, true)).await;
    }

    /// What is known now of a pod of this node.
    pub(super) fn now(&self, namespace: &str, name: &str) -> Option<Known> {
        let key = (namespace.to_owned(), name.to_owned());
        let view = self.view.borrow();
        view.pods
            .get(&key)
            .map(|pod| view.known(namespace, pod.clone()))
    }

    /// The pod of this node whose interface on the host has this name.
    pub(super) fn pod_of_interface(&self, interface: &str) -> Option<Who> {
        let view = self.view.borrow();
        view.pods
            .keys()
            .map(|(namespace, name)| Who::Pod {
                namespace: namespace.clone(),
                name: name.clone(),
            })
            .find(|who| who.interface() == interface)
    }

    /// What is known of a workload; a pod that is not there yet is waited for. `uid` is the runtime's idea of the pod's
    /// identity: an earlier pod of the same name is not the one that is meant.
    pub(super) async fn known(
        &self,
        who: &Who,
        uid: Option<&str>,
        wait: Duration,
    ) -> Result<Known, Failure> {
        let Who::Pod { namespace, name } = who else {
            return Ok(Known::default());
        };
        let key = (namespace.clone(), name.clone());
        let mut changes = self.view.subscribe();
        let there = |view: &View| {
            view.pods.get(&key).is_some_and(|pod| is_meant(pod, uid))
                && (view.listed.1 || view.namespaces.contains_key(namespace))
        };
        let come = async {
            let view = changes.wait_for(there).await.ok()?;
            let pod = view.pods.get(&key)?.clone();
            Some(view.known(namespace, pod))
        };
        if let Ok(Some(known)) = tokio::time::timeout(wait, come).await {
            return Ok(known);
        }
        self.ask(namespace, name, uid, wait).await
    }

    /// The ranges that Kubernetes gave to this node. The datastore is asked until there are some.
    pub(super) async fn pod_cidrs(&self, wait: Duration) -> Result<Vec<String>, Failure> {
        if let Some(known) = self.pod_cidrs.get() {
            return Ok(known.clone());
        }
        let key = Key::cluster(Kind::K8sNode, self.node.as_str());
        let not_yet = || {
            let msg = format!(
                "node {} has no spec.podCIDRs in the datastore yet; try again",
                self.node
            );
            failure(code::TRY_AGAIN, msg)
        };
        let answer = tokio::time::timeout(wait, self.store.get(&key)).await;
        let found = answer.map_err(|_| not_yet())?.map_err(|e| {
            failure_of(
                code::TRY_AGAIN,
                format!("cannot read node {}", self.node),
                &e,
            )
        })?;
        let AnyResource::K8sNode(node) = found.object.as_ref() else {
            return Err(not_yet());
        };
        let ranges = match (&node.spec.pod_cidrs, &node.spec.pod_cidr) {
            (Some(ranges), _) if !ranges.is_empty() => ranges.clone(),
            (_, Some(range)) => vec![range.clone()],
            _ => Vec::new(),
        };
        if ranges.is_empty() {
            return Err(not_yet());
        }
        Ok(self.pod_cidrs.get_or_init(|| ranges).clone())
    }

    /// Asks the datastore, once.
    async fn ask(
        &self,
        namespace: &str,
        name: &str,
        uid: Option<&str>,
        wait: Duration,
    ) -> Result<Known, Failure> {
        let pod = Key::namespaced(Kind::K8sPod, namespace, name);
        let whole = Key::cluster(Kind::K8sNamespace, namespace);
        let both = async { (self.store.get(&pod).await, self.store.get(&whole).await) };
        let not_yet = |why: &str| {
            let msg =
                format!("pod {namespace}/{name} is not known on this node yet: {why}; try again");
            failure(code::TRY_AGAIN, msg)
        };
        let Ok((pod, whole)) = tokio::time::timeout(wait, both).await else {
            return Err(not_yet("the datastore does not answer"));
        };
        let away = |e: &Error| {
            let msg = format!("cannot read pod {namespace}/{name}");
            failure_of(code::TRY_AGAIN, msg, e)
        };
        let pod = match pod {
            Err(Error::NotFound { .. }) => return Err(not_yet("the datastore does not have it")),
            other => other.map_err(|e| away(&e))?,
        };
        let AnyResource::K8sPod(pod) = pod.object.as_ref() else {
            return Err(not_yet("the datastore has something else"));
        };
        let Some(on) = pod.spec.node_name.as_deref() else {
            return Err(not_yet("it is not scheduled"));
        };
        if on != self.node {
            let msg = format!(
                "pod {namespace}/{name} is scheduled to node {on:?}, this is {:?}",
                self.node
            );
            return Err(failure(code::POD, msg));
        }
        if !is_meant(pod, uid) {
            return Err(not_yet("the datastore has another one of the same name"));
        }
        let mut known = Known {
            pod: Some(pod.as_ref().clone()),
            ..Known::default()
        };
        match whole {
            Ok(found) => {
                known.namespace_annotations = found.object.metadata().annotations.clone();
                known.namespace_labels = found.object.labels().clone();
            }
            Err(Error::NotFound { .. }) => {}
            Err(e) => return Err(away(&e)),
        }
        Ok(known)
    }
}

/// The pod is the one that the runtime means.
fn is_meant(pod: &Pod, uid: Option<&str>) -> bool {
    let (Some(asked), Some(own)) = (uid, pod.metadata.uid.as_deref()) else {
        return true;
    };
    asked == own
        || pod
            .metadata
            .annotations
            .get(MIRROR)
            .is_some_and(|mirror| mirror == asked)
}

impl View {
    fn known(&self, namespace: &str, pod: Pod) -> Known {
        let namespace = self.namespaces.get(namespace).cloned().unwrap_or_default();
        Known {
            pod: Some(pod),
            namespace_annotations: namespace.annotations,
            namespace_labels: namespace.labels,
        }
    }

    fn put(&mut self, node: &str, object: &AnyResource) {
        match object {
            AnyResource::K8sPod(pod) if pod.spec.node_name.as_deref() == Some(node) => {
                self.pods.insert(place(&pod.key()), pod.as_ref().clone());
            }
            AnyResource::K8sNamespace(namespace) => {
                let known = Namespace {
                    annotations: namespace.metadata.annotations.clone(),
                    labels: object.labels().clone(),
                };
                self.namespaces
                    .insert(namespace.metadata.name.to_string(), known);
            }
            _ => {}
        }
    }

    fn remove(&mut self, key: &Key) {
        if key.kind == Kind::K8sPod {
            self.pods.remove(&place(key));
        } else {
            self.namespaces.remove(&*key.name);
        }
    }
}

fn place(key: &Key) -> (String, String) {
    let namespace = key.namespace.as_deref().unwrap_or_default();
    (namespace.to_owned(), key.name.to_string())
}

/// Keeps one half of the view.
struct Follower {
    what: Followed,
    store: Arc<dyn Datastore>,
    node: String,
    view: Arc<watch::Sender<View>>,
}

impl Follower {
    async fn run(self) {
        let mut wait = RETRY.0;
        loop {
            match self.once().await {
                // The revision is too old, or the watch has ended in order.
                Ok(()) | Err(Error::RevisionGone { .. }) => wait = RETRY.0,
                Err(error) => {
                    tracing::warn!(what = ?self.what, %error, retry_in = ?wait, "cannot follow; what is known stays");
                }
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY.1);
        }
    }

    async fn once(&self) -> Result<(), Error> {
        let list = self.list().await?;
        let from = list.revision.clone();
        self.view.send_modify(|view| self.take(view, &list.items));
        let mut events = self.watch(&from).await?;
        while let Some(event) = events.next().await {
            match event? {
                WatchEvent::Put(put) => {
                    self.view
                        .send_modify(|view| view.put(&self.node, &put.object));
                }
                WatchEvent::Deleted { key, .. } => self.view.send_modify(|view| view.remove(&key)),
                WatchEvent::Undecodable(_) | WatchEvent::Bookmark(_) => {}
            }
        }
        Ok(())
    }

    fn take(&self, view: &mut View, items: &[Versioned]) {
        match self.what {
            Followed::Pods => {
                view.pods.clear();
                view.listed.0 = true;
            }
            Followed::Namespaces => {
                view.namespaces.clear();
                view.listed.1 = true;
            }
        }
        for item in items {
            view.put(&self.node, &item.object);
        }
    }

    async fn list(&self) -> Result<List, Error> {
        match self.what {
            Followed::Pods => self.store.list_pods(&self.node).await,
            Followed::Namespaces => self.store.list(Kind::K8sNamespace, None).await,
        }
    }

    async fn watch(&self, from: &cali_api::Revision) -> Result<WatchStream, Error> {
        match self.what {
            Followed::Pods => self.store.watch_pods(&self.node, from).await,
            Followed::Namespaces => self.store.watch(&[Kind::K8sNamespace], from).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, mirror: Option<&str>) -> Pod {
        let mut pod = Pod::named("pod", cali_api::kubernetes::PodSpec::default());
        pod.metadata.uid = Some(uid.to_owned());
        if let Some(mirror) = mirror {
            let annotation = (MIRROR.to_owned(), mirror.to_owned());
            pod.metadata.annotations.extend([annotation]);
        }
        pod
    }

    #[test]
    fn an_earlier_pod_of_the_name_is_not_meant_but_the_mirror_of_a_static_one_is() {
        assert!(is_meant(&pod("a", None), Some("a")));
        assert!(is_meant(&pod("a", None), None), "a runtime may not say");
        assert!(!is_meant(&pod("a", None), Some("b")));
        assert!(is_meant(&pod("a", Some("b")), Some("b")));
    }
}
