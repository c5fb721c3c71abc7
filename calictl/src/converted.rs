//! Resources as the daemons see them: what is stored, and what native Kubernetes objects amount to.
//!
//! A stored resource hides a converted one of the same name, as in `cali_datastore::sync`.

use std::collections::BTreeMap;
use std::sync::Arc;

use cali_api::{AnyResource, Key, Kind, Revision, kubernetes};
use cali_datastore::{Datastore, Error, Undecodable};
use tokio::sync::mpsc;

/// Objects in one page of a list, at most.
const PAGE: usize = 10_000;

/// A part of a list.
pub(crate) struct Part {
    pub(crate) objects: Vec<Arc<AnyResource>>,
    /// What exists but cannot be read.
    pub(crate) undecodable: Vec<Undecodable>,
    /// That of the list.
    pub(crate) revision: Revision,
}

/// All resources of a kind, part by part: while one is printed, the next is read, and that is all that is held. Where native objects amount to resources of
/// the kind in a store that keeps resources of the kind, too, everything comes in one part.
pub(crate) async fn stream(
    store: Arc<dyn Datastore>,
    kind: Kind,
    namespace: Option<&str>,
) -> Result<mpsc::Receiver<Result<Part, Error>>, Error> {
    let native = converted(store.as_ref(), kind, namespace).await?;
    let namespace = namespace.map(str::to_owned);
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        if !native.is_empty() {
            let part = merged(store.as_ref(), kind, namespace.as_deref(), native).await;
            // The receiver is gone only when the command ends.
            let _ = sender.send(part).await;
            return;
        }
        let mut after = None;
        loop {
            let page = store
                .list_page(kind, namespace.as_deref(), after.as_ref(), PAGE)
                .await;
            let (part, next) = match page {
                Ok(page) => {
                    let objects = page.items.into_iter().map(|item| item.object);
                    let part = Part {
                        objects: objects.collect(),
                        undecodable: page.undecodable,
                        revision: page.revision,
                    };
                    (Ok(part), page.next)
                }
                Err(error) => (Err(error), None),
            };
            if sender.send(part).await.is_err() || next.is_none() {
                return;
            }
            after = next;
        }
    });
    Ok(receiver)
}

/// The native kinds that resources of this kind are made from.
fn sources(kind: Kind) -> &'static [Kind] {
    match kind {
        Kind::Profile => &[Kind::K8sNamespace, Kind::K8sServiceAccount],
        Kind::WorkloadEndpoint => &[Kind::K8sPod],
        Kind::NetworkPolicy => &[Kind::K8sNetworkPolicy],
        Kind::GlobalNetworkPolicy => &[
            Kind::K8sClusterNetworkPolicy,
            Kind::K8sAdminNetworkPolicy,
            Kind::K8sBaselineAdminNetworkPolicy,
        ],
        Kind::Node => &[Kind::K8sNode],
        _ => &[],
    }
}

/// All resources of a kind, in one namespace or in all, ordered by name.
pub(crate) async fn list(
    store: &dyn Datastore,
    kind: Kind,
    namespace: Option<&str>,
) -> Result<Vec<Arc<AnyResource>>, Error> {
    let native = converted(store, kind, namespace).await?;
    Ok(merged(store, kind, namespace, native).await?.objects)
}

/// What native objects amount to. Nothing in stores that show the kind as a view of them.
async fn converted(
    store: &dyn Datastore,
    kind: Kind,
    namespace: Option<&str>,
) -> Result<BTreeMap<Key, Arc<AnyResource>>, Error> {
    let mut found: BTreeMap<Key, Arc<AnyResource>> = BTreeMap::new();
    let sources = sources(kind).iter().filter(|_| store.is_stored(kind));
    for source in sources {
        // A cluster-scoped result may come from any namespace (the profile of a service account).
        let within = namespace.filter(|_| kind.is_namespaced());
        for item in store.list(*source, within).await?.items {
            let converted = kubernetes::to_calico(&item.object).into_iter();
            found.extend(
                converted
                    .filter(|object| object.kind() == kind)
                    .map(|object| (object.key(), Arc::new(object))),
            );
        }
    }
    Ok(found)
}

/// What is stored, over what native objects amount to.
async fn merged(
    store: &dyn Datastore,
    kind: Kind,
    namespace: Option<&str>,
    mut found: BTreeMap<Key, Arc<AnyResource>>,
) -> Result<Part, Error> {
    let list = store.list(kind, namespace).await?;
    for item in list.items {
        found.insert(item.object.key(), item.object);
    }
    Ok(Part {
        objects: found.into_values().collect(),
        undecodable: list.undecodable,
        revision: list.revision,
    })
}

/// One resource.
pub(crate) async fn get(store: &dyn Datastore, key: &Key) -> Result<Arc<AnyResource>, Error> {
    let missing = match store.get(key).await {
        Ok(found) => return Ok(found.object),
        Err(error @ Error::NotFound { .. }) if !sources(key.kind).is_empty() => error,
        Err(error) => return Err(error),
    };
    let all = list(store, key.kind, key.namespace.as_deref()).await?;
    all.into_iter()
        .find(|object| object.key() == *key)
        .ok_or(missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use cali_datastore::sqlite::Sqlite;
    use serde_json::json;

    #[tokio::test]
    async fn a_pod_is_listed_as_the_endpoint_it_amounts_to() {
        let folder = tempfile::tempdir().unwrap();
        let store = Sqlite::open(&folder.path().join("cali.db")).unwrap();
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "web", "namespace": "shop", "annotations": {"cni.projectcalico.org/podIP": "10.0.0.1/32"}},
            "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]},
        });
        store
            .apply(AnyResource::from_json(pod).unwrap())
            .await
            .unwrap();
        let endpoints = list(&store, Kind::WorkloadEndpoint, Some("shop"))
            .await
            .unwrap();
        assert_eq!(endpoints.len(), 1);
        assert!(
            list(&store, Kind::WorkloadEndpoint, Some("other"))
                .await
                .unwrap()
                .is_empty()
        );
        let key = endpoints[0].key();
        assert_eq!(get(&store, &key).await.unwrap(), endpoints[0]);
        let absent = Key::namespaced(Kind::WorkloadEndpoint, "shop", "absent");
        assert!(matches!(
            get(&store, &absent).await,
            Err(Error::NotFound { .. })
        ));
    }
}
